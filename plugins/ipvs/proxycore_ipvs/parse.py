"""Dumps of virtual servers and destinations, from bytes to values."""

from __future__ import annotations

import sys
from operator import itemgetter
from socket import AF_INET, AF_INET6, inet_ntop, ntohs
from typing import Any

from proxycore.api import KernelError, Protocol
from proxycore.kernel.netlink import text_of

from . import wire
from .layout import Build, Fields, Path, Positions, Reader
from .servers import (
    HASHED,
    ByAddress,
    ByMark,
    Counters,
    Destination,
    DestinationState,
    Key,
    Server,
    ServerState,
)

_COUNTERS = 1, 2, 3, 4, 5
"""Connections, packets in and out, bytes in and out."""
_PROTOCOLS: dict[int, Protocol] = {number: protocol for protocol, number in wire.NUMBERS.items()}


def _picker(positions: Positions, what: str, *paths: Path) -> itemgetter[Any]:
    """Takes these values out of fields.  Raises KernelError if the kernel does not tell one of them."""
    missing = [path for path in paths if path not in positions]
    if missing:
        raise KernelError(f"IPVS does not tell of a {what} what it should: attributes {missing}")
    return itemgetter(*(positions[path] for path in paths))


def _destination_plan(positions: Positions) -> Build[DestinationState]:
    top, stats = wire.DEST, wire.DEST_STATS64
    pick = _picker(
        positions,
        "destination",
        (top, wire.DEST_ADDR),
        (top, wire.DEST_PORT),
        (top, wire.DEST_ADDR_FAMILY),
        (top, wire.DEST_WEIGHT),
        (top, wire.DEST_FWD_METHOD),
        (top, wire.DEST_ACTIVE_CONNS),
        (top, wire.DEST_INACT_CONNS),
        (top, wire.DEST_PERSIST_CONNS),
    )
    count = _picker(positions, "destination", *((top, stats, counter) for counter in _COUNTERS))

    def build(fields: Fields) -> DestinationState:
        address, port, family, weight, method, active, inactive, persistent = pick(fields)
        host = inet_ntop(AF_INET, address[:4]) if family == AF_INET else inet_ntop(AF_INET6, address)
        return DestinationState(
            Destination(host, ntohs(port), weight, method),
            active,
            inactive,
            persistent,
            Counters._make(count(fields)),
        )

    return build


def _server_plan(positions: Positions) -> Build[ServerState]:
    top = wire.SERVICE
    by_mark = (top, wire.SVC_FWMARK) in positions
    pick = _picker(
        positions,
        "virtual server",
        (top, wire.SVC_AF),
        (top, wire.SVC_SCHED_NAME),
        (top, wire.SVC_FLAGS),
        (top, wire.SVC_TIMEOUT),
        (top, wire.SVC_NETMASK),
    )
    parts = (wire.SVC_FWMARK,) if by_mark else (wire.SVC_PROTOCOL, wire.SVC_ADDR, wire.SVC_PORT)
    identify = _picker(positions, "virtual server", *((top, part) for part in parts))
    count = _picker(positions, "virtual server", *((top, wire.SVC_STATS64, counter) for counter in _COUNTERS))

    def build(fields: Fields) -> ServerState:
        family, scheduler, flags, timeout, mask = pick(fields)
        key: Key
        if by_mark:
            key = ByMark("IPv4" if family == AF_INET else "IPv6", identify(fields))
        else:
            number, address, port = identify(fields)
            host = inet_ntop(AF_INET, address[:4]) if family == AF_INET else inet_ntop(AF_INET6, address)
            key = ByAddress(_protocol(number), host, ntohs(port))
        server = Server(
            key,
            text_of(scheduler),
            int.from_bytes(flags[:4], sys.byteorder) & ~HASHED,
            timeout,
            _prefix_length(family, mask),
        )
        return ServerState(server, Counters._make(count(fields)))

    return build


def _protocol(number: int) -> Protocol:
    protocol = _PROTOCOLS.get(number)
    if protocol is None:
        raise KernelError(f"IPVS has a virtual server of protocol {number}, which nobody can make")
    return protocol


def _prefix_length(family: int, mask: bytes) -> int | None:
    """None: the whole address; -1: no prefix."""
    if family == AF_INET6:
        length = int.from_bytes(mask, sys.byteorder)
        return None if length == 128 else length
    bits = int.from_bytes(mask, "big")
    length = bits.bit_count()
    if bits != 0xFFFFFFFF << 32 - length & 0xFFFFFFFF:
        return -1
    return None if length == 32 else length


def destination_reader() -> Reader[DestinationState]:
    top = wire.DEST
    return Reader(
        nests=((top,), (top, wire.DEST_STATS), (top, wire.DEST_STATS64)),
        raw=((top, wire.DEST_ADDR),),
        plan=_destination_plan,
    )


def server_reader() -> Reader[ServerState]:
    top = wire.SERVICE
    raw = wire.SVC_ADDR, wire.SVC_SCHED_NAME, wire.SVC_FLAGS, wire.SVC_NETMASK, wire.SVC_PE_NAME
    return Reader(
        nests=((top,), (top, wire.SVC_STATS), (top, wire.SVC_STATS64)),
        raw=tuple((top, kind) for kind in raw),
        plan=_server_plan,
    )
