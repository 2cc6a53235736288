"""`python -m training train|evaluate|backtest|sample|look|lecture|export`, also mounted as `recurra train|...`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from service.bundle import MAX_WINDOW, Window, load
from training import loop
from training.backtest import backtest_run
from training.calibrate import calibrate_run, cross
from training.checkpoint import CheckpointError, load_model
from training.config import RecipeError, read_recipe, recipe_from, recipe_names
from training.corpora import OWN, load_corpus
from training.data import DataError
from training.evaluate import evaluate_run
from training.job import Job, prepare
from training.processes import Group, together
from training.report import Report, board
from training.run import NonFiniteError
from training.sample import AHEAD, labels_shown, notes_shown, roll, sample_text, values_shown

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Cache = Annotated[Path, typer.Option(help="Where fetched source archives are kept.")]
RunFolder = Annotated[Path, typer.Argument(help="The folder that `train --out` wrote.")]
CACHE = Path(".cache")


@app.callback()
def main() -> None:
    """Train, evaluate, sample and export recurrent models."""


@app.command()
def train(
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a path to a .toml file.")] = "",
    out: Annotated[Path | None, typer.Option(help="The run's folder (runs/<recipe>); nothing else is written.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Your own .txt, .csv, .parquet or .tsv (pairs), or a folder of WAV files.")
    ] = None,
    time: Annotated[str, typer.Option(help="CSV: the column of times; rows are sorted by it.")] = "",
    target: Annotated[list[str] | None, typer.Option(help="CSV: a column to forecast; may be repeated.")] = None,
    horizon: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Forecast so many steps ahead; may be repeated, all are said at once."),
    ] = None,
    series: Annotated[str, typer.Option(help="CSV: the column of entities; state and split are per entity.")] = "",
    label: Annotated[str, typer.Option(help="CSV: the column of labels to classify into, row by row.")] = "",
    tokens: Annotated[str, typer.Option(help="Text: characters, bytes, or bpe.")] = "",
    max_minutes: Annotated[float | None, typer.Option(help="Stop then; the schedule follows the clock.")] = None,
    seed: Annotated[int | None, typer.Option(help="For weights, order and dropout.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu (a resumed run is exact), cuda or mps.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto (bf16 where it is faster), fp32 or bf16.")] = None,
    tbptt: Annotated[
        int | None, typer.Option(help="Steps a gradient reaches back (0: all); the state reaches further.")
    ] = None,
    accumulate: Annotated[int | None, typer.Option(help="Parts a batch is learnt from in: less memory.")] = None,
    average: Annotated[float | None, typer.Option(help="Export a running mean of the weights: 0.999.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many evaluations without a better one.")] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Begin with the best weights of another run's folder (fine-tuning).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key, e.g. model.hidden=512.")
    ] = None,
    evaluation: Annotated[bool, typer.Option(help="Score the test part at the end.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but the figures, as JSON, and errors.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Curves for TensorBoard, in --out.")] = False,
    log_json: Annotated[
        str, typer.Option(metavar="FILE|-", help="A line of JSON an evaluation; with -, all that is said, to stdout.")
    ] = "",
    cache: Cache = CACHE,
) -> None:
    """Train a model by a recipe, or on your own file; Ctrl-C saves, --resume goes on.

    Cells and regularisation are keys of the recipe: model.cell (rnn, rnn-relu, leaky, gru, lstm), model.skip,
    model.norm, model.tied, model.dropout, model.input_dropout, model.weight_dropout, model.locked, model.start,
    model.chrono, model.forget_bias, model.alpha, model.bidirectional.

    `torchrun --nproc-per-node 2 -m training train ...` learns in two processes, each from half the rows of a batch.
    """
    flags = {
        "train.max_minutes": max_minutes,
        "train.seed": seed,
        "train.threads": threads,
        "train.device": device,
        "train.precision": precision,
        "train.steps": tbptt,
        "train.accumulate": accumulate,
        "train.average": average,
        "train.patience": patience,
        "train.tensorboard": tensorboard or None,
    }
    changes = data_changes(data, time, target or [], series, label, horizon or [], tokens)
    changes += [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    json_lines = log_json == "-"
    with plain_errors(), together() as group:
        name = recipe or default_recipe(data, label)
        chosen = recipe_from(own_file(read_recipe(name), data), [*changes, *(overrides or [])])
        torch.set_num_threads(chosen.train.threads)
        with group.leader_first():
            job = prepare(
                chosen, cache, "python -m training " + shlex.join(sys.argv[1:]), None if resume else init_from
            )
        folder = out or Path("runs") / chosen.name
        log = Path(log_json) if log_json and not json_lines and group.leads else None
        curves = board(folder) if job.recipe.train.tensorboard and group.leads else None
        report = Report(job.task.unit, quiet=quiet or not group.leads, log_json=json_lines, log=log, board=curves)
        say = silent if quiet or json_lines else typer.echo
        ended = run(job, folder, report, resume, group)
        if job.model.config.quantiles and group.leads:
            steps = calibrate_run(folder, job.corpus, cross(folder, job, cache, say) if ended else [])
            say(f"quantiles {f'calibrated on {steps:,}' if steps else 'not calibrated: too few'} held-out steps")
        if evaluation and group.leads:
            say(f"scoring the test part, {sum(map(len, job.corpus.test)):,} steps")
            show_metrics(evaluate_run(folder, cache), quiet=quiet or json_lines)


def silent(_text: str) -> None:
    """In place of typer.echo, where nobody wants to be told."""


def run(job: Job, out: Path, report: Report, resume: bool, group: Group) -> bool:
    """Say what is about to be learnt, learn it, say how it ended; returns whether no signal stopped it."""
    recipe = job.recipe
    parameters = sum(parameter.numel() for parameter in job.model.parameters())
    for note in job.corpus.notes:
        report.event("note", note, {"text": note})
    steps = sum(map(len, job.corpus.train))
    report.event(
        "start",
        f"{recipe.name}: {recipe.model.layers} x {recipe.model.hidden} {recipe.model.cell}, {parameters:,} parameters,"
        f" {steps:,} steps to learn from, {job.batches.per_epoch():,} batches an epoch, on {recipe.train.device} in"
        f" {recipe.train.precision}, into {out}",
        {"recipe": recipe.to_json(), "parameters": parameters, "steps": steps, "out": str(out)},
    )
    out.mkdir(parents=True, exist_ok=True)
    try:
        progress = loop.train(job, out, report, resume=resume, group=group)
    finally:
        report.close()
    if not group.leads:
        return progress.ended
    report.event(
        "end",
        f"{progress.step} steps in {progress.minutes:.1f} min, best {progress.best:.4f} {job.task.unit}"
        f" at step {progress.best_step}, gradient clipped in {progress.clipped / max(1, progress.step):.0%} of steps",
        vars(progress),
    )
    return progress.ended


@app.command()
def evaluate(run: RunFolder, cache: Cache = CACHE, threads: Annotated[int, typer.Option()] = 1) -> None:
    """Score a run on its test part beside the baselines; the last line is JSON."""
    torch.set_num_threads(threads)
    with plain_errors():
        show_metrics(evaluate_run(run, cache))


@app.command()
def backtest(
    run: RunFolder,
    horizon: Annotated[int, typer.Option(min=1, max=10_000, help="Steps ahead.")] = 1,
    data: Annotated[Path | None, typer.Option(help="Another file with the same columns; all of it is scored.")] = None,
    cache: Cache = CACHE,
    threads: Annotated[int, typer.Option()] = 1,
) -> None:
    """Score a forecaster's forecasts from every step, in one streamed pass; the last line is JSON."""
    torch.set_num_threads(threads)
    with plain_errors():
        show_metrics(backtest_run(run, cache, horizon, data))


