"""What bad input gets: a refusal that says why; no session changes and the process lives on."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from live import Server

JSON = {"Content-Type": "application/json"}
SESSIONS = {
    "bad-letters": ("tiny-letters", "abc"),
    "bad-tags": ("tiny-tags", ["go", "left"]),
    "bad-people": ("tiny-people", "anna has keys"),
    "bad-weather": ("tiny-weather", [[10, 1], [11, 2]]),
    "bad-single": ("tiny-single", [40, 41]),
}
HUGE = 10**400


@pytest.fixture(scope="module")
def victims(server: Server) -> Server:
    """The server with one fed session of every tiny model."""
    for session, (model, inputs) in SESSIONS.items():
        server.steps(session, inputs, model=model)
    return server


@pytest.fixture(autouse=True)
def unharmed(victims: Server) -> Iterator[None]:
    """Every test here leaves every session and the list of sessions as they were."""
    before = everything(victims)
    yield
    assert everything(victims) == before


def everything(server: Server) -> Any:  # noqa: ANN401 (any JSON)
    listed = server.ok(server.http.get("/v1/sessions?limit=1000"))
    return listed, [server.state(session) for session in SESSIONS]


def refused(response: httpx.Response, status: int, code: str, pointer: str | None = None) -> Any:  # noqa: ANN401
    """Check a problem document; returns it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["code"] == code and problem["status"] == status, problem
    assert problem["type"] and problem["title"] and problem["detail"]
    assert "Traceback" not in response.text and "/" + "work" not in response.text
    if pointer is not None:
        assert [error["pointer"] for error in problem["errors"]] == [pointer], problem
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
    return problem


# ---------------------------------------------------------------------- what does not exist

BODIES: dict[str, dict[str, Any]] = {
    "steps": {"inputs": [0]},
    "generate": {"max_tokens": 1},
    "forecast": {"horizon": 1},
    "cancel": {},
    "fork": {},
    "rewind": {"position": 0},
    "migrate": {"version": 1},
    "verify": {},
}


@pytest.mark.parametrize("operation", BODIES)
def test_an_unknown_session_is_404(operation: str, victims: Server) -> None:
    refused(victims.post(f"/v1/sessions/nobody/{operation}", BODIES[operation]), 404, "session_not_found")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("PATCH", ""),
        ("DELETE", ""),
        ("GET", "/state"),
        ("GET", "/events?after=1.1"),
        ("GET", "/events?after=1.1-end"),
        ("GET", "/log"),
        ("GET", "/state?position=0"),
    ],
)
def test_an_unknown_session_is_404_for_every_look(method: str, path: str, victims: Server) -> None:
    body = {"json": {"metadata": {}}} if method == "PATCH" else {}
    refused(victims.http.request(method, f"/v1/sessions/nobody{path}", **body), 404, "session_not_found")


@pytest.fixture
def gone(victims: Server, name: str) -> str:
    """A session that was deleted."""
    victims.steps(name, [0], model="tiny-letters")
    assert victims.http.delete(f"/v1/sessions/{name}").status_code == 204
    return name


@pytest.mark.parametrize("operation", BODIES)
def test_a_deleted_session_is_410(operation: str, victims: Server, gone: str) -> None:
    refused(victims.post(f"/v1/sessions/{gone}/{operation}", BODIES[operation]), 410, "session_closed")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("PATCH", ""), ("GET", "/state"), ("GET", "/events?after=1.1"), ("GET", "/log")]
)
def test_a_deleted_session_is_410_for_every_look(method: str, path: str, victims: Server, gone: str) -> None:
    body = {"json": {"metadata": {}}} if method == "PATCH" else {}
    refused(victims.http.request(method, f"/v1/sessions/{gone}{path}", **body), 410, "session_closed")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/models/nothing/predict", {"sequences": [[1]]}),
        ("/v1/models/nothing/generate", {}),
        ("/v1/sessions", {"model": "nothing"}),
        ("/v1/sessions/new-one/steps", {"model": "nothing", "inputs": [1]}),
        ("/v1/sessions/new-one/generate", {"model": "nothing"}),
    ],
)
def test_an_unknown_model_is_404_and_names_what_there_is(path: str, body: Any, victims: Server) -> None:  # noqa: ANN401
    problem = refused(victims.post(path, body), 404, "model_not_found")
    assert "nothing" in problem["detail"] and "tiny-letters" in problem["detail"]


