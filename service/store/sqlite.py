"""The SQLite store: the embedded default, one process a data folder.

A group commit is one row in a journal, whatever its size: Python's sqlite3 gives the GIL away at every row, so a
row a session costs hundreds of milliseconds beside a busy event loop. What the journal holds is kept in memory
as well, until a background thread spreads it to the tables, many tokens of a session to one row. At start the
journal that a crash left behind is spread first.

A branch is begun once, with the past that it reaches (`reach`), and ended once, when its session leaves it; ended
branches that nobody reaches are deleted. Both are read from the journal in its order, so at every moment the tables
describe a moment of the past, and what nobody reached then nobody can reach later. A branch that begins a log, is
not forked and not ended needs no row: most sessions have none.
"""

import fcntl
import heapq
import os
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import structlog

from service.store.base import (
    REPLIES_KEPT,
    SCHEMA_VERSION,
    SNAPSHOTS_KEPT,
    TENANT_REPLIES_KEPT,
    TOMBSTONE_TTL_S,
    Applied,
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
    StoreError,
    cut,
    holds,
    join,
    now_ms,
    parts,
    stamp,
    surplus,
)

log = structlog.get_logger(__name__)

SPREAD_EVERY_S = 1.0
SPREAD_KEYS = 256
DELETED_AT_ONCE = 1_000
COLLECTED_AT_ONCE = 256
GIVE_WAY_S = 0.0005
CACHED_HEADS = 16_384

META = "CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL)"

SCHEMA = """
CREATE TABLE journal (seq INTEGER PRIMARY KEY, batch BLOB NOT NULL);
CREATE TABLE sessions (
    tenant TEXT NOT NULL, id TEXT NOT NULL, model TEXT NOT NULL, version INTEGER NOT NULL, status TEXT NOT NULL,
    updated_ms INTEGER NOT NULL, expires_ms INTEGER, parent TEXT, seq INTEGER NOT NULL, head BLOB NOT NULL,
    PRIMARY KEY (tenant, id));
CREATE INDEX sessions_live ON sessions (tenant, id, expires_ms) WHERE status = 'live';
CREATE INDEX sessions_of_model ON sessions (tenant, model, id, expires_ms) WHERE status = 'live';
CREATE INDEX sessions_of_version ON sessions (model, version, expires_ms) WHERE status = 'live';
CREATE INDEX sessions_forked ON sessions (tenant, parent) WHERE parent IS NOT NULL;
CREATE INDEX sessions_due ON sessions (expires_ms) WHERE status = 'live' AND expires_ms IS NOT NULL;
CREATE INDEX sessions_ended ON sessions (updated_ms) WHERE status != 'live';
CREATE TABLE log (branch TEXT NOT NULL, start INTEGER NOT NULL, count INTEGER NOT NULL, segment BLOB NOT NULL,
    PRIMARY KEY (branch, start));
CREATE TABLE snapshots (branch TEXT NOT NULL, graph TEXT NOT NULL, position INTEGER NOT NULL, snapshot BLOB NOT NULL,
    PRIMARY KEY (branch, graph, position));
CREATE TABLE branches (branch TEXT PRIMARY KEY, line BLOB NOT NULL, ended INTEGER NOT NULL);
CREATE TABLE reach (branch TEXT NOT NULL, reacher TEXT NOT NULL, upto INTEGER, since INTEGER NOT NULL,
    PRIMARY KEY (branch, reacher));
CREATE INDEX reach_of ON reach (reacher);
CREATE TABLE loose (branch TEXT PRIMARY KEY);
CREATE TABLE replies (
    tenant TEXT NOT NULL, scope TEXT NOT NULL, key TEXT NOT NULL, at_ms INTEGER NOT NULL, reply BLOB NOT NULL,
    PRIMARY KEY (tenant, scope, key));
CREATE INDEX replies_newest ON replies (tenant, scope, at_ms);
CREATE INDEX replies_old ON replies (at_ms);
"""
"""`branches`: those that do not begin a log, and ended ones. `reach`: what the session on `reacher` reaches of another
branch (up to `upto`), or that its own log begins after `since` (`upto` is NULL). `loose`: where there may be something
to delete."""

PROBE = "INSERT INTO meta VALUES ('probe', 1) ON CONFLICT (key) DO UPDATE SET value = value + 1"
"""Writes a page: a value that does not change would not reach the disk."""

FACTS = """
SELECT l.branch, coalesce(max(b.ended), 0), max(r.upto), min(r.since), coalesce(max(r.reacher = l.branch), 0)
FROM (SELECT branch FROM loose LIMIT ?) AS l
LEFT JOIN branches AS b ON b.branch = l.branch LEFT JOIN reach AS r ON r.branch = l.branch GROUP BY l.branch
"""

BESIDE = """
INSERT OR REPLACE INTO snapshots SELECT * FROM (VALUES {values}) AS v
WHERE EXISTS (SELECT 1 FROM branches WHERE branch = v.column1 AND NOT ended) OR v.column3 <=
    (SELECT start + count FROM log WHERE branch = v.column1 AND start < v.column3 ORDER BY start DESC LIMIT 1)
"""

ReplyKey = tuple[str, str, str]
"""(tenant, scope, key)"""


