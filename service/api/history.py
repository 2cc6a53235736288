"""Routes through a session's past: fork, rewind, migrate, verify, log, and the state as a file."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from service.api.requests import (
    KEY_PARAMETER,
    SESSION_ID,
    Seed,
    Strict,
    Version,
    body_of,
    history_of,
    key_of,
    keyed_of,
    read,
    read_bytes,
    replay_body,
    sessions_of,
    while_connected,
)
from service.api.responses import BODY_ERRORS, ERRORS, JsonResponse, described
from service.api.sessions import SessionId, created, new_id, replay_created, replay_session, session, timestamp, where
from service.errors import Problem
from service.feeding import head_of
from service.history import write_state
from service.store.base import Segment
from service.tasks import Codec

router = APIRouter(prefix="/v1/sessions", tags=["history"])

STATE_TYPE = "application/octet-stream"

Past = Annotated[int, Field(ge=0, le=2**53, description="how many entries of the log; at most the session's position")]
PastQuery = Annotated[int | None, Query(ge=0, le=2**53, description="default: the newest")]


class ForkBody(Strict):
    """Where to leave a session."""

    id: Annotated[str, Field(pattern=SESSION_ID)] | None = None
    position: Past | None = None
    seed: Seed | None = None


class RewindBody(Strict):
    """Where to go back to."""

    position: Past


class MigrateBody(Strict):
    """Which version to move to."""

    version: Version


@router.post(
    "/{session_id}/fork",
    status_code=201,
    openapi_extra=body_of(ForkBody, now={}, then={"id": "what-if", "position": 100}),
    responses=described(
        201, "the new session", "Session", *ERRORS, "session_exists", "position_mismatch", "log_truncated", *BODY_ERRORS
    ),
)
async def fork(request: Request, session_id: SessionId) -> Response:
    """Begin a session whose past is this one's, up to a position; nothing is copied."""
    body = await read(request, ForkBody)
    history, keyed = history_of(request), keyed_of(request, "", body)

    async def fresh() -> Response:
        child = key_of(request, body.id if body.id is not None else new_id())
        return created(await history.fork(key_of(request, session_id), child, body.position, body.seed, keyed))

    return await while_connected(request, sessions_of(request).replies.once(keyed, fresh, replay_created))


@router.post(
    "/{session_id}/rewind",
    openapi_extra=body_of(RewindBody, back={"position": 100}),
    responses=described(200, "the session", "Session", *ERRORS, "position_mismatch", "log_truncated", *BODY_ERRORS),
)
async def rewind(request: Request, session_id: SessionId) -> Response:
    """Go back to a position; the seed stays, so the same requests give the same again."""
    body = await read(request, RewindBody)
    history, keyed = history_of(request), keyed_of(request, session_id, body)

    async def fresh() -> Response:
        return JsonResponse(session(await history.rewind(key_of(request, session_id), body.position, keyed)))

    return await while_connected(request, sessions_of(request).replies.once(keyed, fresh, replay_session))


@router.post(
    "/{session_id}/migrate",
    openapi_extra=body_of(MigrateBody, newer={"version": 2}),
    responses=described(
        200,
        "the session",
        "Session",
        *ERRORS,
        "version_not_found",
        "incompatible_version",
        "log_truncated",
        *BODY_ERRORS,
    ),
)
async def migrate(request: Request, session_id: SessionId) -> Response:
    """Move to another version of the model: the log is folded with it, and the old memory serves until then."""
    body = await read(request, MigrateBody)
    history, keyed = history_of(request), keyed_of(request, session_id, body)

    async def fresh() -> Response:
        return JsonResponse(session(await history.migrate(key_of(request, session_id), body.version, keyed)))

    return await while_connected(request, sessions_of(request).replies.once(keyed, fresh, replay_session))


