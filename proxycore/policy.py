"""Traffic policies: which pool a client takes, whether it is masqueraded, and which endpoints are in the pools.

Semantics: KEP-2086 (internalTrafficPolicy), KEP-1669 (terminating endpoints), externalTrafficPolicy with kube-proxy's
short cut: a client on this node reaches endpoints everywhere under an external address, as if its packets had gone out
and come back.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from .model import Endpoint, Pool, PoolName, Route, Routes, WhenEmpty
from .slices import EndpointHints, Merged
from .topology import nearest

CLUSTER = Route(PoolName.CLUSTER, masquerade=False)
CLUSTER_MASQUERADED = Route(PoolName.CLUSTER, masquerade=True)
LOCAL = Route(PoolName.LOCAL, masquerade=False)
LOCAL_MASQUERADED = Route(PoolName.LOCAL, masquerade=True)

_REFUSING = Pool(when_empty=WhenEmpty.REJECT)
_SILENT = Pool(when_empty=WhenEmpty.DROP)


@cache
def internal_routes(*, local: bool, detector: bool, masquerade_all: bool) -> Routes:
    """Routes of a cluster IP.  `local`: internalTrafficPolicy; `detector`: local pods of that family can be told.

    Without a detector nobody is masqueraded, because a pod could not be told from anyone else.
    """
    plain, masqueraded = (LOCAL, LOCAL_MASQUERADED) if local else (CLUSTER, CLUSTER_MASQUERADED)
    if masquerade_all:
        return Routes(local_pod=masqueraded, node=masqueraded, outside=masqueraded)
    if detector:
        return Routes(local_pod=plain, node=masqueraded, outside=masqueraded)
    return Routes(local_pod=plain, node=plain, outside=plain)


@cache
def external_routes(*, local: bool, detector: bool) -> Routes:
    """Routes of an external IP, load-balancer address or node port.  `local`: externalTrafficPolicy."""
    if not local:
        return Routes(local_pod=CLUSTER_MASQUERADED, node=CLUSTER_MASQUERADED, outside=CLUSTER_MASQUERADED)
    return Routes(local_pod=CLUSTER if detector else LOCAL, node=CLUSTER_MASQUERADED, outside=LOCAL)


class Pools(NamedTuple):
    """The two selections of a Service port's endpoints; None where no frontend wants one."""

    cluster: Pool | None
    local: Pool | None


def pools(merged: Merged, *, uses_cluster: bool, uses_local: bool, node_name: str, zone: str | None) -> Pools:
    """Choose the endpoints of both pools.

    Cluster: the ready ones that topology admits, else all that are serving and terminating.  Local: the ready ones of this
    node, else those of this node that are serving and terminating; topology has no say.  A pool that is a whole list
    shares its tuple.
    """
    endpoints = merged.endpoints
    if not endpoints:
        return Pools(_REFUSING if uses_cluster else None, _REFUSING if uses_local else None)
    ready = tuple([endpoint for endpoint in endpoints if endpoint.ready])
    if len(ready) == len(endpoints):
        ready = endpoints
    fallback = () if ready else tuple([e for e in endpoints if e.serving and e.terminating])
    cluster = local = None
    if uses_cluster:
        chosen = _near(merged, ready, node_name, zone) if ready else fallback
        cluster = Pool(endpoints=chosen) if chosen else _REFUSING
    if uses_local:
        chosen = tuple([endpoint for endpoint in ready if endpoint.is_local])
        if not chosen:
            chosen = tuple(
                [e for e in endpoints if e.is_local and not e.ready and e.serving and e.terminating]
            )
        if len(chosen) == len(endpoints):
            chosen = endpoints
        if chosen:
            local = Pool(endpoints=chosen, when_empty=WhenEmpty.DROP)
        else:
            local = _SILENT if ready or fallback else _REFUSING
    return Pools(cluster, local)


def _near(
    merged: Merged, ready: tuple[Endpoint, ...], node_name: str, zone: str | None
) -> tuple[Endpoint, ...]:
    if merged.hints is None:
        return ready
    pairs: list[tuple[Endpoint, EndpointHints | None]] = [
        (endpoint, hint)
        for endpoint, hint in zip(merged.endpoints, merged.hints, strict=True)
        if endpoint.ready
    ]
    chosen = nearest(pairs, node_name, zone)
    return ready if len(chosen) == len(ready) else chosen