def test_looking_at_an_unknown_model_is_404(victims: Server) -> None:
    refused(victims.http.get("/v1/models/nothing"), 404, "model_not_found")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/models/tiny-letters/predict", {"sequences": ["a"], "version": 9}),
        ("/v1/models/tiny-letters/generate", {"version": 9}),
        ("/v1/sessions", {"model": "tiny-letters", "version": 9}),
        ("/v1/sessions/new-one/steps", {"model": "tiny-letters", "version": 9, "inputs": "a"}),
        ("/v1/sessions/new-one/generate", {"model": "tiny-letters", "version": 9}),
    ],
)
def test_an_unknown_version_is_404(path: str, body: Any, victims: Server) -> None:  # noqa: ANN401
    refused(victims.post(path, body), 404, "version_not_found")


@pytest.mark.parametrize("position", [1, 7])
def test_a_session_with_a_past_is_not_created_silently(position: int, victims: Server) -> None:
    body = {"model": "tiny-letters", "inputs": "a", "position": position}
    refused(victims.post("/v1/sessions/nobody/steps", body), 404, "session_not_found")
    refused(victims.post("/v1/sessions/nobody/generate", body), 404, "session_not_found")


def test_a_deleted_session_with_a_past_is_not_created_silently(victims: Server, gone: str) -> None:
    body = {"model": "tiny-letters", "inputs": "a", "position": 1}
    refused(victims.post(f"/v1/sessions/{gone}/steps", body), 410, "session_closed")


@pytest.mark.parametrize("path", ["/nowhere", "/v1/sessions/bad-letters/nowhere", "/v1/models/a/b/c"])
def test_an_unknown_route_is_404(path: str, victims: Server) -> None:
    refused(victims.http.get(path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "/v1/sessions"), ("GET", "/v1/sessions/a/steps"), ("DELETE", "/v1/models"), ("OPTIONS", "/readyz")],
)
def test_a_wrong_method_is_405_and_says_which_are_right(method: str, path: str, victims: Server) -> None:
    response = victims.http.request(method, path)
    refused(response, 405, "method_not_allowed")
    assert response.headers["allow"]


# ---------------------------------------------------------------------- ids, queries, ids of events


@pytest.mark.parametrize("session", ["%20", "a%20b", "%C3%A4", "a" * 129, "a%2Bb", "a@b", "a%00", "a%0A"])
@pytest.mark.parametrize("path", ["", *(f"/{one}" for one in BODIES), "/state", "/log", "/events?after=1.1"])
def test_a_bad_session_id_in_the_path_is_422(session: str, path: str, victims: Server) -> None:
    url = f"/v1/sessions/{session}{path}"
    response = victims.post(url, BODIES[path[1:]]) if path[1:] in BODIES else victims.http.get(url)
    refused(response, 422, "invalid_input", "/session_id")


@pytest.mark.parametrize("session", ["", "a b", "ä", "a" * 129, "a/b", "a\n", "\u0000", 5, True, ["a"]])
def test_a_bad_session_id_in_the_body_is_422(session: object, victims: Server) -> None:
    refused(victims.post("/v1/sessions", {"model": "tiny-letters", "id": session}), 422, "invalid_input", "/id")


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ("limit=0", "/limit"),
        ("limit=1001", "/limit"),
        ("limit=x", "/limit"),
        ("cursor=é", "/cursor"),
        ("cursor=a", "/cursor"),
    ],
)
def test_a_bad_page_is_422(query: str, pointer: str, victims: Server) -> None:
    refused(victims.http.get(f"/v1/sessions?{query}"), 422, "invalid_input", pointer)


@pytest.mark.parametrize("given", ["x", "1", "1.", ".5", "-1.5", "1.5-done", "1.5.5", "9" * 40 + ".1", "1.1 "])
def test_a_bad_event_id_is_refused(given: str, victims: Server) -> None:
    response = victims.http.get("/v1/sessions/bad-letters/events", params={"after": given})
    assert response.status_code in (400, 422)
    assert response.json()["code"] in ("bad_request", "invalid_input")


# ---------------------------------------------------------------------- bodies

