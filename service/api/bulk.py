"""Many sessions in one request: lines of JSON in, as many lines out, in the same order.

Lines that are plain steps go in columns, a slice of them at once. Another line is begun without a task of its own,
unless it has to wait for its session or has a key. Of the lines of one session each begins when the one before it has
been answered.
"""

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field, ValidationError
from starlette.types import Receive, Scope, Send

from service.api.columns import PlainLine, answers, plain_line
from service.api.errors import document, from_validation, problem_from
from service.api.limits import Visit, steps_in
from service.api.requests import (
    KEY_PARAMETER,
    MAX_KEY,
    SESSION_ID,
    checked_key,
    departures_of,
    digest_of,
    header,
    history_of,
    must_be,
    read_bytes,
    sessions_of,
    visit_of,
)
from service.api.responses import BODY_ERRORS, described
from service.api.sessions import StepsBody, answer_line, feed_of, is_long, kept_answer, written
from service.errors import ClientLeft, Problem
from service.feeding import Feeding, Gathering, fed_of
from service.history import History
from service.run import Race
from service.session import Sessions
from service.store.base import Reply
from service.work.events import Column, Event
from service.work.feed import Keyed

router = APIRouter(prefix="/v1", tags=["sessions"])

MEDIA_TYPE = "application/x-ndjson"
MAX_LINES = 65_536
"""each takes about a kilobyte of memory, however short it is"""
WINDOW = 4096
"""lines that are under way at once"""
SLICE, SLICE_ALONE = 256, 64
"""lines that are worked on before others have the event loop, and lines that go their own way"""
FIRST, ASIDE_S = 128, 0.001
"""the first slice of several, and what is waited after it: the graph shall begin before the other lines are read, and
meanwhile the engine would have to wait for the interpreter"""
PART_BYTES = 64 * 1024
"""no part of the answer is longer, and one that is as long is sent"""


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
    """A line of the request that goes its own way, and what becomes of it."""

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
        if self.feeding is not None:
            return self.feeding.ended
        return self.task.done() if self.task is not None else self.problem is not None

    def refusal(self) -> bytes:
        """What is answered when it was not fed."""
        assert self.problem is not None
        return msgspec.json.encode({"session": self.session, "error": document(self.problem)}) + b"\n"


class Written(msgspec.Struct, frozen=True, gc=False):
    """The answers to lines that follow each other."""

    lines: int
    answers: bytes


Begun = Line | Gathering | Written | None
"""What a line is part of, or its answer and those of lines after it; None: it is answered"""

_encode_lines = msgspec.json.Encoder().encode_lines


def _session_in(raw: bytes) -> str | None:
    """The session that a line means which is refused for something else."""
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    session = found.get("session") if isinstance(found, dict) else None
    return session if isinstance(session, str) else None


