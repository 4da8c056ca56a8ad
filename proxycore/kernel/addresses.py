"""The addresses of this node's interfaces, followed live by rtnetlink.

Semantics of flags and scopes: `linux/if_addr.h`, `linux/rtnetlink.h`.  An IPv6 address counts once it is usable: one
that is still being probed for duplicates (tentative) or that turned out to be one (dadfailed) cannot be bound and is
not answered for; the kernel tells again when probing has ended.  Optimistic and deprecated ones count.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable
from ipaddress import ip_address
from types import TracebackType
from typing import Self

from ..host import InterfaceAddress, Scope
from .netlink import (
    NETLINK_ROUTE,
    Message,
    NetlinkSocket,
    Overrun,
    parse_attributes,
    text_of,
)

_RTMGRP_LINK = 0x1
_RTMGRP_IPV4_IFADDR = 0x10
_RTMGRP_IPV6_IFADDR = 0x100

_RTM_NEWLINK = 16
_RTM_DELLINK = 17
_RTM_GETLINK = 18
_RTM_NEWADDR = 20
_RTM_DELADDR = 21
_RTM_GETADDR = 22

_IFINFOMSG = struct.Struct("=BxHiII")
_IFLA_IFNAME = 3
_IFADDRMSG = struct.Struct("=BBBBI")
_IFA_ADDRESS = 1
_IFA_LOCAL = 2
_IFA_FLAGS = 8
_IFA_F_OPTIMISTIC = 0x04
_IFA_F_DADFAILED = 0x08
_IFA_F_TENTATIVE = 0x40

_SCOPES: tuple[tuple[int, Scope], ...] = ((254, "host"), (253, "link"), (200, "site"), (0, "global"))

Addresses = tuple[InterfaceAddress, ...]


class AddressWatch:
    """Interface addresses of the network namespace of the thread that makes this object.

    `gather_seconds`: changes within this time of the first one are told together.
    Raises KernelError when netlink cannot be opened.
    """

    def __init__(self, *, gather_seconds: float = 0.02) -> None:
        self._gather_seconds = gather_seconds
        self._names: dict[int, str] = {}
        self._stopping = threading.Event()
        self._query = NetlinkSocket(NETLINK_ROUTE, timeout_seconds=10)
        try:
            self._events = NetlinkSocket(
                NETLINK_ROUTE, _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR, timeout_seconds=0
            )
        except BaseException:
            self._query.close()
            raise
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back the sockets, after run() has returned or without it; doing it twice does no harm."""
        self._query.close()
        self._events.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def current(self) -> Addresses:
        """All usable addresses, in the kernel's order: an interface's primary address comes before its others.

        Not to be called while run() is under way.  Raises KernelError: nothing could be read.
        """
        self._read_names()
        return self._read_addresses()

    def run(self, callback: Callable[[Addresses], None]) -> None:
        """Call back at once with the addresses of now, then with all of them after each change, until stop().

        Blocks; the callback is called on this thread.  Lost notifications lead to a fresh reading.
        Raises KernelError when netlink fails otherwise, and whatever the callback raises; run() may be called again.
        """
        last = self.current()
        callback(last)
        poll = select.poll()
        poll.register(self._events, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            poll.poll()
            if self._stopping.is_set():
                return
            if not self._take_events():
                continue
            if self._stopping.wait(self._gather_seconds):
                return
            self._take_events()
            addresses = self._read_addresses()
            if addresses != last:
                last = addresses
                callback(addresses)

    def stop(self) -> None:
        """Let run() return; may be called from any thread, and before run()."""
        self._stopping.set()
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _take_events(self) -> bool:
        """Take what has arrived; True if addresses may have changed."""
        changed = False
        while True:
            try:
                for event in self._events.receive():
                    changed = self._take(event) or changed
            except BlockingIOError:
                return changed
            except Overrun:
                self._read_names()
                changed = True

    def _take(self, event: Message) -> bool:
        if event.type in (_RTM_NEWADDR, _RTM_DELADDR):
            return True
        if event.type not in (_RTM_NEWLINK, _RTM_DELLINK) or len(event.body) < _IFINFOMSG.size:
            return False
        family, _, index, _, _ = _IFINFOMSG.unpack_from(event.body)
        if family != socket.AF_UNSPEC:
            # A bridge port's own news.  Its removal from the bridge comes as a RTM_DELLINK too.
            return False
        if event.type == _RTM_DELLINK:
            return self._names.pop(index, None) is not None
        name = _link_name(event)
        known = self._names.get(index)
        self._names[index] = name
        return known is not None and known != name

    def _read_names(self) -> None:
        entries = self._query.dump(_RTM_GETLINK, _IFINFOMSG.pack(0, 0, 0, 0, 0))
        self._names = {_IFINFOMSG.unpack_from(entry.body)[2]: _link_name(entry) for entry in entries}

    def _read_addresses(self) -> Addresses:
        found: list[InterfaceAddress] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for entry in self._query.dump(_RTM_GETADDR, _IFADDRMSG.pack(family, 0, 0, 0, 0)):
                address = self._parse(entry)
                if address is not None:
                    found.append(address)
        return tuple(found)

    def _parse(self, entry: Message) -> InterfaceAddress | None:
        """None: not usable, or its interface is just going."""
        if entry.type != _RTM_NEWADDR or len(entry.body) < _IFADDRMSG.size:
            return None
        family, prefix_length, flags, scope, index = _IFADDRMSG.unpack_from(entry.body)
        parts = parse_attributes(entry.body[_IFADDRMSG.size :])
        if _IFA_FLAGS in parts:
            flags = int.from_bytes(parts[_IFA_FLAGS], sys.byteorder)
        if family == socket.AF_INET6 and _unusable(flags):
            return None
        # Of a point-to-point interface IFA_ADDRESS is the other end.
        own = parts.get(_IFA_LOCAL, parts.get(_IFA_ADDRESS))
        if own is None or len(own) != (4 if family == socket.AF_INET else 16):
            return None
        if index not in self._names:
            self._read_names()
        name = self._names.get(index)
        if name is None:
            return None
        return InterfaceAddress(
            address=str(ip_address(bytes(own))),
            prefix_length=prefix_length,
            interface=name,
            scope=next(word for least, word in _SCOPES if scope >= least),
        )


def _unusable(flags: int) -> bool:
    if flags & _IFA_F_DADFAILED:
        return True
    return bool(flags & _IFA_F_TENTATIVE) and not flags & _IFA_F_OPTIMISTIC


def _link_name(entry: Message) -> str:
    parts = parse_attributes(entry.body[_IFINFOMSG.size :])
    return text_of(parts[_IFLA_IFNAME]) if _IFLA_IFNAME in parts else ""
