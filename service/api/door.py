"""The door that every request comes through: whose it is, and what the answer says beside itself.

It stands before the routes and before every short way to them, so that none can be reached past it: the routes take
their tenant from the visit that begins here, and without one they fail.
"""

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import metrics
from service.api import errors
from service.api.auth import ANYBODY, Keys, Tenant
from service.api.limits import Limits, Visit
from service.errors import Problem

DOCS = "/docs"
OPEN = frozenset(("/", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", DOCS, "/openapi.json"))
"""what is there for everybody: whether the service lives, and how it is asked"""
OPEN_BELOW = "/swagger/"
METRICS = "/metrics"
UNAUTHORIZED = 4401
"""code of a WebSocket that is closed for want of a key"""

PAGE_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
]
"""of pages that a browser shows"""
HEADERS = [("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY")]
"""of every answer; uvicorn writes them"""


class Door:
    """Lets requests in."""

    def __init__(self, app: ASGIApp, keys: Keys, limits: Limits) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in with its tenant, or answer why not."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            tenant = self._tenant(scope)
            self._limits.must_have_bytes(tenant)
        except Problem as problem:
            await self._refuse(problem, scope, receive, send)
            return
        scope["visit"] = visit = Visit(self._limits, tenant)
        try:
            await self._app(scope, receive, self._marked(scope, visit, send))
        finally:
            visit.leave()

    def _tenant(self, scope: Scope) -> Tenant:
        """Whose the request is; raises Problem 401."""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not given and self._keys.on and _is_open(scope["path"]):
            return ANYBODY
        if len(given) > 1:
            raise Problem("bad_request", "one Authorization header, not several")
        return self._keys.tenant_of(given[0] if given else None, "metrics" if scope["path"] == METRICS else "use")

    def _marked(self, scope: Scope, visit: Visit, send: Send) -> Send:
        """A way to send that says what is left of the tenant's limits, and counts; the same where there are none."""
        page, name = scope["path"] == DOCS, visit.tenant.name
        if not page and not name:
            return send

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                if name:
                    metrics.TENANT_REQUESTS.labels(name, str(message["status"])).inc()
                extra = [*(PAGE_HEADERS if page else ()), *(visit.headers() if name else ())]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        return marked

    @staticmethod
    async def _refuse(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close", "code": UNAUTHORIZED, "reason": problem.detail[:100]})
            return
        answer = errors.answer(problem, scope["path"])
        metrics.REQUESTS.labels(scope["method"], str(answer.status_code)).inc()
        await answer(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith(OPEN_BELOW)


def with_cors(app: ASGIApp, origins: str) -> ASGIApp:
    """The application for pages of other origins too; as it was where there are none.

    It stands before the door: a browser asks whether it may ask without a key. Cookies are never looked at.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins.split(","),
        allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
        expose_headers=[
            "Location",
            "Idempotent-Replayed",
            "Retry-After",
            "RateLimit",
            "RateLimit-Policy",
            "X-Request-ID",
        ],
    )
