"""The stores against one suite: compare-and-set, group commits, logs, snapshots, paging, expiry, crashes."""

import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from redis_server import RedisServer, server_binary

from service.store import base as base_module
from service.store import memory as memory_module
from service.store import redis as redis_module
from service.store.base import (
    MAX_GROWN,
    TOMBSTONE_TTL_S,
    Applied,
    Branch,
    Change,
    Commit,
    CommitUnknown,
    Conflict,
    Fence,
    Generation,
    Head,
    Line,
    Parent,
    Reply,
    Result,
    Segment,
    Snapshot,
    Source,
    Step,
    Store,
    StoreError,
    graft,
    parts,
    surplus,
    tombstone,
)
from service.store.memory import MemoryStore
from service.store.redis import RedisStore
from service.store.sqlite import SqliteStore, collect, schema, spread, tables
from service.store.sqlite import store as sqlite_module
from service.store.sqlite.rows import seal, segment_row, unseal
from service.store.sqlite.schema import SCHEMA_VERSION

HOUR_MS = 3_600_000


class Clock:
    """The stores' clock, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_000_000_000_000

    def __call__(self) -> int:
        return self.now

    def rule(self, patch: pytest.MonkeyPatch) -> None:
        """Be the clock of every store; nothing happens in the background."""
        for module in (memory_module, sqlite_module):
            patch.setattr(module, "now_ms", self)
        patch.setattr(RedisStore, "_now", lambda store: self())
        patch.setattr(sqlite_module, "SPREAD_EVERY_S", 3600.0)
        patch.setattr(tables, "GIVE_WAY_S", 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    found.rule(monkeypatch)
    return found


class Spreading:
    """A SQLite store that spreads its journal after each commit."""

    def __init__(self, store: Any) -> None:  # noqa: ANN401 (private parts are used)
        self._store = store

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._store, name)

    def commit(self, commits: Sequence[Change], snapshots: Sequence[Snapshot] = ()) -> list[Result]:
        results = self._store.commit(commits, snapshots)
        self._store._spreader.spread()
        return list(results)

    def keep(self, tenant: str, reply: Reply) -> bool:
        kept = self._store.keep(tenant, reply)
        self._store._spreader.spread()
        return bool(kept)


class Served(RedisStore):
    """A Redis store with a server of its own."""

    def __init__(self, folder: Path) -> None:
        self._server = RedisServer(folder / "redis").start()
        super().__init__(self._server.url)

    def close(self) -> None:
        super().close()
        self._server.kill()


STORES: dict[str, Callable[[Path], Store]] = {
    "memory": lambda folder: MemoryStore(),
    "sqlite": SqliteStore,
    "sqlite spread": lambda folder: Spreading(SqliteStore(folder)),
    "redis": Served,
}
"""Every store; "spread" moves each commit to the tables at once."""


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, clock: Clock, tmp_path: Path) -> Iterator[Store]:
    if request.param == "redis" and server_binary() is None:
        pytest.skip("no Redis-compatible server")
    made = STORES[request.param](tmp_path)
    yield made
    made.close()


def head_of(store: Store, id: str = "a", **more: Any) -> Head:  # noqa: ANN401
    epoch = store.next_epoch(("", id))
    values = {"model": "m", "version": 1, "graph": "g", "epoch": epoch, "position": 0, "seed": 1}
    values["branch"] = f"{id}-{epoch}"
    return Head(**{"tenant": "", "id": id, **values, **more})


def create(store: Store, id: str = "a", **more: Any) -> Head:  # noqa: ANN401
    result = store.commit([Commit(head_of(store, id, **more), None)])[0]
    assert isinstance(result, Applied)
    return result.head


def grown(head: Head, data: bytes, source: Any = "fed", snapshot: bytes | None = None, **more: Any) -> Commit:  # noqa: ANN401
    """A commit that appends one-byte entries to a head."""
    logprobs = bytes(4 * len(data)) if source == "generated" else b""
    segment = Segment(head.branch, head.position, len(data), source, data, "n", logprobs=logprobs)
    snapshots = (Snapshot(head.branch, head.position, "n", snapshot, head.graph),) if snapshot is not None else ()
    after = msgspec.structs.replace(head, position=head.position + len(data), **more)
    return Commit(after, head.fence, (segment,), snapshots)


def applied(store: Store, commit: Commit) -> Head:
    result = store.commit([commit])[0]
    assert isinstance(result, Applied)
    return result.head


def at_home(commit: Commit, line: Line) -> Commit:
    """The same commit, its snapshots on the branches that hold their entries: so whoever has the entry finds them."""
    snapshots = [
        msgspec.structs.replace(one, branch=parts(line, one.branch, one.position - 1, one.position)[0][0])
        if one.position
        else one
        for one in commit.snapshots
    ]
    return msgspec.structs.replace(commit, snapshots=tuple(snapshots))


def rewound(store: Store, head: Head, position: int) -> Commit:
    """A commit that goes on after an earlier position, on a branch of its own."""
    epoch = store.next_epoch(head.key)
    branch = f"{head.id}-{epoch}"
    line = graft(store.line(head.branch), head.branch, position)
    origin = head.origin if position else 0
    after = msgspec.structs.replace(head, epoch=epoch, position=position, branch=branch, origin=origin)
    return Commit(after, head.fence, branch=Branch(branch, line))


def forked(store: Store, head: Head, id: str, position: int, **more: Any) -> Commit:  # noqa: ANN401
    """A commit that begins a session whose past is another's."""
    line = graft(store.line(head.branch), head.branch, position)
    new = head_of(store, id, position=position, origin=head.origin, parent=Parent(head.id, position, head.life), **more)
    return Commit(new, None, branch=Branch(new.branch, line), source=Source(head.id, head.epoch, head.branch))


def answered(commit: Commit, key: str, scope: str | None = None, **more: Any) -> Commit:  # noqa: ANN401
    """The same commit, keeping an answer under a key."""
    reply = Reply(commit.head.id if scope is None else scope, key, **{"digest": b"d", "kind": "body", **more})
    return msgspec.structs.replace(commit, reply=reply)


def delete(store: Store, head: Head) -> Head:
    return applied(store, Commit(tombstone(head, "closed"), head.fence))


def newest(store: Store, branch: str, below: int = 10**9) -> Snapshot | None:
    return store.snapshot(branch, below, "g")


def entries(store: Store, branch: str, after: int, to: int) -> bytes:
    return b"".join(segment.data for segment in store.log(branch, after, to))


# ---------------------------------------------------------------------- compare-and-set


def test_a_new_session_is_there_with_the_stores_times(store: Store, clock: Clock) -> None:
    made = create(store, metadata={"room": "kitchen"}, ttl_s=60)
    assert store.head(("", "a")) == made
    assert (made.created_ms, made.updated_ms, made.expires_ms) == (clock.now, clock.now, clock.now + 60_000)
    assert made.metadata == {"room": "kitchen"} and len(made.commit_id) == 8


def test_a_session_that_was_never_there_is_none(store: Store) -> None:
    assert store.head(("", "nobody")) is None


def test_a_commit_moves_the_head_and_keeps_its_birth(store: Store, clock: Clock) -> None:
    made = create(store)
    clock.now += 5
    moved = applied(store, grown(made, b"abc"))
    assert store.head(("", "a")) == moved
    assert (moved.position, moved.created_ms, moved.updated_ms) == (3, clock.now - 5, clock.now)
    assert moved.commit_id != made.commit_id


@pytest.mark.parametrize("fence", [(1, 0, b""), (1, 4, b""), (2, 3, b""), (0, 3, b""), (1, 3, b"another!")])
def test_a_commit_on_another_fence_is_a_conflict_and_says_where_the_head_stands(fence: Fence, store: Store) -> None:
    stands = applied(store, grown(create(store), b"abc"))
    expected = (*fence[:2], fence[2] or stands.commit_id)
    stale = msgspec.structs.replace(grown(stands, b"x"), expected=expected)
    assert store.commit([stale]) == [Conflict(stands)]
    assert store.head(("", "a")) == stands and entries(store, stands.branch, 0, 9) == b"abc"


def test_creating_a_live_session_is_a_conflict(store: Store) -> None:
    made = create(store)
    assert store.commit([Commit(head_of(store), None)]) == [Conflict(made)]


def test_a_commit_to_a_session_that_is_not_there_is_a_conflict(store: Store) -> None:
    assert store.commit([grown(head_of(store), b"x")]) == [Conflict(None)]


def test_a_commit_to_a_closed_session_is_a_conflict(store: Store) -> None:
    made = create(store)
    delete(store, made)
    result = store.commit([grown(made, b"x")])[0]
    assert isinstance(result, Conflict) and result.head is not None and result.head.status == "closed"


def test_a_loser_rolls_nobody_else_back(store: Store) -> None:
    heads = [create(store, id) for id in "abc"]
    stale = msgspec.structs.replace(grown(heads[1], b"x"), expected=(1, 9, heads[1].commit_id))
    results = store.commit([grown(heads[0], b"1"), stale, grown(heads[2], b"22")])
    assert [type(result) for result in results] == [Applied, Conflict, Applied]
    assert [store.head(("", id)).position for id in "abc"] == [1, 0, 2]


def test_a_step_is_stored_as_its_commit_would_be(store: Store, clock: Clock) -> None:
    suspended = Generation(0, 1, 5, 1.0, 0, 1.0, 0)
    heads = [create(store, id, ttl_s=60, metadata={"a": 1}, generation=suspended) for id in "abcd"]
    for data in (b"x", b"y", b"z"):
        clock.now += 10
        steps = [Step(head, data, "n") for head in heads]
        results = store.commit([steps[0], steps[1].whole(), steps[2], grown(heads[3], data)])
        heads = [result.head for result in results if isinstance(result, Applied)]
        assert len(heads) == 4
    assert len({head.commit_id for head in heads}) == 4
    told = [msgspec.structs.replace(head, id="", branch="", commit_id=b"") for head in heads]
    assert told[0] == told[1] == told[2] == msgspec.structs.replace(told[3], generation=told[0].generation)
    assert told[0].generation == msgspec.structs.replace(suspended, finish_reason="cancelled", end=0)
    logs = [[msgspec.structs.replace(one, branch="") for one in store.log(head.branch, 0, 3)] for head in heads]
    assert logs[0] == logs[1] == logs[2] == logs[3]
    assert logs[0] == [
        Segment("", 0, 3, "fed", b"xyz", "n", ((1, clock.now - 20), (1, clock.now - 10), (1, clock.now)))
    ]


def test_many_steps_in_a_row_are_all_in_the_log(store: Store, clock: Clock) -> None:
    """More than one segment that grows takes in, and the arithmetic changes on the way."""
    head, begun = create(store), clock.now
    numerics = ["n"] * (MAX_GROWN + 10) + ["m"] * 20
    entries = [bytes([i % 251]) for i in range(len(numerics))]
    for entry, one in zip(entries, numerics, strict=True):
        clock.now += 1
        (result,) = store.commit([Step(head, entry, one)])
        assert isinstance(result, Applied)
        head = result.head
    for after, to in ((0, len(entries)), (MAX_GROWN - 3, MAX_GROWN + 3), (100, 101)):
        log = store.log(head.branch, after, to)
        assert b"".join(one.data for one in log) == b"".join(entries[after:to])
        said = [(one.numerics, at) for one in log for count, at in one.at_ms for _ in range(count)]
        assert said == [(numerics[i], begun + i + 1) for i in range(after, to)]


