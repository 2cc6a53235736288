"""Two tenants on one service: each sees its own, and of the other's not even that it is there."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from keyed import As, KeysFile
from live import MakeServer, Server, problem
from redis_server import RedisServer, server_binary

MINE, THEIRS, UNKNOWN = "cellar-of-anna", "cellar-of-bert", "cellar-of-noon"
"""of the same length, so that answers that name them are too"""
JSON = {"Content-Type": "application/json"}

BODIES: dict[tuple[str, str], Any] = {
    ("patch", "/v1/sessions/{session_id}"): {"metadata": {"mine": True}, "ttl_s": 1},
    ("post", "/v1/sessions/{session_id}/steps"): {"inputs": "ab"},
    ("post", "/v1/sessions/{session_id}/generate"): {"inputs": "ab", "max_tokens": 2},
    ("post", "/v1/sessions/{session_id}/forecast"): {"horizon": 2},
    ("post", "/v1/sessions/{session_id}/fork"): {"position": 1},
    ("post", "/v1/sessions/{session_id}/rewind"): {"position": 1},
    ("post", "/v1/sessions/{session_id}/migrate"): {"version": 1},
}
MORE: list[tuple[str, str, Any]] = [
    ("post", "/v1/sessions/{session_id}/steps", {"inputs": "ab", "position": 3}),
    ("post", "/v1/sessions/{session_id}/steps", {"inputs": "?"}),
    ("post", "/v1/sessions/{session_id}/steps", {"inputs": "ab", "model": "nothing"}),
    ("post", "/v1/sessions/{session_id}/generate", {"max_tokens": 2, "stream": True}),
    ("post", "/v1/sessions/{session_id}/generate", {"max_tokens": 2, "position": 3}),
    ("get", "/v1/sessions/{session_id}/events?after=1.1", None),
    ("get", "/v1/sessions/{session_id}/events?after=1.5-end", None),
    ("get", "/v1/sessions/{session_id}/events", None),
    ("get", "/v1/sessions/{session_id}/log?after=2", None),
    ("get", "/v1/sessions/{session_id}/state?position=1", None),
    ("post", "/v1/sessions/{session_id}/verify?position=1", None),
    ("delete", "/v1/sessions/{session_id}?forks=delete", None),
]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeysFile:
    return KeysFile(tmp_path_factory.mktemp("keys") / "keys.toml")


@pytest.fixture(scope="module")
def shared(models: Path, tmp_path_factory: pytest.TempPathFactory, keys: KeysFile) -> Iterator[Server]:
    """A server with keys."""
    keys.add("nobody-in-particular")
    one = Server(models, tmp_path_factory.mktemp("tenants"), api_keys_file=keys.path)
    yield one.start()
    one.close()


@pytest.fixture(scope="module")
def admin(shared: Server, keys: KeysFile) -> Iterator[As]:
    with As(shared, keys.add("ops", "admin")) as one:
        yield one


@pytest.fixture(scope="module")
def anna(shared: Server, keys: KeysFile) -> Iterator[As]:
    with As(shared, keys.add("anna")) as one:
        yield one


@pytest.fixture(scope="module")
def bert(shared: Server, keys: KeysFile) -> Iterator[As]:
    with As(shared, keys.add("bert")) as one:
        yield one


def routes(server: Server) -> list[tuple[str, str]]:
    """Every method and path with a session in it, from the OpenAPI page."""
    paths = server.ok(server.http.get("/openapi.json"))["paths"]
    return [(method, path) for path, said in paths.items() if "{session_id}" in path for method in said]


def told(server: Server, session: str) -> Any:  # noqa: ANN401 (any JSON)
    """Everything that can be known of a session."""
    return server.session(session), server.log_of(session), server.state(session), server.verify(session)


def ask(server: Server, method: str, path: str, body: object) -> httpx.Response:
    sent = {"content": json.dumps(body), "headers": JSON} if body is not None else {}
    return server.http.request(method.upper(), path, **sent)  # type: ignore[arg-type]


def bare(answer: httpx.Response, session: str) -> tuple[int, list[tuple[str, str]], bytes]:
    """What an answer says; its date, its random id and the session's own name left out."""
    said = [(name, value) for name, value in answer.headers.items() if name not in ("date", "x-request-id")]
    headers = [(name, value.replace(session, "*")) for name, value in said]
    return answer.status_code, headers, answer.content.replace(session.encode(), b"*")


