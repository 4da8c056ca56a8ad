"""From what is there to what should be: operations in an order in which the map never names a server that is not there.

First servers and destinations are added and weights set, then entries change, then servers and destinations go.  A TCP
destination that nobody wants any more keeps its connections: it gets weight 0 and goes when it has none, or when its time is up.
What others made is not touched: only servers with our marks are looked at, and only our sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeGuard

import msgspec

from proxycore.api import Protocol

from .entries import Entry, SetKind
from .marks import Marks
from .plane import Objects, VirtualServer, key_of
from .servers import (
    HASHED,
    PERSISTENT,
    AddDestination,
    AddServer,
    ByMark,
    DeleteDestination,
    DeleteServer,
    Destination,
    DestinationState,
    Key,
    Operation,
    Server,
    ServerState,
    SetDestination,
    SetServer,
)

At = tuple[str, int]
"""A destination's address and port."""


class HeldServer(NamedTuple):
    """A virtual server of ours as the kernel has it; beside each destination how many connections it has."""

    server: Server
    destinations: Mapping[At, tuple[Destination, int]]


class Held(msgspec.Struct, frozen=True):
    """What is there; entries with their value, None where the set carries none."""

    servers: Mapping[ByMark, HeldServer] = {}
    entries: Mapping[Entry, int | None] = {}


class Drain(NamedTuple):
    """A destination that only keeps the connections it has."""

    key: ByMark
    address: str
    port: int


class PutEntry(NamedTuple):
    """Add an entry, or give it another value."""

    entry: Entry
    value: int | None = None

    def __str__(self) -> str:
        value = "" if self.value is None else f" skbmark 0x{self.value:x}"
        return f"add {self.entry}{value}"


class DeleteEntry(NamedTuple):
    entry: Entry

    def __str__(self) -> str:
        return f"del {self.entry}"


SetOperation = PutEntry | DeleteEntry


class Plan(msgspec.Struct, frozen=True):
    """Operations in the order `first`, `sets`, `last`, and what is left then.

    `draining`: every destination that drains, with its deadline on the caller's clock in seconds.  `remaining`: numbers of
    Service ports that still have a server, of those looked at; the others' may be released once all is done.
    """

    first: tuple[Operation, ...] = ()
    sets: tuple[SetOperation, ...] = ()
    last: tuple[Operation, ...] = ()
    draining: Mapping[Drain, float] = {}
    remaining: frozenset[int] = frozenset()

    @property
    def is_empty(self) -> bool:
        """Is there nothing to do?"""
        return not (self.first or self.sets or self.last)

    def __str__(self) -> str:
        return "".join(f"{operation}\n" for operation in (*self.first, *self.sets, *self.last))


def held_servers(
    found: Mapping[Key, tuple[ServerState, Iterable[DestinationState]]], marks: Marks
) -> Mapping[ByMark, HeldServer]:
    """Our servers among all that are there."""
    return {
        key: HeldServer(
            state.server,
            {
                (each.destination.address, each.destination.port): (
                    each.destination,
                    each.active + each.inactive,
                )
                for each in destinations
            },
        )
        for key, (state, destinations) in found.items()
        if is_ours(key, marks)
    }


def is_ours(key: Key, marks: Marks) -> TypeGuard[ByMark]:
    """Is it a virtual server of this data plane?"""
    return isinstance(key, ByMark) and marks.server_of(key.mark) is not None


def plan(
    held: Held,
    wanted: Objects,
    *,
    marks: Marks,
    now: float,
    drain_seconds: float,
    draining: Mapping[Drain, float] | None = None,
    protocols: Mapping[int, Protocol] | None = None,
) -> Plan:
    """What to do so that exactly `wanted` is there, and what drains.

    Both sides may be restricted to the same keys of servers and the same entries; nothing else is then touched.  What drains
    ends only when it is looked at.
    `draining`: that of the plan before, for these servers; one with weight 0 that is not in it starts its time now.
    `protocols`: of Service ports by number, where known.  Wanted servers and entries of either side tell others; TCP is taken
    for the rest, as no other server is left without entries.
    """
    made = _Planning(marks, now, drain_seconds, draining or {})
    made.protocols = {
        **_protocols(held.entries, marks),
        **_protocols(wanted.entries, marks),
        **(protocols or {}),
    }
    for key, virtual in wanted.servers.items():
        made.keep(key, held.servers.get(key), virtual)
    for key, there in held.servers.items():
        if key not in wanted.servers and is_ours(key, marks):
            made.empty(key, there)
    return Plan(
        first=(*made.servers, *sorted(made.weights, key=_lowering)),
        sets=_set_operations(held.entries, wanted.entries),
        last=(*made.lowered, *made.deletes),
        draining=made.draining,
        remaining=frozenset(made.remaining),
    )


def _lowering(operation: Operation) -> bool:
    """Weights that rise come before those that fall, so that somebody is always there."""
    return isinstance(operation, SetDestination) and operation.destination.weight == 0


