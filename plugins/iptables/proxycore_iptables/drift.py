"""What others have changed, told per Service port."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from proxycore.api import Drift, ServicePortName
from proxycore.kubechains import is_kube_proxys

from .listing import Listing
from .live import Live
from .normal import normal
from .rules import MARKER, Jump, Rules, TableName, mark
from .ruleset import ALL_TABLES, GUARDED, Ruleset

_SHOWN = 3


class _Found(msgspec.Struct):
    """What is wrong with one Service port: chains that are gone or changed, shared chains that lack a rule of it."""

    gone: list[str] = []
    changed: list[str] = []
    lacking: list[str] = []


def compare(ruleset: Ruleset, live: Live, listing: Listing) -> tuple[list[Drift], list[Jump]]:
    """How a listing differs from what was written; the ruleset then takes the listing for the truth.

    A chain whose rules have another text and the same meaning is none: that text is remembered.  The second part: rules that
    lead to us, if these alone are missing; once they are put back, nothing else is to be done.
    """
    if ruleset.shape is None:
        # Nothing was brought into force yet.
        ruleset.learn(listing)
        return [], []
    unsure = ruleset.unsettled or ruleset.doubtful
    expected = ruleset.wanted_marks() if unsure else {t: dict(ruleset.present[t]) for t in ALL_TABLES}
    missing_before = [] if unsure else ruleset.missing(ruleset.frame)
    ruleset.learn(listing)
    suspects = [
        (table, chain)
        for table in ALL_TABLES
        for chain, before in expected[table].items()
        if ruleset.present[table].get(chain) != before
    ]
    added = [
        (table, chain)
        for table in ALL_TABLES
        for chain in ruleset.present[table]
        if chain not in expected[table] | dict.fromkeys(ruleset.kept, 0)
        and is_kube_proxys(table, chain)
        and (table, chain) not in ruleset.used
    ]
    drift: list[Drift] = []
    if suspects:
        drift += _judged(ruleset, live, suspects, expected)
    drift += [
        Drift(service=None, what=f"{live.name} {t}: chain {c} was made by somebody else") for t, c in added
    ]
    stale = ruleset.stale(ruleset.frame)
    others = bool(drift or stale)
    missing = ruleset.missing(ruleset.frame)
    for rule in missing:
        if rule not in missing_before:
            where = f"{live.name} {rule.table}"
            drift.append(Drift(service=None, what=f"{where}: the rule -A {rule.chain} {rule.rule} is gone"))
    for jump in stale:
        what = f"{live.name} {jump.table}: the rule -A {jump.chain} {jump.rule} was put there by somebody else, and goes"
        drift.append(Drift(service=None, what=what))
    if not drift and not missing:
        ruleset.unsettled = False
    alone = not others and all((rule.table, rule.chain) != GUARDED for rule in missing)
    # Services first: a log shows but a few.
    drift.sort(key=lambda item: item.service is None)
    return drift, missing if alone else []


def _judged(
    ruleset: Ruleset,
    live: Live,
    suspects: list[tuple[TableName, str]],
    expected: Mapping[TableName, Mapping[str, int]],
) -> list[Drift]:
    """What is wrong with chains whose marks differ; those whose rules mean what was written are taken for the same."""
    there = {chain for table, chain in suspects if chain in ruleset.present[table]}
    texts = live.read(there) if there else Listing()
    owners, entries = ruleset.owners()
    wanted = ruleset.wanted_chains()
    by_service: dict[ServicePortName, _Found] = {}
    drift: list[Drift] = []
    for table, chain in suspects:
        owner = owners.get(chain) if table == "nat" else None
        meant = ruleset.rules_of(owner).chains[chain] if owner is not None else wanted.get((table, chain), ())
        shown = texts.table(table).rules.get(chain) if chain in ruleset.present[table] else None
        if shown is not None and _is_same(shown, meant, expected[table][chain]):
            ruleset.take_for_same(mark(shown), expected[table][chain])
            ruleset.present[table][chain] = expected[table][chain]
        elif owner is not None:
            found = by_service.setdefault(owner, _Found())
            (found.gone if shown is None else found.changed).append(chain)
        else:
            lacking = set(meant).difference(shown or ())
            for rule in lacking & entries.keys():
                by_service.setdefault(entries[rule], _Found()).lacking.append(chain)
            told = _told_of_shared(ruleset, chain, meant, shown, lacking <= entries.keys())
            drift += [Drift(service=None, what=f"{live.name} {table}: {told}")] if told else []
    services = [
        Drift(service=name, what=f"{live.name}: {_told(found)}") for name, found in by_service.items()
    ]
    return drift + services


def _told_of_shared(
    ruleset: Ruleset, chain: str, meant: Rules, shown: Rules | None, told_by_service: bool
) -> str:
    """What is wrong with a chain that is no single Service's; empty when the Services tell all of it."""
    if shown is None:
        if chain == MARKER.chain and ruleset.present["nat"]:
            return f"chain {chain} is gone: kube-proxy takes it away, one is running beside this proxy"
        return f"chain {chain} is gone"
    if told_by_service and not set(shown).difference(meant) and len(shown) < len(meant):
        return ""
    return _differing(chain, meant, shown)


def _is_same(shown: Rules, meant: Rules, written: int) -> bool:
    """Do these rules mean what was written?"""
    return mark(meant) == written and list(map(normal, shown)) == list(map(normal, meant))


def _told(found: _Found) -> str:
    parts = []
    for what, chains in (
        ("gone", found.gone),
        ("changed", found.changed),
        ("its rules are not in", sorted(set(found.lacking))),
    ):
        if chains:
            more = f" and {len(chains) - _SHOWN} more" if len(chains) > _SHOWN else ""
            parts.append(f"{what}: {', '.join(chains[:_SHOWN])}{more}")
    return "; ".join(parts)


def _differing(chain: str, meant: Rules | None, shown: Rules | None) -> str:
    lacks = [rule for rule in meant or () if rule not in set(shown or ())]
    more = [rule for rule in shown or () if rule not in set(meant or ())]
    parts = []
    for what, rules in (("lacks", lacks), ("has besides", more)):
        if rules:
            rest = f" and {len(rules) - 1} more rules" if len(rules) > 1 else ""
            parts.append(f"{what} `{rules[0]}`{rest}")
    return f"chain {chain} {'; '.join(parts) or 'has its rules in another order'}"
