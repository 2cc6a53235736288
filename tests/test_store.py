"""The stores against one suite: compare-and-set, group commits, logs, snapshots, paging, expiry, crashes."""

import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from service.store import memory as memory_module
from service.store import sqlite as sqlite_module
from service.store.base import (
    SCHEMA_VERSION,
    TOMBSTONE_TTL_S,
    Applied,
    Commit,
    CommitUnknown,
    Conflict,
    Generation,
    Head,
    Segment,
    Snapshot,
    Store,
    StoreError,
    tombstone,
)
from service.store.memory import MemoryStore
from service.store.sqlite import SqliteStore

HOUR_MS = 3_600_000


class Clock:
    """The stores' clock, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_000_000_000_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in (memory_module, sqlite_module):
        monkeypatch.setattr(module, "now_ms", found)
    monkeypatch.setattr(sqlite_module, "SPREAD_EVERY_S", 3600.0)
    return found


@pytest.fixture(params=["memory", "sqlite", "sqlite spread"])
def store(request: pytest.FixtureRequest, clock: Clock, tmp_path: Path) -> Iterator[Store]:
    """Every store; "spread" moves each commit to the tables at once."""
    made: Store = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path)
    if request.param == "sqlite spread":
        made = Spreading(made)
    yield made
    made.close()


class Spreading:
    """A SQLite store that spreads its journal after each commit."""

    def __init__(self, store: Any) -> None:  # noqa: ANN401 (private parts are used)
        self._store = store

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._store, name)

    def commit(self, commits: list[Commit]) -> list[Any]:
        results = self._store.commit(commits)
        self._store._spread()
        return list(results)


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
    snapshots = (Snapshot(head.branch, head.position, "n", snapshot),) if snapshot is not None else ()
    after = msgspec.structs.replace(head, position=head.position + len(data), **more)
    return Commit(after, head.fence, (segment,), snapshots)


def applied(store: Store, commit: Commit) -> Head:
    result = store.commit([commit])[0]
    assert isinstance(result, Applied)
    return result.head


def delete(store: Store, head: Head) -> Head:
    return applied(store, Commit(tombstone(head, "closed"), head.fence))


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


@pytest.mark.parametrize("fence", [(1, 0), (1, 4), (2, 3), (0, 3)])
def test_a_commit_on_another_fence_is_a_conflict_and_says_where_the_head_stands(
    fence: tuple[int, int], store: Store
) -> None:
    stands = applied(store, grown(create(store), b"abc"))
    stale = msgspec.structs.replace(grown(stands, b"x"), expected=fence)
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
    stale = msgspec.structs.replace(grown(heads[1], b"x"), expected=(1, 9))
    results = store.commit([grown(heads[0], b"1"), stale, grown(heads[2], b"22")])
    assert [type(result) for result in results] == [Applied, Conflict, Applied]
    assert [store.head(("", id)).position for id in "abc"] == [1, 0, 2]


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
    assert store.snapshot(head.branch, 99) is None


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
    if not isinstance(store, MemoryStore):
        store._spread()


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
    assert store.log(old.branch, 0, 9) == [] and store.snapshot(old.branch, 9) is None


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
    assert store.log(head.branch, 0, 9) == [] and store.snapshot(head.branch, 9) is None


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
    assert store.log("nothing", 0, 9) == [] and store.snapshot("nothing", 9) is None


def test_the_newest_snapshot_below_a_position_is_found(store: Store) -> None:
    head = create(store)
    for i in range(4):
        head = applied(store, grown(head, b"xyz", snapshot=b"at %d" % (3 * i)))
    assert store.snapshot(head.branch, 0) is None
    found = [store.snapshot(head.branch, below).position for below in range(1, 12)]
    assert found == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9]
    assert store.snapshot(head.branch, 7).data == b"at 6"


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


@dataclass
class Life:
    """What the model knows of a session's present or last life."""

    head: Head
    log: bytes = b""
    snapshots: dict[int, bytes] = field(default_factory=dict)


