"""What one Service port asks of the data plane: virtual servers, and entries of the sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from proxycore.api import (
    Endpoint,
    Frontend,
    FrontendKind,
    Pool,
    PoolName,
    Protocol,
    ServicePortName,
    ServiceState,
)

from . import entries, fates
from .entries import Entry, SetKind, SetName
from .fates import Fates
from .ids import FrontendKey, Target
from .marks import Parts
from .servers import PERSISTENT, SCHEDULER_FLAGS, ByMark, Destination, Server
from .shape import Shape

_WEIGHTED = {"rr": "wrr", "lc": "wlc"}
"""Schedulers that know no weights, and the same that do."""
_LOOKS_AT_PORT = {"mh": SCHEDULER_FLAGS[1]}
"""Flags that make clients behind one address spread out."""


class Unsupported(NamedTuple):
    """What cannot be had here.  `frontend`: which has no entry because of it; None: it concerns all, and they are served."""

    frontend: Frontend | None
    reason: str

    def __str__(self) -> str:
        return self.reason if self.frontend is None else f"{self.frontend}: {self.reason}"


class VirtualServer(msgspec.Struct, frozen=True, gc=False):
    """A virtual server with its destinations, by address and port; its protocol is nothing that the kernel knows."""

    server: Server
    destinations: Mapping[tuple[str, int], Destination]
    protocol: Protocol


class Objects(msgspec.Struct, frozen=True, gc=False):
    """Servers by key, and entries with their value; None where the set carries none."""

    servers: Mapping[ByMark, VirtualServer] = {}
    entries: Mapping[Entry, int | None] = {}
    unsupported: tuple[Unsupported, ...] = ()


def target_of(state: ServiceState, shape: Shape) -> Target | Unsupported | None:
    """The target port for which a Service port needs a class: a persistent server keeps the port that the client dialled.

    None: there is no affinity, or clients dial the target port itself, or nobody is served.
    """
    if state.affinity_seconds is None:
        return None
    pools = [pool for name in _reached(state, shape) if (pool := state.pool(name)) is not None]
    ports = {endpoint.port for pool in pools for endpoint in pool.endpoints if endpoint.weight > 0}
    if not ports:
        return None
    if len(ports) > 1:
        some = ", ".join(map(str, sorted(ports)[:4]))
        return Unsupported(None, f"no session affinity: endpoints listen on different ports ({some})")
    port = ports.pop()
    if all(frontend.port == port for frontend in state.frontends):
        return None
    return Target(state.name.protocol, port)


def _reached(state: ServiceState, shape: Shape) -> frozenset[PoolName]:
    """Pools to which some frontend leads some client."""
    classes = fates.classes_of(shape)
    return frozenset(
        fate.pool
        for frontend in state.frontends
        for fate in fates.fates(frontend.routes, state, classes)
        if fate.pool is not None
    )


def render(state: ServiceState, shape: Shape, number: int, port_class: int = 0) -> Objects:
    """Everything that stands for a Service port; equal arguments give equal objects.

    `number`: of the Service port.  `port_class`: of the target_of() it, where that is a target; 0: there was none left,
    and the Service port goes without affinity.
    """
    made = _Rendering(state, shape, number)
    target = target_of(state, shape)
    persistent = state.affinity_seconds is not None
    if isinstance(target, Unsupported):
        made.unsupported.append(target)
        persistent = False
    elif target is not None and not port_class:
        told = f"{target.port}/{target.protocol}"
        made.unsupported.append(
            Unsupported(None, f"no session affinity: no class is left for target port {told}")
        )
        persistent = False
    for frontend in state.frontends:
        differs = isinstance(target, Target) and persistent and frontend.port != target.port
        made.frontend(frontend, port_class if differs else 0)
    for name in sorted(made.pools, key=lambda pool: pool.value):
        pool = state.pool(name)
        if pool is not None:
            made.server(name, pool, state.affinity_seconds if persistent else None)
    return Objects(made.servers, made.entries, tuple(made.unsupported))


class _Rendering:
    """What render() has found so far.  `pools`: those that values lead to."""

    def __init__(self, state: ServiceState, shape: Shape, number: int) -> None:
        self.state = state
        self.shape = shape
        self.number = number
        self.classes = fates.classes_of(shape)
        self.pools: set[PoolName] = set()
        self.servers: dict[ByMark, VirtualServer] = {}
        self.entries: dict[Entry, int | None] = {}
        self.unsupported: list[Unsupported] = []

    def _set(self, kind: SetKind) -> SetName:
        return SetName(self.shape.family, kind)

    def frontend(self, frontend: Frontend, port_class: int) -> None:
        if frontend.kind is FrontendKind.CLUSTER_IP and frontend.address is not None:
            self.entries[Entry(self._set(SetKind.CLUSTER_IPS), frontend.address)] = None
        wanted: Fates = fates.fates(frontend.routes, self.state, self.classes)
        flags = fates.flags_for(wanted, fates.usual(frontend.routes, self.classes), self.classes)
        if flags is None:
            self._refuse(frontend, f"no mark says {fates.told(wanted, self.classes)}")
            return
        if frontend.address is None:
            if frontend.source_ranges is not None:
                self._refuse(frontend, "a node port cannot have source ranges")
                return
            entry = entries.node_port(self.shape.family, frontend.protocol, frontend.port)
        else:
            entry = entries.vip(self.shape.family, frontend.address, frontend.protocol, frontend.port)
        if entry in self.entries:
            return
        self.entries[entry] = self._value(flags, port_class)
        if frontend.source_ranges is not None and frontend.address is not None:
            self._wall(frontend, frontend.address, frontend.source_ranges)
        self.pools.update(fate.pool for fate in wanted if fate.pool is not None)

    def _refuse(self, frontend: Frontend, reason: str) -> None:
        self.unsupported.append(Unsupported(frontend, reason))

    def _value(self, flags: Parts, port_class: int) -> int:
        if not flags.reject:
            flags = flags._replace(number=self.number, port_class=port_class)
        return self.shape.marks.compose(flags)

    def _wall(self, frontend: Frontend, address: str, ranges: tuple[str, ...]) -> None:
        at = (address, frontend.protocol, frontend.port)
        self.entries[Entry(self._set(SetKind.FIREWALLED), *at)] = None
        for cidr in ranges:
            for part in entries.halves(cidr):
                self.entries[Entry(self._set(SetKind.ADMITTED), *at, part)] = None

    def server(self, name: PoolName, pool: Pool, affinity_seconds: int | None) -> None:
        key = ByMark(self.shape.family, self.shape.marks.server(self.number, name))
        scheduler = self._scheduler(pool.endpoints)
        flags = _LOOKS_AT_PORT.get(scheduler, 0)
        if affinity_seconds is not None:
            flags |= PERSISTENT
        server = Server(key, scheduler, flags, affinity_seconds or 0)
        destinations: dict[tuple[str, int], Destination] = {}
        for endpoint, weight in (*((e, e.weight) for e in pool.endpoints), *self._kept(name)):
            at = (endpoint.address, endpoint.port)
            if at in destinations:
                continue
            destinations[at] = Destination(*at, weight)
            loop = Entry(
                self._set(SetKind.LOOP),
                endpoint.address,
                self.state.name.protocol,
                endpoint.port,
                endpoint.address,
            )
            self.entries[loop] = None
        self.servers[key] = VirtualServer(server, destinations, self.state.name.protocol)

    def _kept(self, name: PoolName) -> Iterator[tuple[Endpoint, int]]:
        """Endpoints that still serve and get no new flows.

        A TCP endpoint that has gone drains; one of another protocol ends its flows when it goes.
        """
        if self.state.name.protocol == "TCP":
            return
        for endpoint in self.state.endpoints:
            reachable = name is PoolName.CLUSTER or endpoint.is_local
            if reachable and endpoint.terminating and endpoint.serving:
                yield endpoint, 0

    def _scheduler(self, endpoints: tuple[Endpoint, ...]) -> str:
        chosen = self.shape.scheduler
        if len({endpoint.weight for endpoint in endpoints if endpoint.weight > 0}) > 1:
            return _WEIGHTED.get(chosen, chosen)
        return chosen


def owners(states: Iterable[ServiceState]) -> dict[FrontendKey, ServicePortName]:
    """Who has which frontend, as `Ids.recover` asks for it."""
    return {
        FrontendKey(each.address, each.protocol, each.port): state.name
        for state in states
        for each in state.frontends
    }


def values_in(found: Mapping[Entry, int | None]) -> dict[FrontendKey, int]:
    """Values by frontend, among entries that were read."""
    return {
        key: value
        for entry, value in found.items()
        if value is not None and (key := key_of(entry)) is not None
    }


def key_of(entry: Entry) -> FrontendKey | None:
    """The frontend of an entry that carries a value; None: it carries none."""
    if entry.set.kind not in entries.MAPS or entry.protocol is None or entry.port is None:
        return None
    return FrontendKey(entry.address, entry.protocol, entry.port)
