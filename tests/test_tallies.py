"""Counters and histograms that one thread writes say what prometheus-client's own would."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from service.tallies import Counts, Tallies

BUCKETS = (0.125, 0.5, 1, 8)
WRITERS = st.tuples(st.sampled_from("ab"), st.sampled_from("12"))
VALUES = st.lists(st.tuples(WRITERS, st.sampled_from((0, 0.125, 0.25, 0.5, 1, 7, 8, 8.5, 100))))


def lines(registry: CollectorRegistry) -> set[str]:
    return set(generate_latest(registry).decode().splitlines())


@given(VALUES)
def test_a_histogram_sums_those_of_all_writers(written: list[tuple[tuple[str, str], float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tallies = Tallies("seconds", "how long", ("model",), ours, BUCKETS)
    known = Histogram("seconds", "how long", ("model",), registry=theirs, buckets=BUCKETS)
    for writer, value in written:
        tallies.of(*writer).observe(value)
        known.labels(writer[0]).observe(value)
    assert lines(ours) == {line for line in lines(theirs) if "_created" not in line}


@given(VALUES)
def test_a_counter_sums_those_of_all_writers(written: list[tuple[tuple[str, str], float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counts = Counts("steps", "how many", ("model",), ours)
    known = Counter("steps", "how many", ("model",), registry=theirs)
    for writer, value in written:
        counts.of(*writer).inc(int(value))
        known.labels(writer[0]).inc(int(value))
    assert lines(ours) == {line for line in lines(theirs) if "_created" not in line}


def test_what_has_no_labels_is_one_series() -> None:
    registry = CollectorRegistry()
    tallies = Tallies("seconds", "how long", (), registry, (1,))
    tallies.of("a").observe(0.5)
    tallies.of("b").observe(2)
    assert {'seconds_bucket{le="1.0"} 1.0', 'seconds_bucket{le="+Inf"} 2.0', "seconds_sum 2.5"} <= lines(registry)
