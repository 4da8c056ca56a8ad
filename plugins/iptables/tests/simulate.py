"""What rules of iptables do to one packet: an interpreter of what `iptables-save` prints.

Only matches and targets that the backend uses are known; others raise Unknown, so that nothing is passed over.  Chance
(`-m statistic`) is not rolled: all that may come of a packet is returned, each with its probability.

    came in:   nat PREROUTING -> filter INPUT (for the node) | filter FORWARD -> nat POSTROUTING
    node's:    nat OUTPUT -> filter OUTPUT -> nat POSTROUTING (-> filter INPUT, for the node itself)
"""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Literal, NamedTuple

Verdict = Literal["accept", "drop", "reject"]
Ends = dict["Outcome", Fraction]
NESTED = 16
"""So many jumps may be nested in nf_tables."""
CHANCE_STEPS = 1 << 31


class Unknown(ValueError):
    """A rule uses what this interpreter does not know."""


@dataclass(frozen=True, slots=True, eq=False)
class Packet:
    """The first packet of a connection, unless `state` says otherwise.

    `interface`: by which it came in; None: the node sends it.
    """

    source: str
    destination: str
    port: int
    protocol: str = "tcp"
    interface: str | None = None
    state: Literal["NEW", "ESTABLISHED", "RELATED", "INVALID"] = "NEW"


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """What rules look at besides the packet.

    `local`: addresses of the node, loopback not among them.  `recent`: seconds since a source address was put into a list, by
    the list's name.
    """

    local: frozenset[str] = frozenset()
    recent: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def is_local(self, address: str) -> bool:
        return address in self.local or _address(address).is_loopback


@cache
def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(text)


class Outcome(NamedTuple):
    """What became of a packet.

    `address` and `port`: its destination when that was decided.  `remembered`: the lists into which its source was put.
    """

    verdict: Verdict
    address: str
    port: int
    translated: bool = False
    masqueraded: bool = False
    remembered: frozenset[str] = frozenset()


class _Seen(NamedTuple):
    """The packet on its way."""

    packet: Packet
    world: World
    address: str
    port: int
    mark: int = 0
    translated: bool = False
    masqueraded: bool = False
    remembered: frozenset[str] = frozenset()
    interface: str | None = None

    def end(self, verdict: Verdict) -> Outcome:
        return Outcome(
            verdict, self.address, self.port, self.translated, self.masqueraded, frozenset(self.remembered)
        )


Branches = dict[_Seen, Fraction]
Test = Callable[[_Seen], bool]


class Rule(NamedTuple):
    """`chance`: of matching when all tests hold.  `remember`: the list that it puts the source into when it matches."""

    tests: tuple[Test, ...]
    chance: Fraction
    remember: str | None
    target: str | None
    goto: bool
    options: Mapping[str, str]


class Chain(NamedTuple):
    """`policy` is None for one that is not built in."""

    policy: Verdict | None
    rules: list[Rule]


@dataclass(slots=True)
class Ruleset:
    """Chains by table."""

    tables: dict[str, dict[str, Chain]]

    def unreachable(self, table: str) -> set[str]:
        """Chains that no packet can come to."""
        chains = self.tables.get(table, {})
        found = {name for name, chain in chains.items() if chain.policy is not None}
        waiting = list(found)
        while waiting:
            for rule in chains[waiting.pop()].rules:
                if rule.target in chains and rule.target not in found:
                    found.add(rule.target)
                    waiting.append(rule.target)
        return chains.keys() - found


# -- reading --


