"""A request that is sent again with its Idempotency-Key is answered again and done once."""

import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import MakeServer, Server, events_of, problem

from service.work.generate import MAX_TOKENS_KEPT

MODEL = "tiny-letters"
KEPT = 256
LARGE = {"inputs": "abcdefghij" * 8, "predictions": "all", "alternatives": 13}
"""the answer is above 16 KiB"""
WRITE = {"max_tokens": 60, "temperature": 0.9}


def same(first: httpx.Response, second: httpx.Response) -> None:
    """The second answer is the first one, byte for byte, and says that it is a replay."""
    assert "idempotent-replayed" not in first.headers
    assert second.headers.get("idempotent-replayed") == "true", second.text
    assert (second.status_code, second.content) == (first.status_code, first.content)
    assert second.headers.get("location") == first.headers.get("location")
    assert second.headers["content-type"] == first.headers["content-type"]


def memory(server: Server, session: str) -> Any:  # noqa: ANN401 (any JSON)
    """Everything that there is of a session."""
    return server.session(session), server.log_of(session), server.state(session)


def ids(server: Server) -> set[str]:
    found: set[str] = set()
    cursor: str | None = None
    while True:
        params = {"limit": 1000, **({"cursor": cursor} if cursor else {})}
        page = server.ok(server.http.get("/v1/sessions", params=params))
        found |= {one["id"] for one in page["data"]}
        if (cursor := page["next_cursor"]) is None:
            return found


def steps(server: Server, session: str, inputs: object, key: str | None, **more: object) -> httpx.Response:
    return server.post(f"/v1/sessions/{session}/steps", {"inputs": inputs, **more}, key)


def stream_bytes(server: Server, session: str, key: str, **body: object) -> tuple[httpx.Headers, bytes]:
    """A whole streamed generate as it is on the wire."""
    path = f"/v1/sessions/{session}/generate"
    headers = {"Idempotency-Key": key}
    with server.http.stream("POST", path, json={**body, "stream": True}, headers=headers) as response:
        content = response.read()
    assert response.status_code == 200, content
    return response.headers, content


# ---------------------------------------------------------------------- every POST

IN_A_SESSION: dict[str, tuple[str, dict[str, Any]]] = {
    "steps": (MODEL, {"inputs": "ab"}),
    "generate": (MODEL, {"max_tokens": 5, "logprobs": 2}),
    "fork": (MODEL, {}),
    "rewind": (MODEL, {"position": 2}),
    "migrate": ("tiny-tags", {"version": 1}),
    "cancel": (MODEL, {}),
    "verify": (MODEL, {}),
    "forecast": ("tiny-weather", {"horizon": 3, "samples": 5, "future": [{"hour": 3}, {"hour": 4}]}),
}
FED: dict[str, Any] = {MODEL: "abcdef", "tiny-tags": "go left turn right", "tiny-weather": [[10, 1], [11, 2]]}


@pytest.mark.parametrize("operation", IN_A_SESSION)
def test_a_post_on_a_session_is_done_once(operation: str, server: Server, name: str) -> None:
    model, body = IN_A_SESSION[operation]
    server.steps(name, FED[model], model=model)
    path = f"/v1/sessions/{name}/{operation}"
    first = server.post(path, body, name)
    assert first.is_success, first.text
    after, there = memory(server, name), ids(server)
    for _ in range(2):
        same(first, server.post(path, body, name))
    assert memory(server, name) == after and ids(server) == there


ALONE: dict[str, dict[str, Any]] = {
    "/v1/sessions": {"model": MODEL},
    f"/v1/models/{MODEL}/predict": {"sequences": ["abc", "d"], "predictions": "all"},
    f"/v1/models/{MODEL}/generate": {"max_tokens": 30},
    "/v1/models/reload": {},
}


@pytest.mark.parametrize("path", ALONE)
def test_a_post_without_a_session_is_done_once(path: str, server: Server) -> None:
    key = secrets.token_hex(8)
    first = server.post(path, ALONE[path], key)
    assert first.is_success, first.text
    there = ids(server)
    same(first, server.post(path, ALONE[path], key))
    assert ids(server) == there


