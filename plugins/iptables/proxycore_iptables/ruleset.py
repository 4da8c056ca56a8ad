"""One family's rules: what should be there, and what is known to be there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from proxycore.api import Family, HostState, ServicePortName, ServiceState
from proxycore.kubechains import KEPT_MARKERS, is_jump, is_kube_proxys, target_of

from .dispatch import Shared
from .frame import FORWARD
from .listing import Listing
from .normal import normal
from .program import Present, Section
from .render import render
from .rules import (
    MARKER,
    SERVICES,
    SHARED,
    Entry,
    Frame,
    Jump,
    Place,
    Rule,
    Rules,
    ServiceRules,
    TableName,
    mark,
)
from .shape import Features, Options, Shape, shape_of

GUARDED = Place("filter", "KUBE-FIREWALL")
"""The kubelet's chain as well: our rule is put into it, and the others stay."""
KEPT_WHOLE = frozenset({GUARDED.chain, FORWARD.chain})
"""Chains whose rules are wanted from every reading."""
ALL_TABLES: tuple[TableName, ...] = ("filter", "mangle", "nat")

States = dict[ServicePortName, ServiceState]


class Ruleset:
    """What this backend remembers of one family.

    `states`: what is in force.  `present`: marks of the chains in the kernel, ours and kube-proxy's, by table.  `used`: our
    chains that rules of others lead to.  `doubtful`: `present` may be wrong, and the kernel is to be read first.
    `unsettled`: it was read, and what was found has not been compared with what should be.
    """

    def __init__(self, family: Family, options: Options, features: Features) -> None:
        self.family: Family = family
        self.options = options
        self._features = features
        self.states: States = {}
        self.present: Present = {table: {} for table in ALL_TABLES}
        self._leading: dict[tuple[TableName, str, Rule], Jump] = {}
        """Rules that lead to chains of ours, or may: table, chain and normal form, with their words."""
        self.has_guarded = False
        self.kept: set[str] = set()
        """Marks beside our own that were seen."""
        self.forward: Rules = ()
        """What KUBE-FORWARD holds."""
        self.used: frozenset[tuple[TableName, str]] = frozenset()
        self.doubtful = True
        self.unsettled = True
        self.shape: Shape | None = None
        self.frame = Frame({}, {}, ())
        self.shared: dict[Place, Shared] = {}
        self._comments: bool | None = None
        self._endpoints = 0
        self._same: dict[int, int] = {}
        """Marks of chains as the kernel shows them, where it writes what we mean in another way: our mark."""

    @property
    def chains(self) -> int:
        """How many chains of ours and kube-proxy's there are."""
        return sum(map(len, self.present.values())) - len(KEPT_MARKERS & self.present["nat"].keys())

    @property
    def is_marked(self) -> bool:
        """Are they proxycore's?"""
        return MARKER.chain in self.present[MARKER.table]

    # -- what should be --

    def shape_for(self, host: HostState, endpoints: int) -> Shape:
        """The shape for so many endpoints.  Comments come back only when there are much fewer than when they went."""
        limit = self.options.comments_up_to
        comments = endpoints <= (limit // 2 if self._comments is False else limit)
        return shape_of(host, self.family, self.options, self._features, comments=comments)

    def endpoints_after(self, changes: Mapping[ServicePortName, ServiceState | None], full: bool) -> int:
        """How many endpoints there will be."""
        known = 0 if full else self._endpoints
        for name, state in changes.items():
            known += count(state) - (0 if full else count(self.states.get(name)))
        return known

    def new_shared(self, framed: Frame) -> dict[Place, Shared]:
        """Empty shared chains with their tails."""
        return {
            place: Shared(
                place, framed.tails.get(place, ()), self.options.tree_from if place == SERVICES else None
            )
            for place in SHARED
        }

    def accept(
        self, states: States, shape: Shape, framed: Frame, shared: dict[Place, Shared], endpoints: int
    ) -> None:
        """A batch is in force."""
        self.states = states
        self.shape, self.frame, self.shared = shape, framed, shared
        self.forward = framed.chains[FORWARD]
        self._comments = shape.comments
        self._endpoints = endpoints

    def fixed(self, framed: Frame) -> dict[Place, Rules]:
        """Chains that are there once and are wholly ours."""
        found = {place: rules for place, rules in framed.chains.items() if place != GUARDED}
        return found | {Place("nat", chain): () for chain in self.kept}

    def rules_of(self, name: ServicePortName) -> ServiceRules:
        """What is in force of a Service port."""
        state = self.states.get(name)
        return NOTHING if state is None or self.shape is None else render(state, self.shape)

    def wanted_chains(self) -> dict[tuple[TableName, str], Rules]:
        """Every chain that should be there, the Services' own excepted."""
        found = {(place.table, place.chain): rules for place, rules in self.fixed(self.frame).items()}
        for place, shared in self.shared.items():
            found.update({(place.table, name): rules for name, rules in shared.chains().items()})
        return found

    def wanted_marks(self) -> Present:
        """Marks of everything that should be there; costs as much as rendering all Services."""
        found: Present = {table: {} for table in ALL_TABLES}
        for (table, chain), rules in self.wanted_chains().items():
            found[table][chain] = mark(rules)
        for name in self.states:
            for chain, rules in self.rules_of(name).chains.items():
                found["nat"][chain] = mark(rules)
        return found

    def owners(self) -> tuple[dict[str, ServicePortName], dict[Rule, ServicePortName]]:
        """Whose each chain of the nat table is, and each rule in shared chains; costs as much as rendering all Services."""
        chains: dict[str, ServicePortName] = {}
        rules: dict[Rule, ServicePortName] = {}
        for name in self.states:
            found = self.rules_of(name)
            chains.update(dict.fromkeys(found.chains, name))
            for entries in found.entries.values():
                rules.update({entry.rule: name for entry in entries})
        return chains, rules

    # -- what is there --

    def learn(self, listing: Listing) -> None:
        """Take a listing for the truth."""
        for table in ALL_TABLES:
            marks = listing.table(table).marks
            self.present[table] = {name: self._same.get(shown, shown) for name, shown in marks.items()}
        self.has_guarded = self.present[GUARDED.table].pop(GUARDED.chain, None) is not None
        # Whoever made them wants them back when somebody has flushed the table.
        self.kept |= KEPT_MARKERS & self.present["nat"].keys()
        used = {(table, chain) for table in ALL_TABLES for chain in listing.table(table).users}
        self._leading = {}
        for table in ALL_TABLES:
            for chain, rules in listing.table(table).built_in.items():
                for rule in rules:
                    target = (target_of(f"-A {chain} {rule}") or "") if "KUBE-" in rule else ""
                    if target == GUARDED.chain or (is_jump(chain, target) and is_plain(rule, target)):
                        self.put((Jump(table, chain, rule),))
                    elif is_kube_proxys(table, target):
                        # Somebody else's rule, such as one that marks packets for masquerading.
                        used.add((table, target))
        self.used = frozenset(used)
        self.forward = listing.table(FORWARD.table).rules.get(FORWARD.chain, ())
        guards = listing.table(GUARDED.table).rules.get(GUARDED.chain, ())
        self.put(Jump(GUARDED.table, GUARDED.chain, rule) for rule in guards)
        self.doubtful = False
        self.unsettled = True

    def has(self, jump: Jump) -> bool:
        """Is this rule there, in whatever words?"""
        return _key(jump) in self._leading

    def missing(self, framed: Frame) -> list[Jump]:
        """Rules that lead to us and are not there, in the order in which they are put there."""
        return [jump for jump in ensured_rules(framed) if not self.has(jump)]

    def stale(self, framed: Frame) -> list[Jump]:
        """Rules of built-in chains that lead to chains of ours or kube-proxy's where nothing is wanted any more."""
        wanted = {_key(jump) for jump in ensured_rules(framed)}
        return [
            jump
            for key, jump in self._leading.items()
            if key not in wanted and is_jump(jump.chain, target_of(f"-A {jump.chain} {jump.rule}") or "")
        ]

    def took(self, section: Section) -> None:
        """A section is in force."""
        present = self.present[section.table]
        for chain, after in section.marks.items():
            if after is None:
                present.pop(chain, None)
            else:
                present[chain] = after
        for jump in section.dropped:
            self._leading.pop(_key(jump), None)
        self.put(section.ensured)
        self.has_guarded = self.has_guarded or any((j.table, j.chain) == GUARDED for j in section.ensured)

    def put(self, jumps: Iterable[Jump]) -> None:
        """These are there now."""
        self._leading.update({_key(jump): jump for jump in jumps})

    def take_for_same(self, shown: int, meant: int) -> None:
        """The kernel shows a chain with that mark where ours is meant."""
        self._same[shown] = meant


NOTHING = ServiceRules({}, {})


_OF_JUMPS = re.compile(r'-m comment --comment (?:"[^"]*"|\S+) |-m conntrack --ctstate NEW ')


def is_plain(rule: Rule, target: str) -> bool:
    """Does a rule send everything, or every new connection, to a chain, as kube-proxy's jumps do?"""
    return _OF_JUMPS.sub("", rule) == f"-j {target}"


def _key(jump: Jump) -> tuple[TableName, str, Rule]:
    return jump.table, jump.chain, normal(jump.rule)


def count(state: ServiceState | None) -> int:
    """Endpoints of a Service port that have rules."""
    if state is None:
        return 0
    return max(len(pool.endpoints) if pool else 0 for pool in (state.cluster, state.local))


def ensured_rules(framed: Frame) -> tuple[Jump, ...]:
    """Rules in chains that are not ours alone, in the order in which they are put there."""
    guard = framed.chains.get(GUARDED, ())
    return (*(Jump(GUARDED.table, GUARDED.chain, rule) for rule in guard), *framed.jumps)


def entries_of(rules: Iterable[ServiceRules]) -> dict[Place, list[Entry]]:
    """Entries of many Service ports by shared chain."""
    found: dict[Place, list[Entry]] = {}
    for item in rules:
        for place, entries in item.entries.items():
            found.setdefault(place, []).extend(entries)
    return found


def shown(table: str, chain: str) -> bool:
    """Is a chain one whose content is wanted of a listing?"""
    return is_kube_proxys(table, chain) or (table, chain) == GUARDED
