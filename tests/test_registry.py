"""Which models are served, and what is said of those that are not."""

import shutil
from pathlib import Path

import pytest

from service.errors import Problem
from service.registry import Registry
from service.settings import Settings
from service.store.base import Head
from service.store.memory import MemoryStore


def registry(folder: Path) -> Registry:
    return Registry(Settings(models_dir=folder, store="memory"), MemoryStore(), lambda events: None)


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """Two versions of one model, one of another."""
    for version in ("1", "2"):
        shutil.copytree(models / "tiny-tags" / version, tmp_path / "tiny-tags" / version)
    shutil.copytree(models / "tiny-single" / "1", tmp_path / "tiny-single" / "1")
    return tmp_path


def head(found: Registry, version: int, graph: str | None = None) -> Head:
    model = found.get("tiny-tags", version)
    return Head("", "s", "tiny-tags", version, graph or model.bundle.manifest.graph_sha256, 1, 0, 1, "b")


def test_every_version_is_loaded_and_the_greatest_is_the_default(folder: Path) -> None:
    found = registry(folder)
    assert list(found.versions()) == ["tiny-single", "tiny-tags"]
    assert list(found.versions()["tiny-tags"]) == [1, 2]
    assert found.problems == {}
    assert found.get("tiny-tags").bundle.manifest.version == 2
    assert found.get("tiny-tags", 1).bundle.manifest.version == 1


def test_versions_are_ordered_as_numbers(folder: Path) -> None:
    shutil.copytree(folder / "tiny-tags" / "1", folder / "tiny-tags" / "10")
    text = (folder / "tiny-tags" / "10" / "manifest.json").read_text()
    (folder / "tiny-tags" / "10" / "manifest.json").write_text(text.replace('"version": 1,', '"version": 10,'))
    assert list(registry(folder).versions()["tiny-tags"]) == [1, 2, 10]


@pytest.mark.parametrize(
    ("name", "version", "code"), [("nothing", None, "model_not_found"), ("tiny-tags", 3, "version_not_found")]
)
def test_what_is_not_there_is_named_with_what_is(name: str, version: int | None, code: str, folder: Path) -> None:
    with pytest.raises(Problem) as found:
        registry(folder).get(name, version)
    assert found.value.code == code and ("tiny-single" in found.value.detail or "1, 2" in found.value.detail)


@pytest.mark.parametrize(
    "junk", ["README.md", "tiny-tags/notes.txt", "tiny-tags/.5-tmp/model.onnx", "tiny-tags/latest/x"]
)
def test_what_is_no_bundle_is_passed_over(junk: str, folder: Path) -> None:
    (folder / junk).parent.mkdir(parents=True, exist_ok=True)
    (folder / junk).write_text("junk")
    found = registry(folder)
    assert found.problems == {} and list(found.versions()["tiny-tags"]) == [1, 2]


def test_one_bad_version_leaves_the_other(folder: Path) -> None:
    (folder / "tiny-tags" / "2" / "model.onnx").write_bytes(b"")
    found = registry(folder)
    assert list(found.versions()["tiny-tags"]) == [1] and list(found.problems) == ["tiny-tags/2"]
    assert found.get("tiny-tags").bundle.manifest.version == 1


def test_a_session_has_the_very_graph_it_began_with(folder: Path) -> None:
    found = registry(folder)
    assert found.of(head(found, 1)).bundle.manifest.version == 1
    with pytest.raises(Problem) as refused:
        found.of(head(found, 1, graph="0" * 64))
    assert refused.value.code == "not_ready"


def test_no_folder_is_no_models(tmp_path: Path) -> None:
    assert registry(tmp_path / "nothing").versions() == {}
