"""How a forecaster would have done: one streamed pass, a forecast from every step of it.

The state is carried through the whole series once. From each step the forecast is rolled on its own means on copies
of the state, all steps at once; a model that says the horizon directly is not rolled.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training import baselines
from training.checkpoint import CheckpointError, load_model
from training.config import recipe_from
from training.corpora import load_corpus
from training.data import Corpus, DataError, Sequence
from training.evaluate import point_quantile, run_corpus, verdict
from training.model import RecurrentModel, State
from training.sample import next_row

ROWS = 4096
"""copies of the state that are rolled at once"""


def backtest_run(run: Path, cache: Path, horizon: int, data: Path | None = None) -> dict[str, Any]:
    """Mean absolute error `horizon` steps ahead, per entity and target, beside the baselines.

    Over the run's own test part, or all of another file `data` with the same columns.
    """
    model, meta = load_model(run)
    if meta["task"] != "forecaster":
        raise CheckpointError(f"{run} is a {meta['task']}: backtest is for forecasters; use evaluate")
    if horizon not in model.config.horizons and model.config.horizons[0] != 1:
        said = ", ".join(map(str, model.config.horizons))
        raise DataError(f"--horizon {horizon}: the model says {said} steps ahead, and has no next step to roll on")
    if data is None:
        corpus = run_corpus(run, meta, cache)
        series = {sequence.name: (sequence, corpus.warm_up[sequence.name]) for sequence in corpus.test}
    else:
        corpus = _other(meta, data, cache)
        series = {sequence.name: (sequence, 0) for sequence in corpus.test}
    direct = horizon in model.config.horizons and horizon != 1
    by_entity = {name: _figures(model, corpus, one, first, horizon) for name, (one, first) in series.items()}
    return {
        "task": "forecaster",
        "unit": f"mean absolute error {horizon} steps ahead, in the data's units",
        "horizon": horizon,
        "how": "direct" if direct else "rolled on its own means",
        "by_entity": by_entity,
        **verdict(by_entity),
    }


def _other(meta: dict[str, Any], path: Path, cache: Path) -> Corpus:
    recipe = recipe_from(meta["recipe"])
    recipe = replace(recipe, data=replace(recipe.data, path=str(path)))
    corpus = load_corpus(recipe, cache)
    names, known = [f.name for f in corpus.features], [feature["name"] for feature in meta["features"]]
    if names != known:
        raise DataError(f"{path} has the numeric columns {', '.join(names)}; the model needs {', '.join(known)}")
    return corpus


def _figures(
    model: RecurrentModel, corpus: Corpus, sequence: Sequence, first: int, horizon: int
) -> dict[str, dict[str, float]]:
    """Per target the errors of forecasts whose target lies at `first` or behind it."""
    said = forecasts_from(model, sequence.inputs, horizon)
    steps = len(sequence)
    origins = np.arange(steps - horizon + 1)
    if not len(origins):
        raise DataError(f"{sequence.name} has {steps} steps, too few for --horizon {horizon}")
    scored = origins + horizon > first
    found: dict[str, dict[str, float]] = {}
    known = observed(sequence)
    for k, name in enumerate(corpus.target_names):
        values = sequence.inputs[:, corpus.targets[k]].double().numpy()
        following = np.append(values[1:], float(sequence.targets[-1, k]))
        wanted = following[horizon - 1 :]
        use = scored & known[horizon - 1 :, k]
        forecasts = {
            "model": said[: len(origins), k].double().numpy(),
            "persistence": values[: len(origins)],
            "same hour yesterday": baselines.same_hour_yesterday(values, horizon=horizon)[: len(origins)],
        }
        errors = {which: float(np.abs(forecast - wanted)[use].mean()) for which, forecast in forecasts.items()}
        found[name] = {**errors, "steps": int(use.sum())}
    return found


def observed(sequence: Sequence) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[N, K] whether the data hold the target of the step after each, in the whole of the sequence."""
    assert sequence.observed is not None
    known: np.ndarray[Any, np.dtype[np.bool_]] = sequence.observed.numpy()
    return known


@torch.no_grad()
def forecasts_from(model: RecurrentModel, inputs: Tensor, horizon: int) -> Tensor:
    """[N, F] -> [N, K]: from every step what it says of `horizon` steps later."""
    model.eval()
    K, point = len(model.config.targets), point_quantile(model)
    states, outputs = _states(model, inputs)
    if horizon in model.config.horizons:
        j = model.config.horizons.index(horizon)
        chosen = outputs["mean"] if point is None else outputs["quantiles"][:, point]
        return chosen[:, j * K : (j + 1) * K]
    drift = inputs - torch.cat((inputs[:1], inputs[:-1]))
    ends = [
        _roll(
            model,
            inputs[at : at + ROWS],
            drift[at : at + ROWS],
            outputs["mean"][at : at + ROWS],
            tuple(state[:, at : at + ROWS].contiguous() for state in states),
            horizon,
        )
        for at in range(0, len(inputs), ROWS)
    ]
    return torch.cat(ends)[:, :K]


def _states(model: RecurrentModel, inputs: Tensor) -> tuple[State, dict[str, Tensor]]:
    """The state [layers, N, hidden] after every step and what is said there; the series is gone through once."""
    state, states, outputs = model.initial_state(1), [], []
    for row in inputs:
        said, state = model(row[None, None], state)
        states.append(state)
        outputs.append(said)
    joined = tuple(torch.cat(parts, dim=1) for parts in zip(*states, strict=True))
    return joined, {name: torch.cat([said[name][0] for said in outputs]) for name in outputs[0]}


def _roll(model: RecurrentModel, row: Tensor, drift: Tensor, mean: Tensor, state: State, horizon: int) -> Tensor:
    for _ in range(horizon - 1):
        row = next_row(model, row, drift, mean)
        outputs, state = model(row[None], state)
        mean = outputs["mean"][0]
    return mean
