"""The README says what is so: its commands run as pasted, its settings and its tree are those of the code."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny import shipped

from service.settings import PREFIX, Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HERE = "127.0.0.1:8000"
START_S = 40.0

# Every request must succeed: curl answers a status of 400 and above with a failure, and the script ends there.
STRICT = 'set -euo pipefail\ncurl() { command curl --fail-with-body --max-time 60 "$@"; }\n'


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The service with the shipped models on a data folder; killed with -9 at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    mine = {"PORT": where.partition(":")[2], "DATA_DIR": str(folder / "data"), "MODELS_DIR": str(ROOT / "models")}
    with (folder / "service.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "service"],
            cwd=ROOT,
            env={**kept, **{PREFIX + name: value for name, value in mine.items()}},
            stdout=log,
            stderr=log,
        )
    try:
        wait_until_ready(where, process)
        yield where
    finally:
        process.kill()
        process.wait(30)


def wait_until_ready(where: str, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{where}/readyz", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the service is not ready")


def bash(script: str, where: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", STRICT + script.replace(HERE, where)], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found is not None, f"README.md has no section {title!r}"
    return found[1]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def between(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n(.*?)<!-- end of {marker} -->", README, re.DOTALL)
    assert found is not None, f"README.md lacks the marks of the {marker}"
    return found[1].strip()


@pytest.mark.slow
def test_the_tour_passes_twice_in_a_row_against_a_fresh_server(tmp_path: Path) -> None:
    tour = "".join(blocks(section("A tour with curl"), "bash"))
    assert tour.count("curl ") >= 15
    assert "jq" not in tour and "--json" not in tour
    with served(tmp_path) as where:
        first = bash(tour, where, tmp_path)
        again = bash(tour, where, tmp_path)
    assert "event: done" in first
    assert "event: done" in again


@pytest.mark.slow
def test_the_demonstration_prints_what_the_readme_shows(tmp_path: Path) -> None:
    told = section("It remembers")
    commands, shown = blocks(told, "bash"), blocks(told, "text")
    assert len(commands) == len(shown) == 2
    for command, answer in zip(commands, shown, strict=True):
        with served(tmp_path) as where:  # ends with kill -9
            assert bash(command, where, tmp_path) == answer


@pytest.mark.slow
def test_the_lines_for_tritons_client_run_twice_in_a_row(tmp_path: Path) -> None:
    (lines,) = blocks(section("With Triton's client"), "python")
    with served(tmp_path) as where:
        script = [sys.executable, "-W", "error", "-c", lines.replace(HERE, where)]
        first, again = (subprocess.run(script, capture_output=True, text=True, timeout=120) for _ in range(2))
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert [line.split()[0] for line in first.stdout.splitlines()] == ["3", "6"]
    assert again.stdout == first.stdout


@pytest.mark.slow
def test_the_requests_of_the_durability_page_pass_twice_in_a_row(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "durability.md").read_text(encoding="utf-8")
    requests = "".join(block for block in blocks(page, "bash") if "curl " in block)
    assert requests.count("curl ") >= 10
    # The second of two steps on one position is there to be refused.
    tolerant = requests.replace('"position": 5}\'\n', '"position": 5}\' || true\n')
    with served(tmp_path) as where:
        for _ in range(2):
            assert "position_mismatch" in bash(tolerant, where, tmp_path)


def settings_table() -> str:
    rows = ["| variable | default | |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        said = (field.description or "").replace("<", "&lt;")
        rows.append(f"| `{PREFIX}{name.upper()}` | `{field.default}` | {said} |")
    return "\n".join(rows)


def test_the_settings_table_is_that_of_the_code() -> None:
    assert between("settings") == settings_table()


def newest(model: str) -> dict[str, Any]:
    """The metrics in the manifest of a shipped model's greatest version."""
    versions = [int(path.name) for path in (ROOT / "models" / model).iterdir() if path.name.isdecimal()]
    manifest = ROOT / "models" / model / str(max(versions)) / "manifest.json"
    found: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))["metrics"]
    return found


