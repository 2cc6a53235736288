"""Runs a bundle's graph on many sessions' states.

At load the bundle's golden example is run again: the answers must be those of training, and rows and chunks must
not change a bit on this machine; where they do, rows are run one at a time and the model says so.
"""

import hashlib
import platform
import threading
from collections.abc import Callable, Iterable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from operator import is_
from time import perf_counter
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from service import pool, state
from service.balance import Balance
from service.bundle import DTYPES, Bundle, BundleError, Manifest, StateSpec, TensorSpec, Window
from service.cores import ALL, Cores
from service.graph import VERSION, Call, Graph, Stepping
from service.state import Array, Row

_TYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}
_TYPES |= {f"tensor({name})": name for name in ("int64", "int32", "float16", "int16", "int8", "uint8", "bool")}

ENTERS_S = 0.001
"""how long a call in another thread is waited for at most until it has begun"""
MANY = 32
"""rows of a roll-out from which on a call takes so long that nothing is gained by arrays that are made once"""

Called = tuple[list[Array], list[Array]]
"""Outputs and next states"""
Begun = Future[Any]
"""A call that is under way in another thread; what it gives is its runner's own affair"""
P = ParamSpec("P")
T = TypeVar("T")
Draw = Callable[[int, dict[str, Array]], Array]
"""From the number of the step and its outputs [B, ...] by name to the next entries [B]"""


@dataclass(frozen=True, slots=True)
class Folded:
    """What a call gives: outputs [T, B, ...] by name, and each row's next state.

    The rows of a fold are slots of a pool, those of a roll-out share the batch's memory.
    """

    outputs: dict[str, Array]
    rows: Sequence[Row]
    finite: bool = True
    """whether every number of outputs and states is finite; if not, some rows' are not"""
    seconds: float = 0.0
    """in the graph"""


