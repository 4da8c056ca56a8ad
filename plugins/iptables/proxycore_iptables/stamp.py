"""Has anybody changed the rules?  Asked every second, so it costs one small request a table, or one for all.

Legacy: what the kernel says of each table's size and layout; a rule replaced by one of equal size does not show.  nft: the number
of the ruleset, which every commit of anybody raises, in any table.
"""

from __future__ import annotations

import ctypes
import errno as errnos
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from proxycore.api import Family, KernelError
from proxycore.kernel import nftables, xtables
from proxycore.kernel.xtables import Variant

_GET_INFO = 64
"""IPT_SO_GET_INFO, and IP6T_SO_GET_INFO."""
_INFO = struct.Struct("=32sI5I5III")
"""struct ipt_getinfo: name, hooks in use, where each begins, where its policy stands, number of entries, bytes."""
_LEVELS: Mapping[Family, tuple[socket.AddressFamily, int]] = {
    "IPv4": (socket.AF_INET, socket.IPPROTO_IP),
    "IPv6": (socket.AF_INET6, socket.IPPROTO_IPV6),
}
_libc = ctypes.CDLL(None, use_errno=True)


class TableStamp(NamedTuple):
    """What the kernel says of one legacy table.  `hooks`, `policies`: bytes from the start, of each hook in use."""

    entries: int
    size: int
    hooks: tuple[int, ...]
    policies: tuple[int, ...]


class Stamp(msgspec.Struct, frozen=True, kw_only=True):
    """A state of the rules; equal stamps: nothing has changed as far as can be told.

    `generation`: of nf_tables, None in legacy.  `tables`: of legacy.
    """

    generation: int | None = None
    tables: Mapping[tuple[Family, str], TableStamp] = {}

    def entries(self, family: Family, table: str) -> int | None:
        """How many entries a legacy table has, its own included; None: there is none, or it is the nft variant."""
        found = self.tables.get((family, table))
        return found.entries if found else None


class Stamps(Protocol):
    """Where stamps come from; belongs to the network namespace of the thread that made it, and so must who reads."""

    def read(self) -> Stamp:
        """The state of now.  Raises KernelError."""

    def close(self) -> None: ...


def stamps(variant: Variant, families: Sequence[Family]) -> Stamps:
    """The kind for a variant.  Raises KernelError, saying which capability is missing."""
    return LegacyStamps(families) if variant == "legacy" else NftStamps()


class NftStamps:
    """One number for all families and all tables, those of other programs as well."""

    def __init__(self) -> None:
        self._kernel = nftables.NfTables()

    def read(self) -> Stamp:
        return Stamp(generation=self._kernel.generation())

    def close(self) -> None:
        self._kernel.close()


class LegacyStamps:
    """Asks only for tables that exist: asking for another would make it.  Needs CAP_NET_RAW and CAP_NET_ADMIN."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._sockets: dict[Family, socket.socket] = {}
        for family in families:
            try:
                self._sockets[family] = socket.socket(
                    _LEVELS[family][0], socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW
                )
            except OSError as error:
                if error.errno == errnos.EAFNOSUPPORT:
                    # Then there are no tables either.
                    continue
                self.close()
                raise _failed(f"open a raw {family} socket", error.errno or 0, "CAP_NET_RAW") from error

    def read(self) -> Stamp:
        found: dict[tuple[Family, str], TableStamp] = {}
        for family, on in self._sockets.items():
            tables = xtables.legacy_tables(family)
            if tables is None:
                raise KernelError(
                    f"cannot see which {family} tables there are: /proc/net may not be read",
                    errno=errnos.EACCES,
                )
            for table in sorted(tables):
                stamp = _stamp(on, family, table)
                if stamp is not None:
                    found[family, table] = stamp
        return Stamp(tables=found)

    def close(self) -> None:
        for on in self._sockets.values():
            on.close()
        self._sockets.clear()


def _stamp(on: socket.socket, family: Family, table: str) -> TableStamp | None:
    """None: the table has gone since it was listed, with its module."""
    buffer = ctypes.create_string_buffer(table.encode(), _INFO.size)
    size = ctypes.c_uint32(_INFO.size)
    if _libc.getsockopt(on.fileno(), _LEVELS[family][1], _GET_INFO, buffer, ctypes.byref(size)):
        number = ctypes.get_errno()
        if number == errnos.ENOENT:
            return None
        raise _failed(f"ask for {family} table {table}", number, "CAP_NET_ADMIN")
    _, valid, *places, entries, bytes_ = _INFO.unpack(buffer.raw)
    used = [hook for hook in range(5) if valid >> hook & 1]
    return TableStamp(
        entries=entries,
        size=bytes_,
        hooks=tuple(places[hook] for hook in used),
        policies=tuple(places[5 + hook] for hook in used),
    )


def _failed(doing: str, number: int, right: str) -> KernelError:
    needs = f"; that needs {right}, which this process lacks" if number == errnos.EPERM else ""
    return KernelError(f"cannot {doing}: {os.strerror(number)}{needs}", errno=number)
