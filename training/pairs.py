"""Inputs and outputs of somebody's own module: does the exported graph say the same?

An .npz file, batch first. As the module takes and gives them: `inputs` [N, T, F] scaled values or [N, T] symbols, and
`outputs` [N, T, ...], or [N, ...] at the last step. In the data's own units: `values` and `predictions`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training import parity
from training.model import OwnHead, RecurrentModel, ValueEncoder
from training.own import LOGITS
from training.parity import Array, ExportError, Tensors
from training.spec import Spec

TOLERANCE = 1e-4
GOLDEN_ROWS, GOLDEN_STEPS = 7, 64

Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class Pairs:
    """What goes into a network from the zero state, and what comes out."""

    entries: Array
    """[T, N, ...], in the data's own units"""
    outputs: Tensors
    """by name, [T, N, ...], or [1, N, ...] of the last step; of a head that ends in a softmax the logarithms"""
    softmax: bool

    @property
    def every_step(self) -> bool:
        """Whether outputs of all steps are there."""
        return len(next(iter(self.outputs.values()))) == len(self.entries)


def read(given: Arrays | Path, module: RecurrentModel, spec: Spec) -> Pairs:
    """Pairs from an .npz file or arrays by name; raises ExportError when they do not fit the network."""
    arrays = read_arrays(given, "check") if isinstance(given, Path) else given
    entries = entries_of(arrays, module, "check")
    name = "predictions" if "predictions" in arrays else "outputs"
    if name not in arrays:
        raise ExportError(
            "check: outputs (as the module gives them) or predictions (in the data's own units) are missing"
        )
    softmax = bool(spec.head) and spec.head[-1] in LOGITS
    raw = _along_time(arrays[name], entries, _width(module), name)
    if not module.config.targets:
        return Pairs(entries, {"logits": _logarithms(raw, str(spec.head[-1]) if softmax else "")}, softmax)
    assert isinstance(module.head, OwnHead)
    said = module.head.said(torch.from_numpy(raw), scaled=name == "outputs")
    return Pairs(entries, {key: value.numpy() for key, value in said.items()}, softmax)


def read_arrays(path: Path, what: str) -> dict[str, Array]:
    """The arrays of an .npz file, none of them pickled; raises ExportError."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise ExportError(f"{what}: {path.name} is not there") from error
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise ExportError(f"{what}: {path.name} is not an .npz file of plain arrays") from error


def entries_of(arrays: Arrays, module: RecurrentModel, what: str) -> Array:
    """`values`, or `inputs` with the scaling undone, as entries [T, N, ...]; raises ExportError."""
    name = "values" if "values" in arrays else "inputs"
    if name not in arrays:
        raise ExportError(f"{what}: inputs (as the module takes them) or values (in the data's own units) are missing")
    found, vocabulary = np.asarray(arrays[name]), module.config.vocabulary
    wanted = (int(found.ndim == 2),) if vocabulary else (len(module.config.periods),)
    if found.ndim != (2 if vocabulary else 3) or 0 in found.shape or (not vocabulary and found.shape[2:] != wanted):
        shape = "[N, T]" if vocabulary else f"[N, T, {wanted[0]}]"
        raise ExportError(f"{what}: {name} is {list(found.shape)}, but {shape} is needed")
    if found.dtype.kind not in ("iu" if vocabulary else "iuf") or not np.isfinite(found).all():
        raise ExportError(f"{what}: {name} must hold {'ids of symbols' if vocabulary else 'finite numbers'}")
    if vocabulary:
        if found.min() < 0 or found.max() >= vocabulary:
            raise ExportError(f"{what}: {name} must lie in 0..{vocabulary - 1}")
        return np.ascontiguousarray(found.T, np.int64)
    if name == "inputs":
        assert isinstance(module.encoder, ValueEncoder)
        mean, scale = module.encoder.mean.double().numpy(), module.encoder.scale.double().numpy()
        found = found * scale + mean
    return np.ascontiguousarray(np.moveaxis(found, 1, 0), np.float32)


def compare(pairs: Pairs, step: parity.Step, module: RecurrentModel) -> dict[str, Any]:
    """How far the graph is from the pairs, in each target's scale or in logits; raises ExportError above TOLERANCE."""
    steps, sequences = pairs.entries.shape[:2]
    ours, _ = step(pairs.entries, parity.zero_states(module, sequences))
    if pairs.softmax:
        ours = {"logits": _log_softmax(ours["logits"])}
    shown = {name: array[-len(pairs.outputs[name]) :] for name, array in ours.items()}
    apart = [np.abs(shown[name] - theirs) / _size(module, theirs) for name, theirs in pairs.outputs.items()]
    furthest = max(apart, key=lambda array: float(np.nan_to_num(array, nan=np.inf).max()))
    greatest = float(np.nan_to_num(furthest, nan=np.inf).max())
    if not greatest <= TOLERANCE:
        t, n = np.unravel_index(int(np.nan_to_num(furthest, nan=np.inf).argmax()), furthest.shape)[:2]
        at = int(t) + steps - len(furthest) + 1
        raise ExportError(
            f"check: the graph's output differs from your module's by {greatest:.3g} at step {at} of sequence {int(n)} "
            f"(in units of {'its target' if module.config.targets else 'a logit'}"
            f"; at most {TOLERANCE:g} is allowed)"
        )
    return {"sequences": sequences, "steps": steps, "greatest": greatest, "tolerance": TOLERANCE}


def golden(pairs: Pairs, module: RecurrentModel) -> tuple[Array, Tensors]:
    """Entries [T, 7, ...] of a golden example that begins with the pairs, and their outputs where they are known."""
    steps = min(len(pairs.entries), GOLDEN_STEPS) if pairs.every_step else len(pairs.entries)
    entries = parity.plausible_entries(module, steps, GOLDEN_ROWS)
    rows = min(pairs.entries.shape[1], GOLDEN_ROWS)
    entries[:, :rows] = pairs.entries[:steps, :rows]
    if pairs.softmax:
        return entries, {}
    kept = slice(0, steps) if pairs.every_step else slice(0, 1)
    return entries, {name: array[kept, :rows] for name, array in pairs.outputs.items()}


def _width(module: RecurrentModel) -> int:
    """Numbers that the module gives at a step."""
    assert isinstance(module.head, OwnHead)
    config = module.config
    return len(module.head.order) if config.targets else config.labels or config.vocabulary


def _along_time(found: Array, entries: Array, width: int, name: str) -> Array:
    """Outputs [N, T, width], [N, width] and the like as [T or 1, N, width] float32."""
    found = np.asarray(found)
    steps, sequences = entries.shape[:2]
    fits = found.ndim and len(found) == sequences and found.size in (sequences * steps * width, sequences * width)
    if not fits or found.dtype.kind not in "iuf" or not np.isfinite(found).all():
        needed = f"[{sequences}, {steps}, {width}], or [{sequences}, {width}] at the last step"
        raise ExportError(f"check: {name} is {found.dtype} {list(found.shape)}, but finite numbers {needed} are needed")
    shaped = found.reshape(sequences, -1, width)
    return np.ascontiguousarray(np.moveaxis(shaped, 1, 0), np.float32)


def _logarithms(raw: Array, ending: str) -> Array:
    """Logits as they are; of what a softmax gave the logarithm."""
    return np.log(np.maximum(raw, np.finfo(np.float32).tiny)) if ending == "softmax" else raw


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _size(module: RecurrentModel, theirs: Array) -> Array:
    """What a difference is measured in."""
    if not module.config.targets:
        return np.maximum(1, np.abs(theirs))
    return np.maximum(parity.target_std(module), np.abs(theirs) / 1000)
