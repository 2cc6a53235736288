"""The training loop: truncated back-propagation through time with the state carried from chunk to chunk."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from training.batches import Batch
from training.checkpoint import Progress
from training.config import TrainRecipe
from training.evaluate import fresh_state, validate
from training.job import Job
from training.model import State
from training.report import Report
from training.run import Run

STALE = 5
"""Evaluations without a better figure before a run is told that it only memorises."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient is no longer a number; the last checkpoint from before is kept."""


def train(job: Job, out: Path, report: Report, *, resume: bool = False) -> Progress:
    """Go on to the recipe's end, to a signal, or to a loss that is no number; `out` holds the checkpoints."""
    run = Run(job, out, resume=resume)
    progress, recipe = run.progress, job.recipe.train
    if run.done:
        report.event("note", "this run is at its end: raise --max-minutes or train.max_steps to go on", {})
    with interrupts() as stopped:
        while not (run.done or stopped):
            for batch in job.batches.epoch(recipe.seed, progress.epoch, progress.chunk):
                set_learning_rate(job.optimiser, learning_rate(recipe, progress.step, run.fraction))
                loss, norm, state = update(job, batch, fresh_state(run.state, batch.fresh))
                run.note(batch, loss, norm, state)
                report.step(run.line())
                if run.due_to_evaluate():
                    evaluate(run, report)
                if run.due_to_save:
                    run.save()
                if run.done or stopped:
                    break
            else:
                run.next_epoch()
        if not run.evaluated and (run.done or progress.best is None):
            evaluate(run, report)
        run.save()
    return progress


def update(job: Job, batch: Batch, state: State) -> tuple[float, float, State]:
    """One optimiser step on one chunk -> (mean loss, gradient norm before clipping, state')."""
    recipe, model = job.recipe.train, job.model.train()
    batch = batch.to(recipe.device)
    with torch.autocast(recipe.device, torch.bfloat16, enabled=recipe.precision == "bf16"):
        outputs, after = model(batch.inputs, state)
    total, weight = job.task.losses(model, outputs, batch)
    loss = total / weight.clamp(min=1.0)
    job.optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip).item()
    if not (math.isfinite(norm) and math.isfinite(loss.item())):
        raise NonFiniteError(
            f"the loss is {loss.item()} and the gradient's norm {norm}: the last checkpoint is kept;"
            " lower train.learning_rate and --resume"
        )
    job.optimiser.step()
    return loss.item(), norm, after


def evaluate(run: Run, report: Report) -> None:
    """The validation figure beside the baselines, then a sample or a plot."""
    job, progress = run.job, run.progress
    figure = job.task.figure(validate(job.model, job.task, job.corpus))
    line = run.record(figure)
    beside = "".join(f"  {name} {value:.4f}" for name, value in job.baselines.items())
    text = f"step {progress.step:>6}  validation {figure:.4f} {job.task.unit}  best {progress.best:.4f}{beside}"
    stale = sum(line["step"] > progress.best_step for line in run.history)
    if stale >= STALE:
        text += f"  (no better for {stale} evaluations: stop here, or raise model.dropout, or give more data)"
    report.event("evaluation", text, {**line, "baselines": job.baselines})
    shadow = copy.deepcopy(job.model).cpu().eval()
    shown = job.task.show(shadow, job.meta, job.corpus, job.recipe.sample, run.out / "plots")
    report.event("sample", shown, {"text": shown})


def learning_rate(recipe: TrainRecipe, step: int, fraction: float) -> float:
    """Linear warm-up, then a cosine that ends near zero with the run."""
    warm = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    return recipe.learning_rate * warm * max(0.5 * (1 + math.cos(math.pi * fraction)), 1e-3)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """The same for all parameters."""
    for group in optimiser.param_groups:
        group["lr"] = rate


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list that a first Ctrl-C or SIGTERM fills, so that the run can save; a second one interrupts at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
