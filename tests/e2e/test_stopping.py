"""SIGTERM: new work is refused, what runs is finished and committed."""

import asyncio
import threading
import time
from pathlib import Path

import httpx
import pytest
from live import MakeServer

from service.app import create_app
from service.settings import Settings
from service.store.memory import MemoryStore

BODY = {"model": "tiny-letters", "inputs": "abc"}
WORK = [
    ("POST", "/v1/sessions/s/steps", BODY),
    ("POST", "/v1/sessions/new/steps", BODY),
    ("POST", "/v1/sessions/s/generate", {"max_tokens": 3}),
    ("POST", "/v1/sessions/s/rewind", {"position": 1}),
    ("POST", "/v1/sessions", {"model": "tiny-letters"}),
    ("POST", "/v1/models/tiny-letters/predict", {"sequences": ["ab"]}),
    ("DELETE", "/v1/sessions/s", None),
]


def test_work_is_refused_and_readiness_says_why(models: Path) -> None:
    async def stopping() -> None:
        app = create_app(Settings(models_dir=models, store="memory"), MemoryStore())
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://t") as http,
        ):
            assert (await http.post("/v1/sessions/s/steps", json=BODY)).status_code == 200
            app.state.sessions.suspend_all()
            for method, path, body in WORK:
                answer = await http.request(method, path, json=body)
                assert (answer.status_code, answer.json()["code"]) == (503, "not_ready"), path
                assert int(answer.headers["retry-after"]) >= 1
            ready = await http.get("/readyz")
            assert ready.status_code == 503 and ready.json()["problems"] == {"stopping": True}
            assert (await http.get("/healthz")).status_code == 200
            assert (await http.get("/v1/sessions/s")).json()["position"] == 3  # reads go on

    asyncio.run(stopping())


@pytest.mark.parametrize("inputs", ["abcdefgh" * 20_000])
def test_a_feed_under_way_is_answered_and_kept(inputs: str, fresh: MakeServer) -> None:
    one = fresh().start()
    one.create("tiny-letters", "s")
    answers: list[httpx.Response] = []

    def feed() -> None:
        answers.append(httpx.post(f"{one.url}/v1/sessions/s/steps", json={"inputs": inputs}, timeout=60, verify=False))

    thread = threading.Thread(target=feed)
    thread.start()
    end = time.monotonic() + 30
    while one.metric("recurra_steps_total", model="tiny-letters") == 0:
        assert time.monotonic() < end
    assert one.terminate() == 0
    thread.join()
    assert answers[0].status_code == 200 and answers[0].json()["position"] == len(inputs)
    assert one.start().position("s") == len(inputs)