def test_a_replay_is_counted(server: Server, name: str) -> None:
    before = server.metric("recurra_replays_total")
    for _ in range(3):
        steps(server, name, "ab", "key", model=MODEL)
    assert server.metric("recurra_replays_total") == before + 2


# ---------------------------------------------------------------------- the key

OTHER_BODIES: list[tuple[str, dict[str, Any]]] = [
    ("steps", {"inputs": "abd"}),
    ("steps", {"inputs": "abc", "predictions": "all"}),
    ("steps", {"inputs": "abc", "position": 3}),
    ("generate", {"inputs": "abc"}),
    ("rewind", {"position": 0}),
    ("verify", {}),
    ("verify?position=1", {}),
]


@pytest.mark.parametrize(("operation", "body"), OTHER_BODIES)
def test_another_request_with_the_key_is_refused(
    operation: str, body: dict[str, Any], server: Server, name: str
) -> None:
    server.create(MODEL, name)
    steps(server, name, "abc", "key")
    before = memory(server, name)
    problem(server.post(f"/v1/sessions/{name}/{operation}", body, "key"), 422, "idempotency_key_reused")
    assert memory(server, name) == before
    assert steps(server, name, "abc", "key").headers["idempotent-replayed"] == "true"


def test_a_key_belongs_to_one_session(server: Server, name: str) -> None:
    for session in (name, f"{name}-2"):
        answer = steps(server, session, "abc", "key", model=MODEL)
        assert "idempotent-replayed" not in answer.headers and answer.json()["session"] == session


def test_a_quoted_key_and_a_bare_one_are_the_same(server: Server, name: str) -> None:
    same(steps(server, name, "abc", '"a key"', model=MODEL), steps(server, name, "abc", "a key", model=MODEL))


def test_a_key_of_255_characters_is_taken(server: Server, name: str) -> None:
    for key in ("k" * 255, '"' + "q" * 255 + '"'):
        same(steps(server, name, "abc", key, model=MODEL), steps(server, name, "abc", key, model=MODEL))
    assert server.position(name) == 6


@pytest.mark.parametrize("key", ["", '""', "k" * 256, '"' + "k" * 256 + '"', "a\tb"])
def test_a_key_that_is_none_is_refused(key: str, server: Server, name: str) -> None:
    problem(steps(server, name, "abc", key, model=MODEL), 400, "bad_request")
    assert name not in ids(server)


def test_the_newest_256_keys_of_a_session_are_kept(mortal: Server, name: str) -> None:
    mortal.create(MODEL, name)
    first = {f"key-{i}": steps(mortal, name, "a", f"key-{i}") for i in range(KEPT + 1)}
    mortal.restart()
    for key in (f"key-{KEPT}", "key-128", "key-1"):
        same(first[key], steps(mortal, name, "a", key))
    assert mortal.position(name) == KEPT + 1
    assert "idempotent-replayed" not in steps(mortal, name, "a", "key-0").headers
    assert mortal.position(name) == KEPT + 2


# ---------------------------------------------------------------------- what is kept, and what is not

REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("steps", {"inputs": "ab", "position": 7}, 409, "position_mismatch"),
    ("steps", {"inputs": "Z"}, 422, "unknown_symbol"),
    ("steps", {"inputs": "a", "model": "tiny-tags"}, 409, "model_mismatch"),
    ("forecast", {"horizon": 3}, 422, "task_mismatch"),
    ("generate", {"position": 9}, 409, "position_mismatch"),
    ("rewind", {"position": 9}, 409, "position_mismatch"),
    ("migrate", {"version": 9}, 404, "version_not_found"),
    ("fork", {"position": 9}, 409, "position_mismatch"),
    ("verify?position=9", {}, 409, "position_mismatch"),
]


