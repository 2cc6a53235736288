"""Completions as OpenAI's clients ask for them: throw-away ones, and with `session` such as are remembered."""

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from service.api import errors
from service.api.completions import Answer, Choice, CompletionBody, CompletionStream, Source, scored, unscored
from service.api.limits import steps_in
from service.api.requests import (
    body_of,
    header,
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
from service.api.responses import BODY_ERRORS, ERRORS, described
from service.api.streaming import begun, recalled, seed_of
from service.errors import ClientLeft, Problem, invalid
from service.feeding import Inputs, head_of
from service.registry import Model
from service.run import Reader, Replay
from service.sampling import choice_seed
from service.session import Opening, needs_language_model, prompt_of
from service.state import Array
from service.store.base import Head, Key, Reply, now_ms
from service.work.events import Done, Token
from service.work.feed import KeptAnswer, Keyed

router = APIRouter(prefix="/v1", tags=["openai"])

Rest = Callable[[], Awaitable[Response]]
STREAM_EXAMPLE = """data: {"id":"cmpl-7","object":"text_completion","created":1790000000,"model":"shakespeare",\
"system_fingerprint":"fp_44709d6fcb","choices":[{"text":"To be","index":0,"logprobs":null,"finish_reason":null}]}

data: {"id":"cmpl-7","object":"text_completion","created":1790000000,"model":"shakespeare",\
"system_fingerprint":"fp_44709d6fcb","choices":[{"text":"","index":0,"logprobs":null,"finish_reason":"length"}]}

data: [DONE]

"""

RESPONSES = described(
    200,
    "the completions, or a stream of their pieces",
    "Completion",
    *ERRORS,
    "model_not_found",
    "model_mismatch",
    "unknown_symbol",
    "task_mismatch",
    "empty_session",
    *BODY_ERRORS,
    streams=True,
)
RESPONSES[200]["content"]["text/event-stream"] = {
    "schema": {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}},
    "example": STREAM_EXAMPLE,
}


@router.post(
    "/completions",
    openapi_extra=body_of(
        CompletionBody,
        plain={"model": "shakespeare", "prompt": "ROMEO.\n", "max_tokens": 50, "seed": 1},
        remembering={"model": "shakespeare", "prompt": "JULIET.\n", "session": "balcony"},
        scoring={"model": "shakespeare", "prompt": "To be, or not to be", "max_tokens": 0, "echo": True, "logprobs": 1},
    ),
    responses=RESPONSES,
)
async def completions(request: Request) -> Response:
    """Complete prompts, as OpenAI's `POST /v1/completions` does; with `session` the memory is kept.

    Errors hold OpenAI's `error` object beside the members of a problem document.
    """
    body = await read(request, CompletionBody)
    limit: int = request.app.state.settings.max_tokens
    body.check(limit)
    prompts, visit = body.prompts(), visit_of(request)
    drawn = len(prompts) * body.candidates * body.length
    if body.stream:
        visit.stream()
    visit.take(drawn + sum(steps_in(one) for one in prompts if one is not None))
    if body.session is None:
        return await while_connected(request, _alone(request, body))
    keyed = keyed_of(request, body.session, body, "stream", "stream_options")
    try:
        if keyed is None:
            _must_be_the_first_try(request)
        return await while_connected(request, _remembered(request, body, body.session, keyed))
    except ClientLeft:
        raise
    except Exception as error:
        found = errors.answer_to(_of_prompt(error), request.url.path)
        if keyed is None:
            # The openai package would try again, and without a key nobody can tell whether this was done already.
            found.headers["x-should-retry"] = "false"
        return found


def _must_be_the_first_try(request: Request) -> None:
    """Raise Problem for a retry without a key: whether the session has moved already can not be known."""
    count = header(request, b"x-stainless-retry-count") or "0"
    if count != "0":
        raise Problem(
            "bad_request",
            "this is a retry, and without a key it might move the session twice: send an Idempotency-Key with every "
            'completion of a session, in Python extra_headers={"Idempotency-Key": str(uuid.uuid4())}',
        )


def _of_prompt(error: Exception) -> Exception:
    """The error with what sessions call inputs by its name here."""
    if isinstance(error, Problem):
        for one in error.members.get("errors", ()):
            one["pointer"] = one["pointer"].replace("/inputs", "/prompt", 1)
    return error


# ---------------------------------------------------------------------- without a session


