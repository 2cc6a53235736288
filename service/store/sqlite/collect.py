"""Deleting what no session reaches any more, and the snapshots that need not be kept."""

from collections.abc import Iterable, Sequence
from typing import Any

from service.store.base import SNAPSHOTS_KEPT, Segment, cut, surplus
from service.store.sqlite.overlay import Overlay
from service.store.sqlite.rows import decode_segment, one_of, segment_row, slices
from service.store.sqlite.tables import ROWS_AT_ONCE, Tables

BRANCHES_AT_ONCE = 256
DELETED_AT_ONCE = 1_000

FACTS = """
SELECT l.branch, coalesce(max(b.ended), 0), max(r.upto), min(r.since), coalesce(max(r.reacher = l.branch), 0)
FROM (SELECT branch FROM loose LIMIT ?) AS l
LEFT JOIN branches AS b ON b.branch = l.branch LEFT JOIN reach AS r ON r.branch = l.branch GROUP BY l.branch
"""


class Collector:
    """Deletes in bounded statements, so that no commit waits long; what a crash leaves is done again."""

    def __init__(self, tables: Tables, overlay: Overlay) -> None:
        self._tables = tables
        self._overlay = overlay
        self._snapped: set[str] = set()
        """branches that have got snapshots and may have too many now"""

    def note_snapped(self, branches: Iterable[str]) -> None:
        """These branches have got snapshots."""
        self._snapped.update(branches)

    def thin(self) -> None:
        """Delete the snapshots that need not be kept."""
        for part in slices(sorted(self._snapped), BRANCHES_AT_ONCE):
            with self._tables.giving_way():
                crowded = self._tables.db.execute(
                    f"SELECT branch, graph, group_concat(position) FROM snapshots WHERE branch IN {one_of(part)}"
                    f" GROUP BY branch, graph HAVING count(*) > {SNAPSHOTS_KEPT}",
                    part,
                ).fetchall()
                if crowded:
                    self._delete_surplus(crowded, part)
                self._snapped.difference_update(part)

    def _delete_surplus(self, crowded: Sequence[tuple[str, str, str]], branches: Sequence[str]) -> None:
        rows = self._tables.db.execute(f"SELECT DISTINCT since FROM reach WHERE branch IN {one_of(branches)}", branches)
        # An origin that is not in the tables yet protects, too.
        protected = {since for (since,) in rows} | set(self._overlay.moves.origins.values())
        places = [
            (branch, graph, position)
            for branch, graph, positions in crowded
            for position in surplus([int(one) for one in positions.split(",")], protected)
        ]
        for part in slices(places, ROWS_AT_ONCE):
            self._tables.delete_exactly("snapshots", ("branch", "graph", "position"), part)

    def collect(self) -> bool:
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
            with self._tables.lock:
                self._tables.db.execute(f"DELETE FROM loose WHERE branch IN {one_of(done)}", done)
        return collected

    def _loose(self) -> list[tuple[str, int, int | None, int | None, int]]:
        """Branches to look at: (branch, ended, upto, since, whether that holds for its own session, too)."""
        with self._tables.lock:
            return self._tables.db.execute(FACTS, (BRANCHES_AT_ONCE,)).fetchall()

    def _delete_branches(self, branches: Sequence[str]) -> None:
        if branches:
            for table in ("log", "snapshots", "branches"):
                self._delete(table, f"branch IN {one_of(branches)}", branches)

    def _cut_end(self, branch: str, upto: int) -> None:
        """Delete the entries and snapshots after `upto`, which a branch's session left behind."""
        with self._tables.lock:
            over = self._row_over(branch, upto)
            if over is not None:
                self._tables.insert("log", [segment_row(cut(over, over.start, upto))])
        self._delete("log", "branch = ? AND start >= ?", (branch, upto))
        self._delete("snapshots", "branch = ? AND position > ?", (branch, upto))

    def _cut_begin(self, branch: str, since: int) -> None:
        """Delete the entries up to `since` and the snapshots before it, which no session retains."""
        with self._tables.lock:
            over = self._row_over(branch, since)
            if over is not None:
                with self._tables.transaction():
                    self._tables.insert("log", [segment_row(cut(over, since, over.end))])
                    self._tables.delete_exactly("log", ("branch", "start"), [(branch, over.start)])
        self._delete("log", "branch = ? AND start < ?", (branch, since))
        self._delete("snapshots", "branch = ? AND position < ?", (branch, since))

    def _row_over(self, branch: str, position: int) -> Segment | None:
        """The row of the log that holds the entries on both sides of a position."""
        rows = self._tables.segments(branch, position - 1, position + 1)
        segments = [decode_segment(blob) for blob in rows]
        return next((one for one in segments if one.start < position < one.end), None)

    def _delete(self, table: str, where: str, arguments: Sequence[Any]) -> None:
        rows = f"SELECT rowid FROM {table} WHERE {where} LIMIT {DELETED_AT_ONCE}"
        deleted = DELETED_AT_ONCE
        while deleted == DELETED_AT_ONCE:
            with self._tables.giving_way():
                deleted = self._tables.db.execute(f"DELETE FROM {table} WHERE rowid IN ({rows})", arguments).rowcount
