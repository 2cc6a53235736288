"""Windowed memory: each answer is the fold of the last W entries from the initial state.

It is a step function like any other, `(input, state) -> (output, state')`, whose state holds the last W entries
beside the graph's own states after them. So the log, snapshots, forks, forecasts and all else that folds know nothing
of it, and a session's state depends on its last W entries alone, however they came.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import perf_counter
from typing import Literal

import numpy as np

from service import state
from service.bundle import DTYPES, Bundle, TensorSpec, Window
from service.foreign import ForeignRunner
from service.runner import Begun, Draw, Folded, Runner
from service.state import Array, Row
from service.tasks import Output

MOST_WINDOWS = 128
"""that are folded in one call"""
MOST_NUMBERS = 4_000_000
"""of inputs or of outputs in one call"""


class Windowed:
    """A runner whose rows are windows. Like a Runner it is not for two threads at once.

    A row is the graph's states after the window, the last W entries (the newest last), and how many of them there are.
    """

    def __init__(self, runner: Runner, window: int) -> None:
        self.manifest = runner.manifest
        self.batches_exactly = runner.batches_exactly
        self.numerics = runner.numerics
        self.on_graph = False  # a call is as much Python as graph
        self._runner = runner
        self._window = window
        self._initial = state.initial_row(self.manifest.states)
        entry = self.manifest.inputs[0].shape[2:]
        numbers = max(int(np.prod([axis for axis in entry if isinstance(axis, int)])), self.manifest.output_numbers)
        self._steps = max(1, min(window, MOST_NUMBERS // numbers))
        self._windows = max(1, min(MOST_WINDOWS, MOST_NUMBERS // (numbers * self._steps)))
        self._beside = ThreadPoolExecutor(1, thread_name_prefix=f"windows-{self.manifest.name}")

    def run(self, entries: Array, rows: Sequence[Row], wanted: Sequence[int] | None = None) -> Folded:
        """Take `entries` [T, B, ...] into the windows of B rows.

        `wanted`: how many of each row's last outputs are looked at, at least 1 (None: all); others may be zero.
        """
        began, steps = perf_counter(), len(entries)
        counts = np.array([int(row[-1][0]) for row in rows])
        before, _ = state.stack(self.manifest.session_states[-2:], [row[-2:] for row in rows])
        lines = np.concatenate([before, np.moveaxis(entries, 1, 0)], axis=1)
        ends = counts[:, None] + np.arange(1, steps + 1)  # entries up to each position, [B, T]
        asked = np.arange(steps) >= steps - np.array([steps] * len(rows) if wanted is None else wanted)[:, None]
        taken = _Taken(self.manifest.outputs, steps, len(rows))
        self._grow(taken, entries, rows, np.minimum(self._window - counts, steps))
        self._slide(taken, lines, *np.nonzero(asked & (ends > self._window)))
        windows = np.ascontiguousarray(lines[:, steps:]).astype(before.dtype, copy=False)
        lengths = np.minimum(counts + steps, self._window).astype(np.int32)[:, None]
        after = [(*row, *kept) for row, *kept in zip(taken.rows, windows, lengths, strict=True)]
        return Folded(taken.outputs, after, taken.finite, perf_counter() - began)

    def _grow(self, taken: "_Taken", entries: Array, rows: Sequence[Row], steps: Array) -> None:
        """Windows that are not full yet: the state is carried for as many `steps` [B] as fit."""
        growing = np.flatnonzero(steps > 0)
        if len(growing):
            most = int(steps[growing].max())
            folded = self._runner.run(entries[:most, growing], [rows[i][:-2] for i in growing.tolist()])
            t, i = np.nonzero(np.arange(most)[:, None] < steps[growing])
            taken.put(t, growing[i], {name: array[t, i] for name, array in folded.outputs.items()})
            taken.leave(growing, folded.rows)

    def _slide(self, taken: "_Taken", lines: Array, rows: Array, positions: Array) -> None:
        """Full windows, each from the initial state: the one that ends at `positions[n]` of `rows[n]`."""
        views = np.moveaxis(np.lib.stride_tricks.sliding_window_view(lines, self._window, axis=1), -1, 0)
        for begin in range(0, len(rows), self._windows):
            b, t = rows[begin : begin + self._windows], positions[begin : begin + self._windows]
            outputs, after = self._fold(views[:, b, t + 1])
            taken.put(t, b, outputs)
            taken.leave(b, after)

    def _fold(self, windows: Array) -> tuple[Output, Sequence[Row]]:
        """Windows [W, N, ...] from the initial state: the last outputs [N, ...] by name, the states after them."""
        rows: Sequence[Row] = [self._initial] * windows.shape[1]
        for begin in range(0, len(windows), self._steps):
            folded = self._runner.run(np.ascontiguousarray(windows[begin : begin + self._steps]), rows)
            rows = folded.rows
        return {name: array[-1] for name, array in folded.outputs.items()}, rows

    def begin(self, entries: Array, rows: Sequence[Row], wanted: Sequence[int] | None = None) -> Begun:
        """Begin the same in another thread; what is begun is run one after another."""
        return self._beside.submit(self.run, entries, rows, wanted)

    def cancel(self, begun: Begun) -> bool:
        """Take back what was begun; False: it is too late."""
        return begun.cancel()

    def end(self, begun: Begun) -> Folded:
        """Wait for what was begun."""
        folded: Folded = begun.result()
        return folded

    def roll(
        self, entries: Array, rows: Sequence[Row], steps: Iterable[int], draw: Draw, ahead: bool = False
    ) -> Folded:
        """Take `entries` [B], one a row, and then those that are drawn; `outputs` are those of the last step."""
        finite = True
        for step in steps:
            folded = self.run(entries[None], rows)
            rows, finite = folded.rows, finite and folded.finite
            entries = draw(step, {name: array[0] for name, array in folded.outputs.items()})
        return replace(folded, finite=finite)

    def close(self) -> None:
        """End the threads that work ahead."""
        self._beside.shutdown()
        self._runner.close()


class _Taken:
    """What a call has given so far: outputs [T, B, ...], and each row's states after its last step."""

    def __init__(self, specs: Sequence[TensorSpec], steps: int, rows: int) -> None:
        self.outputs: Output = {
            spec.name: np.zeros((steps, rows, *spec.shape[2:]), DTYPES[spec.dtype]) for spec in specs
        }
        self.rows: list[Row] = [()] * rows

    def put(self, steps: Array, rows: Array, outputs: Output) -> None:
        """The outputs [n, ...] of row `rows[n]` at step `steps[n]`."""
        for name, array in outputs.items():
            self.outputs[name][steps, rows] = array

    def leave(self, rows: Array, states: Sequence[Row]) -> None:
        """The states of `rows` after a fold; those of a later position come later."""
        for i, row in zip(rows.tolist(), states, strict=True):
            self.rows[i] = row

    @property
    def finite(self) -> bool:
        """Whether all numbers are finite."""
        outputs = all(map(state.all_finite, self.outputs.values()))
        return outputs and all(map(state.finite, self.rows))


Served = Runner | Windowed
"""What an engine runs."""


def open_runner(bundle: Bundle, threads: int | Literal["auto"]) -> Served:
    """The runner of a bundle, with the memory that its manifest asks for; raises BundleError."""
    manifest = bundle.manifest
    runner = Runner(bundle, threads) if manifest.foreign is None else ForeignRunner(bundle, threads)
    memory = manifest.memory
    return Windowed(runner, memory.window) if isinstance(memory, Window) else runner