def parse(text: str) -> Ruleset:
    """Rules from what `iptables-save` prints.  Raises Unknown, or ValueError for what no kernel would take."""
    tables: dict[str, dict[str, Chain]] = {}
    chains: dict[str, Chain] = {}
    for line in text.splitlines():
        if line.startswith("*"):
            chains = tables.setdefault(line[1:], {})
        elif line.startswith(":"):
            name, policy, *_ = line[1:].split()
            if name in chains:
                raise ValueError(f"chain {name} is declared twice")
            chains[name] = Chain(None if policy == "-" else _POLICIES[policy], [])
        elif line.startswith("-A "):
            _, name, *words = shlex.split(line)
            try:
                chains[name].rules.append(_rule(words))
            except Unknown as error:
                raise Unknown(f"{error}: {line}") from None
        elif line and not line.startswith(("#", "COMMIT")):
            raise Unknown(line)
    for known in tables.values():
        for chain in known.values():
            for rule in chain.rules:
                if rule.target is not None and rule.target not in known and rule.target not in _TARGETS:
                    raise ValueError(f"there is no chain {rule.target}")
    return Ruleset(tables)


_POLICIES: dict[str, Verdict] = {"ACCEPT": "accept", "DROP": "drop"}
_TARGETS = {"ACCEPT", "DROP", "RETURN", "REJECT", "MARK", "DNAT", "MASQUERADE"}
_MATCHES = {"comment", "tcp", "udp", "sctp", "addrtype", "conntrack", "mark", "statistic", "recent", "nfacct"}
_SILENT = {"--comment", "--nfacct-name", "--reject-with", "--mode"}
"""Options that change nothing here; each with a value."""


def _rule(words: list[str]) -> Rule:
    """Raises Unknown."""
    tests: list[Test] = []
    chance = Fraction(1)
    remember: str | None = None
    target: str | None = None
    goto = False
    options: dict[str, str] = {}
    recent: dict[str, str] = {}
    left = iter(words)
    for word in left:
        negated = word == "!"
        option = next(left) if negated else word
        if option in ("-j", "-g"):
            target, goto = next(left), option == "-g"
        elif option == "-m":
            if (match := next(left)) not in _MATCHES:
                raise Unknown(f"match {match}")
        elif option in _TESTS:
            test = _TESTS[option](next(left))
            tests.append((lambda seen, test=test: not test(seen)) if negated else test)
        elif option in ("--rcheck", "--set", "--reap", "--rsource"):
            recent[option] = ""
        elif option in ("--seconds", "--name", "--mask"):
            recent[option] = next(left)
        elif option == "--probability":
            chance = Fraction(round(Fraction(next(left)) * CHANCE_STEPS), CHANCE_STEPS)
        elif option in ("--set-xmark", "--to-destination"):
            options[option] = next(left)
        elif option == "--random-fully":
            options[option] = ""
        elif option in _SILENT and not negated:
            value = next(left)
            if option == "--mode" and value != "random":
                raise Unknown(f"mode {value}")
        else:
            raise Unknown(option)
    if recent:
        remember = _recent(recent, tests)
    return Rule(tuple(tests), chance, remember, target, goto, options)


