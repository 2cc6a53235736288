"""A trained model becomes a bundle, `models/<name>/<version>/`, which the service can load.

The graph is checked against the module first (`parity.py`); then everything is written beside its place and
renamed, so that a bundle is there in full or not at all. A version is never overwritten.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors.numpy import save
from torch import Tensor, nn

from service.bundle import (
    CARD,
    GOLDEN,
    GRAPH,
    Feature,
    Foreign,
    Manifest,
    Splitter,
    StateSpec,
    Target,
    TensorSpec,
    Window,
    sha256_of,
)
from training import card, graph, memory, own, pairs, parity, whole
from training.checkpoint import environment, load_model
from training.evaluate import headline, run_corpus
from training.int8 import Int8Nodes, simulated
from training.model import OwnHead, RecurrentModel, carried_states
from training.pairs import Arrays, Pairs
from training.parity import Step, Tensors
from training.publish import ExportError, free_version, publish, without_paths
from training.spec import Spec, read_spec

GOLDEN_STEPS, GOLDEN_ROWS, GOLDEN_SEED, GOLDEN_TRIES = 16, 7, 7, 32
MAX_PLOTS, MAX_PLOT_BYTES = 8, 512 * 1024
PROVENANCE = (
    "command",
    "seed",
    "data",
    "weights",
    "steps",
    "epochs",
    "minutes",
    "recipe",
    "environment",
    "calibration",
)

Own = nn.Module | Mapping[str, Tensor] | Path
"""A network that was trained elsewhere: itself, its state dict, or a file of one"""
SpecLike = Spec | Mapping[str, Any] | Path | str


@dataclass(frozen=True)
class Int8:
    """What an int8 export may lose on the run's validation part, and where its corpus is."""

    bound_percent: float = 0.5
    cache: Path = Path(".cache")


def export_run(
    run: Path,
    models: Path,
    name: str,
    version: int | None = None,
    example: str | None = None,
    int8: Int8 | None = None,
) -> Path:
    """Publish the best checkpoint of a run with its figures and plots; returns the bundle's folder.

    `example` is what the model card's calls feed: a text, or values as JSON.
    """
    module, meta = load_model(run)
    if example is not None:
        meta = {**meta, "example": _read_example(example, meta)}
    figures = run / "metrics.json"
    metrics = json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else {}
    if int8 is not None:
        metrics["int8"] = int8_loss(run, module, meta, int8)
    plots = sorted((run / "plots").glob("*.png"))
    return export_model(module, meta, models, name, version, metrics, plots, int8=int8 is not None)


def export(
    module: Own,
    spec: SpecLike,
    name: str | None = None,
    models: Path = Path("models"),
    version: int | None = None,
    check: Arrays | Path | None = None,
    data: Path | None = None,
    int8: Int8 | None = None,
    example: str | None = None,
    command: str = "",
) -> Path:
    """Publish a network that was trained elsewhere; returns the bundle's folder; raises ExportError saying why not.

    `module` is the network itself, its state dict, or a file of one; `spec` says what its weights do not say
    (docs/own-weights.md). `check` holds inputs and outputs of the network (training/pairs.py), which the graph must
    agree with and which become the golden example; `data` labelled sequences (training/memory.py), on which the figure
    is measured with the memory carried on and from windows.
    """
    said, weights, provenance = _own_parts(module, spec)
    if said.memory is None:
        raise ExportError(
            'spec: memory: say "carried", or { window = W } for a network that was trained on windows of W'
        )
    if (named := name or said.name) is None:
        raise ExportError("spec: name: give the model a name")
    built, meta = own.build(weights, said)
    meta |= {"weights": provenance, "environment": environment(), **({"command": command} if command else {})}
    if example is not None:
        meta["example"] = _read_example(example, meta)
    labelled = memory.read(data, built, said) if data is not None else None
    metrics: dict[str, Any] = {}
    if labelled is not None:
        metrics["memory"] = memory.both_ways(built, labelled, said)
    if int8 is not None:
        metrics["int8"] = _own_int8_loss(built, labelled, said, int8.bound_percent)
    compared = pairs.read(check, built, said) if check is not None else None
    return export_model(built, meta, models, named, version, metrics, int8=int8 is not None, compared=compared)


