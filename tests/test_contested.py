"""Steps over HTTP whose session another replica moves first: they are fed after all, once, on what won."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from contested import KEY, Contested

from service.api import columns
from service.api.connections import Connection
from service.app import create_app
from service.settings import Settings

SESSIONS = [KEY[1], *(f"t{i}" for i in range(20))]


@pytest.fixture
def store() -> Contested:
    return Contested()


@pytest.fixture
def http(models: Path, store: Contested) -> Iterator[httpx.Client]:
    """A client of a service that runs in this process."""
    settings = Settings(models_dir=models, store="memory")
    server = uvicorn.Server(uvicorn.Config(create_app(settings, store), http=Connection, log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=20) as client:
            yield client
        server.should_exit = True
        thread.join()


def bulk(http: httpx.Client, inputs: list[int]) -> dict[str, int]:
    lines = [{"session": one, "inputs": inputs, "model": "tiny-letters"} for one in SESSIONS]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    answer = http.post("/v1/steps", content=content, headers={"Content-Type": "application/x-ndjson"})
    return {one["session"]: one["position"] for one in map(json.loads, answer.text.splitlines())}


def test_a_line_that_lost_a_race_is_fed_on_what_won(http: httpx.Client, store: Contested) -> None:
    assert bulk(http, [1]) == dict.fromkeys(SESSIONS, 1)
    store.races = 1
    assert bulk(http, [2]) == dict.fromkeys(SESSIONS, 2) | {KEY[1]: 3}
    assert bulk(http, [3]) == dict.fromkeys(SESSIONS, 3) | {KEY[1]: 4}


def test_a_step_that_lost_a_race_is_fed_on_what_won(http: httpx.Client, store: Contested) -> None:
    for races, position in ((0, 1), (0, 2), (1, 4), (2, 7), (0, 8)):
        store.races = races
        answer = http.post(f"/v1/sessions/{KEY[1]}/steps", json={"inputs": [1], "model": "tiny-letters"})
        assert (answer.status_code, answer.json()["position"]) == (200, position)


def test_answers_that_can_not_be_written_together_are_written_one_by_one(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    assert bulk(http, [1]) == dict.fromkeys(SESSIONS, 1)
    monkeypatch.setattr(columns, "shown_together", fail)
    assert bulk(http, [2]) == dict.fromkeys(SESSIONS, 2)
    answer = http.post(f"/v1/sessions/{KEY[1]}/steps", json={"inputs": [1]})
    assert (answer.status_code, answer.json()["position"]) == (200, 3)
    assert len(answer.json()["predictions"][0]["alternatives"]) == 5


def test_a_step_that_says_where_its_session_stands_is_told_that_another_won(
    http: httpx.Client, store: Contested
) -> None:
    assert bulk(http, [1])[KEY[1]] == 1
    store.races = 1
    answer = http.post(f"/v1/sessions/{KEY[1]}/steps", json={"inputs": [1], "position": 1})
    assert (answer.status_code, answer.json()["code"], answer.json()["position"]) == (409, "position_mismatch", 2)
    head = store.head(KEY)
    assert head is not None and head.position == 2
