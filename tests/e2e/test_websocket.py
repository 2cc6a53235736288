"""Sessions over WebSockets: the same answers as by the routes, for clients that hurry, flood, sleep and never read."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import psutil
import pytest
from live import MakeServer, Server, problem
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from service.api.websocket import MAX_FRAGMENTS, MAX_WAITING, SEND_S

LETTERS = "tiny-letters"


def url(server: Server, session: str) -> str:
    return f"ws://127.0.0.1:{server.settings['port']}/v1/sessions/{session}/ws"


class Client:
    """A WebSocket on a session."""

    def __init__(self, server: Server, session: str, **options: Any) -> None:  # noqa: ANN401 (of the library)
        self._entered = ExitStack()
        connecting = connect(url(server, session), proxy=None, max_size=None, close_timeout=1, **options)
        self.socket: ClientConnection = self._entered.enter_context(connecting)
        self.hello = self.receive()

    def close(self) -> None:
        self._entered.close()

    def send(self, kind: str, **members: object) -> None:
        self.socket.send(json.dumps({"type": kind, **members}))

    def receive(self) -> Any:  # noqa: ANN401 (any JSON)
        return json.loads(self.socket.recv(timeout=30))

    def ask(self, kind: str, **members: object) -> Any:  # noqa: ANN401 (any JSON)
        self.send(kind, **members)
        return self.receive()

    def all(self) -> list[Any]:
        """The messages up to the one that ends an operation."""
        found = [self.receive()]
        while found[-1]["type"] == "token":
            found.append(self.receive())
        return found

    def write(self, **members: object) -> list[Any]:
        self.send("generate", **members)
        return self.all()

    def closed(self) -> int:
        """The code that the service closes with."""
        with pytest.raises(ConnectionClosed) as raised:
            while True:
                self.socket.recv(timeout=30)
        assert raised.value.rcvd is not None, "it was cut off"
        return int(raised.value.rcvd.code)


Open = Callable[..., Client]


@pytest.fixture
def opened() -> Iterator[Open]:
    with ExitStack() as stack:

        def make(server: Server, session: str, **options: Any) -> Client:  # noqa: ANN401 (of the library)
            client = Client(server, session, **options)
            stack.callback(client.close)
            return client

        yield make


def rested(server: Server, session: str) -> int:
    return server.suspended(session, 20.0)


# ---------------------------------------------------------------------- the same as the routes


def test_hello_says_where_the_session_stands(server: Server, name: str, opened: Open) -> None:
    server.steps(name, "abc", model=LETTERS)
    hello = opened(server, name).hello
    assert hello == {"type": "hello", "session": name, "epoch": 1, "position": 3, "idle_timeout_s": 3600.0}


FEEDS: list[dict[str, Any]] = [
    {"inputs": "abc"},
    {"inputs": "d", "alternatives": 2},
    {"inputs": "defghij" * 50, "predictions": "all", "alternatives": 3},
    {"inputs": [3, 4], "predictions": "none"},
    {"inputs": "ab", "position": 3 + 1 + 350 + 2, "model": LETTERS},
]


def test_steps_are_answered_as_by_their_route(server: Server, name: str, opened: Open) -> None:
    for session in (name, f"{name}-ws"):
        server.create(LETTERS, session, seed=1)
    client = opened(server, f"{name}-ws")
    for number, body in enumerate(FEEDS):
        by_route = server.post(f"/v1/sessions/{name}/steps", body).text
        client.send("steps", ref=number, **body)
        by_socket = str(client.socket.recv(timeout=30))
        assert by_socket + "\n" == by_route.replace("{", f'{{"type":"prediction","ref":{number},', 1).replace(
            f'"{name}"', f'"{name}-ws"', 1
        )
    assert server.state(name) == server.state(f"{name}-ws")
    assert server.log_of(name)[-1]["position"] == client.ask("steps", inputs="a", position=356 + 2)["position"] - 1


WRITES: list[dict[str, Any]] = [
    {"inputs": "abc", "max_tokens": 40},
    {"max_tokens": 25, "temperature": 0.7, "seed": 9},
    {"inputs": "j", "max_tokens": 60, "stop": ["a", "b"]},
]


def test_a_generate_is_answered_as_by_its_stream(server: Server, name: str, opened: Open) -> None:
    for session in (name, f"{name}-ws"):
        server.create(LETTERS, session, seed=1)
    client = opened(server, f"{name}-ws")
    for body in WRITES:
        by_route = server.stream(name, **body)
        by_socket = client.write(ref="w", **body)
        assert [one["type"] for one in by_socket] == [event.event for event in by_route]
        for message, event in zip(by_socket, by_route, strict=True):
            extra = {"id": event.id} if event.event == "token" else {}
            assert message == {"type": event.event, "ref": "w", **extra, **event.data}
    assert server.state(name) == server.state(f"{name}-ws")


def test_a_generate_in_one_message(server: Server, name: str, opened: Open) -> None:
    for session in (name, f"{name}-ws"):
        server.create(LETTERS, session, seed=1)
    client = opened(server, f"{name}-ws")
    body = {"inputs": "abc", "max_tokens": 12, "logprobs": 2}
    by_route = server.generate(name, **body)
    message = client.ask("generate", stream=False, key="once", **body)
    assert message == {"type": "done", **by_route, "session": f"{name}-ws"}
    again = client.ask("generate", stream=False, key="once", **body)
    assert again == {**message, "replayed": True}


def test_many_sockets_at_once(server: Server, name: str) -> None:
    """100 sockets, each with its own steps and generates in between: each session is what it would be alone."""

    async def one(number: int) -> list[Any]:
        async with connect_async(url(server, f"{name}-{number}"), proxy=None) as socket:
            await socket.recv()
            for i in range(5):
                await socket.send(json.dumps({"type": "steps", "ref": i, "inputs": "abcdefghij"[number % 7 : 8]}))
                await socket.send(json.dumps({"type": "generate", "ref": f"g{i}", "max_tokens": 5 + number % 3}))
            found: list[Any] = []
            while sum(message["type"] == "done" for message in found) < 5:
                found.append(json.loads(await socket.recv()))
            return found

    async def many() -> list[list[Any]]:
        return await asyncio.gather(*(one(number) for number in range(100)))

    for number in range(100):
        server.create(LETTERS, f"{name}-{number}", seed=number)
    answers = asyncio.run(many())
    for number in range(0, 100, 9):
        alone = f"{name}-{number}-alone"
        server.create(LETTERS, alone, seed=number)
        expected: list[str] = []
        for _ in range(5):
            server.steps(alone, "abcdefghij"[number % 7 : 8])
            expected.append(server.generate(alone, max_tokens=5 + number % 3)["text"])
        refs = [message["ref"] for message in answers[number] if message["type"] != "token"]
        assert refs == [ref for i in range(5) for ref in (i, f"g{i}")]
        texts = [
            "".join(m["text"] for m in answers[number] if m["type"] == "token" and m["ref"] == f"g{i}")
            for i in range(5)
        ]
        assert texts == expected and server.state(f"{name}-{number}") == server.state(alone)


def test_sockets_on_one_session_take_turns(server: Server, name: str) -> None:
    server.create(LETTERS, name)

    async def feed(letter: str) -> list[int]:
        async with connect_async(url(server, name), proxy=None) as socket:
            await socket.recv()
            positions = []
            for _ in range(20):
                await socket.send(json.dumps({"type": "steps", "inputs": letter}))
                positions.append(json.loads(await socket.recv())["position"])
            return positions

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(feed(letter) for letter in "abcdefgh"))

    found = asyncio.run(all_of_them())
    logged = "".join(one["input"] for one in server.log_of(name))
    assert len(logged) == 160
    for letter, positions in zip("abcdefgh", found, strict=True):
        assert [at for at, symbol in enumerate(logged, 1) if symbol == letter] == positions


# ---------------------------------------------------------------------- keys, crashes, restarts


def test_a_key_is_the_routes_key(server: Server, name: str, opened: Open) -> None:
    server.create(LETTERS, name)
    client = opened(server, name)
    body = {"inputs": "abc", "predictions": "all"}
    first = client.ask("steps", key="one", **body)
    again = client.ask("steps", key="one", **body)
    assert again == {**first, "replayed": True}
    by_route = server.post(f"/v1/sessions/{name}/steps", body, "one")
    assert by_route.headers["idempotent-replayed"] == "true"
    assert {"type": "prediction", **by_route.json()} == first
    assert client.ask("steps", key="one", inputs="x")["code"] == "idempotency_key_reused"
    assert server.position(name) == 3


def test_kill_9_and_connect_again(mortal: Server, name: str, opened: Open) -> None:
    mortal.create(LETTERS, name, seed=4)
    mortal.create(LETTERS, f"{name}-whole", seed=4)
    whole = mortal.stream(f"{name}-whole", inputs="abc", max_tokens=3000)
    client = opened(mortal, name)
    client.send("generate", ref=1, inputs="abc", max_tokens=3000, key="long")
    seen = [client.receive() for _ in range(20)]
    mortal.restart()
    client = opened(mortal, name)
    assert 20 + 3 <= client.hello["position"] <= 3003
    messages = client.write(ref=2, inputs="abc", max_tokens=3000, key="long")
    assert [one["id"] for one in messages[:-1]] == [event.id for event in whole[:-1]]
    assert [one["token"] for one in messages[:-1]] == [event.data["token"] for event in whole[:-1]]
    assert [one["id"] for one in seen] == [event.id for event in whole[:20]]
    assert mortal.position(name) == 3003
    assert client.ask("steps", inputs="a")["position"] == 3004


def test_a_client_that_leaves_suspends_its_generate(server: Server, name: str) -> None:
    server.create(LETTERS, name, seed=4)
    client = Client(server, name)
    client.send("generate", inputs="abc", max_tokens=20_000)
    first = [client.receive() for _ in range(3)]
    client.close()
    position = rested(server, name)
    assert position < 20_003
    resumed = server.resume(name, first[-1]["id"], 30)
    assert [event.data["position"] for event in resumed] == list(range(7, 37))


def test_sigterm_closes_with_1012(fresh: MakeServer, name: str, opened: Open) -> None:
    one = fresh().start()
    one.create(LETTERS, name)
    idle, busy = opened(one, name), opened(one, name)
    busy.send("generate", inputs="abc", max_tokens=100_000, key="long")
    for _ in range(5):
        busy.receive()
    assert one.process is not None
    one.process.terminate()
    assert idle.closed() == busy.closed() == 1012
    assert one.terminate_wait() == 0
    one.start()
    assert 8 <= one.position(name) < 100_000


# ---------------------------------------------------------------------- cancel


def test_cancel_while_it_writes(server: Server, name: str, opened: Open) -> None:
    server.create(LETTERS, name)
    client = opened(server, name)
    client.send("generate", ref="g", inputs="abc", max_tokens=20_000)
    client.send("steps", ref="s", inputs="abc")
    client.receive()
    client.send("cancel", ref="g")
    done = client.all()[-1]
    assert (done["type"], done["ref"], done["finish_reason"]) == ("done", "g", "cancelled")
    fed = client.receive()
    assert (fed["type"], fed["ref"], fed["position"]) == ("prediction", "s", done["position"] + 3)
    assert server.position(name) == fed["position"] < 20_000


def test_cancel_of_what_waits(server: Server, name: str, opened: Open) -> None:
    server.create(LETTERS, name)
    client = opened(server, name)
    client.send("generate", ref=1, inputs="abc", max_tokens=20_000)
    client.receive()
    client.send("steps", ref=2, inputs="abc")
    client.send("cancel", ref=2)
    client.send("cancel", ref=1)
    ends = [message for _ in range(2) for message in client.all() if message["type"] != "token"]
    assert {(end["type"], end["ref"], end["finish_reason"]) for end in ends} == {
        ("done", 1, "cancelled"),
        ("done", 2, "cancelled"),
    }
    position = next(end["position"] for end in ends if end["ref"] == 1)
    assert client.ask("steps", inputs="a")["position"] == position + 1


def test_cancel_of_one_that_has_no_turn_yet(server: Server, name: str, opened: Open) -> None:
    server.create(LETTERS, name)
    first, second = opened(server, name), opened(server, name)
    first.send("generate", ref=1, max_tokens=20_000)
    first.receive()
    second.send("generate", ref=2, inputs="abc", max_tokens=10)
    second.send("cancel", ref=2)
    assert second.receive() == {"type": "done", "ref": 2, "finish_reason": "cancelled"}
    first.send("cancel", ref=1)
    done = first.all()[-1]
    assert done["finish_reason"] == "cancelled" and server.position(name) == done["position"]


def test_cancel_of_a_generate_that_goes_on(server: Server, name: str, opened: Open) -> None:
    server.create(LETTERS, name)
    body = {"inputs": "abc", "max_tokens": 20_000, "key": "long"}
    first = Client(server, name)
    first.send("generate", **body)
    before = [first.receive() for _ in range(3)]
    first.close()
    rested(server, name)
    client = opened(server, name)
    client.send("generate", ref=2, **body)
    assert [client.receive() for _ in range(3)] == [{**message, "ref": 2} for message in before]
    client.send("cancel", ref=2)
    done = client.all()[-1]
    assert (done["ref"], done["finish_reason"], done["position"]) == (2, "cancelled", server.position(name))
    assert server.position(name) < 20_003


def test_cancel_without_a_ref_ends_what_is_suspended(server: Server, name: str, opened: Open) -> None:
    server.create(LETTERS, name)
    server.stream(name, 5, max_tokens=20_000)
    position = rested(server, name)
    client = opened(server, name)
    assert client.ask("cancel") == {"type": "done", "finish_reason": "cancelled", "epoch": 1, "position": position}
    assert server.resume(name, f"1.{position}")[-1].data["finish_reason"] == "cancelled"


def test_cancel_of_nothing_is_an_error(server: Server, name: str, opened: Open) -> None:
    server.create(LETTERS, name)
    found = opened(server, name).ask("cancel", ref="nothing")
    assert (found["type"], found["ref"], found["code"]) == ("error", "nothing", "bad_request")


# ---------------------------------------------------------------------- refusals


def test_sessions_that_do_not_live(server: Server, name: str, opened: Open) -> None:
    for session in (name, "%00", "a%20b", "x" * 200):
        client = opened(server, session)
        assert (client.hello["type"], client.hello["code"]) == ("error", "session_not_found")
        assert client.closed() == 4404
    server.create(LETTERS, name)
    open_before = opened(server, name)
    server.http.delete(f"/v1/sessions/{name}")
    client = opened(server, name)
    assert client.hello["code"] == "session_closed" and client.closed() == 4410
    assert open_before.ask("steps", inputs="a")["code"] == "session_closed" and open_before.closed() == 4410


MALFORMED: list[tuple[str | bytes, str]] = [
    ("", "bad_request"),
    ("no JSON", "bad_request"),
    ("[]", "bad_request"),
    ("3", "bad_request"),
    ("{}", "bad_request"),
    ('{"type":7}', "bad_request"),
    ('{"type":"dance"}', "bad_request"),
    (b'{"type":"steps","inputs":"a"}', "bad_request"),
    ("[" * 50_000, "bad_request"),
    ('{"type":"steps"}', "invalid_input"),
    ('{"type":"steps","inputs":"a","more":1}', "invalid_input"),
    ('{"type":"steps","inputs":"a","ref":{}}', "invalid_input"),
    ('{"type":"steps","inputs":"a","ref":true}', "invalid_input"),
    ('{"type":"steps","inputs":"a","key":""}', "bad_request"),
    ('{"type":"steps","inputs":"X"}', "unknown_symbol"),
    ('{"type":"steps","inputs":"a","position":7}', "position_mismatch"),
    ('{"type":"steps","inputs":"a","model":"tiny-tags"}', "model_mismatch"),
    ('{"type":"generate","max_tokens":0}', "invalid_input"),
    ('{"type":"generate","max_tokens":1000000}', "invalid_input"),
    ('{"type":"cancel","ref":1.5}', "invalid_input"),
    ('{"type":"cancel","inputs":"a"}', "invalid_input"),
]


def test_malformed_messages_are_answered(server: Server, name: str, opened: Open) -> None:
    server.create(LETTERS, name)
    client = opened(server, name)
    for text, code in MALFORMED:
        client.socket.send(text)
        found = client.receive()
        assert (found["type"], found["code"]) == ("error", code), text
        assert {"title", "status", "detail"} <= set(found)
    assert client.ask("steps", ref="r", inputs="X")["ref"] == "r"
    assert client.ask("steps", inputs="ab")["position"] == 2


def test_large_messages(server: Server, name: str, opened: Open) -> None:
    limit = 100_000  # of the shared server
    server.create(LETTERS, name)
    client = opened(server, name)
    assert client.ask("steps", inputs="a" * 90_000)["position"] == 90_000
    client.send("steps", inputs="a" * limit)
    assert client.closed() == 1009
    client = opened(server, name)
    with pytest.raises(ConnectionClosed) as raised:
        client.socket.send("" for _ in range(100 * MAX_FRAGMENTS))
        client.receive()
    # What was still being sent meets a closed connection, and the reset may overtake the reason.
    assert raised.value.rcvd is None or raised.value.rcvd.code == 1009
    assert server.position(name) == 90_000


def test_pages_of_other_sites_are_refused(server: Server, name: str, opened: Open) -> None:
    server.create(LETTERS, name)
    with pytest.raises(InvalidStatus) as raised:
        opened(server, name, origin="http://evil.example")
    assert raised.value.response.status_code == 403
    assert opened(server, name, origin=f"http://127.0.0.1:{server.settings['port']}").hello["type"] == "hello"


def test_without_a_websocket_it_is_said(server: Server, name: str) -> None:
    response = server.http.get(f"/v1/sessions/{name}/ws")
    problem(response, 426, "upgrade_required")
    assert response.headers["upgrade"] == "websocket"
    page = server.http.get("/openapi.json").json()
    assert "hello" in page["paths"]["/v1/sessions/{session_id}/ws"]["get"]["description"]


# ---------------------------------------------------------------------- clients that flood, sleep and never read


def test_more_than_may_wait_is_done_in_order(server: Server, name: str, opened: Open) -> None:
    server.create(LETTERS, name)
    client = opened(server, name)
    count = 5 * MAX_WAITING

    def send() -> None:
        for number in range(count):
            client.send("steps", ref=number, inputs="ab")

    sending = threading.Thread(target=send)
    sending.start()
    answers = [client.receive() for _ in range(count)]
    sending.join(30)
    assert [(one["ref"], one["position"]) for one in answers] == [(i, 2 * i + 2) for i in range(count)]


def test_an_idle_socket_is_closed(fresh: MakeServer, name: str, opened: Open) -> None:
    one = fresh(ws_idle_s=3).start()
    one.create(LETTERS, name)
    client = opened(one, name)
    assert client.hello["idle_timeout_s"] == 3
    for _ in range(3):
        time.sleep(1.2)
        client.ask("steps", inputs="a")
    began = time.monotonic()
    assert client.closed() == 1000
    assert time.monotonic() - began > 2.5


def test_a_socket_that_is_answered_is_not_idle(fresh: MakeServer, name: str, opened: Open) -> None:
    one = fresh(ws_idle_s=1).start()
    one.create(LETTERS, name)
    client = opened(one, name)
    began = time.monotonic()
    assert client.write(max_tokens=100_000)[-1]["finish_reason"] == "length"
    assert time.monotonic() - began > 1
    assert client.ask("steps", inputs="a")["position"] == 100_002


def raw(server: Server, session: str) -> socket.socket:
    """A WebSocket of which nothing is read after the handshake."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect(("127.0.0.1", int(str(server.settings["port"]))))
    key = "AAAAAAAAAAAAAAAAAAAAAA=="
    made.sendall(
        f"GET /v1/sessions/{session}/ws HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    head = b""
    while b"\r\n\r\n" not in head:
        head += made.recv(1)
    assert b" 101 " in head.split(b"\r\n")[0]
    return made


def frame(message: object) -> bytes:
    """A text frame under the mask 0."""
    data = json.dumps(message).encode()
    return bytes([0x81, 0x80 | 126]) + len(data).to_bytes(2, "big") + bytes(4) + data


def cut(one: socket.socket, within_s: float) -> bool:
    """Whether the service cuts a connection off: sending into it fails."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            one.sendall(bytes([0x8A, 0x80, 0, 0, 0, 0]))  # an unasked pong
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_one_that_never_reads_is_cut_off_and_slows_nobody(server: Server, name: str, opened: Open) -> None:
    deaf_sessions = [f"{name}-deaf-{i}" for i in range(5)]
    for session in [name, *deaf_sessions]:
        server.create(LETTERS, session)
    client = opened(server, name)

    def slowest() -> float:
        took = []
        for _ in range(100):
            began = time.perf_counter()
            client.ask("steps", inputs="a")
            took.append(time.perf_counter() - began)
        return sorted(took)[-10]

    alone = slowest()
    deaf = [raw(server, session) for session in deaf_sessions]
    try:
        for one in deaf:
            one.sendall(frame({"type": "generate", "max_tokens": 20_000}) * 10)  # more than the system's buffers hold
        for session in deaf_sessions:
            assert rested(server, session) < 200_000
        beside = slowest()
        print(f"nine of ten steps within {alone * 1000:.1f} ms alone, {beside * 1000:.1f} ms beside those")
        assert beside < 0.5
        assert all(cut(one, 3 * SEND_S) for one in deaf)
    finally:
        for one in deaf:
            one.close()
    assert client.ask("steps", inputs="a")["position"] == 201
    assert server.http.get("/readyz").status_code == 200


def test_one_that_pings_and_never_reads_is_cut_off(server: Server, name: str) -> None:
    server.create(LETTERS, name)
    one = raw(server, name)
    try:
        ping = bytes([0x89, 0x80 | 125]) + bytes(4) + bytes(125)
        with pytest.raises(OSError):
            for _ in range(5000):
                one.sendall(ping * 1000)
    finally:
        one.close()


@pytest.mark.slow
def test_two_thousand_idle_sockets(fresh: MakeServer, opened: Open) -> None:
    one = fresh().start()
    one.create(LETTERS, "s")
    assert one.process is not None
    process = psutil.Process(one.process.pid)

    async def hold() -> tuple[float, float]:
        async with asyncio.TaskGroup() as group:
            tasks = []
            for begin in range(0, 2000, 100):
                tasks += [group.create_task(quiet()) for _ in range(begin, begin + 100)]
                await asyncio.wait(tasks[-100:])
        sockets = [task.result() for task in tasks]
        held = process.memory_info().rss
        began = time.perf_counter()
        answer = await asyncio.to_thread(httpx.post, f"{one.url}/v1/sessions/s/steps", json={"inputs": "a"}, timeout=30)
        took = time.perf_counter() - began
        assert answer.status_code == 200
        for client in sockets[::100]:
            await client.send(json.dumps({"type": "steps", "inputs": "a"}))
            assert json.loads(await client.recv())["type"] == "prediction"
        for client in sockets:
            client.transport.abort()
        return held, took

    async def quiet() -> Any:  # noqa: ANN401 (a connection)
        client = await connect_async(url(one, "s"), proxy=None, ping_interval=None, compression=None)
        await client.recv()
        return client

    before = process.memory_info().rss
    held, took = asyncio.run(hold())
    each = (held - before) / 2000
    print(f"{each / 1024:.1f} KiB a socket, a step beside them {took * 1000:.1f} ms")
    assert each < 64 * 1024
    assert one.position("s") == 21
