"""The engine without HTTP: commit before reply, failures that harm nobody else, sessions that wake as they slept."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs import Inbox, MakeRig, Rig
from tiny import newest

from service import engine, scheduler
from service.engine import AHEAD_FED
from service.errors import Problem
from service.runner import Begun, Draw, Folded, Runner
from service.state import Array, Row
from service.store.base import Commit, CommitUnknown, Conflict, Generation, Head, Key, Snapshot, StoreError
from service.store.memory import MemoryStore
from service.tasks import Output
from service.work.base import NewSession, Work
from service.work.events import Done, Event, Failed, LostRace, Suspended, Token, Tokens
from service.work.feed import Feed, Predict
from service.work.generate import Generate
from service.work.look import Peek

WAIT_S = 20
POISON = 12


class Ear:
    """A listener: the events of one piece of work."""

    def __init__(self, hook: Callable[[Event | Token], None] | None = None) -> None:
        self.events: list[Event | Token] = []
        self._ended = threading.Event()
        self._hook = hook

    def __call__(self, event: Event) -> None:
        if isinstance(event, Tokens):
            for token in event.each():
                self._take(token)
        else:
            self._take(event)
            self._ended.set()

    def _take(self, event: Event | Token) -> None:
        if self._hook is not None:
            self._hook(event)
        self.events.append(event)

    def end(self) -> Any:  # noqa: ANN401 (an event)
        """The last event."""
        assert self._ended.wait(WAIT_S), "the work never ended"
        return self.events[-1]

    def problem(self) -> Problem:
        end = self.end()
        assert isinstance(end, Failed), end
        return end.problem


def key(name: str = "s") -> Key:
    return ("", name)


def symbols(*ids: int) -> Array:
    return np.array(ids, "<i4")


def many(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 12, count).astype("<i4")


def known(rig: Rig, name: str = "s") -> Head:
    """The head as it is stored."""
    head = rig.store.head(key(name))
    assert head is not None
    return head


def feed(rig: Rig, entries: Array, name: str = "s", new: bool = False, ear: Ear | None = None) -> Ear:
    ear = ear or Ear()
    at = NewSession(key(name), 1) if new else known(rig, name)
    rig.engine.submit(Feed(ear, at, entries, True))
    return ear


def generation(**more: Any) -> Generation:  # noqa: ANN401
    values = {"max_tokens": 10, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 5}
    return Generation(start=0, prompt_tokens=0, **{**values, **more})


def row_of(rig: Rig, name: str = "s") -> list[bytes]:
    """The session's state, as bytes."""
    ear = Ear()
    rig.engine.submit(Peek(ear, known(rig, name)))
    end = ear.end()
    assert isinstance(end, Done), end
    return [array.tobytes() for array in end.row]


def expected_row(rig: Rig, entries: Array) -> list[bytes]:
    """The fold of entries from the initial state."""
    ear = Ear()
    rig.engine.submit(Predict(ear, entries, True))
    return [array.tobytes() for array in ear.end().row]


# ---------------------------------------------------------------------- commit, then reply


def test_a_feed_is_committed_before_its_answer(rig: MakeRig) -> None:
    store = MemoryStore()
    seen: list[int] = []

    def look(event: Event | Token) -> None:
        head = store.head(key())
        seen.append(head.position if head is not None else -1)

    one = rig(store=store)
    end = feed(one, symbols(1, 2, 3), new=True, ear=Ear(look)).end()
    assert isinstance(end, Done) and end.created and end.head is not None and end.head.position == 3
    assert seen == [3]


def test_a_token_is_committed_before_it_is_sent(rig: MakeRig) -> None:
    store = MemoryStore()
    late: list[Event | Token] = []

    def look(event: Event | Token) -> None:
        head = store.head(key())
        if isinstance(event, Token) and (head is None or head.position < event.position):
            late.append(event)

    one = rig(store=store)
    ear = Ear(look)
    one.engine.submit(Generate(ear, NewSession(key(), 5), symbols(1), generation()))
    assert isinstance(ear.end(), Done) and len(ear.events) == 11 and late == []


def test_the_log_holds_what_was_fed_and_generated(rig: MakeRig) -> None:
    one = rig()
    feed(one, symbols(1, 2), new=True).end()
    ear = Ear()
    one.engine.submit(Generate(ear, known(one), symbols(3), generation()))
    head = ear.end().head
    tokens = [event.token for event in ear.events if isinstance(event, Token)]
    segments = one.store.log(head.branch, 0, head.position)
    logged = np.concatenate([one.engine.codec.entries(segment.data) for segment in segments])
    assert logged.tolist() == [1, 2, 3, *tokens]
    assert [(segment.source, segment.count) for segment in segments] == [("fed", 3), ("generated", 10)]


