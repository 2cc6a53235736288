"""Generate: as one JSON answer or as server-sent events that can be cut and resumed.

An event's id stands in the same block as its data and pings have no blank line of their own: clients that keep
the last id would otherwise take a ping for an empty event.
"""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import Field
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from service.api.errors import document
from service.api.limits import Visit, steps_in
from service.api.requests import (
    ModelName,
    Position,
    Seed,
    Strict,
    Version,
    body_of,
    check_max_tokens,
    departures_of,
    history_of,
    key_of,
    keyed_of,
    read,
    replay_body,
    replayed,
    sessions_of,
    visit_of,
    while_connected,
)
from service.api.responses import BODY_ERRORS, ERRORS, JsonResponse, described
from service.api.sessions import SessionId
from service.errors import ClientLeft, Problem, invalid, not_ready
from service.run import Race, Reader, Replay, Run
from service.sampling import MAX_SEED
from service.session import Opening, new_seed, prompt_of
from service.store.base import Generation, Head, Reply
from service.work.events import Suspended, Token
from service.work.feed import Keyed

router = APIRouter(prefix="/v1", tags=["generate"])

Rest = Callable[[], Awaitable[Response]]
"""what is left to do for an answer"""

PING_S = 15.0
MAX_JOINS = 4
CUT_SHORT = "cut short: it was read too slowly or the service stops, and without a session it can not be resumed"
PART_BYTES = 64 * 1024
"""of events that are sent together"""
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

_encode = msgspec.json.Encoder().encode

_EVENT_ID = re.compile(r"^([0-9]{1,15})\.([0-9]{1,16})(-end)?$")


class GenerateBody(Strict):
    """What to write."""

    inputs: Any = Field(default=None, description="a prompt to feed first: a string, symbols or ids")
    max_tokens: int = Field(default=100, ge=1, description="at most RECURRA_MAX_TOKENS")
    temperature: float = Field(default=1.0, ge=0, le=100, description="0 is greedy")
    top_k: int = Field(default=0, ge=0, le=2**31 - 1, description="draw among the k most likely; 0: among all")
    top_p: float = Field(default=1.0, gt=0, le=1, description="draw among the fewest that reach this probability")
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16)] = Field(
        default_factory=list
    )
    logprobs: int | None = Field(default=None, ge=0, le=20, description="show that many likely symbols a token")
    stream: bool = False
    seed: Seed | None = None
    version: Version | None = None


class SessionGenerateBody(GenerateBody):
    """What to write, going on from a session's memory."""

    position: Position | None = None
    model: ModelName | None = None


def generation_of(body: GenerateBody, keyed: Keyed | None = None) -> Generation:
    """A generate's parameters as they are committed."""
    return Generation(
        start=0,
        prompt_tokens=0,
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        seed=0,
        stop=tuple(body.stop),
        logprobs=body.logprobs or 0,
        key=keyed.key if keyed is not None else "",
        digest=keyed.digest if keyed is not None else b"",
    )


@router.post(
    "/sessions/{session_id}/generate",
    openapi_extra=body_of(
        SessionGenerateBody, streamed={"inputs": "ROMEO.\n", "max_tokens": 200, "stream": True, "model": "shakespeare"}
    ),
    responses=described(
        200,
        "the text, or a stream of tokens",
        "Generated",
        *ERRORS,
        "task_mismatch",
        "empty_session",
        *BODY_ERRORS,
        streams=True,
    ),
)
async def generate(request: Request, session_id: SessionId) -> Response:
    """Draw tokens and go on remembering; with `stream` each is sent as soon as it is committed."""
    body = await read(request, SessionGenerateBody)
    check_max_tokens(request, body.max_tokens)
    visit = take(visit_of(request), body)
    sessions, keyed = sessions_of(request), keyed_of(request, session_id, body, "stream")
    opening = Opening(body.model, body.version, body.seed, body.position)

    async def fresh() -> Rest:
        generation = generation_of(body, keyed)
        run = await sessions.generate(key_of(request, session_id), body.inputs, generation, opening)
        return partial(answer, await begun(run), body, session_id, visit)

    async def replay(reply: Reply) -> Rest:
        return partial(replay_generate, request, reply, body)

    async def work() -> Response:
        # Once its first token is committed, others with the same key need not wait for it: they join.
        rest = await sessions.replies.once(keyed, fresh, replay)
        return await rest()

    return await while_connected(request, work())


