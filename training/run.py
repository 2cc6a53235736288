"""A run under way: how far it is, what it has seen, and its folder of checkpoints, curve and plots."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from training import checkpoint, plots
from training.batches import Batch
from training.checkpoint import CheckpointError, Progress
from training.job import Job
from training.model import State
from training.report import Line

HISTORY = "history.json"


class Run:
    """Counts steps and minutes over all starts of a run, and reads and writes its folder."""

    def __init__(self, job: Job, out: Path, *, resume: bool) -> None:
        self.job, self.out, self.recipe = job, out, job.recipe.train
        self.state = job.model.initial_state(job.batches.rows)
        self.progress = Progress()
        self.history: list[dict[str, Any]] = []
        if resume:
            self._resume()
        elif (out / checkpoint.LAST).exists():
            raise CheckpointError(f"{out} holds a run: add --resume to go on, or give another --out")
        self._before, self._first_symbol = self.progress.minutes, self.progress.symbols
        self._began = self._saved = time.monotonic()
        self._smooth = Smooth()
        self._fraction_before = self.fraction
        self._quarter = int(self.fraction * 4)

    def _resume(self) -> None:
        checkpoint.refuse_mismatch(checkpoint.read_meta(self.out, checkpoint.LAST), self.job.meta)
        state, self.progress = checkpoint.load_last(self.out, self.job.model, self.job.optimiser)
        if state[0].shape != self.state[0].shape:
            raise CheckpointError("cannot resume: train.batch differs from the run's, and its state is per row")
        self.state = tuple(tensor.to(self.recipe.device) for tensor in state)
        path = self.out / HISTORY
        history = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        self.history = [line for line in history if line["step"] <= self.progress.step]

    @property
    def minutes(self) -> float:
        """Of all starts of this run together."""
        return self._before + (time.monotonic() - self._began) / 60

    @property
    def fraction(self) -> float:
        """0 at the start, 1 at the end; by steps or by the clock, whichever is further."""
        by_steps = self.progress.step / self.recipe.max_steps if self.recipe.max_steps else 0.0
        by_clock = self.minutes / self.recipe.max_minutes if self.recipe.max_minutes else 0.0
        return min(1.0, max(by_steps, by_clock))

    @property
    def done(self) -> bool:
        """The recipe's end is reached."""
        return self.fraction >= 1.0

    @property
    def evaluated(self) -> bool:
        """The newest weights have been scored."""
        return bool(self.history) and self.history[-1]["step"] == self.progress.step

    def due_to_evaluate(self) -> bool:
        """Every `evaluate_steps` steps, and each quarter of a run that the clock ends."""
        quarter, self._quarter = self._quarter, int(self.fraction * 4) if self.recipe.max_minutes else 0
        return self.progress.step % self.recipe.evaluate_steps == 0 or self._quarter > quarter

    @property
    def due_to_save(self) -> bool:
        """Every `checkpoint_minutes`."""
        return time.monotonic() - self._saved > self.recipe.checkpoint_minutes * 60

    def note(self, batch: Batch, loss: float, norm: float, state: State) -> None:
        """One more step is done; the state goes on, its history does not."""
        self.state = tuple(tensor.detach() for tensor in state)
        progress = self.progress
        progress.step, progress.chunk = progress.step + 1, progress.chunk + 1
        progress.clipped += norm > self.recipe.clip
        progress.symbols += sum(stop - start for _, start, stop in batch.spans)
        self._smooth.add(loss)

    def next_epoch(self) -> None:
        """The data set has been gone through once more."""
        self.progress.epoch, self.progress.chunk = self.progress.epoch + 1, 0

    def line(self) -> Line:
        """The newest step as it is shown."""
        fraction, seconds = self.fraction, time.monotonic() - self._began
        rate = (self.progress.symbols - self._first_symbol) / max(seconds, 1e-9)
        eta = seconds * (1 - fraction) / max(fraction - self._fraction_before, 1e-9)
        return Line(self.progress.step, fraction, self.job.task.figure(self._smooth.value), rate, eta)

    def record(self, validation: float) -> dict[str, Any]:
        """An evaluation: into the history and the learning curve; keeps the weights where they are the best."""
        progress, task = self.progress, self.job.task
        progress.minutes = self.minutes
        line = {
            "step": progress.step,
            "minutes": round(progress.minutes, 3),
            "train": task.figure(self._smooth.take()),
            "validation": validation,
            "learning_rate": self.job.optimiser.param_groups[0]["lr"],
            "clipped": progress.clipped / max(1, progress.step),
        }
        self.history.append(line)
        if progress.best is None or validation < progress.best:
            progress.best, progress.best_step = validation, progress.step
            checkpoint.save_best(self.out, self.job.model, self.meta())
        checkpoint.write_json(self.out / HISTORY, self.history)
        plots.learning_curve(self.history, task.unit, self.job.baselines, self.out / "plots" / "learning-curve.png")
        return line

    def save(self) -> None:
        """Write `last/`: all that an unbroken run would have in memory."""
        self.progress.minutes = self.minutes
        checkpoint.save_last(self.out, self.job.model, self.job.optimiser, self.state, self.progress, self.meta())
        self._saved = time.monotonic()

    def meta(self) -> dict[str, Any]:
        """meta.json with the run's progress."""
        progress = self.progress
        return {**self.job.meta, "steps": progress.step, "minutes": round(self.minutes, 2), "epochs": progress.epoch}


class Smooth:
    """Training loss: an exponential mean for the eye, an exact one since the last evaluation for the record."""

    def __init__(self) -> None:
        self.value = 0.0
        self._seen = 0
        self._since: list[float] = []

    def add(self, loss: float) -> None:
        """One step's mean loss."""
        self._seen += 1
        self.value += (loss - self.value) / min(self._seen, 50)
        self._since.append(loss)

    def take(self) -> float:
        """The mean since the last call."""
        since, self._since = self._since, []
        return sum(since) / max(1, len(since))
