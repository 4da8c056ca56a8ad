"""What rules say about a Service port: its rules in the kernel, and how often they were met.

A rule of the nat table is met once for each connection.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping

from proxycore.api import Counters, Family, KernelObject, ServicePortName

from .live import Live
from .reader import Counts
from .rules import NODE_PORTS, SERVICES, Entry, Place, Rule, Rules
from .ruleset import Ruleset

_DNAT = "--to-destination "
_Seen = dict[tuple[Family, str, Rule], tuple[int, int]]
"""By rule: what it counted before its chain was last rewritten, and its count of last time."""


class Totals:
    """Connections since the start: a rule's own counter begins anew when its chain is rewritten."""

    def __init__(self) -> None:
        self._seen: _Seen = {}

    def read(self, ruleset: Ruleset, live: Live) -> Iterator[Counters]:
        """Counters of every Service port of a family.  Raises KernelError."""
        counted = _Counted(live.counters())
        frontends: dict[Rule, tuple[ServicePortName, str]] = {}
        by_endpoint: dict[ServicePortName, dict[str, int]] = {}
        by_frontend: dict[ServicePortName, dict[str, int]] = {}
        fresh: _Seen = {}
        for name in ruleset.states:
            rules = ruleset.rules_of(name)
            by_endpoint[name], by_frontend[name] = {}, {}
            for chain, own in rules.chains.items():
                if _DNAT in own[-1]:
                    endpoint = own[-1].rpartition(_DNAT)[2].partition(" ")[0]
                    packets = counted.of(chain, own)[own[-1]]
                    _add(
                        by_endpoint[name],
                        endpoint,
                        self._total(ruleset.family, chain, own[-1], packets, fresh),
                    )
            for place in (SERVICES, NODE_PORTS):
                for entry in rules.entries.get(place, ()):
                    frontends[entry.rule] = name, _frontend(entry)
        for place in (SERVICES, NODE_PORTS):
            for chain, shared in ruleset.shared[place].chains().items() if frontends else ():
                for rule, packets in counted.of(chain, shared).items():
                    if known := frontends.get(rule):
                        total = self._total(ruleset.family, "", rule, packets, fresh)
                        _add(by_frontend[known[0]], known[1], total)
        self._seen = {key: value for key, value in self._seen.items() if key[0] != ruleset.family} | fresh
        for name in ruleset.states:
            yield Counters(
                name=name,
                connections=sum(by_endpoint[name].values()),
                by_frontend=by_frontend[name],
                by_endpoint=by_endpoint[name],
            )

    def _total(self, family: Family, chain: str, rule: Rule, packets: int, fresh: _Seen) -> int:
        base, last = self._seen.get((family, chain, rule), (0, 0))
        if packets < last:
            base += last
        fresh[family, chain, rule] = base, packets
        return base + packets


class _Counted:
    """Packets by the rules that should be there; none where a chain is not as it should be."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def of(self, chain: str, rules: Rules) -> Mapping[Rule, int]:
        counts = self._counts.get(("nat", chain), ())
        if len(counts) != len(rules):
            return dict.fromkeys(rules, 0)
        return {rule: count.packets for rule, count in zip(rules, counts, strict=True)}


def _add(totals: dict[str, int], key: str, more: int) -> None:
    totals[key] = totals.get(key, 0) + more


def _frontend(entry: Entry) -> str:
    """As a Frontend is printed."""
    if not entry.address:
        return f"*:{entry.port}/{entry.protocol}"
    address = ipaddress.ip_address(entry.address)
    host = f"[{address}]" if address.version == 6 else str(address)
    return f"{host}:{entry.port}/{entry.protocol}"


def inspect(ruleset: Ruleset, live: Live, name: ServicePortName) -> tuple[KernelObject, ...]:
    """Rules of one Service port as they are in the kernel: its entries in shared chains, then its own chains."""
    rules = ruleset.rules_of(name)
    wanted = {entry.rule for entries in rules.entries.values() for entry in entries}
    roots = [root for place in rules.entries for root in _with_nodes(ruleset, place, wanted)]
    own = [Place("nat", chain) for chain in reversed(list(rules.chains))]
    there = live.rules([*roots, *own])
    objects: list[KernelObject] = []
    for root in roots:
        objects += _shown(live, root, (rule for rule in there.get(root, ()) if rule in wanted))
    for place in own:
        objects += _shown(live, place, there.get(place, ()))
    return tuple(objects)


def _with_nodes(ruleset: Ruleset, place: Place, wanted: set[Rule]) -> Iterator[Place]:
    """Chains of a shared chain that should hold one of these rules."""
    for chain, rules in ruleset.shared[place].chains().items():
        if not wanted.isdisjoint(rules):
            yield Place(place.table, chain)


def _shown(live: Live, place: Place, rules: Iterable[Rule]) -> list[KernelObject]:
    where = f"{live.name} {place.table} {place.chain}"
    return [KernelObject(kind="rule", place=where, native=f"-A {place.chain} {rule}") for rule in rules]
