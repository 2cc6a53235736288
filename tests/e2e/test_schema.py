"""The OpenAPI page against the service: what Schemathesis makes of it is answered as the page says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from keyed import KeysFile, bearer
from live import MakeServer, Server
from schema_hooks import SESSIONS
from tiny import newest, some_inputs

HERE = Path(__file__).parent
EXAMPLES = 3
"""of each operation and phase, beside those that Schemathesis works out"""


def run(server: Server, folder: Path, *options: str) -> None:
    """All phases and all checks."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "--config-file",
        str(HERE / "schemathesis.toml"),
        "run",
        f"{server.url}/openapi.json",
        f"--max-examples={EXAMPLES}",
        "--generation-database=none",
        "--no-color",
        "--seed=1",
        *options,
    ]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-12_000:]}\n{done.stderr[-3000:]}\n{server.output()[-3000:]}"
    print(done.stdout[-1500:])


@pytest.mark.slow
@pytest.mark.parametrize("locked", [False, True], ids=["open", "with keys"])
def test_the_page_says_what_is_answered(locked: bool, models: Path, tmp_path: Path, fresh: MakeServer) -> None:
    file = KeysFile(tmp_path / "keys.toml")
    key = file.add("anna", "admin")
    server = fresh(max_body_bytes=100_000, max_tokens=500, **({"api_keys_file": file.path} if locked else {})).start()
    server.http.headers.update(bearer(key) if locked else {})
    for session, model in SESSIONS.items():
        server.steps(session, some_inputs(newest(models, model).manifest, 5), model=model)
    run(server, tmp_path, *(["--header", f"Authorization: Bearer {key}"] if locked else []))
    assert "Traceback" not in server.output()
