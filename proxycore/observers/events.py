"""Observer `events`: tells in the cluster, as events.k8s.io/v1 Events, that we start and which Services are not programmed.

On the Node: `Starting`, and one summary where too many Services are refused to name them one by one.  On a Service:
`NotProgrammed`, a warning with the reason, and `Programmed` when that is over.  Nothing where objects do not come from an
API server.  What is refused is looked up in the published status, so that nothing has to be kept of the batches, and a
storm is one look.  It needs no right but to create Events.
"""

from __future__ import annotations

import random
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from .. import __version__
from ..apiclient import APIClient, Limiter, connect, jittered, read
from ..changes import ChangeBatch
from ..errors import SourceError
from ..hookspecs import hookimpl
from ..logs import get
from ..model import ServicePortName
from ..observer import ObserverContext
from ..status import Status

CONTROLLER = "proxycore"
"""Who reports.  Not `kube-proxy`, which may run beside us while a cluster moves: it must show who said what."""
START_ACTION = "StartKubeProxy"
"""As kube-proxy has it, for those who look for it."""
PROGRAM_ACTION = "ProgramService"
GATHER_SECONDS = 1.0
"""So long after a batch it is looked at what is refused; what is put right within is not worth an Event."""
SPREAD = 30.0
"""Up to so many times as long: the cluster's nodes do not all speak at once."""
LOOK_SECONDS = 10.0
AGAIN_SECONDS = 300.0
"""A Service whose reason changes is told again after this time at the earliest; so is a summary."""
BURST = 5
PER_SECOND = 0.1
"""Events: at once, and in the long run."""
QUEUE = 100
TRIES = 5
RETRY_SECONDS = (1.0, 60.0)
REFUSED_SECONDS = 600.0
"""Pause after the API server has refused an Event: it will refuse the next one too."""
MAX_NOTE_BYTES = 1024
_NAMED = 3
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]{0,230}[a-z0-9])?\Z")

Service = tuple[str, str]
"""Namespace and name."""


class Note(NamedTuple):
    """An Event to be; `service` is None for one on the Node."""

    service: Service | None
    reason: str
    note: str
    warning: bool = False
    action: str = PROGRAM_ACTION


class Judge:
    """Decides what is worth an Event; `limiter` says when there were enough."""

    def __init__(self, limiter: Limiter, clock: Callable[[], float]) -> None:
        self._limiter = limiter
        self._clock = clock
        self._told: dict[Service, tuple[str, float]] = {}
        self._summary = float("-inf")
        """When there was last a summary."""
        self._open = False
        """It is not over."""
        self._covered: set[Service] = set()
        """Services that only a summary speaks of."""

    def notes(self, refused: Mapping[Service, str], gone: frozenset[Service] = frozenset()) -> list[Note]:
        """What is new, given everything that is refused now; `gone` are deleted, not mended."""
        now = self._clock()
        notes: list[Note] = []
        for service in [service for service in self._told if service not in refused]:
            del self._told[service]
            if service not in gone and self._limiter.allows():
                notes.append(Note(service, "Programmed", "The Service is programmed on this node again"))
        self._covered &= refused.keys()
        left: list[Service] = []
        for service, why in refused.items():
            before = self._told.get(service)
            known = before is not None and (before[0] == why or now - before[1] < AGAIN_SECONDS)
            if known or service in self._covered:
                continue
            if self._limiter.allows():
                self._told[service] = (why, now)
                notes.append(Note(service, "NotProgrammed", why, warning=True))
            elif before is None:
                left.append(service)
        if left and now - self._summary >= AGAIN_SECONDS:
            self._summary, self._open = now, True
            self._covered.update(left)
            some = ", ".join("/".join(service) for service in left[:_NAMED])
            text = f"{len(refused)} Services are not programmed on this node, {some} among them: {refused[left[0]]}"
            notes.append(Note(None, "NotProgrammed", text, warning=True))
        elif self._open and not refused:
            self._open = False
            notes.append(Note(None, "Programmed", "All Services are programmed on this node again"))
        return notes


