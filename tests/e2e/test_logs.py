"""Request ids and the log: every line says which request it is of, and nothing that came in breaks a line."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest
from live import ROOT, MakeServer, Server

HOSTILE = "/v1/sessions/a%0Alevel%3Derror%20event%3Dforged%0D%1B%5B31m%22%5C%C2%85%E2%80%A8%E2%80%AEx"
"""a path with ends of lines of three kinds, a terminal's code, quotes and a sign that turns text around"""
BODY = {"model": "tiny-letters", "inputs": "a"}


def lines(server: Server) -> list[str]:
    """The log's lines; the greeting goes to standard output, which the tests write to the same file."""
    return [line for line in server.output().splitlines() if not re.match(r"Recurra listens|  (what|the)", line)]


def answered(server: Server) -> list[Any]:
    return [event for event in map(json.loads, lines(server)) if event["event"] == "answered"]


@pytest.fixture
def json_log(fresh: MakeServer) -> Server:
    """A server that logs all it can as JSON."""
    return fresh(log_format="json", log_level="debug", store="memory").start()


@pytest.mark.parametrize("path", ["/v1/sessions/s/log", "/v1/sessions/s/steps", "/v1/sessions/s"])
def test_an_id_is_taken_echoed_and_logged(path: str, json_log: Server) -> None:
    headers = {"X-Request-ID": "trace/4711:a=b"}
    method = "POST" if path.endswith("steps") else "GET"
    response = json_log.http.request(method, path, headers=headers, json=BODY if method == "POST" else None)
    assert response.headers.get_list("x-request-id") == ["trace/4711:a=b"]
    (event,) = [one for one in answered(json_log) if one["path"] == path]
    assert (event["request_id"], event["session"], event["method"]) == ("trace/4711:a=b", "s", method)
    assert event["status"] == response.status_code and event["level"] == "debug"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"b', "ä", "a\tb", "{}"])
@pytest.mark.parametrize("path", ["/v1/sessions/s/steps", "/v1/sessions/s/rewind"])
def test_an_id_that_can_not_be_written_anywhere_is_replaced(given: str, path: str, server: Server) -> None:
    response = server.http.post(path, json=BODY, headers=[("X-Request-ID", given.encode())])
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


def test_an_id_is_made_where_it_costs_little(server: Server, name: str) -> None:
    made = [server.http.get("/v1/models").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    assert "x-request-id" not in server.post(f"/v1/sessions/{name}/steps", BODY).headers
    assert re.fullmatch("[0-9a-f]{32}", server.http.get("/no/such/route").headers["x-request-id"])


def test_ids_of_requests_that_run_together_are_not_mixed_up(json_log: Server) -> None:
    for i in range(10):
        json_log.http.get(f"/v1/sessions/s{i}", headers={"X-Request-ID": f"id-{i}"})
    told = {event["session"]: event["request_id"] for event in answered(json_log) if "session" in event}
    assert told == {f"s{i}": f"id-{i}" for i in range(10)}


def test_every_line_is_json_whatever_came_in(json_log: Server) -> None:
    json_log.http.get(HOSTILE, headers={"User-Agent": '\\"'})
    events = [json.loads(line) for line in lines(json_log)]
    (event,) = [one for one in events if one["event"] == "answered" and "forged" in one["path"]]
    assert event["path"] == '/v1/sessions/a\nlevel=error event=forged\r\x1b[31m"\\\x85\u2028\u202ex'
    assert all(event["timestamp"] and event["level"] for event in events)
    assert json_log.output().isascii()


def test_a_line_of_pairs_can_not_be_forged(fresh: MakeServer) -> None:
    one = fresh(log_level="debug", store="memory").start()
    one.http.get(HOSTILE)
    (line,) = [line for line in lines(one) if "forged" in line]
    assert line.startswith("timestamp=") and r"a\\nlevel=error event=forged\\r\\x1b[31m\"" in line.replace(
        r"\n", r"\\n"
    )
    assert all(sign == "\n" or sign.isprintable() for sign in one.output())
    assert all(one.startswith("timestamp=") for one in lines(one))


def test_a_failure_is_logged_above_debug(fresh: MakeServer, tmp_path: Any) -> None:  # noqa: ANN401
    (tmp_path / "none").mkdir()
    one = fresh(models=tmp_path / "none", log_format="json", log_level="warning", store="memory").start(ready=503)
    one.http.get("/readyz", headers={"X-Request-ID": "mine"})
    one.http.get("/healthz", headers={"X-Request-ID": "other"})
    events = answered(one)
    assert {"mine"} == {event["request_id"] for event in events} & {"mine", "other"}
    assert {(event["level"], event["status"]) for event in events} == {("warning", 503)}


RAISES = r"""
import logging
import sys
from service import logs
from service.api import errors, request_ids
logs.configure("info", sys.argv[1])
scope = {"type": "http", "method": "GET", "path": "/v1/sessions/s", "headers": []}
with request_ids.Identified(scope, None, b"mine"):
    try:
        raise RuntimeError("\x1b]0;title\x07\n\rtimestamp=forged")
    except RuntimeError as error:
        errors.problem_from(error)
    logging.getLogger("uvicorn.error").warning("a library's \x1b[31m line\ntimestamp=forged")
"""


@pytest.mark.parametrize("form", ["json", "logfmt"])
def test_a_traceback_stays_in_its_line_and_has_the_requests_id(form: str) -> None:
    done = subprocess.run([sys.executable, "-c", RAISES, form], cwd=ROOT, capture_output=True, timeout=60)
    line, other = done.stderr.decode().split("\n")[:-1]
    assert other.isprintable() and "uvicorn.error" in other and "request_id" in other
    assert line.isprintable() and "RuntimeError" in line and "request_failed" in line
    if form == "json":
        event = json.loads(line)
        assert (event["request_id"], event["session"], event["level"]) == ("mine", "s", "error")
    else:
        assert " request_id=mine" in line and " session=s" in line and line.count(" timestamp=") == 0
