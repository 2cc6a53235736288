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
    """Ten letters, data.steps blanks, then the letters again while it is asked for them; a blank is said until then.

    Each part has a seed of its own, so that a longer delay, gone on to with --init-from, tests no letters that were
    learnt.
    """
    delay = checked(data)
    blank, recall = len(LETTERS), len(LETTERS) + 1
    seeds = [torch.Generator().manual_seed(SEED + i) for i in range(3)]
    letters = torch.cat(
        [
            torch.randint(len(LETTERS), (count, REMEMBERED), generator=generator)
            for count, generator in zip(counts(data), seeds, strict=True)
        ]
    )
    asked = REMEMBERED + 1  # the first one is asked before the first letter is due
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


def counts(data: DataRecipe) -> tuple[int, int, int]:
    """How many sequences train, validate and test; raises DataError for a part without any."""
    first, second = (int(data.sequences * (1 - share)) for share in (data.validation + data.test, data.test))
    parts = first, second - first, data.sequences - second
    if min(parts) < 1:
        raise DataError(f"data.sequences: {data.sequences} are too few for three parts")
    return parts


def split(sequences: list[Sequence], data: DataRecipe) -> tuple[list[Sequence], list[Sequence], list[Sequence]]:
    """The first ones train, the next validate, the last test."""
    train, validation, _ = counts(data)
    return sequences[:train], sequences[train : train + validation], sequences[train + validation :]
