"""Reading requests: bounded bodies, strict schemas, clients that leave."""

import asyncio
import hashlib
from collections.abc import Awaitable
from typing import Annotated, Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field

from service.errors import ClientLeft, Problem, invalid
from service.history import History
from service.sampling import MAX_SEED
from service.session import Sessions
from service.store.base import Key, Reply
from service.work.feed import Keyed

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)

SESSION_ID = r"^[A-Za-z0-9._:-]{1,128}$"

ModelName = Annotated[str, Field(min_length=1, max_length=64, description="a name from GET /v1/models")]
Version = Annotated[int, Field(ge=1, le=2**31 - 1, description="default: the greatest")]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED, description="decides every draw; default: random")]
Position = Annotated[int, Field(ge=0, le=2**53, description="refused with 409 unless the session stands here")]
Ttl = Annotated[int, Field(ge=0, le=10**9, description="idle seconds until it expires; 0: never")]


MAX_KEY = 255

KEY_PARAMETER: dict[str, Any] = {
    "parameters": [
        {
            "in": "header",
            "name": "Idempotency-Key",
            "required": False,
            "schema": {"type": "string", "maxLength": MAX_KEY},
            "description": "a later request with the same key and body gets the first one's answer and changes nothing",
        }
    ]
}


class Strict(BaseModel):
    """A request body: unknown fields are refused, nothing is coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


async def read(request: Request, schema: type[Body]) -> Body:
    """The request's JSON body by its schema; raises Problem 415, 413, or ValidationError."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise Problem(
            "unsupported_media_type",
            "the body must be JSON and say so: -H 'Content-Type: application/json' (curl sends a form otherwise)",
        )
    return schema.model_validate_json(await read_bytes(request))


def keyed_of(request: Request, scope: str, body: BaseModel | None = None, *unlike: str) -> Keyed | None:
    """The request's Idempotency-Key, with a digest of what is asked; None without one.

    `unlike` names members in which two requests may differ and ask the same.
    Source: draft-ietf-httpapi-idempotency-key-header, where the key is a quoted string; bare ones are taken too.
    """
    given = request.headers.get("idempotency-key")
    if given is None:
        return None
    quoted = len(given) > 1 and given[0] == given[-1] == '"'
    key = given[1:-1] if quoted else given
    if not 1 <= len(key) <= MAX_KEY or not key.isprintable():
        raise Problem("bad_request", f"an Idempotency-Key has 1 to {MAX_KEY} printable characters")
    asked = body.model_dump_json(exclude=set(unlike)) if body is not None else ""
    digest = hashlib.sha256(f"{request.url.path}?{request.url.query}\n{asked}".encode()).digest()[:16]
    return Keyed("", scope, key, digest)


def replayed(response: Response) -> Response:
    """Say that an answer is the one that an earlier request with the same key got."""
    response.headers["Idempotent-Replayed"] = "true"
    return response


async def replay_body(reply: Reply) -> Response:
    """The kept answer of a request whose answer was kept whole."""
    return replayed(Response(reply.body + b"\n", media_type="application/json"))


async def read_bytes(request: Request) -> bytes:
    """The request's body, never more than RECURRA_MAX_BODY_BYTES of it."""
    limit: int = request.app.state.settings.max_body_bytes
    too_large = Problem("payload_too_large", f"the body is larger than {limit} bytes (RECURRA_MAX_BODY_BYTES)")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_large
    return bytes(body)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await work, but cancel it when the client leaves; raises ClientLeft then."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
            raise ClientLeft
        return task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def key_of(session_id: str) -> Key:
    """The store's key of a session id."""
    return ("", session_id)


def sessions_of(request: Request) -> Sessions:
    """The application's sessions."""
    found: Sessions = request.app.state.sessions
    return found


def history_of(request: Request) -> History:
    """The application's way into the sessions' past."""
    found: History = request.app.state.history
    return found


def body_of(schema: type[BaseModel], **examples: object) -> dict[str, Any]:
    """The OpenAPI description of a POST: the body that `read` parses, and the key that makes it safe to repeat."""
    content: dict[str, Any] = {"schema": schema.model_json_schema()}
    if examples:
        content["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {"requestBody": {"required": True, "content": {"application/json": content}}, **KEY_PARAMETER}


def check_max_tokens(request: Request, max_tokens: int) -> None:
    """Refuse more tokens than RECURRA_MAX_TOKENS."""
    limit: int = request.app.state.settings.max_tokens
    if max_tokens > limit:
        raise invalid(f"at most {limit} (RECURRA_MAX_TOKENS)", "/max_tokens")
