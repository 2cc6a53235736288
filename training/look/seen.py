"""What every view looks at, and what a view comes to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.checkpoint import load_model
from training.data import Corpus
from training.evaluate import run_corpus
from training.model import RecurrentModel
from training.run import HISTORY
from training.tasks import TASKS, Task


class LacksError(Exception):
    """A run that has nothing for this view; the message says what is missing."""


@dataclass(frozen=True)
class Seen:
    """A run with everything that its folder and its data say."""

    run: Path
    model: RecurrentModel
    meta: dict[str, Any]
    corpus: Corpus
    task: Task
    history: list[dict[str, Any]]
    text: str = ""
    """What the gates are shown over, instead of the validation part."""

    def plot(self, name: str) -> Path:
        """Where a view draws."""
        return self.run / "plots" / f"{name}.png"


@dataclass(frozen=True)
class View:
    """What a view found: a line for people, figures for machines."""

    text: str
    figures: dict[str, Any]


def see(run: Path, cache: Path, text: str = "") -> Seen:
    """The run's best model, its data and its history; raises CheckpointError, DataError or RecipeError."""
    model, meta = load_model(run)
    path = run / HISTORY
    history = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return Seen(run, model, meta, run_corpus(run, meta, cache), TASKS[meta["task"]], history, text)
