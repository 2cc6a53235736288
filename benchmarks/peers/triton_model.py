"""The model as Triton's Python backend runs it: all requests of a batch in one call, a dict of states.

It runs in Triton's own environment and imports nothing of the project.
"""

import json
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton  # type: ignore[import-not-found]


class TritonPythonModel:
    """What the backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph that the configuration names."""
        said = {name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(said["threads"])
        self.session = onnxruntime.InferenceSession(said["graph"], options, providers=["CPUExecutionProvider"])
        self.symbols, *states = self.session.get_inputs()
        self.names = [state.name for state in states]
        self.zero = [np.zeros((state.shape[0], 1, state.shape[2]), np.float32) for state in states]
        self.fetch = [output.name for output in self.session.get_outputs()]
        self.states: dict[int, list[Any]] = {}

    def execute(self, requests: list[Any]) -> list[Any]:
        """One step of each request's sequence."""
        tokens = [triton.get_input_tensor_by_name(request, "token").as_numpy()[0, 0] for request in requests]
        starts = [triton.get_input_tensor_by_name(request, "start").as_numpy()[0, 0] for request in requests]
        ids = [request.correlation_id() for request in requests]
        rows = [self.zero if start else self.states[id] for id, start in zip(ids, starts, strict=True)]
        fed = {name: np.concatenate(arrays, 1) for name, *arrays in zip(self.names, *rows, strict=True)}
        logits, *after = self.session.run(self.fetch, {self.symbols.name: np.array([tokens]), **fed})
        best = logits[0].argmax(-1)
        values = logits[0][np.arange(len(rows)), best]
        for i, id in enumerate(ids):
            self.states[id] = [array[:, i : i + 1] for array in after]
        return [
            triton.InferenceResponse(
                [triton.Tensor("id", best[i : i + 1, None]), triton.Tensor("value", values[i : i + 1, None])]
            )
            for i in range(len(rows))
        ]
