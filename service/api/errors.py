"""Problem documents (RFC 9457): each code's status and title, and the handlers that write them."""

import re
from typing import Any

import msgspec
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from service import metrics
from service.errors import ClientLeft, Problem
from service.store.base import StoreError, problem_of

log = structlog.get_logger(__name__)

RETRY_AFTER_S = 1

OPENAI = ("/v1/completions", "/v1/models")
"""routes whose clients look for OpenAI's `error` object, which stands beside the problem's members there"""

STATUS: dict[str, tuple[int, str]] = {
    "bad_request": (400, "Bad request"),
    "unauthorized": (401, "Unauthorized"),
    "forbidden": (403, "Forbidden"),
    "not_found": (404, "No such route"),
    "method_not_allowed": (405, "Method not allowed"),
    "model_not_found": (404, "Model not found"),
    "version_not_found": (404, "Model version not found"),
    "session_not_found": (404, "Session not found"),
    "request_timeout": (408, "Request timeout"),
    "session_exists": (409, "Session exists"),
    "position_mismatch": (409, "Position mismatch"),
    "model_mismatch": (409, "Model mismatch"),
    "session_expired": (410, "Session expired"),
    "session_closed": (410, "Session closed"),
    "rolled_back": (409, "Rolled back"),
    "log_truncated": (410, "Log truncated"),
    "payload_too_large": (413, "Payload too large"),
    "unsupported_media_type": (415, "Unsupported media type"),
    "invalid_input": (422, "Invalid input"),
    "unknown_symbol": (422, "Unknown symbol"),
    "task_mismatch": (422, "Task mismatch"),
    "not_streamable": (422, "Not streamable"),
    "empty_session": (422, "Empty session"),
    "incompatible_version": (422, "Incompatible version"),
    "idempotency_key_reused": (422, "Idempotency key reused"),
    "state_mismatch": (422, "State mismatch"),
    "upgrade_required": (426, "Upgrade required"),
    "skipped": (424, "Skipped"),
    "session_busy": (429, "Session busy"),
    "rate_limited": (429, "Rate limited"),
    "quota_exceeded": (429, "Quota exceeded"),
    "headers_too_large": (431, "Headers too large"),
    "internal": (500, "Internal error"),
    "not_supported": (501, "Not supported"),
    "numeric_fault": (500, "Numeric fault"),
    "overloaded": (503, "Overloaded"),
    "not_ready": (503, "Not ready"),
    "commit_unknown": (503, "Commit unknown"),
}


def count(problem: Problem) -> None:
    """Count a problem that a client is told of, in whatever form."""
    metrics.REFUSALS.labels(problem.code).inc()


def document(problem: Problem) -> dict[str, Any]:
    """The problem as a JSON object; it is told, so it is counted."""
    count(problem)
    status, title = STATUS[problem.code]
    return {
        "type": f"urn:recurra:problem:{problem.code}",
        "title": title,
        "status": status,
        "detail": problem.detail,
        "code": problem.code,
        **problem.members,
    }


def open_inference_status(code: str, status: int) -> int:
    """The status that the Open Inference Protocol has for a problem: Triton knows no others.

    Source: triton-inference-server/server, where what is neither missing, unavailable nor a defect is 400.
    """
    if code == "session_not_found" or status in (409, 410, 422, 424):
        return 400
    return 503 if status == 429 else status


def _as_open_inference(body: dict[str, Any]) -> dict[str, Any]:
    """The document as that protocol's clients need it: with a string `error`, which is what they show."""
    return {**body, "status": open_inference_status(body["code"], body["status"]), "error": body["detail"]}


def openai_error(problem: Problem) -> dict[str, Any]:
    """The problem as OpenAI's clients read it."""
    status, _ = STATUS[problem.code]
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    pointers = [one["pointer"] for one in problem.members.get("errors", ())]
    param = pointers[0].split("/")[1] if pointers and pointers[0] else None
    return {"message": problem.detail, "type": kind, "param": param, "code": problem.code}


