"""One-token POSTs beside what others would serve the graph with: `make bench BENCH=posts`, about nine minutes.

Every connection has a session of its own and sends its next symbol when the last one is answered. The limits are a
loop over the same graph with the same batch, and a bare ASGI application under uvicorn, which also is the ceiling of
the load generator. Triton is measured where `make bench-triton` has installed it.
"""

import argparse
import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import pictures
from benchmarks.bare import Bare
from benchmarks.generator import Load, measure, steps
from benchmarks.peers import start, triton
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
from benchmarks.served import Client, Served
from service.bundle import Bundle

STORES = ("memory", "sqlite")
PEERS = {"FastAPI": "simple", "FastAPI, batched": "batcher", "ASGI echo": "echo"}
SEQUENCE = 10**9
CHECKED = 8
"""steps after which all must say the same symbol"""
LOOP = "bare loop"
SHOWN = ("FastAPI", "FastAPI, batched", "Triton")


@dataclass(frozen=True)
class Side:
    """Something that is measured: where it listens, what it is sent, and where its answer has the likeliest symbol."""

    port: int
    load: Callable[..., Load]
    read: Callable[[Any], int] | None = None

    def likeliest(self, vocabulary: int) -> int | None:
        """The symbol after a few steps of a session, one request each."""
        if self.read is None:
            return None
        client, answer = Client(self.port), None
        for i in range(CHECKED):
            load = self.load(1, first=SEQUENCE)
            answer = client.ask("POST", load.path_of("check"), load.body_of("check", 7 * i % vocabulary, i == 0))
        return self.read(answer)


@contextlib.contextmanager
def services(bundle: Bundle, chosen: argparse.Namespace) -> Iterator[dict[str, Side]]:
    """Everything that is measured, started, and known to answer alike."""
    with contextlib.ExitStack() as stack:
        found: dict[str, Side] = {}
        for store in STORES:
            data = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            served = stack.enter_context(Served(chosen.models, data, store=store, threads=chosen.threads))
            found[f"Recurra, {store}"] = Side(served.port, partial(steps, bundle.manifest.name), _of_recurra)
        for title, module in PEERS.items():
            peer = stack.enter_context(start.Peer(module, bundle, chosen.threads))
            found[title] = Side(peer.port, start.steps, None if module == "echo" else _of_peer)
        if triton.installed():
            server = stack.enter_context(triton.Triton(bundle, chosen.threads))
            found["Triton"] = Side(server.port, triton.steps, _of_triton)
        answers = {title: side.likeliest(chosen.vocabulary) for title, side in found.items() if side.read is not None}
        if len(set(answers.values())) != 1:
            raise RuntimeError(f"they do not answer alike: {answers}")
        yield found


def _of_recurra(answer: Any) -> int:  # noqa: ANN401 (any JSON)
    return int(answer["predictions"][0]["alternatives"][0]["token"])


def _of_peer(answer: Any) -> int:  # noqa: ANN401 (any JSON)
    return int(answer["token"])


def _of_triton(answer: Any) -> int:  # noqa: ANN401 (any JSON)
    return int({output["name"]: output["data"][0] for output in answer["outputs"]}["id"])


def sides_of(found: dict[str, Side], precision: str, chosen: argparse.Namespace, rounds: Rounds) -> dict[str, Measured]:
    """How each is measured: answers a second; latency and the generator's own share are noted beside."""
    first = itertools.count(0, 1000)

    def measured_side(title: str, side: Side) -> Measured:
        def answers_per_s(size: int) -> float:
            phase = measure(side.port, side.load(size, first=next(first), vocabulary=chosen.vocabulary), chosen.seconds)
            for name, value in (("p50", phase.p50_ms), ("p99", phase.p99_ms), ("cores", phase.cores)):
                rounds.add(f"{precision} {size}", f"{title} {name}", value)
            return phase.answers_per_s

        return answers_per_s

    return {title: measured_side(title, side) for title, side in found.items()}


def run(chosen: argparse.Namespace) -> Report:
    """Every precision in turn."""
    rounds, sizes, bundles, titles = Rounds(), numbers(chosen.connections), bundles_of(chosen), []
    for precision, bundle in bundles.items():
        bare = Bare(bundle, chosen.threads)
        with services(bundle, chosen) as found:
            sides = sides_of(found, precision, chosen, rounds)
            sides[LOOP] = partial(bare.steps_per_s, seconds=chosen.seconds)
            titles = list(sides)
            alternate(rounds, precision, sizes, sides, chosen.rounds)
    tables = [one_table(rounds, precision, size, titles) for precision in bundles for size in sizes]
    shown = [draw(rounds, precision, sizes, titles) for precision in bundles if chosen.markdown]
    return measured("posts", tables, rounds, *shown)


def draw(rounds: Rounds, precision: str, sizes: list[int], titles: list[str]) -> str:
    """Answers a second as a picture, without the limits; returns what shows it."""
    drawn = [title for title in titles if title not in (LOOP, "ASGI echo")]
    series = {title: [rounds.median(f"{precision} {size}", title) for size in sizes] for title in drawn}
    path, groups = PLOTS / f"posts-{precision}.svg", [f"{size} connection{'s' * (size > 1)}" for size in sizes]
    pictures.bars(path, f"answers a second, {precision}", groups, series)
    return f"![answers a second, {precision}](plots/{path.name})"


def one_table(rounds: Rounds, precision: str, size: int, titles: list[str]) -> Table:
    """All sides of one precision and size."""
    peers = [title for title in SHOWN if title in titles]
    header = ["", "answers a second", "of the bare loop", "of memory", *(f"times {peer}" for peer in peers)]
    header += ["p50 ms", "p99 ms", "generator, cores"]
    others = [LOOP, "Recurra, memory", *peers]
    rows = [row(rounds, f"{precision} {size}", title, others) for title in titles]
    return Table(f"One-token POSTs, {size} connection{'s' * (size > 1)}, {precision}", header, rows)


def row(rounds: Rounds, case: str, title: str, others: list[str]) -> list[str]:
    """A line of the table; a loop has no requests."""
    beside = ["", "", ""]
    if title != LOOP:
        beside = [f"{rounds.median(case, f'{title} {name}'):.2f}" for name in ("p50", "p99", "cores")]
    ratios = [f"{rounds.ratio(case, title, other):.2f}" for other in others]
    return [title, f"{rounds.median(case, title):,.0f}", *ratios, *beside]


def options() -> argparse.ArgumentParser:
    """What it can be told."""
    made = parser(seconds=2.0, rounds=5)
    made.add_argument("--connections", default="1,16,64")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--vocabulary", type=int, default=64, help="symbols that are sent: the first so many")
    return made


if __name__ == "__main__":
    command(options(), run)
