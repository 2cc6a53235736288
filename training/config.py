"""Recipes: TOML files whose every key can be overridden on the command line (`--set model.hidden=512`)."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from training.model import TASKS

RECIPES = Path(__file__).parent / "recipes"
RENAMED = {("data", "stories"): "sequences"}


class RecipeError(ValueError):
    """A recipe or an override that cannot be used; the message names the nearest valid key."""


@dataclass(frozen=True)
class DataRecipe:
    """Where the sequences come from and how they are split."""

    source: str = "file"
    """One of training.corpora.SOURCES; file is your own."""
    path: str = ""
    tokens: str = "characters"
    """Text: characters, bytes, or bpe (pairs of bytes that are frequent in the training part)."""
    vocabulary: int = 1024
    """bpe: at most so many symbols."""
    time: str = ""
    targets: tuple[str, ...] = ()
    horizons: tuple[int, ...] = (1,)
    """How many steps ahead the targets are forecast, all at once."""
    series: str = ""
    split: str = "time"
    """time: each series is cut in time; series: whole series are dealt to the three parts."""
    label: str = ""
    symbol: str = ""
    """The column that holds a symbol a row, where a classifier's inputs are no numbers."""
    only: str = ""
    """nyc-weather: keep this feature alone."""
    sequences: int = 4000
    """Made data (who, reverse, adding, copy-memory): how many there are; of who, how many to learn from."""
    steps: int = 100
    """adding: numbers of a sequence; copy-memory: the delay."""
    hop_ms: float = 10.0
    """Sound: milliseconds of a step."""
    window_ms: float = 25.0
    """Sound: milliseconds that each step is heard with, its own and those before."""
    mels: int = 40
    """Sound: bands, equally far apart for the ear."""
    validation: float = 0.1
    test: float = 0.2
    later: float = 0.0
    """Labelled sequences: a step weighs the share that was seen by then, to this power; 0 weighs all alike."""
    transpose: int = 0
    """jsb: semitones above and below its own key in which each training piece is learnt too."""
    calibration: float = 0.0
    """Share of the training part, in blocks spread over it, that is held out to calibrate a forecaster's quantiles."""
    folds: int = 0
    """Instead of that all is learnt from, and so many further models are trained, each without one of so many seasons:
    on what they had not seen the quantiles are calibrated (cross-conformal)."""
    fold: int = 0
    """Which of them this model is, 1 to `folds`; 0: the one that learns from all."""


@dataclass(frozen=True)
class ModelRecipe:
    """The network; what the data fixes (vocabulary, features, labels) is not here."""

    cell: str = "lstm"
    """rnn (tanh), rnn-relu, leaky, gru or lstm."""
    layers: int = 2
    hidden: int = 256
    embedding: int = 128
    embedding_scale: float = 1.0
    """Spread of the embedding at the start; small where words that training never sees should say little."""
    dropout: float = 0.0
    """Of what the head and each layer but the first read."""
    input_dropout: float = 0.0
    """Of what the first layer reads."""
    weight_dropout: float = 0.0
    """Of recurrent weights, once a chunk (AWD-LSTM)."""
    locked: bool = False
    """Variational dropout: the same units of a row are dropped at every step of a chunk."""
    skip: bool = False
    """Residual connections: from layer 1 on a layer's output is added to its input."""
    norm: bool = False
    """Layer normalisation of what the head and each layer but the first read."""
    tied: bool = False
    """Language models: the head's weights are the embedding."""
    start: str = "orthogonal"
    """Of recurrent weights: orthogonal, or identity (IRNN, with cell = rnn-relu)."""
    forget_bias: float = 1.0
    """lstm: how far the forget gate is open at the start."""
    chrono: int = 0
    """lstm, gru: the longest memory in steps over which the gates are spread at the start."""
    alpha: float = 0.1
    """leaky: the share of the state that is new at each step."""
    bidirectional: bool = False
    """Labels only: each sequence is read whole and from both ends (train.steps is not used); the service predicts."""
    noise: float = 0.0
    """Added to standardised input values in training: spread, in units of their own."""
    residual: bool = False
    """Forecasters predict the difference from the present value."""
    quantiles: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrainRecipe:
    """The loop. A run ends at `max_steps` or `max_minutes`, whichever is set and comes first."""

    form: str = "stream"
    """stream (state carried) or windowed (overlapping windows from a zero state)."""
    batch: int = 32
    steps: int = 64
    """Time steps in a chunk: the reach of back-propagation through time; 0: each sequence whole."""
    stride: int = 16
    """windowed only: steps between the starts of two windows."""
    learning_rate: float = 4e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    accumulate: int = 1
    """Each batch is learnt from in so many parts, rows by rows, before one step: less memory, the same loss."""
    average: float = 0.0
    """Weights are averaged with this decay a step (0.999); the average is what is scored and exported. 0: not."""
    patience: int = 0
    """Stop after so many evaluations without a better one; 0: never."""
    precision: str = "auto"
    """fp32, bf16 (autocast; the weights stay fp32), or auto: bf16 where it is known to be faster."""
    max_steps: int = 0
    max_minutes: float = 0.0
    evaluate_steps: int = 500
    checkpoint_minutes: float = 3.0
    seed: int = 1
    threads: int = 1
    device: str = "auto"
    """cpu, where a resumed run is exact, cuda, mps, or auto: a GPU where there is one."""
    tensorboard: bool = False
    """Curves for TensorBoard in the run's folder."""