@app.command()
def sample(
    run: RunFolder,
    prompt: Annotated[str, typer.Option(help="Text models: what comes before.")] = "",
    length: Annotated[int | None, typer.Option(min=1, max=1_000_000, help="Characters, or steps.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest symbol.")] = 0.7,
    seed: Annotated[int, typer.Option()] = 0,
    cache: Cache = CACHE,
) -> None:
    """Text from a language model, a rolled forecast, or labels: whatever the run's model says."""
    with plain_errors():
        model, meta = load_model(run)
        if meta["task"] == "language-model":
            typer.echo(prompt + sample_text(model, meta, prompt, length or 300, temperature, seed))
            return
        corpus = load_corpus(recipe_from(meta["recipe"]), cache)
        shows = {"classifier": labels_shown, "multi-label": notes_shown, "regressor": values_shown}
        if meta["task"] in shows:
            typer.echo(shows[meta["task"]](model, corpus, corpus.test[0], length or 24))
            return
        table = Table("step", *corpus.target_names, title=f"{corpus.test[0].name}, after the last row")
        for i, row in enumerate(roll(model, corpus.test[0].inputs, length or AHEAD).tolist()):
            table.add_row(str(i + 1), *(f"{value:.2f}" for value in row))
        Console().print(table)


@app.command()
def export(
    name: Annotated[str, typer.Option(help="The model's name in the service.")],
    run: Annotated[Path | None, typer.Argument(help="The folder that `train --out` wrote.")] = None,
    models: Annotated[Path, typer.Option(help="The folder that the service reads.")] = Path("models"),
    version: Annotated[int | None, typer.Option(help="The next free one, if not given.")] = None,
    example: Annotated[str | None, typer.Option(help="What the model card's calls feed: a text, or JSON.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Products with the state in int8: smaller, faster.")] = False,
    int8_bound: Annotated[float, typer.Option(help="Percent that int8 may lose on the validation part.")] = 0.5,
    weights: Annotated[Path | None, typer.Option(help="Instead of a run: your own .safetensors or .pt file.")] = None,
    spec: Annotated[
        Path | None, typer.Option(help="What your weights are: a .toml file (docs/own-weights.md).")
    ] = None,
    check: Annotated[Path | None, typer.Option(help="Inputs and outputs of your own module: an .npz file.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Labelled sequences, .npz or .csv: measures both kinds of memory.")
    ] = None,
    cache: Cache = CACHE,
) -> None:
    """Write a run's best model, or your own weights, as a checked ONNX bundle."""
    from training.export import Int8, export_run  # onnx loads slowly and only this command needs it
    from training.publish import ExportError

    quantised = Int8(int8_bound, cache) if int8 else None
    try:
        with plain_errors():
            if run is not None and weights is None:
                path = export_run(run, models, name, version, example, quantised)
            elif run is None and weights is not None and spec is not None:
                given = {"version": version, "check": check, "data": data, "int8": quantised, "example": example}
                path = export_own(weights, spec, name=name, models=models, **given)
            else:
                fail("give a run's folder, or --weights and --spec")
            if int8:
                show_loss(load(path).manifest.metrics["int8"])
            typer.echo(str(path))
    except ExportError as error:
        fail(str(error))


