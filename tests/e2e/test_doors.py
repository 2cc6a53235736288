"""Who is let in, how much of it, and what becomes of those who hold a place and do not move."""

import hmac
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
from keyed import As, KeysFile, bearer
from live import MakeServer, Server, events_of, problem

from service.api import auth
from service.api.auth import Keys, KeysError

SLOW_S = 30.0
"""a limit of a second or so must have been kept by then, on a busy machine too"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeysFile:
    return KeysFile(tmp_path_factory.mktemp("keys") / "keys.toml")


@pytest.fixture(scope="module")
def locked(models: Path, tmp_path_factory: pytest.TempPathFactory, keys: KeysFile) -> Iterator[Server]:
    """A server with keys."""
    keys.add("ops", "admin")
    one = Server(models, tmp_path_factory.mktemp("locked"), api_keys_file=keys.path)
    yield one.start()
    one.close()


@pytest.fixture
def enter(locked: Server) -> Iterator[Callable[[str], As]]:
    """Shows a key to the server."""
    with ExitStack() as stack:
        yield lambda key: stack.enter_context(As(locked, key))


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SLOW_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


# ---------------------------------------------------------------------- keys


def test_without_a_key_only_the_open_pages_are_there(locked: Server) -> None:
    for path in ("/healthz", "/readyz", "/v2/health/ready", "/docs", "/openapi.json", "/swagger/swagger-ui.css"):
        assert locked.http.get(path).status_code == 200, path
    for path in ("/v1/models", "/v1/sessions", "/v1/sessions/a", "/metrics", "/nothing", "/v2", "/docs/", "/swagger"):
        answer = locked.http.get(path)
        problem(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"] == 'Bearer realm="recurra"'
    assert set(locked.ok(locked.http.get("/readyz"))) == {"status", "problems"}


@pytest.mark.parametrize(
    "given",
    [
        "Bearer rk_0123456789abcdef_" + "a" * 43,
        "Bearer",
        "Bearer x",
        "Bearer " + "rk_" * 10_000,
        "Bearer rk_0123456789abcdef_" + "\xff" * 43,
        "Basic cmVjdXJyYTpyZWN1cnJh",
        "rk_0123456789abcdef_" + "a" * 43,
        "",
    ],
)
def test_a_wrong_key_is_401_and_says_nothing_of_it(given: str, locked: Server) -> None:
    answer = locked.http.get("/v1/sessions", headers={b"Authorization": given.encode("latin-1")})
    problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith('Bearer realm="recurra"')
    assert "rk_0" not in answer.text and "cmVj" not in answer.text


def test_a_wrong_key_is_refused_on_the_open_pages_too(locked: Server) -> None:
    problem(locked.http.get("/readyz", headers=bearer("rk_x")), 401, "unauthorized")


def test_two_keys_at_once_are_refused(locked: Server, keys: KeysFile, enter: Callable[[str], As]) -> None:
    key = keys.add("twice")
    enter(key)
    both = [("Authorization", f"Bearer {key}"), ("Authorization", f"Bearer {key}")]
    problem(locked.http.get("/v1/sessions", headers=both), 400, "bad_request")


def test_a_known_id_with_another_secret_is_401(locked: Server, keys: KeysFile, enter: Callable[[str], As]) -> None:
    key = keys.add("almost")
    enter(key)
    for wrong in (key[:-2] + ("A" if key[-2] != "A" else "B") + key[-1], key[:-1], key + "a", key.upper()):
        answer = locked.http.get("/v1/sessions", headers=bearer(wrong))
        problem(answer, 401, "unauthorized")
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]


def test_secrets_are_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every refusal of something that looks like a key compares digests once, whether its id is known or not."""
    file = KeysFile(tmp_path / "keys.toml")
    key = file.add("anna")
    found, compared = Keys(file.path), []

    class Noted:
        digest = staticmethod(hmac.digest)

        @staticmethod
        def compare_digest(a: bytes, b: bytes) -> bool:
            compared.append((len(a), len(b)))
            return hmac.compare_digest(a, b)

    monkeypatch.setattr(auth, "hmac", Noted)
    for given in (key[:-1] + "_", "rk_" + "0" * 16 + key[19:], "nonsense"):
        with pytest.raises(auth.Problem):
            found.tenant_of(b"Bearer " + given.encode())
    assert compared == [(32, 32)] * 3
    assert found.tenant_of(b"Bearer " + key.encode()).name == "anna"
    assert found.tenant_of(b"bearer  " + key.encode()).name == "anna"
    assert len(compared) == 4, "a key that was shown before is looked up by a digest"


