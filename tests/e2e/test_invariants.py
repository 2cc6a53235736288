"""What is true of every model: cutting, mixing, streaming and restarting change no bit.

JSON numbers are compared exactly: a float32 written to JSON and read again is the same float32.
"""

import asyncio
import random
import secrets
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import Server, text_of, tokens_of
from tiny import every_model, newest, shipped, some_inputs

from service.bundle import Manifest

few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
fewer = settings(few, max_examples=5)

STEPS = 70
SESSIONS = 64
TEXT = {"max_tokens": 120, "seed": 1234, "temperature": 0.9, "top_p": 0.95}


@cache
def manifest_of(models: Path, model: str) -> Manifest:
    return newest(models, model).manifest


def writers() -> list[str]:
    """The models that generate."""
    known = ("tiny-letters", "tiny-tags", "tiny-window-letters", "shakespeare", "bible")
    return [model for model in every_model() if model in known]


def start_of(models: Path, model: str) -> list[Any]:
    return some_inputs(manifest_of(models, model), 5, 3)


def test_the_shipped_models_are_there() -> None:
    assert {"bible", "japanese-vowels", "nyc-weather", "shakespeare", "temperature", "who"} <= set(shipped())


def test_every_shipped_model_is_loaded_and_runs_in_batches(server: Server) -> None:
    ready = server.ok(server.http.get("/readyz"))
    assert set(every_model()) <= set(ready["models"])
    assert ready["skipped"] == {} and ready["row_by_row"] == []


# ---------------------------------------------------------------------- feeding


@pytest.mark.parametrize("model", every_model())
@few
@given(data=st.data())
def test_a_sequence_cut_anywhere_gives_the_same_predictions_and_state(
    model: str, models: Path, server: Server, data: st.DataObject
) -> None:
    inputs = some_inputs(manifest_of(models, model), STEPS, data.draw(st.integers(0, 99), label="seed"))
    cuts = sorted(data.draw(st.sets(st.integers(1, STEPS - 1), max_size=8), label="cuts"))
    whole, parts = new(server, model), new(server, model)
    expected = server.steps(whole, inputs, predictions="all")["predictions"]
    found = feed_in_parts(server, parts, inputs, cuts)
    assert found == expected
    assert server.state(parts) == server.state(whole)


@pytest.mark.parametrize("model", every_model())
def test_a_sequence_fed_one_by_one_gives_the_same_predictions_and_state(
    model: str, models: Path, server: Server
) -> None:
    inputs = some_inputs(manifest_of(models, model), STEPS, 8)
    whole, parts = new(server, model), new(server, model)
    expected = server.steps(whole, inputs, predictions="all")["predictions"]
    assert feed_in_parts(server, parts, inputs, list(range(1, STEPS))) == expected
    assert server.state(parts) == server.state(whole)


@pytest.mark.parametrize("model", every_model())
def test_predict_says_what_a_session_says(model: str, models: Path, server: Server) -> None:
    sequences = [some_inputs(manifest_of(models, model), n, n) for n in (1, 7, 33)]
    body = {"sequences": sequences, "predictions": "all"}
    predicted = server.ok(server.post(f"/v1/models/{model}/predict", body))["predictions"]
    fed = [server.steps(new(server, model), one, predictions="all")["predictions"] for one in sequences]
    assert predicted == fed


def test_the_last_prediction_is_the_last_of_all(models: Path, server: Server) -> None:
    inputs = some_inputs(manifest_of(models, "tiny-letters"), 40)
    everything = server.steps(new(server, "tiny-letters"), inputs, predictions="all")["predictions"]
    assert server.steps(new(server, "tiny-letters"), inputs)["predictions"] == everything[-1:]


