"""A model that makes a number that is not finite: refused, counted, and no session changes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live import Server, problem
from tiny import copied, with_graph

TOKENS = 50
"""the faulty language model's logits are NaN after that many entries"""


def faulty_values() -> bytes:
    """mean = sqrt(x + 1000), h' = h + sum of x * x: NaN answers below -1000, an infinite memory for huge values."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Add", ["values", "thousand"], ["shifted"]),
        helper.make_node("Sqrt", ["shifted"], ["mean"]),
        helper.make_node("Mul", ["values", "values"], ["squares"]),
        helper.make_node("ReduceSum", ["squares", "time"], ["sum"], keepdims=1),
        helper.make_node("Add", ["h", "sum"], ["h_next"]),
    ]
    constants = [
        helper.make_tensor("thousand", TensorProto.FLOAT, [1], [1000.0]),
        helper.make_tensor("time", TensorProto.INT64, [1], [0]),
    ]
    return graph_of(
        nodes,
        constants,
        [
            helper.make_tensor_value_info("values", TensorProto.FLOAT, ["T", "B", 1]),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, "B", 1]),
        ],
        [
            helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["T", "B", 1]),
            helper.make_tensor_value_info("h_next", TensorProto.FLOAT, [1, "B", 1]),
        ],
    )


def faulty_tags(symbols: int) -> bytes:
    """h counts the entries; the logits are sqrt(TOKENS - h) times a constant: NaN once there are more."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["symbols"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["numbers", "zero"], ["zeros"]),
        helper.make_node("Add", ["zeros", "one"], ["ones"]),
        helper.make_node("Unsqueeze", ["ones", "last"], ["column"]),
        helper.make_node("CumSum", ["column", "time"], ["counted"]),
        helper.make_node("Add", ["counted", "h"], ["count"]),
        helper.make_node("Sub", ["most", "count"], ["left"]),
        helper.make_node("Sqrt", ["left"], ["root"]),
        helper.make_node("Mul", ["root", "slope"], ["logits"]),
        helper.make_node("ReduceSum", ["column", "times"], ["sum"], keepdims=1),
        helper.make_node("Add", ["h", "sum"], ["h_next"]),
    ]
    constants = [
        helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
        helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0]),
        helper.make_tensor("most", TensorProto.FLOAT, [1], [float(TOKENS)]),
        helper.make_tensor("last", TensorProto.INT64, [1], [2]),
        helper.make_tensor("time", TensorProto.INT64, [], [0]),
        helper.make_tensor("times", TensorProto.INT64, [1], [0]),
        helper.make_tensor("slope", TensorProto.FLOAT, [symbols], [i / 10 for i in range(symbols)]),
    ]
    return graph_of(
        nodes,
        constants,
        [
            helper.make_tensor_value_info("symbols", TensorProto.INT64, ["T", "B"]),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, "B", 1]),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["T", "B", symbols]),
            helper.make_tensor_value_info("h_next", TensorProto.FLOAT, [1, "B", 1]),
        ],
    )


