"""Feeding a sequence: into a session, or through an empty memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from service.state import Array, Row
from service.store.base import Commit, Head, Reply, abandoned, tombstone
from service.tasks import Output
from service.work.base import Host, NewSession, Resident, SessionWork, Work, all_finite, length_of
from service.work.events import Done, Failed, Listener

MAX_BODY_KEPT = 16 * 1024
"""a longer answer is not kept but worked out again"""


@dataclass(frozen=True, slots=True)
class Keyed:
    """A request with an idempotency key, and the digest that tells it from others."""

    tenant: str
    scope: str
    """the session's id; "" for the tenant's own keys"""
    key: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """How a feed's answer is kept under its request's key."""

    keyed: Keyed
    write: Callable[[Done], dict[str, object]]
    """what is answered; called on the engine's thread"""
    most: int = MAX_BODY_KEPT
    """bytes; of a longer answer the predictions are left out"""
    over: int = 0
    """the life whose answer to the same key does not count any more"""

    def reply(self, done: Done, start: int) -> Reply:
        """The answer as it is committed with the step: whole, or to be worked out again from the entries."""
        head = done.head
        assert head is not None
        answer = self.write(done)
        body = msgspec.json.encode(answer)
        scope, key, digest = self.keyed.scope, self.keyed.key, self.keyed.digest
        if len(body) <= self.most:
            return Reply(scope, key, digest, "body", body=body)
        body = msgspec.json.encode(answer | {"predictions": []})
        return Reply(
            scope, key, digest, "feed", body=body, branch=head.branch, start=start, end=head.position, graph=head.graph
        )


class Kept:
    """The outputs that an answer needs: those of all new entries or of the last, and the one before."""

    def __init__(self, count: int) -> None:
        self._needed = count + 1
        self._chunks: list[Output] = []
        self._held = 0

    def start(self, output: Output | None) -> None:
        """The output before the first entry, if there is one."""
        if output is not None:
            self.add({name: array[None] for name, array in output.items()})

    def add(self, outputs: Output) -> None:
        """The outputs of the next entries, [steps, ...]."""
        self._chunks.append(outputs)
        self._held += length_of(outputs)
        while self._held - length_of(self._chunks[0]) >= self._needed:
            self._held -= length_of(self._chunks.pop(0))

    def take(self, count: int) -> tuple[Output, Output | None]:
        """(the last `count` outputs, the one before them or None)."""
        chunks = self._chunks
        if length_of(chunks[-1]) == count:
            before = {name: array[-1] for name, array in chunks[-2].items()} if len(chunks) > 1 else None
            return chunks[-1], before
        whole = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        length = length_of(whole)
        before = {name: array[length - count - 1] for name, array in whole.items()} if length > count else None
        return {name: array[length - count :] for name, array in whole.items()}, before


class Predict(Work):
    """A whole sequence from the initial state or a given one, without a session."""

    def __init__(self, listener: Listener, entries: Array, last_only: bool, row: Row | None = None) -> None:
        super().__init__(listener, len(entries))
        self.entries = entries
        self._begins_with = row
        self._count = 1 if last_only else len(entries)
        self.answered = self._count + 1
        self._kept = Kept(self._count)

    def begin(self, host: Host) -> None:
        """Start from the initial state, or from the one that is given."""
        self.row = self._begins_with if self._begins_with is not None else host.initial_row
        self.entries = host.codec.fill(self.entries, None)

    def keep(self, outputs: Output) -> None:
        """Keep the outputs asked for."""
        self._kept.add(outputs)

    def advance(self) -> None:
        """Answer when all is folded."""
        if not self.remaining:
            outputs, before = self._kept.take(self._count)
            self.end(Done(None, outputs, before, self.row))


class Whole(Work):
    """A whole sequence through a graph that can not be streamed: one call, without a session."""

    def __init__(self, listener: Listener, entries: Array, last_only: bool) -> None:
        super().__init__(listener, len(entries))
        self._sequence = entries
        self._shown = 1 if last_only else len(entries)

    def begin(self, host: Host) -> None:
        """The sequence is one entry."""
        self.row = host.initial_row
        self.entries = np.empty(1, object)
        self.entries[0] = host.codec.fill(self._sequence, None)

    def take(self, outputs: Output, rows: Sequence[Row], finite: bool) -> int:
        """Take what the call gave, and answer."""
        whole: Output = {name: array[0, 0] for name, array in outputs.items()}
        self.cursor = 1
        if not (finite or all_finite(whole)):
            self.end(Failed(self.fault))
            return 1
        begin = max(length_of(whole) - self._shown, 0)
        before = {name: array[begin - 1] for name, array in whole.items()} if begin else None
        self.end(Done(None, {name: array[begin:] for name, array in whole.items()}, before, self.row))
        return 0


class Feed(SessionWork):
    """Feed a sequence: all of it is committed once, after its last entry is folded; with `closes` so is its end."""

    def __init__(
        self,
        listener: Listener,
        at: Head | NewSession,
        entries: Array,
        last_only: bool,
        kept: KeptAnswer | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(listener, len(entries), at)
        self._closes = closes
        self._fed = entries
        self._count = 1 if last_only else len(entries)
        self.answered = self._count + 1
        self._outputs = Kept(self._count)
        self._kept = kept

    def begin(self, host: Host) -> None:
        """Fold what is left of the log, then the new entries."""
        base = self.open(host)
        self._created = self.new is not None
        self._outputs.start(base.output)
        self._fed = host.codec.fill(self._fed, base.last)
        self.entries = np.concatenate([base.tail, self._fed]) if len(base.tail) else self._fed

    def keep(self, outputs: Output) -> None:
        """Keep the outputs asked for."""
        self._outputs.add(outputs)

    def commit(self) -> Commit | None:
        """Everything, once all is folded, with the answer if it shall be kept."""
        if self.remaining:
            return None
        start = self.base.head.position
        head = msgspec.structs.replace(
            self.base.head, position=start + len(self._fed), generation=abandoned(self.base.head)
        )
        outputs, before = self._outputs.take(self._count)
        self._done = Done(head, outputs, before, entries=self._fed, created=self._created)
        # Of a session that is closed nobody reads the log: nothing is added to it.
        commit = self.committed(head, self.segment(self._fed, start, "fed")) if not self._closes else self._last(head)
        if self._kept is None:
            return commit
        return msgspec.structs.replace(commit, reply=self._kept.reply(self._done, start), over=self._kept.over)

    def _last(self, head: Head) -> Commit:
        return Commit(tombstone(head, "closed"), self.expected)

    def applied(self, head: Head) -> Resident:
        """Answer."""
        self.end(msgspec.structs.replace(self._done, head=head))
        return self.settle(head)
