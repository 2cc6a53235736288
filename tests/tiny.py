"""Tiny models with random weights, and what they may be fed.

torch is imported by the function that builds the bundles, and nowhere else here.
"""

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from service import bundle
from service.bundle import Bundle, Manifest

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "models"

TINY = {
    "tiny-letters": 1,
    "tiny-tags": 2,
    "tiny-people": 1,
    "tiny-weather": 1,
    "tiny-single": 1,
    "tiny-window-letters": 1,
    "tiny-window-weather": 1,
    "tiny-window-people": 1,
}
"""name -> newest version"""

WINDOWED = {
    "tiny-window-letters": "tiny-letters",
    "tiny-window-weather": "tiny-weather",
    "tiny-window-people": "tiny-people",
}
"""models with a windowed memory, and those with the same weights that carry it"""
WINDOW = 7

LETTERS = list("\n abcdefghij.")
TAGS = ["stop", "go", "left", "right", "turn"]
WORDS = [".", "anna", "has", "her", "his", "keys", "lost", "nikolas", "shoes"]
PEOPLE = ["unknown", "anna", "nikolas"]
TEMPERATURE = {"name": "temperature", "unit": "°C", "period": 0.0, "mean": 12.0, "std": 9.0, "fill": "last"}
HOUR = {"name": "hour", "unit": "h", "period": 24.0, "mean": 11.5, "std": 6.9, "fill": None}
LOAD = {"name": "load", "unit": "MW", "period": 0.0, "mean": 40.0, "std": 8.0, "fill": "mean"}

CHARACTERS = {"kind": "characters", "lowercase": False}
LOWER_WORDS = {"kind": "words", "lowercase": True}


def shipped() -> list[str]:
    """Names of the models in models/, read at collection."""
    return sorted(path.name for path in SHIPPED.iterdir() if path.is_dir() and any(path.glob("[1-9]*/manifest.json")))


def every_model() -> list[str]:
    """The tiny models and all that are shipped."""
    return [*TINY, *shipped()]


def build_tiny(folder: Path) -> None:
    """Export the tiny bundles."""
    import torch

    from training.export import export_model
    from training.model import ForecastHead, ModelConfig, RecurrentModel, ValueEncoder

    def publish(name: str, seed: int, meta: dict[str, Any], **config: Any) -> None:  # noqa: ANN401 (a config's values)
        torch.manual_seed(seed)
        module = RecurrentModel(ModelConfig(**config)).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
            features = meta.get("features", [])
            if isinstance(module.encoder, ValueEncoder):
                module.encoder.mean.copy_(torch.tensor([feature["mean"] for feature in features]))
                module.encoder.scale.copy_(torch.tensor([feature["std"] for feature in features]))
            if isinstance(module.head, ForecastHead):
                module.head.target_mean.copy_(torch.tensor([features[i]["mean"] for i in config["targets"]]))
                module.head.target_scale.copy_(torch.tensor([features[i]["std"] for i in config["targets"]]))
        export_model(module, meta, folder, name)

    letters = {"input_kind": "text", "symbols": LETTERS, "splitter": CHARACTERS, "start_symbol": "\n"}
    publish(
        "tiny-letters",
        1,
        letters,
        task="language-model",
        cell="lstm",
        layers=2,
        hidden=16,
        embedding=8,
        vocabulary=len(LETTERS),
    )
    tags = {"input_kind": "symbols", "symbols": TAGS, "splitter": LOWER_WORDS}
    for seed in (2, 3):
        publish(
            "tiny-tags",
            seed,
            tags,
            task="language-model",
            cell="rnn",
            layers=1,
            hidden=8,
            embedding=4,
            vocabulary=len(TAGS),
        )
    people = {"input_kind": "symbols", "symbols": WORDS, "splitter": LOWER_WORDS, "labels": PEOPLE}
    publish(
        "tiny-people",
        4,
        people,
        task="classifier",
        cell="gru",
        layers=1,
        hidden=12,
        embedding=6,
        vocabulary=len(WORDS),
        labels=len(PEOPLE),
    )
    weather = {"input_kind": "values", "features": [TEMPERATURE, HOUR]}
    publish(
        "tiny-weather",
        5,
        weather,
        task="forecaster",
        cell="gru",
        layers=1,
        hidden=10,
        periods=(0.0, 24.0),
        targets=(0,),
        quantiles=(0.1, 0.5, 0.9),
        residual=True,
    )
    single = {"input_kind": "values", "features": [LOAD]}
    publish("tiny-single", 6, single, task="forecaster", cell="lstm", layers=1, hidden=8, periods=(0.0,), targets=(0,))
    for name, carried in WINDOWED.items():
        windowed(folder / carried / "1", folder / name / "1")


