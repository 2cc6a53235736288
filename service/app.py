"""The application: settings, store, models, sessions and routes put together."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi_swagger import patch_fastapi
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import cores, metrics
from service.api import (
    bulk,
    errors,
    history,
    models,
    oip,
    openai,
    operations,
    request_ids,
    sessions,
    shortcuts,
    streaming,
    websocket,
)
from service.api.auth import Keys
from service.api.door import OPEN, Door, with_cors
from service.api.limits import Limits
from service.api.oip.tallies import Tallies
from service.api.requests import Departures
from service.history import History
from service.registry import Registry
from service.session import Sessions
from service.settings import Settings
from service.store.base import Store, StoreError
from service.store.memory import MemoryStore
from service.store.sqlite import SqliteStore
from service.work.events import Event, Listener

log = structlog.get_logger(__name__)

VERSION = "0.1.0"
SWEEP_EVERY_S = 30.0
KEYS_EVERY_S = 1.0


def open_store(settings: Settings) -> Store:
    """The store that the settings name; raises StoreError."""
    if settings.store == "memory":
        return MemoryStore(settings.idempotency_ttl_s)
    if settings.store == "sqlite":
        return SqliteStore(settings.data_dir, settings.durability, settings.idempotency_ttl_s)
    try:
        from service.store.redis import RedisStore  # an extra: most services run without it
    except ImportError as error:
        raise StoreError("the Redis client is not installed: pip install 'recurra[redis]'") from error
    return RedisStore(settings.store, settings.durability, settings.idempotency_ttl_s)


class App(FastAPI):
    """The application behind its door; what is asked most takes the short way."""

    front: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that comes through the door."""
        await self.front(scope, receive, send)

    async def inside(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, by the short way if there is one."""
        found = shortcuts.find(scope)
        if found is None:
            await CountRequests(super().__call__)(scope, receive, send)
        elif (given := request_ids.given(scope)) is None:
            await shortcuts.serve(self, *found, scope, receive, send)
        else:
            with request_ids.Identified(scope, send, given) as identified:
                await shortcuts.serve(self, *found, scope, receive, identified.send)


def create_app(settings: Settings, store: Store) -> FastAPI:
    """The service as an ASGI application, on an open store; raises KeysError."""
    app = App(
        title="Recurra",
        version=VERSION,
        summary="Recurrent networks that keep remembering.",
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.settings = settings
    app.state.store = store
    app.state.departures = Departures()
    app.state.keys = Keys(settings.api_keys_file)
    app.state.limits = Limits(store)
    app.front = with_cors(Door(app.inside, app.state.keys, app.state.limits), settings.cors_origins)
    app.state.tallies = Tallies()
    for module in (models, sessions, streaming, websocket, bulk, openai, oip, history, operations):
        app.include_router(module.router)
    # The page's scripts come from here: FastAPI's own come from a CDN, and many services run without a way out.
    patch_fastapi(app, redirect_from_root_to_docs=False)
    errors.install(app)
    if app.state.keys.on:
        app.openapi = partial(_with_keys, app.openapi)  # type: ignore[method-assign]
    return app


def _with_keys(openapi: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The OpenAPI page, which says that a key is needed."""
    page = openapi()
    page["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    page["security"] = [{"key": []}]
    for path in OPEN & page["paths"].keys():
        for operation in page["paths"][path].values():
            operation["security"] = []
    return page


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(thread_name_prefix="asyncio", initializer=cores.free))

    def post(events: list[tuple[Listener, Event]]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            loop.call_soon_threadsafe(lambda: app.state.sessions.deliver(events))

    registry = await asyncio.to_thread(Registry, settings, app.state.store, post)
    app.state.registry = registry
    app.state.sessions = Sessions(registry, app.state.store, settings.session_ttl_s, settings.session_wait_ms / 1000)
    app.state.history = History(app.state.sessions)
    app.state.sessions.may_begin = app.state.limits.begin_session
    await app.state.limits.count(app.state.keys.allowances())
    registry.start()
    upkeep = [
        asyncio.create_task(_every(SWEEP_EVERY_S, app.state.sessions.sweep)),
        asyncio.create_task(_every(SWEEP_EVERY_S, lambda: app.state.limits.count(app.state.keys.allowances()))),
        asyncio.create_task(_every(KEYS_EVERY_S, lambda: _refresh(app.state.keys, app.state.limits))),
    ]
    try:
        yield
    finally:
        for task in upkeep:
            task.cancel()
        await app.state.sessions.drain(settings.grace_s)
        await asyncio.to_thread(registry.stop)
        await asyncio.to_thread(app.state.store.close)
        log.info("stopped")


async def _refresh(keys: Keys, limits: Limits) -> None:
    if await asyncio.to_thread(keys.refresh):
        await limits.count(keys.allowances())


async def _every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except Exception:
            log.exception("sweep_failed")


class CountRequests:
    """Counts answers by method and status, and gives each request an id; around all else, so it sees every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and note the answer's status."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        with request_ids.Identified(scope, send, request_ids.given(scope)) as identified:

            async def counted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    metrics.answered(scope["method"], message["status"])
                await identified.send(message)

            await self._app(scope, receive, counted)
