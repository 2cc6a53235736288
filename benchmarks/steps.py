"""Steps over HTTP beside the bare graph: `python -m benchmarks.steps`, about half a minute.

Three measurements take turns on one machine: a loop over the graph in ONNX Runtime alone, one session that is fed one
symbol a request, and 16 sessions at once. Every answer is committed before it is sent. Client and service share the
cores, so the figures are those of a busy machine, not of the service alone.
"""

import argparse
import http.client
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from service.bundle import Bundle, load

SESSIONS = 16
START_S = 30.0


def bare_us(session: onnxruntime.InferenceSession, bundle: Bundle, rows: int, seconds: float) -> float:
    """Median microseconds of a call of one step for `rows` rows, the state carried."""
    manifest = bundle.manifest
    spec = manifest.inputs[0]
    entry = np.zeros((1, rows, *(a for a in spec.shape[2:] if isinstance(a, int))), spec.dtype)
    shapes = [[a if isinstance(a, int) else rows for a in state.shape] for state in manifest.states]
    states = [np.zeros(shape, s.dtype) for shape, s in zip(shapes, manifest.states, strict=True)]
    fetch = [o.name for o in manifest.outputs] + [s.output for s in manifest.states]
    took, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        fed = dict(zip((s.input for s in manifest.states), states, strict=True))
        states = session.run(fetch, {spec.name: entry, **fed})[len(manifest.outputs) :]
        took.append(time.perf_counter() - begun)
    return statistics.median(took) * 1e6


def http_ms(port: int, bundle: Bundle, name: str, seconds: float) -> list[float]:
    """Milliseconds of each request that feeds one step to the session `name`."""
    manifest = bundle.manifest
    step = [0] if manifest.symbols else [[feature.mean for feature in manifest.features]]
    body = json.dumps({"inputs": step, "model": manifest.name, "alternatives": 1})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    took, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        connection.request("POST", f"/v1/sessions/{name}/steps", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        took.append((time.perf_counter() - begun) * 1e3)
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} {text.decode()}")
    return took


def together_per_s(port: int, bundle: Bundle, seconds: float) -> float:
    """Steps a second of SESSIONS sessions, each on a connection and thread of its own."""
    took: list[list[float]] = []
    clients = [
        threading.Thread(target=lambda i=i: took.append(http_ms(port, bundle, f"many-{i}", seconds)))
        for i in range(SESSIONS)
    ]
    begun = time.perf_counter()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    if len(took) != SESSIONS:
        raise RuntimeError("a client failed")
    return sum(map(len, took)) / (time.perf_counter() - begun)


def start(models: Path, data: Path) -> "tuple[subprocess.Popen[bytes], int]":
    """The service on a free port, once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    mine = {"PORT": port, "MODELS_DIR": models, "DATA_DIR": data, "LOG_LEVEL": "warning"}
    environment = os.environ | {f"RECURRA_{name}": str(value) for name, value in mine.items()}
    process = subprocess.Popen([sys.executable, "-m", "service"], env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return process, port
        except OSError:
            pass
        time.sleep(0.05)
    process.kill()
    raise RuntimeError("the service is not ready")


def measure(bundle: Bundle, port: int, seconds: float, rounds: int) -> dict[str, Any]:
    """All three in turn, `rounds` times; medians over the rounds, latencies over all requests."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    graph = onnxruntime.InferenceSession(str(bundle.graph), options, providers=["CPUExecutionProvider"])
    bare, wide, many, single = [], [], [], []
    for _ in range(rounds):
        bare.append(bare_us(graph, bundle, 1, seconds))
        single += http_ms(port, bundle, "one", seconds)
        wide.append(SESSIONS * 1e6 / bare_us(graph, bundle, SESSIONS, seconds))
        many.append(together_per_s(port, bundle, seconds))
    single_ms, bare_ms = statistics.median(single), statistics.median(bare) / 1e3
    return {
        "bare_step_ms": round(bare_ms, 4),
        "http_step_ms": {"p50": round(single_ms, 4), "p99": round(float(np.quantile(single, 0.99)), 4)},
        "http_to_bare": round(single_ms / bare_ms, 2),
        f"bare_steps_per_s_at_{SESSIONS}": round(statistics.median(wide)),
        f"http_steps_per_s_at_{SESSIONS}": round(statistics.median(many)),
        "share_of_bare": round(statistics.median(many) / statistics.median(wide), 4),
    }


def main() -> None:
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--model", default="shakespeare")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    bundle = load(max((chosen.models / chosen.model).iterdir(), key=lambda path: int(path.name)))
    with tempfile.TemporaryDirectory() as data:
        process, port = start(chosen.models.resolve(), Path(data))
        try:
            found = measure(bundle, port, chosen.seconds, chosen.rounds)
        finally:
            process.terminate()
            process.wait(30)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "onnxruntime": onnxruntime.__version__}
    model = {"model": f"{chosen.model}/{bundle.manifest.version}", "hidden": bundle.manifest.hidden}
    print(json.dumps({"benchmark": "steps", **model, **found, **machine}))


if __name__ == "__main__":
    main()
