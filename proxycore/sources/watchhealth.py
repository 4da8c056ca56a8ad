"""What the resources' threads have come to, put together: when everything has been delivered, and whether it is current."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..objects import Kind
from ..source import Event, Health, Synced, Trouble

GRACE_SECONDS = 10.0
"""So long what a proxy can do without may keep the rest waiting at the start, counted from when the rest is there."""


class Resource(NamedTuple):
    """A kind as it is listed and watched; `essential`: without it nothing can be programmed."""

    kind: Kind
    path: str
    plural: str
    essential: bool
    labels: str = ""
    fields: str = ""


class _State:
    """Of one resource.  `problem`: why it is not watched; `excused`: we go on without it."""

    def __init__(self) -> None:
        self.complete = False
        self.excused = False
        self.watched = False
        self.problem = ""
        self.heard_at: float | None = None


class Board:
    """Gathers what the threads report, and tells the sink; every method may be called from any thread.

    Synced is told once Services and EndpointSlices are complete, and of the others each that is not excused: the server
    does not serve it or does not show it to us, or has failed to for GRACE_SECONDS.
    """

    def __init__(
        self,
        resources: Sequence[Resource],
        server: str,
        put: Callable[[list[Event]], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._server = server
        self._put = put
        self._clock = clock
        self._wall = wall
        self._lock = threading.Lock()
        self._resources = {resource.kind: resource for resource in resources}
        self._states = {resource.kind: _State() for resource in resources}
        self._due: float | None = None
        self._told: Health | None = None
        self._told_problem = ""
        self._troubles: dict[str, str] = {}
        self.synced = False

    def heard(self, kind: Kind) -> None:
        """Something came from the server.  Called for every piece of a watch: cheap."""
        self._states[kind].heard_at = self._wall()

    def heard_at(self) -> dict[str, float]:
        """When something last came from the server, in seconds since the epoch, by the plural."""
        return {
            self._resources[kind].plural: state.heard_at
            for kind, state in self._states.items()
            if state.heard_at is not None
        }

    def complete(self, kind: Kind) -> None:
        """A list was delivered."""
        with self._lock:
            state = self._states[kind]
            state.complete, state.excused, state.problem, state.heard_at = True, False, "", self._wall()
            self._tell(self._trouble(kind, ""))

    def watched(self, kind: Kind) -> None:
        """A watch is open."""
        with self._lock:
            state = self._states[kind]
            state.watched, state.problem, state.heard_at = True, "", self._wall()
            self._tell([])

    def failed(self, kind: Kind, problem: str) -> None:
        """It cannot be had, for a reason that does not change by itself from one try to the next."""
        with self._lock:
            state = self._states[kind]
            state.watched, state.problem = False, problem
            self._tell([])

    def excuse(self, kind: Kind, reason: str) -> None:
        """Go on without it; `reason` is for people, and empty where nothing is amiss."""
        with self._lock:
            state = self._states[kind]
            state.excused, state.watched, state.problem = True, False, ""
            self._tell(self._trouble(kind, reason))

    def tick(self) -> float | None:
        """Look whether those that are missing were waited for long enough; seconds until the next look, None: never."""
        with self._lock:
            if self.synced:
                return None
            if self._due is None:
                return 1.0
            left = self._due - self._clock()
            if left > 0:
                return left
            troubles: list[Event] = []
            for kind in self._missing():
                reason = self._states[kind].problem or "there was no answer in time"
                self._states[kind].excused = True
                troubles += self._trouble(kind, f"{reason}; going on without")
            self._tell(troubles)
            return None

    def _missing(self) -> list[Kind]:
        return [kind for kind, state in self._states.items() if not (state.complete or state.excused)]

    def _trouble(self, kind: Kind, reason: str) -> list[Event]:
        subject = f"API resource {self._resources[kind].plural}"
        if self._troubles.get(subject, "") == reason:
            return []
        self._troubles[subject] = reason
        # Without ServiceCIDRs addresses of no Service are not dropped, and that is all.
        harmless = not reason or kind == "ServiceCIDR"
        return [Trouble(subject, reason, harmless=harmless, tolerable=not harmless, kind=kind)]

    def _tell(self, events: list[Event]) -> None:
        """Add what follows from the states, and hand over."""
        if not self.synced:
            missing = self._missing()
            if not missing:
                self.synced = True
                events = [*events, Synced()]
            elif self._due is None and not any(self._resources[kind].essential for kind in missing):
                self._due = self._clock() + GRACE_SECONDS
        health = self._health()
        if health is not None and health != self._told:
            self._told = health
            events = [*events, health]
        if events:
            self._put(events)

    def _health(self) -> Health | None:
        """None: as was told."""
        failing = {
            kind: state.problem
            for kind, state in self._states.items()
            if state.problem and not state.excused and (self.synced or self._resources[kind].essential)
        }
        if not failing:
            self._told_problem = ""
            waiting = any(not state.watched for state in self._states.values() if not state.excused)
            return None if waiting or not self.synced else Health("live")
        if self._told_problem in failing.values():
            return None
        kind, problem = next(iter(failing.items()))
        self._told_problem = problem
        return Health("stale", f"API server {self._server}: {problem}; {self._last_heard(kind)}")

    def _last_heard(self, kind: Kind) -> str:
        """As a time of day: an age would be wrong as soon as it is read."""
        plural, heard_at = f"{kind}s", self._states[kind].heard_at
        if heard_at is None:
            return f"nothing was heard of {plural} yet"
        return f"last heard of {plural} at {time.strftime('%H:%M:%S', time.gmtime(heard_at))} UTC"
