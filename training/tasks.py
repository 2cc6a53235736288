"""What differs by task, and nothing else: the loss, how its figure reads, the baselines, what is shown."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from service.bundle import Splitter
from training import baselines
from training.batches import Batch, collate
from training.config import SampleRecipe
from training.data import Corpus
from training.model import ForecastHead, RecurrentModel
from training.sample import forecasts_shown, labels_shown, notes_shown, pairs_shown, sample_text, values_shown


class Task(Protocol):
    """One of them; a lower figure is better."""

    unit: str

    def losses(self, model: RecurrentModel, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of weighted losses, sum of weights); their quotient is what training lowers."""
        ...

    def figure(self, loss: float) -> float:
        """A mean loss as users read it."""
        ...

    def baselines(self, model: RecurrentModel, corpus: Corpus) -> dict[str, float]:
        """Figures on the validation part that need no network."""
        ...

    def show(
        self, model: RecurrentModel, meta: dict[str, Any], corpus: Corpus, sample: SampleRecipe, plots: Path
    ) -> str:
        """Something to look at while the model trains."""
        ...


class LanguageModel:
    """Cross-entropy of the next symbol; read in bits a symbol."""

    unit = "bits per symbol"

    def losses(self, model: RecurrentModel, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Nats."""
        return cross_entropy(outputs["logits"], batch)

    def figure(self, loss: float) -> float:
        """Nats -> bits."""
        return loss / math.log(2)

    def baselines(self, model: RecurrentModel, corpus: Corpus) -> dict[str, float]:
        """Unigram and 5-gram."""
        return baselines.text_bits(corpus, corpus.validation)

    def show(
        self, model: RecurrentModel, meta: dict[str, Any], corpus: Corpus, sample: SampleRecipe, plots: Path
    ) -> str:
        """Text that the model writes."""
        if corpus.separator:
            return pairs_shown(model, corpus, corpus.validation)
        split = Splitter.model_validate(corpus.splitter).split(sample.prompt)
        prompt = sample.prompt if set(split) <= set(corpus.symbols) else ""
        return sample_text(model, meta, prompt, sample.length, sample.temperature)


class Classifier:
    """Cross-entropy of the label at each step."""

    unit = "nats per step"

    def losses(self, model: RecurrentModel, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Nats."""
        return cross_entropy(outputs["logits"], batch)

    def figure(self, loss: float) -> float:
        """Nats, as they are."""
        return loss

    def baselines(self, model: RecurrentModel, corpus: Corpus) -> dict[str, float]:
        """The training part's label frequencies, said at every step."""
        parts = (corpus.train, corpus.validation)
        train, test = (torch.cat([s.targets[s.weights > 0] for s in part]) for part in parts)
        return {"label frequencies": baselines.label_entropy(train.numpy(), test.numpy(), len(corpus.labels))}

    def show(
        self, model: RecurrentModel, meta: dict[str, Any], corpus: Corpus, sample: SampleRecipe, plots: Path
    ) -> str:
        """The last steps of a validation sequence with the label said at each."""
        return labels_shown(model, corpus, corpus.validation[0])


class MultiLabel:
    """Cross-entropy of each label for itself, summed over the labels of a step."""

    unit = "nats per step"

    def losses(self, model: RecurrentModel, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Nats."""
        logits = outputs["logits"].float()
        nats = F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="none").sum(dim=-1)
        return (nats * batch.weights).sum(), batch.weights.sum()

    def figure(self, loss: float) -> float:
        """Nats, as they are."""
        return loss

    def baselines(self, model: RecurrentModel, corpus: Corpus) -> dict[str, float]:
        """Each label as often as in the training part, whatever was heard."""
        return {"label frequencies": baselines.label_nats(corpus, corpus.validation)}

    def show(
        self, model: RecurrentModel, meta: dict[str, Any], corpus: Corpus, sample: SampleRecipe, plots: Path
    ) -> str:
        """The first steps of a validation sequence with the labels that are likely at each."""
        return notes_shown(model, corpus, corpus.validation[0])


class Forecaster:
    """Huber loss of the mean plus pinball loss of each quantile, in units of each target's scale."""

    unit = "scaled loss"

    def losses(self, model: RecurrentModel, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Both losses in normalised units, weighted per target."""
        scale = forecast_head(model).target_scale
        loss = F.huber_loss(outputs["mean"] / scale, batch.targets / scale, reduction="none")
        for i, quantile in enumerate(model.config.quantiles):
            error = (batch.targets - outputs["quantiles"][..., i, :]) / scale
            loss = loss + torch.maximum(quantile * error, (quantile - 1) * error)
        return (loss * batch.weights).sum(), batch.weights.sum()

    def figure(self, loss: float) -> float:
        """As it is: it has no unit."""
        return loss

    def baselines(self, model: RecurrentModel, corpus: Corpus) -> dict[str, float]:
        """The same loss of saying that nothing changes, for the mean and for every quantile."""
        return {"persistence": self._loss_of(lambda batch: batch.inputs[..., corpus.columns], model, corpus)}

    def _loss_of(self, guess: Callable[[Batch], Tensor], model: RecurrentModel, corpus: Corpus) -> float:
        """The mean loss on the validation part of a guess [T, B, K], taken for the mean and for every quantile."""
        total = weight = 0.0
        for i, sequence in enumerate(corpus.validation):
            batch = collate(corpus.validation, [(i, 0, len(sequence), True)])
            said = guess(batch)
            copies = said.unsqueeze(-2).expand(*said.shape[:-1], len(model.config.quantiles), -1)
            loss, weighed = self.losses(model, {"mean": said, "quantiles": copies}, batch)
            total, weight = total + float(loss), weight + float(weighed)
        return total / max(weight, 1.0)

    def show(
        self, model: RecurrentModel, meta: dict[str, Any], corpus: Corpus, sample: SampleRecipe, plots: Path
    ) -> str:
        """A plot of the first target's last steps with the forecast fan."""
        path = plots / "forecast.png"
        return forecasts_shown(model, corpus, corpus.validation[0], path)


class Regressor(Forecaster):
    """The same loss, of values that belong to the step itself."""

    def baselines(self, model: RecurrentModel, corpus: Corpus) -> dict[str, float]:
        """The same loss of always saying the training part's mean."""
        mean = forecast_head(model).target_mean
        return {"training mean": self._loss_of(lambda batch: mean.expand_as(batch.targets), model, corpus)}

    def show(
        self, model: RecurrentModel, meta: dict[str, Any], corpus: Corpus, sample: SampleRecipe, plots: Path
    ) -> str:
        """The last steps of a validation sequence that are scored, with what is said at each."""
        return values_shown(model, corpus, corpus.validation[0])


def cross_entropy(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """[T, B, classes] against [T, B] -> (weighted sum in nats, sum of weights)."""
    nats = F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), reduction="none")
    weights = batch.weights.flatten()
    return (nats * weights).sum(), weights.sum()


def forecast_head(model: RecurrentModel) -> ForecastHead:
    """The head, known to be a forecaster's."""
    if not isinstance(model.head, ForecastHead):
        raise TypeError(f"a {model.config.task} has no forecast head")
    return model.head


TASKS: dict[str, Task] = {
    "language-model": LanguageModel(),
    "classifier": Classifier(),
    "multi-label": MultiLabel(),
    "forecaster": Forecaster(),
    "regressor": Regressor(),
}
