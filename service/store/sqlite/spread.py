"""Moving what the journal holds to the tables, in slices between which commits go on.

A slice is a transaction that says of every session up to which row of the journal it goes, so a crash between two
slices doubles nothing when the journal is spread again. What is said of branches is written first and for all
sessions together, and may be written again.
"""

from collections.abc import Collection, Sequence
from typing import Any

from service.store.base import REPLIES_KEPT, TENANT_REPLIES_KEPT, Key, Segment, join
from service.store.sqlite.collect import Collector
from service.store.sqlite.overlay import Moves, Overlay
from service.store.sqlite.rows import (
    decode_segment,
    encode,
    flat,
    marks,
    one_of,
    segment_row,
    session_row,
    slices,
    snapshot_row,
)
from service.store.sqlite.tables import ROWS_AT_ONCE, Tables

SPREAD_KEYS = 256
SHORT_ROW = 512
"""bytes: a row of the log that is shorter takes in what follows it"""

UPDATE_HEADS = """
UPDATE sessions SET updated_ms = v.column6, seq = v.column9, head = v.column10 FROM (VALUES {values}) AS v
WHERE tenant = v.column1 AND id = v.column2 AND model = v.column3 AND version = v.column4 AND status = v.column5
AND expires_ms IS v.column7 AND parent IS v.column8
"""

INSERT_HEADS = """
INSERT OR REPLACE INTO sessions SELECT * FROM (VALUES {values}) AS v WHERE NOT EXISTS
    (SELECT 1 FROM sessions AS t WHERE t.tenant = v.column1 AND t.id = v.column2 AND t.seq = v.column9)
"""

BESIDE = """
INSERT OR REPLACE INTO snapshots SELECT * FROM (VALUES {values}) AS v
WHERE EXISTS (SELECT 1 FROM branches WHERE branch = v.column1 AND NOT ended) OR v.column3 <=
    (SELECT start + count FROM log WHERE branch = v.column1 AND start < v.column3 ORDER BY start DESC LIMIT 1)
"""

LAST_ROWS = f"""
SELECT t.segment FROM (VALUES {{values}}) AS v CROSS JOIN log AS t ON t.branch = v.column1
AND t.start = (SELECT max(start) FROM log WHERE branch = v.column1 AND start < v.column2)
WHERE t.start + t.count = v.column2 AND length(t.segment) < {SHORT_ROW}
"""


