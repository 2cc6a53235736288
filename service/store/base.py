"""The store's protocol: heads, log segments and snapshots, written by compare-and-set group commits.

A session is a log and a head that points into it. The log is a tree of branches, entries are immutable, and a
commit appends to one branch and moves one head. A commit holds when the live head still stands at the expected
(epoch, position); in a group commit every session gets a result of its own, and a loser rolls nobody else back.
"""

import secrets
import time
from collections.abc import Collection, Sequence
from typing import Any, Literal, Protocol

import msgspec

SCHEMA_VERSION = 1
TOMBSTONE_TTL_S = 7 * 24 * 3600

Key = tuple[str, str]
"""(tenant, session id); the tenant is "" until keys are switched on."""


class StoreError(Exception):
    """The store can not be opened or used; the message says what to do."""


class CommitUnknown(StoreError):
    """It is not known whether a commit was applied: the store could not be read after it failed."""


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


class Parent(msgspec.Struct, frozen=True, array_like=True):
    """Where a session left the one that it was forked from."""

    session: str
    position: int


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

    @property
    def key(self) -> Key:
        """The key that the head is stored under."""
        return (self.tenant, self.id)

    @property
    def fence(self) -> tuple[int, int]:
        """(epoch, position): what a commit on top of this head expects."""
        return (self.epoch, self.position)

    @property
    def expires_ms(self) -> int | None:
        """When the session expires unless something is committed before; None: never."""
        return self.updated_ms + self.ttl_s * 1000 if self.ttl_s else None

    def at(self, now_ms: int) -> "Head":
        """The head as it is at `now_ms`: expired when its time has passed."""
        if self.status == "live" and self.expires_ms is not None and now_ms >= self.expires_ms:
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


class Commit(msgspec.Struct, frozen=True, array_like=True):
    """One session's part of a group commit."""

    head: Head
    expected: tuple[int, int] | None
    """(epoch, position) of the live head; None: the id must not live"""
    segments: tuple[Segment, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()


class Applied(msgspec.Struct, frozen=True):
    """The commit holds; `head` is as stored, with the store's times."""

    head: Head


class Conflict(msgspec.Struct, frozen=True):
    """The commit was refused: the head stands elsewhere (None: there is none)."""

    head: Head | None


Result = Applied | Conflict


class Store(Protocol):
    """What every store does. Methods may be called from any thread; none of them knows HTTP."""

    durability: str

    def commit(self, commits: Sequence[Commit]) -> list[Result]:
        """Apply a group commit; returns one result a commit, in order.

        Raises StoreError when nothing was applied, CommitUnknown when that can not be told.
        """

    def head(self, key: Key, at_ms: int | None = None) -> Head | None:
        """The head of a session, also of a closed or expired one while its tombstone lasts.

        Whether it is expired is judged at `at_ms`, by default now.
        """

    def log(self, branch: str, after: int, to: int) -> list[Segment]:
        """The segments that hold positions after + 1 to `to`, in order, cut to that range."""

    def snapshot(self, branch: str, below: int) -> Snapshot | None:
        """The newest snapshot at a position less than `below`."""

    def heads(self, tenant: str, model: str | None, after: str, limit: int) -> list[Head]:
        """Live sessions whose id is greater than `after`, ordered by id."""

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


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def stamp(commit: Commit, live: Head | None, now: int) -> Commit:
    """The commit with the store's times and a fresh commit id; `live` is the head it follows."""
    head = msgspec.structs.replace(
        commit.head,
        created_ms=now if commit.expected is None or live is None else live.created_ms,
        updated_ms=now,
        commit_id=secrets.token_bytes(8),
    )
    segments = tuple(msgspec.structs.replace(segment, at_ms=((segment.count, now),)) for segment in commit.segments)
    return Commit(head, commit.expected, segments, commit.snapshots)


def holds(commit: Commit, stored: Head | None, now: int) -> bool:
    """Whether the compare-and-set of a commit succeeds against the stored head."""
    live = stored.at(now) if stored is not None else None
    if commit.expected is None:
        return live is None or live.status != "live"
    # A session with work under way does not expire: its commit is judged by the fence alone.
    return stored is not None and stored.status == "live" and stored.fence == commit.expected


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
