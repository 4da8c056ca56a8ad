"""What the node itself asks of the sets: the addresses that serve node ports, and the ranges of cluster IPs."""

from __future__ import annotations

from collections.abc import Mapping

from proxycore.api import Family, HostState, family_of

from .entries import Entry, SetKind, SetName, halves


def is_loopback(address: str) -> bool:
    """Is it an address that only the node can dial?"""
    return address == "::1" or address.startswith("127.")


def node_port_addresses(host: HostState, family: Family) -> tuple[str, ...]:
    """Where node ports answer.  A set cannot say `every local address`, so this follows the node's addresses."""
    where = host.node_ports(family)
    addresses = host.node_addresses if where.all_local else where.addresses
    return tuple(
        dict.fromkeys(a for a in addresses if family_of(a) == family and not is_loopback(a)),
    )


def render_host(host: HostState, family: Family) -> Mapping[Entry, int | None]:
    """Entries that stand for the node, in one family."""
    node, cidr = SetName(family, SetKind.NODE), SetName(family, SetKind.CIDR)
    found: dict[Entry, int | None] = {Entry(node, a): None for a in node_port_addresses(host, family)}
    for text in host.service_cidrs:
        if family_of(text) == family:
            found.update({Entry(cidr, part): None for part in halves(text)})
    return found
