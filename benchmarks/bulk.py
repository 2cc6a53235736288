"""Many sessions in one request, NDJSON, beside the bare graph: `make bench BENCH=bulk`, about four minutes.

Each request feeds one step to each of 1,024 sessions; each connection sends its next request when the last one is
answered. The limit is a loop over the same graph with the greatest batch that the service may make. The peer is a
FastAPI route that takes the same lines, makes one batch of them, and keeps nothing.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

from benchmarks.bare import Bare
from benchmarks.generator import Load, bulk, measure
from benchmarks.peers import start
from benchmarks.report import Measured, Report, Rounds, Table, alternate, bundles_of, command, measured, numbers, parser
from benchmarks.served import Served
from service.bundle import Bundle


def sides_of(
    bundle: Bundle, precision: str, served: Served, peer: start.Peer, chosen: argparse.Namespace, rounds: Rounds
) -> dict[str, Measured]:
    """How each is measured."""
    bare, name, first = Bare(bundle, chosen.threads), bundle.manifest.name, itertools.count(0, 10 * chosen.lines)

    def lines_per_s(size: int, side: str, port: int, load: Load) -> float:
        phase = measure(port, load, chosen.seconds)
        rounds.add(f"{precision} {size}", f"{side} ms", phase.p50_ms)
        return phase.marks_per_s

    def recurra(size: int) -> float:
        load = bulk(name, chosen.lines, size, first=next(first), vocabulary=chosen.vocabulary)
        return lines_per_s(size, "recurra", served.port, load)

    def batcher(size: int) -> float:
        load = start.bulk(chosen.lines, size, first=next(first), vocabulary=chosen.vocabulary)
        return lines_per_s(size, "fastapi", peer.port, load)

    limit = f"bare loop, {chosen.max_batch} rows"
    return {
        limit: lambda size: bare.steps_per_s(chosen.max_batch, chosen.seconds),
        "recurra": recurra,
        "fastapi": batcher,
    }


def run(chosen: argparse.Namespace) -> Report:
    """Every precision in turn."""
    rounds, sizes, bundles = Rounds(), numbers(chosen.connections), bundles_of(chosen)
    for precision, bundle in bundles.items():
        settings = {"store": chosen.store, "threads": chosen.threads, "max_batch": chosen.max_batch}
        with (
            tempfile.TemporaryDirectory() as data,
            Served(chosen.models, Path(data), **settings) as served,
            start.Peer("batcher", bundle, chosen.threads) as peer,
        ):
            sides = sides_of(bundle, precision, served, peer, chosen, rounds)
            alternate(rounds, precision, sizes, sides, chosen.rounds)
    limit = f"bare loop, {chosen.max_batch} rows"
    rows = [row(rounds, f"{precision} {size}", limit) for precision in bundles for size in sizes]
    header = ["connections", "Recurra", limit, "of the bare loop", "FastAPI", "times FastAPI", "ms a request"]
    title = f"Steps a second, {chosen.lines:,} sessions a request, store {chosen.store}, {chosen.threads} thread a call"
    return measured("bulk", [Table(title, header, rows)], rounds)


def row(rounds: Rounds, case: str, limit: str) -> list[str]:
    """A line of the table."""
    precision, _, size = case.partition(" ")
    return [
        f"{size}, {precision}",
        f"{rounds.median(case, 'recurra'):,.0f}",
        f"{rounds.median(case, limit):,.0f}",
        f"{rounds.ratio(case, 'recurra', limit):.2f}",
        f"{rounds.median(case, 'fastapi'):,.0f}",
        f"{rounds.ratio(case, 'recurra', 'fastapi'):.1f}",
        f"{rounds.median(case, 'recurra ms'):.0f}",
    ]


def options() -> argparse.ArgumentParser:
    """What it can be told."""
    made = parser(seconds=3.0, rounds=5)
    made.add_argument("--connections", default="1,2")
    made.add_argument("--lines", type=int, default=1024)
    made.add_argument("--store", default="sqlite")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--max-batch", type=int, default=256)
    made.add_argument("--vocabulary", type=int, default=64, help="symbols that are sent: the first so many")
    return made


if __name__ == "__main__":
    command(options(), run)