def test_a_step_from_where_the_session_does_not_stand_is_a_conflict(store: Store) -> None:
    first, closed = create(store), create(store, "b")
    second = applied(store, grown(first, b"x"))
    gone = delete(store, closed)
    absent = head_of(store, "c")
    stale = [Step(one, b"?", "n") for one in (first, closed, absent)]
    assert store.commit([*stale, Step(second, b"y", "n")])[:3] == [Conflict(second), Conflict(gone), Conflict(None)]
    head = store.head(first.key)
    assert head is not None and head.position == 2
    assert b"".join(one.data for one in store.log(head.branch, 0, 2)) == b"xy"
    twice = store.commit([Step(head, b"z", "n"), Step(head, b"z", "n"), grown(head, b"z")])
    assert [type(one) for one in twice] == [Applied, Conflict, Conflict]


def test_tenants_have_sessions_of_their_own(store: Store) -> None:
    mine, theirs = create(store, tenant="x"), create(store, tenant="y", seed=2)
    assert store.head(("x", "a")) == mine and store.head(("y", "a")) == theirs and store.head(("", "a")) is None
    assert store.heads("x", None, "", 9) == [mine]


def test_a_head_keeps_everything_it_says(store: Store) -> None:
    generation = Generation(3, 2, 100, 0.5, 4, 0.9, 2**53 - 1, ("x", "ä"), 2, "stop", 17)
    made = create(store, generation=generation, metadata={"a": [1, None, {"b": 1.5}]}, seed=2**53 - 1)
    found = store.head(("", "a"))
    assert found == made and found.generation == generation


# ---------------------------------------------------------------------- lives and epochs


def test_a_closed_session_leaves_a_tombstone_without_its_past(store: Store) -> None:
    head = applied(store, grown(create(store, metadata={"secret": 1}), b"abc", snapshot=b"s"))
    delete(store, head)
    found = store.head(("", "a"))
    assert (found.status, found.position, found.metadata) == ("closed", 3, {})
    assert store.heads("", None, "", 9) == []
    flush(store)
    assert entries(store, head.branch, 0, 9) == b"" and newest(store, head.branch) is None


def test_a_new_life_has_a_new_epoch_and_nothing_of_the_old(store: Store) -> None:
    old = applied(store, grown(create(store), b"abc", snapshot=b"s"))
    delete(store, old)
    new = create(store)
    assert new.epoch > old.epoch and new.position == 0
    assert entries(store, new.branch, 0, 9) == b""
    assert store.commit([grown(old, b"x")]) == [Conflict(new)]


def test_epochs_are_not_used_again_after_the_tombstone_is_swept(store: Store, clock: Clock) -> None:
    used = {create(store).epoch}
    for _ in range(3):
        delete(store, store.head(("", "a")))
        flush(store)
        clock.now += TOMBSTONE_TTL_S * 1000 + 1
        assert store.sweep() == 1
        assert store.head(("", "a")) is None
        epoch = create(store).epoch
        assert epoch not in used
        used.add(epoch)


def flush(store: Store) -> None:
    """Move the journal to the tables, where there is one."""
    if isinstance(store, SqliteStore | Spreading):
        store._spreader.spread()


def test_a_tombstone_lasts_its_time(store: Store, clock: Clock) -> None:
    delete(store, create(store))
    flush(store)
    clock.now += TOMBSTONE_TTL_S * 1000 - 1
    assert store.sweep() == 0 and store.head(("", "a")).status == "closed"


def test_a_session_expires_by_the_clock_alone(store: Store, clock: Clock) -> None:
    create(store, ttl_s=10)
    clock.now += 9_999
    assert store.head(("", "a")).status == "live"
    clock.now += 1
    found = store.head(("", "a"))
    assert (found.status, found.updated_ms) == ("expired", clock.now)
    assert store.heads("", None, "", 9) == []
    assert store.head(("", "a"), at_ms=0).status == "live"


def test_a_commit_extends_a_life(store: Store, clock: Clock) -> None:
    head = create(store, ttl_s=10)
    clock.now += 9_000
    applied(store, grown(head, b"x"))
    clock.now += 9_000
    assert store.head(("", "a")).status == "live"


def test_work_under_way_commits_although_the_time_has_passed(store: Store, clock: Clock) -> None:
    head = create(store, ttl_s=10)
    clock.now += 20_000
    assert applied(store, grown(head, b"x")).status == "live"


def test_an_expired_id_may_live_again(store: Store, clock: Clock) -> None:
    old = applied(store, grown(create(store, ttl_s=10), b"abc", snapshot=b"s"))
    flush(store)
    clock.now += 20_000
    new = create(store)
    flush(store)
    assert new.epoch > old.epoch and store.head(("", "a")) == new
    assert store.log(old.branch, 0, 9) == [] and newest(store, old.branch) is None


def test_sweep_expires_what_is_due_but_nothing_busy(store: Store, clock: Clock) -> None:
    for id in "abc":
        create(store, id, ttl_s=10)
    create(store, "d")
    flush(store)
    clock.now += 20_000
    store.sweep(busy={("", "b")})
    assert [store.head(("", id), at_ms=0).status for id in "abcd"] == ["expired", "live", "expired", "live"]


def test_a_swept_session_forgets_its_log(store: Store, clock: Clock) -> None:
    head = applied(store, grown(create(store, ttl_s=10), b"abc", snapshot=b"s"))
    flush(store)
    clock.now += 20_000
    store.sweep()
    flush(store)
    assert store.log(head.branch, 0, 9) == [] and newest(store, head.branch) is None


# ---------------------------------------------------------------------- log and snapshots


@pytest.fixture
def long_log(store: Store) -> Head:
    """Ten entries in five commits."""
    head = create(store)
    for data, source in ((b"ab", "fed"), (b"c", "generated"), (b"d", "generated"), (b"efgh", "fed"), (b"ij", "fed")):
        head = applied(store, grown(head, data, source))
    return head


@pytest.mark.parametrize("after", range(11))
def test_the_log_is_cut_to_the_positions_asked_for(after: int, store: Store, long_log: Head) -> None:
    for to in range(after, 12):
        segments = store.log(long_log.branch, after, to)
        assert b"".join(s.data for s in segments) == b"abcdefghij"[after:to]
        assert all(len(s.data) == s.count == sum(n for n, _ in s.at_ms) for s in segments)
        if segments:
            assert segments[0].start == after and segments[-1].end == min(to, 10)


def test_the_log_says_what_was_fed_and_what_was_generated(store: Store, long_log: Head) -> None:
    segments = store.log(long_log.branch, 0, 10)
    assert [(s.source, s.data, len(s.logprobs)) for s in segments] == [
        ("fed", b"ab", 0),
        ("generated", b"cd", 8),
        ("fed", b"efghij", 0),
    ]


def test_entries_of_several_bytes_are_cut_whole(store: Store) -> None:
    head = create(store)
    segment = Segment(head.branch, 0, 3, "fed", b"aaaabbbbcccc", "n")
    applied(store, Commit(msgspec.structs.replace(head, position=3), head.fence, (segment,)))
    assert entries(store, head.branch, 1, 2) == b"bbbb"


def test_the_log_keeps_when_entries_came(store: Store, clock: Clock) -> None:
    head = create(store)
    head = applied(store, grown(head, b"ab"))
    clock.now += 7
    applied(store, grown(head, b"c"))
    times = [pair for segment in store.log(head.branch, 1, 3) for pair in segment.at_ms]
    assert times == [(1, clock.now - 7), (1, clock.now)]


def test_an_unknown_branch_has_no_log(store: Store) -> None:
    assert store.log("nothing", 0, 9) == [] and newest(store, "nothing") is None


def test_the_newest_snapshot_below_a_position_is_found(store: Store) -> None:
    head = create(store)
    for i in range(4):
        head = applied(store, grown(head, b"xyz", snapshot=b"at %d" % (3 * i)))
    assert newest(store, head.branch, 0) is None
    found = [newest(store, head.branch, below).position for below in range(1, 12)]
    assert found == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9]
    assert newest(store, head.branch, 7).data == b"at 6"


def test_a_snapshot_is_of_one_graph(store: Store) -> None:
    head = create(store)
    head = applied(store, grown(head, b"abc", snapshot=b"old"))
    head = applied(store, Commit(msgspec.structs.replace(head, graph="h"), head.fence))
    head = applied(store, grown(head, b"d", snapshot=b"new"))
    store.commit([], [Snapshot(head.branch, 3, "n", b"same place", "g")])
    found = [(one.position, one.data) for graph in "gh" if (one := store.snapshot(head.branch, 9, graph))]
    assert found == [(3, b"same place"), (3, b"new")]
    assert store.snapshots(head.branch, 0, 9, "h") == [3] and store.snapshot(head.branch, 9, "other") is None


def test_snapshots_are_told_by_their_positions(store: Store) -> None:
    head = create(store)
    for _ in range(4):
        head = applied(store, grown(head, b"xyz", snapshot=b"s"))
    assert store.snapshots(head.branch, 0, 99, "g") == [3, 6, 9]
    assert store.snapshots(head.branch, 3, 6, "g") == [6]


def test_a_snapshot_may_be_written_beside_the_commits(store: Store) -> None:
    head = applied(store, grown(create(store), b"abc"))
    store.commit([], [Snapshot(head.branch, 2, "n", b"two", "g")])
    flush(store)
    assert newest(store, head.branch).data == b"two" and store.head(("", "a")) == head


def test_a_snapshot_that_comes_too_late_is_not_kept(store: Store) -> None:
    head = applied(store, grown(create(store), b"abcd"))
    applied(store, rewound(store, head, 2))
    other = applied(store, grown(create(store, "b"), b"abc"))
    delete(store, other)
    flush(store)
    store.commit([], [Snapshot(branch, 3, "n", b"late", "g") for branch in (head.branch, other.branch)])
    flush(store)
    assert newest(store, head.branch) is None and newest(store, other.branch) is None


def test_surplus_snapshots_are_dropped(store: Store) -> None:
    head = create(store)
    for _ in range(12):
        head = applied(store, grown(head, b"x", snapshot=b"s"))
        flush(store)
    assert [0, *store.snapshots(head.branch, 0, 99, "g")] == [0, 8, 9, 10, 11]
    assert newest(store, head.branch, 8).position == 0


def test_the_snapshot_that_a_log_begins_at_is_kept(store: Store) -> None:
    head = create(store)
    for _ in range(3):
        head = applied(store, grown(head, b"x", snapshot=b"s"))
    head = applied(store, Commit(msgspec.structs.replace(head, origin=1), head.fence))
    fork = applied(store, forked(store, head, "b", 3))
    for _ in range(12):
        head = applied(store, grown(head, b"x", snapshot=b"s", origin=2))
        flush(store)
    assert [newest(store, branch, 3).position for branch in (head.branch, fork.branch)] == [2, 2]
    assert newest(store, fork.branch, 2).position == 1


@pytest.mark.parametrize(
    ("positions", "protected", "dropped"),
    [
        ([], [], []),
        ([1, 2, 3, 4], [], []),
        ([5, 1, 2, 3, 4, 6], [], [2]),
        ([1, 2, 3, 4, 5, 6], [2], []),
        ([10, 4095, 4096, 5000, 8192, 8193, 8194, 8195, 8196], [5000], [4095]),
    ],
)
def test_which_snapshots_need_not_be_kept(positions: list[int], protected: list[int], dropped: list[int]) -> None:
    assert surplus(positions, protected) == dropped


# ---------------------------------------------------------------------- branches


def test_a_rewound_session_goes_on_from_an_earlier_position(store: Store, long_log: Head) -> None:
    head = applied(store, rewound(store, long_log, 5))
    assert store.line(head.branch) == ((long_log.branch, 5),)
    head = applied(store, grown(head, b"XY"))
    for _ in range(2):
        assert entries(store, head.branch, 0, 99) == b"abcdeXY"
        assert entries(store, head.branch, 4, 6) == b"eX"
        flush(store)
    assert [segment.branch for segment in store.log(head.branch, 0, 9)][-1] == head.branch
    assert store.commit([grown(long_log, b"x")]) == [Conflict(head)]