def export_own(weights: Path, spec: Path, **options: Any) -> Path:  # noqa: ANN401 (those of training.export.export)
    """Publish somebody's own weights; asks for the memory where the spec does not say it and somebody can answer."""
    from training.export import export, measure_memory
    from training.spec import read_spec

    said = read_spec(spec)
    if said.memory is None and sys.stdin.isatty():
        if options["data"] is not None:
            show_memory(measure_memory(weights, said, options["data"]))
        said = said.model_copy(update={"memory": ask_memory()})
    path = export(weights, said, command="python -m training " + shlex.join(sys.argv[1:]), **options)
    manifest = load(path).manifest
    if "memory" in manifest.metrics:
        show_memory(manifest.metrics["memory"])
    if (pairs := manifest.checks.get("pairs")) is not None:
        sizes = f"{pairs['sequences']} sequences of {pairs['steps']} steps"
        typer.echo(f"agrees with your module to {pairs['greatest']:.1e} over {sizes}", err=True)
    return path


def ask_memory() -> Literal["carried"] | Window:
    """Which memory the network was trained for."""
    question = (
        "Was the network trained with its state carried from one sequence to the next, or on windows of a fixed length "
        "that begin at zero? carried, or the window's length"
    )
    while True:
        typer.echo(f"{question}: ", err=True, nl=False)  # standard output is for the bundle's path
        answer = sys.stdin.readline()
        if answer.strip() == "carried":
            return "carried"
        if answer.strip().isdecimal() and 1 <= int(answer) <= MAX_WINDOW:
            return Window(window=int(answer))
        if not answer:
            fail("memory: nothing was answered")