def graph_of(nodes: list[Any], constants: list[Any], inputs: list[Any], outputs: list[Any]) -> bytes:
    from onnx import helper

    graph = helper.make_graph(nodes, "faulty", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def faulty(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two faulty models."""
    served = tmp_path_factory.mktemp("faulty") / "models"
    state = {"name": "h", "input": "h", "output": "h_next", "shape": [1, "B", 1], "batch_axis": 1}
    values = copied(models / "tiny-single" / "1", served / "faulty-values" / "1", states=[state])
    with_graph(values, faulty_values(), np.arange(56, dtype="<f4").reshape(8, 7, 1))
    tags = copied(models / "tiny-tags" / "1", served / "faulty-tags" / "1", states=[state])
    with_graph(tags, faulty_tags(5), np.arange(56).reshape(8, 7) % 5)
    copied(models / "tiny-tags" / "2", served / "faulty-tags" / "2")
    copied(models / "tiny-letters" / "1", served / "tiny-letters" / "1")
    one = Server(served, tmp_path_factory.mktemp("faulty-data"))
    yield one.start()
    one.close()


def faults(server: Server, model: str) -> float:
    return server.metric("recurra_numeric_faults_total", model=model)


def told(server: Server, session: str) -> Any:  # noqa: ANN401 (any JSON)
    return server.session(session), server.state(session), server.log_of(session)


def test_the_faulty_models_pass_their_golden_examples(faulty: Server) -> None:
    ready = faulty.ok(faulty.http.get("/readyz"))
    assert set(ready["models"]) == {"faulty-tags", "faulty-values", "tiny-letters"} and ready["skipped"] == {}


BAD = {"answer": -2000.0, "memory": 1e30}
"""what makes the answer alone, and the memory alone, not finite"""


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("before", [[], [3.0, 4.0]])
def test_a_fault_refuses_the_feed_and_leaves_the_session(
    what: str, before: list[float], faulty: Server, name: str
) -> None:
    model, path = "faulty-values", f"/v1/sessions/{name}/steps"
    faulty.create(model, name)
    if before:
        faulty.steps(name, before)
    was, counted = told(faulty, name), faults(faulty, model)
    refused = problem(faulty.post(path, {"inputs": [1.0, BAD[what], 2.0]}, "key"), 500, "numeric_fault")
    assert refused["last_good_position"] == len(before)
    assert told(faulty, name) == was and faults(faulty, model) == counted + 1
    assert faulty.rewind(name, refused["last_good_position"])["position"] == len(before)
    again = faulty.post(path, {"inputs": [5.0]}, "key")
    assert again.status_code == 200 and "idempotent-replayed" not in again.headers
    assert again.json()["position"] == len(before) + 1
    assert faulty.state(name)["h"] == [[sum(value * value for value in before) + 25.0]]


@pytest.mark.parametrize("what", BAD)
def test_a_fault_does_not_begin_a_session(what: str, faulty: Server, name: str) -> None:
    body = {"inputs": [BAD[what]], "model": "faulty-values"}
    problem(faulty.post(f"/v1/sessions/{name}/steps", body), 500, "numeric_fault")
    problem(faulty.http.get(f"/v1/sessions/{name}"), 404, "session_not_found")


def test_a_fault_harms_no_neighbour(faulty: Server, name: str) -> None:
    """Feeds that wait together are rows of one batch."""
    sessions = [f"{name}-{i}" for i in range(8)]
    for session in sessions:
        faulty.create("faulty-values", session)

    def feed(session: str) -> list[int]:
        bad = session == sessions[3]
        bodies = [{"inputs": [1.0, BAD["answer"] if bad else 2.0, 3.0] * 200} for _ in range(20)]
        return [faulty.post(f"/v1/sessions/{session}/steps", body).status_code for body in bodies]

    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(sessions, pool.map(feed, sessions), strict=True))
    assert found.pop(sessions[3]) == [500] * 20 and faulty.position(sessions[3]) == 0
    assert all(statuses == [200] * 20 for statuses in found.values())
    assert {str(faulty.state(session)) for session in found} == {str({"h": [[20 * 200 * 14.0]]})}


def test_a_sequence_with_a_fault_is_refused(faulty: Server) -> None:
    path = "/v1/models/faulty-values/predict"
    problem(faulty.post(path, {"sequences": [[1.0, 2.0], [1.0, BAD["answer"]]]}), 500, "numeric_fault")
    assert faulty.ok(faulty.post(path, {"sequences": [[0.0, 44.0]]}))["predictions"][0][0]["mean"] == {
        "load": pytest.approx(1044**0.5)
    }


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "1e39", "-1e39"])
def test_a_value_that_is_not_finite_is_no_fault_of_the_model(value: str, faulty: Server, name: str) -> None:
    faulty.steps(name, [1.0], model="faulty-values")
    counted = faults(faulty, "faulty-values")
    answer = faulty.http.post(
        f"/v1/sessions/{name}/steps",
        content=f'{{"inputs": [{value}]}}',
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code in (400, 422), answer.text
    assert faults(faulty, "faulty-values") == counted and faulty.position(name) == 1


def test_a_fault_in_a_stream_is_an_error_event(faulty: Server, name: str) -> None:
    counted = faults(faulty, "faulty-tags")
    events = faulty.stream(name, model="faulty-tags", version=1, inputs="go go", max_tokens=100, seed=1)
    assert [event.event for event in events] == ["token"] * (len(events) - 1) + ["error"]
    assert events[-1].id == "" and len(events) == TOKENS
    assert (events[-1].data["code"], events[-1].data["status"]) == ("numeric_fault", 500)
    assert events[-1].data["last_good_position"] == faulty.position(name) == events[-2].data["position"]
    assert faults(faulty, "faulty-tags") == counted + 1


def test_a_generate_goes_on_after_a_rewind(faulty: Server, name: str) -> None:
    body = {"max_tokens": 100, "seed": 1}
    path = f"/v1/sessions/{name}/generate"
    refused = problem(
        faulty.post(path, {**body, "model": "faulty-tags", "version": 1, "inputs": "go"}, "key"), 500, "numeric_fault"
    )
    good = refused["last_good_position"]
    assert good == faulty.position(name) == TOKENS + 1
    assert faulty.rewind(name, TOKENS - 10)["position"] == TOKENS - 10
    assert faulty.generate(name, max_tokens=10)["position"] == TOKENS
    problem(faulty.post(path, {"max_tokens": 5}), 500, "numeric_fault")


def test_a_fault_without_a_session_names_no_position(faulty: Server) -> None:
    body = {"sequences": [[0] * (TOKENS + 1)], "version": 1}
    refused = problem(faulty.post("/v1/models/faulty-tags/predict", body), 500, "numeric_fault")
    assert "last_good_position" not in refused
    assert faulty.ok(faulty.post("/v1/models/faulty-tags/predict", {"sequences": [[0] * TOKENS], "version": 1}))


def test_a_version_that_fails_on_the_log_is_not_migrated_to(faulty: Server, name: str) -> None:
    faulty.steps(name, [0] * (TOKENS + 1), model="faulty-tags", version=2)
    was, path = told(faulty, name), f"/v1/sessions/{name}/migrate"
    refused = problem(faulty.post(path, {"version": 1}, "key"), 500, "numeric_fault")
    assert refused["last_good_position"] == TOKENS + 1
    assert told(faulty, name) == was
    faulty.rewind(name, TOKENS)
    migrated = faulty.post(path, {"version": 1}, "key")
    assert migrated.json()["version"] == 1 and faulty.state(name) == {"h": [[float(TOKENS)]]}