@pytest.mark.parametrize(("operation", "body", "status", "code"), REFUSED)
def test_after_a_refusal_the_key_is_free(
    operation: str, body: dict[str, Any], status: int, code: str, server: Server, name: str
) -> None:
    server.steps(name, "abc", model=MODEL)
    for _ in range(2):
        problem(server.post(f"/v1/sessions/{name}/{operation}", body, name), status, code)
    answer = steps(server, name, "de", name)
    assert "idempotent-replayed" not in answer.headers and answer.json()["position"] == 5


def test_after_404_the_key_is_free(server: Server, name: str) -> None:
    problem(steps(server, name, "ab", "key"), 404, "session_not_found")
    server.create(MODEL, name)
    assert steps(server, name, "ab", "key").json()["position"] == 2


def test_after_409_at_create_the_key_is_free(server: Server, name: str) -> None:
    server.create(MODEL, name)
    body = {"model": MODEL, "id": name}
    key = secrets.token_hex(8)
    problem(server.post("/v1/sessions", body, key), 409, "session_exists")
    assert server.http.delete(f"/v1/sessions/{name}").status_code == 204
    first = server.post("/v1/sessions", body, key)
    assert first.status_code == 201
    same(first, server.post("/v1/sessions", body, key))


def test_the_key_comes_before_the_position(server: Server, name: str) -> None:
    server.steps(name, "abc", model=MODEL)
    first = steps(server, name, "de", "key", position=3)
    server.steps(name, "f")
    same(first, steps(server, name, "de", "key", position=3))
    assert server.position(name) == 6


def test_one_post_creates_and_its_replay_says_so(server: Server, name: str) -> None:
    first = steps(server, name, "abc", "key", model=MODEL, position=0)
    assert first.json()["created"] is True
    same(first, steps(server, name, "abc", "key", model=MODEL, position=0))
    generated = server.post(f"/v1/sessions/{name}-g/generate", {"model": MODEL, **WRITE}, "key")
    assert generated.json()["created"] is True
    same(generated, server.post(f"/v1/sessions/{name}-g/generate", {"model": MODEL, **WRITE}, "key"))


def test_a_key_outlasts_a_rewind(server: Server, name: str) -> None:
    first = steps(server, name, "abcdef", "key", model=MODEL)
    server.rewind(name, 0)
    same(first, steps(server, name, "abcdef", "key", model=MODEL))
    assert server.position(name) == 0


def test_a_key_outlasts_the_session(server: Server, name: str) -> None:
    first = steps(server, name, "abc", "key", model=MODEL)
    written = server.post(f"/v1/sessions/{name}/generate", WRITE, "write")
    rewound = server.post(f"/v1/sessions/{name}/rewind", {"position": 1}, "rewind")
    assert server.http.delete(f"/v1/sessions/{name}").status_code == 204
    same(first, steps(server, name, "abc", "key", model=MODEL))
    same(written, server.post(f"/v1/sessions/{name}/generate", WRITE, "write"))
    same(rewound, server.post(f"/v1/sessions/{name}/rewind", {"position": 1}, "rewind"))
    assert server.http.get(f"/v1/sessions/{name}").status_code == 410


@pytest.mark.parametrize("how", ["rewind", "delete"])
def test_a_generate_with_logprobs_outlasts_what_it_made(how: str, server: Server, name: str) -> None:
    body = {"model": MODEL, "logprobs": 3, **WRITE}
    first = server.post(f"/v1/sessions/{name}/generate", body, "key")
    if how == "rewind":
        server.rewind(name, 0)
    else:
        server.http.delete(f"/v1/sessions/{name}")
    same(first, server.post(f"/v1/sessions/{name}/generate", body, "key"))


def test_a_large_text_without_a_session_is_answered_again(server: Server, name: str) -> None:
    first, again = (server.post(f"/v1/models/{MODEL}/generate", {"max_tokens": 6000}, name) for _ in range(2))
    assert len(first.content) > 16 * 1024 and again.content == first.content


