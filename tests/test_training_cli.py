import json
import random
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from training.__main__ import app

SMALL = ["--set", "model.hidden=8", "--set", "model.embedding=4", "--set", "train.max_steps=6"]
SMALL += ["--set", "train.evaluate_steps=3", "--set", "train.precision=fp32", "--set", "sample.length=20"]


def call(*arguments: str | Path) -> Result:
    torch.set_num_threads(1)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return path


@pytest.fixture
def sensors(tmp_path: Path) -> Path:
    rng = random.Random(0)
    rows = [
        f"2024-01-{1 + i // 24:02}T{i % 24:02}:00,{sensor},{i % 24 + rng.random():.3f},{rng.random():.3f},"
        + ("day" if 6 < i % 24 < 20 else "night")
        for sensor in "ab"
        for i in range(400)
    ]
    path = tmp_path / "sensors.csv"
    path.write_text("time,sensor,heat,noise,phase\n" + "\n".join(rows))
    return path


def last_json(result: Result) -> dict[str, object]:
    found: dict[str, object] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def test_text_from_file_to_sample(tmp_path: Path, book: Path) -> None:
    run = tmp_path / "run"
    trained = call("train", "--data", book, "--out", run, *SMALL)
    assert trained.exit_code == 0, trained.output
    assert "unigram" in trained.stdout and "5-gram" in trained.stdout and "ETA" in trained.stdout
    assert last_json(trained) == json.loads((run / "metrics.json").read_text())
    again = call("train", "--data", book, "--out", run, "--resume", *SMALL, "--set", "train.max_steps=9", "--quiet")
    assert again.exit_code == 0, again.output
    evaluated = call("evaluate", run)
    assert evaluated.exit_code == 0
    assert 0 < last_json(evaluated)["model"] < 10  # type: ignore[operator]
    sampled = call("sample", run, "--prompt", "the ", "--length", 30, "--temperature", 0.5)
    assert sampled.stdout.startswith("the ") and len(sampled.stdout.rstrip("\n")) <= 34
    assert sampled.stdout == call("sample", run, "--prompt", "the ", "--length", 30, "--temperature", 0.5).stdout
    refused = call("sample", run, "--prompt", "€")
    assert refused.exit_code == 1 and "never saw '€'" in refused.stderr


def test_a_forecaster_from_csv(tmp_path: Path, sensors: Path) -> None:
    run = tmp_path / "run"
    columns = ["--time", "time", "--series", "sensor", "--target", "heat"]
    trained = call("train", "--data", sensors, *columns, "--out", run, "--log-json", "-", *SMALL)
    assert trained.exit_code == 0, trained.output
    lines = [json.loads(line) for line in trained.stdout.splitlines()]
    assert {"start", "step", "evaluation", "sample", "end"} <= {line.get("event") for line in lines}
    figures = lines[-1]["by_entity"]["a"]["heat"]
    assert {"model", "persistence", "same hour yesterday", "AR(48) ridge"} <= figures.keys()
    assert (run / "plots" / "forecast.png").exists()
    sampled = call("sample", run, "--length", 5)
    assert sampled.exit_code == 0 and "heat" in sampled.stdout


def test_a_classifier_from_csv(tmp_path: Path, sensors: Path) -> None:
    run = tmp_path / "run"
    trained = call("train", "--data", sensors, "--series", "sensor", "--label", "phase", "--out", run, *SMALL)
    assert trained.exit_code == 0, trained.output
    assert 0 <= last_json(trained)["model"] <= 1  # type: ignore[operator]
    assert "step/" in call("sample", run).stdout


def test_who_from_its_recipe(tmp_path: Path) -> None:
    few = ("--set", "data.sequences=20")
    trained = call("train", "--recipe", "who", "--out", tmp_path / "run", *few, *SMALL, "--quiet")
    assert trained.exit_code == 0, trained.output
    assert last_json(trained)["by_distance"].keys() == {"5", "10", "20", "50", "100"}  # type: ignore[attr-defined]


def test_export_of_a_run(tmp_path: Path, book: Path) -> None:
    run, models = tmp_path / "run", tmp_path / "models"
    assert call("train", "--data", book, "--out", run, "--quiet", *SMALL).exit_code == 0
    exported = call("export", run, "--name", "fox", "--models", models)
    assert exported.exit_code == 0, exported.output
    assert (models / "fox" / "1" / "manifest.json").exists()
    taken = call("export", run, "--name", "fox", "--models", models, "--version", 1)
    assert taken.exit_code == 1 and "error:" in taken.stderr


def test_the_example_of_a_model_card_is_one_that_the_model_takes(tmp_path: Path, book: Path) -> None:
    run, models = tmp_path / "run", tmp_path / "models"
    assert call("train", "--data", book, "--out", run, "--quiet", *SMALL).exit_code == 0
    refused = call("export", run, "--name", "fox", "--models", models, "--example", "§")
    assert refused.exit_code == 1 and "'§'" in refused.stderr and not models.exists()
    assert call("export", run, "--name", "fox", "--models", models, "--example", "the").exit_code == 0
    assert '"inputs": "the"' in (models / "fox" / "1" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train"], "--recipe"),
        (["train", "--recipe", "shakespaere"], "shakespeare"),
        (["train", "--recipe", "text"], "--data"),
        (["train", "--data", "absent.txt"], "absent.txt"),
        (["train", "--recipe", "who", "--set", "model.hiden=3"], "model.hidden"),
        (["train", "--recipe", "who", "--set", "model.cell=lstn"], "rnn, rnn-relu, leaky, gru, lstm"),
        (["evaluate", "absent"], "train first"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_tiny_corpus_names_the_flag_to_lower(tmp_path: Path) -> None:
    path = tmp_path / "tiny.txt"
    path.write_text("hello world, hello")
    result = call("train", "--data", path, "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 1 and "data.validation" in result.stderr
    path.write_text("hello world " * 5)
    result = call("train", "--data", path, "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 1 and "train.batch" in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_recipes_are_listed() -> None:
    assert {"shakespeare", "nyc-weather", "temperature", "who"} <= set(call("recipes").stdout.split())
