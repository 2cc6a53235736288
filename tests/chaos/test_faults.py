"""Disks that are full, read-only or damaged, and clocks that jump: never a wrong answer, nothing acknowledged lost."""

import random
import resource
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from checker import folded, read_log
from live import START_S, MakeServer, Server, free_port, spawn
from storm import Storm
from tiny import LETTERS

MODEL = "tiny-letters"
DAY_S = 86_400
PAGE = 4096

CLOCK = """
import os, time
_time_ns, _time, _file = time.time_ns, time.time, os.environ["CLOCK_SHIFT"]

def shift():
    with open(_file) as opened:
        return int(opened.read())

time.time_ns = lambda: _time_ns() + shift() * 10**9
time.time = lambda: _time() + shift()
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB; needs the right to mount."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


# ---------------------------------------------------------------------- no room


def limit_files(one: Server, size: int) -> None:
    """Let the process write no file beyond a size, as a full disk would."""
    assert one.process is not None
    resource.prlimit(one.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def is_refused(one: Server) -> None:
    """Writes are refused for now, reads are not, and the service says that it is not ready."""
    refused = wait_for(503, lambda: one.post("/v1/sessions/full/steps", {"model": MODEL, "inputs": "a"}))
    assert refused.json()["code"] == "not_ready" and int(refused.headers["retry-after"]) >= 1
    ready = wait_for(503, lambda: one.http.get("/readyz"))
    assert ready.json()["problems"]["store"]
    assert one.http.get("/healthz").status_code == 200
    assert one.position("kept") == 3 and one.state("kept") == one.state("control")


def wait_for(status: int, ask: Callable[[], httpx.Response]) -> httpx.Response:
    end = time.monotonic() + 10
    while (found := ask()).status_code != status:
        assert found.is_success or found.status_code == 503, found.text
        assert time.monotonic() < end, found.text
        time.sleep(0.02)
    return found


@pytest.mark.slow
def test_files_that_can_not_grow_lose_nothing_and_it_goes_on_when_they_can(fresh: MakeServer, seed: int) -> None:
    one = fresh().start()
    no_room(one, seed, lambda: limit_files(one, 1024), lambda: limit_files(one, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_full_disk_loses_nothing_and_it_goes_on_when_there_is_room(
    fresh: MakeServer, small_disk: Path, seed: int
) -> None:
    one = fresh(data_dir=small_disk / "data").start()
    filler = small_disk / "filler"
    no_room(one, seed, lambda: fill(filler), filler.unlink)


def fill(filler: Path) -> None:
    """Write until the disk is full."""
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(1024))


def no_room(one: Server, seed: int, take: Callable[[], None], give: Callable[[], None]) -> None:
    """Take the room away under a storm, give it back, twice; then kill the server and look."""
    for session in ("kept", "control"):
        one.steps(session, "abc", model=MODEL)
    with Storm("disk", [one], seed, clients=16) as storm:
        for _ in range(2):
            time.sleep(0.7)
            take()
            is_refused(one)
            give()
            wait_for(200, lambda: one.http.get("/readyz"))
            storm.count.update(rounds=1)
    storm.check(one.restart())


def test_a_read_only_data_folder_is_refused_and_nothing_is_lost(
    few: Path, fresh: MakeServer, small_disk: Path, tmp_path: Path
) -> None:
    one = fresh(data_dir=small_disk / "data").start()
    one.steps("kept", "abc", model=MODEL)
    one.kill()
    remount(small_disk, "ro")
    log = tmp_path / "refused.log"
    process = spawn(log, models_dir=few, data_dir=small_disk / "data", port=free_port())
    assert process.wait(START_S) not in (0, None)
    printed = log.read_text().strip()
    assert "RECURRA_DATA_DIR" in printed and len(printed.splitlines()) == 1, printed
    remount(small_disk, "rw")
    assert one.start().position("kept") == 3


# ---------------------------------------------------------------------- damage


@pytest.mark.slow
def test_a_damaged_page_is_never_answered_wrongly(fresh: MakeServer, seed: int) -> None:
    rng = random.Random(seed)
    one = fresh().start()
    texts = {f"s{i}": "".join(rng.choices(LETTERS, k=rng.randint(20, 400))) for i in range(24)}
    for session, text in texts.items():
        for start in range(0, len(text), 50):
            one.steps(session, text[start : start + 50], model=MODEL, predictions="none")
    states = {session: one.state(session) for session in texts}
    one.terminate()
    file = Path(str(one.settings["data_dir"])) / "sessions.sqlite"
    whole = file.read_bytes()
    refused = 0
    for _ in range(4):
        for other in file.parent.glob("sessions.sqlite-*"):
            other.unlink()
        file.write_bytes(whole)
        damage_page(file, rng)
        refused += count_refusals(one, texts, states) if start_or_refused(one) else 1
    file.write_bytes(whole)


def damage_page(file: Path, rng: random.Random) -> None:
    """Overwrite a part of one page that is not the first."""
    page = rng.randrange(1, file.stat().st_size // PAGE)
    with file.open("r+b") as opened:
        opened.seek(page * PAGE + rng.choice([0, rng.randrange(PAGE - 300)]))
        opened.write(rng.randbytes(300))


def start_or_refused(one: Server) -> bool:
    """Start on damaged data: it serves what it can, or refuses with one line that names the folder."""
    one.log.write_bytes(b"")
    one.process = spawn(one.log, **one.settings)
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if one.process.poll() is not None:
            assert "RECURRA_DATA_DIR" in one.output() and "Traceback" not in one.output(), one.output()
            one.process = None
            return False
        try:
            one.http.get("/healthz")
            return True
        except httpx.TransportError:
            time.sleep(0.03)
    raise AssertionError(one.output())


def count_refusals(one: Server, texts: dict[str, str], states: dict[str, Any]) -> int:
    """Every answer is right or says that it can not be given; how many said so."""
    refused = 0
    for session, text in texts.items():
        for path, right in (
            (f"/v1/sessions/{session}/log", lambda body, text=text: "".join(e["input"] for e in body["data"]) == text),
            (f"/v1/sessions/{session}/state", lambda body, s=session: body["state"] == states[s]),
            (f"/v1/sessions/{session}", lambda body, text=text: body["position"] == len(text)),
        ):
            found = one.http.get(path, headers={"Accept": "application/json"})
            if found.status_code == 200:
                assert right(found.json()), (path, found.text[:300])
            else:
                assert found.status_code in (500, 503) and found.json()["code"] in ("internal", "not_ready"), found.text
                refused += 1
    one.kill()
    return refused


def test_snapshots_that_can_not_be_read_are_passed_over(fresh: MakeServer, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices(LETTERS, k=300))
    one = fresh().start()
    for start in range(0, 300, 10):
        one.steps("s", text[start : start + 10], model=MODEL, predictions="none")
    before = one.state("s")
    one.terminate()
    file = Path(str(one.settings["data_dir"])) / "sessions.sqlite"
    with closing(sqlite3.connect(file)) as db, db:
        assert db.execute("SELECT count(*) FROM snapshots").fetchone()[0] >= 2
        db.execute("UPDATE snapshots SET snapshot = CAST(replace(snapshot, 'F32', 'F23') AS BLOB)")
    one.start()
    assert one.state("s") == before
    assert one.steps("s", "abc", position=300)["position"] == 303
    assert one.state("s") == folded(one, MODEL, list(text + "abc"))
    assert "snapshot_unreadable" in one.output()


# ---------------------------------------------------------------------- clocks


def test_a_clock_that_jumps_is_not_noticed_by_sessions_without_ttl(
    fresh: MakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    clock = tmp_path / "shift"
    clock.write_text("0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CLOCK_SHIFT", str(clock))
    one = fresh().start()
    one.steps("mortal", "abc", model=MODEL)
    assert one.http.patch("/v1/sessions/mortal", json={"ttl_s": 3600}).status_code == 200
    position, before = 0, one.session("mortal")["updated_at"]
    for i, days in enumerate([0, 3650, -3650, 20_000, 0]):
        clock.write_text(str(days * DAY_S))
        for _ in range(3):
            position = one.steps("s", "ab", model=MODEL, position=position)["position"]
        if i == 2:
            one.restart()
        assert one.session("s")["position"] == position == 6 * (i + 1)
        if days == 3650:
            assert one.session("s")["updated_at"] > before  # the clock did jump
            assert one.http.get("/v1/sessions/mortal").status_code == 410
    assert one.state("s") == folded(one, MODEL, list("ab" * 15))
    assert [value for _, value in read_log(one, "s")] == list("ab" * 15)
