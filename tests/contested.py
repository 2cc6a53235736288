"""A store that another replica shares, which is faster."""

from collections.abc import Sequence
from typing import Any

import msgspec

from service.store.base import Change, Commit, Head, Segment, Snapshot
from service.store.memory import MemoryStore

KEY = ("", "s")
OTHER = 3
"""what the other replica feeds"""


class Contested(MemoryStore):
    """Another replica feeds a symbol just before each of the next `races` commits."""

    def __init__(self) -> None:
        super().__init__()
        self.races = 0

    def commit(self, commits: Sequence[Change], snapshots: Sequence[Snapshot] = ()) -> list[Any]:
        head = super().head(KEY)
        if self.races and head is not None:
            self.races -= 1
            self.feed_one(head)
        return list(super().commit(commits, snapshots))

    def feed_one(self, head: Head) -> None:
        segment = Segment(head.branch, head.position, 1, "fed", OTHER.to_bytes(4, "little"), "other")
        moved = msgspec.structs.replace(head, position=head.position + 1)
        super().commit([Commit(moved, head.fence, (segment,))])
