"""Vanishing gradients: how much the output depends on the state k steps before, for each cell at its start."""

from __future__ import annotations

import torch
from torch import Tensor

from training.lecture.cells import WITH_CHRONO, cell
from training.lecture.finding import Finding, Setting
from training.look import pictures
from training.look.lags import FLOOR, norms, relative

UNITS, BATCH = 64, 16


def run(setting: Setting) -> Finding:
    """The gradient's norm by lag, 1 at lag 1."""
    steps = 50 if setting.quick else 100
    starts = [(kind, 0) for kind in ("rnn", "gru", "lstm")] + [(kind, steps) for kind in WITH_CHRONO]
    found = {name(*start): by_lag(*start, steps, setting.seed) for start in starts}
    figure, (axes,) = pictures.panels(1)
    drawn = {
        label + ("*" if "chrono" in label else ""): (range(1, steps + 1), [max(FLOOR, value) for value in values])
        for label, values in found.items()
    }
    pictures.lines(axes, drawn, "lag k", "|d output(t) / d state(t - k)|, 1 at lag 1", y_scale="log")
    setting.draw(figure, "vanishing")
    left = {label: values[-1] for label, values in found.items()}
    plain = max(left["rnn"], left["gru"])
    return Finding(
        "The gradient vanishes with the lag in an rnn; a gate that keeps, started well, holds it up",
        plain < 1e-3 and left["lstm, chrono"] > 100 * plain,
        {f"{label}: left at lag {steps}": value for label, value in left.items()},
    )


def name(kind: str, chrono: int) -> str:
    """As it stands in the legend."""
    return f"{kind}, chrono" if chrono else kind


def by_lag(kind: str, chrono: int, steps: int, seed: int) -> list[float]:
    """Norms relative to lag 1, for random inputs."""
    torch.manual_seed(seed)
    made = cell(kind, 2, UNITS, chrono)
    inputs = torch.randn(steps, BATCH, 2)
    zero = torch.zeros(1, BATCH, UNITS, requires_grad=True)
    states: list[tuple[Tensor, ...]] = [(zero, zero.clone()) if kind == "lstm" else (zero,)]
    for x in inputs:
        fed = states[-1] if kind == "lstm" else states[-1][0]
        hidden, after = made(x[None], fed)
        states.append(after if kind == "lstm" else (after,))
    output = (hidden[-1] * torch.randn(UNITS)).sum()
    return relative(norms(output, states[:-1]))