POSTS = [
    "/v1/sessions",
    "/v1/sessions/bad-letters/steps",
    "/v1/sessions/bad-letters/generate",
    "/v1/sessions/bad-single/forecast",
    "/v1/sessions/bad-letters/fork",
    "/v1/sessions/bad-letters/rewind",
    "/v1/sessions/bad-tags/migrate",
    "/v1/models/tiny-letters/predict",
    "/v1/models/tiny-letters/generate",
]
VALID: dict[str, dict[str, Any]] = {
    "/v1/sessions": {"model": "tiny-letters"},
    "/v1/sessions/bad-letters/steps": {"inputs": "a"},
    "/v1/sessions/bad-letters/generate": {"max_tokens": 1},
    "/v1/sessions/bad-single/forecast": {"horizon": 1},
    "/v1/sessions/bad-letters/fork": {},
    "/v1/sessions/bad-letters/rewind": {"position": 1},
    "/v1/sessions/bad-tags/migrate": {"version": 1},
    "/v1/models/tiny-letters/predict": {"sequences": ["a"]},
    "/v1/models/tiny-letters/generate": {"max_tokens": 1},
}
NOT_JSON = {
    "nothing": b"",
    "cut": b'{"inputs": "a"',
    "two": b"{} {}",
    "text": b"inputs=a",
    "single quotes": b"{'inputs': 'a'}",
    "not UTF-8": b'{"inputs": "\xff\xfe"}',
    "lone surrogate": b'{"inputs": "\\ud800"}',
    "surrogate bytes": b'{"inputs": "\xed\xa0\x80"}',
    "deeply nested": b'{"inputs": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "NUL": b"\x00",
    "control character": b'{"inputs": "a\x01"}',
    "trailing comma": b'{"inputs": "a",}',
}


@pytest.mark.parametrize("what", NOT_JSON)
@pytest.mark.parametrize("path", POSTS)
def test_what_is_not_json_is_400(path: str, what: str, victims: Server) -> None:
    refused(victims.http.post(path, content=NOT_JSON[what], headers=JSON), 400, "bad_request")


def test_a_patch_that_is_not_json_is_400(victims: Server) -> None:
    refused(victims.http.patch("/v1/sessions/bad-letters", content=b"{", headers=JSON), 400, "bad_request")


@pytest.mark.parametrize("body", [b"[]", b"5", b'"a"', b"null", b"true"])
@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_is_no_object_is_422(path: str, body: bytes, victims: Server) -> None:
    refused(victims.http.post(path, content=body, headers=JSON), 422, "invalid_input", "")


@pytest.mark.parametrize("path", POSTS)
def test_an_unknown_field_is_422_and_named(path: str, victims: Server) -> None:
    refused(victims.post(path, {**VALID[path], "extra~/field": 1}), 422, "invalid_input", "/extra~0~1field")


def test_an_unknown_field_of_a_patch_is_422(victims: Server) -> None:
    refused(victims.http.patch("/v1/sessions/bad-letters", json={"seed": 1}), 422, "invalid_input", "/seed")


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_does_not_say_it_is_json_is_415(path: str, content_type: str | None, victims: Server) -> None:
    headers = {"Content-Type": content_type} if content_type is not None else {}
    response = victims.http.post(path, content=json.dumps(VALID[path]), headers=headers)
    problem = refused(response, 415, "unsupported_media_type")
    assert "-H 'Content-Type: application/json'" in problem["detail"]


