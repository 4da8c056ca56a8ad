"""Which of the two kinds of iptables this host uses; rules in both at once work badly together.

Semantics: kube-proxy's image (iptables-wrapper).  The kubelet leaves a chain in the variant that it uses; without one, the
variant with more rules is the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from proxycore.api import Family, KernelError
from proxycore.kernel import nftables, xtables
from proxycore.kernel.xtables import Tools, Variant

from .shape import VariantChoice

HINTS = frozenset({"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"})
"""Chains that the kubelet makes in mangle, in its variant."""
_BUILT_IN_TABLES = frozenset({"filter", "nat", "mangle", "raw", "security"})
_PREFIX: Mapping[Family, str] = {"IPv4": "iptables", "IPv6": "ip6tables"}
_NFT: Mapping[Family, nftables.NftFamily] = {"IPv4": "ip", "IPv6": "ip6"}
_OTHER: Mapping[Variant, Variant] = {"legacy": "nft", "nft": "legacy"}


class Chosen(NamedTuple):
    """A variant and its tools, by family.

    `why`: a phrase for the log.  `others`: what there is in the other variant, a phrase each; it is in force beside our rules.
    """

    variant: Variant
    tools: Mapping[Family, Tools]
    why: str
    others: tuple[str, ...] = ()


class Found(NamedTuple):
    """What there is in one variant of one family.  `tables`: that exist; `problem`: why they cannot be read."""

    tables: frozenset[str] = frozenset()
    rules: int = 0
    kube: bool = False
    hint: str = ""
    problem: str = ""


def choose(
    families: Sequence[Family],
    wanted: VariantChoice = "auto",
    find: Callable[[], Iterable[Tools]] | None = None,
) -> Chosen:
    """Choose for the network namespace of this thread; nothing is changed, made or loaded for it.

    Raises KernelError: the programs of the variant are missing for a family, or it does not work, and what to do.
    """
    tools = {(found.variant, found.family): found for found in (find or xtables.find)()}
    variant, why, seen = _choose(families, wanted, tools)
    return Chosen(
        variant=variant,
        tools={family: tools[variant, family] for family in families},
        why=why,
        others=tuple(_others(_OTHER[variant], families, tools, seen)),
    )


_Tools = Mapping[tuple[Variant, Family], Tools]
_Seen = dict[tuple[Variant, Family], Found]


def _choose(families: Sequence[Family], wanted: VariantChoice, tools: _Tools) -> tuple[Variant, str, _Seen]:
    complete = {
        variant for variant in _OTHER if all((variant, family) in tools for family in families)
    }  # fmt: skip
    if wanted != "auto" and wanted not in complete:
        raise KernelError(_missing(wanted, families, tools))
    if not complete:
        raise KernelError(_missing("nft", families, tools))
    if wanted != "legacy" and "nft" in complete and (known := _at_home(families)) is not None:
        return "nft", "the configuration says nft" if wanted == "nft" else known, {}
    seen: _Seen = {
        (variant, family): _look(tools.get((variant, family)), variant, family)
        for variant in _OTHER
        for family in families
    }
    problems = {
        variant: next(
            (found.problem for (of, _), found in seen.items() if of == variant and found.problem), ""
        )
        for variant in complete
    }
    if wanted != "auto":
        if problems[wanted]:
            raise KernelError(f"iptables-{wanted} does not work here: {problems[wanted]}")
        return wanted, f"the configuration says {wanted}", seen
    if all(problems.values()):
        raise KernelError(
            "no iptables works here: "
            + "; ".join(f"iptables-{variant}: {problems[variant]}" for variant in sorted(complete))
        )
    for (of, family), found in seen.items():
        if of in complete and found.problem and found.tables:
            # Whoever made these may be the one to go by.
            raise KernelError(f"{_PREFIX[family]}-{of} has tables here that cannot be read: {found.problem}")
    working = [variant for variant in ("nft", "legacy") if variant in complete and not problems[variant]]
    if len(working) == 1:
        [only] = working
        other = _OTHER[only]
        reason = problems.get(other) or "its programs are not installed"
        return only, f"iptables-{other} cannot be used: {reason}", seen
    for variant in working:
        hint = next((found.hint for (of, _), found in seen.items() if of == variant and found.hint), "")
        if hint:
            return variant, f"the kubelet uses it (chain {hint})", seen
    count = {variant: sum(f.rules for (of, _), f in seen.items() if of == variant) for variant in working}
    if count["legacy"] > count["nft"]:
        return "legacy", f"{count['legacy']} rules are there, {count['nft']} in iptables-nft", seen
    if count["nft"]:
        return "nft", f"{count['nft']} rules are there, {count['legacy']} in iptables-legacy", seen
    return "nft", "there are no rules yet", seen


def _at_home(families: Sequence[Family]) -> str | None:
    """Why it is the nft variant, where that shows without counting rules, of which there may be hundreds of thousands.

    None: it does not show.
    """
    if any(xtables.legacy_tables(family) != frozenset() for family in families):
        return None
    try:
        with nftables.NfTables() as kernel:
            chains = {name for family in families for _, name in kernel.chains(_NFT[family])}
    except KernelError:
        return None
    hint = next((name for name in HINTS if name in chains), "")
    if hint:
        return f"the kubelet uses it (chain {hint})"
    return "rules of Services are there, and none in iptables-legacy" if "KUBE-SERVICES" in chains else None


def _missing(variant: Variant, families: Sequence[Family], tools: _Tools) -> str:
    """What to install."""
    names = ", ".join(
        f"{_PREFIX[family]}-{variant}-{program}"
        for family in families
        if (variant, family) not in tools
        for program in ("save", "restore")
    )
    here = sorted({str(found) for found in tools.values()})
    return f"the programs {names} are not installed (package iptables)" + (
        f"; here there are those of {', '.join(here)}" if here else ""
    )


def _look(tools: Tools | None, variant: Variant, family: Family) -> Found:
    """What there is, by a tool if there is one."""
    tables = _tables(variant, family)
    if tables is None:
        return Found(problem=f"the names of {family} tables in /proc/net may not be read")
    if tools is None:
        return Found(tables=tables)
    lacking = xtables.missing_rights(variant)
    if lacking:
        return Found(tables=tables, problem=f"it needs {' and '.join(lacking)}, which this process lacks")
    if variant == "legacy" and not tables:
        return Found()
    try:
        return xtables.save(tools, scan)._replace(tables=tables)
    except KernelError as error:
        return Found(tables=tables, problem=str(error))


def _tables(variant: Variant, family: Family) -> frozenset[str] | None:
    """Tables of iptables that exist; None: we may not know."""
    if variant == "legacy":
        return xtables.legacy_tables(family)
    try:
        with nftables.NfTables() as kernel:
            return kernel.tables(_NFT[family]) & _BUILT_IN_TABLES
    except KernelError:
        # No nf_tables, or no right to ask; the tool will say which.
        return frozenset()


def scan(lines: Iterable[str]) -> Found:
    """Count rules in a listing, and look for chains of Kubernetes."""
    rules, kube, hint, table = 0, False, "", ""
    for line in lines:
        if line.startswith("-A"):
            rules += 1
        elif line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(":KUBE-"):
            kube = True
            name = line[1:].split(" ", 1)[0]
            if table == "mangle" and name in HINTS:
                hint = name
    return Found(rules=rules, kube=kube, hint=hint)


def _others(variant: Variant, families: Sequence[Family], tools: _Tools, seen: _Seen) -> Iterable[str]:
    """Phrases about what is in the variant that was not chosen."""
    for family in families:
        name = f"{_PREFIX[family]}-{variant}"
        found = seen.get((variant, family), Found())
        if (variant, family) not in tools:
            if found.tables:
                yield f"{name} tables {', '.join(sorted(found.tables))}, and no {name}-save to read them"
        elif found.problem:
            if found.tables:
                yield f"{name} tables that cannot be read: {found.problem}"
        elif found.rules or found.kube:
            kube = ", KUBE-* chains among them" if found.kube else ""
            yield f"{found.rules} {name} {'rule' if found.rules == 1 else 'rules'}{kube}"
