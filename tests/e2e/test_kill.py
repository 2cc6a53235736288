"""kill -9, SIGTERM and restarts: nothing that was answered is lost, nothing is done twice."""

import json
import random
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import (
    START_S,
    MakeServer,
    Server,
    SseEvent,
    environment,
    events_of,
    free_port,
    read_events,
    spawn,
    text_of,
    tokens_of,
)
from tiny import TINY, every_model, newest, some_inputs

WRITE = {"max_tokens": 400, "seed": 11}


def manifest_inputs(models: Path, model: str, count: int, seed: int = 0) -> list[Any]:
    return some_inputs(newest(models, model).manifest, count, seed)


@pytest.mark.parametrize("model", every_model())
def test_a_killed_server_remembers_every_bit(model: str, models: Path, mortal: Server, server: Server) -> None:
    before, after = manifest_inputs(models, model, 300, 1), manifest_inputs(models, model, 5, 2)
    unbroken, killed = f"unbroken-{model}", f"killed-{model}"
    fed = mortal.steps(killed, before, model=model, predictions="all")
    assert fed == {**server.steps(unbroken, before, model=model, predictions="all"), "session": killed}
    mortal.restart()
    assert mortal.position(killed) == 300
    assert mortal.state(killed) == server.state(unbroken)
    assert mortal.steps(killed, after, predictions="all") == {
        **server.steps(unbroken, after, predictions="all"),
        "session": killed,
    }
    assert mortal.state(killed) == server.state(unbroken)


def test_many_restarts_change_nothing(models: Path, mortal: Server, name: str, server: Server) -> None:
    inputs = manifest_inputs(models, "tiny-letters", 12)
    server.steps("no-restarts", inputs, model="tiny-letters")
    for i in range(0, 12, 4):
        mortal.steps(name, inputs[i : i + 4], model="tiny-letters", position=i)
        mortal.restart()
    assert mortal.state(name) == server.state("no-restarts")


def test_a_restart_keeps_seed_metadata_and_epoch(mortal: Server, name: str) -> None:
    made = mortal.create("tiny-letters", name, seed=77, metadata={"room": ["kitchen", 1.5, None]}, ttl_s=3600)
    mortal.restart()
    assert mortal.session(name) == made


def test_a_deleted_session_stays_deleted_and_its_epoch_is_not_used_again(mortal: Server, name: str) -> None:
    epoch = mortal.create("tiny-letters", name)["epoch"]
    assert mortal.http.delete(f"/v1/sessions/{name}").status_code == 204
    mortal.restart()
    assert mortal.http.get(f"/v1/sessions/{name}").status_code == 410
    assert mortal.create("tiny-letters", name)["epoch"] > epoch


# ---------------------------------------------------------------------- generates


def cut_by_kill(one: Server, session: str, tokens: int, **body: object) -> list[SseEvent]:
    """Read some tokens of a stream, kill the server under it, and say what had arrived."""
    path = f"/v1/sessions/{session}/generate"
    with one.http.stream("POST", path, json={**body, "stream": True}) as response:
        stream = events_of(response)
        seen = [next(stream) for _ in range(tokens)]
        assert one.process is not None
        one.process.kill()
        seen += rest_of(stream)
    one.kill()
    return seen


def rest_of(stream: Any) -> list[SseEvent]:  # noqa: ANN401 (a generator)
    """What still arrives before the connection breaks."""
    rest: list[SseEvent] = []
    with suppress(httpx.TransportError, AssertionError):
        rest.extend(stream)
    return rest


