"""Made problems that need a long memory: the adding problem and copy memory, as Bai, Kolter and Koltun pose them.

(An empirical evaluation of generic convolutional and recurrent networks for sequence modeling, 2018, arXiv 1803.01271;
both are of Hochreiter and Schmidhuber 1997.) Nothing is fetched: a seed makes the data.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from service.bundle import Splitter
from training.config import DataRecipe
from training.data import Corpus, DataError, Feature, Sequence
from training.labelled import fitted

SEED = 7
LONGEST = 100_000
"""steps of delay, and of numbers to add"""
BLANK, RECALL, LETTERS = "-", "?", "abcdefgh"
REMEMBERED = 10
"""letters to copy"""


def adding(data: DataRecipe) -> Corpus:
    """The sum of two marked numbers out of data.steps, asked for at the last step."""
    steps = checked(data)
    generator = torch.Generator().manual_seed(SEED)
    given, sums = numbers(steps, data.sequences, generator)
    inputs = given.transpose(0, 1).contiguous()
    last = torch.zeros(steps, 1)
    last[-1] = 1
    pairs = zip(inputs, sums, strict=True)
    sequences = [Sequence("adding", one, total.expand(steps, 1), last) for one, total in pairs]
    train, validation, test = split(sequences, data)
    source = f"{data.sequences:,} made sequences of {steps} numbers, two of them marked, seed {SEED}"
    learnt = torch.stack([sequence.targets[0] for sequence in train]).double()
    return Corpus(
        train=train,
        validation=validation,
        test=test,
        input_kind="values",
        source=source,
        sha256=hashlib.sha256(source.encode()).hexdigest(),
        features=fitted(
            [Feature("number"), Feature("mark")],
            torch.cat([sequence.inputs for sequence in train]).double().numpy(),
        ),
        targets=[0],
        outputs=fitted([Feature("sum")], learnt.numpy()),
        whole=True,
    )


def numbers(steps: int, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Inputs [T, B, 2], a number between 0 and 1 and its mark, of which one lies in each half; the sums [B]."""
    values = torch.rand(steps, count, generator=generator)
    marks = torch.zeros(steps, count)
    half = steps // 2
    for low, high in ((0, half), (half, steps)):
        marks[torch.randint(low, high, (count,), generator=generator), torch.arange(count)] = 1
    return torch.stack((values, marks), dim=-1), (values * marks).sum(dim=0)


def copy_memory(data: DataRecipe) -> Corpus:
    """Ten letters, data.steps blanks, then the letters again while it is asked for them; a blank is said until then."""
    delay = checked(data)
    generator = torch.Generator().manual_seed(SEED)
    blank, recall = len(LETTERS), len(LETTERS) + 1
    letters = torch.randint(len(LETTERS), (data.sequences, REMEMBERED), generator=generator)
    asked = REMEMBERED + 1
    inputs = torch.full((data.sequences, delay + 2 * REMEMBERED), blank, dtype=torch.int64)
    inputs[:, :REMEMBERED] = letters
    inputs[:, -asked:] = recall
    targets = torch.full_like(inputs, blank)
    targets[:, -REMEMBERED:] = letters
    every = torch.ones(inputs.shape[1])
    pairs = zip(inputs, targets, strict=True)
    train, validation, test = split([Sequence("copy", *pair, every) for pair in pairs], data)
    source = f"{data.sequences:,} made sequences of {REMEMBERED} letters to keep for {delay} steps, seed {SEED}"
    guess = REMEMBERED * math.log(len(LETTERS)) / inputs.shape[1]
    return Corpus(
        train=train,
        validation=validation,
        test=test,
        input_kind="text",
        source=source,
        sha256=hashlib.sha256(source.encode()).hexdigest(),
        symbols=[*LETTERS, BLANK, RECALL],
        splitter=Splitter(kind="characters").model_dump(),
        labels=[*LETTERS, BLANK],
        notes=[f"without a memory of the letters: {guess:.4f} nats per step"],
    )


def checked(data: DataRecipe) -> int:
    """data.steps; raises DataError for one that makes no puzzle."""
    if not 2 <= data.steps <= LONGEST:
        raise DataError(f"data.steps is {data.steps}: it must be from 2 to {LONGEST:,}")
    return data.steps


def split(sequences: list[Sequence], data: DataRecipe) -> tuple[list[Sequence], list[Sequence], list[Sequence]]:
    """The first ones train, the next validate, the last test."""
    first, second = int(len(sequences) * (1 - data.validation - data.test)), int(len(sequences) * (1 - data.test))
    parts = sequences[:first], sequences[first:second], sequences[second:]
    if not all(parts):
        raise DataError(f"data.sequences: {len(sequences)} are too few for three parts")
    return parts
