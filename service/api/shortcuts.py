"""The short way to the routes that are asked most: the same functions, without the layers in between.

On the long way FastAPI's routing, its exit stacks and the layers around them cost more than a step of a small network.
The routes stay declared as all others are, so the OpenAPI page knows no difference, and neither do their clients.
"""

import re
from collections.abc import Awaitable, Callable

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service import metrics
from service.api import errors, sessions, streaming

Endpoint = Callable[[Request, str], Awaitable[Response]]

_ENDPOINTS: dict[str, Endpoint] = {"steps": sessions.steps, "generate": streaming.generate}
_PATH = re.compile("/v1/sessions/([A-Za-z0-9._:-]{1,128})/(steps|generate)")
_ANSWERED = metrics.REQUESTS.labels("POST", "200")


def find(scope: Scope) -> tuple[Endpoint, str] | None:
    """The function of a request that takes the short way, and the session's id; what is odd takes the long way."""
    if scope["type"] != "http" or scope["method"] != "POST" or scope.get("root_path"):
        return None
    found = _PATH.fullmatch(scope["path"])
    return (_ENDPOINTS[found[2]], found[1]) if found is not None else None


async def serve(app: ASGIApp, endpoint: Endpoint, session_id: str, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request by its route's function."""
    scope["app"] = app
    request = Request(scope, receive, send)
    try:
        response = await endpoint(request, session_id)
    except Exception as error:
        response = errors.answer_to(error)
    if response.status_code == 200:
        _ANSWERED.inc()
    else:
        metrics.REQUESTS.labels("POST", str(response.status_code)).inc()
    await response(scope, receive, send)
