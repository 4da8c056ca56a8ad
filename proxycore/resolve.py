"""A Service and its endpoints become what this node does for it: `ServiceState`s, one per port and family.

Service --plan--> frontends, routes -+
                                     +--> ServiceState per port and family
slices --merge--> endpoints --pools--+
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .frontends import RESERVED_PORTS, ServicePlan, plan
from .model import HostState, Protocol, ServiceState
from .objects import EndpointSlice, Service
from .policy import pools
from .problems import Problem
from .slices import SliceEndpoints, merge, parse


class Resolution(NamedTuple):
    """`problems` names what was ignored.  `uses_zone`: the result may be another one in another zone."""

    states: tuple[ServiceState, ...]
    problems: tuple[Problem, ...]
    uses_zone: bool = False


def resolve(
    service: Service,
    slices: Iterable[EndpointSlice | SliceEndpoints],
    host: HostState,
    *,
    reserved_ports: frozenset[tuple[int, Protocol]] = RESERVED_PORTS,
) -> Resolution:
    """Everything that a node does for one Service, claims of other Services aside.

    `slices` are those whose label names the Service, in any order.  A Service that no family proxies has no states.
    """
    parsed = tuple(
        item if isinstance(item, SliceEndpoints) else parse(item, host.node_name) for item in slices
    )
    return resolve_plan(plan(service, host, reserved_ports=reserved_ports), parsed, host)


def resolve_plan(planned: ServicePlan, slices: Sequence[SliceEndpoints], host: HostState) -> Resolution:
    """The same for a Service whose frontends are planned already."""
    if not planned.ports:
        return Resolution((), planned.problems)
    states = []
    node_name, zone = host.node_name, host.zone
    for name, frontends, uses_cluster, uses_local, affinity_seconds, health_check_node_port in planned.ports:
        merged = merge(slices, name.family, (name.port, name.protocol))
        cluster, local = pools(
            merged, uses_cluster=uses_cluster, uses_local=uses_local, node_name=node_name, zone=zone
        )
        states.append(
            ServiceState(
                name=name,
                frontends=frontends,
                cluster=cluster,
                local=local,
                endpoints=merged.endpoints,
                affinity_seconds=affinity_seconds,
                health_check_node_port=health_check_node_port,
            )
        )
    problems = planned.problems
    uses_zone = False
    for item in slices:
        if item.problems:
            subject = f"EndpointSlice {item.namespace}/{item.name}"
            problems += tuple([Problem(subject, reason) for reason in item.problems])
        if item.hints is not None:
            uses_zone = uses_zone or any(hint is not None and hint.zones for hint in item.hints)
    return Resolution(tuple(states), problems, uses_zone)
