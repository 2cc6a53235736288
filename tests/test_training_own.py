"""Weights that were trained elsewhere: read from their shapes, refused by key, exported to what their module says."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor, nn

from service import bundle
from service.bundle import Bundle, Window
from training import memory, own, parity
from training.export import Int8, export
from training.parity import ExportError
from training.spec import read_spec

ROOT = Path(__file__).parents[1]
MEAN, SCALE = np.array([12.0, 1013.0]), np.array([9.0, 7.0])
FEATURES = [
    {"name": "temperature", "unit": "°C", "mean": 12.0, "scale": 9.0},
    {"name": "pressure", "unit": "hPa", "mean": 1013.0, "scale": 7.0},
]
TARGET = {"name": "temperature", "unit": "°C", "mean": 12.0, "scale": 9.0}
FORECASTER: dict[str, Any] = {
    "task": "forecaster",
    "memory": "carried",
    "recurrent": "rnn",
    "head": ["fc"],
    "features": FEATURES,
    "targets": [TARGET],
}
CLASSIFIER: dict[str, Any] = {
    "task": "classifier",
    "memory": {"window": 6},
    "recurrent": "rnn",
    "head": ["fc"],
    "features": FEATURES,
    "labels": ["a", "b", "c"],
}

Make = Callable[..., nn.Module]


class Net(nn.Module):
    """Somebody's module: recurrent layers and a head, batch first."""

    def __init__(self, rnn: nn.Module, fc: nn.Module, embedding: nn.Module | None = None) -> None:
        super().__init__()
        self.rnn, self.fc = rnn, fc
        if embedding is not None:
            self.emb = embedding

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.rnn(self.emb(x) if hasattr(self, "emb") else x)[0])
        return result


CELLS: dict[str, Make] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "relu": lambda *sizes, **more: nn.RNN(*sizes, nonlinearity="relu", **more),
}


def net(cell: str = "lstm", outputs: int = 1, layers: int = 1, bias: bool = True, seed: int = 0, width: int = 2) -> Net:
    torch.manual_seed(seed)
    return Net(CELLS[cell](width, 8, num_layers=layers, bias=bias, batch_first=True), nn.Linear(8, outputs)).eval()


def values(sequences: int = 5, steps: int = 20, seed: int = 0) -> np.ndarray[Any, Any]:
    """[N, T, 2] in the data's own units."""
    return (np.random.default_rng(seed).normal(size=(sequences, steps, 2)) * SCALE + MEAN).astype(np.float32)


def scaled(found: np.ndarray[Any, Any]) -> Tensor:
    return torch.tensor((found - MEAN) / SCALE, dtype=torch.float32)


def said(module: nn.Module, given: Tensor) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        result: np.ndarray[Any, Any] = module(given).numpy()
    return result


