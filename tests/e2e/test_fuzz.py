"""Mangled bytes on every route: the process lives, its memory is bounded, and what it remembers is untouched."""

import json
import random
import re
import secrets
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from live import MakeServer, Server

BRIEF_S = 10.0
THREADS = 4
WAIT_S = 0.5
GROWTH_BYTES = 256 * 2**20
"""what the process may hold more than before: caches, sessions that the fuzzing makes, Python's own slack"""
ANSWER = re.compile(rb"HTTP/1\.1 (\d{3}) ")

BODIES: dict[str, list[Any]] = {
    "/v1/sessions": [
        {"model": "tiny-letters", "id": "f-new", "metadata": {"a": [1, None, "x"]}, "ttl_s": 5, "seed": 1}
    ],
    "/v1/sessions/{session_id}": [{"metadata": {"a": 1}, "ttl_s": 10}],
    "/v1/sessions/{session_id}/steps": [
        {"model": "tiny-letters", "inputs": "abc", "predictions": "all"},
        {"model": "tiny-weather", "inputs": [[1.5, 2], [None, 3.0], {"temperature": 1e3, "hour": 4}]},
        {"inputs": [0, 1, 2], "position": 3, "alternatives": 2, "version": 1, "seed": 5},
    ],
    "/v1/sessions/{session_id}/generate": [
        {"model": "tiny-letters", "inputs": "ab", "max_tokens": 9, "stream": True, "stop": ["a", "bc"], "logprobs": 3},
        {"max_tokens": 5, "temperature": 0.5, "top_k": 3, "top_p": 0.9},
    ],
    "/v1/sessions/{session_id}/forecast": [{"horizon": 3, "samples": 2, "future": [{"hour": 1}] * 3}],
    "/v1/sessions/{session_id}/fork": [{"id": "f-fork", "position": 1, "seed": 9}],
    "/v1/sessions/{session_id}/rewind": [{"position": 1}],
    "/v1/sessions/{session_id}/migrate": [{"version": 2}],
    "/v1/models/{model}/predict": [{"sequences": ["abc", [0, 1]], "predictions": "all"}],
    "/v1/models/{model}/generate": [{"inputs": "ab", "max_tokens": 9, "stream": True, "seed": 2}],
}
LINES = b'{"session": "f-1", "inputs": "a", "model": "tiny-letters"}\n{"session": "f-2", "inputs": [1], "key": "k"}\n'
HEADERS = [
    b"Idempotency-Key: k1",
    b"Last-Event-ID: 1.2",
    b"Accept: application/json",
    b"Transfer-Encoding: chunked",
    b"Expect: 100-continue",
    b"Connection: close",
    b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
    + b"A" * 22
    + b"==",
    b"Content-Length: 99999999999999999999",
    b"Content-Length: -1",
    b"Authorization: Bearer x",
    b"X-Forwarded-For: \x00\xff",
    b"Cookie: " + b"a=b; " * 50,
]
TOKENS = [
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\x00",
    b"\xff\xfe",
    b"%00",
    b"%2e%2e/",
    b"../",
    b"\x1b[31m",
    b"{",
    b"]",
    b'"',
    b"1e999",
]
TOKENS += [
    b"null",
    b"-1",
    b"9" * 40,
    b"[" * 500,
    b"NaN",
    b"\\ud800",
    b"HTTP/2.0",
    b"?after=1.1",
    b"#",
    b" ",
    b"\t",
    b":",
]


def requests_of(server: Server, file: bytes) -> list[bytes]:
    """A good request of every route, with each of its bodies."""
    found = []
    paths = server.ok(server.http.get("/openapi.json"))["paths"]
    for path, operations in paths.items():
        for method in (name.upper() for name in operations):
            bodies = [json.dumps(body).encode() for body in BODIES.get(path, [{}])] if method != "GET" else [b""]
            bodies = [LINES] if path == "/v1/steps" else [file] if method == "PUT" else bodies
            target = path.replace("{session_id}", "f-1").replace("{model}", "tiny-letters")
            kind = b"application/x-ndjson" if path == "/v1/steps" else b"application/json"
            kind = b"application/octet-stream" if method == "PUT" else kind
            for body in bodies:
                head = f"{method} {target} HTTP/1.1\r\nHost: a\r\n".encode()
                head += b"Content-Type: %b\r\nContent-Length: %d\r\n" % (kind, len(body)) if body else b""
                found.append(head + b"\r\n" + body)
    assert len({one.split(b" ", 2)[0] for one in found}) == 5 and len(found) > 25
    return found


