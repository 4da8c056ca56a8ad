"""The words in which this backend thinks: rules, the chains that hold them, and what each Service port asks for.

A rule is text as `iptables-save` of both variants prints it, without `-A CHAIN `: what is written and what is read back are then
equal letter by letter, and a ruleset that is there already can be recognised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

TableName = Literal["nat", "filter", "mangle"]
TABLES: tuple[TableName, TableName] = ("filter", "nat")
Rule = str
Rules = tuple[Rule, ...]


class Place(NamedTuple):
    """A chain of a table."""

    table: TableName
    chain: str


SERVICES = Place("nat", "KUBE-SERVICES")
NODE_PORTS = Place("nat", "KUBE-NODEPORTS")
REFUSED = Place("filter", "KUBE-SERVICES")
"""Addresses of Services without endpoints; seen in forward and output, untranslated."""
REFUSED_OUTSIDE = Place("filter", "KUBE-EXTERNAL-SERVICES")
"""The same for addresses that clients outside dial; seen in input and forward."""
FIREWALL = Place("filter", "KUBE-PROXY-FIREWALL")
HEALTH_PORTS = Place("filter", "KUBE-NODEPORTS")
SHARED: tuple[Place, ...] = (SERVICES, NODE_PORTS, REFUSED, REFUSED_OUTSIDE, FIREWALL, HEALTH_PORTS)
"""Chains to which every Service port may add entries; they exist even when nothing is in them."""
MARKER = Place("nat", "KUBE-SVC-PROXYCORE")
"""An empty chain: this ruleset is proxycore's.  kube-proxy takes it for the chain of a Service that is gone and removes it."""


class Entry(NamedTuple):
    """One rule of a shared chain; entries of a chain stand in the order of these fields.

    `address`: packed, empty for node ports.  `protocol` in lower case.  `turn`: among rules of one frontend.  `owner`: text
    that tells apart Service ports which have the same frontend.
    """

    address: bytes
    port: int
    protocol: str
    owner: str
    turn: int
    rule: Rule


class ServiceRules(NamedTuple):
    """What one Service port of one family stands for.

    `chains`: its own chains of the nat table, endpoint chains first, each before those that jump to it.  `entries`: its
    rules in shared chains.
    """

    chains: Mapping[str, Rules]
    entries: Mapping[Place, tuple[Entry, ...]]


class Jump(NamedTuple):
    """A rule of a built-in chain that leads to one of ours."""

    table: TableName
    chain: str
    rule: Rule


class Frame(NamedTuple):
    """What is there once: whole chains, the last rules of shared chains, and the jumps.

    `jumps` stand in the order in which they are put at the head of their chains, so that the last one comes first.
    """

    chains: Mapping[Place, Rules]
    tails: Mapping[Place, Rules]
    jumps: tuple[Jump, ...]


def mark(rules: Rules) -> int:
    """Fingerprint of a chain's content, of this process alone: equal content, equal mark; the low 16 bits are its length."""
    return hash(rules) & ~0xFFFF | min(len(rules), 0xFFFF)


def length(mark: int) -> int:
    """How many rules a chain of that mark has."""
    return mark & 0xFFFF
