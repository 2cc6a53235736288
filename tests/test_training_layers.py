"""Layers, what lies between them and how they begin: in PyTorch, and the same in the exported graph."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_training_export import text_model
from test_training_parity import CELLS, TEXT, VALUES, random_model, serialised
from torch import nn

from training import graph, parity
from training.checkpoint import load_weights, weights
from training.export import export_model
from training.int8 import Int8Nodes, simulated
from training.layers import Layers, drop
from training.model import ModelConfig, RecurrentModel
from training.parity import ExportError


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def model(seed: int = 0, **config: object) -> RecurrentModel:
    torch.manual_seed(seed)
    return RecurrentModel(ModelConfig(**{**TEXT, "cell": "lstm", "layers": 2, "hidden": 8, **config}))


@pytest.mark.parametrize("cell", ["rnn", "rnn-relu", "gru", "lstm"])
def test_plain_layers_compute_what_torchs_own_module_does(cell: str) -> None:
    ours = model(cell=cell, layers=3).rnn.eval()
    kind = {"rnn": nn.RNN, "rnn-relu": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[cell]
    theirs = kind(6, 8, num_layers=3, **({"nonlinearity": "relu"} if cell == "rnn-relu" else {}))
    theirs.load_state_dict(ours.state_dict())
    x, state = torch.randn(9, 4, 6), tuple(torch.randn(3, 4, 8) for _ in range(2 if cell == "lstm" else 1))
    got, after = ours(x, state)
    wanted, wanted_after = theirs(x, state if cell == "lstm" else state[0])
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(after, wanted_after if cell == "lstm" else (wanted_after,))


def test_a_leaky_state_keeps_its_share() -> None:
    layers = model(cell="leaky", layers=1, alpha=0.25).rnn
    x, h = torch.randn(1, 3, 6), torch.randn(1, 3, 8)
    hidden, (after,) = layers(x, (h,))
    w_ih, w_hh, b_ih, b_hh = (
        layers.get_parameter(f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    wanted = 0.75 * h[0] + 0.25 * torch.tanh(x[0] @ w_ih.T + b_ih + b_hh + h[0] @ w_hh.T)
    torch.testing.assert_close(hidden[0], wanted)
    torch.testing.assert_close(after[0], wanted)


def test_skip_and_norm_are_where_they_are_said_to_be() -> None:
    layers = model(layers=2, skip=True, norm=True).rnn.eval()
    x, zero = torch.randn(5, 3, 6), torch.zeros(1, 3, 8)
    first, _ = layers._layer(0, x, (zero, zero))
    second, _ = layers._layer(1, layers.norms[0](first), (zero, zero))
    got, _ = layers(x, (torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)))
    torch.testing.assert_close(got, layers.norms[1](first + second))


@pytest.mark.parametrize("kind", [TEXT, VALUES], ids=["symbols", "values"])
@pytest.mark.parametrize("between", [{"skip": True}, {"norm": True}, {"skip": True, "norm": True}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_is_exported_with_what_lies_between(
    cell: str, between: dict[str, bool], kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "BATCHES", (1, 2, 7, 33))
    module = random_model(cell=cell, layers=3, **between, **kind)
    checks = parity.check(module, serialised(module))
    assert checks["chunk_invariant"] and checks["batch_invariant"] and checks["thread_invariant"]
    eight = graph.build(module, Int8Nodes).SerializeToString()
    checks = parity.check(simulated(module), eight, int8=True)
    assert checks["chunk_invariant"] and checks["batch_invariant"] and checks["parity"]["beyond"] <= 0.01


@pytest.mark.parametrize("hidden", [1, 5, 16, 31])
@pytest.mark.parametrize("between", [{}, {"skip": True, "norm": True}], ids=str)
def test_a_relu_cell_is_exported(between: dict[str, bool], hidden: int) -> None:
    module = model(cell="rnn-relu", layers=2, hidden=hidden, **between).eval()
    with torch.no_grad():
        for name, parameter in module.rnn.named_parameters():
            parameter.mul_(0.8) if "weight_hh" in name else parameter.add_(torch.randn_like(parameter) * 0.3)
    assert parity.check(module, serialised(module))["batch_invariant"]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hidden=st.integers(1, 40), seed=st.integers(0, 99))
def test_normalisation_changes_no_bit_at_any_size(hidden: int, seed: int) -> None:
    module = random_model(seed, cell="gru", layers=2, hidden=hidden, skip=True, norm=True, **TEXT)
    step = parity.ort_step(serialised(module), threads=2)
    parity.check_chunks(module, step)
    parity.check_batches(module, step)


def test_only_bounded_inputs_are_integer_products() -> None:
    def integers(**config: object) -> int:
        module = random_model(layers=3, **TEXT, **config)
        body = next(node for node in graph.build(module, Int8Nodes).graph.node if node.op_type == "Scan")
        step = next(attribute.g for attribute in body.attribute if attribute.name == "body")
        return [node.op_type for node in step.node].count("MatMulInteger")

    assert integers() == 5
    assert integers(skip=True) == 4  # layer 2 reads a sum
    assert integers(norm=True) == 3
    assert integers(cell="rnn-relu") == 0


def test_int8_of_a_relu_cell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="relu cell has no bound"):
        export_model(*text_model(cell="rnn-relu"), tmp_path, "tiny", int8=True)
    assert not list(tmp_path.iterdir())


def test_tied_weights_are_one_tensor_that_survives_a_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    first, other = model(embedding=8, tied=True), model(1, embedding=8, tied=True)
    assert first.head.linear.weight is first.encoder.weight
    tensors = weights(first)
    save_file(tensors, tmp_path / "model.safetensors")
    load_weights(tmp_path, other)
    assert other.head.linear.weight is other.encoder.weight
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in first.state_dict().items())
    assert sum(p.numel() for p in first.parameters()) == sum(tensor.numel() for tensor in tensors.values())
    assert parity.check(first.eval(), serialised(first))["parity"]["outputs"] <= 1e-4


def test_locked_dropout_keeps_one_mask_for_all_steps() -> None:
    torch.manual_seed(0)
    locked = drop(torch.ones(50, 4, 40), 0.5, True, True)
    assert (locked == locked[0]).all() and set(locked.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(locked[:, 0], locked[:, 1])
    free = drop(torch.ones(50, 4, 40), 0.5, True, False)
    assert not torch.equal(free[0], free[1])
    assert torch.equal(drop(torch.ones(2, 2, 2), 0.5, False, True), torch.ones(2, 2, 2))


@pytest.mark.parametrize("cell", ["rnn", "leaky", "gru", "lstm"])
@pytest.mark.parametrize(
    "share",
    [{"dropout": 0.5}, {"input_dropout": 0.5}, {"weight_dropout": 0.5}, {"dropout": 0.5, "locked": True}],
    ids=str,
)
def test_dropout_is_of_training_alone(share: dict[str, Any], cell: str) -> None:
    module = model(cell=cell, layers=2, **share)
    symbols, zero = torch.randint(11, (6, 3)), module.initial_state(3)
    first, second = (module.train()(symbols, zero)[0]["logits"] for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (module.eval()(symbols, zero)[0]["logits"] for _ in range(2))
    assert torch.equal(first, second)


def test_dropped_weights_are_recurrent_ones_and_learn() -> None:
    module = model(layers=1, weight_dropout=0.9)
    outputs, _ = module.train()(torch.randint(11, (6, 3)), tuple(torch.ones(1, 3, 8) for _ in range(2)))
    outputs["logits"].sum().backward()
    recurrent, given = module.rnn.get_parameter("weight_hh_l0").grad, module.rnn.get_parameter("weight_ih_l0").grad
    assert recurrent is not None and given is not None
    assert 0.7 < (recurrent == 0).float().mean() < 1 and (given == 0).float().mean() < 0.5


def test_an_irnn_begins_with_the_identity() -> None:
    layers = model(cell="rnn-relu", layers=2, start="identity").rnn
    for i in range(2):
        assert torch.equal(layers.get_parameter(f"weight_hh_l{i}").data, torch.eye(8))
        assert not layers.get_parameter(f"bias_hh_l{i}").any() and not layers.get_parameter(f"bias_ih_l{i}").any()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_chrono_spreads_memories_from_one_step_to_the_longest(cell: str) -> None:
    layers = model(cell=cell, layers=1, hidden=400, chrono=100).rnn
    both = layers.get_parameter("bias_ih_l0") + layers.get_parameter("bias_hh_l0")
    memory = both[400:800].exp() + 1  # an open gate sigmoid(b) forgets 1 / (1 + e^b) a step
    assert 2 <= memory.min() < 5 and 90 < memory.max() <= 100
    assert memory.mean().item() == pytest.approx(51, abs=6)
    if cell == "lstm":
        assert torch.equal(both[:400], -both[400:800])


def test_the_forget_bias_is_the_recipes() -> None:
    layers: Layers = model(forget_bias=2.5).rnn
    both = layers.get_parameter("bias_ih_l1") + layers.get_parameter("bias_hh_l1")
    assert (both[8:16] == 2.5).all() and not both[:8].any()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tied": True}, "model.embedding equal to model.hidden"),
        ({"tied": True, "task": "classifier", "labels": 2, "embedding": 8}, "language models"),
        ({"chrono": 2}, "3 or more"),
        ({"chrono": 50, "cell": "rnn"}, "lstm or a gru"),
        ({"alpha": 0.0}, "model.alpha"),
        ({"weight_dropout": 1.0}, "below 1"),
        ({"dropout": math.nan}, "below 1"),
        ({"start": "zero"}, "orthogonal, identity"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model(**changes)


def test_a_config_from_before_is_still_read() -> None:
    old = {"task": "language-model", "cell": "gru", "layers": 1, "hidden": 4, "embedding": 2, "vocabulary": 3}
    config = ModelConfig.from_json(json.loads(json.dumps(old)))
    assert not (config.skip or config.norm or config.tied) and config.start == "orthogonal"


def test_a_deeper_bundle_is_served(tmp_path: Path) -> None:
    from service.bundle import load
    from service.runner import Runner

    shape = {"layers": 3, "skip": True, "norm": True, "tied": True, "hidden": 6, "embedding": 6}
    for version, cell in enumerate(CELLS, 1):
        path = export_model(*text_model(cell=cell, **shape), tmp_path, "deep", version)
        runner = Runner(load(path), threads=1)
        assert runner.batches_exactly
    assert np.isfinite(json.loads((path / "manifest.json").read_text())["checks"]["parity"]["outputs"])