class EventsObserver:
    """Hooks only wake the worker, which looks, and posts one Event after the other."""

    def __init__(self) -> None:
        self.posted_total = 0
        self.failed_total = 0
        self.dropped_total = 0
        self._log = get("events")
        self._changed = threading.Condition()
        self._stopping = False
        self._look_at: float | None = None
        self._gone: set[Service] = set()
        self._queue: deque[tuple[Note, str]] = deque()
        self._judge = Judge(Limiter(PER_SECOND, BURST), time.monotonic)
        self._said: set[str] = set()
        self._client: APIClient | None = None
        self._context: ObserverContext | None = None
        self._worker: threading.Thread | None = None

    @hookimpl
    def proxycore_observer_start(self, context: ObserverContext) -> None:
        if context.api_server is None:
            return
        self._context = context
        try:
            self._client = connect(context.api_server, user_agent=f"proxycore/{__version__} (events)")
        except SourceError as error:
            self._log.warning("no Events are written", reason=str(error))
            return
        mode = f", for mode {context.mode}" if context.mode else ""
        text = f"Starting proxycore {__version__} with the {context.backend.name} backend{mode}"
        self._push(Note(None, "Starting", text, action=START_ACTION))
        self._worker = threading.Thread(target=self._work, name="events-worker", daemon=True)
        self._worker.start()

    @hookimpl
    def proxycore_observer_applied(self, batch: ChangeBatch) -> None:
        self._wake({(c.name.namespace, c.name.name) for c in batch.changes if c.after is None})

    @hookimpl
    def proxycore_observer_failed(self, batch: ChangeBatch) -> None:
        self._wake(set())

    @hookimpl
    def proxycore_observer_stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._client is not None:
            self._client.close()
        if self._worker is not None:
            self._worker.join(1.0)

    def _wake(self, gone: set[Service]) -> None:
        with self._changed:
            if self._worker is None:
                return
            self._gone |= gone
            # Every node may have met the same Service at the same moment.
            soon = time.monotonic() + GATHER_SECONDS * random.uniform(1.0, SPREAD)
            if self._look_at is None or self._look_at > soon:
                self._look_at = soon
                self._changed.notify_all()

    # -- the worker --

    def _work(self) -> None:
        tries, retry_at = 0, 0.0
        while self._wait(retry_at):
            if self._take_due():
                self._look()
            if not self._queue or time.monotonic() < retry_at:
                continue
            note, when = self._queue[0]
            pause = self._post(note, when)
            if pause is None:
                self._queue.popleft()
                tries, retry_at = 0, 0.0
                continue
            tries += 1
            retry_at = time.monotonic() + max(
                pause, jittered(min(RETRY_SECONDS[1], RETRY_SECONDS[0] * 2**tries))
            )
            if tries >= TRIES or pause >= REFUSED_SECONDS:
                self._queue.popleft()
                self.dropped_total += 1
                tries = 0

    def _wait(self, retry_at: float) -> bool:
        """Wait until something is to be done; False: stop."""
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                due = [at for at in (self._look_at, retry_at if self._queue else None) if at is not None]
                if due and min(due) <= now:
                    return True
                self._changed.wait(min(due) - now if due else None)
            return False

    def _take_due(self) -> bool:
        with self._changed:
            if self._look_at is None or self._look_at > time.monotonic():
                return False
            self._look_at = None
            return True

    def _look(self) -> None:
        """Compare what is refused now with what was told."""
        assert self._context is not None
        with self._changed:
            gone = frozenset(self._gone)
            self._gone.clear()
        if self._context.facts is None:
            return
        refused = refused_services(self._context.facts().status)
        for note in self._judge.notes(refused, gone):
            self._push(note)
        if refused:
            # It may be put right, or another reason be found, without a batch that we are told of.
            with self._changed:
                if self._look_at is None:
                    self._look_at = time.monotonic() + LOOK_SECONDS

    def _push(self, note: Note) -> None:
        if len(self._queue) >= QUEUE:
            self.dropped_total += 1
            return
        self._queue.append((note, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")))

    def _post(self, note: Note, when: str) -> float | None:
        """Post one; None: done with, else it failed, and the next try comes after so many seconds at the earliest."""
        assert self._context is not None
        assert self._client is not None
        value = event(note, when, self._context.host.node_name)
        if value is None:
            self._fail("a name that no Event can carry", note)
            return None
        namespace = value["metadata"]["namespace"]
        try:
            response = self._client.post(f"/apis/events.k8s.io/v1/namespaces/{namespace}/events", value)
            status, retry_after = response.status, response.headers.get("Retry-After", "")
            read(response)
        except SourceError as error:
            self._fail(str(error), note)
            return 0.0
        if 200 <= status < 300:
            self.posted_total += 1
            return None
        self._fail(f"the API server answers {status}", note)
        if status in (401, 429) or status >= 500:
            return float(retry_after) if retry_after.isdecimal() else 0.0
        # A namespace that is being deleted refuses too, and speaks for itself alone.
        return REFUSED_SECONDS if status == 403 and note.service is None else None

    def _fail(self, reason: str, note: Note) -> None:
        """Count a failure; log the first of its kind."""
        self.failed_total += 1
        if self._stopping or reason in self._said or len(self._said) > 20:
            return
        self._said.add(reason)
        self._log.warning(
            "cannot write an Event; more of this kind are only counted", event=note.reason, reason=reason
        )


def refused_services(status: Status) -> dict[Service, str]:
    """Services of which some port is not in force as it should be, and why."""
    reasons: dict[Service, dict[str, list[ServicePortName]]] = {}
    for refused in (status.quarantined, status.unsupported):
        for name, why in refused.items():
            reasons.setdefault((name.namespace, name.name), {}).setdefault(why, []).append(name)
    return {
        service: "; ".join(f"{_ports(names)}: {why}" for why, names in sorted(found.items()))
        for service, found in sorted(reasons.items())
    }


def _ports(names: list[ServicePortName]) -> str:
    return ", ".join(f"{n.port}/{n.protocol} {n.family}".lstrip("/") for n in sorted(set(names)))


def event(note: Note, when: str, node_name: str) -> dict[str, Any] | None:
    """The Event as the API takes it; None: a name of it is none that the API admits.

    Events on the Node, which has no namespace, are in `default`; those on a Service are beside it.
    """
    if note.service is None:
        namespace, name = "default", node_name
        # kube-proxy and the kubelet put the name where the UID belongs, and are looked up by it.
        regarding = {"apiVersion": "v1", "kind": "Node", "name": name, "uid": name}
    else:
        namespace, name = note.service
        regarding = {"apiVersion": "v1", "kind": "Service", "name": name, "namespace": namespace}
    if not _LABEL.match(namespace) or not _SUBDOMAIN.match(name) or not node_name.isprintable():
        return None
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{name}.{secrets.token_hex(8)}", "namespace": namespace},
        "eventTime": when,
        "reportingController": CONTROLLER,
        "reportingInstance": f"{CONTROLLER}-{node_name}"[:128],
        "action": note.action,
        "reason": note.reason,
        "regarding": regarding,
        "note": _cut(note.note),
        "type": "Warning" if note.warning else "Normal",
    }


def _cut(text: str) -> str:
    data = text.encode("utf-8", "replace")
    if len(data) <= MAX_NOTE_BYTES:
        return data.decode()
    return data[: MAX_NOTE_BYTES - 3].decode("utf-8", "ignore") + "..."


def plugin() -> EventsObserver:
    """Entry point of `events`."""
    return EventsObserver()
