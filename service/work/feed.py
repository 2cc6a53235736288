"""Feeding: a sequence into a session or through an empty memory; changing a session's head; looking at its state."""

from collections.abc import Callable

import msgspec
import numpy as np

from service import state
from service.state import Array
from service.store.base import Commit, Generation, Head, Key, tombstone
from service.tasks import Output
from service.work.base import Host, NewSession, Resident, SessionWork, Work, length_of
from service.work.events import Done, Listener


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
        whole = {name: np.concatenate([chunk[name] for chunk in self._chunks]) for name in self._chunks[0]}
        length = length_of(whole)
        before = {name: array[length - count - 1] for name, array in whole.items()} if length > count else None
        return {name: array[length - count :] for name, array in whole.items()}, before


class Predict(Work):
    """A whole sequence from the initial state, without a session."""

    def __init__(self, listener: Listener, entries: Array, last_only: bool) -> None:
        super().__init__(listener, len(entries))
        self.entries = entries
        self._count = 1 if last_only else len(entries)
        self._kept = Kept(self._count)

    def begin(self, host: Host) -> None:
        """Start from the initial state."""
        self.row = state.initial_row(host.manifest.states)
        self.entries = host.codec.fill(self.entries, None)

    def keep(self, outputs: Output) -> None:
        """Keep the outputs asked for."""
        self._kept.add(outputs)

    def advance(self) -> None:
        """Answer when all is folded."""
        if not self.remaining:
            outputs, before = self._kept.take(self._count)
            self.end(Done(None, outputs, before, self.row))


class Feed(SessionWork):
    """Feed a sequence: all of it is committed once, after its last entry is folded."""

    def __init__(
        self, listener: Listener, key: Key, entries: Array, last_only: bool, new: NewSession | None = None
    ) -> None:
        super().__init__(listener, len(entries), key, new)
        self._fed = entries
        self._count = 1 if last_only else len(entries)
        self._kept = Kept(self._count)

    def begin(self, host: Host) -> None:
        """Fold what is left of the log, then the new entries."""
        base = self.open(host)
        self._created = self.new is not None
        self._kept.start(base.output)
        self._fed = host.codec.fill(self._fed, base.last)
        self.entries = np.concatenate([base.tail, self._fed])

    def keep(self, outputs: Output) -> None:
        """Keep the outputs asked for."""
        self._kept.add(outputs)

    def commit(self) -> Commit | None:
        """Everything, once all is folded."""
        if self.remaining:
            return None
        start = self.base.head.position
        head = msgspec.structs.replace(
            self.base.head, position=start + len(self._fed), generation=abandoned(self.base.head)
        )
        return Commit(head, self.expected, (self.segment(self._fed, start, "fed"),), self.snapshots())

    def applied(self, head: Head) -> Resident:
        """Answer."""
        outputs, before = self._kept.take(self._count)
        self.end(Done(head, outputs, before, entries=self._fed, created=self._created))
        return self.settle(head)


class Change(SessionWork):
    """Change a session's head without feeding anything: create, describe, cancel, close."""

    def __init__(
        self, listener: Listener, key: Key, change: Callable[[Head], Head], new: NewSession | None = None
    ) -> None:
        super().__init__(listener, 1, key, new)
        self._change = change

    def begin(self, host: Host) -> None:
        """Load the session."""
        self.open(host)
        self._created = self.new is not None

    def commit(self) -> Commit | None:
        """The changed head."""
        return Commit(self._change(self.base.head), self.expected)

    def applied(self, head: Head) -> Resident | None:
        """Answer; a closed session leaves memory."""
        self.end(Done(head, created=self._created))
        if head.status != "live":
            return None
        base = self.base
        return Resident(head, base.row, base.folded, base.tail, base.output, base.last, base.snapshot_at)


class Peek(SessionWork):
    """The newest committed state, its last sampled entry folded in; commits nothing."""

    def __init__(self, listener: Listener, key: Key) -> None:
        super().__init__(listener, 1, key)

    def begin(self, host: Host) -> None:
        """Start from the session's state."""
        self.open(host)

    def advance(self) -> None:
        """Answer when the tail is folded."""
        if not self.remaining:
            self.end(Done(self.base.head, row=self.row))


def abandoned(head: Head) -> Generation | None:
    """The head's generation once another operation changes the session: a suspended one ends as cancelled."""
    generation = head.generation
    if generation is None or generation.finish_reason is not None:
        return generation
    return msgspec.structs.replace(generation, finish_reason="cancelled", end=head.position)


def cancelled(head: Head) -> Head:
    """The head with its suspended generate ended where it stands."""
    return msgspec.structs.replace(head, generation=abandoned(head))


def closed(head: Head) -> Head:
    """The head's tombstone."""
    return tombstone(head, "closed")
