"""Streamed tokens a second over HTTP beside the bare graph: `make bench BENCH=streams`, about four minutes.

Each session is one generate, read as server-sent events; every token is committed before it is sent. The limit is a
loop over the same graph with the same batch, which draws nothing and keeps nothing. The peer is what everyone writes
first: FastAPI, a generator that calls the graph for its own session, and nothing kept.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

from benchmarks import pictures
from benchmarks.bare import Bare
from benchmarks.generator import measure, stream
from benchmarks.peers import start
from benchmarks.report import (
    PLOTS,
    Measured,
    Report,
    Rounds,
    Table,
    alternate,
    bundles_of,
    command,
    measured,
    numbers,
    parser,
)
from benchmarks.served import Served
from service.bundle import Bundle

GAP = "ms between arrivals, p99"


def sides_of(
    bundle: Bundle, precision: str, served: Served, peer: start.Peer, chosen: argparse.Namespace, rounds: Rounds
) -> dict[str, Measured]:
    """How each is measured."""
    bare, first = Bare(bundle, chosen.threads), itertools.count(0, 1000)

    def recurra(size: int) -> float:
        load = stream(bundle.manifest.name, size, first=next(first))
        phase = measure(served.port, load, chosen.seconds)
        rounds.add(f"{precision} {size}", GAP, phase.p99_ms)
        return phase.marks_per_s

    def simple(size: int) -> float:
        return measure(peer.port, start.stream(size, first=next(first)), chosen.seconds).marks_per_s

    return {"bare loop": lambda size: bare.steps_per_s(size, chosen.seconds), "recurra": recurra, "fastapi": simple}


def run(chosen: argparse.Namespace) -> Report:
    """Every precision in turn."""
    rounds, sizes, bundles = Rounds(), numbers(chosen.sessions), bundles_of(chosen)
    for precision, bundle in bundles.items():
        settings = {"store": chosen.store, "threads": chosen.threads}
        with (
            tempfile.TemporaryDirectory() as data,
            Served(chosen.models, Path(data), **settings) as served,
            start.Peer("simple", bundle, chosen.threads) as peer,
        ):
            sides = sides_of(bundle, precision, served, peer, chosen, rounds)
            alternate(rounds, precision, sizes, sides, chosen.rounds)
    rows = [row(rounds, precision, size) for precision in bundles for size in sizes]
    header = ["sessions", "Recurra", "bare loop", "of the bare loop", "FastAPI", "times FastAPI", GAP]
    title = f"Streamed tokens a second, store {chosen.store}, {chosen.threads} thread a call"
    shown = [draw(rounds, precision, sizes) for precision in bundles if chosen.markdown]
    return measured("streams", [Table(title, header, rows)], rounds, *shown)


def draw(rounds: Rounds, precision: str, sizes: list[int]) -> str:
    """Tokens a second as a picture; returns what shows it."""
    names = {"recurra": "Recurra", "bare loop": "bare loop", "fastapi": "FastAPI"}
    series = {name: [rounds.median(f"{precision} {size}", side) for size in sizes] for side, name in names.items()}
    path, groups = PLOTS / f"streams-{precision}.svg", [f"{size} session{'s' * (size > 1)}" for size in sizes]
    pictures.bars(path, f"tokens a second, {precision}", groups, series)
    return f"![tokens a second, {precision}](plots/{path.name})"


def row(rounds: Rounds, precision: str, size: int) -> list[str]:
    """A line of the table."""
    case = f"{precision} {size}"
    return [
        f"{size}, {precision}",
        f"{rounds.median(case, 'recurra'):,.0f}",
        f"{rounds.median(case, 'bare loop'):,.0f}",
        f"{rounds.ratio(case, 'recurra', 'bare loop'):.2f}",
        f"{rounds.median(case, 'fastapi'):,.0f}",
        f"{rounds.ratio(case, 'recurra', 'fastapi'):.1f}",
        f"{rounds.median(case, GAP):.2f}",
    ]


def options() -> argparse.ArgumentParser:
    """What it can be told."""
    made = parser(seconds=2.0, rounds=5)
    made.add_argument("--sessions", default="1,16,64")
    made.add_argument("--store", default="sqlite")
    made.add_argument("--threads", type=int, default=1)
    return made


if __name__ == "__main__":
    command(options(), run)
