"""Every decision about one Service on this node, with its reason, for one class of client.

The same pure functions run again as for the real thing; what is said here cannot drift from what is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from .claims import ClaimKey, claim_key, claim_text
from .frontends import RESERVED_PORTS, PlanFacts, ServiceKey, plan, skip_reason
from .model import (
    FAMILIES,
    Endpoint,
    Frontend,
    FrontendKind,
    HostState,
    Pool,
    PoolName,
    Protocol,
    Route,
    ServiceState,
    WhenEmpty,
)
from .objects import EndpointSlice, Service
from .resolve import resolve_plan
from .slices import EndpointHints, SliceEndpoints, merge, parse
from .topology import TopologyMode, admits, mode

Client = Literal["local_pod", "node", "outside"]

_CLIENTS: dict[Client, str] = {
    "local_pod": "a pod of this node",
    "node": "the node itself",
    "outside": "a client from elsewhere",
}


class Decision(NamedTuple):
    """One line of an explanation: what is so, and why."""

    text: str
    because: str


def explain(
    service: Service,
    slices: Iterable[EndpointSlice | SliceEndpoints],
    host: HostState,
    client: Client,
    *,
    lost: Mapping[ClaimKey, ServiceKey] | None = None,
    reserved_ports: frozenset[tuple[int, Protocol]] = RESERVED_PORTS,
) -> list[Decision]:
    """What becomes of a packet of `client`, from the Service down to the single endpoint.

    `lost`: what the Service claims and another one owns, as `Claims.lost` tells.
    """
    title = f"Service {service.metadata.namespace}/{service.metadata.name}"
    reason = skip_reason(service)
    if reason:
        return [Decision(f"{title} is not proxied", reason)]
    parsed = tuple(
        item if isinstance(item, SliceEndpoints) else parse(item, host.node_name) for item in slices
    )
    facts = PlanFacts.of(host)
    planned = plan(service, host, facts=facts, reserved_ports=reserved_ports)
    resolution = resolve_plan(planned, parsed, host)
    decisions = []
    for family in FAMILIES:
        if family not in facts.families:
            decisions.append(
                Decision(f"{title} is not served over {family}", "this node does not have that family")
            )
        elif all(state.name.family != family for state in resolution.states):
            decisions.append(
                Decision(
                    f"{title} is not served over {family}",
                    "it has no usable port or no cluster IP of that family",
                )
            )
    for state in resolution.states:
        if client == "local_pod" and state.name.family not in facts.detector_families:
            decisions.append(
                Decision(
                    f"nobody counts as a pod of this node over {state.name.family}",
                    "no detector of local pods is configured for that family",
                )
            )
        for frontend in state.frontends:
            decisions += _frontend(state, frontend, client, facts, lost or {})
        decisions += _endpoints(state, parsed, host)
    decisions += [Decision(f"something of {subject} is ignored", why) for subject, why in resolution.problems]
    return decisions


def _frontend(
    state: ServiceState,
    frontend: Frontend,
    client: Client,
    facts: PlanFacts,
    lost: Mapping[ClaimKey, ServiceKey],
) -> list[Decision]:
    key = claim_key(state.name.family, frontend)
    title = f"{frontend.kind.value} {claim_text(key)}"
    owner = lost.get(key)
    if owner is not None:
        return [
            Decision(
                f"{title} is not served for this Service",
                f"Service {owner[0]}/{owner[1]} has the better claim",
            )
        ]
    route: Route = getattr(frontend.routes, client)
    pool = state.pool(route.pool)
    decisions = []
    if frontend.source_ranges is not None:
        ranges = ", ".join(frontend.source_ranges)
        decisions.append(
            Decision(f"{title} admits only {ranges}", "of loadBalancerSourceRanges of this family")
        )
    decisions.append(
        Decision(
            f"{_CLIENTS[client]} that dials {title} takes the {route.pool.value} pool",
            _pool_reason(frontend, route, client),
        )
    )
    decisions.append(
        Decision(
            f"its address is {'masqueraded' if route.masquerade else 'kept, unless it is the chosen endpoint itself'}",
            _masquerade_reason(state, frontend, client, facts),
        )
    )
    if pool is not None and not pool.endpoints:
        decisions.append(_empty(title, pool))
    return decisions


def _pool_reason(frontend: Frontend, route: Route, client: Client) -> str:
    internal = frontend.kind is FrontendKind.CLUSTER_IP
    policy = "internalTrafficPolicy" if internal else "externalTrafficPolicy"
    if route.pool is PoolName.LOCAL:
        return f"{policy} is Local"
    if frontend.routes.outside.pool is PoolName.LOCAL:
        return f"{policy} is Local, but {_CLIENTS[client]} is served as if its packets had gone out and come back"
    return f"{policy} is Cluster"


def _masquerade_reason(state: ServiceState, frontend: Frontend, client: Client, facts: PlanFacts) -> str:
    if frontend.kind is not FrontendKind.CLUSTER_IP:
        if frontend.routes.outside.pool is PoolName.CLUSTER:
            return "externalTrafficPolicy is Cluster: the endpoint may be on another node, and must answer through this one"
        if client == "node":
            return "externalTrafficPolicy is Local, and the node dials an address that is not its own"
        return "externalTrafficPolicy is Local, which keeps the client's address"
    if facts.masquerade_all:
        return "masqueradeAll is set"
    if state.name.family not in facts.detector_families:
        return "without a detector of local pods no traffic to a cluster IP is masqueraded"
    return "pods are not masqueraded" if client == "local_pod" else "the client is no pod of this node"


def _empty(title: str, pool: Pool) -> Decision:
    if pool.when_empty is WhenEmpty.REJECT:
        return Decision(f"new connections to {title} are refused", "no endpoint can be used on any node")
    return Decision(f"new connections to {title} are dropped", "endpoints exist, but none on this node")


def _endpoints(state: ServiceState, slices: tuple[SliceEndpoints, ...], host: HostState) -> list[Decision]:
    name = state.name
    merged = merge(slices, name.family, (name.port, name.protocol))
    if not merged.endpoints:
        return [
            Decision(
                f"{name} has no endpoints over {name.family}",
                "no EndpointSlice has that port by name and protocol",
            )
        ]
    hints = dict(zip(merged.endpoints, merged.hints or [None] * len(merged.endpoints), strict=True))
    chosen = mode([hint for endpoint, hint in hints.items() if endpoint.ready], host.node_name, host.zone)
    decisions = []
    if state.cluster is not None and chosen is not TopologyMode.NONE:
        decisions.append(
            Decision(
                f"{name} prefers near endpoints ({chosen.value})",
                "every ready endpoint is hinted, and some for here",
            )
        )
    for pool_name in (PoolName.CLUSTER, PoolName.LOCAL):
        pool = state.pool(pool_name)
        if pool is None:
            continue
        members = set(pool.endpoints)
        for endpoint, hint in hints.items():
            inside = endpoint in members
            because = _why(endpoint, hint, inside, pool_name, chosen, host)
            decisions.append(
                Decision(
                    f"endpoint {endpoint} is {'in' if inside else 'not in'} the {pool_name.value} pool",
                    because,
                )
            )
    return decisions


def _why(
    endpoint: Endpoint,
    hint: EndpointHints | None,
    inside: bool,
    pool: PoolName,
    chosen: TopologyMode,
    host: HostState,
) -> str:
    if pool is PoolName.LOCAL and not endpoint.is_local:
        return f"it is on node {endpoint.node}" if endpoint.node else "its slice names no node"
    if inside:
        return (
            "it is ready"
            if endpoint.ready
            else "it is terminating and still serving, and no endpoint is ready"
        )
    if not endpoint.ready:
        if endpoint.serving and endpoint.terminating:
            return "it is terminating, and others are ready"
        return "it is not ready"
    if not admits(chosen, hint, host.node_name, host.zone):
        return (
            "it is hinted for other nodes"
            if chosen is TopologyMode.SAME_NODE
            else "it is hinted for other zones"
        )
    return "others were chosen"
