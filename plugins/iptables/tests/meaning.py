"""What rules mean, found by sending packets through them, and what resolved Services should come to, to be held against it.

Names of chains, their order and their number do not show; what each kind of client gets at each frontend does.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from proxycore.api import (
    Family,
    Frontend,
    HostState,
    LocalPodsByCIDR,
    LocalPodsByInterface,
    Pool,
    Route,
    ServiceState,
    WhenEmpty,
)

from .simulate import Ends, Outcome, Packet, Ruleset, World, parse, simulate

Result = tuple[object, ...]
"""`("reject",)`, `("drop",)`, `("untouched",)`, or `("to", address, port, masqueraded)`."""
Chances = dict[Result, Fraction]
Meaning = dict[str, object]

UNTOUCHED: Result = ("untouched",)
EXEMPT = frozenset({"KUBE-MARK-MASQ", "KUBE-SVC-PROXYCORE", "KUBE-PROXY-CANARY"})
"""Chains to which nothing need lead."""
LARGEST_DENOMINATOR = 10_000
"""Of a chance: those of the kernel are this exact, so that what was meant can be told."""
OTHER_PORT = 9
LOOPBACK = "127.0.0.1"


class Client(NamedTuple):
    """One who dials.  `interface`: by which its packets come in; None: it is on the node itself."""

    what: str
    source: str
    interface: str | None


class Probe(NamedTuple):
    """A packet to send; `after`: a connection of the same client that was made `age` seconds before.

    `walled`: with a policy that lets nothing into the node.
    """

    packet: Packet
    client: Client
    after: Packet | None = None
    age: float = 0.0
    walled: bool = False

    def __str__(self) -> str:
        after = self.after and f" {self.age:g} s after {self.after.destination} {self.after.port}"
        walled = " through a wall" if self.walled else ""
        packet = self.packet
        return f"{self.client.what} {packet.source} -> {packet.destination} {packet.port}/{packet.protocol}{after or ''}{walled}"


# -- who dials what --


def world_of(host: HostState) -> World:
    """The node's addresses."""
    addresses = {*host.node_addresses, *host.node_ips}
    for ports in (host.node_ports_ipv4, host.node_ports_ipv6):
        addresses.update(ports.addresses)
    return World(frozenset(addresses))


def _pod_interface(host: HostState) -> str:
    detect = host.detect_local
    if isinstance(detect, LocalPodsByInterface):
        return f"{detect.name}7" if detect.prefix else detect.name
    return "pods0"


def clients_of(state: ServiceState, host: HostState) -> list[Client]:
    """One of each kind, the Service's endpoints, and one out of each of its source ranges."""
    v4 = state.name.family == "IPv4"
    inside = _pod_interface(host)
    found = [
        Client("pod", "10.0.0.2" if v4 else "fd00:10::2", inside),
        Client("outside", "203.0.113.2" if v4 else "2600:5200::1", "eth0"),
        Client("pod elsewhere", "10.9.9.9" if v4 else "fd00:10::9999", "eth0"),
    ]
    found += [Client("node", ip, None) for ip in host.node_ips if (":" in ip) != v4][:1]
    for pool in (state.cluster, state.local):
        ends = pool.endpoints if pool is not None else ()
        for end in (*ends[:2], *ends[2:][-1:]):
            interface = inside if end.is_local or end.node is None else "eth0"
            found.append(Client("endpoint", end.address, interface))
    for frontend in state.frontends:
        for text in frontend.source_ranges or ():
            address = str(ipaddress.ip_network(text).broadcast_address - 1)
            found.append(Client("admitted", address, "eth0"))
    local = world_of(host).local
    return list(dict.fromkeys(c for c in found if c.interface is None or c.source not in local))


def served_addresses(frontend: Frontend, family: Family, host: HostState) -> list[str]:
    """Where a frontend answers."""
    if frontend.address is not None:
        return [frontend.address]
    ports = host.node_ports(family)
    if not ports.all_local:
        return list(ports.addresses)
    return [address for address in host.node_addresses if (":" in address) == (family == "IPv6")]


def _dialled(state: ServiceState, host: HostState) -> Iterator[tuple[str, int, str]]:
    """Addresses of its frontends, and beside them what is nobody's."""
    family = state.name.family
    everywhere = [a for a in world_of(host).local if (":" in a) == (family == "IPv6")]
    for frontend in state.frontends:
        protocol = frontend.protocol.lower()
        served = served_addresses(frontend, family, host)
        for address in served[:2]:
            yield address, frontend.port, protocol
            yield address, OTHER_PORT, protocol
            yield address, frontend.port, "udp" if protocol == "tcp" else "tcp"
        if frontend.address is None:
            for address in [a for a in sorted(everywhere) if a not in served][:1]:
                yield address, frontend.port, protocol