def test_the_file_holds_no_key(tmp_path: Path) -> None:
    file = KeysFile(tmp_path / "keys.toml")
    key = file.add("anna")
    assert key.split("_", 2)[2] not in file.path.read_text()


def test_keys_are_rotated_without_a_restart(locked: Server, keys: KeysFile, enter: Callable[[str], As]) -> None:
    old = enter(keys.add("rota"))
    old.steps("kept", "abc", model="tiny-letters")
    new_key = keys.add("rota")
    new = enter(new_key)
    assert (old.position("kept"), new.position("kept")) == (3, 3)
    keys.revoke(old.http.headers["Authorization"].removeprefix("Bearer "))
    until(lambda: old.http.get("/v1/sessions").status_code == 401)
    assert new.position("kept") == 3
    assert locked.process is not None and locked.process.poll() is None


@pytest.mark.parametrize("expires", ["2001-01-01", "2001-01-01T00:00:00", "2001-01-01T02:00:00+02:00"])
def test_an_expired_key_is_401(expires: str, locked: Server, keys: KeysFile, enter: Callable[[str], As]) -> None:
    key = keys.add("late", expires=expires)
    enter(keys.add("late"))  # read: so was the other one
    answer = locked.http.get("/v1/sessions", headers=bearer(key))
    assert "expired" in problem(answer, 401, "unauthorized")["detail"]


def test_a_key_expires_while_it_is_used(locked: Server, keys: KeysFile, enter: Callable[[str], As]) -> None:
    soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 4))
    one = enter(keys.add("soon", expires=soon))
    until(lambda: one.http.get("/v1/sessions").status_code == 401)


@pytest.mark.parametrize(
    "line",
    [
        "this is not TOML",
        'keys.0123456789abcdef = {tenant = "anna"}',
        'keys.short = {tenant = "anna", salt = "00", hash = "00"}',
        'tenants.anna = {sessions = "many"}',
        "tenants.anna = {steps_per_s = 0}",
        'more = "x"',
    ],
)
def test_a_bad_file_changes_nothing(
    line: str, locked: Server, keys: KeysFile, enter: Callable[[str], As], tmp_path: Path, fresh: MakeServer
) -> None:
    one = enter(keys.add("steady"))
    noted = locked.output().count("keys_not_read")
    keys.write(line)
    until(lambda: locked.output().count("keys_not_read") > noted)
    assert one.http.get("/v1/sessions").status_code == 200
    keys.write()
    file = KeysFile(tmp_path / "bad.toml")
    key = file.add("anna")
    file.write(line)
    with pytest.raises(KeysError) as refused:
        Keys(file.path)
    assert "keys file" in str(refused.value) and key not in str(refused.value)


def test_the_service_does_not_start_with_a_bad_file(tmp_path: Path, fresh: MakeServer) -> None:
    (tmp_path / "keys.toml").write_text("nonsense")
    server = fresh(api_keys_file=tmp_path / "keys.toml")
    with pytest.raises(AssertionError, match="RECURRA_API_KEYS_FILE"):
        server.start()


def test_scopes(locked: Server, keys: KeysFile, enter: Callable[[str], As]) -> None:
    use, admin, scraper = (enter(keys.add("team", scope)) for scope in ("use", "admin", "metrics"))  # type: ignore[arg-type]
    problem(use.http.post("/v1/models/reload"), 403, "forbidden")
    for name in ("load", "unload"):
        answer = use.http.post(f"/v2/repository/models/tiny-tags/{name}", json={})
        assert answer.status_code == 403 and isinstance(answer.json()["error"], str), "as tritonclient reads it"
    problem(use.http.get("/metrics"), 403, "forbidden")
    problem(scraper.http.get("/v1/models"), 403, "forbidden")
    problem(scraper.http.post("/v1/models/reload"), 403, "forbidden")
    problem(scraper.post("/v1/sessions/a/steps", {"inputs": "a"}), 403, "forbidden")
    assert scraper.http.get("/metrics").status_code == 200
    assert admin.http.post("/v1/models/reload").status_code == 200
    assert admin.http.get("/metrics").status_code == 200
    assert "models" in admin.ok(admin.http.get("/readyz")) and "models" not in use.ok(use.http.get("/readyz"))
    use.steps("ours", "abc", model="tiny-letters")
    assert admin.position("ours") == 3, "scopes are of keys, sessions of the tenant"


