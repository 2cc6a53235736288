"""The metrics: documented, named as Prometheus wants it, and each moved by what it tells."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from keyed import As, KeysFile
from live import MakeServer, Server
from prometheus_client.parser import text_string_to_metric_families
from test_health import faulty_values
from tiny import copied, with_graph

from service import metrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
LETTERS = "tiny-letters"
FAULTY = "faulty-values"
BODY = {"model": LETTERS, "inputs": "abc"}


@pytest.fixture(scope="module")
def watched(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that holds two sessions of a model in memory, and has a faulty model."""
    served = tmp_path_factory.mktemp("watched") / "models"
    state = {"name": "h", "input": "h", "output": "h_next", "shape": [1, "B", 1], "batch_axis": 1}
    values = copied(models / "tiny-single" / "1", served / FAULTY / "1", states=[state])
    with_graph(values, faulty_values(), np.arange(56, dtype="<f4").reshape(8, 7, 1))
    copied(models / LETTERS / "1", served / LETTERS / "1")
    one = Server(served, tmp_path_factory.mktemp("watched-data"), max_resident=2, max_batch=7)
    yield one.start()
    one.close()


def documented() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> type and labels, as the page has it."""
    table = PAGE.split("<!-- metrics -->")[1].split("<!-- end of metrics -->")[0]
    rows = [[cell.strip("` ") for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert all(told for *_, told in rows)
    return {name: (kind, tuple(re.findall(r"\w+", labels))) for name, kind, labels, _ in rows}


def offered() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> type and labels, as the code has it."""
    found = {}
    for metric in vars(metrics).values():
        if isinstance(metric, metrics.Counter | metrics.Gauge | metrics.Histogram):
            suffix = "_total" if isinstance(metric, metrics.Counter) else ""
            found[metric._name + suffix] = (metric._type, tuple(metric._labelnames))
    return found


def test_the_page_has_the_metrics_of_the_code() -> None:
    assert documented() == offered()


def test_the_text_is_as_prometheus_wants_it(watched: Server) -> None:
    text = watched.http.get("/metrics").text
    families = list(text_string_to_metric_families(text))
    names = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert names >= set(offered())
    for family in families:
        assert family.documentation and family.type in ("counter", "gauge", "histogram")
        if family.name.startswith("recurra_"):
            assert family.name == family.name.lower() and not family.name.endswith(("_ms", "_count", "_sum", "_total"))
            samples = {sample.name for sample in family.samples}
            assert not any(name.endswith("_created") for name in samples)
            if family.type == "counter":
                assert samples <= {family.name + "_total"}
    if (promtool := shutil.which("promtool")) is not None:
        linted = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
        assert (linted.returncode, linted.stdout, linted.stderr) == (0, "", "")


# ---------------------------------------------------------------------- each is moved


def feed(server: Server, name: str) -> None:
    server.steps(name, "abcde", model=LETTERS)


def write(server: Server, name: str) -> None:
    server.generate(name, model=LETTERS, inputs="a", max_tokens=5)


def repeat(server: Server, name: str) -> None:
    for _ in range(2):
        assert server.post(f"/v1/sessions/{name}/steps", BODY, "key").status_code == 200


def refuse(server: Server, name: str) -> None:
    assert server.post(f"/v1/sessions/{name}/steps", {"model": LETTERS, "inputs": "?"}).status_code == 422


def refuse_line(server: Server, name: str) -> None:
    headers = {"Content-Type": "application/x-ndjson"}
    line = f'{{"session": "{name}", "model": "{LETTERS}", "inputs": "?"}}\n'
    assert server.http.post("/v1/steps", content=line, headers=headers).status_code == 200


def crowd(server: Server, name: str) -> None:
    """One session more than memory holds, then the first one again."""
    for i in (0, 1, 2, 0):
        feed(server, f"{name}-{i}")


def close(server: Server, name: str) -> None:
    feed(server, name)
    server.http.delete(f"/v1/sessions/{name}")


