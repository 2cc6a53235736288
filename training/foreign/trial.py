"""Running a stranger's graph to find out what its axes are and how it may be called.

`Called` is a graph whose axes have been named; it takes entries [T, B, ...] and states [B, ...] like every other
model here. What is tried: which axis is time and which the batch, whether carried states go on where they stopped,
whether an output looks ahead, and whether chunks or batches change a bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
import onnxruntime

from service.bundle import DTYPES
from training.foreign.graph import GraphError
from training.foreign.pairs import Pair, Tensor

T0, B0 = 6, 3
BATCHES = (2, 3, 7, 16, 64)
MAX_TENSOR_BYTES = 64 * 2**20
CLOSE = 1e-3

Array = np.ndarray[Any, np.dtype[Any]]
Axes = tuple[int | str, ...]
_TYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}
_TYPES |= {f"tensor({name})": name for name in DTYPES}


class Unknown(GraphError):
    """Something that can not be found in the graph; `questions` says what, by the spec's key."""

    def __init__(self, questions: Mapping[str, str]) -> None:
        said = "\n".join(f"  {text}: --set {key}=..." for key, text in questions.items())
        super().__init__(f"this can not be found in the graph; say it with --set, or in the spec's [graph]:\n{said}")
        self.questions = dict(questions)


