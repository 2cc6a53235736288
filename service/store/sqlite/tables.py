"""The tables of the file, its journal and its write-ahead log; what is read here knows nothing of memory."""

import os
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from service.store.base import Head, Key, Line, Reply, Snapshot, StoreError
from service.store.sqlite.rows import (
    Batch,
    ReplyKey,
    decode_batch,
    decode_head,
    decode_line,
    decode_reply,
    decode_snapshot,
    encode,
    flat,
    marks,
    matching,
    reply_key,
    slices,
)
from service.store.sqlite.schema import PROBE, connect, opening_failed, transaction

ROWS_AT_ONCE = 512
GIVE_WAY_S = 0.0005
LONG_WAL = 8192
"""pages (32 MB)"""

PAGE = "SELECT head FROM sessions WHERE status = 'live' AND tenant = ?{} AND id > ?{} ORDER BY id"
LIVING = " AND (expires_ms IS NULL OR expires_ms > ?)"

SEGMENTS = """
SELECT segment FROM log WHERE branch = ?1 AND start + count > ?2 AND start < ?3
AND start >= coalesce((SELECT max(start) FROM log WHERE branch = ?1 AND start <= ?2), 0) ORDER BY start
"""
"""Begins at the row that holds what is asked for first: a long log is not read from its beginning."""


