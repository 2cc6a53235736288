"""Traces by OpenTelemetry: under the span of a request how long it queued, ran and was committed.

Off until `start`: then nothing of OpenTelemetry is imported and nothing is noted. No input and no exception's text
gets into a span.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from time import time_ns
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

MAX_SPANS = 64
"""under one request: of a long stream's ticks, or a bulk request's lines, the first are told"""
_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"

on = False
_provider: "TracerProvider | None" = None
_tracer: "Tracer | None" = None


class Trace:
    """A request's span, and what is told under it by the engines that work for it."""

    def __init__(self, span: "Span") -> None:
        from opentelemetry.trace import set_span_in_context

        self.span = span
        self._context = set_span_in_context(span)
        self._since = 0
        self._spans = 0

    def queued(self) -> None:
        """Work was made for the request; it waits until it runs."""
        self._since = self._since or time_ns()

    def add(self, name: str, start: int, end: int) -> None:
        """A span of something that has happened, times in ns since the epoch; before the first run it has queued."""
        if name == "run" and not self._spans:
            self._record("queue", min(self._since or start, start), start)
        self._record(name, start, end)

    def _record(self, name: str, start: int, end: int) -> None:
        if self._spans < MAX_SPANS and _tracer is not None:
            self._spans += 1
            _tracer.start_span(name, self._context, start_time=start).end(end)


class Traced(Protocol):
    """Work for requests that have traces."""

    @property
    def traces(self) -> Sequence[Trace]:
        """Those of the requests."""


_current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def enabled(endpoint: str) -> bool:
    """Whether there is anywhere to send traces to: the setting, or OpenTelemetry's own variable."""
    return endpoint != "off" or bool(os.environ.get(_ENDPOINT))


def start(endpoint: str, version: str) -> None:
    """Trace from now on; raises ImportError when the extra `otel` is not installed."""
    global on, _provider, _tracer
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces" if endpoint != "off" else None)
    named = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "recurra"), "service.version": version}
    _provider = TracerProvider(resource=Resource.create(named))
    _provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = _provider.get_tracer("recurra", version)
    on = True


def stop() -> None:
    """Send what has not been sent yet."""
    global on
    on = False
    if _provider is not None:
        _provider.shutdown()


def begin(name: str, headers: Mapping[str, str]) -> Trace | None:
    """The span of a request, under its sender's if it says which (W3C trace context); now the current one."""
    if _tracer is None:
        return None
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    above = TraceContextTextMapPropagator().extract(headers)
    trace = Trace(_tracer.start_span(name, above, SpanKind.SERVER))
    _current.set(trace)
    return trace


def current() -> Trace | None:
    """The trace of the request that is being answered here, which waits from now on."""
    if not on:
        return None
    trace = _current.get()
    if trace is not None:
        trace.queued()
    return trace


def tell(name: str, works: Iterable[Traced], seconds: float) -> None:
    """Something that took so long until now was done for work."""
    end = time_ns()
    start = end - int(seconds * 1e9)
    for work in works:
        for trace in work.traces:
            trace.add(name, start, end)
