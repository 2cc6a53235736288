"""Routes of sessions: create, look, feed, forecast, close."""

import asyncio
import base64
import binascii
import json
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Protocol

import msgspec
import numpy as np
from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import Field

from service.api.limits import steps_in
from service.api.requests import (
    KEY_PARAMETER,
    SESSION_ID,
    ModelName,
    Position,
    Seed,
    Strict,
    Ttl,
    Version,
    body_of,
    history_of,
    key_of,
    keyed_of,
    read,
    replay_body,
    replayed,
    sessions_of,
    tenant_of,
    visit_of,
    while_connected,
)
from service.api.responses import BODY_ERRORS, ERRORS, JsonLine, JsonResponse, described, line_of
from service.errors import Problem, invalid
from service.feeding import Fed, Inputs, head_of
from service.history import History
from service.registry import Model
from service.session import MANY, Opening, Sessions
from service.store.base import Head, Key, Reply
from service.tasks import Codec
from service.work.events import Done
from service.work.feed import KeptAnswer, Keyed

router = APIRouter(prefix="/v1/sessions", tags=["sessions"])

MAX_METADATA_BYTES = 16 * 1024
MAX_SAMPLES = 1000
MAX_HORIZON = 10_000
MAX_SAMPLED_STEPS = 100_000

SessionId = Annotated[str, Path(pattern=SESSION_ID, description="chosen by the client, or given at creation")]


class CreateBody(Strict):
    """A new session."""

    model: ModelName
    id: Annotated[str, Field(pattern=SESSION_ID)] | None = None
    version: Version | None = None
    seed: Seed | None = None
    ttl_s: Ttl | None = None
    metadata: dict[str, Any] | None = None


class UpdateBody(Strict):
    """What is said of a session."""

    metadata: dict[str, Any] | None = None
    ttl_s: Ttl | None = None


class StepsBody(Strict):
    """A sequence to feed."""

    inputs: Any = Field(description="a string, symbols or ids, values by feature, or tensors; see the model's `inputs`")
    position: Position | None = None
    predictions: Literal["last", "all", "none"] = "last"
    alternatives: int = Field(default=5, ge=0, le=1000, description="language models: how many likely symbols to show")
    model: ModelName | None = None
    version: Version | None = None
    seed: Seed | None = None


class Shown(Protocol):
    """What a request says of its answer."""

    @property
    def predictions(self) -> Literal["last", "all", "none"]:
        """Which positions it shows."""

    @property
    def alternatives(self) -> int:
        """How many likely symbols."""


class Asked(Shown, Protocol):
    """What a request asks to be fed."""

    @property
    def inputs(self) -> object:
        """The sequence."""

    @property
    def position(self) -> int | None:
        """Where the session is believed to stand."""

    @property
    def model(self) -> str | None:
        """What a new session is of."""

    @property
    def version(self) -> int | None:
        """Of the model."""

    @property
    def seed(self) -> int | None:
        """Of a new session."""


class ForecastBody(Strict):
    """How far to look ahead."""

    horizon: int = Field(ge=1, le=MAX_HORIZON)
    samples: int = Field(default=0, ge=0, le=MAX_SAMPLES, description="quantiles from that many sampled paths")
    quantiles: Annotated[list[float], Field(max_length=99)] | None = None
    future: Annotated[list[dict[str, Any]], Field(max_length=MAX_HORIZON)] | None = Field(
        default=None, description="the features that the model does not predict, one object a step"
    )
    seed: Seed | None = None


@router.post(
    "",
    status_code=201,
    openapi_extra=body_of(CreateBody, who={"model": "who", "id": "kitchen"}),
    responses=described(
        201, "the session", "Session", "model_not_found", "session_exists", "not_streamable", *BODY_ERRORS
    ),
)
async def create(request: Request) -> Response:
    """Create a session at position 0."""
    body = await read(request, CreateBody)
    keyed = keyed_of(request, "", body)
    opening = Opening(body.model, body.version, body.seed, ttl_s=body.ttl_s, metadata=_checked_metadata(body.metadata))

    async def fresh() -> Response:
        key = key_of(request, body.id if body.id is not None else new_id())
        return created(await sessions_of(request).create(key, opening, keyed))

    return await while_connected(request, sessions_of(request).replies.once(keyed, fresh, replay_created))


