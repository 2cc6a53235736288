"""`python -m service`: read the settings, open the store, serve until SIGTERM."""

import gc
import os
import signal
import socket
import sys
from types import FrameType
from typing import TextIO, cast

import uvicorn

from service import logs, tracing
from service.api import websocket
from service.api.auth import KeysError
from service.api.connections import SEND_BUFFER_BYTES, Connection, cut_off, make_room
from service.api.door import HEADERS
from service.api.traces import TraceRequests
from service.app import VERSION, create_app, open_store
from service.settings import Settings, SettingsError, load
from service.store.base import StoreError

SWITCH_INTERVAL_S = 0.0001
GC_THRESHOLDS = (50_000, 20, 100)
"""Nearly everything here is freed by counting references: Python's own thresholds look for cycles far too often."""


def main() -> int:
    """Serve; returns the exit code."""
    # An engine that comes back from the graph or the disk waits this long at most for a busy event loop's GIL.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        settings = load()
        logs.configure(settings.log_level, settings.log_format)
        start_tracing(settings)
        listener = listen(settings)
        store = open_store(settings)
    except SettingsError as error:
        return _refuse(str(error))
    except StoreError as error:
        return _refuse(f"{'RECURRA_DATA_DIR' if settings.store == 'sqlite' else 'RECURRA_STORE'}: {error}")
    try:
        app = create_app(settings, store)
    except KeysError as error:
        store.close()
        return _refuse(f"RECURRA_API_KEYS_FILE: {error}")
    make_room(settings.max_connections)
    config = uvicorn.Config(
        TraceRequests(app, app.state) if tracing.on else app,
        http=Connection,
        headers=HEADERS,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, int(settings.grace_s)),
        ws=websocket.Protocol,
        ws_max_size=settings.max_body_bytes,
        ws_ping_interval=websocket.PING_S,
        ws_ping_timeout=websocket.PING_S,
        ws_per_message_deflate=False,  # it costs memory and time for each, and messages are short
    )
    server = Server(config)
    server.run([listener])
    tracing.stop()
    return 0 if server.started else 1


def start_tracing(settings: Settings) -> None:
    """Trace if there is anywhere to send traces to; raises SettingsError when that can not be done."""
    if tracing.enabled(settings.otel_endpoint):
        try:
            tracing.start(settings.otel_endpoint, VERSION)
        except ImportError as error:
            raise SettingsError("RECURRA_OTEL_ENDPOINT: traces need pip install 'recurra[otel]'") from error


def listen(settings: Settings) -> socket.socket:
    """The open port; raises SettingsError when it can not be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        where = f"RECURRA_HOST={settings.host!r}, RECURRA_PORT={settings.port}"
        raise SettingsError(f"{where}: {os.strerror(error.errno) if error.errno else error}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    return listener


class Server(uvicorn.Server):
    """Uvicorn that lets the running streams end, suspended, when it is told to stop."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On the first SIGTERM or SIGINT: refuse new work and suspend the generates."""
        sessions = getattr(self.config.app.state, "sessions", None)  # type: ignore[union-attr]
        if sessions is not None:
            sessions.suspend_all()
        # Not uvicorn's own: that raises the signal again at the end, and the exit code would not be 0.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if counter % 10 == 0:
            cut_off(self.server_state.connections)
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where to go next, once the port is open."""
        await super().startup(sockets)
        if self.started:
            # A look through all that was loaded takes 50 ms, in which nobody is answered.
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)
            host, port = sockets[0].getsockname()[:2] if sockets else (self.config.host, self.config.port)
            where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            told = f"Recurra listens on {where}\n  what is served: {where}/v1/models\n  the API: {where}/docs"
            print(told, file=cast("TextIO", logs.Unfailing(sys.stdout)), flush=True)


def _refuse(why: str) -> int:
    print(f"recurra: can not start: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
