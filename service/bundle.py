"""The bundle: what a served model is on disk, `models/<name>/<version>/`.

A bundle is one ONNX step graph and a manifest that says everything the service needs to know about it. It is
immutable: a session pins the sha256 of the graph. This module is the contract between training (which writes
bundles) and the service (which reads them); it imports neither torch nor onnxruntime.
"""

import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from service import bytepairs

MANIFEST = "manifest.json"
GRAPH = "model.onnx"
GOLDEN = "golden.safetensors"
CARD = "README.md"
WINDOW, WINDOW_LENGTH = "window", "window.length"
MAX_WINDOW = 65_536

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
DType = Literal["float32", "float64", "int64", "int32", "float16", "int16", "int8", "uint8", "bool"]
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in get_args(DType)}

Task = Literal["language-model", "forecaster", "regressor", "classifier", "multi-label", "raw"]
InputKind = Literal["text", "symbols", "values", "tensors"]
Axis = Annotated[int, Field(ge=1)] | Literal["T", "B"]


_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


class BundleError(Exception):
    """A bundle that must not be served; the message says which rule it breaks."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Strict):
    """One input or output of the graph; `shape` names the axes "T" (time) and "B" (batch), which come first.

    In a graph that was made elsewhere they may be anywhere, or nowhere.
    """

    name: str = Field(min_length=1, max_length=256)
    dtype: DType
    shape: tuple[Axis, ...]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one session's part of one step."""
        return tuple(axis for axis in self.shape if isinstance(axis, int))


class StateSpec(_Strict):
    """One state tensor: fed to `input`, read from `output`, zero (or `initial`) at position 0."""

    name: str = Field(min_length=1, max_length=256, description="how people see it: h, c")
    input: str
    output: str
    dtype: DType = "float32"
    shape: tuple[Axis, ...] = Field(description='e.g. [2, "B", 256]: layers, batch, hidden')
    batch_axis: int | None = Field(ge=0, description="null: the graph takes one session a call and has no such axis")
    initial: float = 0.0

    @model_validator(mode="after")
    def _batch_axis_is_named(self) -> "StateSpec":
        if self.batch_axis is None:
            if any(isinstance(axis, str) for axis in self.shape):
                raise ValueError(f"state {self.name!r}: an axis is named, but batch_axis is null")
            return self
        if self.batch_axis >= len(self.shape) or self.shape[self.batch_axis] != "B":
            raise ValueError(f"state {self.name!r}: batch_axis {self.batch_axis} is not the axis named 'B'")
        if sum(isinstance(axis, str) for axis in self.shape) != 1:
            raise ValueError(f"state {self.name!r}: all axes but the batch axis must be numbers")
        return self

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one session's state: the batch axis left out."""
        return tuple(axis for axis in self.shape if isinstance(axis, int))

    @property
    def stack_axis(self) -> int:
        """Which axis the sessions have in a batch outside of the graph."""
        return self.batch_axis or 0

    @property
    def nbytes(self) -> int:
        """Bytes of one session's state in this tensor."""
        return int(np.prod(self.row_shape)) * DTYPES[self.dtype].itemsize


class Feature(_Strict):
    """One column of the values that a model is fed, in the data's own units."""

    name: str = Field(min_length=1, max_length=128)
    unit: str = ""
    period: float = Field(default=0.0, ge=0, description="0, or the period of a cyclic feature (hour of day: 24)")
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)
    fill: Literal["last", "mean"] | None = Field(default=None, description="what JSON null becomes")


class Target(_Strict):
    """One predicted value, in the data's own units; `std` is that of the training data."""

    name: str = Field(min_length=1, max_length=128)
    unit: str = ""
    std: float = Field(default=1.0, gt=0)


