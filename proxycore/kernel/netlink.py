"""A small typed socket for raw netlink: sending, receiving, dumps and extended acknowledgements.

Layout of messages, attributes and errors: `linux/netlink.h`.  Numbers in headers are in the host's order.
"""

from __future__ import annotations

import errno as errnos
import os
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

from ..errors import KernelError

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

NLMSG_NOOP = 1
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSG_OVERRUN = 4

NLM_F_REQUEST = 0x1
NLM_F_MULTI = 0x2
NLM_F_ACK = 0x4
NLM_F_ECHO = 0x8
NLM_F_DUMP_INTR = 0x10
NLM_F_ROOT = 0x100
NLM_F_MATCH = 0x200
NLM_F_DUMP = NLM_F_ROOT | NLM_F_MATCH
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800

NLA_F_NESTED = 0x8000
NLA_F_NET_BYTEORDER = 0x4000
NLA_TYPE_MASK = 0x3FFF

_NLMSGERR_ATTR_MSG = 1
_NLMSGERR_ATTR_OFFS = 2

_SOL_NETLINK = 270
_NETLINK_NO_ENOBUFS = 5
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_NETLINK_GET_STRICT_CHK = 12
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33

HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length with header, type, flags, sequence number, port of the sender (0: the kernel)."""
_ATTRIBUTE = struct.Struct("=HH")
_ERROR = struct.Struct("=i")
_U32 = struct.Struct("=I")

_DATAGRAM_BYTES = 256 << 10
_DUMP_ATTEMPTS = 5

Buffer = bytes | bytearray | memoryview


class Message(NamedTuple):
    """One netlink message.  `body` is what follows the 16-byte header; it keeps its datagram alive."""

    type: int
    flags: int
    seq: int
    body: memoryview


class NetlinkFault(NamedTuple):
    """The kernel's refusal of the request `seq`.

    `errno` is positive.  `text` is the extended acknowledgement's message, empty if there is none.  `offset`:
    byte in the request, counted from its header, that the kernel blames; None if it names none.
    """

    errno: int
    text: str
    offset: int | None
    seq: int

    def __str__(self) -> str:
        name = errnos.errorcode.get(self.errno, str(self.errno))
        said = f"{os.strerror(self.errno)} ({name})"
        return f"{said}: {self.text}" if self.text else said


class Overrun(KernelError):
    """Messages were lost, the receive buffer being full: what was learnt by listening must be read anew."""


class DumpInterrupted(KernelError):
    """The kernel's table kept changing while it was dumped, so the dump may have gaps."""