def measure_memory(module: Own, spec: SpecLike, data: Path) -> dict[str, dict[str, float]]:
    """What labelled sequences say of both kinds of memory, as `export` measures it; raises ExportError."""
    said, weights, _ = _own_parts(module, spec)
    built, _ = own.build(weights, said)
    return memory.both_ways(built, memory.read(data, built, said), said)


def _own_parts(module: Own, spec: SpecLike) -> tuple[Spec, dict[str, Tensor], dict[str, str]]:
    """The spec, the state dict, and where that came from."""
    said = read_spec(spec)
    if isinstance(module, Path):
        return said, own.read_weights(module), {"file": module.name, "sha256": sha256_of(module)}
    if isinstance(module, nn.Module):
        return own.told_by(module, said), own.state_dict(module.state_dict()), {"module": type(module).__name__}
    return said, own.state_dict(module), {}


def _own_int8_loss(
    module: RecurrentModel, labelled: Sequence[memory.Labelled] | None, spec: Spec, bound_percent: float
) -> dict[str, Any]:
    if labelled is None:
        raise ExportError("int8: give labelled sequences with --data, so that it can be said what is lost")
    _refuse_unbounded(module)
    window = spec.memory.window if isinstance(spec.memory, Window) else None
    before, after = (memory.figure(one, labelled, spec, window) for one in (module, simulated(module)))
    return _loss(before, after, bound_percent)


def int8_loss(run: Path, module: RecurrentModel, meta: Mapping[str, Any], int8: Int8) -> dict[str, Any]:
    """What int8 loses on the validation part, in percent of the figure it hurts most; ExportError above the bound."""
    corpus = run_corpus(run, meta, int8.cache)
    return _loss(headline(module, corpus), headline(simulated(module), corpus), int8.bound_percent)


def _loss(before: Mapping[str, float], after: Mapping[str, float], bound_percent: float) -> dict[str, Any]:
    lost = max(_lost_percent(name, before[name], after[name]) for name in before)
    if not lost <= bound_percent:
        figures = "; ".join(f"{name} {before[name]:.6g} becomes {after[name]:.6g}" for name in before)
        raise ExportError(f"int8: {lost:.3g} % is lost, at most {bound_percent:g} % is allowed: {figures}")
    validation = {name: {"float32": before[name], "int8": after[name]} for name in before}
    return {"lost_percent": lost, "bound_percent": bound_percent, "validation": validation}


def _lost_percent(name: str, before: float, after: float) -> float:
    """Bits and errors are worse when greater, a share of steps right when smaller."""
    worse = before - after if name.startswith("share") else after - before
    return 100 * worse / max(before, 1e-12)


def _read_example(example: str, meta: Mapping[str, Any]) -> Any:  # noqa: ANN401 (text or numbers)
    """The example as it is fed; raises ExportError when the model would refuse it."""
    if not meta["symbols"]:
        try:
            return json.loads(example)
        except json.JSONDecodeError as error:
            raise ExportError(f"example: {example!r} is not JSON, as [35, 32, 45]") from error
    unknown = set(Splitter.model_validate(meta["splitter"]).split(example)) - set(meta["symbols"])
    if unknown:
        raise ExportError(f"example: the model does not know {', '.join(map(repr, sorted(unknown)))}")
    return example


def export_model(
    module: RecurrentModel,
    meta: Mapping[str, Any],
    models: Path,
    name: str,
    version: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    plots: Sequence[Path] = (),
    int8: bool = False,
    compared: Pairs | None = None,
) -> Path:
    """Check the module's graph and publish it as `models/<name>/<version>/`; raises ExportError."""
    version = free_version(models, name, version)
    _refuse_mismatch(module, meta)
    module = module.eval().cpu()
    if module.config.bidirectional:
        return _export_whole(module, meta, models / name / str(version), metrics or {}, plots, int8)
    if int8:
        _refuse_unbounded(module)
    onnx = (graph.build(module, Int8Nodes) if int8 else graph.build(module)).SerializeToString()
    exact = simulated(module) if int8 else module
    checks = parity.check(exact, onnx, int8)
    if compared is not None:  # with what float32 gives: what int8 loses is told apart from what is wrong
        floats = graph.build(module).SerializeToString() if int8 else onnx
        checks["pairs"] = pairs.compare(compared, parity.ort_step(floats), module)
    manifest = describe(module, meta, name, version, checks, metrics or {}, int8)
    example = own_golden(module, onnx, compared) if compared is not None and not int8 else golden(exact, onnx)
    files = {GRAPH: onnx, GOLDEN: save(example), **_pictures(plots)}
    pictures = [file for file in files if file.endswith(".png")]
    files[CARD] = card.write(manifest, pictures, meta.get("example")).encode()
    return publish(models / name / str(version), manifest, files)