@dataclass(frozen=True)
class SampleRecipe:
    """What is shown while a text model trains."""

    prompt: str = "\n"
    length: int = 200
    temperature: float = 0.8


@dataclass(frozen=True)
class Recipe:
    """All that shapes a run; stored whole in each checkpoint."""

    name: str
    task: str
    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    sample: SampleRecipe = field(default_factory=SampleRecipe)

    def __post_init__(self) -> None:
        _one_of("task", self.task, TASKS)
        _one_of("data.tokens", self.data.tokens, ("characters", "bytes", "bpe"))
        _one_of("data.split", self.data.split, ("time", "series"))
        if self.data.horizons != (1,) and self.task != "forecaster":
            raise RecipeError(f"data.horizons are for forecasters; this recipe's task is {self.task!r}")
        _one_of("train.device", self.train.device, ("auto", "cpu", "cuda", "mps"))
        _one_of("train.form", self.train.form, ("stream", "windowed"))
        _one_of("train.precision", self.train.precision, ("auto", "fp32", "bf16"))
        if min(self.train.batch, self.train.stride, self.train.evaluate_steps) < 1:
            raise RecipeError("train.batch, train.stride and train.evaluate_steps must be at least 1")
        if self.train.steps < (1 if self.train.form == "windowed" else 0):
            raise RecipeError("train.steps must be at least 1; 0, for whole sequences, is for train.form = stream")
        if self.train.accumulate < 1 or self.train.patience < 0 or not 0 <= self.train.average < 1:
            raise RecipeError(
                "train.accumulate must be at least 1, train.patience at least 0, train.average from 0 to below 1"
            )
        if not (self.train.max_steps or self.train.max_minutes):
            raise RecipeError("nothing ends this run: set train.max_steps or train.max_minutes (--max-minutes)")
        untested = self.data.test == 0 and self.task == "language-model" and self.data.source == "file"
        tested = self.data.test > 0 or untested
        if not (self.data.validation > 0 and tested and self.data.validation + self.data.test < 1):
            raise RecipeError(
                "data.validation and data.test must be positive and leave something to train on; of a text file "
                "data.test may be 0: then the validation part is scored"
            )
        if not 0 <= self.data.calibration < 0.5:
            raise RecipeError("data.calibration must be at least 0 and below 0.5")
        if self.data.folds and (self.data.folds < 2 or self.data.calibration or self.data.split != "time"):
            raise RecipeError("data.folds must be 2 or more, with data.calibration=0 and data.split=time")
        if self.data.folds and (self.task not in ("forecaster", "regressor") or self.data.symbol):
            raise RecipeError("data.folds are for what has quantiles of series of values: set data.folds=0")
        if not 0 <= self.data.fold <= self.data.folds:
            raise RecipeError("data.fold must be from 0 to data.folds")

    def to_json(self) -> dict[str, Any]:
        """A nested dict that `recipe_from` reads back."""
        return asdict(self)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe as plain data: one that comes with the package, or a path to a TOML file."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        raise RecipeError(f"no recipe {name!r}; there are {', '.join(recipe_names())}, or give a path to a .toml file")
    try:
        return {"name": path.stem, **tomllib.loads(path.read_text(encoding="utf-8"))}
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: {error}") from error


def recipe_from(data: Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Plain data and `section.key=value` overrides -> a checked Recipe; runs and bundles may have a key's old name."""
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    for (section, old), new in RENAMED.items():
        if isinstance(part := merged.get(section), dict) and old in part:
            part.setdefault(new, part.pop(old))
    for override in overrides:
        _apply(merged, override)
    recipe: Recipe = _build(Recipe, merged, "")
    return recipe


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"{override!r} is no override; write section.key=value, for example model.hidden=512")
    *sections, last = key.strip().split(".")
    place = data
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise RecipeError(f"{key!r}: {section!r} is no section")
    place[last] = _parse(text.strip())


def _parse(text: str) -> Any:  # noqa: ANN401 (TOML values are of any type)
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word such as lstm


def _build(kind: type[Any], data: Mapping[str, Any], prefix: str) -> Any:  # noqa: ANN401 (one of the dataclasses)
    hints = get_type_hints(kind)
    known = [item.name for item in fields(kind)]
    for key in data:
        if key not in known:
            raise RecipeError(unknown_key(prefix + key, [prefix + name for name in known]))
    return kind(**{key: _convert(hints[key], value, prefix + key) for key, value in data.items()})


def _convert(hint: Any, value: Any, key: str) -> Any:  # noqa: ANN401
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{key} is a section, not {value!r}")
        return _build(hint, value, key + ".")
    if get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(get_args(hint)[0], item, key) for item in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise RecipeError(f"{key} must be of type {hint.__name__}, not {value!r}")
    return value


def unknown_key(key: str, known: list[str]) -> str:
    """A message that names the nearest valid key."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"unknown key {key!r}; did you mean {near[0]!r}?" if near else f"unknown key {key!r}"


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RecipeError(f"{key} is {value!r}; it must be one of {', '.join(known)}")
