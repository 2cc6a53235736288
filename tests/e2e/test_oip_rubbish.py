"""Rubbish sent to /v2: a refusal that Triton's clients can read, no session changes, the process lives on."""

import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from live import Server
from oip import error_of, posted

SEQUENCE = "rubbish"
SESSIONS = {"tiny-letters": "abc", "tiny-weather": [[10, 1], [11, 2]]}
LENGTH = "Inference-Header-Content-Length"

BINARY = {"name": "symbols", "shape": [1, 2], "datatype": "INT64", "parameters": {"binary_data_size": 16}}
LETTERS = {"name": "symbols", "shape": [1, 2], "datatype": "INT64", "data": [0, 1]}
WEATHER = {"name": "values", "shape": [1, 1, 2], "datatype": "FP32", "data": [10.0, 1.0]}


@pytest.fixture(scope="module")
def victims(server: Server) -> Server:
    """The server with one sequence of two models."""
    for model, inputs in SESSIONS.items():
        server.steps(f"oip.{model}.s.{SEQUENCE}", inputs, model=model)
    return server


@pytest.fixture(autouse=True)
def unharmed(victims: Server) -> Iterator[None]:
    """Every test here leaves the sequences, and the list of sessions, as they were."""
    before = everything(victims)
    yield
    assert everything(victims) == before


def everything(server: Server) -> Any:  # noqa: ANN401 (any JSON)
    listed = server.ok(server.http.get("/v1/sessions?limit=1000"))
    return listed, [server.state(f"oip.{model}.s.{SEQUENCE}") for model in SESSIONS]


def sent(server: Server, content: bytes, model: str = "tiny-letters", **headers: str) -> Any:  # noqa: ANN401
    return server.http.post(f"/v2/models/{model}/infer", content=content, headers=headers)


def framed(head: object, tail: bytes = b"", more: int = 0) -> tuple[bytes, dict[str, str]]:
    """A body of JSON and bytes, and its header."""
    said = json.dumps(head).encode()
    return said + tail, {LENGTH: str(len(said) + more)}


def step(*inputs: object, **more: object) -> dict[str, object]:
    return {"parameters": {"sequence_id": SEQUENCE}, "inputs": list(inputs), **more}


