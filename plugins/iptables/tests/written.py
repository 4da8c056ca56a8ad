"""A whole ruleset as text, put together in the plainest way: no tree, no pieces, nothing that was there before."""

from __future__ import annotations

from collections.abc import Iterable

from proxycore.api import ServiceState
from proxycore_iptables.frame import frame
from proxycore_iptables.render import render
from proxycore_iptables.rules import SHARED, TABLES, Entry, Place, Rules, TableName
from proxycore_iptables.shape import Shape

BUILT_IN: dict[TableName, tuple[str, ...]] = {
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
}
Chains = dict[Place, Rules]


def chains_of(states: Iterable[ServiceState], shape: Shape) -> Chains:
    """Every chain with its rules, built-in ones included."""
    framed = frame(shape)
    chains: Chains = dict(framed.chains)
    entries: dict[Place, list[Entry]] = {place: [] for place in SHARED}
    for state in states:
        rules = render(state, shape)
        for name, content in rules.chains.items():
            assert Place("nat", name) not in chains, f"{name} twice"
            chains[Place("nat", name)] = content
        for place, more in rules.entries.items():
            entries[place] += more
    for place, found in entries.items():
        chains[place] = tuple(entry.rule for entry in sorted(found)) + framed.tails.get(place, ())
    for table, names in BUILT_IN.items():
        for name in names:
            chains[Place(table, name)] = tuple(
                jump.rule for jump in reversed(framed.jumps) if (jump.table, jump.chain) == (table, name)
            )
    return chains


def text_of(chains: Chains) -> str:
    """Input for `iptables-restore`; read as a listing it says the same."""
    lines: list[str] = []
    for table in TABLES:
        mine = {place.chain: rules for place, rules in chains.items() if place.table == table}
        lines.append(f"*{table}")
        lines += [f":{name} {'ACCEPT' if name in BUILT_IN[table] else '-'} [0:0]" for name in mine]
        lines += [f"-A {name} {rule}" for name, rules in mine.items() for rule in rules]
        lines.append("COMMIT")
    return "\n".join((*lines, ""))


def written(states: Iterable[ServiceState], shape: Shape) -> str:
    """What there is with these Services and no others."""
    return text_of(chains_of(states, shape))