class Session:
    """A graph in ONNX Runtime."""

    def __init__(self, graph: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises many types, none of them public
            raise GraphError(f"ONNX Runtime can not load it: {_first_line(error)}") from error
        self.inputs = [_tensor(node) for node in self._session.get_inputs()]
        self.outputs = [_tensor(node) for node in self._session.get_outputs()]

    def run(self, feed: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
        """One call; raises whatever ONNX Runtime raises."""
        return dict(zip(names, self._session.run(list(names), dict(feed)), strict=True))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["?"])[0][:300]


def _tensor(node: Any) -> Tensor:  # noqa: ANN401 (onnxruntime's NodeArg)
    dtype = _TYPES.get(node.type)
    if dtype is None:
        raise GraphError(f"{node.name!r} is a {node.type}: tensors of {', '.join(DTYPES)} are served")
    dims = tuple(dim if isinstance(dim, int | str) and dim != "" else None for dim in node.shape)
    if any(isinstance(dim, int) and dim < 1 for dim in dims):
        raise GraphError(f"{node.name!r} has an axis without numbers: {list(dims)}")
    return Tensor(node.name, dtype, dims)


@dataclass(frozen=True)
class Named:
    """A tensor whose axes are named "T" and "B", or have a size."""

    name: str
    dtype: str
    axes: Axes

    @property
    def row(self) -> tuple[int, ...]:
        """One session's part of one step."""
        return tuple(axis for axis in self.axes if isinstance(axis, int))

    def sized(self, T: int, B: int) -> tuple[int, ...]:
        """The shape for so many steps and sessions."""
        return tuple({"T": T, "B": B}.get(axis, 1) if isinstance(axis, str) else axis for axis in self.axes)

    def put(self, array: Array) -> Array:
        """[T, B, ...] in the graph's axes."""
        named = [axis for axis in ("T", "B") if axis in self.axes]
        kept = array.reshape([n for n, axis in zip(array.shape, "TB", strict=False) if axis in named] + list(self.row))
        places = [self.axes.index(axis) for axis in named]
        return np.ascontiguousarray(np.moveaxis(kept, range(len(places)), places)) if kept.ndim else kept

    def got(self, array: Array) -> Array:
        """The graph's axes as [T, B, ...]."""
        named = [axis for axis in ("T", "B") if axis in self.axes]
        moved = np.moveaxis(array, [self.axes.index(axis) for axis in named], range(len(named)))
        return np.expand_dims(moved, [i for i, axis in enumerate("TB") if axis not in named])


@dataclass(frozen=True)
class Called:
    """A graph with named axes, and what is known of how it may be called."""

    session: Session = field(repr=False)
    inputs: tuple[Named, ...]
    states: tuple[tuple[Pair, Named], ...]
    constants: tuple[tuple[Named, Any], ...]
    timed: bool
    """whether one call can take many steps; if not, an axis named "T" is 1"""
    batched: bool
    """whether one call can take many sessions; if not, an axis named "B" is 1"""
    outputs: tuple[Named, ...] = ()
    initial: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    """what was taken for granted so that it runs"""

    def zero(self, B: int) -> list[Array]:
        """The states at position 0, [B, ...] each."""
        return [np.full((B, *one.row), self.initial.get(pair.input, 0), DTYPES[one.dtype]) for pair, one in self.states]

    def some_states(self, B: int, rng: np.random.Generator) -> list[Array]:
        """States as they may be somewhere, [B, ...] each."""
        return [some(one, (B, *one.row), rng) for _, one in self.states]

    def some_entries(self, T: int, B: int, rng: np.random.Generator) -> dict[str, Array]:
        """Inputs [T, B, ...] by name."""
        return {one.name: some(one, (T, B, *one.row), rng) for one in self.inputs}

    def call(self, entries: Mapping[str, Array], states: Sequence[Array]) -> tuple[dict[str, Array], list[Array]]:
        """One call: outputs [T, B, ...] by name and the next states [B, ...]."""
        T, B = next(iter(entries.values())).shape[:2]
        raw, after = self.raw(entries, states, T, B)
        return {one.name: one.got(raw[one.name]) for one in self.outputs}, after

    def raw(
        self, entries: Mapping[str, Array], states: Sequence[Array], T: int, B: int
    ) -> tuple[dict[str, Array], list[Array]]:
        """One call: all outputs as the graph gives them, and the next states [B, ...]."""
        feed = {one.name: one.put(entries[one.name]) for one in self.inputs}
        feed.update((one.name, _filled(one, value, T, B)) for one, value in self.constants)
        feed.update((pair.input, one.put(array[None])) for (pair, one), array in zip(self.states, states, strict=True))
        found = self.session.run(feed, [one.name for one in self.session.outputs])
        for (pair, one), fed in zip(self.states, states, strict=True):
            array = found[pair.output]
            if array.shape != one.sized(1, B) or array.dtype != fed.dtype:
                raise ValueError(f"{pair.output!r} comes out as {array.dtype} {list(array.shape)}")
        return found, [one.got(found[pair.output])[0] for pair, one in self.states]

    def alone(self, entries: Mapping[str, Array], states: Sequence[Array]) -> tuple[dict[str, Array], list[Array]]:
        """The same, one step and one session a call: what every other way is compared with."""
        rows = []
        for i in range(next(iter(entries.values())).shape[1]):
            steps, row = [], [array[i : i + 1] for array in states]
            for t in range(len(next(iter(entries.values())))):
                outputs, row = self.call({name: a[t : t + 1, i : i + 1] for name, a in entries.items()}, row)
                steps.append(outputs)
            rows.append(({name: np.concatenate([step[name] for step in steps]) for name in steps[0]}, row))
        whole = {name: np.concatenate([row[0][name] for row in rows], axis=1) for name in rows[0][0]}
        return whole, [np.concatenate(parts) for parts in zip(*(row[1] for row in rows), strict=True)]


def some(one: Named, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Numbers that a tensor may hold: small ones; ids 0 and 1, which any table has."""
    dtype = DTYPES[one.dtype]
    if dtype.kind == "f":
        return (0.5 * rng.standard_normal(shape)).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype)


def _filled(one: Named, value: Any, T: int, B: int) -> Array:  # noqa: ANN401 (a number or nested lists)
    try:
        return np.ascontiguousarray(np.broadcast_to(np.array(value, DTYPES[one.dtype]), one.sized(T, B))).reshape(
            one.sized(T, B)
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise GraphError(f"constants.{one.name}: {value!r} does not fit {one.dtype} {list(one.axes)}") from error


# ---------------------------------------------------------------------- axes


def named_ways(
    session: Session, pairs: Sequence[Pair], constants: Mapping[str, Any], sizes: Mapping[str, int]
) -> Iterator[Called]:
    """Ways to name the axes that the graph runs with, the most likely first; raises Unknown when sizes are missing."""
    by_name = {one.name: one for one in session.inputs}
    states = [by_name[pair.input] for pair in pairs]
    inputs = [one for one in session.inputs if one.name not in constants and one not in states]
    if not inputs:
        raise GraphError("no input is left to feed")
    shared = _batch_names(states)
    dims = {one.name: _with_sizes(one, sizes) for one in (*inputs, *states)}
    fixed = not any(open_axes(dims[one.name]) for one in (*states, *inputs))
    state_axes = [Named(one.name, one.dtype, _state_axes(one, dims[one.name], fixed)) for one in states]
    constant_axes = tuple(
        (Named(name, by_name[name].dtype, _constant_axes(by_name[name])), value) for name, value in constants.items()
    )
    choices = [list(_input_axes(dims[one.name], shared)) for one in inputs]
    for way in product(*choices):
        named = tuple(Named(one.name, one.dtype, axes) for one, axes in zip(inputs, way, strict=True))
        timed = any(_isopen_axes(one, "T", dims) for one in named)
        batched = all(_isopen_axes(one, "B", dims) for one in (*named, *state_axes))
        called = Called(session, named, tuple(zip(pairs, state_axes, strict=True)), constant_axes, timed, batched)
        _bound(called)
        if (observed := _with_outputs(called)) is not None:
            yield observed


def open_axes(dims: Sequence[int | str | None]) -> list[int]:
    """The axes that the graph gives no size to."""
    return [i for i, dim in enumerate(dims) if not isinstance(dim, int)]


def _isopen_axes(one: Named, axis: str, dims: Mapping[str, Sequence[int | str | None]]) -> bool:
    """Whether a tensor has an axis, and of any size."""
    return axis in one.axes and not isinstance(dims[one.name][one.axes.index(axis)], int)


def _batch_names(states: Sequence[Tensor]) -> set[str]:
    """What the states call the batch axis."""
    return {dim for one in states for dim in one.dims if isinstance(dim, str)}


def _with_sizes(one: Tensor, sizes: Mapping[str, int]) -> tuple[int | str | None, ...]:
    for key in sizes:
        name, _, axis = key.rpartition(".")
        if name == one.name and not (axis.isdecimal() and int(axis) < len(one.dims)):
            raise GraphError(f"sizes.{key}: {one.name!r} has the axes 0 to {len(one.dims) - 1}")
    return tuple(sizes.get(f"{one.name}.{i}", dim) for i, dim in enumerate(one.dims))


def _state_axes(one: Tensor, dims: Sequence[int | str | None], fixed: bool) -> Axes:
    """A state's axes: the one without a size is the batch; where all have one, an axis of 1 is."""
    places = open_axes(dims)
    if len(places) > 1:
        keys = {f"sizes.{one.name}.{i}": f"axis {i} of the state {one.name!r}, unless it is the batch" for i in places}
        raise Unknown(keys)
    if not places and fixed:
        order = (1, 0, 2) if len(dims) > 2 else (0, 1)
        places = [i for i in order if i < len(dims) - 1 and dims[i] == 1][:1]
    return tuple("B" if i in places else int(dim) for i, dim in enumerate(dims) if dim is not None or i in places)  # type: ignore[arg-type]


def _constant_axes(one: Tensor) -> Axes:
    """A constant's axes: what has no size is the batch."""
    if len(open_axes(one.dims)) > 1:
        raise GraphError(f"constants.{one.name}: more than one axis of it has no size")
    return tuple(dim if isinstance(dim, int) else "B" for dim in one.dims)


def _input_axes(dims: Sequence[int | str | None], shared: set[str]) -> Iterator[Axes]:
    """What an input's axes may be: those without a size are time or the batch, each at most once."""
    places = open_axes(dims)
    if not places:
        yield _ones_named(dims)
        return
    for roles in product("TB", repeat=len(places)):
        known = [dims[i] in shared for i in places]
        if len(set(roles)) < len(roles) or any(k and role != "B" for k, role in zip(known, roles, strict=True)):
            continue
        if any(known) and any(role == "B" and not k for k, role in zip(known, roles, strict=True)):
            continue
        chosen = dict(zip(places, roles, strict=True))
        axes = tuple(chosen.get(i, dim) for i, dim in enumerate(dims))
        yield _ones_named([axis if isinstance(axis, int | str) else 1 for axis in axes])


def _ones_named(dims: Sequence[int | str | None]) -> Axes:
    """Leading axes of 1 before the features are time and the batch, whichever is not named yet: they stay 1."""
    axes: list[int | str] = [dim if isinstance(dim, int | str) else 1 for dim in dims]
    spare = [name for name in ("T", "B") if name not in axes]
    ones = [i for i, axis in enumerate(axes[:2]) if axis == 1 and i < len(axes) - 1]
    if len(ones) < len(spare):
        spare = spare[::-1] if "B" in spare else spare
    for i, name in zip(ones, spare, strict=False):
        axes[i] = name
    return tuple(axes)


def _bound(called: Called) -> None:
    for one in (*called.inputs, *(state for _, state in called.states)):
        if prod(one.row) * DTYPES[one.dtype].itemsize > MAX_TENSOR_BYTES:
            raise GraphError(f"one step of {one.name!r} is larger than {MAX_TENSOR_BYTES // 2**20} MiB")


def _with_outputs(called: Called) -> Called | None:
    """The outputs' axes, seen by what changes with the number of steps and sessions; None when it does not run so."""
    rng = np.random.default_rng(0)
    T, B = T0 if called.timed else 1, B0 if called.batched else 1
    seen = []
    for steps, rows in ((T, B), (T - 1 if T > 1 else 1, B), (T, B - 1 if B > 1 else 1)):
        try:
            found, _ = called.raw(called.some_entries(steps, rows, rng), called.some_states(rows, rng), steps, rows)
        except GraphError:
            raise
        except Exception:  # onnxruntime raises many types, none of them public
            return None
        seen.append({name: array.shape for name, array in found.items()})
    fed_back = {pair.output for pair, _ in called.states}
    outputs = []
    for one in called.session.outputs:
        shapes = [shape.get(one.name, ()) for shape in seen]
        if one.name not in fed_back and len({len(shape) for shape in shapes}) == 1:
            outputs.append(Named(one.name, one.dtype, _seen_axes(called, *shapes)))
    outputs = outputs or [replace(one, name=pair.output) for pair, one in called.states]
    return replace(called, outputs=tuple(outputs))


def _seen_axes(called: Called, base: Sequence[int], fewer_steps: Sequence[int], fewer_rows: Sequence[int]) -> Axes:
    axes: list[int | str] = []
    like = called.inputs[0].axes
    for i, (size, short, thin) in enumerate(zip(base, fewer_steps, fewer_rows, strict=True)):
        if size != short:
            axes.append("T" if "T" not in axes else size)
        elif size != thin:
            axes.append("B" if "B" not in axes else size)
        elif size == 1 and i < len(like) and isinstance(like[i], str) and like[i] not in axes and i < len(base) - 1:
            axes.append(like[i])  # an axis that is 1 in every call
        else:
            axes.append(size)
    return tuple(axes)


# ---------------------------------------------------------------------- what is tried


def close(a: Mapping[str, Array] | Sequence[Array], b: Mapping[str, Array] | Sequence[Array]) -> bool:
    """Whether arrays are the same but for rounding."""
    pairs = zip(*(list(x.values()) if isinstance(x, Mapping) else x for x in (a, b)), strict=True)
    return all(_close(x, y) for x, y in pairs)


def _close(a: Array, b: Array) -> bool:
    tolerance = 0.05 if a.dtype == np.float16 else CLOSE
    x, y = a.astype(np.float64), b.astype(np.float64)
    return x.shape == y.shape and bool(np.allclose(x, y, rtol=tolerance, atol=tolerance))


def same(a: Mapping[str, Array] | Sequence[Array], b: Mapping[str, Array] | Sequence[Array]) -> bool:
    """Bit for bit."""
    pairs = zip(*(list(x.values()) if isinstance(x, Mapping) else x for x in (a, b)), strict=True)
    return all(x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs)


def rows_are_apart(called: Called) -> bool:
    """Whether a session's outputs and states do not depend on what the others are fed."""
    if not called.batched:
        return True
    rng = np.random.default_rng(1)
    T = T0 if called.timed else 1
    entries, states = called.some_entries(T, B0, rng), called.some_states(B0, rng)
    before = called.call(entries, states)
    changed = {name: _with(array, np.s_[:, 0], called, name, rng) for name, array in entries.items()}
    after = called.call(changed, states)
    others = [
        ({name: array[:, 1:] for name, array in outputs.items()}, [array[1:] for array in rows])
        for outputs, rows in (before, after)
    ]
    return close(others[0][0], others[1][0]) and close(others[0][1], others[1][1])


def looks_ahead(called: Called) -> bool:
    """Whether an output depends on later inputs."""
    rng = np.random.default_rng(2)
    B = 2 if called.batched else 1
    entries, states = called.some_entries(T0, B, rng), called.some_states(B, rng)
    changed = {name: _with(array, np.s_[-1], called, name, rng) for name, array in entries.items()}
    before, after = (called.call(one, states)[0] for one in (entries, changed))
    early = [{name: array[:-1] for name, array in one.items() if len(array) == T0} for one in (before, after)]
    return not close(*early)


def _with(array: Array, place: Any, called: Called, name: str, rng: np.random.Generator) -> Array:  # noqa: ANN401
    one = next(one for one in called.inputs if one.name == name)
    changed = array.copy()
    part = changed[place]
    changed[place] = part + some(one, part.shape, rng) if part.dtype.kind == "f" else 1 - part
    return changed


def remembers(called: Called) -> bool:
    """Whether an output depends on earlier inputs, in a graph without states."""
    rng = np.random.default_rng(2)
    B = 2 if called.batched else 1
    entries = called.some_entries(T0, B, rng)
    changed = {name: _with(array, np.s_[0], called, name, rng) for name, array in entries.items()}
    before, after = (called.call(one, [])[0] for one in (entries, changed))
    return not same([array[-1] for array in before.values()], [array[-1] for array in after.values()])


def carries(called: Called) -> bool:
    """Whether single steps with carried states are, but for rounding, what one call of all steps gives."""
    rng = np.random.default_rng(3)
    B = 2 if called.batched else 1
    entries, states = called.some_entries(T0, B, rng), called.some_states(B, rng)
    whole, after = called.call(entries, states)
    single, row = called.alone(entries, states)
    timed = {name: array for name, array in whole.items() if len(array) == T0}
    last = {name: array[-1:] for name, array in whole.items() if len(array) != T0}
    ends = {name: single[name][-1:] for name in last}
    return close(timed, {name: single[name] for name in timed}) and close(last, ends) and close(after, row)


def chunks_exactly(called: Called) -> bool:
    """Whether calls of many steps give the bits of single steps, however they are cut."""
    rng = np.random.default_rng(4)
    for B in (1, 7) if called.batched else (1,):
        entries = called.some_entries(16, B, rng)
        expected = called.alone(entries, called.zero(B))
        for cuts in ((16,), (1, 15), (5, 2, 8, 1)):
            found, begin, row = [], 0, called.zero(B)
            for steps in cuts:
                outputs, row = called.call({n: a[begin : begin + steps] for n, a in entries.items()}, row)
                begin += steps
                found.append(outputs)
            whole = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
            if not (same(whole, expected[0]) and same(row, expected[1])):
                return False
    return True


def batches_exactly(called: Called) -> bool:
    """Whether sessions that share a call get the bits that each gets alone."""
    rng = np.random.default_rng(5)
    entries, states = called.some_entries(2, max(BATCHES), rng), called.zero(max(BATCHES))
    expected = called.alone(entries, states)
    for B in BATCHES:
        row = [array[:B] for array in states]
        for t in range(2):
            outputs, row = called.call({name: array[t : t + 1, :B] for name, array in entries.items()}, row)
            if not same(outputs, {name: array[t : t + 1, :B] for name, array in expected[0].items()}):
                return False
        if not same(row, [array[:B] for array in expected[1]]):
            return False
    return True
