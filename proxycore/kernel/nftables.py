"""nf_tables by netlink, as far as finding other owners' tables needs it: listing tables and chains, deleting a table, the
number of the ruleset.

Messages and attributes: `linux/netfilter/nf_tables.h`.  Needs no `nft` program.
"""

from __future__ import annotations

import errno as errnos
import socket
import struct
from typing import Literal

from ..errors import KernelError
from .netlink import (
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    NetlinkSocket,
    attribute,
    error_of,
    message,
    parse_attributes,
    text_of,
)

NftFamily = Literal["ip", "ip6"]

_SUBSYSTEM = 10
_GETTABLE, _DELTABLE, _GETCHAIN, _GETGEN = 1, 2, 4, 16
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_GENERATION = 1
_NFGENMSG = struct.Struct(">BBH")
_TABLE_NAME = 1
_CHAIN_TABLE, _CHAIN_NAME = 1, 3
_PROTOCOLS: dict[NftFamily, int] = {"ip": 2, "ip6": 10}
_NO_NF_TABLES = (errnos.EOPNOTSUPP, errnos.EINVAL, errnos.EPROTONOSUPPORT, errnos.EAFNOSUPPORT)


def generation(on: NetlinkSocket) -> int:
    """Number of the ruleset of a NETLINK_NETFILTER socket's network namespace; each commit of anybody raises it by one.

    Raises KernelError: the kernel has no nf_tables, or we may not ask.
    """
    seq = on.request(_SUBSYSTEM << 8 | _GETGEN, _NFGENMSG.pack(socket.AF_UNSPEC, 0, 0))
    while True:
        for reply in on.receive():
            if reply.seq != seq:
                continue
            if reply.type == NLMSG_ERROR:
                fault = error_of(reply)
                raise KernelError(
                    f"cannot read the ruleset's generation: {fault}", errno=fault.errno if fault else 0
                )
            return int.from_bytes(parse_attributes(reply.body[_NFGENMSG.size :])[_GENERATION], "big")


class NfTables:
    """A connection to the nf_tables of the calling thread's network namespace.  Raises KernelError, as its methods do."""

    def __init__(self) -> None:
        self._socket = NetlinkSocket(NETLINK_NETFILTER, timeout_seconds=30)

    def __enter__(self) -> NfTables:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def close(self) -> None:
        """Close; doing it twice does no harm."""
        self._socket.close()

    def generation(self) -> int:
        """Number of the ruleset; each commit of anybody, in any family, raises it by one."""
        return generation(self._socket)

    def tables(self, family: NftFamily) -> frozenset[str]:
        """Names of the tables of a family; empty where the kernel has no nf_tables for it."""
        return frozenset(name for (name,) in self._names(_GETTABLE, family, _TABLE_NAME))

    def chains(self, family: NftFamily) -> frozenset[tuple[str, str]]:
        """Table and name of every chain of a family."""
        return frozenset(
            (table, chain) for table, chain in self._names(_GETCHAIN, family, _CHAIN_TABLE, _CHAIN_NAME)
        )

    def has_chain(self, family: NftFamily, table: str, chain: str) -> bool:
        """Is there a chain of this name?  However many there are, only this one is looked at."""
        body = _NFGENMSG.pack(_PROTOCOLS[family], 0, 0)
        body += attribute(_CHAIN_TABLE, table.encode() + b"\0") + attribute(
            _CHAIN_NAME, chain.encode() + b"\0"
        )
        fault = self._socket.transact(_SUBSYSTEM << 8 | _GETCHAIN, body)
        if fault is None:
            return True
        if fault.errno == errnos.ENOENT or fault.errno in _NO_NF_TABLES:
            return False
        raise KernelError(f"cannot look for chain {chain} in {family} {table}: {fault}", errno=fault.errno)

    def _names(self, kind: int, family: NftFamily, *wanted: int) -> list[tuple[str, ...]]:
        header = _NFGENMSG.pack(_PROTOCOLS[family], 0, 0)
        try:
            entries = self._socket.dump(_SUBSYSTEM << 8 | kind, header)
        except KernelError as error:
            if error.errno in _NO_NF_TABLES:
                return []
            raise
        found = []
        for entry in entries:
            if entry.body[0] != _PROTOCOLS[family]:
                continue
            parts = parse_attributes(entry.body[_NFGENMSG.size :])
            if all(number in parts for number in wanted):
                found.append(tuple(text_of(parts[number]) for number in wanted))
        return found

    def delete_table(self, family: NftFamily, name: str) -> bool:
        """Delete a table with all it holds; False: there was none.  Raises KernelError: it is still there."""
        first = self._socket.reserve(3)
        mark = _NFGENMSG.pack(socket.AF_UNSPEC, 0, _SUBSYSTEM)
        body = _NFGENMSG.pack(_PROTOCOLS[family], 0, 0) + attribute(_TABLE_NAME, name.encode() + b"\0")
        self._socket.send(
            message(_BATCH_BEGIN, NLM_F_REQUEST, first, mark)
            + message(_SUBSYSTEM << 8 | _DELTABLE, NLM_F_REQUEST | NLM_F_ACK, first + 1, body)
            + message(_BATCH_END, NLM_F_REQUEST, first + 2, mark)
        )
        while True:
            for reply in self._socket.receive():
                if reply.type != NLMSG_ERROR or not first <= reply.seq <= first + 2:
                    continue
                fault = error_of(reply)
                if fault is None:
                    return True
                if fault.errno == errnos.ENOENT:
                    return False
                raise KernelError(f"table {family} {name} cannot be deleted: {fault}", errno=fault.errno)