def test_without_a_keys_file_nothing_is_asked_for(server: Server) -> None:
    assert server.http.get("/v1/sessions", headers=bearer("rk_x")).status_code == 200
    assert server.http.post("/v1/models/reload").status_code == 200
    assert "security" not in server.ok(server.http.get("/openapi.json"))


def test_the_openapi_page_says_that_a_key_is_needed(locked: Server) -> None:
    page = locked.ok(locked.http.get("/openapi.json"))
    assert page["security"] == [{"key": []}] and page["paths"]["/healthz"]["get"]["security"] == []


def test_a_websocket_without_a_key_is_closed_as_unauthorized(locked: Server) -> None:
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    with connect(locked.url.replace("http", "ws") + "/v1/sessions/a/ws") as socket, pytest.raises(ConnectionClosed):
        socket.recv(timeout=SLOW_S)
    assert socket.close_code == 4401


# ---------------------------------------------------------------------- limits


def test_steps_are_limited_and_the_headers_say_so(keys: KeysFile, enter: Callable[[str], As]) -> None:
    keys.limit("few", "steps_per_s = 2.5")
    one = enter(keys.add("few"))
    until(lambda: "ratelimit" in one.http.get("/v1/models").headers)
    answer = one.post("/v1/sessions/s/steps", {"model": "tiny-letters", "inputs": "a" * 24, "predictions": "none"})
    assert answer.headers["ratelimit-policy"] == '"steps";q=25;qu="steps";w=10'
    assert re.fullmatch(r'"steps";r=[123];t=\d+', answer.headers["ratelimit"])
    assert one.post("/v1/sessions/s/steps", {"inputs": "a" * 25}).status_code == 200, "a limit may be overdrawn"
    refused = one.post("/v1/sessions/s/steps", {"inputs": "a"})
    told = problem(refused, 429, "rate_limited")
    assert told["violated-policies"] == ["steps"] and one.position("s") == 49
    wait_s, (left, reset_s) = int(refused.headers["retry-after"]), re.findall(r"=(\d+)", refused.headers["ratelimit"])
    assert left == "0" and wait_s >= int(reset_s) >= 1
    problem(one.post("/v1/sessions/s/generate", {"max_tokens": 1}), 429, "rate_limited")
    problem(one.post("/v1/models/tiny-letters/predict", {"sequences": ["a"]}), 429, "rate_limited")
    for parameters in ({}, {"sequence_id": 1, "sequence_start": True}):
        said = one.http.get("/v2/models/tiny-letters").json()["inputs"][0]
        tensor = {"name": said["name"], "shape": [1, 1], "datatype": said["datatype"], "data": [1]}
        infer = one.post("/v2/models/tiny-letters/infer", {"inputs": [tensor], "parameters": parameters})
        assert infer.status_code == 503 and infer.json()["code"] == "rate_limited", infer.text
    time.sleep(wait_s)
    assert one.steps("s", "a")["position"] == 50


def test_bulk_lines_are_limited_one_by_one(keys: KeysFile, enter: Callable[[str], As]) -> None:
    keys.limit("bulky", "steps_per_s = 0.2")
    one = enter(keys.add("bulky"))
    until(lambda: "ratelimit" in one.http.get("/v1/models").headers)
    lines = "".join(f'{{"session": "s{i}", "model": "tiny-letters", "inputs": "a"}}\n' for i in range(6))
    answer = one.http.post("/v1/steps", content=lines, headers={"Content-Type": "application/x-ndjson"})
    found = [json.loads(line).get("error", {}).get("code") for line in answer.text.splitlines()]
    assert found[:2] == [None, None] and found[4:] == ["rate_limited"] * 2


