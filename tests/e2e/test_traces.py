"""Traces: a span for the request and, under it, queue, run and commit; nothing of what was asked is in them."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import pytest
from live import ROOT, START_S, MakeServer, Server, environment, free_port, spawn

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

ABOVE = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
WAIT_S = 30.0


class Collector:
    """Takes spans by OTLP over HTTP."""

    def __init__(self) -> None:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take(self.path, body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []
        self.bodies = b""
        self._news = threading.Condition()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        with self._news:
            self.bodies += body
            for part in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resources.append({one.key: one.value.string_value for one in part.resource.attributes})
                self.spans += [span for scope in part.scope_spans for span in scope.spans]
            self._news.notify_all()

    def of(self, session: str) -> list[Any]:
        """The spans of the one request on a session, once its own is there; it ends last."""
        end = time.monotonic() + WAIT_S
        with self._news:
            while True:
                tops = [span for span in self.spans if attributes(span).get("recurra.session") == session]
                if tops:
                    return [span for span in self.spans if span.trace_id == tops[0].trace_id]
                assert self._news.wait(end - time.monotonic()), "the spans do not come"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def attributes(span: Any) -> dict[str, Any]:  # noqa: ANN401 (protobuf has no types)
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    one = Collector()
    yield one
    one.close()


@pytest.fixture
def traced(collector: Collector, fresh: MakeServer) -> Server:
    return fresh(otel_endpoint=collector.url, store="memory").start()


def shape(spans: list[Any]) -> dict[str, int]:
    names = [span.name for span in spans]
    return {name: names.count(name) for name in names}


def test_a_step_has_its_spans_under_its_senders(traced: Server, collector: Collector) -> None:
    headers = {"traceparent": f"00-{ABOVE[0]}-{ABOVE[1]}-01"}
    body = {"model": "tiny-letters", "inputs": "abca"}
    assert traced.http.post("/v1/sessions/s/steps", json=body, headers=headers).status_code == 200
    spans = collector.of("s")
    route = "/v1/sessions/{session_id}/steps"
    assert shape(spans) == {f"POST {route}": 1, "queue": 1, "run": 1, "commit": 1}
    by_name = {span.name.split()[0]: span for span in spans}
    top = by_name.pop("POST")
    assert (top.trace_id.hex(), top.parent_span_id.hex()) == ABOVE
    assert attributes(top) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": route,
        "recurra.session": "s",
    }
    for span in by_name.values():
        assert span.parent_span_id == top.span_id and not span.attributes and not span.events
        assert top.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
    order = [by_name[name] for name in ("queue", "run", "commit")]
    for one, then in pairwise(order):
        assert one.end_time_unix_nano <= then.start_time_unix_nano
    assert {one["service.name"] for one in collector.resources} == {"recurra"}


def test_other_routes_have_spans_too(traced: Server, collector: Collector) -> None:
    traced.create("tiny-letters", "a")
    traced.http.get("/v1/sessions/a-b-c")
    (top,) = collector.of("a-b-c")
    assert top.name == "GET /v1/sessions/{session_id}" and attributes(top)["http.response.status_code"] == 404


def test_single_steps_that_share_a_batch_keep_their_own_traces(traced: Server, collector: Collector) -> None:
    threads = [
        threading.Thread(target=traced.steps, args=(f"s{i}", "a"), kwargs={"model": "tiny-letters"}) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        spans = collector.of(f"s{i}")
        assert shape(spans) == {"POST /v1/sessions/{session_id}/steps": 1, "queue": 1, "run": 1, "commit": 1}


def test_a_long_stream_tells_a_bounded_number(traced: Server, collector: Collector) -> None:
    traced.stream("long", model="tiny-letters", inputs="a", max_tokens=4000)
    spans = collector.of("long")
    assert 10 < len(spans) <= 65
    assert shape(spans)["queue"] == 1


def test_a_bulk_request_is_one_trace(traced: Server, collector: Collector) -> None:
    lines = "".join(f'{{"session": "b{i}", "model": "tiny-letters", "inputs": "ab"}}\n' for i in range(500))
    headers = {"Content-Type": "application/x-ndjson", "traceparent": f"00-{ABOVE[0]}-{ABOVE[1]}-01"}
    assert traced.http.post("/v1/steps", content=lines, headers=headers).status_code == 200
    assert traced.terminate() == 0  # what is left is sent at the end
    spans = [span for span in collector.spans if span.trace_id.hex() == ABOVE[0]]
    assert "POST /v1/steps" in shape(spans) and 3 < len(spans) <= 65


def test_neither_inputs_nor_errors_are_in_them(traced: Server, collector: Collector) -> None:
    body = {"model": "tiny-letters", "inputs": "SECRETWORD", "metadata": 1}
    assert traced.http.post("/v1/sessions/x/steps", json=body, headers={"X-A": "SECRETHEADER"}).status_code == 422
    assert traced.http.get("/v1/sessions/y?cursor=SECRETQUERY").status_code == 404
    collector.of("x"), collector.of("y")
    assert b"SECRET" not in collector.bodies and b"Traceback" not in collector.bodies
    assert all(not span.events and not span.status.message for span in collector.spans)


def test_opentelemetrys_own_variable_turns_them_on(
    collector: Collector, fresh: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    one = fresh(store="memory").start()
    one.http.get("/v1/sessions/s")
    assert collector.of("s")


def test_a_collector_that_is_gone_changes_nothing(fresh: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    one = fresh(otel_endpoint=f"http://127.0.0.1:{free_port()}", store="memory").start()
    assert one.steps("s", "abc", model="tiny-letters")["position"] == 3
    assert one.terminate() == 0


def test_off_is_free_of_opentelemetrys_sdk() -> None:
    code = "import sys, service.__main__, service.tracing as t; print(t.on, 'opentelemetry.sdk' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["False", "False"]


def test_without_the_extra_the_start_ends_with_one_line(models: Any, tmp_path: Any) -> None:  # noqa: ANN401
    blocked = tmp_path / "opentelemetry" / "exporter"
    (blocked / "otlp").mkdir(parents=True)
    code = (
        "import sys; sys.modules['opentelemetry.exporter.otlp.proto.http.trace_exporter'] = None\n"
        "from service.__main__ import main; sys.exit(main())"
    )
    settings = environment(otel_endpoint="http://127.0.0.1:1", models_dir=models, data_dir=tmp_path / "data")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "RECURRA_OTEL_ENDPOINT" in done.stderr and "recurra[otel]" in done.stderr


def test_a_wrong_endpoint_ends_the_start(models: Any, tmp_path: Any) -> None:  # noqa: ANN401
    process = spawn(tmp_path / "log", otel_endpoint="collector:4318", models_dir=models, data_dir=tmp_path / "data")
    assert process.wait(START_S) == 2
    assert "RECURRA_OTEL_ENDPOINT" in (tmp_path / "log").read_text()
