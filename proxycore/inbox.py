"""What the engine is told: at the start, and through its inbox while it runs."""

from __future__ import annotations

from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

import msgspec

from .changes import ChangeBatch
from .dispatch import BackendReply
from .frontends import RESERVED_PORTS
from .model import Family, Protocol
from .source import Event
from .store import Contents


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


class HostMayHaveChanged(NamedTuple):
    """Something that the host function reads is different now."""


class Stop(NamedTuple):
    """End the loop."""


class TakeSnapshot(NamedTuple):
    """Somebody waits for a full batch of all that is in force."""

    answer: Future[ChangeBatch | None]


class ReadContents(NamedTuple):
    """Somebody waits for all objects."""

    answer: Future[Contents]


class SetSettings(NamedTuple):
    """The settings are others from now on."""

    settings: EngineSettings


Item = list[Event] | BackendReply | HostMayHaveChanged | Stop | TakeSnapshot | ReadContents | SetSettings


class InboxSink:
    """Where sources put their events."""

    def __init__(self, inbox: SimpleQueue[Item]) -> None:
        self._inbox = inbox

    def put(self, events: list[Event]) -> None:
        """Hand over events; returns at once."""
        if events:
            self._inbox.put(events)
