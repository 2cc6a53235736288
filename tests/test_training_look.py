"""Pictures of a run: each kind of run has those that fit it, and the numbers behind them are right."""

import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from training.__main__ import app
from training.checkpoint import load_model
from training.config import recipe_from
from training.corpora import load_corpus
from training.data import Sequence
from training.device import bf16_runs
from training.evaluate import accuracy
from training.look import lags, memory
from training.look.confusion import confusion
from training.look.curves import clipped_shares
from training.look.gates import FORGETTING, MEMORIES, NEW, WEIGHTED, gates
from training.look.memory import kept_bytes
from training.model import ModelConfig, RecurrentModel, state_names
from training.tasks import TASKS

SMALL = ["--set", "model.hidden=8", "--set", "model.embedding=4", "--set", "train.max_steps=6", "--quiet"]
SMALL += ["--set", "train.evaluate_steps=3"]
ALWAYS = {"learning-curve.png", "gradient-by-lag.png", "memory.png"}


def call(*arguments: str | Path) -> Result:
    torch.set_num_threads(1)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def look(run: Path, *arguments: str) -> dict[str, Any]:
    result = call("look", run, *arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return {**found, "said": result.stdout, "pictures": {path.name for path in (run / "plots").iterdir()}}


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "book.txt").write_text("the quick brown fox jumps over the $lazy_ dog. ^\n" * 200)
    out = folder / "run"
    trained = call("train", "--data", folder / "book.txt", "--out", out, "--set", "model.cell=lstm", *SMALL)
    assert trained.exit_code == 0, trained.output
    return out


def sensors(folder: Path) -> Path:
    rng = random.Random(0)
    rows = [
        f"2024-01-{1 + i // 24:02}T{i % 24:02}:00,{sensor},{i % 24 + rng.random():.3f},"
        + ("day" if 6 < i % 24 < 20 else "night")
        for sensor in "ab"
        for i in range(400)
    ]
    path = folder / "sensors.csv"
    path.write_text("time,sensor,heat,phase\n" + "\n".join(rows))
    return path


def test_a_text_model(text_run: Path) -> None:
    found = look(text_run)
    assert found["pictures"] == ALWAYS | {"gates.png", "samples.png"}
    assert "no forecasts: the run is no forecaster" in found["said"]
    assert "no confusion: the run is no classifier" in found["said"]
    assert found["gradient-by-lag"]["left"].keys() == {"lstm, trained", "rnn, fresh", "gru, fresh", "lstm, fresh"}


def test_the_gates_over_a_text_of_ones_own(text_run: Path) -> None:
    assert look(text_run, "--text", "the fox")["gates"]["steps"] == 7
    refused = call("look", text_run, "--text", "€")
    assert refused.exit_code == 1 and "never saw '€'" in refused.stderr


def test_a_run_without_its_history(text_run: Path, tmp_path: Path) -> None:
    moved = (text_run / "history.json").rename(tmp_path / "history.json")
    try:
        assert "no learning-curve: the run has no history.json" in look(text_run)["said"]
    finally:
        moved.rename(text_run / "history.json")


def test_a_forecaster_with_an_rnn(tmp_path: Path) -> None:
    columns = ["--time", "time", "--series", "sensor", "--target", "heat", "--set", "model.cell=rnn"]
    trained = call("train", "--data", sensors(tmp_path), *columns, "--out", tmp_path / "run", *SMALL)
    assert trained.exit_code == 0, trained.output
    found = look(tmp_path / "run")
    assert found["pictures"] == ALWAYS | {"forecast.png", "forecasts.png"}
    assert "no gates: the cell rnn has no gates" in found["said"]
    assert found["forecasts"]["covered"].keys() == {"a: heat", "b: heat"}


def test_a_classifier_with_a_gru(tmp_path: Path) -> None:
    columns = ["--series", "sensor", "--label", "phase", "--set", "model.cell=gru"]
    trained = call("train", "--data", sensors(tmp_path), *columns, "--out", tmp_path / "run", *SMALL)
    assert trained.exit_code == 0, trained.output
    found = look(tmp_path / "run")
    assert found["pictures"] == ALWAYS | {"gates.png", "confusion.png"}
    model, meta = load_model(tmp_path / "run")
    corpus = load_corpus(recipe_from(meta["recipe"]), tmp_path)
    counts = confusion(model, corpus.test, 2)
    assert counts.sum() == sum(int((s.weights > 0).sum()) for s in corpus.test)
    assert found["confusion"]["right"] == pytest.approx(accuracy(model, corpus.test), abs=1e-6)


