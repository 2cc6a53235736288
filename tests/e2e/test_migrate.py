"""New versions of a model in a running server, and sessions that move to them."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import MakeServer, Server, problem
from tiny import TAGS, copied, newest, some_inputs, with_other_weights

WORDS = "go left turn right stop go"


class Folder:
    """A models folder that tests publish into."""

    def __init__(self, models: Path, served: Path) -> None:
        self.models, self.served = models, served
        self._published = 0

    def tags(self, name: str, versions: tuple[int, ...] = (1, 2)) -> str:
        """A model of its own for a test: versions 1 and 2 differ in their weights."""
        for version in versions:
            self.publish(name, version)
        return name

    def publish(self, name: str, version: int, **changes: object) -> None:
        copied(self.models / "tiny-tags" / str(min(version, 2)), self.served / name / str(version), **changes)

    def remove(self, name: str, version: int) -> None:
        shutil.rmtree(self.served / name / str(version))


@pytest.fixture(scope="module")
def folder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    served = tmp_path_factory.mktemp("publish") / "models"
    for name in ("tiny-letters", "tiny-single"):
        copied(models / name / "1", served / name / "1")
    copied(models / "tiny-weather" / "1", served / "tiny-weather" / "1")
    for name in ("tiny-single", "tiny-weather"):
        with_other_weights(models / name / "1", served / name / "2")
    return Folder(models, served)


@pytest.fixture(scope="module")
def one(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on that folder, which tests may kill."""
    server = Server(folder.served, tmp_path_factory.mktemp("migrate"), snapshot_every=64)
    yield server.start()
    server.close()


def reload(server: Server) -> Any:  # noqa: ANN401 (any JSON)
    return server.ok(server.post("/v1/models/reload", {}))


def migrate(server: Server, session: str, version: int) -> httpx.Response:
    return server.post(f"/v1/sessions/{session}/migrate", {"version": version})


def told(server: Server, session: str) -> Any:  # noqa: ANN401 (any JSON)
    return server.session(session), server.state(session), server.log_of(session)


# ---------------------------------------------------------------------- new versions


def test_a_new_version_is_served_and_sessions_stay_on_theirs(folder: Folder, one: Server, name: str) -> None:
    model = folder.tags(f"m-{name}", (1,))
    assert reload(one) == {"loaded": [f"{model}/1"], "unloaded": [], "kept": [], "skipped": {}}
    one.steps("stays", WORDS, model=model)
    before = told(one, "stays")
    folder.publish(model, 2)
    assert reload(one)["loaded"] == [f"{model}/2"]
    assert told(one, "stays") == before
    one.steps("stays", "go")
    one.steps("young", WORDS, model=model)
    assert [one.session(session)["version"] for session in ("stays", "young")] == [1, 2]
    assert one.ok(one.http.get(f"/v1/models/{model}"))["versions"] == [1, 2]
    assert reload(one) == {"loaded": [], "unloaded": [], "kept": [], "skipped": {}}
    one.restart()
    assert one.session("stays")["version"] == 1 and one.state("young") == fresh_state(one, model, 2, WORDS)


def fresh_state(server: Server, model: str, version: int, inputs: object) -> Any:  # noqa: ANN401 (any JSON)
    session = str(server.create(model, version=version)["id"])
    server.steps(session, inputs)
    return server.state(session)


def test_a_graph_that_changed_under_its_version_is_refused(folder: Folder, one: Server, name: str) -> None:
    model = folder.tags(f"m-{name}", (1,))
    reload(one)
    one.steps(name, WORDS, model=model)
    before = told(one, name)
    folder.remove(model, 1)
    folder.publish(model, 2)
    (folder.served / model / "2").rename(folder.served / model / "1")
    rename(folder.served / model / "1", version=1)
    found = reload(one)
    assert found["loaded"] == found["unloaded"] == [] and "new version" in found["skipped"][f"{model}/1"]
    assert one.ok(one.http.get("/readyz"))["skipped"] == found["skipped"]
    one.steps(name, "go")
    one.rewind(name, 6)
    assert told(one, name)[1:] == before[1:]
    folder.remove(model, 1)
    folder.publish(model, 1)
    assert reload(one)["skipped"] == {}


