"""Confusion matrices of classifiers: which label was said where another held."""

from __future__ import annotations

import torch
from torch import Tensor

from training.data import Sequence
from training.evaluate import streamed
from training.look import pictures
from training.look.seen import LacksError, Seen, View
from training.model import RecurrentModel

LABELS = 40
"""With more than so many labels their names are left off."""
NUMBERS = 20
"""Up to so many labels the shares are written into the squares."""


def view(seen: Seen) -> View:
    """The test part's scored steps: a row for the label that held, a column for the one that was said."""
    if seen.meta["task"] != "classifier":
        raise LacksError("the run is no classifier")
    labels = seen.corpus.labels
    counts = confusion(seen.model, seen.corpus.test, len(labels))
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    size = max(4.0, min(10.0, 0.5 * len(labels)))
    figure, (axes,) = pictures.panels(1, width=size + 1, height=size)
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the row", shrink=0.8)
    if len(labels) <= LABELS:
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        axes.set_yticks(range(len(labels)), labels)
    if len(labels) <= NUMBERS:
        for row, column in torch.nonzero(shares >= 0.005).tolist():
            value = float(shares[row, column])
            colour = "white" if value > 0.5 else "black"
            text = f"{value:.2f}" if value < 0.995 else "1"
            axes.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    axes.set(xlabel="said", ylabel="held")
    pictures.save(figure, seen.plot("confusion"))
    right = float(counts.diagonal().sum() / counts.sum().clamp(min=1))
    wrong = counts.clone().fill_diagonal_(0)
    text = f"{right:.2%} of {int(counts.sum()):,} steps right"
    if int(wrong.max()):
        held, said = divmod(int(wrong.argmax()), len(labels))
        text += f"; most often {labels[said]!r} where {labels[held]!r} held ({int(wrong.max())} times)"
    return View(text, {"right": right, "steps": int(counts.sum())})


def confusion(model: RecurrentModel, sequences: list[Sequence], labels: int) -> Tensor:
    """[held, said] counts over the scored steps, each sequence from a zero state."""
    counts = torch.zeros(labels * labels)
    for batch, outputs in streamed(model, sequences):
        pairs = (batch.targets * labels + outputs["logits"].argmax(dim=-1))[batch.weights > 0]
        counts += torch.bincount(pairs, minlength=labels * labels)
    return counts.reshape(labels, labels)
