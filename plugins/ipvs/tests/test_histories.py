"""The backend on a host in memory, through any history: batches, restarts, connections, refusals, deaths, foreign hands.

After every batch that came into force the host means what it would if a backend wrote it at once on an empty one; what is there
besides are servers and endpoints that drain.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest

from proxycore.api import (
    Endpoint,
    FrontendKind,
    KernelError,
    LocalPodsByInterface,
    NodePortAddresses,
    Pool,
    WhenEmpty,
)
from proxycore.testing.states import (
    EXTERNAL_LOCAL,
    HOST,
    IN_CLUSTER,
    batch,
    context,
    frontend,
    full,
    host,
    name_of,
    node_port,
    service,
)
from proxycore_ipvs.backend import IpvsBackend
from proxycore_ipvs.entries import MAPS, named
from proxycore_ipvs.fakesystem import FakeSystem
from proxycore_ipvs.marks import Marks
from proxycore_ipvs.servers import ByMark, DeleteDestination, SetDestination

MARKS = Marks()
FAMILIES = ("IPv4", "IPv6")
NAMES = [
    name_of(f"s{number}", protocol=("TCP", "TCP", "UDP")[number % 3], family=family)
    for number in range(6)
    for family in FAMILIES
]
HOSTS = [
    HOST,
    host(detect_local=None),
    host(detect_local=LocalPodsByInterface("cni0")),
    host(node_ports_ipv4=NodePortAddresses(all_local=True), node_ports_ipv6=NodePortAddresses()),
]
PORTS = (80, 8080, 9090)


def state_of(name, chance):
    """A Service port whose frontends nobody else has."""
    place, v4 = NAMES.index(name) // 2, name.family == "IPv4"
    port = chance.choice(PORTS)
    endpoints = tuple(
        Endpoint(
            address=f"10.0.{place}.{n + 1}" if v4 else f"fd00:10::{place}:{n + 1:x}",
            port=port,
            is_local=n % 2 == 0,
            weight=chance.choice([1, 1, 1, 2]),
        )
        for n in range(chance.randrange(3), chance.randrange(1, 8))
    )
    empty = chance.choice([WhenEmpty.DROP, WhenEmpty.REJECT])
    at = {"protocol": name.protocol}
    made = [frontend(f"172.30.0.{place + 1}" if v4 else f"fd00:172:30::{place + 1:x}", **at)]
    local = None
    if chance.random() < 0.5:
        silent = WhenEmpty.DROP if endpoints else empty
        local = Pool(endpoints=tuple(e for e in endpoints if e.is_local), when_empty=silent)
        ranges = ("198.51.100.0/24", "0.0.0.0/0") if v4 else ("2001:db8:9::/64",)
        balancer = f"203.0.113.{place + 1}" if v4 else f"2001:db8:5::{place + 1:x}"
        made += [
            frontend(
                balancer,
                kind=FrontendKind.LOAD_BALANCER_IP,
                routes=EXTERNAL_LOCAL,
                source_ranges=ranges if chance.random() < 0.5 else None,
                **at,
            ),
            node_port(30000 + place, routes=chance.choice([EXTERNAL_LOCAL, IN_CLUSTER]), **at),
        ]
    return service(
        name,
        *made,
        cluster=Pool(endpoints=endpoints, when_empty=empty),
        local=local,
        affinity=chance.choice([None, None, 10]),
    )


class Target(NamedTuple):
    """What a server does, whatever its mark."""

    scheduler: str
    flags: int
    timeout: int
    destinations: frozenset


def meaning(system, classes):
    """What the host does, numbers of Service ports and classes of target ports being nobody's business."""
    served = {}
    for state in system.servers.servers():
        server = state.server
        if not any(each.destination.weight for each in system.servers.destinations(server.key)):
            continue
        served[server.key] = Target(
            server.scheduler,
            server.flags,
            server.timeout_seconds,
            frozenset(
                each.destination
                for each in system.servers.destinations(server.key)
                if each.destination.weight > 0
            ),
        )
    found = {}
    for text, state in system.entries.states().items():
        name = named(text)
        for entry, mark in system.entries.members(state.spec).items():
            if name.kind not in MAPS:
                found[text, str(entry)] = mark
                continue
            parts = MARKS.take_apart(mark.value)
            if parts.reject:
                found[text, str(entry)] = "rejected"
                continue
            target = served.get(ByMark(name.family, MARKS.server(parts.number, parts.pool)))
            assert target is not None or parts.dropped
            other = None
            if parts.short:
                pool = type(parts.pool)("cluster")
                other = served.get(ByMark(name.family, MARKS.server(parts.number, pool)))
            found[text, str(entry)] = (
                parts._replace(number=0, port_class=bool(parts.port_class)),
                target,
                other,
                classes(name.family, parts.port_class, entry.protocol),
            )
    return found, set(system.routes.parts)


