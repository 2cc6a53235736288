"""Files that can not be used: one line that names the remedy, and no traceback."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from training import data_text, series
from training.__main__ import app
from training.batches import StreamSet

SMALL = "--set model.hidden=8 --set model.embedding=4 --set train.max_steps=4 --set train.evaluate_steps=2 --quiet"
SMALL += " --set train.precision=fp32 --set train.batch=4 --set sample.length=5"
ROOT = Path(__file__).parents[1]


def train(tmp_path: Path, data: Path, *options: str) -> Result:
    torch.set_num_threads(1)
    return CliRunner().invoke(
        app, ["train", "--data", str(data), "--out", str(tmp_path / "run"), *options, *SMALL.split()]
    )


def refused(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def rows(count: int = 60, header: str = "time,heat", row: Callable[[int], str] | None = None) -> str:
    made = row or (lambda i: f"2024-01-{1 + i // 24:02}T{i % 24:02}:00,{i % 24}")
    return header + "\n" + "".join(f"{made(i)}\n" for i in range(count))


FILES = {
    "empty text": ("a.txt", "", [], "is empty: give a text"),
    "one line of text": ("a.txt", "hello\n", [], "too short to split: give a longer text"),
    "empty csv": ("a.csv", "", ["--target", "heat"], "is empty: give a CSV with a header"),
    "one line of csv": ("a.csv", "time,heat\n", ["--target", "heat"], "no rows under its header"),
    "few rows": ("a.csv", rows(2), ["--target", "heat"], "too few to split"),
    "wrong column": ("a.csv", rows(), ["--time", "tine", "--target", "heat"], "did you mean 'time'?"),
    "wrong target": ("a.csv", rows(), ["--target", "cold"], "there are heat"),
    "words in a target": (
        "a.csv",
        rows(row=lambda i: f"x,{'warm' if i == 7 else i}"),
        ["--target", "heat"],
        "row 9 holds 'warm'",
    ),
    "all missing": (
        "a.csv",
        rows(row=lambda i: f"x,{'NaN' if i < 50 else 1}"),
        ["--target", "heat"],
        "leave the column",
    ),
    "the same time twice": (
        "a.csv",
        rows(row=lambda i: f"2024-01-01T{i // 2 % 24:02}:{i % 2 * 0:02},{i}", count=40),
        ["--time", "time", "--target", "heat"],
        "two rows at time 2024-01-01T00:00:00+00:00: name the column of entities with --series",
    ),
    "no times": ("a.csv", rows(row=lambda i: f"soon,{i}"), ["--time", "time", "--target", "heat"], "ISO 8601"),
    "ragged": ("a.csv", rows() + "2025-01-01T00:00\n", ["--target", "heat"], "row 62 has not the 2 columns"),
    "latin-1": ("a.csv", b"time,heat\n1,\xe4\n", ["--target", "heat"], "not UTF-8"),
    "no parquet": ("a.parquet", "PAR", ["--target", "heat"], "no Parquet file"),
    "one series to deal": ("a.csv", rows(), ["--recipe", "sequences", "--label", "time"], "1 series are too few"),
    "no pairs": ("a.tsv", "one line\n", [], "line 1 is no pair"),
    "no pairs at all": ("a.tsv", "", [], "give a pair a line"),
    "not 0 or 1": (
        "a.csv",
        rows(header="heat,wet", row=lambda i: f"{i},2"),
        ["--recipe", "multi-label", "--target", "wet"],
        "0 and 1",
    ),
    "no chorales": ("a.json", '{"train": []}', ["--recipe", "jsb"], "no file of chorales"),
    "no earthquakes": ("a.json", "[]", ["--recipe", "earthquakes"], "no GeoJSON of the USGS"),
    "beyond the end": ("a.csv", rows(), ["--target", "heat", "--horizon", "300"], "lower data.horizons"),
    "horizons of labels": ("a.csv", rows(), ["--label", "heat", "--horizon", "3"], "horizons are for forecasters"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_can_not_be_used(case: str, tmp_path: Path) -> None:
    name, content, options, said = FILES[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refused(train(tmp_path, path, *options))
    assert not (tmp_path / "run").exists()


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "there is no file" in refused(train(tmp_path, tmp_path / "none.csv", "--target", "heat"))
    assert "holds no recordings" in refused(train(tmp_path, tmp_path, "--target", "heat"))


def test_unsorted_rows_and_rows_of_nothing_are_mended_and_told(tmp_path: Path) -> None:
    lines = rows(
        200, row=lambda i: f"2024-01-{1 + i // 24:02}T{i % 24:02}:00,{'' if i in (20, 21) else i % 24}"
    ).splitlines()
    path = tmp_path / "a.csv"
    path.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    corpus = series.csv_file(path, series.DataRecipe(time="time", targets=("heat",)))
    assert any("not in the order of time and were sorted" in note for note in corpus.notes)
    assert any("filled with the last value" in note and "heat 2" in note for note in corpus.notes)
    train_part = corpus.train[0]
    assert train_part.inputs[:24, 0].tolist() == [*map(float, range(20)), 19.0, 19.0, 22.0, 23.0]
    assert train_part.weights[18:22, 0].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_another_vocabulary_does_not_resume(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh " * 200)
    assert train(tmp_path, path).exit_code == 0
    path.write_text("abcdefghü " * 200)
    said = refused(train(tmp_path, path, "--resume"))
    assert "cannot resume" in said and "or another --out" in said
    assert "add --resume to go on" in refused(train(tmp_path, path))


def test_a_long_file_of_bytes_is_mapped_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_text, "MAPPED_BYTES", 1000)
    monkeypatch.setattr(data_text, "SCORED_BYTES", 300)
    path = tmp_path / "a.txt"
    path.write_text("Größe zählt.\n" * 400, encoding="utf-8")
    corpus = data_text.text_file(path, 0.1, 0.1, data_text.Coding("bytes"))
    assert "mapped" in corpus.notes[0] and corpus.train[0].inputs.dtype == torch.uint8
    assert len(corpus.validation[0]) == len(corpus.test[0]) == 299
    batch = next(StreamSet(corpus.train, 4, 16).in_order())
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.inputs[1:], batch.targets[:-1])
    done = train(tmp_path, path, "--tokens", "bytes")
    assert done.exit_code == 0, done.output


def test_what_is_too_big_to_hold_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_text, "HELD_BYTES", 1000)
    monkeypatch.setattr(series, "HELD_BYTES", 1000)
    text, table = tmp_path / "a.txt", tmp_path / "a.csv"
    text.write_text("abc " * 500)
    table.write_text(rows())
    assert "data.tokens=bytes" in refused(train(tmp_path, text))
    assert "too much to hold" in refused(train(tmp_path, table, "--target", "heat"))


@pytest.mark.slow
def test_no_disk_left(tmp_path: Path) -> None:
    """No file of the process may grow beyond 2,560 bytes, which is what a full disk looks like to the writer."""
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh " * 200)
    command = [sys.executable, "-m", "training", "train", "--data", str(path), "--out", str(tmp_path / "run")]
    # The limit is set by a shell: a preexec_fn would copy this whole process, for which a small host has no room.
    limited = ["sh", "-c", 'ulimit -f 5 && exec "$@"', "sh", *command, *SMALL.split()]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "make room on the disk" in done.stderr
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training import checkpoint

    path = tmp_path / "a.txt"
    path.write_text("abcdefgh " * 200)
    assert train(tmp_path, path).exit_code == 0
    before = (tmp_path / "run" / "last" / "model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    monkeypatch.setattr(checkpoint, "save_file", full)
    said = refused(train(tmp_path, path, "--resume", "--set", "train.max_steps=8"))
    assert "No space left on device" in said and "then --resume" in said
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() == before
