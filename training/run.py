"""A run under way: how far it is, what it has seen, and its folder of checkpoints, curve and plots."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from training import checkpoint, plots
from training.batches import Batch
from training.checkpoint import CheckpointError, Progress
from training.job import Job
from training.model import State
from training.processes import Group
from training.report import Line

HISTORY = "history.json"


class NonFiniteError(RuntimeError):
    """The loss, the gradient or a weight is no longer a number; the last checkpoint from before is kept."""


class Run:
    """Counts steps and minutes over all starts of a run, and reads and writes its folder."""

    def __init__(self, job: Job, out: Path, *, resume: bool, group: Group) -> None:
        self.job, self.out, self.recipe, self.group = job, out, job.recipe.train, group
        self.rows = group.share(job.batches.rows)
        self.state = job.model.initial_state(self.rows.stop - self.rows.start)
        if not group.leads:
            torch.manual_seed(self.recipe.seed + 1000 * group.rank)  # other units are dropped in each process
        self.progress = Progress()
        self.history: list[dict[str, Any]] = []
        if resume:
            self._resume()
        elif (out / checkpoint.LAST).exists():
            raise CheckpointError(f"{out} holds a run: add --resume to go on, or give another --out")
        self.fraction, self.stopped, self.due_to_save = 0.0, False, False
        self._before, self._first_symbol = self.progress.minutes, self.progress.symbols
        self._began = self._saved = time.monotonic()
        self._saved_step = self.progress.step
        self._smooth = Smooth()
        self.look()
        self._fraction_before = self.fraction
        self._quarter = int(self.fraction * 4)

    def _resume(self) -> None:
        checkpoint.refuse_mismatch(checkpoint.read_meta(self.out, checkpoint.LAST), self.job.meta)
        job, group = self.job, self.group
        state, rng, self.progress = checkpoint.load_last(self.out, job.model, job.optimiser, job.average)
        if state[0].shape[1] != job.batches.rows:
            raise CheckpointError("cannot resume: train.batch differs from the run's, and its state is per row")
        self.state = tuple(tensor[:, self.rows].to(self.recipe.device) for tensor in state)
        if rng.ndim == group.size == 1:
            torch.set_rng_state(rng)
        elif len(rng) == group.size:  # as many processes as before, else each goes on from its seed
            torch.set_rng_state(rng[group.rank].clone())
        path = self.out / HISTORY
        history = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        self.history = [line for line in history if line["step"] <= self.progress.step]

    @property
    def minutes(self) -> float:
        """Of all starts of this run together."""
        return self._before + (time.monotonic() - self._began) / 60

    def look(self, stop: bool = False) -> None:
        """See how far the run is, and agree with the other processes on what comes next; `stop`: a signal came."""
        stop = stop or 0 < self.recipe.patience <= self.stale
        save = time.monotonic() - self._saved > self.recipe.checkpoint_minutes * 60
        self.fraction, self.due_to_save, self.stopped = self.group.agree(self._fraction(), save, stop)

    def _fraction(self) -> float:
        """0 at the start, 1 at the end; by steps or by the clock, whichever is further."""
        by_steps = self.progress.step / self.recipe.max_steps if self.recipe.max_steps else 0.0
        by_clock = self.minutes / self.recipe.max_minutes if self.recipe.max_minutes else 0.0
        return min(1.0, max(by_steps, by_clock))

    @property
    def done(self) -> bool:
        """The recipe's end is reached."""
        return self.fraction >= 1.0

    def over(self) -> bool:
        """Nothing more is to be learnt: the end is reached, or somebody stops the run before it."""
        return self.done or self.stopped

    @property
    def stale(self) -> int:
        """Evaluations since the best one."""
        return sum(line["step"] > self.progress.best_step for line in self.history)

    @property
    def evaluated(self) -> bool:
        """The newest weights have been scored."""
        return bool(self.history) and self.history[-1]["step"] == self.progress.step

    def due_to_evaluate(self) -> bool:
        """Every `evaluate_steps` steps, and each quarter of a run that the clock ends."""
        quarter, self._quarter = self._quarter, int(self.fraction * 4) if self.recipe.max_minutes else 0
        return self.progress.step % self.recipe.evaluate_steps == 0 or self._quarter > quarter

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
        gained = fraction - self._fraction_before
        eta = seconds * (1 - fraction) / gained if gained > 0 else None
        return Line(self.progress.step, fraction, self.job.task.figure(self._smooth.value), rate, eta)

    def record(self, validation: float) -> dict[str, Any]:
        """An evaluation: into the history and the learning curve; keeps the weights where they are the best."""
        progress, task = self.progress, self.job.task
        if not math.isfinite(validation):
            raise NonFiniteError(f"the validation figure is {validation}")
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
            checkpoint.save_best(self.out, self.job.judged, self.meta())
        checkpoint.write_json(self.out / HISTORY, self.history)
        plots.learning_curve(self.history, task.unit, self.job.baselines, self.out / "plots" / "learning-curve.png")
        return line

    def save(self) -> None:
        """Write `last/`: all that an unbroken run would have in memory."""
        job, group, rng = self.job, self.group, torch.get_rng_state()
        state = tuple(group.join(tensor, self.rows, job.batches.rows, dim=1) for tensor in self.state)
        if group.size > 1:
            rng = group.join(rng[None], slice(group.rank, group.rank + 1), group.size)
        if not all(parameter.isfinite().all() for parameter in job.model.parameters()):
            raise NonFiniteError("a weight is no longer a number")
        if group.leads:
            self.progress.minutes = self.minutes
            meta = self.meta()
            checkpoint.save_last(self.out, job.model, job.optimiser, state, rng, self.progress, meta, job.average)
        self._saved, self._saved_step = time.monotonic(), self.progress.step

    def remedy(self) -> str:
        """What to do about a loss that is no number."""
        kept = "nothing was saved yet: lower train.learning_rate or train.clip and start again"
        if self._saved_step:
            kept = f"the checkpoint of step {self._saved_step} is kept: lower train.learning_rate and --resume"
        return f"after step {self.progress.step}; {kept}"

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