def _from_itself(state: ServiceState) -> Iterator[Probe]:
    """The node dials its own loopback address."""
    client = Client("localhost", LOOPBACK, None)
    for frontend in state.frontends:
        if frontend.address is None and state.name.family == "IPv4":
            for port in (frontend.port, OTHER_PORT):
                yield Probe(Packet(LOOPBACK, LOOPBACK, port, frontend.protocol.lower()), client)


def probes_of(state: ServiceState, host: HostState) -> Iterator[Probe]:
    """Everything that is asked about one Service port."""
    yield from _from_itself(state)
    dialled = list(dict.fromkeys(_dialled(state, host)))
    for client in clients_of(state, host):
        packets = [
            Packet(client.source, address, port, protocol, client.interface)
            for address, port, protocol in dialled
        ]
        for packet in packets:
            yield Probe(packet, client)
        if state.affinity_seconds is None:
            continue
        mine = [packet for packet in packets if packet.port != OTHER_PORT]
        for first, second in itertools.pairwise([*mine, *mine[:1]]):
            for age in (0, state.affinity_seconds, state.affinity_seconds + 1):
                yield Probe(second, client, first, age)
                yield Probe(first, client, first, age)
    if state.health_check_node_port is not None:
        client = clients_of(state, host)[1]
        for address in sorted(world_of(host).local):
            if (":" in address) == (state.name.family == "IPv6"):
                for port in (state.health_check_node_port, OTHER_PORT):
                    yield Probe(
                        Packet(client.source, address, port, "tcp", client.interface), client, walled=True
                    )


def probes(states: Sequence[ServiceState], family: Family, host: HostState) -> list[Probe]:
    """Everything that is asked about Services of one family."""
    mine = [state for state in states if state.name.family == family]
    return list({str(probe): probe for state in mine for probe in probes_of(state, host)}.values())


# -- what should be --


class _Served(NamedTuple):
    state: ServiceState
    frontend: Frontend


class Model:
    """What Services say, ready to be looked up.  `localhost`: node ports are at the loopback address, too."""

    def __init__(
        self, states: Iterable[ServiceState], family: Family, host: HostState, localhost: bool = False
    ) -> None:
        self.host = host
        self.world = world_of(host)
        self.family = family
        self._frontends: dict[tuple[str, int, str], _Served] = {}
        self.health_ports: set[int] = set()
        states = [state for state in states if state.name.family == family]
        # An address that is named goes before a node port.
        for named in (False, True):
            for state in states:
                for frontend in state.frontends:
                    if (frontend.address is not None) == named:
                        at_loopback = [LOOPBACK] if localhost and frontend.address is None else []
                        for address in (*served_addresses(frontend, family, host), *at_loopback):
                            place = address, frontend.port, frontend.protocol.lower()
                            self._frontends[place] = _Served(state, frontend)
        for state in states:
            if state.health_check_node_port is not None:
                self.health_ports.add(state.health_check_node_port)

    def answer(self, probe: Probe) -> object:
        if probe.walled:
            return {UNTOUCHED if probe.packet.port in self.health_ports else ("drop",): Fraction(1)}
        if probe.after is None:
            return self._chances(probe.packet)
        return {first: self._again(first, probe) for first in self._chances(probe.after) if first[0] == "to"}

    def _again(self, first: Result, probe: Probe) -> Chances:
        """What the second packet gets when the first was sent to that endpoint."""
        assert probe.after is not None
        one, other = self._served(probe.after), self._served(probe.packet)
        chances = self._chances(probe.packet)
        if one is None or other is None or one.state is not other.state:
            return chances
        affinity = one.state.affinity_seconds
        if affinity is None or probe.age > affinity:
            return chances
        kept = [result for result in chances if result[1:3] == first[1:3]]
        return {kept[0]: Fraction(1)} if kept else chances

    def _served(self, packet: Packet) -> _Served | None:
        return self._frontends.get((packet.destination, packet.port, packet.protocol))

    def _route(self, packet: Packet, frontend: Frontend) -> Route:
        if self._is_local_pod(packet):
            return frontend.routes.local_pod
        return frontend.routes.node if self.world.is_local(packet.source) else frontend.routes.outside

    def _is_local_pod(self, packet: Packet) -> bool:
        detect = self.host.detect_local
        if isinstance(detect, LocalPodsByInterface):
            name = packet.interface or ""
            return name.startswith(detect.name) if detect.prefix else name == detect.name
        return isinstance(detect, LocalPodsByCIDR) and _in_any(packet.source, detect.cidrs)

    def _chances(self, packet: Packet) -> Chances:
        served = self._served(packet)
        if served is None:
            return {UNTOUCHED: Fraction(1)}
        ranges = served.frontend.source_ranges
        if ranges is not None and not _in_any(packet.source, ranges):
            return {("drop",): Fraction(1)}
        route = self._route(packet, served.frontend)
        pool = served.state.pool(route.pool) or Pool()
        total = sum(end.weight for end in pool.endpoints)
        if not total:
            return {("drop" if pool.when_empty is WhenEmpty.DROP else "reject",): Fraction(1)}
        found: Chances = {}
        for end in pool.endpoints:
            if end.weight:
                masqueraded = route.masquerade or end.address == packet.source
                # What ends on the node itself comes by no chain that could: the node answers to whom it sees anyway.
                if packet.interface is not None and self.world.is_local(end.address):
                    masqueraded = False
                result = ("to", end.address, end.port, masqueraded)
                found[result] = found.get(result, Fraction(0)) + Fraction(end.weight, total)
        return found


