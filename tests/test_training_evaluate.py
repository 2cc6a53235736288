import math
from pathlib import Path

import numpy as np
import pytest
import torch

from training import evaluate, series
from training.config import DataRecipe, recipe_from
from training.data import Corpus, Feature, Sequence, part, warm
from training.job import fit_scales, model_config
from training.model import ForecastHead, ModelConfig, RecurrentModel, ValueEncoder
from training.sample import next_row, roll
from training.tasks import TASKS


def waves(tmp_path: Path) -> Corpus:
    """Two entities of a daily wave with one missing value in the test part."""
    del tmp_path
    hours = np.arange(200.0)
    tables = []
    for i, name in enumerate(("x", "y")):
        values = np.stack([10 + i + 5 * np.sin(hours * 2 * math.pi / 24), hours % 24], axis=1)
        values[180, 0] = math.nan
        tables.append(series.Table(name, values, []))
    features = [Feature("heat", "degC", fill="last"), Feature("hour", "h", period=24.0)]
    return series.values_corpus(tables, features, ["heat"], DataRecipe(), source="made", sha256="0")


def forecaster(corpus: Corpus, *, residual: bool = True) -> RecurrentModel:
    torch.manual_seed(0)
    plain = {"name": "x", "task": "forecaster", "train": {"max_steps": 1}}
    shape = ["model.layers=1", "model.hidden=6", "model.quantiles=[0.1,0.5,0.9]"]
    shape.append(f"model.residual={str(residual).lower()}")
    model = RecurrentModel(model_config(recipe_from(plain, shape), corpus)).eval()
    fit_scales(model, corpus)
    return model


def test_scales_come_from_the_data(tmp_path: Path) -> None:
    corpus = waves(tmp_path)
    model = forecaster(corpus, residual=False)
    assert isinstance(model.encoder, ValueEncoder) and isinstance(model.head, ForecastHead)
    assert model.encoder.mean[0].item() == pytest.approx(corpus.features[0].mean)
    assert model.head.target_mean[0].item() == pytest.approx(10.5, abs=0.5)
    steps = np.diff(np.sin(np.arange(140) * 2 * math.pi / 24) * 5).std()
    head = forecaster(corpus).head
    assert isinstance(head, ForecastHead)
    assert head.target_scale[0].item() == pytest.approx(steps, rel=0.05)


def test_the_rows_to_post_reproduce_the_figures(tmp_path: Path) -> None:
    """Feeding `test_rows` one at a time gives the errors that `score_series` prints."""
    corpus = waves(tmp_path)
    model = forecaster(corpus)
    printed = evaluate.score_series(model, corpus)
    errors: dict[str, list[float]] = {"x": [], "y": []}
    state = model.initial_state(1)
    for row in evaluate.test_rows(corpus):
        if row.position == 0:
            state = model.initial_state(1)
        with torch.no_grad():
            outputs, state = model(torch.tensor([[row.values]]), state)
        if row.scored and not math.isnan(row.expected[0]):
            errors[row.series].append(abs(outputs["quantiles"][0, 0, 1, 0].item() - row.expected[0]))
    for name, found in errors.items():
        figures = printed["by_entity"][name]["heat"]
        assert figures["steps"] == len(found) == 38  # of 39 test steps one value is missing
        assert figures["model"] == pytest.approx(np.mean(found), abs=1e-5)
    assert printed["interval"]["nominal"] == 0.8
    assert printed["point_forecast"] == "quantile 0.5"


def test_an_untrained_residual_mean_scores_as_persistence(tmp_path: Path) -> None:
    corpus = waves(tmp_path)
    model = forecaster(corpus)
    with torch.no_grad():
        model.head.linear.weight.zero_()
        model.head.linear.bias.zero_()
    figures = evaluate.score_series(model, corpus)["by_entity"]["x"]["heat"]
    assert figures["mean output"] == pytest.approx(figures["persistence"], abs=1e-5)
    assert figures["same hour yesterday"] < 1e-5 < figures["persistence"]
    assert figures["AR(48) ridge"] < 0.2