class Runner:
    """One loaded graph; `run` folds a chunk of entries into each row's state. Not for two threads at once."""

    def __init__(self, bundle: Bundle, threads: int | Literal["auto"]) -> None:
        self.manifest = bundle.manifest
        self._graph = Graph(bundle.graph, threads)
        self._check_signature()
        self._input = self.manifest.inputs[0]
        self._names = [spec.name for spec in self.manifest.outputs]
        self._fetch = self._names + [spec.output for spec in self.manifest.states]
        self._fed = [spec.input for spec in self.manifest.states]
        self._rolling = _Last(self.manifest.states)
        self._stepped: Stepping | None = None
        # What a windowed session remembers is more than the graph's states: its rows are put together elsewhere.
        is_whole = not isinstance(self.manifest.memory, Window)
        self._pool = pool.Pool(self.manifest.states, self.manifest.outputs) if is_whole else None
        self._widen()
        self._balance = Balance(self._graph.threads == 1 and len(ALL) != 1)
        self._cores = Cores(self._graph.threads)
        self._beside = ThreadPoolExecutor(1, f"ahead-{self.manifest.name}", self._cores.enter)
        self.batches_exactly, self.numerics = self._verify_golden(bundle)

    @property
    def on_graph(self) -> bool:
        """Whether folds of one step wait for the graph, and leave a core to Python."""
        return self._balance.on_graph and not self._is_wide(1)

    def _is_wide(self, steps: int) -> bool:
        """Whether a fold may have two threads: one step comes with so much Python that it needs the other core."""
        return self._graph.is_wide and (steps > 1 or self._balance.hardly_python)

    def run(self, entries: Array, rows: Sequence[Row], wanted: Sequence[int] | None = None) -> Folded:
        """Fold `entries` [T, B, ...] into the states of B rows; all outputs are there, whatever is `wanted`."""
        states = pool.stack(self.manifest.states, rows)
        return self._kept(*self._timed(entries, states, self._is_wide(len(entries))))

    def begin(self, entries: Array, rows: Sequence[Row], wanted: Sequence[int] | None = None) -> Begun:
        """Begin the same in another thread; what is begun is run one after another.

        That thread does nothing but run the graph: for anything else it would have to wait for the GIL.
        """
        states, wide = pool.stack(self.manifest.states, rows), self._is_wide(len(entries))
        begin = self._beside.submit if self._cores.under_way or self._rolling.is_ahead else self._begin_now
        begun = begin(self._timed, entries, states, wide)
        self._cores.begin(not wide)
        return begun

    def cancel(self, begun: Begun) -> bool:
        """Take back what was begun; False: it is too late."""
        if not begun.cancel():
            return False
        self._cores.end()
        return True

    def end(self, begun: Begun) -> Folded:
        """Wait for what was begun."""
        try:
            called = begun.result()
        finally:
            self._cores.end()
        return self._kept(*called)

    def _timed(self, entries: Array, states: list[Array], wide: bool) -> tuple[list[Array], list[Array], float, bool]:
        began = perf_counter()
        outputs, states = self._call(entries, states, wide)
        return outputs, states, perf_counter() - began, wide

    def _kept(self, outputs: list[Array], states: list[Array], seconds: float, wide: bool) -> Folded:
        """What a call gave, its states in slots."""
        steps, rows = outputs[0].shape[:2]
        self._balance.took(seconds * self._graph.threads_of(rows, wide), steps * rows)
        named = self._named(outputs)
        last = {name: array[-1] for name, array in named.items()}
        kept = self._pool.keep(states, last, outputs[0].shape[1]) if self._pool is not None else None
        after = kept if kept is not None else state.unstack(self.manifest.states, states)
        return Folded(named, after, self._finite((*outputs, *states)), seconds)

    def roll(
        self, entries: Array, rows: Sequence[Row], steps: Iterable[int], draw: Draw, ahead: bool = False
    ) -> Folded:
        """Fold `entries` [B], one a row, and then those that are drawn; `outputs` are those of the last step.

        `steps` are their numbers, at least one, and may end early.
        With `ahead` the step after the last is begun at once, beside what the caller does until the next roll-out.
        """
        states = self._rolling.states_of(rows)
        early = self._rolling.early(rows, entries)
        stepping = self._stepping(states) if early is None and not ahead else None
        finite = True
        for step in steps:
            if stepping is not None:
                outputs = stepping(entries)
            else:
                outputs, states = early.result() if early is not None else self._call(entries[None], states, True)
            early = None
            finite = finite and all(map(state.all_finite, outputs))
            entries = draw(step, {name: array[0] for name, array in zip(self._names, outputs, strict=True)})
        if stepping is not None:
            outputs, states = [array.copy() for array in outputs], stepping.states
        early = self._begin_now(self._call, entries[None], states, True) if ahead else None
        finite = finite and all(map(state.all_finite, states))
        after = self._rolling.take(states)
        if early is not None:
            self._rolling.begin(entries, early)
        return Folded(self._named(outputs), after, finite)

    def _begin_now(self, call: Callable[P, T], *arguments: P.args, **more: P.kwargs) -> Future[T]:
        """Begin a call in the other thread, and leave the interpreter to it until it has begun."""
        entered = threading.Event()

        def enter() -> T:
            entered.set()
            return call(*arguments, **more)

        begun = self._beside.submit(enter)
        entered.wait(ENTERS_S)
        return begun

    def _stepping(self, states: list[Array]) -> Stepping | None:
        """Steps from these states on, in the arrays of the last ones of as many rows; None where that does not pay."""
        specs, rows = self.manifest.states, states[0].shape[self.manifest.states[0].stack_axis]
        if rows >= MANY or not (self.batches_exactly or rows == 1):
            return None
        if self._stepped is None or self._stepped.rows != rows:
            entries = np.empty((1, rows, *self._input.row_shape), self._input.dtype)
            outputs = {s.name: np.empty((1, rows, *s.row_shape), DTYPES[s.dtype]) for s in self.manifest.outputs}
            links = {(s.input, s.output): np.empty(a.shape, a.dtype) for s, a in zip(specs, states, strict=True)}
            self._stepped = self._graph.stepping((self._input.name, entries), outputs, links)
        self._stepped.begin(states)
        return self._stepped

    def _widen(self) -> None:
        """Let calls have two threads where that pays."""
        self._graph.widen(self._trial)

    def _trial(self, rows: int) -> Call:
        entries = self._blank(rows)
        states = state.stack(self.manifest.states, [state.initial_row(self.manifest.states)] * rows)

        def call(wide: bool) -> Sequence[Array]:
            outputs, after = self._run(entries, states, wide)
            return [*outputs, *after]

        return call

    def _finite(self, arrays: Sequence[Array]) -> bool:
        return all(map(state.all_finite, arrays))

    def _blank(self, rows: int) -> Array:
        """One step of entries."""
        return np.zeros((1, rows, *self._input.row_shape))

    def _check_signature(self) -> None:
        """Raise BundleError when the graph is not what the manifest says."""
        said_in = [(s.name, s.dtype, len(s.shape)) for s in self.manifest.inputs]
        said_in += [(s.input, s.dtype, len(s.shape)) for s in self.manifest.states]
        check_names("inputs", set(said_in), self._graph.inputs)
        said_out = [(s.name, s.dtype, len(s.shape)) for s in self.manifest.outputs]
        said_out += [(s.output, s.dtype, len(s.shape)) for s in self.manifest.states]
        check_names("outputs", set(said_out), self._graph.outputs)
        check_sizes(self.manifest, self._graph.inputs, self._graph.outputs)
        if len(self.manifest.inputs) != 1 or not _is_time_major(self.manifest.inputs[0]):
            raise BundleError("the graph must have one input whose first axes are T and B")
        if not all(_is_time_major(spec) for spec in self.manifest.outputs):
            raise BundleError("the graph's outputs must begin with the axes T and B")

    def _verify_golden(self, bundle: Bundle) -> tuple[bool, str]:
        """Run the golden example again: (whether batching changes no bit here, sha256 of the bits)."""
        return _verify_golden(self, bundle)

    def close(self) -> None:
        """End the thread that works ahead."""
        self._beside.shutdown()

    def _named(self, outputs: list[Array]) -> dict[str, Array]:
        return dict(zip(self._names, outputs, strict=True))

    def _call(self, entries: Array, states: list[Array], wide: bool) -> Called:
        """(outputs, next states) of one call, or of one a row where rows change each other's bits."""
        if self.batches_exactly or entries.shape[1] == 1:
            return self._run(entries, states, wide)
        axes = [spec.stack_axis for spec in self.manifest.states]
        alone = [
            self._run(entries[:, i : i + 1], [s.take([i], axis) for s, axis in zip(states, axes, strict=True)], wide)
            for i in range(entries.shape[1])
        ]
        outputs = [np.concatenate(parts, axis=1) for parts in zip(*(one[0] for one in alone), strict=True)]
        after = zip(zip(*(one[1] for one in alone), strict=True), axes, strict=True)
        return outputs, [np.concatenate(parts, axis=axis) for parts, axis in after]

    def _run(self, entries: Array, states: list[Array], wide: bool) -> Called:
        feed = {self._input.name: entries.astype(self._input.dtype, copy=False)}
        feed.update(zip(self._fed, states, strict=True))
        fetched = self._graph.run(self._fetch, feed, entries.shape[1], wide)
        return fetched[: len(self._names)], fetched[len(self._names) :]


