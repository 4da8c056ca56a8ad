"""The kernel's connection tracking: reading UDP flows and deleting single ones, by ctnetlink.

Messages and attributes: `linux/netfilter/nfnetlink_conntrack.h`; their values are in network order.
"""

from __future__ import annotations

import errno as errnos
import struct
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from ..errors import KernelError
from ..model import Family
from .flow import Flow
from .netlink import (
    NETLINK_NETFILTER,
    NLA_F_NESTED,
    NLM_F_ACK,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    NetlinkFault,
    NetlinkSocket,
    attribute,
    error_of,
    message,
    nested,
    parse_attributes,
)

_SUBSYSTEM = 1 << 8
_CT_NEW = _SUBSYSTEM | 0
_CT_GET = _SUBSYSTEM | 1
_CT_DELETE = _SUBSYSTEM | 2

_CTA_TUPLE_ORIG = 1
_CTA_TUPLE_REPLY = 2
_CTA_STATUS = 3
_CTA_ID = 12
_CTA_ZONE = 18
_CTA_FILTER = 25
_CTA_TUPLE_IP = 1
_CTA_TUPLE_PROTO = 2
_CTA_TUPLE_ZONE = 3
_CTA_PROTO_NUM = 1
_CTA_PROTO_SRC_PORT = 2
_CTA_PROTO_DST_PORT = 3
_CTA_FILTER_ORIG_FLAGS = 1
_CTA_FILTER_F_PROTO_NUM = 1 << 3

_AF: dict[Family, int] = {"IPv4": 2, "IPv6": 10}
_UDP = 17
_DELETES_PER_SEND = 128


def _header(type: int, length: int) -> bytes:
    return struct.pack("=HH", length, type)


class _Layout:
    """Where the kernel puts the parts of a UDP entry when nothing unusual is in front of its status.

    One unpack with five comparisons of attribute headers reads such an entry in a microsecond; all others go the long
    way, so that a kernel with another order costs time and not correctness.
    """

    def __init__(self, address_bytes: int) -> None:
        ip_bytes = 4 + 2 * (4 + address_bytes)
        tuple_bytes = 4 + ip_bytes + 28
        source, destination = (1, 2) if address_bytes == 4 else (3, 4)
        ip = _header(_CTA_TUPLE_IP | NLA_F_NESTED, ip_bytes) + _header(source, 4 + address_bytes)
        self.original = _header(_CTA_TUPLE_ORIG | NLA_F_NESTED, tuple_bytes) + ip
        self.reply = _header(_CTA_TUPLE_REPLY | NLA_F_NESTED, tuple_bytes) + ip
        self.protocol = (
            _header(_CTA_TUPLE_PROTO | NLA_F_NESTED, 28)
            + _header(_CTA_PROTO_NUM, 5)
            + bytes((_UDP, 0, 0, 0))
            + _header(_CTA_PROTO_SRC_PORT, 6)
        )
        self.status = _header(_CTA_STATUS, 8)
        one = f"12s {address_bytes}s 4x {address_bytes}s 16s H 6x H 2x"
        # Network order; the attribute headers, in host order, are compared as bytes.
        self.struct = struct.Struct(f">20x {one} {one} 4s I")
        self.ip_types = source, destination


_LAYOUTS: dict[Family, _Layout] = {"IPv4": _Layout(4), "IPv6": _Layout(16)}
_ID_HEADER = int.from_bytes(_header(_CTA_ID, 8), "big")
_HEADER_AND_U32 = struct.Struct(">II")
_LENGTH_AND_TYPE = struct.Struct("=IH")


