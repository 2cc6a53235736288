"""The routes as a client meets them: sessions, steps, generate, forecast, predict, models, operations."""

import asyncio
import math
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import MakeServer, Server, problem, text_of, tokens_of
from prometheus_client.parser import text_string_to_metric_families
from tiny import LETTERS, TINY, newest, some_inputs

# ---------------------------------------------------------------------- sessions


def test_create_answers_the_session_and_its_place(server: Server, name: str) -> None:
    body = {"model": "tiny-letters", "id": name, "seed": 5, "ttl_s": 60, "metadata": {"a": [1, None, "ä"]}}
    response = server.post("/v1/sessions", body)
    assert response.status_code == 201 and response.headers["location"] == f"/v1/sessions/{name}"
    found = response.json()
    assert server.session(name) == found
    assert (found["id"], found["model"], found["version"], found["position"]) == (name, "tiny-letters", 1, 0)
    assert (found["seed"], found["metadata"], found["parent"]) == (5, {"a": [1, None, "ä"]}, None)
    assert found["state_bytes"] == 2 * 2 * 16 * 4
    lives = datetime.fromisoformat(found["expires_at"]) - datetime.fromisoformat(found["updated_at"])
    assert lives.total_seconds() == 60


def test_generated_ids_and_seeds_differ(server: Server) -> None:
    made = [server.create("tiny-letters") for _ in range(5)]
    assert len({one["id"] for one in made}) == 5 and len({one["seed"] for one in made}) == 5
    assert all(len(one["id"]) >= 22 for one in made)


@pytest.mark.parametrize("session", ["a", "A.b_c:d-1", "x" * 128, "0", "-", "..."])
def test_every_allowed_id_works(session: str, server: Server) -> None:
    server.http.delete(f"/v1/sessions/{session}")
    assert server.create("tiny-letters", session)["id"] == session
    assert server.steps(session, "ab")["session"] == session


def test_a_version_is_pinned_and_the_greatest_is_the_default(server: Server) -> None:
    assert server.create("tiny-tags")["version"] == 2
    assert server.create("tiny-tags", version=1)["version"] == 1


def test_one_post_creates_and_feeds(server: Server, name: str) -> None:
    first = server.steps(name, "abc", model="tiny-letters", seed=9)
    assert first["created"] is True and first["position"] == 3
    second = server.steps(name, "d", model="tiny-letters")
    assert "created" not in second and second["position"] == 4
    assert server.session(name)["seed"] == 9


def test_one_post_creates_and_generates(server: Server, name: str) -> None:
    answer = server.generate(name, model="tiny-letters", inputs="ab", max_tokens=5, seed=3)
    assert answer["created"] is True and answer["position"] == 7
    assert server.session(name)["seed"] == 3


def test_one_post_at_position_0_creates(server: Server, name: str) -> None:
    assert server.steps(name, "a", model="tiny-letters", position=0)["created"] is True


def test_a_position_that_is_right_feeds(server: Server, name: str) -> None:
    server.steps(name, "ab", model="tiny-letters")
    assert server.steps(name, "c", position=2)["position"] == 3
    assert server.generate(name, position=3, max_tokens=2)["position"] == 5


def test_a_steps_answer_says_where_the_session_stands(server: Server, name: str) -> None:
    answer = server.steps(name, "abcd", model="tiny-letters", predictions="all")
    assert (answer["session"], answer["steps"], answer["position"]) == (name, 4, 4)
    assert [prediction["position"] for prediction in answer["predictions"]] == [1, 2, 3, 4]
    assert server.steps(name, "a", predictions="none")["predictions"] == []


def test_patch_changes_metadata_and_ttl_alone(server: Server, name: str) -> None:
    server.steps(name, "abc", model="tiny-letters")
    before, state = server.session(name), server.state(name)
    patched = server.ok(server.http.patch(f"/v1/sessions/{name}", json={"metadata": {"a": 1}, "ttl_s": 100}))
    assert patched["metadata"] == {"a": 1} and patched["expires_at"] is not None
    unchanged = {"metadata", "updated_at", "expires_at"}
    assert {k: v for k, v in patched.items() if k not in unchanged} == {
        k: v for k, v in before.items() if k not in unchanged
    }
    assert server.ok(server.http.patch(f"/v1/sessions/{name}", json={"ttl_s": 0}))["expires_at"] is None
    assert server.session(name)["metadata"] == {"a": 1}
    assert server.state(name) == state


def test_delete_is_204_also_the_second_time(server: Server, name: str) -> None:
    server.create("tiny-letters", name)
    for _ in range(2):
        response = server.http.delete(f"/v1/sessions/{name}")
        assert response.status_code == 204 and response.content == b""