def test_the_pictures_go_into_the_model_card(text_run: Path, tmp_path: Path) -> None:
    pictures = look(text_run)["pictures"]
    exported = call("export", text_run, "--name", "fox", "--models", tmp_path)
    assert exported.exit_code == 0, exported.output
    card = (tmp_path / "fox" / "1" / "README.md").read_text(encoding="utf-8")
    assert all(f"({name})" in card and (tmp_path / "fox" / "1" / name).is_file() for name in pictures)


@pytest.mark.skipif(not bf16_runs("cpu", "lstm"), reason="torch runs no lstm in bf16 on this processor")
def test_a_run_in_bf16_can_be_looked_at_where_torch_runs_none(
    text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book, lstm = text_run.parent / "book.txt", ["--set", "model.cell=lstm", "--set", "train.precision=bf16"]
    trained = call("train", "--data", book, "--out", tmp_path / "run", *lstm, *SMALL)
    assert trained.exit_code == 0, trained.output
    found = look(tmp_path / "run")
    assert "in fp32" not in found["said"]
    monkeypatch.setattr(memory, "bf16_runs", lambda *_: False)
    elsewhere = look(tmp_path / "run")
    assert "in fp32: torch runs no lstm in bf16" in elsewhere["said"]
    assert elsewhere["memory"]["bytes_per_step"] != found["memory"]["bytes_per_step"]


def test_no_run_is_one_line() -> None:
    refused = call("look", "absent")
    assert refused.exit_code == 1 and "train first" in refused.stderr and "Traceback" not in refused.output


def model_of(cell: str, layers: int = 2, **between: bool) -> RecurrentModel:
    torch.manual_seed(0)
    return RecurrentModel(ModelConfig("language-model", cell, layers, 6, embedding=4, vocabulary=9, **between)).eval()


@pytest.mark.parametrize("between", [{}, {"norm": True}, {"skip": True}, {"norm": True, "skip": True}])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_gates_lead_to_the_models_own_memory(cell: str, between: dict[str, bool]) -> None:
    model = model_of(cell, layers=3, **between)
    symbols = torch.randint(0, 9, (12,))
    found = gates(model, symbols)
    _, state = model(symbols[:, None], model.initial_state(1))
    torch.testing.assert_close(found[MEMORIES][-1], state[-1][-1, 0].detach(), rtol=1e-4, atol=1e-5)
    before = torch.cat((torch.zeros(1, 6), found[MEMORIES][:-1]))
    torch.testing.assert_close(found[MEMORIES], found[FORGETTING] * before + found[WEIGHTED])
    assert (found[WEIGHTED].abs() <= found[NEW].abs()).all()


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@torch.no_grad()
def test_the_gradient_by_lag_is_that_of_a_changed_state(cell: str) -> None:
    """Against the differences that a small change of each unit makes."""
    model = model_of(cell)
    batch = lags.windows([Sequence("a", torch.randint(0, 9, (6,)), torch.randint(0, 9, (6,)), torch.ones(6))], 6, 1)

    def loss(at: int, part: int, change: torch.Tensor) -> float:
        state = model.initial_state(1)
        for t in range(6):
            if t == at:
                state = tuple(tensor + change * (i == part) for i, tensor in enumerate(state))
            outputs, state = model(batch.inputs[t : t + 1], state)
        return float(nn.functional.cross_entropy(outputs["logits"][0], batch.targets[-1]))

    with torch.enable_grad():
        found = lags.by_lag(model, TASKS["language-model"], batch)
    assert len(found) == 6
    for lag in (1, 3):
        changes = product(range(len(state_names(cell))), torch.eye(12).reshape(12, 2, 1, 6) * 0.02)
        slopes = [(loss(6 - lag, part, unit) - loss(6 - lag, part, -unit)) / 0.04 for part, unit in changes]
        assert found[lag - 1] == pytest.approx(float(torch.tensor(slopes).norm()), rel=0.02)


def test_the_kept_bytes_of_a_known_pass() -> None:
    module = nn.Linear(10, 20, bias=False)
    inputs = torch.randn(5, 10)
    # a linear layer keeps its input and its weight; the weight is the module's own
    assert kept_bytes(lambda: module(inputs), module) == 5 * 10 * 4


def test_clipped_shares_count_from_line_to_line() -> None:
    history = [{"step": 10, "clipped": 1.0}, {"step": 20, "clipped": 0.5}, {"step": 40, "clipped": 0.5}]
    assert clipped_shares(history) == pytest.approx([1.0, 0.0, 0.5])
