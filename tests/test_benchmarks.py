"""The benchmarks measure what they say; ratios of one run within wide bounds notice what got several times slower."""

import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny import SHIPPED, newest

from benchmarks import report
from benchmarks.bare import Bare
from benchmarks.generator import Generator, Load, stream
from benchmarks.served import Served

MODEL = "shakespeare"
SECONDS = 1.0

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="the load generator needs a C compiler")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(SHIPPED, tmp_path_factory.mktemp("data")) as service:
        yield service


def streamed_per_s(served: Served, sessions: int) -> float:
    found = served.load("stream", MODEL, SECONDS, connections=sessions, first=1000 * sessions)
    return float(found["per_s"])


def test_streams_keep_a_good_part_of_the_bare_loop(served: Served) -> None:
    bare = Bare(newest(SHIPPED, MODEL))
    shares = [streamed_per_s(served, 16) / bare.steps_per_s(16, SECONDS) for _ in range(2)]
    assert max(shares) >= 0.35


def test_sessions_together_are_faster_than_one_after_another(served: Served) -> None:
    assert streamed_per_s(served, 15) >= 1.5 * streamed_per_s(served, 1)


class Canned(BaseHTTPRequestHandler):
    """Answers each request with two events in one chunk, in three writes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    bodies: list[bytes]

    def do_POST(self) -> None:
        type(self).bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in (b"1c\r\nevent: tok", b"en\n\nevent: token\n\n\r\n0\r\n", b"\r\n"):
            self.wfile.write(part)
            time.sleep(0.001)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def canned() -> Iterator[int]:
    Canned.bodies = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Canned) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield int(server.server_address[1])
        server.shutdown()
        thread.join()


@needs_compiler
def test_the_generator_counts_marks_that_come_in_two_parts(canned: int) -> None:
    load = Load(
        "/{session}", "{session} {number} {token} {start}", connections=2, sessions=4, vocabulary=5, mark="event: token"
    )
    with Generator(canned, load) as generator:
        found = generator.measure(0.2, warm_s=0.0)
    assert found.answers > 0
    assert abs(found.marks - 2 * found.answers) <= 2 * load.connections
    asked = [body.decode().split() for body in Canned.bodies]
    assert {number for _, number, _, _ in asked} == {"1", "2", "3", "4"}
    assert len({session for session, *_ in asked}) == 4
    assert {token for _, _, token, _ in asked} <= {"0", "1", "2", "3", "4"}
    assert sum(start == "true" for *_, start in asked) == 4


@needs_compiler
def test_the_generator_ends_at_what_must_not_come(canned: int) -> None:
    with pytest.raises(RuntimeError, match="the service says"), Generator(canned, Load("/", "", error="event: token")):
        pass


@needs_compiler
def test_the_generator_ends_at_a_refusal(served: Served) -> None:
    with pytest.raises(RuntimeError, match="404 Not Found"), Generator(served.port, stream("nothing", 1)):
        pass


def test_ratios_are_medians_of_rounds() -> None:
    rounds = report.Rounds()
    for ours, limit in ((1.0, 2.0), (8.0, 10.0), (9.0, 10.0)):
        rounds.add("fp32 1", "recurra", ours)
        rounds.add("fp32 1", "bare loop", limit)
    assert rounds.ratio("fp32 1", "recurra", "bare loop") == 0.8
    assert rounds.median("fp32 1", "recurra") == 8.0


def test_a_page_takes_the_tables_of_its_benchmark_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before <!-- one -->old<!-- end of one --> <!-- two -->kept<!-- end of two -->")
    report.Report("one", [report.Table("Costs", ["a", "b"], [[1, "x"]])]).write(page)
    text = page.read_text()
    assert "| 1 | x |" in text and "old" not in text
    assert text.startswith("before <!-- one -->") and "<!-- two -->kept<!-- end of two -->" in text