@router.get("", responses=described(200, "a page of live sessions, ordered by id", "SessionList"))
async def list_sessions(
    request: Request,
    model: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: Annotated[str | None, Query(max_length=512, pattern=r"^[A-Za-z0-9_-]*$")] = None,
) -> Response:
    """List live sessions."""
    after = _read_cursor(cursor) if cursor is not None else ""
    heads = await sessions_of(request).heads(tenant_of(request), model, after, limit)
    following = _cursor(heads[-1].id) if len(heads) == limit else None
    return JsonResponse({"data": [session(head) for head in heads], "next_cursor": following})


@router.get("/{session_id}", responses=described(200, "the session", "Session", *ERRORS))
async def get(request: Request, session_id: SessionId) -> Response:
    """Look at a session."""
    return JsonResponse(session(await sessions_of(request).head(key_of(request, session_id))))


@router.patch(
    "/{session_id}",
    openapi_extra={"requestBody": body_of(UpdateBody, describe={"metadata": {"room": "kitchen"}})["requestBody"]},
    responses=described(200, "the session", "Session", *ERRORS, *BODY_ERRORS),
)
async def update(request: Request, session_id: SessionId) -> Response:
    """Change a session's metadata or time to live."""
    body = await read(request, UpdateBody)
    metadata = _checked_metadata(body.metadata)
    sessions = sessions_of(request)

    async def fresh() -> Head:
        return await sessions.update(key_of(request, session_id), metadata, body.ttl_s)

    return JsonResponse(session(await while_connected(request, sessions.replies.again(fresh))))


@router.delete("/{session_id}", status_code=204, responses=described(204, "it is closed", None, "session_not_found"))
async def delete(
    request: Request,
    session_id: SessionId,
    forks: Annotated[
        Literal["keep", "delete"], Query(description="delete: those forked from it are closed too")
    ] = "keep",
) -> Response:
    """Close a session, also when it is closed already; what a fork still reaches stays."""
    sessions = sessions_of(request)
    await sessions.replies.again(lambda: sessions.delete(key_of(request, session_id), forks == "delete"))
    return Response(status_code=204)


@router.post(
    "/{session_id}/cancel", openapi_extra=KEY_PARAMETER, responses=described(200, "the session", "Session", *ERRORS)
)
async def cancel(request: Request, session_id: SessionId) -> Response:
    """End a running or suspended generate where it stands."""
    sessions, keyed = sessions_of(request), keyed_of(request, session_id)

    async def fresh() -> Response:
        answer = JsonResponse(session(await sessions.cancel(key_of(request, session_id))))
        await sessions.replies.keep(keyed, bytes(answer.body))
        return answer

    return await sessions.replies.once(keyed, fresh, replay_body)


@router.post(
    "/{session_id}/steps",
    openapi_extra=body_of(
        StepsBody,
        text={"inputs": "To be, or not to be", "model": "shakespeare"},
        values={"inputs": [[35.0], [32.5]], "model": "temperature", "predictions": "all"},
        fenced={"inputs": "his", "position": 9},
    ),
    responses=described(
        200, "what the network says now", "Steps", *ERRORS, "position_mismatch", "unknown_symbol", *BODY_ERRORS
    ),
)
async def steps(request: Request, session_id: SessionId) -> Response:
    """Feed a sequence; all of it is kept, or nothing."""
    body = await read(request, StepsBody)
    sessions, keyed, visit = sessions_of(request), keyed_of(request, session_id, body), visit_of(request)
    inputs, opening = feed_of(body, keyed)
    visit.take(steps_in(body.inputs))

    async def fresh() -> Response:
        fed = await sessions.feed(key_of(request, session_id), inputs, opening)
        visit.used(len(fed.done.entries))
        return JsonLine(await written(fed, body))

    async def replay(reply: Reply) -> Response:
        return replayed(JsonLine(await kept_answer(history_of(request), tenant_of(request), reply, body)))

    return await while_connected(request, sessions.replies.once(keyed, fresh, replay))