def mangled(good: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A request with a few things wrong."""
    data = bytearray(good)
    for _ in range(rng.choice((0, 1, 1, 2, 4, 12))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(8):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + rng.choice((1, 2, 7, 40))]
            case 2:
                data[at:at] = rng.choice(TOKENS)
            case 3:
                data[at:at] = rng.randbytes(rng.choice((1, 3, 64, 2000)))
            case 4:
                data[at:at] = data[at : at + rng.randrange(200)]
            case 5:
                end = data.find(b"\r\n")
                data[end + 2 : end + 2] = rng.choice(HEADERS) + b"\r\n"
            case 6:
                data += rng.choice(others)
            case 7:
                del data[at:]
    return bytes(data)


def throw(port: int, data: bytes, rng: random.Random) -> bytes:
    """Send it, in one or in several parts, and read a while."""
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as connection:
        told = b""
        try:
            for part in (data,) if rng.random() < 0.7 else (data[: len(data) // 2], data[len(data) // 2 :]):
                connection.sendall(part)
            if rng.random() < 0.8:
                connection.shutdown(socket.SHUT_WR)
            if rng.random() < 0.9:
                told = connection.recv(65536)
        except OSError:
            pass
        return told


def fuzz(server: Server, good: list[bytes], seed: str, until: float) -> Counter[int]:
    rng, seen = random.Random(seed), Counter[int]()
    port = int(server.url.rpartition(":")[2])
    while time.monotonic() < until:
        data = mangled(rng.choice(good), good, rng)
        told = throw(port, data, rng)
        for status in ANSWER.findall(told):
            seen[int(status)] += 1
        assert b"HTTP/1.1 500" not in told, (data, told)
        assert b"Traceback" not in told and str(server.settings["data_dir"]).encode() not in told, (data, told)
    return seen


@pytest.mark.slow
def test_mangled_requests_harm_nothing(fresh: MakeServer, seed: int, request: pytest.FixtureRequest) -> None:
    seconds = 60 * request.config.getoption("minutes") or BRIEF_S
    server = fresh(max_body_bytes=100_000, max_tokens=200, head_wait_s=1, body_wait_s=1, send_wait_s=1).start()
    assert server.process is not None
    kept = [secrets.token_hex(8) for _ in range(3)]
    for session, (model, inputs) in zip(
        kept, (("tiny-letters", "abcab"), ("tiny-weather", [[1, 2], [3, 4]]), ("tiny-people", "anna has")), strict=True
    ):
        server.steps(session, inputs, model=model)
    server.generate(kept[0], max_tokens=5)
    file = server.state_file(kept[0])
    was = [(server.session(one), server.log_of(one), server.state(one)) for one in kept]
    good, process = requests_of(server, file), psutil.Process(server.process.pid)
    fuzz(server, good, f"{seed}-warm", time.monotonic() + 1)
    before, end = process.memory_info().rss, time.monotonic() + seconds
    with ThreadPoolExecutor(THREADS) as pool:
        seen = sum(pool.map(lambda i: fuzz(server, good, f"{seed}-{i}", end), range(THREADS)), Counter[int]())
    grown = process.memory_info().rss - before
    print(json.dumps({"answers": seen.total(), "by_status": dict(sorted(seen.items())), "grown_mib": grown >> 20}))
    assert server.process.poll() is None, server.output()
    assert [(server.session(one), server.log_of(one), server.state(one)) for one in kept] == was
    assert grown < GROWTH_BYTES and seen[200] and seen[400] and seen[422]
    log = server.log.read_bytes()
    odd = [line for line in log.splitlines() if b"Traceback" in line or re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", line)]
    assert odd == [] and len(log) < 20_000, (odd[:3], log[-3000:])
    server.restart()
    assert [(server.session(one), server.log_of(one), server.state(one)) for one in kept] == was
