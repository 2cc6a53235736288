"""Scores a run's best weights on its test part: one streamed pass with the state carried, beside the baselines."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.bundle import Splitter
from training import baselines
from training.batches import Batch, StreamSet
from training.checkpoint import CheckpointError, load_model, write_json
from training.config import recipe_from
from training.corpora import load_corpus
from training.data import Corpus, Sequence, part
from training.model import ForecastHead, RecurrentModel, State
from training.sample import answers, text_of
from training.tasks import TASKS, Task

METRICS = "metrics.json"
STEPS, ROWS = 256, 16
PAIRS = 500
"""of which answers are written out; more would take long and say little new"""
SEEN = (0.25, 0.5, 0.75, 1.0)
"""shares of a labelled sequence after which its label is judged"""
PARTS = ("inputs", "targets", "weights")
RESET = {"language-model": (64, 256), "classifier": (16,)}
"""For comparison the state is zeroed every so many steps."""


@dataclass(frozen=True)
class Row:
    """One step of a test series: what to feed, and what the data says follows (NaN where it was missing)."""

    series: str
    position: int
    values: list[float]
    expected: list[float]
    scored: bool
    """False in the warm-up before the test part."""


def evaluate_run(run: Path, cache: Path) -> dict[str, Any]:
    """The test figures of a run; also written to its metrics.json."""
    model, meta = load_model(run)
    corpus = run_corpus(run, meta, cache)
    metrics = {"task": meta["task"], **SCORERS[meta["task"]](model, corpus)}
    write_json(run / METRICS, metrics)
    return metrics


def run_corpus(run: Path, meta: Mapping[str, Any], cache: Path) -> Corpus:
    """The corpus that a run was trained on; raises CheckpointError if it is another by now."""
    corpus = load_corpus(recipe_from(meta["recipe"]), cache)
    if corpus.sha256 != meta["data"]["sha256"]:
        raise CheckpointError(f"{run} was trained on other data than {corpus.source} is now")
    return corpus


def score_text(model: RecurrentModel, corpus: Corpus) -> dict[str, Any]:
    """Nats and bits a symbol, per text and in all, state carried and reset, beside unigram and 5-gram."""
    names = [sequence.name for sequence in corpus.test]
    carried = losses(model, corpus.test)
    reset = {every: losses(model, cut(corpus.test, every)) for every in RESET["language-model"]}
    steps = scored_steps(corpus.test)
    nats = sum(carried) / steps
    if corpus.separator:
        return pairs_figures(model, corpus, nats, steps)
    return {
        "unit": "bits per symbol",
        "symbols": steps,
        "nats": nats,
        "model": nats / math.log(2),
        **{f"model_reset_every_{every}": sum(lost) / steps / math.log(2) for every, lost in reset.items()},
        **bits_a_character(corpus, sum(carried)),
        **baselines.text_bits(corpus, corpus.test),
        "by_text": {
            name: total / len(sequence) / math.log(2)
            for name, total, sequence in zip(names, carried, corpus.test, strict=True)
        },
        "note": "each text from a zero state after the start symbol, state carried to its end",
    }


def scored_steps(sequences: list[Sequence]) -> int:
    """Steps that weigh something."""
    return sum(int((sequence.weights > 0).sum()) for sequence in sequences)


def bits_a_character(corpus: Corpus, nats: float) -> dict[str, float]:
    """Where a symbol is a byte or several: the same in bits a character, which compares with other vocabularies."""
    splitter = Splitter.model_validate(corpus.splitter)
    if splitter.kind != "bytes":
        return {}
    ids = (sequence.targets.tolist() for sequence in corpus.test)
    characters = sum(len(text_of([corpus.symbols[i] for i in part], splitter)) for part in ids)
    return {"characters": characters, "bits_per_character": nats / characters / math.log(2)}


def pairs_figures(model: RecurrentModel, corpus: Corpus, nats: float, steps: int) -> dict[str, Any]:
    """How many of the first PAIRS test pairs are answered without a wrong symbol, and bits a symbol of all answers."""
    asked = corpus.test[:PAIRS]
    found = answers(model, corpus, asked, max(map(len, asked)) + 1)
    return {
        "unit": "share of answers without a wrong symbol",
        "pairs": len(asked),
        "exact match": sum(said == wanted for _, said, wanted in found) / len(asked),
        "symbols": steps,
        "bits per symbol of the answer": nats / math.log(2),
        "note": "greedy, each pair from a zero state; no test pair's given text is in the training part",
    }


def score_notes(model: RecurrentModel, corpus: Corpus) -> dict[str, Any]:
    """Nats a step, summed over the labels, beside the labels' frequencies."""
    return {
        "unit": "nats per step",
        "steps": scored_steps(corpus.test),
        "model": mean_loss(model, TASKS["multi-label"], corpus.test),
        "label frequencies": baselines.label_nats(corpus, corpus.test),
        "note": "each sequence from a zero state; the labels of a step are taken as independent of one another",
    }


