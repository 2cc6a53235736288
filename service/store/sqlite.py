"""The SQLite store: the embedded default, one process a data folder.

A group commit is one row in a journal, whatever its size: Python's sqlite3 gives the GIL away at every row, so a
row a session costs hundreds of milliseconds beside a busy event loop. What the journal holds is kept in memory
as well, until a background thread spreads it to the tables, many tokens of a session to one row. At start the
journal that a crash left behind is spread first.
"""

import fcntl
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import structlog

from service.store.base import (
    SCHEMA_VERSION,
    TOMBSTONE_TTL_S,
    Applied,
    Commit,
    CommitUnknown,
    Conflict,
    Head,
    Key,
    Result,
    Segment,
    Snapshot,
    StoreError,
    cut,
    holds,
    join,
    now_ms,
    stamp,
)

log = structlog.get_logger(__name__)

SPREAD_EVERY_S = 1.0
SPREAD_KEYS = 256
CACHED_HEADS = 65_536

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE journal (seq INTEGER PRIMARY KEY, commits BLOB NOT NULL);
CREATE TABLE sessions (
    tenant TEXT NOT NULL, id TEXT NOT NULL, model TEXT NOT NULL, status TEXT NOT NULL,
    updated_ms INTEGER NOT NULL, expires_ms INTEGER, seq INTEGER NOT NULL, head BLOB NOT NULL,
    PRIMARY KEY (tenant, id));
CREATE INDEX sessions_live ON sessions (tenant, id) WHERE status = 'live';
CREATE INDEX sessions_of_model ON sessions (tenant, model, id) WHERE status = 'live';
CREATE INDEX sessions_due ON sessions (expires_ms) WHERE status = 'live' AND expires_ms IS NOT NULL;
CREATE INDEX sessions_ended ON sessions (updated_ms) WHERE status != 'live';
CREATE TABLE log (branch TEXT NOT NULL, start INTEGER NOT NULL, count INTEGER NOT NULL, segment BLOB NOT NULL,
    PRIMARY KEY (branch, start));
CREATE TABLE snapshots (branch TEXT NOT NULL, position INTEGER NOT NULL, snapshot BLOB NOT NULL,
    PRIMARY KEY (branch, position));
