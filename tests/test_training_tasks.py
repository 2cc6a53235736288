"""What the tasks promise: no look ahead, calibrated quantiles, a backtest that equals feeding, weights taken over."""

import gzip
import json
import math
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from service import bytepairs
from training import baselines, data_text, events, labelled, series, translation
from training.__main__ import app
from training.backtest import forecasts_from
from training.calibrate import calibrate, stretch_of
from training.checkpoint import load_model
from training.config import DataRecipe, read_recipe, recipe_from, recipe_names
from training.data import DataError, Feature, fetch_wheel
from training.evaluate import covered, verdict
from training.job import fit_scales, model_config
from training.model import ForecastHead, ModelConfig, RecurrentModel
from training.sample import roll
from training.series import Table, values_corpus

SMALL = "--set model.hidden=8 --set model.embedding=4 --set train.max_steps=6 --set train.evaluate_steps=3 --quiet"
SMALL += " --set train.precision=fp32 --set train.batch=4 --set sample.length=5"


def call(*arguments: str | Path) -> Result:
    torch.set_num_threads(1)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def last_json(result: Result) -> dict[str, object]:
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout.strip().splitlines()[-1]))


def counting(rows: int, data: DataRecipe) -> series.Corpus:
    """A series that counts, so that a target tells where it lies."""
    values = np.stack([np.arange(rows, dtype=np.float64), np.arange(rows) * 10.0], axis=1)
    features = [Feature("n"), Feature("tens")]
    return values_corpus([Table("one", values, [])], features, list(data.targets), data, source="", sha256="")


# ------------------------------------------------------------------ horizons


def test_targets_lie_so_many_steps_ahead_and_in_the_same_part() -> None:
    corpus = counting(200, DataRecipe(targets=("n", "tens"), horizons=(1, 5)))
    ends = {"train": 140, "validation": 160, "test": 200}
    for part, end in ends.items():
        (sequence,) = getattr(corpus, part)
        scored = sequence.weights > 0
        now = sequence.inputs[:, :1]
        ahead = torch.tensor([[1, 1, 5, 5]]) + now
        wanted = ahead * torch.tensor([[1, 10, 1, 10]])
        assert torch.equal(sequence.targets[scored], wanted[scored])
        assert int(ahead[scored].max()) <= end  # the step behind a part's last was always its target
    assert corpus.column_names == ["n 1 ahead", "tens 1 ahead", "n 5 ahead", "tens 5 ahead"]


def test_scales_are_of_each_horizon_and_of_known_targets_alone() -> None:
    corpus = counting(200, DataRecipe(targets=("n",), horizons=(1, 30)))
    recipe = recipe_from({"name": "x", **read_recipe("series"), "data": {"targets": ["n"]}})
    model = RecurrentModel(model_config(recipe, corpus))
    fit_scales(model, corpus)
    assert isinstance(model.head, ForecastHead)
    # residual: every known step moves by 1, or by 30
    assert model.head.target_scale.tolist() == pytest.approx([1e-6, 1e-6])
    assert model.head.target_mean.tolist() == pytest.approx([70.5, 30 + 109 / 2], abs=1)


def test_the_same_hour_is_a_whole_day_before() -> None:
    values = np.arange(100.0)
    for horizon in (1, 6, 24, 30):
        forecast = baselines.same_hour_yesterday(values, horizon=horizon)
        known = np.isfinite(forecast)
        apart = (values + horizon - forecast)[known]
        assert (apart % 24 == 0).all() and (apart >= horizon).all()
        assert apart.max() < horizon + 24


# ------------------------------------------------------------------ calibration


def noisy(rows: int, spread: float, data: DataRecipe) -> series.Corpus:
    rng = np.random.default_rng(3)
    values = rng.normal(0, spread, (rows, 1))
    return values_corpus([Table("one", values, [])], [Feature("x")], ["x"], data, source="", sha256="")