def score_values(model: RecurrentModel, corpus: Corpus) -> dict[str, Any]:
    """Errors of what belongs to the step itself, beside the mean and what the row says without memory.

    The absolute error is that of the middle quantile, if there is one; the squared error that of the mean output.
    """
    point = point_quantile(model)
    tested = joined(corpus.test, forecasts(model, corpus.test))
    rows = baselines.this_row(corpus.train, [sequence for sequence, _ in tested], len(corpus.symbols))
    means = np.array([output.mean for output in corpus.outputs])
    absolute: dict[str, Any] = {}
    squared: dict[str, Any] = {}
    for (sequence, outputs), row in zip(tested, rows, strict=True):
        mean = outputs["mean"].double().numpy()
        chosen = mean if point is None else outputs["quantiles"][:, point].double().numpy()
        beside = {"this row alone": row, "training mean": np.broadcast_to(means, mean.shape)}
        absolute[sequence.name] = _value_figures(sequence, corpus, {"model": chosen, **beside}, np.abs)
        squared[sequence.name] = _value_figures(sequence, corpus, {"model": mean, **beside}, np.square)
    return {
        "unit": "mean absolute error, in the data's units",
        "point": "mean" if point is None else f"quantile {model.config.quantiles[point]}",
        "by_entity": absolute,
        "squared_error": squared,
        **verdict(absolute),
        **interval(model, corpus),
    }


def _value_figures(sequence: Sequence, corpus: Corpus, said: Mapping[str, Any], error: Any) -> dict[str, Any]:  # noqa: ANN401 (a numpy function)
    """Per target the mean of error(said - wanted) over the scored steps."""
    wanted, scored = sequence.targets.double().numpy(), sequence.weights.numpy() > 0
    return {
        name: {which: float(error(value - wanted)[scored[:, k], k].mean()) for which, value in said.items()}
        | {"steps": int(scored[:, k].sum())}
        for k, name in enumerate(corpus.target_names)
        if scored[:, k].any()
    }


def joined(sequences: list[Sequence], outputs: list[dict[str, Tensor]]) -> list[tuple[Sequence, dict[str, Tensor]]]:
    """Sequences of one name one after another, as one, each with what was said of it."""
    named: dict[str, list[tuple[Sequence, dict[str, Tensor]]]] = {}
    for pair in zip(sequences, outputs, strict=True):
        named.setdefault(pair[0].name, []).append(pair)
    return [
        (
            Sequence(name, *(torch.cat([getattr(one, part) for one, _ in pairs]) for part in PARTS)),
            {output: torch.cat([said[output] for _, said in pairs]) for output in pairs[0][1]},
        )
        for name, pairs in named.items()
    ]


def verdict(by_entity: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, list[str]]:
    """Where a baseline errs less than the model, said in words."""
    beaten = []
    for entity, targets in by_entity.items():
        for target, figures in targets.items():
            known = {k: v for k, v in figures.items() if k not in ("model", "mean output", "steps") and v == v}
            best = min(known, key=known.__getitem__, default=None)
            if best is not None and known[best] <= figures["model"]:
                beaten.append(
                    f"{best} is better for {entity}, {target}: {known[best]:.4g} against {figures['model']:.4g}"
                )
    return {"baseline_wins": beaten} if beaten else {}


