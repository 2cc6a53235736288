"""What is asked of the service: one `Call` an operation, for both clients; nothing here sends."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx

from recurra_client.results import Forecast, Generated, LogEntry, Prediction, SessionInfo, Steps, Verified

T = TypeVar("T")


class Options(TypedDict, total=False):
    """How a generate writes; what is left out is the service's default."""

    max_tokens: int
    temperature: float
    """0: always the most likely symbol"""
    top_k: int
    top_p: float
    stop: Sequence[str]
    logprobs: int
    """how many likely symbols a token are shown, 0 to 20; not in streams"""
    seed: int
    """for this generate alone; or the session's, when it makes one"""
    position: int
    """refuse unless the session stands there"""
    key: str
    """an Idempotency-Key of your own"""


Inputs = str | Sequence[Any] | Mapping[str, Any]
"""text, symbols or ids, values, or by input's name; see the model's `inputs`"""
Shown = Literal["last", "all", "none"]
USER_AGENT = "recurra-client/0.1.0"
STATE_TYPE = "application/octet-stream"
LOG_PAGE = 1000
_SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request, and how its answer is read."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    body: Mapping[str, Any] | None = None
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str | int] = field(default_factory=dict)
    repeatable: bool = True
    """whether it may be sent again when its answer was lost"""


def post(path: str, read: Callable[[httpx.Response], T], body: Mapping[str, Any], key: str | None = None) -> Call[T]:
    """A POST with a key, so that it can be repeated; members that are None are left out."""
    headers = {"Idempotency-Key": f'"{key if key is not None else new_key()}"'}
    return Call("POST", path, read, given(body), headers=headers)


def given(body: Mapping[str, Any]) -> dict[str, Any]:
    """Without the members that are None."""
    return {name: value for name, value in body.items() if value is not None}


def new_key() -> str:
    """A key that no other request has."""
    return uuid4().hex


def of_session(session: str, operation: str = "") -> str:
    """The path of a session's route."""
    return f"/v1/sessions/{session}{operation}"


def checked_id(session: str) -> str:
    """The id, if it is one; raises ValueError."""
    if not _SESSION_ID.fullmatch(session) or session in (".", ".."):
        raise ValueError(f"not a session's id: {session[:140]!r} (1 to 128 of A-Z a-z 0-9 . _ : -)")
    return session


# ---------------------------------------------------------------------- sessions


def create(
    model: str,
    session: str | None,
    version: int | None,
    seed: int | None,
    ttl_s: int | None,
    metadata: Mapping[str, Any] | None,
) -> Call[SessionInfo]:
    """A new session."""
    body = {"model": model, "id": session, "version": version, "seed": seed, "ttl_s": ttl_s, "metadata": metadata}
    return post("/v1/sessions", _session, body)


def info(session: str) -> Call[SessionInfo]:
    """A look at a session."""
    return Call("GET", of_session(session), _session)


def update(session: str, metadata: Mapping[str, Any] | None, ttl_s: int | None) -> Call[SessionInfo]:
    """What is said of a session."""
    return Call("PATCH", of_session(session), _session, given({"metadata": metadata, "ttl_s": ttl_s}))


def delete(session: str, forks: bool) -> Call[None]:
    """The end of a session."""
    return Call("DELETE", of_session(session), lambda _: None, params={"forks": "delete"} if forks else {})


def steps(session: str, body: Mapping[str, Any], key: str | None) -> Call[Steps]:
    """A sequence to feed."""
    return post(of_session(session, "/steps"), lambda response: Steps.of(response.json()), body, key)


def generate(session: str, body: Mapping[str, Any]) -> Call[Generated]:
    """A text, as one answer; the body's `key` is its Idempotency-Key."""
    rest, key = {name: value for name, value in body.items() if name != "key"}, body.get("key")
    return post(of_session(session, "/generate"), lambda response: Generated.of(response.json()), rest, key)


def forecast(session: str, body: Mapping[str, Any]) -> Call[Forecast]:
    """Steps ahead on a copy."""
    return post(of_session(session, "/forecast"), lambda response: Forecast.of(response.json()), body)


def fork(session: str, child: str | None, position: int | None, seed: int | None) -> Call[SessionInfo]:
    """A session with the same past."""
    return post(of_session(session, "/fork"), _session, {"id": child, "position": position, "seed": seed})


def rewind(session: str, position: int) -> Call[SessionInfo]:
    """Back to a position."""
    return post(of_session(session, "/rewind"), _session, {"position": position})


def migrate(session: str, version: int) -> Call[SessionInfo]:
    """To another version of the model."""
    return post(of_session(session, "/migrate"), _session, {"version": version})


def cancel(session: str) -> Call[SessionInfo]:
    """The end of a generate, where it stands."""
    return post(of_session(session, "/cancel"), _session, {})


def verify(session: str, position: int | None) -> Call[Verified]:
    """Whether a memory is what its log says."""
    params = {"position": position} if position is not None else {}
    return Call("POST", of_session(session, "/verify"), lambda response: Verified.of(response.json()), params=params)


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a list, and where the next one begins."""

    entries: list[T]
    next: str | int | None


def log(session: str, after: str | int | None) -> Call[Page[LogEntry]]:
    """A page of a log."""
    params = {"limit": LOG_PAGE, **({"after": after} if after is not None else {})}
    return Call("GET", of_session(session, "/log"), _page(LogEntry.of), params=params)


def sessions(model: str | None, cursor: str | int | None) -> Call[Page[SessionInfo]]:
    """A page of the sessions that live."""
    params = given({"model": model, "cursor": cursor})
    return Call("GET", "/v1/sessions", _page(SessionInfo.of), params=params)


def state(session: str, position: int | None) -> Call[bytes]:
    """The memory as a file."""
    params = {"position": position} if position is not None else {}
    headers = {"Accept": STATE_TYPE}
    return Call("GET", of_session(session, "/state"), lambda response: response.content, headers=headers, params=params)


def upload(session: str, data: bytes) -> Call[SessionInfo]:
    """A session from such a file; it has no key, so a lost answer can not be asked for again."""
    headers = {"Content-Type": STATE_TYPE}
    return Call("PUT", of_session(session, "/state"), _session, content=data, headers=headers, repeatable=False)


# ---------------------------------------------------------------------- models


def models() -> Call[list[dict[str, Any]]]:
    """What is served."""
    return Call("GET", "/v1/models", lambda response: list(response.json()["data"]))


def predict(
    model: str, sequences: Sequence[Inputs], shown: Literal["last", "all"], version: int | None
) -> Call[list[list[Prediction]]]:
    """Whole sequences without a session."""

    def read(response: httpx.Response) -> list[list[Prediction]]:
        return [[Prediction.of(one) for one in sequence] for sequence in response.json()["predictions"]]

    body = {"sequences": list(sequences), "predictions": shown, "version": version}
    return post(f"/v1/models/{quote(model, safe='')}/predict", read, body)


def _session(response: httpx.Response) -> SessionInfo:
    return SessionInfo.of(response.json())


def _page(of: Callable[[Mapping[str, Any]], T]) -> Callable[[httpx.Response], Page[T]]:
    def read(response: httpx.Response) -> Page[T]:
        found = response.json()
        return Page([of(one) for one in found["data"]], found["next_cursor"])

    return read


def arguments(call: Call[Any]) -> dict[str, Any]:
    """What httpx sends for a call."""
    found: dict[str, Any] = {"method": call.method, "url": call.path, "headers": call.headers, "params": call.params}
    if call.body is not None:
        found["json"] = call.body
    if call.content is not None:
        found["content"] = call.content
    return found