class Conntrack:
    """Access to the connection tracking table of the calling thread's network namespace; for one thread at a time.

    Raises KernelError when it cannot be opened (no CAP_NET_ADMIN is needed for that, but for all else).
    """

    def __init__(self, *, timeout_seconds: float = 10.0) -> None:
        self._socket = NetlinkSocket(
            NETLINK_NETFILTER, send_buffer_bytes=1 << 20, timeout_seconds=timeout_seconds
        )
        self._filter = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close; doing it twice does no harm."""
        self._socket.close()

    def udp_flows(self, family: Family) -> list[Flow]:
        """All UDP flows of a family, in all zones.

        While the table changes, an entry may come twice or a new one not at all.  The kernel passes over other
        protocols since Linux 5.8; before that they are skipped here.
        Raises KernelError: the table could not be read; nothing has changed.
        """
        body = bytes((_AF[family], 0, 0, 0))
        chosen = nested(
            _CTA_FILTER, attribute(_CTA_FILTER_ORIG_FLAGS, struct.pack("=I", _CTA_FILTER_F_PROTO_NUM))
        )
        chosen += nested(_CTA_TUPLE_ORIG, nested(_CTA_TUPLE_PROTO, attribute(_CTA_PROTO_NUM, bytes((_UDP,)))))
        if self._filter:
            try:
                return self._dump(family, body + chosen)
            except KernelError as error:
                if error.errno not in (errnos.EINVAL, errnos.EOPNOTSUPP):
                    raise
                self._filter = False
        return self._dump(family, body)

    def _dump(self, family: Family, body: bytes) -> list[Flow]:
        found: list[Flow] = []
        try:
            for datagram in self._socket.dump_datagrams(_CT_GET, body):
                _read(datagram, _LAYOUTS[family], found)
        except TimeoutError as error:
            self._reopen()
            raise KernelError(
                "reading UDP flows: the kernel does not answer", errno=errnos.ETIMEDOUT
            ) from error
        except KernelError:
            # The rest of the dump may still be under way.
            self._reopen()
            raise
        return found

    def _reopen(self) -> None:
        timeout = self._socket.socket.gettimeout()
        self._socket.close()
        self._socket = NetlinkSocket(NETLINK_NETFILTER, send_buffer_bytes=1 << 20, timeout_seconds=timeout)

    def delete(self, flows: Iterable[Flow]) -> int:
        """Delete exactly these entries and return how many of them were still there.

        An entry is found by its reply tuple and must have the id that the kernel derives from the original one:
        a successor, of the same client to the same frontend but with another server, stays.
        Raises KernelError at the first other refusal: those before it are deleted, of those after it some may be.
        """
        pending = list(flows)
        deleted = 0
        for start in range(0, len(pending), _DELETES_PER_SEND):
            deleted += self._delete(pending[start : start + _DELETES_PER_SEND])
        return deleted

    def _delete(self, flows: Sequence[Flow]) -> int:
        first = self._socket.reserve(len(flows))
        requests = [
            message(_CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, first + index, _delete_body(flow))
            for index, flow in enumerate(flows)
        ]
        self._socket.send(b"".join(requests))
        outcomes: dict[int, NetlinkFault | None] = {}
        try:
            while len(outcomes) < len(flows):
                for reply in self._socket.receive():
                    if reply.type == NLMSG_ERROR and first <= reply.seq < first + len(flows):
                        outcomes[reply.seq] = error_of(reply)
        except TimeoutError as error:
            self._reopen()
            raise KernelError(
                "deleting UDP flows: the kernel does not answer", errno=errnos.ETIMEDOUT
            ) from error
        for seq, fault in outcomes.items():
            if fault is not None and fault.errno != errnos.ENOENT:
                raise KernelError(f"cannot delete UDP flow {flows[seq - first]}: {fault}", errno=fault.errno)
        return sum(fault is None for fault in outcomes.values())


def _delete_body(flow: Flow) -> bytes:
    # Without a tuple the kernel would delete the whole table; of two tuples it would ignore the reply's.
    family: Family = "IPv4" if len(flow.reply_source) == 4 else "IPv6"
    source, destination = _LAYOUTS[family].ip_types
    reply = nested(
        _CTA_TUPLE_REPLY,
        nested(
            _CTA_TUPLE_IP,
            attribute(source, flow.reply_source),
            attribute(destination, flow.reply_destination),
        ),
        nested(
            _CTA_TUPLE_PROTO,
            attribute(_CTA_PROTO_NUM, bytes((_UDP,))),
            attribute(_CTA_PROTO_SRC_PORT, flow.reply_source_port.to_bytes(2, "big")),
            attribute(_CTA_PROTO_DST_PORT, flow.reply_destination_port.to_bytes(2, "big")),
        ),
    )
    zone = attribute(_CTA_ZONE, flow.reply_zone.to_bytes(2, "big")) if flow.reply_zone else b""
    return bytes((_AF[family], 0, 0, 0)) + reply + zone + attribute(_CTA_ID, flow.id.to_bytes(4, "big"))


def _read(datagram: memoryview, layout: _Layout, found: list[Flow]) -> None:
    """Append the UDP flows of one datagram of a dump."""
    original, reply, protocol, status_header = layout.original, layout.reply, layout.protocol, layout.status
    unpack, fixed_bytes = layout.struct.unpack_from, layout.struct.size
    length_and_type, header_and_u32 = _LENGTH_AND_TYPE.unpack_from, _HEADER_AND_U32.unpack_from
    new, append = tuple.__new__, found.append
    id_at = fixed_bytes
    offset, end = 0, len(datagram)
    while offset + 16 <= end:
        length, type = length_and_type(datagram, offset)
        if length < 16 or offset + length > end:
            return
        start = offset
        offset += (length + 3) & ~3
        if type != _CT_NEW:
            continue
        if length >= fixed_bytes:
            (o, src, dst, p, sport, dport, r, rsrc, rdst, q, rsport, rdport, s, status) = unpack(
                datagram, start
            )
            if o == original and p == protocol and r == reply and q == protocol and s == status_header:
                where = id_at if id_at + 8 <= length else 0
                header, id = header_and_u32(datagram, start + where)
                if header != _ID_HEADER:
                    where = _find_id(datagram[start : start + length], fixed_bytes)
                    if where == 0:
                        continue
                    id_at = where
                    _, id = header_and_u32(datagram, start + where)
                append(new(Flow, (src, sport, dst, dport, rsrc, rsport, rdst, rdport, status, 0, 0, id)))
                continue
        flow = _parse(datagram[start + 16 : start + length], layout)
        if flow is not None:
            append(flow)


def _find_id(entry: memoryview, offset: int) -> int:
    """Offset of CTA_ID in a message, searched from `offset` on; 0: it is not there."""
    while offset + 8 <= len(entry):
        length, type = struct.unpack_from("=HH", entry, offset)
        if type == _CTA_ID:
            return offset
        offset += (max(length, 4) + 3) & ~3
    return 0


def _parse(body: memoryview, layout: _Layout) -> Flow | None:
    """One entry with its parts in any order; None unless it is a complete UDP flow."""
    parts = parse_attributes(body[4:])
    try:
        original, reply = parse_attributes(parts[_CTA_TUPLE_ORIG]), parse_attributes(parts[_CTA_TUPLE_REPLY])
        ends = _ends(original, layout), _ends(reply, layout)
        zones = (parts.get(_CTA_ZONE, tuple_.get(_CTA_TUPLE_ZONE, b"\0\0")) for tuple_ in (original, reply))
        status, id = parts[_CTA_STATUS], parts[_CTA_ID]
    except KeyError:
        return None
    if ends[0] is None or ends[1] is None:
        return None
    rest = (int.from_bytes(part, "big") for part in (status, *zones, id))
    return Flow(*ends[0], *ends[1], *rest)


def _ends(tuple_: dict[int, memoryview], layout: _Layout) -> tuple[bytes, int, bytes, int] | None:
    protocol = parse_attributes(tuple_[_CTA_TUPLE_PROTO])
    if protocol[_CTA_PROTO_NUM][0] != _UDP:
        return None
    addresses = parse_attributes(tuple_[_CTA_TUPLE_IP])
    source, destination = layout.ip_types
    return (
        bytes(addresses[source]),
        int.from_bytes(protocol[_CTA_PROTO_SRC_PORT], "big"),
        bytes(addresses[destination]),
        int.from_bytes(protocol[_CTA_PROTO_DST_PORT], "big"),
    )
