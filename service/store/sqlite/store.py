"""Sessions in one file of SQLite's.

A group commit is one row in a journal, whatever its size: Python's sqlite3 gives the GIL away at every row, so a
row a session costs hundreds of milliseconds beside a busy event loop. What the journal holds is kept in memory
as well (`overlay`), until a background thread spreads it to the tables (`spread`), many tokens of a session to one
row. At start the journal that a crash left behind is spread first.

A branch is begun once, with the past that it reaches (table `reach`), and ended once, when its session leaves it;
ended branches that nobody reaches are deleted (`collect`). Both are read from the journal in its order, so at every
moment the tables describe a moment of the past, and what nobody reached then nobody can reach later. A branch that
begins a log, is not forked and not ended needs no row: most sessions have none.
"""

import heapq
import os
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from time import perf_counter

import msgspec
import structlog

from service.store.base import (
    TOMBSTONE_TTL_S,
    UNREAD,
    Applied,
    Change,
    Commit,
    CommitUnknown,
    Conflict,
    Head,
    Key,
    Line,
    Reply,
    Result,
    Segment,
    Snapshot,
    Step,
    Stepped,
    StoreError,
    Unread,
    cut,
    holds,
    join,
    may_step,
    now_ms,
    parts,
    stamp,
    stepped,
    whole,
)
from service.store.sqlite.overlay import Overlay
from service.store.sqlite.rows import Batch, ReplyKey, decode_segment, reply_key
from service.store.sqlite.schema import is_damage, lock_folder, opening_failed, roll_back
from service.store.sqlite.spread import Spreader
from service.store.sqlite.tables import Tables

log = structlog.get_logger(__name__)

SPREAD_EVERY_S, SPREAD_LATEST_S = 1.0, 5.0
SPREAD_SHARE = 0.05
"""of the time that spreading may take: where it takes longer it comes less often, and finds more of each session"""


