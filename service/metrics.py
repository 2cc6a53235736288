"""Prometheus metrics of the process."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

REGISTRY = CollectorRegistry()

_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_MODEL = ("model", "version")

STEPS = Counter("recurra_steps", "Log entries folded", _MODEL, registry=REGISTRY)
TOKENS = Counter("recurra_tokens", "Tokens drawn", _MODEL, registry=REGISTRY)
BATCH_ROWS = Histogram(
    "recurra_batch_rows",
    "Rows in a call of the graph",
    _MODEL,
    registry=REGISTRY,
    buckets=tuple(2**i for i in range(9)),
)
RUN_SECONDS = Histogram("recurra_run_seconds", "Time in the graph a tick", _MODEL, registry=REGISTRY, buckets=_SECONDS)
COMMIT_SECONDS = Histogram("recurra_commit_seconds", "Time of a group commit", registry=REGISTRY, buckets=_SECONDS)
COMMITS = Counter("recurra_commits", "Session commits by outcome", ("outcome",), registry=REGISTRY)
WAKES = Counter("recurra_session_wakes", "Sessions loaded from the store", _MODEL, registry=REGISTRY)
PARKS = Counter("recurra_session_parks", "Sessions left to the store", _MODEL, registry=REGISTRY)
NUMERIC_FAULTS = Counter(
    "recurra_numeric_faults",
    "Chunks refused because the model made a number that is not finite",
    _MODEL,
    registry=REGISTRY,
)
REPLAYS = Counter("recurra_replays", "Requests answered by what their key had stored", registry=REGISTRY)
RESIDENT = Gauge("recurra_sessions_resident", "Sessions held in memory", _MODEL, registry=REGISTRY)
QUEUED_STEPS = Gauge("recurra_queued_steps", "Steps waiting or running", _MODEL, registry=REGISTRY)
REQUESTS = Counter("recurra_requests", "HTTP requests by method and status", ("method", "status"), registry=REGISTRY)

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


def render() -> bytes:
    """The metrics in Prometheus' text format."""
    return generate_latest(REGISTRY)
