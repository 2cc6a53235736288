"""A million parked sessions: `python -m benchmarks.parked --sessions 1000000`, about four minutes.

The sessions are real: those with a long log are fed over HTTP, so that they have snapshots; the others are committed
through the store, ten entries each, and a sample of them is checked against the model when it is woken. Then the
service is started on them: how soon is it ready, how long does a session take to wake, how much memory and disk do
they need, how fast is a page of the list. The same figures of a service without sessions, and of sessions that are in
memory, are the limit.
"""

import argparse
import base64
import random
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.load import name_of
from benchmarks.served import SETTLE_S, Client, Served, finish, load_result, newest, quantiles, say, table
from service.bundle import Bundle
from service.runner import Runner
from service.store.base import Applied, Commit, Head, Segment
from service.store.sqlite import SqliteStore
from service.tasks import Codec

LOG = 10
DEEP_LOG = 300
GROUP = 1000
AT_ONCE = 100_000
WOKEN = 1000
PAGES = 300
BYTES_EXPECTED = 2500
CHECKED = 20

Found = dict[str, Any]


def entries_of(number: int, count: int, bundle: Bundle) -> list[int]:
    """The log of a session."""
    rng = random.Random(number)
    return [rng.randrange(len(bundle.manifest.symbols)) for _ in range(count)]


def create_deep(served: Served, bundle: Bundle, deep: int) -> None:
    """Sessions with a long log, over HTTP."""
    client = served.client()
    for number in range(deep):
        body = {"model": bundle.manifest.name, "inputs": entries_of(number, DEEP_LOG, bundle), "alternatives": 0}
        client.ask("POST", f"/v1/sessions/{name_of(number)}/steps", body)


def create_parked(data: Path, bundle: Bundle, numbers: Sequence[int]) -> float:
    """Sessions with a short log, through the store; returns how many a second."""
    numerics, codec, begun = Runner(bundle, 1).numerics, Codec(bundle.manifest), time.perf_counter()
    for part in _slices(numbers, AT_ONCE):
        store = SqliteStore(data)
        # Ids come in random order, but each part in its own: so a page of the file is written once for many.
        for group in _slices(sorted(part, key=name_of), GROUP):
            results = store.commit([_parked(number, bundle, codec, numerics) for number in group])
            if not all(isinstance(result, Applied) for result in results):
                raise RuntimeError("a commit was refused")
        store.close()
        say(f"{part[-1] + 1:,} sessions")
    return len(numbers) / (time.perf_counter() - begun)


def _parked(number: int, bundle: Bundle, codec: Codec, numerics: str) -> Commit:
    manifest, entries = bundle.manifest, codec.encode(entries_of(number, LOG, bundle))
    name = name_of(number)
    branch = name + name[::-1]
    made = (manifest.name, manifest.version, manifest.graph_sha256)
    head = Head("", name, *made, 1, LOG, number, branch, state_bytes=manifest.state_bytes)
    return Commit(head, None, (Segment(branch, 0, LOG, "fed", entries.tobytes(), numerics),))


