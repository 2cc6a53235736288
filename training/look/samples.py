"""What a text model writes at several temperatures, side by side."""

from __future__ import annotations

import textwrap
import warnings

from training.config import recipe_from
from training.look import pictures
from training.look.seen import LacksError, Seen, View
from training.sample import sample_text

TEMPERATURES = (0.0, 0.4, 0.7, 1.0, 1.3)
LENGTH, SEED = 300, 1
COLUMNS, LINES = 46, 14


def view(seen: Seen) -> View:
    """A panel a temperature, all after the recipe's prompt and from the same seed."""
    if seen.meta["task"] != "language-model":
        raise LacksError("the run is no language model")
    prompt = recipe_from(seen.meta["recipe"]).sample.prompt
    prompt = prompt if set(prompt) <= set(seen.corpus.symbols) else ""
    texts = {t: sample_text(seen.model, seen.meta, prompt, LENGTH, t, SEED) for t in TEMPERATURES}
    figure, axes = pictures.panels(len(texts), width=5, height=2.5, columns=2)
    for ax, (temperature, text) in zip(axes, texts.items(), strict=True):
        ax.set_axis_off()
        ax.set_title(f"temperature {temperature:g}" + ("" if temperature else ", the likeliest symbol"), loc="left")
        ax.text(0, 1, wrapped(text), va="top", family="monospace", fontsize=9, parse_math=False, transform=ax.transAxes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a symbol that the font lacks is drawn as a box
        pictures.save(figure, seen.plot("samples"))
    kinds = {f"{t:g}": len(set(text.split())) / max(1, len(text.split())) for t, text in texts.items()}
    said = ", ".join(f"{t} {share:.0%}" for t, share in kinds.items())
    return View(f"after {prompt!r}; different words by temperature: {said}", {"texts": list(texts.values())})


def wrapped(text: str) -> str:
    """At most LINES lines of at most COLUMNS characters, the text's own breaks kept."""
    lines = [piece for line in text.split("\n") for piece in textwrap.wrap(line, COLUMNS) or [""]]
    return "\n".join(lines[:LINES] + (["..."] if len(lines) > LINES else []))