class _Last:
    """The batch of the last call: if it comes again, its arrays are used, and what was begun early for it counts."""

    def __init__(self, specs: Sequence[StateSpec]) -> None:
        self._specs = specs
        self._rows: list[Row] = []
        self._states: list[Array] = []
        self._entries: Array | None = None
        self._early: Future[Called] | None = None

    @property
    def is_ahead(self) -> bool:
        """Whether a call that was begun early is under way."""
        return self._early is not None and not self._early.done()

    def states_of(self, rows: Sequence[Row]) -> list[Array]:
        """The rows' states as a batch."""
        return self._states if self._is(rows) else pool.stack(self._specs, rows)

    def early(self, rows: Sequence[Row], entries: Array) -> Future[Called] | None:
        """The call that was begun with these rows and entries, if there is one."""
        early, self._early = self._early, None
        same = early is not None and self._is(rows) and bool((entries == self._entries).all())
        return early if same else None

    def take(self, states: list[Array]) -> list[Row]:
        """The next states as rows, which share the batch's memory."""
        self._states, self._rows, self._early = states, state.unstack(self._specs, states), None
        return list(self._rows)

    def begin(self, entries: Array, early: Future[Called]) -> None:
        """Note a call that was begun with the rows that were just taken."""
        self._entries, self._early = entries, early

    def _is(self, rows: Sequence[Row]) -> bool:
        return len(rows) == len(self._rows) and all(map(is_, rows, self._rows))


class Node(Protocol):
    """An input or output as onnxruntime describes it."""

    name: str
    type: str
    shape: list[int | str | None]


Signature = tuple[str, str, int]
"""Name, type and rank of a tensor"""


def check_names(kind: str, said: Set[Signature], found: Sequence[Node], spare: bool = False) -> None:
    """Raise BundleError unless the graph's tensors are those of the manifest.

    With `spare` it may have others too, and say nothing of a tensor's axes.
    """
    ranks = {name: rank for name, _, rank in said} if spare else {}
    there = {
        (node.name, _TYPES.get(node.type, node.type), len(node.shape) or ranks.get(node.name, 0)) for node in found
    }
    if said != there and not (spare and said <= there):
        odd = sorted(str(signature) for signature in (said - there if spare else said ^ there))
        raise BundleError(f"the graph's {kind} do not match the manifest: {', '.join(odd)[:300]}")


