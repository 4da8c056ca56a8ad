"""What rules say about a Service port: its rules in the kernel, and how often they were met.

A rule of the nat table is met once for each connection.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from proxycore.api import Counters, Family, KernelObject, ServicePortName

from .live import Live
from .reader import Counts
from .rules import NODE_PORTS, SERVICES, Entry, Place, Rule, Rules
from .ruleset import Ruleset

_DNAT = "--to-destination "
_ONE_BY_ONE = 50
"""So many chains of the nft variant are sooner read one by one than with all others; legacy has no such choice."""
_Seen = tuple[int, int] | None
"""What to add to a rule's count, and its count of last time; None: the next count is where to begin."""


class Totals:
    """Connections since the start: a rule's own counter begins anew when its chain is rewritten.

    `adopted`: families whose rules were there before, and have counted: what their first reading says is taken for nothing.
    """

    def __init__(self, adopted: Collection[Family] = ()) -> None:
        self._to_begin = set(adopted)
        self._seen: dict[Family, dict[str, _Seen]] = {}

    def read(self, ruleset: Ruleset, live: Live) -> tuple[Counters, ...]:
        """Counters of every Service port of a family.  Raises KernelError: the next reading goes on where the last one was."""
        family = ruleset.family
        counts = live.counters()
        tally = _Tally(self._seen.get(family, {}), begins=family in self._to_begin)
        frontends: dict[Rule, tuple[ServicePortName, str]] = {}
        by_endpoint: dict[ServicePortName, dict[str, int]] = {}
        by_frontend: dict[ServicePortName, dict[str, int]] = {}
        for name in ruleset.states:
            rules = ruleset.rules_of(name)
            to_endpoints = by_endpoint[name] = {}
            by_frontend[name] = {}
            for chain, own in rules.chains.items():
                if _DNAT in own[-1]:
                    endpoint = own[-1].rpartition(_DNAT)[2].partition(" ")[0]
                    packets = _packets(counts, chain, own)
                    _add(to_endpoints, endpoint, tally.total(chain, packets[-1] if packets else None))
            for place in (SERVICES, NODE_PORTS):
                for entry in rules.entries.get(place, ()):
                    frontends[entry.rule] = name, _frontend(entry)
        for place in (SERVICES, NODE_PORTS) if frontends else ():
            for chain, shared in ruleset.shared[place].chains().items():
                numbers = _packets(counts, chain, shared) or (None,) * len(shared)
                for rule, number in zip(shared, numbers, strict=True):
                    if known := frontends.get(rule):
                        _add(by_frontend[known[0]], known[1], tally.total(rule, number))
        self._seen[family] = tally.fresh
        if ruleset.shape is not None:
            self._to_begin.discard(family)
        return tuple(
            Counters(
                name=name,
                connections=sum(by_endpoint[name].values()),
                by_frontend=by_frontend[name],
                by_endpoint=by_endpoint[name],
            )
            for name in ruleset.states
        )


class _Tally:
    """One reading.  `before`: what is known of the last one; `begins`: there was none, and rules have counted before."""

    def __init__(self, before: Mapping[str, _Seen], *, begins: bool) -> None:
        self._before = before
        self._begins = begins
        self.fresh: dict[str, _Seen] = {}

    def total(self, rule: str, packets: int | None) -> int:
        """Of a rule, by a name for it.  None: its chain is not as it should be; what it counted last time stays."""
        before = self._before.get(rule)
        if packets is None:
            if before is not None or rule in self._before or self._begins:
                self.fresh[rule] = before
            return sum(before or ())
        if before is None:
            base = -packets if self._begins or rule in self._before else 0
        else:
            base, last = before
            if packets < last:
                base += last
        self.fresh[rule] = base, packets
        return base + packets


def _packets(counts: Counts, chain: str, rules: Rules) -> Sequence[int]:
    """Packets that met the rules that should be there, by position; nothing if the chain is not as it should be."""
    found = counts.get(("nat", chain), ())
    return [count.packets for count in found] if len(found) == len(rules) else ()


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
    there = _rules(live, [*roots, *own])
    objects: list[KernelObject] = []
    for root in roots:
        objects += _shown(live, root, (rule for rule in there.get(root, ()) if rule in wanted))
    for place in own:
        objects += _shown(live, place, there.get(place, ()))
    return tuple(objects)


def _rules(live: Live, places: Collection[Place]) -> Mapping[Place, Rules]:
    """Rules of those of these chains that are there, as the listing has them."""
    if len(places) <= _ONE_BY_ONE:
        return {
            place: tuple(rule.replace("--nfacct-name  ", "--nfacct-name ") for rule in rules)
            for place, rules in live.rules(places).items()
        }
    listing = live.read({place.chain for place in places})
    found = {place: listing.table(place.table).rules.get(place.chain) for place in places}
    return {place: rules for place, rules in found.items() if rules is not None}


def _with_nodes(ruleset: Ruleset, place: Place, wanted: set[Rule]) -> Iterator[Place]:
    """Chains of a shared chain that should hold one of these rules."""
    for chain, rules in ruleset.shared[place].chains().items():
        if not wanted.isdisjoint(rules):
            yield Place(place.table, chain)


def _shown(live: Live, place: Place, rules: Iterable[Rule]) -> list[KernelObject]:
    where = f"{live.name} {place.table} {place.chain}"
    return [KernelObject(kind="rule", place=where, native=f"-A {place.chain} {rule}") for rule in rules]
