"""The store's protocol: heads, log segments, snapshots and kept answers, written by compare-and-set group commits.

A session is a log and a head that points into it. The log is a tree of branches: entries are immutable and belong
to a branch, and a branch says which part of which older branches comes before its own entries. A commit appends to
one branch and moves one head; rewind and fork begin a branch and copy nothing. A commit holds when the live head is
still the one that it follows; in a group commit every session gets a result of its own, and a loser rolls nobody
else back. The answer to a request with a key is kept in the commit that the request made.
"""

import random
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Protocol

import msgspec

from service.errors import Problem, not_ready

TOMBSTONE_TTL_S = 7 * 24 * 3600
REPLIES_KEPT = 256
TENANT_REPLIES_KEPT = 65_536
SNAPSHOTS_KEPT = 4
SNAPSHOT_SPACING = 4096
MAX_GROWN = 256
"""steps of a segment that goes on growing: to read one of them all are put together"""

Key = tuple[str, str]
"""(tenant, session id); the tenant is "" until keys are switched on."""

Line = tuple[tuple[str, int], ...]
"""A branch's ancestors, oldest first: (branch, the last position that is taken from it), positions growing."""

Fence = tuple[int, int, bytes]
"""(epoch, position, commit id) of a head: what a commit on top of it expects."""


class Unread(Enum):
    """What `peek` answers when it would have to wait."""

    UNREAD = "unread"


UNREAD = Unread.UNREAD

_random = random.Random()


class StoreError(Exception):
    """The store can not be opened or used; the message says what to do."""


class CommitUnknown(StoreError):
    """It is not known whether a commit was applied: the store could not be read after it failed."""


class RolledBack(StoreError):
    """The store came back older than what this process had acknowledged of a session; raised once."""

    def __init__(self, acknowledged: tuple[int, int], found: tuple[int, int] | None) -> None:
        super().__init__("the store came back older than what was acknowledged")
        self.acknowledged = acknowledged
        """(epoch, position) that was acknowledged"""
        self.found = found
        """(epoch, position) that the store has; None: the session is not there"""


def problem_of(error: StoreError) -> Problem:
    """What a client is told when the store failed."""
    if isinstance(error, RolledBack):
        (epoch, position), found = error.acknowledged, error.found
        return Problem(
            "rolled_back",
            "the store came back older than what was acknowledged: the session stands at an earlier position",
            acknowledged={"epoch": epoch, "position": position},
            found={"epoch": found[0], "position": found[1]} if found is not None else None,
        )
    if isinstance(error, CommitUnknown):
        return Problem("commit_unknown", "it is not known whether the change was stored: read the session")
    return not_ready("the store can not be used at the moment; nothing was changed")


class Generation(msgspec.Struct, frozen=True, array_like=True):
    """The session's latest generate: its parameters, and whether something of it is left."""

    start: int
    """position of the last entry of the prompt: the first token stands at start + 1"""
    prompt_tokens: int
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: tuple[str, ...] = ()
    logprobs: int = 0
    finish_reason: Literal["length", "stop", "cancelled"] | None = None
    end: int | None = None
    """position of the last token, once it is finished"""
    key: str = ""
    """the request's idempotency key, if it had one"""
    digest: bytes = b""
    """of that request"""
    created: bool = False
    """whether it began the session"""


class Parent(msgspec.Struct, frozen=True, array_like=True):
    """Where a session left the one that it was forked from."""

    session: str
    position: int
    life: int = 0
    """the epoch that the parent's life began with"""


