"""Networks from scripts that know nothing of Recurra, served over HTTP: they say what their modules say."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from live import Server, problem
from safetensors.torch import load_file
from torch import nn

from training.export import export

ROOT = Path(__file__).parents[2]
HERE = "http://127.0.0.1:8000"
SPEC = ROOT / "examples"

pytestmark = pytest.mark.slow

Array = np.ndarray[Any, Any]


@dataclass
class Own:
    """A folder in which the examples were run, and the server of what was exported."""

    folder: Path
    server: Server
    told: str
    """what the classifier's export said"""


def run(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


REGRESSOR = {
    "task": "regressor",
    "memory": "carried",
    "head": ["head"],
    "recurrent": "gru",
    "features": [{"name": "speed", "unit": "1/s"}],
    "targets": [{"name": "wear", "unit": "mm", "min": 0.0, "max": 4.0}],
    "quantiles": [0.1, 0.5, 0.9],
}


def regressor() -> nn.ModuleDict:
    torch.manual_seed(3)
    return nn.ModuleDict({"gru": nn.GRU(1, 5, batch_first=True), "head": nn.Linear(5, 4)}).eval()


@pytest.fixture(scope="module")
def one(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    folder = tmp_path_factory.mktemp("own")
    (folder / "examples").symlink_to(SPEC)
    shutil.copytree(models / "tiny-single", folder / "models" / "tiny-single")
    server = Server(folder / "models", folder)
    server.start()
    readme(folder, server)
    run(str(SPEC / "own_classifier.py"), cwd=folder)
    files = ("own_classifier.safetensors", str(SPEC / "own_classifier.toml"), "own_classifier.npz", "own_labelled.npz")
    options = (part for pair in zip(("--weights", "--spec", "--check", "--data"), files, strict=True) for part in pair)
    told = run(str(ROOT / "cli.py"), "export", "--name", "machine", *options, cwd=folder).stderr
    export(regressor(), REGRESSOR, "wear", folder / "models")
    server.ok(server.post("/v1/models/reload", {}))
    yield Own(folder, server, told)
    server.close()


def readme(folder: Path, server: Server) -> None:
    """The README's commands, as they are pasted; the last one's answer must be a prediction."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- own -->\n```bash\n")[1].split("```")[0]
    commands = re.findall(r"^\S", section, re.MULTILINE)
    assert len(commands) <= 5
    script = section.replace(HERE, server.url).replace(".venv/bin/python", sys.executable)
    script = script.replace(".venv/bin/recurra", f"{sys.executable} {ROOT / 'cli.py'}")
    strict = 'set -euo pipefail\ncurl() { command curl --fail-with-body --max-time 60 "$@"; }\n'
    done = subprocess.run(
        ["bash", "-c", strict + script], cwd=folder, capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"temperature"' in done.stdout and "agrees with your module to" in done.stderr


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SPEC / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        spec.loader.exec_module(module)
    finally:
        sys.argv = argv
    return module


def forecaster(own: Own) -> tuple[nn.Module, Array, Array]:
    """The module with its weights, and the scaler's mean and scale as the script works them out."""
    script = example("own_forecaster")
    module = script.Forecaster().eval()
    module.load_state_dict(torch.load(own.folder / "own_forecaster.pt", weights_only=True))
    data = script.boiler(4000, np.random.default_rng(0))
    return module, data.mean(axis=0), data.std(axis=0)


def test_no_example_knows_recurra() -> None:
    for script in SPEC.glob("own_*.py"):
        source = script.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from)\s+(service|training|cli|recurra)", source, re.MULTILINE)


def test_the_forecaster_says_what_its_module_says(one: Own, name: str) -> None:
    module, mean, scale = forecaster(one)
    values = example("own_forecaster").boiler(120, np.random.default_rng(77)).astype(np.float32)
    with torch.no_grad():
        scaled = module(torch.tensor((values - mean) / scale, dtype=torch.float32)[None])[0, :, 0].numpy()
    expected = scaled * scale[0] + mean[0]
    found: list[float] = []
    for begin, end in ((0, 1), (1, 2), (2, 50), (50, 51), (51, 120)):
        body = one.server.steps(name, values[begin:end].tolist(), model="boiler", predictions="all")
        found += [prediction["mean"]["temperature"] for prediction in body["predictions"]]
        if end == 50:
            one.server.restart()
    np.testing.assert_allclose((np.array(found) - mean[0]) / scale[0], scaled, atol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    sequences = {"sequences": [values.tolist()], "predictions": "all"}
    [predicted] = one.server.ok(one.server.post("/v1/models/boiler/predict", sequences))["predictions"]
    assert [prediction["mean"]["temperature"] for prediction in predicted] == found


def test_the_forecaster_takes_nulls_and_names(one: Own, name: str) -> None:
    one.server.steps(name, [{"temperature": 50.0, "load": 10.0}, {"temperature": None, "load": 11.0}], model="boiler")
    assert [entry["input"] for entry in one.server.log_of(name)] == [[50.0, 10.0], [50.0, 11.0]]
    problem(one.server.post(f"/v1/sessions/{name}/steps", {"inputs": [[50.0, None]]}), 422, "invalid_input")
    body = {"horizon": 3, "future": [{"load": 11.0}, {"load": 12.0}]}
    ahead = one.server.ok(one.server.post(f"/v1/sessions/{name}/forecast", body))["forecast"]
    assert len(ahead) == 3


def test_a_regressor_says_what_holds_at_each_step(one: Own, name: str) -> None:
    module = regressor()
    speeds = np.random.default_rng(2).normal(size=30).astype(np.float32)
    with torch.no_grad():
        expected = module["head"](module["gru"](torch.tensor(speeds)[None, :, None])[0])[0].numpy() * 4.0
    found = one.server.steps(name, speeds.tolist(), model="wear", predictions="all")["predictions"]
    shown = [[p["mean"]["wear"], *(p["quantiles"][q]["wear"] for q in ("0.1", "0.5", "0.9"))] for p in found]
    np.testing.assert_allclose(shown, expected, rtol=1e-5, atol=1e-5)
    assert not any("surprise" in prediction for prediction in found)
    problem(one.server.post(f"/v1/sessions/{name}/forecast", {"horizon": 2}), 422, "task_mismatch")


def test_the_classifier_says_what_its_module_says_of_the_last_window(one: Own, name: str) -> None:
    script = example("own_classifier")
    module = script.Classifier().eval()
    module.load_state_dict(load_file(one.folder / "own_classifier.safetensors"))
    vibration, labels = script.machine(300, np.random.default_rng(5))
    vibration = vibration.astype(np.float32)
    scaled = torch.tensor((vibration - script.LOW) / (script.HIGH - script.LOW), dtype=torch.float32)
    with torch.no_grad():
        windows = [scaled[None, max(0, p - script.WINDOW) : p, None] for p in range(1, 301)]
        expected = np.stack([torch.softmax(module(window)[0], -1).numpy() for window in windows])
    found: list[list[float]] = []
    for begin, end in ((0, 1), (1, 20), (20, 21), (21, 30), (30, 31), (31, 200), (200, 300)):
        body = one.server.steps(name, vibration[begin:end].tolist(), model="machine", predictions="all")
        found += [[one["probabilities"][label] for label in script.LABELS] for one in body["predictions"]]
        if end == 30:
            one.server.restart()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (np.array(found).argmax(axis=1) == labels)[script.WINDOW :].mean() > 0.8


def test_the_export_says_how_well_both_memories_do(one: Own) -> None:
    said = dict(re.findall(r"^memory (.+): share of steps right (\S+)$", one.told, re.MULTILINE))
    assert set(said) == {"carried", "window 24"}
    assert float(said["window 24"]) > float(said["carried"]) + 0.1
    metrics = one.server.ok(one.server.http.get("/v1/models/machine"))["metrics"]["memory"]
    assert f"{metrics['carried']['share of steps right']:.4g}" == said["carried"]
