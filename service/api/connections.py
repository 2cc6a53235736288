"""Connections that hold a place and do not move: how many, how large a head, how long.

Uvicorn bounds none of it: a connection without a request, a head or a body that trickles in and a client that does not
read may stay for ever, a head may have any size, and its own `limit_concurrency` counts idle connections and answers
without a body that says so. Nothing here costs a request a clock: once a second every connection is looked at, and one
that is where it was when its time began is cut off.
"""

import logging
import resource
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from service import metrics
from service.api.errors import document, headers_of
from service.api.wire import Wire
from service.errors import Problem, overloaded
from service.settings import Settings

MAX_HEADERS = 100
SPARE_CONNECTIONS = 128
"""above the limit these are told so; more are dropped"""
SPARE_FILES = 512
"""open at once beside connections: the store's, the models'"""
WIRE_FACTOR = 2
"""how much longer a body may be on the wire than it is: the frames of its chunks"""
SEND_BUFFER_BYTES = 128 * 1024
"""in the kernel, of each connection: what a client that does not read can fill (Linux takes twice as much)"""


_COUNTED = ("Invalid HTTP request received.", "Unsupported upgrade request.")


def _worth_a_line(record: logging.LogRecord) -> bool:
    """What strangers can bring about as often as they like is counted, not logged."""
    return record.msg not in _COUNTED


logging.getLogger("uvicorn.error").addFilter(_worth_a_line)


class _Refused(Exception):
    """The request is answered already; ends its parsing."""


