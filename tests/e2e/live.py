"""The real service as a process: start, wait, kill, start again on the same data."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
START_S = 40.0
STOP_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**settings: object) -> dict[str, str]:
    """This process's environment with the service's settings put in place of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RECURRA_")}
    return {**kept, **{f"RECURRA_{name.upper()}": str(value) for name, value in settings.items()}}


def spawn(log: Path, **settings: object) -> "subprocess.Popen[bytes]":
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "service"], cwd=ROOT, env=environment(**settings), stdout=file, stderr=file
        )


class Server:
    """One data folder and the process that serves it."""

    def __init__(self, models: Path, folder: Path, **settings: object) -> None:
        self.log = folder / "service.log"
        self.settings = {"models_dir": models, "data_dir": folder / "data", "port": free_port(), **settings}
        self.url = f"http://127.0.0.1:{self.settings['port']}"
        self.http = httpx.Client(base_url=self.url, timeout=30.0, verify=False)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, ready: int = 200) -> "Server":
        """Start, and wait until /readyz answers with the status `ready`."""
        assert self.process is None
        self.process = spawn(self.log, **self.settings)
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self.process.poll() is None, self.output()
            try:
                if self.http.get("/readyz").status_code == ready:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.03)
        raise AssertionError(f"not ready after {START_S} s:\n{self.output()}")

    def output(self) -> str:
        """Everything the process printed."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_S)
        self.process = None
        self.reconnect()

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.terminate_wait()

    def terminate_wait(self) -> int:
        """Wait for a process that has been told to stop; the exit code."""
        assert self.process is not None
        code = self.process.wait(STOP_S)
        self.process = None
        self.reconnect()
        return code

    def restart(self) -> "Server":
        """kill -9 and start again."""
        self.kill()
        return self.start()

    def reconnect(self) -> None:
        """Forget connections to a process that is gone."""
        self.http.close()
        self.http = httpx.Client(base_url=self.url, timeout=30.0, verify=False)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_S)
            self.process = None
        self.http.close()

    # ------------------------------------------------------------------ requests

    def post(self, path: str, body: object, key: str | None = None) -> httpx.Response:
        headers = {"Idempotency-Key": key} if key is not None else {}
        return self.http.post(path, json=body, headers=headers)

    def ok(self, response: httpx.Response) -> Any:  # noqa: ANN401 (any JSON)
        assert response.is_success, f"{response.status_code} {response.text}"
        return response.json()

    def create(self, model: str, session: str | None = None, **more: object) -> Any:  # noqa: ANN401 (any JSON)
        named = {"id": session} if session is not None else {}
        return self.ok(self.post("/v1/sessions", {"model": model, **named, **more}))

    def steps(self, session: str, inputs: object, **more: object) -> Any:  # noqa: ANN401 (any JSON)
        return self.ok(self.post(f"/v1/sessions/{session}/steps", {"inputs": inputs, **more}))

    def generate(self, session: str, **more: object) -> Any:  # noqa: ANN401 (any JSON)
        return self.ok(self.post(f"/v1/sessions/{session}/generate", more))

    def session(self, session: str) -> Any:  # noqa: ANN401 (any JSON)
        return self.ok(self.http.get(f"/v1/sessions/{session}"))

    def position(self, session: str) -> int:
        return int(self.session(session)["position"])

    def state(self, session: str) -> Any:  # noqa: ANN401 (any JSON)
        """The state as JSON: its numbers say every bit of a float32."""
        return self.ok(self.http.get(f"/v1/sessions/{session}/state", headers={"Accept": "application/json"}))["state"]

    def state_at(self, session: str, position: int) -> Any:  # noqa: ANN401 (any JSON)
        """The state at a position as JSON."""
        path, headers = f"/v1/sessions/{session}/state", {"Accept": "application/json"}
        return self.ok(self.http.get(path, params={"position": position}, headers=headers))["state"]

    def state_file(self, session: str) -> bytes:
        """The state as a file."""
        response = self.http.get(f"/v1/sessions/{session}/state")
        assert response.is_success, response.text
        return response.content

    def upload(self, session: str, data: bytes) -> httpx.Response:
        """PUT a state file."""
        headers = {"Content-Type": "application/octet-stream"}
        return self.http.put(f"/v1/sessions/{session}/state", content=data, headers=headers)

    def log_of(self, session: str, limit: int = 10_000) -> list[Any]:
        """Every entry of the log, page by page."""
        found: list[Any] = []
        cursor: object = None
        while True:
            params = {"limit": limit, **({"cursor": cursor} if cursor is not None else {})}
            page = self.ok(self.http.get(f"/v1/sessions/{session}/log", params=params))
            found += page["data"]
            if (cursor := page["next_cursor"]) is None:
                return found

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value, summed over the labels that are not given."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def fork(self, session: str, **body: object) -> Any:  # noqa: ANN401 (any JSON)
        return self.ok(self.post(f"/v1/sessions/{session}/fork", body))

    def rewind(self, session: str, position: int) -> Any:  # noqa: ANN401 (any JSON)
        return self.ok(self.post(f"/v1/sessions/{session}/rewind", {"position": position}))

    def verify(self, session: str, **params: int) -> Any:  # noqa: ANN401 (any JSON)
        return self.ok(self.http.post(f"/v1/sessions/{session}/verify", params=params))

    def stream(
        self, session: str, tokens: int | None = None, key: str | None = None, **body: object
    ) -> list["SseEvent"]:
        """The events of a streamed generate; after `tokens` tokens the client leaves."""
        path = f"/v1/sessions/{session}/generate"
        headers = {"Idempotency-Key": key} if key is not None else {}
        with self.http.stream("POST", path, json={**body, "stream": True}, headers=headers) as response:
            return read_events(response, tokens)

    def resume(self, session: str, after: str, tokens: int | None = None) -> list["SseEvent"]:
        """GET .../events after an id; after `tokens` tokens the client leaves."""
        headers = {"Last-Event-ID": after}
        with self.http.stream("GET", f"/v1/sessions/{session}/events", headers=headers) as response:
            return read_events(response, tokens)

    def suspended(self, session: str, timeout_s: float = 5.0) -> int:
        """Wait until the session's position rests; returns it."""
        end, before = time.monotonic() + timeout_s, -1
        while time.monotonic() < end:
            now = self.position(session)
            if now == before:
                return now
            before = now
            time.sleep(0.3)
        raise AssertionError("the session does not come to rest")


