"""What needs no started backend: probing the host, rendering a state as text, planning the way to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from proxycore.api import (
    BackendContext,
    ChangeBatch,
    Family,
    KernelError,
    Operation,
    Probe,
)
from proxycore.kernel import xtables
from proxycore.kernel.xtables import Tools

from .host import Host
from .listing import Listing
from .program import Line, Piece
from .reader import Census, reader
from .ruleset import Ruleset
from .shape import Features, parse_options
from .variant import choose
from .work import Work

_TOOL: dict[Family, str] = {"IPv4": "iptables-restore", "IPv6": "ip6tables-restore"}


_OPTIONAL = frozenset({"nfacct", "MASQUERADE --random-fully"})
"""Extensions that our rules can do without."""


def probe(context: BackendContext) -> Probe:
    """Which variant would be used, and what stands against it; nothing is changed, and no table is made.

    Legacy is asked by python-iptables, in a worker process for each family, which counts what there is of ours or kube-proxy's
    as well: it reads a large table in about a second, as it knows most rules by where they lead alone.

    Raises ConfigError: the options are wrong, on this host as on any other.
    """
    options = parse_options(context.options)
    try:
        chosen = choose(context.families, options.variant)
    except KernelError as error:
        return Probe(problems=(str(error),))
    problems: list[str] = []
    warnings = [f"rules in the other variant are in force beside ours: {other}" for other in chosen.others]
    lacking: dict[str, str] = {}
    facts = {"iptables": chosen.variant, "chosen because": chosen.why}
    chains: list[str] = []
    with ThreadPoolExecutor(len(chosen.tools)) as pool:
        # A thread takes over the network namespace of the one that made it.
        asked = pool.map(lambda tools: _ask(tools, options.lock_seconds), chosen.tools.values())
        for tools, found in zip(chosen.tools.values(), asked, strict=True):
            if isinstance(found, str):
                (problems if xtables.missing_rights(chosen.variant) else warnings).append(found)
                continue
            lacking |= {name: why for name, why in found.lacking.items() if name in _OPTIONAL}
            needed = {name: why for name, why in found.lacking.items() if name not in _OPTIONAL}
            problems += [f"{tools} cannot use {name}: {why}" for name, why in needed.items()]
            chains += [f"{told} of {tools}" for told in (_told(found.chains),) if told]
    if chains:
        facts["chains"] = ", ".join(chains)
    if lacking:
        facts["does without"] = ", ".join(sorted(lacking))
    return Probe(problems=tuple(problems), warnings=tuple(warnings), facts=facts)


class _Found(NamedTuple):
    """`lacking`: matches and targets that cannot be used, with the reason.  `chains`: what there is; only of legacy."""

    lacking: Mapping[str, str]
    chains: Census


def _ask(tools: Tools, lock_seconds: int) -> _Found | str:
    """What a family's tables say; or why nobody could ask."""
    try:
        asked = reader(tools, lock_seconds)
        try:
            return _Found(asked.probe(), asked.census() if tools.variant == "legacy" else {})
        finally:
            asked.close()
    except KernelError as error:
        return f"what {tools} can do is not known: {error}"


def _told(census: Census) -> str:
    """How many chains of kube-proxy's names there are, and how many rules in other chains lead to them; empty: none."""
    chains = sum(map(len, census.values()))
    rules = sum(sum(uses.values()) for uses in census.values())
    return f"{chains} (rules in other chains that lead there: {rules})" if chains else ""


def render(context: BackendContext, batch: ChangeBatch) -> str:
    """Input for `iptables-restore --noflush`, a part for each family, that makes this state on a host without rules."""
    options = parse_options(context.options)
    parts = []
    for family in context.families:
        ruleset = Ruleset(family, options, Features())
        ruleset.learn(Listing())
        piece = _piece(ruleset, context, batch)
        if piece is not None:
            parts.append(f"# {family}: {_TOOL[family]} --noflush\n{piece.text}")
    return "".join(parts)


def plan(host: Host, context: BackendContext, batch: ChangeBatch) -> tuple[Operation, ...]:
    """Lines for iptables-restore from what is there to the batch."""
    options = parse_options(context.options)
    found: list[Operation] = []
    for family, live in host.tables.items():
        ruleset = Ruleset(family, options, host.features[family])
        ruleset.learn(live.read())
        piece = _piece(ruleset, context, batch)
        for section in piece.sections if piece else ():
            there = ruleset.present[section.table]
            where = f"{live.name} {section.table}"
            found += [item for line in section.lines for item in _operation(where, line, there)]
    return tuple(found)


def _piece(ruleset: Ruleset, context: BackendContext, batch: ChangeBatch) -> Piece | None:
    changes = {c.name: c.after for c in batch.changes if c.name.family == ruleset.family}
    return Work(ruleset, changes, batch.host.after if batch.host else context.host, full=True).together()


def _operation(where: str, line: Line, there: dict[str, int]) -> Iterator[Operation]:
    kind, _, rest = line.text.partition(" ")
    service = str(line.owner) if line.owner else None
    if line.text.startswith(":"):
        chain = kind[1:]
        if chain in there:
            yield Operation(verb="replace", native=f"{where}: -F {chain}", service=service)
        else:
            yield Operation(verb="add", native=f"{where}: -N {chain}", service=service)
    elif kind in ("-D", "-X"):
        yield Operation(verb="delete", native=f"{where}: {kind} {rest}", service=service)
    else:
        yield Operation(verb="add", native=f"{where}: {kind} {rest}", service=service)
