"""Feeding one entry to each of many sessions, in columns: an object a session would cost more than the step."""

from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import msgspec
import numpy as np

from service import state, tracing
from service.errors import Problem, not_ready
from service.pool import Slot
from service.state import Array, Row
from service.store.base import Applied, Change, Head, Key, Result, Step
from service.tasks import Output
from service.work.base import PARK_AFTER, Host, NewSession, Resident, Work, all_finite, begun, numeric_fault
from service.work.events import Column, Event, Failed, Listener, LostRace
from service.work.feed import Feed


class Asked(Protocol):
    """The feeds, in columns, and who is told what becomes of them: of all together, and of one alone."""

    @property
    def keys(self) -> Sequence[Key]:
        """The sessions."""

    @property
    def ats(self) -> Sequence[Head | NewSession]:
        """Where they stand."""

    @property
    def entries(self) -> Array:
        """What is fed, [n, ...]."""

    def __call__(self, event: Event) -> None:
        """Take the column of those that were fed together, on the event loop."""

    def alone(self, i: int) -> Listener:
        """Who is told what becomes of one alone."""

    def dropped(self, i: int) -> bool:
        """Whether nobody waits for one any more; set from the event loop."""

    def part_of(self, i: int, work: Work) -> None:
        """Note what one is part of from now on."""

    def trace(self, i: int) -> tracing.Trace | None:
        """The trace of the request that one is for."""


