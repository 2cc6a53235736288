"""The short way to the hot routes: what it answers is what the long way would have answered."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service import metrics
from service.api import shortcuts
from service.app import create_app
from service.settings import Settings
from service.store.memory import MemoryStore

JSON = {"Content-Type": "application/json"}
BODIES: list[tuple[bytes, dict[str, str]]] = [
    (b'{"model": "tiny-letters", "seed": 3, "inputs": "abc"}', JSON),
    (b'{"model": "tiny-letters", "seed": 3, "inputs": "abc", "predictions": "all"}', JSON),
    (b'{"model": "tiny-letters", "seed": 3, "inputs": [1]}', {**JSON, "Idempotency-Key": "k"}),
    (b'{"model": "tiny-letters", "seed": 3, "inputs": "ab", "max_tokens": 4}', JSON),
    (b'{"model": "tiny-letters", "seed": 3, "inputs": "ab", "max_tokens": 4, "stream": true}', JSON),
    (b'{"model": "tiny-letters", "inputs": "?"}', JSON),
    (b'{"model": "nothing", "inputs": "a"}', JSON),
    (b'{"model": "tiny-letters", "inputs": "a", "more": 1}', JSON),
    (b'{"model": "tiny-letters", "inputs": "a", "position": 7}', JSON),
    (b'{"model": "tiny-letters", "inputs": "a"}', {**JSON, "Idempotency-Key": ""}),
    (b'{"model": "tiny-weather", "inputs": [[1, 2, 3]]}', JSON),
    (b'{"inputs": "a"}', JSON),
    (b'{"inputs": ', JSON),
    (b'{"inputs": "a"}', {}),
    (b'{"inputs": "' + b"a" * 2000 + b'"}', JSON),
    (b"", JSON),
]

Ways = Callable[[Callable[[FastAPI], Any]], Any]


@pytest.fixture
def in_app(models: Path) -> Ways:
    """Runs a coroutine beside the application, in this process."""

    def run(work: Callable[[FastAPI], Any]) -> Any:  # noqa: ANN401 (whatever the work gives)
        async def inside() -> Any:  # noqa: ANN401
            app = create_app(Settings(models_dir=models, store="memory", max_body_bytes=1024), MemoryStore())
            async with app.router.lifespan_context(app):
                return await work(app)

        return asyncio.run(inside())

    return run


def client(app: FastAPI, root_path: str = "") -> httpx.AsyncClient:
    """A client by the short way, or by the long one: behind a root path nothing is cut short."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, root_path=root_path), base_url="http://test")


def unnamed(headers: httpx.Headers) -> dict[str, str]:
    """An answer's headers but for the request's id, which the short way makes for nobody who sent none."""
    return {name: value for name, value in headers.items() if name != "x-request-id"}


@pytest.mark.parametrize("operation", ["steps", "generate"])
def test_both_ways_answer_the_same(operation: str, in_app: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []
    serve = shortcuts.serve

    async def noted(app: Any, endpoint: Any, session_id: str, *rest: Any) -> None:  # noqa: ANN401 (as `serve` takes)
        served.append(session_id)
        await serve(app, endpoint, session_id, *rest)

    monkeypatch.setattr(shortcuts, "serve", noted)

    async def work(app: FastAPI) -> None:
        async with client(app) as short, client(app, "/behind") as long:
            for i, (body, headers) in enumerate(BODIES):
                ways = [("short", short), ("long_", long)]
                found = [
                    await http.post(f"/v1/sessions/{way}-{i}/{operation}", content=body, headers=headers)
                    for way, http in ways
                    for _ in range(2)
                ]
                told = [(one.status_code, unnamed(one.headers), one.text.replace("short", "long_")) for one in found]
                assert told[:2] == told[2:], body

    in_app(work)
    assert served == [f"short-{i}" for i in range(len(BODIES)) for _ in range(2)]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/sessions/a/steps"),
        ("POST", "/v1/sessions/a b/steps"),
        ("POST", "/v1/sessions/a/steps/"),
        ("POST", "/v1/sessions/a/forecast"),
        ("POST", "/v1/sessions/a\n/steps"),
        ("POST", f"/v1/sessions/{'a' * 129}/generate"),
        ("POST", "/v1/sessions//generate"),
    ],
)
def test_what_is_odd_takes_the_long_way(method: str, path: str) -> None:
    assert shortcuts.find({"type": "http", "method": method, "path": path, "root_path": ""}) is None


def test_an_unexpected_error_is_a_problem_document_and_is_counted(
    in_app: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setitem(shortcuts._ENDPOINTS, "steps", fail)
    counter = metrics.REQUESTS.labels("POST", "500")
    before = counter._value.get()

    async def work(app: FastAPI) -> httpx.Response:
        async with client(app) as http:
            return await http.post("/v1/sessions/a/steps", json={})

    answer = in_app(work)
    assert answer.status_code == 500 and answer.json()["code"] == "internal" and "secret" not in answer.text
    assert counter._value.get() == before + 1
