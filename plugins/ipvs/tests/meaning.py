"""What resolved Services should come to for a packet, by the model alone."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterator, Sequence

from proxycore.api import (
    Family,
    Frontend,
    FrontendKind,
    HostState,
    LocalPodsByCIDR,
    LocalPodsByInterface,
    Route,
    ServiceState,
    WhenEmpty,
)

from .drawn import ADDRESSES, RANGES
from .simulate import DROP, REJECT, UNTOUCHED, Outcome, Packet


def served(host: HostState, family: Family) -> list[str]:
    """Addresses of the node that serve node ports."""
    ports = host.node_ports(family)
    found = host.node_addresses if ports.all_local else ports.addresses
    return [
        address
        for address in found
        if (":" in address) == (family == "IPv6") and not ipaddress.ip_address(address).is_loopback
    ]


def local_addresses(host: HostState) -> frozenset[str]:
    """The node's own."""
    found = {*host.node_addresses, *host.node_ips, *served(host, "IPv4"), *served(host, "IPv6")}
    return frozenset(found)


def packets(states: Sequence[ServiceState], host: HostState, family: Family) -> Iterator[Packet]:
    """First packets of every kind of client to every frontend, and beside them."""
    v4 = family == "IPv4"
    detect = host.detect_local
    pods = "pods0"
    if isinstance(detect, LocalPodsByInterface):
        pods = f"{detect.name}7" if detect.prefix else detect.name
    own = next(ip for ip in host.node_ips if (":" in ip) != v4)
    clients = [("203.0.113.2" if v4 else "2600:5200::1", "eth0"), (own, None)]
    clients += [(address, where) for address in ADDRESSES[family] for where in (pods, "eth0")]
    clients += [
        (str(ipaddress.ip_network(text)[1 if "/0" in text else -1]), "eth0") for text in RANGES[family]
    ]
    clients = [c for c in clients if c[1] is None or c[0] not in local_addresses(host)]
    unassigned = "172.30.200.200" if v4 else "fd00:172:30::ffff"
    elsewhere = "9.9.9.9" if v4 else "2620::9"
    for source, interface in clients:
        for state in states:
            for frontend in state.frontends:
                at = served(host, family) if frontend.address is None else [frontend.address]
                for address in (*at, own):
                    for port in (frontend.port, 9):
                        for protocol in ("tcp", "udp"):
                            yield Packet(source, interface, address, protocol, port)
                    yield Packet(source, interface, address, frontend.protocol.lower(), frontend.port)
        for address in (unassigned, elsewhere):
            yield Packet(source, interface, address, "tcp", 80)


def wanted(
    packet: Packet,
    states: Sequence[ServiceState],
    host: HostState,
    family: Family,
    skipped: Collection[Frontend],
) -> set[Outcome] | None:
    """Everything that may become of a first packet; None: no matter, as its frontend is one of `skipped`."""
    for state in states:
        for frontend in state.frontends:
            at = served(host, family) if frontend.address is None else [frontend.address]
            if (
                packet.destination in at
                and packet.port == frontend.port
                and packet.protocol == frontend.protocol.lower()
            ):
                return None if frontend in skipped else _at_frontend(packet, frontend, state, host)
    source_of = ipaddress.ip_address(packet.destination)
    if any(
        frontend.kind is FrontendKind.CLUSTER_IP and frontend.address == packet.destination
        for state in states
        for frontend in state.frontends
    ):
        return {REJECT}
    if any(source_of in ipaddress.ip_network(cidr) for cidr in host.service_cidrs):
        return {DROP}
    return {UNTOUCHED}


def _at_frontend(packet: Packet, frontend: Frontend, state: ServiceState, host: HostState) -> set[Outcome]:
    ranges = frontend.source_ranges
    source = ipaddress.ip_address(packet.source)
    if ranges is not None and not any(source in ipaddress.ip_network(cidr) for cidr in ranges):
        return {DROP}
    route = _route(packet, frontend, host)
    pool = state.pool(route.pool)
    assert pool is not None
    usable = [each for each in pool.endpoints if each.weight > 0]
    if not usable:
        return {REJECT if pool.when_empty is WhenEmpty.REJECT else DROP}
    return {
        ("to", each.address, each.port, route.masquerade or each.address == packet.source) for each in usable
    }


def _route(packet: Packet, frontend: Frontend, host: HostState) -> Route:
    detect = host.detect_local
    inside = False
    if isinstance(detect, LocalPodsByCIDR):
        source = ipaddress.ip_address(packet.source)
        inside = any(source in ipaddress.ip_network(cidr) for cidr in detect.cidrs)
    elif detect is not None and packet.interface is not None:
        name = packet.interface
        inside = name.startswith(detect.name) if detect.prefix else name == detect.name
    if inside:
        return frontend.routes.local_pod
    return frontend.routes.node if packet.source in local_addresses(host) else frontend.routes.outside