def test_every_route_answers_a_foreign_id_as_an_unknown_one(anna: As, bert: As, admin: As) -> None:
    bert.steps(THEIRS, "abcab", model="tiny-letters", seed=1)
    bert.generate(THEIRS, max_tokens=3)
    anna.steps(MINE, "abc", model="tiny-letters", seed=2)
    was, had = told(bert, THEIRS), admin.metric("recurra_tenant_steps_total", tenant="bert")
    heard = admin.metric("recurra_tenant_requests_total", tenant="bert")
    found = routes(anna)
    assert len(found) >= 14
    asked = [(method, path, BODIES.get((method, path))) for method, path in found if method != "put"] + MORE
    seen = set()
    for method, path, body in asked:
        foreign, unknown = (
            ask(anna, method, path.replace("{session_id}", session), body) for session in (THEIRS, UNKNOWN)
        )
        assert bare(foreign, THEIRS) == bare(unknown, UNKNOWN), (method, path)
        assert foreign.status_code >= 400, (method, path, foreign.text)
        seen.add(foreign.status_code)
    assert seen == {400, 404, 426}  # 426: what is to be a WebSocket, below
    assert told(bert, THEIRS) == was
    assert [one["id"] for one in anna.ok(anna.http.get("/v1/sessions"))["data"]] == [MINE]
    assert [one["id"] for one in bert.ok(bert.http.get("/v1/sessions"))["data"]] == [THEIRS]
    # Four looks at the session, once more, and the list: nothing that the other one did counts as Bert's.
    assert admin.metric("recurra_tenant_requests_total", tenant="bert") == heard + 5
    assert admin.metric("recurra_tenant_steps_total", tenant="bert") == had


def test_a_socket_of_a_foreign_session_is_closed_as_one_of_an_unknown(anna: As, bert: As) -> None:
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    bert.steps("socket-of-bert", "abc", model="tiny-letters")
    told = []
    for session in ("socket-of-bert", "socket-of-noon"):
        url = f"{anna.url.replace('http', 'ws')}/v1/sessions/{session}/ws"
        with connect(url, additional_headers={"Authorization": anna.http.headers["Authorization"]}) as socket:
            messages = []
            with pytest.raises(ConnectionClosed):
                while True:
                    messages.append(str(socket.recv(timeout=30)).replace(session, "*"))
        told.append((messages, socket.close_code, socket.close_reason))
    assert told[0] == told[1] and told[0][1] == 4404


def test_the_same_id_is_another_session_of_each(anna: As, bert: As, name: str) -> None:
    assert anna.steps(name, "abc", model="tiny-letters")["created"]
    assert bert.steps(name, [0, 1], model="tiny-tags")["created"]
    assert (anna.position(name), bert.position(name)) == (3, 2)
    assert bert.http.delete(f"/v1/sessions/{name}").status_code == 204
    assert anna.position(name) == 3
    problem(bert.http.get(f"/v1/sessions/{name}"), 410, "session_closed")


def test_a_state_file_goes_into_the_own_session(anna: As, bert: As, name: str) -> None:
    anna.steps(name, "abc", model="tiny-letters")
    data = anna.state_file(name)
    assert bert.upload(name, data).status_code == 201
    problem(bert.upload(name, data), 409, "session_exists")
    bert.steps(name, "a")
    assert (anna.position(name), bert.position(name)) == (3, 4)


def test_idempotency_keys_are_the_tenants_own(anna: As, bert: As, name: str) -> None:
    body = {"model": "tiny-letters", "metadata": {}}
    mine, theirs = (one.post("/v1/sessions", body, f"{name}-key") for one in (anna, bert))
    assert mine.json()["id"] != theirs.json()["id"] and "idempotent-replayed" not in theirs.headers
    again = anna.post("/v1/sessions", body, f"{name}-key")
    assert again.headers["idempotent-replayed"] == "true" and again.json() == mine.json()
    fed = [
        one.post(f"/v1/sessions/{name}/steps", {"model": "tiny-letters", "inputs": "a"}, "k") for one in (anna, bert)
    ]
    assert [one.json()["position"] for one in fed] == [1, 1]
    assert not any("idempotent-replayed" in one.headers for one in fed)
    for one in (anna, bert):
        replay = one.post(f"/v1/sessions/{name}/steps", {"model": "tiny-letters", "inputs": "a"}, "k")
        assert replay.headers["idempotent-replayed"] == "true"