class Feeds(Work):
    """What as many `Feed`s of one entry would do; those with more to do than a step go on as one of those."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked, len(asked.ats))
        self._asked = asked
        self._which: Sequence[int] = range(len(asked.ats))
        """those that are left"""
        self._bases: list[Resident] = []
        self._after: Sequence[Row] = ()
        self._outputs: Output = {}

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
        return [self._asked.keys[i] for i in self._which]

    @property
    def traces(self) -> Sequence[tracing.Trace]:
        """Theirs."""
        traces = [self._asked.trace(i) for i in self._which]
        return list({id(one): one for one in traces if one is not None}.values())

    @property
    def remaining(self) -> int:
        """One step, until it is taken."""
        return 0 if self._outputs or not self._bases else 1

    def begin(self, host: Host) -> None:
        """Take the sessions that have nothing to do but this step."""
        self._host, self._keeping = host, host.keeping
        self.entries = self._asked.entries
        ats, gaps = self._asked.ats, host.codec.gaps(self.entries)
        held = host.standing(self._asked.keys, ats)
        bases = [
            one if one is not None and self._is_plain(one) else self._base(at)
            for one, at in zip(held, ats, strict=True)
        ]
        plain = [base is not None and not gap for base, gap in zip(bases, gaps, strict=True)]
        self._bases = cast(list[Resident], bases)
        if not all(plain):
            for i, good in enumerate(plain):
                if not good:
                    self.strays.append(self._one(i))
            self._keep(plain)

    def _base(self, at: Head | NewSession) -> Resident | None:
        """The session to begin on; None: there is more to do with it."""
        try:
            base = self._host.resident(at) if isinstance(at, Head) else begun(self._host, at)
        except Exception:
            return None  # it meets the same on its own, and is told
        return base if self._is_plain(base) else None

    def _is_plain(self, base: Resident) -> bool:
        """Whether a session has nothing to do but this step: neither a snapshot, nor what a wake-up has to fold."""
        since, at = base.folded - base.snapshot_at, base.snapshot_at
        due = since >= self._keeping.snapshot_every and since >= self._keeping.to_next(base.head.branch, at)
        return not (due or len(base.tail))

    def each(self) -> list[Feed]:
        """Those that are left as work of their own."""
        return [self._one(i) for i in self._which]

    def _one(self, i: int) -> Feed:
        """The i-th of all that were asked for as work of its own."""
        asked = self._asked
        work = Feed(asked.alone(i), asked.ats[i], asked.entries[i : i + 1], last_only=True)
        work.trace = asked.trace(i)
        asked.part_of(i, work)
        return work

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
                self.events.append((self._alone(i), Failed(numeric_fault(base.head))))
        self._keep(good)
        return good.count(False)

    def _good(self, i: int) -> bool:
        return all_finite({name: array[i] for name, array in self._outputs.items()}) and state.finite(self._after[i])

    def _alone(self, i: int) -> Listener:
        """Who is told of one of those that are left."""
        return self._asked.alone(self._which[i])

    def _keep(self, good: Sequence[bool]) -> None:
        """Go on with these alone."""
        chosen = [i for i, one in enumerate(good) if one]
        self._which = [self._which[i] for i in chosen]
        self._bases = [self._bases[i] for i in chosen]
        self.entries = self.entries[chosen]
        if self._outputs:
            self._after = [self._after[i] for i in chosen]
            self._outputs = {name: array[chosen] for name, array in self._outputs.items()}
        self.finished = not chosen

    def refused(self, problem: Problem) -> None:
        """The engine does not take it; called on the event loop."""
        for i in self._which:
            self._asked.alone(i)(Failed(problem))

    def failed(self, problem: Problem) -> None:
        """Each goes on alone, so that one bad entry harms no other."""
        self.strays += self.each()
        self._keep([False] * self.width)

    def commits(self) -> Sequence[Change]:
        """A commit each, once the step is taken."""
        if not self._outputs:
            return ()
        data, numerics = self.entries.astype(self._host.codec.entry_dtype, copy=False).tobytes(), self._host.numerics
        size = len(data) // self.width
        ats = self._asked.ats
        steps: list[Change] = []
        for j, (i, base) in enumerate(zip(self._which, self._bases, strict=True)):
            step = Step(base.head, data[j * size : (j + 1) * size], numerics)
            steps.append(step if isinstance(ats[i], Head) else msgspec.structs.replace(step.whole(), expected=None))
        return steps

    def settled(self, results: Sequence[Result | Problem]) -> Iterable[tuple[Key, Resident | None]]:
        """Answer those whose commit holds in one event, and the others each for itself."""
        heads = [result.head for result in results if isinstance(result, Applied)]
        lost: list[Key] = []
        if len(heads) < len(results):
            for i, result in enumerate(results):
                if not isinstance(result, Applied):
                    lost.append(self._asked.keys[self._which[i]])
                    event = Failed(result) if isinstance(result, Problem) else LostRace(result.head)
                    self.events.append((self._alone(i), event))
            self._keep([isinstance(result, Applied) for result in results])
        if heads:
            self._answer(heads)
        return [*((key, None) for key in lost), *zip(self.keys, self._residents(heads), strict=True)]

    def _answer(self, heads: Sequence[Head]) -> None:
        created = [isinstance(self._asked.ats[i], NewSession) for i in self._which]
        judged = self._host.codec.judged
        before = {judged: self._before(judged)} if judged else {}
        self.end(Column(self._which, heads, created, self.entries, self._outputs, before))

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
            if isinstance(row, Slot):
                yield Resident(head, row, base.folded + 1, none, row, last, base.snapshot_at, behind)
            else:
                said = {name: array[i].copy() for name, array in self._outputs.items()}
                yield Resident(head, state.own(row), base.folded + 1, none, said, last, base.snapshot_at, behind)

    def halt(self) -> None:
        """Let those go that nobody waits for; the others go on."""
        dropped = [self._asked.dropped(i) for i in self._which]
        for i, gone in enumerate(dropped):
            if gone:
                self.events.append((self._alone(i), Failed(not_ready("the work was dropped"))))
        self._keep([not gone for gone in dropped])
        self.stop, self.halted = None, False

    def end(self, event: Event) -> None:
        """The last event: each is told what is not a column."""
        if isinstance(event, Column):
            self.tell(event)
        else:
            self.events += [(self._alone(i), event) for i in range(len(self._which))]
        self.finished = True