def _recent(given: Mapping[str, str], tests: list[Test]) -> str | None:
    """Adds the test; returns the list to put the source into."""
    name = given["--name"]
    if given.get("--mask") not in ("255.255.255.255", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"):
        raise Unknown("recent without the mask of a whole address")
    if "--rsource" not in given or ("--set" in given) == ("--rcheck" in given):
        raise Unknown("recent")
    if "--set" in given:
        return name
    seconds = float(given.get("--seconds", "inf"))

    def known(seen: _Seen) -> bool:
        age = seen.world.recent.get(name, {}).get(seen.packet.source)
        return age is not None and age <= seconds

    tests.append(known)
    return None


def _in_network(of: Callable[[_Seen], str]) -> Callable[[str], Test]:
    def made(text: str) -> Test:
        network = ipaddress.ip_network(text)
        return lambda seen: _address(of(seen)) in network

    return made


def _interface(name: str) -> Test:
    if name.endswith("+"):
        return lambda seen: seen.interface is not None and seen.interface.startswith(name[:-1])
    return lambda seen: seen.interface == name


def _ports(text: str) -> Test:
    first, _, last = text.partition(":")
    allowed = range(int(first), int(last or first) + 1)
    return lambda seen: seen.port in allowed


def _addrtype(of: Callable[[_Seen], str]) -> Callable[[str], Test]:
    def made(kind: str) -> Test:
        if kind != "LOCAL":
            raise Unknown(f"address type {kind}")
        return lambda seen: seen.world.is_local(of(seen))

    return made


def _conntrack(text: str) -> Test:
    states = set(text.split(","))
    if states - {"NEW", "ESTABLISHED", "RELATED", "INVALID", "DNAT"}:
        raise Unknown(f"state {text}")
    return lambda seen: seen.packet.state in states or ("DNAT" in states and seen.translated)


def _value_and_mask(text: str) -> tuple[int, int]:
    value, _, mask = text.partition("/")
    return int(value, 0), int(mask, 0) if mask else 0xFFFFFFFF


def _mark(text: str) -> Test:
    value, mask = _value_and_mask(text)
    return lambda seen: seen.mark & mask == value


def _protocol(name: str) -> Test:
    if name not in ("tcp", "udp", "sctp"):
        raise Unknown(f"protocol {name}")
    return lambda seen: seen.packet.protocol == name


_TESTS: dict[str, Callable[[str], Test]] = {
    "-s": _in_network(lambda seen: seen.packet.source),
    "-d": _in_network(lambda seen: seen.address),
    "-i": _interface,
    "-p": _protocol,
    "--dport": _ports,
    "--src-type": _addrtype(lambda seen: seen.packet.source),
    "--dst-type": _addrtype(lambda seen: seen.address),
    "--ctstate": _conntrack,
    "--mark": _mark,
}


# -- walking --


class _Walk:
    """One packet on its way through a ruleset; `ended` gathers what came of it."""

    def __init__(self, ruleset: Ruleset) -> None:
        self._tables = ruleset.tables
        self.ended: Ends = {}

    def hook(self, table: str, name: str, branches: Branches) -> Branches:
        """Those that go on after a built-in chain."""
        chain = self._tables.get(table, {}).get(name)
        if chain is None:
            return branches
        accepted, back = self._chain(table, chain, branches, 0)
        if chain.policy == "drop":
            self._end(back, "drop")
            return accepted
        return _sum(accepted, back)

    def _chain(self, table: str, chain: Chain, branches: Branches, depth: int) -> tuple[Branches, Branches]:
        """Those that were accepted in it or below, and those that come back from it."""
        if depth > NESTED:
            raise ValueError("jumps are nested too deeply")
        accepted: Branches = {}
        back: Branches = {}
        here = branches
        for rule in chain.rules:
            matching: Branches = {}
            others: Branches = {}
            for seen, weight in here.items():
                if not all(test(seen) for test in rule.tests):
                    _add(others, seen, weight)
                    continue
                if rule.chance < 1:
                    _add(others, seen, weight * (1 - rule.chance))
                if rule.remember:
                    known = seen._replace(remembered=seen.remembered | {rule.remember})
                    _add(matching, known, weight * rule.chance)
                else:
                    _add(matching, seen, weight * rule.chance)
            if not matching:
                continue
            through, came_back, stay = self._target(table, rule, matching, depth)
            accepted, back = _sum(accepted, through), _sum(back, came_back)
            here = _sum(others, stay)
            if not here:
                break
        return accepted, _sum(back, here)

    def _target(
        self, table: str, rule: Rule, branches: Branches, depth: int
    ) -> tuple[Branches, Branches, Branches]:
        """Accepted, back to the chain above, and on to the next rule."""
        if rule.target is None:
            return {}, {}, branches
        if rule.target in self._tables[table]:
            below = self._tables[table][rule.target]
            accepted, back = self._chain(table, below, branches, depth + 1)
            return (accepted, back, {}) if rule.goto else (accepted, {}, back)
        if rule.target == "ACCEPT":
            return branches, {}, {}
        if rule.target == "RETURN":
            return {}, branches, {}
        if rule.target in ("DROP", "REJECT"):
            if table == "nat":
                raise Unknown(f"{rule.target} in nat")
            self._end(branches, "drop" if rule.target == "DROP" else "reject")
            return {}, {}, {}
        if rule.target == "MARK":
            value, mask = _value_and_mask(rule.options["--set-xmark"])
            return {}, {}, _each(branches, lambda seen: seen._replace(mark=seen.mark & ~mask ^ value))
        if rule.target == "DNAT":
            address, _, port = rule.options["--to-destination"].rpartition(":")
            address = address.strip("[]")
            done = _each(
                branches, lambda seen: seen._replace(address=address, port=int(port), translated=True)
            )
            return done, {}, {}
        return _each(branches, lambda seen: seen._replace(masqueraded=True)), {}, {}

    def _end(self, branches: Branches, verdict: Verdict) -> None:
        for seen, weight in branches.items():
            end = seen.end(verdict)
            self.ended[end] = self.ended.get(end, Fraction(0)) + weight

    def accept(self, branches: Branches) -> None:
        self._end(branches, "accept")


def _add(branches: Branches, seen: _Seen, weight: Fraction) -> None:
    branches[seen] = branches.get(seen, Fraction(0)) + weight


def _sum(one: Branches, other: Branches) -> Branches:
    if not one or not other:
        return one or other
    result = dict(one)
    for seen, weight in other.items():
        _add(result, seen, weight)
    return result


def _each(branches: Branches, change: Callable[[_Seen], _Seen]) -> Branches:
    result: Branches = {}
    for seen, weight in branches.items():
        _add(result, change(seen), weight)
    return result


def _split(branches: Branches, test: Test) -> tuple[Branches, Branches]:
    yes = {seen: weight for seen, weight in branches.items() if test(seen)}
    return yes, {seen: weight for seen, weight in branches.items() if seen not in yes}


def simulate(ruleset: Ruleset, packet: Packet, world: World) -> Ends:
    """All that may become of a packet, with probabilities that sum up to 1."""
    _refuse_others(ruleset)
    walk = _Walk(ruleset)
    is_new = packet.state == "NEW"
    start = _Seen(packet, world, packet.destination, packet.port, interface=packet.interface)
    live: Branches = {start: Fraction(1)}

    def is_local(seen: _Seen) -> bool:
        return world.is_local(seen.address)

    if packet.interface is None:
        if is_new:
            live = walk.hook("nat", "OUTPUT", live)
        live = walk.hook("filter", "OUTPUT", live)
        if is_new:
            live = walk.hook("nat", "POSTROUTING", live)
        inwards, outwards = _split(live, is_local)
        arrived = _each(inwards, lambda seen: seen._replace(interface="lo"))
        walk.accept(_each(walk.hook("filter", "INPUT", arrived), lambda seen: seen._replace(interface=None)))
        walk.accept(outwards)
        return walk.ended
    if is_new:
        live = walk.hook("nat", "PREROUTING", live)
    inwards, through = _split(live, is_local)
    walk.accept(walk.hook("filter", "INPUT", inwards))
    through = walk.hook("filter", "FORWARD", through)
    if is_new:
        through = _each(through, lambda seen: seen._replace(interface=None))
        through = walk.hook("nat", "POSTROUTING", through)
    walk.accept(through)
    return walk.ended


def _refuse_others(ruleset: Ruleset) -> None:
    """Raises Unknown for rules at hooks that are not looked at."""
    for table, chain in _passed_over(ruleset):
        if chain.rules or chain.policy == "drop":
            raise Unknown(f"rules in {table}")


def _passed_over(ruleset: Ruleset) -> Iterator[tuple[str, Chain]]:
    for table, chains in ruleset.tables.items():
        for name, chain in chains.items():
            if chain.policy is not None and (
                table not in ("nat", "filter") or (table, name) == ("nat", "INPUT")
            ):
                yield table, chain