def answer(problem: Problem, path: str = "") -> Response:
    """The problem as an HTTP answer, in the form that the clients of a path know."""
    body = document(problem)
    if path == "/v2" or path.startswith("/v2/"):
        body = _as_open_inference(body)
    headers = headers_of(problem)
    if path.startswith(OPENAI):
        body["error"] = openai_error(problem)
        if body["status"] == 409:
            headers["x-should-retry"] = "false"  # the openai package would: here another try ends in the same
    return Response(msgspec.json.encode(body) + b"\n", body["status"], headers, media_type="application/problem+json")


def headers_of(problem: Problem) -> dict[str, str]:
    """The headers that a problem's answer has besides: when to try again, how to say who asks (RFC 6750)."""
    status = STATUS[problem.code][0]
    if status in (429, 503):
        return {"Retry-After": str(problem.members.get("retry_after_s", RETRY_AFTER_S))}
    if status == 401:
        error = problem.members.get("error")
        return {"WWW-Authenticate": 'Bearer realm="recurra"' + (f', error="{error}"' if error else "")}
    return {}


def from_validation(error: ValidationError) -> Problem:
    """A request body or query that does not fit its schema: 422 with JSON pointers, or 400 when it is not JSON."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    if found[0]["type"] == "json_invalid":
        return Problem("bad_request", f"the body is not JSON: {found[0]['msg'][:200]}")
    errors = [{"detail": one["msg"], "pointer": _pointer(one["loc"])} for one in found[:20]]
    first = f"{errors[0]['pointer']}: {errors[0]['detail']}" if errors[0]["pointer"] else errors[0]["detail"]
    return Problem("invalid_input", first, None, errors=errors)


def _pointer(location: tuple[int | str, ...]) -> str:
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in location)


def problem_from(error: Exception) -> Problem:
    """What a client is told of an error."""
    match error:
        case Problem():
            return error
        case ValidationError():
            return from_validation(error)
        case RequestValidationError():
            errors = [{"detail": one["msg"], "pointer": _pointer(one["loc"][1:])} for one in error.errors()[:20]]
            return Problem("invalid_input", f"{errors[0]['pointer']}: {errors[0]['detail']}", None, errors=errors)
        case HTTPException():
            codes = {404: "not_found", 405: "method_not_allowed", 413: "payload_too_large"}
            return Problem(codes.get(error.status_code, "bad_request"), str(error.detail))
        case StoreError():
            log.error("store_failed", error=str(error))
            return problem_of(error)
    log.exception("request_failed", exc_info=error)
    return Problem("internal", "the service failed on this request")


def answer_to(error: Exception, path: str = "") -> Response:
    """The answer to a request of `path` that ended with an error."""
    if isinstance(error, ClientLeft):
        return Response(status_code=499)
    found = answer(problem_from(error), path)
    if isinstance(error, HTTPException):
        found.headers.update(error.headers or {})
    return found


def _methods_at(request: Request) -> list[str]:
    """What a path can be asked, over all its routes: Starlette says it of the first one only."""
    paths, asked = request.app.openapi()["paths"], request.url.path
    named = [asked] if asked in paths else [one for one in paths if _fits(one, asked)]
    return sorted({method.upper() for one in named for method in paths[one]})


def _fits(template: str, path: str) -> bool:
    named = re.split(r"\{[^}]*\}", template)
    return re.fullmatch("[^/]+".join(map(re.escape, named)), path) is not None


def install(app: FastAPI) -> None:
    """Answer every error with a problem document."""

    async def handle(request: Request, error: Exception) -> Response:
        found = answer_to(error, request.url.path)
        if found.status_code == 405 and (methods := _methods_at(request)):
            found.headers["Allow"] = ", ".join(methods)
        return found

    for kind in (Problem, HTTPException, ValidationError, RequestValidationError, ClientLeft, StoreError, Exception):
        app.add_exception_handler(kind, handle)