def test_a_new_life_has_no_keys(server: Server, name: str) -> None:
    steps(server, name, "abc", "key", model=MODEL)
    server.http.delete(f"/v1/sessions/{name}")
    server.create(MODEL, name)
    answer = steps(server, name, "abc", "key", model=MODEL)
    assert "idempotent-replayed" not in answer.headers and answer.json()["epoch"] > 1
    assert server.position(name) == 3


def test_a_fork_has_no_keys(server: Server, name: str) -> None:
    first = steps(server, name, "abc", "key", model=MODEL)
    child = server.fork(name)["id"]
    answer = steps(server, child, "abc", "key", model=MODEL)
    assert "idempotent-replayed" not in answer.headers and answer.json()["position"] == 6
    same(first, steps(server, name, "abc", "key", model=MODEL))


def test_keys_survive_kill_9(mortal: Server, name: str) -> None:
    asked: list[Callable[[], httpx.Response]] = [
        lambda: steps(mortal, name, "abc", "a", model=MODEL),
        lambda: steps(mortal, name, "ab", "b", predictions="all", position=3),
        lambda: mortal.post(f"/v1/sessions/{name}/generate", WRITE, "c"),
        lambda: mortal.post(f"/v1/sessions/{name}/fork", {"position": 4}, f"fork-{name}"),
        lambda: mortal.post(f"/v1/sessions/{name}/rewind", {"position": 60}, "d"),
        lambda: mortal.post(f"/v1/sessions/{name}/verify", {}, "e"),
        lambda: mortal.post(f"/v1/models/{MODEL}/predict", {"sequences": ["ab"]}, f"predict-{name}"),
        lambda: steps(mortal, name, **LARGE, key="f"),
    ]
    first = [ask() for ask in asked]
    before = memory(mortal, name)
    mortal.restart()
    for one, ask in zip(first, asked, strict=True):
        same(one, ask())
    assert memory(mortal, name) == before
    mortal.terminate()
    mortal.start()
    for one, ask in zip(first, asked, strict=True):
        same(one, ask())


def test_keys_outlast_eviction(fresh: MakeServer) -> None:
    one = fresh(max_resident=1).start()
    first = {s: steps(one, s, "abc", "key", model=MODEL) for s in ("a", "b", "c")}
    large = {s: steps(one, s, **LARGE, key="large") for s in first}
    written = {s: one.post(f"/v1/sessions/{s}/generate", {**WRITE, "logprobs": 1}, "write") for s in first}
    for session, answer in first.items():
        same(answer, steps(one, session, "abc", "key", model=MODEL))
        same(large[session], steps(one, session, **LARGE, key="large"))
        same(written[session], one.post(f"/v1/sessions/{session}/generate", {**WRITE, "logprobs": 1}, "write"))
    assert one.metric("recurra_sessions_evicted_total", reason="parked") > 3


def test_keys_are_forgotten_after_their_time(fresh: MakeServer, name: str) -> None:
    one = fresh(idempotency_ttl_s=2).start()
    first = steps(one, name, "abc", "key", model=MODEL)
    same(first, steps(one, name, "abc", "key", model=MODEL))
    time.sleep(2.1)
    assert "idempotent-replayed" not in steps(one, name, "abc", "key", model=MODEL).headers
    assert one.position(name) == 6


# ---------------------------------------------------------------------- large answers


@pytest.mark.parametrize("begin", ["", "abc"])
def test_a_large_answer_is_worked_out_again(begin: str, mortal: Server, name: str) -> None:
    mortal.create(MODEL, name)
    if begin:
        mortal.steps(name, begin)
    first = steps(mortal, name, **LARGE, key="key")
    assert len(first.content) > 16 * 1024
    same(first, steps(mortal, name, **LARGE, key="key"))
    mortal.steps(name, "abc" * 200)
    mortal.generate(name, max_tokens=20)
    same(first, steps(mortal, name, **LARGE, key="key"))
    mortal.restart()
    same(first, steps(mortal, name, **LARGE, key="key"))
    assert mortal.position(name) == len(begin) + 80 + 620


