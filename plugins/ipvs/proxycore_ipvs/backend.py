"""The backend's hooks: from a batch to IPVS servers, IP sets and rules in force."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from proxycore.api import (
    ApplyResult,
    BackendContext,
    BackendInfo,
    Capability,
    ChangeBatch,
    Cleanup,
    Counters,
    Drift,
    Failure,
    Family,
    HostState,
    KernelError,
    KernelObject,
    Operation,
    Probe,
    ServicePortName,
    Started,
    Verification,
    hookimpl,
)
from proxycore.kernel.xtables import LockHeld

from . import cleaning, counts, drift, offline
from .family import FamilyPlane, Outcome
from .marks import Marks
from .memory import Memory
from .options import Options, parse_options
from .servers import AddServer, ByMark, DeleteServer, Server
from .system import RealSystem, System

CAPABILITIES = frozenset(Capability) - {Capability.ATOMIC, Capability.LOCALHOST_NODE_PORT}
NEEDS = ("IPVS (ip_vs)", "IP sets with skbinfo", "iptables 1.8.2", "CAP_NET_ADMIN", "CAP_NET_RAW")
SUMMARY = (
    "IPVS virtual servers by firewall mark, IP sets, policy routing and a fixed number of iptables rules"
)
VERIFY_SHARE = 0.02
VERIFY_PAUSE_MIN = 5.0
"""All is read and compared about that share of the time, and not more often than this."""
DRAIN_SHARE = 0.2
DRAIN_LOOK_SECONDS = 0.5
"""Looking at endpoints that drain takes at most this share of the time, so long at once."""


class IpvsBackend:
    """One instance serves one network namespace, on one thread."""

    def __init__(
        self,
        open_system: Callable[[BackendContext, Options], System] = RealSystem,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_system = open_system
        self._clock = clock
        self._opened: System | None = None
        self._planes: dict[Family, FamilyPlane] = {}
        self._host: HostState | None = None
        self._totals = counts.Totals()
        self._verify_after = self._drain_after = 0.0

    # -- facts --

    @hookimpl
    def proxycore_backend_describe(self) -> BackendInfo:
        return BackendInfo(
            name="ipvs", summary=SUMMARY, api=">=0.1,<0.2", capabilities=CAPABILITIES, needs=NEEDS
        )

    @hookimpl
    def proxycore_backend_probe(self, context: BackendContext) -> Probe:
        return offline.probe(context)

    # -- life --

    @hookimpl
    def proxycore_backend_start(self, context: BackendContext) -> Started:
        self.proxycore_backend_stop()
        options = parse_options(context.options)
        system = self._open_system(context, options)
        try:
            planes = {family: FamilyPlane(family, system, options) for family in context.families}
            found = [
                text
                for family, plane in planes.items()
                if (text := _found(system, family, plane, context.host))
            ]
            totals = counts.Totals()
            for plane in planes.values():
                totals.begin(plane, system)
            held = [server for plane in planes.values() for server in plane.memory.servers.values()]
            if all(server.server.scheduler != options.scheduler for server in held):
                _check_scheduler(system, options.scheduler)
            system.prepare(options)
        except BaseException:
            system.close()
            raise
        self._opened, self._planes, self._host, self._totals = system, planes, context.host, totals
        self._verify_after = self._drain_after = 0.0
        return Started(adopted="; ".join(found) or None)

    @hookimpl
    def proxycore_backend_stop(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _system(self) -> System:
        if self._opened is None:
            raise KernelError("the ipvs backend is not started")
        return self._opened

    # -- changes --

    @hookimpl
    def proxycore_backend_apply(self, batch: ChangeBatch) -> ApplyResult:
        self._system()
        if batch.host is not None:
            self._host = batch.host.after
        assert self._host is not None
        done: list[Outcome] = []
        unknown: list[ServicePortName] = []
        messages: list[str] = []
        for family, plane in self._planes.items():
            changes = {c.name: c.after for c in batch.changes if c.name.family == family}
            if not (changes or batch.full or batch.host is not None):
                continue
            try:
                done.append(
                    plane.bring(
                        changes,
                        self._host,
                        self._clock(),
                        full=batch.full,
                        host_changed=batch.host is not None,
                    )
                )
            except KernelError as error:
                unknown += changes
                messages.append(str(error))
                if isinstance(error, LockHeld):
                    # Whoever has the lock has it for the other family, too.
                    later = list(self._planes)[list(self._planes).index(family) + 1 :]
                    unknown += [c.name for c in batch.changes if c.name.family in later]
                    break
        if messages and not done:
            return ApplyResult(
                generation=batch.generation, outcome="rejected", culprits=(), message="; ".join(messages)
            )
        for outcome in done:
            unknown += outcome.dropped
            messages += [*outcome.dropped.values(), *outcome.notes]
        return ApplyResult(
            generation=batch.generation,
            failed=_failures(outcome.failed.items() for outcome in done),
            unsupported=_failures(outcome.unsupported.items() for outcome in done),
            unknown=tuple(unknown),
            message="; ".join(dict.fromkeys(messages)),
            operations=sum(outcome.operations for outcome in done),
        )

    # -- offline --

    @hookimpl
    def proxycore_backend_render(self, context: BackendContext, batch: ChangeBatch) -> str:
        return offline.render(context, batch)

    @hookimpl
    def proxycore_backend_plan(self, context: BackendContext, batch: ChangeBatch) -> tuple[Operation, ...]:
        system = self._open_system(context, parse_options(context.options))
        try:
            return offline.plan(system, context, batch)
        finally:
            system.close()

    # -- truth --

    @hookimpl
    def proxycore_backend_verify(self, deep: bool) -> Verification:
        system = self._system()
        self._drain()
        began = self._clock()
        doubts = any(plane.doubtful and plane.shape is not None for plane in self._planes.values())
        if not deep and began < self._verify_after and not doubts:
            return Verification(checked=False)
        found: list[Drift] = []
        try:
            for plane in self._planes.values():
                found += drift.compare(plane, system, began)
        finally:
            ended = self._clock()
            self._verify_after = ended + max((ended - began) / VERIFY_SHARE, VERIFY_PAUSE_MIN)
        return Verification(checked=True, drift=tuple(found))

    def _drain(self) -> None:
        began = self._clock()
        if began < self._drain_after:
            return

        def still() -> bool:
            return self._clock() < began + DRAIN_LOOK_SECONDS

        for plane in self._planes.values():
            plane.drain(began, still)
        ended = self._clock()
        self._drain_after = ended + (ended - began) / DRAIN_SHARE

    @hookimpl
    def proxycore_backend_inspect(self, name: ServicePortName) -> tuple[KernelObject, ...]:
        system = self._system()
        plane = self._planes.get(name.family)
        return () if plane is None else tuple(counts.inspect(plane, system, name))

    @hookimpl
    def proxycore_backend_counters(self) -> tuple[Counters, ...]:
        system = self._system()
        return tuple(item for plane in self._planes.values() for item in self._totals.read(plane, system))

    @hookimpl
    def proxycore_backend_cleanup(self, context: BackendContext) -> Cleanup:
        return Cleanup(removed=cleaning.clean_up(context))


def _failures(found: Iterable[Iterable[tuple[ServicePortName, str]]]) -> tuple[Failure, ...]:
    return tuple(Failure(name=name, why=why) for items in found for name, why in items)


def _check_scheduler(system: System, name: str) -> None:
    """Raises KernelError: this kernel has none of that name, and cannot load it."""
    # Known connections carry this mark, and no virtual server of ours has it.
    trial = ByMark("IPv4", Marks().ours)
    for refusal in system.kernel.run([AddServer(Server(trial, name)), DeleteServer(trial)]):
        if refusal.reason == "no scheduler":
            raise KernelError(
                f"this kernel has no scheduler {name} for IPVS (module ip_vs_{name})", errno=refusal.errno
            )


def _found(system: System, family: Family, plane: FamilyPlane, host: HostState) -> str:
    """What a run before left, in words; empty if there is nothing."""
    marks = plane.shape_for(host).marks
    memory = Memory(family)
    memory.read(system.kernel, system.sets, marks)
    plane.memory = memory
    if not (memory.servers or memory.entries):
        return ""
    return f"{len(memory.servers)} {family} virtual servers and {len(memory.entries)} entries of sets"
