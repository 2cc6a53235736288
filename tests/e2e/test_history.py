"""A session's past: fork, rewind, verify, log, state at a position, state files, retention, parking."""

import contextlib
import random
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from live import MakeServer, Server, events_of, problem, tokens_of
from tiny import newest, some_inputs

from service import state as states

MODEL = "tiny-letters"
LONG = 10_000


def fresh_state(server: Server, model: str, inputs: list[Any]) -> Any:  # noqa: ANN401 (any JSON)
    """The state of a new session that was fed the inputs alone."""
    session = str(server.create(model)["id"])
    if inputs:
        server.steps(session, inputs, predictions="none")
    return server.state(session)


def inputs_of(models: Path, model: str, count: int, seed: int = 0) -> list[Any]:
    return some_inputs(newest(models, model).manifest, count, seed)


def mixed(count: int, seed: int) -> list[int]:
    """Ends of chunks of mixed sizes."""
    rng = random.Random(seed)
    ends = [0]
    while ends[-1] < count:
        ends.append(min(ends[-1] + rng.choice([1, 2, 5, 33, 200, 257, 1000]), count))
    return ends


def feed_mixed(server: Server, session: str, inputs: list[Any], seed: int) -> None:
    ends = mixed(len(inputs), seed)
    for begin, end in pairwise(ends):
        server.steps(session, inputs[begin:end], predictions="none")


# ---------------------------------------------------------------------- a long past


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-letters", "tiny-weather"])
def test_any_position_of_a_long_session_can_be_had_back(model: str, models: Path, server: Server, name: str) -> None:
    inputs = inputs_of(models, model, LONG)
    server.create(model, name)
    feed_mixed(server, name, inputs, 1)
    rng = random.Random(2)
    positions = sorted({0, 1, LONG - 1, LONG, *rng.sample(range(LONG), 96)})
    expected = prefixes(server, model, inputs, positions)
    for position in positions:
        assert server.state_at(name, position) == expected[position], position
        assert server.state(fork_at(server, name, position)) == expected[position], position
    for i, position in enumerate(reversed(positions)):
        back = server.rewind(name, position)
        assert (back["position"], back["epoch"]) == (position, i + 2)
        assert server.state(name) == expected[position], position


def prefixes(server: Server, model: str, inputs: list[Any], positions: list[int]) -> dict[int, Any]:
    """The state of a session that was fed a prefix, by the prefix's length."""
    session = str(server.create(model)["id"])
    found, begin = {}, 0
    for position in positions:
        if position > begin:
            server.steps(session, inputs[begin:position], predictions="none")
            begin = position
        found[position] = server.state(session)
    return found


def fork_at(server: Server, session: str, position: int) -> str:
    child = server.fork(session, position=position)
    assert child["position"] == position
    return str(child["id"])


def test_a_past_is_read_from_snapshots(models: Path, fresh: MakeServer) -> None:
    """With snapshots every 8 steps no look back folds more than a few."""
    one = fresh(snapshot_every=8, store="memory").start()
    inputs = inputs_of(models, MODEL, 100)
    one.create(MODEL, "s")
    for begin in range(0, 100, 5):
        one.steps("s", inputs[begin : begin + 5])
    before = one.metric("recurra_steps_total", model=MODEL)
    assert one.state_at("s", 98) == fresh_state(one, MODEL, inputs[:98])
    assert one.metric("recurra_steps_total", model=MODEL) - before - 98 <= 16


# ---------------------------------------------------------------------- fork


def test_a_fork_goes_on_as_its_parent_would(models: Path, server: Server, name: str) -> None:
    inputs = inputs_of(models, MODEL, 120)
    server.steps(name, inputs[:80], model=MODEL, seed=4)
    child = server.fork(name, id=f"{name}-child", position=50)
    assert (child["model"], child["version"], child["epoch"], child["metadata"]) == (MODEL, 1, 1, {})
    assert child["parent"] == {"session": name, "position": 50}
    assert child["seed"] != 4 and child["created_at"] >= server.session(name)["created_at"]
    answer = server.steps(f"{name}-child", inputs[50:], predictions="all")
    server.steps(f"{name}-2", inputs[:50], model=MODEL)
    assert answer == {**server.steps(f"{name}-2", inputs[50:], predictions="all"), "session": f"{name}-child"}
    assert server.position(name) == 80 and server.state(name) == fresh_state(server, MODEL, inputs[:80])