@pytest.mark.parametrize("tokens", [1, 40, 150])
def test_a_stream_cut_by_kill_is_resumed_to_the_very_same_text(
    tokens: int, mortal: Server, name: str, server: Server
) -> None:
    body = {**WRITE, "model": "tiny-letters", "inputs": "abba"}
    whole = server.stream(f"whole-{tokens}", **body)
    seen = cut_by_kill(mortal, name, tokens, **body)
    assert "done" not in {event.event for event in seen}
    mortal.start()
    rest = mortal.resume(name, seen[-1].id)
    assert text_of(seen) + text_of(rest) == text_of(whole)
    assert tokens_of(seen) + tokens_of(rest) == tokens_of(whole)
    assert [event.id for event in seen + rest] == [event.id for event in whole]
    assert rest[-1].data == whole[-1].data
    assert mortal.state(name) == server.state(f"whole-{tokens}")


def test_every_token_that_was_sent_is_in_the_log_after_a_kill(mortal: Server, name: str) -> None:
    seen = cut_by_kill(mortal, name, 30, **WRITE, model="tiny-letters", inputs="a")
    mortal.start()
    assert mortal.position(name) >= seen[-1].data["position"]
    again = mortal.resume(name, "1.0")
    assert tokens_of(again)[: len(seen)] == tokens_of(seen)


def test_a_generate_cut_by_kill_is_abandoned_by_the_next_step(mortal: Server, name: str) -> None:
    seen = cut_by_kill(mortal, name, 10, **WRITE, model="tiny-letters")
    mortal.start()
    position = mortal.position(name)
    assert mortal.steps(name, "ab")["position"] == position + 2
    replay = mortal.resume(name, seen[0].id)
    assert replay[-1].event == "done" and replay[-1].data["finish_reason"] == "cancelled"
    assert mortal.position(name) == position + 2


def test_a_json_generate_cut_by_kill_goes_on_with_events(mortal: Server, name: str, server: Server) -> None:
    body = {"max_tokens": 1500, "seed": 3, "inputs": "cd", "model": "tiny-letters"}
    whole = server.generate("json-whole", **body)
    failed: list[Exception] = []

    def ask() -> None:
        try:
            httpx.post(f"{mortal.url}/v1/sessions/{name}/generate", json=body, timeout=30)
        except httpx.TransportError as error:
            failed.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for_position(mortal, name, 50)
    mortal.kill()
    asking.join(10)
    assert failed
    mortal.start()
    events = mortal.resume(name, "1.0")
    assert tokens_of(events) == whole["tokens"] and text_of(events) == whole["text"]


def wait_for_position(one: Server, session: str, position: int) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        response = one.http.get(f"/v1/sessions/{session}")
        if response.status_code == 200 and response.json()["position"] >= position:
            return
        time.sleep(0.01)
    raise AssertionError(f"{session} never reached position {position}")


# ---------------------------------------------------------------------- kills under load


class Feeder(threading.Thread):
    """Feeds one session step after step until the server dies, fencing with the position."""

    def __init__(self, url: str, session: str, model: str, entries: list[Any], done: int) -> None:
        super().__init__(daemon=True)
        self.url, self.session, self.model, self.entries = url, session, model, entries
        self.acknowledged = done
        self.refused: str | None = None

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=20, verify=False) as http:
            while self.acknowledged < len(self.entries):
                i = self.acknowledged
                body = {"inputs": [self.entries[i]], "position": i}
                body |= {"model": self.model} if i == 0 else {}
                try:
                    response = http.post(f"/v1/sessions/{self.session}/steps", json=body)
                except httpx.TransportError:
                    return
                if response.status_code != 200:
                    self.refused = response.text
                    return
                self.acknowledged = response.json()["position"]


