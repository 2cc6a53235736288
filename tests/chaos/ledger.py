"""What the clients of a session were told of it: a model that owes nothing to the service's own code."""

import threading
from typing import Any

Entry = tuple[str, Any]
"""(source, input) as the log shows it"""


class Ledger:
    """Every entry of a session that was acknowledged to a client, by epoch and position."""

    def __init__(self, session: str, model: str, prefix: list[Entry] | None = None) -> None:
        self.session = session
        self.model = model
        self.prefix = prefix or []
        self.lock = threading.Lock()
        self.told: dict[tuple[int, int], Entry] = {}
        self.begins: dict[int, int] = {}
        """epoch -> the position of the line before that it goes on after"""
        self.doubled = 0

    def begin(self, epoch: int, position: int) -> None:
        """The session was created, forked or rewound: it goes on after a position in a new epoch."""
        with self.lock:
            self.begins[epoch] = position

    def fed(self, epoch: int, end: int, entries: list[Entry]) -> None:
        """Entries were acknowledged, the last of them at position `end`."""
        with self.lock:
            for i, entry in enumerate(entries):
                at = (epoch, end - len(entries) + 1 + i)
                self.doubled += at in self.told
                self.told[at] = entry

    def roll_back(self, found: dict[str, int] | None) -> int:
        """The store came back older; returns how many acknowledged entries it lost."""
        at = (found["epoch"], found["position"]) if found is not None else (0, 0)
        with self.lock:
            gone = [one for one in self.told if one > at]
            for one in gone:
                del self.told[one]
            self.begins = {epoch: position for epoch, position in self.begins.items() if epoch <= at[0]}
            return len(gone)

    def line(self) -> tuple[list[Entry], int]:
        """The log as it must be, and how many acknowledged entries have no place in it."""
        with self.lock:
            line, placed = list(self.prefix), 0
            for epoch in sorted(self.begins):
                del line[self.begins[epoch] :]
                while (entry := self.told.get((epoch, len(line) + 1))) is not None:
                    line.append(entry)
                    placed += 1
            return line, len(self.told) - placed

    @property
    def epoch(self) -> int:
        """The newest epoch that anybody was told of; 0: none."""
        with self.lock:
            return max(self.begins, default=0)

    @property
    def position(self) -> int:
        """Where the session stands, as far as its clients were told."""
        return len(self.line()[0])