def test_json_with_a_charset_is_taken(victims: Server) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    response = victims.http.post("/v1/models/tiny-letters/predict", content=b'{"sequences": ["a"]}', headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize("key", ["", '""', "k" * 256, "a\tb"])
@pytest.mark.parametrize("path", POSTS)
def test_a_key_that_is_none_is_400(path: str, key: str, victims: Server) -> None:
    refused(victims.post(path, VALID[path], key), 400, "bad_request")


@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_is_too_large_is_413(path: str, victims: Server) -> None:
    body = json.dumps({**VALID[path], "metadata": "a" * 100_000})
    refused(victims.http.post(path, content=body, headers=JSON), 413, "payload_too_large")


def test_a_body_that_announces_its_size_is_refused_before_it_is_sent(victims: Server) -> None:
    answer = raw(victims, b"Content-Length: 1000000000\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_is_refused_as_soon_as_it_is_too_large(victims: Server) -> None:
    chunk = b"%x\r\n" % 60_000 + b"a" * 60_000 + b"\r\n"
    answer = raw(victims, b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 2)
    assert answer.startswith(b"HTTP/1.1 413 ")


def raw(server: Server, rest: bytes) -> bytes:
    """The beginning of the answer to a POST whose body never ends."""
    head = b"POST /v1/sessions/bad-letters/steps HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(str(server.settings["port"]))), timeout=10) as wire:
        wire.sendall(head + rest)
        return wire.recv(1000)


# ---------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("session", "inputs", "code", "pointer"),
    [
        ("bad-letters", "", "invalid_input", "/inputs"),
        ("bad-letters", [], "invalid_input", "/inputs"),
        ("bad-letters", None, "invalid_input", "/inputs"),
        ("bad-letters", 5, "invalid_input", "/inputs"),
        ("bad-letters", {"a": 1}, "invalid_input", "/inputs"),
        ("bad-letters", ["a", 1.5], "invalid_input", "/inputs/1"),
        ("bad-letters", ["a", True], "invalid_input", "/inputs/1"),
        ("bad-letters", ["a", None], "invalid_input", "/inputs/1"),
        ("bad-letters", ["a", ["b"]], "invalid_input", "/inputs/1"),
        ("bad-letters", "abZ", "unknown_symbol", "/inputs"),
        ("bad-letters", "ab\u0000", "unknown_symbol", "/inputs"),
        ("bad-letters", "ab\U0001f600", "unknown_symbol", "/inputs"),
        ("bad-letters", ["a", "ab"], "unknown_symbol", "/inputs/1"),
        ("bad-letters", ["a", 13], "unknown_symbol", "/inputs/1"),
        ("bad-letters", [-1], "unknown_symbol", "/inputs/0"),
        ("bad-letters", [HUGE], "unknown_symbol", "/inputs/0"),
        ("bad-people", "anna has cats", "unknown_symbol", "/inputs"),
        ("bad-people", "   ", "invalid_input", "/inputs"),
        ("bad-weather", "abc", "invalid_input", "/inputs"),
        ("bad-weather", [], "invalid_input", "/inputs"),
        ("bad-weather", [1, 2], "invalid_input", "/inputs/0"),
        ("bad-weather", [[1]], "invalid_input", "/inputs/0"),
        ("bad-weather", [[1, 2], [1, 2, 3]], "invalid_input", "/inputs/1"),
        ("bad-weather", [[1, "2"]], "invalid_input", "/inputs/0/1"),
        ("bad-weather", [[1, True]], "invalid_input", "/inputs/0/1"),
        ("bad-weather", [[1, [2]]], "invalid_input", "/inputs/0/1"),
        ("bad-weather", [[1, None]], "invalid_input", "/inputs/0/1"),
        ("bad-weather", [[1, HUGE]], "invalid_input", "/inputs/0/1"),
        ("bad-weather", [[1e39, 1]], "invalid_input", "/inputs/0/0"),
        ("bad-weather", [{"temperature": 1}], "invalid_input", "/inputs/0"),
        ("bad-weather", [{"temperature": 1, "hour": 2, "wind": 3}], "invalid_input", "/inputs/0"),
        ("bad-weather", [{"temperature": 1, "hour": None}], "invalid_input", "/inputs/0/hour"),
        ("bad-single", [[1, 2]], "invalid_input", "/inputs/0"),
        ("bad-single", ["a"], "invalid_input", "/inputs/0"),
    ],
)
def test_bad_inputs_are_422_with_a_pointer(
    session: str, inputs: object, code: str, pointer: str, victims: Server
) -> None:
    refused(victims.post(f"/v1/sessions/{session}/steps", {"inputs": inputs}), 422, code, pointer)
    model = SESSIONS[session][0]
    predicted = victims.post(f"/v1/models/{model}/predict", {"sequences": [inputs]})
    refused(predicted, 422, code, "/sequences/0" + pointer.removeprefix("/inputs"))


@pytest.mark.parametrize("literal", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999"])
def test_numbers_that_are_not_finite_are_422(literal: bytes, victims: Server) -> None:
    body = b'{"inputs": [[1, 2], [' + literal + b", 3]]}"
    response = victims.http.post("/v1/sessions/bad-weather/steps", content=body, headers=JSON)
    refused(response, 422, "invalid_input", "/inputs/1/0")


def test_an_unknown_symbol_is_named_with_its_index(victims: Server) -> None:
    problem = refused(victims.post("/v1/sessions/bad-letters/steps", {"inputs": "abcZa"}), 422, "unknown_symbol")
    assert problem["symbol"] == "Z" and problem["index"] == 3


def test_an_unknown_symbol_in_a_prompt_is_422(victims: Server) -> None:
    response = victims.post("/v1/sessions/bad-letters/generate", {"inputs": "Z", "stream": True})
    refused(response, 422, "unknown_symbol", "/inputs")


def test_one_bad_entry_feeds_nothing(victims: Server) -> None:
    refused(victims.post("/v1/sessions/bad-letters/steps", {"inputs": "abc" * 500 + "Z"}), 422, "unknown_symbol")


def test_bad_inputs_create_no_session(victims: Server, name: str) -> None:
    victims.post(f"/v1/sessions/{name}/steps", {"model": "tiny-letters", "inputs": "Z"})
    victims.post(f"/v1/sessions/{name}/generate", {"model": "tiny-letters", "inputs": "Z"})
    refused(victims.http.get(f"/v1/sessions/{name}"), 404, "session_not_found")


# ---------------------------------------------------------------------- parameters


@pytest.mark.parametrize("path", ["/v1/sessions/bad-letters/generate", "/v1/models/tiny-letters/generate"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 20_001),
        ("max_tokens", HUGE),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("max_tokens", None),
        ("top_p", 0),
        ("top_p", -0.1),
        ("top_p", 1.01),
        ("top_p", "1"),
        ("temperature", -0.1),
        ("temperature", HUGE),
        ("top_k", -1),
        ("top_k", HUGE),
        ("logprobs", -1),
        ("logprobs", 21),
        ("seed", -1),
        ("seed", 2**53),
        ("seed", 1.5),
        ("version", 0),
        ("stream", "yes"),
        ("stream", 1),
    ],
)
def test_a_bad_parameter_of_generate_is_422(path: str, field: str, value: object, victims: Server) -> None:
    refused(victims.post(path, {field: value}), 422, "invalid_input", f"/{field}")


@pytest.mark.parametrize("stop", [[""], ["a" * 257], [5], [None]])
def test_a_bad_stop_string_is_422(stop: object, victims: Server) -> None:
    refused(victims.post("/v1/sessions/bad-letters/generate", {"stop": stop}), 422, "invalid_input", "/stop/0")


@pytest.mark.parametrize("stop", ["a", ["a"] * 17, {}])
def test_bad_stop_strings_are_422(stop: object, victims: Server) -> None:
    refused(victims.post("/v1/sessions/bad-letters/generate", {"stop": stop}), 422, "invalid_input", "/stop")


@pytest.mark.parametrize("field", ["temperature", "top_p"])
@pytest.mark.parametrize("literal", [b"NaN", b"Infinity", b"1e999"])
def test_a_parameter_that_is_not_finite_is_422(field: str, literal: bytes, victims: Server) -> None:
    body = b'{"' + field.encode() + b'": ' + literal + b"}"
    response = victims.http.post("/v1/sessions/bad-letters/generate", content=body, headers=JSON)
    refused(response, 422, "invalid_input", f"/{field}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("position", -1),
        ("position", "3"),
        ("position", HUGE),
        ("predictions", "some"),
        ("alternatives", -1),
        ("alternatives", HUGE),
        ("model", ""),
        ("model", 5),
        ("version", -1),
        ("version", HUGE),
        ("seed", HUGE),
    ],
)
def test_a_bad_parameter_of_steps_is_422(field: str, value: object, victims: Server) -> None:
    response = victims.post("/v1/sessions/bad-letters/steps", {"inputs": "a", field: value})
    refused(response, 422, "invalid_input", f"/{field}")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/model"),
        ({"model": "tiny-letters", "ttl_s": -1}, "/ttl_s"),
        ({"model": "tiny-letters", "ttl_s": HUGE}, "/ttl_s"),
        ({"model": "tiny-letters", "ttl_s": 1.5}, "/ttl_s"),
        ({"model": "tiny-letters", "seed": -1}, "/seed"),
        ({"model": "tiny-letters", "version": "1"}, "/version"),
        ({"model": "tiny-letters", "metadata": []}, "/metadata"),
        ({"model": "tiny-letters", "metadata": {"a": "x" * 20_000}}, "/metadata"),
        ({"model": "tiny-letters", "metadata": {"a": 10**30}}, "/metadata"),
    ],
)
def test_a_bad_parameter_of_create_is_422(body: dict[str, Any], pointer: str, victims: Server) -> None:
    refused(victims.post("/v1/sessions", body), 422, "invalid_input", pointer)


