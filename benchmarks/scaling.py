"""What a step costs as the model and the load grow: `make bench BENCH=scaling`, about three minutes.

Hidden size, sessions in a batch, vocabulary, layers and steps a call grow in turn, the rest stays that of the
reference model. Each is measured on the bare graph and through the engine, in one process, with one thread a call:
the engine draws tokens, or takes sequences where the steps of a call grow. `--markdown` draws the plots.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save

from benchmarks import pictures
from benchmarks.bare import Bare
from benchmarks.inside import Inside
from benchmarks.report import PLOTS, Report, Rounds, Table, command, measured, parser
from benchmarks.served import say
from service.bundle import GOLDEN, GRAPH, Bundle, load
from training import export, graph
from training.model import ModelConfig, RecurrentModel
from training.publish import publish as published

REFERENCE = ModelConfig("language-model", "lstm", layers=2, hidden=512, embedding=256, vocabulary=128)
BARE, ENGINE = "bare graph", "engine"


@dataclass(frozen=True)
class Sweep:
    """What grows, and what it does to the model; the lines are batches."""

    name: str
    label: str
    values: tuple[int, ...]
    batches: tuple[int, ...] = (1, 16)
    change: Callable[[int], dict[str, Any]] = field(default=lambda value: {})

    def config(self, value: int) -> ModelConfig:
        """The model of a point."""
        return replace(REFERENCE, **self.change(value))


SWEEPS = (
    Sweep("hidden", "hidden size", (64, 128, 256, 512, 1024, 2048), change=lambda value: {"hidden": value}),
    Sweep("batch", "sessions in a batch", (1, 4, 16, 64, 256, 1024), batches=(0,)),
    Sweep(
        "vocabulary",
        "symbols of the vocabulary",
        (128, 1000, 10_000, 50_000),
        change=lambda value: {"vocabulary": value},
    ),
    Sweep("layers", "layers", (1, 2, 4, 8), change=lambda value: {"layers": value}),
    Sweep("chunk", "steps of a call", (1, 4, 16, 64, 256)),
)
"""a batch of 0: the value is the batch"""


def multiplications(config: ModelConfig) -> int:
    """Of one step of one session; a small vocabulary's inputs of the first layer are a table."""
    inside = 4 * config.hidden * config.hidden * (2 * config.layers - 1)
    entry = 0 if graph.folded(config) else 4 * config.hidden * config.embedding
    return inside + entry + config.hidden * config.vocabulary


def publish(config: ModelConfig, folder: Path) -> Bundle:
    """A bundle of random weights; the export's checks are left out, they take longer than what is measured here."""
    torch.manual_seed(0)
    module = RecurrentModel(config).eval()
    splitter = {"kind": "words", "lowercase": False}
    meta = {"input_kind": "symbols", "symbols": [f"w{i}" for i in range(config.vocabulary)], "splitter": splitter}
    onnx = graph.build(module).SerializeToString()
    manifest = export.describe(module, meta, "scaling", 1, {}, {})
    files = {GRAPH: onnx, GOLDEN: save(export.golden(module, onnx))}
    return load(published(folder / "scaling" / "1", manifest, files))


def measure_point(sweep: Sweep, value: int, bundle: Bundle, chosen: argparse.Namespace, rounds: Rounds) -> None:
    """Microseconds a step of a session, by batch: of the graph alone, and through the engine."""
    bare = Bare(bundle)
    for batch in sweep.batches:
        rows, steps = batch or value, value if sweep.name == "chunk" else 1
        with Inside(bundle, rows) as inside:
            for _ in range(chosen.rounds):
                graph_per_s = bare.steps_per_s(rows, chosen.seconds, steps)
                chunked = sweep.name == "chunk"
                per_s = (
                    inside.fed_per_s(chosen.seconds, steps)
                    if chunked
                    else inside.drawn_per_s(chosen.seconds, graph_per_s)
                )
                rounds.add(f"{sweep.name} {value}", line(BARE, batch), 1e6 / graph_per_s)
                rounds.add(f"{sweep.name} {value}", line(ENGINE, batch), 1e6 / per_s)


def line(side: str, batch: int) -> str:
    """The name of a line of a plot."""
    return f"{side}, {batch} session{'s' * (batch > 1)}" if batch else side


def lines_of(sweep: Sweep) -> list[str]:
    """All lines of a plot."""
    return [line(side, batch) for batch in sweep.batches for side in (BARE, ENGINE)]


def run_sweep(sweep: Sweep, chosen: argparse.Namespace, rounds: Rounds) -> None:
    """All points; where the model stays the same it is published once."""
    published: dict[ModelConfig, Bundle] = {}
    with tempfile.TemporaryDirectory() as folder:
        for value in sweep.values:
            config = sweep.config(value)
            if config not in published:
                published[config] = publish(config, Path(folder) / str(value))
            measure_point(sweep, value, published[config], chosen, rounds)
            costs = {name: round(rounds.last(f"{sweep.name} {value}", name), 1) for name in lines_of(sweep)}
            say(f"{sweep.name} {value}: microseconds a step {costs}")


def one_table(sweep: Sweep, rounds: Rounds) -> Table:
    """A row a value."""
    rows = []
    for value in sweep.values:
        costs = [f"{rounds.median(f'{sweep.name} {value}', name):.1f}" for name in lines_of(sweep)]
        rows.append([f"{value:,}", f"{multiplications(sweep.config(value)) / 1e6:.2f}", *costs])
    header = [sweep.label, "million multiplications a step", *lines_of(sweep)]
    return Table(f"Microseconds a step of one session by {sweep.label}", header, rows)


def draw(sweep: Sweep, rounds: Rounds) -> str:
    """The table as a picture; returns what shows it."""
    series = {
        name: [rounds.median(f"{sweep.name} {value}", name) for value in sweep.values] for name in lines_of(sweep)
    }
    path = PLOTS / f"scaling-{sweep.name}.svg"
    pictures.lines(path, sweep.label, "microseconds a step", sweep.values, series)
    return f"![{sweep.label}](plots/{path.name})"


def run(chosen: argparse.Namespace) -> Report:
    """Every sweep in turn."""
    rounds, names = Rounds(), chosen.sweeps.split(",")
    sweeps = [sweep for sweep in SWEEPS if sweep.name in names]
    for sweep in sweeps:
        run_sweep(sweep, chosen, rounds)
    shown = [draw(sweep, rounds) for sweep in sweeps if chosen.markdown]
    return measured("scaling", [one_table(sweep, rounds) for sweep in sweeps], rounds, *shown)


def options() -> argparse.ArgumentParser:
    """What it can be told."""
    made = parser(seconds=0.3, rounds=3)
    made.add_argument("--sweeps", default=",".join(sweep.name for sweep in SWEEPS))
    return made


if __name__ == "__main__":
    command(options(), run)
