"""Drawing symbols from logits: counter-based uniform numbers and one vectorised sampler.

The uniform number of a position depends on (seed, position, purpose, index) alone, so there is no generator
state to keep, and a text is the same alone, in a batch, cut, resumed or after a restart.
Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), Philox4x32-10.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from service.state import Array

MAX_SEED = 2**53 - 1
_ROUNDS = 10
_LOW32 = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


class Purpose(IntEnum):
    """Keeps streams of one seed apart."""

    TOKEN = 0
    FORECAST = 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a generate draws: temperature 0 is greedy, top_k 0 and top_p 1 leave all symbols in."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def philox(key: int, counters: Array) -> Array:
    """Philox4x32-10: `counters` [n, 4] uint32 to [n, 4] uint32, under a 64-bit key."""
    c = [counters[:, i].astype(np.uint64) for i in range(4)]
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(_ROUNDS):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> _SHIFT) ^ c[1] ^ np.uint64(k0),
            p1 & _LOW32,
            (p0 >> _SHIFT) ^ c[3] ^ np.uint64(k1),
            p0 & _LOW32,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=1).astype(np.uint32)


def uniforms(seed: int, start: int, count: int, purpose: Purpose, index: int = 0) -> Array:
    """The numbers in [0, 1) of positions start to start + count - 1, [count] float64."""
    positions = np.arange(start, start + count, dtype=np.uint64)
    counters = np.empty((count, 4), np.uint32)
    counters[:, 0] = positions & _LOW32
    counters[:, 1] = positions >> _SHIFT
    counters[:, 2] = int(purpose)
    counters[:, 3] = index
    words = philox(seed, counters).astype(np.uint64)
    bits = (words[:, 0] << np.uint64(21)) ^ (words[:, 1] >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis, float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def sample(logits: Array, how: Sequence[Sampling], uniform: Array) -> Array:
    """One symbol a row: `logits` [n, V], `uniform` [n] -> [n] int64.

    Inverse of the cumulative distribution over the ids in order, with what top-k and top-p leave out at zero.
    A row's symbol depends on that row alone.
    """
    scores = logits.astype(np.float64)
    temperature = np.array([s.temperature for s in how])
    greedy = temperature == 0
    with np.errstate(over="ignore"):  # a tiny temperature makes what is unlikely impossible
        scores = (scores - scores.max(axis=1, keepdims=True)) / np.where(greedy, 1.0, temperature)[:, None]
    weights = np.exp(scores)
    for i, s in enumerate(how):
        if 0 < s.top_k < weights.shape[1] or s.top_p < 1:
            weights[i] *= _kept(weights[i], s)
    cumulative = np.cumsum(weights, axis=1)
    threshold = uniform * cumulative[:, -1]
    drawn = np.minimum((cumulative <= threshold[:, None]).sum(axis=1), weights.shape[1] - 1)
    return np.asarray(np.where(greedy, logits.argmax(axis=1), drawn), np.int64)


def _kept(weights: Array, how: Sampling) -> Array:
    """Which symbols of one row stay: the top_k most likely, then the fewest whose sum reaches top_p."""
    order = np.argsort(-weights, kind="stable")
    if how.top_k:
        order = order[: how.top_k]
    if how.top_p < 1:
        mass = np.cumsum(weights[order])
        order = order[: int(np.searchsorted(mass, how.top_p * mass[-1])) + 1]
    kept = np.zeros(weights.shape, np.bool_)
    kept[order] = True
    return kept
