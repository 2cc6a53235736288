"""The runner: any cut and any batch give the same bits, and a bundle that lies is refused."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import TINY, every_model, newest, some_inputs

from service import graph, state
from service.bundle import Bundle, BundleError, Manifest
from service.runner import Folded, Runner
from service.state import Array, Row
from service.tasks import Codec

_loaded: dict[str, Runner] = {}


def runner_of(models: Path, name: str) -> Runner:
    if name not in _loaded:
        _loaded[name] = Runner(newest(models, name), threads=1)
    return _loaded[name]


def entries_of(runner: Runner, count: int, seed: int) -> Array:
    codec = Codec(runner.manifest)
    return codec.fill(codec.encode(some_inputs(runner.manifest, count, seed)), None)


def bits(folded: Folded, i: int) -> list[bytes]:
    """Row i of a fold: its outputs and its state."""
    outputs = [np.ascontiguousarray(array[:, i]).tobytes() for array in folded.outputs.values()]
    return outputs + [array.tobytes() for array in folded.rows[i]]


def fold(runner: Runner, entries: Array, cuts: Sequence[int]) -> list[bytes]:
    """One row, cut: its outputs and state."""
    row: Row = state.initial_row(runner.manifest.states)
    outputs: dict[str, list[Array]] = {}
    for begin, end in zip([0, *cuts], [*cuts, len(entries)], strict=True):
        part = runner.run(entries[begin:end, None], [row])
        row = part.rows[0]
        for name, array in part.outputs.items():
            outputs.setdefault(name, []).append(array[:, 0])
    return [np.concatenate(parts).tobytes() for parts in outputs.values()] + [array.tobytes() for array in row]


@pytest.mark.parametrize("name", every_model())
@given(cuts=st.sets(st.integers(1, 39), max_size=12), seed=st.integers(0, 50))
@settings(max_examples=12, deadline=None)
def test_a_fold_does_not_depend_on_how_it_is_cut(name: str, models: Path, cuts: set[int], seed: int) -> None:
    runner = runner_of(models, name)
    entries = entries_of(runner, 40, seed)
    assert fold(runner, entries, sorted(cuts)) == fold(runner, entries, [])


@pytest.mark.parametrize("name", every_model())
@given(rows=st.integers(1, 70), place=st.integers(0, 69))
@settings(max_examples=12, deadline=None)
def test_a_fold_does_not_depend_on_its_batch(name: str, models: Path, rows: int, place: int) -> None:
    runner = runner_of(models, name)
    assert runner.batches_exactly
    chunks = [entries_of(runner, 6, i) for i in range(rows)]
    zero = [state.initial_row(runner.manifest.states)] * rows
    together, i = runner.run(np.stack(chunks, axis=1), zero), place % rows
    assert bits(together, i) == bits(runner.run(chunks[i][:, None], zero[:1]), 0)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads of each session that is opened, on a machine of two cores."""
    found: list[int] = []
    original = graph._open
    monkeypatch.setattr(graph, "_open", lambda path, threads: found.append(threads) or original(path, threads))
    monkeypatch.setattr(graph, "ALL", {0, 1})
    return found


def test_calls_that_take_long_may_have_two_threads(
    models: Path, monkeypatch: pytest.MonkeyPatch, opened: list[int]
) -> None:
    for long_s, gain, threads in ((10.0, 0.0, [1]), (0.0, 10.0**9, [1, 2]), (0.0, 0.0, [1, 2])):
        monkeypatch.setattr(graph, "LONG_S", long_s)
        monkeypatch.setattr(graph, "GAIN", gain)
        opened.clear()
        runner = Runner(newest(models, "tiny-letters"), "auto")
        assert opened == threads and runner._graph.is_wide == (gain == 0.0 and long_s == 0.0)
        assert runner.numerics == runner_of(models, "tiny-letters").numerics


def test_a_large_graph_is_loaded_once(models: Path, monkeypatch: pytest.MonkeyPatch, opened: list[int]) -> None:
    for name, value in (("LONG_S", 0.0), ("GAIN", 0.0), ("TWICE_BYTES", 10)):
        monkeypatch.setattr(graph, name, value)
    found = Runner(newest(models, "tiny-letters"), "auto")
    assert found._graph.threads == 2 and not found._graph.is_wide


def test_two_threads_that_give_other_bits_are_not_used(
    models: Path, monkeypatch: pytest.MonkeyPatch, opened: list[int]
) -> None:
    for name, value in (("LONG_S", 0.0), ("GAIN", 0.0), ("_same", lambda call: False)):
        monkeypatch.setattr(graph, name, value)
    assert not Runner(newest(models, "tiny-letters"), "auto")._graph.is_wide


