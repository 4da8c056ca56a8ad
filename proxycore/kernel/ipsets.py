"""IP sets by netlink, as far as finding another owner's needs it: names, ports among the members, destroying a set.

Messages and attributes: `linux/netfilter/ipset/ip_set.h`.  Needs no `ipset` program, and asks nothing where the kernel's
module is not loaded, as asking would load it.
"""

from __future__ import annotations

import errno as errnos
import socket
import struct
from pathlib import Path

from ..errors import KernelError
from .netlink import (
    NETLINK_NETFILTER,
    NLA_F_NET_BYTEORDER,
    NLM_F_EXCL,
    NetlinkSocket,
    attribute,
    attributes,
    parse_attributes,
    text_of,
)

_SUBSYSTEM = 6
_DESTROY, _LIST = 3, 7
_NFGENMSG = struct.Struct(">BBH")
_PROTOCOL, _SETNAME, _FLAGS, _ADT = 1, 2, 6, 8
_PORT = 4
_NAMES_ONLY = 1 << 1
_VERSION = 6
"""Every kernel since 2.6.39 speaks it."""
BUSY = 4100
"""The kernel's number for a set that rules or other sets refer to."""


def there() -> bool:
    """Has this kernel IP sets?  Loads nothing."""
    return Path("/sys/module/ip_set").exists()


class IPSets:
    """A connection to the sets of the calling thread's network namespace; only where `there()`.

    Raises KernelError, as its methods do.
    """

    def __init__(self) -> None:
        self._socket = NetlinkSocket(NETLINK_NETFILTER, timeout_seconds=30)

    def __enter__(self) -> IPSets:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def names(self) -> frozenset[str]:
        """Names of all sets."""
        flags = attribute(_FLAGS | NLA_F_NET_BYTEORDER, struct.pack(">I", _NAMES_ONLY))
        entries = self._socket.dump(_SUBSYSTEM << 8 | _LIST, _request() + flags)
        found = (parse_attributes(entry.body[_NFGENMSG.size :]) for entry in entries)
        return frozenset(text_of(parts[_SETNAME]) for parts in found if _SETNAME in parts)

    def ports(self, name: str) -> frozenset[int]:
        """Ports among a set's members; empty if there is no such set, or none of its members has one."""
        try:
            entries = self._socket.dump(_SUBSYSTEM << 8 | _LIST, _request(name))
        except KernelError as error:
            if error.errno == errnos.ENOENT:
                return frozenset()
            raise
        found: set[int] = set()
        for entry in entries:
            members = parse_attributes(entry.body[_NFGENMSG.size :]).get(_ADT, b"")
            for _, member in attributes(members):
                port = parse_attributes(member).get(_PORT)
                if port is not None and len(port) == 2:
                    found.add(int.from_bytes(port, "big"))
        return frozenset(found)

    def destroy(self, name: str) -> bool:
        """Destroy a set; False: there was none.

        Raises KernelError: it stays; its number is BUSY if somebody refers to it.
        """
        fault = self._socket.transact(_SUBSYSTEM << 8 | _DESTROY, _request(name), NLM_F_EXCL)
        if fault is None:
            return True
        if fault.errno == errnos.ENOENT:
            return False
        why = "rules or other sets refer to it" if fault.errno == BUSY else str(fault)
        raise KernelError(f"set {name} cannot be destroyed: {why}", errno=fault.errno)


def _request(name: str | None = None) -> bytes:
    body = _NFGENMSG.pack(socket.AF_INET, 0, 0) + attribute(_PROTOCOL, bytes([_VERSION]))
    return body if name is None else body + attribute(_SETNAME, name.encode() + b"\0")