def _protocols(entries: Mapping[Entry, int | None], marks: Marks) -> dict[int, Protocol]:
    found: dict[int, Protocol] = {}
    for entry, value in entries.items():
        key = key_of(entry) if value is not None else None
        if key is None or value is None:
            continue
        parts = marks.take_apart(value)
        if parts is not None and not parts.reject:
            found[parts.number] = key.protocol
    return found


class _Planning:
    """What plan() has found so far about servers.

    `servers`: they and their destinations are made, in this order.  `weights`: of servers that stay.  `lowered`: of those
    that go, once no entry names them.
    """

    def __init__(self, marks: Marks, now: float, drain_seconds: float, before: Mapping[Drain, float]) -> None:
        self._marks = marks
        self._now = now
        self._drain_seconds = drain_seconds
        self._before = before
        self.protocols: Mapping[int, Protocol] = {}
        self.servers: list[Operation] = []
        self.weights: list[Operation] = []
        self.lowered: list[Operation] = []
        self.deletes: list[Operation] = []
        self.draining: dict[Drain, float] = {}
        self.remaining: set[int] = set()

    def keep(self, key: ByMark, there: HeldServer | None, virtual: VirtualServer) -> None:
        """A server that is wanted, with exactly its destinations; what drains stays besides."""
        self._remains(key)
        if there is None:
            self.servers.append(AddServer(virtual.server))
        elif _comparable(there.server) != _comparable(virtual.server):
            self.servers.append(SetServer(virtual.server))
        present = there.destinations if there is not None else {}
        for at, destination in virtual.destinations.items():
            if at not in present:
                self.servers.append(AddDestination(key, destination))
            elif present[at][0] != destination:
                self.weights.append(SetDestination(key, destination))
        for at, (destination, connections) in present.items():
            if at in virtual.destinations:
                continue
            if not self._drains(key, destination, connections, self.weights, virtual.protocol):
                self.deletes.append(DeleteDestination(key, *at))

    def empty(self, key: ByMark, there: HeldServer) -> None:
        """A server that is not wanted: it stays as long as one of its destinations drains."""
        lowered: list[Operation] = []
        server = self._marks.server_of(key.mark)
        protocol = self.protocols.get(server[0], "TCP") if server is not None else "TCP"
        gone = [
            at
            for at, (destination, connections) in there.destinations.items()
            if not self._drains(key, destination, connections, lowered, protocol)
        ]
        if len(gone) == len(there.destinations):
            self.deletes.append(DeleteServer(key))
            return
        self._remains(key)
        self.lowered += lowered
        self.deletes += [DeleteDestination(key, *at) for at in gone]

    def _remains(self, key: ByMark) -> None:
        server = self._marks.server_of(key.mark)
        if server is not None:
            self.remaining.add(server[0])

    def _drains(
        self,
        key: ByMark,
        destination: Destination,
        connections: int,
        lowered: list[Operation],
        protocol: Protocol,
    ) -> bool:
        """Does a destination that is not wanted stay for now?  It goes once found at weight 0 without connections."""
        if protocol != "TCP":
            return False
        drain = Drain(key, destination.address, destination.port)
        deadline = self._before.get(drain, self._now + self._drain_seconds)
        if destination.weight == 0 and (connections == 0 or self._now >= deadline):
            return False
        if destination.weight != 0:
            # It was wanted again meanwhile, or somebody else raised it.
            deadline = self._now + self._drain_seconds
            lowered.append(SetDestination(key, msgspec.structs.replace(destination, weight=0)))
        self.draining[drain] = deadline
        return True


def _comparable(server: Server) -> Server:
    """Without what the kernel adds, and what means nothing without persistence."""
    flags = server.flags & ~HASHED
    if flags & PERSISTENT:
        return msgspec.structs.replace(server, flags=flags)
    return msgspec.structs.replace(server, flags=flags, timeout_seconds=0, prefix_length=None)


_ORDER = (
    SetKind.LOOP,
    SetKind.NODE,
    SetKind.ADMITTED,
    SetKind.FIREWALLED,
    SetKind.VIP,
    SetKind.NODE_PORTS_TCP,
    SetKind.NODE_PORTS_UDP,
    SetKind.NODE_PORTS_SCTP,
    SetKind.CLUSTER_IPS,
    SetKind.CIDR,
)
"""In which entries are added: whom a firewall admits comes before the firewall, and that before what it protects.

They are deleted in the opposite order, after all that is added.
"""
_TURN = {kind: turn for turn, kind in enumerate(_ORDER)}


def _set_operations(
    held: Mapping[Entry, int | None], wanted: Mapping[Entry, int | None]
) -> tuple[SetOperation, ...]:
    puts = [
        PutEntry(entry, value) for entry, value in wanted.items() if entry not in held or held[entry] != value
    ]
    deletes = [DeleteEntry(entry) for entry in held if entry not in wanted]
    puts.sort(key=lambda put: _TURN[put.entry.set.kind])
    deletes.sort(key=lambda delete: -_TURN[delete.entry.set.kind])
    return (*puts, *deletes)