def _export_whole(
    module: RecurrentModel,
    meta: Mapping[str, Any],
    target: Path,
    metrics: Mapping[str, Any],
    plots: Sequence[Path],
    int8: bool,
) -> Path:
    """The same of a bidirectional model, which the service gives whole sequences."""
    if int8:
        raise ExportError("int8: a bidirectional model is exported in float32 only")
    onnx = whole.build(module).SerializeToString()
    checks = whole.check(module, onnx)
    manifest = describe(module, meta, target.parent.name, int(target.name), checks, metrics)
    example = golden(module, onnx)
    example[f"input.{manifest.inputs[0].name}"] = example.pop("input")
    files = {GRAPH: onnx, GOLDEN: save(example), **_pictures(plots)}
    pictures = [file for file in files if file.endswith(".png")]
    files[CARD] = card.write(manifest, pictures, meta.get("example")).encode()
    return publish(target, manifest, files)


def _refuse_unbounded(module: RecurrentModel) -> None:
    if module.config.cell == "rnn-relu":
        raise ExportError("int8: the h of a relu cell has no bound that its steps could be counted in")


def describe(
    module: RecurrentModel,
    meta: Mapping[str, Any],
    name: str,
    version: int,
    checks: Mapping[str, Any],
    metrics: Mapping[str, Any],
    int8: bool = False,
) -> Manifest:
    """The manifest but for its checksums; raises ExportError if the contract refuses it."""
    config = module.config
    parts = {
        "name": name,
        "version": version,
        "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "task": config.task,
        "input_kind": meta["input_kind"],
        "cell": config.cell,
        "layers": config.layers,
        "hidden": config.hidden,
        "quantization": "int8" if int8 else "none",
        "tolerance": parity.INT8_TOLERANCE if int8 else parity.TOLERANCE,
        "memory": "carried" if config.bidirectional else _memory(meta),
        "foreign": Foreign(streamable=False) if config.bidirectional else None,
        **_tensors(module),
        **_vocabulary(meta),
        "features": [Feature(**feature) for feature in meta.get("features", ())],
        "sound": config.sound,
        "targets": _targets(module, meta),
        "horizons": config.horizons,
        "quantiles": config.quantiles,
        "labels": tuple(meta.get("labels", ())),
        "files": {},
        "training": without_paths({key: meta[key] for key in PROVENANCE if key in meta} | _size(module)),
        "metrics": without_paths(dict(metrics)),
        "checks": dict(checks),
    }
    try:
        return Manifest.model_validate(parts)
    except ValidationError as error:
        raise ExportError(f"manifest: {error}") from error


def golden(module: RecurrentModel, onnx: bytes) -> Tensors:
    """An input [T, B, ...], and what PyTorch and ONNX Runtime make of it in one call from the zero state.

    It is the first of a few on which both agree to TOLERANCE: in an int8 model one h that is rounded to the other side
    becomes many within 16 steps, and such an example would say little.
    """
    steps: dict[str, Step] = {"torch": parity.torch_step(module), "ort": parity.ort_step(onnx)}
    for seed in range(GOLDEN_SEED, GOLDEN_SEED + GOLDEN_TRIES):
        entries = parity.plausible_entries(module, GOLDEN_STEPS, GOLDEN_ROWS, seed)
        answers = {who: step(entries, parity.zero_states(module, GOLDEN_ROWS)) for who, step in steps.items()}
        if parity.distance(module, answers["ort"], answers["torch"]) <= parity.TOLERANCE:
            break
    return _tensors_of(entries, answers)


