"""Observer `metrics`: counts batches, and registers what /metrics shows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector as AnyCollector

from ..backend import ApplyResult
from ..changes import ChangeBatch
from ..hookspecs import hookimpl
from ..observer import ObserverContext
from ..status import Facts
from . import build, families, requests, snapshot
from .exposition import Collector
from .recorder import Recorder
from .values import Values


class MetricsObserver:
    """Does nothing where nobody serves metrics."""

    def __init__(self) -> None:
        # Held by the hooks and by scrapes, for as long as it takes to count a batch or to read the counts.
        self._lock = threading.Lock()
        self._recorder: Recorder | None = None
        self._registry: CollectorRegistry | None = None
        self._registered: list[AnyCollector] = []

    @hookimpl
    def proxycore_observer_start(self, context: ObserverContext) -> None:
        registry, facts = context.registry, context.facts
        if registry is None or facts is None:
            return
        recorder = Recorder(context.host.families, context.mode)
        constant = build.constant(context.backend.name, context.mode, external_ips=context.host.external_ips)
        self._registry = registry
        self._recorder = recorder
        try:
            self._register(
                Collector(families.of_mode(families.RECORDED, context.mode), self._locked(recorder.values))
            )
            self._register(Collector(families.PUBLISHED, _published(facts, context)))
            self._register(Collector(families.REQUESTS, requests.values))
            self._register(Collector(families.CONSTANT, lambda: constant))
            self._register(ProcessCollector(registry=None))
        except BaseException:
            self.proxycore_observer_stop()
            raise

    @hookimpl
    def proxycore_observer_applied(self, batch: ChangeBatch, result: ApplyResult, seconds: float) -> None:
        if self._recorder is not None:
            now = time.time()
            with self._lock:
                self._recorder.applied(batch, result, seconds, now)

    @hookimpl
    def proxycore_observer_failed(self, batch: ChangeBatch, result: ApplyResult, seconds: float) -> None:
        if self._recorder is not None:
            with self._lock:
                self._recorder.failed(batch, result, seconds)

    @hookimpl
    def proxycore_observer_stop(self) -> None:
        while self._registered and self._registry is not None:
            self._registry.unregister(self._registered.pop())
        self._recorder = None

    def _register(self, collector: AnyCollector) -> None:
        assert self._registry is not None
        self._registry.register(collector)
        self._registered.append(collector)

    def _locked(self, values: Callable[[], Values]) -> Callable[[], Values]:
        def read() -> Values:
            with self._lock:
                return values()

        return read


def _published(facts: Callable[[], Facts], context: ObserverContext) -> Callable[[], Values]:
    return lambda: snapshot.of_facts(facts(), context.host.families)
