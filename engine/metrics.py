"""Counters, gauges and histograms as plain objects; server/operations.py renders them.

Names follow `everstep:<noun>_<unit>[_total]` (USERS.md §2); each is declared beside the code
that owns the fact, in that module's `Registry`.
"""

from bisect import bisect_left
from collections.abc import Sequence

from msgspec import Struct

SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)


class Metric(Struct):
    """name, help and label names; `values` maps label values to a number or bucket counts."""

    name: str
    help: str
    labels: tuple[str, ...] = ()


class Counter(Metric, tag="counter"):
    """Only grows."""

    values: dict[tuple[str, ...], float] = {}

    def add(self, amount: float = 1.0, *labels: str) -> None:
        self.values[labels] = self.values.get(labels, 0.0) + amount

    def set_total(self, total: float, *labels: str) -> None:
        """Take over a total that another process counts."""
        self.values[labels] = max(total, self.values.get(labels, 0.0))


class Gauge(Metric, tag="gauge"):
    """A value of this moment."""

    values: dict[tuple[str, ...], float] = {}

    def set(self, value: float, *labels: str) -> None:
        self.values[labels] = value


class Histogram(Metric, tag="histogram"):
    """Counts per bucket (upper bounds), with sum; the last bucket is +Inf."""

    buckets: tuple[float, ...] = SECONDS
    counts: list[int] = []
    sum: float = 0.0

    def observe(self, value: float) -> None:
        if not self.counts:
            self.counts = [0] * (len(self.buckets) + 1)
        self.counts[bisect_left(self.buckets, value)] += 1
        self.sum += value


class Registry:
    """The metrics of one process, in order of declaration."""

    def __init__(self) -> None:
        self.metrics: list[Counter | Gauge | Histogram] = []

    def counter(self, name: str, help: str, labels: Sequence[str] = ()) -> Counter:
        metric = Counter(name, help, tuple(labels))
        self.metrics.append(metric)
        return metric

    def gauge(self, name: str, help: str, labels: Sequence[str] = ()) -> Gauge:
        metric = Gauge(name, help, tuple(labels))
        self.metrics.append(metric)
        return metric

    def histogram(self, name: str, help: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        metric = Histogram(name, help, buckets=buckets)
        self.metrics.append(metric)
        return metric