MakeServer = Callable[..., Server]


def problem(response: httpx.Response, status: int, code: str) -> Any:  # noqa: ANN401 (any JSON)
    """Check a refusal; returns its document."""
    assert (response.status_code, response.json().get("code")) == (status, code), response.text
    return response.json()


class SseEvent:
    """One server-sent event."""

    def __init__(self, block: list[str]) -> None:
        fields = dict(line.split(": ", 1) for line in block)
        self.event = fields["event"]
        self.id = fields.get("id", "")
        self.data = json.loads(fields["data"])


def events_of(response: httpx.Response) -> Iterator[SseEvent]:
    """Parse the events of an open response as they come."""
    block: list[str] = []
    for line in response.iter_lines():
        if line.startswith(":"):
            continue
        if line:
            block.append(line)
        elif block:
            yield SseEvent(block)
            block = []
    assert not block, "the stream ended within an event"


def read_events(response: httpx.Response, tokens: int | None = None) -> list[SseEvent]:
    """All events, or the first `tokens` tokens."""
    if response.status_code != 200:
        response.read()
        raise AssertionError(f"{response.status_code} {response.text}")
    found: list[SseEvent] = []
    if tokens == 0:
        return found
    for event in events_of(response):
        found.append(event)
        if tokens is not None and sum(one.event == "token" for one in found) >= tokens:
            break
    return found


def text_of(events: list[SseEvent]) -> str:
    """The text of a stream."""
    return "".join(event.data.get("text", "") for event in events)


def tokens_of(events: list[SseEvent]) -> list[int]:
    """The tokens of a stream."""
    return [event.data["token"] for event in events if event.event == "token"]