class Spreader:
    """Spreads the journal; `begin` says where it stood when the file was opened."""

    def __init__(self, tables: Tables, overlay: Overlay, spread_to: int) -> None:
        self._tables = tables
        self._overlay = overlay
        self._spread_to = spread_to
        self._collector = Collector(tables, overlay)

    def spread(self) -> None:
        """Move what the journal holds into the tables, and delete what nobody reaches any more."""
        spread = self._spread_journal()
        if self._collector.collect() or spread:
            self._tables.checkpoint()

    def _spread_journal(self) -> bool:
        """Spread in slices, then drop the journal up to where it stood; returns whether it held anything."""
        with self._tables.lock:
            upto, keys = self._overlay.seq, list(self._overlay.sessions)
            if upto == self._spread_to:
                return False
            self._apply_moves()
        for part in slices(keys, SPREAD_KEYS):
            with self._tables.giving_way():
                self._spread_slice(part)
        self._spread_beside()
        self._spread_replies()
        with self._tables.lock:
            self._tables.drop_journal(upto)
        self._spread_to = upto
        self._collector.thin()
        return True

    # ------------------------------------------------------------------ branches

    def _apply_moves(self) -> None:
        moves = self._overlay.moves
        reach: list[tuple[Any, ...]] = [
            (past, branch, upto, 0) for branch, line in moves.begun.items() for past, upto in line
        ]
        reach += [(branch, branch, None, origin) for branch, origin in moves.origins.items()]
        with self._tables.transaction():
            self._tables.insert("branches", [(branch, encode(line), 0) for branch, line in moves.begun.items()])
            self._tables.insert("reach", reach)
            for raised in slices(list(moves.origins.items()), ROWS_AT_ONCE):
                self._raise(raised)
            for ended in slices(sorted(moves.ended), ROWS_AT_ONCE):
                self._end(ended)
        self._overlay.moves = Moves()

    def _raise(self, origins: Sequence[tuple[str, int]]) -> None:
        self._tables.db.execute(
            f"UPDATE reach SET since = v.column2 FROM (VALUES {marks(origins, 2)}) AS v WHERE reacher = v.column1",
            flat(origins),
        )
        self._loosen([branch for branch, _ in origins])

    def _loosen(self, reachers: Sequence[str]) -> None:
        self._tables.db.execute(
            f"INSERT OR IGNORE INTO loose SELECT branch FROM reach WHERE reacher IN {one_of(reachers)}", reachers
        )

    def _end(self, branches: Sequence[str]) -> None:
        self._loosen(branches)
        self._tables.db.execute(f"DELETE FROM reach WHERE reacher IN {one_of(branches)}", branches)
        rows = [(branch, encode(()), 1) for branch in branches]
        self._tables.db.execute(
            f"INSERT INTO branches VALUES {marks(rows, 3)} ON CONFLICT DO UPDATE SET ended = 1", flat(rows)
        )
        self._tables.insert("loose", [(branch,) for branch in branches])

    # ------------------------------------------------------------------ sessions

    def _spread_slice(self, keys: Sequence[Key]) -> None:
        entries = [self._overlay.sessions[key] for key in keys]
        with self._tables.transaction():
            segments = [segment for entry in entries for segment in entry.segments]
            self._tables.insert("log", [segment_row(one) for one in self._onto_last_rows(segments)])
            snapshots = [snapshot for entry in entries for snapshot in entry.snapshots]
            self._tables.insert("snapshots", [snapshot_row(one) for one in snapshots])
            self._write_heads([session_row(entry.head, entry.seq) for entry in entries])
        self._collector.note_snapped(snapshot.branch for snapshot in snapshots)
        self._overlay.spread(keys)

    def _write_heads(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Most heads have a row that differs in nothing that is indexed: then the indexes stay as they are."""
        for sql in (UPDATE_HEADS, INSERT_HEADS):
            for part in slices(rows, ROWS_AT_ONCE):
                self._tables.db.execute(sql.format(values=marks(part, 10)), flat(part))

    def _onto_last_rows(self, segments: Sequence[Segment]) -> list[Segment]:
        """The segments, a branch's first joined to the branch's last row where that is short and of its kind."""
        rows = {(one.branch, one.start): one for one in segments}
        firsts = {one.branch: one for one in reversed(segments)}
        for last in self._short_last_rows([(one.branch, one.start) for one in firsts.values()]):
            first = firsts[last.branch]
            whole = join([last, first])
            if len(whole) == 1:
                del rows[first.branch, first.start]
                rows[last.branch, last.start] = whole[0]
        return list(rows.values())

    def _short_last_rows(self, places: Sequence[tuple[str, int]]) -> list[Segment]:
        """The rows of the log that end where a branch goes on: (branch, position)."""
        found: list[tuple[bytes]] = []
        for part in slices(places, ROWS_AT_ONCE):
            found += self._tables.db.execute(LAST_ROWS.format(values=marks(part, 2)), flat(part)).fetchall()
        return [decode_segment(blob) for (blob,) in found]

    # ------------------------------------------------------------------ without a commit

    def _spread_beside(self) -> None:
        beside = self._overlay.beside
        for part in slices(list(beside), SPREAD_KEYS):
            with self._tables.giving_way():
                rows = [snapshot_row(snapshot) for branch in part for snapshot in beside[branch]]
                for some in slices(rows, ROWS_AT_ONCE):
                    self._tables.db.execute(BESIDE.format(values=marks(some, 4)), flat(some))
                self._collector.note_snapped(part)
                for branch in part:
                    del beside[branch]

    def _spread_replies(self) -> None:
        kept = self._overlay.replies
        for part in slices(list(kept), SPREAD_KEYS):
            with self._tables.giving_way():
                rows = [(*key, kept[key].at_ms, encode(kept[key])) for key in part]
                with self._tables.transaction():
                    self._tables.insert("replies", rows)
                    self._drop_surplus_replies({(tenant, scope) for tenant, scope, _ in part})
                for key in part:
                    del kept[key]

    def _drop_surplus_replies(self, scopes: Collection[Key]) -> None:
        found = self._tables.db.execute(
            f"SELECT v.column1, v.column2 FROM (VALUES {marks(scopes, 2)}) AS v"
            " WHERE (SELECT count(*) FROM replies WHERE tenant = v.column1 AND scope = v.column2)"
            f" > iif(v.column2 = '', {TENANT_REPLIES_KEPT}, {REPLIES_KEPT})",
            flat(scopes),
        ).fetchall()
        for tenant, scope in found:
            self._tables.db.execute(
                "DELETE FROM replies WHERE rowid IN (SELECT rowid FROM replies WHERE tenant = ? AND scope = ?"
                " ORDER BY at_ms DESC, rowid DESC LIMIT -1 OFFSET ?)",
                (tenant, scope, REPLIES_KEPT if scope else TENANT_REPLIES_KEPT),
            )
