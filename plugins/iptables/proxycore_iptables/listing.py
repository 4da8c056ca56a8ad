"""What `iptables-save` says: our chains as fingerprints, and what of others' touches them.

Pure.  A listing may have hundreds of thousands of lines; it is read line by line and of most chains only the mark is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from typing import NamedTuple

import msgspec

from proxycore.kubechains import target_of

from .rules import NODE_PORTS, Rule, Rules, mark

_LEADS_TO = re.compile(r" -[jg] (\S+)")
_INCOMPATIBLE = re.compile(r"# Table `([^']*)' is incompatible")


class TableListing(msgspec.Struct, frozen=True, kw_only=True):
    """One table.

    `marks`: our chains that are there, in the order of the listing, with `rules.mark` of what they hold.  `rules`: of
    those chains that were to be kept, whosever they are.  `built_in`: rules of every built-in chain.  `users`: our
    chains to which a rule in a chain of somebody else leads, with the first such rule as an `-A` line.
    """

    marks: Mapping[str, int] = {}
    rules: Mapping[str, Rules] = {}
    built_in: Mapping[str, Rules] = {}
    users: Mapping[str, str] = {}


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """All tables that were listed.  `incompatible`: names of those that iptables-nft cannot read."""

    tables: Mapping[str, TableListing] = {}
    incompatible: tuple[str, ...] = ()

    def table(self, name: str) -> TableListing:
        """A table; an empty one when it was not listed, since then nothing is in it."""
        return self.tables.get(name, TableListing())


class Count(NamedTuple):
    """How often a rule was met."""

    packets: int
    bytes: int


Counts = Mapping[tuple[str, str], tuple[Count, ...]]
"""By table and chain of ours, each rule's count, at its position."""


def read(lines: Iterable[str], *, ours: Callable[[str, str], bool], keep: Container[str] = ()) -> Listing:
    """Read the output of `iptables-save` without counters.

    Args: `ours(table, chain)`: is a chain of this name ours?  `keep`: names of chains whose rules are wanted.
    Raises ValueError when rules of a chain do not stand together, which no version of the tool prints, or when the
    listing ends before a table does.
    """
    tables: dict[str, TableListing] = {}
    incompatible: list[str] = []
    reader: _Reader | None = None
    start, skip, held = "\0", 0, list[Rule]()
    for line in lines:
        # Nearly all lines are rules, and nearly all rules follow one of the same chain.
        if line.startswith(start):
            held.append(line[skip:].rstrip("\n"))
        elif line.startswith("-A ") and reader is not None:
            chain, _, rule = line[3:].rstrip("\n").partition(" ")
            held = reader.begin(chain)
            held.append(rule)
            start = f"-A {chain} "
            skip = len(start)
        elif line.startswith(":") and reader is not None:
            chain, _, rest = line[1:].partition(" ")
            reader.declare(chain, rest.partition(" ")[0])
        elif line.startswith("*"):
            reader, start = _Reader(line[1:].strip(), ours, keep), "\0"
        elif line.startswith("COMMIT") and reader is not None:
            tables[reader.table] = reader.finished()
            reader, start = None, "\0"
        elif found := _INCOMPATIBLE.match(line):
            incompatible.append(found[1])
    if reader is not None:
        raise ValueError(f"the listing ends within table {reader.table}")
    return Listing(tables=tables, incompatible=tuple(incompatible))


class _Reader:
    """A table of which lines are being read."""

    def __init__(self, table: str, ours: Callable[[str, str], bool], keep: Container[str]) -> None:
        self.table = table
        self._ours, self._keep = ours, keep
        self._marks: dict[str, int] = {}
        self._rules: dict[str, Rules] = {}
        self._built_in: dict[str, Rules] = {}
        self._users: dict[str, str] = {}
        self._chain = ""
        self._held: list[Rule] = []

    def declare(self, chain: str, policy: str) -> None:
        if policy != "-":
            self._built_in[chain] = ()
            return
        if self._ours(self.table, chain):
            self._marks[chain] = _EMPTY
        if chain in self._keep:
            self._rules[chain] = ()

    def begin(self, chain: str) -> list[Rule]:
        """The list to which the rules of this chain are added."""
        if chain != self._chain:
            self._end()
            self._chain = chain
        return self._held

    def _end(self) -> None:
        """No more rules of the present chain come."""
        chain, rules = self._chain, tuple(self._held)
        if self.table == "filter" or chain == NODE_PORTS.chain:
            # Only there are named counters, before whose names the tool prints two spaces.
            rules = tuple(rule.replace("--nfacct-name  ", "--nfacct-name ") for rule in rules)
        if chain in self._marks:
            if self._marks[chain] != _EMPTY:
                raise ValueError(f"rules of chain {chain} in table {self.table} do not stand together")
            self._marks[chain] = mark(rules)
        elif chain in self._built_in:
            if self._built_in[chain]:
                raise ValueError(f"rules of chain {chain} in table {self.table} do not stand together")
            self._built_in[chain] = rules
        else:
            for rule in rules:
                # A comment may look like a target; to tell is slow, so only for those that look like one of ours.
                if any(name in self._marks for name in _LEADS_TO.findall(f" {rule}")):
                    line = f"-A {chain} {rule}"
                    target = target_of(line)
                    if target in self._marks:
                        self._users.setdefault(target, line)
        if chain in self._rules:
            self._rules[chain] += rules
        self._held = []

    def finished(self) -> TableListing:
        self._end()
        return TableListing(
            marks=self._marks,
            rules=self._rules,
            built_in=self._built_in,
            users=self._users,
        )


_EMPTY = mark(())


def counters(
    lines: Iterable[str], *, ours: Callable[[str, str], bool], unreadable: Callable[[str], None]
) -> Counts:
    """Read the output of `iptables-save -c`.

    Args: `ours(table, chain)`: is a chain of this name ours?  `unreadable(table)`: called of each table that the tool leaves out.
    """
    found: dict[tuple[str, str], list[Count]] = {}
    table, start = "", "\0"
    held: list[Count] = []
    for line in lines:
        # Nearly all lines are rules, and nearly all of these were met by nothing.
        if line.startswith("["):
            numbers, _, rest = line.partition("] -A ")
            if not rest.startswith(start):
                chain = rest.partition(" ")[0].rstrip("\n")
                start = f"{chain} "
                held = found.get((table, chain), [])
            if numbers == "[0:0":
                held.append(_NEVER)
            else:
                packets, _, size = numbers.partition(":")
                held.append(Count(int(packets[1:]), int(size)))
        elif line.startswith(":"):
            chain = line[1:].partition(" ")[0]
            if ours(table, chain):
                found[table, chain] = []
        elif line.startswith("*"):
            table, start = line[1:].strip(), "\0"
        elif left_out := _INCOMPATIBLE.match(line):
            unreadable(left_out[1])
    return {place: tuple(counts) for place, counts in found.items()}


_NEVER = Count(0, 0)
