"""Completions in OpenAI's form: what is asked, and what is shown of tokens as one answer or piece by piece.

An answer that is not streamed is what a stream of it would have been, put together. A stream's blocks have no ids, so
that pings do no harm.
"""

import asyncio
import hashlib
import secrets
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from fastapi import Response
from pydantic import Field
from starlette.types import Send

from service.api import errors
from service.api.requests import SESSION_ID, ModelName, Strict
from service.api.responses import JsonResponse
from service.api.streaming import Stream
from service.errors import invalid
from service.registry import MAX_SHOWN, Model
from service.run import Reader
from service.sampling import MAX_SEED
from service.session import MANY
from service.state import Array
from service.store.base import Generation
from service.tasks import Codec, TextStream
from service.work.events import Done, Token
from service.work.feed import Keyed

Piece = dict[str, Any]
"""a choice as a stream's chunk shows it: text and tokens that are new, and at the end the reason"""


MAX_PROMPTS = 2048
MAX_CHOICES = 128
DEFAULT_TOKENS = 16

PROMPT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}

Stop = Annotated[str, Field(min_length=1, max_length=256)]


class CompletionBody(Strict):
    """What to complete."""

    model: ModelName
    prompt: Any = Field(
        default=None, description="text or token ids, or a list of such; empty: go on", json_schema_extra=PROMPT_SCHEMA
    )
    session: Annotated[str, Field(pattern=SESSION_ID)] | None = Field(
        default=None, description="feed the prompt into this session and go on from its memory; created if need be"
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(default=None, description=f"default: {DEFAULT_TOKENS}")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(default=None, description="default: 1; 0 is greedy")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(default=None, description="completions of a prompt")
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        default=None, description="the n most likely of so many"
    )
    echo: bool | None = Field(default=None, description="show the prompt before its completion")
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(
        default=None, description="show how likely each token is, and that many likely ones; with echo the prompt's too"
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool | None] | None = Field(
        default=None, description="include_usage: the stream's last chunk says how many tokens there were"
    )
    user: Annotated[str, Field(max_length=1024)] | None = Field(default=None, description="has no effect")
    suffix: str | None = Field(default=None, description="only the empty one")
    logit_bias: dict[str, float] | None = Field(default=None, description="only the empty one")
    presence_penalty: float | None = Field(default=None, description="only 0")
    frequency_penalty: float | None = Field(default=None, description="only 0")

    @property
    def length(self) -> int:
        """Tokens to draw for each completion."""
        return DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def candidates(self) -> int:
        """Completions to draw for each prompt."""
        return self.best_of or self.n or 1

    @property
    def scored(self) -> bool:
        """Whether the prompt's tokens are shown with how likely they are."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def counted(self) -> bool:
        """Whether a stream ends with how many tokens there were."""
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def own_seed(self) -> int | None:
        """The seed that was given, as one of ours."""
        return None if self.seed is None else self.seed % (MAX_SEED + 1)

    def prompts(self) -> list[str | list[Any] | None]:
        """What is to be completed; None where nothing is given."""
        given = self.prompt
        if given is None or isinstance(given, str):
            return [given or None]
        if isinstance(given, list) and given:
            if all(type(item) is int for item in given):
                return [given]
            if all(isinstance(item, str) for item in given) or all(isinstance(item, list) for item in given):
                return [item or None for item in given]
        raise invalid("a string, a list of token ids, or a list of either", "/prompt")

    def check(self, most: int) -> None:
        """Raise Problem for what can not be done; `most`: tokens that one request may draw."""
        for name in ("suffix", "logit_bias", "presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise invalid(f"{name} is not supported: leave it out", f"/{name}")
        prompts, n = len(self.prompts()), self.n or 1
        if self.candidates < n:
            raise invalid(f"best_of is at least n, which is {n}", "/best_of")
        if self.stream and self.candidates > n:
            raise invalid("the best of several are known at their end: they can not be streamed", "/best_of")
        if self.stream_options is not None and not self.stream:
            raise invalid("only with stream", "/stream_options")
        if self.session is not None and prompts * self.candidates > 1:
            raise invalid("a session goes on from one prompt to one completion", "/session")
        if prompts > MAX_PROMPTS:
            raise invalid(f"at most {MAX_PROMPTS} prompts a request", "/prompt")
        tokens = prompts * self.candidates * self.length
        if tokens > most:
            raise invalid(f"at most {most} tokens over all completions (RECURRA_MAX_TOKENS)", "/max_tokens")
        if tokens * (self.logprobs or 0) > MAX_SHOWN:
            raise invalid(f"at most {MAX_SHOWN} likely tokens over all completions", "/logprobs")

    def generation(self, seed: int = 0, keyed: Keyed | None = None) -> Generation:
        """How each completion is drawn."""
        return Generation(
            start=0,
            prompt_tokens=0,
            max_tokens=self.length,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logprobs=self.logprobs or 0,
            key=keyed.key if keyed is not None else "",
            digest=keyed.digest if keyed is not None else b"",
        )


# ---------------------------------------------------------------------- what is shown


def unscored(entries: Array) -> list[Token]:
    """Entries as tokens of which nothing is known."""
    return [Token(0, entry, "", float("nan")) for entry in entries.tolist()]


async def scored(codec: Codec, entries: Array, done: Done, count: int) -> list[Token]:
    """Entries with how likely each was, and what was more likely."""
    if len(entries) > MANY:
        return await asyncio.to_thread(_score, codec, entries, done, count)
    return _score(codec, entries, done, count)


def _score(codec: Codec, entries: Array, done: Done, count: int) -> list[Token]:
    after = codec.predictions(done.outputs, 1, done.before, entries, count)
    first = codec.alternatives(done.before["logits"], count) if done.before is not None else None
    before = [first, *(one["alternatives"] for one in after[:-1])]
    return [
        Token(0, entry, "", -one.get("surprise", float("nan")), likely)
        for entry, one, likely in zip(entries.tolist(), after, before, strict=True)
    ]


class Choice:
    """One completion as it grows: text that is certain, and the tokens that it is made of."""

    def __init__(self, index: int, codec: Codec, logprobs: int | None) -> None:
        self.index = index
        self._codec = codec
        self._logprobs = logprobs
        self._own = TextStream(codec, ())
        self._gap = ""
        self._offset = 0
        self._certain = 0
        self._held: deque[tuple[int, str, float | None, dict[str, float] | None]] = deque()
        """tokens of which no text is certain yet: they may begin what is left out as a stop string"""

    def echo(self, tokens: Sequence[Token]) -> Piece:
        """The prompt."""
        piece = self._piece("".join(self._note(tokens)))
        splitter = self._codec.manifest.splitter
        self._gap = splitter.separator if splitter is not None else ""
        return piece

    def drawn(self, tokens: Sequence[Token]) -> Piece:
        """Tokens that were drawn."""
        self._note(tokens)
        return self._text("".join([token.text for token in tokens]))

    def end(self, reason: str, rest: str) -> Piece:
        """The last piece."""
        if reason != "stop":
            self._certain = self._offset + 1
        # A completion that somebody cancelled has a reason that OpenAI's clients do not know.
        return {**self._text(rest), "finish_reason": "length" if reason == "length" else "stop"}

    def _text(self, text: str) -> Piece:
        """A piece of the completion itself; words stand apart from the prompt's last one."""
        gap, self._gap = (self._gap, "") if text else ("", self._gap)
        return self._piece(gap + text)

    def _note(self, tokens: Sequence[Token]) -> list[str]:
        texts, _ = self._own.extend([token.token for token in tokens])
        if self._logprobs is not None:
            for token, text in zip(tokens, texts, strict=True):
                self._held.append((self._offset, text, *self._likely(token, text)))
                self._offset += len(text)
        return texts

    def _likely(self, token: Token, text: str) -> tuple[float | None, dict[str, float] | None]:
        """How likely a token was, and the likely ones with it among them."""
        if token.logprob != token.logprob:
            return None, None
        gap = text[: len(text) - len(self._codec.text(token.token))]
        likely = {gap + one.text: one.logprob for one in token.alternatives or ()}
        return token.logprob, likely | {text: token.logprob}

    def _piece(self, text: str) -> Piece:
        self._certain += len(text)
        return {"text": text, "index": self.index, "logprobs": self._shown(), "finish_reason": None}

    def _shown(self) -> dict[str, list[Any]] | None:
        if self._logprobs is None:
            return None
        shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        while self._held and self._held[0][0] < self._certain:
            offset, text, logprob, likely = self._held.popleft()
            for column, value in zip(shown.values(), (text, logprob, likely, offset), strict=True):
                column.append(value)
        return shown


