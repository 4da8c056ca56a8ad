"""The outward side of a Service: load-balancer addresses, external IPs and node ports, with their firewall.

Worked out once per Service and then read for each port and family.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from . import canonical
from .model import Family, Frontend, FrontendKind, HostState, Protocol, family_of
from .objects import Service, ServicePort
from .policy import external_routes

AddressesByFamily = dict[Family, tuple[str, ...]]


class External(msgspec.Struct, frozen=True, kw_only=True):
    """What of a Service can be dialled from outside.

    `local`: externalTrafficPolicy Local is in force.  `ranges`: source ranges of the load-balancer addresses; a family
    without any has no firewall.  `refused`: addresses that may not be taken at that port.  `at_reserved_port`: whether
    something is refused depends on the node's addresses.
    """

    local: bool
    load_balancer: AddressesByFamily
    external_ips: AddressesByFamily
    ranges: AddressesByFamily
    admits_node: frozenset[Family]
    refused: frozenset[tuple[str, int, Protocol]]
    at_reserved_port: bool

    @classmethod
    def of(
        cls,
        service: Service,
        ports: Sequence[ServicePort],
        host: HostState,
        reserved_ports: frozenset[tuple[int, Protocol]],
        problems: list[str],
    ) -> External:
        """Read a Service that has a spec; what is ignored is added to `problems`."""
        spec = service.spec
        assert spec is not None
        vips = _load_balancer_addresses(service, problems)
        external_ips: AddressesByFamily = {}
        if spec.external_ips and host.external_ips:
            external_ips = _by_family("external IP", spec.external_ips, problems)
        elif spec.external_ips:
            problems.append("external IPs are not served here (feature gate AllowServiceExternalIPs is off)")
        ranges = _source_ranges(spec.load_balancer_source_ranges or (), problems)
        at_reserved_port = bool(vips or external_ips) and any(
            (port.port, port.protocol or "TCP") in reserved_ports for port in ports
        )
        return cls(
            local=spec.external_traffic_policy == "Local"
            and (spec.type in ("LoadBalancer", "NodePort") or bool(external_ips)),
            load_balancer=vips,
            external_ips=external_ips,
            ranges=ranges,
            admits_node=frozenset(
                family
                for family, cidrs in ranges.items()
                if any(canonical.contains(cidr, ip) for cidr in cidrs for ip in host.node_ips)
            ),
            refused=_refused((vips, external_ips), ports, host, reserved_ports, problems)
            if at_reserved_port
            else frozenset(),
            at_reserved_port=at_reserved_port,
        )

    def frontends(
        self, port: ServicePort, protocol: Protocol, family: Family, detector: bool
    ) -> list[Frontend]:
        """Load-balancer addresses, external IPs, then the node port.

        An address that is both is a load-balancer address, and keeps its firewall.
        """
        routes = external_routes(local=self.local, detector=detector)
        found: dict[str, Frontend] = {}
        for kind, addresses in (
            (FrontendKind.LOAD_BALANCER_IP, self.load_balancer),
            (FrontendKind.EXTERNAL_IP, self.external_ips),
        ):
            for address in addresses.get(family, ()):
                if address in found or (address, port.port, protocol) in self.refused:
                    continue
                found[address] = Frontend(
                    kind=kind,
                    address=address,
                    port=port.port,
                    protocol=protocol,
                    routes=routes,
                    source_ranges=self._admitted(address, family)
                    if kind is FrontendKind.LOAD_BALANCER_IP
                    else None,
                )
        frontends = list(found.values())
        if port.node_port:
            frontends.append(
                Frontend(
                    kind=FrontendKind.NODE_PORT,
                    address=None,
                    port=port.node_port,
                    protocol=protocol,
                    routes=routes,
                )
            )
        return frontends

    def _admitted(self, address: str, family: Family) -> tuple[str, ...] | None:
        """Source ranges for one load-balancer address, None when all may come.

        When the node may come, so may the address itself: the kernel takes it as the source where it is bound locally.
        """
        ranges = self.ranges.get(family)
        if ranges is None or any(cidr.endswith("/0") for cidr in ranges):
            return None
        if family in self.admits_node and not any(canonical.contains(cidr, address) for cidr in ranges):
            return (*ranges, f"{address}/{32 if family == 'IPv4' else 128}")
        return ranges


NO_EXTERNAL = External(
    local=False,
    load_balancer={},
    external_ips={},
    ranges={},
    admits_node=frozenset(),
    refused=frozenset(),
    at_reserved_port=False,
)


def _load_balancer_addresses(service: Service, problems: list[str]) -> AddressesByFamily:
    """Ingress addresses of mode VIP.  One of mode Proxy is the balancer's own: packets to it must leave the node."""
    if service.status is None or service.status.load_balancer is None:
        return {}
    ingress = service.status.load_balancer.ingress
    if not ingress:
        return {}
    return _by_family(
        "load-balancer address",
        [entry.ip for entry in ingress if entry.ip and entry.ip_mode in (None, "VIP")],
        problems,
    )


def _by_family(what: str, texts: Iterable[str], problems: list[str]) -> AddressesByFamily:
    found: AddressesByFamily = {}
    for text in texts:
        try:
            address = canonical.usable_address(text)
        except ValueError as error:
            problems.append(f"{what} {text!r} is ignored: {error}")
            continue
        family = family_of(address)
        known = found.get(family, ())
        if address not in known:
            found[family] = (*known, address)
    return found


def _source_ranges(texts: Iterable[str], problems: list[str]) -> AddressesByFamily:
    """Source ranges by family, disjoint.  Padding is removed: API validation admits it."""
    found: dict[Family, list[str]] = {}
    unread = False
    for text in texts:
        try:
            cidr = canonical.cidr(text.strip())
        except ValueError as error:
            problems.append(f"a source range is ignored: {error}")
            unread = True
            continue
        found.setdefault(family_of(cidr), []).append(cidr)
    if unread and not found:
        # Kubernetes' API admits no such list; to serve everybody because nothing in it can be read would open the door.
        problems.append("no source range can be read: nobody is admitted to its load-balancer addresses")
        return {"IPv4": (), "IPv6": ()}
    return {family: canonical.outermost(cidrs) for family, cidrs in found.items()}


def _refused(
    addresses: tuple[AddressesByFamily, ...],
    ports: Sequence[ServicePort],
    host: HostState,
    reserved_ports: frozenset[tuple[int, Protocol]],
    problems: list[str],
) -> frozenset[tuple[str, int, Protocol]]:
    refused: set[tuple[str, int, Protocol]] = set()
    for by_family in addresses:
        for address in (address for known in by_family.values() for address in known):
            if address not in host.node_addresses:
                continue
            for port in ports:
                protocol: Protocol = port.protocol or "TCP"
                if (port.port, protocol) in reserved_ports:
                    refused.add((address, port.port, protocol))
                    problems.append(
                        f"{address} port {port.port}/{protocol} is ignored: the address is this node's own, "
                        "and the node needs that port itself"
                    )
    return frozenset(refused)
