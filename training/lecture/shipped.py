"""A shipped model through its ONNX bundle, as the service runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.bundle import Manifest, load
from training.data import DataError
from training.parity import Tensors, ort_step

Floats = NDArray[np.float32]


class Shipped:
    """The newest version of a model in a folder of bundles."""

    manifest: Manifest

    def __init__(self, models: Path, name: str) -> None:
        versions = sorted(int(path.name) for path in (models / name).glob("[1-9]*") if path.name.isdecimal())
        if not versions:
            raise DataError(f"{models} holds no model {name!r}: give the folder of the shipped models with --models")
        bundle = load(models / name / str(versions[-1]))
        self.manifest = bundle.manifest
        self.version = versions[-1]
        self._step = ort_step(bundle.graph.read_bytes())
        self._known = {symbol: i for i, symbol in enumerate(self.manifest.symbols)}

    def ids(self, text: str) -> list[int]:
        """The symbols of a text."""
        splitter = self.manifest.splitter
        assert splitter is not None  # every model that takes text has one
        return [self._known[symbol] for symbol in splitter.split(text)]

    def logits(self, rows: list[list[int]]) -> Floats:
        """[T, B, classes] over rows of ids, each from a zero state; shorter rows are padded at their end."""
        longest = max(map(len, rows))
        entries = np.array([row + [0] * (longest - len(row)) for row in rows], dtype=np.int64).T
        outputs, _ = self._step(entries, self._zeros(len(rows)))
        return outputs["logits"]

    def logprobs(self, texts: list[str]) -> list[Floats]:
        """Nats of each symbol given those before it; the first follows the start symbol."""
        rows = [self.ids(text) for text in texts]
        start = self._known[self.manifest.start_symbol or "\n"]
        logits = self.logits([[start, *row[:-1]] for row in rows]).astype(np.float64)
        chances = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        chances -= logits.max(-1, keepdims=True)
        return [chances[np.arange(len(row)), i, row].astype(np.float32) for i, row in enumerate(rows)]

    def _zeros(self, rows: int) -> Tensors:
        def shape(dimensions: list[Any]) -> list[int]:
            return [rows if not isinstance(size, int) else size for size in dimensions]

        return {state.name: np.zeros(shape(list(state.shape)), np.float32) for state in self.manifest.states}
