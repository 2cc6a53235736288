"""Which rows make the next batch: fair between sessions, equal lengths within a batch.

A call of the graph folds the same number of steps for every row, so a row that has n steps to go joins the rows
with the same power of two of steps (at most `max_chunk`); a fold's result does not depend on how it is cut. The
batch that has waited longest goes first and a row goes to the back after each tick, so a long feed waits behind
the streams and they behind it, never longer than a chunk.
"""

from collections import deque
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

MAX_CHUNK = 32


class Row(Protocol):
    """What the scheduler knows of a piece of work."""

    @property
    def remaining(self) -> int:
        """Steps that can be folded now, at least 1."""


R = TypeVar("R", bound=Row)


@dataclass(slots=True)
class Batch(Generic[R]):
    """Rows that fold `steps` entries each in the next tick."""

    rows: list[R]
    steps: int


class Scheduler(Generic[R]):
    """Queues of rows, one a chunk length. Owned by one thread."""

    def __init__(self, max_batch: int, max_chunk: int = MAX_CHUNK) -> None:
        self._max_batch = max_batch
        self._max_chunk = max_chunk
        self._queues: dict[int, deque[tuple[int, R]]] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, row: R) -> None:
        """Put a row behind those that wait."""
        steps = 1 << (min(row.remaining, self._max_chunk).bit_length() - 1)
        self._arrivals += 1
        self._queues.setdefault(steps, deque()).append((self._arrivals, row))

    def next(self) -> Batch[R] | None:
        """The rows of the next tick, taken from the queue whose first row has waited longest."""
        waiting = [(queue[0][0], steps) for steps, queue in self._queues.items() if queue]
        if not waiting:
            return None
        steps = min(waiting)[1]
        queue = self._queues[steps]
        return Batch([queue.popleft()[1] for _ in range(min(len(queue), self._max_batch))], steps)