"""

_commits = msgspec.msgpack.Decoder(list[Commit])
_head = msgspec.msgpack.Decoder(Head)
_segment = msgspec.msgpack.Decoder(Segment)
_snapshot = msgspec.msgpack.Decoder(Snapshot)
_encoder = msgspec.msgpack.Encoder()


@dataclass(slots=True)
class _Unspread:
    """What the journal holds of one session and the tables do not yet."""

    head: Head
    seq: int
    segments: list[Segment] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def add(self, commit: Commit, seq: int) -> None:
        self.head, self.seq = commit.head, seq
        self.segments.extend(commit.segments)
        self.snapshots.extend(commit.snapshots)

    def forget(self, branch: str) -> None:
        self.segments = [segment for segment in self.segments if segment.branch != branch]
        self.snapshots = [snapshot for snapshot in self.snapshots if snapshot.branch != branch]
        self.forgotten.append(branch)


class SqliteStore:
    """Sessions in `<folder>/sessions.sqlite`; commits survive kill -9 (`commit`) or power loss (`fsync`)."""

    def __init__(self, folder: Path, durability: str = "commit") -> None:
        self.durability = durability
        self._lock = threading.RLock()
        self._lock_file = _lock_folder(folder)
        self._path = folder / "sessions.sqlite"
        try:
            self._db = self._open()
        except StoreError:
            os.close(self._lock_file)
            raise
        self._cache: OrderedDict[Key, Head | None] = OrderedDict()
        self._unspread: dict[Key, _Unspread] = {}
        self._branches: dict[str, _Unspread] = {}
        self._failure: str | None = None
        self._open_commit: tuple[int, list[Commit]] | None = None
        try:
            self._replay()
        except (sqlite3.Error, msgspec.MsgspecError) as error:
            self._db.close()
            os.close(self._lock_file)
            raise StoreError(f"{self._path.name} is damaged and can not be read: {error}") from error
        self._stop = threading.Event()
        self._spreader = threading.Thread(target=self._spread_forever, name="store", daemon=True)
        self._spreader.start()

    # ------------------------------------------------------------------ opening

    def _open(self) -> sqlite3.Connection:
        try:
            db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=5.0)
        except sqlite3.Error as error:
            raise StoreError(f"{self._path.name} can not be opened: {error}") from error
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute(f"PRAGMA synchronous={'FULL' if self.durability == 'fsync' else 'NORMAL'}")
            # Checkpoints are made by the spreader, so that no commit has to wait for one.
            db.execute("PRAGMA wal_autocheckpoint=0")
            _prepare_schema(db)
        except sqlite3.Error as error:
            db.close()
            raise StoreError(f"{self._path.name} can not be opened: {error}") from error
        except StoreError:
            db.close()
            raise
        return db

    def _replay(self) -> None:
        rows = self._db.execute("SELECT seq, commits FROM journal ORDER BY seq").fetchall()
        last = self._db.execute("SELECT value FROM meta WHERE key = 'seq'").fetchone()
        self._seq = max([int(last[0]), *(seq for seq, _ in rows)])
        for seq, blob in rows:
            for commit in _commits.decode(blob):
                if seq > self._spread_up_to(commit.head.key):
                    self._remember(commit, seq)
        if rows:
            log.info("journal_replayed", commits=len(rows), sessions=len(self._unspread))
        self._spread()
        self._db.execute("DELETE FROM journal WHERE seq <= ?", (self._seq,))

    def _spread_up_to(self, key: Key) -> int:
        row = self._db.execute("SELECT seq FROM sessions WHERE tenant = ? AND id = ?", key).fetchone()
        return int(row[0]) if row is not None else 0

    # ------------------------------------------------------------------ committing

    def commit(self, commits: Sequence[Commit]) -> list[Result]:
        """Apply a group commit with one INSERT; one result a commit."""
        with self._reading():
            now = now_ms()
            results: list[Result] = []
            stamped: list[Commit] = []
            for commit in commits:
                stored = self._stored(commit.head.key)
                if holds(commit, stored, now):
                    stamped.append(stamp(commit, stored, now))
                    results.append(Applied(stamped[-1].head))
                else:
                    results.append(Conflict(stored.at(now) if stored is not None else None))
            if stamped:
                self._write(stamped)
            return results

    def _write(self, commits: list[Commit]) -> None:
        seq = self._seq + 1
        try:
            self._db.execute("INSERT INTO journal VALUES (?, ?)", (seq, _encoder.encode(commits)))
            self._failure = None
        except sqlite3.Error as error:
            self._failure = str(error)
            self._open_commit = (seq, commits)
            try:
                applied = self._settle_open()
            except sqlite3.Error as again:
                raise CommitUnknown(f"the store failed and can not be read: {again}") from error
            if not applied:
                raise StoreError(f"the store could not commit: {error}") from error
            return
        self._take(seq, commits)

    def _take(self, seq: int, commits: list[Commit]) -> None:
        self._seq = seq
        for commit in commits:
            self._remember(commit, seq)

    def _settle_open(self) -> bool:
        """Find out whether the commit whose outcome is open was applied, and take it if so."""
        if self._open_commit is None:
            return False
        seq, commits = self._open_commit
        row = self._db.execute("SELECT 1 FROM journal WHERE seq = ?", (seq,)).fetchone()
        self._open_commit = None
        if row is not None:
            self._take(seq, commits)
        return row is not None

    def _remember(self, commit: Commit, seq: int) -> None:
        key = commit.head.key
        stored = self._stored(key)
        entry = self._unspread.get(key)
        if entry is None:
            entry = self._unspread[key] = _Unspread(commit.head, seq)
        if stored is not None and stored.branch != commit.head.branch:
            entry.forget(stored.branch)
        entry.add(commit, seq)
        self._branches[commit.head.branch] = entry
        if commit.head.status != "live":
            entry.forget(commit.head.branch)
        self._cache.pop(key, None)

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
        self._keep(key, head)
        return head

    def _keep(self, key: Key, head: Head | None) -> None:
        self._cache[key] = head
        if len(self._cache) > CACHED_HEADS:
            self._cache.popitem(last=False)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Hold the lock, settle a commit whose outcome is open, and turn SQLite's errors into StoreError."""
        with self._lock:
            try:
                self._settle_open()
                yield
            except sqlite3.Error as error:
                self._failure = str(error)
                raise StoreError(f"the store can not be read: {error}") from error

    def head(self, key: Key, at_ms: int | None = None) -> Head | None:
        """The head of a session."""
        with self._reading():
            stored = self._stored(key)
            return stored.at(now_ms() if at_ms is None else at_ms) if stored is not None else None

    def log(self, branch: str, after: int, to: int) -> list[Segment]:
        """Positions after + 1 to `to`, in order."""
        with self._reading():
            rows = self._db.execute(
                "SELECT segment FROM log WHERE branch = ? AND start < ? AND start + count > ? ORDER BY start",
                (branch, to, after),
            ).fetchall()
            entry = self._branches.get(branch)
            unspread = list(entry.segments) if entry is not None else []
        segments = [_segment.decode(row[0]) for row in rows]
        segments += [s for s in unspread if s.branch == branch and s.end > after and s.start < to]
        return join([cut(segment, after, to) for segment in segments])

    def snapshot(self, branch: str, below: int) -> Snapshot | None:
        """The newest snapshot at a position less than `below`."""
        with self._reading():
            entry = self._branches.get(branch)
            unspread = entry.snapshots if entry is not None else []
            found = [s for s in unspread if s.branch == branch and s.position < below]
            if found:
                return found[-1]
            row = self._db.execute(
                "SELECT snapshot FROM snapshots WHERE branch = ? AND position < ? ORDER BY position DESC LIMIT 1",
                (branch, below),
            ).fetchone()
        return _snapshot.decode(row[0]) if row is not None else None

    def heads(self, tenant: str, model: str | None, after: str, limit: int) -> list[Head]:
        """Live sessions in order of id; what is not spread yet is laid over the tables' page."""
        of_model, arguments = ("AND model = ?", [model]) if model is not None else ("", [])
        with self._reading():
            now = now_ms()
            changed = {key[1]: entry.head for key, entry in self._unspread.items() if key[0] == tenant}
            rows = self._db.execute(
                f"SELECT head FROM sessions WHERE status = 'live' AND tenant = ? {of_model} AND id > ?"
                " AND (expires_ms IS NULL OR expires_ms > ?) ORDER BY id LIMIT ?",
                [tenant, *arguments, after, now, limit + len(changed)],
            ).fetchall()
        page = {head.id: head for head in (_head.decode(row[0]) for row in rows)}
        complete_to = max(page, default=None) if len(rows) == limit + len(changed) else None
        page.update((id, head) for id, head in changed.items() if id > after)
        found = [
            head
            for id, head in sorted(page.items())
            if head.at(now).status == "live"
            and model in (None, head.model)
            and (complete_to is None or id <= complete_to)
        ]
        return found[:limit]

    def next_epoch(self, key: Key) -> int:
        """One more than every epoch that this id has had."""
        with self._reading():
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
            except sqlite3.Error as error:
                self._failure = str(error)
                log.error("store_failed", error=str(error))

    def _spread(self) -> None:
        """Move what the journal holds into the tables, a slice of sessions at a time, then drop the journal."""
        with self._lock:
            upto, keys = self._seq, list(self._unspread)
        if not keys:
            return
        for begin in range(0, len(keys), SPREAD_KEYS):
            with self._lock:
                self._spread_slice(keys[begin : begin + SPREAD_KEYS])
        with self._lock:
            self._db.execute("UPDATE meta SET value = ? WHERE key = 'seq'", (upto,))
            self._db.execute("DELETE FROM journal WHERE seq <= ?", (upto,))
        self._checkpoint()

    def _spread_slice(self, keys: list[Key]) -> None:
        entries = [self._unspread[key] for key in keys]
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._forget(branch for entry in entries for branch in entry.forgotten)
            segments = [segment for entry in entries for segment in join(entry.segments)]
            self._insert("log", [(s.branch, s.start, s.count, _encoder.encode(s)) for s in segments])
            snapshots = [snapshot for entry in entries for snapshot in entry.snapshots]
            self._insert("snapshots", [(s.branch, s.position, _encoder.encode(s)) for s in snapshots])
            self._insert("sessions", [_session_row(entry) for entry in entries])
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        for key, entry in zip(keys, entries, strict=True):
            del self._unspread[key]
            self._keep(key, entry.head)
            for branch in (entry.head.branch, *entry.forgotten):
                self._branches.pop(branch, None)

    def _forget(self, branches: Iterable[str]) -> None:
        for part in _parts(sorted(set(branches)), 512):
            marks = ",".join("?" * len(part))
            self._db.execute(f"DELETE FROM log WHERE branch IN ({marks})", part)
            self._db.execute(f"DELETE FROM snapshots WHERE branch IN ({marks})", part)

    def _insert(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        # One statement for many rows: a statement gives the GIL away once, executemany once a row.
        for part in _parts(rows, 512):
            marks = ",".join(["(" + ",".join("?" * len(part[0])) + ")"] * len(part))
            self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES {marks}", [v for row in part for v in row])

    def _checkpoint(self) -> None:
        db = sqlite3.connect(self._path, timeout=1.0)
        try:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        finally:
            db.close()

    # ------------------------------------------------------------------ upkeep

    def sweep(self, busy: Collection[Key] = ()) -> int:
        """Expire what is due and forget old tombstones, a bounded number a call."""
        now = now_ms()
        with self._reading():
            due = self._db.execute(
                "SELECT head FROM sessions WHERE status = 'live' AND expires_ms <= ? LIMIT 1000", (now,)
            ).fetchall()
            self._expire([_head.decode(row[0]).key for row in due], busy, now)
            ended = self._db.execute(
                "SELECT head FROM sessions WHERE status != 'live' AND updated_ms < ? LIMIT 1000",
                (now - TOMBSTONE_TTL_S * 1000,),
            ).fetchall()
            old = [head for head in (_head.decode(row[0]) for row in ended) if head.key not in self._unspread]
            self._drop(old)
        return len(due) + len(old)

    def _expire(self, keys: Iterable[Key], busy: Collection[Key], now: int) -> None:
        """Close what is due in one commit: serving waits for one write, not for one a session."""
        stored = [head for key in keys if key not in busy and (head := self._stored(key)) is not None]
        due = [head for head in stored if head.status == "live" and head.at(now).status == "expired"]
        if due:
            self._write([Commit(head=head.at(now), expected=head.fence) for head in due])

    def _drop(self, heads: list[Head]) -> None:
        if not heads:
            return
        floor = max(head.epoch for head in heads)
        self._db.execute("UPDATE meta SET value = max(value, ?) WHERE key = 'epoch_floor'", (floor,))
        for head in heads:
            self._db.execute("DELETE FROM sessions WHERE tenant = ? AND id = ?", head.key)
            self._cache.pop(head.key, None)

    def check(self) -> str | None:
        """None when the last write succeeded and the data file can be written."""
        if self._failure is None:
            return None
        with self._lock:
            try:
                self._db.execute("UPDATE meta SET value = value WHERE key = 'schema'")
                self._failure = None
            except sqlite3.Error as error:
                self._failure = str(error)
        return self._failure

    def close(self) -> None:
        """Spread the journal, close the file, give the folder free."""
        self._stop.set()
        self._spreader.join()
        with self._lock:
            try:
                self._spread()
            except sqlite3.Error as error:
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


def _prepare_schema(db: sqlite3.Connection) -> None:
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() is None:
        db.executescript(
            f"BEGIN; {SCHEMA} INSERT INTO meta VALUES ('schema', {SCHEMA_VERSION}), ('epoch_floor', 0),"
            " ('seq', 0); COMMIT;"
        )
    found = int(db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()[0])
    if found > SCHEMA_VERSION:
        raise StoreError(
            f"the data folder was written by a newer version (schema {found}, this one knows {SCHEMA_VERSION})"
        )


def _session_row(entry: _Unspread) -> tuple[Any, ...]:
    head = entry.head
    return (
        *head.key,
        head.model,
        head.status,
        head.updated_ms,
        head.expires_ms,
        entry.seq,
        _encoder.encode(head),
    )


def _parts(rows: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (rows[begin : begin + size] for begin in range(0, len(rows), size))
