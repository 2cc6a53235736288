"""The network: encoder, a plain `nn.LSTM | nn.GRU | nn.RNN`, and one linear head per task.

Everything is time-major. The state goes in and comes out; the module keeps none of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[Tensor, ...]
"""(h, c) for lstm, (h,) otherwise; each [layers, B, hidden]."""

TASKS = ("language-model", "forecaster", "classifier", "regressor", "multi-label")
CELLS = ("rnn", "rnn-relu", "gru", "lstm")


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

    def __post_init__(self) -> None:
        for name, value, known in (("task", self.task, TASKS), ("cell", self.cell, CELLS)):
            if value not in known:
                raise ValueError(f"model.{name} is {value!r}; it must be one of {', '.join(known)}")
        if min(self.layers, self.hidden) < 1:
            raise ValueError("model.layers and model.hidden must be at least 1")
        if list(self.quantiles) != sorted(set(self.quantiles)) or not all(0 < q < 1 for q in self.quantiles):
            raise ValueError("model.quantiles must ascend and lie between 0 and 1")
        if not self.horizons or list(self.horizons) != sorted(set(self.horizons)) or self.horizons[0] < 1:
            raise ValueError("data.horizons must ascend and begin with 1 or more")

    @property
    def columns(self) -> tuple[int, ...]:
        """The predicted values in the order of the head: all targets of the first horizon, then of the next."""
        return self.targets * len(self.horizons)

    def to_json(self) -> dict[str, Any]:
        """A dict that survives a trip through JSON and `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        """The config that `to_json` wrote; lists become tuples again."""
        frozen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
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

    encoder: nn.Embedding | ValueEncoder
    rnn: nn.LSTM | nn.GRU | nn.RNN
    head: LanguageHead | ClassifierHead | ForecastHead | OwnHead

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        if config.vocabulary:
            self.encoder = nn.Embedding(config.vocabulary, config.embedding)
            width = config.embedding
        else:
            self.encoder = ValueEncoder(config.periods, config.noise)
            width = self.encoder.width
        relu = partial(nn.RNN, nonlinearity="relu")
        cells: dict[str, Callable[..., nn.LSTM | nn.GRU | nn.RNN]] = {"rnn": nn.RNN, "rnn-relu": relu}
        cell = (cells | {"gru": nn.GRU, "lstm": nn.LSTM})[config.cell]
        between = config.dropout if config.layers > 1 else 0.0
        self.rnn = cell(width, config.hidden, num_layers=config.layers, dropout=between)
        self.dropout = nn.Dropout(config.dropout)
        self.head = _head(config)
        _initialise(self.rnn, config)

    def initial_state(self, batch: int) -> State:
        """Zeros, each [layers, batch, hidden] float32, on the model's device."""
        device = next(self.parameters()).device
        shape = (self.config.layers, batch, self.config.hidden)
        return tuple(torch.zeros(shape, device=device) for _ in state_names(self.config.cell))

    def forward(self, inputs: Tensor, state: State) -> tuple[dict[str, Tensor], State]:
        """[T, B] int64 symbols or [T, B, F] float32 values, and the state -> outputs at each step, state'."""
        encoded = self.encoder(inputs)
        if self.config.cell == "lstm":
            hidden, after = self.rnn(encoded, state)
        else:
            hidden, h = self.rnn(encoded, state[0])
            after = (h,)
        return self.head(self.dropout(hidden), inputs), after


def state_names(cell: str) -> tuple[str, ...]:
    """The cell's state tensors, in order."""
    return ("h", "c") if cell == "lstm" else ("h",)


def _head(config: ModelConfig) -> LanguageHead | ClassifierHead | ForecastHead:
    if config.task == "language-model":
        return LanguageHead(config.hidden, config.vocabulary)
    if config.task in ("classifier", "multi-label"):
        return ClassifierHead(config.hidden, config.labels)
    return ForecastHead(config)


def _initialise(rnn: nn.Module, config: ModelConfig) -> None:
    """Orthogonal recurrent weights, gate by gate, and forget bias 1: memory lasts from the first step on.

    The orthogonal start took 0.06 bits per character off a 2 x 384 LSTM after 1,500 steps.
    """
    for name, parameter in rnn.named_parameters():
        if "weight_hh" in name:
            for gate in torch.split(parameter.data, config.hidden):
                nn.init.orthogonal_(gate)
        elif "bias" in name and config.cell == "lstm":
            # torch adds two biases, so only one of them opens the gate
            parameter.data[config.hidden : 2 * config.hidden] = 1.0 if "bias_ih" in name else 0.0
