"""Bidirectional models: both ends of each row, the same in ONNX, trained on whole sequences and served by predict."""

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live import Server, problem
from test_training_cli import call, last_json
from test_training_export import label_model
from test_training_parity import random_model
from torch import nn

from service import bundle
from training import parity, whole
from training.checkpoint import load_model
from training.export import export_model
from training.layers import turned
from training.model import ModelConfig
from training.parity import ExportError

SYMBOLS: dict[str, Any] = {"task": "classifier", "vocabulary": 9, "embedding": 5, "labels": 3, "bidirectional": True}
VALUES: dict[str, Any] = {"task": "classifier", "periods": (0.0, 24.0), "labels": 3, "bidirectional": True}
CELLS = ("rnn", "rnn-relu", "gru", "lstm")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("cell", CELLS)
def test_layers_compute_what_torchs_own_bidirectional_module_does(cell: str) -> None:
    ours = random_model(cell=cell, layers=2, hidden=7, **SYMBOLS).rnn
    kind = {"rnn": nn.RNN, "rnn-relu": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[cell]
    more = {"nonlinearity": "relu"} if cell == "rnn-relu" else {}
    theirs = kind(5, 7, num_layers=2, bidirectional=True, **more)
    theirs.load_state_dict(ours.state_dict())
    x, lengths = torch.randn(9, 3, 5), torch.tensor([9, 4, 1])
    zero = tuple(torch.zeros(2, 3, 7) for _ in range(2 if cell == "lstm" else 1))
    got, _ = ours(x, zero, lengths)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
    wanted, _ = nn.utils.rnn.pad_packed_sequence(theirs(packed)[0])
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(got[:length, row], wanted[:length, row])


def test_rows_are_turned_within_their_lengths() -> None:
    x = torch.arange(8.0).reshape(4, 2, 1)
    assert turned(x, torch.tensor([4, 2]))[..., 0].T.tolist() == [[6, 4, 2, 0], [3, 1, 5, 7]]
    assert torch.equal(turned(turned(x, torch.tensor([3, 1])), torch.tensor([3, 1])), x)


@pytest.mark.parametrize("kind", [SYMBOLS, VALUES], ids=["symbols", "values"])
@pytest.mark.parametrize("between", [{}, {"skip": True, "norm": True}], ids=str)
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_the_graph_says_what_the_module_says(cell: str, between: dict[str, bool], kind: dict[str, Any]) -> None:
    module = random_model(cell=cell, layers=3, **between, **kind)
    checks = whole.check(module, whole.build(module).SerializeToString())
    assert checks["parity"]["outputs"] <= 1e-4
    other = random_model(1, cell=cell, layers=3, **between, **kind)
    with pytest.raises(ExportError, match="parity"):
        whole.check(other, whole.build(module).SerializeToString())


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    for task in ("language-model", "forecaster"):
        with pytest.raises(ValueError, match="it would read what it is to predict"):
            ModelConfig(task, "gru", 1, 4, embedding=2, vocabulary=3, bidirectional=True)
    _, meta = label_model()
    both = random_model(cell="leaky", **{**SYMBOLS, "vocabulary": 7, "labels": 2})
    with pytest.raises(ExportError, match="leaky is not exported"):
        export_model(both, meta, tmp_path, "tags")
    both = random_model(cell="gru", **{**SYMBOLS, "vocabulary": 7, "labels": 2})
    with pytest.raises(ExportError, match="float32 only"):
        export_model(both, meta, tmp_path, "tags", int8=True)
    assert not list(tmp_path.iterdir())


def test_a_label_that_hangs_on_what_follows_is_learnt_and_served(tmp_path: Path) -> None:
    """The label is the phase of the next row, which a network that only looks back cannot know."""
    rng = random.Random(0)
    rows = []
    for entity in range(30):
        heat = [rng.choice([-1.0, 1.0]) for _ in range(rng.randrange(20, 41))]
        rows += [f"{entity},{x},{'up' if y > 0 else 'down'}" for x, y in itertools.pairwise(heat)]
    table = tmp_path / "table.csv"
    table.write_text("entity,heat,next\n" + "\n".join(rows))
    columns = ["--data", table, "--series", "entity", "--label", "next", "--quiet"]
    sizes = ["model.hidden=16", "model.layers=1", "train.batch=8", "train.max_steps=200", "train.evaluate_steps=100"]
    keys = [part for key in [*sizes, "train.learning_rate=2e-2"] for part in ("--set", key)]
    figures = {}
    for both in (True, False):
        run = tmp_path / str(both)
        trained = call("train", *columns, "--out", run, *keys, "--set", f"model.bidirectional={str(both).lower()}")
        assert trained.exit_code == 0, trained.output
        figures[both] = float(last_json(trained)["model"])  # type: ignore[arg-type]
    assert figures[False] < 0.7 and figures[True] > 0.85  # the last row's label is not to be known
    exported = call("export", tmp_path / "True", "--name", "tags", "--models", tmp_path / "models")
    assert exported.exit_code == 0, exported.output
    manifest = bundle.load(tmp_path / "models" / "tags" / "1").manifest
    assert not manifest.streamable and manifest.states == () and manifest.memory == "carried"
    card = (tmp_path / "models" / "tags" / "1" / "README.md").read_text()
    assert "from both ends" in card and "/sessions/" not in card and "/predict" in card
    served(tmp_path, manifest.labels)


def served(folder: Path, labels: tuple[str, ...]) -> None:
    """A real server answers what the module says of whole sequences, and keeps no session of them."""
    module, _ = load_model(folder / "True")
    sequences = [np.random.default_rng(n).choice([-1.0, 1.0], n).tolist() for n in (1, 5, 33)]
    server = Server(folder / "models", folder, log_retention="all").start()
    try:
        body = {"sequences": sequences, "predictions": "all"}
        answers = server.ok(server.post("/v1/models/tags/predict", body))["predictions"]
        refused = server.post("/v1/sessions/x/steps", {"model": "tags", "inputs": [1.0]})
        problem(refused, 422, "not_streamable")
    finally:
        server.close()
    for sequence, said in zip(sequences, answers, strict=True):
        entries = np.asarray(sequence, np.float32)[:, None, None]
        logits = parity.torch_step(module)(entries, {})[0]["logits"][:, 0]
        chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        found = [[one["probabilities"][label] for label in labels] for one in said]
        np.testing.assert_allclose(found, chances, atol=1e-5)
