"""What the Open Inference Protocol's requests and answers look like, and what the OpenAPI page says of them."""

from typing import Annotated, Any

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

from service.api.errors import STATUS, open_inference_status
from service.api.responses import ErrorDocument

MAX_ID = 255
"""characters of a request's id: it is an idempotency key"""

ModelPath = Annotated[str, Path(max_length=64, description="a name from POST /v2/repository/index")]
VersionPath = Annotated[int, Path(ge=1, le=2**31 - 1, description="one of the model's versions")]

ALWAYS = ("bad_request", "invalid_input", "not_ready", "internal")
"""what any route may answer"""


class _Given(BaseModel):
    """Part of a request: nothing is coerced; members that are not known are left alone, as the protocol wants it."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Tensor(_Given):
    """An input: its numbers in `data`, or raw behind the JSON with the parameter `binary_data_size`."""

    name: str = Field(min_length=1, max_length=256)
    shape: list[Annotated[int, Field(ge=0, le=2**63 - 1)]] = Field(max_length=16, description="batch first")
    datatype: str = Field(max_length=16, description="FP32, INT64, ...; as the model's metadata says")
    parameters: dict[str, Any] = {}
    data: list[Any] | None = Field(default=None, description="row-major, flat or nested")


class Wanted(_Given):
    """An output that is asked for."""

    name: str = Field(min_length=1, max_length=256)
    parameters: dict[str, Any] = Field(default={}, description="`binary_data`: raw behind the JSON")


class InferBody(_Given):
    """Tensors to run the model on; with the parameter `sequence_id` they are the next steps of that sequence."""

    id: str = Field(default="", max_length=MAX_ID, description="with a sequence: makes the step safe to repeat")
    parameters: dict[str, Any] = Field(
        default={},
        description="`sequence_id` (a positive integer or a string), `sequence_start`, `sequence_end`; "
        "`sequence_restart`: end the sequence that lives under the id first; `position`: refused unless the sequence "
        "stands there; `binary_data_output`: all outputs raw behind the JSON",
    )
    inputs: list[Tensor] = Field(min_length=1, max_length=64)
    outputs: list[Wanted] = Field(default=[], max_length=64, description="default: all of the model's")


class IndexBody(_Given):
    """Which models are listed."""

    ready: bool = Field(default=False, description="only those that are served")


class RepositoryParameters(BaseModel):
    """Models are served as they lie in the folder: there is no parameter that would change one."""

    model_config = ConfigDict(strict=True, extra="forbid")

    unload_dependents: bool = Field(default=False, description="no model depends on another")


class RepositoryBody(_Given):
    """How a model is loaded or unloaded."""

    parameters: RepositoryParameters = RepositoryParameters()


# ---------------------------------------------------------------------- answers


class Live(BaseModel):
    """The process is alive."""

    live: bool


class Ready(BaseModel):
    """Requests are taken."""

    ready: bool


class ModelReady(Ready):
    """The model is served."""

    name: str


class ServerMetadata(BaseModel):
    """The service."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """An input or output; -1: an axis of any length."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """A model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ConfigTensor(BaseModel):
    """An input or output, its batch axis left out."""

    name: str
    data_type: str
    dims: list[int]


class ConfigState(BaseModel):
    """A state tensor, its batch axis left out."""

    input_name: str
    output_name: str
    data_type: str
    dims: list[int]


class Oldest(BaseModel):
    """How sequences are batched: whoever is ready joins the next batch."""

    max_candidate_sequences: int


class SequenceBatching(BaseModel):
    """How sequences are kept."""

    oldest: Oldest
    max_sequence_idle_microseconds: int
    state: list[ConfigState]


class ModelConfig(BaseModel):
    """A model's configuration, as Triton writes it."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[ConfigTensor]
    output: list[ConfigTensor]
    sequence_batching: SequenceBatching


class Duration(BaseModel):
    """How often, and how long in all."""

    count: int
    ns: int


class InferenceStats(BaseModel):
    """Requests of this door by outcome, and the time in the graph; what is not measured stays at 0."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class BatchStats(BaseModel):
    """Calls of the graph with that many rows."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStats(BaseModel):
    """What a model version has done, through whatever door."""

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferenceStats
    batch_stats: list[BatchStats]


class Statistics(BaseModel):
    """Statistics, one entry a model version."""

    model_stats: list[ModelStats]


class IndexEntry(BaseModel):
    """A model version in the models folder."""

    name: str
    version: str
    state: str
    reason: str


class OutputTensor(BaseModel):
    """An output: its numbers in `data`, or raw behind the JSON with the parameter `binary_data_size`."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[float] | None = None


class Inferred(BaseModel):
    """The answer to an infer."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="`session` and `position` of a sequence")
    outputs: list[OutputTensor]


class Refusal(ErrorDocument):
    """A problem document that is also an error of the protocol."""

    error: str


RAW = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
"""JSON, and tensors as bytes behind it"""
_REFUSAL = {"application/problem+json": {"schema": Refusal.model_json_schema()}}


def described(what: str, schema: object, *codes: str, raw: bool = False) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of a route's answer (None: it is empty) and of the errors it may give, by code."""
    found: dict[int | str, dict[str, Any]] = {200: {"description": what}} if what else {}
    if schema is not None:
        found[200]["model"] = schema
    if raw:
        found[200]["content"] = RAW
    by_status: dict[int, list[str]] = {}
    for code in sorted({*codes, *ALWAYS}):
        by_status.setdefault(open_inference_status(code, STATUS[code][0]), []).append(code)
    told: dict[int | str, str] = {s: ", ".join(f"`{code}`" for code in codes) for s, codes in by_status.items()}
    for status, description in {**told, "default": "any other refusal"}.items():
        found[status] = {"description": description, "content": _REFUSAL}
    return found


def body_of(schema: type[BaseModel], required: bool, raw: bool = False, **examples: object) -> dict[str, Any]:
    """The OpenAPI description of a POST's body; `raw`: tensors may follow the JSON as bytes."""
    json: dict[str, Any] = {"schema": schema.model_json_schema(ref_template="#/components/schemas/{model}")}
    definitions = json["schema"].pop("$defs", {})
    if examples:
        json["examples"] = {name: {"value": value} for name, value in examples.items()}
    json["schema"] = _inlined(json["schema"], definitions)
    content = {"application/json": json, **(RAW if raw else {})}
    return {"requestBody": {"required": required, "content": content}}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:  # noqa: ANN401 (any JSON)
    """A schema without references: it stands inside a page that has other definitions."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        return {key: _inlined(value, definitions) for key, value in schema.items()}
    return [_inlined(value, definitions) for value in schema] if isinstance(schema, list) else schema
