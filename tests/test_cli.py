"""The command line: both sides from one command, and serving without torch."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.api.auth import Keys

ROOT = Path(__file__).parents[1]
HEAVY = "{'torch', 'onnx', 'matplotlib', 'training'}"


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_service_leaves_torch_alone() -> None:
    done = run("-c", f"import sys, service.app, service.__main__; print(sorted({HEAVY} & set(sys.modules)))")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_command_line_loads_neither_side_to_describe_itself() -> None:
    code = f"""
import sys, cli
try:
    cli.app(["--help"], prog_name="recurra")
finally:
    print(sorted(({HEAVY} | {{"service", "fastapi"}}) & set(sys.modules)), file=sys.stderr)
"""
    done = run("-c", code)
    assert done.returncode == 0
    assert done.stderr == "[]\n"
    for command in ("serve", "keys", "train", "evaluate", "sample", "export", "recipes", "inspect", "add"):
        assert command in done.stdout


def test_serve_starts_the_service_without_torch(tmp_path: Path) -> None:
    code = f"""
import os, sys, cli
os.environ["RECURRA_PORT"] = "nonsense"
try:
    cli.app(["serve"], prog_name="recurra")
finally:
    print(sorted({HEAVY} & set(sys.modules)))
"""
    done = run("-c", code)
    assert done.returncode == 2
    assert "RECURRA_PORT" in done.stderr
    assert done.stdout == "[]\n"


def test_training_commands_are_handed_over_whole() -> None:
    done = run("-m", "cli", "train", "--help")
    assert done.returncode == 0
    assert "--recipe" in done.stdout and "--resume" in done.stdout
    listed = run("-m", "cli", "recipes")
    assert "shakespeare" in listed.stdout.split()


def test_errors_of_training_keep_their_exit_code() -> None:
    done = run("-m", "cli", "evaluate", "no/such/run")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_without_torch_training_says_what_to_install() -> None:
    code = """
import sys, cli
sys.modules["torch"] = None
cli.app(["train", "--recipe", "who"], prog_name="recurra")
"""
    done = run("-c", code)
    assert done.returncode == 1
    assert done.stderr == "recurra train needs torch: pip install -e '.[training]'\n"


def test_a_new_key_is_shown_once_and_its_line_opens_the_service(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    for arguments in (("acme",), ("ops", "--scope", "admin", "--days", "9")):
        done = run("-m", "cli", "keys", "new", *arguments)
        assert done.returncode == 0, done.stderr
        key = next(word for word in done.stderr.split() if word.startswith("rk_"))
        assert key.split("_", 2)[2] not in done.stdout
        with file.open("a") as lines:
            lines.write(done.stdout)
        found = Keys(file).tenant_of(f"Bearer {key}".encode())
        assert (found.name, found.scope or "") == (arguments[0], "admin" if len(arguments) > 1 else "use")
    assert found.expires_s is not None and 8.9 * 86_400 < found.expires_s - time.time() < 9.1 * 86_400


@pytest.mark.parametrize(
    "arguments", [("Acme",), ("a/b",), ("",), ("acme", "--scope", "root"), ("acme", "--days", "0")]
)
def test_a_key_that_can_not_be_is_refused(arguments: tuple[str, ...]) -> None:
    done = run("-m", "cli", "keys", "new", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
