import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service import bytepairs
from service.bundle import Splitter
from training.data_text import Coding, learn_merges

BOOK = "Größe zählt: der schöne Fuß, die schönen Füße 😀 und   die Straßen.\n\n" * 20
MERGES = learn_merges(BOOK, 320)
SPLITTER = Splitter(kind="bytes", merges=MERGES)


def joined(symbols: list[str]) -> str:
    return b"".join(map(bytepairs.to_bytes, symbols)).decode("utf-8", "surrogatepass")


@given(st.text())
def test_symbols_are_the_text(text: str) -> None:
    for splitter in (SPLITTER, Splitter(kind="bytes")):
        symbols = splitter.split(text)
        assert joined(symbols) == text
        assert set(symbols) <= set(bytepairs.vocabulary(splitter.merges))


@given(st.text(alphabet="der schönFuß 😀\n.") | st.text())
def test_cuts_as_the_library_that_learnt_the_merges(text: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {symbol: i for i, symbol in enumerate(bytepairs.vocabulary(MERGES))}
    pairs = [(a, b) for a, b in (merge.split(" ") for merge in MERGES)]
    tokenizer = Tokenizer(models.BPE(known, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = text.encode("utf-8", "replace").decode()  # the library takes no lone surrogates
    theirs = [symbol for word in bytepairs.words(text) for symbol in tokenizer.encode(word).tokens]
    assert SPLITTER.split(text) == theirs


@given(st.text())
def test_words_leave_nothing_out_and_are_short(text: str) -> None:
    words = list(bytepairs.words(text))
    assert "".join(words) == text
    assert all(len(word) <= 33 for word in words)


def test_pairs_shorten_what_they_learnt_from() -> None:
    assert 256 < len(bytepairs.vocabulary(MERGES)) <= 320
    assert len(SPLITTER.split(BOOK)) < 0.7 * len(BOOK.encode())
    assert bytepairs.vocabulary(())[10] == bytepairs.spelt("\n") == "Ċ"


def test_half_a_character_is_shown_as_such() -> None:
    assert SPLITTER.text(bytepairs.ALPHABET[0xC3]) == "\ufffd"
    assert SPLITTER.text(bytepairs.spelt("ö")) == "ö"


@pytest.mark.parametrize("merge", ["a", "a b c", " a", "a ", "a \n"])
def test_merges_that_are_none_are_refused(merge: str) -> None:
    with pytest.raises(ValidationError, match="two symbols"):
        Splitter(kind="bytes", merges=(merge,))


def test_a_vocabulary_is_learnt_from_the_text_alone() -> None:
    symbols, splitter = Coding("bpe", 300).learn(BOOK)
    assert symbols == bytepairs.vocabulary(splitter.merges) and len(symbols) <= 300
    again, same = Coding(symbols=tuple(symbols), splitter=splitter).learn("something else")
    assert (again, same) == (symbols, splitter)
