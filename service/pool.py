"""What sessions remember, side by side: a batch is gathered and kept by one call a tensor, whatever its size.

An array a session would cost more than a step of a small network. A slot is written once, and again only when nobody
holds it any more. Memory is taken in blocks, each as large as all before it, of which only what was written counts;
it is not given back.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from math import prod
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from threading import Lock
from typing import Any, overload

import numpy as np

from service import state
from service.bundle import DTYPES, StateSpec, TensorSpec
from service.state import Array, Row

FIRST_BYTES, LEAST_BYTES = 2**30, 64 * 2**20
"""of the first block: address space until they are written. A batch from two blocks takes twice as long to put
together, so the first one is made for all sessions that are in memory, unless the machine refuses so much at once."""
RECENT, RECENT_BYTES = 8, 16 * 2**20
"""batches that are remembered as they were kept, and their bytes"""

Places = list[tuple[int, Any, int | Array]]
"""Where slots are: (block, which of the batch, where in the block); a number for a slot that is alone"""


class Together:
    """States that were kept as one batch: the same sessions often make a batch again, in the same order."""

    __slots__ = ("nbytes", "numbers", "states")

    def __init__(self, numbers: list[int], states: Sequence[Array]) -> None:
        self.numbers = numbers
        self.states = list(states)
        self.nbytes = sum(array.nbytes for array in states)


class Slot(Sequence[Array]):
    """One session's state, and the outputs that came with it; as a sequence it is the state, in copies."""

    __slots__ = ("number", "pool", "together")

    def __init__(self, pool: "Pool", number: int, together: Together | None = None) -> None:
        self.pool = pool
        self.number = number
        self.together = together
        """what it was kept with, if that is remembered"""

    def __del__(self) -> None:
        self.pool.free.append(self.number)

    def __len__(self) -> int:
        return len(self.pool.states)

    @overload
    def __getitem__(self, i: int) -> Array: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Array]: ...
    def __getitem__(self, i: int | slice) -> Array | Sequence[Array]:
        return self._one(self.pool.states[i]) if isinstance(i, int) else list(self)[i]

    def __iter__(self) -> Iterator[Array]:
        return map(self._one, self.pool.states)

    @property
    def output(self) -> dict[str, Array]:
        """The outputs by name, in copies."""
        return {name: self._one(tensor) for name, tensor in self.pool.outputs.items()}

    def _one(self, tensor: "Tensor") -> Array:
        return tensor.gather(self.pool.places([self.number]), 1).reshape(tensor.shape)


class Tensor:
    """One tensor of many sessions, in blocks."""

    def __init__(self, shape: Sequence[int], axis: int, dtype: np.dtype[Any]) -> None:
        """`shape`: of one session's; `axis`: the one that the sessions have in a batch."""
        self.shape, self.axis, self.dtype = tuple(shape), axis, dtype
        self._parts = prod(shape[:axis])
        """pieces of one session's that lie apart in a batch"""
        # Items without a type are moved whole, and below 500 of them NumPy keeps the GIL.
        self._piece = np.dtype((np.void, prod(shape[axis:]) * dtype.itemsize))
        self._within = np.arange(self._parts)[:, None]
        self._blocks: list[Array] = []

    @property
    def nbytes(self) -> int:
        """Bytes of one session's."""
        return self._parts * self._piece.itemsize

    def block(self, slots: int) -> Array:
        """Memory of so many sessions; raises OSError when there is none."""
        # NumPy would ask for huge pages: on a virtual machine copies took three times as long with them.
        return np.frombuffer(mmap(-1, slots * self.nbytes, flags=MAP_PRIVATE | MAP_ANONYMOUS), self._piece)

    def add(self, block: Array) -> None:
        """Go on in a block more."""
        self._blocks.append(block)

    def fits(self, batch: Array) -> bool:
        """Whether a batch is of this tensor's shape and type."""
        return batch.shape == self._shape(batch.shape[self.axis]) and batch.dtype == self.dtype

    def gather(self, places: Places, count: int) -> Array:
        """The batch [..., count, ...] of the slots at `places`, in copies."""
        if len(places) == 1:
            block, _, at = places[0]
            pieces = self._blocks[block][self._pieces_at(at)]
            pieces = pieces.copy() if count == 1 else pieces
        else:
            pieces = np.empty((self._parts, count), self._piece)
            for block, which, at in places:
                pieces[:, which] = self._blocks[block][self._pieces_at(at)]
        return pieces.view(self.dtype).reshape(self._shape(count))

    def scatter(self, places: Places, batch: Array) -> None:
        """Inverse of `gather`."""
        pieces = np.ascontiguousarray(batch).reshape(-1).view(self._piece).reshape(self._parts, -1)
        for block, which, at in places:
            self._blocks[block][self._pieces_at(at)] = pieces[:, which]

    def _pieces_at(self, at: int | Array) -> slice | Array:
        if isinstance(at, int):
            return slice(at * self._parts, (at + 1) * self._parts)
        return at * self._parts + self._within

    def _shape(self, count: int) -> tuple[int, ...]:
        return (*self.shape[: self.axis], count, *self.shape[self.axis :])