@router.post(
    "/models/{model}/generate",
    openapi_extra=body_of(GenerateBody, streamed={"inputs": "ROMEO.\n", "max_tokens": 200, "stream": True}),
    responses=described(
        200,
        "the text, or a stream of tokens",
        "Generated",
        "model_not_found",
        "task_mismatch",
        *BODY_ERRORS,
        streams=True,
    ),
)
async def generate_alone(request: Request, model: str) -> Response:
    """Generate without a session: nothing is kept, except an answer in JSON under its request's key."""
    body = await read(request, GenerateBody)
    check_max_tokens(request, body.max_tokens)
    visit = take(visit_of(request), body)
    replies, keyed = sessions_of(request).replies, keyed_of(request, "", body)

    async def fresh() -> Response:
        loaded = request.app.state.registry.get(model, body.version)
        generation = msgspec.structs.replace(generation_of(body), seed=seed_of(body.seed, keyed))
        prompt = await prompt_of(loaded, body.inputs)
        run = sessions_of(request).generate_alone(loaded, prompt, generation)
        found = await answer(await begun(run), body, None, visit)
        if not body.stream:
            await replies.keep(keyed, bytes(found.body))
        return found

    return await while_connected(request, replies.once(keyed, fresh, replay_body))


def take(visit: Visit, body: GenerateBody) -> Visit:
    """Take the steps that a generate may need, and the stream; what it does not need is given back at its end."""
    if body.stream:
        visit.stream()
    visit.take(body.max_tokens + (steps_in(body.inputs) if body.inputs is not None else 0))
    return visit


def pay(visit: Visit, run: Run) -> None:
    """Give back what a run has not needed of the steps that were taken for it."""
    prompt = run.work.generation.prompt_tokens if run.work is not None and not run.work.resumed else 0
    visit.used(prompt + len(run.tokens))


def seed_of(given: int | None, keyed: Keyed | None) -> int:
    """The seed asked for; else one of the request's own key, so that a long text that is not kept comes again."""
    if given is not None:
        return given
    if keyed is None:
        return new_seed()
    return int.from_bytes(hashlib.sha256(keyed.digest + keyed.key.encode()).digest()[:8]) % (MAX_SEED + 1)


async def begun(run: Run) -> Reader:
    """A reader of a run that is known not to fail at once."""
    reader = Reader(run)
    try:
        await reader.begun()
    except BaseException:
        reader.close()
        raise
    return reader


async def answer(reader: Reader, body: GenerateBody, session_id: str | None, visit: Visit) -> Response:
    """A run as a stream, or as JSON at its end."""
    return EventStream(b"", reader) if body.stream else await whole_answer(reader, body, session_id, visit)


async def whole_answer(reader: Reader, body: GenerateBody, session_id: str | None, visit: Visit) -> Response:
    """A run as JSON at its end."""
    try:
        done = await reader.finish()
    finally:
        reader.close()
        pay(visit, reader.run)
    tokens = reader.run.tokens
    assert done.generation is not None
    text = "".join(token.text for token in tokens) + done.rest
    return JsonResponse(_generated(session_id, done.head, done.created, text, tokens, done.generation, body))


def _generated(
    session_id: str | None,
    head: Head | None,
    created: bool,
    text: str,
    tokens: Sequence[Token],
    generation: Generation,
    body: GenerateBody,
) -> dict[str, Any]:
    found: dict[str, Any] = {"session": session_id} if session_id is not None else {}
    if head is not None:
        found |= {"epoch": head.epoch, "position": head.position}
    if created:
        found["created"] = True
    found["text"] = text
    found["tokens"] = [token.token for token in tokens]
    if body.logprobs is not None:
        found["logprobs"] = [
            {"token": t.token, "logprob": t.logprob, "alternatives": t.alternatives or []} for t in tokens
        ]
    return found | _ending(generation, len(tokens))


# ---------------------------------------------------------------------- answered before


async def replay_generate(request: HTTPConnection, reply: Reply, body: GenerateBody) -> Response:
    """What a generate has made; one that runs or is suspended is joined and goes on to its end."""
    found = await recalled(request, reply, body.stream)
    if isinstance(found, Replay):
        return replayed(stream(found))
    return replayed(await _replay_ended(request, found, body))


