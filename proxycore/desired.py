"""The desired state of this node, kept up with events: work follows the change, not the cluster.

    events -> Store -> dirty Services -> resolve -> Claims -> what changed since the last take()

Nothing is resolved before somebody asks, so that a burst of events for one Service costs one resolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from types import MappingProxyType

import msgspec

from .claims import Claims, claim_text
from .errors import InternalError
from .frontends import RESERVED_PORTS, PlanFacts, ServiceKey, ServicePlan, plan
from .model import HostState, Protocol, ServicePortName, ServiceState
from .objects import EndpointSlice
from .problems import Problem
from .resolve import Resolution, resolve_plan
from .source import Applied, Deleted, Event, Listed, Replaced
from .store import Store


class _Entry(msgspec.Struct):
    """What is known of one proxied Service: how it was planned and resolved, and what of it is desired."""

    plan: ServicePlan
    resolution: Resolution
    granted: tuple[ServiceState, ...] = ()


class Desired:
    """Every Service port as it should be in force on node `node_name`.

    Nothing is desired before the first HostState is known.  `reserved_ports` are those that the node needs itself (see
    `RESERVED_PORTS`); `started` is the time, in seconds since the epoch, before which trigger times are not believed: those
    changes were programmed, or not, by somebody else.
    """

    def __init__(
        self,
        node_name: str,
        *,
        reserved_ports: frozenset[tuple[int, Protocol]] = RESERVED_PORTS,
        started: float = 0.0,
    ) -> None:
        self.store = Store(node_name)
        self.resolved_total = 0
        self._reserved_ports = reserved_ports
        self._started = started
        self._host: HostState | None = None
        self._facts: PlanFacts | None = None
        self._claims = Claims()
        self._entries: dict[ServiceKey, _Entry] = {}
        self._states: dict[ServicePortName, ServiceState] = {}
        self._dirty: dict[ServiceKey, None] = {}  # in the order of arrival, which is that of memory
        self._replan: set[ServiceKey] = set()
        self._times: dict[ServiceKey, float] = {}
        self._told: dict[ServiceKey, float] = {}
        self._taken: dict[ServicePortName, ServiceState | None] = {}  # changed since take(): what it was then
        self._oldest: float | None = None
        self._triggers: dict[ServicePortName, float] = {}
        self.endpoint_changes_total = 0
        self.service_changes_total = 0
        self._with_problems: set[ServiceKey] = set()
        self._zone_users: set[ServiceKey] = set()
        self._node_ip_users: set[ServiceKey] = set()
        self._node_address_users: set[ServiceKey] = set()

    @property
    def host(self) -> HostState | None:
        """The node's facts as last handed in."""
        return self._host

    @property
    def states(self) -> Mapping[ServicePortName, ServiceState]:
        """Everything that should be in force now; a live view."""
        self._settle()
        return MappingProxyType(self._states)

    @property
    def problems(self) -> Mapping[str, tuple[str, ...]]:
        """What is ignored now, by subject (`Service default/web`, `EndpointSlice default/web-1`)."""
        self._settle()
        found: dict[str, tuple[str, ...]] = {}
        for key in sorted(self._with_problems):
            for subject, reason in (*self._entries[key].resolution.problems, *self._losses(key)):
                if reason not in found.get(subject, ()):
                    found[subject] = (*found.get(subject, ()), reason)
        return found

    @property
    def claims(self) -> Claims:
        """Who owns which address and port; to be read only."""
        self._settle()
        return self._claims

    @property
    def oldest_trigger_time(self) -> float | None:
        """When the earliest cause of what take() would return began, in seconds since the epoch.  Ask before take()."""
        self._settle()
        return self._oldest

    @property
    def triggers(self) -> dict[ServicePortName, float]:
        """When the changes that take() would return began, of those whose EndpointSlices tell.  Ask before take()."""
        self._settle()
        return self._triggers

    def handle(
        self, events: Sequence[Event], host: HostState | None = None, *, arrived: float | None = None
    ) -> None:
        """Take in events and, if it changed, the node's facts.

        `arrived` (seconds since the epoch) stands in for the trigger time of Services whose objects tell none.
        Raises InternalError for facts about another node; nothing was taken in.
        """
        if host is not None and host.node_name != self.store.node_name:
            raise InternalError(f"facts of node {host.node_name!r} reached node {self.store.node_name!r}")
        for event in events:
            touched = self.store.apply(event)
            if touched.services:
                if type(event) is Applied:
                    if type(event.object) is EndpointSlice:
                        self.endpoint_changes_total += 1
                    else:
                        self.service_changes_total += 1
                else:
                    self._count_list(event, len(touched.services))
                self._touch(touched.services, touched.trigger_times, arrived)
        if host is not None and host != self._host:
            self._host_changed(host, arrived)

    def reserve_ports(self, ports: frozenset[tuple[int, Protocol]], arrived: float | None = None) -> None:
        """The node needs these ports itself from now on, and others no more."""
        if ports != self._reserved_ports:
            self._reserved_ports = ports
            self._replan.update(self.store.services)
            self._touch(self.store.services, {}, arrived)

    def take(self) -> dict[ServicePortName, ServiceState | None]:
        """The Service ports whose desired state is another one than at the last take; None: it is to go."""
        self._settle()
        changed = {name: self._states.get(name) for name in self._taken}
        self._taken.clear()
        self._oldest = None
        self._triggers = {}
        return changed

    def _count_list(self, event: Event, services: int) -> None:
        """Of a deletion or a complete list, each Service that it touches counts as one change."""
        if isinstance(event, Deleted | Replaced | Listed) and event.kind == "EndpointSlice":
            self.endpoint_changes_total += services
        else:
            self.service_changes_total += services

    def _touch(
        self, services: Iterable[ServiceKey], times: Mapping[ServiceKey, float], arrived: float | None
    ) -> None:
        for key in services:
            self._dirty[key] = None
            began = times.get(key)
            if began is None or began < self._started:
                began = arrived
            elif began < self._told.get(key, inf):
                self._told[key] = began
            if began is not None:
                known = self._times.get(key)
                if known is None or began < known:
                    self._times[key] = began

    def _host_changed(self, host: HostState, arrived: float | None) -> None:
        """Mark the Services that depend on what changed, and only these."""
        before, self._host = self._host, host
        facts = PlanFacts.of(host)
        if before is None or facts != self._facts:
            self._facts = facts
            self._replan.update(self.store.services)
            self._touch(self.store.services, {}, arrived)
            return
        replan: set[ServiceKey] = set()
        if host.node_ips != before.node_ips:
            replan |= self._node_ip_users
        if host.node_addresses != before.node_addresses:
            replan |= self._node_address_users
        self._replan |= replan
        self._touch(replan, {}, arrived)
        if host.zone != before.zone:
            self._touch(self._zone_users, {}, arrived)

    def _settle(self) -> None:
        """Resolve what is dirty, then let the claims decide, then note what changed."""
        if not self._dirty or self._host is None:
            return
        affected = dict(self._dirty)
        gone: dict[ServiceKey, _Entry] = {}
        for key in self._dirty:
            for other in self._resolve(key, self._host, gone):
                affected[other] = None
        for key in affected:
            entry = self._entries.get(key)
            if entry is not None:
                self._grant(key, entry, self._claims.granted(key, entry.resolution.states))
                if entry.resolution.problems or self._claims.lost(key):
                    self._with_problems.add(key)
                elif self._with_problems:
                    self._with_problems.discard(key)
            elif key in gone:
                self._grant(key, gone[key], ())
                self._with_problems.discard(key)
        self._dirty.clear()
        self._replan.clear()
        self._times.clear()
        self._told.clear()

    def _resolve(self, key: ServiceKey, host: HostState, gone: dict[ServiceKey, _Entry]) -> set[ServiceKey]:
        """Resolve one Service.  Returns the Services whose claims were touched by it."""
        service = self.store.services.get(key)
        entry = self._entries.get(key)
        if service is None:
            if entry is None:
                return set()
            gone[key] = self._entries.pop(key)
            self._index(key, None)
            return self._claims.update(key, (), None)
        if entry is not None and entry.plan.service is service and key not in self._replan:
            planned = entry.plan
        else:
            planned = plan(service, host, facts=self._facts, reserved_ports=self._reserved_ports)
        self.resolved_total += 1
        resolution = resolve_plan(planned, self.store.slices(key), host)
        if entry is None:
            entry = self._entries[key] = _Entry(planned, resolution)
            replanned = True
        else:
            replanned = entry.plan is not planned
            entry.plan, entry.resolution = planned, resolution
        self._index(key, entry)
        if not replanned:
            return set()
        return self._claims.update(key, resolution.states, service.metadata.creation_timestamp)

    def _index(self, key: ServiceKey, entry: _Entry | None) -> None:
        planned = entry.plan if entry else None
        for members, belongs in (
            (self._zone_users, entry and entry.resolution.uses_zone),
            (self._node_ip_users, planned and planned.uses_node_ips),
            (self._node_address_users, planned and planned.uses_node_addresses),
        ):
            if belongs:
                members.add(key)
            elif members:
                members.discard(key)

    def _grant(self, key: ServiceKey, entry: _Entry, granted: tuple[ServiceState, ...]) -> None:
        """Note the difference between what was desired of a Service and what is now."""
        before = {state.name: state for state in entry.granted}
        kept = []
        changed = False
        told = self._told.get(key)
        for state in granted:
            old = before.pop(state.name, None) if before else None
            if old is not None and old == state:
                kept.append(old)
                continue
            kept.append(state)
            changed = True
            self._note(state.name, old, state)
            if told is not None:
                known = self._triggers.get(state.name)
                if known is None or told < known:
                    self._triggers[state.name] = told
        for name, old in before.items():
            changed = True
            self._note(name, old, None)
        entry.granted = tuple(kept)
        began = self._times.get(key) if changed else None
        if began is not None and (self._oldest is None or began < self._oldest):
            self._oldest = began

    def _note(self, name: ServicePortName, old: ServiceState | None, new: ServiceState | None) -> None:
        if new is None:
            del self._states[name]
        else:
            self._states[name] = new
        if name not in self._taken:
            self._taken[name] = old
        elif self._taken[name] == new:
            del self._taken[name]

    def _losses(self, key: ServiceKey) -> list[Problem]:
        return [
            Problem(
                f"Service {key[0]}/{key[1]}",
                f"{claim_text(claim)} is not served: Service {owner[0]}/{owner[1]} has it",
            )
            for claim, owner in self._claims.lost(key).items()
        ]