@router.post(
    "/{session_id}/verify",
    openapi_extra=KEY_PARAMETER,
    responses=described(200, "whether the memory is what its log says", "Verified", *ERRORS, "position_mismatch"),
)
async def verify(request: Request, session_id: SessionId, position: PastQuery = None) -> Response:
    """Fold the log again and compare with the snapshots and the state in memory."""
    replies, keyed = sessions_of(request).replies, keyed_of(request, session_id)

    async def fresh() -> Response:
        verdict = await history_of(request).verify(key_of(request, session_id), position)
        answer: dict[str, Any] = {
            "verified": verdict.verified,
            "from_position": verdict.from_position,
            "to_position": verdict.to_position,
            "state_sha256": verdict.state_sha256,
        }
        if verdict.reason is not None:
            answer["reason"] = verdict.reason
        if verdict.differs_at is not None:
            answer["differs_at"] = verdict.differs_at
        response = JsonResponse(answer)
        await replies.keep(keyed, bytes(response.body))
        return response

    return await while_connected(request, replies.once(keyed, fresh, replay_body))


@router.get("/{session_id}/log", responses=described(200, "a page of the log", "Log", *ERRORS, "log_truncated"))
async def log(
    request: Request,
    session_id: SessionId,
    after: Annotated[int | None, Query(ge=0, le=2**53, description="default: where the log begins")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    cursor: Annotated[int | None, Query(ge=0, le=2**53, description="a next_cursor: the same as after")] = None,
) -> Response:
    """Read the entries of a session's log, in order."""
    begin = cursor if cursor is not None else after
    model, head, segments = await history_of(request).log(key_of(request, session_id), begin, limit)
    data = [entry for segment in segments for entry in _entries(model.engine.codec, segment)]
    more = data and data[-1]["position"] < head.position
    return JsonResponse({"data": data, "next_cursor": data[-1]["position"] if more else None})


def _entries(codec: Codec, segment: Segment) -> list[dict[str, Any]]:
    times = [at for count, at in segment.at_ms for _ in range(count)]
    return [
        {"position": segment.start + i + 1, "input": value, "source": segment.source, "at": timestamp(at)}
        for i, (value, at) in enumerate(zip(codec.decode(codec.entries(segment.data)), times, strict=True))
    ]


def _state_described() -> dict[int | str, dict[str, Any]]:
    found = described(200, "the state, by the manifest's names", "State", *ERRORS, "position_mismatch", "log_truncated")
    found[200]["content"] = {STATE_TYPE: {"schema": {"type": "string", "format": "binary"}}}
    return found


@router.get(
    "/{session_id}/state",
    responses=_state_described(),
)
async def state(request: Request, session_id: SessionId, position: PastQuery = None) -> Response:
    """Take the memory itself: a safetensors file, or JSON to look at (`Accept: application/json`)."""
    model, done = await while_connected(request, history_of(request).state(key_of(request, session_id), position))
    head = msgspec.structs.replace(head_of(done), position=head_of(done).position if position is None else position)
    manifest = model.bundle.manifest
    if "application/json" in request.headers.get("accept", ""):
        arrays = {spec.name: array.tolist() for spec, array in zip(manifest.session_states, done.row, strict=True)}
        return JsonResponse({**where(head), "state": arrays})
    name = f"attachment; filename={head.id.replace(':', '_')}-{head.position}.safetensors"
    return Response(write_state(manifest, head, done.row), media_type=STATE_TYPE, headers={"Content-Disposition": name})


@router.put(
    "/{session_id}/state",
    status_code=201,
    openapi_extra={
        "requestBody": {"required": True, "content": {STATE_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
    },
    responses=described(201, "the new session", "Session", "session_exists", "state_mismatch", *BODY_ERRORS),
)
async def upload(request: Request, session_id: SessionId) -> Response:
    """Begin a session from a state file: it goes on from the file's position, and its log begins there."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != STATE_TYPE:
        raise Problem("unsupported_media_type", f"a state file is sent with -H 'Content-Type: {STATE_TYPE}'")
    data = await read_bytes(request)
    replies = sessions_of(request).replies
    work = replies.again(lambda: history_of(request).upload(key_of(request, session_id), data))
    return created(await while_connected(request, work))
