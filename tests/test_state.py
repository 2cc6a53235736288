"""Rows to batches and back, to bytes and back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import state
from service.bundle import StateSpec


def spec(name: str, shape: list[int | str], dtype: str = "float32", initial: float = 0.0) -> StateSpec:
    return StateSpec.model_validate(
        {
            "name": name,
            "input": name,
            "output": f"{name}_next",
            "dtype": dtype,
            "shape": shape,
            "batch_axis": shape.index("B"),
            "initial": initial,
        }
    )


SPECS = [spec("h", [2, "B", 3]), spec("c", ["B", 4], "float64", 0.5), spec("n", [2, 1, "B"], "int64", 7)]


def random_row(seed: int) -> state.Row:
    rng = np.random.default_rng(seed)
    return tuple((rng.normal(size=s.row_shape) * 9).astype(a.dtype) for s, a in zip(SPECS, initial(), strict=True))


def initial() -> state.Row:
    return state.initial_row(SPECS)


def same(a: state.Row, b: state.Row) -> bool:
    return all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True)
    )


def test_the_initial_row_is_what_the_manifest_says() -> None:
    h, c, n = initial()
    assert (h.shape, c.shape, n.shape) == ((2, 3), (4,), (2, 1))
    assert (h == 0).all() and (c == 0.5).all() and (n == 7).all() and n.dtype == np.int64


@given(seeds=st.lists(st.integers(0, 1000), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_stacked_rows_come_back(seeds: list[int]) -> None:
    rows = [random_row(seed) for seed in seeds]
    batch = state.stack(SPECS, rows)
    assert [array.shape for array in batch] == [(2, len(rows), 3), (len(rows), 4), (2, 1, len(rows))]
    back = state.unstack(SPECS, batch)
    assert all(same(a, b) for a, b in zip(back, rows, strict=True))


def test_a_row_can_own_its_memory() -> None:
    batch = [array.copy() for array in state.stack(SPECS, [random_row(1), random_row(2)])]
    rows = [state.own(row) for row in state.unstack(SPECS, batch)]
    for array in batch:
        array[...] = 0
    assert same(rows[1], random_row(2))


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_dumped_row_comes_back(seed: int) -> None:
    assert same(state.load(SPECS, state.dump(SPECS, random_row(seed))), random_row(seed))


def test_a_row_within_a_batch_is_dumped_as_it_is() -> None:
    rows = state.unstack(SPECS, state.stack(SPECS, [random_row(seed) for seed in range(5)]))
    for seed, row in enumerate(rows):
        assert same(state.load(SPECS, state.dump(SPECS, row)), random_row(seed))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nothing",
        state.dump(SPECS, random_row(1))[:-3],
        state.dump(SPECS[:2], random_row(1)[:2]),
        state.dump([spec("h", [1, "B", 3]), *SPECS[1:]], (np.zeros((1, 3), np.float32), *random_row(1)[1:])),
        state.dump(SPECS, (random_row(1)[0].astype(np.float64), *random_row(1)[1:])),
    ],
    ids=["empty", "garbage", "cut", "tensor missing", "other shape", "other type"],
)
def test_bytes_that_are_no_row_of_the_model_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        state.load(SPECS, data)
