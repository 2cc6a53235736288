"""`POST /v1/steps`: many sessions in one request, each line as if it had come alone."""

import json
import socket
import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import MakeServer, Server, problem
from tiny import LETTERS as SYMBOLS

from service.api.bulk import MAX_LINES, PART_BYTES, WINDOW

NDJSON = {"Content-Type": "application/x-ndjson"}
LETTERS = {"model": "tiny-letters", "seed": 1}


def bulk(server: Server, *lines: Any, key: str | None = None) -> list[Any]:  # noqa: ANN401 (any JSON)
    """The answers to lines that are given as objects, or as they are sent."""
    body = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    return answers(post(server, body.encode(), key))


def post(server: Server, body: bytes, key: str | None = None) -> httpx.Response:
    headers = NDJSON if key is None else {**NDJSON, "Idempotency-Key": key}
    return server.http.post("/v1/steps", content=body, headers=headers)


def answers(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def code(answer: Any) -> tuple[int, str]:  # noqa: ANN401 (any JSON)
    return answer["error"]["status"], answer["error"]["code"]


# ---------------------------------------------------------------------- as if each had come alone


def test_every_line_is_answered_in_order(server: Server, name: str) -> None:
    sessions = [f"{name}-{i}" for i in range(300)]
    found = bulk(server, *({"session": one, "inputs": "ab", **LETTERS} for one in sessions))
    assert [one["session"] for one in found] == sessions
    assert {(one["position"], one["steps"], one["created"]) for one in found} == {(2, 2, True)}
    assert [server.position(one) for one in sessions[::50]] == [2] * 6


@pytest.mark.parametrize(
    ("model", "fed"),
    [
        ("tiny-letters", ["abc", [3], "jj"]),
        ("tiny-tags", [["go", "left"], ["left"]]),
        ("tiny-weather", [[[10, 1]], [[11, 2], [12, 3]]]),
        ("tiny-single", [[40, 41], [42]]),
    ],
)
@pytest.mark.parametrize("predictions", ["last", "all", "none"])
def test_an_answer_is_the_one_that_a_post_of_its_own_gets(
    model: str, fed: list[Any], predictions: str, server: Server, name: str
) -> None:
    first = {"model": model, "seed": 4, "predictions": predictions}
    for inputs in fed:
        alone = server.steps(f"{name}-alone", inputs, **first)
        for i, together in enumerate(
            bulk(server, *({"session": f"{name}-{i}", "inputs": inputs, **first} for i in range(20)))
        ):
            assert together == {**alone, "session": f"{name}-{i}"}
    assert server.state(f"{name}-7") == server.state(f"{name}-alone")


def test_no_part_of_an_answer_is_long(server: Server, name: str) -> None:
    lines = [{"session": f"{name}-{i}", "inputs": [i % 10], "alternatives": 13, **LETTERS} for i in range(300)]
    bulk(server, *lines)
    for line in lines:
        del line["seed"]  # the sessions live now: these are plain steps
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client, client.makefile("rb") as answer:
        head = f"POST /v1/steps HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/x-ndjson\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while answer.readline() != b"\r\n":
            pass
        parts: list[bytes] = []
        while size := int(answer.readline(), 16):
            parts.append(answer.read(size))
            answer.readline()
    said = [json.loads(line) for line in b"".join(parts).splitlines()]
    assert [one["session"] for one in said] == [line["session"] for line in lines]
    assert all(one["position"] == 2 and len(one["predictions"][0]["alternatives"]) == 13 for one in said)
    assert len(parts) > 2 and max(map(len, parts)) <= PART_BYTES


LINES = st.lists(
    st.tuples(
        st.sampled_from("pqrs"),
        st.text("abcdefghij", min_size=1, max_size=4) | st.just("?"),
        st.sampled_from([None, None, None, 0, 3]),
        st.sampled_from(["last", "all", "none"]),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, number=st.uuids())
def test_lines_of_a_session_run_in_order_and_stop_at_the_first_that_is_refused(
    lines: list[tuple[str, str, int | None, str]],
    number: UUID,
    server: Server,
) -> None:
    """The answers and the sessions are those of as many single requests, but for what follows a refusal."""
    sent = [
        {"session": f"{number}-{one}", "inputs": inputs, "position": position, "predictions": shown, **LETTERS}
        for one, inputs, position, shown in lines
    ]
    failed: set[str] = set()
    for line, found in zip(sent, bulk(server, *sent), strict=True):
        session = str(line["session"])
        if session in failed:
            assert code(found) == (424, "skipped")
            continue
        body = {name: value for name, value in line.items() if name != "session"}
        alone = server.post(f"/v1/sessions/{session}-alone/steps", body)
        if alone.status_code == 200:
            assert found == {**alone.json(), "session": session}
        else:
            failed.add(session)
            assert found == {"session": session, "error": {**alone.json(), "detail": found["error"]["detail"]}}
    for session in {str(line["session"]) for line in sent}:
        lives = server.http.get(f"/v1/sessions/{session}").status_code
        assert lives == server.http.get(f"/v1/sessions/{session}-alone").status_code
        if lives == 200:
            assert server.log_of(session) == [
                {**entry, "at": other["at"]}
                for entry, other in zip(server.log_of(f"{session}-alone"), server.log_of(session), strict=True)
            ]


def test_a_line_waits_for_its_session_and_others_do_not(server: Server, name: str) -> None:
    body = {"model": "tiny-letters", "max_tokens": 20_000, "seed": 1, "stream": True}
    with server.http.stream("POST", f"/v1/sessions/{name}/generate", json=body) as held:
        assert held.status_code == 200
        lines = [{"session": f"{name}-free", "inputs": "a", **LETTERS}, {"session": name, "inputs": "a"}]
        content = "".join(json.dumps(line) + "\n" for line in lines)
        with server.http.stream("POST", "/v1/steps", content=content, headers=NDJSON) as response:
            came = response.iter_lines()
            assert json.loads(next(came))["session"] == f"{name}-free"
            server.ok(server.post(f"/v1/sessions/{name}/cancel", None))
            assert json.loads(next(came))["session"] == name


def test_more_lines_than_are_under_way_at_once_keep_their_order(fresh: MakeServer, name: str) -> None:
    one = fresh(store="memory").start()
    inputs = [i % 7 for i in range(WINDOW + 500)]
    lines = [{"session": f"{name}-{i % 5}", "inputs": [x], "model": "tiny-letters"} for i, x in enumerate(inputs)]
    found = bulk(one, *lines)
    assert [answer["position"] for answer in found] == [i // 5 + 1 for i in range(len(lines))]
    assert [entry["input"] for entry in one.log_of(f"{name}-1")] == [SYMBOLS[x] for x in inputs[1::5]]


# ---------------------------------------------------------------------- what is refused


def test_a_line_that_is_refused_harms_no_other(server: Server, name: str) -> None:
    found = bulk(
        server,
        {"session": f"{name}-a", "inputs": "a", **LETTERS},
        "nothing\n",
        {"session": f"{name}-b", "inputs": "?", **LETTERS},
        {"session": f"{name}-b", "inputs": "b", **LETTERS},
        {"session": f"{name}-c", "inputs": "c"},
        {"session": f"{name}-d", "inputs": "d", "unknown": 1, **LETTERS},
        {"session": f"{name}-d", "inputs": "d", **LETTERS},
        {"session": "no id", "inputs": "d", **LETTERS},
        {"inputs": "d", **LETTERS},
        [1],
        {"session": f"{name}-a", "inputs": "a", "position": 7},
        {"session": f"{name}-e", "inputs": "e", **LETTERS},
    )
    codes = [code(one) if "error" in one else one["position"] for one in found]
    assert codes == [
        1,
        (400, "bad_request"),
        (422, "unknown_symbol"),
        (424, "skipped"),
        (404, "session_not_found"),
        (422, "invalid_input"),
        (424, "skipped"),
        (422, "invalid_input"),
        (422, "invalid_input"),
        (422, "invalid_input"),
        (409, "position_mismatch"),
        1,
    ]
    assert [one["session"] for one in found[1:4]] == [None, f"{name}-b", f"{name}-b"]
    assert found[5]["error"]["errors"][0]["pointer"] == "/unknown" and found[10]["error"]["position"] == 1
    assert server.http.get(f"/v1/sessions/{name}-d").status_code == 404


@pytest.mark.parametrize("cut", [1, 5, 20, 40])
def test_a_last_line_that_was_cut_feeds_nothing(cut: int, server: Server, name: str) -> None:
    line = json.dumps({"session": name, "inputs": "abc", **LETTERS})
    found = bulk(server, {"session": f"{name}-a", "inputs": "a", **LETTERS}, line[:-cut])
    assert found[0]["position"] == 1 and code(found[1]) == (400, "bad_request")
    assert server.http.get(f"/v1/sessions/{name}").status_code == 404
    assert bulk(server, line)[0]["position"] == 3  # whole, but without a line end


def test_empty_lines_and_carriage_returns_do_not_count(server: Server, name: str) -> None:
    line = json.dumps({"session": name, "inputs": "a", **LETTERS})
    assert [one["position"] for one in bulk(server, f"\n\r\n{line}\r\n\n", f"{line}\n  \n")] == [1, 2]
    assert bulk(server) == []


def test_a_body_that_is_too_large_or_of_another_type_feeds_nothing(server: Server, name: str) -> None:
    line = json.dumps({"session": name, "inputs": "a", **LETTERS}).encode()
    problem(post(server, line + b"\n" * 100_000), 413, "payload_too_large")
    problem(
        server.http.post("/v1/steps", content=line, headers={"Content-Type": "application/json"}),
        415,
        "unsupported_media_type",
    )
    assert server.http.get(f"/v1/sessions/{name}").status_code == 404


def test_a_body_of_too_many_lines_feeds_nothing(server: Server, name: str) -> None:
    good = json.dumps({"session": name, "inputs": "a", **LETTERS}).encode()
    for filling in (b"", b"1"):
        body = good + (b"\n" + filling) * (MAX_LINES + 1)
        refused = post(server, body)
        problem(refused, 413, "payload_too_large")
    assert server.http.get(f"/v1/sessions/{name}").status_code == 404


def test_overload_is_the_error_of_a_line(fresh: MakeServer, name: str) -> None:
    one = fresh(max_queue_steps=1000, store="memory").start()
    found = bulk(one, *({"session": f"{name}-{i}", "inputs": "a" * 400, "model": "tiny-letters"} for i in range(60)))
    assert {code(answer) for answer in found if "error" in answer} == {(503, "overloaded")}
    fed = [answer["session"] for answer in found if "error" not in answer]
    assert 2 <= len(fed) < 60
    listed = one.ok(one.http.get("/v1/sessions?limit=1000"))["data"]
    assert sorted(fed) == sorted(session["id"] for session in listed)


# ---------------------------------------------------------------------- once, and only once


def test_a_line_with_a_key_is_fed_once(server: Server, name: str) -> None:
    lines = [{"session": f"{name}-{i % 4}", "inputs": [i], "key": f"k{i}", "model": "tiny-letters"} for i in range(10)]
    first = bulk(server, *lines)
    assert bulk(server, *lines) == first
    assert bulk(server, *reversed(lines)) == first[::-1]
    body = {name: value for name, value in lines[5].items() if name not in ("session", "key")}
    alone = server.post(f"/v1/sessions/{lines[5]['session']}/steps", body, key="k5")
    assert alone.headers["idempotent-replayed"] == "true" and alone.json() == first[5]
    other = bulk(server, {**lines[5], "inputs": [9]})
    assert code(other[0]) == (422, "idempotency_key_reused")
    assert [server.position(f"{name}-{i}") for i in range(4)] == [3, 3, 2, 2]


def test_a_key_of_the_request_makes_the_whole_of_it_safe_to_send_again(server: Server, name: str) -> None:
    lines = [{"session": f"{name}-{i % 4}", "inputs": [i], "model": "tiny-letters"} for i in range(10)]
    first = bulk(server, *lines, key="all")
    assert bulk(server, *lines, key="all") == first
    assert sum(server.position(f"{name}-{i}") for i in range(4)) == 10


def test_a_bad_key_is_refused(server: Server, name: str) -> None:
    found = bulk(server, {"session": name, "inputs": "a", "key": "", **LETTERS})
    assert code(found[0]) == (400, "bad_request")
    problem(post(server, b"", key="a\tb"), 400, "bad_request")


def test_a_line_twice_with_one_key_is_fed_once(server: Server, name: str) -> None:
    line = {"session": name, "inputs": "a", "key": "k", **LETTERS}
    first, second = bulk(server, line, line)
    assert first == second and server.position(name) == 1


def test_what_is_answered_survives_a_crash_and_is_not_fed_again(mortal: Server, name: str) -> None:
    lines = [{"session": f"{name}-{i}", "inputs": [i % 10], "key": "k", "model": "tiny-letters"} for i in range(100)]
    first = bulk(mortal, *lines)
    mortal.restart()
    assert bulk(mortal, *lines) == first
    assert mortal.position(f"{name}-50") == 1


# ---------------------------------------------------------------------- clients that leave


def test_what_a_client_that_left_still_waits_for_is_not_fed(server: Server, name: str) -> None:
    body = {"model": "tiny-letters", "max_tokens": 20_000, "seed": 1, "stream": True}
    lines = "".join(json.dumps({"session": name, "inputs": "a"}) + "\n" for _ in range(3)).encode()
    with server.http.stream("POST", f"/v1/sessions/{name}/generate", json=body) as held:
        assert held.status_code == 200
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = f"POST /v1/steps HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/x-ndjson\r\n"
            client.sendall(f"{head}Content-Length: {len(lines)}\r\n\r\n".encode() + lines)
            time.sleep(0.3)
        time.sleep(0.3)
    position = server.suspended(name)
    server.ok(server.post(f"/v1/sessions/{name}/cancel", None))
    assert server.position(name) == position
    assert server.log_of(name)[-1]["source"] == "generated"


def test_sessions_that_go_in_step_do_not_all_have_their_snapshots_in_the_same_request(fresh: MakeServer) -> None:
    every = 64
    one = fresh(snapshot_every=every).start()
    lines = [{"session": f"in-step-{i}", "inputs": "a", **LETTERS} for i in range(100)]
    for _ in range(2 * every):
        bulk(one, *lines)
    one.terminate()
    with closing(sqlite3.connect(Path(str(one.settings["data_dir"])) / "sessions.sqlite")) as db:
        places = Counter(position for (position,) in db.execute("SELECT position FROM snapshots"))
    assert places.total() == len(lines)
    assert every <= min(places) and max(places) < 1.5 * every
    assert max(places.values()) < len(lines) / 4
