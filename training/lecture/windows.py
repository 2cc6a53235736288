"""Windowed data: a network over a window takes its inputs in any order, a recurrent one does not.

The network of the slides is 3-10-10-1 with ReLU. Permute its inputs and, in the same way, the columns of its first
weights: every product and so every prediction and every gradient stays what it was, up to rounding. A recurrent
network has one set of weights for all steps, so there is nothing to permute with the steps: it learns another thing.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.lecture.finding import Finding, Setting
from training.look import pictures

WIDTHS = (3, 12)
"""The slides' window, and a longer one, where the order of the steps tells more."""
UNITS = 10

Floats = NDArray[np.float64]
Learnt = tuple[Floats, Floats]
"""(loss before each step, predictions after the last)."""


class Mlp(nn.Module):
    """width-10-10-1, ReLU; the slides' network at a width of 3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.output = nn.Linear(width, UNITS), nn.Linear(UNITS, UNITS), nn.Linear(UNITS, 1)

    def forward(self, windows: Tensor) -> Tensor:
        """[N, width] -> [N, 1]."""
        output: Tensor = self.output(torch.relu(self.second(torch.relu(self.first(windows)))))
        return output


class Elman(nn.Module):
    """The same window step by step: [N, width] -> [N, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, UNITS, batch_first=True)
        self.output = nn.Linear(UNITS, 1)

    def forward(self, windows: Tensor) -> Tensor:
        """The output after the last step."""
        hidden, _ = self.rnn(windows[..., None])
        output: Tensor = self.output(hidden[:, -1])
        return output


def run(setting: Setting) -> Finding:
    """Curves of both networks, with the inputs in order and permuted."""
    figures: dict[str, float] = {}
    figure, axes = pictures.panels(len(WIDTHS), width=4.6, columns=2)
    for width, ax in zip(WIDTHS, axes, strict=True):
        found = compare(width, setting)
        drawn: dict[str, pictures.Line] = {}
        for name, ((plain, said), (permuted, said_permuted)) in found.items():
            apart = np.abs(said - said_permuted)
            figures[f"{name} of {width}: greatest difference of the curves"] = float(np.abs(plain - permuted).max())
            figures[f"{name} of {width}: greatest difference of the predictions"] = float(apart.max())
            figures[f"{name} of {width}: final loss in order"] = float(plain[-1])
            figures[f"{name} of {width}: final loss permuted"] = float(permuted[-1])
            steps = range(0, len(plain), 5)
            drawn |= {f"{name}, in order": (steps, plain[::5].tolist())}
            drawn |= {f"{name}, permuted*": (steps, permuted[::5].tolist())}
        pictures.lines(ax, drawn, "step", "mean squared error", y_scale="log")
        ax.set_title(f"windows of {width}")
    setting.draw(figure, "windows")
    mlp = max(value for name, value in figures.items() if name.startswith("mlp") and "difference" in name)
    rnn = min(value for name, value in figures.items() if name.startswith("rnn") and "difference" in name)
    return Finding(
        "A windowed network does not know the order of its inputs; a recurrent one does",
        mlp < 1e-9 and rnn > 1e-3,
        figures,
    )


def compare(width: int, setting: Setting) -> dict[str, tuple[Learnt, Learnt]]:
    """Network -> what it learnt with the inputs in order and permuted, from the same start, in float64."""
    torch.manual_seed(setting.seed)
    inputs, targets = windows(series(200 if setting.quick else 600, setting.seed), width)
    order = torch.arange(width).roll(1) if width == WIDTHS[0] else torch.randperm(width)
    steps = 150 if setting.quick else 1000
    mlp, rnn = Mlp(width).double(), Elman().double()
    permuted_mlp = copy.deepcopy(mlp)
    permuted_mlp.first.weight.data = mlp.first.weight.data[:, order].clone()
    permuted_rnn = copy.deepcopy(rnn)
    return {
        "mlp": (learn(mlp, inputs, targets, steps), learn(permuted_mlp, inputs[:, order], targets, steps)),
        "rnn": (learn(rnn, inputs, targets, steps), learn(permuted_rnn, inputs[:, order], targets, steps)),
    }


def series(steps: int, seed: int) -> Tensor:
    """Two waves and a little noise, [steps] float64."""
    rng = np.random.default_rng(seed)
    t = np.arange(steps)
    waves = np.sin(2 * np.pi * t / 25) + 0.5 * np.sin(2 * np.pi * t / 7.3)
    return torch.from_numpy(waves + 0.05 * rng.standard_normal(steps))


def windows(values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """[N] -> [N - width, width] and what follows each, [N - width, 1]."""
    return values.unfold(0, width, 1)[:-1].clone(), values[width:, None].clone()


def learn(model: nn.Module, inputs: Tensor, targets: Tensor, steps: int) -> Learnt:
    """So many Adam steps on all windows at once."""
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.item())
    with torch.no_grad():
        return np.array(losses), model(inputs).numpy()
