"""How often something may be done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Limiter:
    """A token bucket: `burst` requests at once, then `qps` a second; 0 or less of either: no limit."""

    def __init__(self, qps: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._qps = qps if burst > 0 else 0.0
        self._burst = burst
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens = float(burst)
        self._at = clock()

    def allows(self) -> bool:
        """Take a token if there is one."""
        if self._qps <= 0:
            return True
        with self._lock:
            self._refill()
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True

    def reserve(self) -> float:
        """Take a token; how many seconds it is too early for it."""
        if self._qps <= 0:
            return 0.0
        with self._lock:
            self._refill()
            self._tokens -= 1
            return max(0.0, -self._tokens / self._qps)

    def _refill(self) -> None:
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._qps)
        self._at = now
