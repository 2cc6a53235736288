"""Reading requests: bounded bodies, strict schemas, clients that leave."""

import asyncio
import hashlib
from collections.abc import Awaitable
from typing import Annotated, Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope

from service.api.limits import Visit
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
KEY_PATTERN = "^[!-~]([ -~]*[!-~])?$"
LOOK_EVERY_S = 0.05

KEY_PARAMETER: dict[str, Any] = {
    "parameters": [
        {
            "in": "header",
            "name": "Idempotency-Key",
            "required": False,
            "schema": {"type": "string", "maxLength": MAX_KEY, "pattern": KEY_PATTERN},
            "description": "a later request with the same key and body gets the first one's answer and changes nothing",
        }
    ]
}


class Strict(BaseModel):
    """A request body: unknown fields are refused, nothing is coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


async def read(request: Request, schema: type[Body]) -> Body:
    """The request's JSON body by its schema; raises Problem 415, 413, or ValidationError."""
    must_be(request, "application/json")
    return schema.model_validate_json(await read_bytes(request))


def must_be(request: Request, media_type: str) -> None:
    """Raise Problem 415 unless the body says that it is of a type."""
    if (header(request, b"content-type") or "").partition(";")[0].strip().lower() != media_type:
        what = "JSON" if media_type == "application/json" else "lines of JSON"
        raise Problem(
            "unsupported_media_type",
            f"the body must be {what} and say so: -H 'Content-Type: {media_type}' (curl sends a form otherwise)",
        )


def header(request: Request, name: bytes) -> str | None:
    """A header's first value; `name` in small letters."""
    for key, value in request.scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return None


def keyed_of(request: Request, scope: str, body: BaseModel | None = None, *unlike: str) -> Keyed | None:
    """The request's Idempotency-Key, with a digest of what is asked; None without one.

    `unlike` names members in which two requests may differ and ask the same.
    Source: draft-ietf-httpapi-idempotency-key-header, where the key is a quoted string; bare ones are taken too.
    """
    given = header(request, b"idempotency-key")
    if given is None:
        return None
    key = checked_key(given)
    asked = body.model_dump_json(exclude=set(unlike)) if body is not None else ""
    return Keyed(tenant_of(request), scope, key, digest_of(f"{request.url.path}?{request.url.query}", asked))


def digest_of(url: str, asked: str) -> bytes:
    """What tells one request with a key from another."""
    return hashlib.sha256(f"{url}\n{asked}".encode()).digest()[:16]


def checked_key(given: str) -> str:
    """An Idempotency-Key without its quotes; raises Problem 400 when it is none."""
    quoted = len(given) > 1 and given[0] == given[-1] == '"'
    key = given[1:-1] if quoted else given
    if not 1 <= len(key) <= MAX_KEY or not (key.isascii() and key.isprintable()):
        raise Problem("bad_request", f"an Idempotency-Key has 1 to {MAX_KEY} printable characters of ASCII")
    return key


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
    announced = header(request, b"content-length") or ""
    if announced.isdecimal() and int(announced) > limit:
        raise too_large(limit)
    part = await _part(request)
    if not part.get("more_body", False) and len(part["body"]) <= limit:
        visit_of(request).take_bytes(len(part["body"]))
        return bytes(part["body"])
    body = bytearray(part["body"])
    while len(body) <= limit and part.get("more_body", False):
        part = await _part(request)
        body += part["body"]
    visit_of(request).take_bytes(len(body))
    if len(body) > limit:
        raise too_large(limit)
    return bytes(body)


def too_large(limit: int) -> Problem:
    """413."""
    return Problem("payload_too_large", f"the body is larger than {limit} bytes (RECURRA_MAX_BODY_BYTES)")


async def _part(request: Request) -> Message:
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientLeft
    return message


# ---------------------------------------------------------------------- clients that leave


class Departures:
    """Cancels work whose client has left.

    Only work that takes a while is looked after: for a step that is answered at once a second task costs more than
    the step, and nothing is gained by dropping it.
    """

    def __init__(self) -> None:
        self._fresh: set[Stay] = set()
        self._waiting: set[Stay] = set()
        self._armed = False

    def watch(self, receive: Receive, long: bool = False) -> "Stay":
        """A block that raises ClientLeft when the client leaves, a `long` one at once; the body must have been read."""
        return Stay(self, receive, long)

    def add(self, stay: "Stay") -> None:
        """Look after a block from the next round but one."""
        self._fresh.add(stay)
        if not self._armed:
            self._armed = True
            asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)

    def remove(self, stay: "Stay") -> None:
        """The block has ended."""
        self._fresh.discard(stay)
        self._waiting.discard(stay)

    def _look(self) -> None:
        for stay in self._waiting:
            stay.look()
        self._waiting, self._fresh = self._fresh, set()
        self._armed = bool(self._waiting)
        if self._armed:
            asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)


class Stay:
    """A block of work that is of use only while its client waits."""

    __slots__ = ("_departures", "_left", "_long", "_receive", "_task", "_watcher")

    def __init__(self, departures: Departures, receive: Receive, long: bool) -> None:
        self._departures = departures
        self._long = long
        self._receive = receive
        self._left = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        if self._long:
            self.look()
        else:
            self._departures.add(self)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._departures.remove(self)
        if self._watcher is not None:
            self._watcher.cancel()
        if self._left and kind is asyncio.CancelledError:
            self._task.uncancel()
            raise ClientLeft from None

    def look(self) -> None:
        """Wait for the client to leave from now on."""
        self._watcher = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left = True
        self._task.cancel()


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await work, but cancel it when the client leaves; raises ClientLeft then."""
    with departures_of(request.scope).watch(request.receive):
        return await work


def departures_of(scope: Scope) -> Departures:
    """The application's watch over its clients."""
    found: Departures = scope["app"].state.departures
    return found


def visit_of(request: HTTPConnection) -> Visit:
    """Who asks, and what they may still use; the door has begun it."""
    found: Visit = request.scope["visit"]
    return found


def tenant_of(request: HTTPConnection) -> str:
    """The name of the tenant whose request it is: the first part of every key of the store."""
    return visit_of(request).tenant.name


def require_admin(request: Request) -> None:
    """Raise Problem 403 unless the request's key may change what is served."""
    if not visit_of(request).tenant.is_admin:
        raise Problem("forbidden", "this needs a key of scope admin")


def key_of(request: HTTPConnection, session_id: str) -> Key:
    """The store's key of a session id that a request names."""
    return (tenant_of(request), session_id)


def sessions_of(request: HTTPConnection) -> Sessions:
    """The application's sessions."""
    found: Sessions = request.app.state.sessions
    return found


def history_of(request: HTTPConnection) -> History:
    """The application's way into the sessions' past."""
    found: History = request.app.state.history
    return found


def body_of(schema: type[BaseModel], **examples: object) -> dict[str, Any]:
    """The OpenAPI description of a POST: the body that `read` parses, and the key that makes it safe to repeat."""
    content: dict[str, Any] = {"schema": schema.model_json_schema()}
    if examples:
        content["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {"requestBody": {"required": True, "content": {"application/json": content}}, **KEY_PARAMETER}


def check_max_tokens(request: HTTPConnection, max_tokens: int) -> None:
    """Refuse more tokens than RECURRA_MAX_TOKENS."""
    limit: int = request.app.state.settings.max_tokens
    if max_tokens > limit:
        raise invalid(f"at most {limit} (RECURRA_MAX_TOKENS)", "/max_tokens")
