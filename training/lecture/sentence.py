"""Order matters: " drove away" after "I got in the car and", and after the same words in another order."""

from __future__ import annotations

import random
from itertools import permutations

from training.lecture.finding import Finding, Setting
from training.lecture.shipped import Shipped
from training.look import pictures

ENDING = " drove away"
PLAIN, MIXED = "I got in the car and", "In car the and I got"
MODEL = "shakespeare"


def run(setting: Setting) -> Finding:
    """Nats of the ending after both, and after other orders of the same words."""
    model = Shipped(setting.models, MODEL)
    words = PLAIN.split()
    orders = [" ".join(order) for order in permutations(words) if list(order) != words]
    others = random.Random(setting.seed).sample(orders, 40 if setting.quick else len(orders))
    plain, mixed, *rest = endings(model, [PLAIN, MIXED, *others])
    beaten = sum(plain > other for other in rest) / len(rest)
    figure, (axes,) = pictures.panels(1, height=2.6)
    axes.hist(rest, bins=40, color="lightgray", label=f"{len(rest)} other orders of the words")
    axes.axvline(plain, color="tab:blue", label=PLAIN)
    axes.axvline(mixed, color="tab:red", linestyle="--", label=MIXED)
    axes.set(xlabel=f'log-probability of "{ENDING}", nats', ylabel="orders")
    axes.legend(fontsize="small")
    setting.draw(figure, "sentence")
    return Finding(
        "The same words in another order are another context",
        plain > mixed,
        {
            f"after {PLAIN!r}, nats": plain,
            f"after {MIXED!r}, nats": mixed,
            "share of the other orders after which it is less likely": beaten,
        },
        [f"the shipped model {MODEL!r}, version {model.version}: it knows plays of about 1600, and no cars"],
    )


def endings(model: Shipped, contexts: list[str]) -> list[float]:
    """Log-probability of the ending after each context, in nats."""
    nats = model.logprobs([context + ENDING for context in contexts])
    return [float(row[-len(ENDING) :].sum()) for row in nats]
