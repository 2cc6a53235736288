"""Philox against its known answers, and the sampler: exact, independent of its batch, right in distribution."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.sampling import MAX_SEED, Purpose, Sampler, Sampling, log_probability, log_softmax, philox, uniforms

ONES = 2**32 - 1
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
PI_KEY = 0x299F31D0_A4093822


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_gives_the_known_answers(counter: tuple[int, ...], key: int, expected: tuple[int, ...]) -> None:
    """The vectors are those of Random123's kat_vectors, philox4x32-10."""
    found = philox(key, np.array([counter], np.uint32))
    assert tuple(found[0].tolist()) == expected


def test_philox_of_many_counters_is_that_of_each() -> None:
    counters = np.arange(40, dtype=np.uint32).reshape(10, 4)
    together = philox(77, counters)
    assert all((philox(77, counters[i : i + 1]) == together[i]).all() for i in range(10))


@given(seed=st.integers(0, MAX_SEED), start=st.integers(0, 2**40), cut=st.integers(1, 19))
@settings(max_examples=30, deadline=None)
def test_uniforms_depend_on_seed_and_position_alone(seed: int, start: int, cut: int) -> None:
    whole = uniforms(seed, start, 20, Purpose.TOKEN)
    parts = np.concatenate(
        [uniforms(seed, start, cut, Purpose.TOKEN), uniforms(seed, start + cut, 20 - cut, Purpose.TOKEN)]
    )
    assert (whole == parts).all() and ((whole >= 0) & (whole < 1)).all()


def test_purposes_and_indices_and_seeds_are_kept_apart() -> None:
    streams = [
        uniforms(1, 0, 50, Purpose.TOKEN),
        uniforms(1, 0, 50, Purpose.FORECAST),
        uniforms(1, 0, 50, Purpose.FORECAST, 1),
        uniforms(2, 0, 50, Purpose.TOKEN),
        uniforms(1 + 2**32, 0, 50, Purpose.TOKEN),
        uniforms(1, 2**32, 50, Purpose.TOKEN),
    ]
    assert len({value for stream in streams for value in stream.tolist()}) == 300


def test_uniforms_are_uniform() -> None:
    counts = np.histogram(uniforms(3, 0, 20_000, Purpose.TOKEN), bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


# ---------------------------------------------------------------------- the sampler


def sample(logits: np.ndarray, how: list[Sampling], uniform: np.ndarray) -> np.ndarray:
    return Sampler(how, range(len(how))).draw(logits, uniform)[0]


def drawn(logits: np.ndarray, how: Sampling, count: int = 20_000) -> np.ndarray:
    rows = np.repeat(logits[None].astype(np.float32), count, axis=0)
    return sample(rows, [how] * count, uniforms(9, 0, count, Purpose.TOKEN))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_symbols_come_as_often_as_the_softmax_says(temperature: float) -> None:
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5])
    expected = np.exp(log_softmax(logits / temperature)) * 20_000
    counts = np.bincount(drawn(logits, Sampling(temperature)), minlength=5)
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # 4 degrees of freedom, p = 0.001


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_rows_symbol_depends_on_that_row_alone(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    rows, width = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 40))
    logits = (rng.normal(size=(rows, width)) * 5).astype(np.float32)
    how = [
        Sampling(
            float(rng.choice([0, 0.3, 1.0, 3.0])), int(rng.choice([0, 1, 3, 100])), float(rng.choice([1.0, 0.9, 0.1]))
        )
        for _ in range(rows)
    ]
    uniform = rng.random(rows)
    together = sample(logits, how, uniform)
    alone = [sample(logits[i : i + 1], how[i : i + 1], uniform[i : i + 1])[0] for i in range(rows)]
    assert together.tolist() == alone
    logprobs = Sampler(how, range(len(how))).draw(logits, uniform)[1]
    assert logprobs.tolist() == [
        Sampler(how[i : i + 1], [i]).draw(logits[i : i + 1], uniform[i : i + 1])[1][0] for i in range(rows)
    ]
    assert logprobs == pytest.approx(log_softmax(logits)[np.arange(rows), together])


@given(
    logits=st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=40),
    uniform=st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=200, deadline=None)
