"""Request ids: taken from X-Request-ID or made, sent back, and written with whatever is logged for the request."""

import random
import re
from typing import Any

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import Message, Scope, Send

log = structlog.get_logger(__name__)

HEADER = b"x-request-id"
_SANE = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_SESSION = re.compile(r"/v1/sessions/([A-Za-z0-9._:-]{1,128})(?:/.*)?")
_random = random.Random()


def given(scope: Scope) -> bytes | None:
    """The X-Request-ID that a request came with."""
    for name, value in scope["headers"]:
        if name == HEADER:
            return bytes(value)
    return None


def id_of(value: bytes | None) -> str:
    """The id that was given, if it can be written anywhere as it is; else a new one."""
    if value is not None and _SANE.fullmatch(value):
        return value.decode("ascii")
    return f"{_random.getrandbits(128):032x}"


class Identified:
    """A request with an id: binds it to the log, and puts it on the answer."""

    def __init__(self, scope: Scope, send: Send, value: bytes | None) -> None:
        self._scope = scope
        self._send = send
        self._id = id_of(value)
        bound = {"request_id": self._id}
        if (session := _SESSION.fullmatch(scope["path"])) is not None:
            bound["session"] = session[1]
        self._bound = structlog.contextvars.bound_contextvars(**bound)

    def __enter__(self) -> "Identified":
        self._bound.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:  # noqa: ANN401 (as every context manager)
        self._bound.__exit__(*error)

    async def send(self, message: Message) -> None:
        """Send on, the id on the answer's head."""
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).append("X-Request-ID", self._id)
            self._tell(message["status"])
        await self._send(message)

    def _tell(self, status: int) -> None:
        # 501 says what never was here: whoever asks for it again and again must not fill the log.
        tell = log.warning if status >= 500 and status != 501 else log.debug
        tell("answered", method=self._scope["method"], path=self._scope["path"], status=status)
