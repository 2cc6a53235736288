"""The Redis store alone: replicas that race, a server that dies, lies or is full, and answers that never come."""

import contextlib
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis.stateful import rule
from redis_server import RedisServer, free_port, server_binary
from test_store import AnySequence, applied, create, entries, few_steps, forked, grown, head_of, rewound

from service.store import redis as redis_module
from service.store.base import (
    Applied,
    Commit,
    CommitUnknown,
    Conflict,
    Head,
    Reply,
    Result,
    RolledBack,
    Segment,
    Store,
    StoreError,
    tombstone,
)
from service.store.redis import SCHEMA_VERSION, RedisStore

pytestmark = pytest.mark.skipif(server_binary() is None, reason="no Redis-compatible server")

A = ("", "a")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server that outlives a test; what a test changes of it, it puts back."""
    server = RedisServer(tmp_path_factory.mktemp("redis") / "data").start()
    yield server
    server.kill()


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    shared.command("FLUSHALL")
    return shared


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, which writes every commit to its disk."""
    made = RedisServer(tmp_path / "data", append_only="always").start()
    yield made
    made.kill()


@pytest.fixture
def store(server: RedisServer) -> Iterator[RedisStore]:
    made = RedisStore(server.url)
    yield made
    made.close()


@pytest.fixture
def replica(server: RedisServer, store: RedisStore) -> Iterator[RedisStore]:
    made = RedisStore(server.url)
    yield made
    made.close()


def keys(server: RedisServer) -> set[str]:
    """What the server holds of sessions."""
    words = server.command("KEYS", "recurra:*").decode().split("\r\n")
    general = {
        f"recurra:{name}"
        for name in ("schema", "run", "lives", "epochs", "numerics", "due", "check", "/models", "/ids")
    }
    return {word for word in words if word.startswith("recurra:")} - general


# ---------------------------------------------------------------------- replicas


def feed(url: str, mine: int, applied_by: list[int], failures: list[Exception]) -> None:
    store = RedisStore(url)
    try:
        while (head := store.head(A)) is not None and head.position < 200:
            result = store.commit([grown(head, bytes([mine]))])[0]
            applied_by[mine] += isinstance(result, Applied)
    except StoreError as error:
        failures.append(error)
    finally:
        store.close()