def test_a_new_life_is_unrelated_to_the_old_one(server: Server, name: str) -> None:
    first = server.create("tiny-letters", name, seed=1, metadata={"old": True}, ttl_s=50)
    server.steps(name, "abc")
    server.http.delete(f"/v1/sessions/{name}")
    second = server.create("tiny-weather", name)
    assert second["epoch"] > first["epoch"]
    assert (second["position"], second["metadata"], second["expires_at"]) == (0, {}, None)
    assert {n for tensor in server.state(name)["h"] for n in tensor} == {0.0}


def test_an_expired_session_is_410_and_lives_again_in_another_epoch(server: Server, name: str) -> None:
    epoch = server.create("tiny-letters", name, ttl_s=2)["epoch"]
    server.steps(name, "abc")
    time.sleep(2.1)
    problem(server.http.get(f"/v1/sessions/{name}"), 410, "session_expired")
    problem(server.post(f"/v1/sessions/{name}/steps", {"inputs": "a"}), 410, "session_expired")
    problem(
        server.post(f"/v1/sessions/{name}/steps", {"inputs": "a", "model": "tiny-letters", "position": 3}),
        410,
        "session_expired",
    )
    assert name not in {one["id"] for one in server.ok(server.http.get("/v1/sessions?limit=1000"))["data"]}
    answer = server.steps(name, "ab", model="tiny-letters")
    assert answer["created"] is True and answer["position"] == 2 and answer["epoch"] > epoch


def test_a_commit_extends_a_life_and_a_read_does_not(server: Server, name: str) -> None:
    server.create("tiny-letters", name, ttl_s=4)
    time.sleep(2.1)
    assert server.steps(name, "a")["position"] == 1
    time.sleep(2.1)
    server.session(name)
    server.state(name)
    time.sleep(2.1)
    problem(server.http.get(f"/v1/sessions/{name}"), 410, "session_expired")


def test_the_default_ttl_is_a_setting(fresh: MakeServer) -> None:
    one = fresh(session_ttl_s=100, store="memory").start()
    assert one.create("tiny-letters")["expires_at"] is not None
    assert one.create("tiny-letters", ttl_s=0)["expires_at"] is None


def test_pages_hold_every_session_once_in_order(server: Server, name: str) -> None:
    ids = sorted(f"{name}-{i}" for i in range(25))
    for i, session in enumerate(ids):
        server.create("tiny-people" if i % 2 else "tiny-single", session)
    for model in (None, "tiny-people", "tiny-single"):
        found = [one for one in pages(server, model, 4) if one.startswith(name)]
        wanted = [s for i, s in enumerate(ids) if model is None or (i % 2 == 1) == (model == "tiny-people")]
        assert found == wanted


