"""Split-conformal calibration: how far the quantiles must lie from the middle, learnt on steps that were held out.

A quantile of level q lies `stretch` times as far from the middle as the network says, where `stretch` is the
q-quantile of (measured - middle) / (said - middle) over the held-out steps. The stretch is a part of the network from
then on, so that every door gives calibrated quantiles. Held out are the validation part, which is the latest, and
blocks spread over the training part (`data.calibration`), which are of other seasons and did not choose the
checkpoint; the wider of what the two ask for is taken. The promise is that of exchangeable steps; the printed coverage
of the test part says what became of it.
Source: Romano, Patterson and Candes, Conformalized Quantile Regression (2019).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from training.checkpoint import load_model, save_best
from training.data import Corpus, Sequence
from training.evaluate import forecasts
from training.model import ForecastHead, RecurrentModel, middle

LEAST = 50
"""steps; from fewer no quantile can be learnt"""
NARROW = 1e-6
"""of the target's scale; a quantile as near to the middle as that says nothing of a direction"""


def calibrate_run(run: Path, corpus: Corpus) -> int:
    """Calibrate a run's best weights in place; returns the number of steps that were used, 0 where nothing was done."""
    model, meta = load_model(run)
    used = calibrate(model, corpus)
    if used:
        save_best(run, model, {**meta, "calibration": {"steps": used}})
    return used


@torch.no_grad()
def calibrate(model: RecurrentModel, corpus: Corpus) -> int:
    """Fit `head.stretch` on what was held out; returns the fewest steps that a column had, 0 if too few."""
    head, levels = model.head, model.config.quantiles
    if not isinstance(head, ForecastHead) or len(levels) < 2:
        return 0
    head.stretch.fill_(1.0)
    low, high = middle(len(levels))
    held_out = [ratios(model, head, part) for part in (corpus.validation, corpus.calibration) if part]
    for column in range(len(model.config.columns)):
        groups = [part[column] for part in held_out if len(part[column]) >= LEAST]
        for i, level in enumerate(levels):
            if groups and (not low <= i <= high or low != high):
                asked = [stretch_of(group[:, i], level, below=i <= low) for group in groups]
                head.stretch[i, column] = max(asked)
    used = [sum(len(part[column]) for part in held_out) for column in range(len(model.config.columns))]
    return min(used) if bool((head.stretch != 1).any()) else 0


def ratios(model: RecurrentModel, head: ForecastHead, part: list[Sequence]) -> list[Tensor]:
    """Per column [N, Q]: how far from the middle the data lie, in units of how far each quantile does."""
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