def test_what_a_rewind_leaves_behind_is_deleted(store: Store, long_log: Head) -> None:
    head = applied(store, grown(long_log, b"k", snapshot=b"at ten"))
    head = applied(store, rewound(store, head, 5))
    flush(store)
    assert entries(store, long_log.branch, 0, 99) == b"abcde" and newest(store, long_log.branch) is None


def test_a_rewind_to_0_leaves_nothing(store: Store, long_log: Head) -> None:
    head = applied(store, rewound(store, long_log, 0))
    flush(store)
    assert entries(store, long_log.branch, 0, 99) == b"" == entries(store, head.branch, 0, 99)


def test_a_session_may_be_rewound_many_times(store: Store) -> None:
    head, log = create(store), b""
    for i in range(12):
        data = bytes([i]) * 4
        head, log = applied(store, grown(head, data)), log + data
        position = 3 * i
        head, log = applied(store, rewound(store, head, position)), log[:position]
        assert entries(store, head.branch, 0, 99) == log
    flush(store)
    assert entries(store, head.branch, 0, 99) == log


def test_a_fork_has_its_parents_past_and_a_future_of_its_own(store: Store, long_log: Head) -> None:
    fork = applied(store, forked(store, long_log, "b", 4))
    parent = applied(store, grown(long_log, b"kl"))
    fork = applied(store, grown(fork, b"XY"))
    assert entries(store, fork.branch, 0, 99) == b"abcdXY" and entries(store, parent.branch, 0, 99) == b"abcdefghijkl"


def test_a_fork_keeps_what_it_reaches_when_its_parent_is_closed(store: Store, long_log: Head) -> None:
    fork = applied(store, forked(store, long_log, "b", 5))
    grandchild = applied(store, forked(store, applied(store, grown(fork, b"XYZ")), "c", 7))
    delete(store, long_log)
    flush(store)
    assert entries(store, long_log.branch, 0, 99) == b"abcde"
    delete(store, store.head(("", "b")))
    flush(store)
    assert entries(store, grandchild.branch, 0, 99) == b"abcdeXY" and entries(store, fork.branch, 0, 99) == b"abcdeXY"
    delete(store, grandchild)
    flush(store)
    assert [entries(store, h.branch, 0, 99) for h in (long_log, fork, grandchild)] == [b"", b"", b""]


def test_a_parent_keeps_its_log_when_its_fork_is_closed(store: Store, long_log: Head) -> None:
    delete(store, applied(store, forked(store, long_log, "b", 5)))
    flush(store)
    assert entries(store, long_log.branch, 0, 99) == b"abcdefghij"


def test_a_fork_sees_its_parents_snapshots_up_to_where_it_left(store: Store) -> None:
    head = create(store)
    for _ in range(4):
        head = applied(store, grown(head, b"xyz", snapshot=b"s"))
    fork = applied(store, forked(store, head, "b", 7))
    assert newest(store, fork.branch).position == 6
    fork = applied(store, grown(fork, b"abc", snapshot=b"own"))
    assert store.snapshots(fork.branch, 0, 99, "g") == [3, 6, 7]
    found = [newest(store, fork.branch, below) for below in (8, 7, 4)]
    assert [(s.position, s.branch) for s in found] == [(7, fork.branch), (6, head.branch), (3, head.branch)]
    fork = applied(store, rewound(store, fork, 6))
    flush(store)
    assert store.snapshots(fork.branch, 0, 99, "g") == [3, 6]


@pytest.mark.parametrize("ended", ["closed", "rewound", "expired", "never there"])
def test_a_fork_of_a_session_that_has_moved_is_refused(ended: str, store: Store, clock: Clock) -> None:
    head = applied(store, grown(create(store, ttl_s=60), b"abc"))
    fork = forked(store, head, "b", 2)
    match ended:
        case "closed":
            delete(store, head)
        case "rewound":
            applied(store, rewound(store, head, 1))
        case "expired":
            clock.now += 60_000
        case _:
            fork = msgspec.structs.replace(fork, source=Source("nobody", 1, "nobody-1"))
    assert store.commit([fork]) == [Conflict(None)] and store.head(("", "b")) is None


def test_a_group_commit_is_applied_in_order(store: Store) -> None:
    head = applied(store, grown(create(store), b"abc"))
    close = Commit(tombstone(head, "closed"), head.fence)
    early, late = forked(store, head, "b", 2), forked(store, head, "c", 2)
    assert [type(result) for result in store.commit([early, close, close, late])] == [
        Applied,
        Applied,
        Conflict,
        Conflict,
    ]
    flush(store)
    assert entries(store, early.head.branch, 0, 9) == b"ab" == entries(store, head.branch, 0, 9)


def test_forks_of_a_life_are_found(store: Store, clock: Clock) -> None:
    head = applied(store, grown(create(store), b"abc"))
    for id, ttl_s in (("c", 0), ("b", 0), ("d", 60), ("e", 0)):
        fork = applied(store, forked(store, head, id, 2, ttl_s=ttl_s))
    delete(store, fork)
    applied(store, forked(store, store.head(("", "b")), "f", 1))
    create(store, "other")
    assert store.forks(head.key, head.life) == ["b", "c", "d"]
    clock.now += 60_000
    assert store.forks(head.key, head.life) == ["b", "c"]
    assert store.forks(head.key, head.life + 1) == [] == store.forks(("x", "a"), head.life)
    assert store.forks(("", "b"), store.head(("", "b")).life) == ["f"]


def test_a_model_version_lives_while_one_of_its_sessions_does(store: Store, clock: Clock) -> None:
    first, second = create(store, "a"), create(store, "b", ttl_s=60)
    assert store.lives("m", 1) and not store.lives("m", 2) and not store.lives("n", 1)
    delete(store, first)
    assert store.lives("m", 1)
    clock.now += 60_000
    assert not store.lives("m", 1)
    applied(store, Commit(msgspec.structs.replace(second, version=2), second.fence))
    assert store.lives("m", 2) and not store.lives("m", 1)


# ---------------------------------------------------------------------- retention


def test_entries_before_the_origin_are_deleted(store: Store) -> None:
    head = create(store)
    for i in range(6):
        head = applied(store, grown(head, b"%d" % i * 4, snapshot=b"s"))
        flush(store)
    head = applied(store, grown(head, b"last", origin=12))
    flush(store)
    assert entries(store, head.branch, 0, 99) == b"333344445555last"
    assert newest(store, head.branch, 13).position == 12 and newest(store, head.branch, 12) is None


def test_entries_stay_while_any_session_retains_them(store: Store) -> None:
    head = applied(store, grown(create(store), b"abc"))
    flush(store)
    head = applied(store, grown(head, b"def", snapshot=b"s"))
    fork = applied(store, forked(store, head, "b", 5))
    head = applied(store, Commit(msgspec.structs.replace(head, origin=3), head.fence))
    flush(store)
    assert entries(store, fork.branch, 0, 99) == b"abcde"
    delete(store, fork)
    flush(store)
    assert entries(store, head.branch, 0, 99) == b"def"


def test_a_fork_retains_no_more_than_its_origin(store: Store) -> None:
    head = applied(store, grown(create(store), b"abc"))
    flush(store)
    head = applied(store, grown(head, b"def", snapshot=b"s"))
    fork = applied(store, forked(store, head, "b", 5))
    fork = applied(store, Commit(msgspec.structs.replace(fork, origin=3), fork.fence))
    flush(store)
    assert entries(store, head.branch, 0, 99) == b"abcdef"
    delete(store, head)
    flush(store)
    assert entries(store, fork.branch, 0, 99) == b"de" == entries(store, head.branch, 0, 99)


# ---------------------------------------------------------------------- replies


def test_an_answer_is_kept_with_its_commit(store: Store, clock: Clock) -> None:
    made = answered(Commit(head_of(store), None), "k1", kind="session")
    head = applied(store, made)
    expected = msgspec.structs.replace(made.reply, at_ms=clock.now, life=head.life, head=head)
    for _ in range(2):
        assert store.reply("", "a", "k1") == expected
        flush(store)
    assert store.reply("", "a", "k2") is None is store.reply("x", "a", "k1") is store.reply("", "b", "k1")


def test_a_key_that_is_taken_refuses_the_commit(store: Store) -> None:
    head = applied(store, answered(Commit(head_of(store), None), "k"))
    assert store.commit([answered(grown(head, b"x"), "k")]) == [Conflict(head)]
    assert applied(store, answered(grown(head, b"x"), "other")).position == 1


def test_keys_of_a_tenant_are_shared_by_its_sessions(store: Store) -> None:
    made = applied(store, answered(Commit(head_of(store), None), "k", scope=""))
    assert store.reply("", "", "k").life == 0
    assert store.commit([answered(Commit(head_of(store, "b"), None), "k", scope="")]) == [Conflict(None)]
    assert applied(store, answered(grown(made, b"x"), "k")).position == 1
    elsewhere = answered(Commit(head_of(store, tenant="x"), None), "k", scope="")
    assert applied(store, elsewhere).tenant == "x"


def test_one_key_twice_in_a_group_commit_is_taken_once(store: Store) -> None:
    commits = [answered(Commit(head_of(store, id), None), "k", scope="") for id in "ab"]
    assert [type(result) for result in store.commit(commits)] == [Applied, Conflict]
    assert store.head(("", "b")) is None


def test_a_pending_answer_is_finished_by_its_own_generate(store: Store) -> None:
    mine = Generation(0, 0, 9, 1.0, 0, 1.0, 1, key="k")
    head = applied(store, answered(grown(create(store), b"a", generation=mine), "k", pending=True))
    other = msgspec.structs.replace(mine, key="other")
    flush(store)
    head = applied(store, grown(head, b"b"))
    applied_twice = [answered(grown(head, b"c"), "k", digest=b"done"), answered(grown(head, b"c"), "k")]
    assert [type(result) for result in store.commit(applied_twice)] == [Applied, Conflict]
    head = store.head(("", "a"))
    assert (store.reply("", "a", "k").digest, store.reply("", "a", "k").pending) == (b"done", False)
    assert store.commit([answered(grown(head, b"d"), "k")]) == [Conflict(head)]
    head = applied(store, answered(grown(head, b"d", generation=other), "other", pending=True))
    assert store.commit([answered(grown(head, b"e"), "k")]) == [Conflict(head)]


def test_keys_belong_to_one_life_and_outlast_it(store: Store) -> None:
    head = applied(store, answered(Commit(head_of(store), None), "k"))
    head = applied(store, rewound(store, applied(store, grown(head, b"abc")), 1))
    assert store.reply("", "a", "k") is not None
    delete(store, head)
    assert store.reply("", "a", "k") is not None
    closed = store.head(("", "a"))
    assert store.commit([answered(Commit(head_of(store), None), "k")]) == [Conflict(closed)]
    new = create(store)
    assert store.reply("", "a", "k") is None
    applied(store, answered(grown(new, b"x"), "k", digest=b"new"))
    assert store.reply("", "a", "k").digest == b"new"


def test_a_new_life_may_take_a_key_over_from_the_one_before(store: Store) -> None:
    first = delete(store, applied(store, answered(Commit(head_of(store), None), "k")))
    flush(store)

    def again(over: int, **more: Any) -> Commit:  # noqa: ANN401
        return msgspec.structs.replace(answered(Commit(head_of(store), None), "k", **more), over=over)

    assert store.commit([again(0)]) == store.commit([again(first.life + 1)]) == [Conflict(first)]
    second = applied(store, again(first.life, digest=b"second"))
    assert store.reply("", "a", "k").digest == b"second" and store.reply("", "a", "k").life == second.life
    closed = delete(store, second)
    # Whoever knows of the first life alone comes too late.
    assert store.commit([again(first.life)]) == [Conflict(closed)]
    assert store.reply("", "a", "k").digest == b"second"