@pytest.mark.parametrize("calibration", [0.0, 0.2])
@pytest.mark.parametrize("quantiles", [(0.1, 0.5, 0.9), (0.05, 0.95), (0.1, 0.3, 0.5, 0.7, 0.9)])
def test_calibrated_quantiles_cover_what_they_say(quantiles: tuple[float, ...], calibration: float) -> None:
    torch.manual_seed(0)
    corpus = noisy(6000, 4.0, DataRecipe(targets=("x",), calibration=calibration))
    model = RecurrentModel(
        ModelConfig("forecaster", "gru", 1, 4, periods=(0.0,), targets=(0,), quantiles=quantiles)
    ).eval()
    nominal = quantiles[-1] - quantiles[0]
    assert abs(covered(model, corpus)["x"]["one"] - nominal) > 0.1  # it says too little
    assert calibrate(model, corpus) > 500
    assert covered(model, corpus)["x"]["one"] == pytest.approx(nominal, abs=0.04)
    outputs, _ = model(corpus.test[0].inputs[:, None], model.initial_state(1))
    assert bool((outputs["quantiles"].diff(dim=2) >= 0).all())


def test_too_few_steps_calibrate_nothing() -> None:
    corpus = noisy(100, 1.0, DataRecipe(targets=("x",)))
    config = ModelConfig("forecaster", "gru", 1, 4, periods=(0.0,), targets=(0,), quantiles=(0.1, 0.9))
    model = RecurrentModel(config).eval()
    assert calibrate(model, corpus) == 0
    assert isinstance(model.head, ForecastHead) and bool((model.head.stretch == 1).all())


def test_stretch_is_the_conformal_quantile() -> None:
    ratios = torch.arange(1.0, 20.0)  # 19 of them: the rank of level q is exactly 20 q
    assert stretch_of(ratios, 0.9, below=False) == 18.0
    assert stretch_of(ratios, 0.1, below=True) == 18.0
    assert stretch_of(-ratios, 0.9, below=False) == 0.0


def test_held_out_blocks_are_not_learnt_and_not_lost() -> None:
    data = DataRecipe(targets=("n",), horizons=(1, 4), calibration=0.2)
    corpus, whole = counting(1000, data), counting(1000, DataRecipe(targets=("n",), horizons=(1, 4)))
    (learnt,), (kept,), (all_of_it,) = corpus.train, corpus.calibration, whole.train
    assert not bool((learnt.weights * kept.weights).any())
    assert float(kept.weights[:, 0].sum()) == pytest.approx(0.2 * 700, abs=12)
    # a step between: its target lies in a block and it does not, or the other way round
    between = all_of_it.weights - learnt.weights - kept.weights
    assert float(between.min()) >= 0 and float(between.sum()) <= 4 * 2 * (1 + 4)
    blocks = learnt.targets[:, 0][kept.weights[:, 0] > 0]
    assert not set(blocks.tolist()) & set(learnt.targets[:, 0][learnt.weights[:, 0] > 0].tolist())


def test_each_step_is_held_out_by_one_fold() -> None:
    data = DataRecipe(targets=("n",), horizons=(1, 4), folds=3)
    whole = counting(1000, data)
    assert not whole.calibration
    times = torch.zeros_like(whole.train[0].weights)
    for fold in (1, 2, 3):
        corpus = counting(1000, replace(data, fold=fold))
        (learnt,), (kept,) = corpus.train, corpus.calibration
        assert not bool((learnt.weights * kept.weights).any())
        assert float(kept.weights[:, 0].sum()) == pytest.approx(700 / 3, abs=2)
        times += kept.weights
    assert float(times.max()) == 1
    assert float((whole.train[0].weights - times).sum()) <= 3 * (1 + 4)  # a step in one fold, its target in the next


def test_quantiles_are_calibrated_on_what_further_models_lacked(tmp_path: Path, sensors: Path) -> None:
    run = tmp_path / "run"
    options = ["--time", "time", "--series", "pump", "--target", "heat", "--out", run, *SMALL.split()]
    options += ["--set", "data.calibration=0.0", "--set", "data.folds=2"]
    first = last_json(call("train", "--data", sensors, *options))
    _, meta = load_model(run)
    assert meta["calibration"] == {"steps": pytest.approx(2 * (336 + 48), abs=20), "folds": 2}
    lacks = [load_model(run / "folds" / fold)[1]["recipe"]["data"]["fold"] for fold in ("1", "2")]
    assert lacks == [1, 2]
    again = last_json(call("train", "--data", sensors, *options, "--resume"))
    assert again == first
    for wrong in ("data.folds=1", "data.calibration=0.1", "data.split=series", "data.fold=3"):
        refused = call("train", "--data", sensors, *options, "--resume", "--set", wrong)
        assert refused.exit_code == 1 and "data.fold" in refused.stderr
    options[options.index(run)] = tmp_path / "next"
    refused = call("train", "--data", sensors, *options, "--init-from", run)
    assert refused.exit_code == 1 and "set data.folds=0" in refused.stderr


