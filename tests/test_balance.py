"""Whether steps wait for the graph or for Python."""

import pytest

from service import balance
from service.balance import TICKS, Balance


class Clock:
    """The process' processor time."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(balance, "process_time", made)
    return made


def ticks(found: Balance, clock: Clock, graph_s: float, rest_s: float, rows: int = 32, waited_s: float = 0.0) -> None:
    """As many as are looked at together; all but one have also waited."""
    for tick in range(TICKS):
        clock.now += graph_s + rest_s
        found.took(graph_s + (waited_s if tick else 0.0), rows)


def test_steps_wait_for_what_computes_most(clock: Clock) -> None:
    found = Balance(True)
    assert not found.on_graph
    ticks(found, clock, graph_s=0.003, rest_s=0.002)
    assert found.on_graph and not found.hardly_python
    for _ in range(3):
        ticks(found, clock, graph_s=0.003, rest_s=0.001)
    assert found.on_graph and found.hardly_python
    for _ in range(6):
        ticks(found, clock, graph_s=0.001, rest_s=0.002)
    assert not found.on_graph and not found.hardly_python


def test_one_odd_moment_is_not_enough(clock: Clock) -> None:
    found = Balance(True)
    for _ in range(4):
        ticks(found, clock, graph_s=0.003, rest_s=0.002)
    ticks(found, clock, graph_s=0.003, rest_s=0.0035)
    assert found.on_graph


def test_what_a_call_waited_is_not_the_graphs(clock: Clock) -> None:
    found = Balance(True)
    ticks(found, clock, graph_s=0.001, rest_s=0.002, waited_s=0.005)
    assert not found.on_graph


def test_without_a_core_to_spare_they_never_wait_for_the_graph_alone(clock: Clock) -> None:
    found = Balance(False)
    ticks(found, clock, graph_s=0.003, rest_s=0.0)
    assert not found.on_graph


def test_where_both_compute_alike_it_stays_as_it_is(clock: Clock) -> None:
    found = Balance(True)
    for _ in range(4):
        ticks(found, clock, graph_s=0.003, rest_s=0.0032)
    assert not found.on_graph
    for _ in range(4):
        ticks(found, clock, graph_s=0.003, rest_s=0.002)
    assert found.on_graph
    for _ in range(40):
        ticks(found, clock, graph_s=0.003, rest_s=0.0032)
    assert found.on_graph
    for _ in range(40):
        ticks(found, clock, graph_s=0.003, rest_s=0.0036)
    assert not found.on_graph