def test_a_row_alone_with_nothing_left_out_is_drawn_as_among_others(logits: list[float], uniform: float) -> None:
    row = np.array([logits], np.float32)
    alone = Sampler([Sampling()], [1]).draw(row, np.array([uniform]))
    among = Sampler([Sampling()] * 3, [1, 2, 3]).draw(np.repeat(row, 3, axis=0), np.full(3, uniform))
    for one, many in zip(alone, among, strict=True):
        assert (one.shape, one.dtype) == ((1,), many.dtype)
        assert many.tobytes() == 3 * one.tobytes()


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_samplers_numbers_are_those_of_seed_and_position(data: st.DataObject) -> None:
    seeds = data.draw(st.lists(st.integers(0, MAX_SEED), min_size=1, max_size=5))
    at = np.array(data.draw(st.lists(st.integers(0, 2**48), min_size=len(seeds), max_size=len(seeds))))
    sampler = Sampler([Sampling()] * len(seeds), seeds)
    for count in data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6)):
        if data.draw(st.booleans()):
            at = at + 1
        if data.draw(st.booleans()):
            sampler.prepare(at, data.draw(st.integers(1, 40)))
        found = sampler.numbers(at, count)
        expected = [uniforms(seed, first, count, Purpose.TOKEN) for seed, first in zip(seeds, at.tolist(), strict=True)]
        assert (found == np.array(expected).T).all()
        at = at + data.draw(st.integers(0, count))


def test_temperature_0_is_greedy_and_the_first_of_equals() -> None:
    logits = np.array([1.0, 3.0, 3.0, 2.0])
    assert set(drawn(logits, Sampling(0.0), 100).tolist()) == {1}


@pytest.mark.parametrize("temperature", [1e-300, 5e-324])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float) -> None:
    with np.errstate(over="ignore"):
        assert set(drawn(np.array([1.0, 3.0, 2.0]), Sampling(temperature), 100).tolist()) == {1}


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_keeps_the_most_likely(top_k: int) -> None:
    logits = np.array([0.0, 3.0, 1.0, 2.0])
    assert set(drawn(logits, Sampling(2.0, top_k)).tolist()) == set([1, 3, 2][:top_k])


@pytest.mark.parametrize("top_k", [0, 4, 5, 2**31 - 1])
def test_top_k_of_all_symbols_leaves_all_in(top_k: int) -> None:
    logits = np.array([0.0, 3.0, 1.0, 2.0])
    assert (drawn(logits, Sampling(2.0, top_k), 500) == drawn(logits, Sampling(2.0), 500)).all()


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, {0}), (0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}), (0.8, {0, 1, 2})])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: set[int]) -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625]))
    assert set(drawn(logits, Sampling(1.0, 0, top_p)).tolist()) == kept


def test_top_p_looks_at_what_top_k_left() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    assert set(drawn(logits, Sampling(1.0, 2, 0.6)).tolist()) == {0, 1}
    assert set(drawn(logits, Sampling(1.0, 2, 0.5)).tolist()) == {0}


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(1.0, 0.0)])
def test_the_ends_of_the_uniform_numbers_draw_kept_symbols(uniform: float) -> None:
    logits = np.array([[5.0, 1.0, 5.0, 1.0, -50.0]], np.float32)
    found = sample(logits, [Sampling(1.0, 2)], np.array([uniform]))
    assert found.tolist() == [0 if uniform == 0 else 2]


def test_huge_logits_do_no_harm() -> None:
    logits = np.array([3e38, -3e38, 2.9e38])
    assert set(drawn(logits, Sampling(), 100).tolist()) == {0}


@pytest.mark.parametrize("rows", [1, 3, 64, 300])
def test_the_log_probability_of_one_id_has_the_bits_of_all(rows: int) -> None:
    random = np.random.default_rng(rows)
    logits = (random.standard_normal((rows, 129)) * 30).astype(np.float32)
    logits[0] = np.nan  # where nothing was predicted
    ids = random.integers(0, 129, rows)
    assert log_probability(logits, ids).tobytes() == log_softmax(logits)[np.arange(rows), ids].tobytes()


def test_log_softmax_sums_to_one() -> None:
    rows = np.random.default_rng(0).normal(size=(4, 9)) * 100
    assert np.exp(log_softmax(rows)).sum(axis=-1) == pytest.approx(1.0)
