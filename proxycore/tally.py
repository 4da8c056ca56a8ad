"""The engine's books about itself, from which its published `Status` is made.

The clock is the caller's: `now` is in seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import inf

from .delta import Ledger
from .desired import Desired
from .host import node_status
from .model import Family, ServicePortName
from .quarantine import Quarantined
from .source import Health
from .status import NodeStatus, Status


class Tally:
    """What has happened so far.  For the engine's thread alone."""

    def __init__(self, families: tuple[Family, ...], now: float) -> None:
        self.source = Health("live")
        self.applied_total = 0
        self.refused = ""
        """Why nothing could be programmed at the last try."""
        self.drift_total = 0
        self.drift_unrepaired = False
        self.figures: Mapping[str, int] = {}
        self.last_queued: float | None = None
        self.last_success: float | None = None
        self._families = families
        self._source_since = now
        self._node = NodeStatus()
        self._sent = self._in_force = (0, 0)
        """EndpointSlices and Services that had changed up to the batch under way, and up to the last one in force."""
        self._set_aside: tuple[dict[ServicePortName, str], dict[ServicePortName, str]] = ({}, {})
        self._set_aside_version = -1

    def take_health(self, health: Health, now: float) -> bool:
        """The source's state; True if it is news."""
        news = health != self.source
        if health.since is not None:
            self._source_since = health.since
        elif health.state != self.source.state:
            self._source_since = now
        self.source = health
        return news

    def sent(self, desired: Desired) -> None:
        """A batch goes out."""
        self._sent = _changes(desired)

    def applied(self, full: bool, now: float) -> None:
        """The batch is in force."""
        self.refused = ""
        self.applied_total += 1
        self.last_success = now
        self._in_force = self._sent
        if full:
            self.drift_unrepaired = False

    def drifted(self, repaired: bool, now: float) -> None:
        """The kernel was found to differ."""
        self.drift_total += 1
        if not repaired:
            self.drift_unrepaired = True
            self.last_queued = now

    def status(
        self,
        desired: Desired,
        ledger: Ledger,
        *,
        synced: bool,
        started: bool,
        idle: bool,
        pending_since: float | None,
        held: str,
        troubles: Mapping[str, str],
        lacking: Collection[str],
    ) -> Status:
        """What others are told.  `idle`: nothing is under way and nothing waits."""
        changes = _changes(desired)
        if idle and self.applied_total:
            # What changed made no difference here.
            self._in_force = changes
        if ledger.version != self._set_aside_version:
            self._set_aside_version = ledger.version
            self._set_aside = _by_kind(ledger.quarantined)
        quarantined, unsupported = self._set_aside
        return Status(
            synced=synced,
            started=started,
            generation=ledger.generation,
            applied_total=self.applied_total,
            families=self._families,
            last_success=self.last_success,
            last_queued=self.last_queued,
            pending_since=pending_since,
            refused=self.refused,
            held=held,
            quarantined=quarantined,
            unsupported=unsupported,
            troubles=dict(troubles) if troubles else {},
            lacking=frozenset(lacking),
            source=self.source,
            source_since=self._source_since,
            node=self._node,
            endpoint_changes_total=changes[0],
            endpoint_changes_pending=changes[0] - self._in_force[0],
            service_changes_total=changes[1],
            service_changes_pending=changes[1] - self._in_force[1],
            drift_total=self.drift_total,
            drift_unrepaired=self.drift_unrepaired,
            figures=self.figures,
            store_version=desired.store.version,
        )

    def node_changed(self, desired: Desired) -> None:
        """This node's object is another one."""
        self._node = node_status(desired.store.node)


def _changes(desired: Desired) -> tuple[int, int]:
    return desired.endpoint_changes_total, desired.service_changes_total


def _by_kind(
    held: Mapping[ServicePortName, Quarantined],
) -> tuple[dict[ServicePortName, str], dict[ServicePortName, str]]:
    """Those that are tried again from time to time, and those that the backend cannot do."""
    quarantined = {name: item.why for name, item in held.items() if item.next_retry != inf}
    return quarantined, {name: item.why for name, item in held.items() if item.next_retry == inf}
