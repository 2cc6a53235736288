"""What a session takes in memory, and how soon there is a token: `make bench BENCH=memory`, about three minutes.

Ten thousand sessions are fed a symbol each, after a thousand others that let the process reach its size. The limit is
what must be held: the state and one row of outputs. Then the time from the start of the process to the first token of
a stream, with the one model in its folder. The peer is the FastAPI service that everyone writes first.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from benchmarks.generator import Generator, Load, steps, stream
from benchmarks.peers import start
from benchmarks.report import Report, Rounds, Table, bundles_of, command, measured, parser
from benchmarks.served import Served, resident_bytes, say
from service.bundle import DTYPES, Bundle

CONNECTIONS = 20
BEFORE = 1000
"""sessions that are fed before it is measured"""
TURNS = 1.25
"""answers a session, on average, so that the slowest connection has fed all of its sessions too"""
ROOM_BYTES = 2048

Start = Callable[[], AbstractContextManager[Served | start.Peer]]
Feed = Callable[..., Load]
Side = tuple[Start, Feed, Load]
"""how it is started and fed, and its first stream"""


def bytes_a_session(service: Served | start.Peer, feed: Feed, sessions: int) -> float:
    """Growth of the resident memory over so many sessions."""
    feed_each(service.port, feed(CONNECTIONS, sessions=BEFORE))
    before = resident_bytes(service.pid)
    feed_each(service.port, feed(CONNECTIONS, sessions=sessions, first=BEFORE))
    return (resident_bytes(service.pid) - before) / sessions


def feed_each(port: int, load: Load) -> None:
    """Until every session has had an answer."""
    answers = 0
    with Generator(port, load) as generator:
        while answers < TURNS * load.sessions:
            time.sleep(0.1)
            answers += generator.phase().answers


def recurra(models: Path, folder: Path, name: str, store: str) -> Side:
    """On a data folder of its own each time."""

    def begin() -> Served:
        return Served(models, Path(tempfile.mkdtemp(dir=folder)), store=store)

    return begin, partial(steps, name), stream(name, 1, first=10**6)


def one_precision(bundle: Bundle, precision: str, chosen: argparse.Namespace, rounds: Rounds) -> None:
    """Every round on services that were started for it."""
    name = bundle.manifest.name
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        models.mkdir()
        (models / name).symlink_to(bundle.path.parent.resolve())
        sides: dict[str, Side] = {
            "FastAPI": (lambda: start.Peer("simple", bundle, 1), start.steps, start.stream(1)),
        }
        for store in chosen.stores.split(","):
            sides[f"Recurra, {store}"] = recurra(models, Path(folder), name, store)
        for number in range(chosen.rounds):
            for title, side in sides.items():
                one_round(f"{precision} {title}", side, chosen.sessions, rounds)
            say(f"round {number + 1} of {chosen.rounds} of {precision}")


def one_round(case: str, side: Side, sessions: int, rounds: Rounds) -> None:
    """A service is started, streams its first token, and is fed."""
    begin, feed, first = side
    begun = time.perf_counter()
    with begin() as service:
        with Generator(service.port, first):
            rounds.add(case, "first token s", time.perf_counter() - begun)
        rounds.add(case, "bytes", bytes_a_session(service, feed, sessions))
        rounds.add(case, "resident MB", resident_bytes(service.pid) / 1e6)


def must_hold(bundle: Bundle) -> int:
    """Bytes of a session's state and of one row of outputs."""
    manifest = bundle.manifest
    numbers = [axis for spec in manifest.outputs for axis in spec.shape[2:] if isinstance(axis, int)]
    return manifest.state_bytes + sum(numbers) * DTYPES[manifest.outputs[0].dtype].itemsize


def run(chosen: argparse.Namespace) -> Report:
    """Every precision in turn."""
    rounds, bundles = Rounds(), bundles_of(chosen)
    for precision, bundle in bundles.items():
        one_precision(bundle, precision, chosen, rounds)
    titles = ["FastAPI", *(f"Recurra, {store}" for store in chosen.stores.split(","))]
    rows = [row(rounds, f"{name} {title}", bundle) for name, bundle in bundles.items() for title in titles]
    header = ["", "bytes a session", "state and output", "target: at most", "resident MB", "start to first token, s"]
    title = f"Memory of {chosen.sessions:,} sessions after {BEFORE:,} others, and the start"
    return measured("memory", [Table(title, header, rows)], rounds)


def row(rounds: Rounds, case: str, bundle: Bundle) -> list[str]:
    """A line of the table."""
    needed = must_hold(bundle)
    return [
        case,
        f"{rounds.median(case, 'bytes'):,.0f}",
        f"{needed:,}",
        f"{1.25 * needed + ROOM_BYTES:,.0f}",
        f"{rounds.median(case, 'resident MB'):,.0f}",
        f"{rounds.median(case, 'first token s'):.2f}",
    ]


def options() -> argparse.ArgumentParser:
    """What it can be told."""
    made = parser(seconds=0.0, rounds=3)
    made.add_argument("--sessions", type=int, default=10_000)
    made.add_argument("--stores", default="memory,sqlite")
    return made


if __name__ == "__main__":
    command(options(), run)
