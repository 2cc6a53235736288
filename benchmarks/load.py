"""A load on a running service, in a process of its own: `python -m benchmarks.load --port 8000 --kind steps`.

Raw connections and as little parsing as can be, so that the service is what is measured. Every connection of
`steps` sends its next request when the last one is answered; every connection of `stream` reads one long generate.
What is counted begins when every connection has had its first answer. One JSON line at the end.
"""

import argparse
import asyncio
import json
import resource
import time
from functools import partial
from typing import cast

import numpy as np
import uvloop

TOKEN = b"event: token"
FIRST_S = 60.0
LENGTH = b"content-length: "


def name_of(number: int) -> str:
    """The id of a session: distinct, and spread over all ids as random ones are."""
    return f"{number * 2654435761 % 2**32:08x}"


class Load:
    """What all connections share: what was asked for, and what was counted."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.model: str = chosen.model
        self.step = json.dumps({"model": self.model, "inputs": [0], "alternatives": 1})
        self.connections: int = chosen.connections
        self.sessions: int = chosen.sessions or chosen.connections
        self.first: int = chosen.first
        self.waiting = self.connections
        self.begun = asyncio.Event()
        self.counting = False
        self.count = 0
        self.took: list[float] = []
        self.ended = asyncio.get_running_loop().create_future()

    def note(self, count: int, took: float) -> None:
        """Answers or tokens that came, and the seconds since the request or the last token."""
        if self.counting:
            self.count += count
            self.took.append(took)

    def end(self, error: Exception | None = None) -> None:
        """The service ended a connection, or refused a request."""
        self.begun.set()
        if not self.ended.done():
            if error is not None:
                self.ended.set_exception(error)
            else:
                self.ended.set_result(True)


class Connection(asyncio.Protocol):
    """A connection that sends requests and takes what comes."""

    def __init__(self, load: Load, number: int) -> None:
        self.load = load
        self.number = number
        self.rest = b""
        self.answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast(asyncio.WriteTransport, transport)
        self.sent = time.perf_counter()
        self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        """The service ended it."""
        self.load.end()

    def send(self) -> None:
        """Send the next request."""
        raise NotImplementedError

    def post(self, path: str, body: str) -> None:
        """Send a request."""
        head = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        self.transport.write(f"POST {path} HTTP/1.1\r\n{head}{len(body)}\r\n\r\n{body}".encode())

    def first_answer(self, data: bytes) -> None:
        """Look at a first answer: it is the one that says whether the load makes sense."""
        self.answered = True
        self.load.waiting -= 1
        if self.load.waiting == 0:
            self.load.begun.set()
        if not data.startswith(b"HTTP/1.1 200"):
            self.load.end(RuntimeError(data.decode(errors="replace")[:1000]))


class Steps(Connection):
    """Feeds one step a request; its sessions take turns."""

    def send(self) -> None:
        """Feed the next of the connection's sessions."""
        name = name_of(self.load.first + self.number)
        self.number = (self.number + self.load.connections) % self.load.sessions
        self.sent = time.perf_counter()
        self.post(f"/v1/sessions/{name}/steps", self.load.step)

    def data_received(self, data: bytes) -> None:
        """Send the next request when an answer is whole."""
        data = self.rest + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self.rest = data
            return
        at = data.find(LENGTH) + len(LENGTH)
        if len(data) < end + 4 + int(data[at : data.find(b"\r", at)]):
            self.rest = data
            return
        if not self.answered or not data.startswith(b"HTTP/1.1 200"):
            self.first_answer(data)
        self.rest = b""
        self.load.note(1, time.perf_counter() - self.sent)
        self.send()


class Stream(Connection):
    """Reads one generate as server-sent events."""

    def send(self) -> None:
        """Begin the generate."""
        name = name_of(self.load.first + self.number)
        body = {"model": self.load.model, "inputs": [0], "max_tokens": 100_000, "stream": True, "seed": self.number}
        self.post(f"/v1/sessions/{name}/generate", json.dumps(body))

    def data_received(self, data: bytes) -> None:
        """Count the tokens; one may come in two parts."""
        if not self.answered:
            self.first_answer(data)
        data = self.rest + data
        tokens = data.count(TOKEN)
        self.rest = data[data.rfind(TOKEN) + len(TOKEN) :][-len(TOKEN) + 1 :] if tokens else data[-len(TOKEN) + 1 :]
        if tokens:
            now = time.perf_counter()
            self.load.note(tokens, now - self.sent)
            self.sent = now


async def run(chosen: argparse.Namespace) -> dict[str, object]:
    """Connect, wait for everybody's first answer, count for a while."""
    load, loop = Load(chosen), asyncio.get_running_loop()
    kind: type[Connection] = Steps if chosen.kind == "steps" else Stream
    for number in range(load.connections):
        await loop.create_connection(partial(kind, load, number), "127.0.0.1", chosen.port)
    await asyncio.wait_for(load.begun.wait(), FIRST_S)
    before, begun, load.counting = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter(), True
    done, _ = await asyncio.wait((load.ended,), timeout=chosen.seconds)
    load.counting, seconds, after = False, time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
    if done:
        load.ended.result()
    p50, p99 = np.quantile(load.took or [0.0], [0.5, 0.99]) * 1e3
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "per_s": round(load.count / seconds),
        "ms": {"p50": round(float(p50), 3), "p99": round(float(p99), 3)},
        "load_cores": round(used / seconds, 2),
        "cut": bool(done),
    }


def main() -> None:
    """Load, and print one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--kind", choices=("steps", "stream"), default="steps")
    parser.add_argument("--model", default="shakespeare")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--sessions", type=int, default=0, help="a multiple of the connections; default: one each")
    parser.add_argument("--first", type=int, default=0, help="number of the first session")
    parser.add_argument("--seconds", type=float, default=3.0)
    print(json.dumps(uvloop.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