def rename(path: Path, **changes: object) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_corrupt_new_version_is_skipped_and_the_old_one_served(folder: Folder, one: Server, name: str) -> None:
    model = folder.tags(f"m-{name}")
    (folder.served / model / "2" / "model.onnx").write_bytes(b"")
    found = reload(one)
    assert found["loaded"] == [f"{model}/1"] and "model.onnx" in found["skipped"][f"{model}/2"]
    assert one.steps(name, WORDS, model=model)["position"] == 6
    assert one.session(name)["version"] == 1
    problem(migrate(one, name, 2), 404, "version_not_found")
    folder.remove(model, 2)
    assert reload(one)["skipped"] == {}


def test_a_version_that_was_removed_is_kept_while_sessions_live_on_it(folder: Folder, one: Server, name: str) -> None:
    model = folder.tags(f"m-{name}")
    reload(one)
    one.steps(name, WORDS, model=model, version=1)
    folder.remove(model, 1)
    folder.remove(model, 2)
    assert reload(one) == {"loaded": [], "unloaded": [f"{model}/2"], "kept": [f"{model}/1"], "skipped": {}}
    assert one.steps(name, "go")["position"] == 7
    problem(migrate(one, name, 2), 404, "version_not_found")
    one.http.delete(f"/v1/sessions/{name}")
    assert reload(one)["unloaded"] == [f"{model}/1"]
    problem(one.http.get(f"/v1/models/{model}"), 404, "model_not_found")
    problem(one.post("/v1/sessions", {"model": model}), 404, "model_not_found")


def test_sessions_go_on_when_their_version_is_back(folder: Folder, one: Server, name: str) -> None:
    model = folder.tags(f"m-{name}")
    reload(one)
    one.steps(name, WORDS, model=model, version=1)
    before = told(one, name)
    one.kill()
    folder.remove(model, 1)
    one.start()
    for answer in (
        one.post(f"/v1/sessions/{name}/steps", {"inputs": "go"}, "key"),
        one.post(f"/v1/sessions/{name}/generate", {}),
        one.post(f"/v1/sessions/{name}/verify", {}),
        one.http.get(f"/v1/sessions/{name}/state"),
        one.http.get(f"/v1/sessions/{name}/log"),
        migrate(one, name, 2),
    ):
        problem(answer, 503, "not_ready")
        assert int(answer.headers["retry-after"]) >= 1
    assert one.session(name) == before[0]
    folder.publish(model, 1)
    assert reload(one)["loaded"] == [f"{model}/1"]
    assert told(one, name) == before
    first = one.post(f"/v1/sessions/{name}/steps", {"inputs": "go"}, "key")
    assert "idempotent-replayed" not in first.headers and first.json()["position"] == 7
    assert one.state(name) == fresh_state(one, model, 1, f"{WORDS} go")


# ---------------------------------------------------------------------- migrate


def test_a_migrated_memory_is_the_log_folded_by_the_other_version(folder: Folder, one: Server, name: str) -> None:
    model = folder.tags(f"m-{name}")
    reload(one)
    inputs = some_inputs(newest(folder.models, "tiny-tags").manifest, 700)
    one.create(model, name, version=1, seed=5, metadata={"a": 1})
    for begin in range(0, 700, 50):
        one.steps(name, inputs[begin : begin + 50])
    tokens = one.generate(name, max_tokens=40)["tokens"]
    before = one.session(name)
    after = one.ok(migrate(one, name, 2))
    changed = {"version": 2, "epoch": before["epoch"] + 1, "updated_at": after["updated_at"]}
    assert after == {**before, **changed} and after["position"] == 740
    expected = fresh_state(one, model, 2, inputs + tokens)
    assert one.state(name) == expected != fresh_state(one, model, 1, inputs + tokens)
    assert one.state_at(name, 333) == fresh_state(one, model, 2, inputs[:333])
    assert one.verify(name)["verified"] is True
    one.restart()
    assert one.session(name) == after and one.state(name) == expected
    assert one.steps(name, "go")["position"] == 741
    assert one.state(name) == fresh_state(one, model, 2, [*inputs, *tokens, 1])
    back = one.ok(migrate(one, name, 1))
    assert (back["version"], back["epoch"]) == (1, 3)
    assert one.state(name) == fresh_state(one, model, 1, [*inputs, *tokens, 1])
    one.rewind(name, 100)
    assert one.state(name) == fresh_state(one, model, 1, inputs[:100])


