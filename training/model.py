"""The network: encoder, recurrent layers (`layers.py`), and one linear head per task.

Everything is time-major. The state goes in and comes out; the module keeps none of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.bundle import Sound
from training.layers import STARTS, Layers, drop
from training.mel import SoundEncoder

State = tuple[Tensor, ...]
"""(h, c) for lstm, (h,) otherwise, each [layers, B, hidden]; behind them what `state_shapes` says of sound."""

TASKS = ("language-model", "forecaster", "classifier", "regressor", "multi-label")
CELLS = ("rnn", "rnn-relu", "leaky", "gru", "lstm")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the network's shape; stored in each checkpoint as JSON."""

    task: str
    cell: str
    layers: int
    hidden: int
    embedding: int = 0
    vocabulary: int = 0
    periods: tuple[float, ...] = ()
    targets: tuple[int, ...] = ()
    """Which inputs a forecaster predicts; a regressor's are not among its inputs and are numbered from 0."""
    horizons: tuple[int, ...] = (1,)
    """How many steps ahead a forecaster predicts them, all at once."""
    quantiles: tuple[float, ...] = ()
    labels: int = 0
    residual: bool = False
    dropout: float = 0.0
    noise: float = 0.0
    """Spread of what is added to each plain value in training, in units of its own spread."""
    input_dropout: float = 0.0
    weight_dropout: float = 0.0
    locked: bool = False
    skip: bool = False
    norm: bool = False
    tied: bool = False
    start: str = "orthogonal"
    forget_bias: float = 1.0
    chrono: int = 0
    alpha: float = 0.1
    bidirectional: bool = False
    sound: Sound | None = None
    """Where the values are samples: how they are heard."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("task", self.task, TASKS),
            ("cell", self.cell, CELLS),
            ("start", self.start, STARTS),
        ):
            if value not in known:
                raise ValueError(f"model.{name} is {value!r}; it must be one of {', '.join(known)}")
        if min(self.layers, self.hidden) < 1:
            raise ValueError("model.layers and model.hidden must be at least 1")
        if not all(0 <= share < 1 for share in (self.dropout, self.input_dropout, self.weight_dropout)):
            raise ValueError(
                "model.dropout, model.input_dropout and model.weight_dropout must be at least 0 and below 1"
            )
        if not 0 < self.alpha <= 1:
            raise ValueError("model.alpha is the share of a leaky state that is new at each step: above 0, at most 1")
        if self.chrono and (self.chrono < 3 or self.cell not in ("lstm", "gru")):
            raise ValueError("model.chrono is the longest memory in steps, 3 or more, of an lstm or a gru")
        if self.tied and (self.task != "language-model" or self.embedding != self.hidden):
            raise ValueError("model.tied is for language models, and needs model.embedding equal to model.hidden")
        if self.bidirectional and self.task in ("language-model", "forecaster"):
            raise ValueError(f"model.bidirectional is not for a {self.task}: it would read what it is to predict")
        if list(self.quantiles) != sorted(set(self.quantiles)) or not all(0 < q < 1 for q in self.quantiles):
            raise ValueError("model.quantiles must ascend and lie between 0 and 1")
        if not self.horizons or list(self.horizons) != sorted(set(self.horizons)) or self.horizons[0] < 1:
            raise ValueError("data.horizons must ascend and begin with 1 or more")
        if self.sound is not None and (self.task != "classifier" or self.bidirectional):
            raise ValueError("sound is heard step by step by a classifier: task = classifier, no model.bidirectional")

    @property
    def columns(self) -> tuple[int, ...]:
        """The predicted values in the order of the head: all targets of the first horizon, then of the next."""
        return self.targets * len(self.horizons)

    @property
    def width(self) -> int:
        """Of what the head reads."""
        return self.hidden * (2 if self.bidirectional else 1)

    def to_json(self) -> dict[str, Any]:
        """A dict that survives a trip through JSON and `from_json`."""
        return asdict(self) | {"sound": self.sound and self.sound.model_dump()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        """The config that `to_json` wrote; lists become tuples again."""
        frozen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        if frozen.get("sound"):
            frozen["sound"] = Sound(**frozen["sound"])
        return cls(**frozen)


class ValueEncoder(nn.Module):
    """[T, B, F] in the data's own units -> standardised plain features, then sin/cos of periodic ones."""

    mean: Tensor
    scale: Tensor
    period: Tensor

    def __init__(self, periods: tuple[float, ...], noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise
        self.register_buffer("mean", torch.zeros(len(periods)))
        self.register_buffer("scale", torch.ones(len(periods)))
        self.register_buffer("period", torch.tensor(periods, dtype=torch.float32))
        self.plain = [i for i, period in enumerate(periods) if period == 0]
        self.periodic = [i for i, period in enumerate(periods) if period > 0]
        self.width = len(self.plain) + 2 * len(self.periodic)

    def forward(self, values: Tensor) -> Tensor:
        """[T, B, F] -> [T, B, width]: plain features first, then a (sin, cos) pair per periodic one."""
        plain = ((values - self.mean) / self.scale)[..., self.plain]
        if self.training and self.noise:
            plain = plain + self.noise * torch.randn_like(plain)
        if not self.periodic:
            return plain
        angle = values[..., self.periodic] * (2 * math.pi / self.period[self.periodic])
        waves = torch.stack((torch.sin(angle), torch.cos(angle)), dim=-1)
        return torch.cat((plain, waves.flatten(-2)), dim=-1)


class LogitsHead(nn.Module):
    """One linear layer to unnormalised log probabilities."""

    def __init__(self, hidden: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, classes)

    def forward(self, hidden: Tensor, inputs: Tensor) -> dict[str, Tensor]:
        """[T, B, hidden] -> {"logits": [T, B, classes]}."""
        return {"logits": self.linear(hidden)}


class LanguageHead(LogitsHead):
    """Logits over the vocabulary for the symbol at p + 1."""


class ClassifierHead(LogitsHead):
    """Logits over the labels for the position p itself; each for itself where several may hold (multi-label)."""


class ForecastHead(nn.Module):
    """Mean and quantiles of the targets, in the data's own units; quantiles never cross.

    K counts the columns: each target at each horizon. `stretch` [Q, K] is how many times as far from the middle
    calibration found each quantile to lie; 1 until then.
    """

    target_mean: Tensor
    target_scale: Tensor
    stretch: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        K, Q = len(config.columns), len(config.quantiles)
        self.targets = list(config.columns)
        self.quantiles = Q
        self.residual = config.residual
        self.linear = nn.Linear(config.hidden, K * (1 + Q))
        self.register_buffer("target_mean", torch.zeros(K))
        self.register_buffer("target_scale", torch.ones(K))
        self.register_buffer("stretch", torch.ones(Q, K))

    def forward(self, hidden: Tensor, inputs: Tensor) -> dict[str, Tensor]:
        """[T, B, hidden], [T, B, F] -> {"mean": [T, B, K], "quantiles": [T, B, Q, K]}."""
        raw = self.linear(hidden).float().unflatten(-1, (1 + self.quantiles, len(self.targets)))
        offset = inputs[..., self.targets] if self.residual else self.target_mean
        outputs = {"mean": offset + self.target_scale * raw[..., 0, :]}
        if self.quantiles:
            steps = torch.cat((raw[..., 1:2, :], F.softplus(raw[..., 2:, :])), dim=-2)
            ladder = self.stretched(steps.cumsum(dim=-2))
            outputs["quantiles"] = offset.unsqueeze(-2) + self.target_scale * ladder
        return outputs

    def stretched(self, ladder: Tensor) -> Tensor:
        """[..., Q, K] with each rung moved away from the middle as calibration says, none below a lower one."""
        if self.training:
            return ladder
        low, high = middle(self.quantiles)
        centre = (ladder[..., low : low + 1, :] + ladder[..., high : high + 1, :]) / 2
        return (centre + self.stretch * (ladder - centre)).cummax(dim=-2).values


def middle(quantiles: int) -> tuple[int, int]:
    """The two middle ones of so many, or twice the only one."""
    return (quantiles - 1) // 2, quantiles // 2


class OwnHead(nn.Module):
    """Layers that were trained elsewhere, one after another; what they give are logits, or scaled values in any order.

    `order` [M * K] puts the values one quantile after another; the mean is row `mean_at` of the [M, K] that this gives,
    the quantiles are the last rows.
    """

    order: Tensor
    target_mean: Tensor
    target_scale: Tensor

    def __init__(self, layers: Sequence[nn.Module], config: ModelConfig) -> None:
        super().__init__()
        K, Q = len(config.targets), len(config.quantiles)
        self.layers = nn.ModuleList(layers)
        self.targets, self.quantiles = K, Q
        self.mean_at = 0
        self.register_buffer("order", torch.arange(K * (1 + Q)))
        self.register_buffer("target_mean", torch.zeros(K))
        self.register_buffer("target_scale", torch.ones(K))

    def forward(self, hidden: Tensor, inputs: Tensor) -> dict[str, Tensor]:
        """[T, B, hidden] -> {"logits": [T, B, N]}, or {"mean": [T, B, K], "quantiles": [T, B, Q, K]}."""
        for layer in self.layers:
            hidden = layer(hidden)
        return self.said(hidden) if self.targets else {"logits": hidden}

    def said(self, raw: Tensor, scaled: bool = True) -> dict[str, Tensor]:
        """What the last layer gave, [..., M * K], by name; from `scaled` to the data's own units."""
        rows = raw[..., self.order].reshape(*raw.shape[:-1], -1, self.targets)
        rows = self.target_mean + self.target_scale * rows if scaled else rows
        outputs = {"mean": rows[..., self.mean_at, :]}
        return outputs | {"quantiles": rows[..., -self.quantiles :, :]} if self.quantiles else outputs


class RecurrentModel(nn.Module):
    """inputs, state -> outputs, state'; the same function in training, evaluation and export."""

    encoder: nn.Embedding | ValueEncoder | SoundEncoder
    rnn: Layers
    head: LanguageHead | ClassifierHead | ForecastHead | OwnHead

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        if config.vocabulary:
            self.encoder = nn.Embedding(config.vocabulary, config.embedding)
            width = config.embedding
        elif config.sound is not None:
            self.encoder = SoundEncoder(config.sound, config.noise)
            width = self.encoder.width
        else:
            self.encoder = ValueEncoder(config.periods, config.noise)
            width = self.encoder.width
        self.rnn = Layers(width, config)
        self.head = _head(config)
        if config.tied and isinstance(self.encoder, nn.Embedding) and isinstance(self.head, LanguageHead):
            nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
            self.head.linear.weight = self.encoder.weight

    def initial_state(self, batch: int) -> State:
        """Zeros as `state_shapes` has them, float32, on the model's device."""
        device = next(self.parameters()).device
        shapes = state_shapes(self.config).values()
        return tuple(torch.zeros(rows, batch, width, device=device) for rows, width in shapes)

    def forward(self, inputs: Tensor, state: State, lengths: Tensor | None = None) -> tuple[dict[str, Tensor], State]:
        """[T, B] int64 symbols or [T, B, F] float32 values, and the state -> outputs at each step, state'.

        Only a bidirectional model asks for the rows' lengths [B], all T if not given: it begins at their ends.
        """
        config = self.config
        encoded, heard = self.encoded(inputs, state)
        encoded = drop(encoded, config.input_dropout, self.training, config.locked)
        hidden, after = self.rnn(encoded, state[: len(state) - len(heard)], lengths)
        return self.head(drop(hidden, config.dropout, self.training, config.locked), inputs), (*after, *heard)

    def encoded(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """What the first layer reads [T, B, E], and what the encoder itself keeps: samples, or nothing."""
        if isinstance(self.encoder, SoundEncoder):
            heard, samples = self.encoder(inputs, state[-1])
            return heard, (samples,)
        return self.encoder(inputs), ()


def state_names(cell: str) -> tuple[str, ...]:
    """The cell's state tensors, in order."""
    return ("h", "c") if cell == "lstm" else ("h",)


def state_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every state [N, B, W] by name, as (N, W): the cell's, then the samples that a window of sound reaches back to."""
    shapes = dict.fromkeys(state_names(config.cell), (config.layers, config.hidden))
    return shapes | ({"samples": (1, config.sound.window - config.sound.hop)} if config.sound is not None else {})


def carried_states(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The same of what a graph is fed: nothing where whole sequences are read."""
    return {} if config.bidirectional else state_shapes(config)


def _head(config: ModelConfig) -> LanguageHead | ClassifierHead | ForecastHead:
    if config.task == "language-model":
        return LanguageHead(config.hidden, config.vocabulary)
    if config.task in ("classifier", "multi-label"):
        return ClassifierHead(config.width, config.labels)
    return ForecastHead(config)
