"""What a step of the log takes on disk: `python -m benchmarks.growth`, about a minute.

Each way of feeding has sessions of its own in one data folder. What the file grows by is read once the store has put
everything in its place; snapshots are counted by themselves, for they do not grow with every step.
"""

import argparse
import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.served import Client, Served, file_bytes, finish, newest, say, table
from service.bundle import Bundle

SESSIONS = 32
SPREAD_S = 2.5
"""longer than the store takes to spread a commit"""


@dataclass(frozen=True)
class Way:
    """A way of feeding: so many requests of so many entries a session, with a pause after each round."""

    name: str
    model: str
    requests: int
    entries: int
    pause_s: float = 0.0
    generates: bool = False

    @property
    def steps(self) -> int:
        """Of all sessions."""
        return SESSIONS * self.requests * self.entries


WAYS = (
    Way("tokens generated, one a commit", "shakespeare", 1, 500, generates=True),
    Way("one symbol a request, at once", "shakespeare", 200, 1),
    Way("one symbol a request, now and then", "shakespeare", 5, 1, pause_s=SPREAD_S),
    Way("256 symbols a request", "shakespeare", 8, 256),
    Way("one value a request, at once", "temperature", 200, 1),
    Way("one value a request, now and then", "temperature", 5, 1, pause_s=SPREAD_S),
    Way("256 values a request", "temperature", 8, 256),
    Way("eleven values a step, 24 steps a request", "nyc-weather", 20, 24),
)


def feed(client: Client, way: Way, bundle: Bundle) -> None:
    """Give every session of the way its log."""
    features = bundle.manifest.features
    entry: Any = [feature.mean for feature in features] if features else 0
    body: dict[str, Any] = {"inputs": [entry] * way.entries, "model": way.model, "predictions": "none"}
    path = "steps"
    if way.generates:
        path, body = "generate", {"inputs": [0], "model": way.model, "max_tokens": way.entries, "seed": 1}
    for _ in range(way.requests):
        for number in range(SESSIONS):
            name = f"{way.name}-{number}".replace(" ", "_").replace(",", "")
            client.ask("POST", f"/v1/sessions/{name}/{path}", body)
        time.sleep(way.pause_s)


def snapshot_bytes(data: Path) -> int:
    """What the snapshots take."""
    with closing(sqlite3.connect(f"file:{data / 'sessions.sqlite'}?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT coalesce(sum(length(snapshot)), 0) FROM snapshots").fetchone()[0])


def measure(served: Served, data: Path, bundles: Callable[[str], Bundle]) -> dict[str, dict[str, float]]:
    """Bytes a step by way of feeding, and bytes of snapshots a session."""
    found = {}
    for way in WAYS:
        client = served.client()
        whole, snapshots = file_bytes(data), snapshot_bytes(data)
        feed(client, way, bundles(way.model))
        whole, snapshots = file_bytes(data) - whole, snapshot_bytes(data) - snapshots
        found[way.name] = {
            "steps_a_session": way.steps // SESSIONS,
            "entry_bytes": 4 * max(len(bundles(way.model).manifest.features), 1),
            "bytes_a_step": round((whole - snapshots) / way.steps, 1),
            "snapshot_bytes_a_session": round(snapshots / SESSIONS),
        }
        say(f"{way.name}: {found[way.name]}")
    return found


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, default=Path("models"))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        served = Served(chosen.models, data)
        try:
            found = measure(served, data, lambda name: newest(chosen.models, name))
        finally:
            served.stop()
    header = ["", "steps a session", "bytes of an entry (the limit)", "bytes a step", "snapshots, bytes a session"]
    table("what a step of the log takes on disk", header, [[name, *one.values()] for name, one in found.items()])
    finish("growth", {"steps": found})


if __name__ == "__main__":
    main()