# ------------------------------------------------------------------ backtest


def test_a_backtest_is_what_rolling_from_every_step_gives() -> None:
    torch.manual_seed(1)
    config = ModelConfig("forecaster", "lstm", 2, 5, periods=(0.0, 24.0, 0.0), targets=(0,))
    model = RecurrentModel(config).eval()
    inputs = torch.randn(40, 3)
    inputs[:, 1] = torch.arange(40) % 24
    for horizon in (1, 2, 7):
        said = forecasts_from(model, inputs, horizon)
        alone = torch.stack([roll(model, inputs[: p + 1], horizon)[-1] for p in range(40)])
        torch.testing.assert_close(said, alone, atol=1e-5, rtol=1e-5)


@pytest.fixture
def sensors(tmp_path: Path) -> Path:
    rng = random.Random(0)
    lines = [
        f"2024-01-{1 + i // 24:02}T{i % 24:02}:00,{pump},{10 + math.sin(i / 4) + rng.gauss(0, 0.1):.4f},{i % 24}"
        for pump in "ab"
        for i in range(480)
    ]
    path = tmp_path / "sensors.csv"
    path.write_text("time,pump,heat,hour\n" + "\n".join(lines) + "\n")
    return path


def test_backtest_of_the_next_step_is_the_evaluation(tmp_path: Path, sensors: Path) -> None:
    run = tmp_path / "run"
    columns = ("--time", "time", "--series", "pump", "--target", "heat")
    printed = last_json(call("train", "--data", sensors, *columns, "--out", run, *SMALL.split()))
    found = last_json(call("backtest", run, "--horizon", 1))
    for entity, figures in found["by_entity"].items():  # type: ignore[attr-defined]
        expected = printed["by_entity"][entity]["heat"]  # type: ignore[index]
        for name in ("model", "persistence", "same hour yesterday", "steps"):
            assert figures["heat"][name] == pytest.approx(expected[name], rel=1e-5)
    rolled = last_json(call("backtest", run, "--horizon", 6, "--data", sensors))
    assert rolled["how"] == "rolled on its own means"
    assert rolled["by_entity"]["a"]["heat"]["steps"] == 480 - 6  # type: ignore[index]
    other = tmp_path / "other.csv"
    other.write_text(sensors.read_text().replace("heat", "cold", 1))
    refused = call("backtest", run, "--data", other)
    assert refused.exit_code == 1 and "--target heat" in refused.stderr


def test_a_baseline_that_wins_is_named() -> None:
    figures = {
        "a": {
            "x": {"model": 2.0, "persistence": 1.0, "ridge": math.nan, "steps": 3},
            "y": {"model": 1.0, "persistence": 2.0},
        }
    }
    assert verdict(figures) == {"baseline_wins": ["persistence is better for a, x: 1 against 2"]}


# ------------------------------------------------------------------ fine-tuning


def test_init_from_takes_weights_and_vocabulary_over(tmp_path: Path) -> None:
    book, letter = tmp_path / "book.txt", tmp_path / "letter.txt"
    book.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    letter.write_text("the lazy fox ümps over dogs. " * 60)
    first, second = tmp_path / "first", tmp_path / "second"
    assert call("train", "--data", book, "--out", first, *SMALL.split()).exit_code == 0
    options = [
        *SMALL.replace("hidden=8", "hidden=16").replace("--quiet", "").split(),
        "--set",
        "train.learning_rate=0.0",
        "--log-json",
        "-",
    ]
    done = call("train", "--data", letter, "--out", second, "--init-from", first, *options)
    assert done.exit_code == 0, done.output
    assert "starts from first" in done.stdout and "'ü' x" in done.stdout
    (old, old_meta), (new, meta) = load_model(first), load_model(second)
    assert meta["symbols"] == old_meta["symbols"] and new.config.hidden == 8
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())


