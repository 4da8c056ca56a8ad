"""What the engine tells the other threads about itself: one immutable value, replaced as a whole."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from .model import ServicePortName
from .source import Health


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """`last_success`: seconds since the epoch.  `pending_since`: monotonic seconds of the oldest change not yet in force.

    `quarantined`: Services that were set aside, with the reason.  `troubles`: what a source could not read, with the reason.
    """

    synced: bool = False
    started: bool = False
    generation: int = 0
    applied_total: int = 0
    last_success: float | None = None
    pending_since: float | None = None
    quarantined: Mapping[ServicePortName, str] = {}
    troubles: Mapping[str, str] = {}
    source: Health = Health("live")