def test_a_fork_with_the_seed_writes_what_its_parent_writes(server: Server, name: str) -> None:
    server.steps(name, "abcdef", model=MODEL, seed=77)
    twin = server.fork(name, seed=77)["id"]
    other = server.fork(name)["id"]
    texts = [server.generate(session, max_tokens=60)["text"] for session in (name, twin, other)]
    assert texts[0] == texts[1] != texts[2]


def test_a_fork_of_a_fork_of_a_fork(models: Path, server: Server, name: str) -> None:
    inputs = inputs_of(models, MODEL, 60)
    server.steps(name, inputs[:40], model=MODEL)
    session, expected = name, inputs[:40]
    for i, cut in enumerate((30, 25, 27)):
        session = str(server.fork(session, position=cut)["id"])
        expected = expected[:cut] + inputs[40 : 45 + i]
        server.steps(session, inputs[40 : 45 + i])
        assert server.state(session) == fresh_state(server, MODEL, expected)
        assert [entry["position"] for entry in server.log_of(session)] == list(range(1, len(expected) + 1))
    for position in (0, 1, 24, 25, 26, 29):
        assert server.state_at(session, position) == fresh_state(server, MODEL, expected[:position])


ENDINGS: dict[str, Callable[[Server, str], object]] = {
    "rewound": lambda server, parent: server.rewind(parent, 10),
    "rewound to 0": lambda server, parent: server.rewind(parent, 0),
    "fed": lambda server, parent: server.steps(parent, "abc" * 300),
    "rewound and fed": lambda server, parent: (server.rewind(parent, 10), server.steps(parent, "j" * 400)),
    "deleted": lambda server, parent: server.http.delete(f"/v1/sessions/{parent}"),
    "created again": lambda server, parent: (
        server.http.delete(f"/v1/sessions/{parent}"),
        server.steps(parent, "j" * 100, model=MODEL),
    ),
}


@pytest.mark.slow
def test_a_fork_stays_what_it_is_whatever_becomes_of_its_parent(models: Path, fresh: MakeServer) -> None:
    """Also once the store has swept what nobody reaches, and after kill -9."""
    one = fresh(snapshot_every=16).start()
    inputs = inputs_of(models, MODEL, 100)
    for i, end in enumerate(ENDINGS.values()):
        feed(one, f"parent-{i}", inputs[:80])
        one.fork(f"parent-{i}", id=f"child-{i}", position=60)
        one.fork(f"child-{i}", id=f"grandchild-{i}", position=30)
        end(one, f"parent-{i}")
    expected, early = fresh_state(one, MODEL, inputs[:60]), fresh_state(one, MODEL, inputs[:30])
    for _ in range(2):
        for i in range(len(ENDINGS)):
            assert one.state(f"child-{i}") == expected and one.state(f"grandchild-{i}") == early
            assert one.state_at(f"child-{i}", 47) == fresh_state(one, MODEL, inputs[:47])
            assert one.log_of(f"child-{i}")[59]["input"] == one.log_of("child-0")[59]["input"]
        one.restart()
    for i in range(len(ENDINGS)):
        one.steps(f"child-{i}", inputs[60:])
        assert one.state(f"child-{i}") == fresh_state(one, MODEL, inputs)
        assert one.verify(f"child-{i}")["verified"] is True


def feed(server: Server, session: str, inputs: list[Any], chunk: int = 7) -> None:
    """Feed a new session of letters chunk by chunk."""
    server.create(MODEL, session)
    for begin in range(0, len(inputs), chunk):
        server.steps(session, inputs[begin : begin + chunk])


def test_a_session_is_deleted_with_its_forks(server: Server, name: str) -> None:
    server.steps(name, "abcdef", model=MODEL)
    child = server.fork(name)["id"]
    grandchild = server.fork(child, position=2)["id"]
    aside = server.create(MODEL)["id"]
    assert server.http.delete(f"/v1/sessions/{name}", params={"forks": "delete"}).status_code == 204
    for session in (name, child, grandchild):
        problem(server.http.get(f"/v1/sessions/{session}"), 410, "session_closed")
    assert server.position(aside) == 0


def test_forks_of_an_earlier_life_are_deleted_with_it_alone(server: Server, name: str) -> None:
    server.steps(name, "abcdef", model=MODEL)
    old = server.fork(name)["id"]
    server.http.delete(f"/v1/sessions/{name}")
    server.steps(name, "abc", model=MODEL)
    young = server.fork(name)["id"]
    server.http.delete(f"/v1/sessions/{name}", params={"forks": "delete"})
    assert server.http.get(f"/v1/sessions/{young}").status_code == 410
    assert server.position(old) == 6


