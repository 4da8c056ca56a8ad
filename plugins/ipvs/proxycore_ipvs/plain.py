"""The same by pyroute2's IPVS, one request at a time: the reference that the batch is compared with.

pyroute2 0.9: its verb `update` deletes, so `set` is used; the forwarding method, the scheduler and the mask of the flags
must be given, as its defaults are others; an IPv6 server needs a netmask, a prefix length in the host's order, which it
takes as text of an IPv4 address; it drops forwarding methods from what it has read.
"""

from __future__ import annotations

import errno as errnos
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Any

from pyroute2 import IPVS, IPVSDest, IPVSService
from pyroute2.netlink import genlmsg
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import ipvs as messages

from proxycore.api import KernelError

from . import wire
from .servers import (
    HASHED,
    AddDestination,
    AddServer,
    ByAddress,
    ByMark,
    Counters,
    DeleteDestination,
    DeleteServer,
    Destination,
    DestinationState,
    Key,
    Operation,
    Refusal,
    Server,
    ServerState,
    SetDestination,
    SetServer,
    Timeouts,
)

_PROTOCOLS = {number: protocol for protocol, number in wire.NUMBERS.items()}
_REQUEST, _ACK = 1, 4


class _Config(genlmsg):  # type: ignore[misc]
    """pyroute2's own takes the timeouts as text of hexadecimal digits, and the kernel refuses what it makes of them."""

    nla_map = tuple((name, "uint32" if "TIMEOUT" in name else "hex") for name, _ in messages.ipvsmsg.nla_map)


def service_key(key: Key) -> IPVSService:
    """What names a server."""
    if isinstance(key, ByMark):
        family = socket.AF_INET6 if key.family == "IPv6" else socket.AF_INET
        return IPVSService(af=family, fwmark=key.mark)
    return IPVSService(addr=key.address, port=key.port, protocol=wire.NUMBERS[key.protocol])


def service(server: Server) -> IPVSService:
    """A whole server."""
    made = service_key(server.key)
    length = server.prefix_length
    if server.key.family == "IPv6":
        netmask = socket.inet_ntoa(struct.pack("=I", 128 if length is None else length))
    else:
        mask = 0xFFFFFFFF << 32 - (32 if length is None else length) & 0xFFFFFFFF
        netmask = socket.inet_ntoa(struct.pack(">I", mask))
    made["sched_name"] = server.scheduler
    made["flags"] = {"flags": server.flags, "mask": 0xFFFFFFFF}
    made["timeout"] = server.timeout_seconds
    made["netmask"] = netmask
    return made


def destination(wanted: Destination) -> IPVSDest:
    """A whole destination."""
    return IPVSDest(addr=wanted.address, port=wanted.port, weight=wanted.weight, fwd_method=wanted.method)


