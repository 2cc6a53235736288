"""Made sentences about people: at every word, who is meant?

The rule (`meant`): each word of a name means its bearer; he, him and his mean the man named last, she and her the
woman named last, "unknown" before any; every other word means the person whom its sentence is about so far, that
is the one meant last in it, and "unknown" before that. Two registers, the last man and the last woman, must
therefore survive any number of words about somebody or something else.

Test stories use pairs of names, verbs and objects that no training story holds. Such words stand in the
vocabulary; their embeddings begin small (`model.embedding_scale`) and weight decay alone moves them.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from itertools import product

import torch

from service.bundle import Splitter
from training.data import Corpus, Sequence, to_ids

MEN = ("Nikolas", "Peter", "Omar", "Luca", "Henry", "Jan Erik", "David", "Hiro")
WOMEN = ("Anna Sofia", "Maria", "Ingrid", "Leila", "Clara", "Ruth", "Yuki", "Helen")
UNKNOWN = "unknown"
LABELS = (UNKNOWN, *MEN, *WOMEN)
OF_HIM, OF_HER = ("he", "him", "his"), ("she", "her")
DISTANCES = (5, 10, 20, 50, 100)

VERBS = "put left found lost forgot dropped hid saw took kept carried cleaned moved bought wanted needed liked held"
VERBS_HELD_OUT = "placed packed repaired painted borrowed polished"
MEETS = "met called thanked helped visited followed asked paid"
MEETS_HELD_OUT = "greeted watched"
SAYS = "said thought felt knew noticed wrote"
SAYS_HELD_OUT = "believed claimed"
OBJECTS = "keys shoes coat book phone bag letter hat glasses watch bicycle lamp camera gloves map cup umbrella guitar"
OBJECTS_HELD_OUT = "ticket scarf wallet boots notebook violin"
LOOKS = "ugly old small big heavy new cheap dirty nice expensive"
PLURAL = frozenset(["keys", "shoes", "glasses", "gloves", "boots"])
PLACES = "table chair floor bed shelf kitchen garden station car office street window"
THINGS = "weather train music shop river bridge street garden house dog cat coffee bread rain city"
STATES = "cold warm late quiet open closed empty full long good bad slow wet loud"
TIMES = "today again tonight now outside there everywhere"
SMALL = (
    "the a on in under near at are is was were too very and that it to with from by who where whose not all day night"
)
SMALL += " rained snowed gave told went home back up some people children were playing waiting somebody rang bell ."

PAIRS_HELD_OUT = frozenset(
    pair for i, pair in enumerate(product(MEN, WOMEN)) if i % 5 == 2 and pair != ("Nikolas", "Anna Sofia")
)

Story = list[str]


def corpus(stories: int = 4000, words: int = 220, seed: int = 7) -> Corpus:
    """Made afresh from the seed; test stories are held out as the module says."""
    vocabulary = {word: i for i, word in enumerate(all_words())}

    def made(name: str, count: int, held_out: bool) -> list[Sequence]:
        writer = Writer(random.Random(f"{seed}-{name}"), held_out)
        return [_sequence(f"{name}-{i}", writer.story(words), vocabulary) for i in range(count)]

    return Corpus(
        train=made("train", stories, held_out=False),
        validation=made("validation", 100, held_out=False),
        test=made("test", 200, held_out=True),
        input_kind="text",
        source=f"made sentences, {stories} stories of about {words} words, seed {seed}",
        sha256=hashlib.sha256(json.dumps([stories, words, seed, *all_words()]).encode()).hexdigest(),
        symbols=list(vocabulary),
        splitter={"kind": "words", "lowercase": True},
        labels=list(LABELS),
        probes={str(distance): probes(distance, 200, seed) for distance in DISTANCES},
    )


def split(text: str) -> Story:
    """Lower-cased words, with the full stop a word of its own: as the service splits."""
    return Splitter(kind="words", lowercase=True).split(text)


def all_words() -> list[str]:
    """The whole vocabulary, held-out words included, sorted."""
    lists = (VERBS, VERBS_HELD_OUT, MEETS, MEETS_HELD_OUT, SAYS, SAYS_HELD_OUT, OBJECTS, OBJECTS_HELD_OUT)
    names = " ".join((*MEN, *WOMEN)).lower()
    texts = (*lists, LOOKS, PLACES, THINGS, STATES, TIMES, SMALL, names, *OF_HIM, *OF_HER)
    return sorted({word for text in texts for word in text.split()})


def meant(words: Story) -> list[str]:
    """The label of each word, by the rule above."""
    owner = {part.lower(): name for name in (*MEN, *WOMEN) for part in name.split()}
    man = woman = about = UNKNOWN
    labels = []
    for word in words:
        if word in owner:
            about = owner[word]
            man, woman = (about, woman) if about in MEN else (man, about)
        elif word in OF_HIM:
            about = man
        elif word in OF_HER:
            about = woman
        labels.append(about)
        if word == ".":
            about = UNKNOWN
    return labels


def _sequence(name: str, words: Story, vocabulary: dict[str, int], scored: slice = slice(None)) -> Sequence:
    classes = {label: i for i, label in enumerate(LABELS)}
    weights = torch.zeros(len(words))
    weights[scored] = 1
    return Sequence(name, to_ids(words, vocabulary), to_ids(meant(words), classes), weights)


def probes(distance: int, count: int, seed: int) -> list[Sequence]:
    """Stories that name a man and a woman, go on for at least `distance` other words, then say his or her.

    Only the pronoun is scored.
    """
    vocabulary = {word: i for i, word in enumerate(all_words())}
    writer = Writer(random.Random(f"{seed}-{distance}"), held_out=True)
    return [_sequence(f"{distance}-{i}", writer.probe(distance), vocabulary, slice(-1, None)) for i in range(count)]


class Writer:
    """Writes stories; `held_out` chooses the verbs, objects and pairs of names that training never sees."""

    def __init__(self, rng: random.Random, held_out: bool) -> None:
        self.rng, self.held_out = rng, held_out
        self.verbs = (VERBS_HELD_OUT if held_out else VERBS).split()
        self.meets = (MEETS_HELD_OUT if held_out else MEETS).split()
        self.says = (SAYS_HELD_OUT if held_out else SAYS).split()
        self.objects = (OBJECTS_HELD_OUT if held_out else OBJECTS).split()

    def story(self, words: int) -> Story:
        """Sentences about a cast and about nobody, until there are so many words."""
        men, women = self.cast()
        nobody = self.rng.choice((0.1, 0.3, 0.6))
        story: Story = []
        while len(story) < words:
            story += self.sentence(men, women, nobody)
            if self.rng.random() < 0.06:
                story += self.silence(self.rng.randint(5, 120))
                story += self._person(men, women, named=0.0)
        return story

    def probe(self, distance: int) -> Story:
        """See `probes`."""
        man, woman = self.rng.choice(sorted(PAIRS_HELD_OUT))
        named = [FORMS[0](self, name.lower(), whose, "").split() for name, whose in ((man, "his"), (woman, "her"))]
        self.rng.shuffle(named)
        return [*named[0], ".", *named[1], ".", *self.silence(distance), self.rng.choice(("his", "her"))]

    def cast(self) -> tuple[list[str], list[str]]:
        """Men and women of a story: only held-out pairs, or none of them."""
        while True:
            men = self.rng.sample(MEN, self.rng.choice((0, 1, 1, 2, 3, 4)))
            women = self.rng.sample(WOMEN, self.rng.choice((0, 1, 1, 2, 3, 4)))
            pairs = set(product(men, women))
            if (men or women) and (pairs <= PAIRS_HELD_OUT if self.held_out else not pairs & PAIRS_HELD_OUT):
                return men, women

    def silence(self, words: int) -> Story:
        """At least so many words about nobody."""
        story: Story = []
        while len(story) < words:
            story += self._stop(self._nobody())
        return story

    def sentence(self, men: list[str], women: list[str], nobody: float) -> Story:
        """One sentence with its full stop, which is sometimes forgotten."""
        if self.rng.random() < nobody:
            return self._stop(self._nobody())
        return self._person(men, women)

    def _person(self, men: list[str], women: list[str], named: float = 0.65) -> Story:
        he = self.rng.random() < len(men) / max(1, len(men) + len(women))
        names = men if he else women
        subject = self.rng.choice(names).lower() if self.rng.random() < named else ("he" if he else "she")
        others = [name.lower() for name in (*men, *women) if name.lower() != subject]
        form = self.rng.choice(FORMS if others else FORMS[:ALONE])
        return self._stop(form(self, subject, "his" if he else "her", self.rng.choice(others or [""])).split())

    def _stop(self, words: Story) -> Story:
        return words if self.rng.random() < 0.1 else [*words, "."]

    def _nobody(self) -> Story:
        pick = self.pick
        return self.rng.choice(
            (
                f"the {pick(THINGS)} is {pick(STATES)} {pick(TIMES)}",
                f"the {pick(THINGS)} was very {pick(STATES)}",
                f"the {pick(THINGS)} near the {pick(PLACES)} was {pick(STATES)} all day",
                f"it {self.rng.choice(('rained', 'snowed'))} all {self.rng.choice(('day', 'night'))}",
                f"some people were waiting at the {pick(PLACES)}",
                f"the children were playing in the {pick(PLACES)} with a {pick(THINGS)}",
                f"a {self.rng.choice(self.objects)} was on the {pick(PLACES)}",
                f"somebody rang the bell {pick(TIMES)}",
            )
        ).split()

    def pick(self, words: str) -> str:
        """One of the words."""
        return self.rng.choice(words.split())

    def thing(self, be: str = "") -> str:
        """An object of this writer's, with the verb `be` in its number where asked."""
        thing = self.rng.choice(self.objects)
        return thing if not be else f"{thing} {be.split('/')[thing in PLURAL]}"

    def where(self) -> str:
        """A place with its preposition, or nothing."""
        prepositions = ("on the", "in the", "under the", "near the")
        return f"{self.rng.choice(prepositions)} {self.pick(PLACES)}" if self.rng.random() < 0.7 else ""