def test_a_session_may_grow_and_end_in_one_commit(store: Store, clock: Clock) -> None:
    head = applied(store, grown(applied(store, grown(create(store), b"abc", snapshot=b"s")), b"de"))
    flush(store)
    last = tombstone(msgspec.structs.replace(head, position=9), "closed")
    ended = applied(store, answered(Commit(last, head.fence), "k"))
    flush(store)
    assert (ended.status, ended.position) == ("closed", 9) and store.head(("", "a")) == ended
    assert store.reply("", "a", "k") is not None and store.heads("", None, "", 10) == []
    clock.now += 1
    store.sweep()
    assert entries(store, head.branch, 0, 9) == b"" and newest(store, head.branch) is None
    born = msgspec.structs.replace(head_of(store), position=2)
    whole = applied(store, answered(Commit(tombstone(born, "closed"), None), "k2"))
    assert (whole.status, whole.position, whole.life) == ("closed", 2, born.epoch)
    assert store.reply("", "a", "k2") is not None and store.reply("", "a", "k") is None
    assert create(store).epoch > whole.epoch


def test_keys_are_not_copied_by_a_fork(store: Store) -> None:
    head = applied(store, answered(grown(create(store), b"abc"), "k"))
    fork = applied(store, forked(store, head, "b", 2))
    assert store.reply("", "b", "k") is None
    assert applied(store, answered(grown(fork, b"x"), "k")).position == 3


@pytest.mark.parametrize("scope", ["a", ""])
def test_an_answer_is_kept_for_its_time(scope: str, store: Store, clock: Clock) -> None:
    head = applied(store, answered(Commit(head_of(store), None), "k", scope=scope))
    clock.now += 86_400_000 - 1
    assert store.reply("", scope, "k") is not None
    clock.now += 1
    flush(store)
    for _ in range(2):
        assert store.reply("", scope, "k") is None
        assert store.sweep() == 0
    assert applied(store, answered(grown(head, b"x"), "k", scope=scope)).position == 1
    assert store.reply("", scope, "k") is not None


def test_the_newest_answers_of_a_session_are_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (memory_module, spread, redis_module):
        monkeypatch.setattr(module, "REPLIES_KEPT", 4)
    head = create(store)
    for i in range(4):
        head = applied(store, answered(grown(head, b"x"), f"k{i}"))
    assert store.keep("", Reply("a", "k4", b"d", "body")) and store.keep("", Reply("", "k", b"d", "body"))
    head = applied(store, answered(grown(head, b"x"), "k5"))
    flush(store)
    assert [i for i in range(6) if store.reply("", "a", f"k{i}") is not None] == [2, 3, 4, 5]
    assert store.reply("", "", "k") is not None


def test_an_answer_that_committed_nothing_is_kept(store: Store, clock: Clock) -> None:
    head = create(store)
    reply = Reply("a", "k", b"d", "body", body=b"{}")
    assert store.keep("", reply) and not store.keep("", reply)
    flush(store)
    assert not store.keep("", reply)
    assert store.reply("", "a", "k") == msgspec.structs.replace(reply, at_ms=clock.now, life=head.life)
    assert store.commit([answered(grown(head, b"x"), "k")]) == [Conflict(head)]
    assert store.keep("", msgspec.structs.replace(reply, scope="")) and store.reply("", "", "k").life == 0


def test_an_answer_of_an_earlier_life_is_not_that_of_the_new_one(store: Store) -> None:
    old = create(store)
    delete(store, old)
    create(store)
    store.keep("", Reply("a", "k", b"d", "body", life=old.life))
    assert store.reply("", "a", "k") is None


def test_the_answers_go_with_the_tombstone(store: Store, clock: Clock) -> None:
    delete(store, applied(store, answered(Commit(head_of(store), None), "k")))
    flush(store)
    clock.now += TOMBSTONE_TTL_S * 1000 + 1
    store.sweep()
    assert store.reply("", "a", "k") is None
    assert applied(store, answered(Commit(head_of(store), None), "k")).status == "live"


# ---------------------------------------------------------------------- paging


def test_pages_are_in_order_and_of_one_model(store: Store) -> None:
    for i, id in enumerate(["d", "B", "a", "c:1", "-", "Z", "c"]):
        create(store, id, model="even" if i % 2 == 0 else "odd")
    assert [head.id for head in store.heads("", None, "", 99)] == ["-", "B", "Z", "a", "c", "c:1", "d"]
    assert [head.id for head in store.heads("", None, "Z", 2)] == ["a", "c"]
    assert [head.id for head in store.heads("", "odd", "", 99)] == ["B", "Z", "c:1"]
    assert store.heads("", "none", "", 99) == []


def test_a_page_shows_a_session_as_it_is_now(store: Store) -> None:
    create(store, "a", model="old")
    create(store, "b", model="old")
    flush(store)
    delete(store, store.head(("", "a")))
    create(store, "a", model="new")
    applied(store, grown(store.head(("", "b")), b"xy"))
    assert [(h.id, h.model, h.position) for h in store.heads("", None, "", 9)] == [("a", "new", 0), ("b", "old", 2)]
    assert [h.id for h in store.heads("", "old", "", 9)] == ["b"]


def test_a_healthy_store_checks_out(store: Store) -> None:
    create(store)
    assert store.check() is None


# ---------------------------------------------------------------------- any sequence of events

IDS = ["a", "b", "c", "d"]


GROWTH = st.tuples(st.binary(min_size=1, max_size=5), st.booleans(), st.booleans(), st.booleans())
"""(entries, whether generated, whether with a snapshot, whether on a stale fence)"""


KEYS = ["k", "l"]


@dataclass
class Life:
    """What the model knows of a session's present or last life: a full copy of its log."""

    head: Head
    log: bytes = b""
    line: Line = ()
    snapshots: set[int] = field(default_factory=set)
    """positions at which there must be one"""


def state_after(log: bytes, position: int) -> bytes:
    """What a snapshot holds: like a state, it follows from the log."""
    return b"state" + log[:position]