def test_baseline_of_the_forecasters_loss_is_saying_nothing_changes(tmp_path: Path) -> None:
    corpus = waves(tmp_path)
    found = TASKS["forecaster"].baselines(forecaster(corpus), corpus)["persistence"]
    assert 0 < found < 10


def text_corpus() -> Corpus:
    ids = torch.arange(200) % 4
    whole = Sequence("a", ids[:-1], ids[1:], torch.ones(199))
    return Corpus([whole], [whole], [whole], "text", "made", "0", symbols=list("abcd"), start_symbol="a")


def test_text_figures_beside_baselines_and_reset() -> None:
    torch.manual_seed(0)
    corpus = text_corpus()
    model = RecurrentModel(ModelConfig("language-model", "lstm", 1, 8, embedding=4, vocabulary=4)).eval()
    figures = evaluate.score_text(model, corpus)
    outputs, _ = model(corpus.test[0].inputs[:, None], model.initial_state(1))
    nats = torch.nn.functional.cross_entropy(outputs["logits"][:, 0], corpus.test[0].targets).item()
    assert figures["nats"] == pytest.approx(nats, abs=1e-5)
    assert figures["model"] == pytest.approx(nats / math.log(2), abs=1e-5)
    assert figures["unigram"] == pytest.approx(2.0, abs=0.01)
    assert figures["5-gram"] < 0.1
    assert figures["model_reset_every_64"] != figures["model"]


def test_validation_of_a_text_is_about_its_loss() -> None:
    torch.manual_seed(0)
    corpus = text_corpus()
    model = RecurrentModel(ModelConfig("language-model", "gru", 1, 8, embedding=4, vocabulary=4))
    found = evaluate.validate(model, TASKS["language-model"], corpus)
    assert found == pytest.approx(evaluate.losses(model, corpus.validation)[0] / 199, abs=0.1)


def test_accuracy_counts_scored_steps_only() -> None:
    model = RecurrentModel(ModelConfig("classifier", "rnn", 1, 4, embedding=4, vocabulary=2, labels=2)).eval()
    with torch.no_grad():
        model.head.linear.weight.zero_()
        model.head.linear.bias.copy_(torch.tensor([1.0, 0.0]))
    inputs, targets = torch.zeros(10, dtype=torch.int64), torch.tensor([0] * 5 + [1] * 5)
    assert evaluate.accuracy(model, [Sequence("a", inputs, targets, torch.ones(10))]) == 0.5
    assert evaluate.accuracy(model, [Sequence("a", inputs, targets, (targets == 0).float())]) == 1.0


def test_parts_and_warm_up() -> None:
    whole = Sequence("a", torch.arange(10), torch.arange(10), torch.ones(10))
    assert part(whole, 3, 5).inputs.tolist() == [3, 4]
    warmed = warm(whole, 3, 5)
    assert warmed.inputs.tolist() == [0, 1, 2, 3, 4]
    assert warmed.weights.tolist() == [0, 0, 0, 1, 1]
    assert whole.weights.sum() == 10
    assert [len(piece) for piece in evaluate.cut([whole], 4)] == [4, 4, 2]


def test_a_rolled_forecast_feeds_its_own_mean_and_turns_the_clock(tmp_path: Path) -> None:
    corpus = waves(tmp_path)
    model = forecaster(corpus)
    row, drift = torch.tensor([3.0, 23.0]), torch.tensor([0.5, -23.0])
    assert next_row(model, row, drift, torch.tensor([4.0])).tolist() == [4.0, 0.0]
    history = corpus.test[0].inputs[:50]
    rolled = roll(model, history, 3)
    assert rolled.shape == (3, 1)
    following = torch.stack([rolled[0, 0], torch.tensor(50 % 24.0)])
    again = roll(model, torch.cat([history, following[None]]), 2)
    torch.testing.assert_close(again, rolled[1:], atol=1e-5, rtol=0)