async def recalled(request: HTTPConnection, reply: Reply, live: bool) -> "Replay | Ended":
    """What a generate has made, at its end; or if `live` and it is not there yet, what it has and what follows.

    Raises Problem `session_busy` when others moved the session each time, or have ended its life meanwhile.
    """
    kept: Reply | None = reply
    for _ in range(MAX_JOINS):
        if kept is None or not kept.pending:
            break
        joined = await _join(request, kept)
        with suppress(Race):  # somebody else has moved the session: the key says how the generate ended
            if joined is not None and live:
                return await followed(joined)
            if joined is not None and joined.reader is not None:
                try:
                    await joined.reader.finish()
                finally:
                    joined.reader.close()
        # At its end, by its own last commit or by who has ended it, the whole answer is stored.
        kept = await sessions_of(request).replies.find(key_of(request, reply.scope), reply.key)
    if kept is None or kept.pending:
        raise Problem("session_busy", "others keep moving the session; try again")
    assert kept.generation is not None and kept.head is not None
    return Ended(kept, kept.head, kept.generation)


async def _join(request: HTTPConnection, reply: Reply) -> Replay | None:
    """A reader of the generate that a pending reply is about; None when the session seems to have gone on from it."""
    sessions, key = sessions_of(request), key_of(request, reply.scope)
    head = await sessions.stored(key)
    if head is None or head.status != "live" or head.generation is None or head.generation.key != reply.key:
        return None
    try:
        joined = await sessions.events(key, head.epoch, reply.start)
    except Problem as problem:
        if problem.code != "log_truncated":
            raise
        return None  # rewound since its head was read
    if joined is None or joined.key == reply.key:
        return joined
    if joined.reader is not None:
        run = joined.reader.run
        joined.reader.close()
        if run.end is None:
            # Another one's work: it moves the session with its next event, or learns that another replica has.
            await run.news()
    return None


async def _replay_ended(request: HTTPConnection, ended: "Ended", body: GenerateBody) -> Response:
    tokens, rest = await ended.tokens(request, 0 if body.stream else body.logprobs or 0)
    head, generation = ended.head, ended.generation
    if body.stream:
        blocks = _token_blocks(head.epoch, tokens)
        return EventStream(blocks + _done_block(head.epoch, generation, rest))
    text = "".join(token.text for token in tokens) + rest
    at = msgspec.structs.replace(head, position=generation.end or head.position)
    return JsonResponse(_generated(ended.reply.scope, at, generation.created, text, tokens, generation, body))


@dataclass(frozen=True, slots=True)
class Ended:
    """A generate at its end, as its key has kept it."""

    reply: Reply
    head: Head
    generation: Generation

    async def tokens(self, request: HTTPConnection, alternatives: int) -> tuple[list[Token], str]:
        """Its tokens, with so many likely symbols at each, and the text that was held back at its end."""
        history, key = history_of(request), key_of(request, self.reply.scope)
        tokens, rest = await history.tokens(key, self.reply, self.generation)
        if alternatives:
            tokens = await history.with_alternatives(key, self.reply, tokens, alternatives)
        return tokens, rest


def _ending(generation: Generation | None, tokens: int) -> dict[str, Any]:
    reason = generation.finish_reason if generation is not None else "cancelled"
    prompt = generation.prompt_tokens if generation is not None else 0
    return {"finish_reason": reason, "usage": {"prompt_tokens": prompt, "completion_tokens": tokens}}


@router.get(
    "/sessions/{session_id}/events",
    responses=described(200, "the rest of the stream", None, *ERRORS, "log_truncated", streams=True),
)
async def events(
    request: Request,
    session_id: SessionId,
    after: Annotated[str | None, Query(max_length=64)] = None,
    last_event_id: Annotated[str | None, Header(max_length=64)] = None,
) -> Response:
    """Resume a cut generate after an event id: the tokens that are missing, then the rest as it is drawn."""
    epoch, position, ended = _event_id(last_event_id or after)
    visit_of(request).stream()
    if ended:
        await sessions_of(request).head(key_of(request, session_id))
        return Response(status_code=204)
    sessions = sessions_of(request)

    async def rest() -> Response:
        replay = await sessions.events(key_of(request, session_id), epoch, position)
        return stream(await followed(replay)) if replay is not None else Response(status_code=204)

    return await while_connected(request, sessions.replies.again(rest))


async def followed(replay: Replay) -> Replay:
    """The replay, once it is known not to fail at once."""
    if replay.reader is not None:
        try:
            await replay.reader.begun()
        except BaseException:
            replay.reader.close()
            raise
    return replay


def stream(replay: Replay) -> Response:
    """A replay as a stream."""
    blocks = _token_blocks(replay.head.epoch, replay.tokens)
    if replay.reader is not None:
        return EventStream(blocks, replay.reader, replay.after)
    assert replay.head.generation is not None
    return EventStream(blocks + _done_block(replay.head.epoch, replay.head.generation, replay.rest))