class Splitter(_Strict):
    """How a string becomes symbols: one a character, words and single punctuation marks, or bytes and pairs of them."""

    kind: Literal["characters", "words", "bytes"]
    lowercase: bool = False
    merges: tuple[str, ...] = Field(
        default=(),
        max_length=65_536,
        description="bytes: symbols that become one, `a b`, in the order they were learnt",
    )

    @field_validator("merges")
    @classmethod
    def _merges_are_pairs(cls, merges: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [merge for merge in merges if not bytepairs.is_merge(merge)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not two symbols with a space between them")
        return merges

    @cached_property
    def _pairs(self) -> bytepairs.BytePairs:
        return bytepairs.BytePairs(self.merges)

    def split(self, text: str) -> list[str]:
        """The symbols of a text, in order."""
        text = text.lower() if self.lowercase else text
        if self.kind == "bytes":
            return self._pairs.split(text)
        return list(text) if self.kind == "characters" else _WORD.findall(text)

    @property
    def separator(self) -> str:
        """What stands between two symbols in a text."""
        return " " if self.kind == "words" else ""

    def text(self, symbol: str) -> str:
        """A symbol as people read it; U+FFFD where its bytes are no whole characters."""
        return bytepairs.to_bytes(symbol).decode("utf-8", "replace") if self.kind == "bytes" else symbol


class Sound(_Strict):
    """What a step of samples is: the values of a model that hears are `hop` samples between -1 and 1."""

    rate: int = Field(ge=1, description="samples a second")
    hop: int = Field(ge=1, description="samples a step")
    window: int = Field(description="samples that a step is heard with: its own and those before, which are a state")
    mels: int = Field(ge=1, description="bands that are heard")

    @model_validator(mode="after")
    def _window_reaches_back(self) -> "Sound":
        if self.window <= self.hop:
            raise ValueError("the window must be longer than the hop")
        return self


class Window(_Strict):
    """The answer is the fold of the last `window` entries from the initial state."""

    window: int = Field(ge=1, le=MAX_WINDOW)


class Constant(TensorSpec):
    """An input that has the same value in every call: a sample rate, say."""

    value: bool | int | float | list[Any] = Field(description="a number for all of the tensor, or a nested list")


class Foreign(_Strict):
    """How a graph is called that was made elsewhere."""

    streamable: bool = Field(default=True, description="false: whole sequences only, it keeps no state or looks ahead")
    stepping: Literal["chunks", "single"] = Field(
        default="single", description="chunks: many steps a call where that changes no bit; single: one step a call"
    )
    batching: Literal["exact", "together", "alone"] = Field(
        default="exact",
        description="exact: sessions share a call where that changes no bit; together: always; alone: never",
    )
    constants: tuple[Constant, ...] = ()


class Manifest(_Strict):
    """Everything about one version of a model; `docs/manifest.md` shows one in full."""

    format: Literal[1] = 1
    name: str = Field(pattern=NAME_PATTERN)
    version: int = Field(ge=1, le=2**31 - 1)
    created: str = Field(description="RFC 3339, UTC")
    task: Task
    input_kind: InputKind
    cell: str
    layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    quantization: Literal["none", "int8"] = "none"
    tolerance: float = Field(default=1e-4, gt=0, description="how far from PyTorch's answers the golden example may be")
    memory: Literal["carried"] | Window = "carried"
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    states: tuple[StateSpec, ...] = Field(description="at least one, unless the graph is foreign and not streamable")
    foreign: Foreign | None = Field(default=None, description="how a graph that was made elsewhere is called")
    symbols: tuple[str, ...] = Field(default=(), description="the vocabulary, in the order of the ids")
    splitter: Splitter | None = None
    start_symbol: str | None = None
    features: tuple[Feature, ...] = ()
    sound: Sound | None = Field(default=None, description="where the values are samples of sound")
    targets: tuple[Target, ...] = ()
    horizons: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1,), min_length=1, description="how many steps ahead a forecaster predicts, all at once; ascending"
    )
    quantiles: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()
    sampler: Literal["inverse-cdf-1"] = "inverse-cdf-1"
    files: dict[str, str] = Field(description="sha256 of each file of the bundle but the manifest")
    training: dict[str, Any] = Field(default_factory=dict, description="provenance: command, seed, data, ...")
    metrics: dict[str, Any] = Field(default_factory=dict)
    checks: dict[str, Any] = Field(default_factory=dict, description="what the export verified")

    @model_validator(mode="after")
    def _task_has_what_it_needs(self) -> "Manifest":
        if self.input_kind in ("text", "symbols"):
            if not self.symbols or self.splitter is None:
                raise ValueError(f"input_kind {self.input_kind!r} needs symbols and a splitter")
            if len(set(self.symbols)) != len(self.symbols):
                raise ValueError("symbols repeat")
            if self.start_symbol is not None and self.start_symbol not in self.symbols:
                raise ValueError("start_symbol is not one of the symbols")
            if self.splitter.kind == "bytes" and list(self.symbols) != bytepairs.vocabulary(self.splitter.merges):
                raise ValueError("symbols are not the 256 bytes and what the splitter's merges make of them")
        if self.input_kind == "values" and not self.features:
            raise ValueError("input_kind 'values' needs features")
        if self.sound is not None and len(self.features) != self.sound.hop:
            raise ValueError("sound: a hop must have as many samples as there are features")
        if self.task == "language-model" and not self.symbols:
            raise ValueError("a language-model needs symbols")
        if self.task in ("forecaster", "regressor") and not self.targets:
            raise ValueError(f"a {self.task} needs targets")
        if self.task in ("classifier", "multi-label") and not self.labels:
            raise ValueError(f"a {self.task} needs labels")
        if isinstance(self.memory, Window) and {state.name for state in self.states} & {WINDOW, WINDOW_LENGTH}:
            raise ValueError(f"a state named {WINDOW!r} or {WINDOW_LENGTH!r} cannot be kept beside a window")
        if list(self.quantiles) != sorted(set(self.quantiles)) or any(not 0 < q < 1 for q in self.quantiles):
            raise ValueError("quantiles must be ascending numbers between 0 and 1")
        if list(self.horizons) != sorted(set(self.horizons)) or (self.horizons != (1,) and self.task != "forecaster"):
            raise ValueError("horizons must be ascending numbers of a forecaster")
        return self

    @model_validator(mode="after")
    def _graph_can_be_called(self) -> "Manifest":
        foreign = self.foreign
        if not self.states and (foreign is None or foreign.streamable):
            raise ValueError("a model that keeps a memory has states")
        if foreign is None and self.input_kind == "tensors":
            raise ValueError("a graph that takes tensors is a foreign one")
        if self.task == "raw" and self.input_kind != "tensors":
            raise ValueError("a raw model takes tensors")
        if self.input_kind == "tensors" and self.task not in ("raw", "classifier"):
            raise ValueError(f"a {self.task} does not take tensors")
        if self.input_kind != "tensors" and len(self.inputs) != 1:
            raise ValueError("only a model that takes tensors may have more than one input")
        if foreign is not None and self.memory != "carried":
            raise ValueError("the memory of a foreign graph is carried")
        alone = foreign is not None and (foreign.batching == "alone" or not foreign.streamable)
        if not alone and any(state.batch_axis is None for state in self.states):
            raise ValueError("a state without a batch axis needs the batching 'alone'")
        return self

    @model_validator(mode="after")
    def _shapes_fit_the_task(self) -> "Manifest":
        width = {spec.name: spec.row_shape for spec in (*self.inputs, *self.outputs)}
        needed = self.needed_shapes
        if self.input_kind == "values":
            needed = {**needed, self.inputs[0].name: (len(self.features),)}
        for name, shape in needed.items():
            if self._plain(width.get(name)) != self._plain(shape):
                raise ValueError(f"{name!r} must have the shape [T, B, {', '.join(map(str, shape))}]")
        return self

    def _plain(self, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """A shape as it is compared: in a foreign graph axes of 1 say nothing."""
        return tuple(axis for axis in shape if axis != 1) if shape is not None and self.foreign is not None else shape

    @property
    def needed_shapes(self) -> dict[str, tuple[int, ...]]:
        """What a row of each output must look like for the task; none for a raw model."""
        K, Q = len(self.targets) * len(self.horizons), len(self.quantiles)
        match self.task:
            case "language-model":
                return {"logits": (len(self.symbols),)}
            case "classifier":
                given = {spec.name for spec in self.outputs}
                return {"probabilities" if "probabilities" in given else "logits": (len(self.labels),)}
            case "multi-label":
                return {"logits": (len(self.labels),)}
            case "forecaster" | "regressor":
                return {"mean": (K,)} | ({"quantiles": (Q, K)} if Q else {})
            case _:
                return {}

    @property
    def streamable(self) -> bool:
        """Whether it can be fed step by step; if not, it is given whole sequences."""
        return self.foreign is None or self.foreign.streamable

    @field_validator("created")
    @classmethod
    def _created_is_a_time(cls, created: str) -> str:
        datetime.fromisoformat(created.replace("Z", "+00:00"))
        return created

    @cached_property
    def graph_sha256(self) -> str:
        """What a session pins: the graph's sha256, or that of the graph and the window that it folds."""
        graph = self.files[GRAPH]
        if isinstance(self.memory, Window):
            return hashlib.sha256(f"{graph} window {self.memory.window}".encode()).hexdigest()
        return graph

    @cached_property
    def session_states(self) -> tuple[StateSpec, ...]:
        """What is kept of a session: the graph's states; of a windowed one also its last entries, and how many."""
        if not isinstance(self.memory, Window):
            return self.states
        entry, dtype = self.inputs[0].shape[2:], "int32" if self.symbols else self.inputs[0].dtype
        return (
            *self.states,
            _kept(WINDOW, dtype, ("B", self.memory.window, *entry)),
            _kept(WINDOW_LENGTH, "int32", ("B", 1)),
        )

    @cached_property
    def output_numbers(self) -> int:
        """Numbers in one row's outputs of one step."""
        return sum(prod(axis for axis in spec.shape if isinstance(axis, int)) for spec in self.outputs)

    @property
    def state_bytes(self) -> int:
        """Bytes of one session's whole state."""
        return sum(state.nbytes for state in self.session_states)


def _kept(name: str, dtype: str, shape: tuple[int | str, ...]) -> StateSpec:
    """A state that the service keeps beside the graph's."""
    return StateSpec.model_validate(
        {"name": name, "input": name, "output": name, "dtype": dtype, "shape": shape, "batch_axis": 0}
    )


@dataclass(frozen=True, slots=True)
class Bundle:
    """A manifest and the folder it came from, every checksum verified."""

    manifest: Manifest
    path: Path

    @property
    def graph(self) -> Path:
        """The ONNX graph's file."""
        return self.path / GRAPH

    @property
    def golden(self) -> Path:
        """The golden example's file."""
        return self.path / GOLDEN


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(path: Path) -> Bundle:
    """Read and verify the bundle in `path`; raises BundleError naming the broken rule."""
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise BundleError(f"{MANIFEST} is missing") from error
    except ValidationError as error:
        raise BundleError(f"{MANIFEST} is not valid: {_first_error(error)}") from error
    if (manifest.name, str(manifest.version)) != (path.parent.name, path.name):
        raise BundleError(f"{MANIFEST} is of {manifest.name}/{manifest.version}, not of this folder")
    for required in (GRAPH, GOLDEN):
        if required not in manifest.files:
            raise BundleError(f"{MANIFEST} lists no checksum for {required}")
    for name, expected in manifest.files.items():
        _verify_file(path, name, expected)
    return Bundle(manifest, path)


def _verify_file(path: Path, name: str, expected: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise BundleError(f"{MANIFEST} names a file outside the bundle: {name!r}")
    if not (path / name).is_file():
        raise BundleError(f"{name} is missing")
    if sha256_of(path / name) != expected:
        raise BundleError(f"{name} does not match its checksum")


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = "/".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])
