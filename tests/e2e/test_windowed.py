"""Models that were trained on windows: each answer is the fold of the log's last entries, however it came about."""

import asyncio
import hashlib
import json
import random
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import MakeServer, Server, problem
from tiny import WINDOW, WINDOWED, copied, newest, some_inputs, windowed

few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def inputs_of(models: Path, model: str, count: int, seed: int = 0) -> list[Any]:
    return some_inputs(newest(models, model).manifest, count, seed)


def of_the_windows(server: Server, model: str, inputs: list[Any], window: int = WINDOW) -> list[Any]:
    """What the model that carries its memory says of each position's last entries alone."""
    sequences = [inputs[max(0, p - window) : p] for p in range(1, len(inputs) + 1)]
    body = {"sequences": sequences, "predictions": "last"}
    predicted = server.ok(server.post(f"/v1/models/{WINDOWED[model]}/predict", body))["predictions"]
    return [bare(one[0]) for one in predicted]


def bare(prediction: dict[str, Any]) -> dict[str, Any]:
    """What is said, without where, and without what was expected before."""
    return {name: value for name, value in prediction.items() if name not in ("position", "surprise")}


@pytest.mark.parametrize("model", WINDOWED)
@few
@given(data=st.data())
def test_each_answer_is_the_fold_of_the_last_entries(
    model: str, models: Path, server: Server, data: st.DataObject
) -> None:
    inputs = inputs_of(models, model, 40, data.draw(st.integers(0, 99), label="seed"))
    cuts = sorted(data.draw(st.sets(st.integers(1, 39), max_size=12), label="cuts"))
    session, found = secrets.token_hex(6), []
    for begin, end in zip([0, *cuts], [*cuts, 40], strict=True):
        key = secrets.token_hex(6)
        body = {"inputs": inputs[begin:end], "model": model, "predictions": "all"}
        first, again = (server.post(f"/v1/sessions/{session}/steps", body, key) for _ in range(2))
        assert first.content == again.content and "idempotent-replayed" in again.headers
        found += server.ok(first)["predictions"]
    assert [bare(one) for one in found] == of_the_windows(server, model, inputs)
    assert [one["position"] for one in found] == list(range(1, 41))
    body = {"sequences": [inputs], "predictions": "all"}
    assert server.ok(server.post(f"/v1/models/{model}/predict", body))["predictions"] == [found]


@pytest.mark.parametrize("model", WINDOWED)
@pytest.mark.parametrize("shown", ["last", "none"])
def test_what_is_asked_for_changes_nothing(shown: str, model: str, models: Path, server: Server, name: str) -> None:
    inputs = inputs_of(models, model, 700, 5)
    whole = server.steps(f"all-{name}", inputs, model=model, predictions="all")["predictions"]
    found = server.steps(name, inputs[:650], model=model, predictions=shown)["predictions"]
    assert found == ([whole[649]] if shown == "last" else [])
    assert server.steps(name, inputs[650:])["predictions"] == whole[-1:]
    assert server.state(name) == server.state(f"all-{name}")


def test_the_state_is_that_of_the_last_entries_and_the_entries(models: Path, server: Server, name: str) -> None:
    inputs = inputs_of(models, "tiny-window-weather", 30)
    server.steps(name, inputs, model="tiny-window-weather")
    server.steps(f"short-{name}", inputs[-WINDOW:], model="tiny-weather")
    state = server.state(name)
    assert state["h"] == server.state(f"short-{name}")["h"]
    assert state["window"] == np.array(inputs[-WINDOW:], np.float32).astype(float).tolist()
    assert state["window.length"] == [WINDOW]
    assert server.session(name)["state_bytes"] == newest(models, "tiny-window-weather").manifest.state_bytes
    server.steps(f"new-{name}", inputs[:2], model="tiny-window-weather")
    assert server.state_at(name, 2) == server.state(f"new-{name}")
    assert server.state_at(name, 2)["window.length"] == [2]


def test_the_model_says_which_memory_it_has(server: Server) -> None:
    said = {name: server.ok(server.http.get(f"/v1/models/{name}"))["memory"] for name in ("tiny-people", "who")}
    assert set(said.values()) == {"carried"}
    assert server.ok(server.http.get("/v1/models/tiny-window-people"))["memory"] == {"window": WINDOW}


def test_fifty_sessions_of_any_age_in_one_bulk_request(models: Path, server: Server, name: str) -> None:
    """Feeds of one entry run in columns: windows that are full beside those that grow."""
    model, rng = "tiny-window-people", random.Random(3)
    lines = {f"{name}-{i}": inputs_of(models, model, 20 + i % 3, i) for i in range(50)}
    at = dict.fromkeys(lines, 0)
    found: dict[str, list[Any]] = {session: [] for session in lines}
    while any(at[session] < len(line) for session, line in lines.items()):
        chosen = [s for s, line in lines.items() if at[s] < len(line) and rng.random() < 0.7]
        body = b"".join(
            json.dumps({"session": s, "inputs": lines[s][at[s] : at[s] + 1], "model": model}).encode() + b"\n"
            for s in chosen
        )
        headers = {"Content-Type": "application/x-ndjson"}
        answers = server.http.post("/v1/steps", content=body, headers=headers).text.splitlines()
        for session, answer in zip(chosen, map(json.loads, answers), strict=True):
            found[session] += answer["predictions"]
            at[session] += 1
    for session, line in list(lines.items())[::7]:
        assert [bare(one) for one in found[session]] == of_the_windows(server, model, line)