def test_a_large_answer_outlasts_a_rewind_that_keeps_it(server: Server, name: str) -> None:
    first = steps(server, name, **LARGE, key="key", model=MODEL)
    server.steps(name, "abcde")
    server.rewind(name, 80)
    same(first, steps(server, name, **LARGE, key="key", model=MODEL))
    server.rewind(name, 79)
    refused = problem(steps(server, name, **LARGE, key="key", model=MODEL), 410, "log_truncated")
    assert refused["oldest_position"] == 0
    assert server.position(name) == 79


def test_a_large_answer_outlasts_a_migrate(server: Server, name: str) -> None:
    body = {"inputs": "go left turn right stop " * 60, "predictions": "all", "model": "tiny-tags", "version": 1}
    first = server.post(f"/v1/sessions/{name}/steps", body, "key")
    assert len(first.content) > 16 * 1024
    server.ok(server.post(f"/v1/sessions/{name}/migrate", {"version": 2}))
    same(first, server.post(f"/v1/sessions/{name}/steps", body, "key"))


def test_the_first_large_answer_of_an_uploaded_session(server: Server, name: str) -> None:
    server.steps(name, "abc", model=MODEL)
    server.upload(f"{name}-up", server.state_file(name))
    first = steps(server, f"{name}-up", **LARGE, key="key")
    server.steps(f"{name}-up", "abc")
    same(first, steps(server, f"{name}-up", **LARGE, key="key"))


def test_a_large_answer_of_values_is_worked_out_again(server: Server, name: str) -> None:
    rows = [[(i * 37) % 29 - 5.5 if i % 7 else None, i % 24] for i in range(300)]
    body = {"inputs": rows, "predictions": "all", "model": "tiny-weather"}
    first = server.post(f"/v1/sessions/{name}/steps", body, "key")
    assert len(first.content) > 16 * 1024
    server.steps(name, rows[:50])
    same(first, server.post(f"/v1/sessions/{name}/steps", body, "key"))


# ---------------------------------------------------------------------- two at once


def test_of_two_at_once_one_is_done(server: Server, name: str) -> None:
    server.create(MODEL, name)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: steps(server, name, "abcdefghij" * 900, "key"), range(6)))
    assert server.position(name) == 9000
    assert len({answer.content for answer in answers}) == 1
    assert sorted("idempotent-replayed" in answer.headers for answer in answers) == [False] + [True] * 5


def test_a_request_whose_client_left_is_done_once(server: Server, name: str) -> None:
    """Whether the first request was committed or dropped can not be known: the second one settles it."""
    server.create(MODEL, name)
    body, path = "abcdefghij" * 200, f"/v1/sessions/{name}/steps"
    for i in range(20):
        with suppress(httpx.TimeoutException):
            headers = {"Idempotency-Key": f"key-{i}"}
            server.http.post(path, json={"inputs": body}, headers=headers, timeout=0.003 * (i + 1))
        assert steps(server, name, body, f"key-{i}").json()["position"] == 2000 * (i + 1)
    assert server.position(name) == 40_000


def test_of_two_creations_at_once_one_is_done(server: Server, name: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(server.post, "/v1/sessions", {"model": MODEL}, name) for _ in range(6)]
        answers = [one.result() for one in asked]
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_forks_of_a_session_that_is_rewound_all_the_while(server: Server, name: str) -> None:
    """A fork that loses the race against a rewind is tried again, and made once."""
    server.steps(name, "abcdef", model=MODEL)
    before = ids(server)

    def rewind(_: int) -> int:
        return server.post(f"/v1/sessions/{name}/rewind", {"position": 3}).status_code

    def fork(i: int) -> httpx.Response:
        for _ in range(10):
            answer = server.post(f"/v1/sessions/{name}/fork", {"position": 3}, f"{name}-{i}")
            if answer.status_code != 429:
                break
        return answer

    with ThreadPoolExecutor(8) as pool:
        asked = [(pool.submit(rewind, i), pool.submit(fork, i)) for i in range(60)]
        answers = [forked.result() for _, forked in asked]
        assert {rewound.result() for rewound, _ in asked} == {200}
    assert {answer.status_code for answer in answers} == {201}
    assert ids(server) - before == {answer.json()["id"] for answer in answers}
    assert len(ids(server) - before) == 60


