"""Taking away all that is ours, in both variants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from proxycore import kubechains
from proxycore.api import Cleanup, Family, HostState, KernelError
from proxycore.kernel import nftables, xtables, xtlock
from proxycore.kernel.kubeproxy import chunk_of
from proxycore.kernel.xtables import Tools
from proxycore.kubechains import LOCALNET_MARKER, TableRules

from . import counting
from .frame import GUARD, frame
from .normal import normal
from .reader import reader
from .rules import MARKER, Rule
from .shape import Features, Options, shape_of

ROUTE_LOCALNET = Path("/proc/sys/net/ipv4/conf/all/route_localnet")
_KUBELETS = ("KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT")
_GUARD_JUMPS = ("-A INPUT -j KUBE-FIREWALL", "-A OUTPUT -j KUBE-FIREWALL")
_NFT: dict[Family, nftables.NftFamily] = {"IPv4": "ip", "IPv6": "ip6"}


class _Ours(NamedTuple):
    """A variant and family, and what there is of chains such as ours."""

    tools: Tools
    tables: tuple[TableRules, ...]

    def has(self, marker: str) -> bool:
        return any(rules.table == MARKER.table and marker in rules.chains for rules in self.tables)

    @property
    def at_work(self) -> bool:
        """Is there more than marks?"""
        return any(kubechains.is_at_work(kubechains.without_markers(rules)) for rules in self.tables)


def clean_up() -> Cleanup:
    """Take all away that is ours, in both variants.

    The marks go last, everything else before them that is known by them alone: whoever is killed on the way is to do it
    again.  Raises KernelError: so is this; when a table cannot be read, or the xtables lock was held as we began, nothing was
    changed.
    """
    there = [found for tools in xtables.find() if (found := _find(tools))]
    ours = [found for found in there if found.has(MARKER.chain)]
    remembering = [found for found in there if found not in ours and found.has(LOCALNET_MARKER)]
    if not ours and any(found.at_work for found in there if found.tools.family == "IPv4"):
        # An init container of ours made the setting, and others go on with it.
        return Cleanup()
    _check_lock([*ours, *remembering])
    removed: list[str] = []
    removed += _take_guards([found for found in (*ours, *remembering) if found.tools.family == "IPv4"])
    for found in ours:
        removed += _take(found)
    if ours:
        removed += _take_counters()
    for found in (*ours, *remembering):
        removed += _take_marks(found)
    return Cleanup(removed=tuple(removed))


def _find(tools: Tools) -> _Ours | None:
    if tools.variant == "legacy" and not xtables.legacy_tables(tools.family):
        return None
    listing = xtables.save(tools, kubechains.read)
    if listing.unreadable:
        _check_readable(tools, listing.unreadable)
    found = _Ours(tools, tuple(rules for rules in listing.tables if not rules.empty))
    return found if found.tables else None


def _check_lock(found: Sequence[_Ours]) -> None:
    """Raises KernelError: somebody has the lock that the legacy variant needs.  Rather now than half-way."""
    if not any(each.tools.variant == "legacy" for each in found):
        return
    try:
        with xtlock.held(xtables.LOCK_SECONDS):
            pass
    except KernelError as error:
        raise KernelError(f"nothing was changed: {error}", errno=error.errno) from error


def _check_readable(tools: Tools, unreadable: Sequence[str]) -> None:
    """Raises KernelError: there are rules of ours, and some are in a table that the tool leaves out."""
    with nftables.NfTables() as kernel:
        chains = kernel.chains(_NFT[tools.family])
    if (MARKER.table, MARKER.chain) not in chains:
        return
    for table in unreadable:
        if any(kubechains.is_kube_proxys(table, chain) for there, chain in chains if there == table):
            raise KernelError(
                f"{tools} cannot read table {table}, which holds rules of ours: "
                f"{xtables.advice_for_unreadable(tools.family, table)}"
            )


def _take(found: _Ours) -> Iterator[str]:
    """All but the marks."""
    yield from _take_rules(found)
    for rules in found.tables:
        for chain in rules.chains:
            if chain in rules.used and chain not in kubechains.emptied(rules):
                yield f"{found.tools} {rules.table}: chain {chain} stays because of {rules.used[chain]}"


def _take_rules(found: _Ours) -> Iterator[str]:
    tools = found.tools
    if tools.variant == "legacy":
        try:
            asked = reader(tools, xtables.LOCK_SECONDS)
        except KernelError:
            # No python-iptables: the tools do it as well.
            pass
        else:
            try:
                yield from asked.cleanup(keep_markers=True)
            finally:
                asked.close()
            return
    for rules in map(kubechains.without_markers, found.tables):
        if rules.empty:
            continue
        for text in kubechains.removals(rules, chunk_of(tools)):
            xtables.restore(tools, text)
        yield from kubechains.tell(rules, str(tools))


def _take_marks(found: _Ours) -> Iterator[str]:
    for rules in found.tables:
        marks = kubechains.markers(rules)
        if not marks.empty:
            xtables.restore(found.tools, kubechains.removal(marks))
            yield from kubechains.tell(marks, str(found.tools))


def _take_counters() -> Iterator[str]:
    """Those that nobody else's rules use."""
    for name in counting.NAMES:
        try:
            with counting.Counting() as kernel:
                gone = kernel.delete((name,))
        except KernelError:
            continue
        yield from (f"nfacct counter {name}" for name in gone)


