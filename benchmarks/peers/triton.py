"""NVIDIA Triton: its Python backend, sequences batched, the wheel's own server without a GPU.

`make bench-triton` installs the wheel (`nvidia-pytriton`) into an environment beside the project's. It bundles the
server and the Python backend; the ONNX Runtime backend is in no wheel.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.generator import Load
from benchmarks.peers.start import START_S, STOP_S, free_port
from service.bundle import Bundle

ENVIRONMENT = Path(".venv/triton")
BODY = {
    "parameters": {"sequence_id": "{number}", "sequence_start": "{start}"},
    "inputs": [{"name": "token", "datatype": "INT64", "shape": [1, 1], "data": ["{token}"]}],
}

CONFIG = """
name: "step"
backend: "python"
max_batch_size: 64
input [{ name: "token" data_type: TYPE_INT64 dims: [1] }]
output [{ name: "id" data_type: TYPE_INT64 dims: [1] }, { name: "value" data_type: TYPE_FP32 dims: [1] }]
instance_group [{ kind: KIND_CPU count: 1 }]
sequence_batching {
  max_sequence_idle_microseconds: 600000000
  control_input [{ name: "start" control [{ kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] }] }]
  oldest { max_candidate_sequences: 4096 }
}
parameters { key: "graph" value { string_value: "GRAPH" } }
parameters { key: "threads" value { string_value: "THREADS" } }
"""


def installed() -> bool:
    """Whether `make bench-triton` has been run."""
    return (ENVIRONMENT / "bin" / "python").exists()


def steps(connections: int, **more: Any) -> Load:  # noqa: ANN401 (fields of Load)
    """One step of a sequence a request."""
    body = json.dumps(BODY)
    for name in ("number", "start", "token"):
        body = body.replace(f'"{{{name}}}"', f"{{{name}}}")
    return Load("/v2/models/step/infer", body, connections=connections, **more)


class Triton:
    """The server with the one model, in a process of its own."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._bundle, self._threads = bundle, threads
        self.port = free_port()

    def __enter__(self) -> "Triton":
        """Start it; the model is ready."""
        self._folder = tempfile.TemporaryDirectory()
        packages = next((ENVIRONMENT / "lib").glob("python*/site-packages")).resolve()
        server = packages / "pytriton" / "tritonserver"
        backends, models = self._lay_out(server)
        command = [server / "bin" / "tritonserver", "--model-repository", models, "--backend-directory", backends]
        command += ["--http-address", "127.0.0.1", "--http-port", self.port, "--allow-grpc", "false"]
        command += [
            "--exit-timeout-secs",
            "2",
            "--allow-metrics",
            "false",
            "--log-info",
            "false",
            "--log-warning",
            "false",
        ]
        # The stub dies without the libraries, and finds its packages by the python that is first on the path.
        path = f"{(ENVIRONMENT / 'bin').resolve()}:{os.environ['PATH']}"
        environment = {**os.environ, "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"), "PATH": path}
        self._log = (Path(self._folder.name) / "log").open("wb")
        self._process = subprocess.Popen(list(map(str, command)), env=environment, stdout=self._log, stderr=self._log)
        self._wait()
        return self

    def _lay_out(self, server: Path) -> tuple[Path, Path]:
        """The backend with the stub of this Python beside it, and a repository of one model."""
        backends, model = Path(self._folder.name) / "backends", Path(self._folder.name) / "models" / "step"
        shutil.copytree(server / "backends", backends)
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        shutil.copy(server / "python_backend_stubs" / python / "triton_python_backend_stub", backends / "python")
        (model / "1").mkdir(parents=True)
        shutil.copy(Path(__file__).with_name("triton_model.py"), model / "1" / "model.py")
        config = CONFIG.replace("GRAPH", str(self._bundle.graph.resolve())).replace("THREADS", str(self._threads))
        (model / "config.pbtxt").write_text(config)
        return backends, model.parent

    def _wait(self) -> None:
        end, url = time.monotonic() + START_S, f"http://127.0.0.1:{self.port}/v2/models/step/ready"
        while self._process.poll() is None and time.monotonic() < end:
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return
            except OSError:
                time.sleep(0.05)
        self._process.kill()
        raise RuntimeError("Triton is not ready: " + Path(self._log.name).read_text()[-3000:])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        finally:
            self._process.kill()
            self._log.close()
            self._folder.cleanup()