class PlainKernel:
    """IPVS of the calling thread's network namespace, by pyroute2; for one thread at a time.

    Raises KernelError as its methods do, if IPVS is not there.
    """

    def __init__(self) -> None:
        try:
            self._ipvs = IPVS()
        except NetlinkError as error:
            raise _failed("speak to IPVS", error) from error

    def __enter__(self) -> PlainKernel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._ipvs.close()

    def run(self, operations: Sequence[Operation]) -> tuple[Refusal, ...]:
        list(wire.datagrams(operations, 16, 1))
        refusals = []
        for position, operation in enumerate(operations):
            try:
                self._do(operation)
            except NetlinkError as error:
                refusals.append(Refusal(position, operation, error.code))
        return tuple(refusals)

    def _do(self, operation: Operation) -> None:
        match operation:
            case AddServer(server):
                self._ipvs.service("add", service=service(server))
            case SetServer(server):
                self._ipvs.service("set", service=service(server))
            case DeleteServer(key):
                self._ipvs.service("del", service=service_key(key))
            case AddDestination(key, wanted):
                self._ipvs.dest("add", service=service_key(key), dest=destination(wanted))
            case SetDestination(key, wanted):
                self._ipvs.dest("set", service=service_key(key), dest=destination(wanted))
            case DeleteDestination(key, address, port):
                self._ipvs.dest(
                    "del", service=service_key(key), dest=IPVSDest(addr=address, port=port, fwd_method=0)
                )

    def servers(self) -> list[ServerState]:
        try:
            return [_server(found) for found in self._ipvs.service("dump")]
        except NetlinkError as error:
            raise _failed("read IPVS", error) from error

    def server(self, key: Key) -> ServerState | None:
        try:
            (found,) = self._ipvs.service("get", service=service_key(key))
        except NetlinkError as error:
            if error.code == errnos.ESRCH:
                return None
            raise _failed(f"read virtual server {key}", error) from error
        return _server(found)

    def destinations(self, key: Key) -> list[DestinationState]:
        try:
            found = list(self._ipvs.dest("dump", service=service_key(key)))
        except NetlinkError as error:
            raise _failed("read IPVS", error) from error
        return [_destination(entry) for entry in found]

    def timeouts(self) -> Timeouts:
        request = messages.ipvsmsg()
        request["cmd"], request["version"] = wire.GET_CONFIG, wire.VERSION
        try:
            (found,) = self._ipvs.nlm_request(request, self._ipvs.prid, _REQUEST)
        except NetlinkError as error:
            raise _failed("read IPVS's timeouts", error) from error
        texts = (found.get_attr(f"IPVS_CMD_ATTR_TIMEOUT_{kind}") for kind in ("TCP", "TCP_FIN", "UDP"))
        return Timeouts(
            *(int.from_bytes(bytes.fromhex(text.replace(":", "")), sys.byteorder) for text in texts)
        )

    def set_timeouts(self, wanted: Timeouts) -> None:
        request = _Config()
        request["cmd"], request["version"] = wire.SET_CONFIG, wire.VERSION
        pairs = zip(("TCP", "TCP_FIN", "UDP"), wanted, strict=True)
        request["attrs"] = [(f"IPVS_CMD_ATTR_TIMEOUT_{kind}", value) for kind, value in pairs if value]
        try:
            list(self._ipvs.nlm_request(request, self._ipvs.prid, _REQUEST | _ACK))
        except NetlinkError as error:
            raise _failed(f"set IPVS's timeouts to {wanted}", error) from error


def _failed(doing: str, error: NetlinkError) -> KernelError:
    return KernelError(f"cannot {doing}: {error}", errno=error.code)


def _counters(part: Any, prefix: str) -> Counters:
    stats = part.get_attr(f"{prefix}STATS64")
    kinds = ("CONNS", "INPKTS", "OUTPKTS", "INBYTES", "OUTBYTES")
    return Counters(*(stats.get_attr(f"IPVS_STATS_ATTR_{kind}") for kind in kinds))


def _server(found: Any) -> ServerState:
    part = found.get_attr("IPVS_CMD_ATTR_SERVICE")

    def get(name: str) -> Any:
        return part.get_attr(f"IPVS_SVC_ATTR_{name}")

    version6 = get("AF") == socket.AF_INET6
    key: Key
    if get("FWMARK"):
        key = ByMark("IPv6" if version6 else "IPv4", get("FWMARK"))
    else:
        key = ByAddress(_PROTOCOLS[get("PROTOCOL")], get("ADDR"), get("PORT"))
    mask = socket.inet_aton(get("NETMASK"))
    length = struct.unpack("=I", mask)[0] if version6 else int.from_bytes(mask, "big").bit_count()
    return ServerState(
        Server(
            key,
            get("SCHED_NAME"),
            get("FLAGS")["flags"] & ~HASHED,
            get("TIMEOUT"),
            None if length == (128 if version6 else 32) else length,
        ),
        _counters(part, "IPVS_SVC_ATTR_"),
    )


def _destination(found: Any) -> DestinationState:
    part = found.get_attr("IPVS_CMD_ATTR_DEST")

    def get(name: str) -> Any:
        return part.get_attr(f"IPVS_DEST_ATTR_{name}")

    return DestinationState(
        Destination(get("ADDR"), get("PORT"), get("WEIGHT"), get("FWD_METHOD")),
        get("ACTIVE_CONNS"),
        get("INACT_CONNS"),
        get("PERSIST_CONNS"),
        _counters(part, "IPVS_DEST_ATTR_"),
    )
