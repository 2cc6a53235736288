"""Carried on, or from the last W steps? A network's figure both ways on labelled sequences.

An .npz file, batch first: `values` [N, T, F] in the data's own units (or `inputs` as the module takes them, or symbols
[N, T]), with `labels` [N, T] or [N] for a classifier, `targets` [N, T, K] or [N, K] for a regressor or for a forecaster
of what is no feature. A CSV: a column a feature, and `label` or a column a target, of which a forecaster predicts the
next row's; `series` where there are several entities.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from service.bundle import Window
from training.model import OwnHead, RecurrentModel
from training.pairs import entries_of, read_arrays
from training.parity import Array, ExportError
from training.spec import Spec

TRIED = (16, 64)
"""windows that a carried memory is compared with"""
MOST_STEPS = 4_000_000
"""that are folded for one figure; of more positions some are taken, evenly"""
WINDOWS = 1024
"""folded at once"""


@dataclass(frozen=True)
class Labelled:
    """One sequence, and what is right at its steps."""

    entries: Array
    """[T, ...]"""
    truth: Array
    """[T] labels or symbols (-1: not known), [T, K] values (NaN: not known)"""

    @property
    def known(self) -> Array:
        """The steps at which the truth is known."""
        nothing = np.isnan(self.truth).any(axis=1) if self.truth.ndim == 2 else self.truth < 0
        return np.flatnonzero(~nothing)


def read(path: Path, module: RecurrentModel, spec: Spec) -> list[Labelled]:
    """Labelled sequences from a file; raises ExportError."""
    found = list(_from_csv(path, spec) if path.suffix == ".csv" else _from_arrays(path, module, spec))
    if not any(len(sequence.known) for sequence in found):
        raise ExportError(f"data: {path.name} holds no step whose answer is known")
    return found


def both_ways(module: RecurrentModel, data: Sequence[Labelled], spec: Spec) -> dict[str, dict[str, float]]:
    """Figures by memory: carried, and each window in question."""
    windows = (spec.memory.window,) if isinstance(spec.memory, Window) else TRIED
    return {"carried": figure(module, data, spec, None)} | {
        f"window {window}": figure(module, data, spec, window) for window in windows
    }


def figure(module: RecurrentModel, data: Sequence[Labelled], spec: Spec, window: int | None) -> dict[str, float]:
    """Share of steps right, bits a symbol, or the mean absolute error of each target; at the same steps for all."""
    chosen = _chosen(data, spec)
    said = [_answers(module, one, at, window) for one, at in zip(data, chosen, strict=True) if len(at)]
    answers = np.concatenate(said)
    truth = np.concatenate([one.truth[at] for one, at in zip(data, chosen, strict=True)])
    if spec.task == "classifier":
        return {"share of steps right": float((answers.argmax(axis=1) == truth).mean())}
    if spec.task == "language-model":
        shifted = answers - answers.max(axis=1, keepdims=True)
        chances = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return {"bits a symbol": float(-chances[np.arange(len(truth)), truth].mean() / np.log(2))}
    errors = np.abs(answers - truth).mean(axis=0)
    return {f"mean absolute error of {target.name}": float(e) for target, e in zip(spec.targets, errors, strict=True)}


def _chosen(data: Sequence[Labelled], spec: Spec) -> list[Array]:
    """The steps that are measured, a list a sequence."""
    longest = spec.memory.window if isinstance(spec.memory, Window) else max(TRIED)
    stride = -(-sum(len(one.known) for one in data) * longest // MOST_STEPS)
    return [one.known[::stride] if stride > 1 else one.known for one in data]


def _answers(module: RecurrentModel, one: Labelled, at: Array, window: int | None) -> Array:
    """What the network says at the steps `at`, [n, ...] float64."""
    name = "mean" if module.config.targets else "logits"
    last = len(one.entries) if window is None else min(window, len(one.entries))
    with torch.inference_mode():
        outputs, _ = module(torch.from_numpy(one.entries[:last, None]), module.initial_state(1))
        said = outputs[name][:, 0].double().numpy()
        answers = np.empty((len(at), *said.shape[1:]))
        early = at < last
        answers[early] = said[at[early]]
        if window is None or early.all():
            return answers
        views = np.moveaxis(np.lib.stride_tricks.sliding_window_view(one.entries, window, axis=0), -1, 0)
        late = np.flatnonzero(~early)
        for begin in range(0, len(late), WINDOWS):
            part = late[begin : begin + WINDOWS]
            windows = torch.from_numpy(np.ascontiguousarray(views[:, at[part] - window + 1]))
            outputs, _ = module(windows, module.initial_state(len(part)))
            answers[part] = outputs[name][-1].double().numpy()
    return answers


# ---------------------------------------------------------------------- reading


def _from_arrays(path: Path, module: RecurrentModel, spec: Spec) -> Iterator[Labelled]:
    arrays = read_arrays(path, "data")
    entries = entries_of(arrays, module, "data")
    steps, sequences = entries.shape[:2]
    truth = _truth(arrays, entries, module, spec)
    if len(truth) != sequences or truth.shape[1] != steps:
        raise ExportError(f"data: labels or targets are {list(truth.shape)} for inputs of {[sequences, steps]}")
    for n in range(sequences):
        yield Labelled(np.ascontiguousarray(entries[:, n]), truth[n])


def _truth(arrays: dict[str, Array], entries: Array, module: RecurrentModel, spec: Spec) -> Array:
    """[N, T] or [N, T, K]; at steps that nothing is said of -1 or NaN."""
    steps, sequences = entries.shape[:2]
    if spec.task == "language-model":
        return np.concatenate([entries.T[:, 1:], np.full((sequences, 1), -1)], axis=1)
    if spec.task == "classifier":
        return _at_the_last(_numbered(arrays.get("labels"), spec), steps, -1)
    if "targets" not in arrays and spec.task == "forecaster":
        return np.stack([_next_values(entries[:, n], spec) for n in range(sequences)])
    assert isinstance(module.head, OwnHead)
    if "targets" not in arrays:
        raise ExportError("data: targets are missing")
    found = np.asarray(arrays["targets"], np.float64)
    if "values" not in arrays:
        found = found * module.head.target_scale.double().numpy() + module.head.target_mean.double().numpy()
    K = len(spec.targets)
    return _at_the_last(found, steps, np.nan) if found.ndim < 3 else found.reshape(len(found), -1, K)


def _at_the_last(found: Array, steps: int, nothing: float) -> Array:
    """Of what is said of whole sequences: it holds at their last step."""
    if nothing == -1 and found.ndim == 2:
        return found
    rows = found[:, None] if nothing == -1 else found.reshape(len(found), 1, -1)
    rest = np.full((len(found), steps - 1, *rows.shape[2:]), nothing, rows.dtype)
    return np.concatenate([rest, rows], axis=1)


def _numbered(found: Array | None, spec: Spec) -> Array:
    if found is None:
        raise ExportError("data: labels are missing")
    if found.dtype.kind in "iu":
        if found.size and not (found.min() >= -1 and found.max() < len(spec.labels)):
            raise ExportError(f"data: labels must lie in 0..{len(spec.labels) - 1}, or be -1")
        return found.astype(np.int64)
    known = {label: i for i, label in enumerate(spec.labels)}
    unknown = sorted({str(label) for label in found.ravel()} - set(known) - {""})
    if unknown:
        raise ExportError(f"data: the spec has no label {unknown[0]!r}")
    return np.array([known.get(str(label), -1) for label in found.ravel()], np.int64).reshape(found.shape)


def _next_values(entries: Array, spec: Spec) -> Array:
    """A forecaster's targets that are features: what the next step brings, [T, K]."""
    names = [feature.name for feature in spec.features]
    missing = [target.name for target in spec.targets if target.name not in names]
    if missing:
        raise ExportError(f"data: {missing[0]!r} is no feature: give its values as targets [N, T, K]")
    columns = [names.index(target.name) for target in spec.targets]
    following = np.full((len(entries), len(columns)), np.nan)
    following[:-1] = entries[1:, columns]
    return following


