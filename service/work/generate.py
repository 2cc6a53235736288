"""Generating: token after token, each committed before it is sent."""

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from service.errors import Problem
from service.sampling import Purpose, Sampling, uniforms
from service.state import Array
from service.store.base import Commit, Generation, Head, Reply, Segment
from service.tasks import TextStream
from service.work.base import Host, NewSession, Resident, SessionWork
from service.work.events import Done, Listener, Suspended, Token
from service.work.feed import MAX_BODY_KEPT

_UNIFORM_BLOCK = 64
MAX_TOKENS_KEPT = 1024
"""the tokens of a longer answer are read from the log"""


class Generate(SessionWork):
    """Draw token after token; in a session each is committed before it is sent.

    `resumed` continues the session's suspended generate instead of beginning a new one.
    """

    def __init__(
        self,
        listener: Listener,
        at: Head | NewSession | None,
        prompt: Array | None,
        generation: Generation,
        resumed: bool = False,
    ) -> None:
        cost = (len(prompt) if prompt is not None else 0) + 1
        super().__init__(listener, cost, at or NewSession(("", ""), generation.seed))
        self._in_session = at is not None
        self._prompt = prompt
        self.resumed = resumed
        self._uncommitted: tuple[int, float] | None = None
        self._block = -1
        self._shown: list[list[dict[str, object]]] = []
        """the alternatives of all tokens, where they are to be kept with the answer"""
        self.generation = generation
        self.sampling = Sampling(generation.temperature, generation.top_k, generation.top_p)

    def begin(self, host: Host) -> None:
        """Fold what is left of the log and the prompt."""
        self.open(host)
        self._created = self.new is not None and self._in_session
        self._position = self.base.head.position
        self._text = TextStream(host.codec, self.generation.stop)
        if self.resumed:
            self._recall(host)
        else:
            self._start(host)

    def _start(self, host: Host) -> None:
        if self._prompt is None:
            self._prompt = host.codec.start() if self._position == 0 else host.codec.none()
        self.entries = np.concatenate([self.base.tail, self._prompt])
        if not len(self.entries) and self.base.output is None:
            raise Problem("empty_session", "nothing was fed since the state was uploaded: give inputs")
        self._position += len(self._prompt)
        self.generation = msgspec.structs.replace(
            self.generation, start=self._position, prompt_tokens=len(self._prompt), created=self._created
        )

    def _recall(self, host: Host) -> None:
        """Bring the text stream to where the suspended generate stopped."""
        self._prompt = host.codec.none()
        self.entries = self.base.tail
        self._created = self.generation.created
        head = self.base.head
        for token in host.log_entries(head, self.generation.start, head.position):
            self._text.push(int(token))

    @property
    def wants_token(self) -> bool:
        """Ready to draw once everything is folded."""
        ready = self.stop is None and not self.finished and self._uncommitted is None
        return ready and not self.remaining and self.output is not None

    @property
    def logits(self) -> Array:
        """What the next token is drawn from, [V]."""
        assert self.output is not None
        return self.output["logits"]

    def uniform(self) -> float:
        """The number that decides the token at the next position."""
        position = self._position + 1
        block, offset = divmod(position, _UNIFORM_BLOCK)
        if self._block != block:
            self._block = block
            self._numbers = uniforms(self.generation.seed, block * _UNIFORM_BLOCK, _UNIFORM_BLOCK, Purpose.TOKEN)
        return float(self._numbers[offset])

    def take(self, token: int, logprob: float) -> None:
        """The token drawn for the next position, and its log-probability at temperature 1."""
        self._uncommitted = (token, logprob)
        shown = self.generation.logprobs
        self._alternatives = self._host.codec.alternatives(self.logits, shown) if shown else None
        if self._alternatives is not None and self.generation.key:
            self._shown.append(self._alternatives)
        self.entries, self.cursor = np.array([token], self._host.codec.entry_dtype), 0
        self._position += 1
        self._piece, stopped = self._text.push(token)
        if stopped:
            self._finish("stop")
        elif self._position - self.generation.start >= self.generation.max_tokens:
            self._piece += self._text.flush()
            self._finish("length")

    def _finish(self, reason: Literal["length", "stop", "cancelled"]) -> None:
        self.generation = msgspec.structs.replace(self.generation, finish_reason=reason, end=self._position)

    def commit(self) -> Commit | None:
        """The token just drawn, the first one with the prompt; or the end of a cancelled generate."""
        if not self._in_session or (self._uncommitted is None and self.generation.finish_reason != "cancelled"):
            return None
        head = msgspec.structs.replace(self.base.head, position=self._position, generation=self.generation)
        segments = []
        if self._prompt is not None and len(self._prompt):
            segments.append(self.segment(self._prompt, self.base.head.position, "fed"))
        if self._uncommitted is not None:
            segment = self.segment(self.entries, self._position - 1, "generated")
            logprob = np.array([self._uncommitted[1]], "<f4").tobytes()
            segments.append(msgspec.structs.replace(segment, logprobs=logprob))
        return msgspec.structs.replace(self.committed(head, *segments), reply=self._reply(head, segments))

    def _reply(self, head: Head, fresh: list[Segment]) -> Reply | None:
        """What a request with a key leaves: a pending reply with the first token, the whole one with the last."""
        generation = self.generation
        if not generation.key or (generation.end is None and self._prompt is None):
            return None
        if generation.end is None:
            return reply_of(head, pending=True)
        if generation.end - generation.start > MAX_TOKENS_KEPT:
            return reply_of(head)
        earlier = self._host.log(head.branch, generation.start, self.base.head.position)
        segments = (*earlier, *(one for one in fresh if one.source == "generated"))
        whole = len(self._shown) == generation.end - generation.start  # not, if it was resumed in between
        body = msgspec.json.encode(self._shown) if whole else b""
        return msgspec.structs.replace(reply_of(head, segments), body=body if len(body) <= MAX_BODY_KEPT else b"")

    def applied(self, head: Head) -> Resident:
        """Send the token."""
        resident = self.settle(head)
        self._prompt = None
        self._send(head)
        return resident

    def advance(self) -> None:
        """Without a session a token is sent as soon as it is drawn."""
        if not self._in_session and self._uncommitted is not None:
            self._send(None)

    def _send(self, head: Head | None) -> None:
        if self._uncommitted is not None:
            token, logprob = self._uncommitted
            self.events.append(Token(self._position, token, self._piece, logprob, self._alternatives))
            self._uncommitted = None
        if self.generation.finish_reason is not None:
            self.end(Done(head, created=self._created, generation=self.generation, rest=self._text.flush()))

    def lost(self, head: Head | None) -> None:
        """Somebody else moved the session: a generate that has sent tokens ends where it stood."""
        if not self.started:
            super().lost(head)
            return
        base = self.base.head
        ended = msgspec.structs.replace(self.generation, finish_reason="cancelled", end=base.position)
        self.end(Done(base, created=self._created, generation=ended))

    @property
    def started(self) -> bool:
        """Whether something of it is committed."""
        return self.resumed or self._prompt is None

    def halt(self) -> None:
        """Suspend at the last committed token, or end there as cancelled."""
        if self.stop == "cancel" and self.started:
            self._finish("cancelled")
        elif self.stop == "cancel":
            # Nothing is committed yet, not even the prompt.
            head = self.base.head if self._in_session and self.new is None else None
            at = self.base.head.position
            nothing = msgspec.structs.replace(self.generation, start=at, end=at, finish_reason="cancelled")
            self.end(Done(head, generation=nothing))
        else:
            self.end(Suspended(self.base.head if self._in_session else None))


def reply_of(head: Head, segments: Sequence[Segment] = (), pending: bool = False) -> Reply:
    """The reply of the head's generate under its request's key; without `segments` its tokens are in the log."""
    generation = head.generation
    assert generation is not None
    return Reply(
        scope=head.id,
        key=generation.key,
        digest=generation.digest,
        kind="generate",
        branch=head.branch,
        start=generation.start,
        end=generation.end or 0,
        generation=generation,
        segments=tuple(segments),
        pending=pending,
        graph=head.graph,
    )