@pytest.mark.parametrize(("durability", "rounds"), [("commit", 2), ("fsync", 1)])
def test_kills_at_random_moments_lose_and_double_nothing(
    durability: str, rounds: int, models: Path, fresh: MakeServer
) -> None:
    rng = random.Random(5)
    chosen = {f"s{i}": list(TINY)[i % len(TINY)] for i in range(16)}
    entries = {s: manifest_inputs(models, m, 4000, i) for i, (s, m) in enumerate(chosen.items())}
    done = dict.fromkeys(chosen, 0)
    one = fresh(durability=durability)
    for _ in range(rounds):
        one.start()
        feeders = [Feeder(one.url, s, m, entries[s], done[s]) for s, m in chosen.items()]
        for feeder in feeders:
            feeder.start()
        wait_for_steps(feeders, sum(done.values()) + rng.randint(60, 300))
        time.sleep(rng.uniform(0, 0.02))
        one.kill()
        for feeder in feeders:
            feeder.join(10)
            assert not feeder.is_alive() and feeder.refused is None, feeder.refused
        one.start()
        for feeder in feeders:
            done[feeder.session] = check_position(one, feeder)
        one.kill()
    one.start()
    assert sum(done.values()) >= 60
    for session, model in chosen.items():
        control = f"control-{session}"
        one.steps(control, entries[session][: done[session]], model=model, predictions="none")
        assert one.state(session) == one.state(control), session


def wait_for_steps(feeders: list[Feeder], steps: int) -> None:
    end = time.monotonic() + 20
    while sum(feeder.acknowledged for feeder in feeders) < steps:
        assert time.monotonic() < end, "the server is too slow"
        time.sleep(0.002)


def check_position(one: Server, feeder: Feeder) -> int:
    """The position after a kill: the last acknowledged, or the one step more that was in flight."""
    response = one.http.get(f"/v1/sessions/{feeder.session}")
    if response.status_code == 404:
        assert feeder.acknowledged == 0
        return 0
    position = int(response.json()["position"])
    assert feeder.acknowledged <= position <= feeder.acknowledged + 1
    return position


# ---------------------------------------------------------------------- SIGTERM


def test_sigterm_ends_with_exit_code_0(mortal: Server, name: str) -> None:
    mortal.steps(name, "abc", model="tiny-letters")
    assert mortal.terminate() == 0


def test_sigterm_suspends_a_stream_that_is_resumed_after_the_restart(mortal: Server, name: str, server: Server) -> None:
    body = {"max_tokens": 1500, "seed": 21, "inputs": "e", "model": "tiny-letters"}
    with mortal.http.stream("POST", f"/v1/sessions/{name}/generate", json={**body, "stream": True}) as response:
        stream = events_of(response)
        seen = [next(stream) for _ in range(20)]
        assert mortal.process is not None
        mortal.process.terminate()
        seen += list(stream)
    assert mortal.terminate_wait() == 0
    assert {event.event for event in seen} == {"token"}
    mortal.start()
    rest = mortal.resume(name, seen[-1].id)
    assert rest[-1].event == "done"
    whole = server.generate("sigterm-whole", **body)
    assert tokens_of(seen) + tokens_of(rest) == whole["tokens"]


def test_sigterm_ends_in_time_with_long_work_under_way(fresh: MakeServer) -> None:
    one = fresh(grace_s=1).start()
    long = {"max_tokens": 100_000, "temperature": 1, "seed": 1}
    asking = [
        background_post(one, "/v1/models/tiny-letters/generate", {**long, "stream": True}),
        background_post(one, "/v1/models/tiny-letters/generate", long),
        background_post(one, "/v1/sessions/s/generate", {**long, "model": "tiny-letters"}),
        background_post(one, "/v1/sessions/f/steps", {"model": "tiny-letters", "inputs": "abcdefgh" * 100_000}),
    ]
    time.sleep(0.7)
    began = time.monotonic()
    assert one.terminate() == 0
    assert time.monotonic() - began < 8
    for thread in asking:
        thread.join(10)
        assert not thread.is_alive()


def test_sigterm_ends_in_time_with_a_client_that_does_not_read(fresh: MakeServer) -> None:
    one = fresh(grace_s=1, store="memory").start()
    body = json.dumps({"max_tokens": 100_000, "seed": 1, "stream": True}).encode()
    head = b"POST /v1/models/tiny-letters/generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect(("127.0.0.1", int(str(one.settings["port"]))))
        wire.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        time.sleep(1.5)
        began = time.monotonic()
        assert one.terminate() == 0
        assert time.monotonic() - began < 8