class Source:
    """Where a choice's pieces come from: the prompt, what was drawn already, what a run draws."""

    def __init__(self, choice: Choice, echo: Sequence[Token] = ()) -> None:
        self.choice = choice
        self.echo = echo
        self.known: Sequence[Token] = ()
        self.reader: Reader | None = None
        self.after = 0
        self.ended: tuple[Generation | None, str] = (None, "")
        self.count = 0
        """tokens that were drawn"""
        self.logprob = 0.0
        """the sum of theirs"""

    async def pieces(self) -> AsyncIterator[Piece]:
        """Piece after piece; raises Problem where the run fails."""
        if self.echo:
            yield self.choice.echo(self.echo)
        if self.known:
            yield self._drawn(self.known)
        if self.reader is not None:
            while tokens := await self.reader.after(self.after):
                yield self._drawn(tokens)
            done = self.reader.run.outcome()
            self.ended = done.generation, done.rest
        generation, rest = self.ended
        yield self.choice.end(generation.finish_reason or "length" if generation is not None else "length", rest)

    def _drawn(self, tokens: Sequence[Token]) -> Piece:
        self.count += len(tokens)
        self.logprob += sum([token.logprob for token in tokens])
        return self.choice.drawn(tokens)

    async def whole(self) -> Piece:
        """All pieces as one."""
        pieces = [piece async for piece in self.pieces()]
        whole = {**pieces[-1], "text": "".join([piece["text"] for piece in pieces])}
        if whole["logprobs"] is not None:
            columns = whole["logprobs"]
            whole["logprobs"] = {
                name: [value for piece in pieces for value in piece["logprobs"][name]] for name in columns
            }
        return whole

    @property
    def mean(self) -> float:
        """The mean log-probability of its tokens."""
        return self.logprob / max(self.count, 1)

    def close(self) -> None:
        """Read no more."""
        if self.reader is not None:
            self.reader.close()


