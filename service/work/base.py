"""Pieces of work: what is folded for whom.

A piece of work is a row in the engine's batches. It begins on a session's newest committed state (or on the
initial one), folds its entries chunk by chunk, may draw a token or roll a forecast, and hands the engine a commit
where something shall be kept. All methods run on the engine's thread; events reach the listener on the event loop.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol
from zlib import crc32

import msgspec
import numpy as np

from service import state, tracing
from service.bundle import Manifest
from service.errors import Problem, not_ready
from service.pool import Slot
from service.state import Array, Row
from service.store.base import (
    Applied,
    Change,
    Commit,
    Fence,
    Head,
    Key,
    Line,
    Result,
    Segment,
    Snapshot,
    home,
    surplus,
)
from service.tasks import Codec, Output
from service.work.events import Event, Failed, Listener, LostRace

_random = random.Random()

PARK_AFTER = 32
LEAST_CHUNK = 32
"""snapshots may be closer than that; a long feed's are not"""
MAX_NOTED = 16


@dataclass(frozen=True, slots=True)
class Keeping:
    """How much of a session's past is kept."""

    snapshot_every: int = 256
    """steps from one snapshot of the state to the next"""
    log_retention: int | None = None
    """steps that can be gone back; None: all"""

    def to_next(self, branch: str, last: int) -> int:
        """Steps from a branch's last snapshot, at `last`, to the next; `last` is 0 where there is none.

        The first comes later by up to half of that, in each branch by another number of steps: sessions that go in
        step would else have theirs in the same tick, which took ten times as long.
        """
        return self.snapshot_every + (crc32(branch.encode()) % (self.snapshot_every // 2) if not last else 0)


class Resident(msgspec.Struct, frozen=True):
    """A session in memory: its head, and the state after the first `folded` entries of its log."""

    head: Head
    row: Row
    folded: int
    tail: Array
    """the entries folded + 1 to position: at most the last sampled one, or what a wake-up has to fold"""
    said: Output | Slot | None
    """what has the outputs at position `folded`"""
    last: Array | None
    """the newest entry of the log"""
    snapshot_at: int
    behind: tuple[int, Row] | None = None
    """(position, state) before the newest chunk, when more than PARK_AFTER entries follow the last snapshot"""

    @property
    def output(self) -> Output | None:
        """The outputs at position `folded`."""
        return self.said.output if isinstance(self.said, Slot) else self.said


@dataclass(frozen=True, slots=True)
class NewSession:
    """How a session begins that does not live yet."""

    key: Key
    seed: int
    ttl_s: int = 0
    metadata: Mapping[str, object] = field(default_factory=dict)


def new_branch() -> str:
    """A branch of the log that nobody has; the system's random numbers would give the GIL away."""
    return f"{_random.getrandbits(64):016x}"


def new_head(new: NewSession, manifest: Manifest, epoch: int, position: int = 0) -> Head:
    """The head that a session begins with; its log begins at `position`."""
    return Head(
        tenant=new.key[0],
        id=new.key[1],
        model=manifest.name,
        version=manifest.version,
        graph=manifest.graph_sha256,
        epoch=epoch,
        position=position,
        seed=new.seed,
        branch=new_branch(),
        ttl_s=new.ttl_s,
        metadata=dict(new.metadata),
        state_bytes=manifest.state_bytes,
        origin=position,
    )


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

    @property
    def keeping(self) -> Keeping:
        """How much of a session's past is kept."""

    @property
    def initial_row(self) -> Row:
        """The state at position 0."""

    def resident(self, known: Head) -> Resident:
        """A session that stands at `known` or, by this process's own commits, further on."""

    def standing(self, keys: Sequence[Key], ats: Sequence[object]) -> list[Resident | None]:
        """Sessions in memory that stand exactly there, by the key of each; None for any other."""

    def next_epoch(self, key: Key) -> int:
        """An epoch that this id has never had."""

    def line(self, branch: str) -> Line:
        """What comes before a branch's own entries."""

    def state_below(self, head: Head, below: int) -> tuple[int, Row]:
        """(position, state) of the newest snapshot before `below` that can be read, or of the log's beginning."""

    def snapshot(self, head: Head, below: int) -> Snapshot | None:
        """The newest snapshot of this model's state before `below`."""

    def snapshots(self, head: Head, to: int) -> list[int]:
        """Positions of the snapshots of this model's state up to `to`."""

    def log(self, branch: str, after: int, to: int) -> list[Segment]:
        """The segments of positions after + 1 to `to`."""

    def log_entries(self, head: Head, after: int, to: int) -> Array:
        """The session's entries from position after + 1 to `to`; raises Problem when they are not all there."""


class Work:
    """A row of the engine's batches: entries to fold into a state, from a beginning to an end."""

    answered: int | None = None
    """how many outputs are looked at, those of the last entries; None: all"""

    def __init__(self, listener: Listener, cost: int) -> None:
        self.listener = listener
        self.cost = max(cost, 1)
        self.events: list[tuple[Listener, Event]] = []
        self.strays: list[Work] = []
        """work that goes on by itself; the engine begins it"""
        self.finished = False
        self.stop: Literal["suspend", "cancel"] | None = None
        """set from the event loop: nobody waits any more, or somebody wants an end"""
        self.halted = False
        self.trace = tracing.current()
        self.row: Row = ()
        self.output: Output | None = None
        self.entries: Array = np.empty(0)
        self.cursor = 0

    @property
    def remaining(self) -> int:
        """Steps that can be folded now."""
        return len(self.entries) - self.cursor

    @property
    def steps(self) -> int:
        """Steps that can be taken now."""
        return self.remaining

    def wanted(self, steps: int) -> int:
        """How many of the last outputs of the next `steps` entries are looked at."""
        if self.answered is None:
            return steps
        return max(1, min(steps, self.answered - (self.remaining - steps)))

    @property
    def draws(self) -> bool:
        """Whether each step draws the entry of the next one."""
        return False

    @property
    def width(self) -> int:
        """How many sessions it is."""
        return 1

    @property
    def rows(self) -> Sequence[Row]:
        """The states that the next entries are folded into, one a session."""
        return (self.row,)

    @property
    def keys(self) -> Sequence[Key]:
        """The sessions that it may change."""
        return ()

    @property
    def traces(self) -> Sequence[tracing.Trace]:
        """The traces of the requests that it is for."""
        return (self.trace,) if self.trace is not None else ()

    def begin(self, host: Host) -> None:
        """Take the state to start from; raises Problem when the work can not be done."""
        raise NotImplementedError

    def block(self, steps: int) -> Array:
        """The next entries to fold, [steps, width, ...]."""
        return np.asarray(self.entries[self.cursor : self.cursor + steps, None])

    def take(self, outputs: Output, rows: Sequence[Row], finite: bool) -> int:
        """Take what a call gave: outputs [steps, width, ...] by name and the states after it; returns how many failed.

        `finite`: no number of the call is not finite.
        """
        own = {name: state.owned(np.ascontiguousarray(array[:, 0])) for name, array in outputs.items()}
        if finite or (all_finite(own) and state.finite(rows[0])):
            self.folded(own, rows[0])
            return 0
        self.end(Failed(self.fault))
        return 1

    @property
    def fault(self) -> Problem:
        """What is answered when a number is not finite."""
        return numeric_fault()

    def folded(self, outputs: Output, row: Row) -> None:
        """Take what a chunk gave: outputs [steps, ...] by name, and the state after it."""
        self.keep(outputs)
        self.cursor += length_of(outputs)
        self.row = row
        self.output = {name: array[-1] for name, array in outputs.items()}

    def keep(self, outputs: Output) -> None:
        """Keep of a chunk's outputs what the answer needs."""

    def commits(self) -> Sequence[Change]:
        """What shall be kept now."""
        commit = self.commit()
        return (commit,) if commit is not None else ()

    def commit(self) -> Commit | None:
        """What shall be kept now, if anything."""
        return None

    def settled(self, results: Sequence[Result | Problem]) -> Iterable[tuple[Key, Resident | None]]:
        """Take what became of the commits; gives the sessions as they are in memory now (None: not any more)."""
        (result,) = results
        if isinstance(result, Applied):
            resident = self.applied(result.head)
            return ((result.head.key, resident if result.head.status == "live" else None),)
        if isinstance(result, Problem):
            self.end(Failed(result))
        else:
            self.lost(result.head)
        return [(key, None) for key in self.keys]

    def applied(self, head: Head) -> Resident:
        """The commit holds; returns the session as it is in memory now."""
        raise NotImplementedError

    def lost(self, head: Head | None) -> None:
        """The commit was refused."""
        raise NotImplementedError

    def advance(self) -> None:
        """Called once a tick after the commit: finish, or prepare the next entries."""

    def halt(self) -> None:
        """Called instead of folding when `stop` is set."""
        self.end(Failed(not_ready("the work was dropped")))

    def drop(self) -> None:
        """Nobody waits for it any more; called on the event loop."""
        self.stop = "suspend"

    def refused(self, problem: Problem) -> None:
        """The engine does not take it; called on the event loop."""
        self.listener(Failed(problem))

    def failed(self, problem: Problem) -> None:
        """The model could not be run on it, not even alone."""
        self.end(Failed(problem))

    def tell(self, event: Event) -> None:
        """Send an event to the listener with the tick's end."""
        self.events.append((self.listener, event))

    def end(self, event: Event) -> None:
        """The last event."""
        self.tell(event)
        self.finished = True


class SessionWork(Work):
    """Work on a session: begins on its newest committed state and may commit on top of it."""

    def __init__(self, listener: Listener, cost: int, at: Head | NewSession) -> None:
        super().__init__(listener, cost)
        self.key = at.key
        self.new = at if isinstance(at, NewSession) else None
        self._begins_at = at
        self._noted: dict[int, Row] = {}

    @property
    def keys(self) -> Sequence[Key]:
        """The session."""
        return (self.key,)

    @property
    def fault(self) -> Problem:
        """What is answered when a number is not finite."""
        return numeric_fault(self.base.head)

    def open(self, host: Host) -> Resident:
        """Load the session, or make a new one at position 0."""
        return self.start(host, begun(host, self._begins_at))

    def start(self, host: Host, base: Resident) -> Resident:
        """Begin on a session in memory: its tail is to be folded first."""
        self._host = host
        self.base = base
        self.row, self.output, self.entries = base.row, base.output, base.tail
        self.at = base.folded
        self._snapshot_at = base.snapshot_at
        self._behind = base.behind
        return base

    @property
    def steps(self) -> int:
        """Steps that can be taken now: so many that snapshots lie at most twice as far apart as they may.

        They are noted between two chunks. To cut chunks so that they lie at even distances would leave ever shorter
        ones before each.
        """
        every, since = self._to_snapshot, self.at - self._snapshot_at
        return min(self.remaining, max(2 * every - (since if since < every else 0), LEAST_CHUNK))

    @property
    def _to_snapshot(self) -> int:
        return self._host.keeping.to_next(self.base.head.branch, self._snapshot_at)

    @property
    def expected(self) -> Fence | None:
        """What the next commit expects of the live head."""
        return None if self.new is not None else self.base.head.fence

    def folded(self, outputs: Output, row: Row) -> None:
        """Take what a chunk gave."""
        self.passed(length_of(outputs))
        super().folded(outputs, row)

    def passed(self, steps: int) -> None:
        """Note a snapshot where one is due: before the steps, so that at least one entry follows it."""
        if self.at - self._snapshot_at >= self._to_snapshot:
            self._note()
        self._behind = (self.at, self.row)
        self.at += steps

    def _note(self) -> None:
        self._noted[self.at] = self.row
        self._snapshot_at = self.at
        if len(self._noted) > MAX_NOTED:
            for position in surplus(list(self._noted), ()):
                del self._noted[position]

    def committed(self, head: Head, *segments: Segment) -> Commit:
        """A commit on top of the session, with the snapshots that are due; the log's beginning is cut off with them."""
        line = self.line() if self._noted else ()
        snapshots = [self._snapshot(home(line, head.branch, at), at, row) for at, row in self._noted.items()]
        retention = self._host.keeping.log_retention
        if snapshots and retention is not None:
            first = self._first_kept(head, head.position - retention, snapshots)
            if first is not None and first.position > head.origin:
                head = msgspec.structs.replace(head, origin=first.position)
                snapshots += [msgspec.structs.replace(first, branch=home(line, head.branch, first.position))]
        return Commit(head, self.expected, segments, tuple(snapshots))

    def line(self) -> Line:
        """What comes before the own entries of the branch that is committed to."""
        return self._host.line(self.base.head.branch)

    def _first_kept(self, head: Head, floor: int, fresh: list[Snapshot]) -> Snapshot | None:
        """The newest snapshot at or before `floor`: a log is cut at a snapshot only."""
        noted = [snapshot for snapshot in fresh if snapshot.position <= floor]
        return noted[-1] if noted else self._host.snapshot(self.base.head, floor + 1)

    def _snapshot(self, branch: str, position: int, row: Row) -> Snapshot:
        manifest = self._host.manifest
        data = state.dump(manifest.session_states, row)
        return Snapshot(branch, position, self._host.numerics, data, manifest.graph_sha256)

    def segment(
        self, entries: Array, start: int, source: Literal["fed", "generated"], logprobs: bytes = b""
    ) -> Segment:
        """Log entries start + 1 to start + n of this session."""
        return Segment(
            branch=self.base.head.branch,
            start=start,
            count=len(entries),
            source=source,
            data=entries.astype(self._host.codec.entry_dtype, copy=False).tobytes(),
            numerics=self._host.numerics,
            logprobs=logprobs,
        )

    def settle(self, head: Head) -> Resident:
        """The session in memory after a commit."""
        last = self.entries[-1] if len(self.entries) else self.base.last
        behind = self._behind if self.at - self._snapshot_at > PARK_AFTER else None
        tail = self.entries[self.cursor :]
        if self.finished:  # what stays in memory for long keeps no batch
            self.row, tail = own(self.row), state.owned(tail)
            if self.output:
                self.output = {name: state.owned(array) for name, array in self.output.items()}
            behind = (behind[0], own(behind[1])) if behind is not None else None
        said = self.row if isinstance(self.row, Slot) and self.output else self.output
        self.base = Resident(head, self.row, self.at, tail, said, last, self._snapshot_at, behind)
        self.new, self._noted = None, {}
        return self.base

    def lost(self, head: Head | None) -> None:
        """The commit was refused: the session stands at `head`."""
        self.end(LostRace(head))


def begun(host: Host, at: Head | NewSession) -> Resident:
    """A session in memory; a new one stands at position 0 and lives once it is committed."""
    if isinstance(at, Head):
        return host.resident(at)
    head = new_head(at, host.manifest, host.next_epoch(at.key))
    return Resident(head, host.initial_row, 0, host.codec.none(), None, None, 0)


def own(row: Row) -> Row:
    """The row in memory of its own, or in its slot."""
    return row if isinstance(row, Slot) else state.own(row)


def all_finite(outputs: Output) -> bool:
    """Whether every number of the outputs is finite."""
    return all(map(state.all_finite, outputs.values()))


def numeric_fault(at: Head | None = None) -> Problem:
    """What is answered when a number is not finite; `at`: where the session stays."""
    detail = "the model produced a number that is not finite; the session stays where it was"
    if at is None:
        return Problem("numeric_fault", detail)
    return Problem("numeric_fault", detail, last_good_position=at.position)


def length_of(outputs: Output) -> int:
    """How many positions outputs [n, ...] hold."""
    return len(next(iter(outputs.values())))
