"""The shipped models: whole, small, and as good as their cards say they must be."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import shipped

from service.bundle import load
from training.config import read_recipe, recipe_from

MODELS = Path(__file__).parents[1] / "models"


def newest(name: str) -> Path:
    return max((MODELS / name).iterdir(), key=lambda path: int(path.name))


def metrics(name: str) -> dict[str, Any]:
    return dict(json.loads((newest(name) / "manifest.json").read_text(encoding="utf-8"))["metrics"])


@pytest.mark.parametrize("name", shipped())
def test_the_bundle_is_whole_and_says_how_it_was_made(name: str) -> None:
    manifest = load(newest(name)).manifest
    recipe = {"tinyshakespeare": "text"}.get(name, name)  # its settings became a recipe afterwards
    assert manifest.training["command"].startswith("python -m training train --recipe " + recipe)
    assert {"seed", "data", "steps", "minutes"} <= manifest.training.keys()
    assert manifest.checks and manifest.metrics


def test_together_they_are_at_most_30_mb() -> None:
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= 30 * 2**20


@pytest.mark.parametrize("name", [name for name in shipped() if "int8" in metrics(name)])
def test_int8_lost_less_than_its_bound(name: str) -> None:
    found = metrics(name)["int8"]
    assert load(newest(name)).manifest.quantization == "int8"
    assert found["lost_percent"] <= found["bound_percent"] <= 0.5


def test_who_is_small_and_right_at_any_distance() -> None:
    assert (newest("who") / "model.onnx").stat().st_size < 2**20
    found = metrics("who")
    assert found["model"] >= 0.99
    for distance, share in found["by_distance"].items():
        assert share["model"] >= 0.99, distance
        assert share["reset_every_16"] < 0.5, distance


def test_shakespeare_beats_what_counts_characters() -> None:
    found = metrics("shakespeare")
    assert found["model"] <= 2.10
    assert found["model"] < found["5-gram"] < found["unigram"]
    assert found["model"] < found["model_reset_every_64"]


def test_tinyshakespeare_is_better_than_what_it_is_compared_with() -> None:
    """Val loss 1.4697 nats in windows of 256: https://github.com/karpathy/nanoGPT, its 10.7 M-parameter transformer."""
    found = metrics("tinyshakespeare")
    assert found["symbols"] == 111_540
    assert found["model"] < found["model_reset_every_256"] <= 1.4697 / math.log(2)


def test_the_recipe_of_tinyshakespeare_is_how_the_model_was_made() -> None:
    said = load(newest("tinyshakespeare")).manifest.training["command"]
    made = recipe_from(read_recipe("text"), [*re.findall(r"--set (\S+)", said), "train.max_minutes=0"])
    recipe = recipe_from(read_recipe("tinyshakespeare"))
    assert (made.task, made.data, made.model, made.train) == (recipe.task, recipe.data, recipe.model, recipe.train)


def test_bible_reads_any_byte_and_beats_what_counts_them() -> None:
    found, manifest = metrics("bible"), load(newest("bible")).manifest
    assert len(manifest.symbols) == 256 and manifest.splitter is not None and manifest.splitter.kind == "bytes"
    assert found["model"] < found["5-gram"] < found["unigram"]
    assert found["model"] < found["model_reset_every_64"]


def test_japanese_vowels_knows_the_speaker_better_the_more_it_heard() -> None:
    found = metrics("japanese-vowels")
    shares = [seen["right"] for seen in found["by_share_seen"].values()]
    assert shares == sorted(shares) and shares[-1] == found["model"] >= 0.97


@pytest.mark.parametrize("name", ["nyc-weather", "temperature"])
def test_forecasters_beat_persistence_and_print_their_coverage(name: str) -> None:
    found = metrics(name)
    for airport, targets in found["by_entity"].items():
        assert targets["temperature"]["model"] < targets["temperature"]["persistence"]
        assert 0.6 < found["interval"]["covered"]["temperature"][airport] < 0.95