def test_a_feed_of_many_chunks_commits_once(rig: MakeRig) -> None:
    store = Counting()
    one = rig(store=store)
    feed(one, many(1000), new=True).end()
    assert store.commits == [1]


class Counting(MemoryStore):
    """Notes the size of every group commit."""

    def __init__(self) -> None:
        super().__init__()
        self.commits: list[int] = []

    def commit(self, commits: Sequence[Commit], snapshots: Sequence[Snapshot] = ()) -> list[Any]:
        self.commits.append(len(commits))
        return list(super().commit(commits, snapshots))


class CountingRunner:
    """Notes the shape of every call, and may spoil it."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.manifest, self.numerics = runner.manifest, runner.numerics
        self.on_graph = False
        self.calls: list[tuple[int, int]] = []

    def run(self, entries: Array, rows: Sequence[Row], wanted: Sequence[int] | None = None) -> Folded:
        self.calls.append((len(rows), len(entries)))
        return self._runner.run(entries, rows)

    def roll(
        self, entries: Array, rows: Sequence[Row], steps: Iterable[int], draw: Draw, ahead: bool = False
    ) -> Folded:
        numbers = list(steps)
        self.calls.append((len(rows), len(numbers)))
        return self._runner.roll(entries, rows, numbers, draw, ahead)

    def close(self) -> None:
        self._runner.close()


def test_work_that_waits_together_runs_together(rig: MakeRig) -> None:
    runners: list[CountingRunner] = []
    store = Counting()
    one = rig(store=store, start=False, wrap=lambda runner: runners.append(CountingRunner(runner)) or runners[0])
    ears = [feed(one, symbols(1, 2, 3, 4), f"s{i}", new=True) for i in range(20)]
    one.start()
    assert all(isinstance(ear.end(), Done) for ear in ears)
    assert runners[0].calls == [(20, 4)] and store.commits == [20]


def test_no_batch_is_larger_than_allowed(rig: MakeRig) -> None:
    runners: list[CountingRunner] = []
    one = rig(start=False, max_batch=6, wrap=lambda runner: runners.append(CountingRunner(runner)) or runners[0])
    ears = [feed(one, symbols(1), f"s{i}", new=True) for i in range(20)]
    one.start()
    assert all(isinstance(ear.end(), Done) for ear in ears)
    assert max(rows for rows, _ in runners[0].calls) == 6


# ---------------------------------------------------------------------- rows that fail


class Poisoned(CountingRunner):
    """Raises when a chunk holds the poison."""

    def run(self, entries: Array, rows: Sequence[Row], wanted: Sequence[int] | None = None) -> Folded:
        if (entries == POISON).any():
            raise RuntimeError("poison")
        return super().run(entries, rows)


class NotFinite(CountingRunner):
    """Gives NaN for rows that hold the poison."""

    def run(self, entries: Array, rows: Sequence[Row], wanted: Sequence[int] | None = None) -> Folded:
        folded = super().run(entries, rows)
        bad = [i for i in range(len(rows)) if (entries[:, i] == POISON).any()]
        outputs = {name: array.copy() for name, array in folded.outputs.items()}
        for array in outputs.values():
            array[:, bad] = np.nan
        return Folded(outputs, folded.rows, finite=not bad)


@pytest.mark.parametrize(("wrap", "code"), [(Poisoned, "internal"), (NotFinite, "numeric_fault")])
def test_a_row_that_fails_harms_that_row_alone(wrap: Any, code: str, rig: MakeRig) -> None:  # noqa: ANN401
    one = rig(wrap=wrap, start=False)
    ears = [feed(one, symbols(1, POISON if i == 3 else 2), f"s{i}", new=True) for i in range(8)]
    one.start()
    assert ears[3].problem().code == code
    assert all(isinstance(ear.end(), Done) for i, ear in enumerate(ears) if i != 3)
    assert one.store.head(key("s3")) is None and one.store.head(key("s2")) is not None


class Unbegun(Poisoned):
    """Can begin no call beside."""

    def begin(self, entries: Array, rows: Sequence[Row], wanted: Sequence[int] | None = None) -> Begun:
        raise RuntimeError("no memory for the batch")


def test_a_large_fold_that_can_not_be_begun_beside_is_run_here(rig: MakeRig) -> None:
    one = rig(wrap=Unbegun, start=False, max_batch=256)
    ears = [feed(one, symbols(1, POISON if i == 3 else 2), f"s{i}", new=True) for i in range(AHEAD_FED + 8)]
    one.start()
    assert ears[3].problem().code == "internal"
    assert all(isinstance(ear.end(), Done) for i, ear in enumerate(ears) if i != 3)
    assert isinstance(feed(one, symbols(1), "s0").end(), Done)


class Held(CountingRunner):
    """After a fold the next roll-out waits until the gate is opened."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner)
        self.folded = False
        self.gate = threading.Event()

    def run(self, entries: Array, rows: Sequence[Row], wanted: Sequence[int] | None = None) -> Folded:
        self.folded = True
        return super().run(entries, rows, wanted)

    def roll(
        self, entries: Array, rows: Sequence[Row], steps: Iterable[int], draw: Draw, ahead: bool = False
    ) -> Folded:
        assert not self.folded or self.gate.wait(WAIT_S)
        return super().roll(entries, rows, steps, draw, ahead)


