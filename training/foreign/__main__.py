"""`python -m training.foreign inspect|add`, also mounted as `recurra inspect|add`: graphs that were made elsewhere."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from service.bundle import NAME_PATTERN
from training.foreign.add import add as publish_graph
from training.foreign.add import describe, look
from training.foreign.inspect import Findings
from training.foreign.spec import Spec, answer, read_spec
from training.foreign.trial import Unknown
from training.publish import ExportError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Graph = Annotated[Path, typer.Argument(help="An ONNX file.")]
SpecFile = Annotated[Path | None, typer.Option(help="A TOML file: the task, and answers in [graph].")]
Answers = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An answer, as constants.sr=16000.")
]


@app.callback()
def main() -> None:
    """Look at graphs that were made elsewhere, and publish them."""


@app.command()
def inspect(graph: Graph, spec: SpecFile = None, answers: Answers = None) -> None:
    """Find a graph's states and axes, try it, and write its manifest to standard output."""
    with suppress(BrokenPipeError):
        chosen, found = _asking(spec, answers or [], lambda chosen: look(graph, chosen))
        _tell(found)
        manifest = describe(found, chosen, _name_of(graph), 1, {"file": graph.name})
        typer.echo(manifest.model_dump_json(indent=2))


@app.command()
def add(
    graph: Graph,
    name: Annotated[str, typer.Option(help="The model's name in the service.")],
    spec: SpecFile = None,
    models: Annotated[Path, typer.Option(help="The folder that the service reads.")] = Path("models"),
    version: Annotated[int | None, typer.Option(help="The next free one, if not given.")] = None,
    answers: Answers = None,
) -> None:
    """Publish a graph as a bundle: with a spec as its task, without one as raw."""
    _, (path, found) = _asking(spec, answers or [], lambda chosen: publish_graph(graph, models, name, chosen, version))
    _tell(found)
    typer.echo(str(path))


def _asking(spec: Path | None, changes: list[str], act: Any) -> tuple[Spec, Any]:  # noqa: ANN401 (what act gives)
    """Act on the spec; on a terminal what can not be found is asked, elsewhere it is an error."""
    given: dict[str, Any] = {}
    while True:
        try:
            chosen = read_spec(spec, changes, given)
            return chosen, act(chosen)
        except Unknown as unknown:
            if not sys.stdin.isatty():
                _fail(str(unknown))
            given |= _ask(unknown.questions)
        except ExportError as error:
            _fail(str(error))


def _ask(questions: Mapping[str, str]) -> dict[str, Any]:
    asked = {key: answer(typer.prompt(text, err=True)) for key, text in questions.items()}
    typer.echo("to answer at once: " + " ".join(f"--set {key}={value}" for key, value in asked.items()), err=True)
    return asked


def _tell(found: Findings) -> None:
    """What was found, for people: standard output is for the result."""
    called = found.called
    for kind, tensors in (("input", called.inputs), ("output", called.outputs)):
        for one in tensors:
            typer.echo(f"{kind} {one.name!r}: {one.dtype} {list(one.axes)}, {list(one.row)} a step", err=True)
    for one, value in called.constants:
        typer.echo(f"constant {one.name!r}: {value}", err=True)
    for note in found.notes:
        typer.echo(note, err=True)


def _name_of(graph: Path) -> str:
    import re

    name = re.sub(r"[^a-z0-9._-]+", "-", graph.stem.lower()).lstrip("._-")[:64] or "model"
    assert re.fullmatch(NAME_PATTERN, name)
    return name


def _fail(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