def fault(server: Server, name: str) -> None:
    answer = server.post(f"/v1/sessions/{name}/steps", {"model": FAULTY, "inputs": [-2000.0]})
    assert answer.json()["code"] == "numeric_fault"


ACTS: list[tuple[str, dict[str, str], Callable[[Server, str], None], float]] = [
    ("recurra_requests_total", {"method": "POST", "status": "200"}, feed, 1),
    ("recurra_requests_total", {"method": "POST", "status": "422"}, refuse, 1),
    ("recurra_refusals_total", {"code": "unknown_symbol"}, refuse, 1),
    ("recurra_refusals_total", {"code": "unknown_symbol"}, refuse_line, 1),
    ("recurra_replays_total", {}, repeat, 1),
    ("recurra_steps_total", {"model": LETTERS, "version": "1"}, feed, 5),
    ("recurra_tokens_total", {"model": LETTERS, "version": "1"}, write, 5),
    ("recurra_ticks_total", {"model": LETTERS, "version": "1"}, feed, 2),  # five steps are four and one
    ("recurra_batch_rows_count", {"model": LETTERS, "version": "1"}, feed, 2),
    ("recurra_batch_rows_sum", {"model": LETTERS, "version": "1"}, feed, 2),
    ("recurra_queue_seconds_count", {"model": LETTERS, "version": "1"}, feed, 2),
    ("recurra_run_seconds_count", {"model": LETTERS, "version": "1"}, feed, 2),
    ("recurra_commit_seconds_count", {}, feed, 1),
    ("recurra_commits_total", {"outcome": "applied"}, feed, 1),
    ("recurra_sessions_evicted_total", {"model": LETTERS, "version": "1", "reason": "ended"}, close, 1),
    ("recurra_numeric_faults_total", {"model": FAULTY, "version": "1"}, fault, 1),
]


@pytest.mark.parametrize(("metric", "labels", "act", "by"), ACTS, ids=[f"{one[0]}-{one[2].__name__}" for one in ACTS])
def test_a_metric_is_moved_by_what_it_tells(
    metric: str, labels: dict[str, str], act: Callable[[Server, str], None], by: float, watched: Server, name: str
) -> None:
    before = watched.metric(metric, **labels)
    act(watched, name)
    assert watched.metric(metric, **labels) - before == by


def test_times_are_seconds(watched: Server, name: str) -> None:
    names = [f"recurra_{what}_seconds_sum" for what in ("queue", "run", "commit")]
    before = [watched.metric(one) for one in names]
    feed(watched, name)
    assert all(0 < watched.metric(one) - then < 5 for one, then in zip(names, before, strict=True))


def test_sessions_that_leave_memory_are_counted_and_timed_when_they_wake(watched: Server, name: str) -> None:
    labels = {"model": LETTERS, "version": "1"}
    watched.steps(f"{name}-x", "a", model=LETTERS)
    woken, slept = watched.metric("recurra_wake_seconds_count", **labels), watched.metric("recurra_wake_seconds_sum")
    parked = watched.metric("recurra_sessions_evicted_total", **labels, reason="parked")
    crowd(watched, name)
    assert watched.metric("recurra_sessions_active", **labels) == 2
    assert watched.metric("recurra_sessions_evicted_total", **labels, reason="parked") - parked >= 3
    assert watched.metric("recurra_wake_seconds_count", **labels) - woken == 1
    assert 0 < watched.metric("recurra_wake_seconds_sum") - slept < 5
    end = time.monotonic() + 30  # it is counted seldom
    while watched.metric("recurra_sessions_parked", **labels) < 3:
        assert time.monotonic() < end
        time.sleep(0.2)


def test_the_gauges_tell_what_is(watched: Server, name: str) -> None:
    labels = {"model": LETTERS, "version": "1"}
    assert watched.metric("recurra_max_batch_rows", **labels) == 7
    assert watched.metric("recurra_queued_steps", **labels) == 0
    with httpx.Client(base_url=watched.url, verify=False) as other:
        assert any(queued_beside_a_stream(watched, f"{name}-{i}", other) for i in range(20))