@pytest.mark.parametrize("model", ["tiny-letters", "tiny-weather"])
@few
@given(cut=st.integers(1, 9))
def test_surprise_is_the_same_for_any_cut(model: str, models: Path, server: Server, cut: int) -> None:
    inputs = some_inputs(manifest_of(models, model), 10, 4)
    whole = server.steps(new(server, model), inputs, predictions="all")["predictions"]
    parts = feed_in_parts(server, new(server, model), inputs, [cut])
    surprises = [prediction.get("surprise") for prediction in whole]
    assert [prediction.get("surprise") for prediction in parts] == surprises
    assert surprises[0] is None and None not in surprises[1:]


@pytest.mark.parametrize("predictions", ["last", "none"])
def test_the_state_does_not_depend_on_what_is_asked_for(predictions: str, models: Path, server: Server) -> None:
    inputs = some_inputs(manifest_of(models, "tiny-people"), 40)
    all_of_them, asked = new(server, "tiny-people"), new(server, "tiny-people")
    server.steps(all_of_them, inputs, predictions="all")
    server.steps(asked, inputs, predictions=predictions)
    assert server.state(asked) == server.state(all_of_them)


def new(server: Server, model: str) -> str:
    return str(server.create(model)["id"])


def feed_in_parts(server: Server, session: str, inputs: list[Any], cuts: list[int]) -> list[Any]:
    ends = [*cuts, len(inputs)]
    found: list[Any] = []
    for begin, end in zip([0, *cuts], ends, strict=True):
        found += server.steps(session, inputs[begin:end], predictions="all", position=begin)["predictions"]
    return found


# ---------------------------------------------------------------------- many sessions


@pytest.mark.parametrize("model", every_model())
def test_64_interleaved_sessions_give_what_each_gives_alone(model: str, models: Path, server: Server) -> None:
    manifest = manifest_of(models, model)
    sequences = {f"{secrets.token_hex(6)}-{i}": some_inputs(manifest, 8, 100 + i) for i in range(SESSIONS)}
    expected = [server.steps(f"alone-{s}", one, predictions="all", model=model) for s, one in sequences.items()]
    mixed = asyncio.run(feed_all(server.url, model, sequences))
    assert mixed == [answer["predictions"] for answer in expected]
    for session in list(sequences)[::8]:
        assert server.state(session) == server.state(f"alone-{session}")


async def feed_all(url: str, model: str, sequences: dict[str, list[Any]]) -> list[Any]:
    """Every session in random parts of its own, all at once."""
    limits = httpx.Limits(max_connections=SESSIONS)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits, verify=False) as http:
        fed = [feed_one(http, model, s, one, random.Random(i)) for i, (s, one) in enumerate(sequences.items())]
        return await asyncio.gather(*fed)


async def feed_one(
    http: httpx.AsyncClient, model: str, session: str, inputs: list[Any], rng: random.Random
) -> list[Any]:
    found: list[Any] = []
    begin = 0
    while begin < len(inputs):
        end = begin + rng.randint(1, 6)
        body = {"inputs": inputs[begin:end], "predictions": "all", "model": model}
        response = await http.post(f"/v1/sessions/{session}/steps", json=body)
        found += response.raise_for_status().json()["predictions"]
        begin = end
        await asyncio.sleep(rng.random() / 500)
    return found


@pytest.mark.parametrize("model", writers())
def test_a_seed_writes_the_same_text_alone_and_among_64(model: str, models: Path, server: Server) -> None:
    body = {**TEXT, "model": model, "inputs": start_of(models, model)}
    alone = server.generate(new(server, model), **body)
    crowd = asyncio.run(generate_all(server.url, body, [new(server, model) for _ in range(SESSIONS)]))
    assert crowd[0] == alone["tokens"]
    assert len({tuple(tokens) for tokens in crowd}) == SESSIONS


async def generate_all(url: str, body: dict[str, Any], sessions: list[str]) -> list[list[int]]:
    """The same generate under consecutive seeds, all at once."""
    limits = httpx.Limits(max_connections=SESSIONS)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits, verify=False) as http:
        posted = [
            http.post(f"/v1/sessions/{session}/generate", json={**body, "seed": body["seed"] + i})
            for i, session in enumerate(sessions)
        ]
        return [response.raise_for_status().json()["tokens"] for response in await asyncio.gather(*posted)]