# ---------------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"shape": [1]}, "must have [-1, -1]"),
        ({"shape": []}, "must have [-1, -1]"),
        ({"shape": [1, 2, 1]}, "must have [-1, -1]"),
        ({"shape": [1, 0]}, "must have [-1, -1]"),
        ({"shape": [0, 2]}, "must have [-1, -1]"),
        ({"shape": [1, 3]}, "has 3 numbers, not 2"),
        ({"shape": [1, 2**62]}, "numbers, not 2"),
        ({"shape": [2**62, 2**62]}, "numbers, not 2"),
        ({"shape": [1, 2**64]}, "/inputs/0/shape/1"),
        ({"shape": [1, -2]}, "/inputs/0/shape/1"),
        ({"shape": [1, 2.0]}, "/inputs/0/shape/1"),
        ({"shape": [True, 2]}, "/inputs/0/shape/0"),
        ({"shape": [1] * 50}, "/inputs/0/shape"),
        ({"shape": "1,2"}, "/inputs/0/shape"),
        ({"datatype": "INT32"}, "the model takes INT64"),
        ({"datatype": "FP32"}, "the model takes INT64"),
        ({"datatype": "BYTES"}, "the model takes INT64"),
        ({"datatype": "BF16"}, "the model takes INT64"),
        ({"datatype": ""}, "the model takes INT64"),
        ({"datatype": 1}, "/inputs/0/datatype"),
        ({"name": "input"}, "the model takes symbols"),
        ({"name": ""}, "/inputs/0/name"),
        ({"data": None}, "neither `data` nor"),
        ({"data": []}, "has 2 numbers, not 0"),
        ({"data": [0]}, "has 2 numbers, not 1"),
        ({"data": [0, 1, 2]}, "has 2 numbers, not 3"),
        ({"data": [0, "1"]}, "numbers of that type"),
        ({"data": ["a" * 50_000, "b"]}, "numbers of that type"),
        ({"data": [0, True]}, "numbers of that type"),
        ({"data": [0, 1.0]}, "numbers of that type"),
        ({"data": [0, None]}, "numbers of that type"),
        ({"data": [0, [1]]}, "numbers of that type"),
        ({"data": [0, {}]}, "numbers of that type"),
        ({"data": [0, 2**70]}, "does not fit INT64"),
        ({"data": [0, 10**400]}, "does not fit INT64"),
        ({"data": [0, -(2**63) - 1]}, "does not fit INT64"),
        ({"data": [0, 2**63 - 1]}, "not in 0..12"),
        ({"data": [0, 13]}, "not in 0..12"),
        ({"data": [-1, 0]}, "not in 0..12"),
        ({"data": "ab"}, "/inputs/0/data"),
        ({"data": [0, 1], "parameters": {"binary_data_size": 16}}, "both `data` and"),
        ({"parameters": {"shared_memory_region": "r"}}, "shared memory is not supported"),
        ({"parameters": []}, "/inputs/0/parameters"),
    ],
)
def test_a_tensor_that_does_not_fit(given: dict[str, Any], says: str, victims: Server) -> None:
    for body in (step({**LETTERS, **given}), {"inputs": [{**LETTERS, **given}]}):
        assert says in error_of(posted(victims, "tiny-letters", body))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([1e39, 1.0], "must be finite"),
        ([-1e300, 1.0], "must be finite"),
        ([10**400, 1.0], "does not fit FP32"),
        (["NaN", 1.0], "numbers of that type"),
        ([True, 1.0], "numbers of that type"),
    ],
)
def test_a_value_that_does_not_fit(data: list[Any], says: str, victims: Server) -> None:
    for body in (step({**WEATHER, "data": data}), {"inputs": [{**WEATHER, "data": data}]}):
        assert says in error_of(posted(victims, "tiny-weather", body), 400)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_raw_values_must_be_finite(value: float, victims: Server) -> None:
    given = {"name": "values", "shape": [1, 1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
    for body in (step(given), {"inputs": [given]}):
        content, headers = framed(body, struct.pack("<2f", 1.0, value))
        assert "must be finite" in error_of(sent(victims, content, "tiny-weather", **headers), 400)
    raw = struct.pack("<2f", value, 1.0)
    assert "must be finite" in error_of(sent(victims, raw, "tiny-weather", **{LENGTH: "0"}), 400)


TWO = struct.pack("<2q", 0, 1)


@pytest.mark.parametrize(
    ("inputs", "tail", "more"),
    [
        ([BINARY], TWO[:-1], 0),
        ([BINARY], b"", 0),
        ([BINARY], TWO + b"x", 0),
        ([BINARY], TWO, 1),
        ([BINARY], TWO, -1),
        ([LETTERS], TWO, 0),
        ([BINARY, BINARY], TWO + TWO, 0),
        ([{**BINARY, "parameters": {"binary_data_size": 8}}], TWO, 0),
        ([{**BINARY, "parameters": {"binary_data_size": 24}}], TWO, 0),
        ([{**BINARY, "parameters": {"binary_data_size": -16}}], TWO, 0),
        ([{**BINARY, "parameters": {"binary_data_size": 16.0}}], TWO, 0),
        ([{**BINARY, "parameters": {"binary_data_size": "16"}}], TWO, 0),
        ([{**BINARY, "parameters": {"binary_data_size": True}}], TWO, 0),
        ([{**BINARY, "parameters": {"binary_data_size": 10**30}}], TWO, 0),
        ([{**BINARY, "shape": [1, 2**62]}], TWO, 0),
        ([{**BINARY, "datatype": "BYTES"}], struct.pack("<I", 2**32 - 1) + b"abcdefghijkl", 0),
        ([{**BINARY, "datatype": "BYTES"}], struct.pack("<I", 12) + b"abcdefghijkl", 0),
        ([], TWO, 0),
    ],
)
def test_bytes_that_do_not_fit(inputs: list[Any], tail: bytes, more: int, victims: Server) -> None:
    for body in (step(*inputs), {"inputs": inputs}):
        content, headers = framed(body, tail, more)
        error_of(sent(victims, content, **headers), 400)


@pytest.mark.parametrize(
    "length", ["-1", "x", "", "1.5", "99999", "1" * 400, "\xb2", "0x10", "1e2", "18446744073709551616", "1"]
)
def test_a_length_that_is_none(length: str, victims: Server) -> None:
    content, _ = framed(step(BINARY), TWO)
    headers = {LENGTH.encode(): length.encode("latin-1")}
    error_of(victims.http.post("/v2/models/tiny-letters/infer", content=content, headers=headers), 400)


def test_a_raw_body_that_does_not_fit(victims: Server) -> None:
    for content in (b"", b"1234567", b"\xff" * 8, b"\x00" * 17):
        error_of(sent(victims, content, **{LENGTH: "0"}), 400)


# ---------------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b'"inputs"',
        b"\xff\xfe{}",
        b'{"inputs": null}',
        b'{"inputs": []}',
        b'{"inputs": [null]}',
        b'{"inputs": [{}]}',
        b'{"inputs": [{"name": "symbols", "shape": [1, 1], "datatype": "INT64", "data": [NaN]}]}',
        b'{"inputs": [{"name": "symbols", "shape": [1, 1], "datatype": "INT64", "data": ' + b"[" * 30_000,
        b'{"inputs": [{"name": "symbols", "shape": [1, 1], "datatype": "INT64", "data": %b0%b}]}'
        % (b"[" * 150, b"]" * 150),
        b'{"parameters": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}",
        b'{"id": "\\ud800", "parameters": {"sequence_id": "\\ud800"}, "inputs": []}',
        b'{"id": 1, "inputs": []}',
        b'{"inputs": ' + b"9" * 50_000 + b"}",
        json.dumps(step(*[LETTERS] * 100)).encode(),
        json.dumps(step(LETTERS, outputs=[{"name": "logits"}] * 100)).encode(),
        json.dumps(step(LETTERS, outputs=[{"name": "logits", "parameters": {"binary_data": 1}}])).encode(),
        json.dumps(step(LETTERS, outputs=[{"name": "h_next"}])).encode(),
        json.dumps(step(LETTERS, outputs="logits")).encode(),
    ],
)
def test_a_body_that_is_none(content: bytes, victims: Server) -> None:
    error_of(sent(victims, content), 400)


