"""A span around each request."""

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import tracing
from service.api import shortcuts

_SESSION = re.compile(r"/v1/sessions/([A-Za-z0-9._:-]{1,128})(?:/.*)?")
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class TraceRequests:
    """The application with a span around each request; stands before all else, and only where traces are on."""

    def __init__(self, app: ASGIApp, state: object) -> None:
        self._app = app
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on within its span."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        trace = tracing.begin(method, headers)
        if trace is None:
            await self._app(scope, receive, send)
            return
        span = trace.span
        span.set_attribute("http.request.method", method)
        if (session := _SESSION.fullmatch(scope["path"])) is not None:
            span.set_attribute("recurra.session", session[1])

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    _set_failed(trace)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            if (route := _route_of(scope)) is not None:
                span.update_name(f"{method} {route}")
                span.set_attribute("http.route", route)
            span.end()


def _set_failed(trace: tracing.Trace) -> None:
    from opentelemetry.trace import StatusCode

    trace.span.set_status(StatusCode.ERROR)


def _route_of(scope: Scope) -> str | None:
    """The route's template: the paths that clients ask for are many."""
    if (short := shortcuts.find(scope)) is not None:
        return f"/v1/sessions/{{session_id}}/{short[0].__name__}"
    return getattr(scope.get("route"), "path", None)
