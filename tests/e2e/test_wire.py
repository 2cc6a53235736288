"""Steps that the protocol answers itself: what it answers is what the application would have answered."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from keyed import READ_S, As, KeysFile
from live import MakeServer, Server

ORDINARY = b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"
"""a header that asks for more than a step: such a request goes to the application"""

BODIES = [
    b'{"model": "tiny-letters", "seed": 3, "inputs": "a"}',
    b'{"model": "tiny-letters", "seed": 3, "inputs": [1], "predictions": "all"}',
    b'{"model": "tiny-letters", "seed": 3, "inputs": "abc", "predictions": "all", "alternatives": 2}',
    b'{"inputs": "a", "predictions": "none"}',
    b'{"model": "tiny-letters", "inputs": "?"}',
    b'{"model": "nothing", "inputs": "a"}',
    b'{"model": "tiny-weather", "inputs": [[1, 2, 3]]}',
    b'{"inputs": "a", "more": 1}',
    b'{"inputs": "a", "position": 7}',
    b'{"inputs": "a", "position": 0}',
    b'{"inputs": ',
    b'{"inputs": "' + b"a" * 99_000 + b'"}',
    b'{"inputs": "' + b"a" * 100_000 + b'"}',
    b"",
    b'\xff{"inputs": "a"}',
]


def post(session: str, body: bytes, more: bytes = b"", type: bytes = b"application/json") -> bytes:
    head = f"POST /v1/sessions/{session}/steps HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n".encode()
    return head + b"Content-Type: " + type + b"\r\n" + more + b"\r\n" + body


class Connection:
    """A connection that speaks in bytes."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=20)
        self._read = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of the next answer."""
        while b"\r\n\r\n" not in self._read:
            self._more()
        head, _, rest = self._read.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        self._read = rest
        while len(self._read) < int(headers["content-length"]):
            self._more()
        body, self._read = self._read[: int(headers["content-length"])], self._read[int(headers["content-length"]) :]
        headers.pop("date", None)
        return int(first.split(" ")[1]), headers, body

    def _more(self) -> None:
        data = self.socket.recv(65536)
        assert data, "the connection was closed"
        self._read += data

    def closed(self) -> bool:
        """Whether the other side has closed it."""
        return self._read == b"" and self.socket.recv(1) == b""

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def connection(server: Server) -> Iterator[Connection]:
    with closing(Connection(server)) as one:
        yield one


def test_both_ways_answer_the_same(connection: Connection, name: str) -> None:
    for i, body in enumerate(BODIES):
        told = []
        for way, more in (("w", b""), ("a", ORDINARY)):
            for begun in (0, 1):  # a new session, and one that lives
                if begun:
                    connection.send(post(f"{name}-{way}-{i}", b'{"model": "tiny-letters", "seed": 3, "inputs": "b"}'))
                    connection.answer()
                connection.send(post(f"{name}-{way}-{i}", body, more))
                status, headers, answer = connection.answer()
                told.append((status, headers, answer.replace(f"{name}-a-".encode(), f"{name}-w-".encode())))
        assert told[:2] == told[2:], body


def position(connection: Connection) -> int:
    status, _, body = connection.answer()
    assert status == 200, body
    found: int = json.loads(body)["position"]
    return found


BODY = b'{"model": "tiny-letters", "inputs": "a"}'


def test_a_head_that_is_known_changes_no_answer(connection: Connection, name: str) -> None:
    """Each head is read once with a plain step, and then comes again with another session and another body."""
    for i, body in enumerate(BODIES):
        if not len(BODY) <= len(body) < 64_000:
            continue
        for _ in range(2):
            connection.send(post(f"{name}-plain-{i}", BODY.ljust(len(body))))
            assert connection.answer()[0] == 200
        told = []
        for way, more in (("w", b""), ("a", ORDINARY)):
            connection.send(post(f"{name}-{way}-{i}", body, more))
            status, headers, answer = connection.answer()
            told.append((status, headers, answer.replace(f"{name}-a-".encode(), f"{name}-w-".encode())))
        assert told[0] == told[1], body


def test_a_known_head_may_be_followed_by_anything(connection: Connection, name: str) -> None:
    request = post(name, BODY)
    for _ in range(3):
        connection.send(request)
        connection.answer()
    connection.send(request[:-5])
    time.sleep(0.05)
    connection.send(request[-5:] + request + request[:30])
    assert [position(connection) for _ in range(2)] == [4, 5]
    connection.send(request[30:])
    assert position(connection) == 6
    connection.send(request + request)
    assert [position(connection) for _ in range(2)] == [7, 8]
    connection.send(request.replace(b"\r\nHost", b"\r\nConnection: close\r\nHost"))
    assert position(connection) == 9
    assert connection.closed()


def test_a_step_whose_head_is_new_may_be_followed_by_anything(connection: Connection, name: str) -> None:
    others = (b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n", post(f"{name}-b", BODY, b"X-Other: 1\r\n"))
    connection.send(post(name, BODY))
    assert position(connection) == 1
    for i, other in enumerate(others, 2):
        connection.send(post(name, BODY, b"X-New: %d\r\n" % i) + other)
        assert position(connection) == i
        assert connection.answer()[0] == 200


def test_a_known_head_is_no_longer_than_a_head_may_be(fresh: MakeServer, name: str) -> None:
    """What is refused when it is read must be refused when the rest of it is known."""
    server = fresh(max_header_bytes=1024).start()
    padded = b"X-Padding: %b\r\n" % (b"a" * 900)
    with closing(Connection(server)) as connection:
        long = "s" * 128
        for _ in range(2):
            connection.send(post("s", BODY, padded) + post(long, BODY))
            assert [connection.answer()[0] for _ in range(2)] == [200, 200]
            connection.send(post("s", BODY, padded))
            assert connection.answer()[0] == 200
        told = []
        for more in (padded, padded.replace(b"Padding", b"Paddinh")):
            with closing(Connection(server)) as other:
                other.send(post(long, BODY, more))
                told.append(other.answer())
        assert told[0][0] == told[1][0] == 431, told


def test_what_comes_behind_a_plain_step_is_no_plain_head(connection: Connection, name: str) -> None:
    """A request that waits for the step before it is read while that is under way: its key still counts."""
    for i in range(20):
        for _ in range(2):
            connection.send(post(name, BODY))
            connection.send(post(name, BODY, b'Idempotency-Key: "k%d"\r\n' % i))
        found = [position(connection) for _ in range(4)]
        assert found == [3 * i + 1, 3 * i + 2, 3 * i + 3, 3 * i + 2]


def test_requests_that_come_together_are_answered_in_order(connection: Connection, name: str) -> None:
    ordinary = b"GET /v1/sessions/%b HTTP/1.1\r\nHost: here\r\n\r\n" % name.encode()
    connection.send((post(name, BODY) * 3 + ordinary) * 5)
    for at in range(5):
        assert [position(connection) for _ in range(4)] == [3 * at + 1, 3 * at + 2, 3 * at + 3, 3 * at + 3]


def test_a_request_may_come_in_pieces(connection: Connection, name: str) -> None:
    request = post(name, BODY)
    for at in range(len(request)):
        connection.send(request[at : at + 1])
    assert position(connection) == 1
    connection.send(request[:-5])
    with pytest.raises(TimeoutError):
        connection.socket.settimeout(0.2)
        connection.answer()
    connection.socket.settimeout(20)
    connection.send(request[-5:])
    assert position(connection) == 2


def test_what_is_not_plain_goes_to_the_application(connection: Connection, name: str) -> None:
    chunked = b"POST /v1/sessions/%b/steps HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n" % name.encode()
    chunked += b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    connection.send(chunked)
    assert position(connection) == 1
    connection.send(post(name, BODY, b"Expect: 100-continue\r\n"))
    assert connection.socket.recv(25, socket.MSG_WAITALL) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert position(connection) == 2
    connection.send(post(name, BODY, b'Idempotency-Key: "k"\r\n') * 2)
    assert [position(connection) for _ in range(2)] == [3, 3]
    connection.send(post(name, BODY, type=b"text/plain"))
    assert connection.answer()[0] == 415
    connection.send(post(name, BODY, type=b"Application/JSON; charset=utf-8"))
    assert position(connection) == 4
    connection.send(post(name, BODY, b"Connection: close\r\n"))
    assert position(connection) == 5
    assert connection.closed()


def test_a_connection_that_says_nothing_is_closed_and_one_that_asks_stays(fresh: MakeServer, name: str) -> None:
    server = fresh().start()
    with closing(Connection(server)) as connection:
        for at in range(12):
            connection.send(post(name, BODY))
            assert position(connection) == at + 1
            time.sleep(0.5)
        connection.socket.settimeout(20)
        assert connection.closed()


def test_a_client_that_left_harms_nobody(server: Server, name: str) -> None:
    with closing(Connection(server)) as stays:
        for _ in range(30):
            leaves = Connection(server)
            leaves.send(post(name, BODY))
            leaves.close()
        stays.send(post(f"{name}-other", BODY))
        assert position(stays) == 1
        end = time.monotonic() + 20
        while server.http.get(f"/v1/sessions/{name}").status_code != 200 and time.monotonic() < end:
            time.sleep(0.01)
        assert 1 <= server.http.get(f"/v1/sessions/{name}").json()["position"] <= 30
    log = server.http.get(f"/v1/sessions/{name}/log").json()["data"]
    assert [entry["position"] for entry in log] == list(range(1, len(log) + 1))


def test_a_client_that_never_reads_takes_no_memory(fresh: MakeServer, name: str) -> None:
    server = fresh().start()
    with closing(Connection(server)) as deaf, closing(Connection(server)) as other:
        deaf.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.socket.settimeout(0.5)
        request = post(f"{name}-deaf", b'{"model": "tiny-letters", "inputs": "a", "alternatives": 12}') * 100
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 200_000_000:
                sent += deaf.socket.send(request)
        other.send(post(name, BODY))
        assert position(other) == 1


def test_a_stop_answers_what_has_begun_and_closes(fresh: MakeServer, name: str) -> None:
    server = fresh().start()
    connections = [Connection(server) for _ in range(8)]
    told: list[list[int]] = [[] for _ in connections]

    def ask(i: int) -> None:
        try:
            while True:
                connections[i].send(post(f"{name}-{i}", BODY))
                status, _, body = connections[i].answer()
                if status == 200:
                    told[i].append(json.loads(body)["position"])
        except (AssertionError, OSError):
            pass

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(connections))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 20
    while min(map(len, told)) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    assert server.terminate() == 0, server.output()
    for thread in threads:
        thread.join(20)
    server.start()
    for i, positions in enumerate(told):
        assert positions == list(range(1, len(positions) + 1)) and len(positions) >= 5
        stands = server.http.get(f"/v1/sessions/{name}-{i}").json()["position"]
        # What was answered is there; the one that was under way may be there without its answer.
        assert stands - len(positions) in (0, 1)
    for connection in connections:
        connection.close()


def test_a_plain_step_goes_through_the_door_as_well(fresh: MakeServer, tmp_path: Path, name: str) -> None:
    file = KeysFile(tmp_path / "keys.toml")
    key, metrics_key = file.add("mine"), file.add("admin", "admin")
    server = fresh(api_keys_file=file.path, cors_origins="https://pages.example").start()
    mine = b"Authorization: Bearer %b\r\n" % key.encode()
    with closing(Connection(server)) as connection:
        connection.send(post(name, BODY))
        assert connection.answer()[0] == 401
        connection.send(post(name, BODY, b"Authorization: Bearer wrong\r\n"))
        assert connection.answer()[0] == 401
        connection.send(post(name, BODY, mine * 2))
        assert connection.answer()[0] == 400
        connection.send(post(name, b'{"model": "tiny-letters", "inputs": "abc"}', mine))
        assert position(connection) == 3
        connection.send(post(name, BODY, mine))
        assert position(connection) == 4
        connection.send(post(name, BODY, mine + b"Origin: https://pages.example\r\n"))
        status, headers, body = connection.answer()
        assert (status, headers["access-control-allow-origin"]) == (200, "https://pages.example")
        assert json.loads(body)["position"] == 5
    with As(server, metrics_key) as admin:
        assert admin.metric("recurra_tenant_requests_total", tenant="mine", status="200") == 3
        assert admin.metric("recurra_tenant_steps_total", tenant="mine") == 5
    with closing(Connection(server)) as connection:
        connection.send(post(name, BODY, mine))
        assert position(connection) == 6
        file.revoke(key)
        end = time.monotonic() + READ_S
        while True:
            connection.send(post(name, BODY, mine))
            if (status := connection.answer()[0]) != 200 or time.monotonic() > end:
                break
            time.sleep(0.05)
        assert status == 401