def test_an_answer_does_not_wait_for_the_streams_next_step(rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "AHEAD_DRAWN", 1)
    monkeypatch.setattr(engine, "SHORT_STEPS", 1)
    runners: list[Held] = []
    one = rig(start=False, wrap=lambda runner: runners.append(Held(runner)) or runners[0])
    stream = Ear()
    one.engine.submit(Generate(stream, NewSession(key("stream"), 5), symbols(1), generation(max_tokens=500)))
    answer = feed(one, symbols(1, 2), "fed", new=True)
    one.start()
    try:
        assert answer.end().head.position == 2
    finally:
        runners[0].gate.set()
    assert isinstance(stream.end(), Done) and runners[0].folded


# ---------------------------------------------------------------------- folds of a slow graph


class Gated(CountingRunner):
    """The first call that is begun beside waits until the gate is opened."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner)
        self.on_graph = True
        self.begun: list[int] = []
        self.entered, self.gate = threading.Event(), threading.Event()
        self._beside = ThreadPoolExecutor(1)

    def begin(self, entries: Array, rows: Sequence[Row], wanted: Sequence[int] | None = None) -> Begun:
        self.begun.append(len(rows))
        return self._beside.submit(self._gated, entries, rows)

    def _gated(self, entries: Array, rows: Sequence[Row]) -> Folded:
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        return self.run(entries, rows)

    def cancel(self, begun: Begun) -> bool:
        return begun.cancel()

    def end(self, begun: Begun) -> Folded:
        return cast(Folded, begun.result())

    def close(self) -> None:
        self._beside.shutdown()
        super().close()


@pytest.fixture
def gated(rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> tuple[Rig, Gated]:
    """An engine whose steps wait for the graph, where a fold of one session is under way."""
    monkeypatch.setattr(engine, "AHEAD_SLOW", 1)
    runners: list[Gated] = []
    one = rig(wrap=lambda runner: runners.append(Gated(runner)) or runners[0])
    feed(one, symbols(1), "under-way", new=True)
    assert runners[0].entered.wait(WAIT_S)
    return one, runners[0]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_who_comes_while_a_fold_waits_for_the_graph_joins_it(gated: tuple[Rig, Gated]) -> None:
    one, runner = gated
    ears = [feed(one, symbols(1), "a", new=True)]
    until(lambda: runner.begun == [1, 1])
    ears.append(feed(one, symbols(2), "b", new=True))
    until(lambda: runner.begun == [1, 1, 2])
    ears += [feed(one, symbols(*more), f"c{i}", new=True) for i, more in enumerate([(3,), (1, 2)])]
    until(lambda: runner.begun == [1, 1, 2, 3])
    runner.gate.set()
    assert [ear.end().head.position for ear in ears] == [1, 1, 1, 2]
    # Who has two steps to go can not be in a call of one.
    assert runner.calls == [(1, 1), (3, 1), (1, 2)]
    assert row_of(one, "b") == expected_row(one, symbols(2))


def test_a_fold_is_not_begun_again_for_each_of_many(gated: tuple[Rig, Gated], monkeypatch: pytest.MonkeyPatch) -> None:
    one, runner = gated
    monkeypatch.setattr("service.engine.JOINS", 2)
    works = [Feed(Ear(), NewSession(key(f"a{i}"), 1), symbols(1), True) for i in range(9)]
    one.engine.submit(*works)
    until(lambda: runner.begun == [1, 9])
    ears = [feed(one, symbols(1), "b0", new=True)]
    until(lambda: runner.begun == [1, 9, 10])
    ears.append(feed(one, symbols(1), "b1", new=True))
    until(lambda: runner.begun == [1, 9, 10, 11])
    ears += [feed(one, symbols(1), f"c{i}", new=True) for i in range(2)]
    until(lambda: one.engine._scheduler.waiting == 2)
    assert runner.begun == [1, 9, 10, 11]
    ears.append(feed(one, symbols(1), "d", new=True))
    until(lambda: runner.begun == [1, 9, 10, 11, 14])
    runner.gate.set()
    assert all(ear.end().head.position == 1 for ear in ears) and runner.calls == [(1, 1), (14, 1)]


def test_a_fold_leaves_some_to_the_one_that_runs_beside_its_answers(
    gated: tuple[Rig, Gated], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "UNCUT", 2)
    one, runner = gated
    ears = [Ear() for _ in range(9)]
    one.engine.submit(*(Feed(ear, NewSession(key(f"a{i}"), 1), symbols(1), True) for i, ear in enumerate(ears)))
    until(lambda: runner.begun == [1, 6])
    ears.append(feed(one, symbols(1), "b", new=True))
    until(lambda: one.engine._scheduler.waiting == 4)
    runner.gate.set()
    assert all(ear.end().head.position == 1 for ear in ears)
    assert runner.calls == [(1, 1), (6, 1), (4, 1)]


def test_who_waits_for_the_graph_may_still_leave(gated: tuple[Rig, Gated]) -> None:
    one, runner = gated
    gone, stays = Ear(), Ear()
    work = Feed(gone, NewSession(key("gone"), 1), symbols(1), True)
    one.engine.submit(work)
    until(lambda: runner.begun == [1, 1])
    work.drop()
    feed(one, symbols(2), "stays", new=True, ear=stays)
    until(lambda: runner.begun == [1, 1, 1])
    runner.gate.set()
    assert gone.problem().code == "not_ready" and stays.end().head.position == 1
    assert one.store.head(key("gone")) is None


def test_what_is_begun_ahead_changes_nothing(rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that each go on when they are answered, some with more than a step, beside a stream."""
    monkeypatch.setattr(Runner, "on_graph", True)
    monkeypatch.setattr(engine, "AHEAD_SLOW", 2)
    monkeypatch.setattr(engine, "UNCUT", 2)
    begun: list[int] = []
    begin = Runner.begin

    def noted(self: Runner, entries: Array, rows: Sequence[Row], wanted: Sequence[int] | None = None) -> Begun:
        begun.append(len(rows))
        return begin(self, entries, rows, wanted)

    monkeypatch.setattr(Runner, "begin", noted)

    @given(lengths=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=12), min_size=2, max_size=12))
    @settings(max_examples=20, deadline=None)
    def holds(lengths: list[list[int]]) -> None:
        one, stream = rig(), Ear()
        one.engine.submit(Generate(stream, NewSession(key("x"), 5), symbols(1), generation(max_tokens=200)))

        def client(name: str, steps: list[int]) -> None:
            for i, count in enumerate(steps):
                feed(one, many(count, i), name, new=i == 0).end()

        clients = [threading.Thread(target=client, args=(f"s{i}", steps)) for i, steps in enumerate(lengths)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        for i, steps in enumerate(lengths):
            fed = np.concatenate([many(count, j) for j, count in enumerate(steps)])
            assert known(one, f"s{i}").position == len(fed) and row_of(one, f"s{i}") == expected_row(one, fed)
        assert isinstance(stream.end(), Done)

    holds()
    assert max(begun) > 2


@pytest.mark.parametrize("wrap", [Poisoned, NotFinite])
def test_a_failed_feed_leaves_the_session_as_it_was(wrap: Any, rig: MakeRig) -> None:  # noqa: ANN401
    one = rig(wrap=wrap)
    feed(one, many(50), new=True).end()
    before = row_of(one)
    feed(one, np.append(many(100, 1), symbols(POISON))).problem()
    assert one.store.head(key()).position == 50 and row_of(one) == before
    feed(one, many(30, 2)).end()
    assert row_of(one) == expected_row(one, np.append(many(50), many(30, 2)))


def test_a_numeric_fault_says_up_to_where_the_session_is_good(rig: MakeRig) -> None:
    one = rig(wrap=NotFinite)
    feed(one, many(5), new=True).end()
    problem = feed(one, symbols(POISON)).problem()
    assert problem.code == "numeric_fault" and problem.members["last_good_position"] == 5


# ---------------------------------------------------------------------- commits that fail


class Faulty(MemoryStore):
    """Fails the commits that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.only: str | None = None

    def commit(self, commits: Sequence[Commit], snapshots: Sequence[Snapshot] = ()) -> list[Any]:
        if self.error is not None and (self.only is None or any(c.head.id == self.only for c in commits)):
            raise self.error
        return list(super().commit(commits, snapshots))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StoreError("full"), "not_ready"),
        (CommitUnknown("gone"), "commit_unknown"),
        (RuntimeError("defect"), "internal"),
    ],
)
def test_a_commit_that_fails_leaves_the_session_at_its_last(error: Exception, code: str, rig: MakeRig) -> None:
    store = Faulty()
    one = rig(store=store)
    feed(one, many(40), new=True).end()
    before = row_of(one)
    store.error = error
    assert feed(one, many(9, 1)).problem().code == code
    store.error = None
    assert one.store.head(key()).position == 40 and row_of(one) == before
    assert feed(one, many(9, 1)).end().head.position == 49
    assert row_of(one) == expected_row(one, np.append(many(40), many(9, 1)))


def test_a_commit_that_can_not_be_written_harms_no_neighbour(rig: MakeRig) -> None:
    store = Faulty()
    store.error, store.only = OverflowError("a number is too large"), "s3"
    one = rig(store=store, start=False)
    ears = [feed(one, symbols(1, 2), f"s{i}", new=True) for i in range(6)]
    one.start()
    assert ears[3].problem().code == "internal"
    assert all(isinstance(ear.end(), Done) for i, ear in enumerate(ears) if i != 3)


def test_a_generate_whose_commit_fails_has_sent_only_what_is_committed(rig: MakeRig) -> None:
    store = Faulty()

    def fail_after_four(event: Event) -> None:
        if isinstance(event, Token) and event.position == 5:
            store.error = StoreError("full")

    one = rig(store=store)
    ear = Ear(fail_after_four)
    one.engine.submit(Generate(ear, NewSession(key(), 5), symbols(1), generation()))
    assert ear.problem().code == "not_ready"
    head = store.head(key())
    assert 5 <= head.position < 11 and head.position == len(tokens(ear)) + 1
    assert head.generation is not None and head.generation.finish_reason is None


def test_a_lost_race_is_told_and_the_session_reloads(rig: MakeRig) -> None:
    """Two engines on one store are two replicas."""
    store = MemoryStore()
    mine, other = rig(store=store), rig(store=store)
    feed(mine, many(5), new=True).end()
    stale = known(mine)
    feed(other, many(3, 1)).end()
    ear = Ear()
    mine.engine.submit(Feed(ear, stale, many(2, 2), True))
    lost = ear.end()
    assert isinstance(lost, LostRace) and lost.head is not None and lost.head.position == 8
    assert store.head(key()).position == 8
    assert feed(mine, many(2, 2)).end().head.position == 10
    assert row_of(mine) == expected_row(mine, np.concatenate([many(5), many(3, 1), many(2, 2)]))


def test_a_replica_that_was_overtaken_reloads_by_the_head_alone(rig: MakeRig) -> None:
    store = MemoryStore()
    mine, other = rig(store=store), rig(store=store)
    feed(mine, many(5), new=True).end()
    feed(other, many(3, 1)).end()
    assert feed(mine, many(2, 2)).end().head.position == 10
    assert row_of(mine) == expected_row(mine, np.concatenate([many(5), many(3, 1), many(2, 2)]))


class Racing(MemoryStore):
    """Another replica is faster with one session."""

    faster_with = "s3"

    def commit(self, commits: Sequence[Commit], snapshots: Sequence[Snapshot] = ()) -> list[Any]:
        results = iter(super().commit([c for c in commits if c.head.id != self.faster_with]))
        return [Conflict(None) if c.head.id == self.faster_with else next(results) for c in commits]


def test_a_lost_race_harms_no_neighbour(rig: MakeRig) -> None:
    one = rig(store=Racing(), start=False)
    ears = [feed(one, symbols(1, 2), f"s{i}", new=True) for i in range(6)]
    one.start()
    assert [type(ear.end()) for ear in ears] == [Done, Done, Done, LostRace, Done, Done]


# ---------------------------------------------------------------------- queues


def test_a_full_queue_refuses_at_the_door_and_opens_again(rig: MakeRig) -> None:
    one = rig(start=False, max_queue_steps=100)
    waiting = [feed(one, many(50), f"s{i}", new=True) for i in range(2)]
    with pytest.raises(Problem) as refused:
        feed(one, symbols(1), "late", new=True)
    assert refused.value.code == "overloaded"
    one.start()
    assert all(isinstance(ear.end(), Done) for ear in waiting)
    assert isinstance(feed(one, many(100), "late", new=True).end(), Done)


def test_work_submitted_together_is_taken_together_or_not_at_all(rig: MakeRig) -> None:
    one = rig(start=False, max_queue_steps=100)
    ears = [Ear() for _ in range(4)]
    works = [Feed(ear, NewSession(key(f"s{i}"), 1), many(30), True) for i, ear in enumerate(ears)]
    with pytest.raises(Problem):
        one.engine.submit(*works)
    one.engine.submit(*works[:3])
    one.start()
    assert all(isinstance(ear.end(), Done) for ear in ears[:3])
    assert ears[3].events == [] and one.store.head(key("s3")) is None


def test_failed_work_makes_room_in_the_queue(rig: MakeRig) -> None:
    one = rig(wrap=Poisoned, max_queue_steps=100)
    for _ in range(5):
        feed(one, np.full(90, POISON, "<i4"), new=True).problem()
    assert isinstance(feed(one, many(90), new=True).end(), Done)


def test_work_whose_client_left_is_dropped(rig: MakeRig) -> None:
    runners: list[CountingRunner] = []
    one = rig(start=False, wrap=lambda runner: runners.append(CountingRunner(runner)) or runners[0])
    ear = Ear()
    work = Feed(ear, NewSession(key(), 1), many(500), True)
    one.engine.submit(work)
    work.stop = "suspend"
    one.start()
    assert isinstance(ear.end(), Failed)
    assert one.store.head(key()) is None and runners[0].calls == []


def test_a_generate_that_nobody_reads_is_suspended_and_resumed_to_the_same_text(rig: MakeRig) -> None:
    one = rig()
    whole = Ear()
    one.engine.submit(Generate(whole, NewSession(key("whole"), 5), symbols(1), generation(max_tokens=60)))
    whole.end()

    first = Ear(lambda event: stop_at(event, 20))
    work: Work = Generate(first, NewSession(key(), 5), symbols(1), generation(max_tokens=60))

    def stop_at(event: Event, position: int) -> None:
        if isinstance(event, Token) and event.position == position:
            work.stop = "suspend"

    one.engine.submit(work)
    assert isinstance(first.end(), Suspended)
    head = one.store.head(key())
    second = Ear()
    one.engine.submit(Generate(second, head, None, head.generation, resumed=True))
    assert isinstance(second.end(), Done)
    assert tokens(first) + tokens(second) == tokens(whole) and 20 <= len(tokens(first)) < len(tokens(whole)) == 60


def tokens(ear: Ear) -> list[tuple[int, int, str, float]]:
    return [(e.position, e.token, e.text, e.logprob) for e in ear.events if isinstance(e, Token)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_generate_that_stops_within_a_roll_out_goes_on_from_its_exact_end(rig: MakeRig, temperature: float) -> None:
    one = rig()
    whole = Ear()
    start = generation(max_tokens=60, temperature=temperature)
    one.engine.submit(Generate(whole, NewSession(key("whole"), 5), symbols(1), start))
    text = "".join(text for _, _, text, _ in tokens(whole)) if whole.end() else ""
    stopped = Ear()
    stop = generation(max_tokens=60, temperature=temperature, stop=(text[20:24],))
    one.engine.submit(Generate(stopped, NewSession(key(), 5), symbols(1), stop))
    end = stopped.end()
    assert end.generation.finish_reason == "stop" and len(tokens(stopped)) == text.find(text[20:24]) + 4
    assert row_of(one) == expected_row(one, entries_of(one))
    feed(one, symbols(1, 2)).end()
    assert row_of(one) == expected_row(one, entries_of(one))


def entries_of(rig: Rig, name: str = "s") -> Array:
    """The whole log."""
    head = known(rig, name)
    data = b"".join(segment.data for segment in rig.store.log(head.branch, 0, head.position))
    return rig.engine.codec.entries(data)


@pytest.mark.parametrize("prompt", [None, (1,), (1, 2, 3)])
@pytest.mark.parametrize("max_tokens", [1, 2, 33])
def test_a_generate_may_begin_on_a_fed_session(rig: MakeRig, prompt: tuple[int, ...] | None, max_tokens: int) -> None:
    one = rig()
    ears = []
    for fed in ((4, 5, 6, *(prompt or ())), (4, 5, 6)):
        name = str(len(ears))
        feed(one, symbols(*fed), name, new=True).end()
        given = symbols(*prompt) if ears and prompt else None
        ears.append(Ear())
        one.engine.submit(Generate(ears[-1], known(one, name), given, generation(max_tokens=max_tokens)))
        assert ears[-1].end().generation.finish_reason == "length"
        assert row_of(one, name) == expected_row(one, entries_of(one, name))
    assert tokens(ears[0]) == tokens(ears[1]) and len(tokens(ears[0])) == max_tokens


def test_the_number_of_tokens_a_tick_changes_nothing(rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> list[list[tuple[int, int, str, float]]]:
        one = rig(start=False)
        ears = [Ear() for _ in range(7)]
        for i, ear in enumerate(ears):
            how = generation(max_tokens=11 * (i + 1), temperature=0.5 + i % 3, top_k=i, seed=i)
            one.engine.submit(Generate(ear, NewSession(key(str(i)), i), many(1 + 5 * i), how))
        one.start()
        return [tokens(ear) for ear in ears if ear.end()]

    rolled = told()
    monkeypatch.setattr(scheduler, "TICK_S", {True: 0.0, False: 0.0})
    assert told() == rolled


class Disturbed(CountingRunner):
    """Notes how many steps each roll-out takes; in the first one something happens at a step."""

    at = 3
    happens: Callable[[], object] = staticmethod(lambda: None)

    def roll(
        self, entries: Array, rows: Sequence[Row], steps: Iterable[int], draw: Draw, ahead: bool = False
    ) -> Folded:
        drawn: list[int] = []

        def noted(step: int, outputs: Output) -> Array:
            drawn.append(step)
            if step == self.at and not self.calls:
                self.happens()
            return draw(step, outputs)

        folded = self._runner.roll(entries, rows, steps, noted, ahead)
        self.calls.append((len(rows), len(drawn)))
        return folded


@pytest.mark.parametrize("streams", [1, 40])
def test_a_roll_out_ends_early_for_those_who_come(rig: MakeRig, monkeypatch: pytest.MonkeyPatch, streams: int) -> None:
    """A feed that comes within a roll-out is answered after that step, and the tokens stay the same."""
    monkeypatch.setattr(scheduler, "TICK_S", {True: 10.0, False: 10.0})
    monkeypatch.setattr("service.engine.HURRY_S", 0.0)

    def told(disturbed: bool) -> tuple[list[list[tuple[int, int, str, float]]], list[tuple[int, int]]]:
        runners: list[Disturbed] = []
        one = rig(start=False, wrap=lambda runner: runners.append(Disturbed(runner)) or runners[0])
        ears = [Ear() for _ in range(streams)]
        if disturbed:
            fed = Ear()

            def come() -> None:
                feed(one, symbols(1), "other", new=True, ear=fed)
                time.sleep(1.0)  # longer than the streams had to wait for their tick

            runners[0].happens = come
        for i, ear in enumerate(ears):
            one.engine.submit(Generate(ear, NewSession(key(str(i)), i), symbols(i % 12), generation(max_tokens=60)))
        one.start()
        if disturbed:
            assert fed.end().head.position == 1
        return [tokens(ear) for ear in ears if ear.end()], runners[0].calls

    alone, steps = told(disturbed=False)
    beside, hurried = told(disturbed=True)
    assert alone == beside
    assert steps[0] == (streams, 32) and hurried[0] == (streams, 4)


class PoisonedLogits(CountingRunner):
    """Raises, or gives NaN, when a roll-out folds the poison."""

    raises = False

    def roll(
        self, entries: Array, rows: Sequence[Row], steps: Iterable[int], draw: Draw, ahead: bool = False
    ) -> Folded:
        if (entries == POISON).any() and self.raises:
            raise RuntimeError("poison")
        folded = super().roll(entries, rows, steps, draw, ahead)
        return Folded(folded.outputs, folded.rows, finite=not (entries == POISON).any())


@pytest.mark.parametrize(("raises", "code"), [(True, "internal"), (False, "numeric_fault")])
def test_a_roll_out_that_fails_harms_that_session_alone(
    rig: MakeRig, monkeypatch: pytest.MonkeyPatch, raises: bool, code: str
) -> None:
    monkeypatch.setattr(PoisonedLogits, "raises", raises)
    one, alone = rig(start=False, wrap=PoisonedLogits), Ear()
    how = generation(max_tokens=1)
    ears = [Ear() for _ in range(6)]
    for i, ear in enumerate(ears):
        one.engine.submit(Generate(ear, NewSession(key(f"s{i}"), 1), symbols(POISON if i == 3 else 2), how))
    one.start()
    assert ears[3].problem().code == code and one.store.head(key("s3")) is None
    one.engine.submit(Generate(alone, NewSession(key("alone"), 1), symbols(2), how))
    assert alone.end() and all(tokens(ear) == tokens(alone) for i, ear in enumerate(ears) if i != 3)


def test_stopping_finishes_what_is_queued(rig: MakeRig) -> None:
    one = rig(start=False)
    ears = [feed(one, many(100), f"s{i}", new=True) for i in range(5)]
    one.start()
    one.engine.stop()
    assert all(isinstance(ear.end(), Done) for ear in ears)
    with pytest.raises(Problem):
        feed(one, symbols(1), "late", new=True)


# ---------------------------------------------------------------------- waking


@pytest.mark.parametrize("count", [1, 31, 255, 256, 257, 300, 1000])
def test_a_session_wakes_with_the_very_state_it_slept_with(count: int, rig: MakeRig) -> None:
    store = MemoryStore()
    first, second = rig(store=store), rig(store=store)
    feed(first, many(count), new=True).end()
    assert row_of(second) == row_of(first) == expected_row(first, many(count))
    after = [feed(one, many(3, 1), name).end() for one, name in ((second, "s"),)]
    assert after[0].head.position == count + 3
    assert row_of(second) == expected_row(first, np.append(many(count), many(3, 1)))


def test_a_woken_session_predicts_what_it_would_have(rig: MakeRig) -> None:
    store = MemoryStore()
    first, second = rig(store=store), rig(store=store)
    feed(first, many(77), "a", new=True).end()
    feed(first, many(77), "b", new=True).end()
    one, two = feed(first, symbols(4), "a").end(), feed(second, symbols(4), "b").end()
    assert one.outputs["logits"].tobytes() == two.outputs["logits"].tobytes()
    assert one.before["logits"].tobytes() == two.before["logits"].tobytes()


def test_waking_folds_the_tail_after_the_newest_snapshot(rig: MakeRig) -> None:
    store = MemoryStore()
    first = rig(store=store)
    feed(first, many(40), new=True).end()
    for i in range(20):
        feed(first, many(100, i)).end()
    runners: list[CountingRunner] = []
    second = rig(store=store, wrap=lambda runner: runners.append(CountingRunner(runner)) or runners[0])
    assert row_of(second) == row_of(first)
    assert 1 <= sum(steps for _, steps in runners[0].calls) <= 256 + 100 + 32


def test_an_evicted_session_comes_back_as_it_was(rig: MakeRig) -> None:
    one = rig(max_resident=2)
    for step in range(6):
        for name in "abcde":
            feed(one, many(7, step), name, new=step == 0).end()
    expected = expected_row(one, np.concatenate([many(7, step) for step in range(6)]))
    assert all(row_of(one, name) == expected for name in "abcde")


class SlowToRead(MemoryStore):
    """Finds a snapshot when somebody has been answered, or when he has waited long enough."""

    def __init__(self) -> None:
        super().__init__()
        self.answered = threading.Event()
        self.in_time = False

    def snapshot(self, branch: str, below: int, graph: str) -> Snapshot | None:
        self.in_time = self.answered.wait(WAIT_S / 4)
        return super().snapshot(branch, below, graph)


class Visited(CountingRunner):
    """Something happens while the first call runs."""

    happens: Callable[[], object] = staticmethod(lambda: None)

    def run(self, entries: Array, rows: Sequence[Row], wanted: Sequence[int] | None = None) -> Folded:
        if not self.calls:
            self.happens()
        return super().run(entries, rows)


def test_an_answer_does_not_wait_for_a_session_that_wakes(rig: MakeRig) -> None:
    store, ears, runners = SlowToRead(), list[Ear](), list[Visited]()
    feed(rig(store=store), many(5), "asleep", new=True).end()
    one = rig(store=store, start=False, wrap=lambda runner: runners.append(Visited(runner)) or runners[0])
    runners[0].happens = lambda: ears.append(feed(one, many(3), "asleep"))
    ears.append(feed(one, many(4), new=True, ear=Ear(lambda _: store.answered.set())))
    one.start()
    assert ears[0].end().head.position == 4 and ears[1].end().head.position == 8
    assert store.in_time


class Damaged(MemoryStore):
    """Spoils what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.bad_snapshot = b""
        self.lost = 0

    def snapshot(self, branch: str, below: int, graph: str) -> Snapshot | None:
        found = super().snapshot(branch, below, graph)
        if found is None or not self.bad_snapshot or below <= 300:
            return found
        return msgspec.structs.replace(found, data=self.bad_snapshot)

    def log(self, branch: str, after: int, to: int) -> list[Any]:
        return list(super().log(branch, after, to - self.lost))


@pytest.mark.parametrize("data", [b"garbage", b"\x00" * 100])
def test_an_unreadable_snapshot_is_passed_over(data: bytes, rig: MakeRig) -> None:
    store = Damaged()
    first, second = rig(store=store), rig(store=store)
    feed(first, many(300), new=True).end()
    feed(first, many(300, 1)).end()
    store.bad_snapshot = data
    assert row_of(second) == expected_row(first, np.append(many(300), many(300, 1)))


def test_a_log_with_a_hole_is_not_served(rig: MakeRig) -> None:
    store = Damaged()
    first, second = rig(store=store), rig(store=store)
    feed(first, many(20), new=True).end()
    store.lost = 1
    assert feed(second, symbols(1)).problem().code == "internal"
    assert store.head(key()).position == 20


def test_a_store_that_can_not_be_read_is_not_ready(rig: MakeRig) -> None:
    class Unreadable(MemoryStore):
        def log(self, branch: str, after: int, to: int) -> list[Any]:
            raise StoreError("disk I/O error")

    store = Unreadable()
    feed(rig(store=store), symbols(1), new=True).end()
    assert feed(rig(store=store), symbols(1)).problem().code == "not_ready"


def test_an_engine_that_has_stopped_is_let_go_of_with_its_graph(models: Path) -> None:
    """At once: Python looks for cycles once in a long while only, and graphs are large."""
    runner = Runner(newest(models, "tiny-letters"), 1)
    one = engine.Engine(runner, MemoryStore(), Inbox(), 8, 1000, 10)
    one.start()
    heard = threading.Event()
    one.submit(Feed(lambda _: heard.set(), NewSession(key(), 1), symbols(1), True))
    assert heard.wait(WAIT_S)
    gc.disable()
    try:
        one.stop()
        left = weakref.ref(one), weakref.ref(runner)
        del one, runner
        assert [ref() for ref in left] == [None, None]
    finally:
        gc.enable()


def test_a_listener_hears_nothing_after_the_end(rig: MakeRig) -> None:
    one = rig()
    ears = [feed(one, many(60, i), f"s{i}", new=True) for i in range(10)]
    for ear in ears:
        ear.end()
    one.engine.stop()
    assert [len(ear.events) for ear in ears] == [1] * 10
