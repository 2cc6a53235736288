"""The shortest way to a step: a small POST of one is answered by the protocol itself, without a task and without ASGI.

Only what is plain goes this way: what can not be begun at once, and whatever would be refused, is handed to the
application as if it had never been looked at. Uvicorn's protocol does all the reading of HTTP; a head that it has read
once, byte by byte the same but for the session, is known when it comes again.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service import metrics, tracing
from service.api import errors
from service.api.auth import EVERYTHING, Keys
from service.api.columns import PlainStep, answers, plain_step
from service.api.limits import steps_in
from service.api.responses import line_of
from service.api.sessions import StepsBody, answer_line, feed_of, written
from service.feeding import Fed, Feeding, Gathering, fed_of
from service.run import Race
from service.session import Sessions
from service.store.base import Key
from service.work.events import Column, Event

MAX_BODY = 64 * 1024
UNUSUAL = frozenset(
    (b"idempotency-key", b"transfer-encoding", b"expect", b"upgrade", b"origin", b"x-request-id", b"traceparent")
)
"""headers that ask for more than a step"""

MAX_KNOWN, MAX_KNOWN_BYTES = 256, 2048
"""heads that are known, and how long they may be"""

_STEPS = re.compile(rb"/v1/sessions/([A-Za-z0-9._:-]{1,128})/steps")
_FIRST_LINE = re.compile(rb"POST /v1/sessions/([A-Za-z0-9._:-]{1,128})/steps HTTP/1\.1\r\n")
_ANSWERED = metrics.REQUESTS.labels("POST", "200")
_OK, _JSON = STATUS_LINE[200], b"content-length: %d\r\ncontent-type: application/json\r\n"


class _Nobody:
    """An event that nobody waits for."""

    def set(self) -> None:
        """Nothing to do."""


class Step:
    """A feed that has begun, in the place of uvicorn's cycle of a request and its response.

    A plain step is part of a `gathering`; anything else is a `feeding`.
    """

    __slots__ = (
        "body",
        "disconnected",
        "feeding",
        "gathering",
        "keep_alive",
        "key",
        "place",
        "protocol",
        "response_complete",
    )

    message_event = _Nobody()

    def __init__(self, protocol: "Wire", key: Key, body: PlainStep | StepsBody) -> None:
        self.protocol = protocol
        self.key = key
        self.body = body
        self.feeding: Feeding | None = None
        self.gathering: Gathering | None = None
        self.place = 0
        self.keep_alive = True
        self.disconnected = False
        self.response_complete = False

    def drop(self) -> None:
        """Feed nothing if that is still possible: nobody waits for it."""
        if self.feeding is not None:
            self.feeding.drop()
        if self.gathering is not None:
            self.gathering.drop((self.place,))

    def ended(self) -> None:
        """Answer what was fed alone."""
        assert self.feeding is not None
        self.told(self.feeding.result)

    def told(self, result: Callable[[], Fed]) -> None:
        """Answer."""
        try:
            answer = answer_line(result(), self.body)
        except Race:
            self.protocol.again(self)
        except Exception as error:
            self.refuse(error)
        else:
            self.answered(answer)

    async def again(self, sessions: Sessions) -> None:
        """Somebody else moved the session first: try again, as the application does."""
        inputs, opening = feed_of(self.body)
        try:
            fed = await sessions.replies.again(lambda: sessions.feed(self.key, inputs, opening))
            answer = await written(fed, self.body)
        except Exception as error:
            self.refuse(error)
        else:
            self.answered(answer)

    def refuse(self, error: Exception) -> None:
        """Answer with a problem."""
        answer = errors.answer_to(error)
        metrics.REQUESTS.labels("POST", str(answer.status_code)).inc()
        self._count(answer.status_code)
        headers = b"".join([b"%b: %b\r\n" % header for header in answer.raw_headers])
        self.protocol.answer(self, STATUS_LINE[answer.status_code], headers, bytes(answer.body))

    def answered(self, answer: bytes) -> None:
        """Answer with what was fed."""
        _ANSWERED.inc()
        self.write(answer)

    def write(self, answer: bytes) -> None:
        """The same, counted already."""
        self._count(200)
        self.protocol.answer(self, _OK, _JSON % len(answer), answer)

    def _count(self, status: int) -> None:
        if self.key[0]:
            metrics.TENANT_REQUESTS.labels(self.key[0], str(status)).inc()


class _Steps:
    """Who is told of the steps of all connections (`Told`)."""

    def fed(self, gathering: Gathering, column: Column) -> None:
        """Answer those that were fed together."""
        steps: list[Step] = [gathering.whose[i] for i in column.which]
        said = answers(gathering.model, column, [step.body for step in steps])
        written = [line_of(answer) for answer in said]
        _ANSWERED.inc(len(steps))
        for step, answer in zip(steps, written, strict=True):
            step.write(answer)

    def ended(self, gathering: Gathering, i: int, event: Event) -> None:
        """Answer one that was parted from the others."""
        step: Step = gathering.whose[i]
        step.told(partial(fed_of, gathering.model, event))


_TOLD = _Steps()


class Wire(HttpToolsProtocol):
    """Uvicorn's protocol, and the shortest way beside it."""

    _written: ClassVar[list[tuple["Wire", Step, bytes]]] = []
    """answers of this turn of the event loop"""
    _default_headers: ClassVar[list[tuple[bytes, bytes]] | None] = None
    _beginning: ClassVar[bytes] = b""
    """of every answer, while the default headers are those"""
    _known: ClassVar[dict[bytes, tuple[int, bytes | None]]] = {}
    """heads of plain steps without their first line: the body's length, and what says who asks"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 (uvicorn's)
        super().__init__(*args, **kwargs)
        state = self.config.app.state  # type: ignore[union-attr]
        self._sessions: Sessions = state.sessions
        self._keys: Keys = state.keys
        self._max_body: int = state.settings.max_body_bytes
        self._max_head: int = state.settings.max_header_bytes
        self._session_id: str | None = None
        self._authorization: bytes | None = None
        self._body = bytearray()
        self._step: Step | None = None
        self._within = False
        """a request has come in part"""

    def data_received(self, data: bytes) -> None:
        """Begin a step whose head is known; anything else is parsed."""
        whole = None if self._within else _FIRST_LINE.match(data)
        if whole is None:
            super().data_received(data)
            return
        end = data.find(b"\r\n\r\n", whole.end() - 2) + 4
        head, length = data[whole.end() : end], len(data) - end
        known = self._known.get(head)
        if known is not None and known[0] == length and end <= self._max_head and self._is_free():
            step = self._begin(whole[1].decode("ascii"), data[end:], known[1])
            if step is not None:
                self._unset_keepalive_if_required()
                self.cycle = self._step = step  # type: ignore[assignment]
                self.on_known_step()
                return
        before = self._step
        super().data_received(data)
        begun = self._step is not None and self._step is not before
        if begun and known is None and not self._within and len(head) <= MAX_KNOWN_BYTES:
            self._remember(head, length)

    def on_known_step(self) -> None:
        """A step has begun whose request was not parsed."""

    def _remember(self, head: bytes, length: int) -> None:
        """A plain step, if its data was one request: so is any that differs in the session and the body alone."""
        said = dict(self.headers)  # those of the last one, if there are several
        if said.get(b"content-length") == b"%d" % length:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[head] = (length, said.get(b"authorization"))

    # ------------------------------------------------------------------ uvicorn's parser calls these

    def on_message_begin(self) -> None:
        """A request begins."""
        self._within = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Begin the application's task, unless the request may be a plain step: then wait for its body."""
        self._session_id = self._plain_step()
        if self._session_id is None:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Keep the body of a step."""
        if self._session_id is None:
            super().on_body(body)
        else:
            self._body += body

    def on_message_complete(self) -> None:
        """Begin the step, or hand the request to the application."""
        self._within = False
        session_id, self._session_id = self._session_id, None
        if session_id is None:
            super().on_message_complete()
            return
        body, self._body = bytes(self._body), bytearray()
        step = self._begin(session_id, body, self._authorization)
        if step is None:
            super().on_headers_complete()
            super().on_body(body)
            super().on_message_complete()
        else:
            self.cycle = self._step = step  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        """Feed nothing if that is still possible: nobody waits for it."""
        if self._step is not None:
            self._step.drop()
        super().connection_lost(exc)

    # ------------------------------------------------------------------ a step

    def _plain_step(self) -> str | None:
        """The session's id, if a request may be a step that is answered here."""
        found = _STEPS.fullmatch(self.url)
        if (
            found is None
            or self.parser.get_method() != b"POST"
            or self.parser.get_http_version() != "1.1"
            or tracing.on
        ):
            return None
        said = dict(self.headers)
        length = said.get(b"content-length", b"")
        plain = (
            said.get(b"content-type") == b"application/json"
            and length.isdigit()
            and int(length) <= MAX_BODY
            and UNUSUAL.isdisjoint(said)
            and len(said) == len(self.headers)
            and self.parser.should_keep_alive()
        )
        self._authorization = said.get(b"authorization")
        return found[1].decode("ascii") if plain and self._is_free() else None

    def _is_free(self) -> bool:
        """Whether nothing else is under way on this connection, its client reads, and there is room for a request."""
        if self.root_path or self.flow.write_paused or (self.cycle is not None and not self.cycle.response_complete):
            return False
        return self.limit_concurrency is None or len(self.connections) < self.limit_concurrency

    def _begin(self, session_id: str, content: bytes, authorization: bytes | None) -> Step | None:
        """Begin a step; None when it has to wait for something, or to be refused."""
        try:
            if len(content) > self._max_body:
                return None
            tenant = self._keys.tenant_of(authorization)
            if tenant.allowed is not EVERYTHING:
                return None  # the door counts, and says on the answer what is left
            key = (tenant.name, session_id)
            step = self._begin_plain(key, content) or self._begin_other(key, content)
        except Exception:
            return None  # the application meets the same, and answers it
        if step is not None and tenant.name:
            metrics.TENANT_STEPS.labels(tenant.name).inc(steps_in(step.body.inputs))
        return step

    def _begin_plain(self, key: Key, content: bytes) -> Step | None:
        """Begin one step of a session that waits for nothing, in columns with those of the other connections."""
        body = plain_step(content)
        if body is None:
            return None
        step = Step(self, key, body)
        step.gathering = self._sessions.step(key, body, _TOLD, step)
        if step.gathering is None:
            return None
        step.place = len(step.gathering) - 1
        return step

    def _begin_other(self, key: Key, content: bytes) -> Step | None:
        body = StepsBody.model_validate_json(content)
        feeding = self._sessions.feed_now(key, *feed_of(body))
        if feeding is None:
            return None
        step = Step(self, key, body)
        step.feeding, feeding.then = feeding, step.ended
        return step

    def again(self, step: Step) -> None:
        """Run a step again that lost a race."""
        task = self.loop.create_task(step.again(self._sessions))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def answer(self, step: Step, status: bytes, headers: bytes, body: bytes) -> None:
        """Write an answer in one part, together with those of the other connections that come in the same turn."""
        self._step = step.gathering = None  # which holds the step: a cycle would keep both
        end = b"\r\n" if step.keep_alive else b"connection: close\r\n\r\n"
        if not Wire._written:
            self.loop.call_soon(Wire._send)
        Wire._written.append((self, step, b"".join((status, self._defaults(), headers, end, body))))

    @staticmethod
    def _send() -> None:
        """Send what was written: the first one wakes who reads, and the others find him awake."""
        written, Wire._written = Wire._written, []
        for wire, step, answer in written:
            # Only now: what is refused or begun on this connection before would be answered ahead of it.
            step.response_complete = True
            if not (step.disconnected or wire.transport.is_closing()):
                wire.transport.write(answer)
                if not step.keep_alive:
                    wire.transport.close()
                wire.on_step_complete()

    def on_step_complete(self) -> None:
        """A step is answered: as `on_response_complete`, but without a clock, which would cost a tenth of all."""
        if self.pipeline:
            self.on_response_complete()
        else:
            self.server_state.total_requests += 1
            self.flow.resume_reading()

    def _defaults(self) -> bytes:
        """The headers of every answer, written."""
        if Wire._default_headers is not self.server_state.default_headers:
            Wire._default_headers = self.server_state.default_headers
            Wire._beginning = b"".join([b"%b: %b\r\n" % header for header in Wire._default_headers])
        return Wire._beginning
