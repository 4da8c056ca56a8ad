"""IP sets of the data plane and what is in them: frozen values, one set of each kind per family."""

from __future__ import annotations

from enum import Enum
from typing import Literal, NamedTuple

from proxycore.api import Family, Protocol, family_of

SetType = Literal["hash:ip,port", "bitmap:port", "hash:ip", "hash:net", "hash:ip,port,net", "hash:ip,port,ip"]
MOST_ENTRIES = 1 << 20
"""How many a hash may hold; memory is taken as it grows."""


class SetKind(Enum):
    """What a set is for; its name in the kernel is `PX4-` or `PX6-` with this."""

    VIP = "VIP"
    """Address and port of every cluster IP, external IP and load-balancer IP, each with a value."""
    NODE_PORTS_TCP = "NP-tcp"
    NODE_PORTS_UDP = "NP-udp"
    NODE_PORTS_SCTP = "NP-sctp"
    NODE = "NODE"
    """Node addresses that serve node ports."""
    CLUSTER_IPS = "CIP"
    """Cluster IPs, whose other ports are refused."""
    CIDR = "CIDR"
    """Ranges of which unassigned addresses are dropped."""
    FIREWALLED = "FW"
    """Frontends that not everyone may dial."""
    ADMITTED = "FWS"
    """Who may, for each of those."""
    LOOP = "LOOP"
    """Every endpoint with itself: such packets are masqueraded."""


_TYPES: dict[SetKind, SetType] = {
    SetKind.VIP: "hash:ip,port",
    SetKind.NODE_PORTS_TCP: "bitmap:port",
    SetKind.NODE_PORTS_UDP: "bitmap:port",
    SetKind.NODE_PORTS_SCTP: "bitmap:port",
    SetKind.NODE: "hash:ip",
    SetKind.CLUSTER_IPS: "hash:ip",
    SetKind.CIDR: "hash:net",
    SetKind.FIREWALLED: "hash:ip,port",
    SetKind.ADMITTED: "hash:ip,port,net",
    SetKind.LOOP: "hash:ip,port,ip",
}
NODE_PORTS: dict[Protocol, SetKind] = {
    "TCP": SetKind.NODE_PORTS_TCP,
    "UDP": SetKind.NODE_PORTS_UDP,
    "SCTP": SetKind.NODE_PORTS_SCTP,
}
MAPS = frozenset({SetKind.VIP, *NODE_PORTS.values()})
"""Kinds whose entries carry a value."""


class SetName(NamedTuple):
    """A set."""

    family: Family
    kind: SetKind

    def __str__(self) -> str:
        return f"PX{'4' if self.family == 'IPv4' else '6'}-{self.kind.value}"

    @property
    def type(self) -> SetType:
        return _TYPES[self.kind]

    @property
    def creation(self) -> str:
        """Line of `ipset restore` that makes it."""
        kind = self.type
        if kind == "bitmap:port":
            rest = " range 0-65535"
        else:
            rest = f" family {'inet' if self.family == 'IPv4' else 'inet6'} maxelem {MOST_ENTRIES}"
        return f"create {self} {kind}{rest}{' skbinfo' if self.kind in MAPS else ''}"


def named(text: str) -> SetName | None:
    """The set of that name; None: it is not one of ours."""
    return _NAMES.get(text)


_FAMILIES: tuple[Family, Family] = ("IPv4", "IPv6")
_NAMES = {str(name): name for name in (SetName(f, kind) for f in _FAMILIES for kind in SetKind)}


class Entry(NamedTuple):
    """One entry.  Fields that the type of its set does not have are None; `other` is an address, or a CIDR."""

    set: SetName
    address: str | None = None
    protocol: Protocol | None = None
    port: int | None = None
    other: str | None = None

    def __str__(self) -> str:
        return f"{self.set} {self.element}"

    @property
    def element(self) -> str:
        """The element as `ipset` writes it: `10.0.0.1,tcp:80,10.0.0.1`; of a bitmap, the port alone."""
        if self.address is None:
            return str(self.port)
        parts = [self.address]
        if self.port is not None and self.protocol is not None:
            parts.append(f"{self.protocol.lower()}:{self.port}")
        if self.other is not None:
            parts.append(self.other)
        return ",".join(parts)


def vip(family: Family, address: str, protocol: Protocol, port: int) -> Entry:
    """Where a value is found by address and port."""
    return Entry(SetName(family, SetKind.VIP), address, protocol, port)


def node_port(family: Family, protocol: Protocol, port: int) -> Entry:
    """Where a value is found by port alone."""
    return Entry(SetName(family, NODE_PORTS[protocol]), None, protocol, port)


def halves(cidr: str) -> tuple[str, ...]:
    """A CIDR as sets take it: they know no length 0, so that is written as its two halves."""
    if not cidr.endswith("/0"):
        return (cidr,)
    return ("0.0.0.0/1", "128.0.0.0/1") if family_of(cidr) == "IPv4" else ("::/1", "8000::/1")