def feed_of(body: Asked, keyed: Keyed | None = None) -> tuple[Inputs, Opening]:
    """What is fed, and into which session."""

    kept = _kept_of(body, keyed) if keyed is not None else None
    inputs = Inputs(body.inputs, body.predictions, body.alternatives, kept)
    return inputs, Opening(body.model, body.version, body.seed, body.position)


def _kept_of(body: Shown, keyed: Keyed) -> Callable[[Model], KeptAnswer]:
    return lambda model: KeptAnswer(keyed, lambda done: steps_answer(Fed(model, done, head_of(done)), body))


async def written(fed: Fed, body: Shown) -> bytes:
    """The answer to a feed as a line of JSON; a long one is worked out beside the event loop."""
    if is_long(fed, body):
        return await asyncio.to_thread(answer_line, fed, body)
    return answer_line(fed, body)


def is_long(fed: Fed, body: Shown) -> bool:
    """Whether working an answer out would hold the event loop up."""
    return body.predictions == "all" and len(fed.done.entries) > MANY


def answer_line(fed: Fed, body: Shown) -> bytes:
    """The answer to a feed as a line of JSON."""
    return line_of(steps_answer(fed, body))


async def kept_answer(history: History, tenant: str, reply: Reply, body: StepsBody) -> bytes:
    """The kept answer to a feed as a line of JSON; a long one is worked out again from the log."""
    if reply.kind == "body":
        return reply.body + b"\n"
    answer = msgspec.json.decode(reply.body)
    count = reply.end - reply.start if body.predictions == "all" else 1
    model, done = await history.outputs((tenant, reply.scope), reply, reply.end, count)
    head = msgspec.structs.replace(head_of(done), position=reply.end)
    answer["predictions"] = await asyncio.to_thread(predictions, Fed(model, done, head), body.alternatives)
    return line_of(answer)


def steps_answer(fed: Fed, body: Shown) -> dict[str, Any]:
    """The answer to a feed."""
    shown = [] if body.predictions == "none" else predictions(fed, body.alternatives)
    return fed_answer(fed.head, len(fed.done.entries), fed.done.created, shown)