def test_bulk_lines_reach_the_own_sessions(anna: As, bert: As, name: str) -> None:
    bert.steps(name, "abc", model="tiny-letters")
    lines = f'{{"session": "{name}", "inputs": "a"}}\n{{"session": "{name}-2", "inputs": "a", "key": "k"}}\n'
    answer = anna.http.post("/v1/steps", content=lines, headers={"Content-Type": "application/x-ndjson"})
    codes = [json.loads(line)["error"]["code"] for line in answer.text.splitlines()]
    assert codes == ["session_not_found"] * 2 and bert.position(name) == 3


def test_a_generate_of_another_tenant_is_not_joined(anna: As, bert: As, name: str) -> None:
    body = {"model": "tiny-letters", "inputs": "ab", "max_tokens": 4, "seed": 7}
    path = f"/v1/sessions/{name}/generate"
    first, other = (one.post(path, body, "g") for one in (anna, bert))
    assert first.json() == other.json() and "idempotent-replayed" not in other.headers
    anna.rewind(name, 0)
    assert bert.position(name) == 6 and [event.event for event in bert.resume(name, "1.2")][-1] == "done"
    problem(anna.http.get(f"/v1/sessions/{name}/events?after=1.2"), 410, "log_truncated")


def test_forks_are_found_within_the_tenant(anna: As, bert: As, name: str) -> None:
    for one in (anna, bert):
        one.steps(name, "abc", model="tiny-letters")
        one.fork(name, id=f"{name}-fork")
    assert anna.http.delete(f"/v1/sessions/{name}?forks=delete").status_code == 204
    problem(anna.http.get(f"/v1/sessions/{name}-fork"), 410, "session_closed")
    assert (bert.position(name), bert.position(f"{name}-fork")) == (3, 3)


def test_pages_of_the_list_stay_within_the_tenant(anna: As, bert: As, name: str) -> None:
    for i in range(3):
        bert.steps(f"{name}-{i}", "a", model="tiny-letters")
    mine = {one["id"] for one in anna.ok(anna.http.get("/v1/sessions?limit=1000"))["data"]}
    assert not any(id.startswith(name) for id in mine)
    page = bert.ok(bert.http.get("/v1/sessions?limit=1"))
    stolen = anna.ok(anna.http.get("/v1/sessions", params={"limit": 1000, "cursor": page["next_cursor"]}))
    assert {one["id"] for one in stolen["data"]} <= mine


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield "sqlite"
        return
    if server_binary() is None:
        pytest.skip("no Redis-compatible server is installed")
    redis = RedisServer(tmp_path / "redis", append_only="always").start()
    yield redis.url
    redis.kill()


def test_tenants_survive_kill_9(store: str, tmp_path: Path, fresh: MakeServer) -> None:
    file = KeysFile(tmp_path / "keys.toml")
    keys = {name: file.add(name) for name in ("anna", "bert")}
    server = fresh(api_keys_file=file.path, store=store).start()
    for i, key in enumerate(keys.values()):
        with As(server, key) as one:
            one.steps("s", "abc"[: i + 1], model="tiny-letters")
    server.restart()
    for i, key in enumerate(keys.values()):
        with As(server, key) as one:
            assert one.position("s") == i + 1
            assert [listed["position"] for listed in one.ok(one.http.get("/v1/sessions"))["data"]] == [i + 1]


def test_the_metrics_name_no_session(anna: As, admin: As) -> None:
    anna.steps("a-name-to-look-for", "abc", model="tiny-letters")
    text = admin.http.get("/metrics").text
    assert 'tenant="anna"' in text and "a-name-to-look-for" not in text
    assert set(re.findall(r'tenant="([^"]*)"', text)) <= {"anna", "bert", "ops"}