# -- node ports on loopback addresses --


class _Guard(NamedTuple):
    """What there is of the guard in one table.

    `rules`: it, each time that it is there; `jumps`: rules as we make them that lead to its chain.  `others`: further rules in
    that chain; `leading`: further ones that lead there.
    """

    rules: tuple[Rule, ...] = ()
    jumps: tuple[Rule, ...] = ()
    others: tuple[Rule, ...] = ()
    leading: tuple[Rule, ...] = ()


def _take_guards(ours: Sequence[_Ours]) -> Iterator[str]:
    """First the setting goes, if it was a run of ours that made it; the guard not while packets to loopback addresses are
    routed.  Both stay where there is a kubelet."""
    if not ours:
        return
    kubelets = dict(_kubelets())
    why_not = ""
    if _is_routed():
        if kubelets:
            why_not = "stays for the kubelet's sake"
            yield f"net.ipv4.conf.all.route_localnet stays 1: there is a kubelet ({', '.join(kubelets.values())})"
        elif any(found.has(LOCALNET_MARKER) for found in ours):
            try:
                ROUTE_LOCALNET.write_text("0\n")
            except OSError as error:
                why_not = f"cannot be set to 0 ({error.strerror})"
            else:
                yield "net.ipv4.conf.all.route_localnet = 1"
        else:
            why_not = "was not set by a run of ours"
    for found in ours:
        if found.has(MARKER.chain):
            yield from _take_guard(found.tools, why_not, kubelets.get(str(found.tools), ""))


def _kubelets() -> Iterator[tuple[str, str]]:
    """Tools of IPv4 that a kubelet uses, by name, and by which chain that is seen."""
    for tools in xtables.find():
        if tools.family != "IPv4":
            continue
        for chain in _KUBELETS:
            if _has_in_mangle(tools, chain):
                yield str(tools), f"chain {chain} in {tools} mangle"
                break


def _has_in_mangle(tools: Tools, chain: str) -> bool:
    if tools.variant == "nft":
        # Also in a table that the tool cannot read.
        with nftables.NfTables() as kernel:
            return kernel.has_chain("ip", "mangle", chain)
    if "mangle" not in (xtables.legacy_tables(tools.family) or ()):
        return False
    start = f":{chain} "
    return xtables.save(
        tools, lambda lines: any(line.startswith(start) for line in lines), tables=("mangle",)
    )


def _is_routed() -> bool:
    try:
        return ROUTE_LOCALNET.read_text().strip() not in ("", "0")
    except OSError:
        return False


def _take_guard(tools: Tools, why_not: str, kubelet: str) -> Iterator[str]:
    """`why_not`: why packets to loopback addresses go on being routed; empty: they do not.  `kubelet`: it uses this variant."""
    found: _Guard = xtables.save(tools, _find_guard, tables=(GUARD.table,))
    if not found.rules:
        return
    if kubelet or why_not:
        # Nobody can tell who made them, as ours are like the kubelet's.
        staying = " and ".join((f"{tools} filter: chain KUBE-FIREWALL", *found.jumps))
        if kubelet:
            yield f"{staying} stay, also what of it is ours: there is a kubelet ({kubelet})"
        else:
            yield (
                f"{staying} stay: without them net.ipv4.conf.all.route_localnet, which {why_not}, would open loopback "
                "addresses to other hosts"
            )
        return
    # Rules of others in the chain need what leads there.
    jumps = () if found.others else found.jumps
    stays = (*found.others, *found.leading)
    lines = ["*filter", *(f"-D {rule[3:]}" for rule in (*jumps, *found.rules))]
    if not stays:
        lines.append("-X KUBE-FIREWALL")
    xtables.restore(tools, "\n".join((*lines, "COMMIT", "")))
    for rule in jumps:
        yield f"{tools} filter: rule {rule}"
    if stays:
        yield f"{tools} filter: our rule of chain KUBE-FIREWALL, which stays because of {stays[0]}"
    else:
        yield f"{tools} filter: chain KUBE-FIREWALL"


def _guard_rules() -> frozenset[Rule]:
    options = Options(localhost_node_ports=True)
    shape = shape_of(HostState(node_name="any"), "IPv4", options, Features(), comments=True)
    return frozenset(map(normal, frame(shape).chains[GUARD]))


def _find_guard(lines: Iterable[str]) -> _Guard:
    wanted = _guard_rules()
    inside = f"-A {GUARD.chain} "
    rules: list[Rule] = []
    jumps: list[Rule] = []
    others: list[Rule] = []
    leading: list[Rule] = []
    table = ""
    for line in map(str.rstrip, lines):
        if line.startswith("*"):
            table = line[1:]
        elif table != GUARD.table or GUARD.chain not in line:
            continue
        elif line.startswith(inside):
            (rules if normal(line.removeprefix(inside)) in wanted else others).append(line)
        elif line in _GUARD_JUMPS:
            jumps.append(line)
        elif kubechains.target_of(line) == GUARD.chain:
            leading.append(line)
    return _Guard(tuple(rules), tuple(jumps), tuple(others), tuple(leading))
