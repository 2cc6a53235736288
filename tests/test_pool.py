"""What is kept in a pool is what comes out of it, whoever comes and goes in between."""

import itertools
import mmap
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_state import SPECS, random_row, same

from service import pool, state
from service.bundle import TensorSpec
from service.pool import Pool, Slot

OUTPUTS = [TensorSpec(name="logits", dtype="float32", shape=("T", "B", 5))]


def keep(kept: Pool, seeds: list[int]) -> list[Slot]:
    outputs = np.array([[seed] * 5 for seed in seeds], "<f4")
    found = kept.keep(state.stack(SPECS, [random_row(seed) for seed in seeds]), {"logits": outputs}, len(seeds))
    assert found is not None
    return found


@given(
    batches=st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=8, unique=True), min_size=1, max_size=4),
    order=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=30),
    first=st.sampled_from([1, 400, 5000]),
    recent=st.sampled_from([(1, 10**6), (3, 10**6), (8, 700), (8, 10**6)]),
)
@settings(max_examples=150, deadline=None)
def test_sessions_that_come_and_go_keep_what_is_theirs(
    batches: list[list[int]], order: list[tuple[int, bool]], first: int, recent: tuple[int, int]
) -> None:
    """Each round steps one of a few batches, as an engine does: some are there again as they were, others mixed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pool, "RECENT", recent[0])
        patched.setattr(pool, "RECENT_BYTES", recent[1])
        kept, held = Pool(SPECS, OUTPUTS, first), dict[int, tuple[int, Slot]]()
        for number, (chosen, looked_at) in enumerate(order):
            sessions = batches[chosen % len(batches)]
            seeds = [100 * number + session for session in sessions]
            check(kept, [held[session] for session in sessions if session in held])
            for session, seed, slot in zip(sessions, seeds, keep(kept, seeds), strict=True):
                held[session] = (seed, slot)
            if looked_at:
                check(kept, list(held.values()))
                for seed, slot in held.values():
                    assert same(slot, random_row(seed)) and same(slot[1:], random_row(seed)[1:])
                    assert slot.output["logits"].tolist() == [seed] * 5
        check(kept, list(held.values()))
        numbers = [slot.number for _, slot in held.values()]
        assert sorted([*numbers, *kept.free]) == list(range(len(numbers) + len(kept.free)))


def check(kept: Pool, held: list[tuple[int, Slot]]) -> None:
    """What is gathered of some slots is theirs."""
    if not held:
        return
    slots = [slot for _, slot in held]
    batch, said = state.unstack(SPECS, kept.gather(slots)), kept.output("logits", slots)
    for (seed, _), row, output in zip(held, batch, said, strict=True):
        assert same(row, random_row(seed)) and output.tolist() == [seed] * 5


@given(where=st.lists(st.sampled_from(["here", "elsewhere", "own"]), min_size=1, max_size=9))
@settings(max_examples=40, deadline=None)
def test_rows_of_every_kind_make_one_batch(where: list[str]) -> None:
    here, elsewhere = Pool(SPECS, OUTPUTS), Pool(SPECS, OUTPUTS)
    rows: list[state.Row] = [
        random_row(i) if kind == "own" else keep(here if kind == "here" else elsewhere, [i])[0]
        for i, kind in enumerate(where)
    ]
    batch = state.unstack(SPECS, pool.stack(SPECS, rows))
    assert all(same(row, random_row(i)) for i, row in enumerate(batch))


def test_outputs_that_are_not_as_the_manifest_says_are_not_kept() -> None:
    kept = Pool(SPECS, OUTPUTS)
    states = state.stack(SPECS, [random_row(1)])
    for wrong in (np.zeros((1, 6), "<f4"), np.zeros((1, 5), "<f8"), np.zeros((1, 5, 1), "<f4")):
        assert kept.keep(states, {"logits": wrong}, 1) is None


def test_memory_that_can_not_be_had_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, asked = Pool(SPECS, OUTPUTS, 1), itertools.count()

    def scarce(*given: Any, **more: Any) -> mmap.mmap:  # noqa: ANN401 (mmap's own)
        if next(asked) % 7 == 2:
            raise OSError("no memory")
        return mmap.mmap(*given, **more)

    monkeypatch.setattr(pool, "mmap", scarce)
    held: list[tuple[int, Slot]] = []
    for i in range(30):
        seeds = [10 * i + j for j in range(3)]
        with suppress(OSError):
            held += zip(seeds, keep(kept, seeds), strict=True)
    assert 0 < len(held) < 90 and all(same(slot, random_row(seed)) for seed, slot in held)
    numbers = [slot.number for _, slot in held]
    assert sorted([*numbers, *kept.free]) == list(range(len(numbers) + len(kept.free)))


def test_where_little_memory_is_to_be_had_at_once_the_first_block_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def scarce(fd: int, length: int, **more: Any) -> mmap.mmap:  # noqa: ANN401 (mmap's own)
        asked.append(length)
        if length > pool.LEAST_BYTES:
            raise OSError("no memory")
        return mmap.mmap(fd, length, **more)

    monkeypatch.setattr(pool, "mmap", scarce)
    kept = Pool(SPECS, OUTPUTS)
    slots = keep(kept, [1, 2, 3])
    assert asked[0] > pool.LEAST_BYTES and sum(asked[-len(SPECS) - 1 :]) > pool.LEAST_BYTES / 2
    assert all(same(slot, random_row(seed)) for slot, seed in zip(slots, [1, 2, 3], strict=True))


def come_and_go(kept: Pool, start: threading.Barrier, thread: int) -> list[tuple[int, Slot]]:
    """Take from the pool and let go of every other batch; returns the others with their seeds."""
    found: list[tuple[int, Slot]] = []
    start.wait()
    for i in range(6):
        seeds = [1000 * thread + 10 * i + j for j in range(4)]
        slots = keep(kept, seeds)
        check(kept, list(zip(seeds, slots, strict=True)))
        if i % 2:
            found.extend(zip(seeds, slots, strict=True))
    return found


def test_slots_may_be_taken_and_let_go_of_in_any_thread() -> None:
    """Pools that grow from one slot on, with three threads at each."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(40):
            kept = Pool(SPECS, OUTPUTS, 1)
            with ThreadPoolExecutor(3) as threads:
                told = list(threads.map(partial(come_and_go, kept, threading.Barrier(3)), range(3)))
            found = [one for of in told for one in of]
            assert len(found) == 36 and all(same(slot, random_row(seed)) for seed, slot in found)
            numbers = [slot.number for _, slot in found]
            assert sorted([*numbers, *kept.free]) == list(range(len(numbers) + len(kept.free)))
    finally:
        sys.setswitchinterval(before)
