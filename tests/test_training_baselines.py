import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.baselines import NGram, commonest_label, label_entropy, persistence, ridge, same_hour_yesterday


def by_hand(train: list[int], context: list[int], symbol: int, size: int) -> float:
    """Witten-Bell by its definition."""
    if context:
        lower = by_hand(train, context[1:], symbol, size)
        after = Counter(
            train[i + len(context)] for i in range(len(train) - len(context)) if train[i : i + len(context)] == context
        )
    else:
        lower, after = 1 / size, Counter(train)
    if not after:
        return lower
    return (after[symbol] + len(after) * lower) / (after.total() + len(after))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 2), min_size=6, max_size=40), st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_the_n_gram_is_witten_bell(train: list[int], test: list[int]) -> None:
    model = NGram([np.array(train)], 3, order=3)
    chances = model.chances(np.array(test))
    for i, symbol in enumerate(test):
        assert chances[i] == pytest.approx(by_hand(train, test[max(0, i - 2) : i], symbol, 3))
    everything = sum(model.chances(np.array([*test, symbol]))[-1] for symbol in range(3))
    assert everything == pytest.approx(1)


def test_a_unigram_of_a_fair_coin_costs_one_bit() -> None:
    coin = np.tile([0, 1], 5000)
    assert NGram([coin], 2, order=1).bits([coin]) == pytest.approx(1.0, abs=1e-3)
    assert NGram([coin], 2, order=2).bits([coin]) < 0.01


def test_keys_that_would_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match="64-bit"):
        NGram([np.array([1])], 100_000, order=5)


def test_persistence_and_yesterday() -> None:
    hours = np.arange(100.0)
    assert (persistence(hours) == hours).all()
    forecast = same_hour_yesterday(hours)
    assert np.isnan(forecast[:23]).all()
    assert (forecast[23:] == np.arange(100 - 23)).all()  # the value at p + 1 - 24


def test_ridge_finds_an_autoregression_without_seeing_the_test() -> None:
    rng = np.random.default_rng(0)
    series = np.zeros(2001)
    for i in range(2, 2001):
        series[i] = 1.6 * series[i - 1] - 0.8 * series[i - 2] + rng.normal()
    now, following = series[:-1], series[1:]
    scored = np.arange(2000) >= 1500
    forecast = ridge(now, following, scored)
    error = np.abs(forecast - following)[scored].mean()
    assert error == pytest.approx(math.sqrt(2 / math.pi), rel=0.1)
    spoilt = following.copy()
    spoilt[1500:] = 1e6
    assert np.array_equal(ridge(now, spoilt, scored), forecast, equal_nan=True)


def test_ridge_of_a_short_series_says_nothing() -> None:
    assert np.isnan(ridge(np.ones(10), np.ones(10), np.zeros(10, dtype=bool))).all()


def test_labels() -> None:
    train, test = np.array([0, 0, 0, 1]), np.array([0, 1])
    assert commonest_label(train, test) == 0.5
    assert label_entropy(train, test, 2) == pytest.approx(-(math.log(4 / 6) + math.log(2 / 6)) / 2)