async def _alone(request: Request, body: CompletionBody) -> Response:
    """Completions that leave nothing behind, except an answer in JSON under its request's key."""
    replies, keyed = sessions_of(request).replies, keyed_of(request, "", body)

    async def fresh() -> Response:
        model: Model = request.app.state.registry.get(body.model)
        asked = body.prompts()
        where = [f"/prompt/{i}" if len(asked) > 1 else "/prompt" for i in range(len(asked))]
        prompts = [await prompt_of(model, one, at) for one, at in zip(asked, where, strict=True)]
        _check_lengths(request, model, body, prompts)
        shown = await _echoes(request, model, body, [one is not None for one in asked], prompts)
        sources = await _draws(request, model, body, prompts, shown, keyed)
        answer = Answer(model, body, keyed, int(time.time()), sum(map(len, prompts)), sources)
        if body.stream:
            return CompletionStream(answer)
        found = await answer.whole()
        await replies.keep(keyed, bytes(found.body))
        return found

    return await replies.once(keyed, fresh, replay_body)


def _check_lengths(request: Request, model: Model, body: CompletionBody, prompts: Sequence[Array]) -> None:
    """Raise Problem when the prompts are too long to be folded, or shown, by one request."""
    steps, limit = sum(map(len, prompts)), int(request.app.state.settings.max_queue_steps)
    if steps * body.candidates > limit:
        raise Problem("payload_too_large", f"at most {limit} tokens of prompts a request (RECURRA_MAX_QUEUE_STEPS)")
    most = model.most_steps(body.logprobs or 0)
    if body.scored and steps > most:
        raise invalid(f"at most {most} tokens of prompts a request with these logprobs", "/prompt")


async def _echoes(
    request: Request, model: Model, body: CompletionBody, given: Sequence[bool], prompts: Sequence[Array]
) -> list[list[Token]]:
    """The tokens that are shown of the prompts that were given, one list a prompt."""
    if not body.scored:
        return [unscored(one) if body.echo and there else [] for one, there in zip(prompts, given, strict=True)]
    outcomes = await sessions_of(request).predict(model, prompts, last_only=False)
    return [
        await scored(model.engine.codec, one, done, body.logprobs or 0) if there else []
        for one, there, done in zip(prompts, given, outcomes, strict=True)
    ]


async def _draws(
    request: Request,
    model: Model,
    body: CompletionBody,
    prompts: Sequence[Array],
    shown: Sequence[list[Token]],
    keyed: Keyed | None,
) -> "list[Source]":
    """All completions of all prompts under way, once none is known to fail at once."""
    sources: list[Source] = []
    first = seed_of(body.own_seed, keyed)
    try:
        for i, prompt in enumerate(prompts):
            for j in range(body.candidates):
                # With a seed a prompt is completed as if it were alone; without one, alike prompts differ.
                seed = choice_seed(first, j if body.seed is not None else i * body.candidates + j)
                source = Source(Choice(len(sources), model.engine.codec, body.logprobs), shown[i])
                sources.append(source)
                if body.length:
                    source.reader = Reader(sessions_of(request).generate_alone(model, prompt, body.generation(seed)))
        for source in sources:
            if source.reader is not None:
                await source.reader.begun()
    except BaseException:
        for source in sources:
            source.close()
        raise
    return sources


# ---------------------------------------------------------------------- in a session


async def _remembered(request: Request, body: CompletionBody, session: str, keyed: Keyed | None) -> Response:
    """A completion that goes on from a session's memory and is remembered."""
    sessions, key = sessions_of(request), key_of(request, session)
    (prompt,) = body.prompts()
    opening = Opening(body.model, seed=body.own_seed)

    async def fresh() -> Rest:
        await _check_prompt(request, body, key, prompt)
        if body.length:
            run = await sessions.generate(key, prompt, body.generation(keyed=keyed), opening)
            return partial(_of_run, request, body, keyed, await begun(run))
        if prompt is None:
            raise invalid("without a prompt and without tokens to draw there is nothing to do", "/max_tokens")
        fed = await sessions.feed(key, Inputs(prompt, "none", 0, partial(_kept, keyed) if keyed else None), opening)
        return partial(_of_feed, request, body, keyed, _span(fed.done))

    async def replay(reply: Reply) -> Rest:
        if reply.kind == "body":
            return partial(_again, _of_feed, request, body, keyed, msgspec.json.decode(reply.body, type=Span))
        return partial(_again, _of_reply, request, body, keyed, reply)

    # Once its first token is committed, others with the same key need not wait for it: they join.
    rest = await sessions.replies.once(keyed, fresh, replay)
    return await rest()


async def _again(rest: Callable[..., Awaitable[Response]], *args: object) -> Response:
    return replayed(await rest(*args))


