"""`python -m service`: read the settings, open the store, serve until SIGTERM."""

import logging
import sys
from types import FrameType

import structlog
import uvicorn

from service.app import create_app, open_store
from service.settings import SettingsError, load
from service.store.base import StoreError


def main() -> int:
    """Serve; returns the exit code."""
    try:
        settings = load()
        configure_logging(settings.log_level)
        store = open_store(settings)
    except SettingsError as error:
        return _refuse(str(error))
    except StoreError as error:
        return _refuse(f"RECURRA_DATA_DIR: {error}")
    app = create_app(settings, store)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, int(settings.grace_s)),
    )
    server = Server(config)
    server.run()
    return 0 if server.started else 1


class Server(uvicorn.Server):
    """Uvicorn that lets the running streams end, suspended, when it is told to stop."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On the first SIGTERM or SIGINT: refuse new work and suspend the generates."""
        sessions = getattr(self.config.app.state, "sessions", None)  # type: ignore[union-attr]
        if sessions is not None:
            sessions.suspend_all()
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Say where to go next, once the port is open."""
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            where = f"http://{self.config.host}:{self.config.port}"
            print(
                f"Recurra listens on {where}\n  what is served: {where}/v1/models\n  the API: {where}/docs", flush=True
            )


def configure_logging(level: str) -> None:
    """One line of key=value pairs an event, to standard error; uvicorn's own warnings too."""
    number = getattr(logging, level.upper())
    logging.basicConfig(level=max(number, logging.WARNING), format="%(levelname)s %(name)s: %(message)s")
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _refuse(why: str) -> int:
    print(f"recurra: can not start: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
