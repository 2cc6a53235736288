"""A session over a WebSocket: the routes' operations as JSON messages, one after another in their order.

What comes while an operation runs is read, so that a cancel reaches it, and waits: a few messages with no more bytes
than one request may have, beyond which nothing is read. Answers wait for the client to read them; one that does not is
cut off.
"""

import asyncio
import re
from collections import deque
from contextlib import suppress
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

import msgspec
from fastapi import APIRouter, Response, WebSocket
from pydantic import Field, ValidationError
from starlette.types import Message
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from service.api.errors import STATUS, answer, document, from_validation, problem_from
from service.api.limits import steps_in
from service.api.requests import (
    MAX_KEY,
    SESSION_ID,
    Strict,
    check_max_tokens,
    checked_key,
    digest_of,
    history_of,
    key_of,
    sessions_of,
    visit_of,
)
from service.api.responses import described
from service.api.sessions import SessionId, StepsBody, feed_of, kept_answer, written
from service.api.streaming import (
    Ended,
    SessionGenerateBody,
    begun,
    done_data,
    generation_of,
    pay,
    recalled,
    replay_generate,
    take,
    token_data,
    whole_answer,
)
from service.errors import Problem, not_ready
from service.run import Reader, Replay, Run
from service.session import Opening
from service.store.base import Reply
from service.work.events import Token
from service.work.feed import Keyed

router = APIRouter(prefix="/v1/sessions", tags=["sessions"])

MAX_WAITING = 64
"""operations of one socket that wait for those before them"""
SEND_S = 10.0
"""how long a message may wait for the client to read"""
CLOSE_S = 2.0
"""how long a closed socket may wait for that"""
PING_S = 20.0
MAX_FRAGMENTS = 1024
"""pieces that a message may come in"""

TOO_LARGE = 1009
RESTART = 1012
UNKNOWN = 4404
GONE = 4410
CLOSING = {"session_not_found": UNKNOWN, "session_closed": GONE, "session_expired": GONE}

Ref = Annotated[int, Field(ge=-(2**53), le=2**53)] | Annotated[str, Field(max_length=128)]
_ABORT = "recurra.abort"


class StepsMessage(StepsBody):
    """A sequence to feed."""

    type: Literal["steps"]
    ref: Ref | None = None
    key: str | None = Field(default=None, max_length=MAX_KEY + 2)


class GenerateMessage(SessionGenerateBody):
    """What to write; without `stream` the whole answer comes in one message."""

    stream: bool = True
    type: Literal["generate"]
    ref: Ref | None = None
    key: str | None = Field(default=None, max_length=MAX_KEY + 2)


class CancelMessage(Strict):
    """End the operation with this ref; without one whatever runs in the session, or is suspended."""

    type: Literal["cancel"]
    ref: Ref | None = None


SCHEMAS: dict[str, type[StepsMessage | GenerateMessage | CancelMessage]] = {
    "steps": StepsMessage,
    "generate": GenerateMessage,
    "cancel": CancelMessage,
}


class _Kind(msgspec.Struct):
    """What is looked at first of a message."""

    type: Any = None
    ref: Any = None


class Operation:
    """What a message asks for, or why it can not be done."""

    __slots__ = ("asked", "joins", "ref", "run", "size", "task")

    def __init__(self, asked: StepsMessage | GenerateMessage | Problem, ref: object, size: int) -> None:
        self.asked = asked
        self.ref = ref
        self.size = size
        self.run: Run | None = None
        """the generate, once it has begun"""
        self.joins = False
        """whether it goes on with a generate that an earlier request has begun"""
        self.task: asyncio.Task[None] | None = None
        """set while it is worked on"""