def pages(server: Server, model: str | None, limit: int) -> list[str]:
    """All ids, page by page."""
    found: list[str] = []
    cursor: str | None = None
    for _ in range(1000):
        query = {"limit": limit, **({"model": model} if model else {}), **({"cursor": cursor} if cursor else {})}
        page = server.ok(server.http.get("/v1/sessions", params=query))
        assert len(page["data"]) <= limit
        found += [one["id"] for one in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            return found
    raise AssertionError("the pages do not end")


# ---------------------------------------------------------------------- order of operations


def test_steps_wait_for_a_generate(server: Server, name: str) -> None:
    body = {"model": "tiny-letters", "max_tokens": 2000, "seed": 1}
    answers: dict[str, Any] = {}
    generating = threading.Thread(target=lambda: answers.update(generated=server.generate(name, **body)))
    generating.start()
    while server.http.get(f"/v1/sessions/{name}").status_code != 200:
        time.sleep(0.005)
    fed = server.steps(name, "ab")
    generating.join(30)
    assert answers["generated"]["usage"]["completion_tokens"] == 2000
    assert fed["position"] == answers["generated"]["position"] + 2


def test_a_position_is_compared_when_its_turn_comes(server: Server, name: str) -> None:
    with held(server, name):
        posted = asyncio.run(post_many(server, name, [{"inputs": "a", "position": 0}]))
    problem(posted[0], 409, "position_mismatch")


def test_sixteen_operations_may_wait_and_no_more(server: Server, name: str) -> None:
    with held(server, name) as hold:
        posted = asyncio.run(post_many(server, name, [{"inputs": "a"}] * 20, hold.release))
    codes = sorted(response.status_code for response in posted)
    assert codes == [200] * 16 + [429] * 4
    busy = next(response for response in posted if response.status_code == 429)
    problem(busy, 429, "session_busy")
    assert int(busy.headers["retry-after"]) >= 1
    positions = sorted(response.json()["position"] for response in posted if response.status_code == 200)
    assert positions == list(range(positions[0], positions[0] + 16))


def test_reads_do_not_wait_for_a_generate(server: Server, name: str) -> None:
    with held(server, name):
        began = time.monotonic()
        server.session(name)
        server.state(name)
        assert time.monotonic() - began < 2


def test_one_that_waits_too_long_is_429(fresh: MakeServer, name: str) -> None:
    one = fresh(session_wait_ms=300, store="memory").start()
    with held(one, name):
        began = time.monotonic()
        problem(one.post(f"/v1/sessions/{name}/steps", {"inputs": "a"}), 429, "session_busy")
        assert time.monotonic() - began >= 0.3


def test_a_waiter_whose_client_left_feeds_nothing(server: Server, name: str) -> None:
    with held(server, name):
        with pytest.raises(httpx.ReadTimeout):
            server.http.post(f"/v1/sessions/{name}/steps", json={"inputs": "abcabc"}, timeout=0.3)
        time.sleep(0.3)
    position = server.suspended(name)
    server.ok(server.post(f"/v1/sessions/{name}/cancel", None))
    assert server.resume(name, f"1.{position}")[-1].data["position"] == position


class held:  # noqa: N801 (reads as a verb)
    """Holds a session's turn with a long stream until the end of the block, or `release`."""

    def __init__(self, server: Server, session: str) -> None:
        self._body = {"model": "tiny-letters", "max_tokens": 20_000, "seed": 1, "stream": True}
        self._request = server.http.build_request("POST", f"/v1/sessions/{session}/generate", json=self._body)
        self._server = server

    def __enter__(self) -> "held":
        self._response = self._server.http.send(self._request, stream=True)
        assert self._response.status_code == 200
        return self

    def release(self) -> None:
        self._response.close()

    def __exit__(self, *_: object) -> None:
        self.release()


async def post_many(server: Server, session: str, bodies: list[Any], then: Any = None) -> list[httpx.Response]:  # noqa: ANN401
    """Post steps all at once; call `then` when all have reached the server."""
    async with httpx.AsyncClient(base_url=server.url, timeout=30, verify=False) as http:
        posted = [asyncio.create_task(http.post(f"/v1/sessions/{session}/steps", json=body)) for body in bodies]
        await asyncio.sleep(0.5)
        if then is not None:
            then()
        else:
            await http.post(f"/v1/sessions/{session}/cancel")
        return list(await asyncio.gather(*posted))


# ---------------------------------------------------------------------- generate


def test_a_generate_answer_counts_what_it_took_and_made(server: Server, name: str) -> None:
    answer = server.generate(name, model="tiny-letters", inputs="abc", max_tokens=7)
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 7}
    assert answer["position"] == 10 and answer["finish_reason"] == "length"
    assert answer["text"] == "".join(LETTERS[token] for token in answer["tokens"]) and len(answer["tokens"]) == 7
    assert "logprobs" not in answer


def test_without_inputs_an_empty_session_begins_with_the_start_symbol(server: Server, name: str) -> None:
    answer = server.generate(name, model="tiny-letters", max_tokens=4, seed=2)
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 4} and answer["position"] == 5
    told = server.generate(f"{name}-told", model="tiny-letters", inputs="\n", max_tokens=4, seed=2)
    assert answer["tokens"] == told["tokens"]


def test_without_inputs_a_session_goes_on_where_it_stands(server: Server, name: str) -> None:
    server.steps(name, "abc", model="tiny-letters")
    answer = server.generate(name, max_tokens=2)
    assert answer["usage"] == {"prompt_tokens": 0, "completion_tokens": 2} and answer["position"] == 5


def test_a_seed_on_a_live_session_holds_for_this_generate_only(server: Server, name: str) -> None:
    server.create("tiny-letters", name, seed=1)
    server.create("tiny-letters", f"{name}-2", seed=2)
    one = server.generate(name, inputs="ab", max_tokens=50, seed=2)
    two = server.generate(f"{name}-2", inputs="ab", max_tokens=50)
    assert one["tokens"] == two["tokens"] and server.session(name)["seed"] == 1


def test_other_seeds_write_other_texts(server: Server) -> None:
    texts = {
        server.ok(server.post("/v1/models/tiny-letters/generate", {"seed": s, "max_tokens": 30}))["text"]
        for s in range(8)
    }
    assert len(texts) == 8


def test_greatest_seed_works(server: Server, name: str) -> None:
    assert server.create("tiny-letters", name, seed=2**53 - 1)["seed"] == 2**53 - 1
    assert len(server.generate(name, max_tokens=5)["tokens"]) == 5


