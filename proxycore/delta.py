"""What is desired beside what the backend last acknowledged; the difference becomes batches.

A change stays pending until the backend has acknowledged it.  One batch is out at a time; what changes meanwhile goes into
the next one, and what changes back disappears.  Only here is anything ever retried:

    rejected, culprits named    -> these are set aside, the rest goes out again at once
    rejected, nobody named      -> halves, until the culprits are alone
    failed or unsupported alone -> set aside; their last state, or nothing, is in force
    unknown, or an exception    -> UNKNOWN: the next change must read or rewrite

When three suspects in a row are refused alone and nothing has worked in between, the Services are hardly at fault:
then all waits, a little longer each time.

The clock is the caller's: `now` is in seconds and never goes back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from .backend import ApplyResult
from .changes import UNKNOWN, ChangeBatch, HostChange, ServiceChange, Unknown, change
from .errors import InternalError
from .model import HostState, ServicePortName, ServiceState
from .quarantine import Quarantine, Quarantined, delay_seconds

REFUSALS_IN_A_ROW = 3
LONGEST_PAUSE_SECONDS = 30.0
FULL_TRIES = 2
"""So often a full batch that ended in an exception is tried whole before it is halved: halves take rules away."""


class Ledger:
    """Books of one backend.  All methods are to be called on one thread."""

    def __init__(self) -> None:
        self._desired: dict[ServicePortName, ServiceState] = {}
        self._acknowledged: dict[ServicePortName, ServiceState | Unknown] = {}
        self._last_good: dict[ServicePortName, ServiceState] = {}  # of what is UNKNOWN now
        self._pending: dict[ServicePortName, float | None] = {}  # name: trigger time
        self._told: dict[ServicePortName, float] = {}  # of pending ones: trigger time that their objects tell
        self._quarantine = Quarantine()
        self._host: HostState | None = None
        self._host_acknowledged: HostState | None = None
        self._host_held: Quarantined | None = None
        self._full_reason: str | None = None
        self._generation = 0
        self._in_flight: ChangeBatch | None = None
        self._tried: dict[ServicePortName, float | None] = {}  # of the batch in flight: name, trigger time
        self._suspects: list[
            tuple[ServicePortName, ...]
        ] = []  # groups to be tried by themselves, last one first
        self._host_alone = False
        self._refused: list[ServicePortName] = []  # refused alone since something last worked
        self._pauses = 0
        self._paused_until = float("-inf")
        self._retries_next = False
        self._full_tries = 0
        self._full_failed = False  # since one was last applied

    # What is known

    @property
    def generation(self) -> int:
        """Of the last batch made; 0 before the first."""
        return self._generation

    @property
    def in_flight(self) -> ChangeBatch | None:
        """The batch that is neither acknowledged nor given up."""
        return self._in_flight

    @property
    def acknowledged(self) -> Mapping[ServicePortName, ServiceState | Unknown]:
        """What the backend has in force, as far as it said so; a live view."""
        return MappingProxyType(self._acknowledged)

    @property
    def desired(self) -> Mapping[ServicePortName, ServiceState]:
        """What should be in force; a live view."""
        return MappingProxyType(self._desired)

    @property
    def quarantined(self) -> Mapping[ServicePortName, Quarantined]:
        """What is set aside, why, how often it failed, and when it is tried again; a live view."""
        return self._quarantine.view

    @property
    def version(self) -> int:
        """Raised whenever `quarantined` changes."""
        return self._quarantine.version

    @property
    def pending(self) -> frozenset[ServicePortName]:
        """Names whose desired state is not acknowledged, those in flight and in quarantine included."""
        return frozenset(self._pending) | self._tried.keys()

    @property
    def unsettled(self) -> bool:
        """Something is not in force, and that is no fault of single Services: these are set aside."""
        return (
            self._has_healthy()
            or self._full_reason is not None
            or self.host_pending
            or len(self._refused) >= REFUSALS_IN_A_ROW
        )

    @property
    def host_pending(self) -> bool:
        """The backend has not acknowledged the node's present facts."""
        return self._host != self._host_acknowledged

    def next_time(self, now: float) -> float | None:
        """The earliest moment at which batch() may have something to send; None: not before something changes."""
        if self._in_flight is not None:
            return None
        times = []
        if (
            self._has_healthy()
            or self._full_reason is not None
            or (self.host_pending and self._host_held is None)
        ):
            times.append(now)
        if self._host_held is not None and self.host_pending:
            times.append(self._host_held.next_retry)
        retry = self._quarantine.next_retry()
        if retry is not None:
            times.append(retry)
        return max(now, min(times), self._paused_until) if times else None

    # What changes

    def update(
        self,
        changed: Mapping[ServicePortName, ServiceState | None],
        trigger_time: float | None = None,
        told: Mapping[ServicePortName, float] = MappingProxyType({}),
    ) -> None:
        """Take note of new desired states (None: it is to go); each of them leaves quarantine.

        `trigger_time`: seconds since the epoch at which the earliest cause began; `told`: of those whose objects say when.
        """
        for name, state in changed.items():
            if name in told:
                known = self._told.get(name)
                began = told[name]
                self._told[name] = began if known is None or name in self._tried else min(known, began)
            if state is None:
                self._desired.pop(name, None)
            else:
                self._desired[name] = state
            self._quarantine.release(name)
            self._settle(name, trigger_time)

    def update_host(self, host: HostState) -> None:
        """Take note of the node's facts.  What a backend could not do before it may be able to do now."""
        if host == self._host:
            return
        self._host = host
        self._host_held = None
        for name, held in list(self._quarantine.view.items()):
            if held.next_retry == float("inf"):
                self._quarantine.release(name)

    def forget(self, reason: str) -> None:
        """Another backend, or one that was started anew: nothing is acknowledged, the next batch is a full one.

        A batch in flight is given up.
        """
        self._in_flight = None
        self._tried.clear()
        self._acknowledged.clear()
        self._last_good.clear()
        self._full_failed = False
        self._host_acknowledged = self._host_held = None
        self._quarantine.clear()
        self._suspects.clear()
        self._host_alone = False
        self._worked(0.0)
        self._pending = dict.fromkeys(self._desired, None)
        self._told.clear()
        self._full_reason = reason

    # Batches out

    def batch(
        self,
        now: float,
        *,
        full: bool = False,
        reason: str = "",
    ) -> ChangeBatch | None:
        """The next batch, None if there is nothing to send now.

        `full` asks for a full batch; until one is acknowledged, every batch will be full.  Quarantined Services are in a
        full batch with the state that was last acknowledged, so that they keep it.  Of those without one, what may be in
        force after a failure is in it as desired, until a full batch fails.
        Raises InternalError while a batch is in flight.
        """
        if self._in_flight is not None:
            raise InternalError(f"batch {self._generation} is still in flight")
        if full:
            self._full_reason = reason or "full resynchronisation"
        if now < self._paused_until:
            return None
        names, with_host = self._select(now)
        if self._full_reason is not None:
            changes, why = self._full_changes(names), self._full_reason
        else:
            changes, why = tuple([self._change(name) for name in names]), reason
            if not changes and not with_host:
                return None
        host = (
            HostChange(before=self._host_acknowledged, after=self._host) if with_host and self._host else None
        )
        self._tried = {name: self._pending.pop(name) for name in names}
        times = [time for time in self._tried.values() if time is not None]
        self._generation += 1
        self._in_flight = ChangeBatch(
            generation=self._generation,
            changes=changes,
            host=host,
            full=self._full_reason is not None,
            reason=why,
            oldest_trigger_time=min(times, default=None),
        )
        return self._in_flight

    def _select(self, now: float) -> tuple[list[ServicePortName], bool]:
        """The names to try now, and whether the node's facts go along."""
        host = self.host_pending and (self._host_held is None or self._host_held.next_retry <= now)
        if self._host_alone:
            self._host_alone = False
            if host:
                return [], True
        while self._suspects:
            group = self._suspects.pop()
            names = [name for name in group if name in self._pending and self._quarantine.ready(name, now)]
            if names:
                # A full batch without the node's facts would be none; alone they would be one that takes all away.
                return names, host and self._full_reason is not None
        due = [name for name in self._quarantine.due(now) if name in self._pending]
        if due and (self._retries_next or not (host or self._has_healthy())):
            self._retries_next = False
            return due, False
        self._retries_next = True
        return [name for name in self._pending if name not in self._quarantine], host

    def _has_healthy(self) -> bool:
        return len(self._pending) > len(self._quarantine)  # what is quarantined is pending

    def _change(self, name: ServicePortName) -> ServiceChange:
        return change(name, self._acknowledged.get(name), self._desired.get(name), self._told.get(name))

    def _full_changes(self, names: Iterable[ServicePortName]) -> tuple[ServiceChange, ...]:
        """All that must be in force: the new state of `names`, of what else is pending the one to keep."""
        tried = set(names)
        changes = []
        for name in dict.fromkeys((*self._desired, *self._acknowledged)):
            if name in tried or name not in self._pending:
                changes.append(self._change(name))
                continue
            known, keep = self._acknowledged.get(name), self._state_to_keep(name)
            if keep is not None or (known is UNKNOWN and not self._full_failed):
                changes.append(change(name, known, keep))
        return tuple(changes)

    def _state_to_keep(self, name: ServicePortName) -> ServiceState | None:
        """What a full batch has of a Service that it does not try; None: nothing.

        Where it is UNKNOWN what is in force, the last good state is: it was programmed once, when the desired one may be
        what failed.  That is sent only where there is no other, and not again after a full batch failed.
        """
        known = self._acknowledged.get(name)
        if isinstance(known, ServiceState):
            return known
        desired = self._desired.get(name)
        if known is None or desired is None:
            return None
        return self._last_good.get(name, None if self._full_failed else desired)

    def in_force(self) -> dict[ServicePortName, ServiceState]:
        """What the backend has in force; of what is UNKNOWN what it had when it was last known."""
        known = {name: state for name, state in self._acknowledged.items() if isinstance(state, ServiceState)}
        return {**known, **self._last_good}

    # Answers in

    def acknowledge(self, batch: ChangeBatch, result: ApplyResult, now: float) -> None:
        """Take in a backend's answer.

        Raises InternalError when `batch` is not the one in flight; nothing is changed.  An answer for another generation
        says nothing about this batch: it counts as an exception.
        """
        if batch is not self._in_flight:
            raise InternalError(f"batch {batch.generation} is not in flight")
        if result.generation != batch.generation:
            self.lost(
                batch, f"the backend answered for generation {result.generation}, not {batch.generation}", now
            )
        elif result.outcome == "applied":
            self._applied(batch, result, now)
        else:
            self._rejected(batch, result, now)

    def lost(self, batch: ChangeBatch, why: str, now: float) -> None:
        """The backend raised, or never answered: every Service of the batch is UNKNOWN.

        Raises InternalError when `batch` is not the one in flight; nothing is changed.
        """
        if batch is not self._in_flight:
            raise InternalError(f"batch {batch.generation} is not in flight")
        tried = self._take_back()
        for item in batch.changes:
            self._doubt(item.name)
            self._pending.setdefault(item.name, None)
        if batch.host is not None:
            self._host_acknowledged = None
        if batch.full:
            self._full_failed = True
            self._full_tries += 1
            if self._full_tries <= FULL_TRIES:
                self._pause(now)
                return
            # The culprit may be among what was good once: it is found only by leaving out all that is not tried.
            self._last_good.clear()
        self._narrow(batch, tried, why, now)

    def _take_back(self) -> tuple[ServicePortName, ...]:
        """The batch in flight is over; what it tried is pending as before."""
        tried = tuple(self._tried)
        for name, time in self._tried.items():
            self._settle(name, time)
        self._tried = {}
        self._in_flight = None
        return tried

    def _doubt(self, name: ServicePortName) -> None:
        """Nobody knows what of a Service is in force."""
        known = self._acknowledged.get(name)
        if isinstance(known, ServiceState):
            self._last_good[name] = known
        self._acknowledged[name] = UNKNOWN

    def _know(self, name: ServicePortName, state: ServiceState | None) -> None:
        """What is in force of a Service; None: nothing."""
        if self._last_good:
            self._last_good.pop(name, None)
        if state is None:
            self._acknowledged.pop(name, None)
        else:
            self._acknowledged[name] = state

    def _applied(self, batch: ChangeBatch, result: ApplyResult, now: float) -> None:
        tried, self._tried, self._in_flight = self._tried, {}, None
        failed = {failure.name: failure.why for failure in result.failed}
        unsupported = {failure.name: failure.why for failure in result.unsupported}
        unknown = frozenset(result.unknown)
        exceptions = 0
        for item in batch.changes:
            name, after = item.name, item.after
            if name in failed:
                if self._desired.get(name) == after or name not in tried:
                    self._quarantine.hold(name, failed[name], now)
            elif name in unsupported:
                self._know(name, None)
                self._quarantine.hold(name, unsupported[name], now, forever=True)
            elif name in unknown:
                self._doubt(name)
                self._quarantine.hold(name, result.message or "may be half done", now, patient=False)
            else:
                self._know(name, after)
                if name in tried:
                    self._quarantine.release(name)
                if item.trigger_time is not None and self._told.get(name) == item.trigger_time:
                    del self._told[name]
                self._settle(name, None)
                continue
            exceptions += 1
            self._settle(name, tried.get(name))
        if batch.host is not None:
            self._host_acknowledged, self._host_held = batch.host.after, None
        if batch.full:
            self._full_reason, self._full_failed = None, False
        if len(tried) > exceptions or batch.host is not None or batch.full:
            self._worked(now)

    def _rejected(self, batch: ChangeBatch, result: ApplyResult, now: float) -> None:
        tried = self._take_back()
        if result.culprits == ():
            self._pause(now)
            return
        self._full_failed = self._full_failed or batch.full
        among = {item.name: item for item in batch.changes}
        culprits = [failure for failure in result.culprits or () if failure.name in among]
        if not culprits:
            self._narrow(batch, tried, result.message or "refused without a reason", now)
            return
        for failure in culprits:
            if failure.name not in tried:
                # Even the state that was in force is refused now: there is none to keep.
                self._acknowledged[failure.name] = UNKNOWN
                self._last_good.pop(failure.name, None)
                self._pending.setdefault(failure.name, None)
                self._quarantine.hold(failure.name, failure.why, now)
            elif self._still_wanted(among[failure.name]):
                self._quarantine.hold(failure.name, failure.why, now)

    def _narrow(self, batch: ChangeBatch, tried: tuple[ServicePortName, ...], why: str, now: float) -> None:
        """Something in the batch is at fault: halve what was tried, or name the last one left."""
        host_suspected = batch.host is not None and not batch.full
        if not tried:
            if host_suspected:
                attempts = self._host_held.attempts + 1 if self._host_held else 1
                self._host_held = Quarantined(
                    why, attempts, now + delay_seconds(attempts, LONGEST_PAUSE_SECONDS)
                )
            else:
                self._pause(now)
            return
        if len(tried) > 1 or host_suspected:
            self._host_alone = host_suspected
            middle = (len(tried) + 1) // 2
            self._suspects += [half for half in (tried[middle:], tried[:middle]) if half]
            return
        (item,) = (item for item in batch.changes if item.name == tried[0])
        if not self._still_wanted(item):
            return
        self._quarantine.hold(item.name, why, now)
        self._refused.append(item.name)
        if len(self._refused) >= REFUSALS_IN_A_ROW:
            self._pause(now)

    def _still_wanted(self, item: ServiceChange) -> bool:
        """What was refused is what is desired even now; otherwise the refusal is about an object of the past."""
        return item.name in self._pending and self._desired.get(item.name) == item.after

    def _pause(self, now: float) -> None:
        self._pauses += 1
        self._paused_until = now + delay_seconds(self._pauses, LONGEST_PAUSE_SECONDS)

    def _worked(self, now: float) -> None:
        """The backend works: what it refused while nothing worked deserves another try."""
        if len(self._refused) >= REFUSALS_IN_A_ROW:
            self._quarantine.hurry(self._refused, now)
        self._refused.clear()
        self._pauses = self._full_tries = 0
        self._paused_until = float("-inf")

    def _settle(self, name: ServicePortName, trigger_time: float | None) -> None:
        """Keep a name pending while desired and acknowledged differ."""
        desired, known = self._desired.get(name), self._acknowledged.get(name)
        if desired is known or (desired is not None and known is not UNKNOWN and desired == known):
            self._pending.pop(name, None)
            if self._told:
                self._told.pop(name, None)
            self._quarantine.release(name)
            return
        before = self._pending.get(name)
        if before is not None and (trigger_time is None or before < trigger_time):
            trigger_time = before
        self._pending[name] = trigger_time