def test_tokens_that_were_not_drawn_are_given_back(keys: KeysFile, enter: Callable[[str], As]) -> None:
    keys.limit("words", "steps_per_s = 100")
    one = enter(keys.add("words"))
    until(lambda: "ratelimit" in one.http.get("/v1/models").headers)
    body = {"model": "tiny-letters", "seed": 3, "max_tokens": 900, "stop": list("abcdefghij.")}
    for stream in (False, True):
        answer = one.post(f"/v1/sessions/s{stream}/generate", {**body, "stream": stream})
        assert answer.status_code == 200, answer.text
    left = int(re.findall(r"r=(\d+)", one.http.get("/v1/models").headers["ratelimit"])[0])
    assert left > 800


def test_bytes_are_limited(keys: KeysFile, enter: Callable[[str], As]) -> None:
    keys.limit("thin", "bytes_per_s = 100")
    one = enter(keys.add("thin"))
    until(lambda: "ratelimit" in one.http.get("/v1/models").headers)
    body = {"model": "tiny-letters", "inputs": "a" * 3000, "predictions": "none"}
    assert one.post("/v1/sessions/s/steps", body).status_code == 200
    refused = one.post("/v1/sessions/s/steps", {"inputs": "a"})
    assert problem(refused, 429, "rate_limited")["violated-policies"] == ["bytes"]
    assert 15 <= int(refused.headers["retry-after"]) <= 25


def test_sessions_are_limited(keys: KeysFile, enter: Callable[[str], As]) -> None:
    keys.limit("small", "sessions = 3")
    one = enter(keys.add("small"))
    until(lambda: "ratelimit" in one.http.get("/v1/models").headers)
    one.create("tiny-letters", "a")
    one.steps("b", "abc", model="tiny-letters")
    file = one.state_file("b")
    one.fork("b", id="c")
    tries: list[Callable[[], httpx.Response]] = [
        lambda: one.post("/v1/sessions", {"model": "tiny-letters"}),
        lambda: one.post("/v1/sessions/d/steps", {"model": "tiny-letters", "inputs": "a"}),
        lambda: one.post("/v1/sessions/d/generate", {"model": "tiny-letters", "max_tokens": 1}),
        lambda: one.post("/v1/sessions/b/fork", {"id": "d"}),
        lambda: one.upload("d", file),
    ]
    for attempt in tries:
        refused = attempt()
        assert problem(refused, 429, "quota_exceeded")["violated-policies"] == ["sessions"]
        assert "retry-after" in refused.headers
    assert one.steps("a", "a")["position"] == 1, "those that live are fed"
    assert one.http.delete("/v1/sessions/c").status_code == 204
    until(lambda: one.post("/v1/sessions", {"model": "tiny-letters", "id": "d"}).status_code == 201)
    problem(one.post("/v1/sessions", {"model": "tiny-letters"}), 429, "quota_exceeded")


def test_streams_are_limited(keys: KeysFile, enter: Callable[[str], As]) -> None:
    keys.limit("river", "streams = 1")
    one = enter(keys.add("river"))
    until(lambda: "ratelimit" in one.http.get("/v1/models").headers)
    body = {"model": "tiny-letters", "max_tokens": 100_000, "stream": True, "seed": 1}
    with one.http.stream("POST", "/v1/sessions/s/generate", json=body) as response:
        events = events_of(response)  # held: a generator that is dropped closes its response
        next(events)
        refused = one.post("/v1/sessions/t/generate", body)
        assert problem(refused, 429, "quota_exceeded")["violated-policies"] == ["streams"]
        problem(one.http.get("/v1/sessions/s/events?after=1.1"), 429, "quota_exceeded")
        assert one.post("/v1/sessions/u/generate", {"model": "tiny-letters", "max_tokens": 2}).status_code == 200
    until(lambda: len(one.stream("v", tokens=1, model="tiny-letters", max_tokens=2)) > 0 if _free(one) else False)


def _free(one: As) -> bool:
    return one.http.get("/v1/models").headers["ratelimit"] == '"streams";r=1'