def _from_csv(path: Path, spec: Spec) -> Iterator[Labelled]:
    if spec.symbols is not None:
        raise ExportError("data: a CSV holds values; give symbols as .npz")
    rows = _rows(path)
    names = [feature.name for feature in spec.features]
    extra = [target.name for target in spec.targets if target.name not in names]
    needed = [*names, *extra, *(["label"] if spec.task == "classifier" else [])]
    if missing := [name for name in needed if name not in (rows[0] if rows else {})]:
        raise ExportError(f"data: {path.name} has no column {missing[0]!r}")
    for series in dict.fromkeys(row.get("series", "") for row in rows):
        own = [row for row in rows if row.get("series", "") == series]
        entries = np.array([[_number(row, name) for name in names] for row in own], np.float32)
        if spec.task == "classifier":
            yield Labelled(entries, _numbered(np.array([row["label"] for row in own]), spec))
        else:
            columns = np.array([[_number(row, target.name) for target in spec.targets] for row in own])
            later = np.concatenate([columns[1:], np.full((1, columns.shape[1]), np.nan)])
            yield Labelled(entries, later if spec.task == "forecaster" else columns)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ExportError(f"data: {path.name} cannot be read as CSV") from error


def _number(row: dict[str, Any], name: str) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError) as error:
        raise ExportError(f"data: {str(row[name])[:32]!r} in column {name!r} is not a number") from error
    if not np.isfinite(value):
        raise ExportError(f"data: column {name!r} holds a number that is not finite")
    return value