def test_temperature_0_takes_the_most_likely(server: Server, name: str) -> None:
    answer = server.generate(name, model="tiny-letters", inputs="ab", temperature=0, max_tokens=20, logprobs=2)
    for one in answer["logprobs"]:
        assert one["token"] == one["alternatives"][0]["token"]
        assert one["logprob"] == pytest.approx(one["alternatives"][0]["logprob"], abs=1e-6)
        assert one["alternatives"][0]["logprob"] >= one["alternatives"][1]["logprob"]
    again = server.generate(f"{name}-2", model="tiny-letters", inputs="ab", temperature=0, max_tokens=20, seed=7)
    assert again["tokens"] == answer["tokens"]


def test_top_k_1_is_greedy(server: Server, name: str) -> None:
    greedy = server.generate(name, model="tiny-letters", inputs="ab", temperature=0, max_tokens=20)
    one = server.generate(f"{name}-k", model="tiny-letters", inputs="ab", top_k=1, max_tokens=20)
    tiny = server.generate(f"{name}-p", model="tiny-letters", inputs="ab", top_p=1e-9, max_tokens=20)
    assert one["tokens"] == greedy["tokens"] == tiny["tokens"]


@pytest.mark.parametrize("top_k", [2, 3])
def test_top_k_draws_among_the_most_likely(top_k: int, server: Server) -> None:
    body = {"inputs": "ab", "top_k": top_k, "max_tokens": 200, "logprobs": top_k, "seed": 1}
    answer = server.ok(server.post("/v1/models/tiny-letters/generate", body))
    ranks = [[a["token"] for a in one["alternatives"]].index(one["token"]) for one in answer["logprobs"]]
    assert set(ranks) == set(range(top_k))


def test_top_p_leaves_the_tail_out(server: Server) -> None:
    body = {"inputs": "ab", "top_p": 0.5, "max_tokens": 200, "logprobs": 13, "seed": 1}
    answer = server.ok(server.post("/v1/models/tiny-letters/generate", body))
    for one in answer["logprobs"]:
        more_likely = sum(math.exp(a["logprob"]) for a in one["alternatives"] if a["logprob"] > one["logprob"] + 1e-6)
        assert more_likely < 0.5


def test_logprobs_are_those_of_the_distribution(server: Server) -> None:
    body = {"inputs": "ab", "max_tokens": 10, "logprobs": 13}
    answer = server.ok(server.post("/v1/models/tiny-letters/generate", body))
    for one in answer["logprobs"]:
        shown = {a["token"]: a["logprob"] for a in one["alternatives"]}
        assert sum(map(math.exp, shown.values())) == pytest.approx(1)
        assert one["logprob"] == pytest.approx(shown[one["token"]], abs=1e-6)


def test_logprobs_0_shows_the_tokens_own(server: Server) -> None:
    answer = server.ok(server.post("/v1/models/tiny-letters/generate", {"max_tokens": 3, "logprobs": 0}))
    assert [one["alternatives"] for one in answer["logprobs"]] == [[], [], []]


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_string_ends_the_text_before_it(length: int, server: Server, name: str) -> None:
    body = {"model": "tiny-letters", "inputs": "ab", "seed": 12}
    whole = server.generate(f"{name}-whole", max_tokens=60, **body)
    stop = whole["text"][20 : 20 + length]
    at = whole["text"].index(stop)
    answer = server.generate(name, max_tokens=60, stop=["never there", stop], **body)
    assert answer["finish_reason"] == "stop"
    assert answer["text"] == whole["text"][:at]
    assert answer["tokens"] == whole["tokens"][: at + length]
    assert answer["position"] == 2 + at + length


def test_a_stop_string_ends_a_stream_before_it(server: Server, name: str) -> None:
    body = {"model": "tiny-letters", "inputs": "ab", "seed": 12, "max_tokens": 60}
    whole = server.generate(f"{name}-whole", **body)["text"]
    stop = whole[30:34]
    events = server.stream(name, stop=[stop], **body)
    assert text_of(events) == whole[: whole.index(stop)]
    assert events[-1].data["finish_reason"] == "stop"
    assert len(tokens_of(events)) == events[-1].data["usage"]["completion_tokens"] == whole.index(stop) + 4


def test_a_stop_string_that_does_not_come_leaves_the_text_whole(server: Server, name: str) -> None:
    body = {"model": "tiny-letters", "inputs": "ab", "seed": 12, "max_tokens": 60}
    whole = server.generate(f"{name}-whole", **body)["text"]
    half_there = whole[-3:] + "Z"
    assert server.generate(name, stop=[half_there], **body)["text"] == whole
    assert text_of(server.stream(f"{name}-s", stop=[half_there], **body)) == whole


