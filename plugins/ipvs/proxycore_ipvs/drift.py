"""What others have changed, told per Service port where one owns it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from proxycore.api import Drift, ServicePortName

from . import diff, netrules
from .diff import Drain, Held
from .entries import Entry
from .family import FamilyPlane
from .memory import Memory
from .servers import ByMark, DeleteDestination, DeleteServer, Operation
from .system import System
from .tables import Found

_SHOWN = 3


def compare(plane: FamilyPlane, system: System, now: float) -> list[Drift]:
    """How the kernel differs from what is wanted; the plane then goes by what was read.  Raises KernelError."""
    if plane.shape is None:
        return []
    fresh = Memory(plane.family)
    fresh.read(system.kernel, system.sets, plane.shape.marks)
    drift = [
        Drift(service=None, what=f"set {name} is gone")
        for name in sorted(plane.wanted_sets() - fresh.sets, key=str)
    ]
    found = system.tables[plane.family].read()
    drift += _rules(plane, found)
    parts = plane.wanted_routes()
    present = system.routing.present(parts)
    drift += [Drift(service=None, what=f"`{part}` is gone") for part in parts if part not in present]
    plan = diff.plan(
        Held(fresh.servers, fresh.entries),
        plane.desired.everything(),
        marks=plane.shape.marks,
        now=now,
        drain_seconds=plane.options.drain_seconds,
        draining=plane.memory.deadlines(plane.memory.draining),
    )
    drift += _told(plane, plan)
    plane.memory.servers, plane.memory.entries = fresh.servers, fresh.entries
    plane.memory.sets, plane.there = fresh.sets, found
    # Policy routing is looked at only where all is.
    plane.doubtful = bool(drift)
    return drift


def _rules(plane: FamilyPlane, found: Found) -> Iterator[Drift]:
    assert plane.shape is not None
    for place, rules in plane.wanted_chains().items():
        if place not in found.chains:
            yield Drift(service=None, what=f"{place.table}: chain {place.chain} is gone")
        elif found.chains[place] != rules:
            yield Drift(service=None, what=f"{place.table}: chain {place.chain} has other rules")
    for jump in netrules.jumps(plane.shape):
        if jump not in found.jumps:
            yield Drift(service=None, what=f"{jump.table}: the rule -A {jump.chain} {jump.rule} is gone")


def _told(plane: FamilyPlane, plan: diff.Plan) -> list[Drift]:
    by_owner: dict[ServicePortName | None, list[str]] = {}
    operations = [*plan.first, *(each for each in plan.last if not _is_draining(plane, each))]
    for operation in operations:
        server = getattr(operation, "server", None)
        key = server.key if server is not None else operation.key  # type: ignore[union-attr]
        owner = plane.owner_of(key) if isinstance(key, ByMark) else None
        by_owner.setdefault(owner, []).append(str(operation))
    if plan.sets:
        owners = _owners(plane, {each.entry for each in plan.sets})
        for change in plan.sets:
            by_owner.setdefault(owners.get(change.entry), []).append(str(change))
    return [
        Drift(service=owner, what=f"to be put right: {_shortened(told)}") for owner, told in by_owner.items()
    ]


def _is_draining(plane: FamilyPlane, operation: Operation) -> bool:
    """Does it only take away what drains?"""
    draining = plane.memory.draining
    match operation:
        case DeleteServer(key):
            return key in draining
        case DeleteDestination(key, address, port):
            return isinstance(key, ByMark) and Drain(key, address, port) in draining.get(key, {})
    return False


def _owners(plane: FamilyPlane, entries: Iterable[Entry]) -> dict[Entry, ServicePortName]:
    """Who wants these, as far as somebody does."""
    left = set(entries)
    found: dict[Entry, ServicePortName] = {}
    for owner in plane.desired.owners:
        objects = plane.desired.get(owner)
        if objects is not None and isinstance(owner, ServicePortName):
            found.update(dict.fromkeys(objects.entries.keys() & left, owner))
    return found


def _shortened(told: list[str]) -> str:
    more = f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    return "; ".join(told[:_SHOWN]) + more
