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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from types import MappingProxyType
from typing import Any

from .backend import ApplyResult, BackendContext, BackendInfo, Started, Verification
from .batchlog import NAMED_IN_LOG, log_result
from .changes import SNAPSHOT, ChangeBatch, HostChange, change
from .delta import Ledger
from .desired import Desired
from .dispatch import BackendReply, BackendRunner, ObserverRunner
from .health import judge, sentence
from .inbox import (
    EngineSettings,
    HostMayHaveChanged,
    InboxSink,
    Item,
    ReadContents,
    SetSettings,
    Stop,
    TakeSnapshot,
)
from .logs import Log
from .memory import settle
from .model import HostState
from .objects import Node, ServiceCIDR
from .observer import ObserverContext
from .source import Event, Health, Synced, Trouble
from .status import Facts, ObserverStatus, Status
from .store import Contents
from .tally import Tally

RETRY_FIRST_SECONDS = 0.2
"""Pause after a failure that no Service is to blame for; doubled each time, up to the sync period."""
PROBLEMS_PAUSE = 0.5
"""So long after a change it is looked at what of it is ignored; a burst is looked at once."""
DRIFT_PAUSE_MAX = 3.0
"""Longest time between two looks while somebody else keeps changing what is ours."""
PAUSE_MAX = 5.0
"""Longest rest that a backend may ask for between batches."""
BEAT_SECONDS = 5.0
"""The loop turns at least so often, so that one that hangs can be told from one that has nothing to do."""

