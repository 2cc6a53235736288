"""The memory store: nothing survives the process. For tests and throw-away work."""

import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from threading import RLock

import msgspec

from service.store.base import (
    REPLIES_KEPT,
    TENANT_REPLIES_KEPT,
    TOMBSTONE_TTL_S,
    Applied,
    Change,
    Commit,
    Conflict,
    Head,
    Key,
    Line,
    Reply,
    Result,
    Segment,
    Snapshot,
    Written,
    cut,
    holds,
    join,
    may_step,
    now_ms,
    parts,
    segments_of,
    stamp,
    stepped,
    surplus,
    write_step,
)


class MemoryStore:
    """Heads, log, snapshots and replies in dictionaries."""

    durability = "memory"
    run = ""

    def __init__(self, idempotency_ttl_s: int = 86_400) -> None:
        self._lock = RLock()
        self._reply_ttl_ms = idempotency_ttl_s * 1000
        self._heads: dict[Key, Head] = {}
        self._log: dict[str, Written] = {}
        self._snapshots: dict[str, dict[tuple[str, int], Snapshot]] = {}
        self._lines: dict[str, Line] = {}
        self._replies: dict[Key, dict[str, Reply]] = {}
        self._reach: dict[str, dict[Key, tuple[int, int]]] = {}
        """branch -> session -> (the last position that it reaches, the last that it does not retain)"""
        self._epoch_floor = 0

    # ------------------------------------------------------------------ committing

    def commit(self, commits: Sequence[Change], snapshots: Sequence[Snapshot] = ()) -> list[Result]:
        """Apply a group commit; one result a commit."""
        with self._lock:
            now = now_ms()
            results = [self._change(change, now) for change in commits]
            self._add_snapshots([snapshot for snapshot in snapshots if self._reaches(snapshot)])
            return results

    def _change(self, change: Change, now: int) -> Result:
        if isinstance(change, Commit):
            return self._commit_one(change, now)
        key = change.head.key
        stored = self._heads.get(key)
        if stored is None or not may_step(change, stored):
            return Conflict(stored.at(now) if stored is not None else None)
        new = stepped(change, stored, now)
        write_step(self._log.setdefault(new.head.branch, []), new)
        self._heads[key] = new.head
        return Applied(new.head)

    def _commit_one(self, commit: Commit, now: int) -> Result:
        stored = self._heads.get(commit.head.key)
        source = self._heads.get((commit.head.tenant, commit.source.id)) if commit.source is not None else None
        taken = self._kept(commit.head.tenant, commit.reply.scope, commit.reply.key, now) if commit.reply else None
        if not holds(commit, stored, source, taken, now):
            return Conflict(stored.at(now) if stored is not None else None)
        stamped = stamp(commit, stored, now)
        self._apply(stamped, stored)
        return Applied(stamped.head)

    def _apply(self, commit: Commit, stored: Head | None) -> None:
        if commit.branch is not None:
            self._lines[commit.branch.id] = commit.branch.line
        for segment in commit.segments:
            self._log.setdefault(segment.branch, []).append(segment)
        if commit.reply is not None:
            self._add_reply(commit.head.tenant, commit.reply)
        self._move(stored, commit.head)
        if commit.snapshots:
            self._add_snapshots([snapshot for snapshot in commit.snapshots if self._reaches(snapshot)])

    def _move(self, stored: Head | None, head: Head) -> None:
        """Put a session's head where it stands now, and delete what nobody reaches any more."""
        self._heads[head.key] = head
        if stored is not None and _place(stored) == _place(head):
            return
        before = self._ways(stored) if stored is not None else {}
        for branch in before:
            del self._reach[branch][head.key]
        for branch, upto in self._ways(head).items():
            self._reach.setdefault(branch, {})[head.key] = (upto, head.origin)
        for branch in before:
            self._collect(branch)

    def _ways(self, head: Head) -> dict[str, int]:
        """The branches that a session reaches, each with the last position."""
        if head.status != "live":
            return {}
        return {**dict(self._lines.get(head.branch, ())), head.branch: sys.maxsize}

    def _collect(self, branch: str) -> None:
        reached = self._reach[branch].values()
        if not reached:
            for table in (self._log, self._snapshots, self._lines, self._reach):
                table.pop(branch, None)
            return
        upto, since = max(upto for upto, _ in reached), min(since for _, since in reached)
        kept = segments_of(self._log.get(branch, []), since, upto)
        self._log[branch] = [cut(segment, since, upto) for segment in kept]
        found = self._snapshots.get(branch, {})
        self._snapshots[branch] = {place: s for place, s in found.items() if since <= s.position <= upto}

    def _reaches(self, snapshot: Snapshot) -> bool:
        return any(snapshot.position <= upto for upto, _ in self._reach.get(snapshot.branch, {}).values())

    def _add_snapshots(self, snapshots: Sequence[Snapshot]) -> None:
        for new in snapshots:
            kept = self._snapshots.setdefault(new.branch, {})
            kept[new.graph, new.position] = new
            origins = {since for _, since in self._reach[new.branch].values()}
            for position in surplus([position for graph, position in kept if graph == new.graph], origins):
                del kept[new.graph, position]

    # ------------------------------------------------------------------ replies

    def keep(self, tenant: str, reply: Reply) -> bool:
        """Keep the answer of a request that committed nothing; its life is the session's unless it says one."""
        with self._lock:
            now = now_ms()
            if self._kept(tenant, reply.scope, reply.key, now) is not None:
                return False
            head = self._heads.get((tenant, reply.scope)) if reply.scope else None
            life = reply.life or (head.life if head is not None else 0)
            self._add_reply(tenant, msgspec.structs.replace(reply, at_ms=now, life=life))
            return True

    def reply(self, tenant: str, scope: str, key: str) -> Reply | None:
        """The answer kept under a key."""
        with self._lock:
            return self._kept(tenant, scope, key, now_ms())

    def _kept(self, tenant: str, scope: str, key: str, now: int) -> Reply | None:
        reply = self._replies.get((tenant, scope), {}).get(key)
        if reply is None or now - reply.at_ms >= self._reply_ttl_ms:
            return None
        head = self._heads.get((tenant, scope))
        return reply if not scope or (head is not None and head.life == reply.life) else None

    def _add_reply(self, tenant: str, reply: Reply) -> None:
        kept = self._replies.setdefault((tenant, reply.scope), {})
        kept.pop(reply.key, None)
        kept[reply.key] = reply
        if len(kept) > (REPLIES_KEPT if reply.scope else TENANT_REPLIES_KEPT):
            del kept[next(iter(kept))]

    # ------------------------------------------------------------------ reading

    def head(self, key: Key, at_ms: int | None = None) -> Head | None:
        """The head of a session."""
        with self._lock:
            head = self._heads.get(key)
            return head.at(now_ms() if at_ms is None else at_ms) if head is not None else None

    def peek(self, key: Key, at_ms: int | None = None) -> Head | None:
        """The head of a session; a commit that is under way is not waited for."""
        head = self._heads.get(key)
        return head.at(now_ms() if at_ms is None else at_ms) if head is not None else None

    def line(self, branch: str) -> Line:
        """What comes before a branch's own entries."""
        with self._lock:
            return self._lines.get(branch, ())

    def log(self, branch: str, after: int, to: int) -> list[Segment]:
        """Positions after + 1 to `to`, in order."""
        with self._lock:
            found = [
                cut(segment, first, last)
                for name, first, last in parts(self.line(branch), branch, after, to)
                for segment in segments_of(self._log.get(name, []), first, last)
            ]
        return join(found)

    def snapshot(self, branch: str, below: int, graph: str) -> Snapshot | None:
        """The newest snapshot at a position less than `below`."""
        with self._lock:
            found = [s for s in self._visible(branch, graph) if s.position < below]
        return max(found, key=lambda snapshot: snapshot.position, default=None)

    def snapshots(self, branch: str, after: int, to: int, graph: str) -> list[int]:
        """Positions after + 1 to `to` at which there are snapshots, in order."""
        with self._lock:
            return sorted({s.position for s in self._visible(branch, graph) if after < s.position <= to})

    def _visible(self, branch: str, graph: str) -> list[Snapshot]:
        return [
            snapshot
            for name, upto in ((branch, sys.maxsize), *self.line(branch))
            for snapshot in self._snapshots.get(name, {}).values()
            if snapshot.graph == graph and snapshot.position <= upto
        ]

    def heads(self, tenant: str, model: str | None, after: str, limit: int) -> list[Head]:
        """Live sessions in order of id."""
        found = [head for head in self._living(tenant) if head.id > after and model in (None, head.model)]
        return sorted(found, key=lambda head: head.id)[:limit]

    def forks(self, key: Key, life: int) -> list[str]:
        """Ids of the live sessions that were forked from that life of a session."""
        parents = ((head.id, head.parent) for head in self._living(key[0]))
        return sorted(id for id, of in parents if of is not None and (of.session, of.life) == (key[1], life))

    def lives(self, model: str, version: int) -> bool:
        """Whether any session of a model version lives."""
        return any((head.model, head.version) == (model, version) for head in self._living())

    def census(self) -> Mapping[tuple[str, int], int]:
        """How many sessions of each (model, version) live."""
        return Counter((head.model, head.version) for head in self._living())

    def _living(self, tenant: str | None = None) -> list[Head]:
        with self._lock:
            now = now_ms()
            heads = [head for head in self._heads.values() if tenant in (None, head.tenant)]
        return [head for head in heads if head.at(now).status == "live"]

    def next_epoch(self, key: Key) -> int:
        """One more than every epoch that this id has had."""
        with self._lock:
            head = self._heads.get(key)
            return (head.epoch if head is not None else self._epoch_floor) + 1

    # ------------------------------------------------------------------ upkeep

    def sweep(self, busy: Collection[Key] = ()) -> int:
        """Expire what is due, forget old tombstones and old replies."""
        with self._lock:
            now = now_ms()
            heads = [head.at(now) for key, head in self._heads.items() if key not in busy]
            expired = [head for head in heads if head.status == "expired" and head != self._heads[head.key]]
            for head in expired:
                self._move(self._heads[head.key], head)
            old = [h for h in heads if h.status != "live" and h.updated_ms < now - TOMBSTONE_TTL_S * 1000]
            for head in old:
                self._epoch_floor = max(self._epoch_floor, head.epoch)
                del self._heads[head.key]
                self._replies.pop(head.key, None)
            self._drop_old_replies(now)
            return len(expired) + len(old)

    def _drop_old_replies(self, now: int) -> None:
        for scope, kept in list(self._replies.items()):
            left = {key: reply for key, reply in kept.items() if now - reply.at_ms < self._reply_ttl_ms}
            self._replies[scope] = left
            if not left:
                del self._replies[scope]

    def check(self) -> str | None:
        """Memory can always be written."""
        return None

    def close(self) -> None:
        """Nothing to release."""


def _place(head: Head) -> tuple[str, int, str]:
    return (head.branch, head.origin, head.status)