def test_an_empty_session_is_migrated(folder: Folder, one: Server, name: str) -> None:
    model = folder.tags(f"m-{name}")
    reload(one)
    one.create(model, name, version=1)
    assert one.ok(migrate(one, name, 2))["version"] == 2
    one.steps(name, WORDS)
    assert one.state(name) == fresh_state(one, model, 2, WORDS)


@pytest.mark.parametrize("restart", [False, True])
def test_a_null_takes_the_last_value_across_a_migrate(restart: bool, one: Server, name: str) -> None:
    one.steps(name, [[10, 1], [11, 2]], model="tiny-weather", version=1)
    one.ok(migrate(one, name, 2))
    if restart:
        one.restart()
    one.steps(name, [[None, 3]])
    assert one.state(name) == fresh_state(one, "tiny-weather", 2, [[10, 1], [11, 2], [11, 3]])


def test_a_migrate_to_its_own_version_changes_no_bit(folder: Folder, one: Server, name: str) -> None:
    model = folder.tags(f"m-{name}")
    reload(one)
    one.steps(name, WORDS, model=model)
    before = told(one, name)
    one.ok(migrate(one, name, 2))
    assert told(one, name)[1:] == before[1:] and one.session(name)["version"] == 2


def test_a_fork_is_migrated_alone(folder: Folder, one: Server, name: str) -> None:
    model = folder.tags(f"m-{name}")
    reload(one)
    one.steps(name, WORDS, model=model, version=1)
    before = told(one, name)
    child = one.fork(name, position=4)["id"]
    one.steps(child, "stop")
    one.ok(migrate(one, child, 2))
    assert one.state(child) == fresh_state(one, model, 2, "go left turn right stop")
    assert told(one, name) == before
    one.ok(migrate(one, name, 2))
    grandchild = one.fork(child, position=4)["id"]
    assert one.state(grandchild) == one.state_at(name, 4)


def test_an_old_state_file_is_of_the_old_version(folder: Folder, one: Server, name: str) -> None:
    model = folder.tags(f"m-{name}")
    reload(one)
    one.steps(name, WORDS, model=model, version=1)
    data = one.state_file(name)
    one.ok(migrate(one, name, 2))
    assert one.upload(f"{name}-up", data).json()["version"] == 1


def test_what_can_not_be_migrated(folder: Folder, one: Server, name: str) -> None:
    model = folder.tags(f"m-{name}")
    folder.publish(model, 3, symbols=[*TAGS[:-1], "spin"])
    folder.publish(model, 4, symbols=list(reversed(TAGS)))
    assert len(reload(one)["loaded"]) == 4
    one.steps(name, WORDS, model=model, version=1)
    before = told(one, name)
    for version in (3, 4):
        problem(migrate(one, name, version), 422, "incompatible_version")
    problem(migrate(one, name, 9), 404, "version_not_found")
    problem(migrate(one, f"{name}-no", 2), 404, "session_not_found")
    problem(one.post(f"/v1/sessions/{name}/migrate", {}), 422, "invalid_input")
    problem(one.post(f"/v1/sessions/{name}/migrate", {"version": 0}), 422, "invalid_input")
    assert told(one, name) == before
    one.http.delete(f"/v1/sessions/{name}")
    problem(migrate(one, name, 2), 410, "session_closed")


def test_a_migrate_ends_a_suspended_generate(folder: Folder, one: Server, name: str) -> None:
    model = folder.tags(f"m-{name}")
    reload(one)
    body = {"model": model, "version": 1, "inputs": "go", "max_tokens": 5000}
    one.stream(name, 10, "key", **body)
    stood = one.suspended(name)
    assert one.ok(migrate(one, name, 2))["position"] == stood
    found = one.ok(one.post(f"/v1/sessions/{name}/generate", body, "key"))
    assert (found["finish_reason"], found["position"], found["epoch"]) == ("cancelled", stood, 1)