def run(path: Path, entries: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """What the published graph says of entries [N, T, ...], batch first."""
    found: Bundle = bundle.load(path)
    step = parity.ort_step(found.graph.read_bytes())
    shape = {spec.name: [spec.shape[0], len(entries), spec.shape[2]] for spec in found.manifest.states}
    states = {name: np.zeros(axes, np.float32) for name, axes in shape.items()}  # type: ignore[arg-type]
    outputs, _ = step(np.ascontiguousarray(np.moveaxis(entries, 1, 0)), states)
    return {name: np.moveaxis(array, 0, 1) for name, array in outputs.items()}


# ---------------------------------------------------------------------- cells, layers, heads


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_the_graph_says_what_the_module_says(cell: str, layers: int, bias: bool, tmp_path: Path) -> None:
    module = net(cell, layers=layers, bias=bias)
    path = export(module, FORECASTER, "own", tmp_path)
    told = {"nonlinearity": "relu"} if cell == "relu" else {}
    again = export(module.state_dict(), FORECASTER | told, "own", tmp_path)
    assert bundle.load(path).manifest.graph_sha256 == bundle.load(again).manifest.graph_sha256
    expected = said(module, scaled(values())) * 9.0 + 12.0
    np.testing.assert_allclose(run(path, values())["mean"], expected, rtol=1e-5, atol=1e-5)
    manifest = bundle.load(path).manifest
    assert (manifest.cell, manifest.layers, manifest.hidden) == ({"relu": "rnn-relu"}.get(cell, cell), layers, 8)
    assert manifest.memory == "carried" and manifest.targets[0].std == 9.0


def test_a_head_of_many_layers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    head = nn.Sequential(
        nn.LayerNorm(8, eps=1e-3), nn.Linear(8, 9), nn.SiLU(), nn.Linear(9, 7, bias=False), nn.LeakyReLU(), nn.Tanh(),
        nn.LayerNorm(7), nn.Sigmoid(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.7)
    module = Net(nn.GRU(2, 8, batch_first=True), head).eval()
    names = [{"layer": "fc.0", "eps": 1e-3}, "fc.1", "silu", "fc.3", "leaky_relu", "tanh", "fc.6", "sigmoid", "fc.8"]
    path = export(module, CLASSIFIER | {"head": [*names, "relu", "fc.10"]}, "own", tmp_path)
    np.testing.assert_allclose(run(path, values())["logits"], said(module, scaled(values())), rtol=1e-5, atol=1e-5)
    manifest = bundle.load(path).manifest
    assert manifest.memory == Window(window=6)
    by_name = [name if isinstance(name, str) else name["layer"] for name in names]
    told = export(module, CLASSIFIER | {"head": [*by_name, "relu", "fc.10"]}, "own", tmp_path)
    assert bundle.load(told).manifest.graph_sha256 == manifest.graph_sha256


def test_layers_under_several_names_and_cells_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(2)
    first, second, fc = nn.LSTM(2, 8, batch_first=True), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 1)
    parts = {"a": first, "b.c": second, "fc": fc}
    weights = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}
    path = export(weights, FORECASTER | {"recurrent": ["a", "b.c"]}, "own", tmp_path)
    with torch.no_grad():
        expected = fc(second(first(scaled(values()))[0])[0]).numpy() * 9.0 + 12.0
    np.testing.assert_allclose(run(path, values())["mean"], expected, rtol=1e-5, atol=1e-5)
    by_hand = {key.removesuffix("_l0"): tensor for key, tensor in weights.items() if key.startswith(("a.", "fc."))}
    path = export(by_hand, FORECASTER | {"recurrent": "a"}, "cell", tmp_path)
    with torch.no_grad():
        expected = fc(first(scaled(values()))[0]).numpy() * 9.0 + 12.0
    np.testing.assert_allclose(run(path, values())["mean"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", ["language-model", "classifier"])
def test_symbols_with_an_embedding(task: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    count = 5 if task == "language-model" else 2
    module = Net(nn.LSTM(4, 8, batch_first=True), nn.Linear(8, count), nn.Embedding(5, 4)).eval()
    labels = {} if task == "language-model" else {"labels": ["x", "y"]}
    (tmp_path / "vocabulary.json").write_text('["a", "b", "c", "d", "\\n"]')
    (tmp_path / "spec.toml").write_text(
        f'task = "{task}"\nmemory = "carried"\nrecurrent = "rnn"\nhead = ["fc", "log_softmax"]\nembedding = "emb"\n'
        f'symbols = {{ file = "vocabulary.json" }}\n'
        + ('labels = ["x", "y"]\n' if labels else 'start_symbol = "\\n"\n')
    )
    path = export(module, tmp_path / "spec.toml", "own", tmp_path)
    symbols = np.random.default_rng(0).integers(0, 5, (3, 11))
    np.testing.assert_allclose(run(path, symbols)["logits"], said(module, torch.tensor(symbols)), atol=1e-5)
    manifest = bundle.load(path).manifest
    assert manifest.symbols == ("a", "b", "c", "d", "\n") and manifest.input_kind == "text"
    assert manifest.splitter is not None and manifest.splitter.kind == "characters"


@pytest.mark.parametrize("order", ["quantiles", "targets"])
@pytest.mark.parametrize("with_mean", [True, False])
def test_quantiles_in_both_orders(order: str, with_mean: bool, tmp_path: Path) -> None:
    rows = 4 if with_mean else 3
    module = net(outputs=2 * rows)
    targets = [TARGET, {"name": "power", "unit": "kW", "min": 5.0, "max": 25.0}]
    spec = FORECASTER | {"targets": targets, "quantiles": [0.1, 0.5, 0.9], "order": order}
    path = export(module, spec, "own", tmp_path)
    raw = said(module, scaled(values())).reshape(5, 20, *((rows, 2) if order == "quantiles" else (2, rows)))
    expected = (raw if order == "quantiles" else raw.swapaxes(2, 3)) * [9.0, 20.0] + [12.0, 5.0]
    found = run(path, values())
    np.testing.assert_allclose(found["mean"], expected[:, :, 0 if with_mean else 1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["quantiles"], expected[:, :, -3:], rtol=1e-5, atol=1e-5)


def test_minimum_and_maximum_and_no_scaling_at_all(tmp_path: Path) -> None:
    module = net()
    features = [{"name": "a", "min": -3.0, "max": 5.0}, {"name": "b"}]
    path = export(
        module, FORECASTER | {"features": features, "targets": [{"name": "a", "scaled": False}]}, "x", tmp_path
    )
    given = np.random.default_rng(1).uniform(-3, 5, (4, 9, 2)).astype(np.float32)
    inputs = torch.tensor(np.stack([(given[..., 0] + 3) / 8, given[..., 1]], axis=-1), dtype=torch.float32)
    np.testing.assert_allclose(run(path, given)["mean"], said(module, inputs), rtol=1e-5, atol=1e-5)
    manifest = bundle.load(path).manifest
    assert [feature.mean for feature in manifest.features] == [1.0, 0.0]


# ---------------------------------------------------------------------- what the scaler of scikit-learn says


def test_the_two_lines_of_the_readme_turn_a_scaler_into_toml(tmp_path: Path) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = next(part for part in page.split("```python\n")[1:] if "scaler.mean_" in part).split("```")[0]
    assert len(lines.strip().splitlines()) == 2

    class Scaler:  # what scikit-learn's StandardScaler has after fit(a data frame)
        feature_names_in_ = np.array(["temperature", "pressure"], dtype=object)
        mean_, scale_ = MEAN, SCALE

    out = tmp_path / "spec.toml"
    head = 'task = "classifier"\nmemory = "carried"\nrecurrent = "rnn"\nhead = ["fc"]\nlabels = ["x", "y"]\n'
    printed = subprocess.run(
        [sys.executable, "-c", f"from numpy import array, float64\nscaler = {scaler_source(Scaler)}\n{lines}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    out.write_text(head + printed, encoding="utf-8")
    spec = read_spec(out)
    assert [(one.name, one.offset, one.factor) for one in spec.features] == [
        ("temperature", 12.0, 9.0),
        ("pressure", 1013.0, 7.0),
    ]


def scaler_source(scaler: type[Any]) -> str:
    names = list(scaler.feature_names_in_)
    return (
        f"type('S', (), dict(feature_names_in_=array({names}, dtype=object), "
        f"mean_=array({scaler.mean_.tolist()}), scale_=array({scaler.scale_.tolist()})))"
    )


# ---------------------------------------------------------------------- refusals


def changed(**weights: Tensor | None) -> dict[str, Tensor]:
    """The weights of `net()`, some changed, added or left out."""
    found = dict(net().state_dict()) | {key.replace("__", "."): value for key, value in weights.items()}
    return {key: value for key, value in found.items() if value is not None}


NAN = torch.full((32, 8), float("nan"))
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "leftover": (changed(aux__weight=torch.ones(2, 2), aux__bias=torch.ones(2)), {}, r"'aux.weight', 'aux.bias'"),
    "missing-head": (changed(fc__weight=None), {}, r"no 'fc.weight'"),
    "missing-recurrent": (changed(rnn__weight_ih_l0=None), {}, r"no 'rnn.weight_ih_l0'"),
    "missing-bias": (changed(rnn__bias_hh_l0=None), {}, r"no 'rnn.bias_hh_l0'"),
    "missing-head-bias": (changed(fc__bias=torch.ones(2)), {}, r"'fc.bias' is \[2\], but \[1\]"),
    "nan": (changed(rnn__weight_hh_l0=NAN), {}, r"'rnn.weight_hh_l0' holds a number that is not finite"),
    "integers": (changed(fc__weight=torch.ones(1, 8, dtype=torch.int64)), {}, r"'fc.weight' is torch.int64"),
    "axes": (changed(rnn__weight_ih_l0=torch.ones(32)), {}, r"'rnn.weight_ih_l0'.*2 axes"),
    "empty": (changed(rnn__weight_hh_l0=torch.ones(0, 0)), {}, r"'rnn.weight_hh_l0'"),
    "gates": (changed(rnn__weight_hh_l0=torch.ones(16, 8)), {}, r"2 gates"),
    "not-square": (changed(rnn__weight_hh_l0=torch.ones(33, 8)), {}, r"gates"),
    "rows": (changed(rnn__weight_ih_l0=torch.ones(24, 2)), {}, r"'rnn.weight_ih_l0' has 24 rows"),
    "inputs": (changed(rnn__weight_ih_l0=torch.ones(32, 3)), {}, r"takes 3 inputs, but 2 features"),
    "head-width": (changed(fc__weight=torch.ones(1, 9)), {}, r"'fc.weight' takes 9 numbers, but 8"),
    "bidirectional": (changed(rnn__weight_ih_l0_reverse=torch.ones(32, 2)), {}, r"_reverse.*bidirectional"),
    "projected": (changed(rnn__weight_hr_l0=torch.ones(4, 8)), {}, r"weight_hr_l0.*projected"),
    "second-layer-missing": (changed(rnn__weight_hh_l1=torch.ones(32, 8)), {}, r"no 'rnn.weight_ih_l1'"),
    "layer-in-between": (changed(rnn__weight_hh_l2=torch.ones(32, 8)), {}, r"no 'rnn.weight_hh_l1'"),
    "no-prefix": (changed(), {"recurrent": "gru"}, r"no 'gru.weight_hh_l0'; there are 'rnn.weight_ih_l0'"),
    "unknown-activation": (changed(), {"head": ["fc", "gelu"]}, r"'gelu.weight'.*relu, tanh"),
    "softmax-inside": (changed(), {"head": ["softmax", "fc"]}, r"softmax comes last"),
    "softmax-forecaster": (changed(), {"head": ["fc", "softmax"]}, r"softmax comes last"),
    "too-few-outputs": (changed(), {"quantiles": [0.1, 0.5]}, r"ends in 1 numbers, but 2 .* or 3"),
    "relu-lstm": (changed(), {"nonlinearity": "relu"}, r"lstm, which has none"),
    "memory": (changed(), {"memory": None}, r'"carried", or \{ window = W \}'),
    "no-name": (changed(), {"name": None}, r"give the model a name"),
    "unknown-field": (changed(), {"scaling": 1}, r"spec: scaling: "),
    "half-a-scaling": (changed(), {"targets": [{"name": "t", "mean": 1.0}]}, r"mean and scale go together"),
    "two-scalings": (changed(), {"targets": [{"name": "t", "mean": 1, "scale": 1, "min": 0, "max": 1}]}, r"not both"),
    "no-spread": (changed(), {"targets": [{"name": "t", "mean": 1.0, "scale": 0.0}]}, r"above 0"),
    "target-unscaled": (changed(), {"targets": [{"name": "temperature"}]}, r"how it was scaled"),
    "infinite": (changed(), {"targets": [{"name": "t", "mean": float("inf"), "scale": 1.0}]}, r"spec: targets.0"),
    "labels": (changed(), {"labels": ["x"]}, r"forecaster has no labels"),
    "window": (changed(), {"memory": {"window": 0}}, r"spec: memory"),
    "names-repeat": (changed(), {"features": [FEATURES[0], FEATURES[0]]}, r"features repeat"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case: str, tmp_path: Path) -> None:
    weights, changes, reason = REFUSED[case]
    with pytest.raises(ExportError, match=reason):
        export(weights, FORECASTER | {"name": "own"} | changes, models=tmp_path)
    assert not (tmp_path / "own").exists()


def test_keys_that_are_no_part_of_the_network_can_be_named(tmp_path: Path) -> None:
    export(changed(aux__weight=torch.ones(2)), FORECASTER | {"ignore": ["aux."]}, "own", tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (nn.LSTM(2, 8), nn.LSTM(8, 6), "layer of 6 lstm units above one of 8"),
        (nn.LSTM(2, 8), nn.GRU(8, 8), "layer of 8 gru units above one of 8 lstm"),
        (nn.LSTM(2, 8), nn.LSTM(7, 8), "takes 7 inputs, but 8"),
    ],
)
def test_layers_that_do_not_stack_are_refused(first: nn.Module, second: nn.Module, reason: str, tmp_path: Path) -> None:
    parts = {"a": first, "b": second, "fc": nn.Linear(8, 1)}
    weights = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}
    with pytest.raises(ExportError, match=reason):
        export(weights, FORECASTER | {"recurrent": ["a", "b"]}, "own", tmp_path)


# ---------------------------------------------------------------------- files


class Hostile:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["torch", "pickle", "inside", "whole-module"])
def test_code_in_a_file_never_runs(kind: str, tmp_path: Path) -> None:
    file, trap = tmp_path / "w.pt", tmp_path / "trap"
    if kind == "torch":
        torch.save({"state_dict": Hostile(trap)}, file)
    elif kind == "inside":
        torch.save({**net().state_dict(), "rnn.extra": Hostile(trap)}, file)
    elif kind == "whole-module":
        torch.save(net(), file)
    else:
        file.write_bytes(pickle.dumps(Hostile(trap)))
    with pytest.raises(ExportError, match=r"w\.pt holds more than tensors.*never run"):
        export(file, FORECASTER, "own", tmp_path / "models")
    assert not trap.exists()


@pytest.mark.parametrize("wrap", [None, "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_checkpoints_as_people_have_them(wrap: str | None, prefix: str, tmp_path: Path) -> None:
    weights = {prefix + key: tensor.half() for key, tensor in net().state_dict().items()}
    file = tmp_path / "w.pt"
    torch.save(weights if wrap is None else {wrap: weights, "epoch": 3, "optimizer": {"state": {}}}, file)
    manifest = bundle.load(export(file, FORECASTER, "own", tmp_path)).manifest
    assert manifest.training["weights"]["file"] == "w.pt" and len(manifest.training["weights"]["sha256"]) == 64


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_files_that_are_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not there"):
        export(tmp_path / name, FORECASTER, "own", tmp_path)
    (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ExportError, match=name):
        export(tmp_path / name, FORECASTER, "own", tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ExportError, match="no state dict"):
        export(tmp_path / "list.pt", FORECASTER, "own", tmp_path)


@pytest.mark.parametrize("content", [b"task = ", b"\xff", b""])
def test_a_spec_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_bytes(content)
    with pytest.raises(ExportError, match="spec: "):
        export(net(), tmp_path / "spec.toml", "own", tmp_path)


# ---------------------------------------------------------------------- her own inputs and outputs


def own_pairs(module: nn.Module, units: bool, last: bool, steps: int = 20) -> dict[str, np.ndarray[Any, Any]]:
    given = values(steps=steps)
    outputs = said(module, scaled(given))[:, -1 if last else slice(None)]
    if units:
        return {"values": given, "predictions": outputs * 9.0 + 12.0}
    return {"inputs": scaled(given).numpy(), "outputs": outputs}


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("units", [True, False])
def test_pairs_are_compared_and_become_the_golden_example(units: bool, last: bool, tmp_path: Path) -> None:
    module = net()
    given = own_pairs(module, units, last)
    np.savez(tmp_path / "pairs.npz", **given)  # type: ignore[arg-type]
    path = export(module, FORECASTER, "own", tmp_path, check=tmp_path / "pairs.npz")
    checks = bundle.load(path).manifest.checks["pairs"]
    assert (checks["sequences"], checks["steps"]) == (5, 20) and checks["greatest"] <= 1e-5
    golden = load_file(path / "golden.safetensors")
    np.testing.assert_allclose(golden["input"][:, :5], values().swapaxes(0, 1), rtol=1e-6, atol=1e-5)
    theirs = said(module, scaled(values())).swapaxes(0, 1) * 9.0 + 12.0
    kept = golden["torch.output.mean"][:, :5]
    np.testing.assert_allclose(kept[-1:] if last else kept, theirs[-1:] if last else theirs, rtol=1e-6)


@pytest.mark.parametrize("last", [True, False])
def test_pairs_of_another_network_are_refused(last: bool, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"check: .*differs from your module's by .* at step \d+ of sequence \d"):
        export(net(), FORECASTER, "own", tmp_path, check=own_pairs(net(seed=1), True, last))


def test_a_wrong_scaling_is_found_by_pairs_in_the_data_s_own_units(tmp_path: Path) -> None:
    wrong = FORECASTER | {"features": [FEATURES[0], {**FEATURES[1], "mean": 1010.0}]}
    with pytest.raises(ExportError, match="differs"):
        export(net(), wrong, "own", tmp_path, check=own_pairs(net(), True, False))


@pytest.mark.parametrize("ending", ["softmax", "log_softmax"])
def test_pairs_of_a_head_that_ends_in_a_softmax(ending: str, tmp_path: Path) -> None:
    module = net(outputs=3)
    outputs = torch.tensor(said(module, scaled(values())))
    given = {"inputs": scaled(values()).numpy(), "outputs": getattr(torch, ending)(outputs, -1).numpy()}
    path = export(module, CLASSIFIER | {"head": ["fc", ending]}, "own", tmp_path, check=given)
    assert bundle.load(path).manifest.checks["pairs"]["greatest"] <= 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"inputs": None}, "inputs .* or values .* are missing"),
        ({"outputs": None}, "outputs .* or predictions .* are missing"),
        ({"inputs": np.zeros((5, 20, 3))}, r"inputs is \[5, 20, 3\], but \[N, T, 2\]"),
        ({"outputs": np.zeros((5, 19, 1))}, r"outputs is .*\[5, 20, 1\], or \[5, 1\]"),
        ({"outputs": np.full((5, 20, 1), np.nan)}, "finite"),
        ({"inputs": np.full((5, 20, 2), np.inf)}, "finite"),
        ({"inputs": np.array([["a"]])}, "inputs"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    given = {key: value for key, value in (own_pairs(net(), False, False) | change).items() if value is not None}
    with pytest.raises(ExportError, match=reason):
        export(net(), FORECASTER, "own", tmp_path, check=given)


def test_pickled_arrays_are_not_read(tmp_path: Path) -> None:
    file, trap = tmp_path / "pairs.npz", tmp_path / "trap"
    np.savez(file, inputs=np.array([Hostile(trap)], dtype=object), outputs=np.zeros(1))
    with pytest.raises(ExportError, match="plain arrays"):
        export(net(), FORECASTER, "own", tmp_path / "models", check=file)
    assert not trap.exists()
    for content in (b"nothing", b"PK\x03\x04", b""):
        file.write_bytes(content)
        with pytest.raises(ExportError, match="plain arrays"):
            export(net(), FORECASTER, "own", tmp_path / "models", check=file)


# ---------------------------------------------------------------------- memory


def test_both_memories_are_measured(tmp_path: Path) -> None:
    """Against a loop over windows; the truth is what the module says of them, so that windows are always right."""
    module = net(outputs=3, seed=4)
    line = values(1, 90, 7)
    windows = [line[:, max(0, p - 6) : p] for p in range(1, 91)]
    truth = np.array([int(said(module, scaled(window))[0, -1].argmax()) for window in windows])
    carried = said(module, scaled(line))[0].argmax(axis=1)
    np.savez(tmp_path / "data.npz", values=line, labels=truth[None])
    path = export(module, CLASSIFIER, "own", tmp_path, data=tmp_path / "data.npz")
    figures = bundle.load(path).manifest.metrics["memory"]
    assert figures["window 6"] == {"share of steps right": 1.0}
    assert (
        figures["carried"]["share of steps right"] == pytest.approx((carried == truth).mean())
        and (carried != truth).any()
    )
    rows = "".join(f"{t},{p},{'abc'[label]}\n" for (t, p), label in zip(line[0].tolist(), truth.tolist(), strict=True))
    (tmp_path / "data.csv").write_text("temperature,pressure,label\n" + rows)
    again = export(module, CLASSIFIER, "own", tmp_path, data=tmp_path / "data.csv")
    assert bundle.load(again).manifest.metrics["memory"] == figures


def test_a_forecaster_is_measured_in_its_units(tmp_path: Path) -> None:
    module, line = net(), values(2, 50, 3)
    np.savez(tmp_path / "data.npz", values=line)
    path = export(module, FORECASTER, "own", tmp_path, data=tmp_path / "data.npz")
    figures = bundle.load(path).manifest.metrics["memory"]
    expected = np.abs(said(module, scaled(line))[:, :-1, 0] * 9 + 12 - line[:, 1:, 0]).mean()
    assert figures["carried"]["mean absolute error of temperature"] == pytest.approx(expected, rel=1e-5)
    assert set(figures) == {"carried", "window 16", "window 64"}
    series = "".join(f"{n},{t},{p}\n" for n in range(2) for t, p in line[n].tolist())
    (tmp_path / "data.csv").write_text("series,temperature,pressure\n" + series)
    again = bundle.load(export(module, FORECASTER, "own", tmp_path, data=tmp_path / "data.csv")).manifest
    assert again.metrics["memory"]["carried"] == pytest.approx(figures["carried"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("temperature,label\n1,a\n", "no column 'pressure'"),
        ("temperature,pressure\n1,2\n", "no column 'label'"),
        ("temperature,pressure,label\n1,x,a\n", "'x' in column 'pressure'"),
        ("temperature,pressure,label\n1,nan,a\n", "not finite"),
        ("temperature,pressure,label\n1,2,d\n", "no label 'd'"),
        ("temperature,pressure,label\n1,2,\n", "no step whose answer is known"),
        ("", "no column"),
    ],
)
def test_data_that_does_not_fit_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(ExportError, match=reason):
        export(net(outputs=3), CLASSIFIER, "own", tmp_path, data=tmp_path / "data.csv")


def test_a_regressor_is_measured_at_each_step(tmp_path: Path) -> None:
    module, line = net(), values(2, 30, 3)
    spec = FORECASTER | {"task": "regressor", "targets": [{"name": "wear", "unit": "mm", "min": 0.0, "max": 4.0}]}
    truth = said(module, scaled(line)) * 4.0 + 0.5
    np.savez(tmp_path / "data.npz", values=line, targets=truth)
    path = export(module, spec, "own", tmp_path, data=tmp_path / "data.npz")
    figures = bundle.load(path).manifest.metrics["memory"]
    assert figures["carried"]["mean absolute error of wear"] == pytest.approx(0.5, rel=1e-5)
    both = np.concatenate([line, truth], axis=2).tolist()
    rows = "".join(f"{n},{t},{p},{w}\n" for n in range(2) for t, p, w in both[n])
    (tmp_path / "data.csv").write_text("series,temperature,pressure,wear\n" + rows)
    again = bundle.load(export(module, spec, "own", tmp_path, data=tmp_path / "data.csv")).manifest
    assert again.metrics["memory"]["carried"] == pytest.approx(figures["carried"])


def test_labels_of_whole_windows_hold_at_their_last_step(tmp_path: Path) -> None:
    spec = read_spec(CLASSIFIER)
    module, _ = own.build(net(outputs=3).state_dict(), spec)
    np.savez(tmp_path / "data.npz", values=values(), labels=np.array(["a", "b", "c", "a", ""]))
    found = memory.read(tmp_path / "data.npz", module, spec)
    assert [one.known.tolist() for one in found] == [[19]] * 4 + [[]]
    assert [int(one.truth[19]) for one in found] == [0, 1, 2, 0, -1]


# ---------------------------------------------------------------------- int8


def test_int8_says_what_it_loses(tmp_path: Path) -> None:
    module, line = net(outputs=3, seed=4), values(1, 200, 7)
    truth = said(module, scaled(line))[0].argmax(axis=1)
    np.savez(tmp_path / "data.npz", values=line, labels=truth[None])
    spec = CLASSIFIER | {"memory": "carried"}
    given = {"check": {"inputs": scaled(line).numpy(), "outputs": said(module, scaled(line))}}
    path = export(module, spec, "own", tmp_path, data=tmp_path / "data.npz", int8=Int8(50.0), **given)  # type: ignore[arg-type]
    manifest = bundle.load(path).manifest
    assert manifest.quantization == "int8" and manifest.checks["pairs"]["greatest"] <= 1e-4
    assert manifest.metrics["int8"]["validation"]["share of steps right"]["float32"] == 1.0
    with pytest.raises(ExportError, match="--data"):
        export(module, spec, "own", tmp_path, int8=Int8())
    with pytest.raises(ExportError, match="is lost"):
        export(module, spec, "own", tmp_path, data=tmp_path / "data.npz", int8=Int8(-1.0))
    relu = net("relu", outputs=3)
    with pytest.raises(ExportError, match="relu"):
        export(relu, spec | {"nonlinearity": "relu"}, "own", tmp_path, data=tmp_path / "data.npz", int8=Int8(50.0))


# ---------------------------------------------------------------------- the command line


SPEC = """
task = "classifier"
recurrent = "rnn"
head = ["fc"]
labels = ["a", "b", "c"]
features = [{ name = "x", mean = 1.0, scale = 2.0 }, { name = "y" }]
"""


def command(folder: Path, *more: str) -> list[str]:
    save_file(net(outputs=3).state_dict(), folder / "w.safetensors")
    (folder / "spec.toml").write_text(SPEC)
    files = ["--weights", str(folder / "w.safetensors"), "--spec", str(folder / "spec.toml")]
    return [sys.executable, str(ROOT / "cli.py"), "export", *files, "--name", "own", "--models", str(folder), *more]


def test_without_a_terminal_the_memory_is_not_asked_for(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert "memory" in done.stderr and "window" in done.stderr and "Traceback" not in done.stderr


def test_on_a_terminal_the_memory_is_asked_for(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", values=values(1, 100), labels=np.zeros((1, 100), np.int64))
    master, slave = os.openpty()
    try:
        os.write(master, b"perhaps\n24\n")
        asked = command(tmp_path, "--data", str(tmp_path / "data.npz"))
        done = subprocess.run(asked, stdin=slave, capture_output=True, text=True, timeout=120)
    finally:
        os.close(master)
        os.close(slave)
    assert done.returncode == 0, done.stderr
    before, _, after = done.stderr.partition("carried, or the window's length: ")
    assert "memory carried: " in before and "memory window 64: " in before and "memory window 24: " in after
    assert done.stdout == f"{tmp_path / 'own' / '1'}\n"
    assert bundle.load(tmp_path / "own" / "1").manifest.memory == Window(window=24)


def test_a_run_and_weights_together_are_refused(tmp_path: Path) -> None:
    for arguments in (["export", "--name", "x"], [*command(tmp_path)[2:], str(tmp_path)]):
        done = subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), *arguments], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 1 and "--weights and --spec" in done.stderr
