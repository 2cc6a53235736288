"""Which models are served, and what is said of those that are not."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import copied, with_other_weights

from service.errors import Problem
from service.registry import Registry, Reloaded
from service.settings import Settings
from service.store.base import Commit, Head, StoreError
from service.store.memory import MemoryStore


def registry(folder: Path, store: MemoryStore | None = None) -> Registry:
    return Registry(Settings(models_dir=folder, store="memory"), store or MemoryStore(), lambda events: None)


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


# ---------------------------------------------------------------------- looking again


class FailingStore(MemoryStore):
    """A store that can not say who lives."""

    def lives(self, model: str, version: int) -> bool:
        raise StoreError("the disk is gone")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def serving(folder: Path, store: MemoryStore) -> Iterator[Registry]:
    """A registry whose engines run."""
    found = registry(folder, store)
    found.start()
    yield found
    found.stop()


def test_a_reload_without_a_change_changes_nothing(serving: Registry) -> None:
    before = serving.versions()
    assert serving.reload() == Reloaded()
    assert serving.versions() == before


def test_a_reload_finds_new_versions_and_new_models(serving: Registry, folder: Path, models: Path) -> None:
    copied(models / "tiny-tags" / "1", folder / "tiny-tags" / "10")
    copied(models / "tiny-people" / "1", folder / "people" / "3")
    assert sorted(serving.reload().loaded) == ["people/3", "tiny-tags/10"]
    assert serving.get("tiny-tags").bundle.manifest.version == 10 and list(serving.versions()["people"]) == [3]


def test_a_reload_lets_go_of_what_nobody_needs(serving: Registry, folder: Path, store: MemoryStore) -> None:
    store.commit([Commit(head(serving, 1), None)])
    shutil.rmtree(folder / "tiny-tags")
    shutil.rmtree(folder / "tiny-single")
    assert serving.reload() == Reloaded(unloaded=["tiny-single/1", "tiny-tags/2"], kept=["tiny-tags/1"])
    assert serving.of(head(serving, 1)).bundle.manifest.version == 1
    assert list(serving.versions()) == ["tiny-tags"]
    assert serving.get("tiny-tags").bundle.manifest.version == 1


def test_a_reload_keeps_what_has_changed_under_its_version(serving: Registry, folder: Path, models: Path) -> None:
    graph = serving.get("tiny-tags", 2).bundle.manifest.graph_sha256
    shutil.rmtree(folder / "tiny-tags" / "2")
    with_other_weights(models / "tiny-tags" / "2", folder / "tiny-tags" / "2")
    report = serving.reload()
    assert list(report.skipped) == ["tiny-tags/2"] == list(serving.problems)
    assert report.loaded == report.unloaded == []
    assert serving.get("tiny-tags", 2).bundle.manifest.graph_sha256 == graph


def test_a_reload_keeps_what_was_damaged_on_disk(serving: Registry, folder: Path) -> None:
    (folder / "tiny-tags" / "2" / "model.onnx").write_bytes(b"")
    assert "still served" in serving.reload().skipped["tiny-tags/2"]
    assert serving.get("tiny-tags").bundle.manifest.version == 2


def test_what_was_skipped_is_loaded_once_it_is_right(serving: Registry, folder: Path, models: Path) -> None:
    broken = copied(models / "tiny-tags" / "1", folder / "tiny-tags" / "3")
    graph = (broken / "model.onnx").read_bytes()
    (broken / "model.onnx").write_bytes(b"")
    assert list(serving.reload().skipped) == ["tiny-tags/3"]
    (broken / "model.onnx").write_bytes(graph)
    assert serving.reload() == Reloaded(loaded=["tiny-tags/3"])
    assert serving.problems == {}


def test_nothing_is_let_go_while_the_store_can_not_be_read(folder: Path) -> None:
    found = registry(folder, FailingStore())
    found.start()
    shutil.rmtree(folder / "tiny-tags")
    with pytest.raises(StoreError):
        found.reload()
    assert list(found.versions()["tiny-tags"]) == [1, 2]
    found.stop()


def test_a_graph_names_its_version(serving: Registry) -> None:
    graph = serving.get("tiny-tags", 1).bundle.manifest.graph_sha256
    assert serving.with_graph("tiny-tags", graph).bundle.manifest.version == 1
    for name in ("tiny-single", "nothing"):
        with pytest.raises(Problem) as refused:
            serving.with_graph(name, graph)
        assert refused.value.code == "state_mismatch"


# ---------------------------------------------------------------------- letting go by name


def test_a_model_is_unloaded_until_it_is_loaded_again(serving: Registry) -> None:
    assert serving.unload("tiny-tags") == Reloaded(unloaded=["tiny-tags/1", "tiny-tags/2"])
    assert list(serving.versions()) == ["tiny-single"] and serving.unloaded == [("tiny-tags", 1), ("tiny-tags", 2)]
    assert serving.reload() == Reloaded() and list(serving.versions()) == ["tiny-single"]
    assert serving.load("tiny-tags") == Reloaded(loaded=["tiny-tags/1", "tiny-tags/2"])
    assert list(serving.versions()["tiny-tags"]) == [1, 2] and serving.unloaded == []
    assert serving.load("tiny-tags") == Reloaded()


def test_a_version_that_sessions_live_on_is_not_unloaded(serving: Registry, store: MemoryStore) -> None:
    store.commit([Commit(head(serving, 1), None)])
    assert serving.unload("tiny-tags") == Reloaded(unloaded=["tiny-tags/2"], kept=["tiny-tags/1"])
    assert serving.of(head(serving, 1)).bundle.manifest.version == 1 and serving.unloaded == [("tiny-tags", 2)]


def test_what_is_unloaded_and_then_deleted_is_forgotten(serving: Registry, folder: Path) -> None:
    serving.unload("tiny-single")
    shutil.rmtree(folder / "tiny-single")
    serving.reload()
    assert serving.unloaded == []


def test_loading_says_what_could_not_be_loaded(serving: Registry, folder: Path, models: Path) -> None:
    broken = copied(models / "tiny-tags" / "1", folder / "tiny-tags" / "3")
    (broken / "model.onnx").write_bytes(b"")
    report = serving.load("tiny-tags")
    assert list(report.skipped) == ["tiny-tags/3"] == list(serving.problems) and report.loaded == []
    shutil.rmtree(broken)
    assert serving.load("tiny-tags") == Reloaded() and serving.problems == {}


@pytest.mark.parametrize("name", ["nothing", "..", "tiny-tags/1", ""])
def test_only_what_is_there_is_loaded_or_unloaded(name: str, serving: Registry) -> None:
    for act in (serving.load, serving.unload):
        with pytest.raises(Problem) as refused:
            act(name)
        assert refused.value.code == "model_not_found"