def _slices(numbers: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    return (numbers[begin : begin + size] for begin in range(0, len(numbers), size))


def wake(client: Client, model: str, numbers: Iterable[int]) -> dict[str, float]:
    """One step of each session, one at a time: p50 and p99 milliseconds."""
    body = {"inputs": [0], "model": model, "alternatives": 1}
    return quantiles([client.timed_ms("POST", f"/v1/sessions/{name_of(one)}/steps", body) for one in numbers])


def check(client: Client, bundle: Bundle, numbers: Iterable[int]) -> None:
    """What woken sessions say is what the model says of the same entries in one go."""
    model = bundle.manifest.name
    for number in numbers:
        woken = client.ask("POST", f"/v1/sessions/{name_of(number)}/steps", {"inputs": [0], "model": model})
        whole = {"sequences": [[*entries_of(number, LOG, bundle), 0]]}
        if woken["predictions"] != client.ask("POST", f"/v1/models/{model}/predict", whole)["predictions"][0]:
            raise RuntimeError(f"session {name_of(number)} woke with another memory than its log's")


def pages(client: Client, rng: random.Random) -> dict[str, float]:
    """Pages of 100 sessions that begin anywhere."""
    names = [f"{rng.randrange(2**32):08x}" for _ in range(PAGES)]
    cursors = [base64.urlsafe_b64encode(name.encode()).decode().rstrip("=") for name in names]
    return quantiles([client.timed_ms("GET", f"/v1/sessions?limit=100&cursor={cursor}") for cursor in cursors])


def touch(served: Served, model: str, sessions: int, resident: int) -> int:
    """Feed sessions, each once, until more have been woken than may be in memory; returns how many."""
    fed, first = 0, 0
    while fed <= 1.2 * resident and first < sessions:
        part = min(64_000, (sessions - first) // 64 * 64)
        found = served.load("steps", model, 5, connections=64, sessions=part, first=first)
        fed, first = fed + min(part, found["per_s"] * 5), first + part
    return fed


def reloads(client: Client, models: Path, model: str) -> Found:
    """Milliseconds of a reload: of the same folder, without a model that has sessions, without one that has none."""
    aside = models.parent / "aside"
    found = {"same_ms": client.timed_ms("POST", "/v1/models/reload")}
    unused = next(path.name for path in sorted(models.iterdir()) if path.name != model)
    for case, name, outcome in (("used_ms", model, "kept"), ("unused_ms", unused, "unloaded")):
        shutil.move(models / name, aside)
        begun = time.perf_counter()
        report = client.ask("POST", "/v1/models/reload")
        found[case] = (time.perf_counter() - begun) * 1e3
        if not report[outcome]:
            raise RuntimeError(f"the reload without {name} said {report}")
        shutil.move(aside, models / name)
        client.ask("POST", "/v1/models/reload")
    return {case: round(ms, 2) for case, ms in found.items()}


def crash(served: Served, model: str, sessions: int) -> None:
    """kill -9 while 64 connections feed sessions; start again."""
    load = served.start_load("steps", model, 60, connections=64, sessions=sessions // 64 * 64)
    time.sleep(5)
    served.kill()
    if not load_result(load)["cut"]:
        raise RuntimeError("the load was over before the service was killed")
    served.begin()


def populate(models: Path, data: Path, bundle: Bundle, chosen: argparse.Namespace) -> Found:
    """All sessions; what they take on disk."""
    served, file = Served(models, data), data / "sessions.sqlite"
    try:
        create_deep(served, bundle, chosen.deep)
    finally:
        served.stop()
    deep_bytes = file.stat().st_size
    say(f"{chosen.deep:,} sessions of {DEEP_LOG} entries: {deep_bytes / chosen.deep:.0f} bytes each")
    rate = create_parked(data, bundle, range(chosen.deep, chosen.sessions))
    parked = chosen.sessions - chosen.deep
    return {
        "created_per_s": round(rate),
        "disk_mb": round(file.stat().st_size / 1e6, 1),
        "bytes_a_session": round((file.stat().st_size - deep_bytes) / parked),
        "bytes_a_deep_session": round(deep_bytes / chosen.deep),
    }


def measure(models: Path, data: Path, bundle: Bundle, chosen: argparse.Namespace) -> Found:
    """Everything that is asked of a service on the sessions."""
    model, rng = bundle.manifest.name, random.Random(1)
    parked = rng.sample(range(chosen.deep, chosen.sessions), min(2 * WOKEN + CHECKED, chosen.sessions - chosen.deep))
    checked, woken = parked[:CHECKED], parked[CHECKED:]
    served = Served(models, data, max_resident=chosen.resident)
    try:
        client = served.client()
        found: Found = {"ready_s": served.ready_s, "memory_at_start_mb": served.memory_mb()}
        found["wake_ms"] = wake(client, model, woken[:WOKEN])
        found["wake_deep_ms"] = wake(client, model, range(min(WOKEN, chosen.deep)))
        found["awake_ms"] = wake(client, model, [woken[0]] * WOKEN)
        say(f"ready after {found['ready_s']} s; woken {found['wake_ms']}, awake {found['awake_ms']}")
        check(client, bundle, checked)
        found["page_ms"] = pages(client, rng)
        found["reload"] = reloads(client, models, model)
        say(f"page {found['page_ms']}, reload {found['reload']}")
        written = served.written_bytes()
        found["touched"] = touch(served, model, chosen.sessions, chosen.resident)
        found["memory_touched_mb"] = served.memory_mb()
        time.sleep(SETTLE_S)
        found["written_bytes_a_step"] = round((served.written_bytes() - written) / found["touched"])
        say(f"{found['touched']:,} sessions were fed: {found['memory_touched_mb']} MB; now kill -9 under load")
        crash(served, model, chosen.sessions)
        found["ready_after_kill_s"] = served.ready_s
        found["wake_after_kill_ms"] = wake(served.client(), model, woken[-WOKEN:])
        return found
    finally:
        served.stop()


def empty(models: Path, data: Path) -> Found:
    """The limit: a service without sessions."""
    served = Served(models, data)
    try:
        client = served.client()
        page = quantiles([client.timed_ms("GET", "/v1/sessions?limit=100") for _ in range(PAGES)])
        return {"ready_s": served.ready_s, "memory_at_start_mb": served.memory_mb(), "page_ms": page}
    finally:
        served.stop()


def show(sessions: int, found: Found, limit: Found) -> None:
    """The table: what was measured, what the limit is, what was aimed at."""

    def both(name: str) -> str:
        return f"{found[name]['p50']} / {found[name]['p99']}"

    awake, reload = both("awake_ms"), found["reload"]
    rows = [
        ["ready after the start, s", found["ready_s"], limit["ready_s"], "< 2"],
        ["ready after kill -9 under load, s", found["ready_after_kill_s"], limit["ready_s"], "< 2"],
        ["wake-up: first step, p50 / p99 ms", both("wake_ms"), awake, ""],
        [f"the same, {DEEP_LOG} entries and a snapshot", both("wake_deep_ms"), awake, ""],
        ["the same after kill -9", both("wake_after_kill_ms"), awake, ""],
        ["memory at the start, MB", found["memory_at_start_mb"], limit["memory_at_start_mb"], ""],
        [f"memory, {found['touched']:,} fed, MB", found["memory_touched_mb"], limit["memory_at_start_mb"], "< 300"],
        ["page of 100 from anywhere, p50 / p99 ms", both("page_ms"), f"{limit['page_ms']['p50']} (no sessions)", ""],
        ["reload, a model with sessions gone, ms", reload["used_ms"], f"{reload['same_ms']} (nothing gone)", ""],
        ["reload, a model without sessions gone, ms", reload["unused_ms"], f"{reload['same_ms']} (nothing gone)", ""],
        ["written to disk a step of a parked session, bytes", found["written_bytes_a_step"], "", ""],
        [f"disk, bytes a session of {LOG} entries", found["bytes_a_session"], "", ""],
        [f"disk, bytes a session of {DEEP_LOG} entries", found["bytes_a_deep_session"], "", ""],
    ]
    table(f"{sessions:,} parked sessions", ["", "found", "limit: none, or awake", "target"], rows)


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--model", default="shakespeare", help="one over symbols")
    parser.add_argument("--sessions", type=int, default=1_000_000)
    parser.add_argument("--deep", type=int, default=500, help=f"of them with {DEEP_LOG} entries and a snapshot")
    parser.add_argument("--resident", type=int, default=10_000, help="RECURRA_MAX_RESIDENT")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        needed, free = chosen.sessions * BYTES_EXPECTED, shutil.disk_usage(folder).free
        if free < 2 * needed:
            parser.error(f"{folder} has {free / 1e9:.1f} GB free; {2 * needed / 1e9:.1f} GB are needed")
        # A copy: the reload is measured with models taken away.
        models, data = Path(folder) / "models", Path(folder) / "data"
        shutil.copytree(chosen.models, models)
        bundle = newest(models, chosen.model)
        limit = empty(models, Path(folder) / "empty")
        found = populate(models, data, bundle, chosen)
        found |= measure(models, data, bundle, chosen)
    show(chosen.sessions, found, limit)
    finish("parked", {"model": chosen.model, "sessions": chosen.sessions, **found, "without_sessions": limit})


if __name__ == "__main__":
    main()
