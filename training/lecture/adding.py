"""The adding problem (Hochreiter and Schmidhuber 1997): the sum of two marked numbers out of T.

Each step brings a number between 0 and 1 and a mark; one mark lies in each half. Always saying 1 scores a mean
squared error of 1/6. A cell has learnt it below 0.01.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.lecture.cells import KINDS, WITH_CHRONO, Cell, cell
from training.lecture.finding import Finding, Setting
from training.look import pictures
from training.puzzles import numbers

GUESS = 1 / 6
LEARNT, DONE = 0.01, 1e-3
EVERY = 50
LONG = (50, 100, 200, 400, 600)


def run(setting: Setting) -> Finding:
    """The error by update for every cell, plain and with chrono start."""
    lengths = (20,) if setting.quick else LONG if setting.long else (50,)
    figure, axes = pictures.panels(len(lengths))
    figures: dict[str, float] = {}
    for steps, ax in zip(lengths, axes, strict=True):
        curves = {}
        for kind in KINDS:
            curves[kind] = learn(kind, 0, steps, setting)
            if kind in WITH_CHRONO:
                curves[f"{kind}, chrono*"] = learn(kind, steps, steps, setting)
        pictures.lines(ax, curves, "update", "mean squared error", y_scale="log")
        ax.axhline(GUESS, color="gray", linestyle=":")
        ax.set_title(f"T = {steps}; dotted: always saying 1")
        for name, (updates, errors) in curves.items():
            label = f"{name.removesuffix('*')} at {steps}"
            figures[f"{label}: error"] = errors[-1]
            learnt = [update for update, error in zip(updates, errors, strict=True) if error < LEARNT]
            if learnt:
                figures[f"{label}: updates to {LEARNT:g}"] = float(learnt[0])
    setting.draw(figure, "adding")
    longest = lengths[-1]
    rnn, lstm = (figures[f"{name} at {longest}: error"] for name in ("rnn", "lstm, chrono"))
    return Finding(
        "Gates that are started for the distance learn to add across it, where an rnn does not",
        lstm < 0.5 * rnn if setting.quick else lstm < LEARNT < rnn,
        figures,
    )


class Adder(nn.Module):
    """[T, B, 2] -> [B]."""

    def __init__(self, recurrent: Cell, units: int) -> None:
        super().__init__()
        self.recurrent, self.output = recurrent, nn.Linear(units, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """The output after the last step."""
        output: Tensor = self.output(self.recurrent(inputs)[0][-1])
        return output[:, 0]


def learn(kind: str, chrono: int, steps: int, setting: Setting) -> tuple[list[int], list[float]]:
    """(updates, test errors): Adam at 5e-3, clipped at 1, until below DONE or the updates are spent."""
    torch.manual_seed(setting.seed)
    units, batch = (32, 32) if setting.quick else (32, 50)
    updates = 800 if setting.quick else 1000 if steps <= 100 else 4000
    model = Adder(cell(kind, 2, units, chrono), units)
    test_inputs, test_sums = numbers(steps, 1000)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    at: list[int] = []
    errors: list[float] = []
    for update in range(updates + 1):
        if update % EVERY == 0:
            with torch.no_grad():
                at.append(update)
                errors.append(nn.functional.mse_loss(model(test_inputs), test_sums).item())
            if errors[-1] < DONE:
                break
        inputs, sums = numbers(steps, batch)
        loss = nn.functional.mse_loss(model(inputs), sums)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return at, errors