class Bulk:
    """The lines of one request on their way through the engine (`Told`)."""

    def __init__(self, sessions: Sessions, history: History, visit: Visit, key: str | None, body: bytes) -> None:
        self._visit = visit
        self._tenant = visit.tenant.name
        self._sessions = sessions
        self._history = history
        self._key = key
        self._in_columns = key is None and visit.unlimited
        self._dropped = False
        self._raw = [raw for raw in body.split(b"\n") if raw and not raw.isspace()]
        self._next = 0
        """the first line that is not answered yet"""
        self._begun: list[Begun] = []
        """of each line that has begun; those that are answered are forgotten"""
        self._newest: dict[str, int] = {}
        """the newest line of each session"""
        self._waiting: dict[int, Line] = {}
        """lines that wait for another one of the same session to be answered"""
        self._refused: set[str] = set()
        """sessions of which a line was refused"""
        self._news = asyncio.Event()
        """something that went in columns has ended"""
        self._parts = bytearray()

    async def write(self, send: Send) -> None:
        """Run the lines, and send their answers in order: those that are there together in one part."""
        if len(self._raw) > SLICE:
            self._begin(FIRST)
            await asyncio.sleep(ASIDE_S)
        while len(self._begun) < len(self._raw):
            self._begin()
            await asyncio.sleep(0)
            await self._answer_until(WINDOW - SLICE, send)
        await self._answer_until(0, send)
        await self._send_parts(PART_BYTES, send)
        await send({"type": "http.response.body", "body": bytes(self._parts), "more_body": False})

    async def _answer_until(self, most: int, send: Send) -> None:
        """Answer the lines that can be answered at once, and others until no more than `most` are under way."""
        while self._next < len(self._begun):
            ready = self._is_ready()
            if not (ready or len(self._begun) - self._next > most):
                return
            if len(self._parts) >= PART_BYTES or (self._parts and not ready):
                await self._send_parts(0, send)
            await self._take_next()

    async def _take_next(self) -> None:
        """Answer the next line, when it has ended, and those whose answers are written with it."""
        while isinstance(begun := self._begun[self._next], Gathering):
            self._news.clear()
            await self._news.wait()
        if isinstance(begun, Written):
            self._parts += begun.answers
            self._pass(begun.lines)
            await asyncio.sleep(0)
            return
        assert begun is not None
        self._parts += self._answer_now(begun) or await self._answer(begun)
        begun.feeding, begun.task = None, None
        if begun.problem is not None and begun.session is not None:
            self._refused.add(begun.session)
        self._pass(1)

    def _pass(self, lines: int) -> None:
        """Forget lines that are answered, and begin those that have waited for them."""
        first, self._next = self._next, self._next + lines
        self._begun[first : self._next] = [None] * lines
        for number in range(first, self._next) if self._waiting else ():
            line = self._waiting.pop(number, None)
            if line is not None:
                self._follow(line)

    def _is_ready(self) -> bool:
        """Whether the next answer can be had without waiting."""
        begun = self._begun[self._next]
        return isinstance(begun, Written) or (isinstance(begun, Line) and begun.ready)

    async def _send_parts(self, most: int, send: Send) -> None:
        """Send what is written until no more than `most` bytes of it are left."""
        while len(self._parts) > most:
            part = bytes(self._parts[:PART_BYTES])
            del self._parts[:PART_BYTES]
            await send({"type": "http.response.body", "body": part, "more_body": True})

    async def drop(self) -> None:
        """Feed nothing more: nobody waits for it."""
        self._dropped = True
        under_way = self._begun[self._next :]
        tasks = [line.task for line in under_way if isinstance(line, Line) and line.task is not None]
        for task in tasks:
            task.cancel()
        for line in under_way:
            if isinstance(line, Line) and line.feeding is not None:
                line.feeding.drop()
        for gathering in {id(one): one for one in under_way if isinstance(one, Gathering)}.values():
            gathering.drop(range(len(gathering)))
        self._begun.clear()  # they hold this request: a cycle would keep all
        if tasks:
            await asyncio.wait(tasks)

    # ------------------------------------------------------------------ in columns

    def _begin(self, most: int = SLICE) -> None:
        """Feed some lines more, unless they have to wait for others of their sessions."""
        steps = alone = 0
        first = len(self._begun)
        for number in range(first, min(first + most, len(self._raw))):
            if self._begin_step(number):
                steps += 1
                continue
            self._begin_line(Line(number, self._raw[number]))
            alone += 1
            if alone == SLICE_ALONE:
                break
        if steps:
            self._visit.take(steps)

    def _begin_step(self, number: int) -> bool:
        """Feed a line in columns with others, if it is a plain step that has to wait for nothing."""
        line = plain_line(self._raw[number]) if self._in_columns else None
        if line is None or not self._may_begin(line.session):
            return False
        gathering = self._sessions.step((self._tenant, line.session), line, self, (number, line))
        if gathering is None:
            return False
        self._begun.append(gathering)
        self._newest[line.session] = number
        return True

    def _may_begin(self, session: str) -> bool:
        """Whether all lines of a session that came before are answered, and none was refused."""
        return self._newest.get(session, -1) < self._next and session not in self._refused

    def fed(self, gathering: Gathering, column: Column) -> None:
        """Write the answers to lines that were fed together."""
        if self._dropped:
            return
        lines: list[tuple[int, PlainLine]] = [gathering.whose[i] for i in column.which]
        said = answers(gathering.model, column, [line for _, line in lines])
        begin = 0
        for end in range(1, len(lines) + 1):
            if end == len(lines) or lines[end][0] != lines[end - 1][0] + 1:
                self._begun[lines[begin][0]] = Written(end - begin, _encode_lines(said[begin:end]))
                begin = end
        self._news.set()

    def ended(self, gathering: Gathering, i: int, event: Event) -> None:
        """Take what became of a line that was parted from the others: it goes on by itself."""
        number, _ = gathering.whose[i]
        if not self._dropped:
            self._begun[number] = self._parted(gathering, Line(number, self._raw[number]), event)
            self._news.set()

    def _parted(self, gathering: Gathering, line: Line, event: Event) -> Line | Written:
        assert line.body is not None
        try:
            return Written(1, answer_line(fed_of(gathering.model, event), line.body))
        except Race:
            line.task = asyncio.create_task(self._run(line, line.body))
        except Exception as error:
            line.problem = problem_from(error)
        return line

    # ------------------------------------------------------------------ one line

    def _begin_line(self, line: Line) -> None:
        """Feed a line, unless it has to wait for the one before it of the same session."""
        self._begun.append(line)
        before = self._newest.get(line.session, -1) if line.session is not None else -1
        if line.session is not None:
            self._newest[line.session] = line.number
        if before < self._next:
            self._follow(line)
        else:
            self._waiting[before] = line

    def _follow(self, line: Line) -> None:
        if line.session not in self._refused:
            self._start(line)
        elif line.problem is None:
            line.problem = Problem("skipped", "an earlier line of the same session was refused")

    def _start(self, line: Line) -> None:
        if line.body is None:
            return
        try:
            self._visit.take(steps_in(line.body.inputs))
        except Problem as problem:
            line.problem = problem
            return
        if line.body.key is None and self._key is None:
            try:
                line.feeding = self._sessions.feed_now((self._tenant, line.body.session), *feed_of(line.body))
            except Exception as error:
                line.problem = problem_from(error)
                return
        if line.feeding is None:
            line.task = asyncio.create_task(self._run(line, line.body))

    def _answer_now(self, line: Line) -> bytes | None:
        """The answer, if nothing has to be waited for."""
        if line.problem is not None:
            return line.refusal()
        if line.feeding is None or not line.feeding.ended or line.body is None:
            return None
        try:
            fed = line.feeding.result()
            return answer_line(fed, line.body) if not is_long(fed, line.body) else None
        except Race:
            return None
        except Exception as error:
            line.problem = problem_from(error)
            return line.refusal()

    async def _answer(self, line: Line) -> bytes:
        if line.task is not None:
            return await line.task
        assert line.feeding is not None and line.body is not None
        try:
            return await written(await line.feeding.outcome(), line.body)
        except Race:
            return await self._run(line, line.body)
        except Exception as error:
            line.problem = problem_from(error)
            return line.refusal()

    async def _run(self, line: Line, body: BulkLine) -> bytes:
        try:
            return await self._fed(line, body)
        except Exception as error:
            line.problem = problem_from(error)
            return line.refusal()

    async def _fed(self, line: Line, body: BulkLine) -> bytes:
        keyed = self._keyed(line, body)
        inputs, opening = feed_of(body, keyed)

        async def fresh() -> bytes:
            return await written(await self._sessions.feed((self._tenant, body.session), inputs, opening), body)

        async def replay(reply: Reply) -> bytes:
            return await kept_answer(self._history, self._tenant, reply, body)

        return await self._sessions.replies.once(keyed, fresh, replay)

    def _keyed(self, line: Line, body: BulkLine) -> Keyed | None:
        """The line's key, as if it had come alone; the request's own key stands for one a line."""
        if body.key is None and self._key is None:
            return None
        key = checked_key(body.key) if body.key is not None else f"{self._key}:{line.number}"
        asked = body.model_dump_json(exclude={"session", "key"})
        return Keyed(self._tenant, body.session, key, digest_of(f"/v1/sessions/{body.session}/steps?", asked))


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
    return BulkAnswer(Bulk(sessions_of(request), history_of(request), visit_of(request), key, body))
