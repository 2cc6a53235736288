"""Graphs that were made elsewhere, served: the answers are ONNX Runtime's own, whatever is cut, killed or sent."""

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from foreign_graphs import CASES, VAD_ANSWERS, Case, cases, rnn, silero, silero_by_hand, speech, whole_graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Server, problem
from websockets.asyncio.client import connect

from training.foreign.add import add
from training.foreign.spec import read_spec

STREAMS = 32
CLOSE = {"half": 2e-3}

SPEECH = """
task = "classifier"
labels = ["silence", "speech"]
gives = "probability"
"""


@pytest.fixture(scope="module")
def strangers() -> dict[str, Case]:
    return cases()


@pytest.fixture(scope="module")
def raw(strangers: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a model of every stranger's graph; tests may kill it."""
    folder = tmp_path_factory.mktemp("raw")

    def publish(name: str, graph: bytes, *answers: str, spec: str = "") -> None:
        (folder / "model.onnx").write_bytes(graph)
        (folder / "spec.toml").write_text(spec)
        add(folder / "model.onnx", folder / "models", name, read_spec(folder / "spec.toml", answers))

    for name, case in strangers.items():
        publish(name, case.graph, *case.answers)
    for name, graph in whole_graphs().items():
        publish(name, graph)
    publish("vad", silero().read_bytes(), *VAD_ANSWERS)
    publish("speech", silero().read_bytes(), *VAD_ANSWERS, spec=SPEECH)
    publish("batch-last", rnn(state_axes="HB"))
    publish("double", rnn("float32"))
    one = Server(folder / "models", folder, log_retention="all", snapshot_every=8)
    try:
        yield one.start()
    finally:
        one.close()


def inputs_of(case: Case, steps: list[dict[str, Any]]) -> Any:  # noqa: ANN401 (any JSON)
    """Steps as a request holds them."""
    if len(case.inputs) > 1:
        return {name: [step[name] for step in steps] for name in case.inputs}
    (name,) = case.inputs
    return [step[name] for step in steps]


def assert_answers(predictions: list[Any], expected: list[dict[str, Any]], tolerance: float) -> None:
    assert len(predictions) == len(expected)
    for prediction, answer in zip(predictions, expected, strict=True):
        for name, array in answer.items():
            found = np.array(prediction["outputs"][name])
            assert found.shape == array.shape
            np.testing.assert_allclose(found, array, tolerance, tolerance)


# ---------------------------------------------------------------------- served as they are


@pytest.mark.parametrize("model", CASES)
def test_answers_are_those_of_onnxruntime(model: str, strangers: dict[str, Case], raw: Server, name: str) -> None:
    case = strangers[model]
    steps = case.some_steps(21)
    expected, states = case.run(steps)
    tolerance = CLOSE.get(model, 1e-6)
    found = []
    for begin, end in ((0, 1), (1, 12), (12, 21)):
        inputs = inputs_of(case, steps[begin:end])
        found += raw.steps(name, inputs, model=model, version=1, predictions="all")["predictions"]
    assert [one["position"] for one in found] == list(range(1, 22))
    assert_answers(found, expected, tolerance)
    for state, array in raw.state(name).items():
        np.testing.assert_allclose(np.array(array), states[state].reshape(np.shape(array)), tolerance, tolerance)
    assert raw.verify(name)["verified"] is True
    body = {"sequences": [inputs_of(case, steps)], "predictions": "all", "version": 1}
    (predicted,) = raw.ok(raw.post(f"/v1/models/{model}/predict", body))["predictions"]
    assert predicted == found


@pytest.mark.parametrize("model", CASES)
def test_a_log_can_be_fed_again(model: str, strangers: dict[str, Case], raw: Server, name: str) -> None:
    case = strangers[model]
    raw.steps(name, inputs_of(case, case.some_steps(9, seed=3)), model=model, version=1)
    entries = [entry["input"] for entry in raw.log_of(name)]
    raw.steps(f"{name}-again", entries, model=model, version=1)
    assert raw.state(f"{name}-again") == raw.state(name)
    assert raw.log_of(f"{name}-again")[-1]["input"] == entries[-1]


@pytest.mark.parametrize(
    "model", ["script-lstm-bt", "script-rnn-tb", "last-output", "counter", "half", "scan", "mixing"]
)
@given(cuts=st.sets(st.integers(1, 39), max_size=6), seed=st.integers(0, 100))
@settings(max_examples=4, deadline=None)
def test_any_cut_gives_the_same_bits(
    model: str, strangers: dict[str, Case], raw: Server, cuts: set[int], seed: int
) -> None:
    case = strangers[model]
    steps = case.some_steps(40, seed)
    ids = [f"{model}-{seed}-{random.getrandbits(40):x}" for _ in range(2)]
    whole = raw.steps(ids[0], inputs_of(case, steps), model=model, predictions="all")["predictions"]
    parts = []
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), 40], strict=True):
        parts += raw.steps(ids[1], inputs_of(case, steps[begin:end]), model=model, predictions="all")["predictions"]
    assert parts == whole
    assert raw.state(ids[0]) == raw.state(ids[1])


