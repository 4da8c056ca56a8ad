"""Times as the API writes them."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache


@lru_cache(maxsize=1024)
def seconds_of(timestamp: str | None) -> float | None:
    """Seconds since the epoch of an RFC 3339 time, None when it is none.

    Times have whole seconds and come in bursts, hence the cache.
    """
    if not timestamp:
        return None
    try:
        moment = datetime.fromisoformat(timestamp)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return moment.timestamp()
    except (ValueError, OverflowError):
        return None
