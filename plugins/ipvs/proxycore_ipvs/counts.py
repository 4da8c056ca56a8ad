"""What servers say about a Service port: its objects in the kernel, and how many connections they had."""

from __future__ import annotations

from collections.abc import Iterator

from proxycore.api import Counters, KernelObject, PoolName, ServicePortName

from .contents import read_entries
from .diff import PutEntry
from .family import FamilyPlane
from .servers import ByMark
from .system import System

_POOLS = (PoolName.CLUSTER, PoolName.LOCAL)
_Slot = tuple[ByMark, str, int]


class Totals:
    """Connections since the start: what a server counts begins anew with it, and counted before we came.

    `begin`: take what is there now for nothing.
    """

    def __init__(self) -> None:
        self._seen: dict[_Slot, tuple[int, int]] = {}
        self._of: dict[ServicePortName, dict[str, int]] = {}

    def begin(self, plane: FamilyPlane, system: System) -> None:
        """Raises KernelError."""
        for key in plane.memory.servers:
            for each in system.kernel.destinations(key):
                slot = key, each.destination.address, each.destination.port
                self._seen[slot] = (0, each.counters.connections)

    def read(self, plane: FamilyPlane, system: System) -> Iterator[Counters]:
        """Of every Service port of a family.  Raises KernelError."""
        for name in plane.states:
            totals: dict[str, int] = {}
            for key in keys_of(plane, name):
                for each in system.kernel.destinations(key):
                    to = each.destination
                    more = self._more((key, to.address, to.port), each.counters.connections)
                    host = f"[{to.address}]" if ":" in to.address else to.address
                    at = f"{host}:{to.port}"
                    totals[at] = totals.get(at, 0) + more
            yield Counters(name=name, connections=sum(totals.values()), by_endpoint=totals)

    def _more(self, slot: _Slot, connections: int) -> int:
        total, last = self._seen.get(slot, (0, 0))
        total += connections - last if connections >= last else connections
        self._seen[slot] = total, connections
        return total


def keys_of(plane: FamilyPlane, name: ServicePortName) -> list[ByMark]:
    """Servers of a Service port, also those that only drain."""
    number = plane.ids.get(name) if plane.ids is not None else None
    if number is None or plane.shape is None:
        return []
    found = [ByMark(plane.family, plane.shape.marks.server(number, pool)) for pool in _POOLS]
    return [key for key in found if key in plane.memory.servers]


def inspect(plane: FamilyPlane, system: System, name: ServicePortName) -> Iterator[KernelObject]:
    """What of a Service port is in the kernel.  Raises KernelError."""
    objects = plane.desired.get(name)
    if objects is not None:
        names = {entry.set for entry in objects.entries} & plane.memory.sets
        there = read_entries(system.sets, sorted(names, key=str))
        for entry in objects.entries:
            if entry in there:
                line = str(PutEntry(entry, there[entry]))
                yield KernelObject(kind="set entry", place=str(entry.set), native=line)
    for key in keys_of(plane, name):
        state = system.kernel.server(key)
        if state is None:
            continue
        yield KernelObject(kind="virtual server", place=f"FWM {key.mark}", native=f"-A {state.server}")
        for each in system.kernel.destinations(key):
            line = f"-a {key} {each.destination}"
            told = f"{line}  # connections: {each.active} active, {each.inactive} inactive"
            yield KernelObject(kind="destination", place=f"FWM {key.mark}", native=told)
