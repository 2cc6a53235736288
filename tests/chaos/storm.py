"""A storm: many clients at once, and somebody who breaks things under them."""

import time
from collections import Counter
from typing import Any

from checker import Found, check
from clients import TEXT, Client
from cutter import Cutter
from ledger import Ledger
from live import Server

CLIENTS = 64
SHARE = 8
"""one session in so many clients is shared by two"""
END_S = 120.0

REPORTS: list[dict[str, Any]] = []
"""one for each storm of this run"""


class Storm:
    """Clients on some replicas; some fence with positions, some reach the service through a proxy that cuts.

    With `alone` no session is shared and no connection is cut: what is told only once must reach its client.
    """

    def __init__(
        self, name: str, servers: list[Server], seed: int, clients: int = CLIENTS, alone: bool = False
    ) -> None:
        self.name, self.servers, self.seed = name, servers, seed
        self.count: Counter[str] = Counter()
        self.cutters = [Cutter(int(str(one.settings["port"])), seed + i).start() for i, one in enumerate(servers)]
        shared = [] if alone else [Ledger(f"{name}-shared-{i}", TEXT) for i in range(clients // SHARE)]
        self.clients = [self._client(i, shared, alone) for i in range(clients)]

    def _client(self, i: int, shared: list[Ledger], alone: bool) -> Client:
        model = "tiny-weather" if i % 8 == 7 else TEXT
        urls = [one.url for one in (self.cutters if i % 3 == 0 and not alone else self.servers)]
        with_whom = [shared[i // 2]] if i // 2 < len(shared) else []
        keyed = bool(with_whom) or alone or i % 4 != 1
        return Client(urls, [Ledger(f"{self.name}-{i}", model)], with_whom, self.seed * 1000 + i, keyed, not alone)

    def __enter__(self) -> "Storm":
        self._began = time.monotonic()
        for client in self.clients:
            client.start()
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        for client in self.clients:
            client.stop.set()
        end = time.monotonic() + (END_S if failed is None else 5.0)
        for client in self.clients:
            client.join(max(0.0, end - time.monotonic()))
        for cutter in self.cutters:
            cutter.close()

    @property
    def seconds(self) -> float:
        """How long it has blown."""
        return time.monotonic() - self._began

    def check(self, *servers: Server) -> Counter[str]:
        """Assert that every operation was answered, and that on every server all is there once, and verified."""
        stuck = [client.name for client in self.clients if client.is_alive()]
        failures = [client.failure for client in self.clients if client.failure is not None]
        assert not stuck and not failures, (stuck, len(failures), *failures[:3])
        ledgers = {id(one): one for client in self.clients for one in (*client.own, *client.shared)}
        found = Found()
        for server in servers:
            check(server, list(ledgers.values()), found)
        counted = sum((client.count for client in self.clients), self.count)
        counted["cuts"] = sum(cutter.cuts for cutter in self.cutters)
        counted.update({name: value for name, value in vars(found).items() if name != "details"})
        REPORTS.append(
            {"storm": self.name, "seed": self.seed, "clients": len(self.clients), "sessions": len(ledgers), **counted}
        )
        assert found.entries and (found.lost, found.doubled, found.unverified) == (0, 0, 0), found
        return counted