class NetlinkSocket:
    """A netlink socket of the calling thread's network namespace; to be used by one thread at a time.

    `groups` is a mask of multicast groups (RTMGRP_*).  Buffer sizes may exceed the host's limit if we hold
    CAP_NET_ADMIN, else the limit holds.  `strict`: the kernel checks and obeys the filters of dump requests.
    `no_overrun`: drop multicast messages silently instead of raising Overrun.
    Raises KernelError when the socket cannot be opened.
    """

    def __init__(
        self,
        protocol: int,
        groups: int = 0,
        *,
        receive_buffer_bytes: int = 8 << 20,
        send_buffer_bytes: int | None = None,
        strict: bool = False,
        no_overrun: bool = False,
        timeout_seconds: float | None = None,
    ) -> None:
        self._buffer = bytearray(_DATAGRAM_BYTES)
        self._view = memoryview(self._buffer)
        self._sequence = 0
        try:
            self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        except OSError as error:
            raise _failed(f"open a netlink socket of protocol {protocol}", error) from error
        try:
            self._set_size(_SO_RCVBUFFORCE, socket.SO_RCVBUF, receive_buffer_bytes)
            if send_buffer_bytes is not None:
                self._set_size(_SO_SNDBUFFORCE, socket.SO_SNDBUF, send_buffer_bytes)
            self.socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            self.socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            if strict:
                self.socket.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
            if no_overrun:
                self.socket.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
            self.socket.settimeout(timeout_seconds)
            self.socket.bind((0, groups))
        except OSError as error:
            self.socket.close()
            raise _failed(f"set up a netlink socket of protocol {protocol}", error) from error
        self.port: int = self.socket.getsockname()[0]

    def _set_size(self, forced: int, plain: int, size: int) -> None:
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, forced, size)
        except PermissionError:
            self.socket.setsockopt(socket.SOL_SOCKET, plain, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close; doing it twice does no harm."""
        self.socket.close()

    def fileno(self) -> int:
        """For select(), poll() and selectors."""
        return self.socket.fileno()

    def reserve(self, count: int = 1) -> int:
        """First of `count` fresh consecutive sequence numbers; never 0, which is that of notifications."""
        if self._sequence + count > 0xFFFFFFFF:
            self._sequence = 0
        first = self._sequence + 1
        self._sequence += count
        return first

    def send(self, data: Buffer) -> None:
        """Send complete messages in one datagram.  Raises KernelError: nothing was sent."""
        try:
            self.socket.send(data)
        except OSError as error:
            raise _failed(f"send {len(data)} bytes by netlink", error) from error

    def receive_datagram(self) -> memoryview:
        """Wait for one datagram: the bytes of one or more messages.

        Raises Overrun after a loss, TimeoutError when the timeout has passed (BlockingIOError, if that
        is 0), KernelError otherwise.
        """
        try:
            size, _, flags, _ = self.socket.recvmsg_into([self._view])
        except (TimeoutError, BlockingIOError):
            raise
        except OSError as error:
            if error.errno == errnos.ENOBUFS:
                raise Overrun(
                    "netlink messages were lost: receive buffer full", errno=errnos.ENOBUFS
                ) from error
            raise _failed("receive by netlink", error) from error
        if flags & socket.MSG_TRUNC:
            raise Overrun(f"netlink datagram above {_DATAGRAM_BYTES} bytes was cut", errno=errnos.EMSGSIZE)
        return memoryview(bytes(self._view[:size]))

    def receive_waiting(self) -> memoryview:
        """One datagram that has arrived already.

        Raises BlockingIOError if there is none, otherwise as receive_datagram().
        """
        timeout = self.socket.gettimeout()
        self.socket.settimeout(0)
        try:
            return self.receive_datagram()
        finally:
            self.socket.settimeout(timeout)

    def receive(self) -> Iterator[Message]:
        """The messages of one datagram; waits for it.  Errors as in receive_datagram()."""
        return messages(self.receive_datagram())

    def request(self, type: int, body: Buffer = b"", flags: int = 0) -> int:
        """Send one request (NLM_F_REQUEST is implied) and return its sequence number."""
        seq = self.reserve()
        self.send(message(type, NLM_F_REQUEST | flags, seq, body))
        return seq

    def transact(self, type: int, body: Buffer = b"", flags: int = 0) -> NetlinkFault | None:
        """Send one request and wait for its acknowledgement; None: done, else why not."""
        seq = self.request(type, body, flags | NLM_F_ACK)
        while True:
            for reply in self.receive():
                if reply.seq == seq and reply.type == NLMSG_ERROR:
                    return error_of(reply)

    def dump_datagrams(self, type: int, body: Buffer = b"", flags: int = 0) -> Iterator[memoryview]:
        """Raw datagrams of one dump, for parsers in a hurry; the last one holds NLMSG_DONE.

        Foreign sequence numbers are not filtered out: use it on a socket without groups.  Raises KernelError
        if the kernel refuses, DumpInterrupted at the end if what was yielded may have gaps.
        """
        seq = self.request(type, body, flags | NLM_F_DUMP)
        interrupted = False
        while True:
            datagram = self.receive_datagram()
            flagged, last = _scan_dump(datagram, seq)
            interrupted = interrupted or flagged
            fault = None if last is None else error_of(last)
            if fault is not None:
                raise KernelError(f"netlink dump of type {type:#x} refused: {fault}", errno=fault.errno)
            yield datagram
            if last is None:
                continue
            if interrupted:
                raise DumpInterrupted(
                    f"netlink dump of type {type:#x}: the table kept changing", errno=errnos.EINTR
                )
            return

    def dump_messages(self, type: int, body: Buffer = b"", flags: int = 0) -> Iterator[Message]:
        """The entries of one dump as they come, what an earlier one left behind excepted.  Errors as in dump_datagrams()."""
        seq = self._sequence + 1 if self._sequence < 0xFFFFFFFF else 1
        for datagram in self.dump_datagrams(type, body, flags):
            for entry in messages(datagram):
                if entry.type > NLMSG_OVERRUN and entry.seq == seq:
                    yield entry

    def dump(self, type: int, body: Buffer = b"", flags: int = 0) -> list[Message]:
        """All entries of one dump, asked for again while the kernel says that it was interrupted.

        Notifications that arrive in between are not returned and are lost: use a socket without groups.
        Raises KernelError if the kernel refuses, DumpInterrupted if the table does not come to rest.
        """
        for attempt in range(_DUMP_ATTEMPTS):
            entries: list[Message] = []
            try:
                for datagram in self.dump_datagrams(type, body, flags):
                    entries += (
                        m for m in messages(datagram) if m.type > NLMSG_OVERRUN and m.seq == self._sequence
                    )
            except DumpInterrupted:
                if attempt == _DUMP_ATTEMPTS - 1:
                    raise
                continue
            return entries
        raise AssertionError("unreachable")


def _failed(doing: str, error: OSError) -> KernelError:
    return KernelError(f"cannot {doing}: {error.strerror or error}", errno=error.errno or 0)


def message(type: int, flags: int, seq: int, body: Buffer = b"") -> bytes:
    """One message with its header, padded to 4 bytes."""
    padding = -len(body) & 3
    return HEADER.pack(16 + len(body), type, flags, seq, 0) + bytes(body) + b"\0" * padding


def messages(datagram: memoryview) -> Iterator[Message]:
    """The messages in a datagram; what is left after a damaged header is ignored."""
    offset, end = 0, len(datagram)
    while offset + 16 <= end:
        length, type, flags, seq, _ = HEADER.unpack_from(datagram, offset)
        if length < 16 or offset + length > end:
            return
        yield Message(type, flags, seq, datagram[offset + 16 : offset + length])
        offset += (length + 3) & ~3


def _scan_dump(datagram: memoryview, seq: int) -> tuple[bool, Message | None]:
    """Is any part of a dump's datagram marked as interrupted; and the message that ends the dump, if here."""
    offset, end, flagged = 0, len(datagram), 0
    read_header = HEADER.unpack_from
    while offset + 16 <= end:
        length, type, flags, of, _ = read_header(datagram, offset)
        if length < 16:
            break
        flagged |= flags
        if type <= NLMSG_DONE and of == seq and type != NLMSG_NOOP:
            done = Message(type, flags, of, datagram[offset + 16 : offset + length])
            return bool(flagged & NLM_F_DUMP_INTR), done
        offset += (length + 3) & ~3
    return bool(flagged & NLM_F_DUMP_INTR), None


def parse_attributes(buffer: Buffer) -> dict[int, memoryview]:
    """Attributes by type, without NLA_F_NESTED and NLA_F_NET_BYTEORDER; of equal types the last one stays."""
    return dict(attributes(buffer))


def attributes(buffer: Buffer) -> Iterator[tuple[int, memoryview]]:
    """Attributes in order, as (type without flags, payload); for lists, where types repeat."""
    view = memoryview(buffer)
    offset, end = 0, len(view)
    while offset + 4 <= end:
        length, type = _ATTRIBUTE.unpack_from(view, offset)
        if length < 4 or offset + length > end:
            return
        yield type & NLA_TYPE_MASK, view[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def attribute(type: int, payload: Buffer) -> bytes:
    """One attribute, padded to 4 bytes."""
    return _ATTRIBUTE.pack(4 + len(payload), type) + bytes(payload) + b"\0" * (-len(payload) & 3)


def nested(type: int, *children: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(type | NLA_F_NESTED, b"".join(children))


def text_of(payload: Buffer) -> str:
    """A NUL-terminated string attribute; bytes that are not UTF-8 are escaped."""
    return bytes(payload).split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def error_of(reply: Message) -> NetlinkFault | None:
    """The fault that an NLMSG_ERROR or NLMSG_DONE reports; None for an acknowledgement and other messages."""
    if reply.type not in (NLMSG_ERROR, NLMSG_DONE) or len(reply.body) < 4:
        return None
    (code,) = _ERROR.unpack_from(reply.body)
    # NLMSG_DONE may carry a positive count.
    if code >= 0:
        return None
    text, offset, seq = "", None, reply.seq
    start = 4
    if reply.type == NLMSG_ERROR and len(reply.body) >= 20:
        length, _, _, seq, _ = HEADER.unpack_from(reply.body, 4)
        start = 20 if reply.flags & NLM_F_CAPPED else 4 + ((length + 3) & ~3)
    if reply.flags & NLM_F_ACK_TLVS:
        found = parse_attributes(reply.body[start:])
        if _NLMSGERR_ATTR_MSG in found:
            text = text_of(found[_NLMSGERR_ATTR_MSG])
        if len(found.get(_NLMSGERR_ATTR_OFFS, b"")) == 4:
            (offset,) = _U32.unpack(found[_NLMSGERR_ATTR_OFFS])
    return NetlinkFault(-code, text, offset, seq)