def test_another_body_at_once_is_refused(server: Server, name: str) -> None:
    server.create(MODEL, name)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(steps, server, name, c * 20_000, "key") for c in "ab"]
        found = sorted(one.result().status_code for one in asked)
    assert found == [200, 422] and server.position(name) == 20_000


# ---------------------------------------------------------------------- generates


def test_a_generate_is_the_same_as_json_and_as_a_stream(server: Server, name: str) -> None:
    body = {"inputs": "abc", "model": MODEL, **WRITE}
    path = f"/v1/sessions/{name}/generate"
    first = server.post(path, body, "key")
    _, streamed = stream_bytes(server, name, "key", **body)
    headers, again = stream_bytes(server, name, "key", **body)
    assert streamed == again and headers["idempotent-replayed"] == "true"
    assert headers["content-type"].startswith("text/event-stream") and headers["cache-control"] == "no-store"
    same(first, server.post(path, body, "key"))
    seed = server.session(name)["seed"]
    _, unbroken = stream_bytes(server, f"{name}-2", "key", **body, seed=seed)
    assert streamed == unbroken
    assert server.position(name) == 63


def test_a_stream_is_answered_again_as_json(server: Server, name: str) -> None:
    body = {"inputs": "abc", "model": MODEL, "seed": 5, "logprobs": 4, **WRITE}
    headers, streamed = stream_bytes(server, name, "key", **body)
    assert "idempotent-replayed" not in headers
    assert stream_bytes(server, name, "key", **body)[1] == streamed
    found = server.post(f"/v1/sessions/{name}/generate", body, "key")
    assert found.headers["idempotent-replayed"] == "true"
    assert found.json() == {**server.generate(f"{name}-2", **body), "session": name}
    server.steps(name, "abc" * 100)
    assert server.post(f"/v1/sessions/{name}/generate", body, "key").content == found.content


@pytest.mark.parametrize("tokens", [1025, 3000])
def test_a_long_generate_is_read_from_the_log(tokens: int, server: Server, name: str) -> None:
    body = {"inputs": "abc", "model": MODEL, "max_tokens": tokens}
    first = server.post(f"/v1/sessions/{name}/generate", body, "key")
    server.steps(name, "abc")
    same(first, server.post(f"/v1/sessions/{name}/generate", body, "key"))
    server.rewind(name, 100)
    problem(server.post(f"/v1/sessions/{name}/generate", body, "key"), 410, "log_truncated")
    assert server.position(name) == 100


def test_a_generate_that_runs_is_joined(server: Server, name: str) -> None:
    body = {"model": MODEL, "max_tokens": 1500, "seed": 8}
    path = f"/v1/sessions/{name}/generate"
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.post, path, body, "key") for _ in range(3)]
        streamed = pool.submit(stream_bytes, server, name, "key", **body).result()[1]
        answers = [one.result() for one in asked]
    assert len({answer.content for answer in answers}) == 1
    assert answers[0].json() == {**server.generate(f"{name}-2", **body), "session": name}
    assert stream_bytes(server, name, "key", **body)[1] == streamed
    assert streamed.count(b"event: token") == 1500 and server.position(name) == 1501