@pytest.mark.slow
def test_forks_of_forks_are_closed_however_long_their_line_is(server: Server, name: str) -> None:
    first = last = name
    server.steps(first, "abc", model="tiny-letters")
    for _ in range(1100):
        last = server.fork(last)["id"]
    assert server.http.delete(f"/v1/sessions/{first}", params={"forks": "delete"}).status_code == 204
    assert server.http.get(f"/v1/sessions/{last}").status_code == 410


def test_a_fork_needs_a_free_id_and_a_live_parent(server: Server, name: str) -> None:
    server.steps(name, "abc", model=MODEL)
    problem(server.post(f"/v1/sessions/{name}/fork", {"id": name}), 409, "session_exists")
    refused = problem(server.post(f"/v1/sessions/{name}/fork", {"position": 4}), 409, "position_mismatch")
    assert (refused["epoch"], refused["position"]) == (1, 3)
    problem(server.post("/v1/sessions/nobody/fork", {}), 404, "session_not_found")
    server.http.delete(f"/v1/sessions/{name}")
    problem(server.post(f"/v1/sessions/{name}/fork", {}), 410, "session_closed")


def test_a_running_session_is_forked_where_it_stands(server: Server, name: str) -> None:
    body = {"model": MODEL, "inputs": "abc", "max_tokens": 5000, "seed": 9, "stream": True}
    with server.http.stream("POST", f"/v1/sessions/{name}/generate", json=body) as response:
        events = events_of(response)
        tokens = [next(events).data["token"] for _ in range(30)]
        children = [server.fork(name) for _ in range(3)]
        early = server.fork(name, position=10)["id"]
        tokens += [next(events).data["token"] for _ in range(100)]
    entries = [entry["input"] for entry in server.log_of(name)]
    assert fresh_state(server, MODEL, entries[:10]) == server.state(early)
    for child in children:
        assert child["position"] >= 33 and server.position(child["id"]) == child["position"]
        assert server.state(child["id"]) == fresh_state(server, MODEL, entries[: child["position"]])


# ---------------------------------------------------------------------- rewind


def test_the_same_request_after_a_rewind_gives_the_same(server: Server, name: str) -> None:
    server.steps(name, "abcdef", model=MODEL)
    body = {"max_tokens": 80, "temperature": 0.8, "logprobs": 2}
    first = server.generate(name, **body)
    server.rewind(name, 6)
    assert server.generate(name, **body) == {**first, "epoch": 2}


def test_a_rewind_forgets_what_came_after(models: Path, server: Server, name: str) -> None:
    inputs = inputs_of(models, MODEL, 90)
    server.steps(name, inputs[:60], model=MODEL)
    server.rewind(name, 20)
    server.steps(name, inputs[60:])
    assert server.state(name) == fresh_state(server, MODEL, inputs[:20] + inputs[60:])
    assert len(server.log_of(name)) == 50
    back = server.rewind(name, 0)
    assert (back["position"], back["epoch"]) == (0, 3)
    assert server.state(name) == fresh_state(server, MODEL, []) and server.log_of(name) == []
    assert server.generate(name, max_tokens=3)["position"] == 4


def test_a_rewind_ends_a_suspended_generate(server: Server, name: str) -> None:
    server.stream(name, 10, model=MODEL, inputs="ab", max_tokens=5000)
    stood = server.suspended(name)
    server.rewind(name, stood)
    assert server.suspended(name) == stood
    problem(server.http.get(f"/v1/sessions/{name}/events?after=1.5"), 410, "log_truncated")


def test_a_null_takes_the_last_value_of_what_is_left(server: Server, name: str) -> None:
    server.steps(name, [[10, 1], [11, 2], [12, 3]], model="tiny-weather")
    child = server.fork(name, position=1)["id"]
    server.rewind(name, 2)
    for session, told in ((name, [[10, 1], [11, 2], [11, 4]]), (child, [[10, 1], [10, 4]])):
        server.steps(session, [[None, 4]])
        assert server.state(session) == fresh_state(server, "tiny-weather", told)