def test_many_feeds_at_once(models: Path, server: Server) -> None:
    model = "tiny-window-letters"
    lines = [inputs_of(models, model, 30, 50 + i) for i in range(40)]
    found = asyncio.run(feed_together(server.url, model, lines))
    for line, answers in list(zip(lines, found, strict=True))[::9]:
        assert [bare(one) for one in answers] == of_the_windows(server, model, line)


async def feed_together(url: str, model: str, lines: list[list[Any]]) -> list[list[Any]]:
    async with httpx.AsyncClient(base_url=url, timeout=60, verify=False) as http:

        async def feed(line: list[Any], rng: random.Random) -> list[Any]:
            session, found, begin = secrets.token_hex(6), [], 0
            while begin < len(line):
                end = begin + rng.choice((1, 1, 1, 5))
                body = {"inputs": line[begin:end], "model": model, "predictions": "all"}
                response = await http.post(f"/v1/sessions/{session}/steps", json=body)
                found += response.raise_for_status().json()["predictions"]
                begin = end
            return found

        return await asyncio.gather(*(feed(line, random.Random(i)) for i, line in enumerate(lines)))


# ---------------------------------------------------------------------- looking ahead


def test_a_generated_text_is_that_of_windows(server: Server, name: str) -> None:
    """Greedily: each token is the likeliest after the last entries, asked of the model that carries its memory."""
    answer = server.generate(name, inputs="abc", model="tiny-window-letters", max_tokens=30, temperature=0, logprobs=1)
    line = "abc" + answer["text"]
    for p in range(3, len(line)):
        body = {"sequences": [line[max(0, p - WINDOW) : p]], "predictions": "last"}
        [[said]] = server.ok(server.post("/v1/models/tiny-letters/predict", body))["predictions"]
        assert said["alternatives"][0]["text"] == line[p]


def test_a_forecast_slides_its_window(models: Path, server: Server, name: str) -> None:
    inputs = inputs_of(models, "tiny-window-weather", 20)
    server.steps(name, inputs, model="tiny-window-weather")
    hours = [{"hour": (5 + i) % 24} for i in range(9)]
    body = {"horizon": 10, "future": hours}
    ahead = server.ok(server.post(f"/v1/sessions/{name}/forecast", body))["forecast"]
    line = list(inputs)
    for step, hour in zip(ahead, [*hours, None], strict=True):
        assert of_the_windows(server, "tiny-window-weather", line)[-1] == {k: v for k, v in step.items() if k != "step"}
        if hour is not None:
            line.append([step["mean"]["temperature"], hour["hour"]])


# ---------------------------------------------------------------------- the past