def fed_answer(head: Head, steps: int, created: bool, predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer to a feed of so many steps after which the session stands at `head`."""
    answer = where(head)
    answer["steps"] = steps
    if created:
        answer["created"] = True
    answer["predictions"] = predictions
    return answer


def predictions(fed: Fed, alternatives: int) -> list[dict[str, Any]]:
    """The predictions at the positions that were asked for."""
    if fed.shown is not None:
        return fed.shown
    shown = len(next(iter(fed.done.outputs.values())))
    first = fed.head.position - shown + 1
    entries = fed.done.entries[len(fed.done.entries) - shown :]
    return fed.model.engine.codec.predictions(fed.done.outputs, first, fed.done.before, entries, alternatives)


@router.post(
    "/{session_id}/forecast",
    openapi_extra=body_of(ForecastBody, day={"horizon": 24}),
    responses=described(200, "the steps ahead", "Forecast", *ERRORS, "empty_session", "task_mismatch", *BODY_ERRORS),
)
async def forecast(request: Request, session_id: SessionId) -> Response:
    """Roll the session forward on its own predictions; the session does not change."""
    body = await read(request, ForecastBody)
    sessions, keyed = sessions_of(request), keyed_of(request, session_id, body)
    visit_of(request).take(body.horizon * (1 + body.samples))

    async def fresh() -> Response:
        answer = JsonResponse(await _forecast(sessions, key_of(request, session_id), body))
        await sessions.replies.keep(keyed, bytes(answer.body))
        return answer

    return await while_connected(request, sessions.replies.once(keyed, fresh, replay_body))


async def _forecast(sessions: Sessions, key: Key, body: ForecastBody) -> dict[str, Any]:
    manifest = sessions.model_of(await sessions.head(key)).bundle.manifest
    if manifest.task != "forecaster":
        raise Problem("task_mismatch", f"{manifest.name} is a {manifest.task}: forecast is for forecasters")
    if body.horizon * body.samples > MAX_SAMPLED_STEPS:
        raise invalid(f"horizon times samples is at most {MAX_SAMPLED_STEPS}", "/samples")
    levels = _levels(body, manifest.quantiles)
    model, done, paths = await sessions.forecast(key, body.horizon, body.future, body.samples, body.seed)
    steps = [_forecast_step(model.engine.codec, done, i) for i in range(body.horizon)]
    for step in steps:
        if "quantiles" in step:
            step["quantiles"] = {str(level): step["quantiles"][str(level)] for level in levels if not paths}
    if paths:
        _lay_sampled_quantiles(steps, paths, levels, [target.name for target in manifest.targets])
    return {**where(head_of(done)), "forecast": steps}


def _levels(body: ForecastBody, own: tuple[float, ...]) -> list[float]:
    """The quantile levels of the answer; raises Problem when they can not be had."""
    if (body.samples or body.quantiles) and not own:
        raise Problem("task_mismatch", "the model predicts no quantiles: ask for none and for no samples")
    levels = body.quantiles if body.quantiles is not None else list(own)
    if any(not 0 < level < 1 for level in levels):
        raise invalid("quantiles lie between 0 and 1", "/quantiles")
    if not body.samples and any(level not in own for level in levels):
        raise invalid(f"without samples only the model's own: {', '.join(map(str, own))}", "/quantiles")
    return sorted(set(levels))


def _forecast_step(codec: Codec, done: Done, i: int) -> dict[str, Any]:
    return {"step": i + 1, **codec.forecast({name: array[i] for name, array in done.outputs.items()})}


def _lay_sampled_quantiles(
    steps: list[dict[str, Any]], paths: list[Done], levels: list[float], targets: list[str]
) -> None:
    """Put the quantiles over the sampled paths in place of the model's own one-step quantiles."""
    drawn = np.stack([path.outputs["mean"] for path in paths]).astype(np.float64)
    found = np.quantile(drawn, levels, axis=0)
    for i, step in enumerate(steps):
        step["quantiles"] = {
            str(level): dict(zip(targets, found[j, i].tolist(), strict=True)) for j, level in enumerate(levels)
        }


# ---------------------------------------------------------------------- formats


def where(head: Head) -> dict[str, Any]:
    """Which session, and where it stands."""
    return {"session": head.id, "epoch": head.epoch, "position": head.position}


def created(head: Head) -> Response:
    """The answer to what made a session."""
    return JsonResponse(session(head), 201, {"Location": f"/v1/sessions/{head.id}"})


async def replay_created(reply: Reply) -> Response:
    """The kept answer of a request that made a session."""
    assert reply.head is not None
    return replayed(created(reply.head))


async def replay_session(reply: Reply) -> Response:
    """The kept answer of a request that was answered with the session."""
    assert reply.head is not None
    return replayed(JsonResponse(session(reply.head)))


def session(head: Head) -> dict[str, Any]:
    """A session as clients see it."""
    return {
        "id": head.id,
        "model": head.model,
        "version": head.version,
        "epoch": head.epoch,
        "position": head.position,
        "seed": head.seed,
        "created_at": timestamp(head.created_ms),
        "updated_at": timestamp(head.updated_ms),
        "expires_at": timestamp(head.expires_ms) if head.expires_ms is not None else None,
        "metadata": head.metadata,
        "parent": {"session": of.session, "position": of.position} if (of := head.parent) is not None else None,
        "state_bytes": head.state_bytes,
    }


def timestamp(ms: int) -> str:
    """RFC 3339, UTC, to the millisecond."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def new_id() -> str:
    """An unguessable session id."""
    return secrets.token_hex(16)


def _checked_metadata(metadata: dict[str, Any] | None) -> dict[str, Any] | None:
    if metadata is None:
        return None
    try:
        size = max(len(json.dumps(metadata, allow_nan=False)), len(msgspec.msgpack.encode(metadata)))
    except (ValueError, OverflowError, RecursionError) as error:
        raise invalid("numbers must be finite and integers fit 64 bits", "/metadata") from error
    if size > MAX_METADATA_BYTES:
        raise invalid(f"at most {MAX_METADATA_BYTES} bytes of JSON", "/metadata")
    return metadata


def _cursor(session_id: str) -> str:
    return base64.urlsafe_b64encode(session_id.encode()).decode().rstrip("=")


def _read_cursor(cursor: str) -> str:
    try:
        return base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
    except (binascii.Error, ValueError) as error:
        raise invalid("not a cursor of this service", "/cursor") from error