def test_a_generate_that_was_rewound_over_has_no_events(server: Server, name: str) -> None:
    tokens = server.generate(name, model=MODEL, inputs="abc", max_tokens=10)["tokens"]
    server.rewind(name, 13)
    replayed = server.resume(name, "2.3")
    assert tokens_of(replayed) == tokens and replayed[-1].id == "2.13-end"
    server.rewind(name, 12)
    assert server.http.get(f"/v1/sessions/{name}/events?after=3.3").status_code == 204


def test_a_rewind_beyond_the_end_is_refused(server: Server, name: str) -> None:
    server.steps(name, "abc", model=MODEL)
    refused = problem(server.post(f"/v1/sessions/{name}/rewind", {"position": 4}), 409, "position_mismatch")
    assert (refused["epoch"], refused["position"]) == (1, 3)
    assert server.session(name)["epoch"] == 1


def test_a_rewind_to_where_it_stands_is_a_new_epoch(server: Server, name: str) -> None:
    server.steps(name, "abc", model=MODEL)
    assert server.rewind(name, 3)["epoch"] == 2
    assert server.steps(name, "d")["position"] == 4


# ---------------------------------------------------------------------- log


@pytest.mark.parametrize("model", ["tiny-letters", "tiny-tags", "tiny-people", "tiny-weather", "tiny-single"])
def test_a_log_can_be_fed_again(model: str, models: Path, server: Server, name: str) -> None:
    server.create(model, name)
    feed_mixed(server, name, inputs_of(models, model, 300), 3)
    entries = server.log_of(name, limit=37)
    assert [entry["position"] for entry in entries] == list(range(1, 301))
    assert all(set(entry) == {"position", "input", "source", "at"} for entry in entries)
    assert {entry["source"] for entry in entries} == {"fed"}
    assert fresh_state(server, model, [entry["input"] for entry in entries]) == server.state(name)


def test_a_log_says_what_was_generated(server: Server, name: str) -> None:
    server.steps(name, "abc", model=MODEL)
    written = server.generate(name, inputs="de", max_tokens=4)
    server.steps(name, "f")
    entries = server.log_of(name, limit=1)
    assert [entry["source"] for entry in entries] == ["fed"] * 5 + ["generated"] * 4 + ["fed"]
    assert "".join(entry["input"] for entry in entries) == "abcde" + written["text"] + "f"
    assert fresh_state(server, MODEL, [entry["input"] for entry in entries]) == server.state(name)
    assert [entry["at"] for entry in entries] == sorted(entry["at"] for entry in entries)


def test_pages_of_a_log(server: Server, name: str) -> None:
    server.steps(name, "abcdefgh", model=MODEL)
    page = server.ok(server.http.get(f"/v1/sessions/{name}/log?after=3&limit=2"))
    assert [entry["position"] for entry in page["data"]] == [4, 5] and page["next_cursor"] == 5
    last = server.ok(server.http.get(f"/v1/sessions/{name}/log?after=6"))
    assert [entry["position"] for entry in last["data"]] == [7, 8] and last["next_cursor"] is None
    for after in (8, 9, 10**12):
        assert server.ok(server.http.get(f"/v1/sessions/{name}/log?after={after}")) == {"data": [], "next_cursor": None}
    for query, pointer in (("limit=0", "/limit"), ("limit=10001", "/limit"), ("after=-1", "/after")):
        refused = problem(server.http.get(f"/v1/sessions/{name}/log?{query}"), 422, "invalid_input")
        assert refused["errors"][0]["pointer"] == pointer


@pytest.mark.parametrize("path", ["log", "state", "state?position=1"])
def test_looking_at_what_is_not_there(path: str, server: Server, name: str) -> None:
    problem(server.http.get(f"/v1/sessions/{name}/{path}"), 404, "session_not_found")
    server.steps(name, "abc", model=MODEL)
    server.http.delete(f"/v1/sessions/{name}")
    problem(server.http.get(f"/v1/sessions/{name}/{path}"), 410, "session_closed")


def test_a_state_beyond_the_end_is_refused(server: Server, name: str) -> None:
    server.steps(name, "abc", model=MODEL)
    problem(server.http.get(f"/v1/sessions/{name}/state?position=4"), 409, "position_mismatch")
    problem(server.http.get(f"/v1/sessions/{name}/state?position=-1"), 422, "invalid_input")


# ---------------------------------------------------------------------- verify


