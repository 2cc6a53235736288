"""The service as a process of its own, the load on it, and tables of what was measured."""

import http.client
import json
import os
import platform
import socket
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from service.bundle import Bundle, load

START_S = 60.0
STOP_S = 60.0
SETTLE_S = 6.0
"""longer than the store takes to spread its journal"""


class Served:
    """A service on a free port of 127.0.0.1; `settings` are its RECURRA_ variables."""

    def __init__(self, models: Path, data: Path, **settings: object) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        mine = {"models_dir": models.resolve(), "data_dir": data, "port": self.port, "log_level": "warning", **settings}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RECURRA_")}
        self._environment = kept | {f"RECURRA_{name.upper()}": str(value) for name, value in mine.items()}
        self.begin()

    def begin(self) -> None:
        """Start the process, and wait until it is ready: `ready_s` after its start."""
        begun = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "service"], env=self._environment, stdout=subprocess.DEVNULL
        )
        while not self._ready():
            if self._process.poll() is not None or time.perf_counter() - begun > START_S:
                self.kill()
                raise RuntimeError("the service is not ready")
            time.sleep(0.01)
        self.ready_s = round(time.perf_counter() - begun, 2)

    def _ready(self) -> bool:
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
                connection.request("GET", "/readyz")
                return connection.getresponse().status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait(STOP_S)

    def stop(self) -> None:
        """SIGTERM, also when it has ended already."""
        self._process.terminate()
        self._process.wait(STOP_S)

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def memory_mb(self) -> float:
        """Resident memory of the process in megabytes of 10^6 bytes."""
        return round(resident_bytes(self.pid) / 1e6, 1)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def cpu_s(self) -> float:
        """Processor time that the process has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def written_bytes(self) -> int:
        """What the process has handed to the file system to write."""
        counters = Path(f"/proc/{self._process.pid}/io").read_text()
        return int(counters.split("write_bytes:")[1].split()[0])

    def client(self, timeout_s: float = 120) -> "Client":
        """A connection that is kept alive."""
        return Client(self.port, timeout_s)

    def start_load(self, kind: str, model: str, seconds: float, **more: object) -> "subprocess.Popen[str]":
        """Begin a load in a process of its own; see benchmarks/load.py for the options."""
        options = {"port": self.port, "kind": kind, "model": model, "seconds": seconds, **more}
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load", *arguments], stdout=subprocess.PIPE, text=True
        )

    def load(self, kind: str, model: str, seconds: float, **more: object) -> dict[str, Any]:
        """What a whole load measured, and how much of a core the service took meanwhile."""
        used, begun = self.cpu_s(), time.perf_counter()
        found = load_result(self.start_load(kind, model, seconds, **more))
        if found["cut"]:
            raise RuntimeError("the service ended a connection")
        return {**found, "service_cores": round((self.cpu_s() - used) / (time.perf_counter() - begun), 2)}


class Client:
    """One kept connection, one request at a time."""

    def __init__(self, port: int, timeout_s: float = 120) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)

    def reconnect(self) -> None:
        """Connect again: the service closes connections that rest for seconds."""
        self._connection.close()
        self._connection.connect()

    def ask(self, method: str, path: str, body: object = None) -> Any:  # noqa: ANN401 (any JSON)
        """The answer's JSON; raises RuntimeError when the request is refused."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        sent = msgspec.json.encode(body) if body is not None else None
        self._connection.request(method, path, sent, headers)
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {text.decode()}")
        return msgspec.json.decode(text) if text else None

    def timed_ms(self, method: str, path: str, body: object = None) -> float:
        """Milliseconds from sending a request to its whole answer."""
        begun = time.perf_counter()
        self.ask(method, path, body)
        return (time.perf_counter() - begun) * 1e3


def resident_bytes(pid: int) -> int:
    """VmRSS of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def load_result(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What a load measured, once it has ended."""
    printed, _ = process.communicate()
    if process.returncode:
        raise RuntimeError("the load failed")
    found: dict[str, Any] = json.loads(printed)
    return found


def newest(models: Path, name: str) -> Bundle:
    """A model's newest bundle."""
    return load(max((models / name).glob("[1-9]*"), key=lambda path: int(path.name)))


def file_bytes(data: Path) -> int:
    """What the data file holds, once the store is at rest."""
    time.sleep(SETTLE_S)
    with closing(sqlite3.connect(f"file:{data / 'sessions.sqlite'}?mode=ro", uri=True)) as db:
        size, pages, free = (
            db.execute(f"PRAGMA {what}").fetchone()[0] for what in ("page_size", "page_count", "freelist_count")
        )
    return int(size * (pages - free))


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p99."""
    return {"p50": round(statistics.median(values), 4), "p99": round(float(np.quantile(values, 0.99)), 4)}


def say(text: str) -> None:
    """Progress, to standard error: the last line of standard output is JSON."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows in columns."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def finish(benchmark: str, found: dict[str, Any]) -> None:
    """The one JSON line at the end."""
    print("\n" + json.dumps({"benchmark": benchmark, **found, "cpus": os.cpu_count(), "machine": platform.machine()}))
