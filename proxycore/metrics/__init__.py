"""Metrics: what Prometheus is told, in kube-proxy's names where the meaning is the same.

`families.py` declares every metric.  Their values come from three places: `recorder.py` counts batches, `snapshot.py` reads
what the engine publishes, and a few are kept by whoever knows (the servers, the conntrack observer, requests to the API
server).  `exposition.py` turns them into text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .observer import MetricsObserver


def plugin() -> MetricsObserver:
    """Entry point of group `proxycore.plugins`."""
    from .observer import MetricsObserver

    return MetricsObserver()
