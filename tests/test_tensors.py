"""Tensors of foreign graphs: whatever is sent is an entry of the right shape or a refusal; axes go there and back."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.bundle import DTYPES, Constant, TensorSpec
from service.errors import Problem
from service.tensors import Layout, Tensors, check_constants

NUMBERS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True),
    st.text(max_size=3),
)
NESTED: st.SearchStrategy[Any] = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["a", "b", "x"]), inner)),
    max_leaves=20,
)


def spec(dtype: str, *shape: int | str, name: str = "a") -> TensorSpec:
    return TensorSpec.model_validate({"name": name, "dtype": dtype, "shape": shape})


@given(inputs=NESTED, dtype=st.sampled_from(list(DTYPES)), shape=st.sampled_from([(), (2,), (2, 1), (1, 1, 1)]))
@settings(max_examples=400, deadline=None)
def test_anything_is_an_entry_or_a_refusal(inputs: Any, dtype: str, shape: tuple[int, ...]) -> None:  # noqa: ANN401
    for tensors in (Tensors([spec(dtype, "B", *shape)]), Tensors([spec(dtype, "B", *shape), spec("bool", name="b")])):
        try:
            entries = tensors.encode(inputs, "/inputs")
        except Problem as problem:
            assert problem.code == "invalid_input"
            continue
        assert (entries.dtype, entries.shape[1:]) == (tensors.entry_dtype, tensors.entry_shape)
        if len(entries):  # of no steps the names are not known any more; the codec refuses them
            again = tensors.encode(tensors.decode(entries), "/inputs")
            assert again.tobytes() == entries.tobytes()


@given(data=st.data(), dtype=st.sampled_from(["float16", "float32", "float64", "int8", "uint8", "int64", "bool"]))
@settings(max_examples=100, deadline=None)
def test_good_numbers_are_taken_as_they_are(data: st.DataObject, dtype: str) -> None:
    kind = DTYPES[dtype]
    if kind.kind == "f":
        number: st.SearchStrategy[Any] = st.floats(width=kind.itemsize * 8, allow_nan=False, allow_infinity=False)  # type: ignore[arg-type]
    elif kind.kind == "b":
        number = st.booleans()
    else:
        number = st.integers(int(np.iinfo(kind).min), int(np.iinfo(kind).max))
    steps = data.draw(st.lists(st.lists(number, min_size=2, max_size=2), min_size=1, max_size=5))
    tensors = Tensors([spec(dtype, "B", 2)])
    assert tensors.decode(tensors.encode(steps, "/inputs")) == steps


@pytest.mark.parametrize("axes", [axes for n in range(1, 5) for axes in permutations(("T", "B", 2, 3), n)])
def test_axes_go_there_and_back(axes: tuple[int | str, ...]) -> None:
    layout = Layout(spec("float32", *axes))
    T, B = 4 if "T" in axes else 1, 5 if "B" in axes else 1
    inner = tuple(axis for axis in axes if isinstance(axis, int))
    entries = np.arange(T * B * int(np.prod(inner)), dtype=np.float32).reshape(T, B, *inner)
    there = layout.to_graph(entries)
    assert there.shape == tuple({"T": T, "B": B}.get(axis, axis) for axis in axes)  # type: ignore[arg-type]
    assert there.flags.c_contiguous
    np.testing.assert_array_equal(layout.from_graph(there), entries)
    # One step of one session is found where the axes say.
    place = tuple({"T": T - 1, "B": B - 1}[axis] if isinstance(axis, str) else slice(None) for axis in axes)
    np.testing.assert_array_equal(there[place], entries[T - 1, B - 1])


@pytest.mark.parametrize(
    ("shape", "value", "good"),
    [((), 16000, True), (("B",), 1, True), ((2, "B"), [[1], [2]], True), ((2,), [1, 2, 3], False), ((), "x", False)],
)
def test_constants_must_fit(shape: tuple[int | str, ...], value: Any, good: bool) -> None:  # noqa: ANN401
    if isinstance(value, str):
        with pytest.raises(ValueError):
            Constant.model_validate({"name": "c", "dtype": "int64", "shape": shape, "value": value})
        return
    constant = Constant.model_validate({"name": "c", "dtype": "int64", "shape": shape, "value": value})
    if not good:
        with pytest.raises(ValueError, match="'c'"):
            check_constants([constant])
        return
    check_constants([constant])
    assert Layout(constant).filled(value, 1, 3).shape == tuple(3 if axis == "B" else axis for axis in shape)
