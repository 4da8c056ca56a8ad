"""What a Service opens on this node: its frontends per port and family, before any endpoint is looked at.

A plan depends on the Service and on a few facts of the node; endpoints come and go without it being made again.

Semantics: Service v1 as kube-proxy reads it, KEP-1860 (ipMode), externalTrafficPolicy, loadBalancerSourceRanges.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from . import canonical
from .external import NO_EXTERNAL, External
from .model import (
    Family,
    Frontend,
    FrontendKind,
    HostState,
    LocalPodsByCIDR,
    Protocol,
    ServicePortName,
    family_of,
)
from .objects import Service, ServicePort, ServiceSpec
from .policy import internal_routes
from .problems import Problem, summarised

RESERVED_PORTS: frozenset[tuple[int, Protocol]] = frozenset(
    {(22, "TCP"), (10249, "TCP"), (10250, "TCP"), (10256, "TCP")}
)
"""Ports that a node needs under its own addresses: ssh, the proxy's metrics and health, kubelet.

kube-proxy lets an external IP be a node's address, and so do we, but not at these ports: the Service would cut off the
node, or its operators.  A node port may not be one of them either.
"""

DEFAULT_AFFINITY_SECONDS = 10800
MAX_AFFINITY_SECONDS = 86400
"""The API's limit; some sources do not check it, and kernels refuse much longer ones."""

ServiceKey = tuple[str, str]
"""Namespace and name of a Service."""


class PortPlan(NamedTuple):
    """One Service port of one family: everything of its ServiceState but the endpoints."""

    name: ServicePortName
    frontends: tuple[Frontend, ...]
    uses_cluster: bool
    uses_local: bool
    affinity_seconds: int | None
    health_check_node_port: int | None


class ServicePlan(NamedTuple):
    """The plans of all ports and families of a Service.

    `uses_node_ips`, `uses_node_addresses`: it has to be made again when these facts of the node change.
    """

    service: Service
    ports: tuple[PortPlan, ...] = ()
    problems: tuple[Problem, ...] = ()
    uses_node_ips: bool = False
    uses_node_addresses: bool = False


class PlanFacts(NamedTuple):
    """The facts of the node that every plan depends on."""

    families: tuple[Family, ...]
    detector_families: frozenset[Family]
    masquerade_all: bool
    external_ips: bool

    @classmethod
    def of(cls, host: HostState) -> PlanFacts:
        return cls(host.families, detector_families(host), host.masquerade_all, host.external_ips)


def detector_families(host: HostState) -> frozenset[Family]:
    """Families in which a local pod can be told.  An interface serves both, a CIDR its own."""
    detector = host.detect_local
    if detector is None:
        return frozenset()
    if isinstance(detector, LocalPodsByCIDR):
        return frozenset(family_of(cidr) for cidr in detector.cidrs)
    return frozenset(("IPv4", "IPv6"))


def skip_reason(service: Service) -> str | None:
    """Why a Service is not proxied in any family; None when it is."""
    spec = service.spec
    if spec is None or not spec.cluster_ip:
        return "it has no cluster IP"
    if spec.cluster_ip == "None":
        return "it is headless"
    return "its type is ExternalName" if spec.type == "ExternalName" else None


def cluster_ips(spec: ServiceSpec, problems: list[str]) -> dict[Family, str]:
    """The canonical cluster IP of each family; a family without one ignores all of the Service.

    Without `ipFamilies` the family of `clusterIP` decides, otherwise the entries of `clusterIPs` stand beside the
    families.  What cannot be a cluster IP is added to `problems`.
    """
    found: dict[Family, str] = {}
    pairs: Iterable[tuple[str | None, str | None]] = ((None, spec.cluster_ip),)
    if spec.ip_families:
        pairs = zip(spec.ip_families, spec.cluster_ips or (spec.cluster_ip,), strict=False)
    for named, text in pairs:
        try:
            address = canonical.usable_address(text or "")
        except ValueError as error:
            problems.append(f"cluster IP {text!r} is ignored, and its family with it: {error}")
            continue
        family = family_of(address)
        if named is not None and named != family:
            problems.append(
                f"cluster IP {text!r} is ignored, and its family with it: it stands beside {named}"
            )
            continue
        found.setdefault(family, address)
    return found


def plan(
    service: Service,
    host: HostState,
    *,
    facts: PlanFacts | None = None,
    reserved_ports: frozenset[tuple[int, Protocol]] = RESERVED_PORTS,
) -> ServicePlan:
    """Work out what a Service opens.  `facts`: those of `host`, where the caller has them at hand."""
    spec = service.spec
    if spec is None or skip_reason(service) is not None:
        return ServicePlan(service)
    facts = facts or PlanFacts.of(host)
    problems: list[str] = []
    ports = _distinct_ports(spec.ports or (), reserved_ports, problems)
    external = NO_EXTERNAL
    if _looks_outward(service, spec):
        external = External.of(service, ports, host, reserved_ports, problems)
    health_port = _health_check_node_port(spec, external.local, problems)
    affinity = _affinity_seconds(spec, problems)
    plans = [
        _plan_port(service, spec, port, family, address, external, facts, affinity, health_port)
        for family, address in cluster_ips(spec, problems).items()
        if family in facts.families
        for port in ports
    ]
    return ServicePlan(
        service,
        tuple(plans),
        _named(service, problems) if problems else (),
        uses_node_ips=bool(spec.load_balancer_source_ranges),
        uses_node_addresses=external.at_reserved_port,
    )


