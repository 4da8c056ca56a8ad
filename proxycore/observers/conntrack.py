"""Observer `conntrack`: deletes UDP flows that stay translated to endpoints which do not serve them any more.

It looks when a batch took endpoints or frontends away from a UDP Service, and from time to time.  Each look reads all
UDP flows: it takes in all batches up to then, and the next one waits a little, the longer the dearer this one was.
TCP and SCTP are never touched.  Option `periodSeconds`: time between two looks without a cause, 0: never; default 60.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from .. import logs
from ..backend import ApplyResult
from ..changes import ChangeBatch
from ..errors import ConfigError, KernelError
from ..hookspecs import hookimpl
from ..kernel.conntrack import Conntrack
from ..kernel.flow import Flow
from ..metrics.families import CONNTRACK, DURATION
from ..metrics.values import Histogram, Values
from ..model import FAMILIES, Family
from ..observer import ObserverContext
from .staleflows import FlowIndex, Snapshot, is_certain, stale

PERIOD_SECONDS = 60.0
GRACE_SECONDS = 0.25
"""A flow at a server that was never an endpoint as far as we know is looked at twice, this far apart.

The next batch may be in the kernel before this observer hears of it: the server may be an endpoint since just now.
"""
REST_PER_COST = 4.0
"""Looking takes a fifth of a processor at most."""
MAX_REST_SECONDS = 10.0
_RETRY_SECONDS = (1.0, 60.0)


class ConntrackObserver:
    """Hooks only keep the index; a worker thread of its own reads and deletes, one look at a time."""

    def __init__(self) -> None:
        self.deleted_total = 0
        self.looks_total = 0
        self.failures_total = 0
        self._deleted: dict[Family, int] = dict.fromkeys(FAMILIES, 0)
        self._durations = {family: Histogram(DURATION) for family in FAMILIES}
        self._unregister: Callable[[], None] | None = None
        self._log = logs.get("conntrack")
        self._changed = threading.Condition()
        self._index = FlowIndex()
        self._revision = 0
        self._wanted = self._stopping = False
        self._outstanding = False
        self._rest_until = 0.0
        self._suspects: dict[Flow, float] = {}
        self._period = PERIOD_SECONDS
        self._worker: threading.Thread | None = None

    @hookimpl
    def proxycore_observer_start(self, context: ObserverContext) -> None:
        if not context.backend.conntrack:
            self._log.info("not needed by this backend", backend=context.backend.name)
            return
        self._period = _period(context.options)
        self._index.set_host(context.host)
        if context.registry is not None:
            # Imported where somebody serves metrics: its text writer is not for everybody.
            from ..metrics.exposition import Collector

            collector = Collector(CONNTRACK, partial(self._metrics, context.host.families))
            context.registry.register(collector)
            self._unregister = partial(context.registry.unregister, collector)
        self._worker = threading.Thread(target=self._work, name="conntrack-worker", daemon=True)
        self._worker.start()

    @hookimpl
    def proxycore_observer_applied(self, batch: ChangeBatch, result: ApplyResult) -> None:
        if self._worker is None:
            return
        with self._changed:
            self._revision += 1
            if self._index.update(batch, result):
                self._wanted = True
                self._changed.notify_all()

    @hookimpl
    def proxycore_observer_stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join(10)
        unregister, self._unregister = self._unregister, None
        if unregister is not None:
            unregister()

    def wait_done(self, timeout_seconds: float) -> bool:
        """Wait until every look that a batch has asked for is over and has succeeded; False: still not."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._wanted or self._outstanding), timeout_seconds)

    # -- the worker ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        periodic = _in(self._period)
        retry = again = float("inf")
        pause = _RETRY_SECONDS[0]
        while self._wait(min(periodic, retry, again)):
            self._take_wanted()
            began = time.thread_time()
            try:
                self._look()
                retry, pause = float("inf"), _RETRY_SECONDS[0]
            except Exception as error:  # noqa: BLE001  the thread must live on, and says what happened
                self.failures_total += 1
                self._suspects = {}
                if not isinstance(error, KernelError):
                    self._log.exception("looking for stale UDP flows failed by a bug", error)
                self._log.warning("stale UDP flows not cleaned, trying again", error=error, seconds=pause)
                retry, pause = _in(pause), min(2 * pause, _RETRY_SECONDS[1])
            periodic = _in(self._period)
            again = min(self._suspects.values(), default=float("inf"))
            self._rest_until = time.monotonic() + rest_seconds(time.thread_time() - began)
            with self._changed:
                self._outstanding = min(retry, again) != float("inf")
                self._changed.notify_all()

    def _wait(self, until: float) -> bool:
        """Wait for work or a point in time, and in any case until rested; False: stop."""
        with self._changed:
            while not self._stopping:
                earliest = self._rest_until if self._wanted else max(until, self._rest_until)
                left = earliest - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(None if left == float("inf") else left)
            return not self._stopping

    def _take_wanted(self) -> None:
        with self._changed:
            self._outstanding = self._outstanding or self._wanted
            self._wanted = False

    def _look(self) -> None:
        """Read all UDP flows and delete the stale ones.  Raises KernelError: some may be left."""
        began = time.monotonic()
        with self._changed:
            revision, families = self._revision, self._index.families()
        if not families:
            self._suspects = {}
            return
        with Conntrack() as table:
            flows = [flow for family in families for flow in table.udp_flows(family)]
            ripe = self._ripe(self._judge(flows))
            deleted = {family: table.delete(_of(ripe, family)) for family in families}
        seconds = time.monotonic() - began
        with self._changed:
            for family, number in deleted.items():
                self._deleted[family] += number
                self._durations[family].observe(seconds)
            # What has become stale since the flows were read was not among them.
            if self._revision == revision:
                self._index.settle()
        self.looks_total += 1
        total = sum(deleted.values())
        self.deleted_total += total
        if total:
            self._log.info(
                "stale UDP flows deleted",
                deleted=total,
                flows=len(flows),
                milliseconds=round(seconds * 1000),
            )

    def _metrics(self, families: Sequence[Family]) -> Values:
        """A look is at all families together, so its time is that of each."""
        with self._changed:
            return {
                "kubeproxy_conntrack_reconciler_sync_duration_seconds": {
                    (family,): self._durations[family].copy() for family in families
                },
                "kubeproxy_conntrack_reconciler_deleted_entries_total": {
                    (family,): self._deleted[family] for family in families
                },
            }

    def _judge(self, flows: list[Flow]) -> list[tuple[Flow, bool]]:
        """The stale ones, and whether that is certain.

        Where there are many flows it takes long, and batches go on meanwhile: what seems stale is looked at again if so.
        """
        revision, index = self._snapshot()
        found = list(stale(flows, index))
        if found:
            newer, index = self._snapshot()
            if newer != revision:
                found = list(stale(found, index))
        return [(flow, is_certain(flow, index)) for flow in found]

    def _snapshot(self) -> tuple[int, Snapshot]:
        with self._changed:
            return self._revision, self._index.snapshot()

    def _ripe(self, found: Iterable[tuple[Flow, bool]]) -> list[Flow]:
        """Those to be deleted now; the others are remembered as suspects, with the time when they will be due."""
        now = time.monotonic()
        ripe: list[Flow] = []
        suspects: dict[Flow, float] = {}
        for flow, certain in found:
            identity = flow._replace(status=0)
            due = now if certain else self._suspects.get(identity, now + GRACE_SECONDS)
            if due <= now:
                ripe.append(flow)
            else:
                suspects[identity] = due
        self._suspects = suspects
        return ripe


def rest_seconds(cost: float) -> float:
    """How long to rest after a look that took `cost` seconds of a processor."""
    return min(REST_PER_COST * cost, MAX_REST_SECONDS)


def _of(flows: Iterable[Flow], family: Family) -> list[Flow]:
    length = 4 if family == "IPv4" else 16
    return [flow for flow in flows if len(flow.source) == length]


def _in(seconds: float) -> float:
    return time.monotonic() + seconds if seconds > 0 else float("inf")


def _period(options: Mapping[str, Any]) -> float:
    value = options.get("periodSeconds", PERIOD_SECONDS)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ConfigError(f"must be a number of seconds, 0 or more, not {value!r}", field="periodSeconds")
    return float(value)


def plugin() -> ConntrackObserver:
    """Entry point of group `proxycore.plugins`."""
    return ConntrackObserver()