@pytest.mark.parametrize(
    "model", ["script-lstm-bt", "dynamo-gru", "counter", "half", "double", "batch-of-one", "mixing"]
)
def test_a_killed_server_remembers_every_bit(model: str, strangers: dict[str, Case], raw: Server, name: str) -> None:
    case = strangers[model]
    steps = case.some_steps(30, seed=5)
    answers = []
    for session, killed in ((name, False), (f"{name}-killed", True)):
        raw.steps(session, inputs_of(case, steps[:17]), model=model)
        if killed:
            raw.restart()
        answers.append(raw.steps(session, inputs_of(case, steps[17:]), predictions="all", position=17))
    assert answers[0]["predictions"] == answers[1]["predictions"]
    assert raw.state(name) == raw.state(f"{name}-killed")


def test_interleaved_sessions_do_not_touch_each_other(strangers: dict[str, Case], raw: Server, name: str) -> None:
    for model in ("script-gru-tb", "counter", "mixing"):
        case = strangers[model]
        sequences = {f"{name}-{model}-{i}": case.some_steps(12, seed=i) for i in range(20)}
        found = asyncio.run(_feed_all(raw.url, case, model, sequences))
        for (_, steps), predictions in zip(sequences.items(), found, strict=True):
            assert_answers(predictions, case.run(steps)[0], 1e-6)


async def _feed_all(url: str, case: Case, model: str, sequences: dict[str, Any]) -> list[list[Any]]:
    limits = httpx.Limits(max_connections=len(sequences))
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:

        async def feed(session: str, steps: list[Any]) -> list[Any]:
            found = []
            for step in steps:
                body = {"inputs": inputs_of(case, [step]), "model": model}
                response = await http.post(f"/v1/sessions/{session}/steps", json=body)
                assert response.status_code == 200, response.text
                found += response.json()["predictions"]
            return found

        return await asyncio.gather(*(feed(session, steps) for session, steps in sequences.items()))


# ---------------------------------------------------------------------- Silero VAD


def test_32_streams_of_speech_at_once(raw: Server, name: str) -> None:
    audio = {f"{name}-{i}": speech(2, seed=i) for i in range(STREAMS)}
    found = asyncio.run(_stream_all(raw.url, audio))
    for one, predictions in zip(audio.values(), found, strict=True):
        np.testing.assert_allclose(predictions, silero_by_hand(one), rtol=0, atol=1e-6)
    assert max(map(max, found)) > 0.5 > min(map(min, found)), "the test's audio says nothing"


async def _stream_all(url: str, audio: dict[str, Any]) -> list[list[float]]:
    limits = httpx.Limits(max_connections=len(audio))
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:

        async def stream(session: str, samples: Any) -> list[float]:  # noqa: ANN401 (an array)
            found = []
            for begin in range(0, len(samples) - 511, 512):
                body = {"inputs": [samples[begin : begin + 512].tolist()], "model": "vad"}
                response = await http.post(f"/v1/sessions/{session}/steps", json=body)
                assert response.status_code == 200, response.text
                (prediction,) = response.json()["predictions"]
                found.append(prediction["outputs"]["output"][0])
            return found

        return await asyncio.gather(*(stream(session, samples) for session, samples in audio.items()))


