"""What lies in memory over the tables: what the journal holds and they do not yet, and heads that were read lately."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from service.store.base import (
    UNREAD,
    Commit,
    Head,
    Key,
    Line,
    Reply,
    Segment,
    Snapshot,
    Stepped,
    Unread,
    Written,
    join,
    segments_of,
    write_step,
)
from service.store.sqlite.rows import Batch, ReplyKey, reply_key

CACHED_HEADS = 16_384


@dataclass(slots=True)
class Unspread:
    """What the journal holds of one session and the tables do not yet."""

    head: Head
    seq: int
    written: Written = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    branches: set[str] = field(default_factory=set)

    def add(self, commit: Commit, seq: int) -> set[str]:
        """Take a commit in; returns the branches that it is the first to write to."""
        self.head, self.seq = commit.head, seq
        self.written += commit.segments
        self.snapshots += commit.snapshots
        written = [one.branch for one in commit.segments] + [one.branch for one in commit.snapshots]
        fresh = {branch for branch in written if branch not in self.branches}
        self.branches |= fresh
        return fresh

    @property
    def segments(self) -> list[Segment]:
        """The entries of the log, in as few segments as they fit in."""
        return join(segments_of(self.written))


@dataclass(slots=True)
class Moves:
    """What the journal says of branches and the tables do not yet."""

    begun: dict[str, Line] = field(default_factory=dict)
    origins: dict[str, int] = field(default_factory=dict)
    """branch -> after which position its session's log begins, where that is not 0"""
    ended: set[str] = field(default_factory=set)

    def add(self, commit: Commit, before: Callable[[Key], Head | Unread | None] | None) -> None:
        """Take a commit in; `before` knows the head before it."""
        head = commit.head
        if commit.left:
            self.ended.add(commit.left)
        if commit.branch is not None and commit.branch.line:
            self.begun[commit.branch.id] = commit.branch.line
        if head.status == "live" and head.origin:
            stored = before(head.key) if before is not None else None
            if not isinstance(stored, Head) or (stored.branch, stored.origin) != (head.branch, head.origin):
                self.origins[head.branch] = head.origin


class Overlay:
    """Everything that is read here first and in the tables after."""

    def __init__(self) -> None:
        self.seq = 0
        """the journal's newest row"""
        self.sessions: dict[Key, Unspread] = {}
        self.moves = Moves()
        self.beside: dict[str, list[Snapshot]] = {}
        """branch -> snapshots that were written without a commit"""
        self.replies: dict[ReplyKey, Reply] = {}
        self._writers: dict[str, dict[Key, Unspread]] = {}
        """branch -> the sessions that have written to it"""
        self._cache: OrderedDict[Key, Head | None] = OrderedDict()

    def take(self, seq: int, batch: Batch) -> None:
        """Take in what was written to the journal just now."""
        for commit in batch.commits:
            self.moves.add(commit, self.known)
            self._remember(commit, seq)
        for step in batch.steps:
            self._remember_step(step, seq)
        self._take_rest(seq, batch)

    def take_again(self, seq: int, batch: Batch, spread_to: Callable[[Key], int]) -> None:
        """Take in a row that is replayed; the tables hold each session up to the row that `spread_to` says."""
        for commit in batch.commits:
            self.moves.add(commit, None)
            if seq > spread_to(commit.head.key):
                self._remember(commit, seq)
        for step in batch.steps:
            if seq > spread_to(step.head.key):
                self._remember_step(step, seq)
        self._take_rest(seq, batch)

    def _take_rest(self, seq: int, batch: Batch) -> None:
        self.seq = max(seq, self.seq)
        for commit in batch.commits:
            if commit.reply is not None:
                self._add_reply(commit.head.tenant, commit.reply)
        for snapshot in batch.snapshots:
            self.beside.setdefault(snapshot.branch, []).append(snapshot)
        for tenant, reply in batch.kept:
            self._add_reply(tenant, reply)

    def _remember(self, commit: Commit, seq: int) -> None:
        key = commit.head.key
        entry = self.sessions.get(key) or self._begin(key, commit.head, seq)
        for branch in entry.add(commit, seq):
            self._writers.setdefault(branch, {})[key] = entry

    def _remember_step(self, step: Stepped, seq: int) -> None:
        head = step.head
        key = head.key
        entry = self.sessions.get(key) or self._begin(key, head, seq)
        entry.head, entry.seq = head, seq
        if write_step(entry.written, step) and head.branch not in entry.branches:
            entry.branches.add(head.branch)
            self._writers.setdefault(head.branch, {})[key] = entry

    def _begin(self, key: Key, head: Head, seq: int) -> Unspread:
        entry = self.sessions[key] = Unspread(head, seq)
        self._cache.pop(key, None)
        return entry

    def _add_reply(self, tenant: str, reply: Reply) -> None:
        key = reply_key(tenant, reply)
        self.replies.pop(key, None)
        self.replies[key] = reply

    def spread(self, keys: Sequence[Key]) -> None:
        """The tables hold these sessions now."""
        for key in keys:
            entry = self.sessions.pop(key)
            self.hold(key, entry.head)
            self._forget_writer(key, entry.branches)

    def _forget_writer(self, key: Key, branches: Iterable[str]) -> None:
        for branch in branches:
            del self._writers[branch][key]
            if not self._writers[branch]:
                del self._writers[branch]

    def known(self, key: Key) -> Head | Unread | None:
        """The stored head if it is in memory, which it is for longer when it is asked for."""
        head = self.peek(key)
        if key in self._cache:
            self._cache.move_to_end(key)
        return head

    def peek(self, key: Key) -> Head | Unread | None:
        """The stored head if it is in memory; right without a lock, because what is newer lies in front."""
        entry = self.sessions.get(key)
        return entry.head if entry is not None else self._cache.get(key, UNREAD)

    def hold(self, key: Key, head: Head | None) -> None:
        """Keep a head that the tables hold; of many, those asked for lately."""
        self._cache[key] = head
        if len(self._cache) > CACHED_HEADS:
            self._cache.popitem(last=False)

    def forget(self, key: Key) -> None:
        """The tables do not hold the head any more."""
        self._cache.pop(key, None)

    def heads(self, tenant: str) -> list[Head]:
        """Those of a tenant that the tables do not hold yet."""
        return [entry.head for (of, _), entry in self.sessions.items() if of == tenant]

    def segments(self, branch: str, after: int, to: int) -> list[Segment]:
        """Those that hold positions after + 1 to `to` of one branch alone."""
        found = [segment for entry in self._writers.get(branch, {}).values() for segment in entry.segments]
        return [one for one in found if one.branch == branch and one.end > after and one.start < to]

    def snapshots(self, branch: str, graph: str) -> list[Snapshot]:
        """Those of one branch alone."""
        found = [snapshot for entry in self._writers.get(branch, {}).values() for snapshot in entry.snapshots]
        found += self.beside.get(branch, ())
        return [one for one in found if (one.branch, one.graph) == (branch, graph)]