def windowed(source: Path, target: Path, window: int = WINDOW) -> Path:
    """A copy of a bundle that folds the last entries only."""
    return copied(source, target, memory={"window": window})


def newest(models: Path, name: str) -> Bundle:
    """A model's newest bundle."""
    return bundle.load(max((models / name).glob("[1-9]*"), key=lambda path: int(path.name)))


def some_inputs(manifest: Manifest, count: int, seed: int = 0) -> list[Any]:
    """Plausible inputs of a model as a request holds them."""
    rng = random.Random(seed)
    if manifest.symbols:
        return [rng.randrange(len(manifest.symbols)) for _ in range(count)]
    rows = [[_some_value(feature, rng) for feature in manifest.features] for _ in range(count)]
    return [row[0] for row in rows] if len(manifest.features) == 1 else rows


def _some_value(feature: bundle.Feature, rng: random.Random) -> float:
    return float(rng.randrange(int(feature.period))) if feature.period else rng.gauss(feature.mean, feature.std)


# ---------------------------------------------------------------------- bundles made from others


def copied(source: Path, target: Path, **changes: object) -> Path:
    """A copy of a bundle as another name or version, with changes to its manifest."""
    shutil.copytree(source, target)
    file = target / bundle.MANIFEST
    manifest = json.loads(file.read_text()) | {"name": target.parent.name, "version": int(target.name)}
    file.write_text(json.dumps(manifest | changes))
    return target


def with_other_weights(source: Path, target: Path, factor: float = 1.25) -> Path:
    """A copy of a tiny bundle whose layers remember otherwise."""
    import onnx

    graph = onnx.load(source / bundle.GRAPH)
    for weights in graph.graph.initializer:
        if weights.name.endswith(".hidden"):
            changed = onnx.numpy_helper.to_array(weights) * np.float32(factor)
            weights.CopyFrom(onnx.numpy_helper.from_array(changed, weights.name))
    golden = safetensors.numpy.load((source / bundle.GOLDEN).read_bytes())
    return with_graph(copied(source, target), graph.SerializeToString(), golden["input"])


def with_graph(path: Path, graph: bytes, example: "np.ndarray[Any, Any]") -> Path:
    """Put a graph into a bundle, and what it answers to an example as the golden one."""
    file = path / bundle.MANIFEST
    manifest = json.loads(file.read_text())
    golden = safetensors.numpy.save({"input": example, **_answers(manifest, graph, example)})
    for name, content in ((bundle.GRAPH, graph), (bundle.GOLDEN, golden)):
        (path / name).write_bytes(content)
        manifest["files"][name] = hashlib.sha256(content).hexdigest()
    file.write_text(json.dumps(manifest))
    return path


def _answers(manifest: dict[str, Any], graph: bytes, example: "np.ndarray[Any, Any]") -> dict[str, Any]:
    """Outputs and states after the example from the initial state, by the golden example's names."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    batch = example.shape[1]
    feed = {manifest["inputs"][0]["name"]: example}
    for spec in manifest["states"]:
        shape = [batch if axis == "B" else axis for axis in spec["shape"]]
        feed[spec["input"]] = np.full(shape, spec.get("initial", 0.0), spec.get("dtype", "float32"))
    names = {spec["name"]: f"torch.output.{spec['name']}" for spec in manifest["outputs"]}
    names |= {spec["output"]: f"torch.state.{spec['name']}" for spec in manifest["states"]}
    return dict(zip(names.values(), session.run(list(names), feed), strict=True))