def _in_any(address: str, cidrs: Iterable[str]) -> bool:
    value = ipaddress.ip_address(address)
    return any(value in ipaddress.ip_network(cidr) for cidr in cidrs)


def expected(
    states: Sequence[ServiceState], family: Family, host: HostState, localhost: bool = False
) -> Meaning:
    """What the rules of one family should mean; the model alone is asked."""
    model = Model(states, family, host, localhost)
    return {str(probe): model.answer(probe) for probe in probes(states, family, host)}


# -- what is --


def _result(end: Outcome) -> Result:
    if end.verdict != "accept":
        return (end.verdict,)
    if end.translated:
        return "to", end.address, end.port, end.masqueraded
    return ("untouched, yet masqueraded",) if end.masqueraded else UNTOUCHED


def _as_meant(ends: Ends) -> Chances:
    found: Chances = {}
    for end, chance in ends.items():
        found[_result(end)] = found.get(_result(end), Fraction(0)) + chance
    return {result: chance.limit_denominator(LARGEST_DENOMINATOR) for result, chance in found.items()}


def left_over(ruleset: Ruleset) -> set[tuple[str, str]]:
    """Chains to which nothing leads."""
    return {
        (table, chain)
        for table in ruleset.tables
        for chain in ruleset.unreachable(table)
        if chain not in EXEMPT
    }


def actual(text: str, states: Sequence[ServiceState], family: Family, host: HostState) -> Meaning:
    """What rules as `iptables-save` prints them mean to all who are asked about.  Fails for chains that nothing leads to."""
    ruleset = parse(text)
    unused = left_over(ruleset)
    assert not unused, f"nothing leads to {unused}"
    walled = parse(text)
    walled.tables["filter"]["INPUT"] = walled.tables["filter"]["INPUT"]._replace(policy="drop")
    world = world_of(host)
    cache: dict[object, Ends] = {}

    def run(packet: Packet, recent: Mapping[str, Mapping[str, float]] | None = None) -> Ends:
        if recent:
            return simulate(ruleset, packet, World(world.local, recent))
        key = packet.source, packet.destination, packet.port, packet.protocol, packet.interface
        if key not in cache:
            cache[key] = simulate(ruleset, packet, world)
        return cache[key]

    def answer(probe: Probe) -> object:
        if probe.walled:
            return _as_meant(simulate(walled, probe.packet, world))
        if probe.after is None:
            return _as_meant(run(probe.packet))
        return {
            _result(first): _as_meant(run(probe.packet, _memory(first, probe)))
            for first in run(probe.after)
            if _result(first)[0] == "to"
        }

    return {str(probe): answer(probe) for probe in probes(states, family, host)}


def _memory(first: Outcome, probe: Probe) -> dict[str, dict[str, float]]:
    return {name: {probe.packet.source: probe.age} for name in first.remembered}


def difference(found: Meaning, wanted: Meaning) -> list[str]:
    """What does not agree, a line each, for people."""
    return [
        f"{probe}: {_words(found.get(probe))}, not {_words(wanted.get(probe))}"
        for probe in {**wanted, **found}
        if found.get(probe) != wanted.get(probe)
    ]


def _words(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_words(key)}: {_words(item)}" for key, item in value.items()) + "}"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def assert_means(
    text: str, states: Sequence[ServiceState], family: Family, host: HostState, localhost: bool = False
) -> None:
    """Rules mean what Services say."""
    said = difference(actual(text, states, family, host), expected(states, family, host, localhost))
    assert not said, "\n".join(said[:20])