@router.get(
    "/{session_id}/ws",
    status_code=426,
    response_class=Response,
    responses={
        status: said
        for status, said in described(200, "", None, "upgrade_required").items()
        if status in (401, 403, 422, 426, 429)
    },
)
async def plain(session_id: SessionId) -> Response:
    """A WebSocket on a session that lives: `ws://.../v1/sessions/{session_id}/ws`, messages of JSON.

    The client sends `{"type": "steps" | "generate" | "cancel", "ref"?, "key"?, ...}` with the fields of the routes;
    `key` stands for the Idempotency-Key. Operations are done one after another; `cancel` at once.

    The service sends `{"type": "hello", "session", "epoch", "position", "idle_timeout_s"}` first. Steps are answered
    with `{"type": "prediction", "ref"?, ...}` as their route answers; a generate with `{"type": "token", "ref"?, "id",
    "position", "token", "text", "logprob"}` for each token, then `{"type": "done", "ref"?, "finish_reason", ...}`, or
    with `"stream": false` with all of it in `done`. What is refused is answered with `{"type": "error", "ref"?, ...}`
    and the members of a problem document.

    A client that leaves suspends its generate: sent again with its `key` it is answered from its first token on.
    Closing codes: 4401 unauthorised, 4404 unknown, 4410 gone, 1012 restart, 1009 too large, 1000 idle.
    """
    found = answer(Problem("upgrade_required", f"a WebSocket: connect to ws://.../v1/sessions/{session_id}/ws"))
    found.headers.update({"Upgrade": "websocket", "Connection": "Upgrade"})
    return found


@router.websocket("/{session_id}/ws")
async def websocket(socket: WebSocket, session_id: str) -> None:
    """Serve a session over a WebSocket."""
    if _is_foreign(socket):
        await socket.close()  # before it is accepted: 403
        return
    await socket.accept()
    await Connection(socket, session_id).serve()


def _is_foreign(socket: WebSocket) -> bool:
    """Whether a page of another site asks: browsers ask nobody before they open a WebSocket anywhere."""
    origin = socket.headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != socket.headers.get("host")