class _Batch(msgspec.Struct, frozen=True, array_like=True):
    """A row of the journal."""

    commits: tuple[Commit, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    kept: tuple[tuple[str, Reply], ...] = ()
    """(tenant, reply) of requests that committed nothing"""


class _OldCommit(msgspec.Struct, frozen=True, array_like=True):
    """A commit as schema 1 had it; a row of its journal is a list of them."""

    head: Head
    expected: tuple[int, int] | None
    segments: tuple[Segment, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()


_batch = msgspec.msgpack.Decoder(_Batch)
_old_commits = msgspec.msgpack.Decoder(list[_OldCommit])
_head = msgspec.msgpack.Decoder(Head)
_line = msgspec.msgpack.Decoder(Line)
_segment = msgspec.msgpack.Decoder(Segment)
_snapshot = msgspec.msgpack.Decoder(Snapshot)
_reply = msgspec.msgpack.Decoder(Reply)
_encoder = msgspec.msgpack.Encoder()


@dataclass(slots=True)
class _Unspread:
    """What the journal holds of one session and the tables do not yet."""

    head: Head
    seq: int
    segments: list[Segment] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    branches: set[str] = field(default_factory=set)

    def add(self, commit: Commit, seq: int) -> set[str]:
        """Take a commit in; returns the branches that it writes to."""
        self.head, self.seq = commit.head, seq
        self.segments.extend(commit.segments)
        self.snapshots.extend(commit.snapshots)
        written = {one.branch for one in commit.segments} | {one.branch for one in commit.snapshots}
        self.branches |= written
        return written


@dataclass(slots=True)
class _Moves:
    """What the journal says of branches and the tables do not yet."""

    begun: dict[str, Line] = field(default_factory=dict)
    origins: dict[str, int] = field(default_factory=dict)
    """branch -> after which position its session's log begins, where that is not 0"""
    ended: set[str] = field(default_factory=set)

    def add(self, commit: Commit, stored: Head | None) -> None:
        """Take a commit in; `stored` is the head before it, None when that is not known."""
        head = commit.head
        if commit.left:
            self.ended.add(commit.left)
        if commit.branch is not None and commit.branch.line:
            self.begun[commit.branch.id] = commit.branch.line
        known = stored is not None and (stored.branch, stored.origin) == (head.branch, head.origin)
        if head.status == "live" and head.origin and not known:
            self.origins[head.branch] = head.origin


class SqliteStore:
    """Sessions in `<folder>/sessions.sqlite`; commits survive kill -9 (`commit`) or power loss (`fsync`)."""

    run = ""

    def __init__(self, folder: Path, durability: str = "commit", idempotency_ttl_s: int = 86_400) -> None:
        self.durability = durability
        self._reply_ttl_ms = idempotency_ttl_s * 1000
        self._lock = threading.RLock()
        self._lock_file = _lock_folder(folder)
        self._path = folder / "sessions.sqlite"
        self._cache: OrderedDict[Key, Head | None] = OrderedDict()
        self._unspread: dict[Key, _Unspread] = {}
        self._writers: dict[str, dict[Key, _Unspread]] = {}
        """branch -> the sessions that have written to it"""
        self._moves = _Moves()
        self._beside: dict[str, list[Snapshot]] = {}
        self._replies: dict[ReplyKey, Reply] = {}
        self._snapped: set[str] = set()
        """branches that have got snapshots and may have too many now"""
        self._failure: str | None = None
        self._damage: str | None = None
        self._open_write: tuple[int, _Batch] | None = None
        try:
            self._db = _connect(self._path, durability)
        except StoreError:
            os.close(self._lock_file)
            raise
        try:
            self._replay()
        except (sqlite3.Error, msgspec.DecodeError) as error:
            self._db.close()
            os.close(self._lock_file)
            raise StoreError(_opening_failed(self._path, error)) from error
        self._stop = threading.Event()
        self._spreader = threading.Thread(target=self._spread_forever, name="store", daemon=True)
        self._spreader.start()

    # ------------------------------------------------------------------ opening

    def _replay(self) -> None:
        rows = self._db.execute("SELECT seq, batch FROM journal ORDER BY seq").fetchall()
        last = self._db.execute("SELECT value FROM meta WHERE key = 'seq'").fetchone()
        self._spread_to = self._seq = int(last[0])
        for seq, blob in rows:
            self._take(seq, _batch.decode(blob), replayed=True)
        if rows:
            log.info("journal_replayed", commits=len(rows), sessions=len(self._unspread))
        self._spread()

    def _spread_up_to(self, key: Key) -> int:
        row = self._db.execute("SELECT seq FROM sessions WHERE tenant = ? AND id = ?", key).fetchone()
        return int(row[0]) if row is not None else 0

    # ------------------------------------------------------------------ committing

    def commit(self, commits: Sequence[Commit], snapshots: Sequence[Snapshot] = ()) -> list[Result]:
        """Apply a group commit with one INSERT; one result a commit."""
        with self._using():
            results, stamped = self._judge(commits, now_ms())
            if stamped or snapshots:
                self._write(_Batch(tuple(stamped), tuple(snapshots)))
            return results

    def _judge(self, commits: Sequence[Commit], now: int) -> tuple[list[Result], list[Commit]]:
        """The results, and what is to be written; a commit sees those before it in its group."""
        results: list[Result] = []
        stamped: list[Commit] = []
        heads: dict[Key, Head] = {}
        replies = self._replies_of(commits)
        for commit in commits:
            stored, source = self._heads_of(commit, heads)
            taken = replies.get(_reply_key(commit.head.tenant, commit.reply)) if commit.reply is not None else None
            if not holds(commit, stored, source, self._counting(taken, stored, now), now):
                results.append(Conflict(stored.at(now) if stored is not None else None))
                continue
            new = stamp(commit, stored, now)
            stamped.append(new)
            results.append(Applied(new.head))
            heads[new.head.key] = new.head
            if new.reply is not None:
                replies[_reply_key(new.head.tenant, new.reply)] = new.reply
        return results, stamped

    def _heads_of(self, commit: Commit, heads: dict[Key, Head]) -> tuple[Head | None, Head | None]:
        """The stored heads of a commit and of its source, those of the same group before all."""
        key = commit.head.key
        stored = heads.get(key) or self._stored(key)
        if commit.source is None:
            return stored, None
        parent = (commit.head.tenant, commit.source.id)
        return stored, heads.get(parent) or self._stored(parent)

    def _write(self, batch: _Batch) -> None:
        seq = self._seq + 1
        try:
            self._db.execute("INSERT INTO journal VALUES (?, ?)", (seq, _encoder.encode(batch)))
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
        self._take(seq, batch)

    def _settle_open(self) -> bool:
        """Find out whether the write whose outcome is open was applied, and take it if so."""
        if self._open_write is None:
            return False
        seq, batch = self._open_write
        row = self._db.execute("SELECT 1 FROM journal WHERE seq = ?", (seq,)).fetchone()
        self._open_write = None
        if row is not None:
            self._take(seq, batch)
        return row is not None

    def _take(self, seq: int, batch: _Batch, replayed: bool = False) -> None:
        """Keep in memory what the journal holds now; of what is replayed a part may be in the tables already."""
        self._seq = max(seq, self._seq)
        for commit in batch.commits:
            self._moves.add(commit, None if replayed else self._known(commit.head.key))
            if not replayed or seq > self._spread_up_to(commit.head.key):
                self._remember(commit, seq)
            if commit.reply is not None:
                self._add_reply(commit.head.tenant, commit.reply)
        for snapshot in batch.snapshots:
            self._beside.setdefault(snapshot.branch, []).append(snapshot)
        for tenant, reply in batch.kept:
            self._add_reply(tenant, reply)

    def _remember(self, commit: Commit, seq: int) -> None:
        key = commit.head.key
        entry = self._unspread.get(key)
        if entry is None:
            entry = self._unspread[key] = _Unspread(commit.head, seq)
        for branch in entry.add(commit, seq):
            self._writers.setdefault(branch, {})[key] = entry
        self._cache.pop(key, None)

    # ------------------------------------------------------------------ replies

    def keep(self, tenant: str, reply: Reply) -> bool:
        """Keep the answer of a request that committed nothing; its life is the session's unless it says one."""
        with self._using():
            now = now_ms()
            head = self._stored((tenant, reply.scope)) if reply.scope else None
            if self._counting(self._kept(_reply_key(tenant, reply)), head, now) is not None:
                return False
            life = reply.life or (head.life if head is not None else 0)
            self._write(_Batch(kept=((tenant, msgspec.structs.replace(reply, at_ms=now, life=life)),)))
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
        return self._replies.get(key) or self._stored_replies([key]).get(key)

    def _replies_of(self, commits: Sequence[Commit]) -> dict[ReplyKey, Reply]:
        """What is kept under the keys of a group commit, found by one statement at most."""
        keys = {_reply_key(one.head.tenant, one.reply) for one in commits if one.reply is not None}
        known = {key: self._replies[key] for key in keys if key in self._replies}
        return known | self._stored_replies(keys - known.keys())

    def _stored_replies(self, keys: Collection[ReplyKey]) -> dict[ReplyKey, Reply]:
        if not keys:
            return {}
        sql = f"SELECT t.tenant, t.reply {_matching('replies', ('tenant', 'scope', 'key'), len(keys))}"
        rows = self._db.execute(sql, _flat(keys)).fetchall()
        found = [(tenant, _reply.decode(blob)) for tenant, blob in rows]
        return {_reply_key(tenant, reply): reply for tenant, reply in found}

    def _add_reply(self, tenant: str, reply: Reply) -> None:
        key = _reply_key(tenant, reply)
        self._replies.pop(key, None)
        self._replies[key] = reply

    # ------------------------------------------------------------------ reading

    def _stored(self, key: Key) -> Head | None:
        entry = self._unspread.get(key)
        if entry is not None:
            return entry.head
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        row = self._db.execute("SELECT head FROM sessions WHERE tenant = ? AND id = ?", key).fetchone()
        head = _head.decode(row[0]) if row is not None else None
        self._hold(key, head)
        return head

    def _known(self, key: Key) -> Head | None:
        """The stored head if it is in memory: what is asked after a write must not fail."""
        entry = self._unspread.get(key)
        return entry.head if entry is not None else self._cache.get(key)

    def _hold(self, key: Key, head: Head | None) -> None:
        self._cache[key] = head
        if len(self._cache) > CACHED_HEADS:
            self._cache.popitem(last=False)

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Hold the lock, settle a write whose outcome is open, and turn what SQLite says into StoreError."""
        with self._translated(), self._lock:
            _roll_back(self._db)
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
        if _is_damage(error):
            self._damage = f"{self._path.name} is damaged: {error}"

    def head(self, key: Key, at_ms: int | None = None) -> Head | None:
        """The head of a session."""
        with self._using():
            stored = self._stored(key)
            return stored.at(now_ms() if at_ms is None else at_ms) if stored is not None else None

    def line(self, branch: str) -> Line:
        """What comes before a branch's own entries."""
        with self._using():
            return self._line_of(branch)

    def _line_of(self, branch: str) -> Line:
        if branch in self._moves.begun:
            return self._moves.begun[branch]
        row = self._db.execute("SELECT line FROM branches WHERE branch = ?", (branch,)).fetchone()
        return _line.decode(row[0]) if row is not None else ()

    def log(self, branch: str, after: int, to: int) -> list[Segment]:
        """Positions after + 1 to `to`, in order."""
        with self._using():
            pieces = parts(self._line_of(branch), branch, after, to)
            rows = [self._segments_of(*piece) for piece in pieces]
        found: list[Segment] = []
        with self._translated():
            for (_, first, last), (blobs, unspread) in zip(pieces, rows, strict=True):
                found += [cut(segment, first, last) for segment in (*map(_segment.decode, blobs), *unspread)]
        return join(found)

    def _segments_of(self, branch: str, after: int, to: int) -> tuple[list[bytes], list[Segment]]:
        rows = self._db.execute(
            "SELECT segment FROM log WHERE branch = ? AND start < ? AND start + count > ? ORDER BY start",
            (branch, to, after),
        ).fetchall()
        unspread = [segment for entry in self._writers.get(branch, {}).values() for segment in entry.segments]
        return [row[0] for row in rows], [s for s in unspread if s.branch == branch and s.end > after and s.start < to]

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
        unspread = [s for s in self._unspread_snapshots(branch, graph) if s.position < below]
        row = self._db.execute(
            "SELECT snapshot FROM snapshots WHERE branch = ? AND graph = ? AND position < ?"
            " ORDER BY position DESC LIMIT 1",
            (branch, graph, below),
        ).fetchone()
        found = unspread + ([_snapshot.decode(row[0])] if row is not None else [])
        return max(found, key=lambda snapshot: snapshot.position, default=None)

    def _unspread_snapshots(self, branch: str, graph: str) -> list[Snapshot]:
        found = [snapshot for entry in self._writers.get(branch, {}).values() for snapshot in entry.snapshots]
        found += self._beside.get(branch, ())
        return [one for one in found if (one.branch, one.graph) == (branch, graph)]

    def snapshots(self, branch: str, after: int, to: int, graph: str) -> list[int]:
        """Positions after + 1 to `to` at which there are snapshots, in order."""
        with self._using():
            found: set[int] = set()
            for name, upto in ((branch, to), *self._line_of(branch)):
                last = min(upto, to)
                rows = self._db.execute(
                    "SELECT position FROM snapshots WHERE branch = ? AND graph = ? AND position > ? AND position <= ?",
                    (name, graph, after, last),
                )
                found.update(position for (position,) in rows)
                unspread = self._unspread_snapshots(name, graph)
                found.update(one.position for one in unspread if after < one.position <= last)
            return sorted(found)

    def heads(self, tenant: str, model: str | None, after: str, limit: int) -> list[Head]:
        """Live sessions in order of id; what is not spread yet is laid over the tables' page."""
        of_model, arguments = ("AND model = ?", [model]) if model is not None else ("", [])
        sql = (
            f"SELECT head FROM sessions WHERE status = 'live' AND tenant = ? {of_model} AND id > ?"
            " AND (expires_ms IS NULL OR expires_ms > ?) ORDER BY id"
        )
        with self._using():
            now = now_ms()
            changed = sorted(
                (one.head for (of, id), one in self._unspread.items() if of == tenant and id > after),
                key=lambda h: h.id,
            )
            with closing(self._db.execute(sql, [tenant, *arguments, after, now])) as rows:
                merged = heapq.merge(self._spread_heads(rows), changed, key=lambda head: head.id)
                living = (h for h in merged if h.at(now).status == "live" and model in (None, h.model))
                return list(islice(living, limit))

    def _spread_heads(self, rows: Iterable[tuple[bytes]]) -> Iterator[Head]:
        """The heads in rows of the table that the journal does not change."""
        return (head for (blob,) in rows if (head := _head.decode(blob)).key not in self._unspread)

    def forks(self, key: Key, life: int) -> list[str]:
        """Ids of the live sessions that were forked from that life of a session."""
        with self._using():
            now = now_ms()
            rows = self._db.execute("SELECT head FROM sessions WHERE tenant = ? AND parent = ?", key).fetchall()
            unspread = [entry.head for entry in self._unspread.values() if entry.head.tenant == key[0]]
            heads = [head for head in (*self._spread_heads(rows), *unspread) if head.at(now).status == "live"]
        parents = ((head.id, head.parent) for head in heads)
        return sorted(id for id, of in parents if of is not None and (of.session, of.life) == (key[1], life))

    def lives(self, model: str, version: int) -> bool:
        """Whether any session of a model version lives."""
        with self._using():
            now = now_ms()
            unspread = (entry.head for entry in self._unspread.values())
            if any((h.model, h.version) == (model, version) and h.at(now).status == "live" for h in unspread):
                return True
            sql = "SELECT head FROM sessions WHERE status = 'live' AND model = ? AND version = ? AND expires_ms"
            both = f"{sql} IS NULL UNION ALL {sql} > ?"
            with closing(self._db.execute(both, (model, version, model, version, now))) as rows:
                return next(self._spread_heads(rows), None) is not None

    def next_epoch(self, key: Key) -> int:
        """One more than every epoch that this id has had."""
        with self._using():
            stored = self._stored(key)
            if stored is not None:
                return stored.epoch + 1
            row = self._db.execute("SELECT value FROM meta WHERE key = 'epoch_floor'").fetchone()
            return int(row[0]) + 1

    # ------------------------------------------------------------------ spreading

    def _spread_forever(self) -> None:
        while not self._stop.wait(SPREAD_EVERY_S):
            try:
                self._spread()
            except (sqlite3.Error, msgspec.DecodeError) as error:
                self._note(error)
                log.error("store_failed", error=str(error))

    def _spread(self) -> None:
        """Move what the journal holds into the tables, and delete what nobody reaches any more."""
        spread = self._spread_journal()
        if self._collect() or spread:
            self._checkpoint()

    def _spread_journal(self) -> bool:
        """Spread in slices, then drop the journal up to where it stood; returns whether it held anything."""
        with self._lock:
            upto, keys = self._seq, list(self._unspread)
            if upto == self._spread_to:
                return False
            self._apply_moves()
        for part in _slices(keys, SPREAD_KEYS):
            with self._giving_way():
                self._spread_slice(part)
        self._spread_beside()
        self._spread_replies()
        self._drop_journal(upto)
        self._thin()
        return True

    @contextmanager
    def _giving_way(self) -> Iterator[None]:
        with self._lock:
            yield
        time.sleep(GIVE_WAY_S)  # a lock that is taken again at once is hardly ever given to who waits for it

    def _apply_moves(self) -> None:
        moves = self._moves
        reach: list[tuple[Any, ...]] = [
            (past, branch, upto, 0) for branch, line in moves.begun.items() for past, upto in line
        ]
        reach += [(branch, branch, None, origin) for branch, origin in moves.origins.items()]
        with _transaction(self._db):
            self._insert("branches", [(branch, _encoder.encode(line), 0) for branch, line in moves.begun.items()])
            self._insert("reach", reach)
            for raised in _slices(list(moves.origins.items()), 512):
                self._raise(raised)
            for ended in _slices(sorted(moves.ended), 512):
                self._end(ended)
        self._moves = _Moves()

    def _raise(self, origins: Sequence[tuple[str, int]]) -> None:
        self._db.execute(
            f"UPDATE reach SET since = v.column2 FROM (VALUES {_marks(origins, 2)}) AS v WHERE reacher = v.column1",
            _flat(origins),
        )
        self._loosen([branch for branch, _ in origins])

    def _loosen(self, reachers: Sequence[str]) -> None:
        self._db.execute(
            f"INSERT OR IGNORE INTO loose SELECT branch FROM reach WHERE reacher IN {_list(reachers)}",
            reachers,
        )

    def _end(self, branches: Sequence[str]) -> None:
        self._loosen(branches)
        marks = _list(branches)
        self._db.execute(f"DELETE FROM reach WHERE reacher IN {marks}", branches)
        rows = [(branch, _encoder.encode(()), 1) for branch in branches]
        self._db.execute(
            f"INSERT INTO branches VALUES {_marks(rows, 3)} ON CONFLICT DO UPDATE SET ended = 1", _flat(rows)
        )
        self._insert("loose", [(branch,) for branch in branches])

    def _spread_slice(self, keys: Sequence[Key]) -> None:
        entries = [self._unspread[key] for key in keys]
        with _transaction(self._db):
            segments = [segment for entry in entries for segment in join(entry.segments)]
            self._insert("log", [(s.branch, s.start, s.count, _encoder.encode(s)) for s in segments])
            snapshots = [snapshot for entry in entries for snapshot in entry.snapshots]
            self._insert("snapshots", [_snapshot_row(snapshot) for snapshot in snapshots])
            self._insert("sessions", [_session_row(entry) for entry in entries])
        self._snapped.update(snapshot.branch for snapshot in snapshots)
        for key, entry in zip(keys, entries, strict=True):
            del self._unspread[key]
            self._hold(key, entry.head)
            self._forget_writer(key, entry.branches)

    def _forget_writer(self, key: Key, branches: Iterable[str]) -> None:
        for branch in branches:
            del self._writers[branch][key]
            if not self._writers[branch]:
                del self._writers[branch]

    def _spread_beside(self) -> None:
        for part in _slices(list(self._beside), SPREAD_KEYS):
            with self._giving_way():
                rows = [_snapshot_row(snapshot) for branch in part for snapshot in self._beside[branch]]
                for some in _slices(rows, 512):
                    self._db.execute(BESIDE.format(values=_marks(some, 4)), _flat(some))
                self._snapped.update(part)
                for branch in part:
                    del self._beside[branch]

    def _spread_replies(self) -> None:
        for part in _slices(list(self._replies), SPREAD_KEYS):
            with self._giving_way():
                replies = [self._replies[key] for key in part]
                with _transaction(self._db):
                    rows = [(*key, one.at_ms, _encoder.encode(one)) for key, one in zip(part, replies, strict=True)]
                    self._insert("replies", rows)
                    self._drop_surplus_replies({(tenant, scope) for tenant, scope, _ in part})
                for key in part:
                    del self._replies[key]

    def _drop_surplus_replies(self, scopes: Collection[Key]) -> None:
        found = self._db.execute(
            f"SELECT v.column1, v.column2 FROM (VALUES {_marks(scopes, 2)}) AS v"
            " WHERE (SELECT count(*) FROM replies WHERE tenant = v.column1 AND scope = v.column2)"
            f" > iif(v.column2 = '', {TENANT_REPLIES_KEPT}, {REPLIES_KEPT})",
            _flat(scopes),
        ).fetchall()
        for tenant, scope in found:
            self._db.execute(
                "DELETE FROM replies WHERE rowid IN (SELECT rowid FROM replies WHERE tenant = ? AND scope = ?"
                " ORDER BY at_ms DESC, rowid DESC LIMIT -1 OFFSET ?)",
                (tenant, scope, REPLIES_KEPT if scope else TENANT_REPLIES_KEPT),
            )

    def _drop_journal(self, upto: int) -> None:
        with self._lock, _transaction(self._db):
            self._db.execute("UPDATE meta SET value = ? WHERE key = 'seq'", (upto,))
            self._db.execute("DELETE FROM journal WHERE seq <= ?", (upto,))
        self._spread_to = upto

    def _insert(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        # One statement for many rows: a statement gives the GIL away once, executemany once a row.
        for part in _slices(rows, 512):
            self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES {_marks(part, len(part[0]))}", _flat(part))

    def _checkpoint(self) -> None:
        with closing(sqlite3.connect(self._path, timeout=1.0)) as db:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    # ------------------------------------------------------------------ deleting

    def _thin(self) -> None:
        """Delete the snapshots that need not be kept."""
        for part in _slices(sorted(self._snapped), SPREAD_KEYS):
            with self._giving_way():
                marks = _list(part)
                crowded = self._db.execute(
                    f"SELECT branch, graph, group_concat(position) FROM snapshots WHERE branch IN {marks}"
                    f" GROUP BY branch, graph HAVING count(*) > {SNAPSHOTS_KEPT}",
                    part,
                ).fetchall()
                if crowded:
                    self._delete_surplus(crowded, part)
                self._snapped.difference_update(part)

    def _delete_surplus(self, crowded: Sequence[tuple[str, str, str]], branches: Sequence[str]) -> None:
        marks = _list(branches)
        rows = self._db.execute(f"SELECT DISTINCT since FROM reach WHERE branch IN {marks}", branches)
        # An origin that is not in the tables yet protects, too.
        protected = {since for (since,) in rows} | set(self._moves.origins.values())
        places = [
            (branch, graph, position)
            for branch, graph, positions in crowded
            for position in surplus([int(one) for one in positions.split(",")], protected)
        ]
        for part in _slices(places, 512):
            self._delete_exactly("snapshots", ("branch", "graph", "position"), part)

    def _delete_exactly(self, table: str, columns: Sequence[str], rows: Collection[Sequence[Any]]) -> None:
        found = f"SELECT t.rowid {_matching(table, columns, len(rows))}"
        self._db.execute(f"DELETE FROM {table} WHERE rowid IN ({found})", _flat(rows))

    def _collect(self) -> bool:
        """Delete what no session reaches of the loose branches; returns whether there were any."""
        collected = False
        while rows := self._loose():
            collected = True
            self._delete_branches([branch for branch, ended, upto, *_ in rows if ended and upto is None])
            for branch, ended, upto, since, own in rows:
                if ended and upto is not None:
                    self._cut_end(branch, upto)
                if since and (ended or own):
                    self._cut_begin(branch, since)
            done = [row[0] for row in rows]
            with self._lock:
                self._db.execute(f"DELETE FROM loose WHERE branch IN {_list(done)}", done)
        return collected

    def _loose(self) -> list[tuple[str, int, int | None, int | None, int]]:
        """Branches to look at: (branch, ended, upto, since, whether that holds for its own session, too)."""
        with self._lock:
            return self._db.execute(FACTS, (COLLECTED_AT_ONCE,)).fetchall()

    def _delete_branches(self, branches: Sequence[str]) -> None:
        if branches:
            marks = _list(branches)
            for table in ("log", "snapshots", "branches"):
                self._delete(table, f"branch IN {marks}", branches)

    def _cut_end(self, branch: str, upto: int) -> None:
        """Delete the entries and snapshots after `upto`, which a branch's session left behind."""
        with self._lock:
            row = self._db.execute(
                "SELECT start, segment FROM log WHERE branch = ? AND start < ? AND start + count > ?",
                (branch, upto, upto),
            ).fetchone()
            if row is not None:
                left = cut(_segment.decode(row[1]), row[0], upto)
                self._insert("log", [(branch, left.start, left.count, _encoder.encode(left))])
        self._delete("log", "branch = ? AND start >= ?", (branch, upto))
        self._delete("snapshots", "branch = ? AND position > ?", (branch, upto))

    def _cut_begin(self, branch: str, since: int) -> None:
        """Delete the entries up to `since` and the snapshots before it, which no session retains."""
        self._delete("log", "branch = ? AND start < ? AND start + count <= ?", (branch, since, since))
        self._delete("snapshots", "branch = ? AND position < ?", (branch, since))

    def _delete(self, table: str, where: str, arguments: Sequence[Any]) -> None:
        """Delete rows in bounded statements, so that no commit waits long."""
        rows = f"SELECT rowid FROM {table} WHERE {where} LIMIT {DELETED_AT_ONCE}"
        deleted = DELETED_AT_ONCE
        while deleted == DELETED_AT_ONCE:
            with self._giving_way():
                deleted = self._db.execute(f"DELETE FROM {table} WHERE rowid IN ({rows})", arguments).rowcount

    # ------------------------------------------------------------------ upkeep

    def sweep(self, busy: Collection[Key] = ()) -> int:
        """Expire what is due, forget old tombstones and old replies, a bounded number a call."""
        now = now_ms()
        with self._using():
            expired = self._expire(busy, now)
            ended = self._db.execute(
                "SELECT head FROM sessions WHERE status != 'live' AND updated_ms < ? LIMIT 1000",
                (now - TOMBSTONE_TTL_S * 1000,),
            ).fetchall()
            old = [head for head in self._spread_heads(ended) if head.key not in busy]
            self._drop(old)
        with self._using():
            self._db.execute(
                "DELETE FROM replies WHERE rowid IN (SELECT rowid FROM replies WHERE at_ms <= ? LIMIT 10000)",
                (now - self._reply_ttl_ms,),
            )
        return expired + len(old)

    def _expire(self, busy: Collection[Key], now: int) -> int:
        """Close what is due in one commit: serving waits for one write, not for one a session."""
        rows = self._db.execute(
            "SELECT head FROM sessions WHERE status = 'live' AND expires_ms <= ? LIMIT 1000", (now,)
        ).fetchall()
        due = [head for head in self._spread_heads(rows) if head.key not in busy]
        if due:
            self._write(_Batch(tuple(Commit(head.at(now), head.fence, left=head.branch) for head in due)))
        return len(due)

    def _drop(self, heads: Sequence[Head]) -> None:
        if not heads:
            return
        keys = [head.key for head in heads]
        floor = max(head.epoch for head in heads)
        with _transaction(self._db):
            self._db.execute("UPDATE meta SET value = max(value, ?) WHERE key = 'epoch_floor'", (floor,))
            self._delete_exactly("sessions", ("tenant", "id"), keys)
            self._delete_exactly("replies", ("tenant", "scope"), keys)
        for key in keys:
            self._cache.pop(key, None)

    def check(self) -> str | None:
        """None when the last write succeeded and the data file can be written."""
        if self._failure is None or self._damage is not None:
            return self._damage
        with self._lock:
            try:
                self._db.execute(PROBE)
                self._failure = None
            except sqlite3.Error as error:
                self._note(error)
        return self._failure

    def close(self) -> None:
        """Spread the journal, close the file, give the folder free."""
        self._stop.set()
        self._spreader.join()
        with self._lock:
            try:
                self._spread()
            except (sqlite3.Error, msgspec.DecodeError) as error:
                log.error("store_failed", error=str(error))  # the journal keeps it for the next start
            self._db.close()
        os.close(self._lock_file)


def _lock_folder(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"the data folder {str(folder)!r} can not be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise StoreError(
            f"the data folder {str(folder)!r} is in use by another process: stop it, or choose another folder"
        ) from error
    return file


def _connect(path: Path, durability: str) -> sqlite3.Connection:
    """An open file of this schema that can be written; raises StoreError."""
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    except sqlite3.Error as error:
        raise StoreError(_opening_failed(path, error)) from error
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA synchronous={'FULL' if durability == 'fsync' else 'NORMAL'}")
        # Checkpoints are made by the spreader, so that no commit has to wait for one.
        db.execute("PRAGMA wal_autocheckpoint=0")
        _prepare_schema(db)
        db.execute(PROBE)
    except (sqlite3.Error, msgspec.DecodeError) as error:
        db.close()
        raise StoreError(_opening_failed(path, error)) from error
    except StoreError:
        db.close()
        raise
    return db


def _opening_failed(path: Path, error: Exception) -> str:
    if _is_damage(error):
        return f"{path.name} is damaged and can not be read: {error}"
    return f"{path.name} can not be opened: {error}"


def _is_damage(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return isinstance(error, msgspec.DecodeError) or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    _roll_back(db)
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        _roll_back(db)
        raise


def _roll_back(db: sqlite3.Connection) -> None:
    if db.in_transaction:
        db.execute("ROLLBACK")


def _prepare_schema(db: sqlite3.Connection) -> None:
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() is None:
        with _transaction(db):
            db.execute(META)
            _create_tables(db)
            db.execute("INSERT INTO meta VALUES ('schema', ?), ('epoch_floor', 0), ('seq', 0)", (SCHEMA_VERSION,))
    found = int(db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()[0])
    if found > SCHEMA_VERSION:
        raise StoreError(
            f"the data folder was written by a newer version (schema {found}, this one knows {SCHEMA_VERSION})"
        )
    if found < SCHEMA_VERSION:
        with _transaction(db):
            _migrate(db)
        log.info("store_migrated", schema=SCHEMA_VERSION)


def _create_tables(db: sqlite3.Connection) -> None:
    for statement in SCHEMA.split(";\n"):
        db.execute(statement)


def _migrate(db: sqlite3.Connection) -> None:
    """From schema 1, which had no branches after others, no forks and no replies."""
    for index in ("live", "of_model", "due", "ended"):
        db.execute(f"DROP INDEX sessions_{index}")
    for table in ("journal", "sessions", "log", "snapshots"):
        db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    _create_tables(db)
    db.create_function("version_of", 1, lambda blob: _head.decode(blob).version)
    db.execute(
        "INSERT INTO sessions SELECT tenant, id, model, version_of(head), status, updated_ms, expires_ms, NULL, seq,"
        " head FROM old_sessions"
    )
    db.execute("INSERT INTO log SELECT branch, start, count, segment FROM old_log")
    _migrate_snapshots(db)
    _migrate_journal(db)
    for table in ("journal", "sessions", "log", "snapshots"):
        db.execute(f"DROP TABLE old_{table}")
    db.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (SCHEMA_VERSION,))


def _migrate_snapshots(db: sqlite3.Connection) -> None:
    """Say of every snapshot which graph's it is: that of the session whose branch it is on."""
    graphs: dict[str, str] = {}
    for (blob,) in db.execute("SELECT head FROM sessions WHERE status = 'live'"):
        head = _head.decode(blob)
        graphs[head.branch] = head.graph
    for (blob,) in db.execute("SELECT snapshot FROM old_snapshots"):
        found = _snapshot.decode(blob)
        if found.branch in graphs:
            row = _snapshot_row(msgspec.structs.replace(found, graph=graphs[found.branch]))
            db.execute("INSERT INTO snapshots VALUES (?, ?, ?, ?)", row)


def _migrate_journal(db: sqlite3.Connection) -> None:
    """Rewrite what is not spread yet, with the branches that its commits left."""
    heads: dict[Key, Head] = {}
    for seq, blob in db.execute("SELECT seq, commits FROM old_journal ORDER BY seq"):
        commits: list[Commit] = []
        for old in _old_commits.decode(blob):
            row = db.execute("SELECT seq, head FROM sessions WHERE tenant = ? AND id = ?", old.head.key).fetchone()
            if row is None or seq > row[0]:
                stored = heads.get(old.head.key) or (_head.decode(row[1]) if row is not None else None)
                commits.append(_new_commit(old, stored))
                heads[old.head.key] = old.head
        db.execute("INSERT INTO journal VALUES (?, ?)", (seq, _encoder.encode(_Batch(tuple(commits)))))


def _new_commit(old: _OldCommit, stored: Head | None) -> Commit:
    snapshots = tuple(msgspec.structs.replace(one, graph=old.head.graph) for one in old.snapshots)
    changed = stored is not None and (stored.branch != old.head.branch or old.head.status != "live")
    left = stored.branch if stored is not None and changed else ""
    return Commit(old.head, None, old.segments, snapshots, left=left)


def _session_row(entry: _Unspread) -> tuple[Any, ...]:
    head = entry.head
    parent = head.parent.session if head.parent is not None else None
    return (
        *head.key,
        head.model,
        head.version,
        head.status,
        head.updated_ms,
        head.expires_ms,
        parent,
        entry.seq,
        _encoder.encode(head),
    )


def _snapshot_row(snapshot: Snapshot) -> tuple[str, str, int, bytes]:
    return (snapshot.branch, snapshot.graph, snapshot.position, _encoder.encode(snapshot))


def _reply_key(tenant: str, reply: Reply) -> ReplyKey:
    return (tenant, reply.scope, reply.key)


def _marks(rows: Collection[Any], width: int) -> str:
    """Placeholders of many rows."""
    return ",".join(["(" + ",".join("?" * width) + ")"] * len(rows))


def _matching(table: str, columns: Sequence[str], rows: int) -> str:
    """The part of a SELECT that finds many rows by an index; `(a, b) IN (VALUES ...)` reads the whole table."""
    same = " AND ".join(f"t.{column} = v.column{i}" for i, column in enumerate(columns, 1))
    return f"FROM (VALUES {_marks(range(rows), len(columns))}) AS v CROSS JOIN {table} AS t ON {same}"


def _list(values: Sequence[Any]) -> str:
    """Placeholders of one list."""
    return _marks([values], len(values))


def _flat(rows: Iterable[Iterable[Any]]) -> list[Any]:
    return [value for row in rows for value in row]


def _slices(rows: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (rows[begin : begin + size] for begin in range(0, len(rows), size))
