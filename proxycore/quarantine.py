"""Service ports that a backend could not bring into force: why, how often, and when they are tried again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heappush
from math import inf
from types import MappingProxyType
from typing import NamedTuple

from .model import ServicePortName

FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 300.0
_SPARE = 64


def delay_seconds(attempts: int, longest: float = LONGEST_DELAY_SECONDS) -> float:
    """How long to wait after so many failures in a row: 1 s, doubling."""
    return float(min(FIRST_DELAY_SECONDS * 2 ** min(attempts - 1, 16), longest))


class Quarantined(NamedTuple):
    """`next_retry` is in seconds of the caller's clock; infinity: not before its object or the node changes."""

    why: str
    attempts: int
    next_retry: float


class Quarantine:
    """What is set aside, so that everything else can go on.  It keeps the state that was last acknowledged.

    Asking costs in proportion to the answer: the engine asks several times in each turn of its loop.
    """

    def __init__(self) -> None:
        self.version = 0
        """Raised whenever `view` changes."""
        self._held: dict[ServicePortName, Quarantined] = {}
        # A heap.  An item counts while its record is the one held; the others leave when they come to the top, or are many.
        self._times: list[tuple[float, int, ServicePortName, Quarantined]] = []

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
        self._put(name, Quarantined(why, attempts, inf if forever else now + delay))

    def release(self, name: ServicePortName) -> None:
        """It is well, or another object now; unknown names are no matter."""
        if self._held.pop(name, None) is not None:
            self.version += 1

    def clear(self) -> None:
        """Release all."""
        if self._held:
            self.version += 1
        self._held.clear()
        self._times.clear()

    def hurry(self, names: Iterable[ServicePortName], now: float) -> None:
        """Let those be tried again at once; how often they failed stays known."""
        for name in names:
            known = self._held.get(name)
            if known is not None and known.next_retry > now:
                self._put(name, known._replace(next_retry=now))

    def ready(self, name: ServicePortName, now: float) -> bool:
        """It may be tried: it is not set aside, or its time has come."""
        held = self._held.get(name)
        return held is None or held.next_retry <= now

    def due(self, now: float) -> list[ServicePortName]:
        """Those whose time has come, the longest due first."""
        found: list[tuple[float, int, ServicePortName, Quarantined]] = []
        places = [0]
        for place in places:
            if place < len(self._times) and self._times[place][0] <= now:
                found.append(self._times[place])
                places += (2 * place + 1, 2 * place + 2)  # in a heap what is below is not earlier
        found.sort()
        return [name for _, _, name, held in found if self._held.get(name) is held]

    def next_retry(self) -> float | None:
        """When the next one is due, None if none ever is."""
        while self._times:
            time, _, name, held = self._times[0]
            if self._held.get(name) is held:
                return time
            heappop(self._times)
        return None

    def _put(self, name: ServicePortName, held: Quarantined) -> None:
        self.version += 1
        self._held[name] = held
        if held.next_retry == inf:
            return
        if len(self._times) > 2 * len(self._held) + _SPARE:
            self._times = [item for item in self._times if self._held.get(item[2]) is item[3]]
            heapify(self._times)
        heappush(self._times, (held.next_retry, self.version, name, held))