def test_what_a_tenants_limit_refuses_is_counted(models: Path, tmp_path: Path, fresh: MakeServer) -> None:
    keys = KeysFile(tmp_path / "keys.toml")
    key = keys.add("acme", "admin")
    keys.limit("acme", "sessions = 1")
    one = fresh(api_keys_file=keys.path, store="memory").start()
    with As(one, key) as acme:
        acme.steps("a", "a", model=LETTERS)
        assert acme.post("/v1/sessions/b/steps", BODY).status_code == 429
        assert acme.metric("recurra_tenant_refusals_total", tenant="acme", limit="sessions") == 1
        assert acme.metric("recurra_tenant_requests_total", tenant="acme", status="429") == 1
        assert acme.metric("recurra_tenant_steps_total", tenant="acme") >= 1


def test_a_version_that_is_let_go_leaves_no_gauges(models: Path, tmp_path: Path, fresh: MakeServer) -> None:
    for version in ("1", "2"):
        copied(models / "tiny-tags" / version, tmp_path / "models" / "tiny-tags" / version)
    one = fresh(models=tmp_path / "models", store="memory").start()
    shutil.rmtree(tmp_path / "models" / "tiny-tags" / "1")
    assert one.ok(one.http.post("/v1/models/reload"))["unloaded"] == ["tiny-tags/1"]
    families = text_string_to_metric_families(one.http.get("/metrics").text)
    gauges = [s for family in families if family.type == "gauge" for s in family.samples if "version" in s.labels]
    assert gauges and {sample.labels["version"] for sample in gauges} == {"2"}


def queued_beside_a_stream(server: Server, session: str, other: httpx.Client) -> bool:
    """Whether a stream was seen to be queued; a slow client may look too late."""
    body = {"model": LETTERS, "inputs": "a", "max_tokens": 100_000, "stream": True}
    with server.http.stream("POST", f"/v1/sessions/{session}/generate", json=body) as response:
        next(response.iter_lines())
        families = text_string_to_metric_families(other.get("/metrics").text)
    server.suspended(session)
    assert server.metric("recurra_queued_steps") == 0
    return sum(s.value for family in families for s in family.samples if s.name == "recurra_queued_steps") > 0


def test_a_commit_that_another_was_before_is_a_conflict_and_is_discarded(models: Path, tmp_path: Path) -> None:
    from redis_server import RedisServer, server_binary

    if server_binary() is None:
        pytest.skip("no Redis-compatible server here")
    (tmp_path / "redis").mkdir()
    shared = RedisServer(tmp_path / "redis").start()
    two = []
    try:
        for i in range(2):
            (tmp_path / str(i)).mkdir()
            two.append(Server(models, tmp_path / str(i), store=shared.url).start())
        one = two[0]
        one.steps("s", "a", model=LETTERS)
        with ThreadPoolExecutor(8) as pool:
            while not both_moved(two):
                list(pool.map(lambda i: two[i % 2].post("/v1/sessions/s/steps", BODY), range(40)))
        # The last race may have taken the session from this one's memory.
        assert one.post("/v1/sessions/s/steps", BODY).status_code == 200
        shared.kill()
        assert one.post("/v1/sessions/s/steps", BODY).status_code == 503
        shared.start()
        end_of_restart(one)
        assert one.metric("recurra_sessions_evicted_total", reason="store_restarted") >= 1
    finally:
        for each in two:
            each.close()
        shared.kill()


def both_moved(servers: list[Server]) -> bool:
    lost = sum(one.metric("recurra_commits_total", outcome="conflict") for one in servers)
    gone = sum(one.metric("recurra_sessions_evicted_total", reason="discarded") for one in servers)
    return lost > 0 and gone > 0


def end_of_restart(server: Server) -> None:
    """Feed until the store is there again."""
    for _ in range(200):
        if server.post("/v1/sessions/s/steps", BODY).status_code == 200:
            return
    raise AssertionError("the store does not come back")


def test_every_metric_is_moved_by_a_test() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")}
    named = sources.pop(Path(__file__).name).split("each is moved")[1] + "".join(sources.values())
    assert [name for name in offered() if f'"{name}' not in named] == []