def score_labels(model: RecurrentModel, corpus: Corpus) -> dict[str, Any]:
    """Accuracy over all scored steps, with the state carried and reset; by distance where the corpus has probes."""
    if corpus.whole:
        return score_whole(model, corpus)
    (every,) = RESET["classifier"]
    train, test = (torch.cat([s.targets[s.weights > 0] for s in part]).numpy() for part in (corpus.train, corpus.test))
    figures: dict[str, Any] = {
        "unit": "share of steps right",
        "steps": len(test),
        "nats per step": sum(losses(model, corpus.test)) / len(test),
        "model": accuracy(model, corpus.test),
        f"model_reset_every_{every}": accuracy(model, cut(corpus.test, every)),
        "commonest label": baselines.commonest_label(train, test),
    }
    if corpus.probes:
        figures["by_distance"] = {
            distance: {"model": accuracy(model, probe), f"reset_every_{every}": accuracy(model, cut(probe, every))}
            for distance, probe in corpus.probes.items()
        }
    return figures


def score_whole(model: RecurrentModel, corpus: Corpus) -> dict[str, Any]:
    """Accuracy at the end of each sequence, and how answer and confidence grow with the share that was seen."""
    train, test = (np.array([int(s.targets[-1]) for s in part]) for part in (corpus.train, corpus.test))
    chances = label_chances(model, corpus.test)
    seen: dict[str, dict[str, float]] = {}
    for share in SEEN:
        rows = [chance[max(0, math.ceil(share * len(chance)) - 1)] for chance in chances]
        right = [int(row.argmax()) == label for row, label in zip(rows, test, strict=True)]
        confidence = [float(row.max()) for row in rows]
        seen[f"{share:.0%}"] = {"right": sum(right) / len(right), "confidence": sum(confidence) / len(confidence)}
    return {
        "unit": "share of sequences right at their end",
        "sequences": len(test),
        "model": seen["100%"]["right"],
        "commonest label": baselines.commonest_label(train, test),
        "by_share_seen": seen,
    }


def label_chances(model: RecurrentModel, sequences: list[Sequence]) -> list[Tensor]:
    """Probabilities of each sequence, [N, labels]."""
    return [torch.softmax(outputs["logits"], dim=-1) for outputs in forecasts(model, sequences)]


def score_series(model: RecurrentModel, corpus: Corpus) -> dict[str, Any]:
    """Mean absolute error at each horizon, in the data's units, per entity and target, beside three baselines.

    The point forecast is the middle quantile where the model has one (it is what minimises this error), else the
    mean. The state is carried from each entity's first row; only the test part is scored, and of it only values
    that the record holds.
    """
    quantiles = model.config.quantiles
    point = point_quantile(model)
    by_entity: dict[str, Any] = {}
    for sequence, outputs in zip(corpus.test, forecasts(model, corpus.test), strict=True):
        chosen = outputs["mean"] if point is None else outputs["quantiles"][:, point]
        by_entity[sequence.name] = {
            name: _series_figures(
                sequence, corpus, k, chosen[:, k].double().numpy(), outputs["mean"][:, k].double().numpy()
            )
            for k, name in enumerate(corpus.column_names)
        }
    ahead = "one step ahead" if corpus.horizons == (1,) else "at each horizon"
    return {
        "unit": f"mean absolute error {ahead}, in the data's units",
        "point_forecast": "mean" if point is None else f"quantile {quantiles[point]}",
        "by_entity": by_entity,
        **verdict(by_entity),
        **interval(model, corpus),
    }


def interval(model: RecurrentModel, corpus: Corpus) -> dict[str, Any]:
    """The test part's share between the lowest and the highest quantile: as it is, and before calibration."""
    quantiles = model.config.quantiles
    if len(quantiles) < 2:
        return {}
    said: dict[str, Any] = {"nominal": round(quantiles[-1] - quantiles[0], 6), "covered": covered(model, corpus)}
    if isinstance(model.head, ForecastHead) and bool((model.head.stretch != 1).any()):
        raw = copy.deepcopy(model)
        assert isinstance(raw.head, ForecastHead)
        raw.head.stretch.fill_(1.0)
        said["covered_before_calibration"] = covered(raw, corpus)
    return {"interval": said}


