"""A stranger's graph becomes a bundle, `models/<name>/<version>/`."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto
from pydantic import ValidationError
from safetensors.numpy import save

from service.bundle import (
    CARD,
    DTYPES,
    GOLDEN,
    GRAPH,
    Constant,
    Feature,
    Foreign,
    Manifest,
    StateSpec,
    Target,
    TensorSpec,
)
from training.foreign import adapt
from training.foreign.graph import GraphError, graphs, read
from training.foreign.inspect import Findings, inspect
from training.foreign.pairs import Pair
from training.foreign.spec import Scaled, Spec, StatePair
from training.foreign.trial import Array, Called, Named
from training.publish import free_version, publish

GOLDEN_STEPS, GOLDEN_ROWS, GOLDEN_SEED = 16, 7, 7
TOLERANCE, HALF_TOLERANCE = 1e-4, 0.02


def look(path: Path, spec: Spec) -> Findings:
    """What a graph is once everything that its owner asks for is put around it; raises GraphError, or its Unknown."""
    model = adapt.with_context(read(path), spec.graph.context)
    found = inspect(model, spec.graph)
    adapted, outputs = adapt.for_task(found, spec)
    if spec.task == "raw":
        return found
    pairs = tuple(
        StatePair(input=pair.input, output=pair.output, initial=found.called.initial.get(pair.input, 0.0))
        for pair, _ in found.called.states
    )
    sizes = {f"{one.name}.{i}": axis for one in found.called.inputs for i, axis in _sizes_of(one)}
    answers = spec.graph.model_copy(update={"outputs": outputs, "states": pairs or None, "sizes": sizes})
    again = inspect(adapted, answers)
    states = tuple((pair, one) for (pair, _), (_, one) in zip(found.called.states, again.called.states, strict=True))
    notes = (*found.notes[: len(states)], *again.notes[len(states) :])
    return replace(again, called=replace(again.called, states=states), notes=notes)


def _sizes_of(one: Named) -> Iterator[tuple[int, int]]:
    return ((i, axis) for i, axis in enumerate(one.axes) if isinstance(axis, int))


def add(path: Path, models: Path, name: str, spec: Spec, version: int | None = None) -> tuple[Path, Findings]:
    """Publish the graph in `path`; returns the bundle's folder, and what was found. Raises ExportError."""
    version = free_version(models, name, version)
    found = look(path, spec)
    manifest = describe(found, spec, name, version, _source(path))
    files = {GRAPH: found.model.SerializeToString(), GOLDEN: save(golden(found, spec))}
    files[CARD] = card(manifest, found).encode()
    return publish(models / name / str(version), manifest, files), found


