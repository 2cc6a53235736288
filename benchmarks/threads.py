"""How many threads a call takes, and whether the default chooses well: `make bench BENCH=threads`, about six minutes.

The same service with RECURRA_THREADS=1, with 2, and without the setting, under streams and under one-token POSTs. The
limits are loops over the same graph with one thread and with two.
"""

import argparse
import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.bare import Bare
from benchmarks.generator import measure, steps, stream
from benchmarks.report import Measured, Report, Rounds, Table, alternate, bundles_of, command, measured, numbers, parser
from benchmarks.served import Served
from service.bundle import Bundle

SETTINGS: dict[str, dict[str, object]] = {"1": {"threads": 1}, "2": {"threads": 2}, "default": {}}
LOADS = {"streams": stream, "posts": steps}


@contextlib.contextmanager
def services(chosen: argparse.Namespace) -> Iterator[dict[str, Served]]:
    """A service for each setting, all started."""
    with contextlib.ExitStack() as stack:
        found = {}
        for name, setting in SETTINGS.items():
            data = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            found[name] = stack.enter_context(Served(chosen.models, data, store=chosen.store, **setting))
        yield found


def sides_of(
    bundle: Bundle, kind: str, served: dict[str, Served], first: Iterator[int], chosen: argparse.Namespace
) -> dict[str, Measured]:
    """How each is measured: tokens or answers a second. `first` numbers the sessions, so that none is used twice."""
    name = bundle.manifest.name

    def side(setting: str) -> Measured:
        def per_s(size: int) -> float:
            phase = measure(served[setting].port, LOADS[kind](name, size, first=next(first)), chosen.seconds)
            return phase.marks_per_s if kind == "streams" else phase.answers_per_s

        return per_s

    def limit(threads: int) -> Measured:
        bare = Bare(bundle, threads)
        return lambda size: bare.steps_per_s(size, chosen.seconds)

    return {"loop, 1": limit(1), "loop, 2": limit(2)} | {setting: side(setting) for setting in SETTINGS}


def run(chosen: argparse.Namespace) -> Report:
    """Every precision and both loads in turn."""
    rounds, sizes, bundles = Rounds(), numbers(chosen.sessions), bundles_of(chosen)
    first = itertools.count(0, 1000)
    with services(chosen) as served:
        for precision, bundle in bundles.items():
            for kind in LOADS:
                sides = sides_of(bundle, kind, served, first, chosen)
                alternate(rounds, f"{kind} {precision}", sizes, sides, chosen.rounds)
    rows = [row(rounds, f"{kind} {name} {size}") for name in bundles for kind in LOADS for size in sizes]
    header = ["", "1 thread", "2 threads", "default", "default to the best", "loop, 1 thread", "loop, 2 threads"]
    title = f"Tokens or answers a second by RECURRA_THREADS, store {chosen.store}"
    return measured("threads", [Table(title, header, rows)], rounds)


def row(rounds: Rounds, case: str) -> list[str]:
    """A line of the table."""
    best = max(("1", "2"), key=lambda setting: rounds.median(case, setting))
    columns = [f"{rounds.median(case, side):,.0f}" for side in ("1", "2", "default")]
    loops = [f"{rounds.median(case, side):,.0f}" for side in ("loop, 1", "loop, 2")]
    return [case, *columns, f"{rounds.ratio(case, 'default', best):.2f}", *loops]


def options() -> argparse.ArgumentParser:
    """What it can be told."""
    made = parser(seconds=1.5, rounds=3)
    made.add_argument("--sessions", default="1,16,64")
    made.add_argument("--store", default="sqlite")
    return made


if __name__ == "__main__":
    command(options(), run)