class Head(msgspec.Struct, frozen=True, array_like=True):
    """What is true of a session now; times are milliseconds since 1970 by the store's clock."""

    tenant: str
    id: str
    model: str
    version: int
    graph: str
    epoch: int
    position: int
    seed: int
    branch: str
    created_ms: int = 0
    updated_ms: int = 0
    ttl_s: int = 0
    metadata: dict[str, Any] = {}
    parent: Parent | None = None
    status: Literal["live", "closed", "expired"] = "live"
    commit_id: bytes = b""
    generation: Generation | None = None
    state_bytes: int = 0
    life: int = 0
    """the epoch that this life began with"""
    origin: int = 0
    """the log holds positions origin + 1 to position; above 0 there is a snapshot at it"""

    @property
    def key(self) -> Key:
        """The key that the head is stored under."""
        return (self.tenant, self.id)

    @property
    def fence(self) -> Fence:
        """What a commit on top of this head expects."""
        return (self.epoch, self.position, self.commit_id)

    @property
    def expires_ms(self) -> int | None:
        """When the session expires unless something is committed before; None: never."""
        return self.updated_ms + self.ttl_s * 1000 if self.ttl_s else None

    def at(self, now_ms: int) -> "Head":
        """The head as it is at `now_ms`: expired when its time has passed."""
        if self.ttl_s and self.status == "live" and self.expires_ms is not None and now_ms >= self.expires_ms:
            return msgspec.structs.replace(tombstone(self, "expired"), updated_ms=self.expires_ms)
        return self


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive log entries: positions start + 1 to start + count of a branch."""

    branch: str
    start: int
    count: int
    source: Literal["fed", "generated"]
    data: bytes
    """the entries' raw bytes, little-endian, in the model's entry format"""
    numerics: str
    at_ms: tuple[tuple[int, int], ...] = ()
    """(number of entries, milliseconds since 1970), one pair a commit"""
    logprobs: bytes = b""
    """float32 log-probabilities, one an entry, of generated entries"""

    @property
    def end(self) -> int:
        """Position of the last entry."""
        return self.start + self.count


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """The state after `position` entries of a branch, as safetensors."""

    branch: str
    position: int
    numerics: str
    data: bytes
    graph: str = ""
    """sha256 of the graph whose state it is"""


class Branch(msgspec.Struct, frozen=True, array_like=True):
    """A branch that does not begin a log: where its past is found."""

    id: str
    line: Line


class Source(msgspec.Struct, frozen=True, array_like=True):
    """The session that a fork leaves: it must still live in this epoch when the fork is committed."""

    id: str
    epoch: int
    branch: str


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """What a request with an idempotency key was answered."""

    scope: str
    """the session's id; "" for the tenant's own keys"""
    key: str
    digest: bytes
    """of the request: another request with the same key is refused"""
    kind: Literal["body", "session", "feed", "generate"]
    at_ms: int = 0
    life: int = 0
    """of the session that it belongs to"""
    body: bytes = b""
    """kind body: the answer as JSON; kind feed: without its predictions; kind generate: the tokens' alternatives"""
    head: Head | None = None
    """kinds session and generate: the head as it was committed; filled in by the store"""
    branch: str = ""
    start: int = 0
    end: int = 0
    """kinds feed and generate: the answer is worked out again from entries start + 1 to end of the branch"""
    generation: Generation | None = None
    segments: tuple[Segment, ...] = ()
    """kind generate: the tokens themselves, where they are few; else the log has them"""
    pending: bool = False
    """the generate is not at its end yet: the session's head says how far it is"""
    graph: str = ""
    """kinds feed and generate: sha256 of the graph that answered"""


