"""Generating: token after token, each committed before it is sent."""

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from service.errors import Problem
from service.sampling import Sampler, Sampling
from service.state import Array, Row
from service.store.base import Commit, Generation, Head, Reply, Segment
from service.tasks import Alternative, Output, TextStream
from service.work.base import Host, NewSession, Resident, SessionWork
from service.work.events import Done, Listener, Suspended, Tokens
from service.work.feed import MAX_BODY_KEPT

MAX_TOKENS_KEPT = 1024
"""the tokens of a longer answer are read from the log"""


class Generate(SessionWork):
    """Draw token after token; in a session each is committed before it is sent.

    `resumed` continues the session's suspended generate instead of beginning a new one.
    """

    answered = 1

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
        self._drawn = np.empty(0, np.int64)
        """tokens that are not committed yet, and what is told of each"""
        self._logprobs: list[float] = []
        self._texts: list[str] = []
        self._alternatives: list[list[Alternative]] = []
        self._shown: list[list[Alternative]] = []
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
        if not len(self.entries) and self.base.output is not None:
            self._draw_first(self.base.output["logits"])

    def _draw_first(self, logits: Array) -> None:
        """After a feed without a prompt everything is folded: the first token comes from what is there."""
        sampler = Sampler([self.sampling], [self.generation.seed])
        drawn, logprobs = sampler.draw(logits[None], sampler.numbers(np.array([self.next_position]), 1)[0])
        if self.alternatives:
            self.show(logits)
        self.entries = drawn.astype(self._host.codec.entry_dtype)
        self._take(self.entries, logprobs.astype(np.float32))

    def _recall(self, host: Host) -> None:
        """Bring the text stream to where the suspended generate stopped."""
        self._prompt = host.codec.none()
        self.entries = self.base.tail
        self._created = self.generation.created
        head = self.base.head
        self._text.extend(host.log_entries(head, self.generation.start, head.position).tolist())

    @property
    def steps(self) -> int:
        """Entries before the last one are folded; from there on each step draws a token."""
        if self.generation.finish_reason is not None:
            return 0
        return min(self.remaining - 1, super().steps) if self.remaining > 1 else self._to_go

    @property
    def draws(self) -> bool:
        """Ready to draw once nothing but the last entry is to be folded."""
        return self.remaining == 1

    @property
    def _to_go(self) -> int:
        return self.generation.start + self.generation.max_tokens - self._position

    @property
    def alternatives(self) -> int:
        """How many of the most likely symbols are shown with a token."""
        return self.generation.logprobs

    @property
    def has_drawn(self) -> bool:
        """Whether tokens wait to be committed."""
        return len(self._drawn) > 0

    def show_again(self) -> None:
        """Forget what was shown of tokens that were drawn in vain."""
        del self._alternatives[len(self._drawn) :]

    def show(self, logits: Array) -> None:
        """Note the most likely symbols of the next token, drawn from `logits` [V]."""
        self._alternatives.append(self._host.codec.alternatives(logits, self.alternatives))

    @property
    def next_position(self) -> int:
        """The position of the next token."""
        return self._position + 1

    def rolled(self, tokens: Array, logprobs: Array, outputs: Output, row: Row) -> int:
        """Take what a roll-out drew: tokens and log-probabilities [steps], the last step's outputs, the state after it.

        Returns how many tokens are taken. Where the generate ends before the last one, the state stays where it was,
        and what led to the end is left to be folded.
        """
        taken = self._take(tokens, logprobs)
        if taken == len(tokens):
            self.passed(taken)
            self.row, self.output = row, outputs
            self.entries, self.cursor = tokens[-1:], 0
        else:
            self.entries, self.cursor = np.concatenate([self.entries[self.cursor :], tokens[:taken]]), 0
        return taken

    def _take(self, tokens: Array, logprobs: Array) -> int:
        """Take tokens up to the generate's end; returns how many."""
        texts, stopped = self._text.extend(tokens.tolist())
        self._position += len(texts)
        if stopped:
            self._finish("stop")
        elif self._to_go == 0:
            texts[-1] += self._text.flush()
            self._finish("length")
        self._drawn = np.concatenate([self._drawn, tokens[: len(texts)]]) if len(self._drawn) else tokens[: len(texts)]
        self._logprobs += logprobs[: len(texts)].tolist()
        self._texts += texts
        return len(texts)

    def _finish(self, reason: Literal["length", "stop", "cancelled"]) -> None:
        self.generation = msgspec.structs.replace(self.generation, finish_reason=reason, end=self._position)

    def commit(self) -> Commit | None:
        """The tokens just drawn, the first with the prompt; or the end of a cancelled generate."""
        if not self._in_session or (not len(self._drawn) and self.generation.finish_reason != "cancelled"):
            return None
        head = msgspec.structs.replace(self.base.head, position=self._position, generation=self.generation)
        segments = []
        if self._prompt is not None and len(self._prompt):
            segments.append(self.segment(self._prompt, self.base.head.position, "fed"))
        if len(self._drawn):
            logprobs = np.array(self._logprobs, "<f4").tobytes()
            start = self._position - len(self._drawn)
            segments.append(self.segment(self._drawn, start, "generated", logprobs))
        commit, reply = self.committed(head, *segments), self._reply(head, segments)
        return msgspec.structs.replace(commit, reply=reply) if reply is not None else commit

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
        shown = self._shown + self._alternatives[: len(self._drawn)]
        whole = len(shown) == generation.end - generation.start  # not, if it was resumed in between
        body = msgspec.json.encode(shown) if whole else b""
        return msgspec.structs.replace(reply_of(head, segments), body=body if len(body) <= MAX_BODY_KEPT else b"")

    def applied(self, head: Head) -> Resident:
        """Send the tokens."""
        self._prompt = None
        self._send(head)
        return self.settle(head)

    def advance(self) -> None:
        """Without a session tokens are sent as soon as they are drawn."""
        if not self._in_session and len(self._drawn):
            self._send(None)

    def _send(self, head: Head | None) -> None:
        if len(self._drawn):
            shown = self._alternatives[: len(self._drawn)] if self.alternatives else None
            first = self._position - len(self._drawn) + 1
            self.tell(Tokens(first, self._drawn.tolist(), self._logprobs, self._texts, shown))
            if shown is not None and self.generation.key:
                self._shown += shown
            self._forget_drawn()
        if self.generation.finish_reason is not None:
            self.end(Done(head, created=self._created, generation=self.generation, rest=self._text.flush()))

    def _forget_drawn(self) -> None:
        """What was drawn is sent, or not kept."""
        self._drawn, self._logprobs, self._texts, self._alternatives = np.empty(0, np.int64), [], [], []

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
        self._position -= len(self._drawn)
        self._forget_drawn()
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