def test_a_body_that_is_too_large(victims: Server) -> None:
    assert "RECURRA_MAX_BODY_BYTES" in error_of(sent(victims, b" " * 100_001), 413)


def test_names_that_are_none(victims: Server) -> None:
    for path in ("models/%2e%2e%2fsecret/infer", "models/%00/infer", "models/a%0ab/infer", f"models/{'a' * 500}/infer"):
        error_of(victims.http.post(f"/v2/{path}", json={}))
    for model in ("..", "%2e%2e", "tiny-letters%2f..", "no%0asuch", "%ff"):
        for act in ("load", "unload"):
            error_of(victims.http.post(f"/v2/repository/models/{model}/{act}", json={}))
    for body in (b"{", b"[]", b'{"ready": 1}', b'{"ready": "yes"}'):
        error_of(victims.http.post("/v2/repository/index", content=body), 400)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(["symbols", "values", "h", "c", "logits", ""]) | st.text(max_size=8)
PARAMETERS = st.dictionaries(
    st.sampled_from(["binary_data_size", "binary_data_output", "sequence_start", "position", "priority", "triton_x"])
    | st.text(max_size=8),
    ANY,
    max_size=4,
)
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": NAMES | ANY,
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=4) | ANY,
        "datatype": st.sampled_from(["INT64", "FP32", "BYTES", "BOOL", "FP16"]) | ANY,
        "data": st.lists(st.integers(-2, 14), max_size=6) | ANY,
        "parameters": PARAMETERS | ANY,
    },
)
BODY = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(max_size=10) | ANY,
        "parameters": PARAMETERS | ANY,
        "inputs": st.lists(TENSOR, max_size=3) | ANY,
        "outputs": st.lists(TENSOR, max_size=2) | ANY,
    },
)
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(body=BODY, tail=st.binary(max_size=24), more=st.integers(-3, 30), model=st.sampled_from([*SESSIONS]))
@example(body={"inputs": [BINARY]}, tail=TWO, more=0, model="tiny-letters")
def test_any_body_is_answered(body: Any, tail: bytes, more: int, model: str, victims: Server) -> None:  # noqa: ANN401
    """Whatever it is: an answer without a sequence, or a refusal."""
    content, headers = framed(body, tail, more)
    response = sent(victims, content, model, **headers)
    if response.status_code != 200:
        error_of(response)


@FUZZ
@given(
    content=st.binary(max_size=80),
    headers=st.dictionaries(
        st.sampled_from([LENGTH, "Content-Encoding", "Content-Type"]),
        st.sampled_from(["0", "1", "40", "gzip", "deflate", "br", "identity", "application/json"]),
    ),
)
def test_any_bytes_are_answered(content: bytes, headers: dict[str, str], victims: Server) -> None:
    response = sent(victims, content, **headers)
    if response.status_code != 200:
        error_of(response)