class Commit(msgspec.Struct, frozen=True, array_like=True):
    """One session's part of a group commit."""

    head: Head
    expected: Fence | None
    """the fence of the live head; None: the id must not live"""
    segments: tuple[Segment, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    branch: Branch | None = None
    """the head's branch, where this commit begins it after others"""
    source: Source | None = None
    reply: Reply | None = None
    """refused as a conflict when the key is taken, unless it is the pending reply of the head's own generate"""
    left: str = ""
    """the branch that the session was on before, if another; filled in by the store"""
    over: int = 0
    """the life whose kept answer to the same key does not count any more; 0: none"""


class Step(msgspec.Struct, frozen=True, gc=False):
    """One entry fed to a live session: what a `Commit` of it would say, for those of which there are many a second."""

    head: Head
    """where the session stands; the commit holds if it still does"""
    data: bytes
    """the entry's raw bytes"""
    numerics: str

    def whole(self) -> Commit:
        """The same as a commit."""
        head = self.head
        segment = Segment(head.branch, head.position, 1, "fed", self.data, self.numerics)
        moved = msgspec.structs.replace(head, position=head.position + 1, generation=abandoned(head))
        return Commit(moved, head.fence, (segment,))


class Stepped(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A step as it was stored."""

    head: Head
    data: bytes
    numerics: str


class Growing:
    """Steps of which each follows the one before it: a segment of the log that goes on growing, up to a bound.

    A segment a step would be five objects for a few bytes.
    """

    __slots__ = ("_branch", "_data", "_numerics", "_times_ms", "end", "start")

    def __init__(self, first: Stepped) -> None:
        self._branch = first.head.branch
        self._numerics = first.numerics
        self.start = first.head.position - 1
        self._data = [first.data]
        self._times_ms = [first.head.updated_ms]
        self.end = first.head.position

    def take(self, step: Stepped) -> bool:
        """Take a step in, if it is the next entry of the same branch, by the same arithmetic."""
        head, times_ms = step.head, self._times_ms
        position = head.position
        follows = position == self.end + 1 and head.branch == self._branch and step.numerics == self._numerics
        if not follows or len(times_ms) == MAX_GROWN:
            return False
        self._data.append(step.data)
        times_ms.append(head.updated_ms)
        self.end = position
        return True

    def segment(self) -> Segment:
        """What it is by now."""
        return Segment(
            branch=self._branch,
            start=self.start,
            count=len(self._times_ms),
            source="fed",
            data=b"".join(self._data),
            numerics=self._numerics,
            at_ms=tuple([(1, at) for at in self._times_ms]),
        )


Written = list[Segment | Growing]
"""Entries of the log in the order in which they were written"""


def write_step(written: Written, step: Stepped) -> bool:
    """Write one more entry; returns whether it begins a segment."""
    newest = written[-1] if written else None
    if isinstance(newest, Growing) and newest.take(step):
        return False
    written.append(Growing(step))
    return True


def segments_of(written: Written, after: int = 0, to: int = sys.maxsize) -> list[Segment]:
    """The segments that hold positions after + 1 to `to` of what was written."""
    held = [one for one in written if one.end > after and one.start < to]
    return [one.segment() if isinstance(one, Growing) else one for one in held]


Change = Commit | Step


class Applied(msgspec.Struct, frozen=True):
    """The commit holds; `head` is as stored, with the store's times."""

    head: Head


class Conflict(msgspec.Struct, frozen=True):
    """The commit was refused: the head stands elsewhere (None: there is none)."""

    head: Head | None


Result = Applied | Conflict


class Store(Protocol):
    """What every store does. Methods may be called from any thread; none of them knows HTTP."""

    @property
    def durability(self) -> str:
        """What an acknowledged commit survives."""

    @property
    def run(self) -> str:
        """Names the store's run: what was read in another run may be ahead of what it holds."""

    def commit(self, commits: Sequence[Change], snapshots: Sequence[Snapshot] = ()) -> list[Result]:
        """Apply a group commit; returns one result a commit, in order.

        `snapshots` are written beside it without a condition: they repeat what the log says of a committed position.
        Raises StoreError when nothing was applied, CommitUnknown when that can not be told.
        """

    def keep(self, tenant: str, reply: Reply) -> bool:
        """Keep the answer of a request that committed nothing; False: its key is taken."""

    def reply(self, tenant: str, scope: str, key: str) -> Reply | None:
        """The answer kept under a key in the session's latest life, or in the tenant's own keys (scope "")."""

    def head(self, key: Key, at_ms: int | None = None) -> Head | None:
        """The head of a session, also of a closed or expired one while its tombstone lasts.

        Whether it is expired is judged at `at_ms`, by default now.
        """

    def peek(self, key: Key, at_ms: int | None = None) -> Head | Unread | None:
        """What `head` would answer, if that is in memory; it waits for no lock, file or network."""

    def line(self, branch: str) -> Line:
        """What comes before a branch's own entries; () for one that begins a log, or is not known."""

    def log(self, branch: str, after: int, to: int) -> list[Segment]:
        """The segments that hold positions after + 1 to `to` of a branch and its past, in order, cut to that range."""

    def snapshot(self, branch: str, below: int, graph: str) -> Snapshot | None:
        """The newest snapshot of a graph's state at a position less than `below`, of a branch or its past."""

    def snapshots(self, branch: str, after: int, to: int, graph: str) -> list[int]:
        """Positions after + 1 to `to` at which there are snapshots, of a branch and its past, in order."""

    def heads(self, tenant: str, model: str | None, after: str, limit: int) -> list[Head]:
        """Live sessions whose id is greater than `after`, ordered by id."""

    def forks(self, key: Key, life: int) -> list[str]:
        """Ids of the live sessions that were forked from that life of a session."""

    def lives(self, model: str, version: int) -> bool:
        """Whether any session of a model version lives."""

    def census(self) -> Mapping[tuple[str, int], int]:
        """How many sessions of each (model, version) live; the last seconds may be missing."""

    def next_epoch(self, key: Key) -> int:
        """An epoch that this id has never had."""

    def sweep(self, busy: Collection[Key] = ()) -> int:
        """Expire what is due, but no session in `busy`, and forget old tombstones; returns how many."""

    def check(self) -> str | None:
        """None when the store can be written, else what is wrong."""

    def close(self) -> None:
        """Finish what is under way and release everything."""


def tombstone(head: Head, status: Literal["closed", "expired"]) -> Head:
    """What is left of a session that has ended: enough to say that it lived, and its epoch."""
    return msgspec.structs.replace(head, status=status, metadata={}, generation=None, parent=None)


def abandoned(head: Head) -> Generation | None:
    """The head's generation once another operation changes the session: a suspended one ends as cancelled."""
    generation = head.generation
    if generation is None or generation.finish_reason is not None:
        return generation
    return msgspec.structs.replace(generation, finish_reason="cancelled", end=head.position)


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def stamp(commit: Commit, stored: Head | None, now: int) -> Commit:
    """The commit with the store's times and a fresh commit id; `stored` is the head that it takes the place of."""
    born = commit.expected is None or stored is None
    if stored is not None and not born:
        now = max(now, stored.updated_ms)  # a clock that was set back does not make a session younger
    head = msgspec.structs.replace(
        commit.head,
        created_ms=now if born or stored is None else stored.created_ms,
        updated_ms=now,
        # Unlike the system's random numbers these do not give the GIL away, once for every session of a group.
        commit_id=_random.getrandbits(64).to_bytes(8),
        life=commit.head.epoch if born else commit.head.life,
    )
    left = stored.branch if stored is not None and (stored.branch != head.branch or head.status != "live") else ""
    return msgspec.structs.replace(
        commit,
        head=head,
        segments=tuple([msgspec.structs.replace(one, at_ms=((one.count, now),)) for one in commit.segments]),
        reply=_stamped_reply(commit.reply, head, now) if commit.reply is not None else None,
        left=left,
    )


def stepped(step: Step, stored: Head, now: int) -> Stepped:
    """A step with the store's times and a fresh commit id, as `stamp` gives them; `stored` is the head before it."""
    head = step.head
    after = msgspec.structs.replace(
        head,
        position=head.position + 1,
        created_ms=stored.created_ms,
        updated_ms=now if now > stored.updated_ms else stored.updated_ms,
        commit_id=_random.getrandbits(64).to_bytes(8),
        generation=abandoned(head) if head.generation is not None else None,
    )
    return Stepped(after, step.data, step.numerics)


def may_step(step: Step, stored: Head) -> bool:
    """Whether a step may be applied, as `holds` says of a commit."""
    return stored.status == "live" and (stored is step.head or stored.fence == step.head.fence)


def whole(changes: Sequence[Change]) -> list[Commit]:
    """All as commits."""
    return [change.whole() if isinstance(change, Step) else change for change in changes]


def _stamped_reply(reply: Reply, head: Head, now: int) -> Reply:
    life = head.life if reply.scope else 0
    shown = head if reply.kind in ("session", "generate") else None
    return msgspec.structs.replace(reply, at_ms=now, life=life, head=shown)


def holds(commit: Commit, stored: Head | None, source: Head | None, reply: Reply | None, now: int) -> bool:
    """Whether a commit may be applied.

    `stored` is the head that is stored, `source` that of the commit's source, `reply` what its key has now.
    """
    if not _follows(commit, stored, now):
        return False
    if commit.source is not None:
        live = source.at(now) if source is not None else None
        if live is None or live.status != "live" or live.epoch != commit.source.epoch:
            return False
        if live.origin > commit.head.origin:
            return False
    if reply is None or (commit.over and reply.life == commit.over):
        return True
    generation = stored.generation if stored is not None else None
    return reply.pending and generation is not None and generation.key == reply.key


def _follows(commit: Commit, stored: Head | None, now: int) -> bool:
    if commit.expected is None:
        live = stored.at(now) if stored is not None else None
        return live is None or (live.status != "live" and commit.head.epoch > live.epoch)
    # A session with work under way does not expire: its commit is judged by the fence alone.
    return stored is not None and stored.status == "live" and stored.fence == commit.expected


def graft(line: Line, branch: str, position: int) -> Line:
    """The line of a branch that goes on after `position` of `branch`, whose own line is `line`."""
    kept: list[tuple[str, int]] = []
    for ancestor, upto in (*line, (branch, position)):
        if position == 0 or (kept and kept[-1][1] >= position):
            break
        kept.append((ancestor, min(upto, position)))
    return tuple(kept)


def parts(line: Line, branch: str, after: int, to: int) -> list[tuple[str, int, int]]:
    """Where positions after + 1 to `to` of a branch are found: (branch, after, to), in order."""
    found, begin = [], 0
    for name, upto in (*line, (branch, to)):
        first, last = max(begin, after), min(upto, to)
        if first < last:
            found.append((name, first, last))
        begin = max(begin, upto)
    return found


def home(line: Line, branch: str, position: int) -> str:
    """The branch that holds the entry at a position: a snapshot there stays in reach of all who reach the entry."""
    return parts(line, branch, position - 1, position)[0][0] if position else branch


def surplus(positions: Sequence[int], protected: Collection[int]) -> list[int]:
    """The snapshots of a branch that need not be kept.

    Kept are the newest 4, the first in each 4,096 positions, and those that a log begins at (`protected`).
    """
    ordered = sorted(positions)
    firsts = {position // SNAPSHOT_SPACING: position for position in reversed(ordered)}
    kept = {*ordered[-SNAPSHOTS_KEPT:], *firsts.values(), *protected}
    return [position for position in ordered if position not in kept]


def cut(segment: Segment, after: int, to: int) -> Segment:
    """The part of a segment that holds positions after + 1 to `to`."""
    first, last = max(after - segment.start, 0), min(to, segment.end) - segment.start
    if (first, last) == (0, segment.count):
        return segment
    size = len(segment.data) // segment.count
    return Segment(
        branch=segment.branch,
        start=segment.start + first,
        count=last - first,
        source=segment.source,
        data=segment.data[first * size : last * size],
        numerics=segment.numerics,
        at_ms=_cut_times(segment.at_ms, first, last),
        logprobs=segment.logprobs[first * 4 : last * 4],
    )


def _cut_times(times: tuple[tuple[int, int], ...], first: int, last: int) -> tuple[tuple[int, int], ...]:
    kept, begin = [], 0
    for count, at in times:
        inside = min(begin + count, last) - max(begin, first)
        if inside > 0:
            kept.append((inside, at))
        begin += count
    return tuple(kept)


def join(segments: Sequence[Segment]) -> list[Segment]:
    """The same entries in fewer segments: neighbours of one source and one numerics become one."""
    joined: list[Segment] = []
    run: list[Segment] = []
    for segment in segments:
        if run and not _continues(run[-1], segment):
            joined.append(_merge(run))
            run = []
        run.append(segment)
    return joined + ([_merge(run)] if run else [])


def _continues(left: Segment, right: Segment) -> bool:
    return (left.branch, left.end, left.source, left.numerics) == (
        right.branch,
        right.start,
        right.source,
        right.numerics,
    )


def _merge(run: list[Segment]) -> Segment:
    if len(run) == 1:
        return run[0]
    return Segment(
        branch=run[0].branch,
        start=run[0].start,
        count=sum(segment.count for segment in run),
        source=run[0].source,
        data=b"".join(segment.data for segment in run),
        numerics=run[0].numerics,
        at_ms=tuple(pair for segment in run for pair in segment.at_ms),
        logprobs=b"".join(segment.logprobs for segment in run),
    )
