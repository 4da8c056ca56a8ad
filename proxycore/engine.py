"""The wiring: one thread that owns all state and never calls what may block.

    source --events--> inbox --> Desired (store, resolve, claims) --> Ledger (desired - acknowledged)
                         ^                                                |
    addresses -----------+                                         ChangeBatch
                         |                                                v
                         +------------- BackendReply <------------ backend thread
                                                                          |
                                              applied, failed, drift      v
                                                                     observer threads

Everything that other threads want from the engine goes through the inbox; what they may read is the last published `Status`.
A change is programmed at once when the backend is idle; what arrives while it works is gathered into the next batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, Literal, NamedTuple

import msgspec

from .backend import ApplyResult, BackendContext, BackendInfo, Started, Verification
from .changes import ChangeBatch, HostChange, change
from .delta import Ledger
from .desired import Desired
from .dispatch import BackendReply, BackendRunner, ObserverRunner
from .frontends import RESERVED_PORTS
from .logs import Log
from .memory import settle
from .model import Family, HostState, Protocol, ServicePortName
from .objects import Node, ServiceCIDR
from .observer import ObserverContext
from .source import Event, Health, Synced, Trouble
from .status import Status

RETRY_FIRST_SECONDS = 0.2
"""Pause after a failure that no Service is to blame for; doubled each time, up to the sync period."""
PROBLEMS_PAUSE = 0.5
"""So long after a change it is looked at what of it is ignored; a burst is looked at once."""
DRIFT_PAUSE_MAX = 3.0
"""Longest time between two looks while somebody else keeps changing what is ours."""
NAMED_IN_LOG = 5
"""So many Services are named in one log line; more are only counted."""

HostOf = Callable[[Node | None, Sequence[ServiceCIDR]], HostState]
"""The node's facts from its object and the ServiceCIDRs (and whatever else the function holds, such as addresses)."""


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`sync_period_seconds`: longest pause between tries; a change that waits for twice as long makes us unhealthy.

    `min_sync_period_seconds`: shortest time from the end of one batch to the start of the next.
    """

    node_name: str
    families: tuple[Family, ...]
    sync_period_seconds: float = 30.0
    min_sync_period_seconds: float = 0.0
    verify_interval_seconds: float = 1.0
    backend_options: dict[str, Any] = {}
    takeover: Literal["auto", "refuse", "leave"] = "auto"
    reserved_ports: frozenset[tuple[int, Protocol]] = RESERVED_PORTS
    observer_options: dict[str, dict[str, Any]] = {}


class _HostMayHaveChanged(NamedTuple):
    """Something that the host function reads is different now."""


class _Stop(NamedTuple):
    """End the loop."""


class _Snapshot(NamedTuple):
    """Somebody waits for a full batch of all that is in force."""

    answer: Future[ChangeBatch | None]


_Item = list[Event] | BackendReply | _HostMayHaveChanged | _Stop | _Snapshot


class InboxSink:
    """Where sources put their events."""

    def __init__(self, inbox: SimpleQueue[_Item]) -> None:
        self._inbox = inbox

    def put(self, events: list[Event]) -> None:
        """Hand over events; returns at once."""
        if events:
            self._inbox.put(events)


class Engine:
    """See the module's diagram.  `run()` is the engine's thread; all other methods may be called from any thread."""

    def __init__(
        self,
        *,
        settings: EngineSettings,
        host_of: HostOf,
        backend: Callable[[Callable[[BackendReply], None]], BackendRunner],
        backend_info: BackendInfo,
        observers: Callable[[Callable[[], ChangeBatch | None]], Sequence[ObserverRunner]],
        log: Log,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`backend` and `observers` make the runners, given where to deliver answers and how to get a snapshot."""
        self._settings = settings
        self._host_of = host_of
        self._log = log
        self._clock = clock
        self._inbox: SimpleQueue[_Item] = SimpleQueue()
        self.sink = InboxSink(self._inbox)
        self._info = backend_info
        self._desired = Desired(
            settings.node_name, reserved_ports=settings.reserved_ports, started=time.time()
        )
        self._ledger = Ledger()
        self._host: HostState | None = None
        self._host_inputs: tuple[Node | None, tuple[ServiceCIDR, ...]] = (None, ())
        self._synced = False
        self._started = False
        self._full_reason: str | None = "start"
        """Wanted, and not yet handed to the ledger."""
        self._start_at = 0.0
        self._start_pause = RETRY_FIRST_SECONDS
        self._last_end = float("-inf")
        self._verify_at = float("inf")
        self._drifts_in_a_row = 0
        self._pending_since: float | None = None
        self._troubles: dict[str, str] = {}
        self._missing: set[str] = set()
        """Subjects of troubles because of which something is not known."""
        self._adopted = False
        self._said_hold = False
        self._quarantine: dict[ServicePortName, str] = {}
        self._quarantine_version = -1
        self._named_problems: dict[str, tuple[str, ...]] = {}
        self._problems_at = float("inf")
        self._told_host: HostState | None = None
        self._source_health = Health("live")
        self._stopping = False
        self._applied_total = 0
        self._after_full = False
        """Of what a full batch made, much is free again and the rest is to stay."""
        self._healthy: bool | None = None
        self._last_success: float | None = None
        self.status = Status()
        self._observers = observers(self._ask_snapshot)
        self._backend = backend(self._inbox.put)

    # -- from any thread --

    def stop(self) -> None:
        """End run() soon, leaving everything in force."""
        self._inbox.put(_Stop())

    def host_may_have_changed(self) -> None:
        """Ask the host function again."""
        self._inbox.put(_HostMayHaveChanged())

    def healthy(self) -> bool:
        """Is the proxy itself well?  (Read from the published status; the backend's deadline is looked at now.)"""
        status = self.status
        if status.last_success is None or self._backend.overdue() is not None:
            return False
        since = status.pending_since
        return since is None or self._clock() - since < 2 * self._settings.sync_period_seconds

    def _ask_snapshot(self) -> ChangeBatch | None:
        answer: Future[ChangeBatch | None] = Future()
        self._inbox.put(_Snapshot(answer))
        return answer.result(timeout=60)

    # -- the loop --

    def run(self) -> None:
        """Work until stop().  Everything programmed stays in force afterwards."""
        self._refresh_host()
        self._start_backend()
        while not self._stopping:
            for item in self._wait():
                self._take(item)
            self._collect()
            self._work()
        self._shut_down()

    def _wait(self) -> list[_Item]:
        """All that is in the inbox, waiting for the first until the next thing that is due."""
        timeout = max(0.0, self._next_due() - self._clock())
        try:
            items: list[_Item] = [self._inbox.get(timeout=min(timeout, 3600.0))]
        except Empty:
            return []
        while not self._inbox.empty():
            items.append(self._inbox.get_nowait())
        return items

    def _next_due(self) -> float:
        if self._backend.busy:
            # A call past its deadline is noticed by looking.
            return self._clock() + 5.0
        if not self._started:
            return self._start_at
        due = min(self._verify_at, self._problems_at if self._synced else float("inf"))
        if self._may_program():
            work = self._clock() if self._full_reason is not None else self._ledger.next_time(self._clock())
            if work is not None:
                due = min(due, max(work, self._may_start_at()))
        return due

    def _may_start_at(self) -> float:
        return self._last_end + self._settings.min_sync_period_seconds

    def _is_due(self) -> bool:
        """Is there something that could be sent now?  What is set aside until later does not count."""
        due = self._ledger.next_time(self._clock())
        return self._full_reason is not None or (due is not None and due <= self._clock())

    def _take(self, item: _Item) -> None:
        match item:
            case list():
                self._take_events(item)
            case BackendReply():
                self._take_reply(item)
            case _HostMayHaveChanged():
                self._refresh_host()
            case _Snapshot(answer):
                answer.set_result(self._snapshot())
            case _Stop():
                self._stopping = True

    def _take_events(self, events: list[Event]) -> None:
        objects: list[Event] = []
        for event in events:
            match event:
                case Synced():
                    self._synced = True
                case Trouble():
                    self._take_trouble(event)
                case Health():
                    if event != self._source_health:
                        self._log.info("source", state=event.state, reason=event.reason)
                    self._source_health = event
                case _:
                    objects.append(event)
        if objects:
            self._desired.handle(objects, arrived=time.time())
            store = self._desired.store
            if (store.node, store.service_cidr_objects) != self._host_inputs:
                self._refresh_host()

    def _take_trouble(self, trouble: Trouble) -> None:
        subject, reason = trouble.subject, trouble.reason
        self._missing.discard(subject)
        if not reason:
            if self._troubles.pop(subject, None) is not None:
                self._log.info("mended", subject=subject)
            return
        if not trouble.harmless:
            self._missing.add(subject)
        if self._troubles.get(subject) != reason:
            self._troubles[subject] = reason
            self._log.warning("not read, the last good state stays", subject=subject, reason=reason)

    def _may_program(self) -> bool:
        """Is what should be in force known?

        Not before the source has delivered everything.  If it could not read something from the start, its last good state
        is in the kernel alone, where an earlier run has left any: that stays until the source is mended.
        """
        if not self._synced:
            return False
        if self._applied_total or not self._adopted or not self._missing:
            return True
        if not self._said_hold:
            self._said_hold = True
            self._log.error(
                "nothing is programmed until this is mended: rules of an earlier run are in force, and would lose "
                "what cannot be read",
                unread=sorted(self._missing)[:NAMED_IN_LOG],
            )
        return False

    def _refresh_host(self) -> None:
        store = self._desired.store
        self._host_inputs = (store.node, store.service_cidr_objects)
        host = self._host_of(*self._host_inputs)
        if host == self._host:
            return
        self._host = host
        self._ledger.update_host(host)
        self._desired.handle((), host, arrived=time.time())

    def _collect(self) -> None:
        """Bring what changed in the desired state into the ledger.

        Not before all is known: of a Service whose slices are still to come nothing is worth resolving.
        """
        if not self._synced:
            return
        began = self._desired.oldest_trigger_time
        changed = self._desired.take()
        if changed:
            self._ledger.update(changed, began)
        if changed or self._desired.host is not self._told_host:
            self._told_host = self._desired.host
            self._problems_at = min(self._problems_at, self._clock() + PROBLEMS_PAUSE)
        if self._pending_since is None and self._is_due():
            self._pending_since = self._clock()

    def _name_problems(self) -> None:
        """Log what is ignored and was not said before; done some time after a change, as it looks at every problem."""
        self._problems_at = float("inf")
        problems = dict(self._desired.problems)
        if self._synced and self._desired.store.node is None:
            problems[f"Node {self._settings.node_name}"] = (
                "there is no such Node: its addresses are guessed from the interfaces, and it has no zone and no pod CIDRs",
            )
        for subject, reasons in problems.items():
            for reason in reasons:
                if reason not in self._named_problems.get(subject, ()):
                    self._log.warning("ignored", subject=subject, reason=reason)
        self._named_problems = problems

    # -- the backend --

    def _context(self) -> BackendContext:
        assert self._host is not None
        return BackendContext(
            host=self._host,
            families=self._settings.families,
            options=self._settings.backend_options,
            takeover=self._settings.takeover,
        )

    def _start_backend(self) -> None:
        self._start_at = float("inf")
        self._backend.submit("start", self._context())

    def _work(self) -> None:
        """Give the backend its next call, if it is idle and one is due."""
        if self._stopping or self._backend.busy or self._ledger.in_flight is not None:
            self._publish()
            return
        now = self._clock()
        if self._synced and now >= self._problems_at:
            self._name_problems()
        if not self._started:
            if now >= self._start_at:
                self._start_backend()
        elif now >= self._verify_at:
            # Comes before the next batch: where something changes all the time, it would never have its turn otherwise.
            self._verify_at = float("inf")
            if self._after_full:
                self._after_full = False
                settle()
            self._backend.submit("verify", False)
        elif self._may_program() and now >= self._may_start_at():
            self._submit_batch(now)
        self._publish()

    def _submit_batch(self, now: float) -> None:
        batch = self._ledger.batch(
            now, full=self._full_reason is not None, reason=self._full_reason or "change"
        )
        self._full_reason = None
        if batch is None:
            if self._ledger.next_time(now) is None:
                self._pending_since = None
            return
        self._backend.submit("apply", batch)

    def _snapshot(self) -> ChangeBatch | None:
        """A full batch of all that is in force, for an observer that missed events."""
        if not self._applied_total or self._host is None:
            return None
        return ChangeBatch(
            # A batch under way is not in it: the observer still has to be told of that.
            generation=self._ledger.generation - (self._ledger.in_flight is not None),
            changes=tuple(change(name, None, state) for name, state in self._ledger.in_force().items()),
            host=HostChange(before=None, after=self._host),
            full=True,
            reason="snapshot",
        )

    def _take_reply(self, reply: BackendReply) -> None:
        match reply.kind:
            case "start":
                self._take_started(reply)
            case "apply":
                self._take_applied(reply)
            case "verify":
                self._take_verified(reply)

    def _take_started(self, reply: BackendReply) -> None:
        if reply.error is not None:
            self._log.error("backend cannot start", backend=self._backend.name, error=reply.error)
            self._start_at = self._clock() + self._start_pause
            self._start_pause = min(self._start_pause * 2, self._settings.sync_period_seconds)
            return
        started: Started = reply.value
        self._log.info(
            "backend started",
            backend=self._backend.name,
            adopted=started.adopted or "nothing",
            ms=reply.seconds * 1e3,
        )
        self._started = True
        self._adopted = started.adopted is not None
        assert self._host is not None
        for observer in self._observers:
            options = self._settings.observer_options.get(observer.name, {})
            observer.start(
                ObserverContext(host=self._host, backend=self._info, healthy=self.healthy, options=options)
            )

    def _take_applied(self, reply: BackendReply) -> None:
        batch: ChangeBatch = reply.args[0]
        now = self._clock()
        self._last_end = now
        if reply.error is not None:
            why = str(reply.error)
            self._ledger.lost(batch, why, now)
            self._log.error("backend failed", generation=batch.generation, error=reply.error)
            failure = ApplyResult(generation=batch.generation, outcome="rejected", message=why)
            self._tell_failed(batch, failure)
            return
        result: ApplyResult = reply.value
        self._ledger.acknowledge(batch, result, now)
        self._log_result(batch, result, reply.seconds)
        if result.outcome == "rejected":
            self._tell_failed(batch, result)
            return
        self._applied_total += 1
        self._after_full = self._after_full or batch.full
        self._last_success = time.time()
        self._pending_since = now if self._is_due() else None
        if self._verify_at == float("inf"):
            self._verify_at = now + self._interval()
        for observer in self._observers:
            observer.applied(batch, result)

    def _interval(self) -> float:
        return self._settings.verify_interval_seconds or float("inf")

    def _tell_failed(self, batch: ChangeBatch, result: ApplyResult) -> None:
        for observer in self._observers:
            observer.failed(batch, result)

    def _take_verified(self, reply: BackendReply) -> None:
        self._verify_at = self._clock() + self._interval()
        if reply.error is not None:
            self._log.error("cannot verify", backend=self._backend.name, error=reply.error)
            return
        verification: Verification = reply.value
        if not verification.drift:
            self._drifts_in_a_row = max(0, self._drifts_in_a_row - 1)
            return
        # Two writers that undo each other's work must not cost a complete rewrite every second.
        self._drifts_in_a_row += 1
        pause = self._interval() * 2.0 ** min(self._drifts_in_a_row - 1, 10)
        self._verify_at = self._clock() + min(pause, max(self._interval(), DRIFT_PAUSE_MAX))
        named = [f"{d.service}: {d.what}" if d.service else d.what for d in verification.drift[:NAMED_IN_LOG]]
        self._log.warning(
            "the kernel was changed by somebody else", found=len(verification.drift), what=named
        )
        for observer in self._observers:
            observer.drift(verification)
        if not verification.repaired:
            self._full_reason = "drift"
            if self._pending_since is None:
                self._pending_since = self._clock()

    def _log_result(self, batch: ChangeBatch, result: ApplyResult, seconds: float) -> None:
        facts: dict[str, object] = {
            "generation": batch.generation,
            "changes": len(batch.changes),
            "operations": result.operations,
            "ms": round(seconds * 1e3, 2),
            "reason": batch.reason,
        }
        if batch.full:
            facts["full"] = True
        if batch.oldest_trigger_time is not None:
            facts["trigger_to_kernel_ms"] = round((time.time() - batch.oldest_trigger_time) * 1e3, 1)
        if result.outcome == "rejected":
            self._log.error("refused, nothing was changed", **facts, why=result.message)
        else:
            self._log.info("synced", **facts)
            if batch.full and not self._applied_total and self._adopted and not batch.changes:
                self._log.warning("the source has no Service: what an earlier run left is removed")
        if self._log.debugs():
            for item in batch.changes:
                self._log.debug(
                    item.kind, service=str(item.name), protocol=item.name.protocol, family=item.name.family
                )
        for what, failures in (
            ("not programmed", (*result.failed, *(result.culprits or ()))),
            ("not supported by this backend", result.unsupported),
        ):
            for failure in failures[:NAMED_IN_LOG]:
                self._log.warning(what, service=str(failure.name), why=failure.why)

    # -- what others see --

    def _publish(self) -> None:
        status = Status(
            synced=self._synced,
            started=self._started,
            generation=self._ledger.generation,
            applied_total=self._applied_total,
            last_success=self._last_success,
            pending_since=self._pending_since,
            quarantined=self._quarantined(),
            troubles=dict(self._troubles) if self._troubles else {},
            source=self._source_health,
        )
        if status != self.status:
            self.status = status
        healthy = self.healthy()
        if healthy != self._healthy:
            self._healthy = healthy
            for observer in self._observers:
                observer.health(healthy, self._backend.overdue() or "")

    def _quarantined(self) -> dict[ServicePortName, str]:
        if self._ledger.version != self._quarantine_version:
            self._quarantine_version = self._ledger.version
            self._quarantine = {name: held.why for name, held in self._ledger.quarantined.items()}
        return self._quarantine

    def _shut_down(self) -> None:
        for observer in self._observers:
            observer.close(timeout=2.0)
        if not self._backend.busy:
            self._backend.submit("stop")
        if not self._backend.close(timeout=5.0):
            self._log.warning("backend left behind", why=self._backend.overdue() or "still busy")
        self._log.info("stopped; everything programmed stays in force")
