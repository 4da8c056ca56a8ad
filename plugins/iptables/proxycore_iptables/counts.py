"""What rules say about a Service port: its rules in the kernel, and how often they were met.

A rule of the nat table is met once for each connection.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from proxycore.api import Counters, Family, KernelObject, ServicePortName

from .listing import Counted
from .live import Live
from .names import is_service_chain
from .rules import NODE_PORTS, SERVICES, Entry, Place, Rule
from .ruleset import Ruleset

_DNAT = "--to-destination "
_ROOTS = frozenset({SERVICES.chain, NODE_PORTS.chain})


class Totals:
    """Connections since the start: a rule's own counter begins anew when its chain is rewritten."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Family, str, Rule], tuple[int, int]] = {}

    def read(self, ruleset: Ruleset, live: Live) -> Iterator[Counters]:
        """Counters of every Service port of a family.  Raises KernelError."""
        found = live.counters(lambda table, chain: chain in _ROOTS or is_service_chain(chain))
        owners = ruleset.owners()
        frontends: dict[Rule, tuple[ServicePortName, str]] = {}
        for name in ruleset.states:
            for place in (SERVICES, NODE_PORTS):
                for entry in ruleset.rules_of(name).entries.get(place, ()):
                    frontends[entry.rule] = name, _frontend(entry)
        by_frontend: dict[ServicePortName, dict[str, int]] = {name: {} for name in ruleset.states}
        by_endpoint: dict[ServicePortName, dict[str, int]] = {name: {} for name in ruleset.states}
        fresh: dict[tuple[Family, str, Rule], tuple[int, int]] = {}
        for item in found:
            owner = owners.get(item.chain)
            if owner is not None and _DNAT in item.rule:
                total = self._total(ruleset.family, item, fresh)
                endpoint = item.rule.rpartition(_DNAT)[2].partition(" ")[0]
                _add(by_endpoint[owner], endpoint, total)
            elif owner is None and (known := frontends.get(item.rule)):
                _add(by_frontend[known[0]], known[1], self._total(ruleset.family, item, fresh))
        self._seen = {key: value for key, value in self._seen.items() if key[0] != ruleset.family} | fresh
        for name in ruleset.states:
            yield Counters(
                name=name,
                connections=sum(by_endpoint[name].values()),
                by_frontend=by_frontend[name],
                by_endpoint=by_endpoint[name],
            )

    def _total(
        self, family: Family, item: Counted, fresh: dict[tuple[Family, str, Rule], tuple[int, int]]
    ) -> int:
        key = family, item.chain if _DNAT in item.rule else "", item.rule
        base, last = self._seen.get(key, (0, 0))
        if item.packets < last:
            base += last
        fresh[key] = base, item.packets
        return base + item.packets


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
