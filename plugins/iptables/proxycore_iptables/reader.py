"""What is asked of a family's tables beside writing them: what can be used, what leads to our chains, jumps, counters, cleanup.

Two kinds with the same answers: legacy by python-iptables in a worker process, nft by the tools.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from proxycore import kubechains
from proxycore.api import Family, KernelError
from proxycore.kernel import xtables
from proxycore.kernel.kubeproxy import chunk_of
from proxycore.kernel.xtables import RestoreRefused, Tools
from proxycore.kubechains import is_kube_proxys, target_of

from . import listing
from .link import Link
from .listing import Count as Count
from .listing import Counts as Counts
from .normal import normal
from .rules import Jump

PROBE_SECONDS = 30.0
READ_SECONDS = 60.0
WRITE_SECONDS = 120.0
"""Beside the time for the lock."""


class Extension(NamedTuple):
    """A match or target that our rules use.  `options`: that it must know; `rule`: one that uses it, `table` where."""

    kind: str
    name: str
    rule: str
    table: str = "nat"
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " --".join((self.name, *self.options))


def extensions(family: Family) -> tuple[Extension, ...]:
    """All that are needed."""
    v4 = family == "IPv4"
    address = "10.0.0.1:80" if v4 else "[fd00::1]:80"
    refusal = "icmp-port-unreachable" if v4 else "icmp6-port-unreachable"
    return (
        Extension("match", "comment", "-m comment --comment x"),
        *(Extension("match", name, f"-p {name} -m {name} --dport 1") for name in ("tcp", "udp", "sctp")),
        Extension("match", "conntrack", "-m conntrack --ctstate NEW"),
        Extension("match", "statistic", "-m statistic --mode random --probability 0.5"),
        Extension("match", "recent", "-m recent --set --name x"),
        Extension("match", "addrtype", "-m addrtype --dst-type LOCAL"),
        Extension("match", "mark", "-m mark --mark 0x1/0x1"),
        Extension("match", "nfacct", "-m nfacct --nfacct-name x"),
        Extension("target", "DNAT", f"-p tcp -j DNAT --to-destination {address}"),
        # With an option each: without one the tool takes a target that it cannot load for a chain.
        Extension("target", "MASQUERADE", "-j MASQUERADE --random"),
        Extension("target", "MASQUERADE", "-j MASQUERADE --random-fully", options=("random-fully",)),
        Extension("target", "MARK", "-j MARK --set-xmark 0x1/0x1"),
        Extension("target", "REJECT", f"-j REJECT --reject-with {refusal}", table="filter"),
    )


Census = Mapping[str, Mapping[str, int]]
"""By table our chains, with the number of rules of others that lead to each."""


class Reader(Protocol):
    """One family's tables; to be used by the thread that made it.  All raise KernelError."""

    def probe(self) -> Mapping[str, str]:
        """Matches and targets that do not load, by name, with the reason; nothing is changed in the tables."""

    def census(self) -> Census:
        """Of all tables that exist."""

    def assert_jumps(self, jumps: Sequence[Jump]) -> tuple[Jump, ...]:
        """Put those that are missing at the head of their chains, in this order, so that the last comes first; returns those.

        Raises LockHeld: nothing was changed; KernelError: each table has all or none.
        """

    def counters(self) -> Counts:
        """Of every rule of our chains in nat, where a rule is met once for each connection."""

    def cleanup(self, *, keep_markers: bool = False) -> tuple[str, ...]:
        """Take away our chains and jumps, filter first; returns a line for each thing that is gone.

        A chain to which rules of others lead stays, emptied, as kubechains.emptied() says.  `keep_markers`: those of
        kubechains.MARKERS stay.  Raises KernelError: what was not taken away is still there; do it again.
        """

    def close(self) -> None: ...


def reader(tools: Tools, lock_seconds: int) -> Reader:
    """The kind for a variant.  Raises KernelError, saying what to install."""
    if tools.variant == "legacy":
        return LegacyReader(tools, lock_seconds)
    return NftReader(tools)