# ---------------------------------------------------------------------- one text, many ways


@pytest.mark.parametrize("model", writers())
def test_a_text_is_the_same_streamed_unstreamed_and_without_a_session(model: str, models: Path, server: Server) -> None:
    body = {**TEXT, "inputs": start_of(models, model)}
    answer = server.generate(new(server, model), **body)
    events = server.stream(new(server, model), **body)
    kept_nowhere = server.ok(server.post(f"/v1/models/{model}/generate", body))
    assert tokens_of(events) == answer["tokens"] == kept_nowhere["tokens"]
    assert text_of(events) == answer["text"] == kept_nowhere["text"]


@pytest.mark.parametrize("model", writers())
@fewer
@given(cuts=st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_a_text_cut_and_resumed_is_the_same(model: str, models: Path, server: Server, cuts: list[int]) -> None:
    body = {**TEXT, "inputs": start_of(models, model)}
    whole, session = new(server, model), new(server, model)
    expected = server.stream(whole, **body)
    seen = server.stream(session, cuts[0], **body)
    for cut in cuts[1:]:
        if seen[-1].id in (expected[-2].id, expected[-1].id):
            break
        seen += server.resume(session, seen[-1].id, cut)
    if seen[-1].event != "done":
        seen += server.resume(session, seen[-1].id)
    assert [(event.id, event.data) for event in seen] == [(event.id, event.data) for event in expected]
    assert server.state(session) == server.state(whole)


@pytest.mark.parametrize("model", writers())
@fewer
@given(cuts=st.sets(st.integers(1, 119), min_size=1, max_size=4))
def test_a_text_is_the_same_in_several_generates(model: str, models: Path, server: Server, cuts: set[int]) -> None:
    """The draw at a position depends on seed and position alone, so consecutive generates make one text."""
    body = {**TEXT, "inputs": start_of(models, model)}
    whole, session = new(server, model), new(server, model)
    expected = server.generate(whole, **body)["tokens"]
    ends = [*sorted(cuts), 120]
    found: list[int] = []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        part = {**body, "max_tokens": end - begin}
        found += server.generate(session, **{k: v for k, v in part.items() if k != "inputs" or begin == 0})["tokens"]
    assert found == expected
    assert server.state(session) == server.state(whole)


@pytest.mark.parametrize("model", writers())
def test_a_prompt_fed_before_writes_the_same_text(model: str, models: Path, server: Server) -> None:
    prompt = start_of(models, model)
    fed, prompted = new(server, model), new(server, model)
    server.steps(fed, prompt)
    assert server.generate(fed, **TEXT)["tokens"] == server.generate(prompted, inputs=prompt, **TEXT)["tokens"]


@pytest.mark.parametrize("model", writers())
def test_generated_entries_are_worth_the_same_as_fed_ones(model: str, models: Path, server: Server) -> None:
    prompt = start_of(models, model)
    written, fed = new(server, model), new(server, model)
    tokens = server.generate(written, inputs=prompt, **TEXT)["tokens"]
    server.steps(fed, prompt + tokens)
    assert server.state(written) == server.state(fed)
    assert server.steps(written, prompt, predictions="all") == {
        **server.steps(fed, prompt, predictions="all"),
        "session": written,
    }


@pytest.mark.parametrize("model", ["tiny-weather", *[m for m in shipped() if m in ("nyc-weather", "temperature")]])
def test_a_forecast_does_not_change_the_session(model: str, models: Path, server: Server) -> None:
    session = new(server, model)
    server.steps(session, some_inputs(manifest_of(models, model), 20))
    before, state = server.session(session), server.state(session)
    server.ok(server.post(f"/v1/sessions/{session}/forecast", {"horizon": 1, "samples": 3}))
    assert server.session(session) == before and server.state(session) == state
