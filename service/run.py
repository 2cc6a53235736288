"""A generate as its readers see it: tokens that can be read by many, cut, replayed from the log and resumed."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from service.engine import Engine
from service.errors import Problem, not_ready
from service.registry import Model
from service.store.base import Generation, Head, Segment
from service.tasks import TextStream
from service.work.events import Done, Event, Failed, LostRace, Suspended, Token, Tokens
from service.work.generate import Generate

MAX_UNREAD = 2048
UNREAD_S = 1.0
"""a run of which nobody has read anything for that long, and so many tokens not at all, is suspended"""


class Run:
    """A generate that runs: its tokens so far, and those who read them.

    When nobody reads any more, or all read too slowly, it is suspended at a committed position.
    """

    def __init__(self, model: Model, base: Head | None, on_end: Callable[[], None]) -> None:
        self.model = model
        self.base = base
        """the session's head when the run began (None: no session, or it is being created)"""
        self.tokens: list[Token] = []
        self.end: Event | None = None
        self._on_end = on_end
        self._news = asyncio.Event()
        self.readers = 0
        self.read = 0
        """tokens that the fastest reader has had"""
        self.read_at = time.monotonic()
        self.work: Generate | None = None

    @property
    def engine(self) -> Engine:
        """The engine that runs it."""
        return self.model.engine

    def listen(self, event: Event) -> None:
        """Take an event of the work, on the event loop."""
        if isinstance(event, Tokens):
            self.tokens += event.each()
            if len(self.tokens) - self.read > MAX_UNREAD and time.monotonic() - self.read_at > UNREAD_S:
                self.ask("suspend")
        else:
            self.end = event
            self._on_end()
        news, self._news = self._news, asyncio.Event()
        news.set()

    @property
    def stopping(self) -> bool:
        """Whether it has been asked to stop and has not yet."""
        return self.end is None and self.work is not None and self.work.stop is not None

    async def ended(self) -> None:
        """Wait for the end, without reading."""
        while self.end is None:
            await self._news.wait()

    def ask(self, stop: Literal["suspend", "cancel"]) -> None:
        """End the run soon; a cancel is never taken back."""
        if self.work is not None and self.end is None and self.work.stop != "cancel":
            self.work.stop = stop
            self.engine.wake()

    @property
    def epoch(self) -> int:
        """The session's epoch, once the first event has come."""
        assert self.work is not None
        return self.work.base.head.epoch

    @property
    def suspended(self) -> bool:
        """Whether it stopped before its end and can be resumed."""
        return isinstance(self.end, Suspended)

    def leave(self) -> None:
        """One reader less; when nobody reads any more the run is suspended."""
        self.readers -= 1
        if self.readers == 0:
            self.ask("suspend")

    async def news(self) -> None:
        """Wait for the next event."""
        await self._news.wait()

    def outcome(self) -> Done:
        """How the run ended."""
        match self.end:
            case Done():
                return self.end
            case Failed(problem):
                raise problem
            case LostRace(head):
                raise Race(head)
            case _:
                raise not_ready("the generate was suspended; it goes on where it stopped with GET .../events")


class Race(Exception):
    """Somebody else moved the session first, or took the key; nothing of this work was kept."""

    def __init__(self, head: Head | None) -> None:
        super().__init__("lost a race")
        self.head = head


class Reader:
    """One who reads a run from its first token on; must be closed."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._seen = 0
        self._open = True
        run.readers += 1

    async def wait(self) -> bool:
        """Wait until there is something to read; False at the end."""
        while self._seen == len(self.run.tokens):
            if self.run.end is not None:
                return False
            await self.run.news()
        return True

    async def next(self) -> list[Token]:
        """The tokens that came since the last call, at least one; none at the end."""
        await self.wait()
        fresh = self.run.tokens[self._seen :]
        self._seen += len(fresh)
        self.run.read, self.run.read_at = max(self.run.read, self._seen), time.monotonic()
        return fresh

    async def after(self, position: int) -> list[Token]:
        """The same, of the tokens after a position."""
        while tokens := await self.next():
            if tokens[0].position <= position:
                tokens = [token for token in tokens if token.position > position]
            if tokens:
                break
        return tokens

    async def begun(self) -> None:
        """Wait for the first event; raises Problem when that is a failure."""
        if not await self.wait():
            self.run.outcome()

    async def finish(self) -> Done:
        """Read to the end; raises Problem when it failed or was suspended by somebody else."""
        while await self.next():
            pass
        return self.run.outcome()

    def close(self) -> None:
        """Stop reading."""
        if self._open:
            self._open = False
            self.run.leave()


@dataclass(frozen=True, slots=True)
class Replay:
    """What `GET .../events` sends: tokens of the log, then a run's, then the end."""

    head: Head
    tokens: list[Token]
    reader: Reader | None
    after: int
    rest: str = ""

    @property
    def key(self) -> str:
        """The idempotency key of the request that began the generate, if it had one."""
        work = self.reader.run.work if self.reader is not None else None
        generation = work.generation if work is not None else self.head.generation
        return generation.key if generation is not None else ""


def moved(head: Head | None) -> Problem:
    """The problem of one who believed the session to stand elsewhere."""
    if head is None:
        return Problem("session_not_found", "the session does not live any more")
    detail = f"the session stands at position {head.position}"
    return Problem("position_mismatch", detail, epoch=head.epoch, position=head.position)


def tokens_of(model: Model, generation: Generation, segments: Sequence[Segment]) -> tuple[list[Token], str]:
    """The tokens of a generate from the log, with the very text each had, and text that was held back at its end."""
    codec = model.engine.codec
    stream = TextStream(codec, generation.stop)
    tokens: list[Token] = []
    for segment in segments:
        logprobs = memoryview(segment.logprobs).cast("f")
        for i, entry in enumerate(codec.entries(segment.data).tolist()):
            text, _ = stream.push(entry)
            tokens.append(Token(segment.start + i + 1, entry, text, logprobs[i]))
    rest = stream.flush() if generation.finish_reason is not None else ""
    if tokens and generation.finish_reason == "length":
        tokens[-1] = Token(tokens[-1].position, tokens[-1].token, tokens[-1].text + rest, tokens[-1].logprob)
        rest = ""
    return tokens, rest
