"""What a model must beat: counts for text and labels, yesterday and ridge regression for series."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.data import Corpus, Sequence

Ids = NDArray[np.int64]
Values = NDArray[np.float64]

ORDER = 5
COUNTED = 5_000_000
"""symbols of a text that are counted; more would say little new"""
LAGS = 48
DAY = 24


class NGram:
    """Interpolated n-gram model with Witten-Bell smoothing (Bell, Cleary, Witten: Text Compression, 1990)."""

    def __init__(self, train: list[Ids], vocabulary: int, order: int = ORDER) -> None:
        if vocabulary**order >= 2**63:
            raise ValueError(f"{vocabulary} symbols to the power of {order} do not fit 64-bit keys")
        self.vocabulary, self.order = vocabulary, order
        self._counts = [self._count(train, n) for n in range(1, order + 1)]

    def bits(self, test: list[Ids]) -> float:
        """Mean bits a symbol over the sequences, none before their first symbol known."""
        return float(sum(-np.log2(self.chances(ids)).sum() for ids in test) / sum(map(len, test)))

    def chances(self, ids: Ids) -> Values:
        """[N] probability of each symbol after up to `order` - 1 symbols before it."""
        chance = np.full(len(ids), 1 / self.vocabulary)
        for n in range(1, self.order + 1):
            grams = self._grams(ids, n)
            chance[n - 1 :] = self._interpolate(n, grams, chance[n - 1 :])
        return chance

    def _interpolate(self, n: int, grams: Ids, lower: Values) -> Values:
        """(count + kinds * lower) / (total + kinds): the more kinds of successors, the less a count says."""
        keys, counts, contexts, totals, kinds = self._counts[n - 1]
        context = grams // self.vocabulary
        total, kind = _look_up(contexts, totals, context), _look_up(contexts, kinds, context)
        mixed = (_look_up(keys, counts, grams) + kind * lower) / np.maximum(total + kind, 1)
        return np.where(total > 0, mixed, lower)

    def _count(self, train: list[Ids], n: int) -> tuple[Any, Any, Any, Any, Any]:
        keys, counts = np.unique(np.concatenate([self._grams(ids, n) for ids in train]), return_counts=True)
        contexts, first, kinds = np.unique(keys // self.vocabulary, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        return keys, counts, contexts, totals, kinds

    def _grams(self, ids: Ids, n: int) -> Ids:
        """[N - n + 1] each n-gram as one number in base `vocabulary`."""
        keys = np.zeros(max(0, len(ids) - n + 1), dtype=np.int64)
        for i in range(n):
            keys = keys * self.vocabulary + ids[i : i + len(keys)]
        return keys


def _look_up(keys: Ids, values: Any, wanted: Ids) -> Any:  # noqa: ANN401 (integer or float array)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def text_bits(corpus: Corpus, scored: list[Sequence]) -> dict[str, float]:
    """Bits a symbol of unigram and 5-gram, fitted on the training part."""
    parts = (corpus.train, scored)
    train, test = ([sequence.targets[:COUNTED].long().numpy() for sequence in part] for part in parts)
    size = len(corpus.symbols)
    order = min(ORDER, int(62 / np.log2(max(2, size))))
    return {name: NGram(train, size, n).bits(test) for name, n in (("unigram", 1), (f"{order}-gram", order))}


def persistence(series: Values) -> Values:
    """[N] -> [N]: the forecast for p + 1 is the value at p."""
    return series


def same_hour_yesterday(series: Values, period: int = DAY, horizon: int = 1) -> Values:
    """[N] -> [N]: the forecast for p + horizon is the newest value whole periods before it; NaN where there is none."""
    forecast = np.full(len(series), np.nan)
    back = -horizon % period
    forecast[back:] = series[: len(series) - back]
    return forecast


def ridge(
    series: Values, following: Values, scored: NDArray[np.bool_], lags: int = LAGS, weight: float = 1.0
) -> Values:
    """Linear autoregression on the last `lags` values, fitted where not `scored`.

    series: [N], the value at p; following: [N], at p + 1. Returns [N], NaN for the first lags - 1 steps.
    """
    forecast = np.full(len(series), np.nan)
    if len(series) <= lags:
        return forecast
    windows = np.lib.stride_tricks.sliding_window_view(series, lags)
    usable = ~scored[lags - 1 :] & np.isfinite(following[lags - 1 :])
    if not usable.any():
        return forecast
    mean, scale = series[~scored].mean(), series[~scored].std() or 1.0
    X, y = (windows - mean) / scale, (following[lags - 1 :] - mean) / scale
    gram = X[usable].T @ X[usable] + weight * np.eye(lags)
    forecast[lags - 1 :] = X @ np.linalg.solve(gram, X[usable].T @ y[usable]) * scale + mean
    return forecast


def this_row(train: list[Sequence], test: list[Sequence], symbols: int) -> list[Values]:
    """What each row says without a memory, [N, K] a test sequence: least squares on its values, the mean of its symbol.

    NaN targets do not occur; those that weigh nothing are left out.
    """
    X = np.concatenate([_design(sequence, symbols) for sequence in train])
    y = np.concatenate([sequence.targets.double().numpy() for sequence in train])
    known = np.concatenate([(sequence.weights > 0).numpy() for sequence in train])
    columns = []
    for k in range(y.shape[1]):
        rows = X[known[:, k]]
        gram = rows.T @ rows + 1e-6 * np.eye(X.shape[1]) * max(1.0, float(np.trace(rows.T @ rows)) / X.shape[1])
        columns.append(np.linalg.solve(gram, rows.T @ y[known[:, k], k]))
    weights = np.stack(columns, axis=1)
    return [_design(sequence, symbols) @ weights for sequence in test]


def _design(sequence: Sequence, symbols: int) -> Values:
    if symbols:
        return np.asarray(np.eye(symbols)[sequence.inputs.numpy()])
    return np.concatenate((sequence.inputs.double().numpy(), np.ones((len(sequence), 1))), axis=1)


def label_nats(corpus: Corpus, scored: list[Sequence]) -> float:
    """Nats a step of giving each label its frequency in the training part (one added to each count)."""
    train, test = (torch.cat([s.targets[s.weights > 0] for s in part]).double() for part in (corpus.train, scored))
    chance = (train.sum(dim=0) + 1) / (len(train) + 2)
    nats = -(test * chance.log() + (1 - test) * (1 - chance).log()).sum(dim=1)
    return float(nats.mean())


def label_entropy(train: Ids, test: Ids, labels: int) -> float:
    """Nats a step of always giving the training part's label frequencies (one added to each count)."""
    chances = np.bincount(train, minlength=labels) + 1.0
    return float(-np.log(chances / chances.sum())[test].mean())


def commonest_label(train: Ids, test: Ids) -> float:
    """Accuracy of always saying the training part's commonest label."""
    return float((test == np.bincount(train).argmax()).mean())
