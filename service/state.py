"""States as arrays: rows to a batch and back, and to safetensors and back.

A row is one session's state: one array a state tensor, without the batch axis, in the manifest's order.
"""

import hashlib
from collections.abc import Sequence
from math import prod
from typing import Any

import msgspec
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from service.bundle import DTYPES, StateSpec

Array = np.ndarray[Any, np.dtype[Any]]
Row = Sequence[Array]


class _Header(msgspec.Struct):
    """What is read of a safetensors file's header."""

    metadata: dict[str, str] = msgspec.field(name="__metadata__")


_header = msgspec.json.Decoder(_Header)


def initial_row(specs: Sequence[StateSpec]) -> Row:
    """The state at position 0."""
    return tuple(np.full(spec.row_shape, spec.initial, DTYPES[spec.dtype]) for spec in specs)


def stack(specs: Sequence[StateSpec], rows: Sequence[Row]) -> list[Array]:
    """Rows to one batch array a state tensor; inverse of `unstack`."""
    return [_stacked(spec, [row[i] for row in rows]) for i, spec in enumerate(specs)]


def _stacked(spec: StateSpec, arrays: Sequence[Array]) -> Array:
    # NumPy's own ways give the GIL away, and each time it has to be got back from a busy event loop.
    if not all(array.flags.c_contiguous for array in arrays):
        return np.stack(arrays, axis=spec.stack_axis)
    before = prod(spec.row_shape[: spec.stack_axis])
    rows = [array.data.cast("B") for array in arrays]
    size = len(rows[0]) // before
    joined = b"".join([row[at : at + size] for at in range(0, size * before, size) for row in rows])
    shape = (*spec.row_shape[: spec.stack_axis], len(arrays), *spec.row_shape[spec.stack_axis :])
    return np.frombuffer(joined, arrays[0].dtype).reshape(shape)


def unstack(specs: Sequence[StateSpec], batch: Sequence[Array]) -> list[Row]:
    """Batch arrays to rows that share their memory; inverse of `stack`."""
    moved = [np.moveaxis(array, spec.stack_axis, 0) for spec, array in zip(specs, batch, strict=True)]
    return list(zip(*(_rows(array) for array in moved), strict=True))


def _rows(array: Array) -> list[Array]:
    # What a list makes of one axis are numbers, no arrays.
    return list(array) if array.ndim > 1 else [array[i, ...] for i in range(len(array))]


def own(row: Row) -> Row:
    """The same row in memory of its own: one that is kept does not keep its whole batch."""
    return tuple(owned(array) for array in row)


def owned(array: Array) -> Array:
    """The same numbers in an array that keeps no larger one in memory."""
    base = array.base
    return array if base is None or getattr(base, "nbytes", array.nbytes) == array.nbytes else array.copy()


def equal(a: Row, b: Row) -> bool:
    """Whether two rows are the same, bit for bit."""
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def finite(row: Row) -> bool:
    """Whether every number of a row is finite."""
    return all(map(all_finite, row))


def all_finite(array: Array) -> bool:
    """Whether every number of an array is finite."""
    # `all` would give the GIL away a second time.
    return b"\0" not in np.isfinite(array).tobytes()


def digest(row: Row) -> str:
    """sha256 of a row's bytes, in the manifest's order."""
    return hashlib.sha256(b"".join(array.tobytes() for array in row)).hexdigest()


def dump(specs: Sequence[StateSpec], row: Row, metadata: dict[str, str] | None = None) -> bytes:
    """A row as safetensors, one tensor a state, by the manifest's names."""
    # Of an array that is not contiguous it would write other numbers than are in it.
    tensors = {
        spec.name: np.ascontiguousarray(array).reshape(array.shape) for spec, array in zip(specs, row, strict=True)
    }
    return safetensors.numpy.save(tensors, metadata)


def metadata(data: bytes) -> dict[str, str]:
    """What a safetensors file says of itself; raises ValueError when it is none."""
    size = int.from_bytes(data[:8], "little")
    try:
        return _header.decode(data[8 : 8 + size]).metadata
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError("not a safetensors file with metadata") from error


def load(specs: Sequence[StateSpec], data: bytes) -> Row:
    """Inverse of `dump`; raises ValueError when names, shapes or types are not the manifest's."""
    try:
        tensors = safetensors.numpy.load(data)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    row = tuple(tensors.get(spec.name, np.empty(0)) for spec in specs)
    for spec, array in zip(specs, row, strict=True):
        if array.shape != spec.row_shape or array.dtype != DTYPES[spec.dtype]:
            raise ValueError(f"state {spec.name!r} does not fit the model")
    return row
