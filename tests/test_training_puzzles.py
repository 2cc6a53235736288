"""The adding problem and copy memory: what is asked has one right answer, which the inputs hold."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from training import puzzles
from training.__main__ import app
from training.config import DataRecipe
from training.data import Corpus, DataError

SMALL = "--set train.precision=fp32 --quiet"


def data(steps: int) -> DataRecipe:
    return DataRecipe(sequences=40, validation=0.1, test=0.2, steps=steps)


def train(out: Path, options: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    done = CliRunner().invoke(app, ["train", "--out", str(out), *options.split(), *SMALL.split()])
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_sum_of_two_marked_numbers() -> None:
    corpus = puzzles.adding(data(31))
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [28, 4, 8]
    for sequence in corpus.train + corpus.validation + corpus.test:
        values, marks = sequence.inputs.T
        assert len(sequence) == 31 and values.min() >= 0 and values.max() < 1
        assert marks[:15].sum() == marks[15:].sum() == 1
        assert sequence.targets[-1, 0].item() == pytest.approx(float(values[marks > 0].sum()))
        assert sequence.weights.nonzero().tolist() == [[30, 0]]


def test_the_letters_come_again_when_asked_for() -> None:
    corpus = puzzles.copy_memory(data(30))
    for sequence in corpus.train + corpus.validation + corpus.test:
        given = "".join(corpus.symbols[i] for i in sequence.inputs)
        wanted = "".join(corpus.labels[i] for i in sequence.targets)
        letters = given[:10]
        assert set(letters) <= set("abcdefgh")
        assert given == letters + "-" * 29 + "?" * 11 and wanted == "-" * 40 + letters
        assert (sequence.weights == 1).all()
    assert corpus.notes == [f"without a memory of the letters: {10 * math.log(8) / 50:.4f} nats per step"]


@pytest.mark.parametrize("make", [puzzles.adding, puzzles.copy_memory])
def test_a_seed_makes_the_data(make: Callable[[DataRecipe], Corpus]) -> None:
    one, other = make(data(20)), make(data(20))
    assert one.sha256 == other.sha256 != make(data(21)).sha256
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(one.test, other.test, strict=True))
    given = [tuple(sequence.inputs.flatten().tolist()) for sequence in one.train + one.validation + one.test]
    assert len(set(given)) == 40  # nothing that tests was learnt


def test_what_makes_no_puzzle_is_refused() -> None:
    for steps in (1, 100_001):
        with pytest.raises(DataError, match=r"data\.steps"):
            puzzles.adding(data(steps))
    with pytest.raises(DataError, match=r"data\.sequences"):
        puzzles.copy_memory(DataRecipe(sequences=3, steps=20))


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gates_learn_to_add(tmp_path: Path, cell: str) -> None:
    options = (
        f"--recipe adding --set data.steps=50 --set data.sequences=3000 --set model.hidden=16 --set model.cell={cell}"
    )
    found = train(tmp_path / "run", options + " --set model.chrono=50 --set train.max_steps=300")
    figures = found["squared_error"]["adding"]["sum"]
    assert figures["steps"] == 240 and figures["training mean"] == pytest.approx(1 / 6, abs=0.03)
    assert figures["model"] < 0.01


@pytest.mark.slow
def test_a_memory_copies_better_than_chance(tmp_path: Path) -> None:
    options = "--recipe copy-memory --set data.steps=10 --set data.sequences=3000 --set model.chrono=20"
    found = train(tmp_path / "run", options + " --set model.hidden=48 --set train.max_steps=400")
    assert found["steps"] == 150 * 30
    assert found["nats per step"] < 0.97 * 10 * math.log(8) / 30
