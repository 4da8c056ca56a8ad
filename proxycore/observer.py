"""What an observer knows at start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from .backend import BackendInfo
from .model import HostState
from .source import APIServer
from .status import Facts


class ObserverContext(msgspec.Struct, frozen=True, kw_only=True):
    """`healthy()` tells whether the proxy itself is well, `facts()` everything about it; both from any thread.

    `options` are the observer's own settings.  `registry` is what /metrics shows, a prometheus_client.CollectorRegistry in
    which an observer may register metrics of its own; None where nothing is served.  `mode` is kube-proxy's mode whose
    settings hold.  `api_server`: how the API server is reached where objects come from it, else None.
    """

    host: HostState
    backend: BackendInfo
    healthy: Callable[[], bool]
    options: Mapping[str, Any] = {}
    facts: Callable[[], Facts] | None = None
    registry: Any = None
    mode: str = ""
    api_server: APIServer | None = None
