"""What an owner says of a graph: the answers that can not be found in it, and what task it is served as."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.foreign.graph import GraphError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StatePair(_Strict):
    """A state that is named by the owner."""

    input: str
    output: str
    name: str = ""
    initial: float = 0.0


class GraphAnswers(_Strict):
    """What can not be found in every graph; see docs/foreign-graphs.md."""

    states: tuple[StatePair, ...] | None = None
    constants: dict[str, bool | int | float | list[Any]] = Field(default_factory=dict)
    sizes: dict[str, int] = Field(default_factory=dict, description="'input.axis' -> how many numbers")
    context: dict[str, int] = Field(default_factory=dict, description="input -> how much of the last step goes before")
    outputs: tuple[str, ...] | None = None
    batching: Literal["exact", "together", "alone"] | None = None


class Scaled(_Strict):
    """A feature or target; the graph takes (value - mean) / scale, or gives it."""

    name: str = Field(min_length=1, max_length=128)
    unit: str = ""
    mean: float = 0.0
    scale: float = Field(default=1.0, gt=0)
    fill: Literal["last", "mean"] | None = None


class Spec(_Strict):
    """A whole spec file."""

    task: Literal["raw", "forecaster", "classifier"] = "raw"
    output: str = ""
    gives: Literal["logits", "probabilities", "probability"] = "logits"
    features: tuple[Scaled, ...] = ()
    targets: tuple[Scaled, ...] = ()
    labels: tuple[str, ...] = ()
    quantiles: tuple[float, ...] = ()
    quantiles_output: str = ""
    graph: GraphAnswers = GraphAnswers()

    @model_validator(mode="after")
    def _task_has_what_it_needs(self) -> "Spec":
        needed = {"forecaster": ("features", "targets"), "classifier": ("labels",)}.get(self.task, ())
        if missing := [name for name in needed if not getattr(self, name)]:
            raise ValueError(f"a {self.task} needs {' and '.join(missing)}")
        if bool(self.quantiles) != bool(self.quantiles_output):
            raise ValueError("quantiles and quantiles_output go together")
        if self.gives == "probability" and len(self.labels) != 2:
            raise ValueError("one probability is that of the second of two labels")
        return self


def read_spec(path: Path | None, changes: Sequence[str] = (), answers: Mapping[str, Any] | None = None) -> Spec:
    """A spec file with KEY=VALUE changes to its [graph] part, and more answers; raises GraphError."""
    try:
        parts: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError) as error:
        raise GraphError(f"{path.name if path else ''}: {error}") from error
    graph = parts.setdefault("graph", {})
    given = dict(_change(change) for change in changes) | dict(answers or {})
    for key, value in given.items():
        table, _, name = key.partition(".")
        if not isinstance(graph, dict) or (name and not isinstance(graph.setdefault(table, {}), dict)):
            raise GraphError(f"{key}: the spec's [graph] is not a table of that kind")
        if name:
            graph[table][name] = value
        else:
            graph[table] = value
    try:
        return Spec.model_validate(parts)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise GraphError(f"spec: {where + ': ' if where else ''}{first['msg']}") from error


def _change(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise GraphError(f"--set {text}: KEY=VALUE is needed, as constants.sr=16000")
    return key, answer(value)


def answer(text: str) -> Any:  # noqa: ANN401 (any JSON)
    """A value as JSON, or the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