@pytest.mark.parametrize("as_stream", [True, False])
def test_a_generate_whose_client_left_is_continued(as_stream: bool, server: Server, name: str) -> None:
    body = {"inputs": "ab", "model": MODEL, "max_tokens": 8000, "seed": 3, "logprobs": 2}
    server.stream(name, 10, "key", **body)
    assert 12 <= server.suspended(name) < 8002
    if as_stream:
        again = stream_bytes(server, name, "key", **body)[1]
        assert again == stream_bytes(server, f"{name}-2", "key", **body)[1]
    else:
        answer = server.post(f"/v1/sessions/{name}/generate", body, "key")
        assert answer.json() == {**server.generate(f"{name}-2", **body), "session": name}
        same_again = server.post(f"/v1/sessions/{name}/generate", body, "key")
        assert same_again.content == answer.content
    assert server.state(name) == server.state(f"{name}-2")


@pytest.mark.parametrize("as_stream", [True, False])
def test_a_generate_cut_by_kill_9_is_continued(as_stream: bool, mortal: Server, server: Server, name: str) -> None:
    body = {"inputs": "ab", "model": MODEL, "max_tokens": 3000, "seed": 3}
    path, headers = f"/v1/sessions/{name}/generate", {"Idempotency-Key": "key"}
    with mortal.http.stream("POST", path, json={**body, "stream": True}, headers=headers) as response:
        stream = events_of(response)
        for _ in range(20):
            next(stream)
        assert mortal.process is not None
        mortal.process.kill()
    mortal.restart()
    assert 22 <= mortal.position(name) < 3002
    if as_stream:
        assert stream_bytes(mortal, name, "key", **body)[1] == stream_bytes(server, name, "key", **body)[1]
    else:
        found = mortal.post(path, body, "key").json()
        assert found == server.generate(name, **body)
    assert mortal.state(name) == server.state(name)


@pytest.mark.slow
def test_a_generate_cut_by_sigterm_is_continued(fresh: MakeServer, server: Server, name: str) -> None:
    body = {"inputs": "ab", "model": MODEL, "max_tokens": 4000, "seed": 3}
    one, path = fresh().start(), f"/v1/sessions/{name}/generate"
    with ThreadPoolExecutor(1) as pool:
        cut = pool.submit(httpx.post, one.url + path, json=body, headers={"Idempotency-Key": "key"}, timeout=30)
        wait_for(lambda: name in ids(one) and one.position(name) > 20)
        assert one.terminate() == 0
        problem(cut.result(), 503, "not_ready")
    one.start()
    assert 22 < one.position(name) < 4002
    assert one.post(path, body, "key").json() == server.generate(name, **body)


def test_a_generate_that_was_abandoned_says_cancelled(server: Server, name: str) -> None:
    body = {"inputs": "ab", "model": MODEL, "max_tokens": 5000}
    server.stream(name, 10, "key", **body)
    stood = server.suspended(name)
    assert server.steps(name, "abc", position=stood)["position"] == stood + 3
    found = server.ok(server.post(f"/v1/sessions/{name}/generate", body, "key"))
    assert (found["finish_reason"], found["position"]) == ("cancelled", stood)
    assert found["usage"]["completion_tokens"] == len(found["tokens"]) == stood - 2
    events = stream_bytes(server, name, "key", **body)[1]
    assert events.count(b"event: token") == stood - 2 and b'"finish_reason":"cancelled"' in events
    assert server.position(name) == stood + 3


@pytest.mark.parametrize("how", ["cancel", "rewind", "delete"])
def test_a_generate_that_was_ended_says_cancelled(how: str, server: Server, name: str) -> None:
    body = {"inputs": "ab", "model": MODEL, "max_tokens": 20_000}
    server.stream(name, 10, "key", **body)
    stood = server.suspended(name)
    if how == "cancel":
        server.ok(server.post(f"/v1/sessions/{name}/cancel", {}))
    elif how == "rewind":
        server.rewind(name, stood)
    else:
        server.http.delete(f"/v1/sessions/{name}")
    if how == "delete" and stood - 2 > MAX_TOKENS_KEPT:  # the log that had the tokens is gone
        problem(server.post(f"/v1/sessions/{name}/generate", body, "key"), 410, "session_closed")
        return
    found = server.ok(server.post(f"/v1/sessions/{name}/generate", body, "key"))
    assert (found["finish_reason"], found["position"], len(found["tokens"])) == ("cancelled", stood, stood - 2)