def background_post(one: Server, path: str, body: object) -> threading.Thread:
    def ask() -> None:
        try:
            with httpx.stream("POST", one.url + path, json=body, timeout=30) as response:
                for _ in response.iter_bytes():
                    pass
        except httpx.TransportError:
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    return thread


def test_what_was_fed_before_sigterm_is_there_after_it(mortal: Server, name: str) -> None:
    mortal.steps(name, "abcabc", model="tiny-letters")
    before = mortal.state(name)
    mortal.terminate()
    mortal.start()
    assert mortal.position(name) == 6 and mortal.state(name) == before


# ---------------------------------------------------------------------- data folders


def test_a_second_process_on_the_same_data_refuses_with_one_clear_line(mortal: Server, tmp_path: Path) -> None:
    settings = {**mortal.settings, "port": free_port()}
    second = spawn(tmp_path / "second.log", **settings)
    assert second.wait(START_S) != 0
    printed = (tmp_path / "second.log").read_text().strip()
    assert "RECURRA_DATA_DIR" in printed and "in use" in printed and len(printed.splitlines()) == 1
    assert mortal.http.get("/readyz").status_code == 200


def test_a_killed_process_leaves_no_lock_behind(mortal: Server, name: str) -> None:
    mortal.create("tiny-letters", name)
    assert mortal.restart().position(name) == 0


def test_the_memory_store_forgets_and_writes_nothing(fresh: MakeServer) -> None:
    one = fresh(store="memory").start()
    one.steps("s", "abc", model="tiny-letters")
    assert one.ok(one.http.get("/readyz"))["store"] == {"kind": "memory", "durability": "memory"}
    one.restart()
    assert one.http.get("/v1/sessions/s").status_code == 404
    assert not Path(str(one.settings["data_dir"])).exists()


def test_the_memory_store_resumes_a_stream(fresh: MakeServer, server: Server) -> None:
    one = fresh(store="memory").start()
    body = {"max_tokens": 200, "seed": 9, "model": "tiny-letters"}
    seen = one.stream("s", 50, **body)
    one.suspended("s")
    rest = one.resume("s", seen[-1].id)
    assert tokens_of(seen) + tokens_of(rest) == server.generate("memory-whole", **body)["tokens"]


def test_a_restart_with_few_sessions_in_memory_gives_the_same_bits(
    models: Path, fresh: MakeServer, server: Server
) -> None:
    one = fresh(max_resident=1).start()
    inputs = manifest_inputs(models, "tiny-weather", 40)
    for i in range(40):
        for session in ("r1", "r2"):
            one.steps(session, [inputs[i]], model="tiny-weather", predictions="none")
    server.steps("resident", inputs, model="tiny-weather")
    assert one.state("r1") == one.state("r2") == server.state("resident")


def test_importing_the_service_does_not_load_torch() -> None:
    import sys

    code = "import sys, service.app; sys.exit('torch' in sys.modules or 'training' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=Path(__file__).parents[2], timeout=60)
    assert ran.returncode == 0


def test_a_stream_read_by_two_is_the_same_for_both(server: Server) -> None:
    body = {"max_tokens": 300, "seed": 4, "model": "tiny-letters", "stream": True}
    with server.http.stream("POST", "/v1/sessions/two-readers/generate", json=body) as first:
        stream = events_of(first)
        seen = [next(stream) for _ in range(5)]
        with httpx.stream("GET", f"{server.url}/v1/sessions/two-readers/events?after=1.0", timeout=30) as second:
            other = read_events(second)
        seen += list(stream)
    assert [event.id for event in other] == [event.id for event in seen]
    assert text_of(other) == text_of(seen)
