"""Logs to standard error: a line an event, as key=value pairs or as JSON; nothing that was sent in breaks a line."""

import logging
import sys
from contextlib import suppress
from typing import Any, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor


class Unfailing:
    """A text stream that drops what can not be written: a full disk under the log must not stop the service."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or drop."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be."""
        with suppress(OSError):
            self._stream.flush()


def configure(level: str, form: Literal["logfmt", "json"]) -> None:
    """Write what is at least of a level; warnings of uvicorn and other libraries come in the same form."""
    number = getattr(logging, level.upper())
    stream = cast("TextIO", Unfailing(sys.stderr))
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    render: list[Processor] = [structlog.processors.JSONRenderer()]
    if form == "logfmt":
        order = ["timestamp", "level", "event"]
        render = [escape, structlog.processors.LogfmtRenderer(key_order=order, bool_as_flag=False)]
    structlog.configure(
        processors=[*common, *render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(stream),
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*common, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)


def escape(_: object, __: str, event: EventDict) -> EventDict:
    """Write what a terminal would act on as an escape (line feeds are left to the renderer)."""
    return {key: _escaped(value) for key, value in event.items()}


def _escaped(value: Any) -> Any:  # noqa: ANN401 (whatever is logged)
    if isinstance(value, bool | int | float | None):
        return value
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
