"""What the rows of the file hold, and the SQL of many rows in one statement.

Every blob ends with its checksum: SQLite takes the bytes of a damaged page for data. Python's sqlite3 gives the GIL
away once a statement that returns no rows, but executemany once a row.
"""

import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from service.store.base import Commit, Head, Line, Reply, Segment, Snapshot, Stepped

ReplyKey = tuple[str, str, str]
"""(tenant, scope, key)"""


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """A row of the journal."""

    commits: tuple[Commit, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    kept: tuple[tuple[str, Reply], ...] = ()
    """(tenant, reply) of requests that committed nothing"""
    steps: tuple[Stepped, ...] = ()
    """of other sessions than the commits"""


T = TypeVar("T")

_encode = msgspec.msgpack.Encoder().encode


def seal(data: bytes) -> bytes:
    """Data with its CRC-32 behind it."""
    return data + zlib.crc32(data).to_bytes(4, "little")


def unseal(blob: bytes) -> bytes:
    """Inverse of `seal`; raises msgspec.DecodeError when the data are not those that were sealed."""
    data = blob[:-4]
    if zlib.crc32(data).to_bytes(4, "little") != blob[-4:]:
        raise msgspec.DecodeError("the checksum is not that of the data")
    return data


def encode(row: object) -> bytes:
    """A blob as it is stored."""
    return seal(_encode(row))


def decoder(kind: type[T]) -> Callable[[bytes], T]:
    """Reads stored blobs of one kind; raises msgspec.DecodeError when they are damaged."""
    decode = msgspec.msgpack.Decoder(kind).decode
    return lambda blob: decode(unseal(blob))


decode_batch = decoder(Batch)
decode_head = decoder(Head)
decode_line: Callable[[bytes], Line] = decoder(Line)
decode_segment = decoder(Segment)
decode_snapshot = decoder(Snapshot)
decode_reply = decoder(Reply)


def session_row(head: Head, seq: int) -> tuple[Any, ...]:
    """A head as the journal's row `seq` left it."""
    parent = head.parent.session if head.parent is not None else None
    times = (head.updated_ms, head.expires_ms)
    return (*head.key, head.model, head.version, head.status, *times, parent, seq, encode(head))


def segment_row(segment: Segment) -> tuple[str, int, int, bytes]:
    """A row of the log."""
    return (segment.branch, segment.start, segment.count, encode(segment))


def snapshot_row(snapshot: Snapshot) -> tuple[str, str, int, bytes]:
    """A row of the snapshots."""
    return (snapshot.branch, snapshot.graph, snapshot.position, encode(snapshot))


def reply_key(tenant: str, reply: Reply) -> ReplyKey:
    """What a reply is stored under."""
    return (tenant, reply.scope, reply.key)


def marks(rows: Collection[Any], width: int) -> str:
    """Placeholders of many rows."""
    return ",".join(["(" + ",".join("?" * width) + ")"] * len(rows))


def one_of(values: Sequence[Any]) -> str:
    """Placeholders of one list."""
    return marks([values], len(values))


def matching(table: str, columns: Sequence[str], rows: int) -> str:
    """The part of a SELECT that finds many rows by an index; `(a, b) IN (VALUES ...)` reads the whole table."""
    same = " AND ".join(f"t.{column} = v.column{i}" for i, column in enumerate(columns, 1))
    return f"FROM (VALUES {marks(range(rows), len(columns))}) AS v CROSS JOIN {table} AS t ON {same}"


def flat(rows: Iterable[Iterable[Any]]) -> list[Any]:
    """The values of many rows, one after another."""
    return [value for row in rows for value in row]


def slices(rows: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """Parts of at most `size` rows."""
    return (rows[begin : begin + size] for begin in range(0, len(rows), size))
