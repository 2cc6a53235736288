import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import who


@pytest.mark.parametrize(
    ("text", "people"),
    [
        ("Nikolas put his keys on the table", ["Nikolas"] * 7),
        ("Anna Sofia said her shoes are too ugly", ["Anna Sofia"] * 8),
        ("the bell rang . he went home", ["unknown"] * 7),
        ("Omar met Ruth . where are his keys", ["Omar", "Omar", "Ruth", "Ruth", "unknown", "unknown", "Omar", "Omar"]),
        ("Omar met Peter . he", ["Omar", "Omar", "Peter", "Peter", "Peter"]),
        ("Ruth gave Omar her book", ["Ruth", "Ruth", "Omar", "Ruth", "Ruth"]),
        ("his keys .", ["unknown"] * 3),
    ],
)
def test_who_is_meant(text: str, people: list[str]) -> None:
    assert who.meant(who.split(text)) == people


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_a_pronoun_is_the_person_named_last(seed: int) -> None:
    words = who.Writer(random.Random(seed), held_out=bool(seed % 2)).story(150)
    labels = who.meant(words)
    owner = {name.lower().split()[0]: name for name in (*who.MEN, *who.WOMEN)}
    for i, (word, label) in enumerate(zip(words, labels, strict=True)):
        for pronouns, people in ((who.OF_HIM, who.MEN), (who.OF_HER, who.WOMEN)):
            if word in pronouns:
                named = [owner[w] for w in words[:i] if w in owner and owner[w] in people]
                assert label == (named[-1] if named else who.UNKNOWN)


def test_words_and_pairs_of_the_test_are_never_trained_on() -> None:
    held_out = {*who.VERBS_HELD_OUT.split(), *who.MEETS_HELD_OUT.split(), *who.SAYS_HELD_OUT.split()}
    held_out |= set(who.OBJECTS_HELD_OUT.split())
    train, test = (who.Writer(random.Random(1), held_out=flag) for flag in (False, True))
    seen, tested = (set(" ".join(" ".join(w.story(200)) for _ in range(50)).split()) for w in (train, test))
    assert not seen & held_out
    assert held_out <= tested
    for writer, inside in ((train, False), (test, True)):
        for _ in range(200):
            men, women = writer.cast()
            assert all(((man, woman) in who.PAIRS_HELD_OUT) == inside for man in men for woman in women)


def test_every_word_is_in_the_vocabulary() -> None:
    vocabulary = set(who.all_words())
    for held_out in (False, True):
        writer = who.Writer(random.Random(2), held_out=held_out)
        for _ in range(100):
            assert set(writer.story(100)) <= vocabulary
    assert not [word for word in vocabulary if word != word.lower()]


def test_a_probe_scores_only_its_pronoun_after_so_many_words() -> None:
    for sequence in who.probes(50, 20, seed=3):
        words = [who.all_words()[i] for i in sequence.inputs.tolist()]
        last = max(i for i, label in enumerate(sequence.targets.tolist()[:-1]) if label)
        assert words[-1] in ("his", "her")
        assert len(words) - 1 - last > 50
        assert sequence.weights.tolist() == [0.0] * (len(words) - 1) + [1.0]
        assert sequence.targets[-1] > 0


def test_the_corpus_is_a_function_of_its_seed() -> None:
    first, again = (who.corpus(stories=3, words=40) for _ in range(2))
    assert all((a.inputs == b.inputs).all() for a, b in zip(first.train, again.train, strict=True))
    assert first.sha256 == again.sha256 != who.corpus(stories=4, words=40).sha256