def test_of_racing_replicas_exactly_one_wins_each_position(server: RedisServer, store: RedisStore) -> None:
    head = create(store)
    applied_by, failures = [0] * 4, list[Exception]()
    threads = [threading.Thread(target=feed, args=(server.url, i, applied_by, failures)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    log = entries(store, head.branch, 0, 1000)
    assert failures == [] and sum(applied_by) == len(log) == store.head(A).position == 200
    assert [log.count(bytes([i])) for i in range(4)] == applied_by


def test_a_replica_sees_what_another_committed(store: RedisStore, replica: RedisStore) -> None:
    head = applied(store, grown(create(store), b"abc", snapshot=b"s"))
    moved = applied(replica, grown(head, b"de"))
    assert store.head(A) == moved
    assert store.commit([grown(head, b"x")]) == [Conflict(moved)]
    assert applied(store, grown(moved, b"f")).position == 6 and entries(replica, head.branch, 0, 9) == b"abcdef"


def test_two_replicas_create_a_session_once(store: RedisStore, replica: RedisStore) -> None:
    first, second = head_of(store), head_of(replica)
    made = applied(store, Commit(first, None))
    assert replica.commit([Commit(second, None)]) == [Conflict(made)]


def test_a_create_is_judged_again_when_its_tombstone_went_meanwhile(
    store: RedisStore, replica: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = create(store)
    late, original = head_of(store), store._apply

    def closed_first(*arguments: object) -> object:
        monkeypatch.undo()
        applied(replica, Commit(tombstone(head, "closed"), head.fence))
        return original(*arguments)

    applied(replica, Commit(msgspec.structs.replace(head, ttl_s=1, metadata={"x": 1}), head.fence))
    head = replica.head(A)
    time.sleep(1.1)
    monkeypatch.setattr(store, "_apply", closed_first)
    assert applied(store, Commit(late, None)).epoch == late.epoch == 2


# ---------------------------------------------------------------------- what is stored


def test_a_long_log_is_read_in_slices(store: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_module, "SLICE", 7)
    head = create(store)
    for i in range(60):
        head = applied(store, grown(head, bytes([i]) * (1 + i % 3), "generated" if i % 2 else "fed"))
    whole = b"".join(bytes([i]) * (1 + i % 3) for i in range(60))
    for after in range(0, 120, 11):
        for to in range(after, 125, 13):
            assert entries(store, head.branch, after, to) == whole[after:to]


def test_a_group_commit_may_be_large(store: RedisStore) -> None:
    ids = [f"s{i}" for i in range(3000)]
    made = store.commit([Commit(head_of(store, id), None) for id in ids])
    heads = [result.head for result in made if isinstance(result, Applied)]
    results = store.commit([grown(head, b"xy") for head in heads])
    assert len(heads) == 3000 and all(isinstance(result, Applied) for result in results)
    assert len(store.heads("", None, "", 5000)) == 3000


def test_a_branch_may_have_thousands_of_ancestors(store: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
    head = create(store)
    line = tuple((f"old-{i}", i + 1) for i in range(5000))
    commit = rewound(store, applied(store, grown(head, b"a")), 1)
    assert commit.branch is not None
    commit = msgspec.structs.replace(commit, branch=msgspec.structs.replace(commit.branch, line=line))
    head = applied(store, commit)
    assert store.line(head.branch) == line
    applied(store, Commit(tombstone(head, "closed"), head.fence))
    assert store.line("another") == ()


def test_an_entry_that_a_fork_shares_half_of_is_cut_when_the_parent_goes(
    server: RedisServer, store: RedisStore
) -> None:
    head = create(store)
    segment = Segment(head.branch, 0, 4, "generated", b"aabbccdd", "n", logprobs=b"1111222233334444")
    head = applied(store, Commit(msgspec.structs.replace(head, position=4), head.fence, (segment,)))
    head = applied(store, grown(head, b"ee"))
    fork = applied(store, forked(store, head, "b", 3))
    applied(store, Commit(tombstone(head, "closed"), head.fence))
    (left,) = store.log(head.branch, 0, 99)
    assert (left.count, left.data, left.logprobs) == (3, b"aabbcc", b"111122223333")
    assert entries(store, fork.branch, 0, 99) == b"aabbcc"
    applied(store, Commit(tombstone(fork, "closed"), fork.fence))
    assert keys(server) == {"recurra:/head:a", "recurra:/head:b"}


def test_a_fork_of_what_its_parent_gave_up_is_refused(store: RedisStore, replica: RedisStore) -> None:
    head = create(store)
    for _ in range(3):
        head = applied(store, grown(head, b"abc", snapshot=b"s"))
    stale = forked(replica, head, "b", 4)
    applied(store, Commit(msgspec.structs.replace(head, origin=6), head.fence))
    assert replica.commit([stale]) == [Conflict(None)]


def test_a_plain_session_takes_few_keys(server: RedisServer, store: RedisStore) -> None:
    applied(store, grown(create(store), b"abc"))
    assert keys(server) == {"recurra:/head:a", "recurra:log:a-1"}


def test_the_time_is_the_servers(store: RedisStore, server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 5.0)
    monkeypatch.setattr(time, "time_ns", lambda: 5)
    seconds = int(server.command("TIME").split(b"\r\n")[2])
    assert abs(create(store).updated_ms - seconds * 1000) < 3000


def test_the_clock_goes_on_when_the_server_is_gone(mortal: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RedisStore(mortal.url)
    before = store._now()
    mortal.kill()
    monkeypatch.setattr(redis_module, "CLOCK_EVERY_S", 0.0)
    assert before <= store._now() < before + 60_000
    store.close()


# ---------------------------------------------------------------------- a server that dies


def test_what_was_committed_is_there_after_kill_9_and_the_store_goes_on(mortal: RedisServer) -> None:
    store = RedisStore(mortal.url, "fsync")
    run, head = store.run, applied(store, grown(create(store), b"abc", snapshot=b"s"))
    mortal.kill()
    with pytest.raises(StoreError, match="can not be reached"):
        store.commit([grown(head, b"x")])
    assert "can not be reached" in str(store.check())
    mortal.start()
    assert store.check() is None and store.head(A) == head and store.run != run
    assert applied(store, grown(head, b"d")).position == 4 and entries(store, head.branch, 0, 9) == b"abcd"
    store.close()


@pytest.mark.parametrize("lost", [1, 200, 900])
def test_a_commit_that_was_half_in_the_file_is_never_applied(mortal: RedisServer, lost: int) -> None:
    store = RedisStore(mortal.url)
    before = [applied(store, grown(create(store, f"s{i}"), b"abc")) for i in range(20)]
    assert all(isinstance(one, Applied) for one in store.commit([grown(head, b"torn") for head in before]))
    mortal.kill()
    with mortal.append_only_file().open("r+b") as opened:
        opened.truncate(opened.seek(0, 2) - lost)
    mortal.start()
    again = RedisStore(mortal.url)
    assert [again.head(head.key) for head in before] == before
    after = [applied(again, grown(head, b"de")) for head in before[:10]] + before[10:]
    mortal.until_rewritten()
    mortal.restart()
    last = RedisStore(mortal.url)
    assert [last.head(head.key) for head in before] == after
    assert [entries(last, head.branch, 0, 9) for head in after] == [b"abcde"] * 10 + [b"abc"] * 10
    for one in (store, again, last):
        one.close()


def test_a_server_that_may_not_begin_another_file_is_used_with_a_warning(
    mortal: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    mortal.command("ACL", "SETUSER", "default", "-bgrewriteaof")
    RedisStore(mortal.url).close()
    assert "redis_file_kept" in "".join(capsys.readouterr())


def test_a_server_that_ends_before_its_other_file_is_complete_is_right_at_its_second_start(mortal: RedisServer) -> None:
    store = RedisStore(mortal.url)
    before = applied(store, grown(create(store), b"abc"))
    applied(store, grown(before, b"torn"))
    mortal.kill()
    with mortal.append_only_file().open("r+b") as opened:
        opened.truncate(opened.seek(0, 2) - 100)
    mortal.options = (*mortal.options, "rdb-key-save-delay 1000000")  # its other file takes a second a key
    mortal.start()
    again = RedisStore(mortal.url)
    after = applied(again, grown(before, b"de"))
    mortal.restart()
    assert b"not the last file" in (mortal.folder / "server.log").read_bytes()
    last = RedisStore(mortal.url)
    assert last.head(A) == after
    assert entries(last, after.branch, 0, 9) == b"abcde"
    for one in (store, again, last):
        one.close()


def every_call(store: Store, head: Head) -> list[Callable[[], object]]:
    return [
        lambda: store.commit([grown(head, b"x")]),
        lambda: store.keep("", Reply("", "k", b"d", "body")),
        lambda: store.reply("", "", "k"),
        lambda: store.head(A),
        lambda: store.line("other"),
        lambda: store.log(head.branch, 0, 9),
        lambda: store.snapshot(head.branch, 9, "g"),
        lambda: store.snapshots(head.branch, 0, 9, "g"),
        lambda: store.heads("", None, "", 9),
        lambda: store.forks(A, 1),
        lambda: store.lives("m", 1),
        lambda: store.next_epoch(A),
        store.sweep,
    ]


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_server_that_is_gone_is_told_soon_by_every_call(
    how: str, mortal: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_module, "TIMEOUT_S", 0.5)  # a busy machine's server takes its time
    monkeypatch.setattr(redis_module, "SETTLE_S", 0.2)
    store = RedisStore(mortal.url)
    head = create(store)
    mortal.kill() if how == "killed" else mortal.freeze()
    for call in every_call(store, head):
        begin = time.monotonic()
        with pytest.raises(StoreError):
            call()
        assert time.monotonic() - begin < 2
    assert store.check() is not None
    mortal.start() if how == "killed" else mortal.thaw()
    until = time.monotonic() + 10
    while store.check() is not None:  # a thawed one first does what was asked of it
        assert time.monotonic() < until
    for call in every_call(store, head):
        call()
    store.close()


def test_a_server_without_a_file_says_so_and_a_lost_session_is_told_once(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "data", append_only=None).start()
    store = RedisStore(server.url)
    assert store.durability == "none (no append-only file)"
    head = applied(store, grown(create(store), b"abc"))
    server.restart()
    with pytest.raises(RolledBack) as caught:
        store.head(A)
    assert (caught.value.acknowledged, caught.value.found) == ((1, 3), None)
    assert store.head(A) is None and store.next_epoch(A) == 2
    assert store.commit([grown(head, b"x")]) == [Conflict(None)]
    assert store.head(("", "never")) is None
    store.close()
    server.kill()


def test_a_session_that_came_back_older_is_told_once_and_goes_on_from_there(mortal: RedisServer) -> None:
    store, other = RedisStore(mortal.url), RedisStore(mortal.url)
    old = applied(store, grown(create(store), b"abc"))
    still = create(store, "b")
    mortal.kill()
    shutil.copytree(mortal.folder, mortal.folder.with_name("old"))
    mortal.start()
    applied(store, grown(old, b"de"))
    mortal.kill()
    shutil.rmtree(mortal.folder)
    mortal.folder.with_name("old").rename(mortal.folder)
    mortal.start()
    assert store.head(("", "b")) == still and other.head(A) == old
    with pytest.raises(RolledBack) as caught:
        store.head(A)
    assert (caught.value.acknowledged, caught.value.found) == ((1, 5), (1, 3))
    assert store.head(A) == old
    assert applied(store, grown(old, b"x")).position == 4 and entries(store, old.branch, 0, 9) == b"abcx"
    store.close()
    other.close()


def test_a_closed_session_that_came_back_alive_is_told(mortal: RedisServer) -> None:
    store = RedisStore(mortal.url)
    head = create(store)
    mortal.kill()
    shutil.copytree(mortal.folder, mortal.folder.with_name("old"))
    mortal.start()
    applied(store, Commit(tombstone(head, "closed"), head.fence))
    mortal.kill()
    shutil.rmtree(mortal.folder)
    mortal.folder.with_name("old").rename(mortal.folder)
    mortal.start()
    with pytest.raises(RolledBack):
        store.head(A)
    assert store.head(A) == head
    store.close()


# ---------------------------------------------------------------------- answers that never come


def received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 20)
    except OSError:
        return b""


def answers(server: socket.socket, client: socket.socket, muted: threading.Event, answered: threading.Event) -> None:
    """Pass on what the server says, until it is not to be heard any more."""
    with contextlib.suppress(OSError):
        while answer := received(server):
            if muted.is_set():
                answered.set()
            else:
                client.sendall(answer)
        client.shutdown(socket.SHUT_RDWR)


class Cutter:
    """Forwards to a server; the next call of the script is cut off as it is told."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.forwards = True
        self.armed = False
        self.meanwhile: Callable[[], object] = lambda: None
        self.held: bytes = b""
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, forwards: bool, meanwhile: Callable[[], object] = lambda: None) -> None:
        """The next call reaches the server, or not; its answer never comes. Before that is noticed, `meanwhile`."""
        self.armed, self.forwards, self.meanwhile = True, forwards, meanwhile

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        muted, answered = threading.Event(), threading.Event()
        gone = contextlib.suppress(OSError)
        with gone, client, socket.create_connection(("127.0.0.1", self._port)) as server:
            threading.Thread(target=answers, args=(server, client, muted, answered), daemon=True).start()
            while request := received(client):
                if self.armed and b"EVALSHA" in request and b"commit" in request:
                    self.armed, self.held = False, request
                    muted.set()
                    if self.forwards:
                        server.sendall(request)
                        answered.wait(5)
                    self.meanwhile()
                    return
                server.sendall(request)

    def send_held(self) -> bytes:
        """The request that was held back arrives after all."""
        with socket.create_connection(("127.0.0.1", self._port)) as server:
            server.sendall(self.held)
            return server.recv(1 << 20)


@pytest.fixture
def cutter(server: RedisServer) -> Iterator[Cutter]:
    made = Cutter(server.port)
    yield made
    made.close()


@pytest.fixture
def cut_off(cutter: Cutter) -> Iterator[RedisStore]:
    """A store whose connection may be cut."""
    made = RedisStore(cutter.url)
    yield made
    made.close()


def test_a_commit_whose_answer_was_lost_is_found_applied(
    cut_off: RedisStore, cutter: Cutter, store: RedisStore
) -> None:
    heads = [create(cut_off, id) for id in "ab"]
    cutter.cut(forwards=True)
    results = cut_off.commit([grown(head, b"xyz") for head in heads])
    assert [store.head(head.key) for head in heads] == [result.head for result in results]
    assert [type(result) for result in results] == [Applied, Applied] and entries(store, "a-1", 0, 9) == b"xyz"
    assert cut_off.commit([grown(heads[0], b"more")]) == [Conflict(store.head(A))]


def test_a_loser_of_a_commit_whose_answer_was_lost_is_told_so(
    cut_off: RedisStore, cutter: Cutter, store: RedisStore
) -> None:
    first, second = create(cut_off, "a"), create(cut_off, "b")
    moved = applied(store, grown(second, b"other"))
    cutter.cut(forwards=True)
    mine, lost = cut_off.commit([grown(first, b"x"), grown(second, b"y")])
    assert isinstance(mine, Applied) and lost == Conflict(moved)


def test_a_commit_that_did_not_arrive_is_not_applied_even_when_it_arrives_late(
    cut_off: RedisStore, cutter: Cutter, store: RedisStore
) -> None:
    head = create(cut_off)
    cutter.cut(forwards=False)
    with pytest.raises(StoreError, match="nothing was committed"):
        cut_off.commit([grown(head, b"x")])
    assert cutter.send_held().startswith(b"-VOID")
    assert store.head(A) == head and entries(store, head.branch, 0, 9) == b""
    assert applied(cut_off, grown(head, b"y")).position == 1


def test_a_commit_that_did_not_arrive_and_was_overtaken_is_a_conflict(
    cut_off: RedisStore, cutter: Cutter, store: RedisStore
) -> None:
    head = create(cut_off)
    cutter.cut(forwards=False, meanwhile=lambda: applied(store, grown(head, b"theirs")))
    assert cut_off.commit([grown(head, b"mine")]) == [Conflict(store.head(A))]
    assert entries(store, head.branch, 0, 99) == b"theirs"


def overtake(store: RedisStore, times: int) -> None:
    for _ in range(times):
        applied(store, grown(store.head(A), b"+"))


def test_an_applied_commit_that_was_built_upon_counts(cut_off: RedisStore, cutter: Cutter, store: RedisStore) -> None:
    head = create(cut_off)
    cutter.cut(forwards=True, meanwhile=lambda: overtake(store, 1))
    result = cut_off.commit([grown(head, b"mine")])[0]
    assert isinstance(result, Applied) and result.head.position == 4
    assert entries(store, head.branch, 0, 99) == b"mine+"


@pytest.mark.parametrize("forwards", [True, False])
def test_what_the_heads_can_not_tell_is_unknown(
    forwards: bool, cut_off: RedisStore, cutter: Cutter, store: RedisStore
) -> None:
    head = create(cut_off)
    cutter.cut(forwards, meanwhile=lambda: overtake(store, 2))
    with pytest.raises(CommitUnknown):
        cut_off.commit([grown(head, b"mine")])


def test_a_commit_is_unknown_when_the_server_dies_with_it(mortal: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_module, "SETTLE_S", 0.3)
    cutter = Cutter(mortal.port)
    store = RedisStore(cutter.url)
    head = create(store)
    cutter.cut(forwards=True, meanwhile=mortal.kill)
    with pytest.raises(CommitUnknown):
        store.commit([grown(head, b"abc")])
    mortal.start()
    assert store.head(A).position == 3
    store.close()
    cutter.close()


def test_a_server_that_pauses_leaves_one_truth(store: RedisStore, server: RedisServer) -> None:
    """The call waits in the server beyond the time-out: whatever is answered then holds later as well."""
    head, results = create(store), list[Result]()
    server.command("CLIENT", "PAUSE", "1400", "ALL")
    try:
        results = store.commit([grown(head, b"x")])
    except StoreError as error:
        assert not isinstance(error, CommitUnknown)
    time.sleep(0.5)
    assert store.head(A) == (results[0].head if results else head)


def test_a_kept_answer_whose_confirmation_was_lost_is_kept_once(
    cut_off: RedisStore, cutter: Cutter, store: RedisStore
) -> None:
    reply = Reply("", "k", b"digest", "body", body=b"{}")
    cutter.cut(forwards=True)
    assert cut_off.keep("", reply)
    assert not store.keep("", reply)
    cutter.cut(forwards=False)
    with pytest.raises(StoreError, match="not kept"):
        cut_off.keep("", msgspec.structs.replace(reply, key="l"))
    assert store.reply("", "", "l") is None


# ---------------------------------------------------------------------- a server that refuses


def test_a_full_server_refuses_the_commit_and_applies_nothing(store: RedisStore, server: RedisServer) -> None:
    heads = [create(store, id) for id in "ab"]
    server.command("CONFIG", "SET", "maxmemory", "1")
    try:
        with pytest.raises(StoreError, match="full"):
            store.commit([grown(head, b"x", snapshot=b"s") for head in heads])
        assert "full" in str(store.check())
        assert [store.head(head.key) for head in heads] == heads and entries(store, "a-1", 0, 9) == b""
    finally:
        server.command("CONFIG", "SET", "maxmemory", "0")
    assert store.check() is None and applied(store, grown(heads[0], b"x")).position == 1


def test_a_read_only_replica_is_refused_until_it_is_the_primary(store: RedisStore, server: RedisServer) -> None:
    head = create(store)
    server.command("REPLICAOF", "127.0.0.1", str(free_port()))
    try:
        with pytest.raises(StoreError, match="read-only replica"):
            store.commit([grown(head, b"x")])
        assert "read-only replica" in str(store.check())
        with pytest.raises(StoreError, match="read-only replica"):
            RedisStore(server.url)
    finally:
        server.command("REPLICAOF", "NO", "ONE")
    assert applied(store, grown(head, b"x")).position == 1


def test_a_script_that_the_server_forgot_is_given_to_it_again(store: RedisStore, server: RedisServer) -> None:
    head = create(store)
    server.command("SCRIPT", "FLUSH")
    assert applied(store, grown(head, b"x")).position == 1


def test_a_server_that_evicts_is_refused(server: RedisServer, store: RedisStore) -> None:
    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(StoreError, match="set `maxmemory-policy noeviction`"):
            RedisStore(server.url)
    finally:
        server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")


def test_a_server_that_comes_back_evicting_is_refused(mortal: RedisServer) -> None:
    store = RedisStore(mortal.url)
    head = create(store)
    mortal.options = ["maxmemory-policy allkeys-lru"]
    mortal.restart()
    with pytest.raises(StoreError, match="noeviction"):
        store.commit([grown(head, b"x")])
    assert "noeviction" in str(store.check())
    mortal.options = []
    mortal.restart()
    assert applied(store, grown(head, b"x")).position == 1
    store.close()


def durability_of(url: str, asked: str = "commit") -> str:
    store = RedisStore(url, asked)
    store.close()
    return store.durability


def test_durability_says_what_the_server_does(server: RedisServer, mortal: RedisServer) -> None:
    assert durability_of(server.url) == "commit (appendonly everysec)"
    assert durability_of(mortal.url, "fsync") == "fsync (appendonly always)"
    with pytest.raises(StoreError, match="appendfsync is everysec"):
        RedisStore(server.url, "fsync")
    server.command("CONFIG", "SET", "appendonly", "no")
    try:
        with pytest.raises(StoreError, match="no append-only file"):
            RedisStore(server.url, "fsync")
    finally:
        server.command("CONFIG", "SET", "appendonly", "yes")


def test_a_managed_server_that_forbids_config_is_used_with_a_warning(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "data", 'rename-command CONFIG ""').start()
    try:
        assert durability_of(server.url) == "commit (appendonly, how often is unknown)"
        with pytest.raises(StoreError, match="appendfsync is unknown"):
            RedisStore(server.url, "fsync")
    finally:
        server.kill()


def test_data_of_a_newer_schema_is_refused(server: RedisServer) -> None:
    server.command("SET", "recurra:schema", str(SCHEMA_VERSION + 1))
    with pytest.raises(StoreError, match="newer version"):
        RedisStore(server.url)


def test_a_cluster_is_refused(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "data", "cluster-enabled yes")
    server.port = next(port for port in iter(free_port, 0) if port < 55_000)  # the cluster's own port is 10,000 higher
    server.start()
    try:
        with pytest.raises(StoreError, match="can not be a Redis Cluster"):
            RedisStore(server.url)
    finally:
        server.kill()


def test_a_password_is_needed_and_never_shown(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "data", "requirepass right").start()
    try:
        with pytest.raises(StoreError, match="password") as caught:
            RedisStore(server.url.replace("//", "//:wrong-secret@"))
        assert "wrong-secret" not in str(caught.value)
        with pytest.raises(StoreError, match="password"):
            RedisStore(server.url)
        RedisStore(server.url.replace("//", "//:right@")).close()
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("url", "problem"),
    [("redis://127.0.0.1:1/0", "can not be reached"), ("redis://127.0.0.1:what/0", "no Redis URL")],
)
def test_a_server_that_is_not_there_is_refused(url: str, problem: str) -> None:
    with pytest.raises(StoreError, match=problem):
        RedisStore(url)


# ---------------------------------------------------------------------- any sequence of events


class AnySequenceInRedis(AnySequence):
    """The same over two replicas, and the server may be killed at any moment."""

    def open(self) -> Store:
        self.patch.setattr(RedisStore, "_now", lambda store: self.clock())
        self.patch.setattr(redis_module, "SNAPSHOTS_KEPT", 10_000)
        self.server = RedisServer(self.folder / "data", append_only="always").start()
        self.replicas = [RedisStore(self.server.url) for _ in range(2)]
        return self.replicas[0]

    def stop(self) -> None:
        for replica in self.replicas:
            replica.close()
        self.server.kill()

    def stored_snapshots(self, branch: str) -> list[int]:
        found = self.replicas[0]._link.ask(("HKEYS", f"recurra:snapshots:{branch}"))[0]
        return [int(field.split(b" ")[0]) for field in found]

    def store_is_empty(self) -> None:
        kinds = ("log", "snapshots", "line", "upto", "since", "/forks")
        assert [key for key in keys(self.server) if key.split(":")[1] in kinds] == []

    @rule()
    def go_to_another_replica(self) -> None:
        self.replicas.reverse()
        self.store = self.replicas[0]

    @rule()
    def crash(self) -> None:
        self.server.restart()


TestAnySequenceInRedis = AnySequenceInRedis.TestCase
TestAnySequenceInRedis.settings = few_steps
