"""Windows without a service: any mixture of rows and chunks gives the fold of each position's last entries."""

import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import WINDOW, WINDOWED, newest, some_inputs

from service import bundle, state, window
from service.bundle import Window
from service.runner import Runner
from service.state import Array, Row
from service.tasks import Codec
from service.window import Windowed, open_runner

some = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@cache
def windowed(models: Path, name: str) -> Windowed:
    found = open_runner(newest(models, name), 1)
    assert isinstance(found, Windowed)
    return found


@cache
def graph(models: Path, name: str) -> Runner:
    """The graph alone, which carries its state."""
    return Runner(newest(models, name), 1)


def start(models: Path, name: str) -> Row:
    return state.initial_row(newest(models, name).manifest.session_states)


def entries_of(models: Path, name: str, count: int, seed: int) -> Array:
    manifest = newest(models, name).manifest
    return Codec(manifest).encode(some_inputs(manifest, count, seed))


def expected(models: Path, name: str, entries: Array) -> tuple[list[dict[str, Array]], list[Row]]:
    """At each position the outputs and states of a fold of the last entries, one window after another."""
    runner = graph(models, name)
    initial = state.initial_row(runner.manifest.states)
    folds = [runner.run(entries[max(0, p - WINDOW) : p, None], [initial]) for p in range(1, len(entries) + 1)]
    return [{n: a[-1, 0] for n, a in fold.outputs.items()} for fold in folds], [fold.rows[0] for fold in folds]


@pytest.mark.parametrize("name", WINDOWED)
@some
@given(data=st.data())
def test_every_mixture_of_rows_and_chunks_gives_the_fold_of_the_last_entries(
    name: str, models: Path, data: st.DataObject
) -> None:
    runner = windowed(models, name)
    rng = random.Random(data.draw(st.integers(0, 2**32), label="seed"))
    count = data.draw(st.integers(1, 5), label="rows")
    lines = [entries_of(models, name, 40, rng.randrange(1000)) for _ in range(count)]
    truth = [expected(models, name, line) for line in lines]
    rows, at = [start(models, name)] * count, [0] * count
    for _ in range(6):
        chosen = [i for i in range(count) if rng.random() < 0.7 and at[i] <= 32]
        if not chosen:
            continue
        steps = rng.choice((1, 2, 4, 8))
        wanted = [rng.randint(1, steps) for _ in chosen]
        entries = np.stack([lines[i][at[i] : at[i] + steps] for i in chosen], axis=1)
        folded = runner.run(entries, [rows[i] for i in chosen], wanted)
        assert folded.finite
        for b, i in enumerate(chosen):
            outputs, states = truth[i]
            for t in range(steps - wanted[b], steps):
                for output, array in folded.outputs.items():
                    assert array[t, b].tobytes() == outputs[at[i] + t][output].tobytes()
            rows[i] = folded.rows[b]
            at[i] += steps
            *graphs, kept, length = rows[i]
            assert state.equal(tuple(graphs), states[at[i] - 1])
            held = lines[i][max(0, at[i] - WINDOW) : at[i]]
            assert int(length[0]) == len(held) and kept[WINDOW - len(held) :].tobytes() == held.tobytes()


@pytest.mark.parametrize("most", [1, 50])
def test_large_windows_are_folded_in_parts(most: int, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "tiny-window-weather"
    entries = entries_of(models, name, 30, 3)
    monkeypatch.setattr(window, "MOST_NUMBERS", most)
    found = Windowed(graph(models, name), WINDOW).run(entries[:, None], [start(models, name)])
    outputs, states = expected(models, name, entries)
    assert found.outputs["mean"][:, 0].tobytes() == np.stack([one["mean"] for one in outputs]).tobytes()
    assert state.equal(found.rows[0][:-2], states[-1])


def test_a_number_that_is_not_finite_is_told(models: Path) -> None:
    entries = entries_of(models, "tiny-window-weather", 9, 3)
    runner, initial = windowed(models, "tiny-window-weather"), start(models, "tiny-window-weather")
    assert runner.run(entries[:, None], [initial]).finite
    entries[-1] = np.nan
    assert not runner.run(entries[:, None], [initial], [1]).finite


def test_a_window_is_part_of_what_a_session_pins(models: Path) -> None:
    same = newest(models, "tiny-letters").manifest
    found = newest(models, "tiny-window-letters").manifest
    other = found.model_copy(update={"memory": Window(window=WINDOW + 1)})
    assert same.files["model.onnx"] == found.files["model.onnx"]
    assert len({same.graph_sha256, found.graph_sha256, other.graph_sha256}) == 3
    assert found.state_bytes == same.state_bytes + 4 * WINDOW + 4


def test_a_state_cannot_be_named_like_the_window(models: Path) -> None:
    manifest = newest(models, "tiny-window-people").manifest.model_dump(mode="json")
    manifest["states"][0]["name"] = "window"
    with pytest.raises(ValueError, match="window"):
        bundle.Manifest.model_validate(manifest)