def test_words_are_written_with_spaces_between_them(server: Server, name: str) -> None:
    answer = server.generate(name, model="tiny-tags", inputs="go left", max_tokens=10, seed=1)
    assert len(answer["text"].split(" ")) == 10
    assert answer["usage"]["prompt_tokens"] == 2


def test_nothing_is_kept_of_a_generate_without_a_session(server: Server) -> None:
    before = server.ok(server.http.get("/v1/sessions?limit=1000"))
    answer = server.ok(server.post("/v1/models/tiny-letters/generate", {"inputs": "ab", "max_tokens": 5, "seed": 1}))
    assert "session" not in answer and len(answer["tokens"]) == 5
    assert server.ok(server.http.get("/v1/sessions?limit=1000")) == before


def test_a_generate_without_a_session_streams(server: Server) -> None:
    body = {"inputs": "ab", "max_tokens": 5, "seed": 1}
    answer = server.ok(server.post("/v1/models/tiny-letters/generate", body))
    with server.http.stream("POST", "/v1/models/tiny-letters/generate", json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = "".join(response.iter_text())
    assert text.count("event: token") == 5 and text.count("event: done") == 1
    assert all(f'"token":{token},' in text for token in answer["tokens"])


# ---------------------------------------------------------------------- forecast


@pytest.fixture
def weather(server: Server, models: Path, name: str) -> str:
    """A session of a forecaster with a given feature."""
    server.steps(name, some_inputs(newest(models, "tiny-weather").manifest, 30), model="tiny-weather")
    return name


def hours(count: int) -> list[dict[str, float]]:
    return [{"hour": float(i % 24)} for i in range(count)]


def forecast(server: Server, session: str, **body: object) -> Any:  # noqa: ANN401 (any JSON)
    return server.ok(server.post(f"/v1/sessions/{session}/forecast", body))


def test_the_first_step_of_a_forecast_is_the_last_prediction(server: Server, models: Path, name: str) -> None:
    inputs = some_inputs(newest(models, "tiny-weather").manifest, 30)
    last = server.steps(name, inputs, model="tiny-weather")["predictions"][0]
    answer = forecast(server, name, horizon=1)
    assert (answer["session"], answer["position"]) == (name, 30)
    assert answer["forecast"] == [{"step": 1, "mean": last["mean"], "quantiles": last["quantiles"]}]


def test_a_forecast_is_what_feeding_its_own_means_gives(server: Server, weather: str) -> None:
    steps = forecast(server, weather, horizon=6, future=hours(5))["forecast"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    for i, step in enumerate(steps[:-1]):
        fed = server.steps(weather, [{"temperature": step["mean"]["temperature"], "hour": float(i % 24)}])
        assert fed["predictions"][0]["mean"] == steps[i + 1]["mean"]


def test_a_forecast_of_many_steps_does_not_change_the_session(server: Server, weather: str) -> None:
    before, state = server.session(weather), server.state(weather)
    forecast(server, weather, horizon=40, future=hours(40), samples=10)
    assert server.session(weather) == before and server.state(weather) == state


def test_sampled_quantiles_ascend_and_are_the_same_twice(server: Server, weather: str) -> None:
    body = {"horizon": 12, "future": hours(11), "samples": 40, "quantiles": [0.9, 0.05, 0.5]}
    first = forecast(server, weather, **body)
    assert forecast(server, weather, **body) == first
    for step in first["forecast"]:
        assert list(step["quantiles"]) == ["0.05", "0.5", "0.9"]
        values = [one["temperature"] for one in step["quantiles"].values()]
        assert values == sorted(values) and values[0] < values[2]


def test_another_seed_samples_other_paths(server: Server, weather: str) -> None:
    body = {"horizon": 3, "future": hours(2), "samples": 20}
    assert forecast(server, weather, seed=1, **body) == forecast(server, weather, seed=1, **body)
    assert forecast(server, weather, seed=1, **body) != forecast(server, weather, seed=2, **body)


def test_sampled_quantiles_of_one_step_come_near_the_models_own(server: Server, weather: str) -> None:
    own = forecast(server, weather, horizon=1)["forecast"][0]["quantiles"]
    drawn = forecast(server, weather, horizon=1, samples=1000)["forecast"][0]["quantiles"]
    spread = own["0.9"]["temperature"] - own["0.1"]["temperature"]
    for level in ("0.1", "0.5", "0.9"):
        assert abs(drawn[level]["temperature"] - own[level]["temperature"]) < 0.15 * spread


def test_only_the_quantiles_asked_for_are_shown(server: Server, weather: str) -> None:
    assert list(forecast(server, weather, horizon=1, quantiles=[0.5])["forecast"][0]["quantiles"]) == ["0.5"]


def test_a_null_in_the_future_of_a_predicted_feature_is_not_given(server: Server, weather: str) -> None:
    future = [{"temperature": None, "hour": 3.0}]
    answer = forecast(server, weather, horizon=2, future=future)
    assert answer == forecast(server, weather, horizon=2, future=[{"hour": 3.0}])


def test_a_model_of_one_feature_needs_no_future(server: Server, name: str) -> None:
    server.steps(name, [40, 41, 42.5], model="tiny-single")
    steps = forecast(server, name, horizon=24)["forecast"]
    assert len(steps) == 24 and all(set(step) == {"step", "mean"} for step in steps)


def test_an_empty_session_can_not_be_forecast(server: Server, name: str) -> None:
    server.create("tiny-weather", name)
    problem(server.post(f"/v1/sessions/{name}/forecast", {"horizon": 1}), 422, "empty_session")


# ---------------------------------------------------------------------- values, labels, whole sequences


def test_a_null_takes_the_last_value_where_the_manifest_says_so(server: Server, name: str) -> None:
    filled = server.steps(name, [[10, 1], [None, 2], [None, 3]], model="tiny-weather", predictions="all")
    told = server.steps(f"{name}-2", [[10, 1], [10, 2], [10, 3]], model="tiny-weather", predictions="all")
    assert filled["predictions"] == told["predictions"]
    assert server.state(name) == server.state(f"{name}-2")


def test_a_null_takes_the_last_value_of_an_earlier_request(server: Server, name: str) -> None:
    server.steps(name, [[10, 1]], model="tiny-weather")
    server.steps(name, [[None, 2]])
    server.steps(f"{name}-2", [[10, 1], [10, 2]], model="tiny-weather")
    assert server.state(name) == server.state(f"{name}-2")


@pytest.mark.parametrize(
    ("model", "inputs", "told"), [("tiny-single", [None, 41], [40, 41]), ("tiny-weather", [[None, 1]], [[12, 1]])]
)
def test_a_null_without_a_past_takes_the_mean(model: str, inputs: Any, told: Any, server: Server, name: str) -> None:  # noqa: ANN401
    server.steps(name, inputs, model=model)
    server.steps(f"{name}-2", told, model=model)
    assert server.state(name) == server.state(f"{name}-2")


def test_values_are_taken_as_lists_numbers_and_objects(server: Server, name: str) -> None:
    server.steps(name, [[10, 1.5], {"hour": 2, "temperature": 11}], model="tiny-weather")
    server.steps(f"{name}-2", [[10, 1.5], [11, 2]], model="tiny-weather")
    assert server.state(name) == server.state(f"{name}-2")
    server.steps(f"{name}-3", [40, [41], {"load": 42}], model="tiny-single")
    server.steps(f"{name}-4", [40, 41, 42], model="tiny-single")
    assert server.state(f"{name}-3") == server.state(f"{name}-4")


def test_symbols_are_taken_as_text_symbols_and_ids(server: Server, name: str) -> None:
    for i, inputs in enumerate(
        ["Anna has her keys.", ["anna", "has", "her", "keys", "."], [1, 2, 3, 5, 0], ["anna", 2, 3, "keys", 0]]
    ):
        server.steps(f"{name}-{i}", inputs, model="tiny-people")
    assert len({str(server.state(f"{name}-{i}")) for i in range(4)}) == 1


def test_a_classifier_answers_at_every_step(server: Server, name: str) -> None:
    answer = server.steps(name, "anna lost her shoes", model="tiny-people", predictions="all")
    assert len(answer["predictions"]) == 4
    for prediction in answer["predictions"]:
        assert set(prediction) == {"position", "label", "probabilities"}
        assert list(prediction["probabilities"]) == ["unknown", "anna", "nikolas"]
        assert sum(prediction["probabilities"].values()) == pytest.approx(1)
        assert prediction["label"] == max(prediction["probabilities"], key=prediction["probabilities"].__getitem__)


def test_a_language_model_shows_as_many_alternatives_as_asked(server: Server, name: str) -> None:
    for count in (0, 1, 5, 1000):
        prediction = server.steps(name, "a", model="tiny-letters", alternatives=count)["predictions"][0]
        shown = [one["logprob"] for one in prediction["alternatives"]]
        assert len(shown) == min(count, len(LETTERS)) and shown == sorted(shown, reverse=True)


def test_surprise_is_minus_the_logprob_that_was_predicted(server: Server, name: str) -> None:
    before = server.steps(name, "ab", model="tiny-letters", alternatives=1000)["predictions"][0]
    expected = next(one["logprob"] for one in before["alternatives"] if one["text"] == "c")
    assert server.steps(name, "c")["predictions"][0]["surprise"] == -expected


def test_surprise_of_quantiles_is_their_pinball_loss(server: Server, name: str) -> None:
    before = server.steps(name, [[10, 1]], model="tiny-weather")["predictions"][0]["quantiles"]
    found = server.steps(name, [[14, 2]])["predictions"][0]["surprise"]
    errors = {float(q): (14 - one["temperature"]) / 9.0 for q, one in before.items()}
    expected = sum(max(q * e, (q - 1) * e) for q, e in errors.items()) / 3
    assert found == pytest.approx(expected)


def test_surprise_where_a_null_was_filled_is_that_of_the_value(server: Server, name: str) -> None:
    filled = server.steps(name, [[10, 1], [None, 2]], model="tiny-weather", predictions="all")["predictions"]
    told = server.steps(f"{name}-2", [[10, 1], [10, 2]], model="tiny-weather", predictions="all")["predictions"]
    assert filled[1].get("surprise") == told[1]["surprise"]


def test_predict_answers_a_list_a_sequence(server: Server) -> None:
    body = {"sequences": [[35, 32, 45, 48, 41, 39, 36], [40]]}
    answer = server.ok(server.post("/v1/models/tiny-single/predict", body))
    assert [len(one) for one in answer["predictions"]] == [1, 1]
    assert [one[0]["position"] for one in answer["predictions"]] == [7, 1]
    everything = server.ok(server.post("/v1/models/tiny-single/predict", {**body, "predictions": "all"}))
    assert [len(one) for one in everything["predictions"]] == [7, 1]


def test_predict_takes_a_version(server: Server) -> None:
    answers = [
        server.ok(server.post("/v1/models/tiny-tags/predict", {"sequences": ["go left"], **version}))
        for version in ({}, {"version": 1}, {"version": 2})
    ]
    assert answers[0] == answers[2] != answers[1]


# ---------------------------------------------------------------------- models and operations


def test_every_model_has_its_card(server: Server) -> None:
    listed = server.ok(server.http.get("/v1/models"))
    assert listed["object"] == "list"
    cards = {card["id"]: card for card in listed["data"]}
    assert set(TINY) <= set(cards)
    for model, card in cards.items():
        assert server.ok(server.http.get(f"/v1/models/{model}")) == card
        assert card["object"] == "model" and card["owned_by"] and card["created"] > 1_700_000_000
        assert card["default_version"] == max(card["versions"]) and card["state_bytes"] > 0
        assert card["inputs"] and card["outputs"] and card["checks"]["batch_invariant"] is True
    assert cards["tiny-tags"]["versions"] == [1, 2]
    assert [one["name"] for one in cards["tiny-weather"]["inputs"]] == ["temperature", "hour"]
    assert cards["tiny-letters"]["task"] == "language-model" and cards["tiny-letters"]["input_kind"] == "text"
    assert (cards["tiny-letters"]["cell"], cards["tiny-letters"]["layers"], cards["tiny-letters"]["hidden"]) == (
        "lstm",
        2,
        16,
    )


def test_the_state_is_shown_by_name_and_layer(server: Server, name: str) -> None:
    server.steps(name, "abc", model="tiny-letters")
    shown = server.ok(server.http.get(f"/v1/sessions/{name}/state", headers={"Accept": "application/json"}))
    assert shown["position"] == 3 and set(shown["state"]) == {"h", "c"}
    assert [len(layer) for layer in shown["state"]["h"]] == [16, 16]


def test_alive_ready_and_docs(server: Server) -> None:
    assert server.http.get("/healthz").status_code == 200
    assert server.ok(server.http.get("/readyz"))["status"] == "ready"
    assert server.http.get("/docs").status_code == 200
    leads = server.http.get("/")
    assert leads.status_code in (302, 303, 307, 308) and leads.headers["location"] == "/docs"


def test_metrics_can_be_read_and_count(server: Server, name: str) -> None:
    before = samples(server)
    server.steps(name, "abcde", model="tiny-letters")
    after = samples(server)
    steps = ("recurra_steps_total", (("model", "tiny-letters"), ("version", "1")))
    assert after[steps] == before[steps] + 5
    posted = ("recurra_requests_total", (("method", "POST"), ("status", "200")))
    assert after[posted] == before.get(posted, 0) + 1


def samples(server: Server) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(response.text))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


ROUTES = {
    ("get", "/v1/models"),
    ("get", "/v1/models/{model}"),
    ("post", "/v1/models/{model}/predict"),
    ("post", "/v1/models/{model}/generate"),
    ("post", "/v1/sessions"),
    ("get", "/v1/sessions"),
    ("get", "/v1/sessions/{session_id}"),
    ("patch", "/v1/sessions/{session_id}"),
    ("delete", "/v1/sessions/{session_id}"),
    ("post", "/v1/sessions/{session_id}/cancel"),
    ("post", "/v1/sessions/{session_id}/steps"),
    ("post", "/v1/steps"),
    ("post", "/v1/sessions/{session_id}/generate"),
    ("get", "/v1/sessions/{session_id}/events"),
    ("post", "/v1/sessions/{session_id}/forecast"),
    ("post", "/v1/sessions/{session_id}/fork"),
    ("post", "/v1/sessions/{session_id}/rewind"),
    ("post", "/v1/sessions/{session_id}/migrate"),
    ("post", "/v1/sessions/{session_id}/verify"),
    ("get", "/v1/sessions/{session_id}/log"),
    ("get", "/v1/sessions/{session_id}/state"),
    ("put", "/v1/sessions/{session_id}/state"),
    ("get", "/v1/sessions/{session_id}/ws"),
    ("post", "/v1/completions"),
    ("post", "/v1/models/reload"),
    ("get", "/healthz"),
    ("get", "/readyz"),
    ("get", "/metrics"),
}


def openapi(server: Server) -> Any:  # noqa: ANN401 (any JSON)
    return server.ok(server.http.get("/openapi.json"))


def test_the_openapi_page_lists_every_route(server: Server) -> None:
    paths = {path: item for path, item in openapi(server)["paths"].items() if not path.startswith("/v2")}
    assert {(method, path) for path, item in paths.items() for method in item} == ROUTES


def test_the_openapi_page_says_what_each_post_takes_with_an_example(server: Server) -> None:
    paths = openapi(server)["paths"]
    without_body = {"cancel", "verify", "reload"}
    for method, path in sorted(ROUTES):
        if method in ("post", "patch") and path.rpartition("/")[2] not in without_body:
            content = paths[path][method]["requestBody"]["content"]
            if path == "/v1/steps":
                assert content["application/x-ndjson"]["schema"]["properties"]
                assert content["application/x-ndjson"]["example"]
                continue
            assert content["application/json"]["schema"]["properties"], path
            assert content["application/json"]["examples"], path


def test_the_openapi_page_says_that_every_post_takes_a_key(server: Server) -> None:
    paths = openapi(server)["paths"]
    for method, path in sorted(ROUTES):
        if method == "post":
            assert "Idempotency-Key" in {one["name"] for one in paths[path][method]["parameters"]}, path


def test_the_openapi_page_has_no_loose_references(server: Server) -> None:
    page = openapi(server)
    assert page["openapi"].startswith("3.")

    def references(value: Any) -> list[str]:  # noqa: ANN401 (any JSON)
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [found for item in value.values() for found in references(item)]
        return [found for item in value for found in references(item)] if isinstance(value, list) else []

    for reference in references(page):
        assert reference.startswith("#/")
        target = page
        for part in reference[2:].split("/"):
            target = target[part]


def test_the_openapi_page_names_the_errors_and_the_stream(server: Server) -> None:
    paths = openapi(server)["paths"]
    steps = paths["/v1/sessions/{session_id}/steps"]["post"]["responses"]
    assert {"200", "400", "404", "409", "410", "413", "415", "422", "429", "503"} <= set(steps)
    for path in ("/v1/sessions/{session_id}/generate", "/v1/models/{model}/generate"):
        assert "text/event-stream" in paths[path]["post"]["responses"]["200"]["content"]
    assert "text/event-stream" in paths["/v1/sessions/{session_id}/events"]["get"]["responses"]["200"]["content"]


def test_overload_is_503_and_passes(fresh: MakeServer, name: str) -> None:
    one = fresh(max_queue_steps=1000, store="memory").start()
    body = {"sequences": ["a" * 1000]}
    with held(one, name):
        answer = one.post("/v1/models/tiny-letters/predict", body)
        problem(answer, 503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    one.suspended(name)
    assert one.post("/v1/models/tiny-letters/predict", body).status_code == 200


def test_an_answer_that_would_be_too_large_is_refused(server: Server, name: str) -> None:
    body = {"inputs": "a" * 90_000, "model": "tiny-letters", "predictions": "all", "alternatives": 13}
    response = server.post(f"/v1/sessions/{name}/steps", body)
    assert response.status_code == 422 or len(response.content) < 32 * 2**20
