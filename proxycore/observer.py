"""What an observer knows at start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from .backend import BackendInfo
from .model import HostState


class ObserverContext(msgspec.Struct, frozen=True, kw_only=True):
    """`healthy()` tells whether the proxy itself is well, from any thread.  `options` are the observer's own settings."""

    host: HostState
    backend: BackendInfo
    healthy: Callable[[], bool]
    options: Mapping[str, Any] = {}
