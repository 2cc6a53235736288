"""One sequence in, another out: pairs as text, `given<tab>wanted<newline>`, which a language model continues.

Only what follows the tab is scored. Whole pairs are dealt to the three parts, and what is given never repeats, so a
right answer in the test part is none that was seen.
"""

from __future__ import annotations

import hashlib
import random
import string
from pathlib import Path

import torch

from service.bundle import Splitter
from training.config import DataRecipe
from training.data import Corpus, DataError, Sequence, file_sha256, to_ids

SEPARATOR, END = "\t", "\n"
SEED = 7
LONGEST = 12
"""letters to reverse"""
LAST_NUMBER = 999

Pair = tuple[str, str]


def reversals(count: int, data: DataRecipe) -> Corpus:
    """Words of random letters, and the same backwards."""
    rng = random.Random(SEED)
    words = {"".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, LONGEST))): None for _ in range(count)}
    return pairs_corpus([(word, word[::-1]) for word in words], data, source=f"{len(words):,} made words, backwards")


def numbers(data: DataRecipe) -> Corpus:
    """Numbers in English words, and in German ones: units come before tens, so the order changes."""
    pairs = [(english(n), german(n)) for n in range(LAST_NUMBER + 1)]
    random.Random(SEED).shuffle(pairs)
    return pairs_corpus(pairs, data, source=f"the numbers 0 to {LAST_NUMBER} in English and German words")


def pairs_file(path: Path, data: DataRecipe) -> Corpus:
    """A UTF-8 file with a pair a line, a tab between what is given and what is wanted."""
    if not path.stat().st_size:
        raise DataError(f"{path} is empty: give a pair a line, a tab between its two texts")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from error
    pairs: dict[str, str] = {}
    for i, line in enumerate(lines):
        given, tab, wanted = line.partition(SEPARATOR)
        if not (given and tab and wanted) or SEPARATOR in wanted:
            raise DataError(f"{path}: line {i + 1} is no pair: two texts with one tab between them are needed")
        pairs.setdefault(given, wanted)
    shuffled = list(pairs.items())
    random.Random(SEED).shuffle(shuffled)
    return pairs_corpus(shuffled, data, source=path.name, sha256=file_sha256(path))


def pairs_corpus(pairs: list[Pair], data: DataRecipe, *, source: str, sha256: str = "") -> Corpus:
    """The vocabulary is that of all pairs, since a corpus this small would lack letters otherwise."""
    symbols = sorted({character for pair in pairs for text in pair for character in text} | {SEPARATOR, END})
    known = {symbol: i for i, symbol in enumerate(symbols)}
    first, second = int(len(pairs) * (1 - data.validation - data.test)), int(len(pairs) * (1 - data.test))
    if first < 1 or second <= first or len(pairs) <= second:
        raise DataError(f"{source}: {len(pairs)} pairs are too few to split: give more, or raise data.validation")
    sequences = [_sequence(pair, known) for pair in pairs]
    whole = "".join(f"{given}{SEPARATOR}{wanted}{END}" for given, wanted in pairs)
    return Corpus(
        train=sequences[:first],
        validation=sequences[first:second],
        test=sequences[second:],
        input_kind="text",
        source=source,
        sha256=sha256 or hashlib.sha256(whole.encode()).hexdigest(),
        symbols=symbols,
        splitter=Splitter(kind="characters").model_dump(),
        whole=True,
        separator=SEPARATOR,
    )


def _sequence(pair: Pair, known: dict[str, int]) -> Sequence:
    given, wanted = pair
    ids = to_ids(list(f"{given}{SEPARATOR}{wanted}{END}"), known)
    weights = torch.ones(len(ids) - 1)
    weights[: len(given)] = 0
    return Sequence(given, ids[:-1], ids[1:], weights)


ENGLISH = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
ENGLISH_SMALL = [*ENGLISH.split(), "seventeen", "eighteen", "nineteen"]
ENGLISH_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
GERMAN = "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn"
GERMAN_SMALL = [*GERMAN.split(), "siebzehn", "achtzehn", "neunzehn"]
GERMAN_TENS = ["", "", "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig"]


def english(n: int) -> str:
    """A number below 10,000 as in `two hundred and five`."""
    if n < 20:
        return ENGLISH_SMALL[n]
    if n < 100:
        return ENGLISH_TENS[n // 10] + (f"-{ENGLISH_SMALL[n % 10]}" if n % 10 else "")
    size, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    more, rest = divmod(n, size)
    if not rest:
        return f"{english(more)} {name}"
    return f"{english(more)} {name} {'and ' if rest < 100 else ''}{english(rest)}"


def german(n: int) -> str:
    """The same as in `zweihundertfünf`."""
    if n < 20:
        return GERMAN_SMALL[n]
    if n < 100:
        unit = "ein" if n % 10 == 1 else GERMAN_SMALL[n % 10]
        return (f"{unit}und" if n % 10 else "") + GERMAN_TENS[n // 10]
    size, name = (100, "hundert") if n < 1000 else (1000, "tausend")
    more, rest = divmod(n, size)
    return ("ein" if more == 1 else german(more)) + name + (german(rest) if rest else "")
