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
AHEAD = 4
"""how many times the numbers that are needed are worked out at once"""
_ROUNDS = 10
_LOW32 = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


class Purpose(IntEnum):
    """Keeps streams of one seed apart."""

    TOKEN = 0
    FORECAST = 1
    CHOICE = 2


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a generate draws: temperature 0 is greedy, top_k 0 and top_p 1 leave all symbols in."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def philox(key: Array | np.uint64 | int, counters: Array) -> Array:
    """Philox4x32-10: `counters` [n, 4] uint32 to [n, 4] uint32, under one 64-bit key or one a row."""
    c = [counters[:, i].astype(np.uint64) for i in range(4)]
    keys = np.asarray(key, np.uint64)
    k0, k1 = keys & _LOW32, keys >> _SHIFT
    for _ in range(_ROUNDS):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> _SHIFT) ^ c[1] ^ k0, p1 & _LOW32, (p0 >> _SHIFT) ^ c[3] ^ k1, p0 & _LOW32]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW32, (k1 + np.uint64(0xBB67AE85)) & _LOW32
    return np.stack(c, axis=1).astype(np.uint32)


def uniforms(seed: int, start: int, count: int, purpose: Purpose, index: int = 0) -> Array:
    """The numbers in [0, 1) of positions start to start + count - 1, [count] float64."""
    return _numbers(np.uint64(seed), np.arange(start, start + count, dtype=np.uint64), purpose, index)


def choice_seed(seed: int, index: int) -> int:
    """The seed of the completion `index` of several that are asked for with one seed; the first one's is that seed."""
    return int(uniforms(seed, index, 1, Purpose.CHOICE)[0] * (MAX_SEED + 1)) if index else seed


def _numbers(seeds: Array | np.uint64, positions: Array, purpose: Purpose, index: int = 0) -> Array:
    """One number a position, under one seed or one a position."""
    counters = np.empty((len(positions), 4), np.uint32)
    counters[:, 0] = positions & _LOW32
    counters[:, 1] = positions >> _SHIFT
    counters[:, 2] = int(purpose)
    counters[:, 3] = index
    words = philox(seeds, counters).astype(np.uint64)
    bits = (words[:, 0] << np.uint64(21)) ^ (words[:, 1] >> np.uint64(11))
    return np.asarray(bits.astype(np.float64) * 2.0**-53)


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis, float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def log_probability(logits: Array, ids: Array) -> Array:
    """What `log_softmax` of `logits` [n, V] says of one id of each row, [n]: the same bits for less."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted[np.arange(len(ids)), ids] - np.log(np.exp(shifted).sum(axis=-1)))


class Sampler:
    """Draws one symbol a row, for the same rows again and again.

    Inverse of the cumulative distribution over the ids in order, with what top-k and top-p leave out at zero.
    A row's symbol depends on that row alone.
    """

    def __init__(self, how: Sequence[Sampling], seeds: Sequence[int]) -> None:
        temperature = np.array([s.temperature for s in how])
        self._greedy = temperature == 0
        self._any_greedy = bool(self._greedy.any())
        self._temperature = None if (temperature == 1).all() else np.where(self._greedy, 1.0, temperature)[:, None]
        self._limited = [(i, s) for i, s in enumerate(how) if s.top_k or s.top_p < 1]
        self._is_plain = self._temperature is None and not (self._limited or self._any_greedy)
        self._rows = np.arange(len(how))
        self._seeds = np.array(seeds, np.uint64)
        self._made, self._first = np.empty((0, len(how))), np.zeros(len(how), np.int64)

    def numbers(self, first: Array, count: int) -> Array:
        """The uniform numbers of positions first to first + count - 1, [count, rows]; `first`: one a row."""
        self.prepare(first, count)
        begin = int(first[0] - self._first[0])
        return self._made[begin : begin + count]

    def prepare(self, first: Array, count: int) -> None:
        """Work out the same, unless they are there from an earlier call."""
        ahead = first - self._first
        begin = int(ahead[0])
        if begin < 0 or begin + count > len(self._made) or (ahead != begin).any():
            span = np.arange(count * AHEAD, dtype=np.uint64)[:, None]
            positions = (span + first.astype(np.uint64)).ravel()
            numbers = _numbers(np.tile(self._seeds, len(span)), positions, Purpose.TOKEN)
            self._made, self._first = numbers.reshape(len(span), -1), first

    def draw(self, logits: Array, uniform: Array) -> tuple[Array, Array]:
        """`logits` [n, V] and `uniform` [n] to ids [n] int64 and their log-probabilities at temperature 1 [n]."""
        if self._is_plain and len(logits) == 1:
            return self._draw_one(logits[0], uniform)
        scores = logits.astype(np.float64)
        scores -= scores.max(axis=1, keepdims=True)
        weights = np.exp(scores)
        cumulative = weights.cumsum(axis=1)
        total = cumulative[:, -1]
        if self._temperature is not None or self._limited:
            drawn = self._drawn(self._weights(scores, weights).cumsum(axis=1), uniform)
        else:
            drawn = self._drawn(cumulative, uniform)
        if self._any_greedy:
            drawn = np.where(self._greedy, logits.argmax(axis=1), drawn)
        return drawn, scores[self._rows, drawn] - np.log(total)

    @staticmethod
    def _draw_one(logits: Array, uniform: Array) -> tuple[Array, Array]:
        """The same for one row [V] with nothing left out, by fewer calls of NumPy: a stream alone waits for each."""
        scores = logits.astype(np.float64)
        scores -= scores[scores.argmax()]
        cumulative = np.add.accumulate(np.exp(scores))
        beyond = int(cumulative.searchsorted(uniform[0] * cumulative[-1], "right"))
        drawn = min(beyond, len(scores) - 1)
        return np.array([drawn]), scores[drawn : drawn + 1] - np.log(cumulative[-1])

    def _weights(self, scores: Array, weights: Array) -> Array:
        """What symbols weigh under temperature, top-k and top-p."""
        if self._temperature is not None:
            with np.errstate(over="ignore"):  # a tiny temperature makes what is unlikely impossible
                weights = np.exp(scores / self._temperature)
        for i, s in self._limited:
            if s.top_k < weights.shape[1] or s.top_p < 1:
                weights[i] *= _kept(weights[i], s)
        return weights

    @staticmethod
    def _drawn(cumulative: Array, uniform: Array) -> Array:
        """The first symbol whose cumulative weight is beyond the threshold."""
        beyond = cumulative > (uniform * cumulative[:, -1])[:, None]
        beyond[:, -1] = True
        return np.asarray(beyond.argmax(axis=1))


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
