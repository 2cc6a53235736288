"""Looking back: the state and the outputs at any retained position, and folding the log again to prove them."""

from typing import Literal

from service import state
from service.state import Row
from service.store.base import Head
from service.tasks import Output
from service.work.base import Host, SessionWork
from service.work.events import Done, Listener, Verdict
from service.work.feed import Kept


class Peek(SessionWork):
    """The state at a position, and the last `count` outputs up to it with the one before; commits nothing."""

    def __init__(self, listener: Listener, at: Head, position: int | None = None, count: int = 0) -> None:
        cost = 1 if position is None else count + 1
        super().__init__(listener, cost, at)
        self._head = at
        self._position = position
        self._count = count
        self.answered = count + 1
        self._outputs = Kept(count)

    @property
    def steps(self) -> int:
        """All that is left: nothing is noted between chunks."""
        return self.remaining

    def begin(self, host: Host) -> None:
        """Start from the session's state, or from a snapshot before the first output asked for."""
        if self._position is None:
            self._head = self.open(host).head
            return
        below = self._position - self._count if self._count else self._position + 1
        start, self.row = host.state_below(self._head, below)
        self.entries = host.log_entries(self._head, start, self._position)

    def folded(self, outputs: Output, row: Row) -> None:
        """Keep the outputs asked for; nothing else is noted."""
        if self._count:
            self._outputs.add(outputs)
        self.row = row
        self.cursor += len(next(iter(outputs.values())))

    def advance(self) -> None:
        """Answer when all is folded."""
        if self.remaining:
            return
        outputs, before = self._outputs.take(self._count) if self._count else ({}, None)
        self.end(Done(self._head, outputs, before, self.row, self.entries[len(self.entries) - self._count :]))


class Verify(SessionWork):
    """Fold the retained log again from its beginning; compare with every snapshot and with the state in memory."""

    answered = 1

    def __init__(self, listener: Listener, at: Head, position: int | None) -> None:
        super().__init__(listener, 1, at)
        self._head = at
        self._position = at.position if position is None else position
        self._verdict: bool | None = None
        self._other_numerics = False
        self._differs_at: int | None = None

    @property
    def steps(self) -> int:
        """All that is left: nothing is noted between chunks."""
        return self.remaining

    def begin(self, host: Host) -> None:
        """Start from the initial state, or from the snapshot that the log begins at."""
        self._host, head = host, self._head
        self.at, self.row = host.state_below(head, head.origin + 1)
        self._from = self.at
        self._resident = host.resident(head)
        self._stops = [p for p in host.snapshots(head, self._position) if p > self.at]
        if self._holds_head and self.at < self._resident.folded <= self._position:
            self._stops.append(self._resident.folded)
        self._stops = sorted({*self._stops, self._position})
        self._next_leg()

    @property
    def _holds_head(self) -> bool:
        return self._resident.head.fence == self._head.fence

    def _next_leg(self) -> None:
        """The entries up to the next position that something can be compared at."""
        while self._stops and self._stops[0] <= self.at:
            if (stop := self._stops.pop(0)) > self._from:
                self._compare(stop)
        if self._stops:
            self.entries, self.cursor = self._host.log_entries(self._head, self.at, self._stops[0]), 0

    def folded(self, outputs: Output, row: Row) -> None:
        """Go on; the outputs are not needed."""
        steps = len(next(iter(outputs.values())))
        self.row = row
        self.cursor += steps
        self.at += steps

    def advance(self) -> None:
        """Compare at the end of a leg; answer after the last."""
        if not self.remaining:
            self._next_leg()
        if not self.remaining and not self.finished:
            self._answer()

    def _compare(self, position: int) -> None:
        specs = self._host.manifest.session_states
        if position == self._resident.folded and self._holds_head:
            self._judge(position, state.equal(self._resident.row, self.row))
        snapshot = self._host.snapshot(self._head, position + 1)
        if snapshot is None or snapshot.position != position:
            return
        try:
            row = state.load(specs, snapshot.data)
        except ValueError:
            self._judge(position, False)
            return
        if snapshot.numerics == self._host.numerics:
            self._judge(position, state.equal(row, self.row))
        else:
            self._other_numerics = True

    def _judge(self, position: int, equal: bool) -> None:
        self._verdict = equal if self._verdict is None else self._verdict and equal
        if not equal and self._differs_at is None:
            self._differs_at = position

    def _answer(self) -> None:
        reason: Literal["nothing_to_compare", "numerics_changed"] | None = None
        if self._verdict is None:
            reason = "numerics_changed" if self._other_numerics else "nothing_to_compare"
        verdict = Verdict(self._verdict, self._from, self._position, state.digest(self.row), reason, self._differs_at)
        self.end(Done(self._head, verdict=verdict))
