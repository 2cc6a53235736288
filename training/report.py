"""What a run says while it trains: a bar on a terminal, plain lines elsewhere, JSON lines, or nothing.

Beside that each evaluation can go to a file as a line of JSON, and to TensorBoard.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from training.config import RecipeError

PLAIN_EVERY_S = 10.0
BOARD = "tensorboard"
CURVES = ("train", "validation", "learning_rate", "clipped")


@dataclass(frozen=True)
class Line:
    """One step of training as it is shown."""

    step: int
    fraction: float
    """Of the run, 0 to 1."""
    figure: float
    """The training figure, smoothed, in the task's unit."""
    rate: float
    """Time steps learnt a second, over all rows."""
    eta_s: float | None
    """None before the first step is done."""

    def text(self) -> str:
        """For people."""
        eta = _clock(self.eta_s) if self.eta_s is not None else "?"
        return f"step {self.step:>6}  {self.figure:8.4f}  {self.rate:8,.0f} steps/s  ETA {eta}"


class Board(Protocol):
    """TensorBoard's writer, as far as it is used."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """One point of a curve."""
        ...

    def flush(self) -> None:
        """Write what is not written yet."""
        ...


def board(run: Path) -> Board:
    """Curves in the run's folder; RecipeError where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RecipeError("train.tensorboard needs a package: pip install tensorboard, or leave it out") from error
    writer: Board = SummaryWriter(str(run / BOARD))
    return writer


class Report:
    """Chooses one of four voices once and speaks in it; `log` and `board` get the evaluations in any case."""

    def __init__(
        self,
        unit: str,
        *,
        quiet: bool = False,
        log_json: bool = False,
        log: Path | None = None,
        board: Board | None = None,
    ) -> None:
        self.unit, self.quiet, self.log_json, self.log, self.board = unit, quiet, log_json, log, board
        self.console = Console(soft_wrap=True, highlight=False)
        self._spoken = 0.0
        self._bar: Progress | None = None
        if self.console.is_terminal and not quiet and not log_json:
            self._bar = Progress(
                TextColumn("{task.percentage:5.1f} %"),
                BarColumn(),
                TextColumn("{task.description}"),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()

    def step(self, line: Line) -> None:
        """Called every step; speaks at most every ten seconds where there is no bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=line.fraction, description=line.text())
        elif time.monotonic() - self._spoken > PLAIN_EVERY_S:
            self._spoken = time.monotonic()
            self.event("step", line.text(), vars(line))

    def event(self, kind: str, text: str, data: dict[str, Any]) -> None:
        """Something worth a line of its own."""
        line = json.dumps({"event": kind, **data}, ensure_ascii=False)
        if self.log is not None and kind == "evaluation":
            with self.log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        if self.board is not None and kind == "evaluation":
            for name in CURVES:
                self.board.add_scalar(name, data[name], data["step"])
            self.board.flush()
        if self.quiet:
            return
        if self.log_json:
            print(line, flush=True)
        else:
            self.console.print(text, markup=False)
            sys.stdout.flush()

    def close(self) -> None:
        """Takes the bar down."""
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