def _looks_outward(service: Service, spec: ServiceSpec) -> bool:
    """Is there more to read than a node port?  Every Service has a status; of a ClusterIP it is empty."""
    balancer = service.status.load_balancer if service.status else None
    return bool(
        (balancer and balancer.ingress)
        or spec.external_ips
        or spec.load_balancer_source_ranges
        or spec.external_traffic_policy == "Local"
    )


def _named(service: Service, problems: list[str]) -> tuple[Problem, ...]:
    subject = f"Service {service.metadata.namespace}/{service.metadata.name}"
    return tuple([Problem(subject, reason) for reason in summarised(problems)])


def _plan_port(
    service: Service,
    spec: ServiceSpec,
    port: ServicePort,
    family: Family,
    address: str,
    external: External,
    facts: PlanFacts,
    affinity: int | None,
    health_port: int | None,
) -> PortPlan:
    protocol: Protocol = port.protocol or "TCP"
    detector = family in facts.detector_families
    internal_local = spec.internal_traffic_policy == "Local"
    frontends = [
        Frontend(
            kind=FrontendKind.CLUSTER_IP,
            address=address,
            port=port.port,
            protocol=protocol,
            routes=internal_routes(
                local=internal_local, detector=detector, masquerade_all=facts.masquerade_all
            ),
        )
    ]
    if external is not NO_EXTERNAL or port.node_port:
        frontends += external.frontends(port, protocol, family, detector)
    outward = len(frontends) > 1
    return PortPlan(
        ServicePortName(service.metadata.namespace, service.metadata.name, port.name or "", protocol, family),
        tuple(frontends),
        uses_cluster=not internal_local or outward,
        uses_local=internal_local or (external.local and outward),
        affinity_seconds=affinity,
        health_check_node_port=health_port,
    )


def _distinct_ports(
    ports: Iterable[ServicePort], reserved_ports: frozenset[tuple[int, Protocol]], problems: list[str]
) -> list[ServicePort]:
    """Ports that can be told apart and exist; of two that collide the first one holds."""
    kept: list[ServicePort] = []
    names: set[tuple[str, Protocol]] = set()
    numbers: set[tuple[int, Protocol]] = set()
    node_ports: set[tuple[int, Protocol]] = set()
    for port in ports:
        protocol: Protocol = port.protocol or "TCP"
        name = (port.name or "", protocol)
        if not 0 < port.port < 65536:
            problems.append(f"port {port.name or port.port!r} is ignored: {port.port} is no port number")
            continue
        if name in names or (port.port, protocol) in numbers:
            problems.append(
                f"port {port.name or ''!r} {port.port}/{protocol} is ignored: an earlier port has its name or number"
            )
            continue
        node_port = (port.node_port or 0, protocol)
        why = None
        if node_port in node_ports:
            why = "an earlier port has it"
        elif node_port in reserved_ports:
            why = "the node needs that port itself"
        elif not 0 <= node_port[0] < 65536:
            why = "it is no port number"
        if why:
            problems.append(f"node port {node_port[0]}/{protocol} is ignored: {why}")
            port = msgspec.structs.replace(port, node_port=None)
        names.add(name)
        numbers.add((port.port, protocol))
        if port.node_port:
            node_ports.add(node_port)
        kept.append(port)
    return kept


def _health_check_node_port(spec: ServiceSpec, local: bool, problems: list[str]) -> int | None:
    if spec.type != "LoadBalancer" or not local:
        return None
    port = spec.health_check_node_port or 0
    if not 0 < port < 65536:
        problems.append(
            f"healthCheckNodePort {port} is no port number: the load balancer cannot ask this node"
        )
        return None
    return port


def _affinity_seconds(spec: ServiceSpec, problems: list[str]) -> int | None:
    if spec.session_affinity != "ClientIP":
        return None
    config = spec.session_affinity_config
    seconds = (
        config.client_ip.timeout_seconds if config is not None and config.client_ip is not None else None
    )
    if seconds is None:
        return DEFAULT_AFFINITY_SECONDS
    if seconds <= 0:
        problems.append(
            f"sessionAffinityConfig: {seconds} seconds is no time-out, {DEFAULT_AFFINITY_SECONDS} is used"
        )
        return DEFAULT_AFFINITY_SECONDS
    if seconds > MAX_AFFINITY_SECONDS:
        problems.append(
            f"sessionAffinityConfig: {seconds} seconds is longer than a day, {MAX_AFFINITY_SECONDS} is used"
        )
        return MAX_AFFINITY_SECONDS
    return seconds
