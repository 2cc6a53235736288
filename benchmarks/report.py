"""Rounds, tables and the command line of the benchmarks that `docs/performance.md` shows."""

import argparse
import json
import os
import platform
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import onnxruntime

from benchmarks.served import newest, say, table
from service.bundle import Bundle

PAGE = Path("docs/performance.md")
PLOTS = Path("docs/plots")


@dataclass(frozen=True)
class Table:
    """Rows of one size, for people."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def markdown(self) -> str:
        """As a page shows it."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join([f"{self.title}:", "", *("| " + " | ".join(map(str, line)) + " |" for line in lines)])


@dataclass
class Report:
    """What a benchmark found."""

    name: str
    tables: list[Table] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    """for the JSON line"""
    notes: list[str] = field(default_factory=list)

    def show(self) -> None:
        """Print the tables."""
        for one in self.tables:
            table(one.title, one.header, one.rows)
        for note in self.notes:
            print(f"\n{note}")

    def write(self, page: Path) -> None:
        """Put the tables between the page's marks of this benchmark."""
        text, parts = page.read_text(), [*(one.markdown() for one in self.tables), *self.notes, self._conditions()]
        begin, end = f"<!-- {self.name} -->", f"<!-- end of {self.name} -->"
        if begin not in text:
            raise ValueError(f"{page} has no place for {self.name}")
        inside = "\n\n".join([begin, *parts, end])
        page.write_text(re.sub(f"{begin}.*?{end}", lambda _: inside, text, flags=re.DOTALL))

    def _conditions(self) -> str:
        versions = f"ONNX Runtime {onnxruntime.__version__}, Python {platform.python_version()}"
        return f"{date.today().isoformat()}, {os.cpu_count()} cores of an {cpu_model()}, {versions}."


class Rounds:
    """What each side reached in each round of each case."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], list[float]] = defaultdict(list)

    def add(self, case: str, side: str, value: float) -> None:
        """One round more."""
        self._values[case, side].append(value)

    def last(self, case: str, side: str) -> float:
        """Of the newest round."""
        return self._values[case, side][-1]

    def median(self, case: str, side: str) -> float:
        """Over the rounds."""
        return statistics.median(self._values[case, side])

    def ratio(self, case: str, side: str, other: str) -> float:
        """One side to another of the same round, the median over the rounds."""
        pairs = zip(self._values[case, side], self._values[case, other], strict=True)
        return round(statistics.median(one / two for one, two in pairs), 3)

    def json(self) -> dict[str, Any]:
        """Everything that was measured, round by round."""
        found: dict[str, Any] = defaultdict(dict)
        for (case, side), values in self._values.items():
            found[case][side] = [float(f"{value:.5g}") for value in values]
        return dict(found)


Measured = Callable[[int], float]
"""What a side reaches at a size."""


def alternate(rounds: Rounds, name: str, sizes: Sequence[int], sides: Mapping[str, Measured], count: int) -> None:
    """All sides of every size, in every round; every other round the other way round. A case is `<name> <size>`."""
    for number in range(count):
        for size in sizes:
            order = list(sides) if number % 2 == 0 else list(sides)[::-1]
            for side in order:
                rounds.add(f"{name} {size}", side, sides[side](size))
            last = ", ".join(f"{side} {rounds.last(f'{name} {size}', side):,.0f}" for side in sides)
            say(f"round {number + 1} of {count}, {name} {size}: {last}")


def measured(name: str, tables: list[Table], rounds: Rounds, *notes: str, **more: object) -> Report:
    """A report of rounds."""
    return Report(name, tables, {**more, "rounds": rounds.json()}, list(notes))


# ---------------------------------------------------------------------- command line

Measure = Callable[[argparse.Namespace], Report]


def parser(seconds: float | None, rounds: int | None) -> argparse.ArgumentParser:
    """What all of these benchmarks can be told; None leaves it to each."""
    made = argparse.ArgumentParser()
    made.add_argument("--models", type=Path, help="a folder of bundles; without it the reference model is made")
    made.add_argument("--model", default="reference", help="and its -int8 beside it")
    made.add_argument("--precisions", default="fp32,int8")
    made.add_argument("--seconds", type=float, default=seconds, help="of each measurement")
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--markdown", action="store_true", help=f"write the tables into {PAGE}")
    return made


def command(parsed: argparse.ArgumentParser, measure: Measure) -> None:
    """Measure, print tables and one JSON line."""
    chosen = parsed.parse_args()
    with models_of(chosen) as chosen.models:
        report = measure(chosen)
        publish(report, chosen.markdown)
        finish([report])


def publish(report: Report, markdown: bool) -> None:
    """Tables, and the page if it is asked for."""
    report.show()
    if markdown:
        report.write(PAGE)


def finish(reports: list[Report]) -> None:
    """The JSON line."""
    machine = {"cpus": os.cpu_count(), "machine": cpu_model(), "onnxruntime": onnxruntime.__version__}
    print("\n" + json.dumps({**{report.name: report.found for report in reports}, **machine}))


@contextmanager
def models_of(chosen: argparse.Namespace) -> Iterator[Path]:
    """The folder of bundles that is measured."""
    if chosen.models is not None:
        yield chosen.models
        return
    from training.reference import write_reference

    with tempfile.TemporaryDirectory() as folder:
        for precision in chosen.precisions.split(","):
            write_reference(Path(folder), int8=precision == "int8")
        yield Path(folder)


def bundles_of(chosen: argparse.Namespace) -> dict[str, Bundle]:
    """The bundle of each precision."""
    names = {precision: chosen.model + "-int8" * (precision == "int8") for precision in chosen.precisions.split(",")}
    return {precision: newest(chosen.models, name) for precision, name in names.items()}


def numbers(text: str) -> list[int]:
    """Of a list with commas."""
    return [int(part) for part in text.split(",")]


def cpu_model() -> str:
    """What the processor calls itself."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()
