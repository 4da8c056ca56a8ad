"""The threads on which plugins run: the engine hands work over and goes on at once.

`BackendRunner`: one thread, one call at a time, in the order of submission; every call is answered exactly
once through the callable given at construction.  `ObserverRunner`: a thread and a bounded queue for each
observer; one that cannot keep up misses events, is counted, and is then brought up to date by one full batch.

A call past its deadline is named and counted but not interrupted, since Python cannot: it is left behind.
For a backend nothing else runs meanwhile (two calls at once would break its promise of one at a time), so its
owner asks `overdue()` and reports itself as not alive.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any, NamedTuple

from .backend import ApplyResult, Verification
from .cell import Cell, cause_of
from .changes import ChangeBatch
from .errors import PluginError
from .logs import Log
from .observer import ObserverContext
from .status import ObserverStatus

BACKEND_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "probe": ("context",),
    "start": ("context",),
    "apply": ("batch",),
    "verify": ("deep",),
    "counters": (),
    "inspect": ("name",),
    "stop": (),
}
"""Calls of a running backend, and the names of their arguments in order."""

DEADLINES: Mapping[str, float] = {
    "probe": 10.0,
    "start": 30.0,
    "apply": 30.0,
    "verify": 30.0,
    "counters": 10.0,
    "inspect": 10.0,
    "stop": 10.0,
}
"""Seconds that a backend's call may take."""

SECONDS_PER_CHANGE = 0.01
"""So much more for each change of a batch."""

OBSERVER_DEADLINE = 30.0
"""Seconds that one call of an observer may take."""

OBSERVER_QUEUE = 256
"""Events that may wait for one observer."""

START_AGAIN_SECONDS = 10.0
"""An observer whose start failed is started again with the first event after this time."""

Clock = Callable[[], float]


class BackendReply(NamedTuple):
    """Answer to one `submit(kind, *args)`: `value` is what the hook returned, or `error` what it raised."""

    kind: str
    args: tuple[Any, ...]
    value: Any
    error: Exception | None
    seconds: float


class _Running(NamedTuple):
    """A call that has begun and not ended."""

    sequence: int
    kind: str
    began: float
    deadline: float


class _Watch:
    """Remembers the call that runs, and counts one that outlives its deadline once, whoever notices first."""

    def __init__(self, owner: str, log: Log, clock: Clock) -> None:
        self.overdue_total = 0
        self._owner = owner
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._sequence = 0
        self._counted = 0

    def begin(self, kind: str, deadline: float) -> None:
        self._sequence += 1
        self._running = _Running(self._sequence, kind, self._clock(), deadline)

    def end(self) -> float:
        """Seconds that the call took."""
        running = self._running
        assert running is not None
        self._running = None
        seconds = self._clock() - running.began
        if seconds > running.deadline:
            self._count(running)
            self._log.warning("late call returned", plugin=self._owner, call=running.kind, seconds=seconds)
        return seconds

    def overdue(self) -> str | None:
        """One sentence about a call that is past its deadline, else None."""
        running = self._running
        if running is None:
            return None
        seconds = self._clock() - running.began
        if seconds <= running.deadline:
            return None
        self._count(running)
        return (
            f"{running.kind} of {self._owner} has been running for {seconds:.0f} s, "
            f"past its deadline of {running.deadline:g} s"
        )

    def _count(self, running: _Running) -> None:
        with self._lock:
            if running.sequence <= self._counted:
                return
            self._counted = running.sequence
            self.overdue_total += 1
        self._log.error(
            "call is past its deadline",
            plugin=self._owner,
            call=running.kind,
            deadline_seconds=running.deadline,
        )


