"""Operations as generic netlink messages: attributes packed by hand, many requests in one datagram.

Messages and attributes: `linux/ip_vs.h`.  Values are in the host's order but for ports and IPv4 masks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
from socket import AF_INET, AF_INET6
from typing import NamedTuple

from proxycore.api import Protocol
from proxycore.kernel.netlink import NLM_F_ACK, NLM_F_REQUEST, attribute, nested

from .servers import (
    AddDestination,
    AddServer,
    ByMark,
    DeleteDestination,
    DeleteServer,
    Destination,
    Key,
    Operation,
    Server,
    SetDestination,
    SetServer,
    Timeouts,
)

VERSION = 1
NEW_SERVICE, SET_SERVICE, DEL_SERVICE, GET_SERVICE = 1, 2, 3, 4
NEW_DEST, SET_DEST, DEL_DEST, GET_DEST = 5, 6, 7, 8
SET_CONFIG, GET_CONFIG = 12, 13

SERVICE, DEST = 1, 2
TIMEOUT_TCP, TIMEOUT_TCP_FIN, TIMEOUT_UDP = 4, 5, 6
SVC_AF, SVC_PROTOCOL, SVC_ADDR, SVC_PORT, SVC_FWMARK = 1, 2, 3, 4, 5
SVC_SCHED_NAME, SVC_FLAGS, SVC_TIMEOUT, SVC_NETMASK, SVC_STATS, SVC_PE_NAME, SVC_STATS64 = range(6, 13)
DEST_ADDR, DEST_PORT, DEST_FWD_METHOD, DEST_WEIGHT, DEST_U_THRESH, DEST_L_THRESH = 1, 2, 3, 4, 5, 6
DEST_ACTIVE_CONNS, DEST_INACT_CONNS, DEST_PERSIST_CONNS, DEST_STATS, DEST_ADDR_FAMILY, DEST_STATS64 = range(
    7, 13
)

DATAGRAM_BYTES = 60_000
"""Some 450 requests; the answers to all of them, should they all fail, fit into the receive buffer."""

NUMBERS: dict[Protocol, int] = {"TCP": 6, "UDP": 17, "SCTP": 132}
_NESTED = 0x8000
_ALL_FLAGS = 0xFFFFFFFF
_U16, _U32, _FLAGS = struct.Struct("=H"), struct.Struct("=I"), struct.Struct("=II")
_MESSAGE = struct.Struct("=IHHIIBBxx")
_PORT = struct.Struct(">H")


def _destination_form(attributes: str) -> struct.Struct:
    return struct.Struct("=HH HH16s HH2s2x" + attributes)


_WHOLE = _destination_form("HHI HHI HHI HHI HHH2x")
_NAME_ONLY = _destination_form("HHH2x")
_METHOD_HEADER, _WEIGHT_HEADER = (8, DEST_FWD_METHOD), (8, DEST_WEIGHT)


def packed(address: str) -> tuple[int, bytes]:
    """Address family, and the address in the 16 bytes that IPVS has for either.  Raises ValueError."""
    if ":" in address:
        return AF_INET6, IPv6Address(address).packed
    return AF_INET, IPv4Address(address).packed.ljust(16, b"\0")


def key_attributes(key: Key) -> bytes:
    """What the kernel finds a server by; children of the attribute SERVICE."""
    if isinstance(key, ByMark):
        family: int = AF_INET6 if key.family == "IPv6" else AF_INET
        return attribute(SVC_AF, _U16.pack(family)) + attribute(SVC_FWMARK, _U32.pack(key.mark))
    family, address = packed(key.address)
    return (
        attribute(SVC_AF, _U16.pack(family))
        + attribute(SVC_PROTOCOL, _U16.pack(NUMBERS[key.protocol]))
        + attribute(SVC_ADDR, address)
        + attribute(SVC_PORT, _PORT.pack(key.port))
    )


def service(key: Key) -> bytes:
    """The attribute that names a server."""
    return nested(SERVICE, key_attributes(key))


def whole_service(server: Server) -> bytes:
    """The attribute that describes a server in full.  Raises ValueError for a mask that is no prefix."""
    return nested(
        SERVICE,
        key_attributes(server.key),
        attribute(SVC_SCHED_NAME, server.scheduler.encode() + b"\0"),
        attribute(SVC_FLAGS, _FLAGS.pack(server.flags, _ALL_FLAGS)),
        attribute(SVC_TIMEOUT, _U32.pack(server.timeout_seconds)),
        attribute(SVC_NETMASK, _netmask(server)),
    )


def _netmask(server: Server) -> bytes:
    """IPv4: a mask in network order.  IPv6: a prefix length in the host's."""
    length = server.prefix_length
    if server.key.family == "IPv6":
        if length is not None and not 1 <= length <= 128:
            raise ValueError(f"{server.key}: no prefix length: {length}")
        return _U32.pack(128 if length is None else length)
    if length is not None and not 0 <= length <= 32:
        raise ValueError(f"{server.key}: no prefix length: {length}")
    return (0xFFFFFFFF << 32 - (32 if length is None else length) & 0xFFFFFFFF).to_bytes(4, "big")


