"""Starting a peer: in a process of its own on a free port of 127.0.0.1, ended with the `with`."""

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn

from benchmarks.generator import LINES, STREAM, Load
from service.bundle import Bundle, load

START_S = 60.0
STOP_S = 30.0


class Peer:
    """One of the modules beside this one, serving a bundle's graph."""

    def __init__(self, name: str, bundle: Bundle, threads: int) -> None:
        self.port = free_port()
        options = {"bundle": bundle.path, "port": self.port, "threads": threads}
        arguments = [part for option, value in options.items() for part in (f"--{option}", str(value))]
        self._command = [sys.executable, "-m", f"benchmarks.peers.{name}", *arguments]

    def __enter__(self) -> "Peer":
        """Start it; it listens."""
        self._process = subprocess.Popen(self._command)
        self.pid = self._process.pid
        end = time.monotonic() + START_S
        while not listens(self.port):
            if self._process.poll() is not None or time.monotonic() > end:
                self._process.kill()
                self._process.wait(STOP_S)
                raise RuntimeError(f"{self._command[2]} is not ready")
            time.sleep(0.02)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End it."""
        self._process.kill()
        self._process.wait(STOP_S)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Whether somebody does."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def serve(build: Callable[[Bundle, int], Any]) -> None:
    """What each peer's command does: serve its application under uvicorn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    app = build(load(chosen.bundle), chosen.threads)
    uvicorn.run(app, host="127.0.0.1", port=chosen.port, access_log=False, log_level="warning")


# ---------------------------------------------------------------------- what they are sent

ONE = '{"session": "{session}", "token": {token}}'


def steps(connections: int, **more: Any) -> Load:  # noqa: ANN401 (fields of Load)
    """One step a request."""
    return Load("/step", ONE, connections=connections, **more)


def stream(connections: int, **more: Any) -> Load:  # noqa: ANN401 (fields of Load)
    """Tokens without end, as server-sent events."""
    return Load("/generate", ONE, connections=connections, **STREAM, **more)


def bulk(lines: int, connections: int, **more: Any) -> Load:  # noqa: ANN401 (fields of Load)
    """One step for each of many sessions a request."""
    return Load("/steps", ONE, "application/x-ndjson", connections=connections, lines=lines, **LINES, **more)