class Tables:
    """The open file and its lock, which whoever writes or reads by `db` holds."""

    def __init__(self, path: Path, durability: str) -> None:
        self.db = connect(path, durability)
        self.lock = threading.RLock()
        self._path = path
        try:
            # Open until the end: closing any descriptor of the file would take SQLite's own locks away.
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.db.close()
            raise StoreError(opening_failed(path, error)) from error

    def close(self) -> None:
        """Close the file."""
        self.db.close()
        os.close(self._file)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing."""
        with transaction(self.db):
            yield

    @contextmanager
    def giving_way(self) -> Iterator[None]:
        """Hold the lock for one of many pieces of work."""
        with self.lock:
            yield
        time.sleep(GIVE_WAY_S)  # a lock that is taken again at once is hardly ever given to who waits for it

    # ------------------------------------------------------------------ journal

    def append(self, seq: int, batch: Batch) -> None:
        """Write a row of the journal."""
        self.db.execute("INSERT INTO journal VALUES (?, ?)", (seq, encode(batch)))

    def has_appended(self, seq: int) -> bool:
        """Whether a row of the journal was written."""
        return self.db.execute("SELECT 1 FROM journal WHERE seq = ?", (seq,)).fetchone() is not None

    def journal(self) -> list[tuple[int, Batch]]:
        """What a crash left of it."""
        rows = self.db.execute("SELECT seq, batch FROM journal ORDER BY seq").fetchall()
        return [(seq, decode_batch(blob)) for seq, blob in rows]

    def drop_journal(self, upto: int) -> None:
        """Forget its rows that are in the tables."""
        with self.transaction():
            self.db.execute("UPDATE meta SET value = ? WHERE key = 'seq'", (upto,))
            self.db.execute("DELETE FROM journal WHERE seq <= ?", (upto,))

    def fact(self, name: str) -> int:
        """A number that is kept of the whole file."""
        return int(self.db.execute("SELECT value FROM meta WHERE key = ?", (name,)).fetchone()[0])

    def probe(self) -> None:
        """Write something."""
        self.db.execute(PROBE)

    def checkpoint(self) -> None:
        """Copy the write-ahead log to the file, beside the commits; once it is long, see that it is begun again.

        A writer begins it again when nothing is left to copy. Beside steady commits something always is, so the last
        few pages are copied under the lock, after the others have reached the disk.
        """
        with closing(sqlite3.connect(self._path, timeout=1.0)) as db:
            if _copy(db) < LONG_WAL:
                return
            self._sync()
            _copy(db)
            self._sync()
            with self.lock:
                _copy(db)

    def _sync(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            raise sqlite3.OperationalError(str(error)) from error

    # ------------------------------------------------------------------ sessions

    def head(self, key: Key) -> Head | None:
        """The head of a session."""
        row = self.db.execute("SELECT head FROM sessions WHERE tenant = ? AND id = ?", key).fetchone()
        return decode_head(row[0]) if row is not None else None

    def spread_to(self, key: Key) -> int:
        """The journal's newest row that is in the tables, of a session."""
        row = self.db.execute("SELECT seq FROM sessions WHERE tenant = ? AND id = ?", key).fetchone()
        return int(row[0]) if row is not None else 0

    @contextmanager
    def page(self, tenant: str, model: str | None, after: str, now: int) -> Iterator[Iterator[Head]]:
        """The live sessions with a greater id, in order of it."""
        of_model, arguments = ("", []) if model is None else (" AND model = ?", [model])
        sql = PAGE.format(of_model, LIVING)
        with closing(self.db.execute(sql, [tenant, *arguments, after, now])) as rows:
            yield (decode_head(blob) for (blob,) in rows)

    @contextmanager
    def of_version(self, model: str, version: int, now: int) -> Iterator[Iterator[Head]]:
        """The live sessions of a model version."""
        sql = "SELECT head FROM sessions WHERE status = 'live' AND model = ? AND version = ? AND expires_ms"
        both = f"{sql} IS NULL UNION ALL {sql} > ?"
        with closing(self.db.execute(both, (model, version, model, version, now))) as rows:
            yield (decode_head(blob) for (blob,) in rows)

    def census(self) -> dict[tuple[str, int], int]:
        """How many sessions of each (model, version) live, by their index alone."""
        sql = "SELECT model, version, count(*) FROM sessions WHERE status = 'live' GROUP BY model, version"
        return {(model, version): count for model, version, count in self.db.execute(sql).fetchall()}

    def forks(self, key: Key) -> list[Head]:
        """The sessions that were forked from any life of a session."""
        return self._heads("tenant = ? AND parent = ?", key)

    def due(self, now: int) -> list[Head]:
        """Some live sessions that have expired."""
        return self._heads("status = 'live' AND expires_ms <= ? LIMIT 1000", (now,))

    def ended_before(self, then: int) -> list[Head]:
        """Some old tombstones."""
        return self._heads("status != 'live' AND updated_ms < ? LIMIT 1000", (then,))

    def _heads(self, where: str, arguments: Sequence[Any]) -> list[Head]:
        rows = self.db.execute(f"SELECT head FROM sessions WHERE {where}", arguments).fetchall()
        return [decode_head(blob) for (blob,) in rows]

    def drop_sessions(self, heads: Sequence[Head]) -> None:
        """Forget tombstones and their replies, but not how high their epochs were."""
        keys, floor = [head.key for head in heads], max(head.epoch for head in heads)
        with self.transaction():
            self.db.execute("UPDATE meta SET value = max(value, ?) WHERE key = 'epoch_floor'", (floor,))
            self.delete_exactly("sessions", ("tenant", "id"), keys)
            self.delete_exactly("replies", ("tenant", "scope"), keys)

    # ------------------------------------------------------------------ replies

    def replies(self, keys: Collection[ReplyKey]) -> dict[ReplyKey, Reply]:
        """What is kept under keys."""
        if not keys:
            return {}
        sql = f"SELECT t.tenant, t.reply {matching('replies', ('tenant', 'scope', 'key'), len(keys))}"
        rows = self.db.execute(sql, flat(keys)).fetchall()
        found = [(tenant, decode_reply(blob)) for tenant, blob in rows]
        return {reply_key(tenant, reply): reply for tenant, reply in found}

    def drop_replies(self, upto_ms: int) -> None:
        """Forget some that are old."""
        old = "SELECT rowid FROM replies WHERE at_ms <= ? LIMIT 10000"
        self.db.execute(f"DELETE FROM replies WHERE rowid IN ({old})", (upto_ms,))

    # ------------------------------------------------------------------ log

    def line(self, branch: str) -> Line:
        """What comes before a branch's own entries."""
        row = self.db.execute("SELECT line FROM branches WHERE branch = ?", (branch,)).fetchone()
        return decode_line(row[0]) if row is not None else ()

    def segments(self, branch: str, after: int, to: int) -> list[bytes]:
        """Those that hold positions after + 1 to `to` of one branch alone, in order, not decoded yet."""
        rows = self.db.execute(SEGMENTS, (branch, after, to)).fetchall()
        return [blob for (blob,) in rows]

    def newest(self, branch: str, below: int, graph: str) -> Snapshot | None:
        """The newest snapshot at a position less than `below`, of one branch alone; a damaged one is empty."""
        row = self.db.execute(
            "SELECT position, snapshot FROM snapshots WHERE branch = ? AND graph = ? AND position < ?"
            " ORDER BY position DESC LIMIT 1",
            (branch, graph, below),
        ).fetchone()
        if row is None:
            return None
        try:
            return decode_snapshot(row[1])
        except msgspec.DecodeError:  # it can be done without: the log is what counts
            return Snapshot(branch, row[0], "", b"", graph)

    def snapped(self, branch: str, after: int, to: int, graph: str) -> list[int]:
        """Positions after + 1 to `to` at which one branch alone has snapshots."""
        sql = "SELECT position FROM snapshots WHERE branch = ? AND graph = ? AND position > ? AND position <= ?"
        return [position for (position,) in self.db.execute(sql, (branch, graph, after, to))]

    # ------------------------------------------------------------------ many rows

    def insert(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Write many rows over what has their keys."""
        for part in slices(rows, ROWS_AT_ONCE):
            self.db.execute(f"INSERT OR REPLACE INTO {table} VALUES {marks(part, len(part[0]))}", flat(part))

    def delete_exactly(self, table: str, columns: Sequence[str], rows: Collection[Sequence[Any]]) -> None:
        """Delete the rows whose columns have these values."""
        found = f"SELECT t.rowid {matching(table, columns, len(rows))}"
        self.db.execute(f"DELETE FROM {table} WHERE rowid IN ({found})", flat(rows))


def _copy(db: sqlite3.Connection) -> int:
    """One pass over the write-ahead log; returns how long it is, in pages."""
    return int(db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1])
