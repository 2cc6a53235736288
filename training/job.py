"""A recipe and its corpus made ready to train: model, optimiser, batches, and the meta.json of its checkpoints."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.batches import Batches, StreamSet, WindowSet
from training.checkpoint import environment
from training.config import Recipe, RecipeError
from training.corpora import load_corpus
from training.data import Corpus
from training.device import resolved
from training.model import ForecastHead, ModelConfig, RecurrentModel, ValueEncoder
from training.tasks import TASKS, Task

ALIKE = ["dropout", "input_dropout", "weight_dropout", "locked", "skip", "norm", "tied", "start", "forget_bias"]
ALIKE += ["chrono", "alpha", "bidirectional"]
"""Keys that a recipe and a model's config have in common."""


@dataclass
class Job:
    """All that the loop needs."""

    recipe: Recipe
    corpus: Corpus
    model: RecurrentModel
    optimiser: torch.optim.Optimizer
    batches: Batches
    task: Task
    meta: dict[str, Any]
    baselines: dict[str, float]
    """Figures on the validation part, in the task's unit."""
    average: RecurrentModel | None = None
    """The weights' running mean, if the recipe wants one."""

    @property
    def judged(self) -> RecurrentModel:
        """The model that is scored, kept and exported."""
        return self.average or self.model


def prepare(recipe: Recipe, cache: Path, command: str) -> Job:
    """Seeds, loads the data and builds everything; raises before any training if the data cannot be used."""
    recipe = resolved(recipe)
    torch.manual_seed(recipe.train.seed)
    corpus = load_corpus(recipe, cache)
    config = model_config(recipe, corpus)
    model = RecurrentModel(config)
    fit_scales(model, corpus)
    if isinstance(model.encoder, nn.Embedding):
        model.encoder.weight.data.mul_(recipe.model.embedding_scale)
    task, batches = TASKS[recipe.task], build_batches(recipe, corpus)
    beside = task.baselines(model, corpus)
    model.to(recipe.train.device)
    optimiser = build_optimiser(model, recipe)
    meta = build_meta(recipe, corpus, config, command)
    average = copy.deepcopy(model) if recipe.train.average else None
    return Job(recipe, corpus, model, optimiser, batches, task, meta, beside, average)


def model_config(recipe: Recipe, corpus: Corpus) -> ModelConfig:
    """The recipe's sizes with those that the data fixes."""
    try:
        return _config(recipe, corpus)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _config(recipe: Recipe, corpus: Corpus) -> ModelConfig:
    shape = recipe.model
    return ModelConfig(
        task=recipe.task,
        cell=shape.cell,
        layers=shape.layers,
        hidden=shape.hidden,
        embedding=shape.embedding if corpus.symbols else 0,
        vocabulary=len(corpus.symbols),
        periods=tuple(feature.period for feature in corpus.features),
        targets=tuple(corpus.targets),
        quantiles=shape.quantiles if recipe.task == "forecaster" else (),
        labels=len(corpus.labels),
        residual=shape.residual and recipe.task == "forecaster",
        **{name: getattr(shape, name) for name in ALIKE},
    )


def fit_scales(model: RecurrentModel, corpus: Corpus) -> None:
    """Put the training part's means and spreads into the graph, so that users speak in their own units."""
    if isinstance(model.encoder, ValueEncoder):
        model.encoder.mean.copy_(torch.tensor([feature.mean for feature in corpus.features]))
        model.encoder.scale.copy_(torch.tensor([feature.std for feature in corpus.features]))
    if isinstance(model.head, ForecastHead):
        wanted = torch.cat([sequence.targets for sequence in corpus.train])
        current = torch.cat([sequence.inputs[:, corpus.targets] for sequence in corpus.train])
        spread = (wanted - current).std(dim=0) if model.config.residual else wanted.std(dim=0)
        model.head.target_mean.copy_(wanted.mean(dim=0))
        model.head.target_scale.copy_(spread.clamp(min=1e-6))


def build_optimiser(model: RecurrentModel, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only: a decayed bias would only forget what the data says."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.train.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.train.learning_rate, foreach=True)


def build_batches(recipe: Recipe, corpus: Corpus) -> Batches:
    """The data set of the recipe's form."""
    train = recipe.train
    if recipe.model.bidirectional:
        return StreamSet(corpus.train, train.batch, max(map(len, corpus.train)), whole=True)
    if train.form == "windowed":
        return WindowSet(corpus.train, train.batch, train.steps, train.stride)
    return StreamSet(corpus.train, train.batch, train.steps)


def build_meta(recipe: Recipe, corpus: Corpus, config: ModelConfig, command: str) -> dict[str, Any]:
    """What meta.json says apart from the run's progress."""
    return {
        "model": config.to_json(),
        "task": recipe.task,
        "input_kind": corpus.input_kind,
        "symbols": corpus.symbols,
        "splitter": corpus.splitter,
        "start_symbol": corpus.start_symbol,
        "features": [feature.to_json() for feature in corpus.features],
        "targets": corpus.target_names,
        "labels": corpus.labels,
        "quantiles": list(config.quantiles),
        "recipe": recipe.to_json(),
        "command": command,
        "seed": recipe.train.seed,
        "data": {"source": corpus.source, "sha256": corpus.sha256},
        "environment": environment(),
    }
