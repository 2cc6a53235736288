"""`recurra`: one command for both sides; each loads only what it needs, so serving never loads torch."""

from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Recurrent networks that keep remembering: serve them, or train and export them.",
)

keys = typer.Typer(no_args_is_help=True, help="API keys for RECURRA_API_KEYS_FILE.")
app.add_typer(keys, name="keys")

FOR_TRAINING = {"torch", "onnx", "matplotlib"}
FOREIGN = {"inspect", "add"}
PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command()
def serve() -> None:
    """Serve the models; the settings are environment variables, RECURRA_..."""
    from service.__main__ import main as run_service

    raise typer.Exit(run_service())


@keys.command("new")
def new_key(
    tenant: Annotated[str, typer.Argument(help="whose it is: small letters, digits, dots, dashes")],
    scope: Annotated[str, typer.Option(help="use, admin (also reload, load, unload, metrics) or metrics")] = "use",
    days: Annotated[int | None, typer.Option(min=1, max=36_500, help="until it expires; default: never")] = None,
) -> None:
    """Make a key: it is shown once on standard error, its line for the file goes to standard output."""
    from datetime import UTC, datetime, timedelta

    from service.api.auth import SCOPES, make_key

    if scope not in SCOPES:
        raise typer.BadParameter(f"one of {', '.join(SCOPES)}", param_hint="--scope")
    try:
        key, line = make_key(tenant, scope, datetime.now(UTC) + timedelta(days=days) if days is not None else None)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="TENANT") from error
    typer.echo(f"the key, which is not kept anywhere:\n  {key}\nits line for RECURRA_API_KEYS_FILE:", err=True)
    typer.echo(line)


@app.command(context_settings=PASSED_ON)
def train(context: typer.Context) -> None:
    """Train a model by a recipe, or on your own file."""
    hand_over("train", context.args)


@app.command(context_settings=PASSED_ON)
def evaluate(context: typer.Context) -> None:
    """Score a run on its test part beside the baselines."""
    hand_over("evaluate", context.args)


@app.command(context_settings=PASSED_ON)
def backtest(context: typer.Context) -> None:
    """Score a forecaster from every step of a series, in one streamed pass."""
    hand_over("backtest", context.args)


@app.command(context_settings=PASSED_ON)
def sample(context: typer.Context) -> None:
    """Show what a run's model says."""
    hand_over("sample", context.args)


@app.command(context_settings=PASSED_ON)
def look(context: typer.Context) -> None:
    """Draw how a run learnt, what its memory does and what it says."""
    hand_over("look", context.args)


@app.command(context_settings=PASSED_ON)
def lecture(context: typer.Context) -> None:
    """Show each claim about recurrent networks as a small experiment."""
    hand_over("lecture", context.args)


@app.command(context_settings=PASSED_ON)
def export(context: typer.Context) -> None:
    """Publish a run's best model as a checked bundle."""
    hand_over("export", context.args)


@app.command(context_settings=PASSED_ON)
def recipes(context: typer.Context) -> None:
    """List the recipes that come with the package."""
    hand_over("recipes", context.args)


@app.command(context_settings=PASSED_ON)
def inspect(context: typer.Context) -> None:
    """Find out what an ONNX file is: its states, its axes, how it may be called."""
    hand_over("inspect", context.args)


@app.command(context_settings=PASSED_ON)
def add(context: typer.Context) -> None:
    """Publish an ONNX file that was made elsewhere as a bundle."""
    hand_over("add", context.args)


def hand_over(command: str, arguments: list[str]) -> None:
    """Run a command of `python -m training`, or of training.foreign; exits with its status, or says what to install."""
    try:
        if command in FOREIGN:
            from training.foreign.__main__ import app as training
        else:
            from training.__main__ import app as training
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in FOR_TRAINING:
            raise
        typer.echo(f"recurra {command} needs {error.name}: pip install -e '.[training]'", err=True)
        raise typer.Exit(1) from None
    training([command, *arguments], prog_name="recurra")


def main() -> None:
    """The console script."""
    app(prog_name="recurra")


if __name__ == "__main__":
    main()
