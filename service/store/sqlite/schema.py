"""The file: its tables, how it is opened, and how one of an older schema is brought up to date."""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import structlog

from service.store.base import Commit, Head, Key, Segment, Snapshot, StoreError
from service.store.sqlite.rows import Batch, decode_head, decode_snapshot, decoder, encode, seal, snapshot_row

log = structlog.get_logger(__name__)

SCHEMA_VERSION = 4
"""1: no branches after others, no forks, no replies. 2: no checksums. 3: no steps in the journal, only commits."""

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


class _OldCommit(msgspec.Struct, frozen=True, array_like=True):
    """A commit as schema 1 had it; a row of its journal is a list of them."""

    head: Head
    expected: tuple[int, int] | None
    segments: tuple[Segment, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()


_decode_old_commits = decoder(list[_OldCommit])

_BLOBS = {"journal": "batch", "sessions": "head", "log": "segment", "snapshots": "snapshot"}
_BLOBS_SINCE_2 = {"branches": "line", "replies": "reply"}


def lock_folder(folder: Path) -> int:
    """Keep other processes out of the folder until the descriptor is closed; raises StoreError."""
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


def connect(path: Path, durability: str) -> sqlite3.Connection:
    """An open file of this schema that can be written; raises StoreError."""
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    except sqlite3.Error as error:
        raise StoreError(opening_failed(path, error)) from error
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA synchronous={'FULL' if durability == 'fsync' else 'NORMAL'}")
        # Checkpoints are made by the spreader, so that no commit has to wait for one.
        db.execute("PRAGMA wal_autocheckpoint=0")
        prepare(db)
        db.execute(PROBE)
    except (sqlite3.Error, msgspec.DecodeError) as error:
        db.close()
        raise StoreError(opening_failed(path, error)) from error
    except StoreError:
        db.close()
        raise
    return db


def opening_failed(path: Path, error: Exception) -> str:
    """What whoever starts the service is told."""
    if is_damage(error):
        return f"{path.name} is damaged and can not be read: {error}"
    return f"{path.name} can not be opened: {error}"


def is_damage(error: Exception) -> bool:
    """Whether the file itself is wrong."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return isinstance(error, msgspec.DecodeError) or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of it or nothing."""
    roll_back(db)
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        roll_back(db)
        raise


def roll_back(db: sqlite3.Connection) -> None:
    """End a transaction that could not be ended."""
    if db.in_transaction:
        db.execute("ROLLBACK")


def prepare(db: sqlite3.Connection) -> None:
    """Bring an empty file, or one of an older schema, to this one; raises StoreError for a newer one."""
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() is None:
        with transaction(db):
            db.execute(META)
            _create_tables(db)
            db.execute("INSERT INTO meta VALUES ('schema', ?), ('epoch_floor', 0), ('seq', 0)", (SCHEMA_VERSION,))
    found = int(db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()[0])
    if found > SCHEMA_VERSION:
        raise StoreError(
            f"the data folder was written by a newer version (schema {found}, this one knows {SCHEMA_VERSION})"
        )
    if found < SCHEMA_VERSION:
        with transaction(db):
            _migrate(db, found)
        log.info("store_migrated", schema=SCHEMA_VERSION)


def _create_tables(db: sqlite3.Connection) -> None:
    for statement in SCHEMA.split(";\n"):
        db.execute(statement)


def _migrate(db: sqlite3.Connection, found: int) -> None:
    if found < 3:
        blobs = _BLOBS | (_BLOBS_SINCE_2 if found > 1 else {"journal": "commits"})
        db.create_function("seal", 1, seal)
        for table, column in blobs.items():
            db.execute(f"UPDATE {table} SET {column} = seal({column})")
    if found == 1:
        _migrate_branches(db)
    db.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (SCHEMA_VERSION,))


def _migrate_branches(db: sqlite3.Connection) -> None:
    """From schema 1, which had no branches after others, no forks and no replies."""
    for index in ("live", "of_model", "due", "ended"):
        db.execute(f"DROP INDEX sessions_{index}")
    for table in ("journal", "sessions", "log", "snapshots"):
        db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    _create_tables(db)
    db.create_function("version_of", 1, lambda blob: decode_head(blob).version)
    db.execute(
        "INSERT INTO sessions SELECT tenant, id, model, version_of(head), status, updated_ms, expires_ms, NULL, seq,"
        " head FROM old_sessions"
    )
    db.execute("INSERT INTO log SELECT branch, start, count, segment FROM old_log")
    _migrate_snapshots(db)
    _migrate_journal(db)
    for table in ("journal", "sessions", "log", "snapshots"):
        db.execute(f"DROP TABLE old_{table}")


def _migrate_snapshots(db: sqlite3.Connection) -> None:
    """Say of every snapshot which graph's it is: that of the session whose branch it is on."""
    graphs: dict[str, str] = {}
    for (blob,) in db.execute("SELECT head FROM sessions WHERE status = 'live'"):
        head = decode_head(blob)
        graphs[head.branch] = head.graph
    for (blob,) in db.execute("SELECT snapshot FROM old_snapshots"):
        found = decode_snapshot(blob)
        if found.branch in graphs:
            row = snapshot_row(msgspec.structs.replace(found, graph=graphs[found.branch]))
            db.execute("INSERT INTO snapshots VALUES (?, ?, ?, ?)", row)


def _migrate_journal(db: sqlite3.Connection) -> None:
    """Rewrite what is not spread yet, with the branches that its commits left."""
    heads: dict[Key, Head] = {}
    for seq, blob in db.execute("SELECT seq, commits FROM old_journal ORDER BY seq"):
        commits: list[Commit] = []
        for old in _decode_old_commits(blob):
            row = db.execute("SELECT seq, head FROM sessions WHERE tenant = ? AND id = ?", old.head.key).fetchone()
            if row is None or seq > row[0]:
                stored = heads.get(old.head.key) or (decode_head(row[1]) if row is not None else None)
                commits.append(_new_commit(old, stored))
                heads[old.head.key] = old.head
        db.execute("INSERT INTO journal VALUES (?, ?)", (seq, encode(Batch(tuple(commits)))))


def _new_commit(old: _OldCommit, stored: Head | None) -> Commit:
    snapshots = tuple(msgspec.structs.replace(one, graph=old.head.graph) for one in old.snapshots)
    changed = stored is not None and (stored.branch != old.head.branch or old.head.status != "live")
    left = stored.branch if stored is not None and changed else ""
    return Commit(old.head, None, old.segments, snapshots, left=left)