def test_a_running_generate_that_is_cancelled_answers_both(server: Server, name: str) -> None:
    body = {"model": MODEL, "max_tokens": 20_000}
    path = f"/v1/sessions/{name}/generate"
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(server.post, path, body, "key") for _ in range(2)]
        wait_for(lambda: name in ids(server) and server.position(name) > 20)
        server.ok(server.post(f"/v1/sessions/{name}/cancel", {}))
        first, second = (one.result() for one in asked)
    assert first.content == second.content and first.json()["finish_reason"] == "cancelled"
    assert server.position(name) == first.json()["position"]


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.01)


def test_a_generate_whose_prompt_is_refused_leaves_the_key_free(server: Server, name: str) -> None:
    problem(server.post(f"/v1/sessions/{name}/generate", {"model": MODEL, "inputs": "Z"}, "key"), 422, "unknown_symbol")
    assert name not in ids(server)
    assert server.post(f"/v1/sessions/{name}/generate", {"model": MODEL, **WRITE}, "key").status_code == 200


# ---------------------------------------------------------------------- any mix of retries

letters = st.text("abcdefghij", min_size=1, max_size=12)
operations = st.one_of(
    st.tuples(st.just("steps"), letters),
    st.tuples(st.just("generate"), st.integers(1, 12)),
    st.tuples(st.just("stream"), st.integers(1, 12)),
    st.tuples(st.just("cut"), st.integers(200, 400)),
    st.tuples(st.just("rewind"), st.floats(0, 1)),
)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    done=st.lists(st.tuples(operations, st.integers(0, 2), st.booleans()), min_size=1, max_size=8),
    seed=st.integers(0, 2**53 - 1),
)
def test_retries_change_nothing(done: list[Any], seed: int, server: Server) -> None:
    """A client that sends everything up to three times leaves what one leaves that sends it once."""
    patient, nervous = (server.create(MODEL, seed=seed)["id"] for _ in range(2))
    for i, ((what, value), retries, fenced) in enumerate(done):
        once(server, patient, what, value)
        repeatedly(server, nervous, what, value, retries, None if not fenced or what == "rewind" else f"key-{i}")
    assert told(server, nervous) == told(server, patient)


def told(server: Server, session: str) -> Any:  # noqa: ANN401 (any JSON)
    """What is true of a session but its name and its times."""
    found = server.session(session)
    log = [(entry["position"], entry["input"], entry["source"]) for entry in server.log_of(session)]
    return found["epoch"], found["position"], found["seed"], log, server.state(session)


def once(server: Server, session: str, what: str, value: Any) -> None:  # noqa: ANN401 (by operation)
    path, body = request(server, session, what, value)
    server.ok(server.post(f"/v1/sessions/{session}/{path}", body))


def repeatedly(server: Server, session: str, what: str, value: Any, retries: int, key: str | None) -> None:  # noqa: ANN401
    """Send, and send again: with a key where there is one or must be, else fenced by the position."""
    path, body = request(server, session, what, value)
    if what == "rewind":
        key = f"rewind-{secrets.token_hex(4)}"
    if key is None:
        body = {**body, "position": server.position(session)}
    if key is not None and what in ("stream", "cut"):
        server.stream(session, None if what == "stream" else 3, key, **body)
    answers = [server.post(f"/v1/sessions/{session}/{path}", body, key) for _ in range(retries + 1)]
    assert answers[0].status_code == 200, answers[0].text
    for again in answers[1:]:
        assert again.status_code == (200 if key is not None else 409), again.text
        assert key is None or again.content == answers[0].content


def request(server: Server, session: str, what: str, value: Any) -> tuple[str, dict[str, Any]]:  # noqa: ANN401
    match what:
        case "steps":
            return "steps", {"inputs": value}
        case "rewind":
            return "rewind", {"position": int(value * server.position(session))}
        case _:
            return "generate", {"max_tokens": value}
