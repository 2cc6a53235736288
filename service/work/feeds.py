"""Feeding one entry to each of many sessions, in columns: an object a session would cost more than the step."""

from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import msgspec
import numpy as np

from service import state, tracing
from service.errors import Problem, not_ready
from service.pool import Slot
from service.state import Array, Row
from service.store.base import Applied, Commit, Head, Key, Result, Segment
from service.tasks import Output
from service.work.base import PARK_AFTER, Host, NewSession, Resident, Work, all_finite, begun, numeric_fault, own
from service.work.events import Column, Event, Failed, Listener, LostRace
from service.work.feed import Feed, abandoned


class Asked(Protocol):
    """One of the feeds, which is the listener of what becomes of it alone."""

    at: Head | NewSession
    entries: Array
    """[1, ...]"""
    work: Work | None
    """what it is part of at the moment"""
    dropped: bool
    """set from the event loop: nobody waits for it any more"""
    trace: tracing.Trace | None

    def __call__(self, event: Event) -> None:
        """Take the event, on the event loop."""


class Feeds(Work):
    """What as many `Feed`s of one entry would do; those with more to do than a step go on as one of those."""

    def __init__(self, listener: Listener, asked: Sequence[Asked]) -> None:
        super().__init__(listener, len(asked))
        self.asked = list(asked)
        self._bases: list[Resident] = []
        self._after: Sequence[Row] = ()
        self._outputs: Output = {}
        for one in asked:
            one.work = self

    @property
    def width(self) -> int:
        """How many sessions it is."""
        return len(self._bases)

    @property
    def rows(self) -> Sequence[Row]:
        """The sessions' states."""
        return [base.row for base in self._bases]

    @property
    def keys(self) -> Sequence[Key]:
        """The sessions."""
        return [one.at.key for one in self.asked]

    @property
    def traces(self) -> Sequence[tracing.Trace]:
        """Theirs."""
        return [one.trace for one in self.asked if one.trace is not None]

    @property
    def remaining(self) -> int:
        """One step, until it is taken."""
        return 0 if self._outputs or not self._bases else 1

    def begin(self, host: Host) -> None:
        """Take the sessions that have nothing to do but this step."""
        self._host, self._snapshot_every = host, host.keeping.snapshot_every
        self.entries = np.concatenate([one.entries for one in self.asked])
        gaps, bases = host.codec.gaps(self.entries), [self._base(one) for one in self.asked]
        plain = [base is not None and not gap for base, gap in zip(bases, gaps, strict=True)]
        for one, good in zip(self.asked, plain, strict=True):
            if not good:
                self._stray(one)
        self._bases = cast(list[Resident], bases)
        if not all(plain):
            self._keep(plain)

    def _base(self, one: Asked) -> Resident | None:
        """The session to begin on; None: there is more to do with it."""
        try:
            base = begun(self._host, one.at)
        except Exception:
            return None  # it meets the same on its own, and is told
        due = base.folded - base.snapshot_at >= self._snapshot_every
        return None if due or len(base.tail) else base

    def _stray(self, one: Asked) -> None:
        one.work = stray = Feed(one, one.at, one.entries, last_only=True)
        stray.trace = one.trace
        self.strays.append(stray)

    def block(self, steps: int) -> Array:
        """The entries, [1, width, ...]."""
        return self.entries[None]

    def take(self, outputs: Output, rows: Sequence[Row], finite: bool) -> int:
        """Take what the step gave."""
        self._outputs, self._after = {name: array[0] for name, array in outputs.items()}, rows
        if finite:
            return 0
        good = [self._good(i) for i in range(self.width)]
        for i, base in enumerate(self._bases):
            if not good[i]:
                self.events.append((self.asked[i], Failed(numeric_fault(base.head))))
        self._keep(good)
        return good.count(False)

    def _good(self, i: int) -> bool:
        return all_finite({name: array[i] for name, array in self._outputs.items()}) and state.finite(self._after[i])

    def _keep(self, good: Sequence[bool]) -> None:
        """Go on with these alone."""
        chosen = [i for i, one in enumerate(good) if one]
        self.asked = [self.asked[i] for i in chosen]
        self._bases = [self._bases[i] for i in chosen]
        self.entries = self.entries[chosen]
        if self._outputs:
            self._after = [self._after[i] for i in chosen]
            self._outputs = {name: array[chosen] for name, array in self._outputs.items()}
        self.finished = not chosen

    def refused(self, problem: Problem) -> None:
        """The engine does not take it; called on the event loop."""
        for one in self.asked:
            one(Failed(problem))

    def failed(self, problem: Problem) -> None:
        """Each goes on alone, so that one bad entry harms no other."""
        for one in self.asked:
            self._stray(one)
        self._keep([False] * self.width)

    def commits(self) -> Sequence[Commit]:
        """A commit each, once the step is taken."""
        if not self._outputs:
            return ()
        data, numerics = self.entries.astype(self._host.codec.entry_dtype, copy=False).tobytes(), self._host.numerics
        size = len(data) // self.width
        return [
            _commit(base.head, isinstance(one.at, NewSession), data[i * size : (i + 1) * size], numerics)
            for i, (one, base) in enumerate(zip(self.asked, self._bases, strict=True))
        ]

    def settled(self, results: Sequence[Result | Problem]) -> Iterable[tuple[Key, Resident | None]]:
        """Answer those whose commit holds in one event, and the others each for itself."""
        lost = [one.at.key for one, result in zip(self.asked, results, strict=True) if self._lost(one, result)]
        if lost:
            self._keep([isinstance(result, Applied) for result in results])
        heads = [result.head for result in results if isinstance(result, Applied)]
        if heads:
            self._answer(heads)
        return [*((key, None) for key in lost), *((one.head.key, one) for one in self._residents(heads))]

    def _lost(self, one: Asked, result: Result | Problem) -> bool:
        if isinstance(result, Applied):
            return False
        self.events.append((one, Failed(result) if isinstance(result, Problem) else LostRace(result.head)))
        return True

    def _answer(self, heads: Sequence[Head]) -> None:
        created = [isinstance(one.at, NewSession) for one in self.asked]
        judged = self._host.codec.judged
        before = {judged: self._before(judged)} if judged else {}
        self.end(Column(self.asked, heads, created, self.entries, self._outputs, before))

    def _before(self, name: str) -> Array:
        """What was said of a name before this step; NaN where nothing was."""
        said = [base.said for base in self._bases]
        slots = [one for one in said if isinstance(one, Slot)]
        if len(slots) == len(said):
            return slots[0].pool.output(name, slots)
        nothing = np.full_like(self._outputs[name][0], np.nan)
        before = (base.output for base in self._bases)
        return np.array([output[name] if output is not None else nothing for output in before])

    def _residents(self, heads: Sequence[Head]) -> Iterable[Resident]:
        """The sessions as they are in memory now, none of which keeps the batch."""
        none = self._host.codec.none()
        for i, (head, base, row, last) in enumerate(zip(heads, self._bases, self._after, self.entries, strict=True)):
            behind = (base.folded, base.row) if base.folded + 1 - base.snapshot_at > PARK_AFTER else None
            said = row if isinstance(row, Slot) else {name: array[i].copy() for name, array in self._outputs.items()}
            yield Resident(head, own(row), base.folded + 1, none, said, last, base.snapshot_at, behind)

    def halt(self) -> None:
        """Let those go that nobody waits for; the others go on."""
        for one in self.asked:
            if one.dropped:
                self.events.append((one, Failed(not_ready("the work was dropped"))))
        self._keep([not one.dropped for one in self.asked])
        self.stop, self.halted = None, False

    def end(self, event: Event) -> None:
        """The last event: each is told what is not a column."""
        if isinstance(event, Column):
            self.tell(event)
        else:
            self.events += [(one, event) for one in self.asked]
        self.finished = True


def _commit(head: Head, new: bool, data: bytes, numerics: str) -> Commit:
    segment = Segment(head.branch, head.position, 1, "fed", data, numerics)
    moved = msgspec.structs.replace(head, position=head.position + 1, generation=abandoned(head))
    return Commit(moved, None if new else head.fence, (segment,))