class Connection(Wire):
    """Uvicorn's protocol, with the shortest way to a step, within limits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 (uvicorn's)
        super().__init__(*args, **kwargs)
        self._settings: Settings = self.config.app.state.settings  # type: ignore[union-attr]
        self._place = "head"
        """what it is in the middle of: head, body or answer; rest: nothing, since a step was answered"""
        self._requests = 0
        self._received = 0
        """bytes of this request and what came with them"""
        self._paused = 0
        self._turned_away = False
        self._problem: Problem | None = None
        self._running: Any = None
        """uvicorn's cycle whose answer is under way: with requests sent ahead of it, not the newest one"""
        self.looked_at: tuple[tuple[str, int], float] = (("", 0), 0.0)
        """where it was first seen to be, and when"""

    # ------------------------------------------------------------------ the event loop calls these

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401 (uvicorn's)
        """Take a connection, or turn it away."""
        super().connection_made(transport)
        surplus = len(self.connections) - self._settings.max_connections
        self._turned_away = surplus > 0
        if surplus > SPARE_CONNECTIONS:
            self.cut("connections")

    def data_received(self, data: bytes) -> None:
        """Parse what has come, within the limits."""
        self._received += len(data)
        place, requests = self._place, self._requests
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._requests == requests + 1 and place != "body":
            self._received = len(data)  # all of it is of the request that has begun
        if self._place == "head" and self._received > self._settings.max_header_bytes:
            self._refuse_head()
        elif self._received > WIRE_FACTOR * self._settings.max_body_bytes + self._settings.max_header_bytes + len(data):
            self.refuse(Problem("payload_too_large", "the body is too large as it is sent"), "body_size")

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there any more."""
        self._give_up()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is written to."""
        self._paused += 1
        super().pause_writing()

    # ------------------------------------------------------------------ the parser calls these

    def on_message_begin(self) -> None:
        """A request begins."""
        self._place, self._received = "head", 0
        self._requests += 1
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A request's head is there."""
        if self._turned_away:
            self.refuse(overloaded("too many connections"), "connections")
            raise _Refused
        size = sum(len(name) + len(value) for name, value in self.headers) + len(self.url)
        if len(self.headers) > MAX_HEADERS or size > self._settings.max_header_bytes:
            self._refuse_head()
            raise _Refused
        self._place = "body"
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A request is there as a whole."""
        self._place = "answer"
        super().on_message_complete()

    def on_known_step(self) -> None:
        """A request is there as a whole, and was not parsed."""
        self._place = "answer"
        self._requests += 1

    def on_step_complete(self) -> None:
        """A step is answered; how long the connection may rest is looked at once a second."""
        if self._place == "answer" and not self.pipeline:  # else the next request has begun
            self._place, self._received = "rest", 0
        super().on_step_complete()

    def _is_free(self) -> bool:
        return not self._turned_away and super()._is_free()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; or nothing, where a problem was answered already."""
        if self._problem is None:
            self.refuse(Problem("bad_request", "this is not HTTP/1.1 as it should be"), "malformed")

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:  # noqa: ANN401 (uvicorn's)
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    # ------------------------------------------------------------------ ending it

    def _give_up(self) -> None:
        """Tell what is under way that its client is gone: uvicorn tells the newest request only, and late."""
        for cycle in (self._running, self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def _refuse_head(self) -> None:
        limit = self._settings.max_header_bytes
        detail = f"a head has at most {MAX_HEADERS} headers and {limit} bytes (RECURRA_MAX_HEADER_BYTES)"
        self.refuse(Problem("headers_too_large", detail), "head_size")

    def refuse(self, problem: Problem, reason: str) -> None:
        """Answer with a problem, if no answer has begun, and close."""
        self._problem = problem
        if self.transport.is_closing() or self._answers():
            self.cut(reason)
            return
        metrics.CUT.labels(reason).inc()
        body = msgspec.json.encode(document(problem)) + b"\n"
        said = [*self.server_state.default_headers, *_encoded(headers_of(problem))]
        self.transport.write(
            b"".join(
                (
                    STATUS_LINE[document(problem)["status"]],
                    *(b"%b: %b\r\n" % header for header in said),
                    b"content-type: application/problem+json\r\ncontent-length: %d\r\n" % len(body),
                    b"connection: close\r\n\r\n",
                    body,
                )
            )
        )
        self.transport.close()
        self._give_up()

    def _answers(self) -> bool:
        """Whether what is written now would stand within another answer, or after its own."""
        cycle: Any = self.cycle
        if cycle is None:
            return False
        if cycle.response_complete:
            return self._place == "body"
        return self._place == "head" or bool(self.pipeline) or getattr(cycle, "response_started", True)

    def cut(self, reason: str) -> None:
        """End the connection without a word."""
        metrics.CUT.labels(reason).inc()
        self.transport.abort()
        self._give_up()

    def look(self, now: float) -> None:
        """End it if it has not moved for longer than it may."""
        at = self._at()
        if at != self.looked_at[0]:
            self.looked_at = (at, now)
            return
        waited = now - self.looked_at[1]
        match at[0]:
            case "send" if waited >= self._settings.send_wait_s:
                self.cut("send")
            case "fresh" if waited >= (1.0 if self._turned_away else self._settings.head_wait_s):
                self.cut("idle")
            case "head" if waited >= self._settings.head_wait_s:
                self.refuse(Problem("request_timeout", "the request's head took too long"), "head")
            case "rest" if waited >= self.timeout_keep_alive:
                self.transport.close()
            case "body" if waited >= self._settings.body_wait_s:
                self.refuse(Problem("request_timeout", "the request's body took too long"), "body")

    def _at(self) -> tuple[str, int]:
        """What it waits for, if that has a limit, and which time."""
        if self.transport.is_closing():
            return ("send", -1)  # it is closed once its client has read what is left
        if self.flow.write_paused:
            return ("send", self._paused)
        answered = self.cycle is None or self.cycle.response_complete
        if self.timeout_keep_alive_task is not None or self.flow.read_paused or self.pipeline:
            return ("", 0)  # between two requests, where uvicorn has a limit, or it waits for this side
        match self._place:
            case "head" if answered:
                return ("head" if self._requests else "fresh", self._requests)
            case "rest" if not self._received:
                return ("rest", self._requests)
            case "answer" | "rest" if answered:
                return ("head", -self._requests)  # bytes after a request that begin none
            case "body":
                return ("body", self._requests)
        return ("", 0)


def cut_off(connections: Iterable[object]) -> None:
    """Look at every connection, once a second."""
    now = time.monotonic()
    for one in list(connections):
        if isinstance(one, Connection):
            one.look(now)


def make_room(connections: int) -> None:
    """Let the process open as many files as the connections need, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
