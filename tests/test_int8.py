"""int8 models: integer products with fixed scales, the same bits in any company, and no worse than the bound."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training_export import text_model, value_model
from test_training_parity import CELLS, TEXT, VALUES, random_model, run_nodes
from tiny import newest
from typer.testing import CliRunner, Result

from service import bundle
from service.registry import Registry
from service.runner import Runner
from service.settings import Settings
from service.store.memory import MemoryStore
from training import export, graph, int8, parity, reference
from training.__main__ import app
from training.export import Int8, export_model, int8_loss
from training.int8 import Int8Nodes, simulated
from training.model import RecurrentModel
from training.parity import ExportError

SMALL = ["--set", "model.hidden=8", "--set", "model.embedding=4", "--set", "train.max_steps=6", "--set"]
SMALL += ["train.evaluate_steps=3", "--set", "train.precision=fp32", "--set", "sample.length=20", "--quiet"]


def built(module: RecurrentModel) -> onnx.ModelProto:
    return graph.build(module, Int8Nodes)


def step_of(module: RecurrentModel, threads: int = 1) -> parity.Step:
    return parity.ort_step(built(module).SerializeToString(), threads)


def body(model: onnx.ModelProto) -> onnx.GraphProto:
    """What the Scan runs at each step."""
    scan = next(node for node in model.graph.node if node.op_type == "Scan")
    return next(attribute.g for attribute in scan.attribute if attribute.name == "body")


LSTM = random_model(layers=2, **TEXT)
LSTM_STEP = step_of(LSTM)


@pytest.mark.parametrize("kind", [TEXT, VALUES], ids=["symbols", "values"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_passes_every_check(cell: str, layers: int, kind: dict[str, Any]) -> None:
    module = random_model(cell=cell, layers=layers, **kind)
    checks = parity.check(simulated(module), built(module).SerializeToString(), int8=True)
    assert checks["chunk_invariant"] and checks["batch_invariant"] and checks["thread_invariant"]
    assert checks["parity"]["beyond"] <= 0.01 and checks["parity"]["states"] <= 0.05


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_only_products_with_an_h_are_integer_products(cell: str, layers: int) -> None:
    for kind, in_float in ((TEXT, 1), (VALUES, 2)):
        ops = [node.op_type for node in body(built(random_model(cell=cell, layers=layers, **kind))).node]
        assert ops.count("MatMulInteger") == 2 * layers - 1
        assert ops.count("QuantizeLinear") == 2 * layers - 1
        assert ops.count("Gemm") == in_float
        assert not any(op.startswith("Dynamic") for op in ops)


@pytest.mark.parametrize(("cell", "kind"), [("lstm", TEXT), ("gru", VALUES), ("rnn", TEXT)])
def test_no_batch_from_1_to_65_changes_a_bit(cell: str, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "BATCHES", tuple(range(1, 66)))
    module = random_model(cell=cell, layers=2, hidden=33, **kind)
    parity.check_batches(module, step_of(module, threads=2))


@settings(max_examples=40, deadline=None)
@given(cuts=st.sets(st.integers(1, 29)), rows=st.lists(st.integers(0, 64), min_size=1, max_size=65))
def test_any_cut_of_any_rows_gives_the_same_bits(cuts: set[int], rows: list[int]) -> None:
    entries = parity.plausible_entries(LSTM, 30, 65)
    whole = parity.fold(LSTM_STEP, entries, [30], parity.zero_states(LSTM, 65))
    lengths = [stop - start for start, stop in pairwise([0, *sorted(cuts), 30])]
    part = parity.fold(LSTM_STEP, entries[:, rows], lengths, parity.zero_states(LSTM, len(rows)))
    for name, value in part.items():
        assert np.ascontiguousarray(whole[name][:, rows]).tobytes() == value.tobytes()


def test_a_neighbour_far_out_of_range_changes_no_bit() -> None:
    module = random_model(cell="gru", layers=2, **VALUES)
    step, quiet = step_of(module), parity.plausible_entries(module, 20, 2)
    wild = quiet.copy()
    wild[:, 1] *= 1e6
    beside_quiet, beside_wild = (
        parity.fold(step, entries, [20], parity.zero_states(module, 2)) for entries in (quiet, wild)
    )
    for name, value in beside_quiet.items():
        assert value[:, 0].tobytes() == beside_wild[name][:, 0].tobytes()


def test_states_are_float32_and_finer_than_a_step_of_int8() -> None:
    _, states = LSTM_STEP(parity.plausible_entries(LSTM, 9, 3), parity.zero_states(LSTM, 3))
    assert {name: value.dtype for name, value in states.items()} == {"h": np.float32, "c": np.float32}
    counts = states["h"] * int8.STEPS
    assert np.abs(counts - np.rint(counts)).max() > 0.1


def product(h: parity.Array, weight: parity.Array) -> tuple[parity.Array, Int8Nodes]:
    nodes = Int8Nodes("", {})
    zeros = nodes.constant("zeros", np.zeros(weight.shape[1]))
    nodes.name(nodes.product("h", "weight", torch.from_numpy(weight), zeros), "y")
    return run_nodes(nodes, "h", h.astype(np.float32)), nodes


def test_a_product_of_whole_counts_is_exact_to_float32() -> None:
    rng = np.random.default_rng(0)
    counts, weight = rng.integers(-63, 64, (5, 40)), rng.integers(-127, 128, (40, 17)).astype(np.float64)
    weight[0] = 127
    got, _ = product(counts / 63, weight * 0.01)
    np.testing.assert_allclose(got, counts / 63 @ weight * 0.01, rtol=1e-6, atol=1e-6)


def test_pairs_of_products_fit_the_16_bits_of_older_cpus() -> None:
    h = np.concatenate([np.ones((1, 8)), -np.ones((1, 8))])
    got, nodes = product(h, np.stack([np.ones(8), -np.ones(8)], axis=1))
    np.testing.assert_allclose(got, [[8, -8], [-8, 8]], rtol=1e-6)
    weight = onnx.numpy_helper.to_array(nodes.constants["weight"])
    greatest = max(int8.ZERO + int8.STEPS, int8.ZERO)
    assert weight.dtype == np.int8 and np.abs(weight.astype(int)).max() == 127
    assert 2 * greatest * 127 <= 32767


def test_a_column_of_zeros_stays_zero() -> None:
    got, _ = product(np.full((1, 3), 0.5), np.zeros((3, 2)))
    assert got.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("cell", CELLS)
def test_int8_is_close_to_float32_and_not_equal(cell: str) -> None:
    torch.manual_seed(3)
    module, _ = text_model(cell=cell, hidden=24)
    entries, zero = parity.plausible_entries(module.eval(), 12, 9), parity.zero_states(module, 9)
    _, exact = parity.torch_step(module)(entries, zero)
    _, rounded = step_of(module)(entries, zero)
    assert 1e-5 < np.abs(exact["h"] - rounded["h"]).max() < 0.05


def test_another_weight_is_refused() -> None:
    module = random_model(layers=2, **TEXT)
    onnx_bytes = built(module).SerializeToString()
    with torch.no_grad():
        module.rnn.get_parameter("weight_hh_l1")[3, 2] += 0.2
    with pytest.raises(ExportError, match=r"parity: a step differs from PyTorch by"):
        parity.check(simulated(module), onnx_bytes, int8=True)


def test_numbers_that_are_not_finite_are_refused() -> None:
    module = random_model(**TEXT)
    with torch.no_grad():
        module.head.linear.bias[0] = float("nan")
    with pytest.raises(ExportError, match="parity"):
        parity.check(simulated(module), built(module).SerializeToString(), int8=True)


@pytest.mark.parametrize("kind", ["text", "values"])
def test_the_service_loads_and_runs_a_bundle(kind: str, tmp_path: Path) -> None:
    module, meta = {"text": text_model, "values": value_model}[kind]()
    export_model(module, meta, tmp_path, "tiny", int8=True)
    found = Registry(Settings(models_dir=tmp_path, store="memory"), MemoryStore(), lambda events: None)
    model = found.get("tiny")
    assert found.problems == {} and model.runner.batches_exactly
    manifest = model.bundle.manifest
    assert (manifest.quantization, manifest.tolerance) == ("int8", 0.05)
    assert {state.dtype for state in manifest.states} == {"float32"}
    assert " units, int8" in (tmp_path / "tiny/1/README.md").read_text()


def test_a_manifest_from_before_is_still_read(tmp_path: Path) -> None:
    path = export_model(*text_model(), tmp_path, "tiny")
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["quantization"], manifest["tolerance"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    read = bundle.load(path).manifest
    assert (read.quantization, read.tolerance) == ("none", 1e-4)


def test_int8_is_smaller() -> None:
    module, _ = text_model(hidden=64)
    assert built(module).ByteSize() < 0.5 * graph.build(module).ByteSize()


def test_an_embedding_too_large_to_fold_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "FOLDED_BYTES", 0)
    module = random_model(layers=2, **TEXT)
    for whole, exact, rounds in (
        (graph.build(module), module, False),
        (built(module), simulated(module), True),
    ):
        names = {constant.name for constant in whole.graph.initializer}
        assert "embedding" in names and "layer0.table" not in names
        checks = parity.check(exact, whole.SerializeToString(), int8=rounds)
        assert checks["batch_invariant"] and checks["chunk_invariant"]


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [
        ({"bits per symbol": 2.0}, {"bits per symbol": 2.02}, 1.0),
        ({"share of steps right": 0.5}, {"share of steps right": 0.495}, 1.0),
        ({"error of a": 3.0, "error of b": 1.0}, {"error of a": 2.9, "error of b": 1.01}, 1.0),
        ({"bits per symbol": 2.0}, {"bits per symbol": 1.98}, -1.0),
    ],
)
def test_what_is_lost_is_held_against_the_bound(
    before: dict[str, float], after: dict[str, float], lost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, meta = text_model()
    monkeypatch.setattr(export, "run_corpus", lambda *_: None)
    monkeypatch.setattr(export, "headline", lambda model, _: before if model is module else after)
    found = int8_loss(Path("run"), module, meta, Int8(bound_percent=1.01))
    assert found["lost_percent"] == pytest.approx(lost)
    assert {name: value["int8"] for name, value in found["validation"].items()} == after
    with pytest.raises(ExportError, match=rf"int8: {lost:g} % is lost"):
        int8_loss(Path("run"), module, meta, Int8(bound_percent=0.99 if lost > 0 else -1.01))


def call(*arguments: str | Path) -> Result:
    torch.set_num_threads(1)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def a_run(task: str, folder: Path) -> Path:
    """A run of a few steps on a text, or on a table of two sensors."""
    rng = random.Random(0)
    if task == "text":
        (folder / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
        data: list[str | Path] = ["--data", folder / "book.txt"]
    else:
        rows = (
            f"2024-01-{1 + i // 24:02}T{i % 24:02}:00,{s},{i % 24 + rng.random():.3f},{'ab'[i % 2]}"
            for s in "xy"
            for i in range(400)
        )
        (folder / "table.csv").write_text("time,sensor,heat,phase\n" + "\n".join(rows))
        aim = ["--target", "heat"] if task == "forecast" else ["--label", "phase"]
        data = ["--data", folder / "table.csv", "--time", "time", "--series", "sensor", *aim]
    trained = call("train", *data, "--out", folder / "run", *SMALL)
    assert trained.exit_code == 0, trained.output
    return folder / "run"


@pytest.mark.parametrize(
    ("task", "figure"),
    [
        ("text", "bits per symbol"),
        ("forecast", "mean absolute error of heat"),
        ("labels", "share of steps right"),
    ],
)
def test_export_says_what_int8_costs_and_refuses_above_the_bound(task: str, figure: str, tmp_path: Path) -> None:
    run, models = a_run(task, tmp_path), tmp_path / "models"
    publish = ["export", run, "--name", "small", "--models", models, "--int8"]
    refused = call(*publish, "--int8-bound", -100)
    assert refused.exit_code == 1 and "% is lost, at most -100 % is allowed" in refused.stderr
    assert not models.exists()
    published = call(*publish, "--int8-bound", 100)
    assert published.exit_code == 0, published.output
    assert published.stdout.strip() == str(models / "small" / "1") and f"{figure}: " in published.stderr
    loss = newest(models, "small").manifest.metrics["int8"]
    assert loss["bound_percent"] == 100 and loss["validation"][figure].keys() == {"float32", "int8"}
    assert "float32 weights" in (models / "small" / "1" / "README.md").read_text()


def test_a_loss_is_measured_on_the_int8_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "WEIGHT_STEPS", 1)
    run = a_run("text", tmp_path)
    module, meta = export.load_model(run)
    loss = int8_loss(run, module, meta, Int8(bound_percent=1e9))
    figures = loss["validation"]["bits per symbol"]
    assert figures["int8"] != figures["float32"] and loss["lost_percent"] == pytest.approx(
        100 * (figures["int8"] / figures["float32"] - 1)
    )


def test_the_reference_model_of_the_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "BATCHES", (1, 2))
    reference.write_reference(tmp_path, int8=True)
    found = newest(tmp_path, "reference-int8")
    assert Runner(found, threads=1).batches_exactly
    manifest = found.manifest
    assert (len(manifest.symbols), manifest.layers, manifest.hidden, manifest.cell) == (128, 2, 512, "lstm")
    assert found.graph.stat().st_size < 5e6