@pytest.mark.slow
def test_others_go_on_reading_and_feeding_while_a_session_is_migrated(one: Server, models: Path, name: str) -> None:
    """Every answer is of the old version or of the new one; what was fed meanwhile is in the new memory."""
    inputs = some_inputs(newest(models, "tiny-single").manifest, 20_000)
    one.create("tiny-single", name, version=1)
    for begin in range(0, 20_000, 5000):
        one.steps(name, inputs[begin : begin + 5000], predictions="none")
    done = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(keep_looking, one.url, name, look, done) for look in ("state", "log", "forecast")]
        feeder = pool.submit(keep_feeding, one.url, name, done)
        for version in (2, 1, 2):
            assert one.ok(migrate(one, name, version))["version"] == version
        done.set()
        fed = feeder.result()
        assert all(reader.result() > 3 for reader in readers) and len(fed) > 3
    assert one.position(name) == 20_000 + len(fed)
    assert one.state(name) == fresh_state(one, "tiny-single", 2, inputs + fed)


@pytest.mark.parametrize("beyond", [0, 9000])
def test_a_session_that_is_rewound_while_it_is_migrated(beyond: int, one: Server, models: Path, name: str) -> None:
    """Whichever came first, the memory is the log folded by the new version."""
    inputs = some_inputs(newest(models, "tiny-single").manifest, 8000)
    one.create("tiny-single", name, version=1)
    for _ in range(3):
        one.steps(name, inputs, predictions="none")
    with ThreadPoolExecutor(1) as pool:
        moved = pool.submit(httpx.post, f"{one.url}/v1/sessions/{name}/migrate", json={"version": 2}, timeout=30)
        time.sleep(0.05)
        one.rewind(name, 16_000)
        if beyond:
            one.steps(name, inputs[::-1] + inputs[:1000], predictions="none")
        assert moved.result().status_code == 200, moved.result().text
    expected = inputs + inputs + (inputs[::-1] + inputs[:1000] if beyond else [])
    assert one.session(name)["version"] == 2 and one.position(name) == len(expected)
    assert one.state(name) == fresh_state(one, "tiny-single", 2, expected)


def keep_looking(url: str, session: str, look: str, done: threading.Event) -> int:
    """Look at a session again and again; how often that was answered."""
    path, answered = f"/v1/sessions/{session}", 0
    with httpx.Client(base_url=url, timeout=30, verify=False) as http:
        while not done.is_set():
            found = [http.get(path)]
            if look == "state":
                found.append(http.get(f"{path}/state", headers={"Accept": "application/json"}))
            elif look == "log":
                found.append(http.get(f"{path}/log?after=19990"))
            else:
                found.append(http.post(f"{path}/forecast", json={"horizon": 2}))
                found.append(http.post("/v1/models/tiny-single/predict", json={"sequences": [[40, 41]]}))
            assert all(one.status_code == 200 for one in found), [one.text for one in found]
            answered += 1
    return answered


def keep_feeding(url: str, session: str, done: threading.Event) -> list[float]:
    """Feed a session again and again; what it was fed."""
    fed: list[float] = []
    with httpx.Client(base_url=url, timeout=30, verify=False) as http:
        while not done.wait(0.01):
            value = 40.0 + len(fed) % 7
            answer = http.post(f"/v1/sessions/{session}/steps", json={"inputs": [value]})
            assert answer.status_code == 200, answer.text
            fed.append(value)
            assert answer.json()["position"] == 20_000 + len(fed)
    return fed


def test_sessions_of_many_versions_verify_after_a_restart(models: Path, fresh: MakeServer) -> None:
    server = fresh(snapshot_every=8, max_resident=2).start()
    for i in range(6):
        server.steps(f"s{i}", f"{WORDS} " * 4, model="tiny-tags", version=1)
    for i in range(0, 6, 2):
        server.ok(migrate(server, f"s{i}", 2))
    server.restart()
    for i in range(6):
        assert server.session(f"s{i}")["version"] == (1 if i % 2 else 2)
        server.steps(f"s{i}", WORDS)
        assert server.verify(f"s{i}")["verified"] is True
    assert server.state("s0") == server.state("s2") != server.state("s1") == server.state("s3")