HostOf = Callable[[Node | None, Sequence[ServiceCIDR]], HostState]
"""The node's facts from its object and the ServiceCIDRs (and whatever else the function holds, such as addresses)."""


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
        changed: Callable[[], None] | None = None,
        in_force: Callable[[], None] | None = None,
        for_observers: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """`backend` and `observers` make the runners, given where to deliver answers and how to get a snapshot.

        `changed` is called when an object has changed, `in_force` once, when the first batch is in force and the kernel was
        found to hold it; neither may block.  `for_observers`: what else an ObserverContext is to have, by field.
        """
        self._settings = settings
        self._host_of = host_of
        self._log = log
        self._clock = clock
        self._inbox: SimpleQueue[Item] = SimpleQueue()
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
        self.begun: Started | None = None
        """What the backend found at its start; any thread may read it."""
        self._full_reason: str | None = "start"
        """Wanted, and not yet handed to the ledger."""
        self._start_at = 0.0
        self._start_pause = RETRY_FIRST_SECONDS
        self._last_end = float("-inf")
        self._pause_seconds = 0.0
        self._verify_at = float("inf")
        self._drifts_in_a_row = 0
        self._pending_since: float | None = None
        self._troubles: dict[str, str] = {}
        self._lacking: set[str] = set()
        """Subjects of troubles because of which something is not known."""
        self._missing: set[str] = set()
        """Those that a start waits for, where an earlier run has left rules."""
        self._adopted = False
        self._held = ""
        self._named_problems: dict[str, tuple[str, ...]] = {}
        self._problems_at = float("inf")
        self._told_host: HostState | None = None
        self._stopping = self._ended = False
        self._changed = changed
        self._tell_in_force = in_force
        self._for_observers = for_observers
        self.beat = clock()
        """When the loop last turned."""
        self._tally = Tally(settings.families, time.time())
        self._after_full = False
        """Of what a full batch made, much is free again and the rest is to stay."""
        self._told_complaints: str | None = None
        self.status = Status()
        self._observers = observers(self._ask_snapshot)
        self._backend = backend(self._inbox.put)

    # -- from any thread --

    def stop(self) -> None:
        """End run() soon, leaving everything in force."""
        self._inbox.put(Stop())

    def host_may_have_changed(self) -> None:
        """Ask the host function again."""
        self._inbox.put(HostMayHaveChanged())

    def healthy(self) -> bool:
        """Is the proxy itself well, whatever may be with its node?"""
        return not self._complaints()

    def _complaints(self) -> str:
        """What is wrong with the proxy, in a sentence, as far as the engine knows; empty if nothing is."""
        facts = Facts(
            now=time.time(),
            monotonic=self._clock(),
            status=self.status,
            backend_overdue=self.backend_overdue(),
            sync_period_seconds=self._settings.sync_period_seconds,
        )
        return sentence(judge(facts).proxy_failing)

    def backend_overdue(self) -> str:
        """One sentence about the backend's call that is past its deadline; empty if none is."""
        return self._backend.overdue() or ""

    def backend_overdue_total(self) -> int:
        """Calls of the backend that outlived their deadline."""
        return self._backend.overdue_total

    def observers(self) -> tuple[ObserverStatus, ...]:
        """How each observer is doing."""
        return tuple(observer.status() for observer in self._observers)

    def set_settings(self, settings: EngineSettings) -> None:
        """Go on with this pace, and with these ports reserved; what else is in the settings is for the start."""
        self._inbox.put(SetSettings(settings))

    def contents(self, timeout: float = 60.0) -> Contents:
        """All objects as they are known now.  Raises TimeoutError: the engine did not answer in time."""
        answer: Future[Contents] = Future()
        self._inbox.put(ReadContents(answer))
        if self._ended:
            self._answer_readers()
        return answer.result(timeout)

    def _ask_snapshot(self) -> ChangeBatch | None:
        answer: Future[ChangeBatch | None] = Future()
        self._inbox.put(TakeSnapshot(answer))
        return answer.result(timeout=60)

    # -- the loop --

    def run(self) -> None:
        """Work until stop().  Everything programmed stays in force afterwards."""
        self._refresh_host()
        self._start_backend()
        while not self._stopping:
            self.beat = self._clock()
            for item in self._wait():
                self._take(item)
            self._collect()
            self._work()
        self._shut_down()
        self._ended = True
        self._answer_readers()

    def _answer_readers(self) -> None:
        """After the end, objects can still be read."""
        while not self._inbox.empty():
            try:
                item = self._inbox.get_nowait()
            except Empty:
                return
            if isinstance(item, ReadContents):
                item.answer.set_result(self._desired.store.contents())

    def _wait(self) -> list[Item]:
        """All that is in the inbox, waiting for the first until the next thing that is due."""
        timeout = max(0.0, self._next_due() - self._clock())
        try:
            items: list[Item] = [self._inbox.get(timeout=min(timeout, BEAT_SECONDS))]
        except Empty:
            return []
        while not self._inbox.empty():
            items.append(self._inbox.get_nowait())
        return items

    def _next_due(self) -> float:
        if self._backend.busy:
            # A call past its deadline is noticed by looking.
            return self._clock() + BEAT_SECONDS
        if not self._started:
            return self._start_at
        due = min(self._verify_at, self._problems_at if self._synced else float("inf"))
        if self._may_program():
            work = self._clock() if self._full_reason is not None else self._ledger.next_time(self._clock())
            if work is not None:
                due = min(due, max(work, self._may_start_at()))
        return due

    def _may_start_at(self) -> float:
        return self._last_end + max(self._settings.min_sync_period_seconds, self._pause_seconds)

    def _is_due(self) -> bool:
        """Is there something that waits to be sent?  What is set aside does not count."""
        return self._full_reason is not None or self._ledger.unsettled

    def _take(self, item: Item) -> None:
        match item:
            case list():
                self._take_events(item)
            case BackendReply():
                self._take_reply(item)
            case HostMayHaveChanged():
                self._refresh_host()
            case TakeSnapshot(answer):
                answer.set_result(self._snapshot())
            case ReadContents(reader):
                reader.set_result(self._desired.store.contents())
            case SetSettings(settings):
                self._take_settings(settings)
            case Stop():
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
                    self._take_health(event)
                case _:
                    objects.append(event)
        if objects:
            store = self._desired.store
            version = store.version
            self._desired.handle(objects, arrived=time.time())
            if store.version != version and self._changed is not None:
                self._changed()
            if (store.node, store.service_cidr_objects) != self._host_inputs:
                self._refresh_host()

    def _take_health(self, health: Health) -> None:
        if self._tally.take_health(health, time.time()):
            tell = self._log.warning if health.state == "stale" else self._log.info
            tell("source", state=health.state, reason=health.reason)

    def _take_settings(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._desired.reserve_ports(settings.reserved_ports, time.time())
        if self._verify_at != float("inf") or (self._tally.applied_total and not self._backend.busy):
            self._verify_at = self._clock() + self._interval()

    def _take_trouble(self, trouble: Trouble) -> None:
        subject, reason = trouble.subject, trouble.reason
        self._missing.discard(subject)
        self._lacking.discard(subject)
        if not reason:
            if self._troubles.pop(subject, None) is not None:
                self._log.info("mended", subject=subject)
            return
        if not trouble.harmless:
            self._lacking.add(subject)
            if not trouble.tolerable:
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
        if self._tally.applied_total or not self._adopted or not self._missing:
            self._held = ""
            return True
        unread = sorted(self._missing)[:NAMED_IN_LOG]
        if not self._held:
            self._log.error(
                "nothing is programmed until this is mended: rules of an earlier run are in force, and would lose "
                "what cannot be read",
                unread=unread,
            )
        self._held = f"rules of an earlier run stay as they are until this can be read: {', '.join(unread)}"
        return False

    def _refresh_host(self) -> None:
        store = self._desired.store
        self._host_inputs = (store.node, store.service_cidr_objects)
        self._tally.node_changed(self._desired)
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
        began, told = self._desired.oldest_trigger_time, self._desired.triggers
        changed = self._desired.take()
        if changed:
            self._ledger.update(changed, began, told)
        if changed or self._desired.host is not self._told_host:
            self._tally.last_queued = time.time()
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
            self._settle_pending()
            return
        self._tally.sent(self._desired)
        self._backend.submit("apply", batch)

    def _snapshot(self) -> ChangeBatch | None:
        """A full batch of all that is in force, for an observer that missed events."""
        if not self._tally.applied_total or self._host is None:
            return None
        return ChangeBatch(
            # A batch under way is not in it: the observer still has to be told of that.
            generation=self._ledger.generation - (self._ledger.in_flight is not None),
            changes=tuple(change(name, None, state) for name, state in self._ledger.in_force().items()),
            host=HostChange(before=None, after=self._host),
            full=True,
            reason=SNAPSHOT,
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
            self._tally.refused = f"the backend cannot start: {reply.error}"
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
        self.begun = started
        self._adopted = started.adopted is not None
        assert self._host is not None
        for observer in self._observers:
            options = self._settings.observer_options.get(observer.name, {})
            observer.start(
                ObserverContext(
                    **{
                        "host": self._host,
                        "backend": self._info,
                        "healthy": self.healthy,
                        "options": options,
                        **self._for_observers,
                    }
                )
            )

    def _take_applied(self, reply: BackendReply) -> None:
        batch: ChangeBatch = reply.args[0]
        now = self._clock()
        self._last_end = now
        if reply.error is not None:
            why = str(reply.error)
            self._ledger.lost(batch, why, now)
            self._tally.refused = why
            self._log.error("backend failed", generation=batch.generation, error=reply.error)
            failure = ApplyResult(generation=batch.generation, outcome="rejected", message=why)
            self._tell_failed(batch, failure, reply.seconds)
            self._settle_pending()
            return
        result: ApplyResult = reply.value
        self._pause_seconds = min(result.pause_seconds, PAUSE_MAX)
        self._ledger.acknowledge(batch, result, now)
        log_result(self._log, batch, result, reply.seconds)
        if result.outcome == "rejected":
            self._tally.refused = result.message or "the backend refused a batch without a reason"
            self._tell_failed(batch, result, reply.seconds)
            self._settle_pending()
            return
        if batch.full and not self._tally.applied_total and self._adopted and not batch.changes:
            self._log.warning("the source has no Service: what an earlier run left is removed")
        self._tally.applied(batch.full, time.time())
        self._after_full = self._after_full or batch.full
        self._pending_since = now if self._is_due() else None
        if self._verify_at == float("inf"):
            self._verify_at = now + self._interval()
        for observer in self._observers:
            observer.applied(batch, result, reply.seconds)
        if self._verify_at == float("inf"):
            self._first_in_force()

    def _settle_pending(self) -> None:
        """After a refusal: what is left waits for nobody, if it is only Services that were set aside."""
        if not self._ledger.unsettled:
            self._pending_since = None
            self._tally.refused = ""

    def _first_in_force(self) -> None:
        """What was programmed is verified, or never will be: once that is all of it, whatever waited for it may begin."""
        if self._pending_since is not None:
            return
        tell, self._tell_in_force = self._tell_in_force, None
        if tell is not None:
            tell()

    def _interval(self) -> float:
        return self._settings.verify_interval_seconds or float("inf")

    def _tell_failed(self, batch: ChangeBatch, result: ApplyResult, seconds: float) -> None:
        for observer in self._observers:
            observer.failed(batch, result, seconds)

    def _take_verified(self, reply: BackendReply) -> None:
        self._verify_at = self._clock() + self._interval()
        if reply.error is not None:
            self._log.error("cannot verify", backend=self._backend.name, error=reply.error)
            return
        verification: Verification = reply.value
        self._tally.figures = verification.figures
        if not verification.drift:
            self._drifts_in_a_row = max(0, self._drifts_in_a_row - 1)
            self._first_in_force()
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
        self._tally.drifted(verification.repaired, time.time())
        if not verification.repaired:
            self._full_reason = "drift"
            if self._pending_since is None:
                self._pending_since = self._clock()

    # -- what others see --

    def _publish(self) -> None:
        status = self._tally.status(
            self._desired,
            self._ledger,
            synced=self._synced,
            started=self._started,
            idle=self._pending_since is None and not self._backend.busy,
            pending_since=self._pending_since,
            held=self._held,
            troubles=self._troubles,
            lacking=self._lacking,
        )
        if status != self.status:
            self.status = status
        complaints = self._complaints()
        if complaints != self._told_complaints and self._started:
            news = self._told_complaints is None or bool(complaints) != bool(self._told_complaints)
            self._told_complaints = complaints
            for observer in self._observers if news else ():
                observer.health(not complaints, complaints)

    def _shut_down(self) -> None:
        for observer in self._observers:
            observer.close(timeout=2.0)
        if not self._backend.busy:
            self._backend.submit("stop")
        if not self._backend.close(timeout=5.0):
            self._log.warning("backend left behind", why=self._backend.overdue() or "still busy")
        self._log.info("stopped; everything programmed stays in force")
