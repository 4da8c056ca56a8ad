"""IPVS by generic netlink, as far as finding another owner's virtual servers needs it: listing and deleting them.

Messages and attributes: `linux/ip_vs.h`.  Asking for a family that is not there makes the kernel load its module, so
nothing is asked where `/proc/net/ip_vs` says that IPVS is not there.
"""

from __future__ import annotations

import errno as errnos
import socket
import struct
from collections.abc import Collection, Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from ..errors import KernelError
from ..model import Protocol
from .generic import GENLMSGHDR, NETLINK_GENERIC, family_number
from .netlink import NetlinkSocket, attribute, nested, parse_attributes

_VERSION = 1
_DEL_SERVICE, _GET_SERVICE = 3, 4
_ATTR_SERVICE = 1
_AF, _PROTOCOL, _ADDRESS, _PORT, _FWMARK = 1, 2, 3, 4, 5
_U16 = struct.Struct("=H")
_PORT_FORM = struct.Struct(">H")
_NUMBERS: dict[int, Protocol] = {6: "TCP", 17: "UDP", 132: "SCTP"}


class VirtualServer(NamedTuple):
    """A virtual server found by address, protocol and port; `address` is canonical text."""

    protocol: Protocol
    address: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.protocol} {host}:{self.port}"


def there() -> bool:
    """Has the kernel IPVS in this thread's network namespace?  Loads nothing."""
    return Path("/proc/thread-self/net/ip_vs").exists()


def active_connections(servers: Collection[VirtualServer]) -> int:
    """Connections that are open through these virtual servers.  Raises OSError."""
    with Path("/proc/thread-self/net/ip_vs").open() as lines:
        return count_active(lines, servers)


def count_active(lines: Iterable[str], servers: Collection[VirtualServer]) -> int:
    """The same from the lines of `/proc/net/ip_vs`, where addresses are written in hexadecimal digits."""
    wanted = {(server.protocol, ip_address(server.address), server.port) for server in servers}
    count, counts = 0, False
    for line in lines:
        words = line.split()
        if words[:1] == ["->"]:
            if counts and len(words) >= 6 and words[4].isdigit():
                count += int(words[4])
        elif len(words) >= 2 and words[0] in _NUMBERS.values():
            host, _, port = words[1].rpartition(":")
            address = ip_address(host.strip("[]")) if "[" in host else ip_address(int(host, 16))
            counts = (words[0], address, int(port, 16)) in wanted
        else:
            counts = False
    return count


class Ipvs:
    """A connection to the IPVS of the calling thread's network namespace; only where `there()`.

    Raises KernelError, as its methods do.
    """

    def __init__(self) -> None:
        self._socket = NetlinkSocket(NETLINK_GENERIC, timeout_seconds=30)
        try:
            self._family = family_number(self._socket, "IPVS")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Ipvs:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def servers(self) -> tuple[VirtualServer, ...]:
        """All virtual servers but those found by a firewall mark."""
        found = []
        for entry in self._socket.dump(self._family, GENLMSGHDR.pack(_GET_SERVICE, _VERSION)):
            outer = parse_attributes(entry.body[GENLMSGHDR.size :])
            parts = parse_attributes(outer.get(_ATTR_SERVICE, b""))
            if _FWMARK in parts or not {_AF, _PROTOCOL, _ADDRESS, _PORT} <= parts.keys():
                continue
            (family,), (number,) = _U16.unpack(parts[_AF]), _U16.unpack(parts[_PROTOCOL])
            protocol = _NUMBERS.get(number)
            if protocol is None:
                continue
            packed = bytes(parts[_ADDRESS])[: 16 if family == socket.AF_INET6 else 4]
            found.append(VirtualServer(protocol, str(ip_address(packed)), _PORT_FORM.unpack(parts[_PORT])[0]))
        return tuple(found)

    def delete(self, server: VirtualServer) -> bool:
        """Delete a virtual server; False: there was none.  Raises KernelError: it is still there."""
        packed = ip_address(server.address).packed
        family = socket.AF_INET6 if len(packed) == 16 else socket.AF_INET
        number = next(number for number, protocol in _NUMBERS.items() if protocol == server.protocol)
        body = GENLMSGHDR.pack(_DEL_SERVICE, _VERSION) + nested(
            _ATTR_SERVICE,
            attribute(_AF, _U16.pack(family)),
            attribute(_PROTOCOL, _U16.pack(number)),
            attribute(_ADDRESS, packed.ljust(16, b"\0")),
            attribute(_PORT, _PORT_FORM.pack(server.port)),
        )
        fault = self._socket.transact(self._family, body)
        if fault is None:
            return True
        if fault.errno in (errnos.ENOENT, errnos.ESRCH):
            return False
        raise KernelError(f"virtual server {server} cannot be deleted: {fault}", errno=fault.errno)
