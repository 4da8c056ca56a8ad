"""Virtual servers, their destinations, and what can be done to them: frozen values.

A virtual server is found by a firewall mark or by protocol, address and port.  `str()` of an operation is the line
that `ipvsadm -R` would take.
"""

from __future__ import annotations

import errno as errnos
import os
from typing import Literal, NamedTuple

import msgspec

from proxycore.api import Family, Protocol

MASQUERADE, TUNNEL, DIRECT = 0, 2, 3
"""Forwarding methods: by network address translation, which is ours; by a tunnel; by the link layer."""

PERSISTENT, HASHED, ONE_PACKET = 0x1, 0x2, 0x4
SCHEDULER_FLAGS = 0x8, 0x10, 0x20
"""What these three mean is the scheduler's affair: `mh` falls back, and looks at the port, by the first two."""

_METHODS = {MASQUERADE: "-m", TUNNEL: "-i", DIRECT: "-g"}
_PROTOCOLS: dict[Protocol, str] = {"TCP": "-t", "UDP": "-u", "SCTP": "--sctp-service"}


def _at(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


class ByMark(NamedTuple):
    """The server of packets that carry exactly this firewall mark, 1 to 0xffffffff."""

    family: Family
    mark: int

    def __str__(self) -> str:
        return f"-f {self.mark} -6" if self.family == "IPv6" else f"-f {self.mark}"


class ByAddress(NamedTuple):
    """The server of packets to this address and port."""

    protocol: Protocol
    address: str
    port: int

    @property
    def family(self) -> Family:
        return "IPv6" if ":" in self.address else "IPv4"

    def __str__(self) -> str:
        return f"{_PROTOCOLS[self.protocol]} {_at(self.address, self.port)}"


Key = ByMark | ByAddress


class Server(msgspec.Struct, frozen=True, gc=False):
    """A virtual server without its destinations.

    `timeout_seconds` is that of persistence; it does something only with PERSISTENT among the `flags`.  `prefix_length`
    says which clients are one in persistence; None: each address is one, -1: a mask that is no prefix (only when read).
    """

    key: Key
    scheduler: str = "rr"
    flags: int = 0
    timeout_seconds: int = 0
    prefix_length: int | None = None

    def __str__(self) -> str:
        words = [str(self.key), f"-s {self.scheduler}"]
        if self.flags & PERSISTENT:
            words.append(f"-p {self.timeout_seconds}")
            if self.prefix_length is not None:
                words.append(f"-M {self._netmask()}")
        if self.flags & ONE_PACKET:
            words.append("-o")
        named = [f"flag-{n}" for n, flag in enumerate(SCHEDULER_FLAGS, 1) if self.flags & flag]
        if named:
            words.append(f"-b {','.join(named)}")
        return " ".join(words)

    def _netmask(self) -> str:
        if self.key.family == "IPv6" or self.prefix_length == -1:
            return str(self.prefix_length)
        mask = 0xFFFFFFFF << 32 - (self.prefix_length or 0) & 0xFFFFFFFF
        return ".".join(str(byte) for byte in mask.to_bytes(4, "big"))


class Destination(msgspec.Struct, frozen=True, gc=False):
    """Where a virtual server sends connections; with weight 0 it keeps those it has and gets no new ones."""

    address: str
    port: int
    weight: int = 1
    method: int = MASQUERADE

    def __str__(self) -> str:
        method = _METHODS.get(self.method, f"method {self.method}")
        return f"-r {_at(self.address, self.port)} {method} -w {self.weight}"


class Counters(NamedTuple):
    """What a server or destination has seen since it was made, as of up to two seconds ago."""

    connections: int = 0
    packets_in: int = 0
    packets_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class ServerState(NamedTuple):
    """A virtual server as the kernel has it."""

    server: Server
    counters: Counters


class DestinationState(NamedTuple):
    """A destination as the kernel has it, with how many connections it has now.

    `persistent` counts the clients that are bound to it.
    """

    destination: Destination
    active: int
    inactive: int
    persistent: int
    counters: Counters


class Timeouts(NamedTuple):
    """How long IPVS remembers idle connections, in seconds; in a request 0 leaves a value as it is."""

    tcp: int = 0
    tcp_fin: int = 0
    udp: int = 0


class AddServer(NamedTuple):
    server: Server

    def __str__(self) -> str:
        return f"-A {self.server}"


class SetServer(NamedTuple):
    """Give a server another scheduler, other flags or persistence; it keeps its destinations and connections."""

    server: Server

    def __str__(self) -> str:
        return f"-E {self.server}"


class DeleteServer(NamedTuple):
    """Delete a server with all its destinations."""

    key: Key

    def __str__(self) -> str:
        return f"-D {self.key}"


class AddDestination(NamedTuple):
    key: Key
    destination: Destination

    def __str__(self) -> str:
        return f"-a {self.key} {self.destination}"


class SetDestination(NamedTuple):
    """Give a destination another weight; it keeps its connections."""

    key: Key
    destination: Destination

    def __str__(self) -> str:
        return f"-e {self.key} {self.destination}"


class DeleteDestination(NamedTuple):
    key: Key
    address: str
    port: int

    def __str__(self) -> str:
        return f"-d {self.key} -r {_at(self.address, self.port)}"


Operation = AddServer | SetServer | DeleteServer | AddDestination | SetDestination | DeleteDestination

Reason = Literal["exists", "no server", "no destination", "no scheduler", "other"]


class Refusal(NamedTuple):
    """Operation number `position` of a batch was refused; `errno` is positive."""

    position: int
    operation: Operation
    errno: int
    text: str = ""

    @property
    def reason(self) -> Reason:
        """What the number means for this operation.

        `exists`, and `no destination` of a delete, say that the kernel's state is not what was believed and yet the one
        wanted, except for weights and schedulers: read that server again.
        """
        if self.errno == errnos.EEXIST:
            return "exists"
        if self.errno == errnos.ESRCH:
            return "no server"
        if self.errno == errnos.ENOENT:
            of_server = isinstance(self.operation, AddServer | SetServer)
            return "no scheduler" if of_server else "no destination"
        return "other"

    def __str__(self) -> str:
        name = errnos.errorcode.get(self.errno, str(self.errno))
        why = self.reason if self.reason != "other" else self.text or os.strerror(self.errno)
        return f"{self.operation}: {why} ({name})"
