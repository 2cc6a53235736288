"""Plain steps are read without pydantic: whatever is taken so, pydantic takes and reads alike."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from service.api.bulk import BulkLine
from service.api.columns import PlainStep, plain_line, plain_step
from service.api.sessions import StepsBody

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from([-1, 0, 1, 5, 1000, 1001, 2**63, 2**70, "last", "all", "none", "a", [3]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
NAMES = ["inputs", "position", "predictions", "alternatives", "model", "version", "seed", "session", "key", "more"]
BODIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5)
PLAIN = {"inputs": [3], "session": "s"}


def meant(read: PlainStep | BaseModel) -> dict[str, Any]:
    names = ("inputs", "position", "predictions", "alternatives", "model", "version", "seed")
    return {name: getattr(read, name) for name in names} | {"session": getattr(read, "session", None)}


def same(raw: bytes) -> bool:
    """Whether a body is plain, once as a body and once as a line; it must mean the same to pydantic then."""
    found = False
    for plain, schema in ((plain_step(raw), StepsBody), (plain_line(raw), BulkLine)):
        if plain is not None:
            session = getattr(plain, "session", "s")
            if not 1 <= len(session) <= 128 or not all(c.isascii() and (c.isalnum() or c in "._:-") for c in session):
                continue  # no such session lives, so such a line is never begun in columns
            assert repr(meant(plain)) == repr(meant(schema.model_validate_json(raw)))
            found = True
    return found


@given(body=BODIES, plain=st.booleans())
@settings(max_examples=400, deadline=None)
def test_what_is_plain_means_the_same_to_pydantic(body: dict[str, Any], plain: bool) -> None:
    same(json.dumps(PLAIN | body if plain else body).encode())


@pytest.mark.parametrize(
    "raw",
    [
        b'{"inputs": [3]}',
        b' {"inputs" : "a", "position": 0, "predictions": "none", "alternatives": 1000, "model": "m"} ',
        b'{"inputs": [3], "position": null, "model": null}',
        b'{"inputs": [1], "inputs": [2]}',
        b'{"inputs": [[1.5, null, -0.0]], "session": "s"}',
        '{"inputs": "é", "session": "s"}'.encode(),
        b'{"inputs": [1e2, 1180591620717411303424], "session": "s"}',
    ],
)
def test_plain_steps_are_read(raw: bytes) -> None:
    assert same(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]",
        b'{"inputs": [3], "position": 5.0}',
        b'{"inputs": [3], "position": true}',
        b'{"inputs": [3], "alternatives": 1001}',
        b'{"inputs": [3], "alternatives": -1}',
        b'{"inputs": [3], "alternatives": "5"}',
        b'{"inputs": [3], "predictions": "first"}',
        b'{"inputs": [3], "seed": 1}',
        b'{"inputs": [3], "version": 1}',
        b'{"inputs": [3], "session": "s", "key": "k"}',
        b'{"inputs": [NaN]}',
        b'{"inputs": [1e400]}',
        b'{"inputs": "\\ud800"}',
        b'{"inputs": "\xff"}',
        b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"inputs": [3]} x',
    ],
)
def test_what_is_odd_is_left_to_pydantic(raw: bytes) -> None:
    assert plain_step(raw) is None and plain_line(raw) is None
