"""IPVS in memory, for tests: the kernel's rules about what may follow what, and connections as far as draining needs them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from . import wire
from .servers import (
    TUNNEL,
    AddDestination,
    AddServer,
    Counters,
    DeleteDestination,
    DeleteServer,
    Destination,
    DestinationState,
    Key,
    Operation,
    Refusal,
    Server,
    ServerState,
    SetDestination,
    SetServer,
    Timeouts,
)

SCHEDULERS = frozenset(
    ["rr", "wrr", "lc", "wlc", "sh", "dh", "mh", "sed", "nq", "fo", "ovf", "lblc", "lblcr"]
)
_Address = tuple[str, int]


@dataclass
class _Held:
    """A destination, its connections now and ever."""

    destination: Destination
    active: int = 0
    inactive: int = 0
    ever: int = 0

    def state(self) -> DestinationState:
        return DestinationState(
            self.destination, self.active, self.inactive, 0, Counters(connections=self.ever)
        )


@dataclass
class _Served:
    server: Server
    destinations: dict[_Address, _Held] = field(default_factory=dict)
    ever: int = 0


class FakeKernel:
    """IPVS of one namespace.

    A server's destinations are dumped newest first, as the kernel does.  A destination that is deleted while it has
    connections leaves them in the trash; if it comes again to the same server, it has them back.
    `refuse(operation)`: the number that the kernel gives for such an operation, 0: none.  `runs`: the batches done.
    """

    def __init__(self, schedulers: Collection[str] = SCHEDULERS) -> None:
        self.schedulers = frozenset(schedulers)
        self.refuse: Callable[[Operation], int] = lambda operation: 0
        self.runs: list[tuple[Operation, ...]] = []
        self._services: dict[Key, _Served] = {}
        self._trash: dict[tuple[Key, _Address], _Held] = {}
        self._timeouts = Timeouts(900, 120, 300)

    # -- Kernel --

    def run(self, operations: Sequence[Operation]) -> tuple[Refusal, ...]:
        # What cannot be written, cannot be asked for; the bytes are not looked at.
        list(wire.datagrams(operations, 16, 1))
        self.runs.append(tuple(operations))
        refusals = []
        for position, operation in enumerate(operations):
            number = self.refuse(operation) or self._do(operation)
            if number:
                refusals.append(Refusal(position, operation, number))
        return tuple(refusals)

    def servers(self) -> list[ServerState]:
        return [self._state(served) for served in self._services.values()]

    def server(self, key: Key) -> ServerState | None:
        served = self._services.get(key)
        return None if served is None else self._state(served)

    def destinations(self, key: Key) -> list[DestinationState]:
        served = self._services.get(key)
        return [] if served is None else [held.state() for held in reversed(served.destinations.values())]

    def timeouts(self) -> Timeouts:
        return self._timeouts

    def set_timeouts(self, wanted: Timeouts) -> None:
        pairs = zip(wanted, self._timeouts, strict=True)
        self._timeouts = Timeouts(*(new or old for new, old in pairs))

    def close(self) -> None:
        pass

    # -- for tests --

    def open(self, key: Key) -> _Address | None:
        """A new connection to a server: the destination it got; None: there is none with a weight."""
        served = self._services[key]
        able = [held for held in served.destinations.values() if held.destination.weight > 0]
        if not able:
            return None
        held = min(able, key=lambda held: held.ever)
        held.active += 1
        held.ever += 1
        served.ever += 1
        return held.destination.address, held.destination.port

    def end(self, key: Key, address: _Address) -> None:
        """A connection closes; its entry lingers as an inactive one until `forget`."""
        held = self._holder(key, address)
        held.active -= 1
        held.inactive += 1

    def forget(self, key: Key, address: _Address) -> None:
        """An inactive connection times out."""
        held = self._holder(key, address)
        held.inactive -= 1
        if not held.active + held.inactive:
            self._trash.pop((key, address), None)

    # -- the rules --

    def _holder(self, key: Key, address: _Address) -> _Held:
        served = self._services.get(key)
        if served is not None and address in served.destinations:
            return served.destinations[address]
        return self._trash[key, address]

    @staticmethod
    def _state(served: _Served) -> ServerState:
        return ServerState(served.server, Counters(connections=served.ever))

    def _do(self, operation: Operation) -> int:
        match operation:
            case AddServer(server):
                if server.key in self._services:
                    return errno.EEXIST
                if server.scheduler not in self.schedulers:
                    return errno.ENOENT
                self._services[server.key] = _Served(server)
            case SetServer(server):
                if server.key not in self._services:
                    return errno.ESRCH
                if server.scheduler not in self.schedulers:
                    return errno.ENOENT
                self._services[server.key].server = server
            case DeleteServer(key):
                if key not in self._services:
                    return errno.ESRCH
                for address, held in self._services.pop(key).destinations.items():
                    self._discard(key, address, held)
            case AddDestination(key, destination) | SetDestination(key, destination):
                return self._write(key, destination, new=isinstance(operation, AddDestination))
            case DeleteDestination(key, address, port):
                served = self._services.get(key)
                if served is None:
                    return errno.ESRCH
                gone = served.destinations.pop((address, port), None)
                if gone is None:
                    return errno.ENOENT
                self._discard(key, (address, port), gone)
        return 0

    def _write(self, key: Key, destination: Destination, *, new: bool) -> int:
        served = self._services.get(key)
        if served is None:
            return errno.ESRCH
        if (":" in destination.address) != (key.family == "IPv6") and destination.method != TUNNEL:
            return errno.EINVAL
        if destination.weight > 0x7FFFFFFF:
            return errno.ERANGE
        address = destination.address, destination.port
        held = served.destinations.get(address)
        if new:
            if held is not None:
                return errno.EEXIST
            held = self._trash.pop((key, address), None) or _Held(destination)
            served.destinations[address] = held
        elif held is None:
            return errno.ENOENT
        held.destination = destination
        return 0

    def _discard(self, key: Key, address: _Address, held: _Held) -> None:
        if held.active + held.inactive:
            self._trash[key, address] = held
