"""What is believed to be in the kernel, in one family: read once, then kept up to date with each operation that held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from proxycore.api import Family, KernelError

from .contents import read_entries, spec_of
from .diff import At, Drain, Held, HeldServer, PutEntry, SetOperation, is_ours
from .entries import Entry, SetName, named
from .kernel import Kernel
from .marks import Marks
from .servers import (
    AddDestination,
    AddServer,
    ByMark,
    DeleteDestination,
    DeleteServer,
    Destination,
    DestinationState,
    Operation,
    SetDestination,
    SetServer,
)
from .setkernel import Sets

UNSEEN = 1
"""Connections of a destination that was not looked at: it may have some."""


class Memory:
    """Servers, entries and existing sets of one family, and what drains with its deadline."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.servers: dict[ByMark, HeldServer] = {}
        self.entries: dict[Entry, int | None] = {}
        self.sets: set[SetName] = set()
        self.draining: dict[ByMark, dict[Drain, float]] = {}

    # -- reading --

    def read(self, kernel: Kernel, sets: Sets, marks: Marks) -> None:
        """Everything of ours.  Raises KernelError: nothing of this was changed."""
        servers = read_servers(kernel, self.family, marks)
        there = existing(sets, self.family)
        entries = read_entries(sets, there)
        self.servers, self.sets, self.entries = servers, there, entries
        self.draining = {key: kept for key, kept in self.draining.items() if key in servers}

    def look_at(self, kernel: Kernel, key: ByMark) -> None:
        """One server with its connections.  Raises KernelError."""
        found = read_server(kernel, key)
        if found is None:
            self.servers.pop(key, None)
            self.draining.pop(key, None)
        else:
            self.servers[key] = found

    # -- what holds now --

    def did(self, operation: Operation) -> None:
        match operation:
            case AddServer(server):
                if isinstance(server.key, ByMark):
                    self.servers[server.key] = HeldServer(server, {})
            case SetServer(server):
                if isinstance(server.key, ByMark):
                    before = self.servers[server.key].destinations
                    self.servers[server.key] = HeldServer(server, before)
            case DeleteServer(key):
                if isinstance(key, ByMark):
                    self.servers.pop(key, None)
                    self.draining.pop(key, None)
            case AddDestination(key, destination) | SetDestination(key, destination):
                self._at(key)[destination.address, destination.port] = destination, UNSEEN
            case DeleteDestination(key, address, port):
                self._at(key).pop((address, port), None)

    def _at(self, key: object) -> dict[At, tuple[Destination, int]]:
        held = self.servers[key].destinations  # type: ignore[index]
        assert isinstance(held, dict)
        return held

    def did_entry(self, operation: SetOperation) -> None:
        if isinstance(operation, PutEntry):
            self.entries[operation.entry] = operation.value
        else:
            self.entries.pop(operation.entry, None)

    def drains(self, keys: Iterable[ByMark], draining: Mapping[Drain, float]) -> None:
        """Of these servers, this drains now and nothing else."""
        for key in keys:
            self.draining.pop(key, None)
        for drain, deadline in draining.items():
            self.draining.setdefault(drain.key, {})[drain] = deadline

    # -- parts of it --

    def part(self, keys: Iterable[ByMark], entries: Iterable[Entry]) -> Held:
        return Held(
            {key: self.servers[key] for key in keys if key in self.servers},
            {entry: self.entries[entry] for entry in entries if entry in self.entries},
        )

    def deadlines(self, keys: Iterable[ByMark]) -> dict[Drain, float]:
        """What drains of these servers."""
        found: dict[Drain, float] = {}
        for key in keys:
            found.update(self.draining.get(key, {}))
        return found


def read_server(kernel: Kernel, key: ByMark) -> HeldServer | None:
    """One server with its connections; None: it is not there.  Raises KernelError."""
    state = kernel.server(key)
    return None if state is None else HeldServer(state.server, _held(kernel.destinations(key)))


def read_servers(kernel: Kernel, family: Family, marks: Marks) -> dict[ByMark, HeldServer]:
    """Our servers of a family: a dump of all servers, and one for each of ours.  Raises KernelError."""
    return {
        key: HeldServer(state.server, _held(kernel.destinations(key)))
        for state in kernel.servers()
        if is_ours(key := state.server.key, marks) and key.family == family
    }


def _held(found: Iterable[DestinationState]) -> dict[At, tuple[Destination, int]]:
    return {
        (each.destination.address, each.destination.port): (
            each.destination,
            each.active + each.inactive,
        )
        for each in found
    }


def existing(sets: Sets, family: Family) -> set[SetName]:
    """Our sets that are there.  Raises KernelError, also if one is not as we make it."""
    found = set()
    for text, state in sets.states().items():
        name = named(text)
        if name is None or name.family != family:
            continue
        spec, own = state.spec, spec_of(name)
        if (spec.kind, spec.family, spec.skbinfo) != (own.kind, own.family, own.skbinfo):
            raise KernelError(f"set {text} is none of ours: it was made by `{spec}`, not by `{own}`")
        found.add(name)
    return found
