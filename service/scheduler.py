"""Which rows make the next batch, and for how many steps: fair between sessions, equal lengths within a batch.

A call folds the same number of steps for every row, so a row that has n steps to go joins the rows with the same power
of two of steps (at most `MAX_STEPS`); a fold's result does not depend on how it is cut. Rows that know their entries
and rows that draw them wait apart. The batch that was queued first goes first, and a row goes to the back after each
tick: a long feed waits behind the streams and they behind it. What came during a tick goes before the rows of that
tick, a batch of it: more would make streams wait for all lines of a bulk request that comes bit by bit.
"""

from collections import deque
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

MAX_DRAWN = 64
MAX_STEPS = 512
TICK_S = {True: 0.022, False: 0.025}
"""how long a tick of rows that draw, and of rows that do not, may take: what a newcomer waits, and how many tokens of a
stream are sent at once; beside long feeds streams keep half of the time, with what their commits and replies take"""
ALONE = 1.8
"""times as long a tick of rows that draw may take while nothing else waits: a newcomer makes it end early"""
MAX_NUMBERS = 4_000_000
"""of the outputs of a tick"""
_GUESS_S = 0.001
_NEWEST = 0.25


class Row(Protocol):
    """What the scheduler knows of a piece of work."""

    @property
    def steps(self) -> int:
        """Steps that can be taken now, at least 1."""

    @property
    def draws(self) -> bool:
        """Whether each step draws the entry of the next one."""

    @property
    def width(self) -> int:
        """How many sessions it is: at most as many as a batch may have, or it is a batch alone."""


R = TypeVar("R", bound=Row)


@dataclass(slots=True)
class Batch(Generic[R]):
    """Rows that take `steps` steps each in the next tick."""

    rows: list[R]
    steps: int
    draws: bool
    width: int
    since: float
    """when the first of them was there"""
    longest: int
    """the power of two of steps that each may take"""
    most: int
    """sessions that may be in it"""


class Pace:
    """How long a step takes, by kind and size of batch: the newest ticks count most."""

    def __init__(self, numbers: int = 1) -> None:
        """`numbers`: of one row's outputs of one step."""
        self._numbers = numbers
        self._seconds: dict[tuple[bool, int], float] = {}

    def took(self, draws: bool, rows: int, steps: int, seconds: float) -> None:
        """Learn from a tick; 0 seconds: it failed, and says nothing."""
        if not seconds:
            return
        kind = (draws, rows.bit_length())
        known = self._seconds.get(kind, seconds / steps)
        self._seconds[kind] = known + _NEWEST * (seconds / steps - known)

    def most(self, draws: bool, rows: int, alone: bool = False) -> int:
        """The steps that fit into a tick, at least 1; `alone`: nothing else waits."""
        seconds = self._seconds.get((draws, rows.bit_length()), _GUESS_S)
        in_time = int(TICK_S[draws] * (ALONE if draws and alone else 1) / seconds)
        # A roll-out keeps its last step's outputs only.
        return max(1, in_time if draws else min(in_time, MAX_NUMBERS // (rows * self._numbers)))


class Scheduler(Generic[R]):
    """Queues of rows, one a kind and a number of steps. Owned by one thread."""

    def __init__(self, max_batch: int, max_steps: int = MAX_STEPS, numbers: int = 1) -> None:
        self.pace = Pace(numbers)
        self._max_batch = max_batch
        self._max_steps = max_steps
        self._queues: dict[tuple[bool, int], deque[tuple[int, float, R]]] = {}
        self._arrivals = 0
        self._overtook = False
        """whether the last batch went before one that had been queued earlier"""
        self.waiting = 0
        """sessions"""

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, row: R, since: float = 0.0) -> None:
        """Put a row behind those that wait; `since`: when it was there."""
        self._arrivals += 1
        self.waiting += row.width
        most = MAX_DRAWN if row.draws else self._max_steps
        kind = (row.draws, _power_of_two(min(row.steps, most)))
        queue = self._queues.get(kind)
        if queue is None:
            queue = self._queues[kind] = deque()
        queue.append((self._arrivals, since, row))

    def next(self, most_folded: int | None = None) -> Batch[R] | None:
        """The rows of the next tick, taken from the queue whose first row has waited longest.

        `most_folded`: the sessions of a fold of one step, where it may not have as many as any batch.
        """
        waiting = [(queue[0][:2], kind) for kind, queue in self._queues.items() if queue]
        if not waiting:
            return None
        (arrival, _), first_queued = min(waiting)
        (other, _), first_there = min(waiting, key=lambda one: (one[0][1], one[0][0]))
        self._overtook = other != arrival and not self._overtook
        draws, steps = first_there if self._overtook else first_queued
        _, since, first = self._queues[draws, steps].popleft()
        self.waiting -= first.width
        most = self._max_batch if most_folded is None or draws or steps > 1 else min(most_folded, self._max_batch)
        return self.joined(Batch([first], steps, draws, first.width, since, steps, most))

    def joins(self, batch: Batch[R], least: int = 1) -> bool:
        """Whether at least so many sessions wait that could have been in a batch."""
        joining = 0
        for _, _, row in self._queues.get((batch.draws, batch.longest), ()):
            if joining >= least or batch.width + joining + row.width > batch.most:
                break
            joining += row.width
        return joining >= least

    def joined(self, batch: Batch[R]) -> Batch[R]:
        """A batch that was not run yet, with those that could have been in it."""
        queue, rows, width = self._queues[batch.draws, batch.longest], list(batch.rows), batch.width
        while queue and width + queue[0][2].width <= batch.most:
            rows.append(queue.popleft()[2])
            width += rows[-1].width
        self.waiting -= width - batch.width
        steps = min(batch.longest, self.pace.most(batch.draws, width, not self.waiting))
        return Batch(rows, steps, batch.draws, width, batch.since, batch.longest, batch.most)


def _power_of_two(steps: int) -> int:
    return 1 << (steps.bit_length() - 1)