@pytest.fixture(scope="module")
def versions(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose versions are one graph: carried, a window of 7, a window of 3."""
    served = tmp_path_factory.mktemp("windows") / "models"
    copied(models / "tiny-people" / "1", served / "people" / "1")
    windowed(models / "tiny-people" / "1", served / "people" / "2", 7)
    windowed(models / "tiny-people" / "1", served / "people" / "3", 3)
    for name in ("tiny-people", "tiny-window-people"):
        copied(models / name / "1", served / name / "1")
    return served


@pytest.fixture(scope="module")
def one(versions: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that notes a snapshot every 32 steps, and that tests may kill."""
    server = Server(versions, tmp_path_factory.mktemp("window"), snapshot_every=32, max_resident=20)
    yield server.start()
    server.close()


def test_a_session_moves_between_carried_and_windowed_versions_of_one_graph(
    models: Path, one: Server, name: str
) -> None:
    inputs = inputs_of(models, "tiny-people", 100)
    fresh = {}
    for version in (1, 2, 3):
        one.steps(f"{name}-{version}", inputs, model="people", version=version)
        fresh[version] = one.state(f"{name}-{version}")
    assert len({json.dumps(state["h"]) for state in fresh.values()}) == 3
    for version in (2, 1, 3, 2, 1):
        one.ok(one.post(f"/v1/sessions/{name}-1/migrate", {"version": version}))
        assert one.state(f"{name}-1") == fresh[version]
        assert one.verify(f"{name}-1")["verified"] is True
        later = one.fork(f"{name}-1", id=f"{name}-{secrets.token_hex(4)}", position=50)["id"]
        one.steps(later, inputs[50:])
        assert one.state(later) == fresh[version]
    one.restart()
    assert one.state(f"{name}-1") == fresh[1]


def test_fork_rewind_and_state_at_any_position(models: Path, one: Server, name: str) -> None:
    inputs = inputs_of(models, "tiny-window-people", 90, 4)
    said = one.steps(name, inputs, model="tiny-window-people", predictions="all")["predictions"]
    for position in (0, 1, 6, 7, 8, 33, 64, 89):
        fork = one.fork(name, position=position)["id"]
        assert one.steps(fork, inputs[position:], predictions="all")["predictions"][-1] == said[-1]
        assert one.state(fork) == one.state(name)
        assert one.state_at(name, position) == one.state_at(fork, position)
    for position in (80, 40, 5):
        one.rewind(name, position)
        if position == 40:
            one.restart()
        [again] = one.steps(name, inputs[position : position + 1], predictions="last")["predictions"]
        assert again == said[position]
        assert one.verify(name)["verified"] is True


@few
@given(kills=st.sets(st.integers(1, 59), min_size=1, max_size=3), data=st.data())
def test_a_killed_server_goes_on_with_the_same_answers(
    kills: set[int], models: Path, one: Server, data: st.DataObject
) -> None:
    inputs = inputs_of(models, "tiny-window-people", 60, data.draw(st.integers(0, 99), label="seed"))
    session, found, ends = secrets.token_hex(6), [], [*sorted(kills), 60]
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        body = {"inputs": inputs[begin:end], "model": "tiny-window-people", "predictions": "all", "position": begin}
        found += one.ok(one.post(f"/v1/sessions/{session}/steps", body, f"key-{begin}"))["predictions"]
        if end < 60:
            one.restart()
            again = one.post(f"/v1/sessions/{session}/steps", body, f"key-{begin}")
            assert "idempotent-replayed" in again.headers and again.json()["predictions"] == found[begin:end]
    assert [bare(prediction) for prediction in found] == of_the_windows(one, "tiny-window-people", inputs)


def test_sessions_that_are_parked_and_woken(models: Path, one: Server, name: str) -> None:
    inputs = inputs_of(models, "tiny-window-people", 60, 8)
    said = of_the_windows(one, "tiny-window-people", inputs)
    for i in range(60):
        [answer] = one.steps(name, inputs[i : i + 1], model="tiny-window-people")["predictions"]
        assert bare(answer) == said[i]
        if i % 15 == 14:  # more sessions than are held in memory
            for other in range(25):
                one.steps(f"{name}-{other}", inputs[:1], model="tiny-window-people")


def test_a_log_that_was_cut_keeps_what_the_next_window_needs(models: Path, fresh: MakeServer, name: str) -> None:
    cut = fresh(snapshot_every=16, log_retention=16).start()
    inputs = inputs_of(models, "tiny-window-letters", 200, 2)
    said = of_the_windows(cut, "tiny-window-letters", inputs)
    for begin in range(0, 200, 20):
        answer = cut.steps(name, inputs[begin : begin + 20], model="tiny-window-letters", predictions="all")
        assert [bare(one) for one in answer["predictions"]] == said[begin : begin + 20]
    oldest = problem(cut.post(f"/v1/sessions/{name}/rewind", {"position": 20}), 410, "log_truncated")["oldest_position"]
    assert oldest > WINDOW
    cut.rewind(name, oldest)
    again = cut.steps(name, inputs[oldest:], predictions="all")["predictions"]
    assert [bare(one) for one in again] == said[oldest:]
    cut.restart()
    assert cut.verify(name)["verified"] is True


# ---------------------------------------------------------------------- the state as a file


def test_a_state_file_goes_on_where_it_stood(models: Path, server: Server, name: str) -> None:
    inputs = inputs_of(models, "tiny-window-letters", 50, 6)
    said = server.steps(name, inputs[:30], model="tiny-window-letters")
    assert said["position"] == 30
    assert server.upload(f"copy-{name}", server.state_file(name)).status_code == 201
    rest = server.steps(name, inputs[30:], predictions="all")["predictions"]
    copy = server.steps(f"copy-{name}", inputs[30:], predictions="all")["predictions"]
    assert [bare(one) for one in copy] == [bare(one) for one in rest]
    assert server.state(f"copy-{name}") == server.state(name)


@pytest.mark.parametrize("damage", ["length", "negative", "symbol", "position", "carried"])
def test_a_state_file_whose_window_cannot_be_is_refused(damage: str, server: Server, name: str) -> None:
    server.steps(name, "abcabcabcabc", model="tiny-window-letters")
    server.steps(f"carried-{name}", "abcabcabcabc", model="tiny-letters")
    data = server.state_file(f"carried-{name}" if damage == "carried" else name)
    tensors = {key: value.copy() for key, value in safetensors.numpy.load(data).items()}
    size = int.from_bytes(data[:8], "little")
    said = json.loads(data[8 : 8 + size])["__metadata__"]
    if damage == "carried":
        said["model"] = "tiny-window-letters"
    elif damage == "symbol":
        tensors["window"][3] = 99
    elif damage == "position":
        said["position"] = "3"
    else:
        tensors["window.length"][0] = {"length": 3, "negative": -5}[damage]
    order = [key for key in ("h", "c", "window", "window.length") if key in tensors]
    said["state_sha256"] = hashlib.sha256(b"".join(tensors[key].tobytes() for key in order)).hexdigest()
    problem(server.upload(f"bad-{name}", safetensors.numpy.save(tensors, said)), 422, "state_mismatch")