def show_memory(metrics: dict[str, dict[str, float]]) -> None:
    """The figure with the memory carried on, and from windows."""
    for memory, figures in metrics.items():
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        typer.echo(f"memory {memory}: {shown}", err=True)
    if len({str(figures) for figures in metrics.values()}) == 1:
        typer.echo("all alike: are the sequences longer than the window?", err=True)


@app.command()
def look(
    run: RunFolder,
    text: Annotated[str, typer.Option(help="Text models: what the gates are shown over.")] = "",
    cache: Cache = CACHE,
    threads: Annotated[int, typer.Option()] = 1,
) -> None:
    """Pictures of a run in its plots/: how it learnt, what its memory does, what it says; the last line is JSON."""
    from training.look.views import look as views

    torch.set_num_threads(threads)
    figures = {}
    with plain_errors():
        for name, view in views(run, cache, text):
            figures[name] = view.figures
            typer.echo(view.text)
    typer.echo(json.dumps(figures, ensure_ascii=False))


@app.command()
def lecture(
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: minutes, not the figures of the page.")] = False,
    long: Annotated[bool, typer.Option("--long", help="The adding problem up to T = 600: hours.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="An experiment; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where figures go (docs/plots; none with --quick).")] = None,
    seed: Annotated[int, typer.Option()] = 1,
    models: Annotated[Path, typer.Option(help="The folder of the shipped models.")] = Path("models"),
    cache: Cache = CACHE,
    threads: Annotated[int, typer.Option()] = 1,
) -> None:
    """What is taught about recurrent networks, each claim as an experiment; the last line is JSON."""
    from training.lecture.experiments import EXPERIMENTS, lecture
    from training.lecture.finding import Setting

    unknown = set(only or []) - EXPERIMENTS.keys()
    if unknown:
        fail(f"no experiment {min(unknown)!r}; there are {', '.join(EXPERIMENTS)}")
    torch.set_num_threads(threads)
    plots = out or (None if quick else Path("docs/plots"))
    setting = Setting(quick=quick, long=long, seed=seed, models=models, cache=cache, plots=plots)
    found = {}
    with plain_errors():
        for name, finding in lecture(setting, only or []):
            found[name] = vars(finding)
            show_finding(name, finding.claim, finding.holds, finding.figures, finding.notes)
    typer.echo(json.dumps(found, ensure_ascii=False))


def show_finding(name: str, claim: str, holds: bool, figures: dict[str, float], notes: list[str]) -> None:
    """One experiment as a table."""
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False, markup=False)
    console.print(f"{name}: {claim}. {'It holds.' if holds else 'It does not hold here.'}")
    table = Table("", "", box=SIMPLE_HEAD, show_header=False)
    for figure, value in figures.items():
        table.add_row(figure, f"{value:,.4g}")
    console.print(table)
    for note in notes:
        console.print(f"  {note}\n")


@app.command()
def recipes() -> None:
    """The recipes that come with the package."""
    typer.echo("\n".join(recipe_names()))


def data_changes(
    data: Path | None, time: str, target: list[str], series: str, label: str, horizon: list[int], tokens: str
) -> list[str]:
    """The overrides that the data flags stand for."""
    changes: dict[str, Any] = {"data.time": time, "data.targets": target, "data.series": series, "data.label": label}
    changes |= {"data.horizons": sorted(set(horizon)), "data.tokens": tokens}
    if data is not None:
        changes["data.path"] = str(data)
    return [f"{key}={json.dumps(value)}" for key, value in changes.items() if value]


def own_file(recipe: dict[str, Any], data: Path | None) -> dict[str, Any]:
    """The recipe with one's own data in place of those that it would fetch; what reads a file goes on doing so."""
    if data is not None and data.is_dir():
        return {**recipe, "data": {**recipe.get("data", {}), "source": "sounds"}}
    if data is None or recipe.get("data", {}).get("source") in OWN:
        return recipe
    return {**recipe, "data": {**recipe.get("data", {}), "source": "file"}}


def default_recipe(data: Path | None, label: str) -> str:
    """The recipe for one's own file: by its kind."""
    if data is None:
        raise RecipeError(f"give --recipe ({', '.join(recipe_names())}) or --data with a .txt or .csv file")
    if data.is_dir():
        return "sounds"
    if data.suffix in (".csv", ".parquet"):
        return "labels" if label else "series"
    return "pairs" if data.suffix == ".tsv" else "text"


def show_loss(loss: dict[str, Any]) -> None:
    """What int8 cost, for people: standard output is for the bundle's path."""
    for figure, value in loss["validation"].items():
        typer.echo(f"{figure}: {value['float32']:.6g} in float32, {value['int8']:.6g} in int8", err=True)
    typer.echo(f"int8 loses {loss['lost_percent']:.3g} %, at most {loss['bound_percent']:g} % was allowed", err=True)


def show_metrics(metrics: dict[str, Any], *, quiet: bool = False) -> None:
    """A table for people and, as the last line, JSON for machines."""
    if not quiet:
        terminal = sys.stdout.isatty()
        console = Console(width=None if terminal else 110)
        for title, rows in tables(metrics):
            table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", padding=(0, 1))
            names = list(dict.fromkeys(name for row in rows.values() for name in row))
            table.add_column("", no_wrap=True)
            for name in names:
                table.add_column(name, justify="right", overflow="fold")
            for title_of_row, row in rows.items():
                table.add_row(title_of_row, *(_cell(row.get(name)) for name in names))
            console.print(table)
        for line in metrics.get("baseline_wins", ()):
            typer.echo(f"a baseline wins: {line}")
    typer.echo(json.dumps(metrics, ensure_ascii=False))


def tables(metrics: dict[str, Any]) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """The figures as titled tables: row name -> column name -> value."""
    plain = {key: {"": value} for key, value in metrics.items() if isinstance(value, float | int)}
    if plain:
        yield metrics["unit"], plain
    squared = "mean squared error of the mean output, in the data's units"
    for key, title in (("by_entity", metrics["unit"]), ("squared_error", squared)):
        if key in metrics:
            entities = metrics[key].items()
            yield title, {f"{entity} {name}": row for entity, rows in entities for name, row in rows.items()}
    if "interval" in metrics:
        said = metrics["interval"]
        yield f"covered by the {said['nominal']:.0%} interval", said["covered"]
        if "covered_before_calibration" in said:
            yield "covered before calibration", said["covered_before_calibration"]
    if "by_share_seen" in metrics:
        yield "by the share of a sequence that was seen", metrics["by_share_seen"]
    if "by_distance" in metrics:
        yield "right, by the words in between", metrics["by_distance"]
    if "by_text" in metrics:
        yield metrics["unit"], {name: {"": value} for name, value in metrics["by_text"].items()}


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) >= 0.01 or not value else f"{value:.3g}"
    return "" if value is None else f"{value:,}"


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that users can mend are one line, not a traceback."""
    try:
        yield
    except (RecipeError, DataError, CheckpointError, NonFiniteError) as error:
        fail(str(error))
    except OSError as error:
        if not (error.errno and error.filename):
            raise
        fail(f"{error.filename}: {error.strerror}; make room on the disk or give a place that may be written, --out")


def fail(message: str) -> None:
    """Print to standard error and exit with 1."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
