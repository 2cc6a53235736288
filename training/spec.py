"""What somebody says of weights that were trained elsewhere: a TOML file, described in docs/own-weights.md.

What the tensors' shapes say is not asked for: cell, layers, sizes, biases, which layer of the head is of which kind.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.bundle import NAME_PATTERN, Feature, Splitter, Target, Window
from training.parity import ExportError

UNIFORM = 12**0.5
"""a uniform distribution is so many standard deviations wide"""

Number = Annotated[float, Field(allow_inf_nan=False)]
Names = Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Scaled(_Strict):
    """A value by name, and how it was scaled for the network: (x - mean) / scale, or (x - min) / (max - min)."""

    name: str = Field(min_length=1, max_length=128)
    unit: str = ""
    mean: Number | None = None
    scale: Number | None = None
    min: Number | None = None
    max: Number | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Scaled:
        standard, bounds = (self.mean, self.scale), (self.min, self.max)
        for pair, names in ((standard, "mean and scale"), (bounds, "min and max")):
            if (pair[0] is None) != (pair[1] is None):
                raise ValueError(f"{self.name!r}: {names} go together")
        if None not in standard and None not in bounds:
            raise ValueError(f"{self.name!r}: mean and scale, or min and max, not both")
        if self.factor <= 0:
            raise ValueError(f"{self.name!r}: scale must be above 0, and max above min")
        return self

    @property
    def is_scaled(self) -> bool:
        """Whether the network sees it otherwise than the data have it."""
        return self.scale is not None or self.max is not None

    @property
    def offset(self) -> float:
        """What is subtracted."""
        return next((value for value in (self.mean, self.min) if value is not None), 0.0)

    @property
    def factor(self) -> float:
        """What is divided by."""
        if self.max is not None and self.min is not None:
            return self.max - self.min
        return self.scale if self.scale is not None else 1.0

    @property
    def typical(self) -> dict[str, float]:
        """Mean and standard deviation; within bounds those of a uniform distribution."""
        if self.max is not None and self.min is not None:
            return {"mean": (self.max + self.min) / 2, "std": self.factor / UNIFORM}
        return {"mean": self.offset, "std": self.factor}


class FeatureSpec(Scaled):
    """One input value."""

    fill: Literal["last", "mean"] | None = None

    def feature(self) -> Feature:
        """As the manifest has it."""
        return Feature(name=self.name, unit=self.unit, fill=self.fill, **self.typical)


class TargetSpec(Scaled):
    """One predicted value; `scaled = false` says that the network gives it in the data's own units."""

    scaled: bool | None = None

    @model_validator(mode="after")
    def _scaled_as_said(self) -> TargetSpec:
        if self.scaled is not None and self.scaled != self.is_scaled:
            raise ValueError(f"{self.name!r}: scaled = {str(self.scaled).lower()} contradicts what is said beside it")
        return self

    def target(self) -> Target:
        """As the manifest has it."""
        return Target(name=self.name, unit=self.unit, std=self.typical["std"])


class Norm(_Strict):
    """A LayerNorm whose eps is not PyTorch's 1e-5."""

    layer: str
    eps: Number = Field(gt=0)


class SymbolsFile(_Strict):
    """A vocabulary in a file of its own: a JSON list, in the order of the ids."""

    file: str


class Spec(_Strict):
    """All that the weights do not say themselves."""

    name: str | None = Field(default=None, pattern=NAME_PATTERN)
    task: Literal["classifier", "forecaster", "language-model", "regressor"]
    memory: Literal["carried"] | Window | None = None
    recurrent: str | Names = ""
    nonlinearity: Literal["tanh", "relu"] = "tanh"
    head: list[str | Norm] = Field(max_length=64)
    embedding: str | None = None
    symbols: str | Names | SymbolsFile | None = None
    splitter: Splitter | None = None
    start_symbol: str | None = None
    features: list[FeatureSpec] = Field(default_factory=list)
    targets: list[TargetSpec] = Field(default_factory=list)
    quantiles: list[Number] = Field(default_factory=list)
    order: Literal["quantiles", "targets"] = Field(
        default="quantiles", description="all targets of the first quantile, or all quantiles of the first target first"
    )
    labels: list[str] = Field(default_factory=list)
    ignore: list[str] = Field(default_factory=list, description="prefixes of keys that are not part of the network")

    @model_validator(mode="after")
    def _fits_the_task(self) -> Spec:
        if (self.embedding is None) != (self.symbols is None):
            raise ValueError("embedding and symbols go together")
        if (self.symbols is None) != bool(self.features):
            raise ValueError("give either features, or embedding and symbols")
        wanted = {"labels": self.task == "classifier", "targets": self.task in ("forecaster", "regressor")}
        for name, needed in wanted.items():
            if bool(getattr(self, name)) != needed:
                raise ValueError(f"a {self.task} {'needs' if needed else 'has no'} {name}")
        if self.task == "language-model" and self.symbols is None:
            raise ValueError("a language-model needs embedding and symbols")
        if self.quantiles and not self.targets:
            raise ValueError("quantiles are for targets")
        if self.quantiles != sorted(set(self.quantiles)) or any(not 0 < level < 1 for level in self.quantiles):
            raise ValueError("quantiles must be ascending numbers between 0 and 1")
        return self

    @model_validator(mode="after")
    def _names_are_clear(self) -> Spec:
        for kind, names in (
            ("features", [one.name for one in self.features]),
            ("targets", [one.name for one in self.targets]),
            ("labels", self.labels),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"{kind} repeat a name")
        features = {feature.name: feature for feature in self.features}
        for target in self.targets:
            known = features.get(target.name)
            if known is not None and known.is_scaled and not target.is_scaled and target.scaled is None:
                raise ValueError(
                    f"target {target.name!r} is also a scaled feature: say how it was scaled (mean and scale, or min "
                    "and max), or scaled = false if the network gives it in the data's own units"
                )
        return self


def read_spec(given: Spec | Mapping[str, Any] | Path | str) -> Spec:
    """A spec from a TOML file or a mapping, a vocabulary's file read in; raises ExportError naming the field."""
    if isinstance(given, Spec):
        return given
    folder = Path()
    if not isinstance(given, Mapping):
        path = Path(given)
        folder, given = path.parent, _toml(path)
    try:
        spec = Spec.model_validate(given)
    except ValidationError as error:
        raise ExportError(f"spec: {_first(error)}") from error
    if isinstance(spec.symbols, SymbolsFile):
        return read_spec({**given, "symbols": _vocabulary(folder / spec.symbols.file)})
    return spec


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ExportError(f"spec: {path.name}: {getattr(error, 'strerror', None) or error}") from error


def _vocabulary(path: Path) -> Any:  # noqa: ANN401 (checked as the spec's symbols)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"spec: symbols: {path.name} is not a JSON list") from error


def _first(error: ValidationError) -> str:
    """The first thing that is wrong; of a choice of types the last one's complaint says what is possible."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    said = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}: {said}" if where else said
