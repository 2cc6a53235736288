"""Pieces of work: what is folded for whom.

A piece of work is a row in the engine's batches. It begins on a session's newest committed state (or on the
initial one), folds its entries chunk by chunk, may draw a token or roll a forecast, and hands the engine a commit
where something shall be kept. All methods run on the engine's thread; events reach the listener on the event loop.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from service import state
from service.bundle import Manifest
from service.errors import not_ready
from service.state import Array, Row
from service.store.base import Commit, Head, Key, Segment, Snapshot
from service.tasks import Codec, Output
from service.work.events import Event, Failed, Listener

SNAPSHOT_EVERY = 256


@dataclass(frozen=True, slots=True)
class Resident:
    """A session in memory: its head, and the state after the first `folded` entries of its log."""

    head: Head
    row: Row
    folded: int
    tail: Array
    """the entries folded + 1 to position: at most the last sampled one, or what a wake-up has to fold"""
    output: Output | None
    """the outputs at position `folded`"""
    last: Array | None
    """the newest entry of the log"""
    snapshot_at: int


@dataclass(frozen=True, slots=True)
class NewSession:
    """How a session begins that does not live yet."""

    key: Key
    seed: int
    ttl_s: int = 0
    metadata: Mapping[str, object] = field(default_factory=dict)


class Host(Protocol):
    """What work needs of its engine."""

    @property
    def manifest(self) -> Manifest:
        """The model's manifest."""

    @property
    def codec(self) -> Codec:
        """The model's codec."""

    @property
    def numerics(self) -> str:
        """Names the arithmetic of this process."""

    def resident(self, key: Key) -> Resident:
        """A live session, loaded from the store if need be; raises Problem when it does not live."""

    def next_epoch(self, key: Key) -> int:
        """An epoch that this id has never had."""

    def log_entries(self, head: Head, after: int) -> Array:
        """The session's entries from position after + 1 to its head."""


class Work:
    """A row of the engine's batches: entries to fold into a state, from a beginning to an end."""

    def __init__(self, listener: Listener, cost: int) -> None:
        self.listener = listener
        self.cost = max(cost, 1)
        self.events: list[Event] = []
        self.finished = False
        self.stop: Literal["suspend", "cancel"] | None = None
        """set from the event loop: nobody waits any more, or somebody wants an end"""
        self.halted = False
        self.row: Row = ()
        self.output: Output | None = None
        self.entries: Array = np.empty(0)
        self.cursor = 0

    @property
    def remaining(self) -> int:
        """Steps that can be folded now."""
        return len(self.entries) - self.cursor

    def begin(self, host: Host) -> None:
        """Take the state to start from; raises Problem when the work can not be done."""
        raise NotImplementedError

    def chunk(self, steps: int) -> Array:
        """The next entries to fold."""
        return np.asarray(self.entries[self.cursor : self.cursor + steps])

    def folded(self, outputs: Output, row: Row) -> None:
        """Take what a chunk gave: outputs [steps, ...] by name, and the state after it."""
        steps = length_of(outputs)
        self.keep(outputs)
        self.cursor += steps
        self.row = row
        self.output = {name: array[-1] for name, array in outputs.items()}

    def keep(self, outputs: Output) -> None:
        """Keep of a chunk's outputs what the answer needs."""

    def commit(self) -> Commit | None:
        """What shall be kept now, if anything."""
        return None

    def applied(self, head: Head) -> Resident | None:
        """The commit holds; returns the session as it is in memory now (None: leave it out of memory)."""
        raise NotImplementedError

    def advance(self) -> None:
        """Called once a tick after the commit: finish, or prepare the next entries."""

    def halt(self) -> None:
        """Called instead of folding when `stop` is set."""
        self.end(Failed(not_ready("the work was dropped")))

    def end(self, event: Event) -> None:
        """The last event."""
        self.events.append(event)
        self.finished = True


class SessionWork(Work):
    """Work on a session: begins on its newest committed state and may commit on top of it."""

    def __init__(self, listener: Listener, cost: int, key: Key, new: NewSession | None = None) -> None:
        super().__init__(listener, cost)
        self.key = key
        self.new = new
        self._snapshot: tuple[int, Row] | None = None

    def open(self, host: Host) -> Resident:
        """Load the session, or make a new one at position 0."""
        self._host = host
        self.base = self._fresh(host, self.new) if self.new is not None else host.resident(self.key)
        self.row, self.output, self.entries = self.base.row, self.base.output, self.base.tail
        self._folded = self.base.folded
        return self.base

    def _fresh(self, host: Host, new: NewSession) -> Resident:
        manifest = host.manifest
        head = Head(
            tenant=new.key[0],
            id=new.key[1],
            model=manifest.name,
            version=manifest.version,
            graph=manifest.graph_sha256,
            epoch=host.next_epoch(new.key),
            position=0,
            seed=new.seed,
            branch=secrets.token_hex(8),
            ttl_s=new.ttl_s,
            metadata=dict(new.metadata),
            state_bytes=manifest.state_bytes,
        )
        return Resident(head, state.initial_row(manifest.states), 0, host.codec.none(), None, None, 0)

    @property
    def expected(self) -> tuple[int, int] | None:
        """What the next commit expects of the live head."""
        return None if self.new is not None else self.base.head.fence

    def folded(self, outputs: Output, row: Row) -> None:
        """Note a snapshot where one is due: before a chunk, so that at least one entry follows it."""
        if self._folded - self.base.snapshot_at >= SNAPSHOT_EVERY:
            self._snapshot = (self._folded, self.row)
        super().folded(outputs, row)
        self._folded += length_of(outputs)

    def snapshots(self) -> tuple[Snapshot, ...]:
        """The snapshot that is due with this commit, if any."""
        if self._snapshot is None:
            return ()
        position, row = self._snapshot
        data = state.dump(self._host.manifest.states, row)
        return (Snapshot(self.base.head.branch, position, self._host.numerics, data),)

    def segment(self, entries: Array, start: int, source: Literal["fed", "generated"]) -> Segment:
        """Log entries start + 1 to start + n of this session."""
        return Segment(
            branch=self.base.head.branch,
            start=start,
            count=len(entries),
            source=source,
            data=entries.astype(self._host.codec.entry_dtype, copy=False).tobytes(),
            numerics=self._host.numerics,
        )

    def settle(self, head: Head) -> Resident:
        """The session in memory after a commit."""
        last = self.entries[-1] if len(self.entries) else self.base.last
        snapshot_at = self._snapshot[0] if self._snapshot is not None else self.base.snapshot_at
        self.base = Resident(head, self.row, self._folded, self.entries[self.cursor :], self.output, last, snapshot_at)
        self.new, self._snapshot = None, None
        return self.base


def length_of(outputs: Output) -> int:
    """How many positions outputs [n, ...] hold."""
    return len(next(iter(outputs.values())))
