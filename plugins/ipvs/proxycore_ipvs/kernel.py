"""IPVS of the kernel: operations in, refusals out; what is there, read by dumps.

Nothing here is atomic: each operation of a batch holds or is refused by itself.  There is no flush, on purpose: the
kernel keeps deleted destinations for a while in a list that every later addition walks, so that to delete all and write
all anew takes minutes where a comparison takes a second.
"""

from __future__ import annotations

import errno as errnos
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from proxycore.api import KernelError
from proxycore.kernel.generic import GENLMSGHDR, NETLINK_GENERIC, family_number
from proxycore.kernel.netlink import (
    HEADER,
    NLMSG_ERROR,
    NetlinkFault,
    NetlinkSocket,
    error_of,
    parse_attributes,
)

from . import wire
from .layout import Reader, T
from .link import Link, answers
from .parse import destination_reader, server_reader
from .servers import DestinationState, Key, Operation, Refusal, ServerState, Timeouts


class Kernel(Protocol):
    """The IPVS of one network namespace."""

    def run(self, operations: Sequence[Operation]) -> tuple[Refusal, ...]:
        """Do all operations in order; those refused, in order.  Each of the others holds.

        Raises KernelError if the kernel could not be asked: of the operations any may hold, so read what is there.
        Raises ValueError for a value the kernel has no room for: nothing was done.
        """
        ...

    def servers(self) -> list[ServerState]:
        """All virtual servers, others' included.

        One that is made or deleted meanwhile may push another out of the list or into it twice.  Raises KernelError.
        """
        ...

    def server(self, key: Key) -> ServerState | None:
        """One virtual server; None if there is none.  Raises KernelError."""
        ...

    def destinations(self, key: Key) -> list[DestinationState]:
        """Destinations of a server; none, too, if the server is not there.  Raises KernelError."""
        ...

    def timeouts(self) -> Timeouts:
        """Raises KernelError."""
        ...

    def set_timeouts(self, wanted: Timeouts) -> None:
        """Change those that are not 0.  Raises KernelError: none was changed."""
        ...

    def close(self) -> None:
        """Close; doing it twice does no harm."""
        ...


def read_all(kernel: Kernel) -> Mapping[Key, tuple[ServerState, tuple[DestinationState, ...]]]:
    """Every server with its destinations: one dump for all servers and one for each of them.  Raises KernelError."""
    return {
        state.server.key: (state, tuple(kernel.destinations(state.server.key))) for state in kernel.servers()
    }


class NetlinkKernel:
    """IPVS of the calling thread's network namespace, in batches; for one thread at a time.

    Opening it makes the kernel load IPVS if it can.  Raises KernelError: without IPVS, ENOENT.
    """

    def __init__(self) -> None:
        self._link = Link(NETLINK_GENERIC)
        try:
            with self._link.during("ask for IPVS") as socket:
                self._family = family_number(socket, "IPVS")
        except BaseException:
            self._link.close()
            raise
        self._destinations = destination_reader()
        self._servers = server_reader()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._link.close()

    def run(self, operations: Sequence[Operation]) -> tuple[Refusal, ...]:
        if not operations:
            return ()
        first = self._link.socket.reserve(len(operations))
        faults: dict[int, NetlinkFault] = {}
        # Packed to the end before anything is sent, so that a value without room leaves nothing done.
        packed = list(wire.datagrams(operations, self._family, first))
        with self._link.during("change IPVS") as socket:
            for datagram in packed:
                socket.send(datagram.data)
                self._collect(socket, datagram.last, faults)
        return tuple(
            Refusal(seq - first, operations[seq - first], fault.errno, fault.text)
            for seq, fault in sorted(faults.items())
            if first <= seq < first + len(operations)
        )

    @staticmethod
    def _collect(socket: NetlinkSocket, last: int, faults: dict[int, NetlinkFault]) -> None:
        """Read answers until the one to the request `last`."""
        while True:
            for reply in socket.receive():
                if reply.type != NLMSG_ERROR:
                    continue
                fault = error_of(reply)
                if fault is not None:
                    faults[reply.seq] = fault
                if reply.seq == last:
                    return

    def servers(self) -> list[ServerState]:
        return self._dump(wire.GET_SERVICE, b"", self._servers)

    def destinations(self, key: Key) -> list[DestinationState]:
        return self._dump(wire.GET_DEST, wire.service(key), self._destinations)

    def server(self, key: Key) -> ServerState | None:
        try:
            body = self._ask(wire.GET_SERVICE, wire.service(key), f"read virtual server {key}")
        except KernelError as error:
            if error.errno == errnos.ESRCH:
                return None
            raise
        return self._servers.read(body, GENLMSGHDR.size, len(body) - GENLMSGHDR.size)

    def timeouts(self) -> Timeouts:
        body = self._ask(wire.GET_CONFIG, b"", "read IPVS's timeouts")
        parts = parse_attributes(body[GENLMSGHDR.size :])
        try:
            kinds = (wire.TIMEOUT_TCP, wire.TIMEOUT_TCP_FIN, wire.TIMEOUT_UDP)
            return Timeouts(*(int.from_bytes(parts[kind], sys.byteorder) for kind in kinds))
        except KeyError as error:
            raise KernelError(f"IPVS does not tell its timeouts: no attribute {error}") from None

    def set_timeouts(self, wanted: Timeouts) -> None:
        with self._link.during("set IPVS's timeouts") as socket:
            fault = socket.transact(
                self._family, GENLMSGHDR.pack(wire.SET_CONFIG, wire.VERSION) + wire.timeouts(wanted)
            )
        if fault is not None:
            raise KernelError(f"IPVS refuses the timeouts {wanted}: {fault}", errno=fault.errno)

    def _ask(self, command: int, attributes: bytes, doing: str) -> memoryview:
        """Body of the answer to a request for one thing."""
        with self._link.during(doing) as socket:
            seq = socket.request(self._family, GENLMSGHDR.pack(command, wire.VERSION) + attributes)
            reply = next(reply for reply in answers(socket, seq) if reply.type in (self._family, NLMSG_ERROR))
        fault = error_of(reply)
        if fault is not None:
            raise KernelError(f"cannot {doing}: {fault}", errno=fault.errno)
        return reply.body

    def _dump(self, command: int, attributes: bytes, reader: Reader[T]) -> list[T]:
        found: list[T] = []
        append, read, family = found.append, reader.read, self._family
        header, skip = HEADER.unpack_from, HEADER.size + GENLMSGHDR.size
        with self._link.during("read IPVS") as socket:
            body = GENLMSGHDR.pack(command, wire.VERSION) + attributes
            for datagram in socket.dump_datagrams(family, body):
                offset, end = 0, len(datagram)
                while offset + skip <= end:
                    length, kind, _, _, _ = header(datagram, offset)
                    if kind == family:
                        append(read(datagram, offset + skip, length - skip))
                    offset += (max(length, HEADER.size) + 3) & ~3
        return found
