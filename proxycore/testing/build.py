"""Short ways to write API objects and node facts in tests, and to read resolved states as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..model import Frontend, HostState, LocalPodsByCIDR, Pool, Route, ServiceState
from ..objects import (
    LABEL_SERVICE_NAME,
    Conditions,
    EndpointSlice,
    Hints,
    LoadBalancerIngress,
    LoadBalancerStatus,
    Metadata,
    Named,
    Service,
    ServicePort,
    ServiceSpec,
    ServiceStatus,
    SliceEndpoint,
    SlicePort,
)

NODE = "node-a"
HTTP = ServicePort(port=80, name="http", protocol="TCP")


def service(
    name: str = "web",
    namespace: str = "default",
    *,
    cluster_ip: str | None = "172.30.0.1",
    ports: Sequence[ServicePort] = (HTTP,),
    ingress: Sequence[str | LoadBalancerIngress] = (),
    created: str | None = None,
    labels: dict[str, str] | None = None,
    **spec: Any,
) -> Service:
    """A Service with one port 80 called `http`; `spec` takes the fields of ServiceSpec."""
    status = None
    if ingress:
        entries = tuple(
            LoadBalancerIngress(ip=entry) if isinstance(entry, str) else entry for entry in ingress
        )
        status = ServiceStatus(load_balancer=LoadBalancerStatus(ingress=entries))
    spec.setdefault("type", "ClusterIP")
    return Service(
        metadata=Metadata(name=name, namespace=namespace, creation_timestamp=created, labels=labels),
        spec=ServiceSpec(cluster_ip=cluster_ip, ports=tuple(ports), **spec),
        status=status,
    )


def endpoint(
    address: str,
    node: str | None = None,
    *,
    ready: bool | None = None,
    serving: bool | None = None,
    terminating: bool | None = None,
    zone: str | None = None,
    zones: Sequence[str] = (),
    nodes: Sequence[str] = (),
) -> SliceEndpoint:
    """An endpoint of a slice; `zones` and `nodes` are hints."""
    conditions = None
    if (ready, serving, terminating) != (None, None, None):
        conditions = Conditions(ready=ready, serving=serving, terminating=terminating)
    hints = None
    if zones or nodes:
        hints = Hints(for_zones=tuple(map(Named, zones)) or None, for_nodes=tuple(map(Named, nodes)) or None)
    return SliceEndpoint(addresses=(address,), conditions=conditions, node_name=node, zone=zone, hints=hints)


def endpoint_slice(
    *endpoints: SliceEndpoint | str,
    service: str = "web",
    namespace: str = "default",
    name: str = "web-1",
    family: str = "IPv4",
    ports: Sequence[SlicePort] = (SlicePort(name="http", protocol="TCP", port=8080),),
    annotations: dict[str, str] | None = None,
    labels: dict[str, str] | None = None,
) -> EndpointSlice:
    """An EndpointSlice of Service `service`; an address alone stands for a ready endpoint on no node."""
    return EndpointSlice(
        metadata=Metadata(
            name=name,
            namespace=namespace,
            labels={LABEL_SERVICE_NAME: service, **(labels or {})},
            annotations=annotations,
        ),
        address_type=family,
        endpoints=tuple(endpoint(item) if isinstance(item, str) else item for item in endpoints),
        ports=tuple(ports),
    )


def host(**facts: Any) -> HostState:
    """Facts of node `node-a`, whose pods are 10.0.0.0/8 and fd00::/32."""
    facts.setdefault("node_name", NODE)
    facts.setdefault("detect_local", LocalPodsByCIDR(("10.0.0.0/8", "fd00::/32")))
    facts.setdefault("node_ips", ("192.168.0.2", "2001:db8::2"))
    facts.setdefault("node_addresses", ("192.168.0.2", "192.168.1.2", "2001:db8::2"))
    return HostState(**facts)


def _route(route: Route) -> str:
    return route.pool.value + ("+masquerade" if route.masquerade else "")


def frontend_text(frontend: Frontend) -> str:
    """One line: kind, address, and the routes of pod, node and outside."""
    routes = frontend.routes
    answers = {"pod": routes.local_pod, "node": routes.node, "outside": routes.outside}
    line = " ".join(
        (frontend.kind.value, str(frontend), *(f"{who}={_route(route)}" for who, route in answers.items()))
    )
    if frontend.source_ranges is not None:
        line += f" from={','.join(frontend.source_ranges)}"
    return line


def pool_text(pool: Pool | None) -> str:
    """Endpoints in their order, or what an empty pool does, or `unused`."""
    if pool is None:
        return "unused"
    return " ".join(map(str, pool.endpoints)) or pool.when_empty.value


def state_text(state: ServiceState) -> str:
    """A resolved Service port as a few lines of text."""
    name = state.name
    lines = [f"{name} {name.protocol} {name.family}", *map(frontend_text, state.frontends)]
    lines += [f"cluster: {pool_text(state.cluster)}", f"local: {pool_text(state.local)}"]
    if state.affinity_seconds is not None:
        lines.append(f"affinity: {state.affinity_seconds} s")
    if state.health_check_node_port is not None:
        lines.append(f"health check: {state.health_check_node_port}")
    return "\n".join(lines)
