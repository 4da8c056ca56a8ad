"""Generic netlink: the number that the kernel gave a family of messages, such as that of IPVS.

Layout: `linux/genetlink.h`.
"""

from __future__ import annotations

import errno as errnos
import struct

from ..errors import KernelError
from .netlink import NetlinkSocket, attribute, parse_attributes, text_of

NETLINK_GENERIC = 16
GENLMSGHDR = struct.Struct("=BBxx")
"""struct genlmsghdr: command and version; it follows the header of each message."""

_CONTROL = 16
_GETFAMILY = 3
_FAMILY_ID, _FAMILY_NAME = 1, 2
_U16 = struct.Struct("=H")


def family_number(socket: NetlinkSocket, name: str) -> int:
    """Message type of the family `name`; the kernel loads its module if need be.

    Raises KernelError (ENOENT) if the kernel does not have it.
    """
    body = GENLMSGHDR.pack(_GETFAMILY, 1) + attribute(_FAMILY_NAME, name.encode() + b"\0")
    seq = socket.request(_CONTROL, body)
    while True:
        for reply in socket.receive():
            if reply.seq != seq:
                continue
            parts = parse_attributes(reply.body[GENLMSGHDR.size :]) if reply.type == _CONTROL else {}
            if _FAMILY_NAME in parts and text_of(parts[_FAMILY_NAME]) == name:
                return int(_U16.unpack_from(parts[_FAMILY_ID])[0])
            raise KernelError(f"the kernel does not say how to speak to its {name}", errno=errnos.ENOENT)
