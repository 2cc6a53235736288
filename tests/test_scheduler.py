"""Fair batches of equal length."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduler import ALONE, MAX_DRAWN, MAX_NUMBERS, MAX_STEPS, TICK_S, Scheduler


@dataclass(eq=False)
class Row:
    remaining: int
    last_tick: int = 0
    draws: bool = False
    width: int = 1

    @property
    def steps(self) -> int:
        return self.remaining


def run(scheduler: Scheduler[Row], rows: list[Row], endless: list[Row], ticks: int) -> int:
    """Tick as the engine does; returns the greatest number of ticks an endless row had to wait."""
    for row in [*rows, *endless]:
        scheduler.add(row)
    longest = 0
    for tick in range(1, ticks + 1):
        batch = scheduler.next()
        assert batch is not None
        scheduler.pace.took(batch.draws, len(batch.rows), batch.steps, 0.0001)
        for row in batch.rows:
            if row in endless:
                longest = max(longest, tick - row.last_tick)
                row.last_tick = tick
                scheduler.add(row)
                continue
            row.remaining -= batch.steps
            if row.remaining:
                scheduler.add(row)
    return longest


def test_an_empty_scheduler_has_no_batch() -> None:
    assert Scheduler[Row](4).next() is None


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40), max_batch=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_every_row_is_folded_to_its_end(lengths: list[int], max_batch: int) -> None:
    scheduler = Scheduler[Row](max_batch)
    rows = [Row(length) for length in lengths]
    for row in rows:
        scheduler.add(row)
    ticks = 0
    while (batch := scheduler.next()) is not None:
        ticks += 1
        assert 1 <= len(batch.rows) <= max_batch and len(set(map(id, batch.rows))) == len(batch.rows)
        assert batch.steps <= MAX_STEPS
        for row in batch.rows:
            assert row.remaining >= batch.steps
            row.remaining -= batch.steps
            if row.remaining:
                scheduler.add(row)
    assert all(row.remaining == 0 for row in rows) and len(scheduler) == 0


@pytest.mark.parametrize("draws", [True, False])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("step_s", [0.0001, 0.00101, 0.0051, 0.02, 10.0])
def test_a_tick_takes_as_many_steps_as_fit(draws: bool, alone: bool, step_s: float) -> None:
    scheduler = Scheduler[Row](8)
    rows = [Row(1000, draws=draws) for _ in range(8)]
    for _ in range(30):
        for row in rows:
            scheduler.add(row)
        if not alone:
            scheduler.add(Row(1, draws=not draws))
        batch = scheduler.next()
        assert batch is not None and batch.draws == draws
        scheduler.pace.took(draws, len(batch.rows), batch.steps, step_s * batch.steps)
        while scheduler.next() is not None:
            pass
    most = MAX_DRAWN if draws else MAX_STEPS
    tick_s = TICK_S[draws] * (ALONE if alone and draws else 1)
    assert batch.steps == most or batch.steps == 1 or batch.steps * step_s <= tick_s < (batch.steps + 1.5) * step_s


def test_the_outputs_of_a_tick_are_bounded() -> None:
    scheduler = Scheduler[Row](64, numbers=50_000)
    scheduler.pace.took(False, 64, 1, 1e-6)
    for _ in range(64):
        scheduler.add(Row(10_000))
    batch = scheduler.next()
    assert batch is not None and batch.steps >= 1 and batch.steps * 64 * 50_000 <= MAX_NUMBERS


def test_streams_with_much_to_go_run_together() -> None:
    scheduler = Scheduler[Row](64)
    for to_go in (MAX_DRAWN, 100, 1000, 5000):
        scheduler.add(Row(to_go, draws=True))
    batch = scheduler.next()
    assert batch is not None and len(batch.rows) == 4


def test_rows_that_draw_and_rows_that_know_their_entries_run_apart() -> None:
    scheduler = Scheduler[Row](8)
    for i in range(6):
        scheduler.add(Row(4, draws=i % 2 == 0))
    batches = [scheduler.next(), scheduler.next()]
    assert [(batch.draws, len(batch.rows), batch.steps) for batch in batches if batch] == [(True, 3, 4), (False, 3, 4)]


def test_rows_of_equal_length_share_a_batch() -> None:
    scheduler = Scheduler[Row](64)
    for _ in range(50):
        scheduler.add(Row(1))
    batch = scheduler.next()
    assert batch is not None and len(batch.rows) == 50 and batch.steps == 1


def test_a_batch_that_was_not_run_yet_is_joined_by_rows_of_its_kind() -> None:
    scheduler = Scheduler[Row](8)
    for _ in range(3):
        scheduler.add(Row(1, width=2))
    batch = scheduler.next()
    assert batch is not None and batch.width == 6 and not scheduler.joins(batch)
    for other in (Row(2), Row(1, draws=True), Row(1, width=3)):  # the last is too wide
        scheduler.add(other)
        assert not scheduler.joins(batch)
    assert scheduler.joined(batch) == batch
    beside = Scheduler[Row](8)
    beside.add(Row(1))
    first, newcomers = beside.next(), [Row(1), Row(1)]
    for row in newcomers:
        beside.add(row)
    assert first is not None and beside.joins(first)
    joined = beside.joined(first)
    assert joined.rows == [*first.rows, *newcomers] and joined.width == 3 and beside.waiting == 0


def test_the_row_that_has_waited_longest_goes_first() -> None:
    scheduler = Scheduler[Row](1)
    rows = [Row(length) for length in (5, 1, 40, 1, 5)]
    for row in rows:
        scheduler.add(row)
    order = [batch.rows[0] for _ in rows if (batch := scheduler.next()) is not None]
    assert order == rows


def test_who_came_during_a_tick_goes_before_the_rows_of_that_tick() -> None:
    scheduler = Scheduler[Row](8)
    stream, newcomer = Row(9, draws=True), Row(1)
    scheduler.add(stream, since=2.0)
    scheduler.add(newcomer, since=1.0)
    order = [batch.rows[0] for _ in range(2) if (batch := scheduler.next()) is not None]
    assert order == [newcomer, stream]


def test_of_those_who_came_during_a_tick_one_batch_goes_before_its_rows() -> None:
    scheduler = Scheduler[Row](1)
    stream, newcomers = Row(9, draws=True), [Row(1) for _ in range(3)]
    scheduler.add(stream, since=2.0)
    for row in newcomers:
        scheduler.add(row, since=1.0)
    order = [batch.rows[0] for _ in range(4) if (batch := scheduler.next()) is not None]
    assert order == [newcomers[0], stream, *newcomers[1:]]


def test_a_long_feed_among_streams_makes_nobody_wait() -> None:
    """100,000 steps beside 20 streams: a stream is never more than one other batch away from its turn."""
    streams = [Row(1) for _ in range(20)]
    feed = Row(100_000)
    assert run(Scheduler[Row](64), [feed], streams, 2 * (100_000 // MAX_STEPS + 10)) <= 2
    assert feed.remaining == 0


def test_many_long_feeds_among_streams_make_nobody_wait_long() -> None:
    """More feeds than a batch holds: a stream waits for what came before it, once; there are six chunk lengths."""
    rng = random.Random(1)
    feeds = [Row(rng.randint(500, 5000)) for _ in range(40)]
    streams = [Row(1) for _ in range(10)]
    assert run(Scheduler[Row](8), feeds, streams, 300) <= 6 + 40 // 8


@pytest.mark.parametrize("streams", [1, 500])
def test_streams_do_not_starve_a_feed(streams: int) -> None:
    feed = Row(64 * MAX_STEPS)
    run(Scheduler[Row](64), [feed], [Row(1) for _ in range(streams)], 64 * (streams // 64 + 3))
    assert feed.remaining == 0