class AnySequence(RuleBasedStateMachine):
    """Commits, conflicts, ends, new lives, time and (SQLite) crashes in any order, against plain dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.patch = pytest.MonkeyPatch()
        for module in (memory_module, sqlite_module):
            self.patch.setattr(module, "now_ms", self.clock)
        self.patch.setattr(sqlite_module, "SPREAD_EVERY_S", 3600.0)
        self.folder = Path(tempfile.mkdtemp())
        self.lives: dict[str, Life] = {}
        self.epochs: dict[str, set[int]] = {id: set() for id in IDS}
        self.store: Store

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        self.patch.undo()
        shutil.rmtree(self.folder)

    def open(self) -> Store:
        return MemoryStore()

    @initialize()
    def begin(self) -> None:
        self.store = self.open()

    def lives_now(self, id: str) -> bool:
        life = self.lives.get(id)
        return life is not None and life.head.at(self.clock.now).status == "live"

    @rule(id=st.sampled_from(IDS), ttl_s=st.sampled_from([0, 0, 60]), model=st.sampled_from(["m", "n"]))
    def create(self, id: str, ttl_s: int, model: str) -> None:
        head = head_of(self.store, id, ttl_s=ttl_s, model=model)
        result = self.store.commit([Commit(head, None)])[0]
        if self.lives_now(id):
            assert result == Conflict(self.lives[id].head)
            return
        assert isinstance(result, Applied)
        assert head.epoch not in self.epochs[id]
        self.epochs[id].add(head.epoch)
        self.lives[id] = Life(result.head)

    @rule(grow=st.dictionaries(st.sampled_from(IDS), GROWTH))
    def commit_group(self, grow: dict[str, tuple[bytes, bool, bool, bool]]) -> None:
        """A group commit; each session feeds or generates, may snapshot, may be late."""
        due = [(id, *what) for id, what in grow.items() if self.lives_now(id)]
        commits = []
        for id, data, generated, snapshot, late in due:
            head = self.lives[id].head
            commit = grown(head, data, "generated" if generated else "fed", b"s" + data if snapshot else None)
            stale = (head.epoch, head.position + 1)
            commits.append(msgspec.structs.replace(commit, expected=stale) if late else commit)
        for (id, data, _, snapshot, late), result in zip(due, self.store.commit(commits), strict=True):
            life = self.lives[id]
            if late:
                assert result == Conflict(life.head)
                continue
            assert isinstance(result, Applied)
            if snapshot:
                life.snapshots[life.head.position] = b"s" + data
            self.lives[id] = Life(result.head, life.log + data, life.snapshots)

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
                assert entries(self.store, life.head.branch, 0, life.head.position) == life.log
                newest = self.store.snapshot(life.head.branch, life.head.position)
                below = [position for position in life.snapshots if position < life.head.position]
                assert (newest is not None) == bool(below)
                if newest is not None:
                    assert (newest.position, newest.data) == (max(below), life.snapshots[max(below)])

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
    def epochs_are_new(self) -> None:
        for id, used in self.epochs.items():
            if hasattr(self, "store"):
                assert self.store.next_epoch(("", id)) not in used


class AnySequenceInSqlite(AnySequence):
    """The same, and the store may be spread, closed, opened again, or crash at any moment."""

    def open(self) -> Store:
        return SqliteStore(self.folder)

    @rule()
    def spread(self) -> None:
        assert isinstance(self.store, SqliteStore)
        self.store._spread()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.open()

    @rule()
    def crash(self) -> None:
        copy = crashed(self.folder)
        self.store.close()
        shutil.rmtree(self.folder)
        self.folder = copy
        self.store = self.open()


few_steps = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
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
    monkeypatch.setattr(sqlite_module, "SPREAD_KEYS", 8)
    heads = filled(sqlite, 40)
    copies: list[Path] = [crashed(tmp_path / "data")]
    original: Callable[[list[Any]], None] = sqlite._spread_slice

    def slice_and_crash(keys: list[Any]) -> None:
        original(keys)
        copies.append(crashed(tmp_path / "data"))

    monkeypatch.setattr(sqlite, "_spread_slice", slice_and_crash)
    sqlite._spread()
    assert len(copies) == 6
    for copy in copies:
        again = SqliteStore(copy)
        check_filled(again, heads)
        assert journal_of(copy) == 0
        again.close()
        shutil.rmtree(copy)


def test_a_crash_within_a_slice_leaves_it_undone(sqlite: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = filled(sqlite, 20)
    original = sqlite._insert

    def insert_some(table: str, rows: Any) -> None:  # noqa: ANN401
        original(table, rows)
        if table == "snapshots":
            raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(sqlite, "_insert", insert_some)
    with pytest.raises(sqlite3.OperationalError):
        sqlite._spread()
    check_filled(sqlite, heads)
    monkeypatch.undo()
    sqlite._spread()
    check_filled(sqlite, heads)


def journal_of(folder: Path) -> int:
    db = sqlite3.connect(folder / "sessions.sqlite")
    try:
        return int(db.execute("SELECT count(*) FROM journal").fetchone()[0])
    finally:
        db.close()


def test_commits_during_a_spread_are_kept(sqlite: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_module, "SPREAD_KEYS", 2)
    heads = {id: create(sqlite, id) for id in "abcdef"}
    original = sqlite._spread_slice

    def slice_and_commit(keys: list[Any]) -> None:
        original(keys)
        results = sqlite.commit([grown(head, b"x") for head in heads.values()])
        heads.update({r.head.id: r.head for r in results if isinstance(r, Applied)})

    monkeypatch.setattr(sqlite, "_spread_slice", slice_and_commit)
    sqlite._spread()
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
    pages = sqlite._db.execute("PRAGMA page_count").fetchone()[0]
    sqlite._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StoreError, match="full"):
        sqlite.commit([grown(head, b"x" * 100_000)])
    assert sqlite.head(("", "a")) == head and entries(sqlite, head.branch, 0, 999) == b"abc"
    assert sqlite.check() is None or "full" in str(sqlite.check())
    sqlite._db.execute("PRAGMA max_page_count=100000")
    assert applied(sqlite, grown(head, b"x" * 100_000)).position == 100_003
    assert sqlite.check() is None
    assert entries(sqlite, head.branch, 0, 10**6) == b"abc" + b"x" * 100_000


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

    def close(self) -> None:
        self._db.close()


@pytest.fixture
def failing(sqlite: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> Failing:
    found = Failing(sqlite._db)
    monkeypatch.setattr(sqlite, "_db", found)
    return found


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
        lambda: sqlite.log("b", 0, 9),
        lambda: sqlite.snapshot("b", 9),
        lambda: sqlite.heads("", None, "", 9),
        lambda: sqlite.next_epoch(("", "new")),
        sqlite.sweep,
    ):
        with pytest.raises(StoreError):
            read()


def test_many_tokens_of_a_session_become_one_row(sqlite: SqliteStore) -> None:
    head = create(sqlite)
    for i in range(50):
        head = applied(sqlite, grown(head, bytes([i]), "generated"))
    sqlite._spread()
    assert sqlite._db.execute("SELECT count(*), sum(count) FROM log").fetchone() == (1, 50)
    assert sqlite._db.execute("SELECT count(*) FROM journal").fetchone() == (0,)


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
