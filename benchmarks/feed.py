"""A very long feed beside 64 streams: `make bench BENCH=feed`, about ten minutes.

The streams are measured before and while one request feeds 100,000 steps to a session of its own. The limit of the
feed is a loop over the same graph, one row, many steps a call, in the time that the streams leave: their tokens a
second beside the feed, as a share of what a loop over their batch reaches.
"""

import argparse
import itertools
import random
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.bare import Bare
from benchmarks.generator import WARM_S, Generator, Phase, stream
from benchmarks.report import Report, Rounds, Table, bundles_of, command, measured, parser
from benchmarks.served import Served, say
from service.bundle import Bundle

CHUNK = 128
"""steps of a call of the loop that is the feed's limit"""


class Feeding(threading.Thread):
    """One request that feeds many steps; `seconds` is what it took."""

    def __init__(self, served: Served, model: str, name: str, steps: int, vocabulary: int) -> None:
        super().__init__()
        self._client = served.client(600)
        rng = random.Random(steps)
        self._path = f"/v1/sessions/{name}/steps"
        self._body = {"model": model, "inputs": [rng.randrange(vocabulary) for _ in range(steps)], "alternatives": 1}
        self.seconds = 0.0

    def run(self) -> None:
        """Send it, and wait for the answer."""
        self.seconds = self._client.timed_ms("POST", self._path, self._body) / 1e3


def one_round(served: Served, bundle: Bundle, number: int, chosen: argparse.Namespace) -> tuple[Phase, Phase, float]:
    """The streams before the feed and beside it, and what the feed took."""
    name = bundle.manifest.name
    feeding = Feeding(served, name, f"long-{number}", chosen.steps, chosen.vocabulary)
    with Generator(served.port, stream(name, chosen.streams, first=1000 * number)) as generator:
        time.sleep(WARM_S)
        generator.phase()
        time.sleep(chosen.seconds)
        before = generator.phase()
        feeding.start()
        feeding.join()
        beside = generator.phase()
    if not feeding.seconds:
        raise RuntimeError("the feed failed")
    return before, beside, feeding.seconds


def one_precision(bundle: Bundle, precision: str, chosen: argparse.Namespace, rounds: Rounds) -> None:
    """Every round on one service, the loops beside it."""
    bare, number = Bare(bundle, chosen.threads), itertools.count(1)
    with (
        tempfile.TemporaryDirectory() as data,
        Served(chosen.models, Path(data), store=chosen.store, threads=chosen.threads) as served,
    ):
        for _ in range(chosen.rounds):
            batch, row = bare.steps_per_s(chosen.streams, chosen.seconds), bare.steps_per_s(1, chosen.seconds, CHUNK)
            before, beside, seconds = one_round(served, bundle, next(number), chosen)
            left = 1 - beside.marks_per_s / batch
            found = {
                "p99 before": before.p99_ms,
                "p99 beside": beside.p99_ms,
                "streams before": before.marks_per_s,
                "streams beside": beside.marks_per_s,
                "feed": chosen.steps / seconds,
                "left": left * row,
                "bare row": row,
            }
            for side, value in found.items():
                rounds.add(precision, side, value)
            say(f"feed {precision}: {found}")


def run(chosen: argparse.Namespace) -> Report:
    """Every precision in turn."""
    rounds, bundles = Rounds(), bundles_of(chosen)
    for precision, bundle in bundles.items():
        one_precision(bundle, precision, chosen, rounds)
    header = ["", "p99 before, ms", "p99 beside, ms", "times", "streams before", "streams beside"]
    header += ["feed", "the loop, over what is left", "of it"]
    rows = [row(rounds, precision) for precision in bundles]
    title = (
        f"{chosen.steps:,} steps fed beside {chosen.streams} streams; p99 of the time between arrivals, steps a second"
    )
    return measured("feed", [Table(title, header, rows)], rounds)


def row(rounds: Rounds, precision: str) -> list[str]:
    """A line of the table."""
    return [
        precision,
        f"{rounds.median(precision, 'p99 before'):.2f}",
        f"{rounds.median(precision, 'p99 beside'):.2f}",
        f"{rounds.ratio(precision, 'p99 beside', 'p99 before'):.2f}",
        f"{rounds.median(precision, 'streams before'):,.0f}",
        f"{rounds.median(precision, 'streams beside'):,.0f}",
        f"{rounds.median(precision, 'feed'):,.0f}",
        f"{rounds.median(precision, 'left'):,.0f}",
        f"{rounds.ratio(precision, 'feed', 'left'):.2f}",
    ]


def options() -> argparse.ArgumentParser:
    """What it can be told."""
    made = parser(seconds=4.0, rounds=2)
    made.add_argument("--streams", type=int, default=64)
    made.add_argument("--steps", type=int, default=100_000)
    made.add_argument("--store", default="sqlite")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--vocabulary", type=int, default=64, help="symbols that are fed: the first so many")
    return made


if __name__ == "__main__":
    command(options(), run)
