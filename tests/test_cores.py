"""Which cores threads run on while large folds are begun ahead, with real threads."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny import newest

from service import cores, state
from service.cores import Cores
from service.runner import Runner

pytestmark = pytest.mark.skipif(len(cores.ALL) < 2, reason="one core can not be shared out")


@pytest.fixture(autouse=True)
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[frozenset[int]]:
    """The first two cores, as if the machine had no others."""
    every, both = cores.ALL, frozenset(sorted(cores.ALL)[:2])
    monkeypatch.setattr(cores, "ALL", both)
    yield both
    os.sched_setaffinity(0, every)


class Graph:
    """A model's thread beside, and its cores."""

    def __init__(self, threads: int = 1) -> None:
        self.cores = Cores(threads)
        self.pool = ThreadPoolExecutor(1, initializer=self.cores.enter)
        self.pool.submit(int).result()

    def where(self) -> set[int]:
        return self.pool.submit(os.sched_getaffinity, 0).result()


def test_a_graph_that_runs_beside_has_a_core_of_its_own(two: frozenset[int]) -> None:
    graph = Graph()
    graph.cores.begin()
    own = graph.where()
    assert len(own) == 1
    assert os.sched_getaffinity(0) == two - own
    graph.cores.end()
    assert graph.where() == os.sched_getaffinity(0) == two


def test_the_main_thread_keeps_away_too(two: frozenset[int]) -> None:
    graph, engine = Graph(), ThreadPoolExecutor(1)
    engine.submit(graph.cores.begin).result()
    others = two - graph.where()
    assert engine.submit(os.sched_getaffinity, 0).result() == os.sched_getaffinity(0) == others
    engine.submit(graph.cores.end).result()
    assert os.sched_getaffinity(0) == two


def test_of_several_models_the_first_has_it_until_it_is_done(two: frozenset[int]) -> None:
    first, second = Graph(), Graph()
    first.cores.begin()
    second.cores.begin()
    assert (len(first.where()), second.where()) == (1, two)
    second.cores.end()
    first.cores.end()
    second.cores.begin()
    assert (first.where(), len(second.where())) == (two, 1)
    assert os.sched_getaffinity(0) == two - second.where()
    second.cores.end()
    assert second.where() == os.sched_getaffinity(0) == two


@pytest.mark.parametrize(("threads", "count"), [(2, 2), (1, 1)])
def test_nothing_is_held_where_a_graph_needs_all_cores(
    threads: int, count: int, two: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "ALL", frozenset(sorted(two)[:count]))
    before, graph = os.sched_getaffinity(0), Graph(threads)
    graph.cores.begin()
    assert os.sched_getaffinity(0) == before
    graph.cores.end()


def test_a_thread_that_began_while_the_main_one_was_held_can_be_free(two: frozenset[int]) -> None:
    graph = Graph()
    graph.cores.begin()
    assert os.sched_getaffinity(0) != two
    found: list[set[int]] = []

    def look() -> None:
        cores.free()
        found.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [two]
    graph.cores.end()


def test_a_runner_gives_the_core_back_when_nothing_is_under_way(models: Path, two: frozenset[int]) -> None:
    runner = Runner(newest(models, "tiny-letters"), 1)
    rows = [state.initial_row(runner.manifest.states)] * 4
    entries = np.zeros((1, 4), "<i4")
    first = runner.begin(entries, rows)
    runner.end(first)  # its thread is known from now on
    begun = [runner.begin(entries, rows) for _ in range(2)]
    together = runner.end(begun[0])
    assert len(os.sched_getaffinity(0)) == 1
    runner.end(begun[1])
    assert os.sched_getaffinity(0) == two
    alone = runner.run(entries, rows)
    assert all(np.array_equal(together.outputs[name], alone.outputs[name]) for name in alone.outputs)
    runner.close()


def test_a_runner_gives_the_core_back_for_what_was_taken_back(models: Path, two: frozenset[int]) -> None:
    runner = Runner(newest(models, "tiny-letters"), 1)
    rows = [state.initial_row(runner.manifest.states)] * 4
    entries = np.zeros((1, 4), "<i4")
    runner.end(runner.begin(entries, rows))
    gate = threading.Event()
    busy = runner._beside.submit(gate.wait)
    begun = runner.begin(entries, rows)
    assert runner.cancel(begun) and os.sched_getaffinity(0) == two
    gate.set()
    busy.result()
    done = runner.begin(entries, rows)
    done.result()
    assert not runner.cancel(done)
    runner.end(done)
    runner.close()
