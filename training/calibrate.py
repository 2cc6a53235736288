"""Split-conformal calibration: how far the quantiles must lie from the middle, learnt on steps that were held out.

A quantile of level q lies `stretch` times as far from the middle as the network says, where `stretch` is the
q-quantile of (measured - middle) / (said - middle) over the held-out steps. The stretch is a part of the network from
then on, so that every door gives calibrated quantiles. Held out are the validation part, which is the latest, and of
the training part, which is of other seasons and did not choose the checkpoint, blocks spread over it
(`data.calibration`), or all of it, season by season: with `data.folds` further models are trained, each without one,
and are asked about that one. The widest of what these ask for is taken, so that the promise is for each season and not
for their mean (docs/decisions/0018-quantiles-by-season.md). It is that of exchangeable steps; the printed coverage of
the test part says what became of it.
Source: Romano, Patterson and Candes, Conformalized Quantile Regression (2019); Vovk, Cross-conformal Predictors (2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from training import loop
from training.checkpoint import LAST, load_model, save_best
from training.data import Corpus, Sequence
from training.evaluate import forecasts
from training.job import Job, prepare
from training.model import ForecastHead, RecurrentModel, middle
from training.report import Report

LEAST = 50
"""steps; from fewer no quantile can be learnt"""
NARROW = 1e-6
"""of the target's scale; a quantile as near to the middle as that says nothing of a direction"""
FOLDS = "folds"
"""folder of the further models in a run's"""

Ratios = list[Tensor]
"""Per column [N, Q]: how far from the middle the data lie, in units of how far each quantile does."""


def calibrate_run(run: Path, corpus: Corpus, crossed: list[Ratios]) -> int:
    """Calibrate a run's best weights in place; returns the number of steps that were used, 0 where nothing was done."""
    model, meta = load_model(run)
    used = calibrate(model, corpus, crossed)
    if used:
        folds = {"folds": len(crossed)} if crossed else {}
        save_best(run, model, {**meta, "calibration": {"steps": used, **folds}})
    return used


def cross(run: Path, job: Job, cache: Path, say: Callable[[str], None]) -> list[Ratios]:
    """Train the models that each lack a fold, in the run's folder; per fold the ratios on what its model lacks.

    Those that are there already are not trained again. Nothing comes back where the recipe wants no folds, or where a
    signal came: --resume goes on.
    """
    found = []
    for fold in range(1, job.recipe.data.folds + 1):
        recipe = replace(job.recipe, data=replace(job.recipe.data, fold=fold))
        part, out = prepare(recipe, cache, job.meta["command"]), run / FOLDS / str(fold)
        progress = loop.train(part, out, Report(part.task.unit, quiet=True), resume=(out / LAST).exists())
        if not progress.ended:
            return []
        best = f"best {progress.best:.4f} {part.task.unit} at step {progress.best_step}"
        say(f"without fold {fold} of {recipe.data.folds}: {best}")
        model, _ = load_model(out)
        assert isinstance(model.head, ForecastHead)
        found.append(ratios(model, model.head, part.corpus.calibration))
    return found


@torch.no_grad()
def calibrate(model: RecurrentModel, corpus: Corpus, crossed: Iterable[Ratios] = ()) -> int:
    """Fit `head.stretch` on what was held out, with `crossed`; returns the fewest steps of a column, 0 if too few."""
    head, levels = model.head, model.config.quantiles
    if not isinstance(head, ForecastHead) or len(levels) < 2:
        return 0
    head.stretch.fill_(1.0)
    low, high = middle(len(levels))
    held_out = [ratios(model, head, part) for part in (corpus.validation, corpus.calibration) if part]
    held_out += crossed
    for column in range(len(model.config.columns)):
        groups = [part[column] for part in held_out if len(part[column]) >= LEAST]
        for i, level in enumerate(levels):
            if groups and (not low <= i <= high or low != high):
                asked = [stretch_of(group[:, i], level, below=i <= low) for group in groups]
                head.stretch[i, column] = max(asked)
    used = [sum(len(part[column]) for part in held_out) for column in range(len(model.config.columns))]
    return min(used) if bool((head.stretch != 1).any()) else 0


def ratios(model: RecurrentModel, head: ForecastHead, part: list[Sequence]) -> Ratios:
    """Of the steps of the sequences that are scored."""
    low, high = middle(head.quantiles)
    found: list[list[Tensor]] = [[] for _ in model.config.columns]
    for sequence, outputs in zip(part, forecasts(model, part), strict=True):
        said = outputs["quantiles"] / head.target_scale
        centre = (said[:, low : low + 1] + said[:, high : high + 1]) / 2
        apart = (sequence.targets / head.target_scale).unsqueeze(1) - centre
        gap = said - centre
        ratio = apart / torch.where(gap < 0, gap.clamp(max=-NARROW), gap.clamp(min=NARROW))
        for column, rows in enumerate(found):
            rows.append(ratio[sequence.weights[:, column] > 0][:, :, column])
    return [torch.cat(rows) for rows in found]


def stretch_of(ratios: Tensor, level: float, *, below: bool) -> float:
    """How many times the distance from the middle leaves the share `level` under the quantile, at least 0.

    `ratios` [N] are measured distances in units of the said one; below the middle both are turned round.
    """
    ranked, n = ratios.sort().values, len(ratios)
    share = 1 - level if below else level
    rank = min(max(math.ceil((n + 1) * share), 1), n)
    return max(float(ranked[rank - 1]), 0.0)
