"""New facts after training: the weights stay, the memory takes them in.

`who` is told of a man and a woman that no training story brings together, hears other words, and is asked with "his"
or "her". `shakespeare` reads a play that it was not trained on. Either has its memory carried, or begun afresh some
words or characters before. Last, `shakespeare` meets an invented name and is to spell it again.
"""

from __future__ import annotations

import random

import numpy as np

from training.config import read_recipe, recipe_from
from training.corpora import load_corpus
from training.data import DataError, Sequence
from training.lecture.finding import Finding, Setting
from training.lecture.passage import PASSAGE
from training.lecture.shipped import Shipped
from training.look import pictures
from training.who import probes

TEXT_MODEL = "shakespeare"
DISTANCE = 50
"""Words, at least, between name and question."""
WORDS = (2, 5, 10, 20, 40, 60, 80)
CHARACTERS = (4, 8, 16, 32, 64, 128, 256, 512)
"""Characters from one fresh memory to the next."""
READ = 20_480
"""Characters of the play."""
LINES = (
    "I know not what to say.",
    "The night is cold, and we are far from home.",
    "Give me thy hand, and let us go within.",
    "What news from the town?",
    "There is no more to tell.",
    "Then must we wait until the morning comes.",
    "I hear the bell. Who comes this way?",
    "He is a man that keeps his word.",
)


def run(setting: Setting) -> Finding:
    """Right answers of `who`, and bits a character of a new play, by what was kept of the context."""
    right = {words: answered(setting, words) for words in (*WORDS, 0)}
    source, text = held_out(setting)
    lengths = tuple(count for count in CHARACTERS if count * 4 <= len(text))
    *reset, carried = (bits(setting, text, count) for count in (*lengths, len(text)))
    new, returned = spelt(setting)
    figure, (people, play) = pictures.panels(2, width=4.6, columns=2)
    asked = f"words kept before the question\n(a name is {DISTANCE} and more back)"
    drawn: dict[str, pictures.Line] = {"memory begun afresh": (WORDS, [right[words] for words in WORDS])}
    pictures.lines(people, drawn, asked, "", marker="o")
    people.axhline(right[0], color="tab:green", linestyle="--", label="memory carried")
    people.set(title="who", ylabel="answers right", ylim=(-0.03, 1.05))
    drawn = {"memory begun afresh": (lengths, reset)}
    pictures.lines(play, drawn, "characters from one fresh memory to the next", "", x_scale="log", marker="o")
    play.axhline(carried, color="tab:green", linestyle="--", label="memory carried")
    play.set(title=f"{TEXT_MODEL}, {source}", ylabel="bits a character")
    play.set_xticks(lengths, [str(count) for count in lengths])
    play.minorticks_off()
    for axes in (people, play):
        axes.legend(fontsize="small", loc="center left" if axes is people else "upper right")
    setting.draw(figure, "facts")
    return Finding(
        "A trained network takes in new facts: its memory holds them, its weights do not change",
        right[0] > 0.9 and right[WORDS[2]] < 0.3 and carried < min(reset[:4]),
        {
            "who: right, memory carried": right[0],
            **{f"who: right, {words} words kept": right[words] for words in WORDS},
            f"{TEXT_MODEL}: bits a character, memory carried": carried,
            **{
                f"{TEXT_MODEL}: bits a character, afresh every {count}": value
                for count, value in zip(lengths, reset, strict=True)
            },
            f"{TEXT_MODEL}: bits a character of an invented name, new": new,
            f"{TEXT_MODEL}: bits a character of an invented name, on its return": returned,
        },
        [f"the text: {source}, {len(text):,} characters"],
    )


def held_out(setting: Setting) -> tuple[str, str]:
    """A play that the text model was not trained on: (what it is, text)."""
    if not setting.quick:
        try:
            corpus = load_corpus(recipe_from(read_recipe(TEXT_MODEL)), setting.cache)
        except DataError:
            return "a speech of Hamlet's (the archive of the plays could not be fetched)", PASSAGE
        play = corpus.test[0]
        return play.name, "".join(corpus.symbols[i] for i in play.targets[:READ].tolist())
    return "a speech of Hamlet's", PASSAGE


def bits(setting: Setting, text: str, count: int) -> float:
    """Bits a character with a fresh memory every `count` characters."""
    model = Shipped(setting.models, TEXT_MODEL)
    whole = len(text) // count * count
    rows = model.logprobs([text[start : start + count] for start in range(0, whole, count)])
    return nats(rows) / float(np.log(2))


def answered(setting: Setting, words: int) -> float:
    """Share of the probes answered right with the last `words` before the question kept, 0: all."""
    model = Shipped(setting.models, "who")
    asked: list[Sequence] = probes(DISTANCE, 40 if setting.quick else 200, setting.seed)
    rows = [probe.inputs.tolist()[-1 - words if words else 0 :] for probe in asked]
    logits = model.logits(rows)
    said = [int(logits[len(row) - 1, i].argmax()) for i, row in enumerate(rows)]
    return float(np.mean([label == int(probe.targets[-1]) for label, probe in zip(said, asked, strict=True)]))


def spelt(setting: Setting) -> tuple[float, float]:
    """Bits a character of an invented name when it is new, and on its return with the memory carried."""
    model = Shipped(setting.models, TEXT_MODEL)
    rng = random.Random(setting.seed)
    scenes = [scene(rng) for _ in range(8 if setting.quick else 60)]
    whole = model.logprobs([text for text, _ in scenes])
    new = [row[text.index(name) :][: len(name)] for row, (text, name) in zip(whole, scenes, strict=True)]
    returned = [row[-len(name) :] for row, (_, name) in zip(whole, scenes, strict=True)]
    return nats(new) / float(np.log(2)), nats(returned) / float(np.log(2))


def nats(rows: list[np.ndarray]) -> float:
    """Mean surprise of all characters."""
    return -float(np.concatenate(rows).mean())


def scene(rng: random.Random) -> tuple[str, str]:
    """A messenger and somebody with an invented name take turns: (text up to its last return, name with full stop)."""
    name = "".join(rng.choice("BDFGKLMNPRSTVZ") + rng.choice("AEIOU") for _ in range(3)) + rng.choice("LNRS") + "."
    turns = [f"{who}\n{rng.choice(LINES)} {rng.choice(LINES)}\n\n" for _ in range(4) for who in ("MESSENGER.", name)]
    return "".join(turns[:-1]) + name, name