Form = Callable[[Writer, str, str, str], str]
FORMS: list[Form] = [
    lambda w, who, whose, other: f"{who} {w.rng.choice(w.verbs)} {whose} {w.thing()} {w.where()}",
    lambda w, who, whose, other: f"{who} {w.rng.choice(w.verbs)} the {w.thing()} {w.where()}",
    lambda w, who, whose, other: f"{who} {w.rng.choice(w.says)} {whose} {w.thing('is/are')} too {w.pick(LOOKS)}",
    lambda w, who, whose, other: f"{who} {w.rng.choice(w.says)} that the {w.thing('was/were')} {w.pick(LOOKS)}",
    lambda w, who, whose, other: f"{whose} {w.thing('was/were')} {w.where()} {w.pick(TIMES)}",
    lambda w, who, whose, other: f"where {w.rng.choice(('is', 'are'))} {whose} {w.thing()}",
    lambda w, who, whose, other: f"{who} went {w.rng.choice(('home', 'back', 'to the ' + w.pick(PLACES)))}",
    lambda w, who, whose, other: f"{who} {w.rng.choice(w.meets)} {w.rng.choice(('him', 'her'))} {w.where()}",
    lambda w, who, whose, other: f"{who} {w.rng.choice(w.meets)} {other} {w.where()}",
    lambda w, who, whose, other: f"{who} gave {other} {whose} {w.thing()}",
    lambda w, who, whose, other: (
        f"{who} told {other} that {w.rng.choice(('his', 'her'))} {w.thing('is/are')} {w.pick(LOOKS)}"
    ),
    lambda w, who, whose, other: f"the {w.thing()} {w.where()} is not from {other}",
]
ALONE = 8
"""So many forms, the first ones, do without another person."""
