"""Many sessions in one request: lines of JSON in, as many lines out, in the same order.

A line that names a session which no other line names is begun without a task of its own, and a slice of lines is
one call of the engine. Lines of one session, and those with a key, take a task each: they wait for the one before.
"""

import asyncio
from collections import Counter
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field, ValidationError
from starlette.types import Receive, Scope, Send

from service.api.errors import document, from_validation, problem_from
from service.api.requests import (
    KEY_PARAMETER,
    MAX_KEY,
    SESSION_ID,
    checked_key,
    departures_of,
    digest_of,
    header,
    history_of,
    key_of,
    must_be,
    read_bytes,
    sessions_of,
)
from service.api.responses import BODY_ERRORS, described
from service.api.sessions import StepsBody, feed_of, kept_answer, written
from service.errors import ClientLeft, Problem
from service.history import History
from service.run import Race
from service.session import Feeding, Sessions
from service.store.base import Reply
from service.work.feed import Keyed

router = APIRouter(prefix="/v1", tags=["sessions"])

MEDIA_TYPE = "application/x-ndjson"
MAX_LINES = 65_536
"""each takes about a kilobyte of memory, however short it is"""
WINDOW = 4096
"""lines that are under way at once"""
SLICE = 64
"""lines that are worked on before others have the event loop"""
PART_BYTES = 64 * 1024


class BulkLine(StepsBody):
    """A sequence to feed, and into which session."""

    session: str = Field(pattern=SESSION_ID)
    key: str | None = Field(default=None, max_length=MAX_KEY + 2, description="as the header Idempotency-Key")


REQUEST: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            MEDIA_TYPE: {
                "schema": BulkLine.model_json_schema(),
                "example": '{"session": "pump-1", "inputs": [35.0], "model": "temperature"}\n'
                '{"session": "pump-2", "inputs": [32.5], "model": "temperature", "key": "reading-7"}\n',
            }
        },
    },
    **KEY_PARAMETER,
}


class Line:
    """A line of the request, and what becomes of it."""

    __slots__ = ("body", "feeding", "number", "problem", "session", "task")

    def __init__(self, number: int, raw: bytes) -> None:
        self.number = number
        self.body: BulkLine | None = None
        self.problem: Problem | None = None
        self.feeding: Feeding | None = None
        self.task: asyncio.Task[bytes] | None = None
        try:
            self.body = BulkLine.model_validate_json(raw)
            self.session: str | None = self.body.session
        except ValidationError as error:
            self.problem = from_validation(error)
            self.session = _session_in(raw)

    @property
    def ready(self) -> bool:
        """Whether its answer can be had without waiting."""
        if self.task is not None:
            return self.task.done()
        return self.feeding is None or self.feeding.ended

    def refusal(self) -> bytes:
        """What is answered when it was not fed."""
        assert self.problem is not None
        return msgspec.json.encode({"session": self.session, "error": document(self.problem)}) + b"\n"


def _session_in(raw: bytes) -> str | None:
    """The session that a line means which is refused for something else."""
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    session = found.get("session") if isinstance(found, dict) else None
    return session if isinstance(session, str) else None


