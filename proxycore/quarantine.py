"""Service ports that a backend could not bring into force: why, how often, and when they are tried again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf
from types import MappingProxyType
from typing import NamedTuple

from .model import ServicePortName

FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 300.0


def delay_seconds(attempts: int, longest: float = LONGEST_DELAY_SECONDS) -> float:
    """How long to wait after so many failures in a row: 1 s, doubling."""
    return float(min(FIRST_DELAY_SECONDS * 2 ** min(attempts - 1, 16), longest))


class Quarantined(NamedTuple):
    """`next_retry` is in seconds of the caller's clock; infinity: not before its object or the node changes."""

    why: str
    attempts: int
    next_retry: float


class Quarantine:
    """What is set aside, so that everything else can go on.  It keeps the state that was last acknowledged."""

    def __init__(self) -> None:
        self._held: dict[ServicePortName, Quarantined] = {}

    def __contains__(self, name: ServicePortName) -> bool:
        return name in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def view(self) -> Mapping[ServicePortName, Quarantined]:
        """All that is set aside; a live view."""
        return MappingProxyType(self._held)

    def hold(
        self, name: ServicePortName, why: str, now: float, *, forever: bool = False, patient: bool = True
    ) -> None:
        """Set a Service port aside, longer each time.  Not `patient`: the first retry may come at once."""
        known = self._held.get(name)
        attempts = known.attempts + 1 if known else 1
        delay = delay_seconds(attempts) if patient else delay_seconds(attempts - 1) if attempts > 1 else 0.0
        self._held[name] = Quarantined(why, attempts, inf if forever else now + delay)

    def release(self, name: ServicePortName) -> None:
        """It is well, or another object now; unknown names are no matter."""
        self._held.pop(name, None)

    def clear(self) -> None:
        self._held.clear()

    def hurry(self, names: Iterable[ServicePortName], now: float) -> None:
        """Let those be tried again at once; how often they failed stays known."""
        for name in names:
            known = self._held.get(name)
            if known is not None:
                self._held[name] = known._replace(next_retry=min(now, known.next_retry))

    def ready(self, name: ServicePortName, now: float) -> bool:
        """It may be tried: it is not set aside, or its time has come."""
        held = self._held.get(name)
        return held is None or held.next_retry <= now

    def due(self, now: float) -> list[ServicePortName]:
        """Those whose time has come."""
        return [name for name, held in self._held.items() if held.next_retry <= now]

    def next_retry(self) -> float | None:
        """When the next one is due, None if none ever is."""
        earliest = min((held.next_retry for held in self._held.values()), default=inf)
        return None if earliest == inf else earliest