class AnySequence(RuleBasedStateMachine):
    """Commits, conflicts, rewinds, forks, ends, new lives, time and (SQLite) crashes in any order.

    The model is plain dictionaries: every session has a copy of its whole log.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.patch = pytest.MonkeyPatch()
        self.clock.rule(self.patch)
        self.patch.setattr(base_module, "SNAPSHOTS_KEPT", 10_000)
        self.folder = Path(tempfile.mkdtemp())
        self.lives: dict[str, Life] = {}
        self.epochs: dict[str, set[int]] = {id: set() for id in IDS}
        self.written: dict[str, tuple[bytes, Line]] = {}
        """branch -> its log when it was last written, and what comes before its own part"""
        self.replies: dict[tuple[str, str], Reply] = {}
        self.store: Store

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.nothing_is_left()
            self.stop()
        self.patch.undo()
        shutil.rmtree(self.folder)

    def stop(self) -> None:
        self.store.close()

    def open(self) -> Store:
        return MemoryStore()

    @initialize()
    def begin(self) -> None:
        self.store = self.open()

    def lives_now(self, id: str) -> bool:
        life = self.lives.get(id)
        return life is not None and life.head.at(self.clock.now).status == "live"

    def put(self, head: Head, log: bytes, line: Line, snapshots: set[int]) -> None:
        needed = {one for one in snapshots if max(1, head.origin) <= one <= head.position}
        self.lives[head.id] = Life(head, log, line, needed)
        self.written[head.branch] = (log, line)

    @rule(id=st.sampled_from(IDS), ttl_s=st.sampled_from([0, 0, 60]), model=st.sampled_from(["m", "n"]))
    def create(self, id: str, ttl_s: int, model: str) -> None:
        head = head_of(self.store, id, ttl_s=ttl_s, model=model)
        result = self.store.commit([Commit(head, None)])[0]
        if self.lives_now(id):
            assert result == Conflict(self.lives[id].head)
            return
        assert isinstance(result, Applied)
        self.begin_life(result.head)
        self.put(result.head, b"", (), set())

    def begin_life(self, head: Head) -> None:
        assert head.epoch not in self.epochs[head.id] and head.life == head.epoch
        self.epochs[head.id].add(head.epoch)

    @rule(grow=st.dictionaries(st.sampled_from(IDS), GROWTH))
    def commit_group(self, grow: dict[str, tuple[bytes, bool, bool, bool]]) -> None:
        """A group commit; each session feeds or generates, may snapshot, may be late."""
        due = [(id, *what) for id, what in grow.items() if self.lives_now(id)]
        commits: list[Change] = []
        for id, data, generated, snapshot, late in due:
            head, log = self.lives[id].head, self.lives[id].log
            if len(data) == 1 and not (generated or snapshot):
                commits.append(Step(msgspec.structs.replace(head, commit_id=b"another!") if late else head, data, "n"))
                continue
            state = state_after(log, head.position) if snapshot else None
            commit = at_home(grown(head, data, "generated" if generated else "fed", state), self.lives[id].line)
            stale = (head.epoch, head.position, b"another!")
            commits.append(msgspec.structs.replace(commit, expected=stale) if late else commit)
        for (id, data, _, snapshot, late), result in zip(due, self.store.commit(commits), strict=True):
            life = self.lives[id]
            if late:
                assert result == Conflict(life.head)
                continue
            assert isinstance(result, Applied)
            snapped = {life.head.position} if snapshot else set()
            self.put(result.head, life.log + data, life.line, life.snapshots | snapped)

    @rule(id=st.sampled_from(IDS), share=st.floats(0, 1))
    def rewind(self, id: str, share: float) -> None:
        if self.lives_now(id):
            life = self.lives[id]
            position = self.place(life, share)
            head = applied(self.store, rewound(self.store, life.head, position))
            self.epochs[id].add(head.epoch)
            self.put(head, life.log[:position], graft(life.line, life.head.branch, position), life.snapshots)

    def place(self, life: Life, share: float) -> int:
        """A position that a session may go back to: one of its log, or 0."""
        position = round(share * life.head.position)
        return position if position >= life.head.origin else 0

    @rule(id=st.sampled_from(IDS), to=st.sampled_from(IDS), share=st.floats(0, 1), late=st.booleans())
    def fork(self, id: str, to: str, share: float, late: bool) -> None:
        if id not in self.lives or id == to:
            return
        life = self.lives[id]
        position = max(round(share * life.head.position), life.head.origin)
        commit = forked(self.store, life.head, to, position, ttl_s=life.head.ttl_s)
        if late:
            commit = msgspec.structs.replace(commit, source=Source(id, life.head.epoch - 1, life.head.branch))
        result = self.store.commit([commit])[0]
        if late or not self.lives_now(id) or self.lives_now(to):
            assert isinstance(result, Conflict)
            return
        assert isinstance(result, Applied)
        self.begin_life(result.head)
        self.put(result.head, life.log[:position], graft(life.line, life.head.branch, position), life.snapshots)

    @rule(id=st.sampled_from(IDS), share=st.floats(0, 1))
    def raise_origin(self, id: str, share: float) -> None:
        """Cut a log at one of its snapshots."""
        if self.lives_now(id):
            life = self.lives[id]
            found = self.store.snapshots(life.head.branch, life.head.origin, life.head.position, "g")
            if found:
                origin = found[round(share * (len(found) - 1))]
                commit = Commit(msgspec.structs.replace(life.head, origin=origin), life.head.fence)
                self.put(applied(self.store, commit), life.log, life.line, life.snapshots)

    @rule(data=st.data())
    def snapshot_beside(self, data: st.DataObject) -> None:
        """A snapshot that comes when its branch may long be left."""
        if self.written:
            branch = data.draw(st.sampled_from(sorted(self.written)))
            log, line = self.written[branch]
            begin = line[-1][1] if line else 0
            if begin < len(log):
                position = data.draw(st.integers(begin + 1, len(log)))
                self.store.commit([], [Snapshot(branch, position, "n", state_after(log, position), "g")])

    @rule(id=st.sampled_from(IDS), own=st.booleans(), key=st.sampled_from(KEYS), alone=st.booleans())
    def answer(self, id: str, own: bool, key: str, alone: bool) -> None:
        """Keep an answer, with a commit or alone."""
        if not self.lives_now(id):
            return
        life, scope = self.lives[id], id if own else ""
        taken = self.counting(scope, key) is not None
        digest = bytes([len(self.replies)])
        if alone:
            assert self.store.keep("", Reply(scope, key, digest, "body")) != taken
        else:
            result = self.store.commit([answered(grown(life.head, b"?"), key, scope, digest=digest)])[0]
            assert isinstance(result, Conflict if taken else Applied)
            if isinstance(result, Applied):
                self.put(result.head, life.log + b"?", life.line, life.snapshots)
        if not taken:
            reply = Reply(scope, key, digest, "body", self.clock.now, life.head.life if own else 0)
            self.replies[scope, key] = reply

    def counting(self, scope: str, key: str) -> Reply | None:
        reply = self.replies.get((scope, key))
        if reply is None or self.clock.now - reply.at_ms >= 86_400_000:
            return None
        if scope and (self.store.head(("", scope)) is None or self.lives[scope].head.life != reply.life):
            return None
        return reply

    @rule(id=st.sampled_from(IDS))
    def delete(self, id: str) -> None:
        if self.lives_now(id):
            self.lives[id] = Life(delete(self.store, self.lives[id].head))

    @rule(ms=st.sampled_from([1, 30_000, HOUR_MS, TOMBSTONE_TTL_S * 1000]))
    def wait(self, ms: int) -> None:
        self.clock.now += ms

    @rule()
    def sweep(self) -> None:
        self.store.sweep()

    @rule()
    def tidy(self) -> None:
        """Everything is in its place: then nothing is stored that no session reaches."""
        for _ in range(2):
            flush(self.store)
            self.store.sweep()
        flush(self.store)
        reached: dict[str, int] = {}
        for id, life in self.lives.items():
            if self.lives_now(id):
                for branch, upto in (*life.line, (life.head.branch, 10**9)):
                    reached[branch] = max(upto, reached.get(branch, 0))
        for branch, (log, _) in self.written.items():
            upto = reached.get(branch, 0)
            after = [one for one in self.store.log(branch, 0, len(log)) if one.branch == branch and one.end > upto]
            assert after == []
            assert [one for one in self.stored_snapshots(branch) if one > upto or branch not in reached] == []

    def stored_snapshots(self, branch: str) -> list[int]:
        """Positions of the snapshots that the store has on a branch itself."""
        assert isinstance(self.store, MemoryStore)
        return [position for _, position in self.store._snapshots.get(branch, ())]

    def nothing_is_left(self) -> None:
        """When every session is closed, nothing but tombstones and answers remains."""
        for id in IDS:
            if self.lives_now(id):
                delete(self.store, self.lives.pop(id).head)
        self.tidy()
        self.store_is_empty()

    def store_is_empty(self) -> None:
        assert isinstance(self.store, MemoryStore)
        assert [self.store._log, self.store._snapshots, self.store._lines, self.store._reach] == [{}] * 4

    @invariant()
    def heads_are_as_committed(self) -> None:
        for id, life in self.lives.items():
            found = self.store.head(("", id))
            expected = life.head.at(self.clock.now)
            if found is None:
                assert expected.status != "live" and expected.updated_ms < self.clock.now - TOMBSTONE_TTL_S * 1000
            else:
                assert found == expected

    @invariant()
    def logs_are_whole(self) -> None:
        for id, life in self.lives.items():
            if self.lives_now(id):
                head = life.head
                assert self.store.line(head.branch) == life.line
                assert entries(self.store, head.branch, head.origin, 10**9) == life.log[head.origin :]
                middle = (head.origin + head.position) // 2
                assert entries(self.store, head.branch, middle, head.position) == life.log[middle:]

    @invariant()
    def snapshots_follow_from_logs(self) -> None:
        for id, life in self.lives.items():
            if self.lives_now(id):
                branch, origin, position = life.head.branch, life.head.origin, life.head.position
                found = self.store.snapshots(branch, -1, position, "g")
                assert life.snapshots <= set(found)
                assert origin == 0 or origin in found
                for below in (*found, position + 1):
                    before = [one for one in found if one < below]
                    snapshot = self.store.snapshot(branch, below, "g")
                    assert (snapshot.position if snapshot is not None else None) == (before[-1] if before else None)
                    assert snapshot is None or snapshot.data == state_after(life.log, snapshot.position)

    @invariant()
    def replies_are_as_kept(self) -> None:
        for scope, key in self.replies:
            expected = self.counting(scope, key)
            found = self.store.reply("", scope, key)
            assert found == expected

    @invariant()
    def pages_hold_the_living(self) -> None:
        if not hasattr(self, "store"):
            return
        for model in (None, "m"):
            expected = [
                self.lives[id].head
                for id in sorted(self.lives)
                if self.lives_now(id) and model in (None, self.lives[id].head.model)
            ]
            found: list[Head] = []
            while page := self.store.heads("", model, found[-1].id if found else "", 2):
                found += page
            assert found == expected

    @invariant()
    def families_are_known(self) -> None:
        living = [life.head for id, life in self.lives.items() if self.lives_now(id)]
        for id, life in self.lives.items():
            of_it = [(one.id, one.parent) for one in living if one.parent is not None and one.parent.session == id]
            expected = sorted(fork for fork, parent in of_it if parent.life == life.head.life)
            assert self.store.forks(("", id), life.head.life) == expected
        for model in ("m", "n"):
            if hasattr(self, "store"):
                assert self.store.lives(model, 1) == any(head.model == model for head in living)

    @invariant()
    def epochs_are_new(self) -> None:
        for id, used in self.epochs.items():
            if hasattr(self, "store"):
                assert self.store.next_epoch(("", id)) not in used


class AnySequenceInSqlite(AnySequence):
    """The same, and the store may be spread, closed, opened again, or crash at any moment."""

    def open(self) -> Store:
        return SqliteStore(self.folder)

    def stored_snapshots(self, branch: str) -> list[int]:
        assert isinstance(self.store, SqliteStore)
        rows = self.store._tables.db.execute("SELECT position FROM snapshots WHERE branch = ?", (branch,))
        return [position for (position,) in rows]

    def store_is_empty(self) -> None:
        assert isinstance(self.store, SqliteStore)
        for table in ("log", "snapshots", "branches", "reach", "loose", "journal"):
            assert self.store._tables.db.execute(f"SELECT * FROM {table}").fetchall() == []

    @rule()
    def spread(self) -> None:
        flush(self.store)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.open()

    @rule(statements=st.integers(0, 40))
    def fail(self, statements: int) -> None:
        """A spread that fails at some statement; what follows finds everything where it was."""
        assert isinstance(self.store, SqliteStore)
        db = self.store._tables.db
        passed = iter(range(statements))
        self.store._tables.db = failing = Failing(db)
        failing.fail = lambda sql: next(passed, None) is None
        with suppress(sqlite3.OperationalError):
            flush(self.store)
        self.store._tables.db = db

    @rule(statements=st.integers(0, 40))
    def crash(self, statements: int) -> None:
        """The process dies before a statement of a spread, or after the last."""
        assert isinstance(self.store, SqliteStore)
        db = self.store._tables.db = Crashing(self.store._tables.db, self.folder, statements)
        flush(self.store)
        self.store._tables.db = db.db
        copy = db.copy or crashed(self.folder)
        self.store.close()
        shutil.rmtree(self.folder)
        self.folder = copy
        self.store = self.open()


class Crashing:
    """A connection that copies the data as a crash before its n-th statement leaves it."""

    def __init__(self, db: Any, folder: Path, statements: int) -> None:  # noqa: ANN401
        self.db = db
        self._folder = folder
        self._left = statements
        self.copy: Path | None = None

    def execute(self, sql: str, *arguments: Any) -> Any:  # noqa: ANN401
        if self._left == 0:
            self.copy = crashed(self._folder)
        self._left -= 1
        return self.db.execute(sql, *arguments)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.db, name)


few_steps = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestAnySequenceInMemory = AnySequence.TestCase
TestAnySequenceInMemory.settings = few_steps
TestAnySequenceInSqlite = AnySequenceInSqlite.TestCase
TestAnySequenceInSqlite.settings = few_steps


# ---------------------------------------------------------------------- SQLite alone


def crashed(folder: Path) -> Path:
    """A copy of the data as a crash at this moment leaves it: the database and its write-ahead log."""
    copy = Path(tempfile.mkdtemp())
    for name in ("sessions.sqlite", "sessions.sqlite-wal"):
        if (folder / name).exists():
            shutil.copy(folder / name, copy / name)
    return copy


@pytest.fixture
def sqlite(clock: Clock, tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "data")
    yield store
    store.close()


class Failing:
    """A connection whose statements fail where told."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.fail: Callable[[str], bool] = lambda sql: False
        self.after = False

    def execute(self, sql: str, *arguments: Any) -> Any:  # noqa: ANN401
        if self.fail(sql):
            if self.after:
                self._db.execute(sql, *arguments)
            raise sqlite3.OperationalError("disk I/O error")
        return self._db.execute(sql, *arguments)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._db, name)


@pytest.fixture
def failing(sqlite: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> Failing:
    found = Failing(sqlite._tables.db)
    monkeypatch.setattr(sqlite._tables, "db", found)
    return found


@pytest.mark.parametrize("durability", ["commit", "fsync"])
def test_what_is_committed_is_there_when_opened_again(durability: str, clock: Clock, tmp_path: Path) -> None:
    store = SqliteStore(tmp_path, durability)
    head = applied(store, grown(create(store), b"abc", snapshot=b"s"))
    store.close()
    again = SqliteStore(tmp_path, durability)
    assert again.head(("", "a")) == head and entries(again, head.branch, 0, 3) == b"abc"
    assert again.durability == durability
    again.close()


def test_a_second_store_on_one_folder_is_refused(sqlite: SqliteStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="in use by another process"):
        SqliteStore(tmp_path / "data")


def test_a_closed_store_gives_its_folder_free(clock: Clock, tmp_path: Path) -> None:
    for _ in range(3):
        SqliteStore(tmp_path).close()


@pytest.mark.parametrize("found", [SCHEMA_VERSION + 1, 99])
def test_data_of_a_newer_schema_is_refused(found: int, clock: Clock, tmp_path: Path) -> None:
    SqliteStore(tmp_path).close()
    set_schema(tmp_path, found)
    with pytest.raises(StoreError, match="newer version"):
        SqliteStore(tmp_path)
    set_schema(tmp_path, SCHEMA_VERSION)
    SqliteStore(tmp_path).close()


def set_schema(folder: Path, version: int) -> None:
    db = sqlite3.connect(folder / "sessions.sqlite")
    db.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (version,))
    db.commit()
    db.close()


def test_a_file_that_is_no_database_is_refused(clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "sessions.sqlite").write_bytes(b"something else " * 300)
    with pytest.raises(StoreError, match=r"sessions\.sqlite"):
        SqliteStore(tmp_path)


