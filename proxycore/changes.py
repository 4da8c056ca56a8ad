"""What the engine hands to backends and observers: batches of changes, with the endpoint deltas worked out once."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from .model import Endpoint, HostState, Pool, ServicePortName, ServiceState


class Unknown(msgspec.Struct, frozen=True):
    """Stands for `before` when an earlier failure may have been partial: read or rewrite that Service."""


UNKNOWN = Unknown()

SNAPSHOT = "snapshot"
"""Reason of a batch that only brings an observer up to date: nothing was programmed."""


class EndpointDelta(NamedTuple):
    """How one pool changes.  `added` holds new ones and those whose attributes changed in a way that a backend can see."""

    added: tuple[Endpoint, ...] = ()
    removed: tuple[Endpoint, ...] = ()
    kept: tuple[Endpoint, ...] = ()


NO_DELTA = EndpointDelta()


class ServiceChange(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One Service port before and after.

    `before` is what the backend last acknowledged: None if nothing, `UNKNOWN` after a failure that may have been partial.
    `after` is None when the Service port is to go.  Both are never None.  `trigger_time`: when its earliest cause began, in
    seconds since the epoch, as `endpoints.kubernetes.io/last-change-trigger-time` tells; None where nothing told.
    """

    name: ServicePortName
    before: ServiceState | Unknown | None
    after: ServiceState | None
    cluster: EndpointDelta = NO_DELTA
    local: EndpointDelta = NO_DELTA
    trigger_time: float | None = None

    @property
    def kind(self) -> Literal["added", "updated", "removed"]:
        if self.after is None:
            return "removed"
        return "added" if self.before is None else "updated"


class HostChange(msgspec.Struct, frozen=True, kw_only=True):
    """The node's facts before and after; `before` is None in a backend's first batch."""

    before: HostState | None
    after: HostState


class ChangeBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Changes to be brought into force together.

    `full`: afterwards exactly the `after` states of `changes` must be in force, and nothing of any other Service; those in
    quarantine are in it with the state that was last acknowledged.  `host` is None when the node's facts did not change.
    `oldest_trigger_time`: seconds since the epoch of the earliest cause, from
    `endpoints.kubernetes.io/last-change-trigger-time`, else the time of arrival.
    """

    generation: int
    changes: tuple[ServiceChange, ...]
    host: HostChange | None = None
    full: bool = False
    reason: str = ""
    oldest_trigger_time: float | None = None


def _pool_delta(before: Pool | None, after: Pool | None) -> EndpointDelta:
    old = before.endpoints if before else ()
    new = after.endpoints if after else ()
    if old == new:
        return EndpointDelta(kept=new) if new else NO_DELTA
    if not old:
        return EndpointDelta(added=new)
    if not new:
        return EndpointDelta(removed=old)
    known = {(e.address, e.port): e for e in old}
    added: list[Endpoint] = []
    kept: list[Endpoint] = []
    for endpoint in new:
        previous = known.pop((endpoint.address, endpoint.port), None)
        if previous is not None and previous.weight == endpoint.weight:
            kept.append(endpoint)
        else:
            added.append(endpoint)
    return EndpointDelta(tuple(added), tuple(known.values()), tuple(kept))


def change(
    name: ServicePortName,
    before: ServiceState | Unknown | None,
    after: ServiceState | None,
    trigger_time: float | None = None,
) -> ServiceChange:
    """The change from `before` to `after`, deltas included."""
    old = before if isinstance(before, ServiceState) else None
    return ServiceChange(
        name=name,
        before=before,
        after=after,
        cluster=_pool_delta(old.cluster if old else None, after.cluster if after else None),
        local=_pool_delta(old.local if old else None, after.local if after else None),
        trigger_time=trigger_time,
    )
