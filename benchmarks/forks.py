"""What a fork and a rewind cost by the length of the log: `python -m benchmarks.forks`, about two minutes.

Logs of 100, 10,000 and 1,000,000 steps are fed over HTTP. Then forks at the head, forks in the middle and rewinds by
one step take turns over the logs, with the creation of an empty session, which is the limit of what a fork can cost.
Bytes are what the data file grows by, once the store has put everything in its place.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.served import Client, Served, file_bytes, finish, newest, quantiles, say, table

FEED = 100_000

Operation = Callable[[int], float]


def feed(client: Client, name: str, model: str, symbols: int, length: int) -> None:
    """Give a session a log."""
    rng = random.Random(length)
    for begin in range(0, length, FEED):
        entries = [rng.randrange(symbols) for _ in range(min(FEED, length - begin))]
        body = {"inputs": entries, "model": model, "alternatives": 0}
        client.ask("POST", f"/v1/sessions/{name}/steps", body)


def operations(client: Client, model: str, length: int) -> dict[str, Operation]:
    """What is measured on a log, by name: each takes the number of the call, and says its milliseconds."""
    log = f"log-{length}"

    def create(number: int) -> float:
        return client.timed_ms("POST", "/v1/sessions", {"model": model, "id": f"empty-{length}-{number}"})

    def fork(number: int) -> float:
        return client.timed_ms("POST", f"/v1/sessions/{log}/fork", {"id": f"head-{length}-{number}"})

    def middle(number: int) -> float:
        body = {"id": f"middle-{length}-{number}", "position": length // 2 + number % 7}
        return client.timed_ms("POST", f"/v1/sessions/{log}/fork", body)

    def step(number: int) -> float:
        body = {"inputs": [0], "alternatives": 0}
        return client.timed_ms("POST", f"/v1/sessions/middle-{length}-{number}/steps", body)

    def rewind(number: int) -> float:
        return client.timed_ms("POST", f"/v1/sessions/rewound-{length}/rewind", {"position": length - number - 1})

    return {
        "create an empty session": create,
        "fork at the head": fork,
        "fork in the middle": middle,
        "first step on that fork": step,
        "rewind by one step": rewind,
    }


def measure(client: Client, data: Path, model: str, lengths: list[int], count: int) -> dict[str, dict[str, Any]]:
    """p50 and p99 milliseconds, and bytes added, by operation and length; the lengths take turns."""
    by_length = {length: operations(client, model, length) for length in lengths}
    found: dict[str, dict[str, Any]] = {}
    for name in by_length[lengths[0]]:
        took: dict[int, list[float]] = {length: [] for length in lengths}
        sizes = dict.fromkeys(lengths, 0)
        for length in lengths:
            before = file_bytes(data)
            client.reconnect()
            took[length] += [by_length[length][name](number) for number in range(count // 2)]
            sizes[length] = (file_bytes(data) - before) // (count // 2)
        client.reconnect()
        for number in range(count // 2, count):
            for length in lengths:
                took[length].append(by_length[length][name](number))
        found[name] = {str(n): {**quantiles(took[n][count // 2 :]), "bytes": sizes[n]} for n in lengths}
        say(f"{name}: {found[name]}")
    return found


def show(lengths: list[int], found: dict[str, dict[str, Any]]) -> None:
    """The table."""
    header = ["p50 / p99 ms, bytes added", *(f"log of {length:,}" for length in lengths), "longest to shortest, p50"]
    rows = []
    for name, by_length in found.items():
        cells = [by_length[str(length)] for length in lengths]
        shown = [f"{cell['p50']} / {cell['p99']}, {cell['bytes']}" for cell in cells]
        rows.append([name, *shown, f"{cells[-1]['p50'] / cells[0]['p50']:.2f}"])
    table("what a fork and a rewind cost by the length of the log", header, rows)


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--model", default="who", help="one over symbols; a small one is fed sooner")
    parser.add_argument("--lengths", default="100,10000,1000000", help="each greater than --count")
    parser.add_argument("--count", type=int, default=90, help="of each operation on each log")
    chosen = parser.parse_args()
    lengths = [int(length) for length in chosen.lengths.split(",")]
    symbols = len(newest(chosen.models, chosen.model).manifest.symbols)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        served = Served(chosen.models, data)
        try:
            client = served.client()
            for length in lengths:
                begun = time.perf_counter()
                feed(client, f"log-{length}", chosen.model, symbols, length)
                client.ask("POST", f"/v1/sessions/log-{length}/fork", {"id": f"rewound-{length}"})
                say(f"a log of {length:,} steps after {time.perf_counter() - begun:.1f} s")
            found = measure(client, data, chosen.model, lengths, chosen.count)
        finally:
            served.stop()
    show(lengths, found)
    finish("forks", {"model": chosen.model, "lengths": lengths, "operations": found})


if __name__ == "__main__":
    main()