def text_figures(m: dict[str, Any]) -> str:
    return (
        f"{m['model']:.2f} bits a character over the held-out plays, the state carried; "
        f"unigram {m['unigram']:.2f}, 5-gram {m['5-gram']:.2f}"
    )


def windowed_figures(m: dict[str, Any]) -> str:
    nats = [m[name] * math.log(2) for name in ("model_reset_every_256", "model")]
    return (
        f"{nats[0]:.4f} nats a character over the last 10 % with the state reset every 256 characters, "
        f"{nats[1]:.4f} carried; nanoGPT's transformer of 10.7 M parameters has 1.4697 in windows of 256"
    )


def byte_figures(m: dict[str, Any]) -> str:
    return (
        f"{m['model']:.2f} bits a byte over four held-out books, the state carried; "
        f"unigram {m['unigram']:.2f}, 5-gram {m['5-gram']:.2f}"
    )


def speaker_figures(m: dict[str, Any]) -> str:
    seen = [f"{share} {right['right']:.1%}" for share, right in m["by_share_seen"].items()]
    return f"{m['model']:.1%} of {m['sequences']} test utterances right; of an utterance heard: {', '.join(seen)}"


def label_figures(m: dict[str, Any]) -> str:
    far = [f"{distance} words: {shares['model']:.1%}" for distance, shares in m["by_distance"].items()]
    reset = max(shares["reset_every_16"] for shares in m["by_distance"].values())
    return (
        f"{m['model']:.2%} of words right; a name called up after {', '.join(far)}; "
        f"with the state reset every 16 words at most {reset:.1%}"
    )


def temperature_figures(m: dict[str, Any]) -> str:
    rows = {name: targets["temperature"] for name, targets in m["by_entity"].items()}
    means = {kind: " / ".join(f"{row[kind]:.2f}" for row in rows.values()) for kind in next(iter(rows.values()))}
    covered = " / ".join(f"{share:.0%}" for share in m["interval"]["covered"]["temperature"].values())
    return (
        f"mean absolute error of the temperature in degrees at {' / '.join(rows)}: {means['model']}; "
        f"persistence {means['persistence']}, AR(48) ridge {means['AR(48) ridge']}; the 80 % interval covers {covered}"
    )


FIGURES = {
    "who": label_figures,
    "temperature": temperature_figures,
    "nyc-weather": temperature_figures,
    "shakespeare": text_figures,
    "tinyshakespeare": windowed_figures,
    "bible": byte_figures,
    "japanese-vowels": speaker_figures,
}


def test_every_shipped_model_has_its_figures() -> None:
    assert sorted(FIGURES) == shipped()


@pytest.mark.parametrize("model", FIGURES)
def test_the_figures_are_those_of_the_manifests(model: str) -> None:
    row = re.search(rf"^\| `{model}` \|[^|]*\| (.*) \|$", README, re.MULTILINE)
    assert row is not None
    assert row[1] == FIGURES[model](newest(model))


def tree() -> dict[str, str]:
    """Path -> what is said of it."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in blocks(between("tree") + "\n", "text")[0].splitlines():
        indent, name, said = re.fullmatch(r"( *)(\S+)\s*(.*)", line).groups()  # type: ignore[union-attr]
        above = [*above[: len(indent) // 2], name]
        found["".join(above)] = said
    return found


def test_every_path_of_the_tree_is_there_and_described() -> None:
    assert [path for path in tree() if not (ROOT / path).exists()] == []
    assert [path for path, said in tree().items() if not said] == []


def test_every_module_is_in_the_tree() -> None:
    modules = [
        path
        for side in ("service", "training", "benchmarks", "client", "examples")
        for path in (ROOT / side).rglob("*.py")
    ]
    names = {path.relative_to(ROOT).as_posix() for path in modules if path.name != "__init__.py"}
    assert names | {"cli.py"} == {path for path in tree() if path.endswith(".py")}


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_no_place_is_left_to_fill() -> None:
    assert README.count("<!-- fill") == 0