def own_golden(module: RecurrentModel, onnx: bytes, compared: Pairs) -> Tensors:
    """The same of an input that begins with somebody's own pairs; what their module said stands where it is known."""
    entries, known = pairs.golden(compared, module)
    zero = parity.zero_states(module, entries.shape[1])
    answers = {"torch": parity.torch_step(module)(entries, zero), "ort": parity.ort_step(onnx)(entries, zero)}
    for name, theirs in known.items():
        answers["torch"][0][name] = answers["torch"][0][name].copy()
        answers["torch"][0][name][-len(theirs) :, : theirs.shape[1]] = theirs
    return _tensors_of(entries, answers)


def _tensors_of(entries: parity.Array, answers: Mapping[str, tuple[Tensors, Tensors]]) -> Tensors:
    tensors = {"input": entries}
    for who, (outputs, states) in answers.items():
        tensors |= {f"{who}.output.{name}": value for name, value in outputs.items()}
        tensors |= {f"{who}.state.{name}": value for name, value in states.items()}
    # safetensors writes the memory as it lies, whatever the strides say
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def _refuse_mismatch(module: RecurrentModel, meta: Mapping[str, Any]) -> None:
    config = module.config
    for key, wanted in (("symbols", config.vocabulary), ("features", len(config.periods)), ("labels", config.labels)):
        if len(meta.get(key) or ()) != wanted:
            raise ExportError(f"meta: {len(meta.get(key) or ())} {key}, but the model has {wanted}")


def _memory(meta: Mapping[str, Any]) -> str | dict[str, int]:
    """A model that only ever saw windows answers from the last window."""
    if "memory" in meta:
        told: str | dict[str, int] = meta["memory"]
        return told
    train = meta.get("recipe", {}).get("train", {})
    return {"window": train["steps"]} if train.get("form") == "windowed" else "carried"


def _tensors(module: RecurrentModel) -> dict[str, list[Any]]:
    inputs, outputs = graph.signature(module)
    states = [StateSpec.model_validate(_state(name, inputs[name])) for name in carried_states(module.config)]
    own = {name for state in states for name in (state.input, state.output)}
    return {"inputs": _specs(inputs, own), "outputs": _specs(outputs, own), "states": states}


def _specs(signature: graph.Signature, own: set[str]) -> list[TensorSpec]:
    specs = ({"name": n, "dtype": d, "shape": axes} for n, (d, axes) in signature.items() if n not in own)
    return [TensorSpec.model_validate(spec) for spec in specs]


def _state(name: str, spec: tuple[str, list[int | str]]) -> dict[str, Any]:
    dtype, axes = spec
    return {
        "name": name,
        "input": name,
        "output": f"{name}_next",
        "dtype": dtype,
        "shape": axes,
        "batch_axis": axes.index("B"),
    }


def _vocabulary(meta: Mapping[str, Any]) -> dict[str, Any]:
    if meta["input_kind"] not in ("text", "symbols"):
        return {}
    return {key: meta.get(key) for key in ("symbols", "splitter", "start_symbol")}


def _targets(module: RecurrentModel, meta: Mapping[str, Any]) -> list[Target]:
    if isinstance(module.head, OwnHead):
        return [Target(**target) for target in meta["targets"]]
    own = meta.get("outputs") or meta.get("features") or ()
    chosen = [own[i] for i in module.config.targets]
    return [Target(name=feature["name"], unit=feature["unit"], std=feature["std"]) for feature in chosen]


def _size(module: RecurrentModel) -> dict[str, int]:
    return {"parameters": sum(parameter.numel() for parameter in module.parameters())}


def _pictures(plots: Sequence[Path]) -> dict[str, bytes]:
    """The plots by a name that a bundle allows; too many or too big ones are left out."""
    small = [plot for plot in plots if plot.stat().st_size <= MAX_PLOT_BYTES]
    named = {re.sub(r"[^A-Za-z0-9._-]+", "-", plot.name).lstrip("._-"): plot for plot in small}
    return {name: plot.read_bytes() for name, plot in list(named.items())[:MAX_PLOTS]}