def _source(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def describe(found: Findings, spec: Spec, name: str, version: int, source: dict[str, str]) -> Manifest:
    """The manifest but for its checksums; raises GraphError if the contract refuses it."""
    called = found.called
    try:
        return Manifest(
            name=name,
            version=version,
            created=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            task=spec.task,
            input_kind="values" if spec.features else "tensors",
            **_sizes(found.model, called),
            tolerance=HALF_TOLERANCE if _is_half(called) else TOLERANCE,
            inputs=tuple(map(_tensor, called.inputs)),
            outputs=tuple(map(_tensor, called.outputs)),
            states=tuple(_state(pair, one, called.initial.get(pair.input, 0.0)) for pair, one in called.states),
            foreign=Foreign(
                streamable=found.streamable,
                stepping=found.stepping,
                batching=found.batching,
                constants=tuple(Constant(value=value, **_tensor(one).model_dump()) for one, value in called.constants),
            ),
            features=tuple(_feature(one) for one in spec.features),
            targets=tuple(Target(name=one.name, unit=one.unit, std=one.scale) for one in spec.targets),
            quantiles=spec.quantiles,
            labels=spec.labels,
            files={},
            training={"source": source},
            checks=found.checks,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise GraphError(f"manifest: {'.'.join(map(str, first['loc']))} {first['msg']}") from error


def _feature(one: Scaled) -> Feature:
    return Feature(name=one.name, unit=one.unit, mean=one.mean, std=one.scale, fill=one.fill)


def _tensor(one: Named) -> TensorSpec:
    return TensorSpec.model_validate({"name": one.name, "dtype": one.dtype, "shape": one.axes})


def _state(pair: Pair, one: Named, initial: float) -> StateSpec:
    parts = {
        "name": pair.input,
        "input": pair.input,
        "output": pair.output,
        "dtype": one.dtype,
        "shape": one.axes,
        "batch_axis": one.axes.index("B") if "B" in one.axes else None,
        "initial": initial,
    }
    return StateSpec.model_validate(parts)


def _sizes(model: ModelProto, called: Called) -> dict[str, Any]:
    """For people: the kind of cell, layers and hidden size, as far as they can be seen."""
    kinds = {node.op_type for graph in graphs(model.graph) for node in graph.node}
    cell = next((kind.lower() for kind in ("LSTM", "GRU", "RNN") if kind in kinds), "foreign")
    rows = [one.row for _, one in called.states if one.row]
    return {
        "cell": cell,
        "layers": max((row[0] for row in rows if len(row) > 1), default=1),
        "hidden": max((row[-1] for row in rows), default=1),
    }


def _is_half(called: Called) -> bool:
    named = [*called.inputs, *called.outputs, *(one for _, one in called.states)]
    return any(one.dtype == "float16" for one in named)


def golden(found: Findings, spec: Spec) -> dict[str, Array]:
    """Inputs [T, B, ...], and what ONNX Runtime makes of them: states [B, ...], one step and one session a call."""
    called, rng = found.called, np.random.default_rng(GOLDEN_SEED)
    entries = called.some_entries(GOLDEN_STEPS, GOLDEN_ROWS, rng)
    if spec.features:
        one = called.inputs[0]
        mean, scale = (np.array([getattr(f, part) for f in spec.features]) for part in ("mean", "scale"))
        drawn = rng.standard_normal((GOLDEN_STEPS, GOLDEN_ROWS, len(spec.features))) * scale + mean
        entries = {one.name: drawn.reshape(GOLDEN_STEPS, GOLDEN_ROWS, *one.row).astype(DTYPES[one.dtype])}
    tensors = {f"input.{name}": array for name, array in entries.items()}
    if found.streamable:
        outputs, states = called.alone(entries, called.zero(GOLDEN_ROWS))
        tensors |= {f"ort.state.{pair.input}": a for (pair, _), a in zip(called.states, states, strict=True)}
    else:
        rows = [
            called.call({name: array[:, i : i + 1] for name, array in entries.items()}, called.zero(1))[0]
            for i in range(GOLDEN_ROWS)
        ]
        outputs = {name: np.concatenate([row[name] for row in rows], axis=1) for name in rows[0]}
    for name, array in outputs.items():
        if not np.isfinite(array).all():
            raise GraphError(f"{name!r} is not finite on random inputs")
    tensors |= {f"ort.output.{name}": array for name, array in outputs.items()}
    # safetensors writes the memory as it lies, whatever the strides say
    return {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}


def card(manifest: Manifest, found: Findings) -> str:
    """The model card."""
    foreign = manifest.foreign
    assert foreign is not None
    lines = [
        f"# {manifest.name}",
        "",
        f"Added from `{manifest.training['source']['file']}`, a {manifest.task} model.",
        "",
    ]
    lines += ["| tensor | type | axes | |", "|---|---|---|---|"]
    lines += [f"| `{_plain(s.name)}` | {s.dtype} | {list(s.shape)} | fed |" for s in manifest.inputs]
    lines += [f"| `{_plain(s.name)}` | {s.dtype} | {list(s.shape)} | always {s.value} |" for s in foreign.constants]
    lines += [
        f"| `{_plain(s.input)}` | {s.dtype} | {list(s.shape)} | state, from `{_plain(s.output)}` |"
        for s in manifest.states
    ]
    lines += [f"| `{_plain(s.name)}` | {s.dtype} | {list(s.shape)} | answered |" for s in manifest.outputs]
    return "\n".join([*lines, "", *(f"- {_plain(note)}" for note in found.notes), ""])


def _plain(text: str) -> str:
    """A stranger's name as it may stand in a page."""
    return re.sub(r"[^\w .,:;'/<>()\[\]=-]", "?", text)[:200]
