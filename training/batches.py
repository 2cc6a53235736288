"""Two ways to batch sequences: `stream` carries the state from chunk to chunk, `windowed` starts at zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise, zip_longest
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from training.data import DataError, Sequence


@dataclass(frozen=True)
class Batch:
    """Time-major chunk of B rows; rows that ended early are padded and weigh nothing."""

    inputs: Tensor
    """[T, B] or [T, B, F]."""
    targets: Tensor
    """[T, B] or [T, B, K]."""
    weights: Tensor
    """[T, B] or [T, B, K]."""
    fresh: Tensor
    """[B] bool: the state is zeroed before this chunk."""
    spans: list[tuple[int, int, int]]
    """Per row (sequence, start, stop); start == stop where the row is idle."""

    @property
    def lengths(self) -> Tensor:
        """[B] steps of each row that are no padding."""
        return torch.tensor([stop - start for _, start, stop in self.spans], device=self.inputs.device)

    def part(self, rows: slice) -> Batch:
        """Some rows of it, as long as the whole."""
        tensors = (self.inputs[:, rows], self.targets[:, rows], self.weights[:, rows])
        return Batch(*tensors, fresh=self.fresh[rows], spans=self.spans[rows])

    def to(self, device: str) -> Batch:
        """The batch with its tensors on the device."""
        if device == "cpu":
            return self
        tensors = (self.inputs.to(device), self.targets.to(device), self.weights.to(device))
        return Batch(*tensors, fresh=self.fresh.to(device), spans=self.spans)


Piece = tuple[int, int, int]
"""(sequence, start, stop)."""


class Batches(Protocol):
    """A data set: one epoch's batches are a function of (seed, epoch), so a position is (epoch, chunk)."""

    rows: int

    def epoch(self, seed: int, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The epoch's batches from number `first` on."""
        ...

    def per_epoch(self) -> int:
        """About how many batches an epoch has."""
        ...


class StreamSet:
    """B parallel streams cut out of the sequences; each epoch begins at a random offset."""

    def __init__(self, sequences: list[Sequence], rows: int, steps: int, *, whole: bool = False) -> None:
        self.sequences = sequences
        self.steps = steps
        self.whole = whole or len(sequences) > rows
        self.rows = min(rows, len(sequences)) if self.whole else rows
        total = sum(len(sequence) for sequence in sequences)
        if not total or (not self.whole and total < self.rows * 2):
            raise DataError(f"{total} steps do not fill {rows} streams: lower train.batch")

    def per_epoch(self) -> int:
        """Batches of an epoch, without its random offset."""
        return max(sum(-(-(stop - start) // self.steps) for _, start, stop in row) for row in self._deal(None))

    def epoch(self, seed: int, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Each stream's pieces one after another, `steps` at a time; a new piece begins with a fresh state."""
        for spans in self._spans(np.random.default_rng((seed, epoch)), first):
            yield collate(self.sequences, spans)

    def in_order(self) -> Iterator[Batch]:
        """One pass without shuffling or offset, for evaluation."""
        for spans in self._spans(None, 0):
            yield collate(self.sequences, spans)

    def _spans(self, rng: np.random.Generator | None, first: int) -> Iterator[list[tuple[int, int, int, bool]]]:
        rows = (islice(_chunks(row, self.steps), first, None) for row in self._deal(rng))
        for spans in zip_longest(*rows, fillvalue=(0, 0, 0, True)):
            yield list(spans)

    def _deal(self, rng: np.random.Generator | None) -> list[list[Piece]]:
        """Cut the sequences into about equal pieces, one a row; or deal whole sequences to the shortest row."""
        lengths = [len(sequence) for sequence in self.sequences]
        if not self.whole:
            counts = shares(lengths, self.rows)
            return [[piece] for i, length in enumerate(lengths) for piece in self._cut(i, length, counts[i], rng)]
        order = range(len(lengths)) if rng is None else rng.permutation(len(lengths))
        rows: list[list[Piece]] = [[] for _ in range(self.rows)]
        filled = [0] * self.rows
        for i in order:
            shortest = filled.index(min(filled))
            rows[shortest].append((int(i), 0, lengths[i]))
            filled[shortest] += lengths[i]
        return rows

    def _cut(self, sequence: int, length: int, count: int, rng: np.random.Generator | None) -> list[Piece]:
        offset = 0 if rng is None or count == 1 else int(rng.integers(min(self.steps, length // 2) or 1))
        edges = np.linspace(offset, length, count + 1).astype(int).tolist()
        return [(sequence, start, stop) for start, stop in pairwise(edges)]


class WindowSet:
    """Overlapping windows of `steps`, `stride` apart, each from a zero state, shuffled every epoch."""

    def __init__(self, sequences: list[Sequence], rows: int, steps: int, stride: int) -> None:
        self.sequences = sequences
        self.windows = [
            (i, start, start + steps)
            for i, sequence in enumerate(sequences)
            for start in range(0, len(sequence) - steps + 1, stride)
        ]
        if not self.windows:
            longest = max((len(sequence) for sequence in sequences), default=0)
            raise DataError(f"no window of {steps} steps fits the longest sequence ({longest}): lower train.steps")
        self.rows = min(rows, len(self.windows))

    def per_epoch(self) -> int:
        """Batches of an epoch; the last, smaller one is left out."""
        return len(self.windows) // self.rows

    def epoch(self, seed: int, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Shuffled batches of whole windows."""
        order = np.random.default_rng((seed, epoch)).permutation(len(self.windows))
        for batch in range(first, self.per_epoch()):
            chosen = order[batch * self.rows : (batch + 1) * self.rows]
            yield collate(self.sequences, [(*self.windows[i], True) for i in chosen])


def shares(lengths: list[int], rows: int) -> list[int]:
    """How many of `rows` each sequence gets: at least one, else in proportion (largest remainder first)."""
    exact = [length * rows / sum(lengths) for length in lengths]
    counts = [max(1, int(share)) for share in exact]
    while sum(counts) != rows:
        short = np.subtract(exact, counts)
        if sum(counts) < rows:
            counts[int(short.argmax())] += 1
        else:
            counts[int(np.where(np.array(counts) > 1, short, np.inf).argmin())] -= 1
    return counts


def _chunks(pieces: list[Piece], steps: int) -> Iterator[tuple[int, int, int, bool]]:
    """One after another and never all at once: a long file has more of them than fit into memory."""
    for sequence, start, stop in pieces:
        for at in range(start, stop, steps):
            yield sequence, at, min(at + steps, stop), at == start


def collate(sequences: list[Sequence], spans: list[tuple[int, int, int, bool]]) -> Batch:
    """Rows (sequence, start, stop, fresh) side by side, padded with zeros to the longest."""
    columns: dict[str, Tensor] = {}
    longest = max(stop - start for _, start, stop, _ in spans)
    for name in ("inputs", "targets", "weights"):
        first: Tensor = getattr(sequences[0], name)
        column = first.new_zeros((longest, len(spans), *first.shape[1:]))
        for row, (sequence, start, stop, _) in enumerate(spans):
            column[: stop - start, row] = getattr(sequences[sequence], name)[start:stop]
        columns[name] = column.long() if column.dtype == torch.uint8 else column  # bytes of a mapped file
    fresh = torch.tensor([fresh for *_, fresh in spans])
    return Batch(**columns, fresh=fresh, spans=[span[:3] for span in spans])