def test_limits_are_changed_without_a_restart(keys: KeysFile, enter: Callable[[str], As]) -> None:
    one = enter(keys.add("grown"))
    assert "ratelimit" not in one.http.get("/v1/models").headers
    keys.limit("grown", "sessions = 0")
    until(lambda: "ratelimit" in one.http.get("/v1/models").headers)
    problem(one.post("/v1/sessions", {"model": "tiny-letters"}), 429, "quota_exceeded")
    keys.limit("grown", "sessions = 1")
    until(lambda: one.post("/v1/sessions", {"model": "tiny-letters"}).status_code == 201)


# ---------------------------------------------------------------------- headers, other origins


def test_every_answer_is_marked(server: Server, locked: Server) -> None:
    for answer in (
        server.http.get("/healthz"),
        server.http.get("/nothing"),
        server.post("/v1/sessions/marked/steps", {"model": "tiny-letters", "inputs": "a"}),
        locked.http.get("/v1/models"),
    ):
        assert (answer.headers["x-content-type-options"], answer.headers["x-frame-options"]) == ("nosniff", "DENY")
    policy = server.http.get("/docs").headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy


ORIGIN = {"Origin": "https://pages.example"}
PREFLIGHT = {
    **ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, idempotency-key",
}


def test_other_origins_may_not_ask(server: Server) -> None:
    for answer in (
        server.http.get("/v1/models", headers=ORIGIN),
        server.http.options("/v1/sessions/a/steps", headers=PREFLIGHT),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_named_origins_may_ask(tmp_path: Path, fresh: MakeServer) -> None:
    file = KeysFile(tmp_path / "keys.toml")
    key = file.add("anna")
    one = fresh(api_keys_file=file.path, cors_origins="https://pages.example,http://localhost:3000").start()
    before = one.http.options("/v1/sessions/a/steps", headers=PREFLIGHT)
    assert before.status_code == 200 and before.headers["access-control-allow-origin"] == ORIGIN["Origin"]
    assert "access-control-allow-credentials" not in before.headers
    answer = one.http.get("/v1/models", headers={**ORIGIN, **bearer(key)})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == ORIGIN["Origin"]
    refused = one.http.get("/v1/models", headers=ORIGIN)
    problem(refused, 401, "unauthorized")
    assert refused.headers["access-control-allow-origin"] == ORIGIN["Origin"], "its page may read why"
    other = one.http.get("/v1/models", headers={"Origin": "https://other.example", **bearer(key)})
    assert "access-control-allow-origin" not in other.headers


# ---------------------------------------------------------------------- connections


@pytest.fixture(scope="module")
def strict(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose patience is short."""
    one = Server(
        models,
        tmp_path_factory.mktemp("strict"),
        head_wait_s=1,
        body_wait_s=2,
        send_wait_s=1,
        max_connections=40,
        max_body_bytes=100_000,
        max_header_bytes=8192,
    )
    yield one.start()
    one.close()


class Raw:
    """A connection by hand."""

    def __init__(self, server: Server, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(SLOW_S)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def rest(self) -> bytes:
        """Everything until the server closes."""
        parts = []
        try:
            while part := self.socket.recv(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
        return b"".join(parts)

    def trickle(self, data: bytes, every_s: float) -> float:
        """Send byte after byte until the server closes; the seconds that took."""
        began = time.monotonic()
        self.socket.settimeout(every_s)
        for i in range(len(data)):
            try:
                self.socket.send(data[i : i + 1])
                if not self.socket.recv(65536, socket.MSG_PEEK):
                    break
                break
            except TimeoutError:
                continue
            except OSError:
                break
        self.socket.settimeout(SLOW_S)
        return time.monotonic() - began


def cut(server: Server, reason: str) -> float:
    return server.metric("recurra_connections_cut_total", reason=reason)


def test_a_connection_without_a_request_is_closed(strict: Server) -> None:
    with Raw(strict) as raw:
        began = time.monotonic()
        assert raw.rest() == b""
        assert 0.9 <= time.monotonic() - began < SLOW_S


@pytest.mark.parametrize(
    ("sent", "trickled"),
    [
        (b"", b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 4000),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 4000),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", b"\r\n" * 4000),
    ],
)
def test_a_head_that_trickles_in_is_cut_off(sent: bytes, trickled: bytes, strict: Server) -> None:
    with Raw(strict) as raw:
        if sent:
            raw.send(sent)
            assert b"200 OK" in raw.socket.recv(65536)
        assert raw.trickle(trickled, 0.1) < SLOW_S
        told = raw.rest()
        assert b" 408 " in told and b'"code":"request_timeout"' in told and b"connection: close" in told


@pytest.mark.parametrize("head", [b"Content-Length: 5000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1388\r\n"])
def test_a_body_that_trickles_in_is_cut_off(head: bytes, strict: Server, name: str) -> None:
    start = f"POST /v1/sessions/{name}/steps HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n".encode()
    with Raw(strict) as raw:
        raw.send(start + head)
        assert raw.trickle(b'{"model": "tiny-letters", "inputs": "' + b"a" * 5000, 0.1) < SLOW_S
        assert b" 408 " in raw.rest()
    problem(strict.http.get(f"/v1/sessions/{name}"), 404, "session_not_found")


def test_an_upload_that_goes_on_after_its_refusal_is_cut_off(strict: Server) -> None:
    with Raw(strict) as raw:
        raw.send(b"POST /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 50000\r\n\r\n")
        assert b" 404 " in raw.socket.recv(65536)
        began = time.monotonic()
        raw.socket.settimeout(0.2)
        with pytest.raises(OSError, match=r"reset|pipe|closed"):
            while time.monotonic() - began < SLOW_S:
                raw.send(b"a")
                try:
                    if not raw.socket.recv(65536):
                        raise ConnectionResetError("closed")
                except TimeoutError:
                    continue


@pytest.mark.parametrize(
    "head",
    [
        b"".join(b"X-%d: a\r\n" % i for i in range(200)),
        b"X-A: " + b"a" * 9000 + b"\r\n",
        b"X-A: " + b"a" * 90_000,
        b"a" * 9000,
    ],
)
def test_a_head_that_is_too_large_is_431(head: bytes, strict: Server) -> None:
    with Raw(strict) as raw:
        raw.send(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n" + head)
        if head.endswith(b"\r\n"):
            raw.send(b"\r\n")
        told = raw.rest()
        assert told == b"" or (b" 431 " in told and b'"code":"headers_too_large"' in told)


def test_a_path_that_is_too_long_is_431(strict: Server) -> None:
    with Raw(strict) as raw:
        raw.send(b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b" 431 " in raw.rest()


def test_a_body_of_tiny_chunks_is_cut_off(strict: Server) -> None:
    with Raw(strict) as raw:
        raw.send(b"POST /v1/steps HTTP/1.1\r\nHost: a\r\nContent-Type: application/x-ndjson\r\n")
        raw.send(b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(100):
                raw.send(b"1\r\n \r\n" * 1000)
        except OSError:
            pass
        told = raw.rest()
        assert told == b"" or b" 413 " in told


def test_too_many_connections_are_told_so(strict: Server) -> None:
    with ExitStack() as stack:
        streams = [stack.enter_context(Raw(strict)) for _ in range(45)]
        told = []
        for raw in streams:
            raw.send(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            told.append(raw.socket.recv(65536))
        assert sum(b" 200 " in one for one in told) >= 30
        refused = [one for one in told if b" 503 " in one]
        assert refused and all(b"retry-after: 1" in one and b'"code":"overloaded"' in one for one in refused)
    until(lambda: strict.http.get("/healthz").status_code == 200)


def stream_request(session: str, tokens: int, seed: int = 1) -> bytes:
    body = json.dumps({"model": "tiny-letters", "max_tokens": tokens, "stream": True, "seed": seed}).encode()
    head = f"POST /v1/sessions/{session}/generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_a_stream_that_is_not_read_is_cut_off_and_resumed(strict: Server, name: str) -> None:
    before = cut(strict, "send")
    with Raw(strict, receive_buffer=4096) as raw:
        raw.send(stream_request(name, 60_000))
        until(lambda: cut(strict, "send") > before)
    at = strict.suspended(name)
    assert 1000 < at < 60_000
    whole = strict.generate(f"{name}-whole", model="tiny-letters", seed=1, max_tokens=200)
    resumed = strict.resume(name, "1.1", tokens=199)
    assert [event.data["token"] for event in resumed] == whole["tokens"][:199]


def test_answers_that_are_not_read_hold_no_place(strict: Server) -> None:
    """Where little is left to be read the connection is to be closed, and that would wait for its client."""
    assert strict.process is not None
    process, ports = psutil.Process(strict.process.pid), set()
    ask = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"
    size = len(strict.http.get("/v1/models").content) + 150
    with ExitStack() as stack:
        for total in range(100_000, 420_000, 20_000):  # what the kernel takes of it depends on the kernel
            raw = stack.enter_context(Raw(strict, receive_buffer=4096))
            ports.add(raw.socket.getsockname()[1])
            for _ in range(total // size):
                raw.send(ask)
                time.sleep(0.001)  # each an answer of its own

        def gone() -> bool:
            return not any(one.raddr and one.raddr[1] in ports for one in process.net_connections("tcp"))

        until(gone)


def test_a_client_that_never_reads_slows_nobody(strict: Server, name: str) -> None:
    strict.steps(name, "a", model="tiny-letters")

    def took() -> float:
        times = []
        for _ in range(60):
            began = time.perf_counter()
            strict.steps(name, "a")
            times.append(time.perf_counter() - began)
        return sorted(times)[30]

    alone = took()
    with ExitStack() as stack:
        for i in range(20):
            stack.enter_context(Raw(strict, receive_buffer=4096)).send(stream_request(f"{name}-{i}", 90_000, i))
        until(lambda: all(strict.http.get(f"/v1/sessions/{name}-{i}").status_code == 200 for i in range(20)))
        until(lambda: cut(strict, "send") >= 20 or strict.metric("recurra_queued_steps") == 0)
        beside = took()
    print(f"a step's median: {alone * 1000:.1f} ms alone, {beside * 1000:.1f} ms beside 20 that never read")
    assert beside < 10 * alone + 0.05


HELD = 2000


@pytest.mark.slow
def test_two_thousand_slow_clients_are_held_within_bounded_memory(fresh: MakeServer) -> None:
    """Half of them are idle between two requests, half read a stream of theirs a little at a time."""
    server = fresh(head_wait_s=600, send_wait_s=600, store="memory").start()
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    server.steps("probe", "a", model="tiny-letters")
    empty = process.memory_info().rss
    with ExitStack() as stack:
        idle = [stack.enter_context(Raw(server)) for _ in range(HELD // 2)]
        held = process.memory_info().rss
        slow = [stack.enter_context(Raw(server, receive_buffer=4096)) for _ in range(HELD // 2)]
        for i, raw in enumerate(slow):
            raw.send(stream_request(f"slow-{i}", 100_000, i))
        for raw in slow:
            assert raw.socket.recv(2048).startswith(b"HTTP/1.1 200")
        until_quiet(server)
        full = process.memory_info().rss
        times = []
        for _ in range(50):
            began = time.perf_counter()
            server.steps("probe", "a")
            times.append(time.perf_counter() - began)
        assert all(raw.socket.recv(2048) for raw in slow[:50])
        for raw in idle[:50]:
            raw.send(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b" 200 " in raw.socket.recv(65536)
    per_idle, per_stream = (held - empty) / len(idle), (full - held) / len(slow)
    print(
        f"{per_idle / 1024:.1f} KiB an idle connection, {per_stream / 1024:.0f} KiB a slow stream, "
        f"a step beside them {sorted(times)[25] * 1000:.1f} ms"
    )
    assert per_idle < 64 * 1024 and per_stream < 2 * 2**20


def until_quiet(server: Server) -> None:
    """Wait until no model has work: every stream is as far as it gets, however slow the host; none stands still."""
    drawn, moved = 0.0, time.monotonic()
    end = moved + 600
    while server.metric("recurra_queued_steps") > 0:
        now = server.metric("recurra_tokens_total")
        if now > drawn:
            drawn, moved = now, time.monotonic()
        assert time.monotonic() < min(moved + 30, end)
        time.sleep(0.5)