class Bulk:
    """The lines of one request on their way through the engine."""

    def __init__(self, sessions: Sessions, history: History, key: str | None) -> None:
        self._sessions = sessions
        self._history = history
        self._key = key
        self._lines: list[Line] = []
        self._named: Counter[str | None] = Counter()
        """how many lines name a session"""
        self._before: dict[str | None, Line] = {}
        """the newest line of a session that has been begun"""

    async def read(self, body: bytes) -> None:
        """Take the request's lines; empty ones do not count."""
        for raw in body.split(b"\n"):
            if raw and not raw.isspace():
                line = Line(len(self._lines), raw)
                self._lines.append(line)
                self._named[line.session] += 1
                if len(self._lines) % SLICE == 0:
                    await asyncio.sleep(0)

    async def write(self, send: Send) -> None:
        """Run the lines, and send their answers in order: those that are there together in one part."""
        begun, parts = 0, bytearray()
        for line in self._lines:
            while begun < min(line.number + WINDOW, len(self._lines)):
                self._begin(self._lines[begun])
                begun += 1
                if begun % SLICE == 0:
                    await asyncio.sleep(0)
            if parts and (len(parts) >= PART_BYTES or not line.ready):
                await send({"type": "http.response.body", "body": bytes(parts), "more_body": True})
                parts.clear()
            parts += await self._answer(line)
            line.feeding = line.task = None
        await send({"type": "http.response.body", "body": bytes(parts), "more_body": False})

    async def drop(self) -> None:
        """Feed nothing more: nobody waits for it."""
        tasks = [line.task for line in self._lines if line.task is not None]
        for task in tasks:
            task.cancel()
        for line in self._lines:
            if line.feeding is not None:
                line.feeding.drop()
        if tasks:
            await asyncio.wait(tasks)

    # ------------------------------------------------------------------ one line

    def _begin(self, line: Line) -> None:
        before = self._before.get(line.session)
        if self._named[line.session] > 1:
            self._before[line.session] = line
        if line.body is None:
            return
        if self._named[line.session] == 1 and line.body.key is None and self._key is None:
            try:
                line.feeding = self._sessions.feed_now(key_of(line.body.session), *feed_of(line.body))
            except Exception as error:
                line.problem = problem_from(error)
                return
        if line.feeding is None:
            line.task = asyncio.create_task(self._run(line, line.body, before))

    async def _answer(self, line: Line) -> bytes:
        if line.feeding is not None and line.body is not None:
            try:
                return await written(await line.feeding.outcome(), line.body)
            except Race:
                return await self._run(line, line.body, None)
            except Exception as error:
                line.problem = problem_from(error)
        return await line.task if line.task is not None else line.refusal()

    async def _run(self, line: Line, body: BulkLine, before: Line | None) -> bytes:
        """Feed a line when the one before it of the same session has been fed."""
        try:
            if before is not None and before.task is not None:
                await asyncio.wait((before.task,))
            if before is not None and before.problem is not None:
                raise Problem("skipped", "an earlier line of the same session was refused")
            return await self._fed(line, body)
        except Exception as error:
            line.problem = problem_from(error)
            return line.refusal()

    async def _fed(self, line: Line, body: BulkLine) -> bytes:
        keyed = self._keyed(line, body)
        inputs, opening = feed_of(body, keyed)

        async def fresh() -> bytes:
            return await written(await self._sessions.feed(key_of(body.session), inputs, opening), body)

        async def replay(reply: Reply) -> bytes:
            return await kept_answer(self._history, reply, body)

        return await self._sessions.replies.once(keyed, fresh, replay)

    def _keyed(self, line: Line, body: BulkLine) -> Keyed | None:
        """The line's key, as if it had come alone; the request's own key stands for one a line."""
        if body.key is None and self._key is None:
            return None
        key = checked_key(body.key) if body.key is not None else f"{self._key}:{line.number}"
        asked = body.model_dump_json(exclude={"session", "key"})
        return Keyed("", body.session, key, digest_of(f"/v1/sessions/{body.session}/steps?", asked))


class BulkAnswer(Response):
    """The answers, sent as they come."""

    def __init__(self, bulk: Bulk) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}, MEDIA_TYPE)
        del self.headers["content-length"]
        self._bulk = bulk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until all lines are answered, or nobody is there."""
        try:
            with departures_of(scope).watch(receive, long=True):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._bulk.write(send)
        except ClientLeft:
            pass  # nobody can be told
        finally:
            await self._bulk.drop()


@router.post(
    "/steps",
    response_class=Response,
    openapi_extra=REQUEST,
    responses=described(200, "a line a line, in the same order", None, "skipped", *BODY_ERRORS, lines=True),
)
async def bulk_steps(request: Request) -> Response:
    """Feed many sessions: a line of JSON each (at most 65,536), as for one session with `session` and `key` beside.

    The answer has a line a line in the same order: what the session's own route answers, or `{"session", "error"}`.
    Lines of one session run in order; after one that was refused the later ones are `skipped`. An Idempotency-Key of
    the request stands for keys `<key>:<number of the line, from 0>` of its lines.
    """
    must_be(request, MEDIA_TYPE)
    given = header(request, b"idempotency-key")
    key = checked_key(given) if given is not None else None
    body = await read_bytes(request)
    if body.count(b"\n") > MAX_LINES:
        raise Problem("payload_too_large", f"at most {MAX_LINES} lines a request")
    bulk = Bulk(sessions_of(request), history_of(request), key)
    await bulk.read(body)
    return BulkAnswer(bulk)
