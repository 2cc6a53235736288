"""Streams: their form, how they are cut, resumed, cancelled and abandoned."""

import threading
import time

import httpx
import pytest
from live import Server, events_of, read_events, text_of, tokens_of

LONG = {"model": "tiny-letters", "max_tokens": 20_000, "seed": 6}
SHORT = {"model": "tiny-letters", "inputs": "abc", "max_tokens": 30, "seed": 6}


def events(server: Server, session: str, after: str) -> httpx.Response:
    return server.http.get(f"/v1/sessions/{session}/events", headers={"Last-Event-ID": after})


def test_the_form_of_a_stream(server: Server, name: str) -> None:
    body = {**SHORT, "max_tokens": 2, "stream": True}
    with server.http.stream("POST", f"/v1/sessions/{name}/generate", json=body) as response:
        headers = response.headers
        lines = "".join(response.iter_text()).split("\n")
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-store" and headers["x-accel-buffering"] == "no"
    assert [line.split(":")[0] for line in lines] == [*["event", "id", "data", ""] * 3, ""]
    assert lines[0:2] == ["event: token", "id: 1.4"] and lines[8:10] == ["event: done", "id: 1.5-end"]


def test_every_token_has_its_event_and_done_says_how_it_ended(server: Server, name: str) -> None:
    found = server.stream(name, **SHORT)
    assert [event.event for event in found] == ["token"] * 30 + ["done"]
    assert [event.data["position"] for event in found[:-1]] == list(range(4, 34))
    assert all(set(event.data) == {"position", "token", "text", "logprob"} for event in found[:-1])
    assert found[-1].data == {
        "finish_reason": "length",
        "epoch": 1,
        "position": 33,
        "usage": {"prompt_tokens": 3, "completion_tokens": 30},
    }


def test_a_token_is_committed_before_it_is_sent(server: Server, name: str) -> None:
    with server.http.stream("POST", f"/v1/sessions/{name}/generate", json={**LONG, "stream": True}) as response:
        for event, _ in zip(events_of(response), range(5), strict=False):
            assert server.position(name) >= event.data["position"]


def test_a_stream_that_fails_at_once_is_a_problem_document(server: Server, name: str) -> None:
    response = server.post(f"/v1/sessions/{name}/generate", {"model": "tiny-tags", "stream": True})
    assert response.status_code == 422 and response.json()["code"] == "empty_session"


def test_a_client_that_leaves_suspends_its_generate(server: Server, name: str) -> None:
    seen = server.stream(name, 10, **LONG)
    position = server.suspended(name)
    assert seen[-1].data["position"] <= position < 20_000
    time.sleep(0.3)
    assert server.position(name) == position


