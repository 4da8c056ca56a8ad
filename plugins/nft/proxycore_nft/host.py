"""The sets about the node: addresses that serve node ports, sources that are local pods, ServiceCIDRs."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from proxycore.api import Family, HostState, LocalPodsByCIDR, family_of

from . import encode, layout
from .program import interval_elements


def host_elements(host: HostState, family: Family) -> dict[str, tuple[bytes, ...]]:
    """Ready-made elements by set name, in a stable order."""
    detect = host.detect_local
    pods = detect.cidrs if isinstance(detect, LocalPodsByCIDR) else ()
    node_ports = host.node_ports(family)
    addresses = sorted({layout.address_bytes(a) for a in node_ports.addresses if family_of(a) == family})
    return {
        "node-addresses": tuple(encode.element(address) for address in addresses),
        "local-pods": interval_elements(_ranges(pods, family)),
        "service-cidrs": interval_elements(_ranges(host.service_cidrs, family)),
    }


def _ranges(cidrs: Iterable[str], family: Family) -> list[tuple[bytes, bytes]]:
    """First and last address, sorted; what overlaps or touches is merged."""
    networks = [ipaddress.ip_network(cidr, strict=False) for cidr in cidrs if family_of(cidr) == family]
    merged = ipaddress.collapse_addresses(networks)  # type: ignore[type-var]
    return [(n.network_address.packed, n.broadcast_address.packed) for n in merged]
