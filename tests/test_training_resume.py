"""Unbroken, stopped by Ctrl-C and killed outright: the same weights to the last bit, whatever the run has switched on.

Every run here is a process of its own, started by the command that users start.
"""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from training import checkpoint
from training.__main__ import app

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
TEXT = "to be or not to be, that is the question. " * 60
STEPS = 24
SIZES = ["model.layers=2", "model.hidden=12", "model.embedding=12", "sample.length=5", "train.batch=4", "train.steps=8"]
SIZES += [f"train.max_steps={STEPS}", "train.evaluate_steps=8", "train.warmup_steps=5", "train.checkpoint_minutes=0"]
SIZES += ["train.device=cpu"]
DROPPED = ["model.dropout=0.3", "model.weight_dropout=0.3", "model.input_dropout=0.1"]
EVERYTHING = [*DROPPED, "model.locked=true", "model.skip=true", "model.norm=true", "model.tied=true"]
EVERYTHING += ["train.average=0.9", "train.accumulate=2", "train.patience=50"]


def command(folder: Path, out: str, overrides: list[str], *more: str, processes: int = 1) -> list[str]:
    """`train` as a command line, in one process or under torchrun."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(TEXT)
    start = [sys.executable, "-m"]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start += ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1"]
        start += ["--master-port", str(port), "-m"]
    keys = [part for key in [*SIZES, *overrides] for part in ("--set", key)]
    return [
        *start,
        "training",
        "train",
        "--data",
        str(text),
        "--out",
        str(folder / out),
        "--no-evaluation",
        *keys,
        *more,
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def finish(arguments: list[str]) -> str:
    """Run to the end; what was said."""
    if arguments[:4] == [sys.executable, "-m", "training", "train"]:  # torch need not be loaded again
        torch.set_num_threads(1)
        result = CliRunner().invoke(app, arguments[3:])
        assert result.exit_code == 0, result.output
        return result.stdout
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def end(arguments: list[str], run: Path, number: signal.Signals) -> None:
    """Send a run a signal in the middle: when it writes its first evaluation to a pipe that nobody reads yet."""
    pipe = run.with_suffix(".pipe")
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [*arguments, "--log-json", str(pipe)], stdout=subprocess.DEVNULL, env=environment(), start_new_session=True
    )
    limit = time.monotonic() + 240
    while not (run / "history.json").exists():  # written just before
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    if number is signal.SIGKILL:  # of everybody; torchrun's workers are in sessions of their own
        for pid in [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]:
            os.kill(pid, number)
    else:
        os.killpg(process.pid, number)  # as a terminal does
    reader = threading.Thread(target=drain, args=(pipe,), daemon=True)
    reader.start()
    process.wait(timeout=240)
    writer = os.open(pipe, os.O_RDWR)  # lets a reader that waits for one go on, and see the end
    pipe.unlink()
    os.close(writer)
    reader.join()
    assert 0 < progress(run) < STEPS


def progress(run: Path) -> int:
    """The step of the run's newest checkpoint."""
    return int(json.loads((checkpoint.find(run, "last") / "progress.json").read_text())["step"])


def drain(pipe: Path) -> None:
    """Read whatever is written, writer after writer."""
    with contextlib.suppress(FileNotFoundError):
        while True:
            pipe.read_bytes()


def digests(run: Path) -> dict[str, str]:
    """sha256 of all that a run keeps of its weights and its state."""
    files = [*run.glob("last/*.safetensors"), *run.glob("best/*.safetensors")]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize(
    "overrides",
    [
        EVERYTHING,
        [*DROPPED, "model.cell=gru", "model.chrono=20", "train.precision=bf16", "train.average=0.9"],
    ],
    ids=["everything", "bf16"],
)
def test_ctrl_c_and_kill_9_change_no_bit(tmp_path: Path, overrides: list[str]) -> None:
    finish(command(tmp_path, "whole", overrides))
    whole = digests(tmp_path / "whole")
    assert "best/model.safetensors" in whole and "last/state.safetensors" in whole
    for number in (signal.SIGINT, signal.SIGKILL):
        run = tmp_path / number.name
        end(command(tmp_path, run.name, overrides), run, number)
        finish(command(tmp_path, run.name, overrides, "--resume"))
        assert digests(run) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SIGINT", "SIGKILL", "text.txt", "whole"]


def curve(run: Path) -> list[float]:
    return [line["train"] for line in json.loads((run / "history.json").read_text())]


def test_two_processes_have_the_loss_curve_of_one(tmp_path: Path) -> None:
    """To 1e-5 for 20 steps and to 1e-3 for 100, means of five steps each."""
    every = ["train.max_steps=100", "train.max_minutes=0", "train.evaluate_steps=5", "train.batch=5"]
    every += ["train.precision=fp32", "model.dropout=0"]
    finish(command(tmp_path, "one", every))
    said = finish(command(tmp_path, "two", every, processes=2))
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == 20 and one[-1] < one[0]
    apart = [abs(a - b) for a, b in zip(one, two, strict=True)]
    assert max(apart[:4]) < 1e-5 and max(apart) < 1e-3
    assert said.count("parameters") == 1  # one voice
    states = [load_file(tmp_path / run / "last" / "state.safetensors") for run in ("one", "two")]
    assert states[0]["carried.0"].shape == states[1]["carried.0"].shape == (2, 5, 12)
    assert (states[0]["carried.0"] - states[1]["carried.0"]).abs().max() < 1e-3


def test_two_processes_resume_to_the_bits_of_two_unbroken_ones(tmp_path: Path) -> None:
    finish(command(tmp_path, "whole", EVERYTHING, processes=2))
    for number in (signal.SIGINT, signal.SIGKILL):
        run = tmp_path / number.name
        end(command(tmp_path, run.name, EVERYTHING, processes=2), run, number)
        finish(command(tmp_path, run.name, EVERYTHING, "--resume", processes=2))
        assert digests(run) == digests(tmp_path / "whole")
