"""How many requests of this process there were, and how long they took."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import msgspec

BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
"""Upper bounds in seconds, as client-go has them."""
NO_CODE = "<error>"
"""Stands for the status where no answer came, as in client-go."""


class Histogram(msgspec.Struct, frozen=True):
    """`counts[i]`: how many were at most `BUCKETS[i]`, the last one: all."""

    counts: tuple[int, ...] = (0,) * (len(BUCKETS) + 1)
    sum: float = 0.0

    @property
    def count(self) -> int:
        return self.counts[-1]


class RequestCounts(msgspec.Struct, frozen=True):
    """`requests` by (code, method, host); `durations`, seconds until the headers came, by (verb, host)."""

    requests: Mapping[tuple[str, str, str], int]
    durations: Mapping[tuple[str, str], Histogram]


class Requests:
    """Counts the requests of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, str, str], int] = {}
        self._durations: dict[tuple[str, str], tuple[list[int], float]] = {}

    def record(self, method: str, host: str, code: str, seconds: float) -> None:
        """Count one request; `code` is NO_CODE where no answer came."""
        with self._lock:
            key = (code, method, host)
            self._requests[key] = self._requests.get(key, 0) + 1
            counts, total = self._durations.get((method, host)) or ([0] * (len(BUCKETS) + 1), 0.0)
            for index, bound in enumerate((*BUCKETS, float("inf"))):
                counts[index] += seconds <= bound
            self._durations[method, host] = (counts, total + seconds)

    def snapshot(self) -> RequestCounts:
        """What has been counted up to now."""
        with self._lock:
            return RequestCounts(
                dict(self._requests),
                {key: Histogram(tuple(counts), total) for key, (counts, total) in self._durations.items()},
            )


REQUESTS = Requests()
