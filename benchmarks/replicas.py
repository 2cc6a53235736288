"""One process or two, on one core or two: `make bench BENCH=replicas`, about three minutes.

Each replica has a store of its own and half of the sessions, as behind a proxy that sends a session to the same one
each time (deploy/). On one core the load generator shares that core too.
"""

import argparse
import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.generator import Load, measure, steps, stream
from benchmarks.report import Report, Rounds, Table, bundles_of, command, measured, numbers, parser
from benchmarks.served import Served, say

LOADS = {"streams": stream, "posts": steps}


@contextlib.contextmanager
def replicas(count: int, cores: set[int], chosen: argparse.Namespace) -> Iterator[list[Served]]:
    """So many services, which with all that is started meanwhile run on those cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        with contextlib.ExitStack() as stack:
            folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(count)]
            settings = {"store": chosen.store, "threads": chosen.threads}
            yield [stack.enter_context(Served(chosen.models, folder, **settings)) for folder in folders]
    finally:
        os.sched_setaffinity(0, before)


def run(chosen: argparse.Namespace) -> Report:
    """Every layout in every round."""
    rounds, sizes, cores = Rounds(), numbers(chosen.sessions), sorted(os.sched_getaffinity(0))[:2]
    layouts = [(1, cores[:1]), (1, cores), (2, cores)]
    cases = [
        (precision, bundle.manifest.name, kind, size)
        for precision, bundle in bundles_of(chosen).items()
        for kind in LOADS
        for size in sizes
    ]
    first = itertools.count(0, 1000)

    def per_s(served: list[Served], kind: str, model: str, size: int) -> float:
        def one(replica: Served, load: Load) -> float:
            phase = measure(replica.port, load, chosen.seconds)
            return phase.marks_per_s if kind == "streams" else phase.answers_per_s

        loads = [LOADS[kind](model, size // len(served), first=next(first)) for _ in served]
        with ThreadPoolExecutor(len(served)) as pool:
            return sum(pool.map(one, served, loads))

    for number in range(chosen.rounds):
        for count, used in layouts:
            with replicas(count, set(used), chosen) as served:
                for precision, model, kind, size in cases:
                    reached = per_s(served, kind, model, size)
                    rounds.add(f"{kind} {precision} {size}", side_of(count, used), reached)
                    say(f"round {number + 1}, {side_of(count, used)}, {kind} {precision} {size}: {reached:,.0f}")
    sides = [side_of(count, used) for count, used in layouts]
    rows = [row(rounds, f"{kind} {precision} {size}", sides) for precision, _, kind, size in cases]
    title = (
        f"Tokens or answers a second of one replica and of two, store {chosen.store}, {chosen.threads} thread a call"
    )
    return measured("replicas", [Table(title, ["sessions in all", *sides, "two to one on two cores"], rows)], rounds)


def side_of(count: int, cores: list[int]) -> str:
    """As the table says it."""
    return f"{count} replica{'s' * (count > 1)}, {len(cores)} core{'s' * (len(cores) > 1)}"


def row(rounds: Rounds, case: str, sides: list[str]) -> list[str]:
    """A line of the table."""
    return [
        case,
        *(f"{rounds.median(case, side):,.0f}" for side in sides),
        f"{rounds.ratio(case, sides[2], sides[1]):.2f}",
    ]


def options() -> argparse.ArgumentParser:
    """What it can be told."""
    made = parser(seconds=2.0, rounds=2)
    made.add_argument("--sessions", default="2,16,64")
    made.add_argument("--store", default="sqlite")
    made.add_argument("--threads", type=int, default=1)
    return made


if __name__ == "__main__":
    command(options(), run)