def test_init_from_keeps_the_scales_and_refuses_other_columns(tmp_path: Path, sensors: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    columns = ("--time", "time", "--series", "pump", "--target", "heat")
    assert call("train", "--data", sensors, *columns, "--out", first, *SMALL.split()).exit_code == 0
    warmer = tmp_path / "warmer.csv"
    head, *lines = sensors.read_text().splitlines()
    warmer.write_text("\n".join([head, *(line.replace(",1", ",2", 1) for line in lines)]) + "\n")
    done = call("train", "--data", warmer, *columns, "--out", second, "--init-from", first, *SMALL.split())
    assert done.exit_code == 0, done.output
    assert load_model(second)[1]["features"] == load_model(first)[1]["features"]
    refused = call(
        "train",
        "--data",
        warmer,
        "--target",
        "hour",
        "--time",
        "time",
        "--series",
        "pump",
        "--out",
        tmp_path / "third",
        "--init-from",
        first,
        *SMALL.split(),
    )
    assert refused.exit_code == 1 and "targets differs" in refused.stderr and "Traceback" not in refused.stderr


# ------------------------------------------------------------------ corpora


def test_numbers_in_words() -> None:
    known = {
        0: ("zero", "null"),
        21: ("twenty-one", "einundzwanzig"),
        117: ("one hundred and seventeen", "einhundertsiebzehn"),
    }
    known |= {
        380: ("three hundred and eighty", "dreihundertachtzig"),
        5999: ("five thousand nine hundred and ninety-nine", "fünftausendneunhundertneunundneunzig"),
    }
    assert {n: (translation.english(n), translation.german(n)) for n in known} == known
    assert (
        len({translation.german(n) for n in range(10_000)})
        == len({translation.english(n) for n in range(10_000)})
        == 10_000
    )


def test_pairs_are_scored_behind_the_tab_and_never_repeat() -> None:
    corpus = translation.reversals(300, DataRecipe())
    parts = [{sequence.name for sequence in part} for part in (corpus.train, corpus.validation, corpus.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    for sequence in corpus.train[:20]:
        scored = [corpus.symbols[i] for i in sequence.targets[sequence.weights > 0].tolist()]
        assert "".join(scored) == sequence.name[::-1] + "\n"


def test_ts_files_and_wheels_are_read(tmp_path: Path) -> None:
    line = "1.0,2.0,3.0:4.0,5.0,6.0:{}"
    train = "@problemName x\n@data\n" + "\n".join(line.format(1 + i % 2) for i in range(20))
    name = "aeon-1.6.0-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / name, "w") as wheel:
        wheel.writestr("aeon/JapaneseVowels_TRAIN.ts", train)
        wheel.writestr("aeon/JapaneseVowels_TEST.ts", train)
    with pytest.raises(DataError, match="delete it and run again"):
        fetch_wheel("aeon", "1.6.0", "py3-none-any", "0" * 64, tmp_path)
    (values, label), *_ = labelled.parse_ts(train)
    assert values.tolist() == [[1, 4], [2, 5], [3, 6]] and label == "1"
    assert labelled.weights_of(4, 0).tolist() == [1, 1, 1, 1]
    assert labelled.weights_of(4, 2).tolist() == [1 / 16, 1 / 4, 9 / 16, 1]


def test_chorales_ask_for_the_next_notes(tmp_path: Path) -> None:
    path = tmp_path / "jsb.json"
    path.write_text(json.dumps({name: [[[60, 64], [62], []]] for name in ("train", "valid", "test")}))
    corpus = labelled.chorales(path)
    (piece,) = corpus.test
    assert piece.inputs.nonzero().tolist() == [[0, 39], [0, 43], [1, 41]]
    assert piece.targets.nonzero().tolist() == [[0, 41]]
    assert corpus.labels[39] == "note_60"
    assert not corpus.variants


def test_chorales_are_learnt_in_other_keys_too(tmp_path: Path) -> None:
    path = tmp_path / "jsb.json"
    path.write_text(json.dumps({name: [[[21, 64], [108]]] for name in ("train", "valid", "test")}))
    corpus = labelled.chorales(path, transpose=2)
    assert [one.name for one in corpus.variants] == ["train-2-0", "train-1-0", "train+1-0", "train+2-0"]
    notes = [(one.inputs.nonzero()[:, 1].tolist(), one.targets.nonzero()[:, 1].tolist()) for one in corpus.variants]
    assert notes == [([41], [85]), ([42], [86]), ([1, 44], []), ([2, 45], [])]  # what leaves the piano is left out
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [1, 1, 1]


def test_a_catalogue_of_earthquakes_as_csv_or_geojson(tmp_path: Path) -> None:
    table, document = tmp_path / "q.csv", tmp_path / "q.json"
    quakes = [(i * 60_000, i % 7 / 2, i % 5 * 10.0, i % 90, i % 180) for i in range(60)]
    features = [
        {"properties": {"time": t, "mag": m}, "geometry": {"coordinates": [x, y, d]}}
        for t, m, d, y, x in reversed(quakes)
    ]
    document.write_text(json.dumps({"features": features}))
    rows = [f"1970-01-01T00:{t // 60_000:02}:00.000Z,{y},{x},{d},{m}" for t, m, d, y, x in quakes]
    table.write_text("time,latitude,longitude,depth,mag\n" + "\n".join(rows) + "\n")
    from_table, from_document = (events.earthquakes(path, DataRecipe()) for path in (table, document))
    assert torch.equal(from_table.train[0].inputs, from_document.train[0].inputs)
    assert from_table.target_names == ["magnitude", "log_gap"]
    assert from_table.train[0].inputs[1:, 1].tolist() == pytest.approx([math.log10(60)] * 41)


def test_parquet_is_read_as_csv_is(tmp_path: Path, sensors: Path) -> None:
    csv = pytest.importorskip("pyarrow.csv")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "sensors.parquet"
    parquet.write_table(csv.read_csv(sensors), path)
    data = DataRecipe(time="time", series="pump", targets=("heat",))
    ours, theirs = (series.csv_file(one, data) for one in (path, sensors))
    assert torch.equal(ours.train[0].inputs, theirs.train[0].inputs)
    assert [f.name for f in ours.features] == [f.name for f in theirs.features]


def test_whole_series_are_dealt_once(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,x,kind\n" + "".join(f"s{i},{i},{'ab'[i % 2]}\n" for i in range(20) for _ in range(3)))
    corpus = series.csv_file(path, DataRecipe(series="id", label="kind", split="series"), "classifier")
    names = [sequence.name for part in (corpus.train, corpus.validation, corpus.test) for sequence in part]
    assert sorted(names) == sorted({f"s{i}" for i in range(20)}) and len(corpus.test) == 4


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_one(name: str) -> None:
    assert recipe_from(read_recipe(name)).name == name


def test_the_stocks_recipe_reads_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "".join(
        f"{t},2000-{1 + i // 28:02}-{1 + i % 28:02},1,1,1,{i},1,1\n" for t in ("IBM", "FB") for i in range(80)
    )
    content = gzip.compress(f"Ticker,Date,Open,High,Low,Close,Volume,Adj Close\n{rows}".encode())
    monkeypatch.setattr(events, "fetch_wheel", lambda *_: tmp_path)
    monkeypatch.setattr(events, "read_member", lambda *_: content)
    corpus = events.stocks(tmp_path, DataRecipe())
    assert corpus.target_names == ["Close"] and [sequence.name for sequence in corpus.test] == ["IBM", "FB"]


def test_the_bible_recipe_holds_whole_books_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    books = ("Genesis", "Ruth", "Esther", "Ecclesiastes", "John", "Romans", "Hebrews", "Jude")
    verses = [
        {"book": book, "chapter": chapter, "verse": verse, "text": f"{book[0]}{chapter}é{verse}."}
        for book in books
        for chapter in (1, 2)
        for verse in (1, 2)
    ]
    content = "\n".join(map(json.dumps, verses)).encode()
    monkeypatch.setattr(data_text, "fetch_archive", lambda *_: tmp_path)
    monkeypatch.setattr(data_text, "read_member", lambda *_: content)
    corpus = data_text.bible(tmp_path, data_text.Coding("bytes"))
    assert [one.name for one in corpus.test] == ["Ruth", "Ecclesiastes", "John", "Hebrews"]
    assert [one.name for one in corpus.validation] == ["Esther", "Romans"]
    learnt = bytes(bytepairs.to_bytes(corpus.symbols[i])[0] for i in corpus.train[0].targets.tolist()).decode()
    assert learnt == "Genesis\n\nG1é1.\nG1é2.\n\nG2é1.\nG2é2.\n\n\nJude\n\nJ1é1.\nJ1é2.\n\nJ2é1.\nJ2é2.\n\n\n"
