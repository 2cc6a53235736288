"""Infer: the next steps of a sequence, or whole sequences that nothing is kept of."""

import time

from fastapi import APIRouter, Request, Response

from service.api.oip import formats, sequences, stateless
from service.api.oip.exchange import beside
from service.api.oip.formats import InferBody, described
from service.api.oip.models import model_of, of_a_model
from service.api.oip.tensors import LENGTH_HEADER, inflated, read
from service.api.requests import header, read_bytes, sessions_of, visit_of, while_connected
from service.registry import Model

router = APIRouter(prefix="/v2", tags=["open inference protocol"])


@of_a_model(
    router,
    "POST",
    "/infer",
    openapi_extra=formats.body_of(
        InferBody,
        required=True,
        raw=True,
        sequence={
            "id": "42-1",
            "parameters": {"sequence_id": 42, "sequence_start": True, "sequence_end": False},
            "inputs": [{"name": "values", "shape": [1, 2, 1], "datatype": "FP32", "data": [35.0, 32.5]}],
        },
        stateless={"inputs": [{"name": "values", "shape": [1, 2, 1], "datatype": "FP32", "data": [35.0, 32.5]}]},
    )
    | {
        "parameters": [
            {
                "in": "header",
                "name": LENGTH_HEADER,
                "required": False,
                "schema": {"type": "integer", "minimum": 0},
                "description": "bytes of JSON at the body's beginning; raw tensors follow it",
            }
        ]
    },
    responses=described(
        "the outputs, batch first",
        formats.Inferred,
        "model_not_found",
        "session_not_found",
        "session_closed",
        "session_expired",
        "session_exists",
        "position_mismatch",
        "unknown_symbol",
        "idempotency_key_reused",
        "session_busy",
        "overloaded",
        "commit_unknown",
        "rolled_back",
        "numeric_fault",
        "payload_too_large",
        "unsupported_media_type",
        raw=True,
    ),
)
async def infer(request: Request, name: str, version: int | None) -> Response:
    """Run a model: on the next steps of a sequence (`sequence_id`), else on whole sequences from an empty memory."""
    began = time.perf_counter()
    model = model_of(request, name, version)
    tally = request.app.state.tallies.of(model)
    try:
        response = await _infer(request, model, version)
    except BaseException:
        tally.note(began, False)
        raise
    tally.note(began, True)
    return response


async def _infer(request: Request, model: Model, version: int | None) -> Response:
    data = await read_bytes(request)
    encoding = (header(request, b"content-encoding") or "identity").strip().lower()
    if encoding != "identity":
        data = await beside(len(data), inflated, data, encoding, request.app.state.settings.max_body_bytes)
    asked = await beside(len(data), read, data, header(request, LENGTH_HEADER.lower().encode()))
    step = sequences.step_of(asked.parameters)
    if step is None:
        return await while_connected(request, stateless.infer(sessions_of(request), visit_of(request), model, asked))
    return await while_connected(request, sequences.infer(request, model, version, asked, step, data))
