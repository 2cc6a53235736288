"""Byte-pair encoding: text as UTF-8 bytes, of which pairs that were learnt to be frequent are one symbol.

A symbol is written in an alphabet of 256 printable characters, one a byte, so that it can stand in JSON whatever its
bytes are. Training encodes with this module too, so that a model is fed the very symbols that it learnt from.
Sources: Sennrich, Haddow and Birch, Neural Machine Translation of Rare Words with Subword Units (2016); the alphabet
is GPT-2's (Radford and others, Language Models are Unsupervised Multitask Learners, 2019).
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import pairwise

WORD = re.compile(r" ?\w{1,32}| ?[^\w\s]{1,32}|\s{1,32}(?!\S)|\s")
"""no pair reaches over the edge of such a piece, and a piece is short whatever the text is"""
WORDS_KEPT = 16_384


def _alphabet() -> list[str]:
    """Printable Latin-1 for itself, and what stands behind it for the other bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


ALPHABET = _alphabet()
_BYTES = {character: byte for byte, character in enumerate(ALPHABET)}


def vocabulary(merges: Sequence[str]) -> list[str]:
    """The 256 bytes in their order, then what each merge makes, each symbol once."""
    return list(dict.fromkeys([*ALPHABET, *("".join(merge.split(" ")) for merge in merges)]))


def is_merge(merge: str) -> bool:
    """Whether it is two symbols with a space between them."""
    parts = merge.split(" ")
    return len(parts) == 2 and all(part and all(character in _BYTES for character in part) for part in parts)


def spelt(text: str) -> str:
    """The text's UTF-8 bytes in the alphabet."""
    return "".join([ALPHABET[byte] for byte in text.encode("utf-8", "surrogatepass")])


@cache
def to_bytes(symbol: str) -> bytes:
    """The bytes that a symbol stands for."""
    return bytes(_BYTES[character] for character in symbol)


class BytePairs:
    """Cuts text into symbols: in each word the pair that was learnt first becomes one symbol, until none is left."""

    def __init__(self, merges: Sequence[str]) -> None:
        self._ranks = {(a, b): i for i, (a, b) in enumerate(merge.split(" ") for merge in merges)}
        self._word = lru_cache(WORDS_KEPT)(self._cut)

    def split(self, text: str) -> list[str]:
        """The symbols of a text, in order."""
        if not self._ranks:
            return list(spelt(text))
        return [symbol for word in words(text) for symbol in self._word(word)]

    def _cut(self, word: str) -> list[str]:
        symbols = list(spelt(word))
        while len(symbols) > 1:
            first = min(pairwise(symbols), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if first not in self._ranks:
                break
            symbols = _joined(symbols, first)
        return symbols


def words(text: str) -> Iterator[str]:
    """The pieces of a text that no symbol reaches beyond."""
    return (found[0] for found in WORD.finditer(text))


def _joined(symbols: Sequence[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    at = 0
    while at < len(symbols):
        both = at + 1 < len(symbols) and (symbols[at], symbols[at + 1]) == pair
        joined.append(symbols[at] + symbols[at + 1] if both else symbols[at])
        at += 2 if both else 1
    return joined