class BackendRunner:
    """The backend's thread.  `submit` is for one thread, the engine's; the rest may be asked from any."""

    def __init__(
        self,
        cell: Cell,
        deliver: Callable[[BackendReply], None],
        *,
        log: Log,
        deadlines: Mapping[str, float] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """`deliver` is called on the backend's thread with each answer and must not block."""
        self.cell = cell
        self._deliver = deliver
        self._deadlines = {**DEADLINES, **(deadlines or {})}
        self._watch = _Watch(cell.name, log, clock)
        self._log = log
        self._calls: SimpleQueue[tuple[str, tuple[Any, ...]] | None] = SimpleQueue()
        # Two counters with one writer each need no lock.
        self._submitted = 0
        self._answered = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"backend-{cell.name}", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return self.cell.name

    @property
    def busy(self) -> bool:
        """A submitted call is unanswered.  False again before its answer is delivered."""
        return self._submitted != self._answered

    @property
    def overdue_total(self) -> int:
        """Calls that outlived their deadline."""
        return self._watch.overdue_total

    def overdue(self) -> str | None:
        """One sentence about the call that is past its deadline, else None."""
        return self._watch.overdue()

    def submit(self, kind: str, *args: Any) -> None:
        """Queue one call.  Its answer, also that of a call that fails, comes through `deliver`."""
        names = BACKEND_ARGUMENTS[kind]
        if len(args) != len(names):
            raise TypeError(f"{kind} takes {len(names)} arguments ({', '.join(names)}), not {len(args)}")
        if self._closed:
            raise RuntimeError(f"{kind}: the backend's thread is closed")
        self._submitted += 1
        self._calls.put((kind, args))

    def close(self, timeout: float) -> bool:
        """End the thread after what was submitted.

        False if it still runs after `timeout` seconds: it is left behind.
        """
        if not self._closed:
            self._closed = True
            self._calls.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            kind, args = call
            self._watch.begin(kind, self._deadline(kind, args))
            value: Any = None
            failure: Exception | None = None
            try:
                value = self._call(kind, args)
            except Exception as error:  # noqa: BLE001  every failure is the answer to its call
                failure = error
            except BaseException as error:  # noqa: BLE001  no user's interrupt ever comes to this thread
                failure = self.cell.error(f"{kind} failed: {cause_of(error)}")
            seconds = self._watch.end()
            self._answered += 1
            self._deliver(BackendReply(kind, args, value, failure, seconds))

    def _deadline(self, kind: str, args: tuple[Any, ...]) -> float:
        """A first load of a large cluster may take its time."""
        more = len(args[0].changes) * SECONDS_PER_CHANGE if kind == "apply" else 0.0
        return self._deadlines[kind] + more

    def _call(self, kind: str, args: tuple[Any, ...]) -> Any:
        arguments = dict(zip(BACKEND_ARGUMENTS[kind], args, strict=True))
        value = self.cell.call(f"proxycore_backend_{kind}", **arguments)
        if kind == "apply" and value.generation != args[0].generation:
            raise self.cell.error(
                f"apply answered for generation {value.generation} instead of {args[0].generation}"
            )
        return value


class _Event(NamedTuple):
    """One call for an observer."""

    hook: str
    arguments: dict[str, object]


class ObserverRunner:
    """One observer's thread.  No method blocks, but `close`."""

    def __init__(
        self,
        cell: Cell,
        snapshot: Callable[[], ChangeBatch | None],
        *,
        log: Log,
        queue_size: int = OBSERVER_QUEUE,
        deadline: float = OBSERVER_DEADLINE,
        clock: Clock = time.monotonic,
    ) -> None:
        """`snapshot` is called on the observer's thread after it missed events, and may wait for the engine.

        It returns a full batch of all that is in force, its generation that of the last batch it covers; None
        while nothing is in force.
        """
        self.cell = cell
        self.dropped_total = 0
        self.failed_total = 0
        self._snapshot = snapshot
        self._log = log.bind(plugin=cell.name)
        self._watch = _Watch(cell.name, log, clock)
        self._size = queue_size
        self._deadline = deadline
        self._clock = clock
        self._ready = threading.Condition(threading.Lock())
        self._events: deque[_Event] = deque()
        self._resync = False
        self._closing = False
        self._context: ObserverContext | None = None
        self._started = False
        self._start_again = 0.0
        self._seen = -1
        self._health: _Event | None = None
        self._error = ""
        self._logged: set[tuple[str, str]] = set()
        self._thread = threading.Thread(target=self._run, name=f"observer-{cell.name}", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return self.cell.name

    @property
    def overdue_total(self) -> int:
        """Calls that outlived their deadline."""
        return self._watch.overdue_total

    def overdue(self) -> str | None:
        """One sentence about the call that is past its deadline, else None."""
        return self._watch.overdue()

    def status(self) -> ObserverStatus:
        """How it is doing, from any thread."""
        return ObserverStatus(
            name=self.name,
            failed_total=self.failed_total,
            dropped_total=self.dropped_total,
            overdue_total=self.overdue_total,
            overdue=self.overdue() or "",
            error=self._error,
        )

    def start(self, context: ObserverContext) -> None:
        """Start the observer; comes before all else."""
        self._context = context
        self._offer("start", context=context)

    def applied(self, batch: ChangeBatch, result: ApplyResult, seconds: float = 0.0) -> None:
        """A batch is in force."""
        self._offer("applied", batch=batch, result=result, seconds=seconds)

    def failed(self, batch: ChangeBatch, result: ApplyResult, seconds: float = 0.0) -> None:
        """Nothing of a batch came into force."""
        self._offer("failed", batch=batch, result=result, seconds=seconds)

    def drift(self, verification: Verification) -> None:
        """The kernel was found to differ."""
        self._offer("drift", verification=verification)

    def health(self, healthy: bool, reason: str) -> None:
        """The proxy's own health changed."""
        self._offer("health", healthy=healthy, reason=reason)

    def close(self, timeout: float) -> bool:
        """Call the stop hook and end the thread, forgetting events that wait.

        False if the observer still runs after `timeout` seconds: it is left behind.
        """
        with self._ready:
            self._closing = True
            self._ready.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _offer(self, kind: str, **arguments: object) -> None:
        event = _Event(f"proxycore_observer_{kind}", arguments)
        if kind not in ("start", "health") and not self.cell.implements(event.hook):
            return
        with self._ready:
            if kind == "health":
                self._health = event
            if self._closing:
                return
            if self._resync:
                self.dropped_total += kind != "health"
            elif len(self._events) >= self._size:
                self.dropped_total += len(self._events) + (kind != "health")
                self._events.clear()
                self._resync = True
            else:
                self._events.append(event)
            self._ready.notify()
        self._watch.overdue()

    def _run(self) -> None:
        while (event := self._next()) is not None:
            if event.hook.endswith("_start"):
                self._start()
            elif not self._started:
                self._start_later()
            elif event.hook == _RESYNC.hook:
                self._bring_up_to_date()
            else:
                self._tell(event)
        if self._started:
            self._call("proxycore_observer_stop", {})

    def _next(self) -> _Event | None:
        with self._ready:
            while not (self._closing or self._resync or self._events):
                self._ready.wait()
            if self._closing:
                return None
            if self._resync:
                # Cleared before the snapshot is taken: a later event is in it, as generations tell, or new.
                self._resync = False
                return _RESYNC
            return self._events.popleft()

    def _start(self) -> None:
        self._start_again = self._clock() + START_AGAIN_SECONDS
        self._started = self._call("proxycore_observer_start", {"context": self._context})

    def _start_later(self) -> None:
        """An observer that could not start misses everything until it can; then it gets the whole state."""
        if self._context is not None and self._clock() >= self._start_again:
            self._start()
            if self._started:
                self._bring_up_to_date()
                return
        self.dropped_total += 1

    def _bring_up_to_date(self) -> None:
        if self.cell.implements("proxycore_observer_applied"):
            try:
                batch = self._snapshot()
            except Exception as error:  # noqa: BLE001  the engine may be ending; the next overflow asks again
                self._log.error("no snapshot for an observer that missed events", error=cause_of(error))
                return
            if batch is not None:
                self._log.warning("observer missed events, sending all", dropped_total=self.dropped_total)
                self._tell(_applied(batch))
        if self._health is not None:
            self._tell(self._health)

    def _tell(self, event: _Event) -> None:
        batch = event.arguments.get("batch")
        if isinstance(batch, ChangeBatch) and event.hook.endswith("_applied"):
            if batch.generation <= self._seen and not batch.full:
                return
            self._seen = batch.generation
        self._call(event.hook, event.arguments)

    def _call(self, hook: str, arguments: dict[str, object]) -> bool:
        self._watch.begin(hook, self._deadline)
        try:
            self.cell.call(hook, **arguments)
        except BaseException as error:  # noqa: BLE001  an observer hurts nobody but itself
            self._note(hook, error)
            return False
        else:
            self._error = ""
            return True
        finally:
            self._watch.end()

    def _note(self, hook: str, error: BaseException) -> None:
        """Count a failure; log the first of its kind, so that a broken observer does not fill the log."""
        self.failed_total += 1
        self._error = str(error)
        cause = error.__cause__ if isinstance(error, PluginError) and error.__cause__ is not None else error
        kind = (hook, type(cause).__name__)
        if kind in self._logged:
            self._log.debug("observer failed again", hook=hook, error=error)
            return
        self._logged.add(kind)
        self._log.error("observer failed; more of this kind are only counted", hook=hook, error=error)


_RESYNC = _Event("resync", {})


def _applied(batch: ChangeBatch) -> _Event:
    return _Event(
        "proxycore_observer_applied",
        {"batch": batch, "result": ApplyResult(generation=batch.generation), "seconds": 0.0},
    )
