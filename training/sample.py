"""What a trained model says: text symbol by symbol, a forecast rolled on its own predictions, labels by step."""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service import bytepairs
from service.bundle import Splitter
from training import plots
from training.data import Corpus, DataError, Sequence
from training.model import RecurrentModel, State

SHOWN = 96
AHEAD = 24


@torch.no_grad()
def sample_text(
    model: RecurrentModel, meta: dict[str, Any], prompt: str, length: int, temperature: float, seed: int = 0
) -> str:
    """`length` symbols that follow the prompt (the start symbol where it is empty); temperature 0 is greedy."""
    symbols: list[str] = meta["symbols"]
    known = {symbol: i for i, symbol in enumerate(symbols)}
    splitter = Splitter.model_validate(meta["splitter"])
    given = splitter.split(prompt) if prompt else [meta["start_symbol"] or symbols[0]]
    missing = [symbol for symbol in given if symbol not in known]
    if missing:
        raise DataError(f"the model never saw {missing[0]!r}: its {len(symbols)} symbols are {''.join(symbols)!r}")
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.tensor([[known[symbol]] for symbol in given])
    state, written = model.initial_state(1), []
    for _ in range(length):
        outputs, state = model(inputs, state)
        choice = _choose(outputs["logits"][-1, 0], temperature, generator)
        written.append(symbols[choice])
        inputs = torch.tensor([[choice]])
    return text_of(written, splitter)


def text_of(symbols: list[str], splitter: Splitter) -> str:
    """Symbols as text; bytes that are no whole characters become U+FFFD."""
    if splitter.kind == "bytes":
        return b"".join(map(bytepairs.to_bytes, symbols)).decode("utf-8", "replace")
    return splitter.separator.join(symbols)


@torch.no_grad()
def answers(
    model: RecurrentModel, corpus: Corpus, sequences: list[Sequence], longest: int
) -> list[tuple[str, str, str]]:
    """(given, said, wanted) of each pair: the likeliest symbol again and again, up to the line's end."""
    model.eval()
    cut, end = corpus.symbols.index(corpus.separator), corpus.symbols.index("\n")
    found = []
    for sequence in sequences:
        ids = sequence.inputs.tolist()
        at = ids.index(cut)
        outputs, state = model(sequence.inputs[: at + 1, None], model.initial_state(1))
        said: list[int] = []
        while len(said) < longest and (symbol := int(outputs["logits"][-1, 0].argmax())) != end:
            said.append(symbol)
            outputs, state = model(torch.tensor([[symbol]]), state)
        texts = ["".join(corpus.symbols[i] for i in part) for part in (ids[:at], said, ids[at + 1 :])]
        found.append((texts[0], texts[1], texts[2]))
    return found


def pairs_shown(model: RecurrentModel, corpus: Corpus, sequences: list[Sequence], count: int = 3) -> str:
    """The first pairs as given -> said, with what was wanted where that is something else."""
    longest = max(map(len, sequences[:count]))
    return "\n".join(
        f"{given} -> {said}" + ("" if said == wanted else f"  (wanted: {wanted})")
        for given, said, wanted in answers(model, corpus, sequences[:count], longest)
    )


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
    if model.config.horizons[0] != 1:
        raise DataError(
            f"the model says only {', '.join(map(str, model.config.horizons))} steps ahead: nothing to roll"
        )
    outputs, state = model(inputs[:, None], model.initial_state(1))
    row, drift = inputs[-1], inputs[-1] - inputs[max(0, len(inputs) - 2)]
    rolled = [outputs["mean"][-1, 0]]
    while len(rolled) < steps:
        row = next_row(model, row, drift, rolled[-1])
        mean, state = _one(model, row, state)
        rolled.append(mean)
    return torch.stack(rolled[:steps])[:, : len(model.config.targets)]


def next_row(model: RecurrentModel, row: Tensor, drift: Tensor, predicted: Tensor) -> Tensor:
    """[..., F] the row after `row` if `predicted` [..., K], the next step's part of it, came true."""
    periods = torch.tensor(model.config.periods)
    following = torch.where(periods > 0, torch.remainder(row + drift, periods.clamp(min=1e-9)), row)
    following[..., list(model.config.targets)] = predicted[..., : len(model.config.targets)]
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
        actual=[value if weight else nan for value, weight in _last(sequence)],
        mean=outputs["mean"][-SHOWN:, 0, 0].tolist(),
        fan=[] if fan is None else [fan[-SHOWN:, 0, i, 0].tolist() for i in range(fan.shape[2])],
        ahead=roll(model, sequence.inputs, AHEAD)[:, 0].tolist() if model.config.horizons[0] == 1 else [],
        title=f"{sequence.name}: {corpus.column_names[0]} {target.unit}",
        path=path,
    )
    return f"plot: {path}"


def _last(sequence: Sequence) -> list[tuple[float, float]]:
    """The last steps' first target, and whether it is known."""
    columns = (sequence.targets[-SHOWN:, 0].tolist(), sequence.weights[-SHOWN:, 0].tolist())
    return list(zip(*columns, strict=True))


@torch.no_grad()
def notes_shown(model: RecurrentModel, corpus: Corpus, sequence: Sequence, steps: int = 8) -> str:
    """The first steps with the labels that are more likely than not, and an asterisk where others hold."""
    outputs, _ = model(sequence.inputs[:steps, None], model.initial_state(1))
    said, wanted = outputs["logits"][:, 0] > 0, sequence.targets[:steps] > 0
    return " | ".join(
        " ".join(label for label, here in zip(corpus.labels, row.tolist(), strict=True) if here)
        + ("" if bool((row == true).all()) else "*")
        for row, true in zip(said, wanted, strict=True)
    )


@torch.no_grad()
def values_shown(model: RecurrentModel, corpus: Corpus, sequence: Sequence, steps: int = 8) -> str:
    """The last steps that are scored as said/measured, of the first target."""
    outputs, _ = model(sequence.inputs[:, None], model.initial_state(1))
    scored = (sequence.weights[:, 0] > 0).nonzero()[-steps:, 0]
    pairs = zip(outputs["mean"][scored, 0, 0].tolist(), sequence.targets[scored, 0].tolist(), strict=True)
    return f"{corpus.target_names[0]}: " + " ".join(f"{said:.4g}/{true:.4g}" for said, true in pairs)


@torch.no_grad()
def labels_shown(model: RecurrentModel, corpus: Corpus, sequence: Sequence, steps: int = 24) -> str:
    """The last steps as input/label, an asterisk where the label is wrong."""
    outputs, _ = model(sequence.inputs[:, None], model.initial_state(1))
    said = outputs["logits"][-steps:, 0].argmax(dim=-1)
    words = [corpus.symbols[i] for i in sequence.inputs[-steps:].tolist()] if corpus.symbols else ["step"] * len(said)
    wrong = ["" if a == b else "*" for a, b in zip(said.tolist(), sequence.targets[-steps:].tolist(), strict=True)]
    parts = zip(words, [corpus.labels[i] for i in said.tolist()], wrong, strict=True)
    return " ".join(f"{word}/{label}{mark}" for word, label, mark in parts)
