"""Numbers and keys of the data plane: what stands in which map, bit by bit.

A new connection's first packet is looked up in three maps; between two of them the result waits in `meta priority`:

    frontends   daddr . proto . dport   -> ticket   (or node-ports: proto . dport)
    pools       ticket & POOL_MASK      -> class << 20 | index
    endpoints   index . slot            -> address . port          slot = random below the class's endpoint count

A ticket (32 bits) says which Service port, and what each class of client gets:

    bits  0-19  index of the Service port
    bit   20    LOCAL: the local pool instead of the cluster pool (set on the way, from the bits 27 to 29)
    bits 24-26  masquerade a local pod, the node, anyone else
    bits 27-29  a local pod, the node, anyone else takes the local pool
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

from proxycore.api import Endpoint, Family, Frontend, PoolName, Protocol

VERSION = 1
"""Raised with every change of this layout, so that a table of an older one is replaced and not adopted."""

NFT_FAMILY: dict[Family, str] = {"IPv4": "ip", "IPv6": "ip6"}
TABLES = ("proxycore", "proxycore-alt")
"""A table is replaced by building another one beside it; these two names take turns."""

INDEX_MASK = 0x000FFFFF
LOCAL = 1 << 20
POOL_MASK = INDEX_MASK | LOCAL
CLASS_SHIFT = 20
CLASS_MASK = 0xFFF00000
CLASS_MAX = 0xFFF
REJECT, DROP, FIRST_CLASS = 1, 2, 3
MASQUERADE_POD, MASQUERADE_NODE, MASQUERADE_OUTSIDE = 1 << 24, 1 << 25, 1 << 26
LOCAL_POD, LOCAL_NODE, LOCAL_OUTSIDE = 1 << 27, 1 << 28, 1 << 29

STICKY_MASK = 0xFFFF
"""Service ports with affinity have an index below 65,536; the upper 16 bits of an endpoint's handle are its ordinal."""
ORDINAL_SHIFT = 16
ORDINAL_MAX = 0xFFFF

LOCAL_SLOT = 32768
"""Slots of the local pool start here; so a pool has at most this many endpoints."""
POOL_MAX = 32768

PROTOCOL_NUMBER: dict[Protocol, int] = {"TCP": 6, "UDP": 17, "SCTP": 132}
PROTOCOL_NAME: dict[int, str] = {6: "tcp", 17: "udp", 132: "sctp"}

_pack = struct.pack


def address_bytes(address: str) -> bytes:
    """Network-order bytes of a canonical address."""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def target_bytes(address: str, port: int) -> bytes:
    """Map data `address . port`."""
    return address_bytes(address) + _pack(">HH", port, 0)


def targets_bytes(endpoints: Sequence[Endpoint]) -> list[bytes]:
    """Map data of each endpoint.  A pool's endpoints are of one family and mostly have one port."""
    if not endpoints:
        return []
    family = socket.AF_INET6 if ":" in endpoints[0].address else socket.AF_INET
    port = endpoints[0].port
    tail = _pack(">HH", port, 0)
    convert = socket.inet_pton
    return [
        convert(family, e.address) + (tail if e.port == port else _pack(">HH", e.port, 0)) for e in endpoints
    ]


def frontend_key(address: str, protocol: Protocol, port: int) -> bytes:
    """Map key `daddr . l4proto . dport`; every field is padded to four bytes."""
    return address_bytes(address) + _pack(">BBHHH", PROTOCOL_NUMBER[protocol], 0, 0, port, 0)


def node_port_key(protocol: Protocol, port: int) -> bytes:
    """Map key `l4proto . dport`."""
    return _pack(">BBHHH", PROTOCOL_NUMBER[protocol], 0, 0, port, 0)


def number(value: int) -> bytes:
    """Map key or data `meta priority`, in the host's byte order."""
    return _pack("=I", value)


def ticket(index: int, frontend: Frontend) -> int:
    """What the maps `frontends` and `node-ports` hold for a frontend."""
    value = index
    routes = frontend.routes
    for route, masquerade, local in (
        (routes.local_pod, MASQUERADE_POD, LOCAL_POD),
        (routes.node, MASQUERADE_NODE, LOCAL_NODE),
        (routes.outside, MASQUERADE_OUTSIDE, LOCAL_OUTSIDE),
    ):
        value |= (masquerade if route.masquerade else 0) | (local if route.pool is PoolName.LOCAL else 0)
    return value
