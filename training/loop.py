"""The training loop: truncated back-propagation through time with the state carried from chunk to chunk."""

from __future__ import annotations

import copy
import itertools
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.batches import Batch
from training.checkpoint import Progress
from training.config import TrainRecipe
from training.evaluate import fresh_state, validate
from training.job import Job
from training.model import State
from training.processes import Group
from training.report import Report
from training.run import NonFiniteError, Run

STALE = 5
"""Evaluations without a better figure before a run is told that it only memorises."""


def train(job: Job, out: Path, report: Report, *, resume: bool = False, group: Group | None = None) -> Progress:
    """Go on to the recipe's end, to a signal, or to a loss that is no number; `out` holds the checkpoints."""
    group = group or Group()
    run = Run(job, out, resume=resume, group=group)
    progress = run.progress
    if run.over():
        report.event("note", "this run is at its end: raise --max-minutes, train.max_steps or --patience to go on", {})
    try:
        with interrupts(repeated=group.size == 1) as stopped:
            learn(run, report, stopped)
            progress.ended = not stopped
            if group.leads and not run.evaluated and (run.done or progress.best is None):
                evaluate(run, report)
            run.save()
    except NonFiniteError as error:
        raise NonFiniteError(f"{error} {run.remedy()}") from error
    return progress


def learn(run: Run, report: Report, stopped: list[int]) -> None:
    """Step after step with what falls due between them, until the run is over."""
    job, group, progress, recipe = run.job, run.group, run.progress, run.recipe
    while not run.over():
        for batch in job.batches.epoch(recipe.seed, progress.epoch, progress.chunk):
            set_learning_rate(job.optimiser, learning_rate(recipe, progress.step, run.fraction))
            own = batch.part(run.rows)
            loss, norm, state = update(job, own, fresh_state(run.state, own.fresh), group)
            run.note(batch, loss, norm, state)
            if job.average is not None:
                follow(job.average, job.model, recipe.average, progress.step)
            report.step(run.line())
            if run.due_to_evaluate() and group.leads:
                evaluate(run, report)
            run.look(bool(stopped))
            if run.due_to_save:
                run.save()
            if run.over():
                break
        else:
            run.next_epoch()


def update(job: Job, batch: Batch, state: State, group: Group) -> tuple[float, float, State]:
    """One optimiser step on a chunk, of which each process has its own rows.

    Returns (mean loss over all processes, gradient norm before clipping, state').
    """
    recipe, model = job.recipe.train, job.model.train()
    sums, afters = torch.zeros(2, device=recipe.device), []
    job.optimiser.zero_grad()
    for rows in parts(state[0].shape[1], recipe.accumulate):
        part = batch.part(rows).to(recipe.device)
        with torch.autocast(recipe.device, torch.bfloat16, enabled=recipe.precision == "bf16"):
            outputs, after = model(part.inputs, tuple(tensor[:, rows] for tensor in state), part.lengths)
        total, weight = job.task.losses(model, outputs, part)
        total.backward()  # type: ignore[no-untyped-call]
        sums += torch.stack((total.detach(), weight))
        afters.append([tensor.detach() for tensor in after])
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    group.add_up([*gradients, sums])
    mean = (sums[0] / sums[1].clamp(min=1.0)).item()
    torch._foreach_div_(gradients, sums[1].clamp(min=1.0))
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip).item()
    if not (math.isfinite(norm) and math.isfinite(mean)):
        raise NonFiniteError(f"the loss is {mean} and the gradient's norm {norm}")
    job.optimiser.step()
    return mean, norm, tuple(torch.cat(tensors, dim=1) for tensors in zip(*afters, strict=True))


def parts(rows: int, count: int) -> list[slice]:
    """So many about equal parts of the rows, fewer where there are not as many rows."""
    edges = [rows * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the weights: in the first steps it is a plain mean, which soon forgets the start."""
    mean = get_ema_multi_avg_fn(min(decay, step / (step + 9)))  # type: ignore[no-untyped-call]
    mean(list(average.parameters()), list(model.parameters()), 0)


def evaluate(run: Run, report: Report) -> None:
    """The validation figure beside the baselines, then a sample or a plot."""
    job, progress = run.job, run.progress
    figure = job.task.figure(validate(job.judged, job.task, job.corpus))
    line = run.record(figure)
    beside = "".join(f"  {name} {value:.4f}" for name, value in job.baselines.items())
    text = f"step {progress.step:>6}  validation {figure:.4f} {job.task.unit}  best {progress.best:.4f}{beside}"
    if run.stale >= STALE:
        text += f"  (no better for {run.stale} evaluations: stop here, or raise model.dropout, or give more data)"
    report.event("evaluation", text, {**line, "baselines": job.baselines})
    shadow = copy.deepcopy(job.judged).cpu().eval()
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
def interrupts(repeated: bool = True) -> Iterator[list[int]]:
    """A list that a first Ctrl-C or SIGTERM fills, so that the run can save; a second one interrupts at once.

    Unless `repeated` is False: torchrun passes a terminal's Ctrl-C on, so that each process gets it twice.
    """
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received and repeated:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
