"""What a source says once, resolved for this node, without an engine: for `render` and `plan`."""

from __future__ import annotations

import threading
from typing import NamedTuple

from .backend import BackendContext
from .changes import ChangeBatch, HostChange, change
from .config import Config
from .errors import SourceError
from .model import HostState
from .source import Event, Health, Source, Synced, Trouble

SYNC_SECONDS = 60.0
"""How long a source may take to deliver what is there."""


class Offline(NamedTuple):
    """A backend's context and one full batch.

    `troubles`: what could not be read; `ignored`: parts of objects that have no effect.  A sentence each.
    """

    context: BackendContext
    batch: ChangeBatch
    troubles: tuple[str, ...]
    ignored: tuple[str, ...]


class _Collector:
    """A sink that keeps everything up to Synced, then ends the source."""

    def __init__(self, source: Source) -> None:
        self.events: list[Event] = []
        self.synced = False
        self.reason = ""
        self._source = source

    def put(self, events: list[Event]) -> None:
        if self.synced or self.reason:
            return
        for event in events:
            if isinstance(event, Synced):
                self.synced = True
                break
            if isinstance(event, Health) and event.state == "stale":
                self.reason = event.reason or "it is not available"
            else:
                self.events.append(event)
        if self.synced or self.reason:
            self._source.stop()


def collect(source: Source, timeout: float = SYNC_SECONDS) -> list[Event]:
    """Run a source until everything that is there has been delivered; those events.

    Raises SourceError: it did not come so far; nothing was touched.
    """
    collector = _Collector(source)
    timer = threading.Timer(timeout, source.stop)
    timer.daemon = True
    timer.start()
    try:
        source.run(collector)
    finally:
        timer.cancel()
    if not collector.synced:
        raise SourceError(
            collector.reason
            or f"the source has not delivered everything within {timeout:g} s, or ended before"
        )
    return collector.events


def load_states(source: Source, config: Config, node_name: str) -> Offline:
    """The full batch that a first programming would bring, and the context for it.

    Raises SourceError as collect() does.
    """
    from .desired import Desired
    from .host import resolve_host

    events = collect(source)
    troubles = tuple(
        f"{event.subject}: {event.reason}" for event in events if isinstance(event, Trouble) and event.reason
    )
    host: HostState = resolve_host(config, node_name, events)
    desired = Desired(node_name)
    desired.handle(events, host)
    batch = ChangeBatch(
        generation=1,
        changes=tuple(change(name, None, state) for name, state in desired.states.items()),
        host=HostChange(before=None, after=host),
        full=True,
        reason="start",
    )
    ignored = tuple(
        f"{subject}: {reason}" for subject, reasons in desired.problems.items() for reason in reasons
    )
    return Offline(context_of(config, host), batch, troubles, ignored)


def context_of(config: Config, host: HostState) -> BackendContext:
    """What a backend is told at start."""
    return BackendContext(host=host, families=host.families, options=config.backend_options)
