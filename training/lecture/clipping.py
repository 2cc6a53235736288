"""Exploding gradients, and clipping them.

A ReLU network whose update weights begin at 1.05 times the identity multiplies what it remembers by 1.05 a step, and
the gradient on its way back as well. It is to say the mean of its inputs, with plain gradient descent.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from training.lecture.finding import Finding, Setting
from training.look import pictures

STEPS, UNITS, BATCH = 60, 32, 32
GROWTH, RATE, CLIP = 1.05, 0.03, 1.0


class Growing(nn.Module):
    """[T, B, 1] -> [B, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, UNITS, nonlinearity="relu")
        self.output = nn.Linear(UNITS, 1)
        self.rnn.weight_hh_l0.data = GROWTH * torch.eye(UNITS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The output after the last step."""
        output: torch.Tensor = self.output(self.rnn(inputs)[0][-1])
        return output


def run(setting: Setting) -> Finding:
    """Losses and gradient norms with and without clipping, from the same start."""
    updates = 300 if setting.quick else 4000
    free, free_norms = learn(setting.seed, updates, math.inf)
    clipped, clipped_norms = learn(setting.seed, updates, CLIP)
    figure, (losses, norms) = pictures.panels(2, width=4.6, columns=2)
    every = updates // 300
    for axes, free_line, line, label in (
        (losses, free, clipped, "mean squared error"),
        (norms, free_norms, clipped_norms, "gradient's norm before clipping"),
    ):
        pictures.lines(
            axes, {"clipped at 1": (range(0, updates, every), line[::every])}, "update", label, y_scale="log"
        )
        after = f"not clipped: no number after update {len(free)}"
        axes.plot(range(len(free)), free_line, "X-", color="tab:red", markersize=8, label=after)
        axes.legend(fontsize="small")
    setting.draw(figure, "clipping")
    last = sum(clipped[-100:]) / 100
    figures = {
        "norm of the first gradient": clipped_norms[0],
        "updates until no number is left, not clipped": float(len(free)),
        "loss at the start": clipped[0],
        f"loss after {updates} updates, clipped": last,
        "loss of always saying 1/2": 1 / 12 / STEPS,
        "share of updates clipped": sum(norm > CLIP for norm in clipped_norms) / len(clipped_norms),
    }
    return Finding(
        "Gradients explode, and clipping them cures it",
        len(free) < updates and last < (0.1 * clipped[0] if setting.quick else 1 / 12 / STEPS),
        figures,
    )


def learn(seed: int, updates: int, clip: float) -> tuple[list[float], list[float]]:
    """(losses, norms before clipping) up to the first that is no number."""
    torch.manual_seed(seed)
    model = Growing()
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    losses: list[float] = []
    norms: list[float] = []
    for _ in range(updates):
        inputs = torch.rand(STEPS, BATCH, 1)
        loss = nn.functional.mse_loss(model(inputs), inputs.mean(dim=0))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip if math.isfinite(clip) else 1e30).item()
        if not (math.isfinite(norm) and math.isfinite(loss.item())):
            break
        losses.append(loss.item())
        norms.append(norm)
        optimiser.step()
    return losses, norms
