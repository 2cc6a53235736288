"""All views of a run, one after another; what a run lacks is said in a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from training.look import confusion, curves, forecasts, gates, lags, memory, samples
from training.look.seen import LacksError, Seen, View, see

VIEWS: dict[str, Callable[[Seen], View]] = {
    "learning-curve": curves.view,
    "gradient-by-lag": lags.view,
    "memory": memory.view,
    "gates": gates.view,
    "forecasts": forecasts.view,
    "confusion": confusion.view,
    "samples": samples.view,
}
"""Picture's name -> what draws it."""


def look(run: Path, cache: Path, text: str = "") -> Iterator[tuple[str, View]]:
    """Draw every picture into the run's plots/; a view that the run has nothing for says why, without figures."""
    seen = see(run, cache, text)
    for name, view in VIEWS.items():
        try:
            found = view(seen)
        except LacksError as error:
            yield name, View(f"no {name}: {error}", {})
        else:
            yield name, View(f"{seen.plot(name)}: {found.text}", found.figures)