@pytest.mark.parametrize("literal", [b"NaN", b"1e999"])
def test_metadata_that_is_not_json_is_refused(literal: bytes, victims: Server) -> None:
    body = b'{"model": "tiny-letters", "metadata": {"a": ' + literal + b"}}"
    assert victims.http.post("/v1/sessions", content=body, headers=JSON).status_code in (400, 422)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/horizon"),
        ({"horizon": 0}, "/horizon"),
        ({"horizon": HUGE}, "/horizon"),
        ({"horizon": 1, "samples": -1}, "/samples"),
        ({"horizon": 1, "samples": 10**9}, "/samples"),
        ({"horizon": 1, "quantiles": [0.33]}, "/quantiles"),
        ({"horizon": 1, "quantiles": [1], "samples": 5}, "/quantiles"),
        ({"horizon": 1, "quantiles": [-0.5], "samples": 5}, "/quantiles"),
        ({"horizon": 1, "seed": -1}, "/seed"),
        ({"horizon": 3}, "/future"),
        ({"horizon": 3, "future": [{"hour": 1}]}, "/future"),
        ({"horizon": 3, "future": [{"hour": 1}, {}]}, "/future/1"),
        ({"horizon": 3, "future": [{"hour": 1}, {"hour": 2, "wind": 3}]}, "/future/1"),
        ({"horizon": 3, "future": [{"hour": 1}, {"hour": None}]}, "/future/1"),
        ({"horizon": 3, "future": [{"hour": 1}, {"hour": "2"}]}, "/future/1/hour"),
        ({"horizon": 3, "future": [{"hour": 1}, 5]}, "/future/1"),
        ({"horizon": 3, "future": {"hour": [1, 2]}}, "/future"),
    ],
)
def test_a_bad_parameter_of_forecast_is_422(body: dict[str, Any], pointer: str, victims: Server) -> None:
    refused(victims.post("/v1/sessions/bad-weather/forecast", body), 422, "invalid_input", pointer)