def test_32_streams_of_speech_over_sockets(raw: Server, name: str) -> None:
    audio = {raw.create("vad", f"{name}-{i}")["id"]: speech(1, seed=i) for i in range(STREAMS)}
    found = asyncio.run(_talk_all(raw, audio))
    for one, predictions in zip(audio.values(), found, strict=True):
        np.testing.assert_allclose(predictions, silero_by_hand(one), rtol=0, atol=1e-6)


async def _talk_all(server: Server, audio: dict[str, Any]) -> list[list[float]]:
    async def talk(session: str, samples: Any) -> list[float]:  # noqa: ANN401 (an array)
        address = f"ws://127.0.0.1:{server.settings['port']}/v1/sessions/{session}/ws"
        async with connect(address, proxy=None, open_timeout=60) as socket:
            assert json.loads(await socket.recv())["type"] == "hello"
            found = []
            for begin in range(0, len(samples) - 511, 512):
                message = {"type": "steps", "inputs": [samples[begin : begin + 512].tolist()]}
                await socket.send(json.dumps(message))
                answer = json.loads(await socket.recv())
                assert answer["type"] == "prediction", answer
                found.append(answer["predictions"][0]["outputs"]["output"][0])
            return found

    return await asyncio.gather(*(talk(session, samples) for session, samples in audio.items()))


