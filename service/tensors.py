"""Tensors of graphs that were made elsewhere: nested lists to entries and back, entries to the graph's axes and back.

An entry of a raw model holds one step of every input in the graph's own types: an array, or a record of several.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from service.bundle import DTYPES, Constant, Manifest, TensorSpec
from service.errors import invalid
from service.state import Array

SHOWN = 80


class Tensors:
    """The inputs of a raw model."""

    def __init__(self, inputs: Sequence[TensorSpec]) -> None:
        self._inputs = {spec.name: spec for spec in inputs}
        self._alone = inputs[0] if len(inputs) == 1 else None
        self.entry_dtype, self.entry_shape = _entry_of(inputs)

    def encode(self, inputs: object, pointer: str) -> Array:
        """`{input: nested list with time first}`, one input's bare list, or a list of `{input: one step}`: entries [n].

        Raises Problem naming the place that does not fit.
        """
        if isinstance(inputs, list) and inputs and isinstance(inputs[0], dict):
            return self._of_steps(inputs, pointer)
        if isinstance(inputs, dict):
            return self._of_names(inputs, pointer)
        if self._alone is None:
            raise invalid(f"an object is needed, with a list of steps for each of {self._names}", pointer)
        return _encoded(self._alone, inputs, pointer)

    @property
    def _names(self) -> str:
        return ", ".join(map(repr, self._inputs))

    def _of_names(self, inputs: Mapping[str, object], pointer: str) -> Array:
        self._must_name_all(inputs, pointer)
        parts = {
            name: _encoded(spec, inputs[name], f"{pointer}/{name.replace('~', '~0').replace('/', '~1')}")
            for name, spec in self._inputs.items()
        }
        if self._alone is not None:
            return parts[self._alone.name]
        lengths = {name: len(part) for name, part in parts.items()}
        if len(set(lengths.values())) > 1:
            raise invalid(f"every input needs as many steps as the others; given: {lengths}", pointer)
        entries = np.empty(len(next(iter(parts.values()))), self.entry_dtype)
        for name, part in parts.items():
            entries[name] = part
        return entries

    def _of_steps(self, steps: Sequence[object], pointer: str) -> Array:
        for i, step in enumerate(steps):
            if not isinstance(step, dict):
                raise invalid("every step is an object here, as the first one is", f"{pointer}/{i}")
            self._must_name_all(step, f"{pointer}/{i}")
        named = [step for step in steps if isinstance(step, dict)]
        return self._of_names({name: [step[name] for step in named] for name in self._inputs}, pointer)

    def _must_name_all(self, given: Mapping[str, object], pointer: str) -> None:
        unknown = [name[:SHOWN] for name in islice((name for name in given if name not in self._inputs), 5)]
        missing = [name for name in self._inputs if name not in given]
        if unknown or missing:
            said = [f"unknown: {str(unknown)[1:-1]}"] if unknown else []
            said += [f"missing: {str(missing)[1:-1]}"] if missing else []
            raise invalid(f"the names of the inputs do not fit ({'; '.join(said)})", pointer)

    def decode(self, entries: Array) -> list[Any]:
        """Entries as they can be fed again: nested lists, or objects of them."""
        if self._alone is not None:
            return list(entries.tolist())
        columns = {name: entries[name].tolist() for name in self._inputs}
        return [{name: column[i] for name, column in columns.items()} for i in range(len(entries))]


def _entry_of(inputs: Sequence[TensorSpec]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and shape of an entry."""
    if len(inputs) == 1:
        return DTYPES[inputs[0].dtype].newbyteorder("<"), inputs[0].row_shape
    return np.dtype([(spec.name, DTYPES[spec.dtype].newbyteorder("<"), spec.row_shape) for spec in inputs]), ()


def _encoded(spec: TensorSpec, given: object, pointer: str) -> Array:
    """A nested list [n, *row] as an array of the input's type; raises Problem naming the place that does not fit."""
    if not isinstance(given, list):
        raise invalid(f"a list of steps is needed, each {_shown(spec)}", pointer)
    for i, step in enumerate(given):
        _check_nesting(spec, step, spec.row_shape, f"{pointer}/{i}")
    dtype = DTYPES[spec.dtype]
    try:
        wide: Array = np.array(given, {"f": np.float64, "b": np.bool_}.get(dtype.kind, np.int64))
    except OverflowError as error:
        raise invalid(f"a number is too large for {spec.dtype}", pointer) from error
    wide = wide.reshape(len(given), *spec.row_shape)
    if dtype.kind != "b":
        info: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
        good = (wide >= info.min) & (wide <= info.max)  # false for NaN
        if not good.all():
            place = "/".join(str(int(i)) for i in np.argwhere(~good)[0])
            raise invalid(f"numbers must be finite and fit {spec.dtype}", f"{pointer}/{place}")
    return wide.astype(dtype)


