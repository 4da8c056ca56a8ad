"""Named counters of the kernel (nfacct), which rules with `-m nfacct` raise and kube-proxy's metrics show."""

from __future__ import annotations

import errno as errnos
import socket
import struct
from collections.abc import Sequence
from typing import Self

from proxycore.api import KernelError
from proxycore.kernel import xtables
from proxycore.kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NetlinkSocket,
    attribute,
    parse_attributes,
    text_of,
)
from proxycore.kernel.xtables import Tools

from .words import INVALID_COUNTER, LOCALHOST_COUNTER

NAMES = (INVALID_COUNTER, LOCALHOST_COUNTER)

_SUBSYSTEM = 7
_NEW, _GET, _DELETE = (_SUBSYSTEM << 8 | kind for kind in (0, 1, 3))
_NAME, _PACKETS = 1, 2
_HEADER = struct.Struct(">BBH").pack(socket.AF_UNSPEC, 0, 0)


class Counting:
    """The counters of the calling thread's network namespace; to be used by one thread.

    Raises KernelError, as its methods do.
    """

    def __init__(self) -> None:
        self._socket = NetlinkSocket(NETLINK_NETFILTER, timeout_seconds=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close; doing it twice does no harm."""
        self._socket.close()

    def ensure(self, names: Sequence[str] = NAMES) -> tuple[str, ...]:
        """Make counters that are not there yet, and return those; the others go on counting."""
        return tuple(
            name for name in names if self._do("made", _NEW, name, errnos.EEXIST, NLM_F_CREATE | NLM_F_EXCL)
        )

    def packets(self, names: Sequence[str] = NAMES) -> dict[str, int]:
        """Packets counted since each was made; one that is not there is missing."""
        found: dict[str, int] = {}
        for entry in self._socket.dump(_GET, _HEADER):
            parts = parse_attributes(entry.body[len(_HEADER) :])
            name = text_of(parts[_NAME])
            if name in names:
                found[name] = int.from_bytes(parts[_PACKETS], "big")
        return found

    def delete(self, names: Sequence[str] = NAMES) -> tuple[str, ...]:
        """Delete counters and return those that were there.  Raises KernelError (EBUSY: a rule uses it): it is still there."""
        return tuple(name for name in names if self._do("deleted", _DELETE, name, errnos.ENOENT))

    def _do(self, done: str, kind: int, name: str, unless: int, flags: int = 0) -> bool:
        """Was it done?  False if the kernel says `unless`."""
        fault = self._socket.transact(kind, _HEADER + attribute(_NAME, name.encode() + b"\0"), flags)
        if fault is None:
            return True
        if fault.errno == unless:
            return False
        raise KernelError(f"the counter {name} cannot be {done}: {fault}", errno=fault.errno)


def problem(tools: Tools) -> str | None:
    """Why there can be no such counters here, in a sentence; None if there can.

    No table is made, changed or locked.  Raises KernelError: the tool cannot be run.
    """
    try:
        with Counting() as counting:
            counting.packets()
    except KernelError as error:
        return f"the kernel has no nfacct counters: {error}"
    lack = xtables.lacks(tools, "-m", "nfacct", "--nfacct-name")
    return f"{tools} cannot count with nfacct: {lack}" if lack else None


def available(tools: Tools) -> bool:
    """Can rules of this variant and family count by name?  Does and raises as problem()."""
    return problem(tools) is None