def check_sizes(manifest: Manifest, inputs: Sequence[Node], outputs: Sequence[Node]) -> None:
    """Every axis that both the graph and the manifest give a number to has the same."""
    said: dict[str, tuple[int | str, ...]] = {s.name: s.shape for s in (*manifest.inputs, *manifest.outputs)}
    for spec in manifest.states:
        said[spec.input] = said[spec.output] = spec.shape
    for node in (*inputs, *outputs):
        pairs = zip(said.get(node.name, ()), node.shape, strict=False)
        if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
            raise BundleError(f"the graph's {node.name!r} has the shape {node.shape}, not {list(said[node.name])}")


def _is_time_major(spec: TensorSpec) -> bool:
    return spec.shape[:2] == ("T", "B")


def _verify_golden(runner: Runner, bundle: Bundle) -> tuple[bool, str]:
    """Run the golden example again: (whether batching changes no bit here, sha256 of the bits)."""
    golden = _golden(bundle)
    runner.batches_exactly = True
    entries = golden["input"]
    zero = [state.initial_row(runner.manifest.states)] * entries.shape[1]
    whole = runner.run(entries, zero)
    _compare(runner.manifest, golden, whole)
    if not _chunks_agree(runner, entries, whole):
        raise BundleError("the graph gives other bits for one call of T steps than for T calls of one step")
    alone = runner.run(entries[:, :1], zero[:1])
    exact = all(equal(array[:, :1], alone.outputs[name]) for name, array in whole.outputs.items())
    exact = exact and all(equal(a, b) for a, b in zip(whole.rows[0], alone.rows[0], strict=True))
    return exact, digest(runner.manifest, alone)


def _golden(bundle: Bundle) -> dict[str, Array]:
    try:
        golden = safetensors.numpy.load(bundle.golden.read_bytes())
    except SafetensorError as error:
        raise BundleError("the golden example is not a safetensors file") from error
    needed = {"input"} | {f"torch.output.{spec.name}" for spec in bundle.manifest.outputs}
    needed |= {f"torch.state.{spec.name}" for spec in bundle.manifest.states}
    if missing := sorted(needed - set(golden)):
        raise BundleError(f"the golden example lacks {', '.join(missing)}")
    if golden["input"].ndim < 2 or 0 in golden["input"].shape:
        raise BundleError("the golden example's input is not [T, B, ...]")
    return golden


def _compare(manifest: Manifest, golden: dict[str, Array], whole: Folded) -> None:
    for output in manifest.outputs:
        if whole.outputs[output.name].shape[2:] != output.shape[2:]:
            raise BundleError(f"the graph's {output.name!r} is not of the manifest's shape")
    scale = {"mean": _target_std(manifest), "quantiles": _target_std(manifest)}
    for name, array in whole.outputs.items():
        size = scale.get(name, 1.0)
        check_close(name, array / size, golden[f"torch.output.{name}"] / size, manifest.tolerance)
    states = state.stack(manifest.states, whole.rows)
    for spec, array in zip(manifest.states, states, strict=True):
        check_close(spec.name, array, golden[f"torch.state.{spec.name}"], manifest.tolerance)


def _target_std(manifest: Manifest) -> Array:
    return np.array([target.std for target in manifest.targets] * len(manifest.horizons) or [1.0])


def check_close(name: str, found: Array, expected: Array, tolerance: float) -> None:
    """Raise BundleError when an array is not the golden one."""
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=tolerance, atol=tolerance):
        raise BundleError(f"the graph's {name!r} differs from the golden example")


def _chunks_agree(runner: Runner, entries: Array, whole: Folded) -> bool:
    rows: Sequence[Row] = [state.initial_row(runner.manifest.states)] * entries.shape[1]
    for t in range(len(entries)):
        step = runner.run(entries[t : t + 1], rows)
        if not all(equal(array[0], whole.outputs[name][t]) for name, array in step.outputs.items()):
            return False
        rows = step.rows
    return all(
        equal(a, b) for row, other in zip(rows, whole.rows, strict=True) for a, b in zip(row, other, strict=True)
    )


def equal(a: Array, b: Array) -> bool:
    """Bit for bit."""
    return a.tobytes() == b.tobytes()


def digest(manifest: Manifest, folded: Folded) -> str:
    """Names the arithmetic: equal digests promise equal bits."""
    found = hashlib.sha256()
    for part in (manifest.graph_sha256, VERSION, platform.machine(), manifest.sampler):
        found.update(part.encode() + b"\0")
    for array in (*folded.outputs.values(), *folded.rows[0]):
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]
