"""Many clients at once who come, go, cancel and delete at random: the memory is always the fold of the log."""

import asyncio
import json
import random
import socket
import time
from typing import Any

import httpx
import pytest
from live import Server, read_events, tokens_of

MODEL = "tiny-letters"


async def storm(url: str, sessions: list[str], clients: int, operations: int) -> list[int]:
    """Clients with random operations on few sessions; the statuses of all answers."""
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits, verify=False) as http:
        found = await asyncio.gather(*(client(http, sessions, random.Random(i), operations) for i in range(clients)))
    return [status for one in found for status in one]


async def client(http: httpx.AsyncClient, sessions: list[str], rng: random.Random, operations: int) -> list[int]:
    statuses: list[int] = []
    for _ in range(operations):
        path = f"/v1/sessions/{rng.choice(sessions)}"
        what = rng.choice(["steps", "steps", "generate", "leave", "cancel", "delete", "state", "look", "patch"])
        try:
            statuses.append(await operate(http, path, what, rng))
        except httpx.ReadTimeout:
            assert what == "leave"
    return statuses


async def operate(http: httpx.AsyncClient, path: str, what: str, rng: random.Random) -> int:
    text = "".join(rng.choices("abcdefghij", k=rng.randint(1, 60)))
    match what:
        case "steps":
            response = await http.post(f"{path}/steps", json={"model": MODEL, "inputs": text})
        case "generate":
            body = {"model": MODEL, "inputs": text, "max_tokens": rng.randint(1, 40)}
            response = await http.post(f"{path}/generate", json=body)
        case "leave":
            body = {"model": MODEL, "inputs": text, "max_tokens": 3000, "stream": rng.random() < 0.5}
            response = await http.post(f"{path}/generate", json=body, timeout=rng.uniform(0.01, 0.1))
        case "cancel":
            response = await http.post(f"{path}/cancel")
        case "delete" if rng.random() < 0.2:
            response = await http.delete(path)
        case "state":
            response = await http.get(f"{path}/state", headers={"Accept": "application/json"})
        case "patch":
            response = await http.patch(path, json={"metadata": {"n": rng.randint(0, 9)}})
        case _:
            response = await http.get(path)
    return response.status_code


def test_after_a_storm_the_memory_is_the_fold_of_the_log(mortal: Server, name: str) -> None:
    sessions = [f"{name}-{i}" for i in range(4)]
    statuses = asyncio.run(storm(mortal.url, sessions, clients=12, operations=12))
    assert set(statuses) <= {200, 204, 404, 409, 410, 429}
    assert statuses.count(200) > len(statuses) / 3
    before = {session: what_is_there(mortal, session) for session in sessions}
    mortal.restart()
    assert {session: what_is_there(mortal, session) for session in sessions} == before


def what_is_there(server: Server, session: str) -> Any:  # noqa: ANN401 (any JSON)
    """Where a session stands, and its state."""
    response = server.http.get(f"/v1/sessions/{session}")
    if response.status_code != 200:
        return response.status_code
    server.suspended(session)
    return server.session(session), server.state(session)


def leave_at_once(server: Server, method: str, path: str, body: object, after_s: float) -> None:
    """Send a request and close the connection without reading."""
    content = json.dumps(body).encode() if body is not None else b""
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(str(server.settings["port"]))), timeout=10) as wire:
        wire.sendall(head.encode() + content)
        time.sleep(after_s)


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_at_any_moment_leave_no_generate_running(stream: bool, server: Server, name: str) -> None:
    """Were one forgotten, the session would go on to 20,000 tokens and keep its turn."""
    body = {"model": MODEL, "inputs": "abc" * 50, "max_tokens": 20_000, "stream": stream}
    for i in range(12):
        leave_at_once(server, "POST", f"/v1/sessions/{name}-{i}/generate", body, i * 0.002)
    time.sleep(0.5)
    before = positions(server, name)
    time.sleep(0.3)
    assert positions(server, name) == before
    assert max(before.values(), default=0) < 20_000
    for session in before:
        assert server.steps(session, "a")["steps"] == 1


def test_clients_that_leave_while_resuming_leave_no_generate_running(server: Server, name: str) -> None:
    server.stream(name, 3, model=MODEL, max_tokens=20_000, seed=1)
    for i in range(15):
        leave_at_once(server, "GET", f"/v1/sessions/{name}/events?after=1.2", None, i * 0.002)
    position = server.suspended(name)
    time.sleep(0.3)
    assert server.position(name) == position < 20_000
    alone = server.generate(f"{name}-alone", model=MODEL, max_tokens=position, seed=1)
    with server.http.stream("GET", f"/v1/sessions/{name}/events?after=1.0") as response:
        found = read_events(response, position - 1)
    assert tokens_of(found) == alone["tokens"][: position - 1]


def positions(server: Server, prefix: str) -> dict[str, int]:
    listed = server.ok(server.http.get("/v1/sessions?limit=1000"))["data"]
    return {one["id"]: one["position"] for one in listed if one["id"].startswith(prefix)}


def test_what_waits_for_a_deleted_session_is_told_so(server: Server, name: str) -> None:
    async def work() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=30, verify=False) as http:
            path = f"/v1/sessions/{name}"
            body = {"model": MODEL, "max_tokens": 20_000}
            generating = asyncio.create_task(http.post(f"{path}/generate", json=body))
            for _ in range(1000):
                if (await http.get(path)).status_code == 200:
                    break
                await asyncio.sleep(0.01)
            deleting = asyncio.create_task(http.delete(path))
            await asyncio.sleep(0.05)
            waiting = [asyncio.create_task(http.post(f"{path}/steps", json={"inputs": "a"})) for _ in range(3)]
            return list(await asyncio.gather(generating, deleting, *waiting))

    generated, deleted, *fed = asyncio.run(work())
    assert generated.json()["finish_reason"] == "cancelled" and deleted.status_code == 204
    assert {response.status_code for response in fed} == {410}


def test_a_long_feed_holds_nobody_up(server: Server, name: str) -> None:
    """Streams and looks go on while 90,000 steps are folded."""

    async def work() -> tuple[float, list[float], httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, verify=False) as http:
            body = {"model": MODEL, "inputs": "abcdefghi" * 10_000, "predictions": "none"}
            feeding = asyncio.create_task(http.post(f"/v1/sessions/{name}/steps", json=body))
            took: list[float] = []
            start = time.monotonic()
            while not feeding.done():
                began = time.monotonic()
                fed = await http.post(f"/v1/sessions/{name}-small/steps", json={"model": MODEL, "inputs": "a"})
                assert fed.status_code == 200
                took.append(time.monotonic() - began)
            whole = time.monotonic() - start
            return whole, took, await feeding

    whole, took, answer = asyncio.run(work())
    assert answer.json()["position"] == 90_000
    assert len(took) >= 5 and max(took) < whole / 2, took