class SqliteStore:
    """Sessions in `<folder>/sessions.sqlite`; commits survive kill -9 (`commit`) or power loss (`fsync`)."""

    run = ""

    def __init__(self, folder: Path, durability: str = "commit", idempotency_ttl_s: int = 86_400) -> None:
        self.durability = durability
        self._reply_ttl_ms = idempotency_ttl_s * 1000
        self._lock_file = lock_folder(folder)
        self._path = folder / "sessions.sqlite"
        self._failure: str | None = None
        self._damage: str | None = None
        self._open_write: tuple[int, Batch] | None = None
        self._overlay = Overlay()
        try:
            self._tables = Tables(self._path, durability)
        except StoreError:
            os.close(self._lock_file)
            raise
        try:
            self._spreader = self._replay()
        except (sqlite3.Error, msgspec.DecodeError) as error:
            self._release()
            raise StoreError(opening_failed(self._path, error)) from error
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._spread_forever, name="store", daemon=True)
        self._thread.start()

    def _replay(self) -> Spreader:
        """Spread what a crash left in the journal."""
        spread_to = self._overlay.seq = self._tables.fact("seq")
        journal = self._tables.journal()
        for seq, batch in journal:
            self._overlay.take_again(seq, batch, self._tables.spread_to)
        if journal:
            log.info("journal_replayed", commits=len(journal), sessions=len(self._overlay.sessions))
        spreader = Spreader(self._tables, self._overlay, spread_to)
        spreader.spread()
        return spreader

    def _spread_forever(self) -> None:
        rest_s = SPREAD_EVERY_S
        while not self._stop.wait(rest_s):
            began = perf_counter()
            try:
                self._spreader.spread()
            except (sqlite3.Error, msgspec.DecodeError) as error:
                self._note(error)
                log.error("store_failed", error=str(error))
            rest_s = min(max(SPREAD_EVERY_S, (perf_counter() - began) / SPREAD_SHARE), SPREAD_LATEST_S)

    def close(self) -> None:
        """Spread the journal, close the file, give the folder free."""
        self._stop.set()
        self._thread.join()
        with self._tables.lock:
            try:
                self._spreader.spread()
            except (sqlite3.Error, msgspec.DecodeError) as error:
                log.error("store_failed", error=str(error))  # the journal keeps it for the next start
            self._release()

    def _release(self) -> None:
        self._tables.close()
        os.close(self._lock_file)

    # ------------------------------------------------------------------ failing

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Hold the lock, settle a write whose outcome is open, and turn what SQLite says into StoreError."""
        with self._translated(), self._tables.lock:
            roll_back(self._tables.db)
            self._settle_open()
            yield

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, msgspec.DecodeError) as error:
            self._note(error)
            raise StoreError(f"the store can not be used: {error}") from error

    def _note(self, error: Exception) -> None:
        """Remember what is wrong; damage does not go away when a write succeeds."""
        self._failure = str(error)
        if is_damage(error):
            self._damage = f"{self._path.name} is damaged: {error}"

    def check(self) -> str | None:
        """None when the last write succeeded and the data file can be written."""
        if self._failure is None or self._damage is not None:
            return self._damage
        with self._tables.lock:
            try:
                self._tables.probe()
                self._failure = None
            except sqlite3.Error as error:
                self._note(error)
        return self._failure

    # ------------------------------------------------------------------ committing

    def commit(self, commits: Sequence[Change], snapshots: Sequence[Snapshot] = ()) -> list[Result]:
        """Apply a group commit with one INSERT; one result a commit."""
        with self._using():
            batch, results = self._judge(commits, now_ms())
            if batch.commits or batch.steps or snapshots:
                self._write(msgspec.structs.replace(batch, snapshots=tuple(snapshots)))
            return results

    def _judge(self, changes: Sequence[Change], now: int) -> tuple[Batch, list[Result]]:
        """What is to be written, and the results; a commit sees those before it in its group."""
        keys = [change.head.key for change in changes]
        if len(set(keys)) < len(keys):
            changes = whole(changes)  # the journal's row does not say which came first
        results: list[Result] = []
        stamped: list[Commit] = []
        steps: list[Stepped] = []
        heads: dict[Key, Head] = {}
        replies = self._replies_of([change for change in changes if isinstance(change, Commit)])
        unspread = self._overlay.sessions
        for key, change in zip(keys, changes, strict=True):
            entry = unspread.get(key)
            stored = (heads.get(key) if heads else None) or (entry.head if entry is not None else self._stored(key))
            if isinstance(change, Step):
                if stored is not None and may_step(change, stored):
                    steps.append(step := stepped(change, stored, now))
                    results.append(Applied(step.head))
                    continue
            elif self._holds(change, stored, heads, replies, now):
                new = stamp(change, stored, now)
                stamped.append(new)
                heads[key] = new.head
                if new.reply is not None:
                    replies[reply_key(new.head.tenant, new.reply)] = new.reply
                results.append(Applied(new.head))
                continue
            results.append(Conflict(stored.at(now) if stored is not None else None))
        return Batch(tuple(stamped), steps=tuple(steps)), results

    def _holds(
        self,
        commit: Commit,
        stored: Head | None,
        heads: dict[Key, Head],
        replies: Mapping[ReplyKey, Reply],
        now: int,
    ) -> bool:
        """Whether a commit may be applied; `heads` and `replies` are those of its group before it."""
        source = self._source_of(commit, heads) if commit.source is not None else None
        taken = replies.get(reply_key(commit.head.tenant, commit.reply)) if commit.reply is not None else None
        return holds(commit, stored, source, self._counting(taken, stored, now), now)

    def _source_of(self, commit: Commit, heads: dict[Key, Head]) -> Head | None:
        """The stored head of a commit's source, one of the same group before all."""
        assert commit.source is not None
        parent = (commit.head.tenant, commit.source.id)
        return heads.get(parent) or self._stored(parent)

    def _write(self, batch: Batch) -> None:
        seq = self._overlay.seq + 1
        try:
            self._tables.append(seq, batch)
            self._failure = None
        except sqlite3.Error as error:
            self._note(error)
            self._open_write = (seq, batch)
            try:
                applied = self._settle_open()
            except sqlite3.Error as again:
                raise CommitUnknown(f"the store failed and can not be read: {again}") from error
            if not applied:
                raise StoreError(f"the store could not commit: {error}") from error
            return
        self._overlay.take(seq, batch)

    def _settle_open(self) -> bool:
        """Find out whether the write whose outcome is open was applied, and take it if so."""
        if self._open_write is None:
            return False
        seq, batch = self._open_write
        applied = self._tables.has_appended(seq)
        self._open_write = None
        if applied:
            self._overlay.take(seq, batch)
        return applied

    # ------------------------------------------------------------------ replies

    def keep(self, tenant: str, reply: Reply) -> bool:
        """Keep the answer of a request that committed nothing; its life is the session's unless it says one."""
        with self._using():
            now = now_ms()
            head = self._stored((tenant, reply.scope)) if reply.scope else None
            if self._counting(self._kept(reply_key(tenant, reply)), head, now) is not None:
                return False
            life = reply.life or (head.life if head is not None else 0)
            self._write(Batch(kept=((tenant, msgspec.structs.replace(reply, at_ms=now, life=life)),)))
            return True

    def reply(self, tenant: str, scope: str, key: str) -> Reply | None:
        """The answer kept under a key."""
        with self._using():
            head = self._stored((tenant, scope)) if scope else None
            return self._counting(self._kept((tenant, scope, key)), head, now_ms())

    def _counting(self, reply: Reply | None, head: Head | None, now: int) -> Reply | None:
        """The reply unless it is too old, or of another life than the session's latest."""
        if reply is None or now - reply.at_ms >= self._reply_ttl_ms:
            return None
        return reply if not reply.scope or (head is not None and head.life == reply.life) else None

    def _kept(self, key: ReplyKey) -> Reply | None:
        return self._overlay.replies.get(key) or self._tables.replies([key]).get(key)

    def _replies_of(self, commits: Sequence[Commit]) -> dict[ReplyKey, Reply]:
        """What is kept under the keys of a group commit, found by one statement at most."""
        keys = {reply_key(one.head.tenant, one.reply) for one in commits if one.reply is not None}
        known = {key: self._overlay.replies[key] for key in keys if key in self._overlay.replies}
        return known | self._tables.replies(keys - known.keys())

    # ------------------------------------------------------------------ reading a session

    def _stored(self, key: Key) -> Head | None:
        head = self._overlay.known(key)
        if head is UNREAD:
            head = self._tables.head(key)
            self._overlay.hold(key, head)
        return head

    def head(self, key: Key, at_ms: int | None = None) -> Head | None:
        """The head of a session."""
        with self._using():
            stored = self._stored(key)
            return stored.at(now_ms() if at_ms is None else at_ms) if stored is not None else None

    def peek(self, key: Key, at_ms: int | None = None) -> Head | Unread | None:
        """The head of a session, if it is in memory and no write's outcome is open."""
        stored = self._overlay.peek(key) if self._open_write is None else UNREAD
        if stored is None or stored is UNREAD:
            return stored
        return stored.at(now_ms() if at_ms is None else at_ms)

    def next_epoch(self, key: Key) -> int:
        """One more than every epoch that this id has had."""
        with self._using():
            stored = self._stored(key)
            return 1 + (stored.epoch if stored is not None else self._tables.fact("epoch_floor"))

    def line(self, branch: str) -> Line:
        """What comes before a branch's own entries."""
        with self._using():
            return self._line_of(branch)

    def _line_of(self, branch: str) -> Line:
        begun = self._overlay.moves.begun.get(branch)
        return begun if begun is not None else self._tables.line(branch)

    def log(self, branch: str, after: int, to: int) -> list[Segment]:
        """Positions after + 1 to `to`, in order."""
        with self._using():
            pieces = parts(self._line_of(branch), branch, after, to)
            rows = [(self._tables.segments(*piece), self._overlay.segments(*piece)) for piece in pieces]
        found: list[Segment] = []
        with self._translated():
            for (_, first, last), (blobs, unspread) in zip(pieces, rows, strict=True):
                found += [cut(segment, first, last) for segment in (*map(decode_segment, blobs), *unspread)]
        return join(found)

    def snapshot(self, branch: str, below: int, graph: str) -> Snapshot | None:
        """The newest snapshot at a position less than `below`."""
        with self._using():
            newest = self._newest(branch, below, graph)
            for ancestor, upto in reversed(self._line_of(branch)):
                if newest is not None and newest.position >= upto:
                    break
                found = self._newest(ancestor, min(below, upto + 1), graph)
                newest = max((s for s in (newest, found) if s is not None), key=lambda s: s.position, default=None)
            return newest

    def _newest(self, branch: str, below: int, graph: str) -> Snapshot | None:
        """Of one branch alone."""
        found = [one for one in self._overlay.snapshots(branch, graph) if one.position < below]
        spread = self._tables.newest(branch, below, graph)
        return max(found + ([spread] if spread is not None else []), key=lambda one: one.position, default=None)

    def snapshots(self, branch: str, after: int, to: int, graph: str) -> list[int]:
        """Positions after + 1 to `to` at which there are snapshots, in order."""
        with self._using():
            found: set[int] = set()
            for name, upto in ((branch, to), *self._line_of(branch)):
                last = min(upto, to)
                found.update(self._tables.snapped(name, after, last, graph))
                unspread = self._overlay.snapshots(name, graph)
                found.update(one.position for one in unspread if after < one.position <= last)
            return sorted(found)

    # ------------------------------------------------------------------ reading many sessions

    def _unchanged(self, heads: Iterable[Head]) -> Iterator[Head]:
        """Those of the tables' heads that the journal does not change."""
        return (head for head in heads if head.key not in self._overlay.sessions)

    def heads(self, tenant: str, model: str | None, after: str, limit: int) -> list[Head]:
        """Live sessions in order of id; what is not spread yet is laid over the tables' page."""
        with self._using():
            now = now_ms()
            changed = sorted((head for head in self._overlay.heads(tenant) if head.id > after), key=lambda h: h.id)
            with self._tables.page(tenant, model, after, now) as page:
                merged = heapq.merge(self._unchanged(page), changed, key=lambda head: head.id)
                living = (h for h in merged if h.at(now).status == "live" and model in (None, h.model))
                return list(islice(living, limit))

    def forks(self, key: Key, life: int) -> list[str]:
        """Ids of the live sessions that were forked from that life of a session."""
        with self._using():
            now = now_ms()
            found = (*self._unchanged(self._tables.forks(key)), *self._overlay.heads(key[0]))
            heads = [head for head in found if head.at(now).status == "live"]
        parents = ((head.id, head.parent) for head in heads)
        return sorted(id for id, of in parents if of is not None and (of.session, of.life) == (key[1], life))

    def lives(self, model: str, version: int) -> bool:
        """Whether any session of a model version lives."""
        with self._using():
            now = now_ms()
            unspread = (entry.head for entry in self._overlay.sessions.values())
            if any((h.model, h.version) == (model, version) and h.at(now).status == "live" for h in unspread):
                return True
            with self._tables.of_version(model, version, now) as heads:
                return next(self._unchanged(heads), None) is not None

    def census(self) -> Mapping[tuple[str, int], int]:
        """How many sessions of each (model, version) live; what is not spread yet is missing."""
        with self._using():
            return self._tables.census()

    # ------------------------------------------------------------------ upkeep

    def sweep(self, busy: Collection[Key] = ()) -> int:
        """Expire what is due, forget old tombstones and old replies, a bounded number a call."""
        now = now_ms()
        with self._using():
            expired = self._expire(busy, now)
            forgotten = self._forget(busy, now - TOMBSTONE_TTL_S * 1000)
        with self._using():
            self._tables.drop_replies(now - self._reply_ttl_ms)
        return expired + forgotten

    def _expire(self, busy: Collection[Key], now: int) -> int:
        """Close what is due in one commit: serving waits for one write, not for one a session."""
        due = [head for head in self._unchanged(self._tables.due(now)) if head.key not in busy]
        if due:
            self._write(Batch(tuple(Commit(head.at(now), head.fence, left=head.branch) for head in due)))
        return len(due)

    def _forget(self, busy: Collection[Key], then: int) -> int:
        """Drop the tombstones of before."""
        old = [head for head in self._unchanged(self._tables.ended_before(then)) if head.key not in busy]
        if old:
            self._tables.drop_sessions(old)
        for head in old:
            self._overlay.forget(head.key)
        return len(old)
