"""Counters and histograms for prometheus-client that one thread writes, without a lock.

Its own, which any thread may write, took a tenth of what Python does for a small batch.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Count:
    """A counter."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, more: int = 1) -> None:
        """Count on."""
        self.value += more


class Tally:
    """A histogram."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Take a value in."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


W = TypeVar("W", Count, Tally)


class _Written(Generic[W]):
    """What several threads write, each its own; of those with the same labels the sum is shown."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str], new: Callable[[], W]) -> None:
        self.name = name
        self.labels = labels
        self._documentation = documentation
        self._new: Callable[[], W] = new
        self._of: dict[tuple[str, ...], W] = {}

    def of(self, *writer: str) -> W:
        """That of one thread; what it is named by begins with the labels' values. A later one of that name goes on."""
        return self._of.setdefault(writer, self._new())

    def groups(self) -> list[tuple[tuple[str, ...], list[W]]]:
        """Labels, and all that have them."""
        groups: dict[tuple[str, ...], list[W]] = {}
        for writer, written in list(self._of.items()):
            groups.setdefault(writer[: len(self.labels)], []).append(written)
        return list(groups.items())


class Counts(_Written[Count], Collector):
    """A counter of several threads."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        super().__init__(name, documentation, labels, Count)
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """What all have counted."""
        family = CounterMetricFamily(self.name, self._documentation, labels=self.labels)
        for labels, counts in self.groups():
            family.add_metric(labels, sum(one.value for one in counts))
        yield family


class Tallies(_Written[Tally], Collector):
    """A histogram of several threads."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        registry: CollectorRegistry,
        buckets: Sequence[float],
    ) -> None:
        super().__init__(name, documentation, labels, lambda: Tally(buckets))
        self._buckets = [*map(floatToGoString, buckets), "+Inf"]
        registry.register(self)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """What all have taken in."""
        family = HistogramMetricFamily(self.name, self._documentation, labels=self.labels)
        for labels, tallies in self.groups():
            counts = accumulate(map(sum, zip(*(one.counts for one in tallies), strict=True)))
            family.add_metric(labels, list(zip(self._buckets, counts, strict=True)), sum(one.total for one in tallies))
        yield family
