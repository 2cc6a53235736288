"""The manifest's rules, checksums, and how text is split."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import TINY, every_model, newest

from service import bundle
from service.bundle import BundleError, Manifest, Splitter, StateSpec, sha256_of


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Path:
    """A bundle that may be damaged."""
    path = tmp_path / "tiny-letters" / "1"
    shutil.copytree(models / "tiny-letters" / "1", path)
    return path


def change(path: Path, how: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads((path / "manifest.json").read_text())
    how(found)
    (path / "manifest.json").write_text(json.dumps(found))


@pytest.mark.parametrize("name", every_model())
def test_a_bundle_is_loaded_with_its_graph_and_golden_example(name: str, models: Path) -> None:
    found = newest(models, name)
    assert found.graph.is_file() and found.golden.is_file()
    assert found.manifest.files["model.onnx"] == sha256_of(found.graph)


def test_the_state_of_a_session_has_a_size(models: Path) -> None:
    assert newest(models, "tiny-letters").manifest.state_bytes == 2 * 2 * 16 * 4


@pytest.mark.parametrize("file", ["model.onnx", "golden.safetensors", "README.md"])
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_file_that_is_missing_or_changed_is_named(file: str, damage: str, copy: Path) -> None:
    if damage == "missing":
        (copy / file).unlink()
    else:
        (copy / file).write_bytes((copy / file).read_bytes() + b" ")
    with pytest.raises(BundleError, match=file):
        bundle.load(copy)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", "..", ".hidden", "a\\b", ""])
def test_a_file_outside_the_bundle_is_refused(name: str, copy: Path) -> None:
    change(copy, lambda m: m["files"].update({name: "0" * 64}))
    with pytest.raises(BundleError, match="outside the bundle"):
        bundle.load(copy)


@pytest.mark.parametrize("file", ["model.onnx", "golden.safetensors"])
def test_a_checksum_must_be_listed(file: str, copy: Path) -> None:
    change(copy, lambda m: m["files"].pop(file))
    with pytest.raises(BundleError, match=file):
        bundle.load(copy)


@pytest.mark.parametrize(("field", "value"), [("name", "other"), ("version", 2)])
def test_a_manifest_of_another_folder_is_refused(field: str, value: object, copy: Path) -> None:
    change(copy, lambda m: m.update({field: value}))
    with pytest.raises(BundleError, match="not of this folder"):
        bundle.load(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_manifest_that_can_not_be_read_is_refused(content: bytes, copy: Path) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        bundle.load(copy)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json is missing"):
        bundle.load(tmp_path)


@pytest.mark.parametrize(
    ("model", "field", "value"),
    [
        ("tiny-letters", "format", 2),
        ("tiny-letters", "name", "Upper Case"),
        ("tiny-letters", "version", 0),
        ("tiny-letters", "task", "oracle"),
        ("tiny-letters", "surprise", 1),
        ("tiny-letters", "symbols", []),
        ("tiny-letters", "symbols", ["a", "a"]),
        ("tiny-letters", "start_symbol", "Z"),
        ("tiny-letters", "splitter", None),
        ("tiny-letters", "sampler", "other"),
        ("tiny-letters", "states", []),
        ("tiny-letters", "memory", {"window": 0}),
        ("tiny-people", "labels", []),
        ("tiny-weather", "targets", []),
        ("tiny-weather", "features", []),
        ("tiny-weather", "quantiles", [0.5, 0.1]),
        ("tiny-weather", "quantiles", [0.5, 0.5]),
        ("tiny-weather", "quantiles", [0.0, 0.5]),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused(model: str, field: str, value: object, models: Path) -> None:
    parts = newest(models, model).manifest.model_dump(mode="json")
    Manifest.model_validate(parts)
    with pytest.raises(ValidationError):
        Manifest.model_validate(parts | {field: value})


@pytest.mark.parametrize(
    ("shape", "batch_axis"),
    [([2, 3], 0), ([2, "B", 3], 0), ([2, "B", 3], 3), (["B", "B"], 0), (["T", "B"], 1), ([0, "B"], 1)],
)
def test_a_state_must_name_one_batch_axis(shape: list[object], batch_axis: int) -> None:
    with pytest.raises(ValidationError):
        StateSpec.model_validate(
            {"name": "h", "input": "h", "output": "h_next", "shape": shape, "batch_axis": batch_axis}
        )


@pytest.mark.parametrize("name", TINY)
def test_a_manifest_comes_back_from_its_json(name: str, models: Path) -> None:
    found = newest(models, name).manifest
    assert Manifest.model_validate_json(found.model_dump_json()) == found


# ---------------------------------------------------------------------- splitting

CHARACTERS, WORDS = Splitter(kind="characters"), Splitter(kind="words", lowercase=True)


@given(text=st.text())
def test_characters_are_the_text(text: str) -> None:
    assert "".join(CHARACTERS.split(text)) == text


@given(text=st.text())
def test_words_hold_all_but_the_white_space(text: str) -> None:
    assert "".join("".join(WORDS.split(text)).split()) == "".join(text.lower().split())


@given(text=st.text(), cut=st.integers(0, 20))
def test_words_are_the_same_however_often_they_are_split(text: str, cut: int) -> None:
    words = WORDS.split(text)
    assert WORDS.split(WORDS.separator.join(words)) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Anna's keys, and hers.", ["anna's", "keys", ",", "and", "hers", "."]),
        ("  two\n\twords ", ["two", "words"]),
        ("wait...", ["wait", ".", ".", "."]),
        ("don’t 'quote'", ["don’t", "'", "quote", "'"]),
        ("", []),
    ],
)
def test_words_and_marks_are_symbols(text: str, words: list[str]) -> None:
    assert WORDS.split(text) == words