class LegacyReader:
    """By python-iptables, in a worker process."""

    def __init__(self, tools: Tools, lock_seconds: int) -> None:
        # Without these libxtables would end the worker.
        lacking = xtables.missing_rights("legacy")
        if lacking:
            raise KernelError(
                f"{tools} needs {' and '.join(lacking)}, which this process lacks", errno=errno.EPERM
            )
        self._tools = tools
        self._lock_seconds = lock_seconds
        self._link = Link(tools.family)

    def probe(self) -> Mapping[str, str]:
        wanted = [(found.kind, found.name, found.options) for found in extensions(self._tools.family)]
        return dict(self._link.ask(PROBE_SECONDS, "probe", extensions=wanted))

    def census(self) -> Census:
        found: Census = self._link.ask(READ_SECONDS, "census")
        return found

    def assert_jumps(self, jumps: Sequence[Jump]) -> tuple[Jump, ...]:
        if not jumps:
            return ()
        made = self._link.ask(
            self._lock_seconds + WRITE_SECONDS, "assert_jumps", lock_seconds=self._lock_seconds, jumps=jumps
        )
        put = {Jump(*jump) for jump in made}
        return tuple(jump for jump in jumps if jump in put)

    def counters(self) -> Counts:
        found: Mapping[str, Mapping[str, list[int]]] = self._link.ask(READ_SECONDS, "counters")
        return {
            (table, chain): tuple(map(Count, numbers[::2], numbers[1::2]))
            for table, chains in found.items()
            for chain, numbers in chains.items()
        }

    def cleanup(self, *, keep_markers: bool = False) -> tuple[str, ...]:
        return tuple(
            self._link.ask(
                self._lock_seconds + WRITE_SECONDS,
                "cleanup",
                lock_seconds=self._lock_seconds,
                where=str(self._tools),
                keep_markers=keep_markers,
            )
        )

    def close(self) -> None:
        self._link.close()


class NftReader:
    """By iptables-nft-save and iptables-nft-restore.

    Raises KernelError, beside the rest, for a table of ours with rules that these cannot read.
    """

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def probe(self) -> Mapping[str, str]:
        wanted = extensions(self._tools.family)
        if not self._refusal(wanted):
            return {}
        refusals = {str(extension): self._refusal((extension,)) for extension in wanted}
        return {name: why for name, why in refusals.items() if why}

    def _refusal(self, wanted: Iterable[Extension]) -> str:
        """Why the tool cannot read rules that use these; empty if it can."""
        lines = (
            f"*{found.table}\n:PROXYCORE-PROBE - [0:0]\n-A PROXYCORE-PROBE {found.rule}\nCOMMIT\n"
            for found in wanted
        )
        try:
            xtables.restore(self._tools, "".join(lines), test=True)
        except RestoreRefused as refused:
            if refused.errno:
                raise
            return refused.said
        return ""

    def census(self) -> Census:
        return xtables.save(self._tools, lambda lines: census_of(lines, self._tools))

    def assert_jumps(self, jumps: Sequence[Jump]) -> tuple[Jump, ...]:
        places = dict.fromkeys((jump.table, jump.chain) for jump in jumps)
        there = {place: xtables.list_chain(self._tools, *place) or () for place in places}
        known = {place: {normal(rule) for rule in rules} for place, rules in there.items()}
        missing = tuple(jump for jump in jumps if normal(jump.rule) not in known[jump.table, jump.chain])
        text = ""
        for table in dict.fromkeys(jump.table for jump in missing):
            lines = [f"-I {jump.chain} {jump.rule}" for jump in missing if jump.table == table]
            text += "\n".join((f"*{table}", *lines, "COMMIT", ""))
        if text:
            xtables.restore(self._tools, text)
        return missing

    def counters(self) -> Counts:
        def read(lines: Iterable[str]) -> Counts:
            return listing.counters(
                lines, ours=is_kube_proxys, unreadable=lambda table: _check_readable(self._tools, table)
            )

        return xtables.save(self._tools, read, tables=("nat",), counters=True)

    def cleanup(self, *, keep_markers: bool = False) -> tuple[str, ...]:
        told: list[str] = []
        where = str(self._tools)
        listing = xtables.save(self._tools, kubechains.read)
        for found in listing.tables:
            rules = kubechains.without_markers(found) if keep_markers else found
            if rules.empty:
                continue
            for text in kubechains.removals(rules, chunk_of(self._tools)):
                xtables.restore(self._tools, text)
            told += kubechains.tell(rules, where)
        for table in listing.unreadable:
            _check_readable(self._tools, table)
        return tuple(told)

    def close(self) -> None:
        pass


def census_of(lines: Iterable[str], tools: Tools) -> Census:
    """Read the output of `iptables-save`.  Raises KernelError: there is a table that the tool cannot read."""
    found: dict[str, dict[str, int]] = {}
    ours: dict[str, int] = {}
    table = ""
    for line in lines:
        if line.startswith("-A "):
            chain = line[3 : line.find(" ", 3)]
            # Nearly all lines are rules of our own chains.
            if chain not in ours and "KUBE-" in line:
                target = target_of(line)
                if target in ours:
                    ours[target] += 1
        elif line.startswith(":"):
            chain = line[1:].partition(" ")[0]
            if is_kube_proxys(table, chain):
                ours[chain] = 0
        elif line.startswith("*"):
            table = line[1:].strip()
            ours = found[table] = {}
        elif line.startswith("# Table `") and "incompatible" in line:
            _check_readable(tools, line[9:].partition("'")[0])
    return found


def _check_readable(tools: Tools, table: str) -> None:
    """Called of a table that the tool cannot read.  Raises KernelError if there may be something of ours in it."""
    if table in kubechains.SHARED:
        raise KernelError(
            f"{tools} cannot read table {table}: {xtables.advice_for_unreadable(tools.family, table)}"
        )
