"""One family's data plane: what is wanted, what is there, and the way from this to that.

A batch goes this way: policy routing, sets and rules as far as they are not there; then servers and destinations are
added, entries change, servers and destinations go; last of all classes of target ports that nobody has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain

from proxycore.api import (
    Family,
    HostState,
    KernelError,
    PoolName,
    Protocol,
    ServicePortName,
    ServiceState,
)

from . import diff, netrules
from .contents import SetRefusal, change_entries, spec_of
from .desired import Desired, Owner, Touched
from .entries import NODE_PORTS, Entry, SetKind, SetName
from .host import render_host
from .ids import Classes, Exhausted, Ids, Target
from .memory import Memory
from .netrules import Jump, LocalRoute, Place
from .options import Options
from .plane import Objects, owners, render, target_of, values_in
from .routing import Part
from .servers import ByMark, Operation, Refusal
from .shape import Shape, shape_of
from .system import System
from .tables import NOTHING, Found

NODE: Owner = "node"
ROUNDS = 8
"""So often a batch is planned anew after refusals before it is given up."""
_EXPECTED = ("exists", "no server", "no destination")
"""Refusals which say that others were there; whoever looks again sees what is left to do."""
_NODE_PORT_SETS = frozenset(NODE_PORTS.values())
_POOLS = (PoolName.CLUSTER, PoolName.LOCAL)


class Outcome:
    """What became of one family's part of a batch, by Service port with the reason.

    `failed` keep what was in force; `dropped` have nothing in force, or something in between; `unsupported` need what is not
    to be had; `notes` are for people.
    """

    def __init__(self) -> None:
        self.failed: dict[ServicePortName, str] = {}
        self.dropped: dict[ServicePortName, str] = {}
        self.unsupported: dict[ServicePortName, str] = {}
        self.notes: list[str] = []
        self.operations = 0


class FamilyPlane:
    """What is in force in one family, on one system.  `doubtful`: what is there has to be read before the next batch."""

    def __init__(self, family: Family, system: System, options: Options) -> None:
        self.family = family
        self.options = options
        self.doubtful = True
        self.shape: Shape | None = None
        self.states: dict[ServicePortName, ServiceState] = {}
        self.desired = Desired()
        self.memory = Memory(family)
        self.ids: Ids | None = None
        self.classes = Classes()
        self.there: Found = NOTHING
        self._system = system
        self._tables = system.tables[family]

    # -- what is wanted --

    def shape_for(self, host: HostState) -> Shape:
        """Raises ConfigError."""
        return shape_of(
            host,
            self.family,
            scheduler=self.options.scheduler,
            random_fully=self._tables.random_fully,
            security=self._tables.has_security,
        )

    def bring(
        self,
        changes: Mapping[ServicePortName, ServiceState | None],
        host: HostState,
        now: float,
        *,
        full: bool,
        host_changed: bool,
    ) -> Outcome:
        """Bring a batch into force.

        Raises KernelError, ConfigError: what is wanted is as before, some of the batch may be in force, and the next one
        reads what is there.
        """
        outcome = Outcome()
        shape = self.shape_for(host)
        whole = full or shape != self.shape
        todo: dict[ServicePortName, ServiceState | None] = dict(changes)
        if full:
            todo.update((name, None) for name in self.states if name not in changes)
        elif whole:
            todo = {**self.states, **todo}
        before = {name: self.desired.get(name) for name in todo}
        before_shape, before_node = self.shape, self.desired.get(NODE)
        compares = whole or self.doubtful
        try:
            if compares:
                self._read(shape, todo)
            self.shape = shape
            touched: list[Touched] = []
            for name, state in todo.items():
                touched.append(self._want(name, state, shape, outcome))
            if whole or host_changed:
                touched.append(self.desired.put(NODE, Objects(entries=render_host(host, self.family))))
            self._surround(touched, whole=compares, outcome=outcome)
            self._converge(touched, before, now, outcome, whole=compares)
            if self.classes.settle():
                self._surround((), whole=False, outcome=outcome)
        except BaseException:
            self._take_back(before, before_node)
            self.shape = before_shape
            self.doubtful = True
            raise
        self._accept(todo, outcome)
        self.doubtful = bool(outcome.dropped)
        return outcome

    def _read(self, shape: Shape, todo: Mapping[ServicePortName, ServiceState | None]) -> None:
        self.memory.read(self._system.kernel, self._system.sets, shape.marks)
        self.there = self._tables.read()
        if self.ids is None:
            known = [state for state in todo.values() if state is not None]
            marks = [key.mark for key in self.memory.servers]
            self.ids = Ids.recover(shape.marks, values_in(self.memory.entries), marks, owners(known))
            rules = self.there.chains.get(netrules.PORTS, ())
            for target, number in netrules.classes_in(rules, shape.marks).items():
                self.classes.recover(target, number)

    def _want(
        self, name: ServicePortName, state: ServiceState | None, shape: Shape, outcome: Outcome
    ) -> Touched:
        """From now on the Service port is to be so; if that cannot be said, it stays as it was."""
        assert self.ids is not None
        if state is not None:
            try:
                number = self.ids.take(name)
                objects = render(state, shape, number)
            except (Exhausted, ValueError) as error:
                outcome.failed[name] = f"it cannot be put into words: {error}"
                return self._put_back(name, self.desired.get(name))
            refused = [each for each in objects.unsupported if each.frontend is not None]
            if not refused:
                port_class = self._class_of(state, shape)
                if port_class:
                    objects = render(state, shape, number, port_class)
                outcome.notes += (f"{name}: {each}" for each in objects.unsupported)
                return self.desired.put(name, objects)
            outcome.unsupported[name] = "; ".join(map(str, refused))
        self.ids.leave(name)
        self.classes.leave(name)
        return self.desired.put(name, None)

    def _class_of(self, state: ServiceState, shape: Shape) -> int:
        target = target_of(state, shape)
        if isinstance(target, Target):
            try:
                return self.classes.take(state.name, target)
            except Exhausted:
                return 0
        self.classes.leave(state.name)
        return 0

    def _put_back(self, name: ServicePortName, objects: Objects | None) -> Touched:
        """What it had before; its number goes on while it has servers."""
        assert self.ids is not None
        if objects is None:
            self.ids.leave(name)
            self.classes.leave(name)
        elif self.shape is not None and name in self.states:
            self.ids.take(name)
            self._class_of(self.states[name], self.shape)
        return self.desired.put(name, objects)

    def _take_back(self, before: Mapping[ServicePortName, Objects | None], node: Objects | None) -> None:
        if self.ids is not None:
            for name, objects in before.items():
                self._put_back(name, objects)
            self.desired.put(NODE, node)

    def _accept(self, todo: Mapping[ServicePortName, ServiceState | None], outcome: Outcome) -> None:
        for name, state in todo.items():
            if name in outcome.failed:
                continue
            if state is None or name in outcome.unsupported or name in outcome.dropped:
                self.states.pop(name, None)
            else:
                self.states[name] = state

    # -- what stands around --

    def wanted_sets(self) -> set[SetName]:
        """All but those of node ports, which take so much memory that they come with the first one."""
        wanted = {SetName(self.family, kind) for kind in SetKind if kind not in _NODE_PORT_SETS}
        return wanted | self.memory.sets

    def wanted_chains(self) -> Mapping[Place, tuple[str, ...]]:
        assert self.shape is not None
        served = [
            protocol
            for protocol, kind in NODE_PORTS.items()
            if SetName(self.family, kind) in self.memory.sets
        ]
        return netrules.rules(self.shape, self.classes.rules, served)

    def _surround(self, touched: Iterable[Touched], *, whole: bool, outcome: Outcome) -> None:
        """Policy routing, sets, rules: what is not there."""
        assert self.shape is not None
        if whole:
            outcome.operations += self._route()
        needed = self.wanted_sets() | {
            entry.set for each in touched for entry in each.entries if entry.set.kind in _NODE_PORT_SETS
        }
        for name in sorted(needed - self.memory.sets, key=str):
            if not self._system.sets.create(spec_of(name)):
                raise KernelError(f"a set {name} is there, and it is none of ours")
            self.memory.sets.add(name)
            outcome.operations += 1
        wanted = self.wanted_chains()
        changed = {place: rules for place, rules in wanted.items() if self.there.chains.get(place) != rules}
        missing = self._missing_jumps()
        if changed or missing:
            # Half of it may hold if this fails.
            self.doubtful = True
            self._tables.load(netrules.load(changed, missing))
            self.there = Found({**self.there.chains, **changed}, (*self.there.jumps, *missing))
            outcome.operations += sum(map(len, changed.values())) + len(missing)

    def wanted_routes(self) -> tuple[Part, ...]:
        """Policy routing as it should be.

        The rule by which the way back is not through `lo` catches packets of the node itself as well; one for an endpoint
        on an address of the node would then leave by the route of its cluster IP, which IPVS keeps.  So that rule is there
        only where the kernel looks for the way back by the mark.
        """
        assert self.shape is not None
        parts = netrules.policy_routes(self.shape)
        if self.family == "IPv4" and self._system.checks_marks():
            return parts
        return tuple(part for part in parts if isinstance(part, LocalRoute) or part.interface is None)

    def _route(self) -> int:
        assert self.shape is not None
        wanted, parts = self.wanted_routes(), netrules.policy_routes(self.shape)
        present = self._system.routing.present(parts)
        missing = [part for part in wanted if part not in present]
        spare = [part for part in parts if part in present and part not in wanted]
        for part in missing:
            self._system.routing.add(part)
        for part in spare:
            self._system.routing.delete(part)
        return len(missing) + len(spare)

    def _missing_jumps(self) -> tuple[Jump, ...]:
        assert self.shape is not None
        return tuple(jump for jump in netrules.jumps(self.shape) if jump not in self.there.jumps)

    # -- servers and entries --

    def _converge(
        self,
        touched: list[Touched],
        before: Mapping[ServicePortName, Objects | None],
        now: float,
        outcome: Outcome,
        *,
        whole: bool,
    ) -> None:
        """Until everything is as wanted; whoever is refused goes back to what it had, and if that is refused, out."""
        for _ in range(ROUNDS):
            plan, keys = self._plan(touched, now, whole=whole)
            if plan.is_empty:
                self.memory.drains(keys, plan.draining)
                self._settle(keys, before, everywhere=whole)
                return
            refused = self._run(plan, outcome)
            if not refused:
                self.memory.drains(keys, plan.draining)
                self._settle(keys, before, everywhere=whole)
                return
            # Deadlines of what began to drain now are kept, so that it is not begun anew.
            self.memory.drains(keys, plan.draining)
            for name, why in self._blamed(refused, touched).items():
                touched.append(self._blame(name, why, before, outcome))
        raise KernelError(f"IPVS or its sets refuse again and again: {refused[0]}")

    def _plan(self, touched: Iterable[Touched], now: float, *, whole: bool) -> tuple[diff.Plan, set[ByMark]]:
        assert self.shape is not None
        assert self.ids is not None
        if whole:
            wanted = self.desired.everything()
            keys = {*self.memory.servers, *wanted.servers}
            entries: set[Entry] = {*self.memory.entries, *wanted.entries}
        else:
            known = list(touched)
            wanted = self.desired.part(known)
            keys = set(chain.from_iterable(each.servers for each in known))
            entries = set(chain.from_iterable(each.entries for each in known))
        plan = diff.plan(
            self.memory.part(keys, entries),
            wanted,
            marks=self.shape.marks,
            now=now,
            drain_seconds=self.options.drain_seconds,
            draining=self.memory.deadlines(keys),
            protocols=self._protocols(keys),
        )
        return plan, keys

    def _protocols(self, keys: Iterable[ByMark]) -> dict[int, Protocol]:
        found: dict[int, Protocol] = {}
        for key in keys:
            number = self.number_of(key)
            holder = self.ids.holder(number) if self.ids is not None else None
            if holder is not None:
                found[number] = holder.protocol
        return found

    def number_of(self, key: ByMark) -> int:
        """0: it is not one of ours."""
        server = self.shape.marks.server_of(key.mark) if self.shape is not None else None
        return server[0] if server is not None else 0

    def owner_of(self, key: ByMark) -> ServicePortName | None:
        """Whose server it is."""
        return self.ids.holder(self.number_of(key)) if self.ids is not None else None

    def _run(self, plan: diff.Plan, outcome: Outcome) -> list[Refusal | SetRefusal]:
        """In the order that matters, up to the first part in which something is refused."""
        refused = self._run_servers(plan.first, outcome)
        if refused:
            return refused
        found = change_entries(self._system.sets, plan.sets)
        bad = {each.position for each in found}
        for position, operation in enumerate(plan.sets):
            if position not in bad:
                self.memory.did_entry(operation)
        outcome.operations += len(plan.sets)
        return list(found) if found else self._run_servers(plan.last, outcome)

    def _run_servers(self, operations: tuple[Operation, ...], outcome: Outcome) -> list[Refusal | SetRefusal]:
        if not operations:
            return []
        found = self._system.kernel.run(operations)
        bad = {each.position for each in found}
        for position, operation in enumerate(operations):
            if position not in bad:
                self.memory.did(operation)
        outcome.operations += len(operations)
        return list(found)

    # -- blame --

    def _blamed(
        self, refused: Iterable[Refusal | SetRefusal], touched: Iterable[Touched]
    ) -> dict[ServicePortName, str]:
        """Who is at fault, and why.  Raises KernelError: nobody is, and yet something is refused."""
        found: dict[ServicePortName, str] = {}
        looked: set[ByMark] = set()
        entries: dict[Entry, str] = {}
        for each in refused:
            if isinstance(each, SetRefusal):
                entries[each.operation.entry] = str(each)
                continue
            key = _key_of(each.operation)
            if key not in looked:
                looked.add(key)
                self.memory.look_at(self._system.kernel, key)
            if each.reason in _EXPECTED:
                continue
            name = self.owner_of(key)
            if name is None:
                raise KernelError(f"IPVS refuses {each}", errno=each.errno)
            found.setdefault(name, f"IPVS refuses {each}")
        if entries:
            self._blame_entries(entries, found)
        return found

    def _blame_entries(self, entries: Mapping[Entry, str], found: dict[ServicePortName, str]) -> None:
        left = dict(entries)
        for owner in self.desired.owners:
            objects = self.desired.get(owner)
            if objects is None or isinstance(owner, str):
                continue
            for entry in objects.entries.keys() & entries.keys():
                found.setdefault(owner, f"a set refuses {entries[entry]}")
                left.pop(entry, None)
        if left and not found:
            raise KernelError(f"a set refuses {next(iter(left.values()))}")

    def _blame(
        self,
        name: ServicePortName,
        why: str,
        before: Mapping[ServicePortName, Objects | None],
        outcome: Outcome,
    ) -> Touched:
        if name not in outcome.failed and name in before:
            outcome.failed[name] = why
            return self._put_back(name, self._not_taken(name, before[name]))
        outcome.failed.pop(name, None)
        outcome.dropped[name] = why
        return self._put_back(name, None)

    def _not_taken(self, name: ServicePortName, objects: Objects | None) -> Objects | None:
        """Without frontends that others have from this batch on."""
        if objects is None:
            return None
        entries = {
            entry: value
            for entry, value in objects.entries.items()
            if self.desired.holder(entry) in (None, name)
        }
        return Objects(objects.servers, entries, objects.unsupported)

    # -- what goes on by itself --

    def _settle(
        self, keys: Iterable[ByMark], names: Iterable[ServicePortName], *, everywhere: bool = False
    ) -> None:
        """Release numbers without servers: those of these servers and Service ports, or all."""
        assert self.ids is not None
        assert self.shape is not None
        looked = {self.number_of(key) for key in keys}
        looked.update(number for name in names if (number := self.ids.get(name)) is not None)
        looked = set(self.ids.leaving) if everywhere else looked & self.ids.leaving.keys()
        self.ids.settle({number for number in looked if self._has_server(number)}, looked)

    def _has_server(self, number: int) -> bool:
        assert self.shape is not None
        marks = self.shape.marks
        return any(ByMark(self.family, marks.server(number, pool)) in self.memory.servers for pool in _POOLS)

    def drain(self, now: float, still: Callable[[], bool]) -> bool:
        """Look at servers with endpoints that drain, as long as `still`; those without connections, or whose time is up, go.

        Returns: there is somebody left to look at.  Raises KernelError: the next batch reads what is there.
        """
        if self.shape is None or self.doubtful:
            return False
        try:
            for key in list(self.memory.draining):
                if not still():
                    return True
                self._drain_one(key, now)
        except BaseException:
            self.doubtful = True
            raise
        return bool(self.memory.draining)

    def _drain_one(self, key: ByMark, now: float) -> None:
        kept = self.memory.draining.get(key, {})
        self.memory.look_at(self._system.kernel, key)
        # Whose time comes last is looked at last.
        self.memory.draining.pop(key, None)
        if kept:
            self.memory.draining[key] = kept
        touched = Touched(frozenset((key,)), frozenset())
        plan, keys = self._plan([touched], now, whole=False)
        if plan.first or plan.sets:
            # Somebody else was there; what is missing is told before it is put right.
            self.doubtful = True
            return
        if self._run(plan, Outcome()):
            self.doubtful = True
        self.memory.drains(keys, {d: t for d, t in plan.draining.items() if d.key in self.memory.servers})
        self._settle(keys, ())


def _key_of(operation: Operation) -> ByMark:
    server = getattr(operation, "server", None)
    key = server.key if server is not None else operation.key  # type: ignore[union-attr]
    assert isinstance(key, ByMark)
    return key