def test_missing_future_features_are_named(victims: Server) -> None:
    response = victims.post("/v1/sessions/bad-weather/forecast", {"horizon": 3, "future": [{}, {}]})
    assert "hour" in refused(response, 422, "invalid_input")["detail"]


def test_quantiles_of_a_model_without_them_are_422(victims: Server) -> None:
    for more in ({"samples": 5}, {"quantiles": [0.5]}):
        response = victims.post("/v1/sessions/bad-single/forecast", {"horizon": 1, **more})
        assert response.status_code == 422


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/sequences"),
        ({"sequences": []}, "/sequences"),
        ({"sequences": "abc"}, "/sequences"),
        ({"sequences": ["a"] * 1025}, "/sequences"),
        ({"sequences": ["a", ""]}, "/sequences/1"),
        ({"sequences": ["a"], "predictions": "none"}, "/predictions"),
        ({"sequences": ["a"], "alternatives": -1}, "/alternatives"),
    ],
)
def test_a_bad_parameter_of_predict_is_422(body: dict[str, Any], pointer: str, victims: Server) -> None:
    refused(victims.post("/v1/models/tiny-letters/predict", body), 422, "invalid_input", pointer)


@pytest.mark.parametrize(
    ("operation", "body", "pointer"),
    [
        ("fork", {"id": "a b"}, "/id"),
        ("fork", {"id": ""}, "/id"),
        ("fork", {"position": -1}, "/position"),
        ("fork", {"position": 1.5}, "/position"),
        ("fork", {"position": HUGE}, "/position"),
        ("fork", {"seed": 2**53}, "/seed"),
        ("rewind", {}, "/position"),
        ("rewind", {"position": None}, "/position"),
        ("rewind", {"position": -1}, "/position"),
        ("rewind", {"position": "1"}, "/position"),
        ("rewind", {"position": HUGE}, "/position"),
        ("migrate", {}, "/version"),
        ("migrate", {"version": 0}, "/version"),
        ("migrate", {"version": "1"}, "/version"),
        ("migrate", {"version": HUGE}, "/version"),
        ("verify?position=-1", {}, "/position"),
        ("verify?position=x", {}, "/position"),
        (f"verify?position={HUGE}", {}, "/position"),
    ],
)
def test_a_bad_parameter_of_going_back_is_422(
    operation: str, body: dict[str, Any], pointer: str, victims: Server
) -> None:
    refused(victims.post(f"/v1/sessions/bad-letters/{operation}", body), 422, "invalid_input", pointer)


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ("log?limit=0", "/limit"),
        ("log?limit=10001", "/limit"),
        ("log?after=-1", "/after"),
        (f"log?after={HUGE}", "/after"),
        ("log?cursor=x", "/cursor"),
        ("state?position=-1", "/position"),
        (f"state?position={HUGE}", "/position"),
    ],
)
def test_a_bad_look_back_is_422(query: str, pointer: str, victims: Server) -> None:
    refused(victims.http.get(f"/v1/sessions/bad-letters/{query}"), 422, "invalid_input", pointer)