def test_speech_by_its_labels(raw: Server, name: str) -> None:
    samples = speech(2, seed=1)
    chunks = samples[: len(samples) // 512 * 512].reshape(-1, 512).tolist()
    found = raw.steps(name, chunks, model="speech", predictions="all")["predictions"]
    expected = silero_by_hand(samples)
    np.testing.assert_allclose([one["probabilities"]["speech"] for one in found], expected, rtol=0, atol=1e-6)
    assert [one["label"] for one in found] == ["speech" if p > 0.5 else "silence" for p in expected]


# ---------------------------------------------------------------------- whole sequences only


@pytest.mark.parametrize("model", ["both-ways-lstm", "both-ways-gru", "stateless", "stateless-last"])
def test_what_can_not_be_streamed_is_served_by_predict(model: str, raw: Server, name: str) -> None:
    sequences = [np.random.default_rng(i).standard_normal((n, 3)).tolist() for i, n in enumerate((1, 7, 300))]
    for shown in ("all", "last"):
        body = {"sequences": sequences, "predictions": shown}
        answers = raw.ok(raw.post(f"/v1/models/{model}/predict", body))["predictions"]
        single = shown == "last" or model == "stateless-last"
        assert [len(one) for one in answers] == ([1, 1, 1] if single else [1, 7, 300])
        assert [one[-1]["position"] for one in answers] == [1, 7, 300]
        alone = raw.ok(raw.post(f"/v1/models/{model}/predict", {**body, "sequences": sequences[1:2]}))["predictions"]
        assert alone == answers[1:2]
    problem(raw.post(f"/v1/sessions/{name}/steps", {"model": model, "inputs": [[1, 2, 3]]}), 422, "not_streamable")
    problem(raw.post("/v1/sessions", {"model": model, "id": name}), 422, "not_streamable")
    problem(raw.http.get(f"/v1/sessions/{name}"), 404, "session_not_found")


# ---------------------------------------------------------------------- everything else of a session


def test_a_raw_session_has_a_past(strangers: dict[str, Case], raw: Server, name: str) -> None:
    case = strangers["counter"]
    steps = case.some_steps(12, seed=9)
    raw.steps(name, inputs_of(case, steps), model="counter")
    raw.fork(name, id=f"{name}-fork", position=5)
    raw.steps(f"{name}-fork", steps[5:])
    assert raw.state(f"{name}-fork") == raw.state(name)
    file = raw.state_file(name)
    assert raw.upload(f"{name}-file", file).status_code == 201
    assert raw.state(f"{name}-file") == raw.state(name)
    raw.rewind(name, 5)
    raw.steps(name, steps[5:])
    assert raw.state(f"{name}-fork") == raw.state(name)
    key = {"inputs": inputs_of(case, steps), "predictions": "all"}
    first, second = (raw.post(f"/v1/sessions/{name}/steps", key, key="again") for _ in range(2))
    assert second.json() == first.json() and second.headers["Idempotent-Replayed"] == "true"


def test_a_long_answer_with_a_key_is_worked_out_again(raw: Server, strangers: dict[str, Case], name: str) -> None:
    case = strangers["script-lstm-tb"]
    body = {"inputs": inputs_of(case, case.some_steps(400)), "predictions": "all", "model": "script-lstm-tb"}
    first, second = (raw.post(f"/v1/sessions/{name}/steps", body, key="long") for _ in range(2))
    assert len(first.content) > 16 * 1024 and second.json() == first.json()


def test_a_raw_session_migrates_where_the_inputs_are_the_same(
    raw: Server, strangers: dict[str, Case], name: str
) -> None:
    steps = inputs_of(strangers["batch-last"], strangers["batch-last"].some_steps(6))
    raw.steps(name, steps, model="batch-last", version=1)
    raw.ok(raw.post(f"/v1/sessions/{name}/migrate", {"version": 2}))
    raw.steps(f"{name}-double", steps, model="double", version=1)
    refused = raw.post(f"/v1/sessions/{name}-double/migrate", {"version": 2})
    problem(refused, 422, "incompatible_version")


def test_operations_of_other_tasks_are_refused(raw: Server, strangers: dict[str, Case], name: str) -> None:
    case = strangers["double"]
    raw.steps(name, inputs_of(case, case.some_steps(2)), model="double")
    problem(raw.post(f"/v1/sessions/{name}/forecast", {"horizon": 2}), 422, "task_mismatch")
    problem(raw.post(f"/v1/sessions/{name}/generate", {}), 422, "task_mismatch")
    problem(raw.post("/v1/models/vad/generate", {}), 422, "task_mismatch")


def test_many_raw_sessions_in_one_request(raw: Server, strangers: dict[str, Case], name: str) -> None:
    case = strangers["counter"]
    sequences = [case.some_steps(1, seed=i) for i in range(40)]
    lines = [
        {"session": f"{name}-{i}", "model": "counter", "inputs": inputs_of(case, steps)}
        for i, steps in enumerate(sequences)
    ]
    lines.insert(7, {"session": f"{name}-bad", "model": "counter", "inputs": {"signal": [[1, 2]], "flag": ["yes"]}})
    body = "\n".join(httpx.Response(200, json=line).text for line in lines)
    response = raw.http.post("/v1/steps", content=body, headers={"Content-Type": "application/x-ndjson"})
    answers = [httpx.Response(200, text=line).json() for line in response.text.splitlines()]
    assert answers.pop(7)["error"]["code"] == "invalid_input"
    for answer, steps in zip(answers, sequences, strict=True):
        assert_answers(answer["predictions"], case.run(steps)[0], 1e-6)


def test_what_a_raw_model_takes_is_said(raw: Server) -> None:
    shown = raw.ok(raw.http.get("/v1/models/counter"))
    assert (shown["task"], shown["input_kind"]) == ("raw", "tensors")
    assert shown["inputs"] == [
        {"name": "signal", "dtype": "float32", "shape": [2]},
        {"name": "flag", "dtype": "bool", "shape": []},
    ]
    assert shown["outputs"] == [{"name": "weighed", "dtype": "float32", "shape": [2]}]
    ready = raw.ok(raw.http.get("/readyz"))
    assert "mixing" in str(ready), "it says which models run sessions one by one"


def test_a_raw_model_is_served_to_open_inference_clients(raw: Server, name: str) -> None:
    chunk = speech(1, seed=2)[:512]
    tensor = {"name": "input", "shape": [1, 1, 512], "datatype": "FP32", "data": chunk.tolist()}
    sequence = {"sequence_id": name, "sequence_start": True}
    answer = raw.ok(raw.post("/v2/models/vad/infer", {"inputs": [tensor], "parameters": sequence}))
    expected = silero_by_hand(chunk)
    found = next(one for one in answer["outputs"] if one["name"] == "output")
    np.testing.assert_allclose(found["data"], expected, rtol=0, atol=1e-6)
    whole = {"name": "x", "shape": [2, 5, 3], "datatype": "FP32", "data": [0.1] * 30}
    raw.ok(raw.post("/v2/models/both-ways-gru/infer", {"inputs": [whole]}))
    for inputs, parameters in (
        ([whole], {**sequence, "sequence_id": f"{name}-2"}),
        ([{"name": "signal", "shape": [1, 1, 2], "datatype": "FP32", "data": [1, 2]}], {}),
    ):
        model = "both-ways-gru" if parameters else "counter"
        refused = raw.post(f"/v2/models/{model}/infer", {"inputs": inputs, "parameters": parameters})
        assert 400 <= refused.status_code < 500, refused.text


# ---------------------------------------------------------------------- hostile inputs

GOOD = [[0.25] * 512]
DEEP: Any = 1.0
for _ in range(150):
    DEEP = [DEEP]

HOSTILE: list[Any] = [
    None,
    True,
    7,
    "noise",
    [],
    {},
    [[]],
    [[0.1] * 511],
    [[0.1] * 513],
    [[[0.1] * 512]],
    [[0.1] * 511 + ["0.1"]],
    [[0.1] * 511 + [None]],
    [[0.1] * 511 + [True]],
    [[0.1] * 511 + [[0.1]]],
    [[0.1] * 511 + [{}]],
    [[0.1] * 511 + [1e39]],
    [[0.1] * 511 + [10**500]],
    [[0.1] * 512, [0.1] * 511],
    [[0.1] * 512, None],
    {"input": [[0.1] * 512], "sr": [8000]},
    {"input": {"input": [[0.1] * 512]}},
    {"INPUT": [[0.1] * 512]},
    [{"input": [0.1] * 512}, [0.1] * 512],
    [{"input": [[0.1] * 512]}],
    DEEP,
]


@pytest.mark.parametrize("inputs", HOSTILE)
def test_hostile_inputs_are_refused_and_change_nothing(inputs: Any, raw: Server, name: str) -> None:  # noqa: ANN401
    raw.steps(name, GOOD, model="vad")
    before = raw.state(name)
    problem(raw.post(f"/v1/sessions/{name}/steps", {"inputs": inputs}), 422, "invalid_input")
    problem(raw.post("/v1/models/vad/predict", {"sequences": [inputs]}), 422, "invalid_input")
    assert raw.state(name) == before and raw.position(name) == 1


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(number: str, raw: Server, name: str) -> None:
    body = f'{{"model": "vad", "inputs": [[{", ".join(["0.1"] * 511)}, {number}]]}}'
    headers = {"Content-Type": "application/json"}
    response = raw.http.post(f"/v1/sessions/{name}/steps", content=body, headers=headers)
    assert response.status_code in (400, 422), response.text
    problem(raw.http.get(f"/v1/sessions/{name}"), 404, "session_not_found")


def test_a_whole_sequence_has_an_end(raw: Server) -> None:
    body = {"sequences": [[[0, 0, 0]] * 65_537]}
    problem(raw.post("/v1/models/stateless/predict", body), 422, "invalid_input")


def test_more_than_a_body_may_hold_is_refused(raw: Server, name: str) -> None:
    body = {"model": "vad", "inputs": [[0.123456789] * 512] * 2000}
    problem(raw.post(f"/v1/sessions/{name}/steps", body), 413, "payload_too_large")


def test_a_graph_that_fails_on_its_inputs_is_no_fault_of_the_service(fresh: Any, tmp_path: Path, name: str) -> None:  # noqa: ANN401
    import foreign_graphs
    from onnx import helper

    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["looked"]),
        helper.make_node("Add", ["looked", "sum"], ["sum_next"]),
        helper.make_node("Identity", ["sum_next"], ["y"]),
    ]
    graph = foreign_graphs.model(
        nodes,
        {"ids": ("int64", ["n"]), "sum": ("float32", ["n", 4])},
        {"y": ("float32", ["n", 4]), "sum_next": ("float32", ["n", 4])},
        {"table": foreign_graphs.weights(5, 4)},
    )
    (tmp_path / "model.onnx").write_bytes(graph)
    add(tmp_path / "model.onnx", tmp_path / "models", "table", read_spec(None))
    server = fresh(models=tmp_path / "models").start()
    server.steps(name, [1, 4, 0], model="table")
    before = server.state(name)
    problem(server.post(f"/v1/sessions/{name}/steps", {"inputs": [1, 5]}), 422, "invalid_input")
    problem(server.post(f"/v1/sessions/{name}/steps", {"inputs": [2**70]}), 422, "invalid_input")
    assert server.state(name) == before and server.position(name) == 3