class Connection:
    """One client's WebSocket on one session."""

    def __init__(self, socket: WebSocket, session_id: str) -> None:
        self._socket = socket
        self._id = session_id
        self._key = key_of(socket, session_id)
        self._visit = visit_of(socket)
        self._sessions = sessions_of(socket)
        self._history = history_of(socket)
        self._idle_s: float = socket.app.state.settings.ws_idle_s
        self._most_bytes: int = socket.app.state.settings.max_body_bytes
        self._waiting: deque[Operation] = deque()
        self._bytes = 0
        self._current: Operation | None = None
        self._worker: asyncio.Task[None] | None = None
        self._moved = asyncio.Event()
        """set when something that waited does not any more"""
        self._cancels: set[asyncio.Task[None]] = set()
        self._rested = 0.0
        """when it was done with the last operation"""

    async def serve(self) -> None:
        """Greet, then take messages until the client leaves, does nothing for long, or is closed."""
        try:
            await self._greet()
            while (message := await self._next()) is not None:
                await self._take(message)
        except _Gone:
            pass
        finally:
            tasks = [*self._cancels, *([self._worker] if self._worker is not None else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _greet(self) -> None:
        try:
            if re.fullmatch(SESSION_ID, self._id) is None:
                raise Problem("session_not_found", "an id has 1 to 128 letters, digits and ._:-")
            if self._sessions.draining:
                raise not_ready("the service is stopping")
            head = await self._sessions.head(self._key)
        except Exception as error:
            await self._refuse(None, error)
            return
        where = {"session": head.id, "epoch": head.epoch, "position": head.position}
        await self._say("hello", None, {**where, "idle_timeout_s": self._idle_s})

    # ------------------------------------------------------------------ what comes

    async def _next(self) -> Message | None:
        """The next message; None when the client has left, or is sent away because nothing happens."""
        loop = asyncio.get_running_loop()
        self._rested = loop.time()
        while True:
            until = (loop.time() if self._current is not None else self._rested) + self._idle_s
            try:
                async with asyncio.timeout_at(until):
                    message = await self._socket.receive()
            except TimeoutError:
                if self._current is None and loop.time() >= self._rested + self._idle_s:
                    await self._close(1000, f"idle for {self._idle_s:g} s")
                    return None
                continue
            return message if message["type"] == "websocket.receive" else None

    async def _take(self, message: Message) -> None:
        """Put an operation in line once there is room, or cancel one."""
        text: str | None = message.get("text")
        asked, ref = _read(text)
        if isinstance(asked, CancelMessage):
            await self._cancel(asked.ref)
            return
        operation = Operation(asked, ref, len(text or ""))
        while self._waiting and (len(self._waiting) >= MAX_WAITING or self._bytes + operation.size > self._most_bytes):
            self._moved.clear()
            await self._moved.wait()
        self._waiting.append(operation)
        self._bytes += operation.size
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())

    async def _cancel(self, ref: object) -> None:
        while len(self._cancels) >= MAX_WAITING:
            await asyncio.wait(self._cancels, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(self._cancelled(ref))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _cancelled(self, ref: object) -> None:
        with suppress(_Gone):
            try:
                if ref is not None:
                    await self._end(ref)
                    return
                head = await self._sessions.cancel(self._key)
                where = {"epoch": head.epoch, "position": head.position}
                await self._say("done", None, {"finish_reason": "cancelled", **where})
            except _Gone:
                raise
            except Exception as error:
                await self._refuse(ref, error)

    async def _end(self, ref: object) -> None:
        """End the operation with a ref; a generate that runs says itself how far it came."""
        current = self._current
        waiting = next((one for one in self._waiting if one.ref == ref), None)
        if current is not None and current.ref == ref and isinstance(current.asked, GenerateMessage):
            if current.run is not None:
                current.run.ask("cancel")
            elif current.joins:
                await self._sessions.cancel(self._key)
            elif current.task is not None:
                current.task.cancel()
        elif waiting is not None:
            self._waiting.remove(waiting)
            self._bytes -= waiting.size
            self._moved.set()
            await self._say("done", ref, {"finish_reason": "cancelled"})
        else:
            raise Problem("bad_request", "nothing with this ref waits, and no generate runs with it")

    # ------------------------------------------------------------------ what is done

    async def _work(self) -> None:
        """Do what waits, one after another, while somebody is there."""
        with suppress(_Gone):
            await self._do_all()
        self._waiting.clear()
        self._bytes = 0
        self._moved.set()
        self._worker = None

    async def _do_all(self) -> None:
        this = asyncio.current_task()
        assert this is not None
        while self._waiting:
            self._current = operation = self._waiting.popleft()
            self._bytes -= operation.size
            operation.task = asyncio.create_task(self._do(operation))
            try:
                await operation.task
            except asyncio.CancelledError:
                if this.cancelling():
                    raise
                await self._say("done", operation.ref, {"finish_reason": "cancelled"})
            finally:
                self._current = None
                self._rested = asyncio.get_running_loop().time()
                self._moved.set()

    async def _do(self, operation: Operation) -> None:
        asked = operation.asked
        try:
            if isinstance(asked, Problem):
                raise asked
            if isinstance(asked, StepsMessage):
                await self._steps(asked)
            else:
                await self._generate(operation, asked)
        except _Gone:
            raise
        except Exception as error:
            await self._refuse(operation.ref, error)

    def _keyed(self, asked: StepsMessage | GenerateMessage, route: str, *unlike: str) -> Keyed | None:
        """The message's key, as if it had come to the session's route."""
        if asked.key is None:
            return None
        body = asked.model_dump_json(exclude={"type", "ref", "key", *unlike})
        return Keyed(
            self._key[0], self._id, checked_key(asked.key), digest_of(f"/v1/sessions/{self._id}/{route}?", body)
        )

    async def _steps(self, asked: StepsMessage) -> None:
        keyed = self._keyed(asked, "steps")
        inputs, opening = feed_of(asked, keyed)
        self._visit.take(steps_in(asked.inputs))

        async def fresh() -> tuple[bytes, bool]:
            fed = await self._sessions.feed(self._key, inputs, opening)
            self._visit.used(len(fed.done.entries))
            return await written(fed, asked), False

        async def replay(reply: Reply) -> tuple[bytes, bool]:
            return await kept_answer(self._history, self._key[0], reply, asked), True

        line, replayed = await self._sessions.replies.once(keyed, fresh, replay)
        await self._send(_head("prediction", asked.ref, replayed) + line[1:-1].decode())

    async def _generate(self, operation: Operation, asked: GenerateMessage) -> None:
        check_max_tokens(self._socket, asked.max_tokens)
        try:
            take(self._visit, asked)
            await self._generated(operation, asked)
        finally:
            self._visit.leave()

    async def _generated(self, operation: Operation, asked: GenerateMessage) -> None:
        keyed = self._keyed(asked, "generate", "stream")
        opening = Opening(asked.model, asked.version, asked.seed, asked.position)

        async def fresh() -> Reader | Reply:
            generation = generation_of(asked, keyed)
            operation.run = await self._sessions.generate(self._key, asked.inputs, generation, opening)
            return await begun(operation.run)

        async def replay(reply: Reply) -> Reader | Reply:
            return reply

        found = await self._sessions.replies.once(keyed, fresh, replay)
        if isinstance(found, Reader):
            try:
                await self._write(found, asked)
            finally:
                found.close()
                if asked.stream:
                    pay(self._visit, found.run)
            return
        operation.joins = True
        if asked.stream:
            await self._write_again(operation, found, asked)
        else:
            response = await replay_generate(self._socket, found, asked)
            await self._send(_head("done", asked.ref, True) + bytes(response.body)[1:-1].decode())

    async def _write(self, reader: Reader, asked: GenerateMessage) -> None:
        """A generate's tokens as they are drawn, or all at its end."""
        if asked.stream:
            await self._follow(reader, asked)
            return
        response = await whole_answer(reader, asked, self._id, self._visit)
        await self._send(_head("done", asked.ref) + bytes(response.body)[1:-1].decode())

    async def _write_again(self, operation: Operation, reply: Reply, asked: GenerateMessage) -> None:
        """What an earlier request with the key has made, and what follows."""
        found = await recalled(self._socket, reply, live=True)
        if isinstance(found, Ended):
            tokens, rest = await found.tokens(self._socket, 0)
            await self._tokens(found.head.epoch, tokens, asked.ref)
            await self._say("done", asked.ref, done_data(found.head.epoch, found.generation, rest), replayed=True)
            return
        try:
            await self._tokens(found.head.epoch, found.tokens, asked.ref)
            await self._rest(operation, found, asked)
        finally:
            if found.reader is not None:
                found.reader.close()

    async def _rest(self, operation: Operation, found: Replay, asked: GenerateMessage) -> None:
        if found.reader is not None:
            operation.run = found.reader.run
            await self._follow(found.reader, asked, found.after)
        else:
            assert found.head.generation is not None
            data = done_data(found.head.epoch, found.head.generation, found.rest)
            await self._say("done", asked.ref, data, replayed=True)

    async def _follow(self, reader: Reader, asked: GenerateMessage, after: int = 0) -> None:
        run = reader.run
        while tokens := await reader.after(after):
            await self._tokens(run.epoch, tokens, asked.ref)
        if run.suspended:  # as an event stream that ends without `done`
            why = "the service is stopping" if self._sessions.draining else "read too slowly"
            await self._close(RESTART, f"suspended: {why}")
            return
        done = run.outcome()
        assert done.generation is not None
        await self._say("done", asked.ref, done_data(run.epoch, done.generation, done.rest))

    # ------------------------------------------------------------------ what is sent

    async def _tokens(self, epoch: int, tokens: list[Token], ref: object) -> None:
        head = _head("token", ref)
        for token in tokens:
            await self._send(f'{head}"id":"{epoch}.{token.position}",{token_data(token)[1:].decode()}')

    async def _say(self, kind: str, ref: object, members: dict[str, Any], replayed: bool = False) -> None:
        await self._send(_head(kind, ref, replayed) + msgspec.json.encode(members)[1:].decode())

    async def _refuse(self, ref: object, error: Exception) -> None:
        """Say what is wrong; who asks for a session that does not live is sent away."""
        problem = problem_from(error)
        # A problem's own `type` is told by its `code`.
        members = {name: value for name, value in document(problem).items() if name != "type"}
        await self._say("error", ref, members)
        if problem.code in CLOSING:
            await self._close(CLOSING[problem.code], STATUS[problem.code][1])
        elif problem.code == "not_ready" and self._sessions.draining:
            await self._close(RESTART, problem.detail)

    async def _send(self, text: str) -> None:
        """Send a message once the client has read enough of those before; cut it off when it does not."""
        try:
            async with asyncio.timeout(SEND_S):
                await self._socket.send({"type": "websocket.send", "text": text})
        except TimeoutError:
            self._abort()
            raise _Gone from None
        except Exception as error:  # Starlette and the server each have their own way to say that nobody is there
            raise _Gone from error

    async def _close(self, code: int, reason: str) -> None:
        try:
            async with asyncio.timeout(SEND_S):
                await self._socket.close(code, reason)
        except TimeoutError:
            self._abort()
        except Exception:  # it is closed already
            return

    def _abort(self) -> None:
        """Cut the connection: the next message is that it is lost."""
        self._socket.scope["extensions"][_ABORT]()


class _Gone(Exception):
    """Nobody is there to be told."""


def _read(text: str | None) -> tuple[StepsMessage | GenerateMessage | CancelMessage | Problem, object]:
    """A message and its ref."""
    if text is None:
        return Problem("bad_request", "messages are JSON in text frames"), None
    try:
        kind = msgspec.json.decode(text, type=_Kind)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return Problem("bad_request", "a message is a JSON object"), None
    ref = kind.ref if isinstance(kind.ref, int | str) and len(str(kind.ref)) <= 128 else None
    schema = SCHEMAS.get(kind.type) if isinstance(kind.type, str) else None
    if schema is None:
        return Problem("bad_request", f"the type of a message is one of {', '.join(SCHEMAS)}"), ref
    try:
        return schema.model_validate_json(text), ref
    except ValidationError as error:
        return from_validation(error), ref


def _head(kind: str, ref: object, replayed: bool = False) -> str:
    """The beginning of a message, up to its own members."""
    named = f'"ref":{msgspec.json.encode(ref).decode()},' if ref is not None else ""
    return f'{{"type":"{kind}",{named}' + ('"replayed":true,' if replayed else "")


class Protocol(WebSocketsSansIOProtocol):
    """Uvicorn's WebSocket, which can be cut off: to close alone waits for a client that may never read."""

    async def run_asgi(self) -> None:
        """Serve the connection, and leave nothing of it."""
        extensions = cast(dict[str, Any], self.scope["extensions"])
        extensions[_ABORT] = self.transport.abort
        try:
            await super().run_asgi()
        finally:
            self.loop.call_later(CLOSE_S, self.transport.abort)

    def shutdown(self) -> None:
        """The service stops."""
        super().shutdown()
        self.loop.call_later(CLOSE_S, self.transport.abort)

    def handle_ping(self) -> None:
        """Answer; one that asks and does not read is cut off."""
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.transport.abort()

    def handle_cont(self, event: Frame) -> None:
        """Take the next piece of a message; not one of very many."""
        if len(self.frames) < MAX_FRAGMENTS:
            super().handle_cont(event)
            return
        self.conn.fail(TOO_LARGE, f"at most {MAX_FRAGMENTS} fragments")
        self.handle_parser_exception()

    def keepalive_timeout(self) -> None:
        """A ping was not answered."""
        super().keepalive_timeout()
        self.transport.abort()