@pytest.mark.parametrize("forks", ["", "all", "DELETE"])
def test_forks_are_kept_or_deleted(forks: str, victims: Server) -> None:
    response = victims.http.delete("/v1/sessions/bad-letters", params={"forks": forks})
    refused(response, 422, "invalid_input", "/forks")


@pytest.mark.parametrize(("field", "value"), [("ttl_s", -1), ("ttl_s", "1"), ("metadata", 5)])
def test_a_bad_parameter_of_patch_is_422(field: str, value: object, victims: Server) -> None:
    response = victims.http.patch("/v1/sessions/bad-letters", json={field: value})
    refused(response, 422, "invalid_input", f"/{field}")


# ---------------------------------------------------------------------- the wrong kind of model


@pytest.mark.parametrize("session", ["bad-people", "bad-weather"])
def test_generate_is_for_language_models(session: str, victims: Server) -> None:
    refused(victims.post(f"/v1/sessions/{session}/generate", {}), 422, "task_mismatch")
    refused(victims.post(f"/v1/models/{SESSIONS[session][0]}/generate", {}), 422, "task_mismatch")


@pytest.mark.parametrize("session", ["bad-people", "bad-letters"])
def test_forecast_is_for_forecasters(session: str, victims: Server) -> None:
    refused(victims.post(f"/v1/sessions/{session}/forecast", {"horizon": 1}), 422, "task_mismatch")


def test_generate_without_a_start_is_422(victims: Server) -> None:
    refused(victims.post("/v1/sessions/nobody/generate", {"model": "tiny-tags"}), 422, "empty_session")
    refused(victims.post("/v1/models/tiny-tags/generate", {}), 422, "empty_session")


def test_a_live_session_of_another_model_is_409(victims: Server) -> None:
    for operation in ("steps", "generate"):
        body = {"model": "tiny-tags", "inputs": [0]}
        refused(victims.post(f"/v1/sessions/bad-letters/{operation}", body), 409, "model_mismatch")


def test_a_live_session_of_another_version_is_409(victims: Server) -> None:
    for operation in ("steps", "generate"):
        body = {"model": "tiny-tags", "version": 1, "inputs": [0]}
        refused(victims.post(f"/v1/sessions/bad-tags/{operation}", body), 409, "model_mismatch")


def test_creating_a_live_session_is_409(victims: Server) -> None:
    refused(victims.post("/v1/sessions", {"model": "tiny-letters", "id": "bad-letters"}), 409, "session_exists")


@pytest.mark.parametrize("operation", ["steps", "generate"])
def test_a_wrong_position_is_409_with_the_true_one(operation: str, victims: Server) -> None:
    body = {"inputs": "a", "position": 2}
    problem = refused(victims.post(f"/v1/sessions/bad-letters/{operation}", body), 409, "position_mismatch")
    assert (problem["position"], problem["epoch"]) == (3, victims.session("bad-letters")["epoch"])


def test_events_beyond_the_head_are_400(victims: Server, name: str) -> None:
    victims.generate(name, model="tiny-letters", max_tokens=3)
    refused(victims.http.get(f"/v1/sessions/{name}/events?after=1.99"), 400, "bad_request")
    assert victims.http.delete(f"/v1/sessions/{name}").status_code == 204
