"""The examples, run as their readers run them: as scripts, against a running service."""

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import wave
from array import array
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from live import ROOT, MakeServer, Server

RATE = 16_000
TOKENS = 10_000


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]


def environment() -> dict[str, str]:
    """The client is found also where it was not installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "client"), "PYTHONUNBUFFERED": "1"}


def run(script: str, *arguments: object, code: int = 0) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(command(script, *arguments), env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_every_example_on_the_client_is_run_by_a_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    scripts = [path.name for path in (ROOT / "examples").glob("*.py") if "recurra_client" in path.read_text()]
    assert len(scripts) >= 3 and [name for name in scripts if f'"{name}"' not in source] == []


@pytest.mark.parametrize("page", ["README.md", "client/README.md"])
def test_the_python_of_the_pages_runs_as_pasted(page: str, server: Server) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if "recurra_client" in block]
    told = code.replace("http://127.0.0.1:8000", server.url)
    done = subprocess.run([sys.executable, "-c", told], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "'temperature': " in done.stdout and len(done.stdout) > 150


# ---------------------------------------------------------------------- sensor fleet


def test_the_fleet_finds_the_failing_pump_and_feeds_nothing_twice(server: Server, name: str) -> None:
    arguments = ("--url", server.url, "--fleet", name, "--pumps", 30, "--hours", 36, "--failing", 7)
    first = run("sensor_fleet.py", *arguments)
    assert f"look at {name}-7: " in first.stdout
    assert len(re.findall(r"in \d h: +-?\d+\.\d °C", first.stdout)) == 3
    states = [server.state(f"{name}-{pump}") for pump in range(30)]
    assert run("sensor_fleet.py", *arguments).stdout == first.stdout
    assert [server.state(f"{name}-{pump}") for pump in range(30)] == states
    assert {server.position(f"{name}-{pump}") for pump in range(30)} == {36}


def test_the_fleet_goes_on_after_it_was_killed(server: Server, name: str) -> None:
    arguments = ("--url", server.url, "--fleet", name, "--pumps", 20, "--hours", 48)
    with subprocess.Popen(command("sensor_fleet.py", *arguments), env=environment(), stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None and b"hour 24" in killed.stdout.readline()
        killed.send_signal(signal.SIGKILL)
    run("sensor_fleet.py", *arguments)
    assert {server.position(f"{name}-{pump}") for pump in range(20)} == {48}


# ---------------------------------------------------------------------- text stream


def text_options(server: Server, *more: object) -> tuple[object, ...]:
    return ("--url", server.url, "--tokens", TOKENS, "--seed", 3, *more)


def test_the_text_survives_kill_9_of_the_service(mortal: Server, server: Server, name: str) -> None:
    body = {"model": "shakespeare", "inputs": "ROMEO.\n", "max_tokens": TOKENS, "temperature": 0.7, "seed": 3}
    whole = server.generate(name, **body)["text"]
    told = command("text_stream.py", *text_options(mortal, "--session", name))
    with subprocess.Popen(told, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writing:
        assert writing.stdout is not None and writing.stderr is not None
        begun = writing.stdout.read(200)
        mortal.restart()
        text = (begun + writing.stdout.read()).decode()
        ending = writing.stderr.read().decode()
    assert writing.returncode == 0 and text == f"{whole}\n"
    assert ending.strip() == f"length at position {TOKENS + 7}"
    assert mortal.position(name) == TOKENS + 7
    assert 0 < mortal.metric("recurra_tokens_total", model="shakespeare") < TOKENS  # it was killed on the way


def test_a_text_without_a_name_leaves_no_session(server: Server) -> None:
    def lives() -> set[str]:
        listed = server.ok(server.http.get("/v1/sessions", params={"model": "shakespeare", "limit": 1000}))
        return {one["id"] for one in listed["data"]}

    before = lives()
    run("text_stream.py", "--url", server.url, "--tokens", 20)
    assert lives() <= before


# ---------------------------------------------------------------------- voice activity


class Ear:
    """What the script asks of the service, answered by a loudness in place of the network."""

    def __init__(self) -> None:
        ear = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                ear.bodies.append(body)
                chunks = body["inputs"]["input"]
                ear.position += len(chunks)
                loud = [max(map(abs, chunk)) for chunk in chunks]
                predictions = [{"position": i, "outputs": {"output": [[p]]}} for i, p in enumerate(loud, 1)]
                answer = {"session": "ear", "epoch": 1, "position": ear.position, "steps": len(chunks)}
                self._answer(200, {**answer, "predictions": predictions})

            def do_DELETE(self) -> None:
                ear.deleted += 1
                self.send_response(204)
                self.end_headers()

            def _answer(self, status: int, body: object) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None: ...

        self.bodies: list[Any] = []
        self.position = 0
        self.deleted = 0
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def ear() -> Iterator[Ear]:
    one = Ear()
    yield one
    one.close()


def record(path: Path, *stretches: tuple[float, float], rate: int = RATE) -> Path:
    """A WAV file of tones: (seconds, loudness)."""
    samples = array("h")
    for seconds, loudness in stretches:
        samples += array("h", [int(32000 * loudness * math.sin(i / 3)) for i in range(int(seconds * rate))])
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    return path


def test_speech_is_found_in_a_recording(ear: Ear, tmp_path: Path) -> None:
    path = record(tmp_path / "a.wav", (1.024, 0), (2.048, 1), (1.024, 0), (0.3, 1), (0.01, 0))
    told = run("voice_activity.py", path, "--url", ear.url).stdout
    found = [tuple(map(float, re.findall(r"\d+\.\d+", line))) for line in told.splitlines()]
    assert [begin for begin, _ in found] == pytest.approx([1.02, 4.1], abs=0.04)
    assert [end for _, end in found] == pytest.approx([3.07, 4.4], abs=0.04)
    chunks = [chunk for body in ear.bodies for chunk in body["inputs"]["input"]]
    assert {len(chunk) for chunk in chunks} == {512} and len(chunks) == math.ceil(4.406 * RATE / 512)
    assert all(abs(one) <= 1 for chunk in chunks for one in chunk)
    assert {(body["model"], body["predictions"]) for body in ear.bodies} == {("silero-vad", "all")}
    assert len(ear.bodies) < len(chunks) / 20 and ear.deleted == 1


def test_a_recording_of_another_kind_is_refused_with_the_way_out(ear: Ear, tmp_path: Path) -> None:
    path = record(tmp_path / "a.wav", (0.1, 1), rate=8000)
    assert "ffmpeg" in run("voice_activity.py", path, "--url", ear.url, code=1).stderr
    assert "sounddevice" in run("voice_activity.py", "--url", ear.url, code=1).stderr


@pytest.mark.slow
def test_silero_hears_with_the_memory_of_a_session(fresh: MakeServer, tmp_path: Path) -> None:
    """What the script is told of every chunk is what the graph says in this process, chunk after chunk."""
    np, onnxruntime = pytest.importorskip("numpy"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    found = importlib.util.find_spec("silero_vad")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package silero-vad is not installed")
    graph = Path(found.submodule_search_locations[0]) / "data" / "silero_vad.onnx"
    models = tmp_path / "models"
    models.mkdir()
    answers = ["--set", "constants.sr=16000", "--set", "sizes.input.1=512", "--set", "context.input=64"]
    added = [sys.executable, "-m", "cli", "add", str(graph), "--name", "silero-vad", "--models", str(models), *answers]
    done = subprocess.run(added, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    one = fresh(models=models, store="memory").start()
    path = record(tmp_path / "a.wav", (0.5, 0), (1.0, 0.8), (0.5, 0.01))
    run("voice_activity.py", path, "--url", one.url)

    network, state, before = onnxruntime.InferenceSession(str(graph)), np.zeros((2, 1, 128), "f4"), np.zeros(64, "f4")
    with wave.open(str(path), "rb") as file:
        samples = np.frombuffer(file.readframes(10**6), "<i2").astype("f4") / 32768
    chunks = np.append(samples, np.zeros(-len(samples) % 512, "f4")).astype("f4").reshape(-1, 512)
    expected = []
    for chunk in chunks:
        given = np.concatenate([before, chunk])[None]
        out, state = network.run(None, {"input": given, "state": state, "sr": np.array(16000)})
        expected.append(float(out[0, 0]))
        before = chunk[-64:]
    answer = one.steps("ear", {"input": chunks.tolist()}, model="silero-vad", predictions="all")
    heard = [float(np.ravel(prediction["outputs"]["output"])[0]) for prediction in answer["predictions"]]
    assert heard == pytest.approx(expected, abs=1e-5)