def test_a_json_client_that_leaves_suspends_its_generate(server: Server, name: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(f"/v1/sessions/{name}/generate", json=LONG, timeout=0.3)
    assert 0 < server.suspended(name) < 20_000


def test_events_from_the_start_give_the_whole_text(server: Server, name: str) -> None:
    seen = server.stream(name, **SHORT)
    for after in ("1.0", "1.1", "1.3"):
        again = server.resume(name, after)
        assert [(e.id, e.data) for e in again] == [(e.id, e.data) for e in seen]


def test_events_after_a_token_give_the_rest(server: Server, name: str) -> None:
    seen = server.stream(name, **SHORT)
    rest = server.resume(name, seen[11].id)
    assert [(e.id, e.data) for e in rest] == [(e.id, e.data) for e in seen[12:]]


def test_events_after_the_last_token_give_done(server: Server, name: str) -> None:
    seen = server.stream(name, **SHORT)
    rest = server.resume(name, seen[-2].id)
    assert [(e.event, e.id, e.data) for e in rest] == [("done", seen[-1].id, seen[-1].data)]


def test_events_after_the_end_are_204(server: Server, name: str) -> None:
    seen = server.stream(name, **SHORT)
    response = events(server, name, seen[-1].id)
    assert response.status_code == 204 and response.content == b""


def test_events_need_to_know_after_which(server: Server, name: str) -> None:
    server.stream(name, **SHORT)
    assert server.http.get(f"/v1/sessions/{name}/events").status_code == 400


def test_the_query_says_it_as_well_as_the_header(server: Server, name: str) -> None:
    seen = server.stream(name, **SHORT)
    response = server.http.get(f"/v1/sessions/{name}/events?after={seen[20].id}")
    assert response.text.count("event: token") == 9


def test_events_beyond_the_head_are_400_and_move_nothing(server: Server, name: str) -> None:
    server.stream(name, 5, **LONG)
    position = server.suspended(name)
    response = events(server, name, f"1.{position + 1}")
    assert response.status_code == 400 and response.json()["code"] == "bad_request"
    time.sleep(0.3)
    assert server.position(name) == position


def test_events_of_another_epoch_are_410(server: Server, name: str) -> None:
    seen = server.stream(name, **SHORT)
    assert events(server, name, "2.5").json()["code"] == "log_truncated"
    server.http.delete(f"/v1/sessions/{name}")
    server.stream(name, **SHORT)
    response = events(server, name, seen[3].id)
    assert response.status_code == 410 and response.json()["code"] == "log_truncated"


def test_events_of_a_session_that_never_generated_are_204(server: Server, name: str) -> None:
    server.steps(name, "abc", model="tiny-letters")
    assert events(server, name, "1.1").status_code == 204


def test_a_suspended_generate_goes_on_under_two_readers_at_once(server: Server, name: str) -> None:
    body = {**SHORT, "max_tokens": 600}
    whole = server.generate(f"{name}-whole", **body)
    server.stream(name, 5, **body)
    found: list[list[int]] = []

    def read() -> None:
        with httpx.stream("GET", f"{server.url}/v1/sessions/{name}/events?after=1.0", timeout=30) as response:
            found.append(tokens_of(read_events(response)))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(30)
    assert found == [whole["tokens"]] * 3


def test_a_resumed_stream_may_be_cut_again_and_again(server: Server, name: str) -> None:
    body = {**SHORT, "max_tokens": 200}
    whole = server.stream(f"{name}-whole", **body)
    seen = server.stream(name, 3, **body)
    while seen[-1].event != "done":
        seen += server.resume(name, seen[-1].id, 40)
        if seen[-1].id == whole[-2].id:
            seen += server.resume(name, seen[-1].id)
    assert text_of(seen) == text_of(whole) and len(seen) == len(whole)


def test_a_stop_string_over_a_cut_is_found(server: Server, name: str) -> None:
    body = {**SHORT, "max_tokens": 80}
    whole = server.generate(f"{name}-whole", **body)["text"]
    stop = whole[40:44]
    at = whole.index(stop)
    for cut in range(at + 1, at + 4):
        session = f"{name}-{cut}"
        seen = server.stream(session, cut, stop=[stop], **body)
        if seen[-1].event != "done":
            seen += server.resume(session, seen[-1].id)
        assert text_of(seen) == whole[:at]
        assert seen[-1].data["finish_reason"] == "stop"


# ---------------------------------------------------------------------- cancelling


def test_cancel_ends_a_running_stream(server: Server, name: str) -> None:
    with server.http.stream("POST", f"/v1/sessions/{name}/generate", json={**LONG, "stream": True}) as response:
        stream = events_of(response)
        seen = [next(stream) for _ in range(5)]
        cancelled = httpx.post(f"{server.url}/v1/sessions/{name}/cancel", timeout=10)
        seen += list(stream)
    assert cancelled.status_code == 200
    assert seen[-1].event == "done" and seen[-1].data["finish_reason"] == "cancelled"
    assert cancelled.json()["position"] == seen[-1].data["position"] == seen[-2].data["position"]
    assert server.position(name) == seen[-1].data["position"]


def test_cancel_ends_a_running_json_generate(server: Server, name: str) -> None:
    answers: list[dict[str, object]] = []
    asking = threading.Thread(target=lambda: answers.append(server.generate(name, **LONG)))
    asking.start()
    while server.http.get(f"/v1/sessions/{name}").status_code != 200:
        time.sleep(0.005)
    assert server.http.post(f"/v1/sessions/{name}/cancel").status_code == 200
    asking.join(10)
    assert answers[0]["finish_reason"] == "cancelled"
    assert answers[0]["position"] == server.position(name)


def test_cancel_ends_a_suspended_generate(server: Server, name: str) -> None:
    seen = server.stream(name, 5, **LONG)
    position = server.suspended(name)
    assert server.http.post(f"/v1/sessions/{name}/cancel").json()["position"] == position
    rest = server.resume(name, seen[-1].id)
    assert rest[-1].data["finish_reason"] == "cancelled" and rest[-1].data["position"] == position
    assert server.position(name) == position


def test_cancel_of_nothing_changes_nothing(server: Server, name: str) -> None:
    server.steps(name, "abc", model="tiny-letters")
    before = server.session(name)
    assert server.ok(server.http.post(f"/v1/sessions/{name}/cancel")) == before
    server.generate(name, max_tokens=3)
    before = server.session(name)
    assert server.ok(server.http.post(f"/v1/sessions/{name}/cancel")) == before
    assert server.resume(name, "1.0")[-1].data["finish_reason"] == "length"


def test_cancel_of_a_generate_whose_prompt_is_still_read_is_no_failure(server: Server, name: str) -> None:
    server.create("tiny-letters", name)
    answers: list[httpx.Response] = []
    body = {"inputs": "abcd" * 20_000, "max_tokens": 20_000}
    asking = threading.Thread(target=lambda: answers.append(server.post(f"/v1/sessions/{name}/generate", body)))
    asking.start()
    while not server.metric("recurra_queued_steps"):
        assert asking.is_alive()
    assert httpx.post(f"{server.url}/v1/sessions/{name}/cancel", timeout=20).status_code == 200
    asking.join(20)
    assert answers[0].status_code == 200 and answers[0].json()["finish_reason"] == "cancelled", answers[0].text
    assert server.position(name) == answers[0].json()["position"]


def test_delete_ends_a_running_stream_as_cancelled(server: Server, name: str) -> None:
    with server.http.stream("POST", f"/v1/sessions/{name}/generate", json={**LONG, "stream": True}) as response:
        stream = events_of(response)
        seen = [next(stream) for _ in range(5)]
        assert httpx.delete(f"{server.url}/v1/sessions/{name}", timeout=10).status_code == 204
        seen += list(stream)
    assert seen[-1].event == "done" and seen[-1].data["finish_reason"] == "cancelled"
    assert server.http.get(f"/v1/sessions/{name}").status_code == 410


@pytest.mark.parametrize("operation", ["steps", "generate"])
def test_a_later_operation_abandons_a_suspended_generate(operation: str, server: Server, name: str) -> None:
    seen = server.stream(name, 5, **LONG)
    position = server.suspended(name)
    body = {"inputs": "ab"} | ({"max_tokens": 3, "seed": 1} if operation == "generate" else {})
    answer = server.ok(server.post(f"/v1/sessions/{name}/{operation}", body))
    if operation == "steps":
        rest = server.resume(name, seen[1].id)
        assert (rest[-1].data["finish_reason"], rest[-1].data["position"]) == ("cancelled", position)
        assert rest[-2].data["position"] == position
    else:
        assert tokens_of(server.resume(name, seen[-1].id)) == answer["tokens"]


def test_a_forecast_or_read_does_not_abandon_a_suspended_generate(server: Server, name: str) -> None:
    body = {**SHORT, "max_tokens": 3000}
    seen = server.stream(name, 5, **body)
    server.suspended(name)
    server.state(name)
    server.session(name)
    rest = server.resume(name, seen[-1].id)
    assert rest[-1].data["finish_reason"] == "length"
    assert len(tokens_of(seen + rest)) == 3000