@given(cuts=st.sets(st.integers(1, 39), max_size=12), seed=st.integers(0, 50))
@settings(max_examples=12, deadline=None)
def test_the_threads_of_a_call_change_nothing(models: Path, cuts: set[int], seed: int) -> None:
    """Long chunks have two threads here, single steps one."""
    runner = both(models)
    entries = entries_of(runner, 40, seed)
    assert fold(runner, entries, sorted(cuts)) == fold(runner_of(models, "tiny-letters"), entries, [])


def test_single_steps_have_two_threads_only_beside_hardly_any_python(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, asked = both(models), list[bool]()
    run = graph.Graph.run

    def noted(self: graph.Graph, fetch: Sequence[str], feed: dict[str, Array], rows: int, wide: bool) -> list[Array]:
        asked.append(wide)
        return run(self, fetch, feed, rows, wide)

    monkeypatch.setattr(graph.Graph, "run", noted)
    for hardly in (False, True):
        monkeypatch.setattr(runner._balance, "hardly_python", hardly)
        for steps in (1, 2):
            runner.run(entries_of(runner, steps, 0)[:, None], [state.initial_row(runner.manifest.states)])
    assert asked == [False, True, True, True]
    assert runner._graph.threads_of(1, True) == 2 and runner._graph.threads_of(1, False) == 1


@functools.cache
def both(models: Path) -> Runner:
    """A runner with both numbers of threads."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in (("LONG_S", 0.0), ("GAIN", 0.0), ("ALL", {0, 1})):
            patched.setattr(graph, name, value)
        found = Runner(newest(models, "tiny-letters"), "auto")
    assert found._graph.is_wide
    return found


@pytest.mark.parametrize("name", TINY)
def test_two_threads_give_the_same_numerics(name: str, models: Path) -> None:
    assert Runner(newest(models, name), threads=2).numerics == runner_of(models, name).numerics


def test_models_have_numerics_of_their_own(models: Path) -> None:
    assert len({runner_of(models, name).numerics for name in TINY}) == len(TINY)


# ---------------------------------------------------------------------- bundles that lie


def changed(models: Path, name: str = "tiny-letters", **more: Any) -> Bundle:  # noqa: ANN401 (parts of a manifest)
    bundle = newest(models, name)
    parts = bundle.manifest.model_dump(mode="json") | more
    return Bundle(Manifest.model_validate(parts), bundle.path)


def part(models: Path, kind: str, i: int, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    """A list of the manifest with one item changed."""
    items = newest(models, "tiny-letters").manifest.model_dump(mode="json")[kind]
    items[i] |= more
    return {kind: items}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("inputs", {"name": "tokens"}),
        ("inputs", {"dtype": "int32"}),
        ("inputs", {"shape": ["T", "B", 1]}),
        ("inputs", {"shape": ["B", "T"]}),
        ("outputs", {"name": "scores"}),
        ("outputs", {"dtype": "float64"}),
        ("outputs", {"shape": ["T", "B"]}),
        ("outputs", {"shape": ["T", "B", 14]}),
        ("states", {"input": "hidden"}),
        ("states", {"output": "hidden_next"}),
        ("states", {"dtype": "float64"}),
        ("states", {"shape": [2, "B", 17]}),
        ("states", {"shape": [3, "B", 16]}),
    ],
)
def test_a_signature_that_is_not_the_graphs_is_refused(kind: str, more: dict[str, Any], models: Path) -> None:
    with pytest.raises((BundleError, ValidationError)):
        Runner(changed(models, **part(models, kind, 0, **more)), threads=1)


@pytest.mark.parametrize("symbols", [12, 14])
def test_a_vocabulary_that_is_not_the_graphs_is_refused(symbols: int, models: Path) -> None:
    names = ["\n", *(chr(ord("A") + i) for i in range(symbols - 1))]
    shape = part(models, "outputs", 0, shape=["T", "B", symbols])
    with pytest.raises(BundleError):
        Runner(changed(models, symbols=names, **shape), threads=1)


def test_an_initial_state_that_is_not_zero_is_refused_by_the_golden_example(models: Path) -> None:
    with pytest.raises(BundleError, match="golden"):
        Runner(changed(models, **part(models, "states", 0, initial=0.5)), threads=1)


# ---------------------------------------------------------------------- machines that round otherwise


def disturb(monkeypatch: pytest.MonkeyPatch, when: Any) -> None:  # noqa: ANN401 (a condition)
    """Change the last bit of the outputs where `when(rows, steps)` says so."""
    run = Runner._run

    def disturbed(self: Runner, entries: Array, states: list[Array], wide: bool) -> tuple[list[Array], list[Array]]:
        outputs, after = run(self, entries, states, wide)
        if not when(entries.shape[1], len(entries)):
            return outputs, after
        return [np.nextafter(array, np.float32(np.inf)) for array in outputs], after

    monkeypatch.setattr(Runner, "_run", disturbed)


def test_where_batches_round_otherwise_rows_run_alone(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(monkeypatch, lambda rows, steps: rows > 1)
    runner = Runner(newest(models, "tiny-letters"), threads=1)
    assert not runner.batches_exactly
    chunks = [entries_of(runner, 5, i) for i in range(4)]
    zero = [state.initial_row(runner.manifest.states)] * 4
    together = runner.run(np.stack(chunks, axis=1), zero)
    monkeypatch.undo()
    expected = runner_of(models, "tiny-letters")
    assert all(bits(together, i) == bits(expected.run(chunks[i][:, None], zero[:1]), 0) for i in range(4))
    assert runner.numerics == expected.numerics


@pytest.mark.parametrize("exactly", [True, False])
def test_a_roll_out_is_what_single_steps_give(models: Path, exactly: bool) -> None:
    runner = runner_of(models, "tiny-letters")
    runner.batches_exactly = exactly
    rows = [state.initial_row(runner.manifest.states)] * 3

    def likeliest(step: int, outputs: dict[str, Array]) -> Array:
        drawn.append(outputs["logits"].argmax(axis=1))
        return drawn[-1]

    drawn: list[Array] = []
    rolled = runner.roll(np.array([1, 2, 3]), rows, range(6), likeliest)
    for i in range(3):
        entries, row = np.array([i + 1]), rows[0]
        for step in range(6):
            folded = runner.run(entries[:, None], [row])
            entries, row = folded.outputs["logits"][0].argmax(axis=1), folded.rows[0]
            assert entries == drawn[step][i]
        assert state.equal(row, rolled.rows[i])
        assert bits(folded, 0) == bits(rolled, i)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("exactly", [True, False])
def test_a_roll_out_goes_on_from_another_and_leaves_its_rows_as_they_are(
    models: Path, exactly: bool, ahead: bool
) -> None:
    runner = runner_of(models, "tiny-letters")
    runner.batches_exactly = exactly
    drawn: list[list[int]] = []

    def likeliest(step: int, outputs: dict[str, Array]) -> Array:
        found = outputs["logits"].argmax(axis=1)
        drawn.append(found.tolist())
        return found

    zero: list[state.Row] = [state.initial_row(runner.manifest.states)] * 3
    whole = runner.roll(np.array([1, 2, 3]), zero, range(15), likeliest)
    expected, drawn = drawn, []
    entries, rows, held = np.array([1, 2, 3]), zero, []
    for count in range(1, 6):
        rows = runner.roll(entries, rows, range(count), likeliest, ahead).rows
        entries = np.array(drawn[-1])
        held.append((rows, [state.digest(row) for row in rows]))
    assert drawn == expected
    assert all(map(state.equal, rows, whole.rows))
    assert all([state.digest(row) for row in of] == before for of, before in held)
    assert all(state.equal(row, state.initial_row(runner.manifest.states)) for row in zero)
    # What was begun early for these entries is of no use for others.
    other = runner.roll(np.array([3, 3, 3]), rows, range(2), likeliest, ahead)
    alone = runner.roll(np.array([3]), [rows[1]], range(2), likeliest)
    assert state.equal(other.rows[1], alone.rows[0])


def test_where_chunks_round_otherwise_the_bundle_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(monkeypatch, lambda rows, steps: steps > 1)
    with pytest.raises(BundleError, match="bits"):
        Runner(newest(models, "tiny-letters"), threads=1)


def test_other_bits_have_another_name(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(monkeypatch, lambda rows, steps: True)
    assert Runner(newest(models, "tiny-letters"), threads=1).numerics != runner_of(models, "tiny-letters").numerics


def test_rows_of_a_fold_share_no_memory(models: Path) -> None:
    runner = runner_of(models, "tiny-letters")
    zero = [state.initial_row(runner.manifest.states)] * 2
    folded = runner.run(np.stack([entries_of(runner, 3, 1), entries_of(runner, 3, 2)], axis=1), zero)
    before = bits(folded, 1)
    for array in folded.rows[0]:
        array[...] = 9
    assert bits(folded, 1) == before