class Answer:
    """All choices of a request, and what its answer says of them."""

    def __init__(
        self, model: Model, body: CompletionBody, keyed: Keyed | None, created: int, prompt: int, sources: list[Source]
    ) -> None:
        self.body = body
        self.sources = sources
        self._prompt = prompt
        # A request with a key that is sent again gets the same.
        told = keyed.digest + keyed.key.encode() if keyed is not None else secrets.token_bytes(16)
        self._head = {
            "id": f"cmpl-{hashlib.sha256(told).hexdigest()[:24]}",
            "object": "text_completion",
            "created": created,
            "model": body.model,
            "system_fingerprint": f"fp_{model.engine.numerics[:10]}",
        }

    def part(self, choices: list[Piece], **more: object) -> dict[str, Any]:
        """The answer, or a chunk of it."""
        return {**self._head, "choices": choices, **more}

    @property
    def usage(self) -> dict[str, int]:
        """How many tokens there were, once all are drawn."""
        drawn = sum(source.count for source in self.sources)
        return {"prompt_tokens": self._prompt, "completion_tokens": drawn, "total_tokens": self._prompt + drawn}

    async def whole(self) -> Response:
        """The answer at the end of all choices."""
        try:
            # At the same time: a run of which nobody reads is suspended.
            choices = await asyncio.gather(*(source.whole() for source in self.sources))
        finally:
            self.close()
        return JsonResponse(self.part(self._best(choices), usage=self.usage))

    def _best(self, choices: list[Piece]) -> list[Piece]:
        """The n most likely of each prompt's, most likely first."""
        n, of = self.body.n or 1, self.body.candidates
        if of == n:
            return choices
        kept: list[Piece] = []
        for begin in range(0, len(choices), of):
            order = sorted(range(begin, begin + of), key=lambda i: -self.sources[i].mean)
            kept += [choices[i] for i in order[:n]]
        return [{**choice, "index": i} for i, choice in enumerate(kept)]

    def close(self) -> None:
        """Read no more."""
        for source in self.sources:
            source.close()


class CompletionStream(Stream):
    """The pieces of all choices as they come."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer
        self._usage: dict[str, object] = {"usage": None} if answer.body.counted else {}
        self._failed: Exception | None = None

    def close(self) -> None:
        """Read no more."""
        self._answer.close()

    async def write(self, send: Send) -> None:
        """Send the pieces, how many tokens there were, and the mark of the end; or what went wrong."""
        async with asyncio.TaskGroup() as group:
            for source in self._answer.sources:
                group.create_task(self._follow(source, send))
        if self._failed is not None:
            problem = errors.problem_from(self._failed)
            errors.count(problem)
            await self.send_part(send, _block({"error": errors.openai_error(problem)}))
            return
        if self._usage:
            await self.send_part(send, _block(self._answer.part([], usage=self._answer.usage)))
        await self.send_part(send, b"data: [DONE]\n\n")

    async def _follow(self, source: Source, send: Send) -> None:
        try:
            async for piece in source.pieces():
                if piece["text"] or piece["finish_reason"] or (piece["logprobs"] or {}).get("tokens"):
                    await self.send_part(send, _block(self._answer.part([piece], **self._usage)))
        except Exception as error:
            self._failed = error


def _block(data: object) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
