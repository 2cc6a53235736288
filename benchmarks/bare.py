"""The limit: a loop over the graph in ONNX Runtime alone, one process, nothing between the calls."""

import time
from typing import Any

import numpy as np
import onnxruntime

from service.bundle import Bundle

Array = np.ndarray[Any, Any]

WARM_S = 0.2


class Bare:
    """A bundle's graph, with ONNX Runtime's own settings."""

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(bundle.graph), options, providers=["CPUExecutionProvider"])
        self._input = bundle.manifest.inputs[0].name
        self._states = bundle.manifest.states
        self._fetch = [bundle.manifest.outputs[0].name, *(state.output for state in self._states)]

    def initial(self, rows: int) -> list[Array]:
        """States at position 0."""
        shapes = [[axis if isinstance(axis, int) else rows for axis in state.shape] for state in self._states]
        return [np.zeros(shape, state.dtype) for shape, state in zip(shapes, self._states, strict=True)]

    def step(self, symbols: Array, states: list[Array]) -> tuple[Array, list[Array]]:
        """A call: symbols [T, B] to outputs [T, B, ...], and the next states."""
        fed = {state.input: array for state, array in zip(self._states, states, strict=True)}
        outputs, *after = self._session.run(self._fetch, {self._input: symbols, **fed})
        return outputs, after

    def steps_per_s(self, rows: int, seconds: float, steps: int = 1) -> float:
        """Steps a second, of all rows: calls of `steps` steps, the most likely symbol fed back."""
        symbols, states = np.zeros((steps, rows), np.int64), self.initial(rows)
        warm = time.perf_counter() + min(WARM_S, seconds)
        while time.perf_counter() < warm:
            _, states = self.step(symbols, states)
        calls, begun = 0, time.perf_counter()
        while (now := time.perf_counter()) - begun < seconds or calls == 0:
            outputs, states = self.step(symbols, states)
            symbols[:] = outputs[-1].argmax(-1)
            calls += 1
        return calls * rows * steps / (now - begun)
