"""What loads that share one service take from each other: `make bench BENCH=neighbours`, about three minutes.

The load on one side alone, then beside another on the same model or on another model of the same service. Every model
has an engine of its own; a tick's length is bounded, and a roll-out ends early for those who come (docs/decisions).
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.generator import WARM_S, Generator, Load, bulk, measure, steps, stream
from benchmarks.report import Report, Rounds, Table, bundles_of, command, measured, parser
from benchmarks.served import Served, say

Make = Callable[..., Load]
LOADS: dict[str, tuple[Make, int]] = {"1 POST": (steps, 1), "1 stream": (stream, 1), "64 streams": (stream, 64)}
BESIDE: dict[str, tuple[Make, int]] = {"64 streams": (stream, 64), "64 POSTs": (steps, 64), "bulk": (bulk, 2)}


def run(chosen: argparse.Namespace) -> Report:
    """Each load alone and beside each other, in every round."""
    names = [bundle.manifest.name for bundle in bundles_of(chosen).values()]
    own, other = names[0], names[-1]
    rounds, first = Rounds(), itertools.count(0, 10_000)
    cases = [(load, beside, model) for load in LOADS for beside in BESIDE for model in dict.fromkeys((own, other))]

    def made(kind: tuple[Make, int], model: str) -> Load:
        make, connections = kind
        sizes = (chosen.lines, connections) if make is bulk else (connections,)
        return make(model, *sizes, first=next(first), vocabulary=chosen.vocabulary)

    def note(case: str, port: int, load: str) -> None:
        phase = measure(port, made(LOADS[load], own), chosen.seconds)
        per_s = phase.marks_per_s if LOADS[load][0] is stream else phase.answers_per_s
        for side, value in (("per s", per_s), ("p50", phase.p50_ms), ("p99", phase.p99_ms)):
            rounds.add(case, side, value)
        say(f"{case}: {per_s:,.0f} a second, p50 {phase.p50_ms:.2f} ms, p99 {phase.p99_ms:.2f} ms")

    with (
        tempfile.TemporaryDirectory() as data,
        Served(chosen.models, Path(data), store=chosen.store, threads=chosen.threads) as served,
    ):
        for _ in range(chosen.rounds):
            for load in LOADS:
                note(f"{load} alone", served.port, load)
            for load, beside, model in cases:
                with Generator(served.port, made(BESIDE[beside], model)) as generator:
                    generator.measure(0, WARM_S)
                    note(case_of(load, beside, model), served.port, load)
    rows = [row(rounds, f"{load} alone", load) for load in LOADS]
    rows += [row(rounds, case_of(load, beside, model), load) for load, beside, model in cases]
    header = [f"on `{own}`", "a second", "of alone", "p50 ms", "p99 ms"]
    title = f"What a load reaches beside another, store {chosen.store}, {chosen.threads} thread a call"
    return measured("neighbours", [Table(title, header, rows)], rounds)


def case_of(load: str, beside: str, model: str) -> str:
    """As the table says it."""
    return f"{load}, beside {beside} on `{model}`"


def row(rounds: Rounds, case: str, load: str) -> list[str]:
    """A line of the table."""
    per_s = rounds.median(case, "per s")
    return [
        case,
        f"{per_s:,.0f}",
        f"{per_s / rounds.median(f'{load} alone', 'per s'):.2f}",
        f"{rounds.median(case, 'p50'):.2f}",
        f"{rounds.median(case, 'p99'):.2f}",
    ]


def options() -> argparse.ArgumentParser:
    """What it can be told."""
    made = parser(seconds=2.0, rounds=2)
    made.add_argument("--lines", type=int, default=1024, help="of a bulk request")
    made.add_argument("--store", default="sqlite")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--vocabulary", type=int, default=64, help="symbols that are sent: the first so many")
    return made


if __name__ == "__main__":
    command(options(), run)