async def _check_prompt(request: Request, body: CompletionBody, key: Key, prompt: str | list[Any] | None) -> None:
    """Raise Problem for what would otherwise be found out when the session has moved."""
    sessions = sessions_of(request)
    head = await sessions.stored(key)
    lives = head is not None and head.status == "live" and head.model == body.model
    model = sessions.model_of(head) if lives and head is not None else sessions.registry.get(body.model)
    needs_language_model(model)
    if prompt is not None:
        _check_lengths(request, model, body, [await prompt_of(model, prompt, "/prompt")])


class Span(msgspec.Struct, frozen=True):
    """Where a prompt stands in a session's log; what is kept of a completion without tokens."""

    at_ms: int
    session: str
    model: str
    graph: str
    branch: str
    start: int
    end: int

    @classmethod
    def of(cls, head: Head, graph: str, branch: str, end: int, count: int) -> "Span":
        """The last `count` entries up to `end`."""
        return cls(head.updated_ms, head.id, head.model, graph, branch, end - count, end)


def _span(done: Done) -> Span:
    head = head_of(done)
    return Span.of(head, head.graph, head.branch, head.position, len(done.entries))


def _kept(keyed: Keyed, _: Model) -> KeptAnswer:
    """Of a prompt that is fed its place is kept: what is answered is in the log."""
    return KeptAnswer(keyed, lambda done: msgspec.to_builtins(msgspec.structs.replace(_span(done), at_ms=now_ms())))


async def _of_feed(request: Request, body: CompletionBody, keyed: Keyed | None, span: Span) -> Response:
    model = request.app.state.registry.with_graph(span.model, span.graph)
    source = Source(Choice(0, model.engine.codec, body.logprobs), await _echo(request, body, model, span))
    return await _answer(Answer(model, body, keyed, span.at_ms // 1000, span.end - span.start, [source]))


async def _of_run(request: Request, body: CompletionBody, keyed: Keyed | None, reader: Reader) -> Response:
    """The answer of a run that has begun."""
    try:
        run = reader.run
        assert run.work is not None
        head, generation = run.work.base.head, run.work.generation
        if not run.tokens:  # cancelled while the prompt was read: nothing of it is kept
            generation = msgspec.structs.replace(generation, prompt_tokens=0)
        span = Span.of(head, head.graph, head.branch, generation.start, generation.prompt_tokens)
        source = Source(Choice(0, run.model.engine.codec, body.logprobs), await _echo(request, body, run.model, span))
        source.reader = reader
        if not body.stream:
            await run.ended()
            head = run.outcome().head or head
        answer = Answer(run.model, body, keyed, head.updated_ms // 1000, generation.prompt_tokens, [source])
    except BaseException:
        reader.close()
        raise
    return await _answer(answer)


async def _of_reply(request: Request, body: CompletionBody, keyed: Keyed | None, reply: Reply) -> Response:
    """The answer of a generate that was begun by an earlier request with the key."""
    assert reply.head is not None and reply.generation is not None
    model = sessions_of(request).registry.with_graph(reply.head.model, reply.graph)
    prompt_tokens = reply.generation.prompt_tokens
    span = Span.of(reply.head, reply.graph, reply.branch, reply.generation.start, prompt_tokens)
    source = Source(Choice(0, model.engine.codec, body.logprobs), await _echo(request, body, model, span))
    found = await recalled(request, reply, live=bool(body.stream) and body.logprobs is None)
    if isinstance(found, Replay):
        source.known, source.reader, source.after = found.tokens, found.reader, found.after
        source.ended = (found.head.generation, found.rest)
    else:
        source.known, rest = await found.tokens(request, body.logprobs or 0)
        source.ended = (found.generation, rest)
    return await _answer(Answer(model, body, keyed, found.head.updated_ms // 1000, prompt_tokens, [source]))


async def _answer(answer: "Answer") -> Response:
    return CompletionStream(answer) if answer.body.stream else await answer.whole()


async def _echo(request: Request, body: CompletionBody, model: Model, span: Span) -> list[Token]:
    """The prompt's tokens that are shown; how likely they were is worked out again from the log."""
    (prompt,) = body.prompts()
    if not body.echo or prompt is None:
        return []
    entries = await prompt_of(model, prompt, "/prompt")
    if not body.scored or span.end == span.start:
        return unscored(entries)
    place = Reply(span.session, "", b"", "feed", branch=span.branch, start=span.start, end=span.end, graph=span.graph)
    _, done = await history_of(request).outputs(key_of(request, span.session), place, span.end, len(entries))
    return await scored(model.engine.codec, entries, done, body.logprobs or 0)