def whole_destination(destination: Destination) -> bytes:
    """The attribute that describes a destination in full, without thresholds."""
    family, address = packed(destination.address)
    return _WHOLE.pack(
        _WHOLE.size,
        DEST | _NESTED,
        20,
        DEST_ADDR,
        address,
        6,
        DEST_PORT,
        _PORT.pack(destination.port),
        *_METHOD_HEADER,
        destination.method,
        *_WEIGHT_HEADER,
        destination.weight,
        8,
        DEST_U_THRESH,
        0,
        8,
        DEST_L_THRESH,
        0,
        6,
        DEST_ADDR_FAMILY,
        family,
    )


def destination_name(address: str, port: int) -> bytes:
    """The attribute that names a destination."""
    family, raw = packed(address)
    return _NAME_ONLY.pack(
        _NAME_ONLY.size,
        DEST | _NESTED,
        20,
        DEST_ADDR,
        raw,
        6,
        DEST_PORT,
        _PORT.pack(port),
        6,
        DEST_ADDR_FAMILY,
        family,
    )


def timeouts(wanted: Timeouts) -> bytes:
    """Attributes for SET_CONFIG; what is 0 is not named, and stays."""
    kinds = (TIMEOUT_TCP, TIMEOUT_TCP_FIN, TIMEOUT_UDP)
    return b"".join(
        attribute(kind, _U32.pack(value)) for kind, value in zip(kinds, wanted, strict=True) if value
    )


class Encoder:
    """Operations into command and attributes; remembers the last server named, as its destinations follow each other."""

    def __init__(self) -> None:
        self._key: Key | None = None
        self._service = b""

    def encode(self, operation: Operation) -> tuple[int, bytes]:
        """Command number, and the attributes after the generic netlink header.

        Raises ValueError or struct.error for a value that has no room in its attribute.
        """
        match operation:
            case AddDestination(key, destination):
                return NEW_DEST, self._named(key) + whole_destination(destination)
            case SetDestination(key, destination):
                return SET_DEST, self._named(key) + whole_destination(destination)
            case DeleteDestination(key, address, port):
                return DEL_DEST, self._named(key) + destination_name(address, port)
            case AddServer(server):
                return NEW_SERVICE, whole_service(server)
            case SetServer(server):
                return SET_SERVICE, whole_service(server)
            case DeleteServer(key):
                return DEL_SERVICE, service(key)

    def _named(self, key: Key) -> bytes:
        if key != self._key or type(key) is not type(self._key):
            self._key, self._service = key, service(key)
        return self._service


class Datagram(NamedTuple):
    """Requests to be sent at once; `last` is the sequence number of the one that will be acknowledged."""

    data: bytes
    last: int


def datagrams(
    operations: Sequence[Operation], family: int, first: int, limit_bytes: int = DATAGRAM_BYTES
) -> Iterator[Datagram]:
    """All operations in order, packed; their sequence numbers are `first`, `first` + 1 and so on.

    Raises ValueError for a value that has no room in its attribute.

    Only the last request of a datagram asks for an acknowledgement: the kernel works through one before it takes the
    next, answers each request that fails, and goes on behind it.
    """
    encoder = Encoder()
    parts: list[bytes] = []
    size = 0
    pack = _MESSAGE.pack
    for seq, operation in enumerate(operations, first):
        try:
            command, body = encoder.encode(operation)
        except struct.error as error:
            raise ValueError(f"{operation}: {error}") from error
        length = _MESSAGE.size + len(body)
        if parts and size + length > limit_bytes:
            yield _acknowledged(parts, seq - 1)
            parts, size = [], 0
        parts.append(pack(length, family, NLM_F_REQUEST, seq, 0, command, VERSION) + body)
        size += length
    if parts:
        yield _acknowledged(parts, first + len(operations) - 1)


def _acknowledged(parts: list[bytes], last: int) -> Datagram:
    final = bytearray(parts[-1])
    struct.pack_into("=H", final, 6, NLM_F_REQUEST | NLM_F_ACK)
    parts[-1] = bytes(final)
    return Datagram(b"".join(parts), last)