def covered(model: RecurrentModel, corpus: Corpus) -> dict[str, dict[str, float]]:
    """Per column and entity the share of scored steps between the outermost quantiles."""
    shares: dict[str, dict[str, float]] = {name: {} for name in corpus.column_names}
    for sequence, outputs in joined(corpus.test, forecasts(model, corpus.test)):
        for name, share in zip(shares, _coverage(sequence, outputs["quantiles"]), strict=True):
            shares[name][sequence.name] = share
    return shares


def _series_figures(sequence: Sequence, corpus: Corpus, k: int, point: Any, mean: Any) -> dict[str, float]:  # noqa: ANN401
    series = sequence.inputs[:, corpus.columns[k]].double().numpy()
    horizon = corpus.horizons[k // len(corpus.targets)]
    wanted = sequence.targets[:, k].double().numpy()
    scored = sequence.weights[:, k].numpy() > 0
    test = np.arange(len(series)) > corpus.warm_up[sequence.name] - horizon
    forecasts = {
        "model": point,
        "mean output": mean,
        "persistence": baselines.persistence(series),
        "same hour yesterday": baselines.same_hour_yesterday(series, horizon=horizon),
        "AR(48) ridge": baselines.ridge(series, wanted, test),
    }
    if not scored.any():
        return {"model": math.nan, "steps": 0}
    errors = {name: float(np.abs(forecast - wanted)[scored].mean()) for name, forecast in forecasts.items()}
    return {**errors, "steps": int(scored.sum())}


def _coverage(sequence: Sequence, quantiles: Tensor) -> list[float]:
    """Per target the share of scored steps between the lowest and the highest quantile."""
    inside = (sequence.targets >= quantiles[:, 0]) & (sequence.targets <= quantiles[:, -1])
    scored = sequence.weights > 0
    return [float(inside[scored[:, k], k].float().mean()) for k in range(inside.shape[1])]


def test_rows(corpus: Corpus) -> Iterator[Row]:
    """Exactly the rows that `score_series` feeds, in its order, to be posted to a service one by one."""
    for sequence in corpus.test:
        for position in range(len(sequence)):
            known = sequence.weights[position] > 0
            expected = torch.where(known, sequence.targets[position], math.nan)
            scored = position >= corpus.warm_up[sequence.name]
            yield Row(sequence.name, position, sequence.inputs[position].tolist(), expected.tolist(), scored)


test_rows.__test__ = False  # type: ignore[attr-defined]  # no test, in spite of its name


@torch.no_grad()
def streamed(
    model: RecurrentModel, sequences: list[Sequence], rows: int = 64
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Every sequence whole from a zero state, the state carried from chunk to chunk."""
    model.eval()
    data = StreamSet(sequences, rows, _reach(model, sequences), whole=True)
    state = model.initial_state(data.rows)
    for batch in data.in_order():
        outputs, state = model(batch.inputs, fresh_state(state, batch.fresh), batch.lengths)
        yield batch, outputs


def _reach(model: RecurrentModel, sequences: list[Sequence]) -> int:
    """Steps of a chunk; a bidirectional model takes each sequence whole."""
    return max(map(len, sequences)) if model.config.bidirectional else STEPS


def fresh_state(state: State, fresh: Tensor) -> State:
    """Zero the rows that begin something new; fresh: [B] bool."""
    keep = ~fresh[None, :, None].to(state[0].device)
    return tuple(torch.where(keep, tensor, torch.zeros_like(tensor)) for tensor in state)


@torch.no_grad()
def validate(model: RecurrentModel, task: Task, corpus: Corpus) -> float:
    """Mean loss on the validation part, state carried; long texts are cut into a few rows for speed."""
    return mean_loss(model, task, corpus.validation, whole=bool(corpus.warm_up) or corpus.whole)


@torch.no_grad()
def mean_loss(model: RecurrentModel, task: Task, sequences: list[Sequence], *, whole: bool = True) -> float:
    """Mean loss on the sequences, state carried; not `whole` they are cut into a few rows."""
    model.eval()
    device = next(model.parameters()).device.type
    whole = whole or model.config.bidirectional
    data = StreamSet(sequences, ROWS, _reach(model, sequences), whole=whole)
    state, total, weight = model.initial_state(data.rows), 0.0, 0.0
    for batch in data.in_order():
        batch = batch.to(device)
        outputs, state = model(batch.inputs, fresh_state(state, batch.fresh), batch.lengths)
        loss, weighed = task.losses(model, outputs, batch)
        total, weight = total + float(loss), weight + float(weighed)
    return total / max(weight, 1.0)


def headline(model: RecurrentModel, corpus: Corpus) -> dict[str, float]:
    """What users judge a model by, on the validation part: bits a symbol, share of steps right, or error a target."""
    if model.config.task == "language-model":
        return {"bits per symbol": validate(model, TASKS["language-model"], corpus) / math.log(2)}
    if model.config.task == "classifier":
        return {"share of steps right": accuracy(model, corpus.validation)}
    if model.config.task == "multi-label":
        return {"nats per step": validate(model, TASKS["multi-label"], corpus)}
    errors = zip(corpus.column_names, absolute_errors(model, corpus.validation), strict=True)
    return {f"mean absolute error of {name}": error for name, error in errors}


def absolute_errors(model: RecurrentModel, sequences: list[Sequence]) -> list[float]:
    """Mean absolute error of the point forecast, a target each, over all scored steps."""
    point = point_quantile(model)
    total = weight = torch.zeros(len(model.config.columns), dtype=torch.float64)
    for sequence, outputs in zip(sequences, forecasts(model, sequences), strict=True):
        chosen = outputs["mean"] if point is None else outputs["quantiles"][:, point]
        scored = sequence.weights > 0
        total = total + torch.where(scored, (chosen - sequence.targets).abs(), 0).double().sum(dim=0)
        weight = weight + scored.sum(dim=0)
    return (total / weight.clamp(min=1)).tolist()


def point_quantile(model: RecurrentModel) -> int | None:
    """Where the middle quantile lies, if the model has one: it is what minimises the mean absolute error."""
    quantiles = model.config.quantiles
    return quantiles.index(0.5) if 0.5 in quantiles else None


def losses(model: RecurrentModel, sequences: list[Sequence]) -> list[float]:
    """Nats of each sequence, summed over its scored steps."""
    totals = [0.0] * len(sequences)
    for batch, outputs in streamed(model, sequences):
        chances = torch.log_softmax(outputs["logits"], dim=-1)
        nats = -chances.gather(-1, batch.targets[..., None])[..., 0] * batch.weights
        for row, (sequence, start, stop) in enumerate(batch.spans):
            totals[sequence] += float(nats[: stop - start, row].double().sum())
    return totals


def accuracy(model: RecurrentModel, sequences: list[Sequence]) -> float:
    """Share of the scored steps whose likeliest label is right."""
    right = scored = 0.0
    for batch, outputs in streamed(model, sequences):
        hits = (outputs["logits"].argmax(dim=-1) == batch.targets) * batch.weights
        right, scored = right + float(hits.sum()), scored + float(batch.weights.sum())
    return right / max(scored, 1.0)


def forecasts(model: RecurrentModel, sequences: list[Sequence]) -> list[dict[str, Tensor]]:
    """Outputs of each sequence, as mean [N, K] and, where the model has them, quantiles [N, Q, K]; or logits."""
    parts: list[list[dict[str, Tensor]]] = [[] for _ in sequences]
    for batch, outputs in streamed(model, sequences):
        for row, (sequence, start, stop) in enumerate(batch.spans):
            if stop > start:
                parts[sequence].append({name: value[: stop - start, row] for name, value in outputs.items()})
    return [{name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]} for pieces in parts]


def cut(sequences: list[Sequence], steps: int) -> list[Sequence]:
    """Each sequence in pieces of so many steps: the state is reset between them."""
    return [
        part(sequence, start, min(start + steps, len(sequence)))
        for sequence in sequences
        for start in range(0, len(sequence), steps)
    ]


SCORERS = {
    "language-model": score_text,
    "classifier": score_labels,
    "multi-label": score_notes,
    "forecaster": score_series,
    "regressor": score_values,
}