def classes_of(system):
    def told(family, number, protocol):
        if not number:
            return None
        lines = [line for line in system.chains[family].lines() if "--to-destination" in line]
        value = f"--mark 0x{MARKS.compose_class(number):x}/"
        (port,) = {line.rpartition(":")[2] for line in lines if value in line and "-p tcp" in line} or {""}
        (other,) = {line.rpartition(":")[2] for line in lines if value in line and "-p udp" in line} or {""}
        return (port, other) if not protocol else port if protocol == "TCP" else other

    return told


class History:
    """`wanted`: what is in force."""

    def __init__(self, seed):
        self.chance = random.Random(seed)
        self.system = FakeSystem()
        self.system.chains["IPv4"].load("*mangle\n-A PREROUTING -j SOMEBODYS\nCOMMIT\n")
        self.wanted = {}
        self.facts = HOST
        self.now = 0.0
        self.open = []
        self.start()
        self.send({}, whole=True)

    def start(self):
        self.backend = IpvsBackend(open_system=self.system.open, clock=lambda: self.now)
        self.backend.proxycore_backend_start(context(self.facts))

    def send(self, changes, *, whole=False, facts=None):
        """What the engine does: with everything after a failure, until it is applied.  Returns who failed."""
        target = {**self.wanted, **changes}
        target = {name: state for name, state in target.items() if state is not None}
        self.facts = facts or self.facts
        for _ in range(4):
            if whole:
                sent = full(*target.values(), facts=self.facts)
            else:
                gone = [name for name, state in changes.items() if state is None]
                sent = batch(*(s for s in changes.values() if s is not None), removed=gone, facts=facts)
            result = self.backend.proxycore_backend_apply(sent)
            assert result.unsupported == ()
            if result.outcome == "applied" and not result.unknown:
                failed = {failure.name for failure in result.failed}
                for name in {*changes, *target, *self.wanted} - failed:
                    if name in target:
                        self.wanted[name] = target[name]
                    else:
                        self.wanted.pop(name, None)
                return failed
        raise AssertionError(result)

    # -- steps --

    def change(self):
        names = self.chance.sample(NAMES, self.chance.randrange(1, 4))
        gone = self.chance.random() < 0.25
        changes = {name: None if gone else state_of(name, self.chance) for name in names}
        assert self.send(changes, whole=self.chance.random() < 0.1) == set()

    def facts_change(self):
        self.send({}, facts=self.chance.choice(HOSTS))

    def restart(self):
        before = self.system.dump()
        self.start()
        self.system.servers.runs.clear()
        loads = [len(tables.loads) for tables in self.system.chains.values()]
        self.send({}, whole=True)
        deletes = {type(operation) for run in self.system.servers.runs for operation in run}
        assert SetDestination not in deletes
        assert [len(tables.loads) for tables in self.system.chains.values()] == loads
        for part in ("sets", "rules", "routing"):
            assert self.system.dump()[part] == before[part]

    def connections(self):
        for state in self.system.servers.servers():
            if self.chance.random() < 0.3 and (at := self.system.servers.open(state.server.key)):
                self.open.append((state.server.key, at))
        self.chance.shuffle(self.open)
        while self.open and self.chance.random() < 0.7:
            end = self.open.pop()
            self.system.servers.end(*end)
            self.system.servers.forget(*end)

    def time_passes(self):
        self.now += self.chance.choice([1.0, 1.0, 10.0, 1000.0])
        assert self.backend.proxycore_backend_verify(self.chance.random() < 0.5).drift == ()

    def one_is_refused(self):
        name = self.chance.choice(NAMES)
        bad = "10.9.9.9" if name.family == "IPv4" else "fd00:99::9"
        state = service(
            name, *state_of(name, self.chance).frontends[:1], cluster=[Endpoint(address=bad, port=80)]
        )
        if self.chance.random() < 0.5:
            self.system.servers.refuse = lambda op: (
                22 if getattr(getattr(op, "destination", None), "address", "") == bad else 0
            )
        else:
            self.system.entries.refuse = lambda entry: 4352 if entry.second == bad else 0
        other = NAMES[(NAMES.index(name) + 2) % len(NAMES)]
        assert self.send({name: state, other: state_of(other, self.chance)}) == {name}
        self.system.servers.refuse = self.system.entries.refuse = lambda one: 0

    def no_answer(self):
        """The kernel does the first half, and then nothing more for once."""
        run, left = self.system.servers.run, [1]

        def half(operations):
            if left:
                left.pop()
                run(operations[: len(operations) // 2])
                raise KernelError("no answer")
            return run(operations)

        self.system.servers.run = half
        self.change()
        self.system.servers.run = run

    def foreign_hand(self):
        """Somebody takes away what is ours; it is found, and a full batch puts it right."""
        choice = self.chance.randrange(4)
        if choice == 0:
            keys = [
                (state.server.key, each.destination)
                for state in self.system.servers.servers()
                for each in self.system.servers.destinations(state.server.key)
                if each.destination.weight > 0
            ]
            if not keys:
                return
            key, to = self.chance.choice(keys)
            self.open = [each for each in self.open if each != (key, (to.address, to.port))]
            self.system.servers.run([DeleteDestination(key, to.address, to.port)])
        elif choice == 1:
            spec = self.system.entries.states()["PX4-CIDR"].spec
            self.system.entries.delete(spec, list(self.system.entries.members(spec)))
        elif choice == 2:
            self.system.chains["IPv4"].load("*nat\n:PX-PORTS - [0:0]\n-D OUTPUT -j PX-PORTS\nCOMMIT\n")
        else:
            self.system.routes.parts.pop()
        assert self.backend.proxycore_backend_verify(True).drift
        self.send({}, whole=True)
        assert self.backend.proxycore_backend_verify(True).drift == ()

    # -- what always holds --

    def check(self):
        fresh = FakeSystem()
        fresh.chains["IPv4"].load("*mangle\n-A PREROUTING -j SOMEBODYS\nCOMMIT\n")
        backend = IpvsBackend(open_system=fresh.open, clock=lambda: self.now)
        backend.proxycore_backend_start(context(self.facts))
        backend.proxycore_backend_apply(full(*self.wanted.values(), facts=self.facts))
        found, expected = meaning(self.system, classes_of(self.system)), meaning(fresh, classes_of(fresh))
        differing = {
            key: (found[0].get(key, "gone"), expected[0].get(key, "gone"))
            for key in found[0].keys() | expected[0].keys()
            if found[0].get(key, "gone") != expected[0].get(key, "gone")
        }
        assert differing == {}
        assert found[1] == expected[1]
        served = [line for tables in self.system.chains.values() for line in tables.lines()]
        assert "-A PREROUTING -j SOMEBODYS" in served


STEPS = (
    *[History.change] * 8,
    History.facts_change,
    History.restart,
    *[History.connections] * 3,
    *[History.time_passes] * 4,
    History.one_is_refused,
    History.no_answer,
    History.foreign_hand,
)


@pytest.mark.parametrize("seed", range(5))
def test_any_history(seed):
    history = History(seed)
    for number in range(200):
        step = history.chance.choice(STEPS)
        step(history)
        try:
            history.check()
        except AssertionError as error:
            raise AssertionError(f"step {number}: {step.__name__}") from error
    history.now += 10000.0
    history.backend.proxycore_backend_verify(True)
    history.send(dict.fromkeys(NAMES))
    for _ in range(3):
        history.now += 10000.0
        assert history.backend.proxycore_backend_verify(True).drift == ()
    assert history.system.servers.servers() == []
