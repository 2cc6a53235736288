"""How much the loss at t depends on the state at t - k: the gradient's norm by lag.

The state is h, or h and c together; lag 1 is the state that goes into step t. Fresh cells of each kind are shown
beside the trained one, under the run's own encoder and head, so that the cell alone makes the difference.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from training.batches import Batch, collate
from training.data import Sequence
from training.look import pictures
from training.look.seen import LacksError, Seen, View
from training.model import RecurrentModel
from training.tasks import Task

CELLS = ("rnn", "gru", "lstm")
LAGS, ROWS = 100, 32
FLOOR = 1e-30
"""Below this a norm is shown as this: the axis is logarithmic."""


def view(seen: Seen) -> View:
    """Norm by lag, relative to lag 1: the trained model, and fresh cells of its size."""
    batch = windows(seen.corpus.validation, LAGS, ROWS)
    lags = len(batch.inputs)
    if lags < 3 or not batch.weights[-1].any():
        raise LacksError("its sequences are too short, or nothing is scored at their end")
    found = {f"{seen.model.config.cell}, trained": relative(by_lag(seen.model, seen.task, batch))}
    for cell in CELLS:
        found[f"{cell}, fresh*"] = relative(by_lag(fresh(seen.model, cell), seen.task, batch))
    figure, (axes,) = pictures.panels(1)
    pictures.lines(
        axes,
        {name: (range(1, lags + 1), [max(FLOOR, value) for value in norms]) for name, norms in found.items()},
        "lag k",
        "|d loss(t) / d state(t - k)|, 1 at lag 1",
        y_scale="log",
    )
    pictures.save(figure, seen.plot("gradient-by-lag"))
    at_end = {name.removesuffix("*"): norms[-1] for name, norms in found.items()}
    said = ", ".join(f"{name} {value:.1e}" for name, value in at_end.items())
    return View(f"left of the gradient at lag {lags}: {said}", {"lag": lags, "left": at_end})


def windows(sequences: list[Sequence], steps: int, rows: int, seed: int = 0) -> Batch:
    """Random windows of `steps`, or as long as the longest sequence allows."""
    steps = min(steps, max(map(len, sequences)))
    long = [i for i, sequence in enumerate(sequences) if len(sequence) >= steps]
    rng = np.random.default_rng(seed)
    spans = []
    for i in rng.choice(long, rows).tolist():
        start = int(rng.integers(len(sequences[i]) - steps + 1))
        spans.append((i, start, start + steps, True))
    return collate(sequences, spans)


def fresh(model: RecurrentModel, cell: str, seed: int = 0) -> RecurrentModel:
    """An untrained cell of that kind and the model's size, between the model's own encoder and head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        other = RecurrentModel(replace(model.config, cell=cell))
    other.encoder.load_state_dict(model.encoder.state_dict())
    other.head.load_state_dict(model.head.state_dict())
    return other


def by_lag(model: RecurrentModel, task: Task, batch: Batch) -> list[float]:
    """Mean over the rows of |d loss(T) / d state(T - k)|, for k = 1 .. T."""
    model.eval()
    states = [tuple(tensor.requires_grad_() for tensor in model.initial_state(batch.inputs.shape[1]))]
    for t in range(len(batch.inputs)):
        outputs, after = model(batch.inputs[t : t + 1], states[t])
        states.append(after)
    last = replace(batch, inputs=batch.inputs[-1:], targets=batch.targets[-1:], weights=batch.weights[-1:])
    loss, _ = task.losses(model, outputs, last)
    return norms(loss, states[:-1])


def norms(loss: Tensor, states: list[tuple[Tensor, ...]]) -> list[float]:
    """Mean over rows of the gradient's norm in each state, newest first; a state is tensors [layers, B, hidden]."""
    flat = [tensor for state in states for tensor in state]
    gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True))
    found = []
    for state in states:
        parts = [gradient for _ in state if (gradient := next(gradients)) is not None]
        zero = torch.zeros(state[0].shape[1], dtype=torch.float64)  # float32 has no square of 1e-30
        squares = sum((part.double().square().sum(dim=(0, 2)) for part in parts), zero)
        found.append(float(squares.sqrt().mean()))
    return found[::-1]


def relative(norms: list[float]) -> list[float]:
    """By the first, that of lag 1."""
    return [norm / norms[0] if norms[0] else 0.0 for norm in norms]
