"""One tracked UDP flow as a value, free of sockets."""

from __future__ import annotations

from ipaddress import ip_address
from typing import NamedTuple


class Flow(NamedTuple):
    """A UDP conntrack entry.  Addresses are packed, 4 or 16 bytes in network order.

    The original tuple is what the client sent, before translation; the reply tuple is what answers look like, so
    `reply_source` is who really serves the flow.  `status` holds the IPS_* bits.  The zones are those of the two
    directions, 0 by default.  The kernel makes `id` from the entry's place in memory and its original tuple: it is
    not enough to tell an entry from its successor.
    """

    source: bytes
    source_port: int
    destination: bytes
    destination_port: int
    reply_source: bytes
    reply_source_port: int
    reply_destination: bytes
    reply_destination_port: int
    status: int
    zone: int
    reply_zone: int
    id: int

    def __str__(self) -> str:
        client = endpoint_text(self.source, self.source_port)
        dialled = endpoint_text(self.destination, self.destination_port)
        return f"{client} -> {dialled}, served by {endpoint_text(self.reply_source, self.reply_source_port)}"


def packed(address: str) -> bytes:
    """Packed form of a canonical address."""
    if ":" in address:
        return ip_address(address).packed
    return bytes(map(int, address.split(".")))


def endpoint_text(address: bytes, port: int) -> str:
    """`10.0.0.1:53` or `[fd00::1]:53`."""
    text = str(ip_address(address))
    return f"[{text}]:{port}" if len(address) == 16 else f"{text}:{port}"
