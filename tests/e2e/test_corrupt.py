"""Corrupt bundles are skipped by name; wrong settings end the start with one line that names the setting."""

import hashlib
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live import START_S, MakeServer, Server, free_port, spawn

Damage = Callable[[Path], None]


def manifest(change: Callable[[dict[str, Any]], None]) -> Damage:
    """A damage that changes the manifest."""

    def damage(path: Path) -> None:
        file = path / "manifest.json"
        found = json.loads(file.read_text())
        change(found)
        file.write_text(json.dumps(found))

    return damage


def replaced(name: str, content: bytes) -> Damage:
    """A damage that replaces a file and names its right checksum."""

    def damage(path: Path) -> None:
        (path / name).write_bytes(content)
        sums = {"files": hashlib.sha256(content).hexdigest()}
        manifest(lambda found: found["files"].update({name: sums["files"]}))(path)

    return damage


def truncated_with_checksum(path: Path) -> None:
    replaced("model.onnx", (path / "model.onnx").read_bytes()[:500])(path)


def bit_flipped(path: Path) -> None:
    content = bytearray((path / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "model.onnx").write_bytes(content)


def without_golden_input(path: Path) -> None:
    import safetensors.numpy

    golden = safetensors.numpy.load((path / "golden.safetensors").read_bytes())
    golden.pop("input")
    replaced("golden.safetensors", safetensors.numpy.save(golden))(path)


def other_golden_outputs(path: Path) -> None:
    import safetensors.numpy

    golden = safetensors.numpy.load((path / "golden.safetensors").read_bytes())
    changed = {name: array + 0.01 if name.startswith("torch") else array for name, array in golden.items()}
    replaced("golden.safetensors", safetensors.numpy.save(changed))(path)


def manifest_is_a_folder(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (lambda p: (p / "model.onnx").write_bytes((p / "model.onnx").read_bytes()[:500]), "model.onnx"),
    "bit-flipped": (bit_flipped, "model.onnx does not match its checksum"),
    "graph-missing": (lambda p: (p / "model.onnx").unlink(), "model.onnx is missing"),
    "golden-missing": (lambda p: (p / "golden.safetensors").unlink(), "golden.safetensors is missing"),
    "manifest-missing": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest-a-folder": (manifest_is_a_folder, "manifest.json"),
    "manifest-not-json": (lambda p: (p / "manifest.json").write_text("{"), "manifest.json"),
    "manifest-not-utf8": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json"),
    "unknown-field": (manifest(lambda m: m.update(surprise=1)), "surprise"),
    "other-version": (manifest(lambda m: m.update(version=7)), "7"),
    "other-name": (manifest(lambda m: m.update(name="somebody")), "somebody"),
    "newer-format": (manifest(lambda m: m.update(format=2)), "format"),
    "path-traversal": (manifest(lambda m: m["files"].update({"../../secret": "0" * 64})), "outside the bundle"),
    "absolute-path": (manifest(lambda m: m["files"].update({"/etc/passwd": "0" * 64})), "outside the bundle"),
    "no-checksum": (manifest(lambda m: m["files"].pop("model.onnx")), "model.onnx"),
    "truncated-with-checksum": (truncated_with_checksum, "graph"),
    "golden-not-safetensors": (replaced("golden.safetensors", b"nothing"), "golden"),
    "golden-without-input": (without_golden_input, "golden"),
    "golden-differs": (other_golden_outputs, "golden"),
    "other-input": (manifest(lambda m: m["inputs"][0].update(name="tokens")), "inputs"),
    "other-dtype": (manifest(lambda m: m["states"][0].update(dtype="float64")), "inputs"),
    "other-hidden": (manifest(lambda m: m["states"][0].update(shape=[2, "B", 17])), ""),
    "symbol-missing": (manifest(lambda m: m["symbols"].pop()), ""),
    "symbol-too-many": (manifest(lambda m: m["symbols"].append("z")), ""),
    "symbols-repeat": (manifest(lambda m: m["symbols"].append(m["symbols"][0])), "symbols repeat"),
    "no-window": (manifest(lambda m: m.update(memory={"window": 0})), "memory"),
    "unknown-task": (manifest(lambda m: m.update(task="oracle")), "task"),
    "created-not-a-time": (manifest(lambda m: m.update(created="yesterday")), "created"),
}


@pytest.fixture(scope="module")
def damaged(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose models folder holds one good bundle and one of each damage."""
    folder = tmp_path_factory.mktemp("damaged")
    served = folder / "models"
    good = models / "tiny-letters" / "1"
    shutil.copytree(good, served / "tiny-letters" / "1")
    for name, (damage, _) in DAMAGES.items():
        copy = served / name / "1"
        shutil.copytree(good, copy)
        manifest(lambda found, name=name: found.update(name=name))(copy)
        damage(copy)
    shutil.copytree(models / "tiny-people" / "1", served / "label-missing" / "1")
    manifest(lambda m: (m.update(name="label-missing"), m["labels"].pop()))(served / "label-missing" / "1")
    shutil.copytree(models / "tiny-weather" / "1", served / "feature-missing" / "1")
    manifest(lambda m: (m.update(name="feature-missing"), m["features"].pop()))(served / "feature-missing" / "1")
    shutil.copytree(models / "tiny-weather" / "1", served / "quantile-missing" / "1")
    manifest(lambda m: (m.update(name="quantile-missing"), m["quantiles"].pop()))(served / "quantile-missing" / "1")
    (served / "empty" / "1").mkdir(parents=True)
    (served / "stray.txt").write_text("not a model")
    one = Server(served, folder, store="memory")
    try:
        yield one.start()
    finally:
        one.close()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_corrupt_bundle_is_skipped_and_named(name: str, damaged: Server) -> None:
    ready = damaged.ok(damaged.http.get("/readyz"))
    reason = ready["skipped"].get(f"{name}/1")
    assert reason is not None and DAMAGES[name][1] in reason
    assert name not in ready["models"]
    line = next(line for line in damaged.output().splitlines() if f"{name}/1" in line)
    assert "level=error" in line and "Traceback" not in line


@pytest.mark.parametrize("name", ["label-missing", "feature-missing", "quantile-missing"])
def test_a_manifest_that_says_fewer_outputs_than_the_graph_is_skipped(name: str, damaged: Server) -> None:
    assert f"{name}/1" in damaged.ok(damaged.http.get("/readyz"))["skipped"]


def test_reasons_name_no_path(damaged: Server) -> None:
    ready = damaged.http.get("/readyz").text
    assert str(damaged.settings["models_dir"]) not in ready


def test_the_good_bundle_beside_corrupt_ones_is_served(damaged: Server) -> None:
    assert [card["id"] for card in damaged.ok(damaged.http.get("/v1/models"))["data"]] == ["tiny-letters"]
    assert damaged.steps("s", "abc", model="tiny-letters")["position"] == 3


def test_a_skipped_model_is_404(damaged: Server) -> None:
    response = damaged.post("/v1/models/bit-flipped/predict", {"sequences": ["a"]})
    assert response.status_code == 404 and response.json()["code"] == "model_not_found"


@pytest.mark.parametrize("there", [True, False])
def test_without_any_model_the_service_is_not_ready(there: bool, fresh: MakeServer, tmp_path: Path) -> None:
    folder = tmp_path / "none"
    if there:
        folder.mkdir()
    one = fresh(models=folder, store="memory").start(ready=503)
    response = one.http.get("/readyz")
    assert response.json()["problems"]["models"] and int(response.headers["retry-after"]) >= 1
    assert one.http.get("/healthz").status_code == 200


def test_sessions_of_a_model_that_went_away_can_be_listed_and_deleted(
    models: Path, fresh: MakeServer, tmp_path: Path
) -> None:
    served = tmp_path / "models"
    for name in ("tiny-letters", "tiny-tags"):
        shutil.copytree(models / name, served / name)
    one = fresh(models=served).start()
    one.steps("stays", "abc", model="tiny-letters")
    one.steps("orphan", "go", model="tiny-tags")
    one.kill()
    shutil.rmtree(served / "tiny-tags")
    one.start()
    listed = one.ok(one.http.get("/v1/sessions"))
    assert {session["id"] for session in listed["data"]} == {"orphan", "stays"}
    assert one.session("orphan")["position"] == 1
    response = one.post("/v1/sessions/orphan/steps", {"inputs": "go"})
    assert response.status_code == 503 and response.json()["code"] == "not_ready"
    assert one.http.delete("/v1/sessions/orphan").status_code == 204
    assert one.http.get("/v1/sessions/orphan").status_code == 410


# ---------------------------------------------------------------------- settings


def refused_start(tmp_path: Path, **settings: object) -> str:
    """Start with settings that must not do; returns the one line that was printed."""
    given = {"port": free_port(), "data_dir": tmp_path / "data", "models_dir": tmp_path, **settings}
    log = tmp_path / "refused.log"
    process = spawn(log, **given)
    try:
        assert process.wait(START_S) not in (0, None)
    finally:
        process.kill()
        process.wait()
    printed = log.read_text().strip()
    assert "Traceback" not in printed and len(printed.splitlines()) == 1, printed
    return printed


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("port", "http"),
        ("port", "70000"),
        ("store", "redis"),
        ("durability", "none"),
        ("threads", "0"),
        ("max_body_bytes", "-5"),
        ("log_level", "loud"),
        ("session_ttl_s", "never"),
    ],
)
def test_a_wrong_setting_ends_the_start_and_is_named(setting: str, value: str, tmp_path: Path) -> None:
    printed = refused_start(tmp_path, **{setting: value})
    assert f"RECURRA_{setting.upper()}" in printed and value in printed


def test_a_data_folder_that_can_not_be_made_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "RECURRA_DATA_DIR" in refused_start(tmp_path, data_dir=tmp_path / "file" / "data")


def test_a_data_folder_that_can_not_be_written_ends_the_start(tmp_path: Path) -> None:
    assert "RECURRA_DATA_DIR" in refused_start(tmp_path, data_dir="/proc/self")


def test_a_data_folder_that_holds_something_else_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sessions.sqlite").write_bytes(b"not a database" * 100)
    assert "RECURRA_DATA_DIR" in refused_start(tmp_path)


def test_a_port_in_use_ends_the_start(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "RECURRA_PORT" in refused_start(tmp_path, port=port)