def _check_nesting(spec: TensorSpec, given: object, shape: tuple[int, ...], pointer: str) -> None:
    if not shape:
        _check_numbers(spec, [given], pointer, single=True)
        return
    if not isinstance(given, list) or len(given) != shape[0]:
        found = f"{len(given)} items" if isinstance(given, list) else "no list"
        raise invalid(f"a list of {shape[0]} is needed here, {found} given; a step is {_shown(spec)}", pointer)
    if len(shape) == 1:
        _check_numbers(spec, given, pointer)
        return
    for i, part in enumerate(given):
        _check_nesting(spec, part, shape[1:], f"{pointer}/{i}")


_TYPES: dict[str, frozenset[type]] = {"f": frozenset((int, float)), "b": frozenset((bool,))}


def _check_numbers(spec: TensorSpec, given: list[Any], pointer: str, single: bool = False) -> None:
    kind = DTYPES[spec.dtype].kind
    allowed = _TYPES.get(kind, frozenset((int,)))
    if set(map(type, given)) <= allowed:
        return
    i = next(i for i, item in enumerate(given) if type(item) not in allowed)
    what = {"f": "a number", "b": "true or false"}.get(kind, "a whole number")
    raise invalid(f"{what} is needed here", pointer if single else f"{pointer}/{i}")


def _shown(spec: TensorSpec) -> str:
    """What one step of an input is, for people."""
    return f"{spec.dtype} of the shape {list(spec.row_shape)}" if spec.row_shape else f"one {spec.dtype}"


def entry_of(manifest: Manifest) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and shape of an entry of a foreign graph."""
    if manifest.input_kind == "tensors":
        return _entry_of(manifest.inputs)
    if manifest.symbols:
        return np.dtype("<i4"), ()
    return np.dtype("<f4"), (len(manifest.features),)


class Layout:
    """The axes of one tensor of the graph: from [T, B, ...] and back, where T is 1 if the graph has no such axis."""

    def __init__(self, spec: TensorSpec, row_shape: tuple[int, ...] | None = None) -> None:
        """`row_shape`: what a row looks like outside of the graph, if not as within."""
        self.name, self._dtype, self._shape = spec.name, DTYPES[spec.dtype], spec.shape
        self.has_time = "T" in spec.shape
        named = [axis for axis in ("T", "B") if axis in spec.shape]
        inner = tuple(axis for axis in spec.shape if isinstance(axis, int))
        self._inner = inner
        self._outer = inner if row_shape is None else row_shape
        self._missing = tuple(i for i, axis in enumerate(("T", "B")) if axis not in named)
        places = [spec.shape.index(axis) for axis in named]
        self._from_graph = [*places, *(i for i, axis in enumerate(spec.shape) if isinstance(axis, int))]
        self._to_graph = [self._from_graph.index(i) for i in range(len(spec.shape))]

    def to_graph(self, entries: Array) -> Array:
        """[T, B, ...] with the graph's axes and type."""
        T, B = entries.shape[:2]
        kept = [size for i, size in enumerate((T, B)) if i not in self._missing]
        array = entries.reshape(*kept, *self._inner).transpose(self._to_graph)
        return np.ascontiguousarray(array, self._dtype).reshape(array.shape)

    def from_graph(self, array: Array) -> Array:
        """What the graph gave, as [T, B, ...]; inverse of `to_graph`."""
        moved = np.expand_dims(array.transpose(self._from_graph), self._missing)
        return moved.reshape(*moved.shape[:2], *self._outer)

    def filled(self, value: object, T: int, B: int) -> Array:
        """A constant in all of the tensor."""
        shape = [{"T": T, "B": B}.get(axis, 1) if isinstance(axis, str) else axis for axis in self._shape]
        return np.broadcast_to(np.array(value, self._dtype), shape)


def check_constants(constants: Sequence[Constant]) -> None:
    """Raise ValueError naming a constant whose value does not fit its tensor."""
    for constant in constants:
        try:
            Layout(constant).filled(constant.value, 1, 1)
        except (ValueError, OverflowError, TypeError) as error:
            raise ValueError(
                f"constant {constant.name!r} does not fit {constant.dtype} {list(constant.shape)}"
            ) from error


def same_entries(a: Manifest, b: Manifest) -> bool:
    """Whether the entries of one raw model can be fed to the other."""
    return a.input_kind != "tensors" or [(s.name, s.dtype, s.row_shape) for s in a.inputs] == [
        (s.name, s.dtype, s.row_shape) for s in b.inputs
    ]
