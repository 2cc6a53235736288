"""Answers: JSON written by msgspec, and what the OpenAPI page says of them."""

from typing import Any, Literal

import msgspec
from fastapi import Response
from pydantic import BaseModel

from service.api.errors import STATUS

ERRORS = (
    "session_not_found",
    "session_expired",
    "session_closed",
    "session_busy",
    "overloaded",
    "invalid_input",
    "not_streamable",
)


ALWAYS = (
    "bad_request",
    "unauthorized",
    "forbidden",
    "invalid_input",
    "rate_limited",
    "quota_exceeded",
    "not_ready",
    "rolled_back",
    "idempotency_key_reused",
    "commit_unknown",
)
"""what any route of a session may answer"""

BODY_ERRORS = ("payload_too_large", "unsupported_media_type", "request_timeout")
"""what a route that takes a body may answer besides"""


def line_of(content: object) -> bytes:
    """Content as JSON, with the line end that a terminal wants."""
    return msgspec.json.encode(content) + b"\n"


class JsonResponse(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Content as a line of JSON."""
        return line_of(content)


class JsonLine(Response):
    """A JSON answer that is written already: without the ceremony, which costs more than the writing."""

    def __init__(self, body: bytes) -> None:
        self.status_code = 200
        self.background = None
        self.body = body
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]


STREAM_EXAMPLE = """event: token
id: 1.19
data: {"position":19,"token":42,"text":"a","logprob":-0.51}

event: done
id: 1.118-end
data: {"finish_reason":"length","epoch":1,"position":118,"usage":{"prompt_tokens":5,"completion_tokens":100}}

"""


EVENT: dict[str, Any] = {
    "type": "object",
    "description": "an event; `data` is JSON",
    "required": ["event", "data"],
    "properties": {
        "event": {"type": "string", "enum": ["token", "done", "error"]},
        "id": {"type": "string"},
        "data": {"type": "string"},
    },
}

LINES_EXAMPLE = (
    '{"session":"pump-1","epoch":1,"position":42,"steps":1,"predictions":[{"mean":{"flow":35.1},"position":42}]}\n'
    '{"session":"pump-2","error":{"type":"urn:recurra:problem:position_mismatch","title":"Position mismatch",'
    '"status":409,"detail":"the session stands at position 9","code":"position_mismatch","epoch":1,"position":9}}\n'
)


class Parent(BaseModel):
    """Where a session left the one it was forked from."""

    session: str
    position: int


class Session(BaseModel):
    """A session: one memory of one model."""

    id: str
    model: str
    version: int
    epoch: int
    position: int
    seed: int
    created_at: str
    updated_at: str
    expires_at: str | None
    metadata: dict[str, Any]
    parent: Parent | None
    state_bytes: int


class SessionList(BaseModel):
    """A page of sessions."""

    data: list[Session]
    next_cursor: str | None


class Alternative(BaseModel):
    """A symbol that may come next."""

    token: int
    text: str
    logprob: float


class Prediction(BaseModel):
    """What the network says at a position; which members there are depends on the task."""

    position: int
    surprise: float | None = None
    alternatives: list[Alternative] | None = None
    label: str | None = None
    probabilities: dict[str, float] | None = None
    mean: dict[str, float] | None = None
    quantiles: dict[str, dict[str, float]] | None = None
    outputs: dict[str, Any] | None = None
    horizons: dict[str, dict[str, Any]] | None = None


class Steps(BaseModel):
    """The answer to a feed."""

    session: str
    epoch: int
    position: int
    steps: int
    created: bool | None = None
    predictions: list[Prediction]


class Usage(BaseModel):
    """How many entries a generate took and made."""

    prompt_tokens: int
    completion_tokens: int


class Generated(BaseModel):
    """The answer to a generate that is not streamed."""

    session: str | None = None
    epoch: int | None = None
    position: int | None = None
    created: bool | None = None
    text: str
    tokens: list[int]
    logprobs: list[dict[str, Any]] | None = None
    finish_reason: str
    usage: Usage


class CompletionLogprobs(BaseModel):
    """How likely each token was; null where nothing was predicted."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion of one prompt."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionUsage(Usage):
    """Entries of the prompts, and those that were drawn."""

    total_tokens: int


class Completion(BaseModel):
    """Completions as OpenAI's clients read them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: CompletionUsage


class ForecastStep(BaseModel):
    """One step ahead."""

    step: int
    mean: dict[str, float]
    quantiles: dict[str, dict[str, float]] | None = None


class Forecast(BaseModel):
    """The answer to a forecast."""

    session: str
    epoch: int
    position: int
    forecast: list[ForecastStep]


class State(BaseModel):
    """The memory itself, by the manifest's names."""

    session: str
    epoch: int
    position: int
    state: dict[str, list[Any]]


class LogEntry(BaseModel):
    """One input, as it can be fed again."""

    position: int
    input: Any
    source: Literal["fed", "generated"]
    at: str


class Log(BaseModel):
    """A page of a session's log."""

    data: list[LogEntry]
    next_cursor: int | None


class Verified(BaseModel):
    """Whether a memory is what its log says; null when nothing could be compared."""

    verified: bool | None
    from_position: int
    to_position: int
    state_sha256: str
    reason: Literal["nothing_to_compare", "numerics_changed"] | None = None
    differs_at: int | None = None


class Reloaded(BaseModel):
    """What a look at the models folder has changed, as name/version."""

    loaded: list[str]
    unloaded: list[str]
    kept: list[str]
    skipped: dict[str, str]


class Predictions(BaseModel):
    """One list of predictions a sequence."""

    predictions: list[list[Prediction]]


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: str
    created: int
    owned_by: str
    task: str
    input_kind: str
    versions: list[int]
    default_version: int
    cell: str
    layers: int
    hidden: int
    memory: str | dict[str, int]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    state_bytes: int
    metrics: dict[str, Any]
    checks: dict[str, Any]


class ModelList(BaseModel):
    """All models."""

    object: str
    data: list[ModelCard]


class ErrorDocument(BaseModel):
    """A problem document (RFC 9457); further members by code."""

    type: str
    title: str
    status: int
    detail: str
    code: str


_PROBLEM = ErrorDocument.model_json_schema()
"""made once: it stands in some three hundred places, and the service starts the sooner"""

_SCHEMAS: dict[str, type[BaseModel]] = {
    model.__name__: model
    for model in (
        Session,
        SessionList,
        Steps,
        Generated,
        Completion,
        Forecast,
        State,
        Log,
        Verified,
        Predictions,
        ModelCard,
        ModelList,
        Reloaded,
    )
}


def described(
    status: int, what: str, schema: str | None, *codes: str, streams: bool = False, lines: bool = False
) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of a route's answer and of the errors it may give, by code."""
    found: dict[int | str, dict[str, Any]] = {status: {"description": what}}
    if schema is not None:
        found[status]["model"] = _SCHEMAS[schema]
    if streams:
        found[status]["content"] = {"text/event-stream": {"schema": EVENT, "example": STREAM_EXAMPLE}}
    if lines:
        refused = {"type": "object", "properties": {"session": {}, "error": _PROBLEM}}
        line = {"anyOf": [{"$ref": "#/components/schemas/Steps"}, refused]}
        found[status]["content"] = {"application/x-ndjson": {"schema": line, "example": LINES_EXAMPLE}}
    by_status: dict[int, list[str]] = {}
    for code in sorted({*codes, *ALWAYS}):
        by_status.setdefault(STATUS[code][0], []).append(code)
    for error_status, error_codes in by_status.items():
        found[error_status] = {
            "description": ", ".join(f"`{code}`" for code in error_codes),
            "content": {"application/problem+json": {"schema": _PROBLEM}},
        }
    return found