def test_a_folder_that_can_not_be_made_is_refused(clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can not be written"):
        SqliteStore(tmp_path / "file" / "data")


def test_a_journal_that_can_not_be_read_is_refused(clock: Clock, tmp_path: Path) -> None:
    SqliteStore(tmp_path).close()
    db = sqlite3.connect(tmp_path / "sessions.sqlite")
    db.execute("INSERT INTO journal VALUES (1000, ?)", (b"\xff\x00 no commits",))
    db.commit()
    db.close()
    with pytest.raises(StoreError):
        SqliteStore(tmp_path)


def filled(store: SqliteStore, sessions: int) -> dict[str, Head]:
    """Sessions in group commits, with new lives among them."""
    ids = [f"s{i:03}" for i in range(sessions)]
    heads = {id: create(store, id) for id in ids}
    for step in range(3):
        results = store.commit([grown(heads[id], bytes([step, i % 256]), snapshot=b"s") for i, id in enumerate(ids)])
        heads = {id: result.head for id, result in zip(ids, results, strict=True) if isinstance(result, Applied)}
    for id in ids[::7]:
        delete(store, heads[id])
        heads[id] = applied(store, grown(create(store, id), b"new life"))
    return heads


def check_filled(store: SqliteStore, heads: dict[str, Head]) -> None:
    for i, (id, head) in enumerate(heads.items()):
        assert store.head(("", id)) == head
        data = b"new life" if i % 7 == 0 else bytes([0, i % 256, 1, i % 256, 2, i % 256])
        assert entries(store, head.branch, 0, 99) == data


def test_a_crash_between_two_slices_loses_and_doubles_nothing(
    sqlite: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every point of a spread the journal and the tables together hold everything once."""
    monkeypatch.setattr(spread, "SPREAD_KEYS", 8)
    heads = filled(sqlite, 40)
    copies: list[Path] = [crashed(tmp_path / "data")]
    original: Callable[[list[Any]], None] = sqlite._spreader._spread_slice

    def slice_and_crash(keys: list[Any]) -> None:
        original(keys)
        copies.append(crashed(tmp_path / "data"))

    monkeypatch.setattr(sqlite._spreader, "_spread_slice", slice_and_crash)
    sqlite._spreader.spread()
    assert len(copies) == 6
    for copy in copies:
        again = SqliteStore(copy)
        check_filled(again, heads)
        assert journal_of(copy) == 0
        again.close()
        shutil.rmtree(copy)


def test_a_crash_at_any_statement_of_a_spread_loses_and_leaves_nothing(
    sqlite: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewinds, forks, a closed parent, a raised origin, answers: the next start puts all in its place."""
    heads = family(sqlite)
    sqlite._spreader.spread()
    heads = later(sqlite, heads)
    journal = CopyingAlways(sqlite._tables.db, tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(sqlite._tables, "db", journal)
        sqlite._spreader.spread()
    assert len(journal.copies) > 30
    for copy in (*journal.copies, crashed(tmp_path / "data")):
        again = SqliteStore(copy)
        check_family(again, heads)
        again.close()
        shutil.rmtree(copy)


def family(store: SqliteStore) -> dict[str, Head]:
    """A parent, two forks of it and one of a fork."""
    a = applied(store, grown(applied(store, grown(create(store, "a"), b"abc")), b"defghij", snapshot=b"three"))
    b = applied(store, grown(applied(store, forked(store, a, "b", 5)), b"B"))
    c = applied(store, grown(applied(store, forked(store, a, "c", 8)), b"C"))
    d = applied(store, grown(applied(store, forked(store, c, "d", 9)), b"D"))
    return {head.id: head for head in (a, b, c, d, applied(store, grown(create(store, "e"), b"plain")))}


def later(store: SqliteStore, heads: dict[str, Head]) -> dict[str, Head]:
    """The parent is closed, the first fork rewound, the others retain less."""
    delete(store, heads["a"])
    delete(store, heads["e"])
    b = applied(store, grown(applied(store, rewound(store, heads["b"], 4)), b"bb", snapshot=b"four"))
    c = applied(store, answered(grown(heads["c"], b"c", origin=3), "k"))
    d = applied(store, grown(heads["d"], b"d", origin=3))
    store.commit([], [Snapshot(b.branch, 6, "n", b"beside", "g"), Snapshot("e-1", 5, "n", b"too late", "g")])
    return {"b": b, "c": c, "d": d}


def check_family(store: SqliteStore, heads: dict[str, Head]) -> None:
    logs = {"b": b"abcdbb", "c": b"defghCc", "d": b"defghCDd"}
    for id, log in logs.items():
        assert store.head(("", id)) == heads[id]
        assert entries(store, heads[id].branch, heads[id].origin, 99) == log
    assert [newest(store, heads[id].branch, 4).position for id in logs] == [3, 3, 3]
    assert newest(store, heads["b"].branch).data == b"beside" and store.reply("", "c", "k") is not None
    branches = store._tables.db.execute(
        "SELECT branch, max(start + count) FROM log GROUP BY branch ORDER BY branch"
    ).fetchall()
    assert branches == [("a-1", 8), ("b-2", 6), ("c-1", 10), ("d-1", 11)]
    assert newest(store, "e-1") is None and store._tables.db.execute("SELECT * FROM loose").fetchall() == []


def test_an_origin_that_is_raised_during_a_spread_keeps_its_snapshot(
    sqlite: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = create(sqlite)
    for _ in range(12):
        head = applied(sqlite, grown(head, b"x", snapshot=b"s"))
    original = sqlite._spreader._spread_slice

    def slice_and_raise(keys: list[Any]) -> None:
        original(keys)
        raised = applied(sqlite, Commit(msgspec.structs.replace(head, origin=5), head.fence))
        original([raised.key])

    with monkeypatch.context() as patch:
        patch.setattr(sqlite._spreader, "_spread_slice", slice_and_raise)
        sqlite._spreader.spread()
    assert sqlite.snapshots(head.branch, 0, 99, "g") == [5, 8, 9, 10, 11]
    copy = crashed(tmp_path / "data")
    again = SqliteStore(copy)
    head = again.head(("", "a"))
    for _ in range(6):
        head = applied(again, grown(head, b"x", snapshot=b"s"))
    again._spreader.spread()
    assert again.snapshots(head.branch, 0, 99, "g") == [5, 14, 15, 16, 17]
    again.close()
    shutil.rmtree(copy)


def test_no_statement_reads_a_whole_table(sqlite: SqliteStore, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is done, what it costs does not grow with the number of sessions."""
    statements: list[tuple[str, Any]] = []
    db = sqlite._tables.db
    recording = Failing(db)
    with monkeypatch.context() as patch:
        patch.setattr(
            recording, "execute", lambda sql, *more: (statements.append((sql, more)), db.execute(sql, *more))[1]
        )
        patch.setattr(sqlite._tables, "db", recording)
        everything(sqlite, clock)
    plans = {
        (sql, row[3])
        for sql, more in statements
        if sql.startswith(("SELECT", "DELETE", "UPDATE", "INSERT", "\nSELECT", "\nINSERT"))
        for row in db.execute("EXPLAIN QUERY PLAN " + sql, *more)
    }
    scanned = {detail.split()[1] for _, detail in plans if detail.startswith("SCAN ")}
    tables = {"journal", "sessions", "log", "snapshots", "branches", "reach", "replies"}
    assert scanned & (tables | {"t", "b", "r"}) == set()
    assert len(plans) > 40


def test_the_end_of_a_long_log_is_not_read_from_its_beginning(sqlite: SqliteStore) -> None:
    segments = [Segment("b", 10 * i, 10, "fed", bytes([i % 256]) * 10, "n", ((10, 5),)) for i in range(3000)]
    sqlite._tables.insert("log", [segment_row(one) for one in segments])
    assert [one.start for one in sqlite.log("b", 29_985, 30_000)] == [29_985]
    assert work_of(sqlite, 29_985) < 2 * work_of(sqlite, 5)


def work_of(store: SqliteStore, after: int) -> int:
    """How many instructions of SQLite's a short read takes."""
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    store._tables.db.set_progress_handler(count, 1)
    assert sum(one.count for one in store.log("b", after, after + 15)) == 15
    store._tables.db.set_progress_handler(None, 1)
    return steps


def everything(store: SqliteStore, clock: Clock) -> None:
    heads = family(store)
    store._spreader.spread()
    heads = later(store, heads)
    for _ in range(8):
        heads["b"] = applied(store, grown(heads["b"], b"x", snapshot=b"s"))
    store._spreader.spread()
    applied(store, Commit(head_of(store, "f", ttl_s=1), None))
    for id in "bcd":
        store.snapshot(heads[id].branch, 99, "g")
        store.snapshots(heads[id].branch, 0, 99, "g")
        store.forks(("", id), 1)
        store.reply("", id, "none")
    store.heads("", None, "", 9)
    store.heads("", "m", "", 9)
    store.lives("m", 9)
    store._spreader.spread()
    for _ in range(2):
        clock.now += TOMBSTONE_TTL_S * 1000 + 1
        store.sweep()
        store._spreader.spread()
    assert store.head(("", "a")) is None


class CopyingAlways:
    """A connection that copies the data before every statement that writes."""

    def __init__(self, db: sqlite3.Connection, folder: Path) -> None:
        self._db = db
        self._folder = folder
        self.copies: list[Path] = []

    def execute(self, sql: str, *arguments: Any) -> Any:  # noqa: ANN401
        if not sql.startswith("SELECT"):
            self.copies.append(crashed(self._folder))
        return self._db.execute(sql, *arguments)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._db, name)


def test_a_spread_that_fails_anywhere_is_made_good_by_the_next(sqlite: SqliteStore, failing: Failing) -> None:
    heads = family(sqlite)
    sqlite._spreader.spread()
    heads = later(sqlite, heads)
    failures = 0
    for statement in range(100):
        passed = iter(range(statement))
        failing.fail = lambda sql, passed=passed: sql != "ROLLBACK" and next(passed, None) is None
        try:
            sqlite._spreader.spread()
        except sqlite3.OperationalError:
            failures += 1
        else:
            break
    failing.fail = lambda sql: False
    assert failures > 10
    check_family(sqlite, heads)


def test_a_plain_session_needs_no_rows_but_its_own(sqlite: SqliteStore) -> None:
    heads = [applied(sqlite, grown(create(sqlite, f"s{i}"), b"abc", snapshot=b"s")) for i in range(5)]
    sqlite._spreader.spread()
    for table in ("branches", "reach", "loose"):
        assert sqlite._tables.db.execute(f"SELECT * FROM {table}").fetchall() == []
    for head in heads:
        delete(sqlite, head)
    sqlite._spreader.spread()
    for table in ("branches", "reach", "loose", "log", "snapshots"):
        assert sqlite._tables.db.execute(f"SELECT * FROM {table}").fetchall() == []


def test_a_long_log_is_deleted_in_slices(sqlite: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "DELETED_AT_ONCE", 3)
    head = create(sqlite)
    for _ in range(10):
        head = applied(sqlite, grown(head, b"x"))
        sqlite._spreader.spread()
    delete(sqlite, head)
    sqlite._spreader.spread()
    assert sqlite._tables.db.execute("SELECT count(*) FROM log").fetchone() == (0,)


def test_the_oldest_answers_are_dropped_from_the_table(sqlite: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "REPLIES_KEPT", 4)
    monkeypatch.setattr(spread, "TENANT_REPLIES_KEPT", 2)
    create(sqlite)
    for i in range(6):
        assert sqlite.keep("", Reply("a", f"k{i}", b"d", "body")) and sqlite.keep("", Reply("", f"k{i}", b"d", "body"))
    sqlite._spreader.spread()
    rows = sqlite._tables.db.execute("SELECT scope, key FROM replies ORDER BY scope, key").fetchall()
    assert rows == [("", "k4"), ("", "k5"), ("a", "k2"), ("a", "k3"), ("a", "k4"), ("a", "k5")]


SCHEMA_1 = """
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
INSERT INTO meta VALUES ('schema', 1), ('epoch_floor', 7), ('seq', 4);
"""


class OldFile:
    """A data folder as schema 1 had it: heads of 18 fields, snapshots of 4, fences of 2."""

    def __init__(self, folder: Path) -> None:
        self.db = sqlite3.connect(folder / "sessions.sqlite")
        self.db.executescript(SCHEMA_1)

    def head(self, id: str, position: int, epoch: int = 1, status: Any = "live") -> list[Any]:  # noqa: ANN401
        branch, updated_ms = f"{id}-{epoch}", 999_999_999_000
        return [
            "",
            id,
            "m",
            3,
            "g",
            epoch,
            position,
            1,
            branch,
            5,
            updated_ms,
            0,
            {},
            None,
            status,
            b"12345678",
            None,
            9,
        ]

    def session(self, head: list[Any], seq: int) -> None:
        row = ("", head[1], head[2], head[14], head[10], None, seq, msgspec.msgpack.encode(head))
        self.db.execute("INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def segment(self, branch: str, start: int, data: bytes) -> list[Any]:
        return [branch, start, len(data), "fed", data, "n", [[len(data), 5]], b""]

    def log(self, branch: str, start: int, data: bytes) -> None:
        blob = msgspec.msgpack.encode(self.segment(branch, start, data))
        self.db.execute("INSERT INTO log VALUES (?, ?, ?, ?)", (branch, start, len(data), blob))

    def snapshot(self, branch: str, position: int) -> None:
        blob = msgspec.msgpack.encode([branch, position, "n", b"state"])
        self.db.execute("INSERT INTO snapshots VALUES (?, ?, ?)", (branch, position, blob))

    def journal(self, seq: int, *commits: list[Any]) -> None:
        self.db.execute("INSERT INTO journal VALUES (?, ?)", (seq, msgspec.msgpack.encode(commits)))

    def close(self) -> None:
        self.db.commit()
        self.db.close()


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    """Sessions that are spread, that are not, that are in part: a has more, b has ended, c began again."""
    old = OldFile(tmp_path)
    for id in "abcd":
        old.session(old.head(id, 3), 4)
        old.log(f"{id}-1", 0, b"abc")
        old.snapshot(f"{id}-1", 2)
    old.session(old.head("e", 4), 5)
    old.log("e-1", 0, b"abcd")
    old.snapshot("lost-1", 1)
    grown_e = [old.head("e", 4), [1, 3], [old.segment("e-1", 3, b"d")], []]
    grown_a = [old.head("a", 5), [1, 3], [old.segment("a-1", 3, b"de")], [["a-1", 4, "n", b"new state"]]]
    old.journal(5, grown_e, grown_a)
    closed = [[old.head(id, 3, status="closed"), [1, 3], [], []] for id in "bc"]
    old.journal(6, *closed)
    old.journal(7, [old.head("c", 1, epoch=2), None, [old.segment("c-2", 0, b"C")], []])
    old.close()
    return tmp_path


def test_data_of_schema_1_is_migrated(old_file: Path, clock: Clock) -> None:
    for _ in range(2):
        store = SqliteStore(old_file)
        heads = {id: store.head(("", id)) for id in "abcde"}
        assert [(h.status, h.position, h.epoch) for h in heads.values()] == [
            ("live", 5, 1),
            ("closed", 3, 1),
            ("live", 1, 2),
            ("live", 3, 1),
            ("live", 4, 1),
        ]
        logs = [entries(store, branch, 0, 9) for branch in ("a-1", "b-1", "c-1", "c-2", "d-1", "e-1")]
        assert logs == [b"abcde", b"", b"", b"C", b"abc", b"abcd"]
        found = [newest(store, branch) for branch in ("a-1", "b-1", "c-1", "d-1", "e-1", "lost-1")]
        assert [one and (one.position, one.graph) for one in found] == [(4, "g"), None, None, (2, "g"), None, None]
        assert newest(store, "a-1", 4).position == 2
        assert store.lives("m", 3) and store.next_epoch(("", "new")) == 8
        assert [head.id for head in store.heads("", "m", "", 9)] == ["a", "c", "d", "e"]
        store.close()


def test_data_of_schema_2_is_migrated(clock: Clock, tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    head = applied(store, answered(grown(create(store), b"abc", snapshot=b"s"), "k"))
    fork = applied(store, forked(store, head, "fork", 2))
    store.close()
    unsealed(tmp_path)
    again = SqliteStore(tmp_path)
    assert (again.head(head.key), again.head(fork.key)) == (head, fork)
    assert entries(again, head.branch, 0, 3) == b"abc" and entries(again, fork.branch, 0, 2) == b"ab"
    assert again.reply("", "a", "k") is not None and newest(again, head.branch).data == b"s"
    again.close()


def test_data_of_schema_3_is_read(clock: Clock, tmp_path: Path) -> None:
    """Its journal, as a crash has left it, knows no steps."""
    store = SqliteStore(tmp_path)
    head = applied(store, grown(create(store), b"abc"))
    shutil.copytree(tmp_path, tmp_path / "crashed", ignore=shutil.ignore_patterns("lock", "crashed"))
    store.close()
    file = tmp_path / "crashed" / "sessions.sqlite"
    with sqlite3.connect(file) as db:
        rows = db.execute("SELECT seq, batch FROM journal").fetchall()
        old = [(seal(msgspec.msgpack.encode(msgspec.msgpack.decode(unseal(blob))[:3])), seq) for seq, blob in rows]
        assert db.executemany("UPDATE journal SET batch = ? WHERE seq = ?", old).rowcount == 2
    db.close()
    set_schema(file.parent, 3)
    again = SqliteStore(file.parent)
    assert again.head(head.key) == head and entries(again, head.branch, 0, 3) == b"abc"
    result = again.commit([Step(head, b"d", "n")])[0]
    assert isinstance(result, Applied) and entries(again, head.branch, 0, 4) == b"abcd"
    again.close()


def unsealed(folder: Path) -> None:
    """Make the data those of schema 2, which had no checksums."""
    db = sqlite3.connect(folder / "sessions.sqlite")
    columns = ("batch", "head", "segment", "snapshot", "line", "reply")
    for table, column in zip(("journal", "sessions", "log", "snapshots", "branches", "replies"), columns, strict=True):
        db.execute(f"UPDATE {table} SET {column} = substr({column}, 1, length({column}) - 4)")
    db.commit()
    db.close()
    set_schema(folder, 2)


def test_a_changed_byte_of_an_entry_is_found(clock: Clock, tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    head = applied(store, grown(create(store), b"abc"))
    store.close()
    db = sqlite3.connect(tmp_path / "sessions.sqlite")
    db.execute("UPDATE log SET segment = CAST(replace(segment, 'abc', 'abd') AS BLOB)")
    db.commit()
    db.close()
    again = SqliteStore(tmp_path)
    with pytest.raises(StoreError, match="checksum"):
        again.log(head.branch, 0, 3)
    again.close()


def test_a_migrated_session_goes_on(old_file: Path, clock: Clock) -> None:
    store = SqliteStore(old_file)
    head = applied(store, answered(grown(store.head(("", "a")), b"f"), "k"))
    fork = applied(store, forked(store, head, "fork", 4))
    delete(store, head)
    store._spreader.spread()
    assert entries(store, fork.branch, 0, 9) == b"abcd" and newest(store, fork.branch).position == 4
    assert store.reply("", "a", "k") is not None
    store.close()


@pytest.mark.parametrize("statement", range(0, 30, 3))
def test_a_migration_that_is_cut_off_is_done_again(statement: int, old_file: Path, clock: Clock) -> None:
    with sqlite3.connect(old_file / "sessions.sqlite", isolation_level=None) as db:
        db.execute("PRAGMA journal_mode=WAL")
        cut_off = Crashing(db, old_file, statement)
        schema.prepare(cut_off)
    db.close()
    assert cut_off.copy is not None
    test_data_of_schema_1_is_migrated(cut_off.copy, clock)
    shutil.rmtree(cut_off.copy)


def test_a_crash_within_a_slice_leaves_it_undone(sqlite: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = filled(sqlite, 20)
    original = sqlite._tables.insert

    def insert_some(table: str, rows: Any) -> None:  # noqa: ANN401
        original(table, rows)
        if table == "snapshots":
            raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(sqlite._tables, "insert", insert_some)
    with pytest.raises(sqlite3.OperationalError):
        sqlite._spreader.spread()
    check_filled(sqlite, heads)
    monkeypatch.undo()
    sqlite._spreader.spread()
    check_filled(sqlite, heads)


def journal_of(folder: Path) -> int:
    db = sqlite3.connect(folder / "sessions.sqlite")
    try:
        return int(db.execute("SELECT count(*) FROM journal").fetchone()[0])
    finally:
        db.close()


def test_commits_during_a_spread_are_kept(sqlite: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "SPREAD_KEYS", 2)
    heads = {id: create(sqlite, id) for id in "abcdef"}
    original = sqlite._spreader._spread_slice

    def slice_and_commit(keys: list[Any]) -> None:
        original(keys)
        results = sqlite.commit([grown(head, b"x") for head in heads.values()])
        heads.update({r.head.id: r.head for r in results if isinstance(r, Applied)})

    monkeypatch.setattr(sqlite._spreader, "_spread_slice", slice_and_commit)
    sqlite._spreader.spread()
    copy = crashed(tmp_path / "data")
    again = SqliteStore(copy)
    for store in (sqlite, again):
        for id, head in heads.items():
            assert head.position == 3 and store.head(("", id)) == head
            assert entries(store, head.branch, 0, 9) == b"xxx"
    again.close()
    shutil.rmtree(copy)


def test_a_full_disk_refuses_the_commit_and_applies_nothing(sqlite: SqliteStore) -> None:
    head = applied(sqlite, grown(create(sqlite), b"abc"))
    pages = sqlite._tables.db.execute("PRAGMA page_count").fetchone()[0]
    sqlite._tables.db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StoreError, match="full"):
        sqlite.commit([grown(head, b"x" * 100_000)])
    assert sqlite.head(("", "a")) == head and entries(sqlite, head.branch, 0, 999) == b"abc"
    assert sqlite.check() is None or "full" in str(sqlite.check())
    sqlite._tables.db.execute("PRAGMA max_page_count=100000")
    assert applied(sqlite, grown(head, b"x" * 100_000)).position == 100_003
    assert sqlite.check() is None
    assert entries(sqlite, head.branch, 0, 10**6) == b"abc" + b"x" * 100_000


def test_a_write_that_fails_is_refused_and_shown(sqlite: SqliteStore, failing: Failing) -> None:
    head = create(sqlite)
    failing.fail = lambda sql: not sql.startswith("SELECT")
    with pytest.raises(StoreError, match="could not commit"):
        sqlite.commit([grown(head, b"x")])
    assert "I/O" in str(sqlite.check())
    assert sqlite.head(("", "a")) == head
    failing.fail = lambda sql: False
    assert sqlite.check() is None
    assert applied(sqlite, grown(head, b"y")).position == 1


def test_a_write_that_was_applied_although_it_failed_counts(sqlite: SqliteStore, failing: Failing) -> None:
    head = create(sqlite)
    failing.fail, failing.after = lambda sql: sql.startswith("INSERT INTO journal"), True
    moved = applied(sqlite, grown(head, b"x"))
    failing.fail = lambda sql: False
    assert sqlite.head(("", "a")) == moved and entries(sqlite, head.branch, 0, 9) == b"x"
    assert applied(sqlite, grown(moved, b"y")).position == 2


@pytest.mark.parametrize("after", [False, True])
def test_an_unknown_outcome_is_told_and_settled_later(after: bool, sqlite: SqliteStore, failing: Failing) -> None:
    head = create(sqlite)
    failing.after = after
    failing.fail = lambda sql: sql.startswith(("INSERT INTO journal", "SELECT 1 FROM journal"))
    with pytest.raises(CommitUnknown):
        sqlite.commit([grown(head, b"x")])
    failing.fail = lambda sql: False
    found = sqlite.head(("", "a"))
    assert found.position == (1 if after else 0)
    assert entries(sqlite, head.branch, 0, 9) == (b"x" if after else b"")
    assert applied(sqlite, grown(found, b"y")).position == found.position + 1


def test_a_read_that_fails_is_a_store_error(sqlite: SqliteStore, failing: Failing) -> None:
    failing.fail = lambda sql: sql.startswith("SELECT")
    for read in (
        lambda: sqlite.head(("", "new")),
        lambda: sqlite.line("b"),
        lambda: sqlite.snapshots("b", 0, 9, "g"),
        lambda: sqlite.reply("", "", "k"),
        lambda: sqlite.keep("", Reply("", "k", b"d", "body")),
        lambda: sqlite.forks(("", "a"), 1),
        lambda: sqlite.lives("m", 1),
        lambda: sqlite.commit([answered(Commit(Head("", "x", "m", 1, "g", 1, 0, 0, "x-1"), None), "k")]),
        lambda: sqlite.log("b", 0, 9),
        lambda: sqlite.snapshot("b", 9, "g"),
        lambda: sqlite.heads("", None, "", 9),
        lambda: sqlite.next_epoch(("", "new")),
        sqlite.sweep,
    ):
        with pytest.raises(StoreError):
            read()


def test_a_file_that_can_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SqliteStore(tmp_path).close()
    connect = sqlite3.connect

    def read_only(path: Path, **options: Any) -> sqlite3.Connection:  # noqa: ANN401
        db = connect(path, **options)
        db.execute("PRAGMA query_only=ON")
        return db

    monkeypatch.setattr(schema.sqlite3, "connect", read_only)
    with pytest.raises(StoreError, match=r"can not be opened.*readonly"):
        SqliteStore(tmp_path)
    monkeypatch.undo()
    SqliteStore(tmp_path).close()


def test_a_damaged_page_is_told_and_never_read_as_data(tmp_path: Path, clock: Clock) -> None:
    store = SqliteStore(tmp_path)
    heads = [applied(store, grown(create(store, f"s{i:03}"), bytes([i]) * 3000)) for i in range(60)]
    store.close()
    path = tmp_path / "sessions.sqlite"
    data = bytearray(path.read_bytes())
    for page in range(4 * 4096, len(data), 2 * 4096):
        data[page : page + 4096] = b"\xa5" * 4096
    path.write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        read_everything(tmp_path, heads)


def read_everything(folder: Path, heads: Sequence[Head]) -> None:
    """Read every session; what is read is right, or a StoreError says what is wrong."""
    store = SqliteStore(folder)
    try:
        failed = 0
        for head in heads:
            try:
                assert store.head(head.key) == head
                assert entries(store, head.branch, 0, 3000) == bytes([int(head.id[1:])]) * 3000
            except StoreError:
                failed += 1
        if failed:
            raise StoreError(store.check())
    finally:
        store.close()


def test_damage_is_told_until_the_end(sqlite: SqliteStore) -> None:
    head = applied(sqlite, grown(create(sqlite), b"abc"))
    sqlite._spreader.spread()
    sqlite._tables.db.execute("UPDATE log SET segment = x'c1'")
    with pytest.raises(StoreError):
        sqlite.log(head.branch, 0, 9)
    applied(sqlite, grown(head, b"x"))
    assert "damaged" in str(sqlite.check()) and "damaged" in str(sqlite.check())


def test_a_transaction_that_can_not_be_ended_takes_no_commit_with_it(
    sqlite: SqliteStore, failing: Failing, tmp_path: Path
) -> None:
    head = create(sqlite)
    failing.fail = lambda sql: sql in ("COMMIT", "ROLLBACK")
    with pytest.raises(sqlite3.OperationalError):
        sqlite._spreader.spread()
    failing.fail = lambda sql: False
    head = applied(sqlite, grown(head, b"abc"))
    copy = crashed(tmp_path / "data")
    again = SqliteStore(copy)
    assert again.head(("", "a")) == head and entries(again, head.branch, 0, 9) == b"abc"
    again.close()
    shutil.rmtree(copy)
    failing.fail = lambda sql: sql in ("COMMIT", "ROLLBACK")
    with pytest.raises(sqlite3.OperationalError):
        sqlite._spreader.spread()
    failing.fail = lambda sql: False
    sqlite._spreader.spread()
    assert entries(sqlite, head.branch, 0, 9) == b"abc"


def test_a_spread_that_failed_half_way_doubles_nothing_after_a_crash(
    sqlite: SqliteStore, failing: Failing, tmp_path: Path
) -> None:
    """What is in the tables and in the journal is spread once, also where the session went on in between."""
    head = applied(sqlite, grown(create(sqlite), b"abc"))
    failing.fail = lambda sql: sql.startswith("DELETE FROM journal")
    for data in (b"de", b"f"):
        with pytest.raises(sqlite3.OperationalError):
            sqlite._spreader.spread()
        head = applied(sqlite, grown(head, data))
    copy = crashed(tmp_path / "data")
    again = SqliteStore(copy)
    assert entries(again, head.branch, 0, 9) == b"abcdef"
    assert again._tables.db.execute("SELECT start, count FROM log").fetchall() == [(0, 6)]
    again.close()
    shutil.rmtree(copy)
    failing.fail = lambda sql: False


def test_the_answers_of_a_forgotten_session_are_deleted(clock: Clock, tmp_path: Path) -> None:
    store = SqliteStore(tmp_path, idempotency_ttl_s=10 * TOMBSTONE_TTL_S)
    delete(store, applied(store, answered(Commit(head_of(store), None), "k")))
    applied(store, answered(Commit(head_of(store, "b"), None), "k"))
    store._spreader.spread()
    clock.now += TOMBSTONE_TTL_S * 1000 + 1
    assert store.sweep() == 1
    assert store._tables.db.execute("SELECT scope FROM replies").fetchall() == [("b",)]
    store.close()


def test_many_tokens_of_a_session_become_one_row(sqlite: SqliteStore) -> None:
    head = create(sqlite)
    for i in range(50):
        head = applied(sqlite, grown(head, bytes([i]), "generated"))
    sqlite._spreader.spread()
    assert sqlite._tables.db.execute("SELECT count(*), sum(count) FROM log").fetchone() == (1, 50)
    assert sqlite._tables.db.execute("SELECT count(*) FROM journal").fetchone() == (0,)


def test_entries_that_come_now_and_then_share_rows(sqlite: SqliteStore) -> None:
    """One entry a spread costs bytes, not a row: a short last row takes in what follows it."""
    head, other = create(sqlite), create(sqlite, "other")
    for i in range(200):
        head = applied(sqlite, grown(head, bytes([i])))
        other = applied(sqlite, grown(other, bytes([i]), "generated" if i % 2 else "fed"))
        sqlite._spreader.spread()
    db = sqlite._tables.db
    rows = db.execute("SELECT count(*), max(length(segment)) FROM log WHERE branch = ?", (head.branch,)).fetchone()
    assert rows[0] < 10 and rows[1] < 2 * spread.SHORT_ROW
    assert db.execute("SELECT count(*) FROM log WHERE branch = ?", (other.branch,)).fetchone() == (200,)
    for branch in (head.branch, other.branch):
        for after in (0, 7, 100):
            assert entries(sqlite, branch, after, 150) == bytes(range(after, 150))
    assert sum(count for one in sqlite.log(head.branch, 0, 200) for count, _ in one.at_ms) == 200


@pytest.mark.parametrize("position", [5, 6])
def test_rows_are_not_joined_over_a_rewind(position: int, sqlite: SqliteStore) -> None:
    head = applied(sqlite, grown(create(sqlite), b"abc"))
    sqlite._spreader.spread()
    head = applied(sqlite, grown(head, b"def"))
    back = applied(sqlite, grown(applied(sqlite, rewound(sqlite, head, position)), b"x"))
    sqlite._spreader.spread()
    back = applied(sqlite, grown(back, b"y"))
    sqlite._spreader.spread()
    assert entries(sqlite, back.branch, 0, 99) == b"abcdef"[:position] + b"xy"
    rows = sqlite._tables.db.execute("SELECT branch, start, count FROM log ORDER BY branch").fetchall()
    assert rows == [(head.branch, 0, position), (back.branch, position, 2)]


def test_a_crash_while_a_row_takes_in_what_follows_doubles_nothing(sqlite: SqliteStore, tmp_path: Path) -> None:
    head = applied(sqlite, grown(create(sqlite), b"ab"))
    sqlite._spreader.spread()
    head = applied(sqlite, grown(head, b"cd"))
    journal = CopyingAlways(sqlite._tables.db, tmp_path / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite._tables, "db", journal)
        sqlite._spreader.spread()
    assert len(journal.copies) > 5
    for copy in (*journal.copies, crashed(tmp_path / "data")):
        again = SqliteStore(copy)
        assert entries(again, head.branch, 0, 99) == b"abcd"
        assert again._tables.db.execute("SELECT start, count FROM log").fetchall() == [(0, 4)]
        again.close()
        shutil.rmtree(copy)


def test_the_write_ahead_log_does_not_grow_beside_steady_commits(
    sqlite: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commits that never pause leave no moment at which it is copied whole: the store makes one."""
    monkeypatch.setattr(tables, "LONG_WAL", 64)
    head, stop = create(sqlite), threading.Event()

    def feed() -> None:
        nonlocal head
        while not stop.is_set():
            head = applied(sqlite, grown(head, bytes(2000)))

    feeder = threading.Thread(target=feed)
    feeder.start()
    beginnings = set()
    for _ in range(40):
        before = head.position
        while head.position < before + 20 * 2000:
            time.sleep(0.001)
        sqlite._spreader.spread()
        beginnings.add(checkpoints_of(tmp_path / "data" / "sessions.sqlite-wal"))
    stop.set()
    feeder.join(10)
    assert len(beginnings) > 20


def checkpoints_of(wal: Path) -> int:
    """How often a write-ahead log was begun again: https://sqlite.org/fileformat2.html#walformat."""
    with wal.open("rb") as file:
        return int.from_bytes(file.read(16)[12:], "big")


def test_a_file_that_can_not_be_synced_is_told(sqlite: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(tables, "LONG_WAL", 1)
    monkeypatch.setattr(tables.os, "fsync", fail)
    head = applied(sqlite, grown(create(sqlite), b"abc"))
    with pytest.raises(sqlite3.OperationalError, match="Input/output"):
        sqlite._spreader.spread()
    assert entries(sqlite, head.branch, 0, 9) == b"abc"


def test_the_journal_is_spread_in_the_background(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sqlite_module, "SPREAD_EVERY_S", 0.02)
    store = SqliteStore(tmp_path)
    create(store)
    end = time.monotonic() + 5
    while journal_of(tmp_path) and time.monotonic() < end:
        time.sleep(0.01)
    assert journal_of(tmp_path) == 0
    store.close()


def test_commits_from_many_threads_keep_every_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_module, "SPREAD_EVERY_S", 0.01)
    store = SqliteStore(tmp_path)

    def feed(id: str) -> None:
        head = create(store, id)
        for i in range(60):
            head = applied(store, grown(head, bytes([i])))

    threads = [threading.Thread(target=feed, args=(id,)) for id in IDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for id in IDS:
        assert entries(store, store.head(("", id)).branch, 0, 99) == bytes(range(60))
    store.close()
