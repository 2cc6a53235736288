"""Prometheus metrics of the process; their names, labels and meanings are told in docs/operations.md.

The engine observes once a tick, whatever the number of rows.
"""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.process_collector import ProcessCollector

disable_created_metrics()  # type: ignore[no-untyped-call]

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_ROWS = tuple(2**i for i in range(13))
_MODEL = ("model", "version")
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))

REQUESTS = Counter("recurra_requests", "HTTP requests by method and status", ("method", "status"), registry=REGISTRY)
REFUSALS = Counter("recurra_refusals", "Requests, lines and streams refused, by code", ("code",), registry=REGISTRY)
REPLAYS = Counter("recurra_replays", "Requests answered by what their key had stored", registry=REGISTRY)
STEPS = Counter("recurra_steps", "Log entries folded", _MODEL, registry=REGISTRY)
TOKENS = Counter("recurra_tokens", "Tokens drawn", _MODEL, registry=REGISTRY)
TICKS = Counter("recurra_ticks", "Batches run", _MODEL, registry=REGISTRY)
BATCH_ROWS = Histogram("recurra_batch_rows", "Sessions in a batch", _MODEL, registry=REGISTRY, buckets=_ROWS)
MAX_BATCH_ROWS = Gauge("recurra_max_batch_rows", "Sessions that a batch may have", _MODEL, registry=REGISTRY)
QUEUED_STEPS = Gauge("recurra_queued_steps", "Steps waiting or running", _MODEL, registry=REGISTRY)
QUEUE_SECONDS = Histogram(
    "recurra_queue_seconds",
    "How long the first of a batch has waited for it",
    _MODEL,
    registry=REGISTRY,
    buckets=_SECONDS,
)
RUN_SECONDS = Histogram("recurra_run_seconds", "Time in the graph a tick", _MODEL, registry=REGISTRY, buckets=_SECONDS)
COMMIT_SECONDS = Histogram("recurra_commit_seconds", "Time of a group commit", registry=REGISTRY, buckets=_SECONDS)
COMMITS = Counter("recurra_commits", "Session commits by outcome", ("outcome",), registry=REGISTRY)
ACTIVE = Gauge("recurra_sessions_active", "Sessions held in memory", _MODEL, registry=REGISTRY)
PARKED = Gauge("recurra_sessions_parked", "Sessions that live in the store alone", _MODEL, registry=REGISTRY)
EVICTED = Counter(
    "recurra_sessions_evicted", "Sessions that left memory, by reason", (*_MODEL, "reason"), registry=REGISTRY
)
WAKE_SECONDS = Histogram(
    "recurra_wake_seconds",
    "Time to read a session that is not in memory",
    _MODEL,
    registry=REGISTRY,
    buckets=_SECONDS,
)
NUMERIC_FAULTS = Counter(
    "recurra_numeric_faults",
    "Chunks refused because the model made a number that is not finite",
    _MODEL,
    registry=REGISTRY,
)

TENANT_REQUESTS = Counter(
    "recurra_tenant_requests", "HTTP requests by tenant and status", ("tenant", "status"), registry=REGISTRY
)
TENANT_STEPS = Counter("recurra_tenant_steps", "Steps asked for by tenant", ("tenant",), registry=REGISTRY)
TENANT_REFUSALS = Counter(
    "recurra_tenant_refusals", "Requests refused by a tenant's limit", ("tenant", "limit"), registry=REGISTRY
)
CUT = Counter(
    "recurra_connections_cut", "Connections cut off: slow, too large, too many", ("reason",), registry=REGISTRY
)


def answered(method: str, status: int) -> None:
    """Count an answer; a method that is none of HTTP's own makes no label of its own."""
    REQUESTS.labels(method if method in _METHODS else "other", str(status)).inc()


def parked(counts: Mapping[tuple[str, str], int]) -> None:
    """Show how many sessions of each (model, version) live in the store alone."""
    PARKED.clear()
    for of, count in counts.items():
        PARKED.labels(*of).set(count)


def forget(model: str, version: str) -> None:
    """Drop the gauges of a model version that is not served any more; they would keep what they look at alive."""
    for gauge in (MAX_BATCH_ROWS, QUEUED_STEPS, ACTIVE):
        gauge.remove(model, version)


def render() -> bytes:
    """The metrics in Prometheus' text format."""
    return generate_latest(REGISTRY)
