"""What the engine tells the other threads about itself: one immutable value, replaced as a whole."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from .model import Family, ServicePortName
from .source import Health


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """This node's object as the autoscaler and load balancers care about it.

    `eligible`: the object is known, is not being deleted and bears no taint `ToBeDeletedByClusterAutoscaler`; `why` says
    what is against it.  Semantics: kube-proxy's node eligibility, KEP-3836.
    """

    eligible: bool = False
    why: str = "the Node object is not known yet"


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Times are seconds since the epoch, but for `pending_since`: monotonic seconds of the oldest change not in force.

    `quarantined`: Services that were set aside, with the reason.  `troubles`: what a source could not read, with the reason;
    `lacking`: those of them because of which something is not served as it should be.
    `source_since`: since when `source` has been so.  `last_queued`: when something last had to be programmed.
    `endpoint_changes_total`, `service_changes_total`: EndpointSlices and Services that changed; `..._pending` of them are not
    in force.  `drift_total`: how often the kernel was found to differ; `drift_unrepaired`: it has not been put right yet.
    `refused`: why the backend could not program anything at its last try; empty after a success.
    `held`: why nothing may be programmed for now, although everything has been delivered: something cannot be read that only
    the kernel still knows.
    `store_version` is raised whenever an object changes.
    """

    synced: bool = False
    started: bool = False
    generation: int = 0
    applied_total: int = 0
    families: tuple[Family, ...] = ()
    last_success: float | None = None
    last_queued: float | None = None
    pending_since: float | None = None
    refused: str = ""
    held: str = ""
    quarantined: Mapping[ServicePortName, str] = {}
    unsupported: Mapping[ServicePortName, str] = {}
    troubles: Mapping[str, str] = {}
    lacking: frozenset[str] = frozenset()
    source: Health = Health("live")
    source_since: float = 0.0
    node: NodeStatus = NodeStatus()
    endpoint_changes_total: int = 0
    endpoint_changes_pending: int = 0
    service_changes_total: int = 0
    service_changes_pending: int = 0
    drift_total: int = 0
    drift_unrepaired: bool = False
    figures: Mapping[str, int] = {}
    store_version: int = 0


class ObserverStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One observer: calls that failed, events it missed, calls past their deadline; `overdue`: one that runs so now.

    `error`: of its last call, if that failed.
    """

    name: str
    failed_total: int = 0
    dropped_total: int = 0
    overdue_total: int = 0
    overdue: str = ""
    error: str = ""


class SavedStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The last known good state on disk.  `saved_at`: when it was last written by this run.

    `problem`: why it cannot be written, or why the one that was there cannot be used.
    """

    path: str
    saved_at: float | None = None
    problem: str = ""


class ConfigStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration in force since `loaded_at`.

    `problem`: why a newer one was refused; `refused_total`: how often one was.  `needs_restart`: fields that a newer one
    changes and that wait for a restart.
    """

    loaded_at: float
    problem: str = ""
    refused_total: int = 0
    needs_restart: tuple[str, ...] = ()


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One address that we serve; `problem`: why it cannot be opened, empty while it is open."""

    address: str
    problem: str = ""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that health and metrics judge by, as of now.

    `now`: seconds since the epoch; `monotonic`: of the clock of `Status.pending_since`.  `engine_silent_seconds`: since the
    engine's loop last turned; it turns every few seconds even when idle.  `backend_overdue`: the backend's call that is
    past its deadline, empty if none is.  `stale_after_seconds`: so long a source may be stale.
    `source_name`: what the source is to people (`kubernetes`, `file:manifests`); `heard`: when it last heard of each thing
    that it follows.  `takeover`: why the node is not ours alone, empty if it is or is not meant to be.
    """

    now: float
    monotonic: float
    status: Status
    engine_silent_seconds: float = 0.0
    backend_overdue: str = ""
    backend_overdue_total: int = 0
    observers: tuple[ObserverStatus, ...] = ()
    left_out: tuple[str, ...] = ()
    """Observers that could not be loaded, and why."""
    saved: SavedStatus | None = None
    config: ConfigStatus | None = None
    servers: tuple[ServerStatus, ...] = ()
    sync_period_seconds: float = 30.0
    stale_after_seconds: float = 60.0
    source_name: str = ""
    heard: Mapping[str, float] = {}
    takeover: str = ""
