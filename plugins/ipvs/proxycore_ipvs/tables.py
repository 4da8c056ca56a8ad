"""Our chains of iptables in one family: what is there, and loading what should be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from proxycore.api import Family, KernelError
from proxycore.kernel import xtables
from proxycore.kernel.xtables import Tools

from .netrules import CHAINS, JUMPS, TABLES, Chains, Jump, Place, Rule
from .options import Options

_OURS: dict[tuple[str, str], Place] = {(place.table, place.chain): place for place in CHAINS}
_JUMPS: dict[tuple[str, str], Jump] = {(jump.table, f"-A {jump.chain} {jump.rule}"): jump for jump in JUMPS}


class Found(NamedTuple):
    """Our chains with their rules, and each rule that leads to one of them as often as it is there."""

    chains: Chains
    jumps: tuple[Jump, ...]


NOTHING = Found({}, ())


class Tables(Protocol):
    """Tables of one family; raises KernelError where nothing else is said."""

    name: str
    has_security: bool
    random_fully: bool

    def read(self) -> Found:
        """What of ours is there."""
        ...

    def load(self, text: str) -> None:
        """Bring `--noflush` input into force.  Raises RestoreRefused, LockHeld, KernelError as proxycore.kernel.xtables."""
        ...


class ToolTables:
    """Through iptables-save and iptables-restore.  `prepare` finds out about the security table, which makes it."""

    def __init__(self, tools: Tools, lock_seconds: int) -> None:
        self.tools = tools
        self.name = str(tools)
        self.has_security = True
        self.random_fully = not xtables.lacks(tools, "-j", "MASQUERADE", "--random-fully")
        self._lock_seconds = lock_seconds

    def prepare(self) -> None:
        """Raises LockHeld, KernelError."""
        try:
            self.load("*security\nCOMMIT\n")
        except xtables.RestoreRefused as refused:
            if refused.errno:
                raise
            self.has_security = False

    def read(self) -> Found:
        return xtables.save(self.tools, read, tables=TABLES)

    def load(self, text: str) -> None:
        xtables.restore(self.tools, text, self._lock_seconds)


def read(lines: Iterable[str]) -> Found:
    """From lines of iptables-save."""
    chains: dict[Place, list[Rule]] = {}
    jumps: list[Jump] = []
    table = ""
    for line in map(str.rstrip, lines):
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            place = _OURS.get((table, line[1:].partition(" ")[0]))
            if place is not None:
                chains[place] = []
        elif line.startswith("-A "):
            jump = _JUMPS.get((table, line))
            if jump is not None:
                jumps.append(jump)
                continue
            _, chain, rule = line.split(" ", 2)
            place = _OURS.get((table, chain))
            if place is not None:
                chains[place].append(rule)
    return Found({place: tuple(rules) for place, rules in chains.items()}, tuple(jumps))


def choose(families: Iterable[Family], options: Options) -> dict[Family, Tools]:
    """The tools to use.  Raises KernelError: they are not installed for one of the families."""
    found = {(tools.variant, tools.family): tools for tools in xtables.find()}
    wanted = tuple(families)
    for variant in ("legacy", "nft"):
        if options.variant in ("auto", variant) and all((variant, family) in found for family in wanted):
            return {family: found[variant, family] for family in wanted}
    which = "iptables" if options.variant == "auto" else f"iptables-{options.variant}"
    raise KernelError(
        f"the programs of {which} are not installed for {' and '.join(wanted)} (package iptables)"
    )