def _event_id(given: str | None) -> tuple[int, int, bool]:
    if not given:
        raise Problem("bad_request", "say after which event: Last-Event-ID: 1.40, or ?after=1.40")
    found = _EVENT_ID.match(given)
    if found is None:
        raise invalid("an event id is <epoch>.<position>, as in 1.40", "/after")
    return int(found[1]), int(found[2]), found[3] is not None


# ---------------------------------------------------------------------- events


class Stream(Response):
    """Server-sent events, until their end or until the client leaves; a ping when there was nothing for a while."""

    def __init__(self) -> None:
        super().__init__(None, 200, HEADERS, "text/event-stream")
        del self.headers["content-length"]
        self._quiet = True
        self._visit: Visit | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until there is no more to send or nobody to send to."""
        self._visit = scope["visit"]
        pinging = asyncio.ensure_future(self._ping(send))
        try:
            with departures_of(scope).watch(receive, long=True):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self.write(send)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientLeft:
            pass  # nobody can be told
        finally:
            pinging.cancel()
            self.close()

    async def write(self, send: Send) -> None:
        """Send the events."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing more is sent."""

    async def _ping(self, send: Send) -> None:
        """Send a comment whenever nothing else was sent for a while."""
        while True:
            self._quiet = True
            await asyncio.sleep(PING_S)
            if self._quiet:
                await self.send_part(send, b": ping\n")

    async def send_part(self, send: Send, body: bytes) -> None:
        """Send whole events, of many a few at a time: what a slow client has not taken yet stays small."""
        begin = 0
        while begin < len(body):
            self._quiet = False
            end = len(body)
            if end - begin > PART_BYTES:
                last = body.rfind(b"\n\n", begin, begin + PART_BYTES)
                end = (last if last >= 0 else body.index(b"\n\n", begin)) + 2
            await send({"type": "http.response.body", "body": body[begin:end], "more_body": True})
            begin = end


class EventStream(Stream):
    """What the log has of a generate, then what a run draws."""

    def __init__(self, replayed: bytes, reader: Reader | None = None, after: int = 0) -> None:
        super().__init__()
        self._replayed = replayed
        self._reader = reader
        self._after = after

    def close(self) -> None:
        """Read no more."""
        if self._reader is not None:
            self._reader.close()
            if self._visit is not None:
                pay(self._visit, self._reader.run)

    async def write(self, send: Send) -> None:
        """Send the tokens, and the end."""
        if self._replayed:
            await self.send_part(send, self._replayed)
        if self._reader is None:
            return
        while tokens := await self._reader.after(self._after):  # what came together is sent together
            await self.send_part(send, _token_blocks(self._reader.run.epoch, tokens))
        if (end := _end_block(self._reader.run)) is not None:
            await self.send_part(send, end)


def _end_block(run: Run) -> bytes | None:
    """The last event; none for a suspended run, whose stream ends without `done` and is resumed."""
    if run.suspended:
        kept = isinstance(run.end, Suspended) and run.end.head is not None
        return None if kept else _block("error", None, document(not_ready(CUT_SHORT)))
    try:
        done = run.outcome()
    except Problem as problem:
        return _block("error", None, document(problem))
    assert done.generation is not None
    return _done_block(run.epoch, done.generation, done.rest)


def _token_blocks(epoch: int, tokens: Sequence[Token]) -> bytes:
    return b"".join(
        [b"event: token\nid: %d.%d\ndata: %b\n\n" % (epoch, token.position, token_data(token)) for token in tokens]
    )


def token_data(token: Token) -> bytes:
    """What is told of a token, as JSON."""
    return _encode(token if token.alternatives is None else msgspec.structs.replace(token, alternatives=None))


def _done_block(epoch: int, generation: Generation, rest: str) -> bytes:
    return _block("done", f"{epoch}.{generation.end}-end", done_data(epoch, generation, rest))


def done_data(epoch: int, generation: Generation, rest: str) -> dict[str, Any]:
    """What is told of a generate's end."""
    assert generation.end is not None
    ending = _ending(generation, generation.end - generation.start)
    data = {"finish_reason": ending["finish_reason"], "epoch": epoch, "position": generation.end}
    if rest:
        data["text"] = rest
    return data | {"usage": ending["usage"]}


def _block(event: str, event_id: str | None, data: dict[str, Any]) -> bytes:
    named = f"id: {event_id}\n" if event_id is not None else ""
    return f"event: {event}\n{named}".encode() + b"data: " + msgspec.json.encode(data) + b"\n\n"
