"""The load generator in C, compiled when it is first needed, and what it says.

It shares the machine with what it loads, so it must cost little: its own ceiling against a server that does nothing
is in the tables of `posts`.
"""

import atexit
import functools
import json
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import msgspec

SOURCE = Path(__file__).with_name("loadgen.c")
WARM_S = 0.5
STREAM: dict[str, Any] = {"mark": "event: token", "error": "event: error", "gaps": True}
LINES: dict[str, Any] = {"mark": '"session":', "error": '"error":'}
"""what is counted, and what must not come"""


@dataclass(frozen=True)
class Phase:
    """What was counted between two moments."""

    seconds: float
    answers: int
    marks: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    cpu_s: float

    @property
    def answers_per_s(self) -> float:
        """Whole answers a second."""
        return self.answers / self.seconds

    @property
    def marks_per_s(self) -> float:
        """Tokens or lines a second."""
        return self.marks / self.seconds

    @property
    def cores(self) -> float:
        """What the generator itself took of the machine."""
        return self.cpu_s / self.seconds


@dataclass(frozen=True)
class Load:
    """What is sent: see benchmarks/loadgen.c for what may stand in path and body."""

    path: str
    body: str
    type: str = "application/json"
    connections: int = 1
    sessions: int = 0
    """one a line of each connection's request, or more: they take turns"""
    lines: int = 1
    first: int = 0
    vocabulary: int = 1
    mark: str = ""
    error: str = ""
    gaps: bool = False
    """the milliseconds are those between marks, not of whole answers"""

    def path_of(self, session: str) -> str:
        """Of a request that is sent by other means."""
        return self.path.replace("{session}", session)

    def body_of(self, session: str, token: int, start: bool) -> Any:  # noqa: ANN401 (any JSON)
        """The JSON of a request that is sent by other means."""
        said = {"session": session, "number": self.first + 1, "token": token, "start": str(start).lower()}
        text = self.body
        for name, value in said.items():
            text = text.replace(f"{{{name}}}", str(value))
        return json.loads(text)

    def arguments(self, port: int) -> list[str]:
        """For the command line."""
        said = {
            "p": port,
            "u": self.path,
            "b": self.body,
            "t": self.type,
            "c": self.connections,
            "s": self.sessions,
            "l": self.lines,
            "f": self.first,
            "v": self.vocabulary,
            "m": self.mark,
            "e": self.error,
        }
        flags = [part for name, value in said.items() if value != "" for part in (f"-{name}", str(value))]
        return [*flags, "-g"] if self.gaps else flags


def steps(model: str, connections: int, **more: Any) -> Load:  # noqa: ANN401 (fields of Load)
    """One step a request, each connection with a session of its own."""
    body = msgspec.json.encode({"model": model, "inputs": ["TOKEN"], "alternatives": 1}).decode()
    return Load("/v1/sessions/{session}/steps", body.replace('"TOKEN"', "{token}"), connections=connections, **more)


def stream(model: str, connections: int, **more: Any) -> Load:  # noqa: ANN401 (fields of Load)
    """A long generate a connection, read as server-sent events."""
    body = {"model": model, "inputs": [0], "max_tokens": 100_000, "temperature": 1.0, "stream": True}
    text = msgspec.json.encode(body).decode()
    return Load("/v1/sessions/{session}/generate", text, connections=connections, **STREAM, **more)


def bulk(model: str, lines: int, connections: int, **more: Any) -> Load:  # noqa: ANN401 (fields of Load)
    """One step for each of many sessions a request."""
    line = f'{{"session": "{{session}}", "inputs": [{{token}}], "model": "{model}"}}'
    return Load("/v1/steps", line, "application/x-ndjson", connections=connections, lines=lines, **LINES, **more)


class Generator:
    """A load that runs while the `with` lasts."""

    def __init__(self, port: int, load: Load) -> None:
        self._command = [str(program()), *load.arguments(port)]

    def __enter__(self) -> "Generator":
        """Start it; every connection has had its first answer."""
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            self._line()
        except RuntimeError:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End it."""
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def phase(self) -> Phase:
        """What was counted since the last phase, or since the start."""
        _pipe(self._process.stdin).write("\n")
        _pipe(self._process.stdin).flush()
        return Phase(**self._line())

    def measure(self, seconds: float, warm_s: float = WARM_S) -> Phase:
        """Run for a while, then count for a while."""
        time.sleep(warm_s)
        self.phase()
        time.sleep(seconds)
        return self.phase()

    def _line(self) -> dict[str, Any]:
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise RuntimeError(_pipe(self._process.stderr).read().strip() or "the load generator ended")
        found: dict[str, Any] = json.loads(line)
        return found


def measure(port: int, load: Load, seconds: float, warm_s: float = WARM_S) -> Phase:
    """A load by itself."""
    with Generator(port, load) as generator:
        return generator.measure(seconds, warm_s)


@functools.cache
def program() -> Path:
    """The compiled generator, in a folder that ends with the process."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("the load generator needs a C compiler: cc is not on the path")
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    subprocess.run([compiler, "-O2", "-o", f"{folder}/loadgen", SOURCE], check=True)
    return Path(folder) / "loadgen"


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
