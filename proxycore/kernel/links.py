"""One network link by its name, by rtnetlink: its addresses, and deleting it."""

from __future__ import annotations

import errno as errnos
import socket
import struct
from ipaddress import ip_address

from ..errors import KernelError
from .netlink import NETLINK_ROUTE, NetlinkSocket, attribute, parse_attributes, text_of

_RTM_DELLINK, _RTM_GETLINK, _RTM_GETADDR = 17, 18, 22
_IFINFOMSG = struct.Struct("=BxHiII")
_IFLA_IFNAME = 3
_IFADDRMSG = struct.Struct("=BBBBI")
_IFA_ADDRESS, _IFA_LOCAL = 1, 2


def addresses_by_link() -> dict[str, frozenset[str]]:
    """Every link of this thread's network namespace with its addresses, canonical.  Raises KernelError."""
    with NetlinkSocket(NETLINK_ROUTE, timeout_seconds=30) as connection:
        names: dict[int, str] = {}
        for entry in connection.dump(_RTM_GETLINK, _IFINFOMSG.pack(0, 0, 0, 0, 0)):
            parts = parse_attributes(entry.body[_IFINFOMSG.size :])
            names[_IFINFOMSG.unpack_from(entry.body)[2]] = text_of(parts.get(_IFLA_IFNAME, b""))
        found: dict[int, set[str]] = {index: set() for index in names}
        for family in (socket.AF_INET, socket.AF_INET6):
            for entry in connection.dump(_RTM_GETADDR, _IFADDRMSG.pack(family, 0, 0, 0, 0)):
                index = _IFADDRMSG.unpack_from(entry.body)[4]
                parts = parse_attributes(entry.body[_IFADDRMSG.size :])
                own = parts.get(_IFA_LOCAL, parts.get(_IFA_ADDRESS))
                if own is not None and index in found:
                    found[index].add(str(ip_address(bytes(own))))
    return {names[index]: frozenset(addresses) for index, addresses in found.items()}


def delete_link(name: str) -> bool:
    """Delete a link; its addresses and routes go with it.  False: there was none.  Raises KernelError: it stays."""
    with NetlinkSocket(NETLINK_ROUTE, timeout_seconds=30) as connection:
        body = _IFINFOMSG.pack(0, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, name.encode() + b"\0")
        fault = connection.transact(_RTM_DELLINK, body)
    if fault is None:
        return True
    if fault.errno == errnos.ENODEV:
        return False
    raise KernelError(f"link {name} cannot be deleted: {fault}", errno=fault.errno)
