"""What a trained model says: text symbol by symbol, a forecast rolled on its own predictions, labels by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training import plots
from training.data import Corpus, DataError, Sequence
from training.model import RecurrentModel, State

SHOWN = 96
AHEAD = 24


@torch.no_grad()
def sample_text(
    model: RecurrentModel, meta: dict[str, Any], prompt: str, length: int, temperature: float, seed: int = 0
) -> str:
    """`length` characters that follow the prompt (the start symbol where it is empty); temperature 0 is greedy."""
    symbols: list[str] = meta["symbols"]
    known = {symbol: i for i, symbol in enumerate(symbols)}
    missing = [character for character in prompt if character not in known]
    if missing:
        raise DataError(f"the model never saw {missing[0]!r}: its {len(symbols)} symbols are {''.join(symbols)!r}")
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.tensor([[known[character]] for character in prompt or meta["start_symbol"]])
    state, written = model.initial_state(1), []
    for _ in range(length):
        outputs, state = model(inputs, state)
        choice = _choose(outputs["logits"][-1, 0], temperature, generator)
        written.append(symbols[choice])
        inputs = torch.tensor([[choice]])
    return "".join(written)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    chances = torch.softmax(logits.float() / temperature, dim=0)
    return int(torch.multinomial(chances, 1, generator=generator))


@torch.no_grad()
def roll(model: RecurrentModel, inputs: Tensor, steps: int) -> Tensor:
    """[N, F] history -> [steps, K] forecasts, each mean fed back as if it had been measured.

    Periodic features go on as they last did, other features that are not predicted keep their last value.
    """
    outputs, state = model(inputs[:, None], model.initial_state(1))
    row, drift = inputs[-1], inputs[-1] - inputs[max(0, len(inputs) - 2)]
    rolled = [outputs["mean"][-1, 0]]
    while len(rolled) < steps:
        row = next_row(model, row, drift, rolled[-1])
        mean, state = _one(model, row, state)
        rolled.append(mean)
    return torch.stack(rolled[:steps])


def next_row(model: RecurrentModel, row: Tensor, drift: Tensor, predicted: Tensor) -> Tensor:
    """[F] the row after `row` if `predicted` [K] came true."""
    periods = torch.tensor(model.config.periods)
    following = torch.where(periods > 0, torch.remainder(row + drift, periods.clamp(min=1e-9)), row)
    following[list(model.config.targets)] = predicted
    return following


def _one(model: RecurrentModel, row: Tensor, state: State) -> tuple[Tensor, State]:
    outputs, after = model(row[None, None], state)
    return outputs["mean"][0, 0], after


@torch.no_grad()
def forecasts_shown(model: RecurrentModel, corpus: Corpus, sequence: Sequence, path: Path) -> str:
    """Plot the last steps of a sequence with the one-step fan, and the steps ahead of it; returns a line of text."""
    outputs, _ = model(sequence.inputs[:, None], model.initial_state(1))
    fan = outputs.get("quantiles")
    target = corpus.features[corpus.targets[0]]
    plots.forecast(
        actual=sequence.targets[-SHOWN:, 0].tolist(),
        mean=outputs["mean"][-SHOWN:, 0, 0].tolist(),
        fan=[] if fan is None else [fan[-SHOWN:, 0, i, 0].tolist() for i in range(fan.shape[2])],
        ahead=roll(model, sequence.inputs, AHEAD)[:, 0].tolist(),
        title=f"{sequence.name}: {target.name} {target.unit}",
        path=path,
    )
    return f"plot: {path}"


@torch.no_grad()
def labels_shown(model: RecurrentModel, corpus: Corpus, sequence: Sequence, steps: int = 24) -> str:
    """The first steps as input/label, an asterisk where the label is wrong."""
    read = len(sequence) if model.config.bidirectional else steps
    outputs, _ = model(sequence.inputs[:read, None], model.initial_state(1))
    said = outputs["logits"][:steps, 0].argmax(dim=-1)
    words = [corpus.symbols[i] for i in sequence.inputs[:steps].tolist()] if corpus.symbols else ["step"] * len(said)
    wrong = ["" if a == b else "*" for a, b in zip(said.tolist(), sequence.targets[:steps].tolist(), strict=True)]
    parts = zip(words, [corpus.labels[i] for i in said.tolist()], wrong, strict=True)
    return " ".join(f"{word}/{label}{mark}" for word, label, mark in parts)
