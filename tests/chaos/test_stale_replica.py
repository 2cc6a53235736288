"""Two replicas on one Redis: one that missed what the other did never commits onto the session's new life."""

import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checker import folded, read_log
from live import Server, read_events, tokens_of
from redis_server import RedisServer

TEXT, TAGS = "tiny-letters", "tiny-tags"


@pytest.fixture(scope="module")
def replicas(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Two replicas of one service on one Redis."""
    redis = RedisServer(tmp_path_factory.mktemp("redis")).start()
    stale, other = (Server(models, tmp_path_factory.mktemp("replica"), store=redis.url) for _ in range(2))
    try:
        yield stale.start(), other.start()
    finally:
        stale.close()
        other.close()
        redis.kill()


@pytest.fixture
def name() -> str:
    """A session that no other test uses."""
    return secrets.token_hex(6)


def rewound(other: Server, name: str) -> list[object]:
    """Rewind and feed something else, to the very position where the session stood; the log as it is now."""
    assert other.ok(other.post(f"/v1/sessions/{name}/rewind", {"position": 2}))["position"] == 2
    assert other.steps(name, "jj", position=2)["position"] == 4
    return list("abjj")


def recreated(other: Server, name: str) -> list[object]:
    """Delete the session and begin another one under its id, up to the same position."""
    assert other.http.delete(f"/v1/sessions/{name}").status_code == 204
    assert other.steps(name, "ihgf", model=TEXT)["position"] == 4
    return list("ihgf")


NewLife = Callable[[Server, str], list[object]]
NEW_LIVES: list[NewLife] = [rewound, recreated]


@pytest.mark.parametrize("missed", NEW_LIVES)
def test_a_step_without_a_position_lands_on_the_new_life(
    missed: NewLife, replicas: tuple[Server, Server], name: str
) -> None:
    stale, other = replicas
    stale.steps(name, "abcd", model=TEXT)
    now = missed(other, name)
    epoch = other.session(name)["epoch"]
    answer = stale.steps(name, "e")
    assert (answer["epoch"], answer["position"]) == (epoch, 5)
    for one in replicas:
        assert [value for _, value in read_log(one, name)] == [*now, "e"]
        assert one.state(name) == folded(one, TEXT, [*now, "e"])


@pytest.mark.parametrize("missed", NEW_LIVES)
def test_a_generate_lands_on_the_new_life(missed: NewLife, replicas: tuple[Server, Server], name: str) -> None:
    stale, other = replicas
    stale.generate(name, inputs="abc", max_tokens=1, model=TEXT)
    now = missed(other, name)
    stale.generate(name, max_tokens=3)
    log = [value for _, value in read_log(other, name)]
    assert log[:4] == now if missed is recreated else log[2:4] == ["j", "j"]
    assert len(log) == 7 and other.state(name) == stale.state(name) == folded(other, TEXT, log)


def test_a_generate_asked_again_where_another_is_under_way_on_what_was_is_answered(
    replicas: tuple[Server, Server], name: str
) -> None:
    stale, other = replicas
    path, body = f"/v1/sessions/{name}/generate", {"inputs": "abc", "max_tokens": 200, "seed": 7}
    other.steps(name, "ab", model=TEXT)
    whole = other.generate(other.fork(name)["id"], **body)["tokens"]
    body = {**body, "stream": True}
    with ThreadPoolExecutor() as pool:
        begun = stale.metric("recurra_steps_total", model=TEXT, version="1")
        late = pool.submit(stale.post, path, {"inputs": "abc" * 40_000, "max_tokens": 1}, "late")
        while stale.metric("recurra_steps_total", model=TEXT, version="1") == begun:
            assert not late.done()
        with other.http.stream("POST", path, json=body, headers={"Idempotency-Key": "key"}) as response:
            read_events(response, 5)
        assert not late.done(), "it is not in the way"
        again = stale.post(path, body, "key")
        assert again.status_code == 200, again.text
        assert late.result().status_code == 200
    events = read_events(again)
    assert len(tokens_of(events)) >= 5 and tokens_of(events) == whole[: len(tokens_of(events))]
    assert events[-1].data["finish_reason"] in ("length", "cancelled")


@pytest.mark.parametrize("missed", NEW_LIVES)
def test_the_old_position_is_refused_and_the_true_one_is_told(
    missed: NewLife, replicas: tuple[Server, Server], name: str
) -> None:
    stale, other = replicas
    stale.steps(name, "abcdabcd", model=TEXT)
    now = missed(other, name)
    refused = stale.post(f"/v1/sessions/{name}/steps", {"inputs": "e", "position": 8})
    assert refused.status_code == 409 and refused.json()["code"] == "position_mismatch"
    assert refused.json()["position"] == 4 and refused.json()["epoch"] == other.session(name)["epoch"]
    assert [value for _, value in read_log(other, name)] == now


@pytest.mark.parametrize("missed", NEW_LIVES)
def test_reads_on_a_stale_replica_show_the_new_life(
    missed: NewLife, replicas: tuple[Server, Server], name: str
) -> None:
    stale, other = replicas
    stale.steps(name, "abcd", model=TEXT)
    before = stale.state(name)
    now = missed(other, name)
    assert stale.state(name) == other.state(name) == folded(other, TEXT, now) != before
    assert stale.session(name) == other.session(name)
    assert read_log(stale, name) == read_log(other, name) == [("fed", value) for value in now]
    assert stale.ok(stale.http.post(f"/v1/sessions/{name}/verify"))["verified"] is not False


def test_a_forecast_on_a_stale_replica_is_of_the_new_life(replicas: tuple[Server, Server], name: str) -> None:
    stale, other = replicas
    model, first, second = "tiny-weather", [[1.0, 0], [2.0, 1], [3.0, 2]], [[30.0, 12], [31.0, 13]]
    stale.steps(name, first, model=model)
    body = {"horizon": 2, "future": [{"hour": 3}, {"hour": 4}]}
    before = stale.ok(stale.post(f"/v1/sessions/{name}/forecast", body))["forecast"]
    other.ok(other.post(f"/v1/sessions/{name}/rewind", {"position": 1}))
    other.steps(name, second)
    now = stale.ok(stale.post(f"/v1/sessions/{name}/forecast", body))
    assert now["position"] == 3 and now["forecast"] != before
    assert now == other.ok(other.post(f"/v1/sessions/{name}/forecast", body))


def test_a_deleted_session_is_gone_on_every_replica(replicas: tuple[Server, Server], name: str) -> None:
    stale, other = replicas
    stale.steps(name, "abcd", model=TEXT)
    assert other.http.delete(f"/v1/sessions/{name}").status_code == 204
    for body in ({"inputs": "e"}, {"inputs": "e", "position": 4}, {"inputs": "e", "position": 4, "model": TEXT}):
        refused = stale.post(f"/v1/sessions/{name}/steps", body)
        assert refused.status_code == 410 and refused.json()["code"] == "session_closed", body
    assert stale.http.get(f"/v1/sessions/{name}/state").status_code == 410
    assert stale.post(f"/v1/sessions/{name}/generate", {"max_tokens": 1}).status_code == 410


def test_a_replica_that_missed_a_migration_goes_on_with_the_new_version(
    replicas: tuple[Server, Server], name: str
) -> None:
    stale, other = replicas
    inputs = ["go", "left", "left", "turn"]
    stale.steps(name, inputs, model=TAGS, version=1)
    migrated = other.ok(other.post(f"/v1/sessions/{name}/migrate", {"version": 2}))
    assert stale.session(name) == other.session(name)
    assert stale.state(name) == other.state(name) == folded(other, TAGS, inputs)
    answer = stale.steps(name, ["stop"], position=4)
    assert (answer["epoch"], answer["position"]) == (migrated["epoch"], 5)
    assert stale.steps(name, ["go"])["position"] == 6
    assert other.session(name)["version"] == 2
    assert stale.state(name) == other.state(name) == folded(other, TAGS, [*inputs, "stop", "go"])


def test_a_fork_on_a_stale_replica_leaves_the_new_life(replicas: tuple[Server, Server], name: str) -> None:
    stale, other = replicas
    stale.steps(name, "abcd", model=TEXT)
    now = rewound(other, name)
    child = stale.ok(stale.post(f"/v1/sessions/{name}/fork", {}))
    assert child["parent"] == {"session": name, "position": 4}
    assert other.state(child["id"]) == folded(other, TEXT, now)


def test_a_rewind_on_a_stale_replica_is_judged_by_the_new_life(replicas: tuple[Server, Server], name: str) -> None:
    stale, other = replicas
    stale.steps(name, "abcdabcd", model=TEXT)
    rewound(other, name)
    refused = stale.post(f"/v1/sessions/{name}/rewind", {"position": 6})
    assert refused.status_code == 409 and refused.json()["position"] == 4
    assert stale.ok(stale.post(f"/v1/sessions/{name}/rewind", {"position": 3}))["position"] == 3
    assert [value for _, value in read_log(other, name)] == list("abj")
