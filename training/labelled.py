"""Labelled sequences: whose vowels are these, which digit is written here, which notes come next."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.config import DataRecipe
from training.data import Corpus, DataError, Feature, Sequence, fetch_wheel, file_sha256, read_member

AEON = ("aeon", "1.6.0", "py3-none-any", "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409")
SCIKIT_LEARN = (
    "scikit-learn",
    "1.9.1",
    "cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64",
    "e5d7b18a5b9dca241a74695f3275fa4c895a9dadc72b3d8df5fa9d1083c9b83e",
)
EVERY = 10
"""of JapaneseVowels' training sequences each tenth chooses the best checkpoint"""
SIDE = 8
"""rows and columns of a digit"""
LOWEST, NOTES = 21, 88
"""MIDI number of a piano's lowest note, and how many there are"""

Array = NDArray[np.float64]
Labelled = tuple[Array, str]
"""[N, F] values and the label that holds for all of them."""


def japanese_vowels(cache: Path, data: DataRecipe) -> Corpus:
    """Nine men say two vowels, twelve numbers a step; by the archive's own split (270 to learn from, 370 to test)."""
    wheel = fetch_wheel(*AEON, cache)
    learnt, tested = (parse_ts(read_member(wheel, f"JapaneseVowels_{name}.ts").decode()) for name in ("TRAIN", "TEST"))
    validation, train = learnt[EVERY - 1 :: EVERY], [one for i, one in enumerate(learnt) if i % EVERY != EVERY - 1]
    features = [Feature(f"lpc_{i + 1}") for i in range(learnt[0][0].shape[1])]
    return labelled_corpus(
        train,
        validation,
        tested,
        features,
        source="JapaneseVowels in PyPI aeon==1.6.0",
        sha256=AEON[3],
        later=data.later,
    )


def parse_ts(text: str) -> list[Labelled]:
    """The sequences of a .ts file: channels between colons, steps between commas, the label last."""
    _, _, body = text.partition("@data")
    parts = [line.split(":") for line in body.strip().splitlines()]
    return [(np.array([channel.split(",") for channel in part[:-1]], np.float64).T, part[-1]) for part in parts]


def digits(cache: Path, data: DataRecipe) -> Corpus:
    """1,797 written digits, eight rows of eight pixels, a row a step; the last ones test."""
    content = gzip.decompress(read_member(fetch_wheel(*SCIKIT_LEARN, cache), "digits.csv.gz")).decode()
    table = np.array([line.split(",") for line in content.split()], np.float64)
    images = [(row[:-1].reshape(SIDE, SIDE), str(int(row[-1]))) for row in table]
    first, second = int(len(images) * (1 - data.validation - data.test)), int(len(images) * (1 - data.test))
    features = [Feature(f"pixel_{i + 1}") for i in range(SIDE)]
    parts = images[:first], images[first:second], images[second:]
    return labelled_corpus(
        *parts, features, source="digits in PyPI scikit-learn==1.9.1", sha256=SCIKIT_LEARN[3], later=data.later
    )


def labelled_corpus(
    train: list[Labelled],
    validation: list[Labelled],
    test: list[Labelled],
    features: list[Feature],
    *,
    source: str,
    sha256: str,
    later: float = 0.0,
) -> Corpus:
    """Each sequence's label is asked for at every step of it, so that the answer grows with what was seen."""
    labels = sorted({label for _, label in train})
    seen = np.concatenate([values for values, _ in train])

    def made(name: str, part: list[Labelled]) -> list[Sequence]:
        return [_labelled(f"{name}-{i}", values, labels.index(label), later) for i, (values, label) in enumerate(part)]

    return Corpus(
        train=made("train", train),
        validation=made("validation", validation),
        test=made("test", test),
        input_kind="values",
        source=source,
        sha256=sha256,
        features=fitted(features, seen),
        labels=labels,
        whole=True,
    )


def fitted(features: list[Feature], seen: Array) -> list[Feature]:
    """The features with means and spreads of [N, F] values; one that never changes keeps a spread of 1."""
    means, spreads = seen.mean(axis=0), seen.std(axis=0)
    columns = zip(features, means, spreads, strict=True)
    return [replace(one, mean=float(mean), std=float(std) if std > 1e-9 else 1.0) for one, mean, std in columns]


def _labelled(name: str, values: Array, label: int, later: float) -> Sequence:
    count = len(values)
    inputs = torch.tensor(values, dtype=torch.float32)
    return Sequence(name, inputs, torch.full((count,), label, dtype=torch.int64), weights_of(count, later))


def weights_of(count: int, later: float) -> Tensor:
    """[N] what each step weighs: the share of the sequence that was seen by then, to the power `later`."""
    return (torch.arange(1, count + 1) / count) ** later


def chorales(path: Path, transpose: int = 0) -> Corpus:
    """Bach's chorales as JSON {"train", "valid", "test"}: lists of pieces of chords of MIDI numbers; 88 notes a step.

    At each step the notes of the next one are asked for. What is learnt from is heard in its own key and up to
    `transpose` semitones above and below, as far as a piano's keys reach; the other parts in their own keys alone.
    """
    try:
        pieces = json.loads(path.read_text(encoding="utf-8"))
        parts = [[piano_roll(piece) for piece in pieces[name]] for name in ("train", "valid", "test")]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f'{path} is no file of chorales, {{"train": [[[60, 64], ...], ...], "valid": ..., "test": ...}}'
        ) from error
    if not all(parts):
        raise DataError(f"{path} has a part without pieces: train, valid and test each need one")
    names = [f"note_{LOWEST + i}" for i in range(NOTES)]

    def made(name: str, rolls: list[Array]) -> list[Sequence]:
        return [_next_notes(f"{name}-{i}", roll) for i, roll in enumerate(rolls) if len(roll) > 1]

    keys = [key for key in range(-transpose, transpose + 1) if key]
    return Corpus(
        train=made("train", parts[0]),
        variants=[one for key in keys for one in made(f"train{key:+}", [transposed(roll, key) for roll in parts[0]])],
        validation=made("validation", parts[1]),
        test=made("test", parts[2]),
        input_kind="values",
        source=path.name,
        sha256=file_sha256(path),
        features=[Feature(name) for name in names],
        labels=names,
        whole=True,
    )


def piano_roll(piece: list[list[int]]) -> Array:
    """[N, 88] 1 where a note sounds; raises IndexError for one that a piano lacks."""
    roll = np.zeros((len(piece), NOTES))
    for step, chord in enumerate(piece):
        for note in chord:
            if not 0 <= note - LOWEST < NOTES:
                raise IndexError(note)
            roll[step, note - LOWEST] = 1
    return roll


def transposed(roll: Array, semitones: int) -> Array:
    """[N, 88] with every note so much higher; a note that would leave the piano is left out."""
    moved = np.zeros_like(roll)
    if semitones >= 0:
        moved[:, semitones:] = roll[:, : NOTES - semitones]
    else:
        moved[:, :semitones] = roll[:, -semitones:]
    return moved


def _next_notes(name: str, roll: Array) -> Sequence:
    values = torch.tensor(roll, dtype=torch.float32)
    return Sequence(name, values[:-1], values[1:], torch.ones(len(values) - 1))
