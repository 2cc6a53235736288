"""Runs a graph that was made elsewhere: axes anywhere, constants, perhaps one step or one session a call.

At load its golden example, which holds what ONNX Runtime answered to its owner, is run one session and one step at a
time; calls of many steps or sessions are used only where they give the same bits, or where the owner says so.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from service import state
from service.bundle import Bundle, BundleError, Foreign, TensorSpec
from service.graph import Stepping
from service.runner import Called, Folded, Runner, check_close, check_names, check_sizes, digest, equal
from service.state import Array
from service.tensors import Layout, check_constants, entry_of

BATCHES = (2, 3, 7, 16, 64)


class ForeignRunner(Runner):
    """One loaded graph that was made elsewhere.

    If it can not be streamed, an entry is a whole sequence [n, ...], an object in an array, and so are its outputs.
    """

    def __init__(self, bundle: Bundle, threads: int | Literal["auto"]) -> None:
        manifest = bundle.manifest
        self._foreign = cast(Foreign, manifest.foreign)
        shapes = manifest.needed_shapes
        self._inputs = [Layout(spec) for spec in manifest.inputs]
        self._outputs = [Layout(spec, shapes.get(spec.name)) for spec in manifest.outputs]
        try:
            check_constants(self._foreign.constants)
        except ValueError as error:
            raise BundleError(str(error)) from error
        self._constants = [(Layout(constant), constant.value) for constant in self._foreign.constants]
        wanted = [spec.name for spec in manifest.outputs] + [spec.output for spec in manifest.states]
        self._wanted = list(dict.fromkeys(wanted))
        self.chunks_exactly = False
        """whether many steps are one call"""
        super().__init__(bundle, threads)

    def _check_signature(self) -> None:
        manifest, graph = self.manifest, self._graph
        named: tuple[TensorSpec, ...] = (*manifest.inputs, *self._foreign.constants)
        fed = [(s.name, s.dtype, len(s.shape)) for s in named]
        fed += [(s.input, s.dtype, len(s.shape)) for s in manifest.states]
        check_names("inputs", set(fed), graph.inputs)
        fetched = [(s.name, s.dtype, len(s.shape)) for s in manifest.outputs]
        fetched += [(s.output, s.dtype, len(s.shape)) for s in manifest.states]
        check_names("outputs", set(fetched), graph.outputs, spare=True)
        check_sizes(manifest, graph.inputs, graph.outputs)

    def _widen(self) -> None:
        if self._foreign.streamable and self._foreign.batching != "alone":
            super()._widen()

    def _blank(self, rows: int) -> Array:
        dtype, shape = entry_of(self.manifest)
        return np.zeros((1, rows, *shape), dtype)

    def _finite(self, arrays: Sequence[Array]) -> bool:
        if self._foreign.streamable:
            return super()._finite(arrays)
        wholes = [whole for array in arrays if array.dtype.hasobject for whole in array.flat]
        return super()._finite(wholes)

    def _call(self, entries: Array, states: list[Array], wide: bool) -> Called:
        if self._foreign.streamable:
            return super()._call(entries, states, wide)
        specs, initial = self.manifest.states, [state.initial_row(self.manifest.states)]
        wholes = [self._once(sequence[:, None], state.stack(specs, initial), wide)[0] for sequence in entries[0]]
        outputs = [np.empty((1, len(wholes)), object) for _ in self._outputs]
        for i, whole in enumerate(wholes):
            for output, array in zip(outputs, whole, strict=True):
                output[0, i] = array[:, 0]
        return outputs, states

    def _stepping(self, states: list[Array]) -> Stepping | None:
        # Its arrays are put into the graph's own axes at each call.
        return None

    def _run(self, entries: Array, states: list[Array], wide: bool) -> Called:
        if len(entries) == 1 or self.chunks_exactly:
            return self._once(entries, states, wide)
        steps: list[list[Array]] = []
        for t in range(len(entries)):
            outputs, states = self._once(entries[t : t + 1], states, wide)
            steps.append(outputs)
        return [np.concatenate(parts) for parts in zip(*steps, strict=True)], states

    def _once(self, entries: Array, states: list[Array], wide: bool) -> Called:
        """One call of the graph on entries [T, B, ...]: outputs [T, B, ...] and the next states."""
        T, B = entries.shape[:2]
        specs, named = self.manifest.states, entries.dtype.names is not None
        feed = {one.name: one.to_graph(entries[one.name] if named else entries) for one in self._inputs}
        feed.update((one.name, one.filled(value, T, B)) for one, value in self._constants)
        for spec, array in zip(specs, states, strict=True):
            feed[spec.input] = array if spec.batch_axis is not None else array[0]
        found = dict(zip(self._wanted, self._graph.run(self._wanted, feed, B, wide), strict=True))
        after = [found[spec.output] if spec.batch_axis is not None else found[spec.output][None] for spec in specs]
        return [one.from_graph(found[one.name]) for one in self._outputs], after

    # ------------------------------------------------------------------ the golden example

    def _verify_golden(self, bundle: Bundle) -> tuple[bool, str]:
        """Run the golden example again; find out which calls give the bits of one session and one step a call."""
        golden = self._golden(bundle)
        entries = self._joined(golden)
        if not self._foreign.streamable:
            self.batches_exactly = True
            whole = self._wholes(entries)
            self._check(golden, whole)
            return True, digest(self.manifest, whole)
        self.batches_exactly = self.chunks_exactly = False
        plain = self._from_zero(entries)
        self._check(golden, plain)
        name = digest(self.manifest, self._from_zero(entries[:, :1]))
        if self._foreign.stepping == "chunks" and all(one.has_time for one in (*self._inputs, *self._outputs)):
            self.chunks_exactly = True
            self.chunks_exactly = _same(self._from_zero(entries), plain)
        if self._foreign.batching == "alone":
            return False, name
        self.batches_exactly = True
        return self._foreign.batching == "together" or self._batches_agree(entries, plain), name

    def _batches_agree(self, entries: Array, plain: Folded) -> bool:
        width = entries.shape[1]
        for size in BATCHES:
            places = np.arange(size) % width
            together = self._from_zero(entries[:, places])
            expected = Folded(
                {name: array[:, places] for name, array in plain.outputs.items()}, [plain.rows[i] for i in places]
            )
            if not _same(together, expected):
                return False
        return True

    def _from_zero(self, entries: Array) -> Folded:
        return self.run(entries, [state.initial_row(self.manifest.states)] * entries.shape[1])

    def _wholes(self, entries: Array) -> Folded:
        """Sequences [T, B, ...], each whole: outputs [T, B, ...]."""
        objects = np.empty((1, entries.shape[1]), object)
        for i in range(entries.shape[1]):
            objects[0, i] = entries[:, i]
        found = self._from_zero(objects)
        return Folded({name: np.stack(list(array[0]), axis=1) for name, array in found.outputs.items()}, [()])

    def _check(self, golden: Mapping[str, Array], found: Folded) -> None:
        """Raise BundleError when the answers are not the golden ones."""
        expected = {f"ort.output.{name}": array for name, array in found.outputs.items()}
        if self._foreign.streamable:
            columns = zip(*found.rows, strict=True)
            named = zip(self.manifest.states, columns, strict=True)
            expected |= {f"ort.state.{spec.name}": np.stack(column) for spec, column in named}
        for name, array in expected.items():
            check_close(name, array.astype(np.float64), golden[name].astype(np.float64), self.manifest.tolerance)

    def _golden(self, bundle: Bundle) -> dict[str, Array]:
        try:
            golden = safetensors.numpy.load(bundle.golden.read_bytes())
        except SafetensorError as error:
            raise BundleError("the golden example is not a safetensors file") from error
        if missing := sorted(set(self._golden_names()) - set(golden)):
            raise BundleError(f"the golden example lacks {', '.join(missing)}")
        steps = {golden[f"input.{spec.name}"].shape[:2] for spec in self.manifest.inputs}
        fits = [golden[f"input.{spec.name}"].shape[2:] == spec.row_shape for spec in self.manifest.inputs]
        if len(steps) != 1 or 0 in next(iter(steps)) or not all(fits):
            raise BundleError("the golden example's inputs are not [T, B, ...]")
        return golden

    def _golden_names(self) -> Iterator[str]:
        yield from (f"input.{spec.name}" for spec in self.manifest.inputs)
        yield from (f"ort.output.{spec.name}" for spec in self.manifest.outputs)
        if self._foreign.streamable:
            yield from (f"ort.state.{spec.name}" for spec in self.manifest.states)

    def _joined(self, golden: Mapping[str, Array]) -> Array:
        """The golden inputs as entries [T, B, ...]."""
        dtype, shape = entry_of(self.manifest)
        first = golden[f"input.{self.manifest.inputs[0].name}"]
        if dtype.names is None:
            return first.reshape(*first.shape[:2], *shape).astype(dtype)
        entries = np.empty(first.shape[:2], dtype)
        for spec in self.manifest.inputs:
            entries[spec.name] = golden[f"input.{spec.name}"]
        return entries


def _same(a: Folded, b: Folded) -> bool:
    """Bit for bit."""
    outputs = all(equal(array, b.outputs[name]) for name, array in a.outputs.items())
    return outputs and all(state.equal(row, other) for row, other in zip(a.rows, b.rows, strict=True))
