"""The exported graph against the module: close to PyTorch, and the same bits however it is cut or batched."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training import graph, parity
from training.model import ForecastHead, ModelConfig, RecurrentModel, ValueEncoder, state_names
from training.nodes import Nodes, softplus
from training.parity import ExportError

CELLS = ("rnn", "leaky", "gru", "lstm")
TEXT: dict[str, Any] = {"task": "language-model", "vocabulary": 11, "embedding": 6}
VALUES: dict[str, Any] = {
    "task": "forecaster",
    "periods": (0.0, 24.0, 0.0),
    "targets": (2, 0),
    "quantiles": (0.1, 0.5, 0.9),
    "residual": True,
}


def random_model(seed: int = 0, **config: object) -> RecurrentModel:
    """A model with weights and scales far from their initial values."""
    torch.manual_seed(seed)
    module = RecurrentModel(ModelConfig(**{"cell": "lstm", "layers": 1, "hidden": 13, **config})).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        if isinstance(module.encoder, ValueEncoder):
            module.encoder.mean.copy_(torch.randn_like(module.encoder.mean) * 50)
            module.encoder.scale.copy_(torch.rand_like(module.encoder.scale) * 20 + 1)
        if isinstance(module.head, ForecastHead):
            module.head.target_mean.copy_(torch.randn_like(module.head.target_mean) * 50)
            module.head.target_scale.copy_(torch.rand_like(module.head.target_scale) + 0.5)
    return module


def serialised(module: RecurrentModel) -> bytes:
    return graph.build(module).SerializeToString()


FORECASTER = random_model(layers=2, **VALUES)
FORECASTER_STEP = parity.ort_step(serialised(FORECASTER))


@pytest.mark.parametrize("kind", [TEXT, VALUES], ids=["symbols", "values"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_passes_every_check(cell: str, layers: int, kind: dict[str, Any]) -> None:
    module = random_model(cell=cell, layers=layers, **kind)
    checks = parity.check(module, serialised(module))
    assert checks["parity"]["outputs"] <= 1e-4
    assert checks["parity"]["states"] <= 1e-4
    assert checks["chunk_invariant"] and checks["batch_invariant"] and checks["thread_invariant"]
    assert checks["batches"] == [1, 2, 7, 64] and len(checks["chunks"]) == 5
    assert checks["onnxruntime"] == onnxruntime.__version__ and checks["cpu"]


@pytest.mark.parametrize(
    "config",
    [
        {"targets": (0,), "periods": (0.0,), "residual": False},
        {"targets": (0,), "periods": (0.0,), "quantiles": (0.5,)},
        {"targets": (1, 2), "periods": (24.0, 0.0, 0.0, 365.25), "quantiles": (), "residual": True},
        {"targets": (0, 1, 3), "periods": (0.0, 0.0, 7.0, 0.0), "quantiles": (0.1, 0.9), "residual": True},
        {"task": "classifier", "periods": (24.0,), "labels": 3},
        {"task": "classifier", "vocabulary": 9, "embedding": 4, "labels": 5},
    ],
)
def test_every_kind_of_model_passes_every_check(config: dict[str, Any]) -> None:
    module = random_model(**{"task": "forecaster", "quantiles": (0.1, 0.5, 0.9), **config})
    checks = parity.check(module, serialised(module))
    assert max(checks["parity"]["outputs"], checks["parity"]["states"]) <= 1e-4


@pytest.mark.parametrize("hidden", [1, 5, 16, 33])
def test_odd_sizes_and_batches_change_no_bit(hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "BATCHES", (1, 3, 5, 8, 13, 31, 32, 33, 100))
    module = random_model(hidden=hidden, layers=2, cell="gru", **VALUES)
    step = parity.ort_step(serialised(module), threads=2)
    parity.check_chunks(module, step)
    parity.check_batches(module, step)


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, 29)), rows=st.lists(st.integers(0, 19), min_size=1, max_size=20))
def test_any_cut_of_any_rows_gives_the_same_bits(cuts: set[int], rows: list[int]) -> None:
    entries = parity.plausible_entries(FORECASTER, 30, 20)
    whole = parity.fold(FORECASTER_STEP, entries, [30], parity.zero_states(FORECASTER, 20))
    lengths = [stop - start for start, stop in pairwise([0, *sorted(cuts), 30])]
    part = parity.fold(FORECASTER_STEP, entries[:, rows], lengths, parity.zero_states(FORECASTER, len(rows)))
    for name, value in part.items():
        assert np.ascontiguousarray(whole[name][:, rows]).tobytes() == value.tobytes()


def test_perturbed_weight_is_refused() -> None:
    module = random_model(layers=2, **TEXT)
    onnx = serialised(module)
    with torch.no_grad():
        module.rnn.get_parameter("weight_hh_l1")[3, 2] += 0.05
    with pytest.raises(ExportError, match=r"parity: (outputs|states) differ from PyTorch by"):
        parity.check(module, onnx)


def test_numbers_that_are_not_finite_are_refused() -> None:
    module = random_model(**TEXT)
    with torch.no_grad():
        module.head.linear.bias[0] = float("nan")
    with pytest.raises(ExportError, match="parity"):
        parity.check(module, serialised(module))


def test_chunk_dependence_is_refused() -> None:
    def leaky(entries: parity.Array, states: parity.Tensors) -> tuple[parity.Tensors, parity.Tensors]:
        outputs, after = FORECASTER_STEP(entries, states)
        return {name: value + np.float32(1e-3 * len(entries)) for name, value in outputs.items()}, after

    with pytest.raises(ExportError, match="invariance: chunks of"):
        parity.check_chunks(FORECASTER, leaky)


def test_batch_dependence_is_refused() -> None:
    def leaky(entries: parity.Array, states: parity.Tensors) -> tuple[parity.Tensors, parity.Tensors]:
        outputs, after = FORECASTER_STEP(entries, states)
        return outputs, {name: value + value.mean(axis=1, keepdims=True) for name, value in after.items()}

    with pytest.raises(ExportError, match="invariance: rows alone against B=2: 'h'"):
        parity.check_batches(FORECASTER, leaky)


def test_large_cell_states_are_compared_relatively() -> None:
    ours, theirs = {"c": np.full((1, 1, 2), 3000.1, np.float32)}, {"c": np.full((1, 1, 2), 3000.0, np.float32)}
    assert parity._state_distance(ours, theirs) == pytest.approx(0.1 / 3000, rel=1e-2)


def test_graph_names_its_axes_and_states() -> None:
    module = random_model(layers=2, **VALUES)
    session = onnxruntime.InferenceSession(serialised(module), providers=["CPUExecutionProvider"])
    inputs = {value.name: value.shape for value in session.get_inputs()}
    outputs = {value.name: value.shape for value in session.get_outputs()}
    state = [2, "B", 13]
    assert inputs == {"values": ["T", "B", 3], "h": state, "c": state}
    assert outputs == {"mean": ["T", "B", 2], "quantiles": ["T", "B", 3, 2], "h_next": state, "c_next": state}


def test_same_module_gives_the_same_bytes() -> None:
    assert serialised(random_model(**TEXT)) == serialised(random_model(**TEXT))


def test_quantiles_never_cross_in_the_graph() -> None:
    entries = parity.plausible_entries(FORECASTER, 50, 9)
    outputs, _ = FORECASTER_STEP(entries, parity.zero_states(FORECASTER, 9))
    assert (np.diff(outputs["quantiles"], axis=2) >= 0).all()


@pytest.mark.parametrize("x", [-90.0, -20.0, -3.0, -1e-3, 0.0, 1e-3, 0.7, 5.0, 20.0, 90.0])
def test_softplus_of_plain_operations(x: float) -> None:
    expected = float(torch.nn.functional.softplus(torch.tensor(x, dtype=torch.float64)))
    assert run_on(softplus, x) == pytest.approx(expected, rel=1e-6, abs=3e-8)


@pytest.mark.parametrize("period", [24.0, 365.25, 7.0, 0.3])
def test_waves_of_plain_operations(period: float) -> None:
    encoder = ValueEncoder((period,))
    nodes = Nodes("", {})
    nodes.name(graph._waves(nodes, encoder), "y")
    hours = np.linspace(-400, 400, 1601, dtype=np.float32)
    waves = run_nodes(nodes, "values", hours[:, None, None])
    angle = 2 * np.pi * hours.astype(np.float64) / np.float32(period)
    np.testing.assert_allclose(waves[:, 0, 0], np.sin(angle), atol=3e-6)
    np.testing.assert_allclose(waves[:, 0, 1], np.cos(angle), atol=3e-6)


def run_on(function: Callable[[Nodes, str], str], x: float) -> float:
    nodes = Nodes("", {})
    nodes.name(function(nodes, "x"), "y")
    return float(run_nodes(nodes, "x", np.array([x], np.float32))[0])


def run_nodes(nodes: Nodes, name: str, values: parity.Array) -> parity.Array:
    info = graph.helper.make_tensor_value_info
    inputs = [info(name, graph.TensorProto.FLOAT, values.shape)]
    outputs = [info("y", graph.TensorProto.FLOAT, None)]
    whole = graph.helper.make_graph(nodes.nodes, "g", inputs, outputs, list(nodes.constants.values()))
    opset = [graph.helper.make_opsetid("", graph.OPSET)]
    model = graph.helper.make_model(whole, opset_imports=opset, ir_version=graph.IR_VERSION)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: parity.Array = session.run(None, {name: values})[0]
    return result


@pytest.mark.parametrize("cell", CELLS)
def test_state_names_are_the_graphs(cell: str) -> None:
    inputs, outputs = graph.signature(random_model(cell=cell, **TEXT))
    for name in state_names(cell):
        assert inputs[name] == outputs[f"{name}_next"] == ("float32", [1, "B", 13])
