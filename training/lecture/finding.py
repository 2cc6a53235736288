"""How an experiment is asked for, and what it comes to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from training.look import pictures


@dataclass(frozen=True)
class Setting:
    """The same for every experiment of a run."""

    quick: bool = False
    """Small sizes, seconds each: the claims hold, the figures are not those of docs/lecture.md."""
    long: bool = False
    """The adding problem up to T = 600, hours."""
    seed: int = 1
    models: Path = Path("models")
    """The shipped bundles."""
    cache: Path = Path(".cache")
    """Fetched source archives."""
    plots: Path | None = None
    """Where pictures go; None: none are drawn."""

    def draw(self, figure: Figure, name: str) -> None:
        """Save a picture as lecture-<name>.svg."""
        if self.plots is not None:
            pictures.save(figure, self.plots / f"lecture-{name}.svg")


@dataclass(frozen=True)
class Finding:
    """A claim, whether it held here, and the numbers that say so."""

    claim: str
    holds: bool
    figures: dict[str, float]
    notes: list[str] = field(default_factory=list)