class Pool:
    """The slots of one model, for any thread."""

    def __init__(
        self, states: Sequence[StateSpec], outputs: Sequence[TensorSpec], first_bytes: int = FIRST_BYTES
    ) -> None:
        self.states = [Tensor(spec.row_shape, spec.stack_axis, DTYPES[spec.dtype]) for spec in states]
        self.outputs = {spec.name: Tensor(spec.row_shape, 0, DTYPES[spec.dtype]) for spec in outputs}
        self.free: deque[int] = deque()
        self._taking = Lock()
        """those that were in use before"""
        self._slots = self._unused = 0
        """how many all blocks have, and the first that was never in use"""
        self._first = max(1, first_bytes // max(1, sum(tensor.nbytes for tensor in self._tensors())))
        """slots of the first block"""
        self._recent: deque[Together] = deque()
        self._least = max(1, self._first * LEAST_BYTES // FIRST_BYTES)
        """to how many they may be cut down when there is not so much memory"""

    def _tensors(self) -> list[Tensor]:
        return [*self.states, *self.outputs.values()]

    def keep(self, states: Sequence[Array], outputs: dict[str, Array], count: int) -> list[Slot] | None:
        """Slots of a batch's rows, with their outputs [count, ...]; None: these are not as the manifest says."""
        pairs = list(zip(self.states, states, strict=True))
        pairs += [(self.outputs[name], array) for name, array in outputs.items()]
        if not all(tensor.fits(batch) for tensor, batch in pairs):
            return None
        with self._taking:
            while len(self.free) + self._slots - self._unused < count:
                self._grow()
            numbers = [self.free.pop() for _ in range(min(count, len(self.free)))]
            fresh = count - len(numbers)
            numbers += range(self._unused, self._unused + fresh)
            self._unused += fresh
            together = self._remember(numbers, states)
        slots = [Slot(self, number, together) for number in numbers]  # free again if what follows fails
        places = self.places(numbers)
        for tensor, batch in pairs:
            tensor.scatter(places, batch)
        return slots

    def _remember(self, numbers: list[int], states: Sequence[Array]) -> Together | None:
        together = Together(numbers, states)
        if len(numbers) == 1 or together.nbytes > RECENT_BYTES:
            return None
        self._recent.append(together)
        while len(self._recent) > RECENT or sum(one.nbytes for one in self._recent) > RECENT_BYTES:
            self._recent.popleft().states = []
        return together

    def _grow(self) -> None:
        more = self._slots or self._first
        try:
            blocks = [(tensor, tensor.block(more)) for tensor in self._tensors()]
        except OSError:
            if self._slots or self._first <= self._least:
                raise
            self._first //= 2  # and on it goes with as much as there is
            return
        for tensor, block in blocks:  # all of them or none
            tensor.add(block)
        self._slots += more

    def gather(self, rows: Sequence[Row]) -> list[Array]:
        """The states as a batch, to be read only: those of the slots at once and others one after another."""
        if batch := _as_kept(rows):
            return batch
        numbers = [row.number if isinstance(row, Slot) and row.pool is self else None for row in rows]
        places = self.places([number or 0 for number in numbers])
        batch = [tensor.gather(places, len(rows)) for tensor in self.states]
        for i in [i for i, number in enumerate(numbers) if number is None]:
            for tensor, array, own in zip(self.states, batch, rows[i], strict=True):
                np.moveaxis(array, tensor.axis, 0)[i] = own
        return batch

    def output(self, name: str, slots: Sequence[Slot]) -> Array:
        """One output of each, [n, ...]."""
        return self.outputs[name].gather(self.places([slot.number for slot in slots]), len(slots))

    def places(self, numbers: Sequence[int]) -> Places:
        """Where slots are: block 0 has the first ones, each other block as many as all before it."""
        if len(numbers) == 1:
            block = (numbers[0] // self._first).bit_length()
            return [(block, 0, numbers[0] - self._begin(block))]
        array = np.array(numbers)
        if max(numbers) < self._first:
            return [(0, slice(None), array)]
        blocks = np.frexp(array // self._first)[1]  # the bit lengths
        found: Places = []
        for block in np.unique(blocks).tolist():
            which = np.flatnonzero(blocks == block)
            found.append((block, which, array[which] - self._begin(block)))
        return found

    def _begin(self, block: int) -> int:
        return self._first << block - 1 if block else 0


def _as_kept(rows: Sequence[Row]) -> list[Array]:
    """The batch that these rows were kept as, if they are all of one, and it is remembered."""
    together = rows[0].together if isinstance(rows[0], Slot) else None
    if together is None or len(together.numbers) != len(rows):
        return []
    slots = [row for row in rows if isinstance(row, Slot) and row.together is together]
    # Each is another one: a slot that is held keeps its number.
    return together.states if [slot.number for slot in slots] == together.numbers else []


def stack(specs: Sequence[StateSpec], rows: Sequence[Row]) -> list[Array]:
    """Rows to one batch array a state tensor."""
    slot = next((row for row in rows if isinstance(row, Slot)), None)
    return slot.pool.gather(rows) if slot is not None else state.stack(specs, rows)
