"""Servers with API keys."""

import time
from pathlib import Path

import httpx
from live import Server

from service.api.auth import Scope, make_key

READ_S = 20.0
"""until when a running server must have read a changed file"""


class KeysFile:
    """A keys file that is written anew with every change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, str] = {}
        self._limits: dict[str, str] = {}

    def add(self, tenant: str, scope: Scope = "use", expires: str | None = None) -> str:
        """A key of a tenant; `expires` as TOML has it."""
        key, line = make_key(tenant, scope)
        self._lines[key] = line if expires is None else line.removesuffix("}") + f", expires = {expires}}}"
        self.write()
        return key

    def revoke(self, key: str) -> None:
        del self._lines[key]
        self.write()

    def limit(self, tenant: str, limits: str) -> None:
        """Limits as the inside of a TOML table."""
        self._limits[tenant] = f"tenants.{tenant} = {{{limits}}}"
        self.write()

    def write(self, *more: str) -> None:
        # Put into place as a whole, as those who deploy files do.
        fresh = self.path.with_suffix(".fresh")
        fresh.write_text("\n".join([*self._lines.values(), *self._limits.values(), *more]) + "\n")
        fresh.replace(self.path)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def client(server: Server, key: str) -> httpx.Client:
    """A client of a server that shows a key."""
    return httpx.Client(base_url=server.url, headers=bearer(key), timeout=30.0)


class As(Server):
    """A running server as one tenant sees it, once the server has read the key."""

    def __init__(self, server: Server, key: str) -> None:
        self.log, self.url, self.process = server.log, server.url, server.process
        self.http = client(server, key)
        end = time.monotonic() + READ_S
        while self.http.get("/metrics").status_code == 401:
            assert time.monotonic() < end, server.output()
            time.sleep(0.05)

    def __enter__(self) -> "As":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
