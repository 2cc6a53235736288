"""The memory store: nothing survives the process. For tests and throw-away work."""

from collections.abc import Collection, Sequence
from threading import RLock

from service.store.base import (
    TOMBSTONE_TTL_S,
    Applied,
    Commit,
    Conflict,
    Head,
    Key,
    Result,
    Segment,
    Snapshot,
    cut,
    holds,
    join,
    now_ms,
    stamp,
)


class MemoryStore:
    """Heads, log and snapshots in dictionaries."""

    durability = "memory"

    def __init__(self) -> None:
        self._lock = RLock()
        self._heads: dict[Key, Head] = {}
        self._log: dict[str, list[Segment]] = {}
        self._snapshots: dict[str, list[Snapshot]] = {}
        self._epoch_floor = 0

    def commit(self, commits: Sequence[Commit]) -> list[Result]:
        """Apply a group commit; one result a commit."""
        with self._lock:
            now = now_ms()
            return [self._commit_one(commit, now) for commit in commits]

    def _commit_one(self, commit: Commit, now: int) -> Result:
        stored = self._heads.get(commit.head.key)
        if not holds(commit, stored, now):
            return Conflict(stored.at(now) if stored is not None else None)
        if stored is not None and stored.branch != commit.head.branch:
            self._forget_branch(stored.branch)
        stamped = stamp(commit, stored, now)
        self._heads[stamped.head.key] = stamped.head
        if stamped.head.status != "live":
            self._forget_branch(stamped.head.branch)
            return Applied(stamped.head)
        for segment in stamped.segments:
            self._log.setdefault(segment.branch, []).append(segment)
        for snapshot in stamped.snapshots:
            self._snapshots.setdefault(snapshot.branch, []).append(snapshot)
        return Applied(stamped.head)

    def _forget_branch(self, branch: str) -> None:
        self._log.pop(branch, None)
        self._snapshots.pop(branch, None)

    def head(self, key: Key, at_ms: int | None = None) -> Head | None:
        """The head of a session."""
        with self._lock:
            head = self._heads.get(key)
            return head.at(now_ms() if at_ms is None else at_ms) if head is not None else None

    def log(self, branch: str, after: int, to: int) -> list[Segment]:
        """Positions after + 1 to `to`, in order."""
        with self._lock:
            segments = [s for s in self._log.get(branch, ()) if s.end > after and s.start < to]
        return join([cut(segment, after, to) for segment in segments])

    def snapshot(self, branch: str, below: int) -> Snapshot | None:
        """The newest snapshot at a position less than `below`."""
        with self._lock:
            found = [s for s in self._snapshots.get(branch, ()) if s.position < below]
        return max(found, key=lambda snapshot: snapshot.position, default=None)

    def heads(self, tenant: str, model: str | None, after: str, limit: int) -> list[Head]:
        """Live sessions in order of id."""
        with self._lock:
            now = now_ms()
            found = [
                head
                for head in self._heads.values()
                if head.tenant == tenant
                and head.id > after
                and head.at(now).status == "live"
                and model in (None, head.model)
            ]
        return sorted(found, key=lambda head: head.id)[:limit]

    def next_epoch(self, key: Key) -> int:
        """One more than every epoch that this id has had."""
        with self._lock:
            head = self._heads.get(key)
            return (head.epoch if head is not None else self._epoch_floor) + 1

    def sweep(self, busy: Collection[Key] = ()) -> int:
        """Expire what is due and forget old tombstones."""
        with self._lock:
            now = now_ms()
            heads = [head.at(now) for key, head in self._heads.items() if key not in busy]
            expired = [head for head in heads if head.status == "expired" and head != self._heads[head.key]]
            for head in expired:
                self._heads[head.key] = head
                self._forget_branch(head.branch)
            old = [h for h in heads if h.status != "live" and h.updated_ms < now - TOMBSTONE_TTL_S * 1000]
            for head in old:
                self._epoch_floor = max(self._epoch_floor, head.epoch)
                del self._heads[head.key]
            return len(expired) + len(old)

    def check(self) -> str | None:
        """Memory can always be written."""
        return None

    def close(self) -> None:
        """Nothing to release."""
