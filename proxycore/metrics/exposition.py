"""From values to Prometheus' text.

prometheus_client writes the text; its own instruments are not used for our metrics, which are plain data, but other
observers may register theirs.  As with the Go client there are no series called `_created`, and a metric without samples
is left out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector as AnyCollector

from .. import logs
from .families import COLLECTORS
from .values import Family, Histogram, Values, one

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Collector:
    """Families and where their values come from; `values` is called at each scrape, on the scraper's thread."""

    def __init__(self, families: Sequence[Family], values: Callable[[], Values]) -> None:
        self._families = tuple(families)
        self._values = values

    def describe(self) -> list[Metric]:
        """Families without samples: the registry refuses a name that somebody else has."""
        return [_metric(family) for family in self._families]

    def collect(self) -> list[Metric]:
        """All families, in their order."""
        values = self._values()
        found: list[Metric] = []
        for family in self._families:
            metric = _metric(family)
            for labels, value in values.get(family.name, {}).items():
                pairs = dict(zip(family.labels, labels, strict=True))
                if isinstance(value, Histogram):
                    _add_histogram(metric, pairs, value)
                else:
                    metric.add_sample(family.name, pairs, float(value))
            found.append(metric)
        return found


def _metric(family: Family) -> Metric:
    name = family.name.removesuffix("_total") if family.type == "counter" else family.name
    return Metric(name, family.help, family.type)


def _add_histogram(metric: Metric, labels: dict[str, str], histogram: Histogram) -> None:
    counts = list(accumulate(histogram.counts))
    for bound, count in zip((*map(le, histogram.bounds), "+Inf"), counts, strict=True):
        metric.add_sample(f"{metric.name}_bucket", {**labels, "le": bound}, count)
    metric.add_sample(f"{metric.name}_sum", labels, histogram.sum)
    metric.add_sample(f"{metric.name}_count", labels, counts[-1])


def le(bound: float) -> str:
    """A bucket's bound as the Go client writes it: `60`, not `60.0`."""
    return str(int(bound)) if bound == int(bound) else repr(bound)


class Registry(CollectorRegistry):
    """A registry in which one broken collector costs nobody else a metric.

    A collector that raises is left out of this scrape, and so is a family whose name was there already: Prometheus would
    refuse the whole page.  Both are counted, and logged once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._log = logs.get("metrics")
        self._collectors: tuple[AnyCollector, ...] = ()
        self._collectors_lock = threading.Lock()
        self._failures = 0
        self._told: set[tuple[int, str]] = set()
        self.register(Collector(COLLECTORS, lambda: {COLLECTORS[0].name: one(self._failures)}))

    def register(self, collector: AnyCollector) -> None:
        """Add a collector.  Raises ValueError: another one has a metric of that name."""
        super().register(collector)
        with self._collectors_lock:
            self._collectors = (*self._collectors, collector)

    def unregister(self, collector: AnyCollector) -> None:
        """Remove a collector.  Raises KeyError: it is not there."""
        super().unregister(collector)
        with self._collectors_lock:
            self._collectors = tuple(c for c in self._collectors if c is not collector)

    def collect(self) -> Iterator[Metric]:
        """All metrics of all collectors that work."""
        seen: set[str] = set()
        # Our own comes last, so that it counts this scrape's failures too.
        first, *others = self._collectors
        for collector in (*others, first):
            try:
                metrics = list(collector.collect())
            except Exception as error:  # noqa: BLE001  it is somebody else's
                self._fail(collector, "a collector of metrics failed", error)
                continue
            for metric in metrics:
                if metric.name in seen:
                    self._fail(collector, "a metric of that name is there already", None, metric.name)
                    continue
                seen.add(metric.name)
                yield metric

    def _fail(self, collector: AnyCollector, what: str, error: Exception | None, metric: str = "") -> None:
        self._failures += 1
        key = id(collector), metric
        if key not in self._told and len(self._told) < 100:
            self._told.add(key)
            owner = type(collector).__qualname__
            self._log.error(what, collector=owner, metric=metric, error=error if error is not None else "")


class _AsGo:
    """A registry's metrics as the Go client would have them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            created = f"{metric.name}_created"
            if any(sample.name == created for sample in metric.samples):
                kept = [sample for sample in metric.samples if sample.name != created]
                metric = Metric(metric.name, metric.documentation, metric.type, metric.unit)
                metric.samples = kept
            if metric.samples:
                yield metric


def expose(registry: CollectorRegistry) -> bytes:
    """All metrics as text of CONTENT_TYPE."""
    return generate_latest(_AsGo(registry))