@pytest.fixture(scope="module")
def snapshots(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes snapshots often and may be killed."""
    one = Server(models, tmp_path_factory.mktemp("snapshots"), snapshot_every=16)
    yield one.start()
    one.close()


def test_a_session_verifies(models: Path, snapshots: Server, name: str) -> None:
    feed(snapshots, name, inputs_of(models, MODEL, 100))
    snapshots.generate(name, max_tokens=20)
    for _ in range(2):
        found = snapshots.verify(name)
        digest = states.digest(row_of(models, snapshots.state_file(name)))
        assert found == {"verified": True, "from_position": 0, "to_position": 120, "state_sha256": digest}
        at = snapshots.verify(name, position=70)
        assert (at["verified"], at["to_position"]) == (True, 70)
        snapshots.restart()


def row_of(models: Path, data: bytes) -> states.Row:
    return states.load(newest(models, MODEL).manifest.states, data)


def test_a_short_session_that_is_not_in_memory_has_nothing_to_compare(snapshots: Server, name: str) -> None:
    snapshots.steps(name, "abc", model=MODEL)
    assert snapshots.verify(name)["verified"] is True
    snapshots.restart()
    found = snapshots.verify(name)
    assert (found["verified"], found["reason"], found["to_position"]) == (None, "nothing_to_compare", 3)


def test_an_empty_session_has_nothing_to_compare(snapshots: Server, name: str) -> None:
    snapshots.create(MODEL, name)
    assert snapshots.verify(name)["verified"] is None


def test_a_verify_beyond_the_end_is_refused(snapshots: Server, name: str) -> None:
    snapshots.steps(name, "abc", model=MODEL)
    problem(snapshots.http.post(f"/v1/sessions/{name}/verify?position=4"), 409, "position_mismatch")


def test_a_snapshot_that_was_tampered_with_is_found_out(models: Path, fresh: MakeServer) -> None:
    one = fresh(snapshot_every=16).start()
    for session in ("honest", "victim"):
        feed(one, session, inputs_of(models, MODEL, 100))
    assert one.verify("victim")["verified"] is True
    one.terminate()
    with contextlib.closing(sqlite3.connect(Path(str(one.settings["data_dir"])) / "sessions.sqlite")) as db:
        rows = db.execute("SELECT rowid, branch, snapshot FROM snapshots").fetchall()
        branches = sorted({row[1] for row in rows})
        assert len(branches) == 2
        for rowid, branch, snapshot in rows:
            if branch == branches[0]:
                changed = bytearray(snapshot[:-4])
                changed[-100] ^= 1  # among the tensors: the graph's checksum is all that follows them
                sealed = bytes(changed) + zlib.crc32(changed).to_bytes(4, "little")
                db.execute("UPDATE snapshots SET snapshot = ? WHERE rowid = ?", (sealed, rowid))
        db.commit()
    one.start()
    found = {session: one.verify(session) for session in ("honest", "victim")}
    assert sorted(str(one["verified"]) for one in found.values()) == ["False", "True"]
    wrong = next(one for one in found.values() if not one["verified"])
    assert 0 < wrong["differs_at"] < 100


# ---------------------------------------------------------------------- the state as a file


@pytest.mark.parametrize("model", ["tiny-letters", "tiny-people", "tiny-weather"])
def test_a_state_goes_on_in_another_session_and_another_server(
    model: str, models: Path, server: Server, mortal: Server, name: str
) -> None:
    inputs = inputs_of(models, model, 80)
    server.steps(name, inputs[:50], model=model)
    data = server.state_file(name)
    original = server.steps(name, inputs[50:], predictions="all")
    for one in (server, mortal):
        uploaded = one.upload(f"{name}-up", data)
        assert uploaded.status_code == 201 and uploaded.headers["location"] == f"/v1/sessions/{name}-up"
        made = uploaded.json()
        assert (made["position"], made["model"], made["seed"]) == (50, model, server.session(name)["seed"])
        answer = one.steps(f"{name}-up", inputs[50:], predictions="all")
        # What was predicted before the state was taken is not in it: the first input surprises nobody.
        answer["predictions"][0].pop("surprise", None)
        expected = {**original, "predictions": [dict(one) for one in original["predictions"]]}
        expected["predictions"][0].pop("surprise", None)
        assert answer == {**expected, "session": f"{name}-up", "epoch": answer["epoch"]}
        assert one.state(f"{name}-up") == server.state(name)
    mortal.restart()
    assert mortal.state(f"{name}-up") == server.state(name)


def test_an_uploaded_session_writes_what_the_original_writes(server: Server, name: str) -> None:
    server.steps(name, "abcdef", model=MODEL)
    server.upload(f"{name}-up", server.state_file(name))
    texts = [server.generate(session, inputs="gh", max_tokens=60)["text"] for session in (name, f"{name}-up")]
    assert texts[0] == texts[1]


def test_what_can_be_done_with_an_uploaded_session(server: Server, name: str) -> None:
    server.steps(name, "abcdef", model=MODEL)
    up, data = f"{name}-up", server.state_file(name)
    assert server.upload(up, data).status_code == 201
    problem(server.upload(up, data), 409, "session_exists")
    problem(server.post(f"/v1/sessions/{up}/generate", {}), 422, "empty_session")
    assert server.position(up) == 6 and server.log_of(up) == []
    assert server.state(up) == server.state(name) == server.state_at(up, 6)
    child = server.fork(up)["id"]
    early = problem(server.post(f"/v1/sessions/{up}/fork", {"position": 3}), 410, "log_truncated")
    assert early["oldest_position"] == 6
    problem(server.post(f"/v1/sessions/{up}/rewind", {"position": 5}), 410, "log_truncated")
    problem(server.http.get(f"/v1/sessions/{up}/state?position=5"), 410, "log_truncated")
    problem(server.http.get(f"/v1/sessions/{up}/log?after=5"), 410, "log_truncated")
    server.steps(up, "abc")
    assert [entry["position"] for entry in server.log_of(up)] == [7, 8, 9]
    assert server.rewind(up, 6)["position"] == 6 and server.state(up) == server.state(name)
    server.steps(child, "abc")
    server.steps(name, "abc")
    assert server.state(child) == server.state(name)
    assert server.rewind(up, 0)["position"] == 0
    assert server.state(up) == fresh_state(server, MODEL, [])


def test_an_uploaded_session_verifies_from_its_beginning(server: Server, name: str) -> None:
    server.steps(name, "abcdef", model=MODEL)
    server.upload(f"{name}-up", server.state_file(name))
    assert server.verify(f"{name}-up")["verified"] is None
    server.steps(f"{name}-up", "abc")
    found = server.verify(f"{name}-up")
    assert (found["verified"], found["from_position"], found["to_position"]) == (True, 6, 9)


def test_an_uploaded_session_can_not_be_migrated(server: Server, name: str) -> None:
    server.steps(name, "go left", model="tiny-tags", version=1)
    server.upload(f"{name}-up", server.state_file(name))
    assert server.session(f"{name}-up")["version"] == 1
    problem(server.post(f"/v1/sessions/{name}-up/migrate", {"version": 2}), 410, "log_truncated")


def test_an_uploaded_forecaster_forecasts_once_it_is_fed(server: Server, name: str) -> None:
    server.steps(name, [40, 41, 42], model="tiny-single")
    server.upload(f"{name}-up", server.state_file(name))
    problem(server.post(f"/v1/sessions/{name}-up/forecast", {"horizon": 3}), 422, "empty_session")
    for session in (name, f"{name}-up"):
        server.steps(session, [43])
    ahead = [server.ok(server.post(f"/v1/sessions/{s}/forecast", {"horizon": 3})) for s in (name, f"{name}-up")]
    assert ahead[0]["forecast"] == ahead[1]["forecast"]


def test_a_state_at_position_0_is_a_new_session(server: Server, name: str) -> None:
    server.create(MODEL, name, seed=3)
    assert server.upload(f"{name}-up", server.state_file(name)).status_code == 201
    assert server.session(f"{name}-up")["position"] == 0
    texts = [server.generate(session, max_tokens=30)["text"] for session in (name, f"{name}-up")]
    assert texts[0] == texts[1]


def rewritten(data: bytes, tensors: dict[str, Any] | None = None, **said: str | None) -> bytes:
    """A state file with other tensors or other words about them; None leaves a word out."""
    metadata = {k: v for k, v in {**states.metadata(data), **said}.items() if v is not None}
    return safetensors.numpy.save({**safetensors.numpy.load(data), **(tensors or {})}, metadata)


def tampered(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[-5] ^= 1
    return bytes(changed)


def with_state(value: float, digest: bool) -> Callable[[bytes], bytes]:
    """Damage: a number put into the state, with the right checksum or not."""

    def damage(data: bytes) -> bytes:
        found = safetensors.numpy.load(data)
        found["c"] = found["c"].copy()
        found["c"][0, 3] = value
        said = {"state_sha256": states.digest((found["h"], found["c"]))} if digest else {}
        return rewritten(data, found, **said)

    return damage


def nested(data: bytes) -> bytes:
    header = b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    return len(header).to_bytes(8, "little") + header


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "state_mismatch"),
    "garbage": (lambda data: b"\x93NUMPY" * 50, "state_mismatch"),
    "random": (lambda data: random.Random(1).randbytes(2000), "state_mismatch"),
    "zeros": (lambda data: bytes(1000), "state_mismatch"),
    "nested": (nested, "state_mismatch"),
    "huge header": (lambda data: b"\xff" * 8 + data[8:], "state_mismatch"),
    "truncated": (lambda data: data[:-1], "state_mismatch"),
    "header only": (lambda data: data[:40], "state_mismatch"),
    "longer": (lambda data: data + b"\0", "state_mismatch"),
    "one bit": (tampered, "state_mismatch"),
    "a number changed": (with_state(0.25, digest=False), "state_mismatch"),
    "NaN": (with_state(float("nan"), digest=True), "invalid_input"),
    "infinite": (with_state(float("inf"), digest=True), "invalid_input"),
    "other graph": (lambda data: rewritten(data, graph_sha256="0" * 64), "state_mismatch"),
    "other model": (lambda data: rewritten(data, model="tiny-tags"), "state_mismatch"),
    "no model": (lambda data: rewritten(data, model="x" * 5000), "state_mismatch"),
    "without position": (lambda data: rewritten(data, position=None), "state_mismatch"),
    "without checksum": (lambda data: rewritten(data, state_sha256=None), "state_mismatch"),
    "negative position": (lambda data: rewritten(data, position="-1"), "state_mismatch"),
    "huge position": (lambda data: rewritten(data, position="9" * 30), "state_mismatch"),
    "endless position": (lambda data: rewritten(data, position="9" * 6000), "state_mismatch"),
    "position no number": (lambda data: rewritten(data, position="six"), "state_mismatch"),
    "position 0": (lambda data: rewritten(data, position="0"), "state_mismatch"),
    "negative seed": (lambda data: rewritten(data, seed="-1"), "state_mismatch"),
    "huge seed": (lambda data: rewritten(data, seed=str(2**53)), "state_mismatch"),
    "other shape": (lambda data: rewritten(data, {"h": np.zeros((2, 17), "<f4")}), "state_mismatch"),
    "other rank": (lambda data: rewritten(data, {"h": np.zeros(32, "<f4")}), "state_mismatch"),
    "other type": (lambda data: rewritten(data, {"h": np.zeros((2, 16), "<f8")}), "state_mismatch"),
    "tensor missing": (
        lambda data: safetensors.numpy.save({"h": np.zeros((2, 16), "<f4")}, states.metadata(data)),
        "state_mismatch",
    ),
    "no metadata": (lambda data: safetensors.numpy.save(safetensors.numpy.load(data)), "state_mismatch"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_state_file_that_is_not_right_is_refused(what: str, server: Server, name: str) -> None:
    server.steps(name, "abcdef", model=MODEL)
    damage, code = DAMAGES[what]
    problem(server.upload(f"{name}-up", damage(server.state_file(name))), 422, code)
    assert server.http.get(f"/v1/sessions/{name}-up").status_code == 404


def test_a_state_file_of_another_weight_is_refused(server: Server, name: str) -> None:
    server.steps(name, "abcdef", model=MODEL)
    data = server.state_file(name)
    path = f"/v1/sessions/{name}-up/state"
    problem(server.http.put(path, content=data), 415, "unsupported_media_type")
    problem(server.upload(f"{name}-up", data + bytes(100_000)), 413, "payload_too_large")


# ---------------------------------------------------------------------- retention


@pytest.fixture(scope="module")
def cut(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that keeps the last 64 steps, and may be killed."""
    one = Server(models, tmp_path_factory.mktemp("cut"), log_retention=64, snapshot_every=16)
    yield one.start()
    one.close()


def test_what_fell_off_the_log_is_gone_and_the_rest_is_right(models: Path, cut: Server, name: str) -> None:
    inputs = inputs_of(models, MODEL, 500)
    feed(cut, name, inputs)
    child = cut.fork(name)["id"]
    for _ in range(2):
        oldest = problem(cut.http.get(f"/v1/sessions/{name}/state?position=1"), 410, "log_truncated")["oldest_position"]
        assert 500 - 64 - 16 - 7 <= oldest <= 500 - 64
        for session in (name, child):
            for position in (oldest, oldest + 1, 450, 499, 500):
                assert cut.state_at(session, position) == fresh_state(cut, MODEL, inputs[:position]), position
            problem(cut.http.get(f"/v1/sessions/{session}/state?position={oldest - 1}"), 410, "log_truncated")
            entries = cut.log_of(session)
            assert [entry["position"] for entry in entries] == list(range(oldest + 1, 501))
            assert cut.verify(session)["verified"] is True
        for operation in ("rewind", "fork"):
            refused = cut.post(f"/v1/sessions/{name}/{operation}", {"position": oldest - 1})
            assert problem(refused, 410, "log_truncated")["oldest_position"] == oldest
        cut.restart()
    assert cut.rewind(name, oldest)["position"] == oldest
    assert cut.state(name) == fresh_state(cut, MODEL, inputs[:oldest])
    assert cut.rewind(name, 0)["position"] == 0
    cut.steps(child, inputs[:30])
    assert cut.state(child) == fresh_state(cut, MODEL, inputs + inputs[:30])


def test_a_cut_session_wakes_right_after_every_kill(models: Path, cut: Server, name: str) -> None:
    inputs = inputs_of(models, MODEL, 330)
    cut.create(MODEL, name)
    for begin in range(0, 330, 110):
        for i in range(begin, begin + 110, 11):
            cut.steps(name, inputs[i : i + 11])
        cut.restart()
        assert cut.state(name) == fresh_state(cut, MODEL, inputs[: begin + 110])


def test_one_long_feed_cuts_the_log_too(models: Path, cut: Server, name: str) -> None:
    inputs = inputs_of(models, MODEL, 3000)
    cut.steps(name, inputs, model=MODEL)
    assert 3000 - 64 - 64 <= cut.log_of(name)[0]["position"] - 1 <= 3000 - 64
    everything = inputs + cut.generate(name, max_tokens=100)["tokens"]
    oldest = cut.log_of(name)[0]["position"] - 1
    assert 3100 - 64 - 64 <= oldest <= 3100 - 64
    assert cut.state_at(name, oldest) == fresh_state(cut, MODEL, everything[:oldest])
    assert cut.state(name) == fresh_state(cut, MODEL, everything)


def test_a_large_answer_that_fell_off_the_log_is_gone(cut: Server, name: str) -> None:
    body = {"inputs": "abcdefghij" * 8, "predictions": "all", "alternatives": 13, "model": MODEL}
    path = f"/v1/sessions/{name}/steps"
    first = cut.post(path, body, "key")
    assert cut.post(path, body, "key").content == first.content
    for _ in range(10):
        cut.steps(name, "a" * 30)
    oldest = problem(cut.post(path, body, "key"), 410, "log_truncated")["oldest_position"]
    assert 0 < oldest <= 380 - 64 and cut.position(name) == 380


def test_a_cut_session_is_not_migrated(cut: Server, name: str) -> None:
    cut.create("tiny-tags", name, version=1)
    for _ in range(30):
        cut.steps(name, "go left right stop turn")
    problem(cut.post(f"/v1/sessions/{name}/migrate", {"version": 2}), 410, "log_truncated")
    assert cut.session(name)["version"] == 1


# ---------------------------------------------------------------------- parking


def test_a_parked_session_wakes_with_few_steps(models: Path, fresh: MakeServer) -> None:
    one = fresh(max_resident=2).start()
    inputs = {f"s{i}": inputs_of(models, MODEL, 33 + 28 * i, i) for i in range(7)}
    for session, given in inputs.items():
        feed(one, session, given, chunk=5)
    assert one.metric("recurra_sessions_evicted_total", model=MODEL, reason="parked") >= 5
    one.steps("other", "a", model=MODEL)
    one.steps("other-2", "a", model=MODEL)
    woken, folded = (
        one.metric("recurra_wake_seconds_count", model=MODEL),
        one.metric("recurra_steps_total", model=MODEL),
    )
    for session in inputs:
        assert one.steps(session, "a")["position"] == len(inputs[session]) + 1
    assert one.metric("recurra_wake_seconds_count", model=MODEL) - woken == 7
    assert one.metric("recurra_steps_total", model=MODEL) - folded <= 7 * (32 + 5 + 1)
    one.restart()
    for session, given in inputs.items():
        assert one.state(session) == fresh_state(one, MODEL, [*given, 2])
