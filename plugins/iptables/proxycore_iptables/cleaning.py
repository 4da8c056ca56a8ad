"""Taking rules away: all of ours, or what is in the other variant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from proxycore import kubechains
from proxycore.api import Cleanup, HostState, KernelError
from proxycore.kernel import xtables
from proxycore.kernel.xtables import Tools
from proxycore.kubechains import TableRules

from . import counting
from .frame import GUARD, frame
from .host import Host
from .reader import reader
from .rules import MARKER
from .shape import Features, Options, shape_of

ROUTE_LOCALNET = Path("/proc/sys/net/ipv4/conf/all/route_localnet")
_KUBELETS = frozenset({"KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT"})


class Leftovers:
    """Chains of ours or kube-proxy's in the variant that is not used, or of a family that is not served.

    `told`: what there is, a phrase.
    """

    def __init__(self, found: Sequence[tuple[Tools, TableRules]]) -> None:
        self._found = found
        self.told = ", ".join(
            f"{len(rules.chains)} KUBE-* chains in {tools} {rules.table}" for tools, rules in found
        )

    def remove(self) -> None:
        """Take them away.  Raises KernelError: what was not taken away stays."""
        for tools, rules in self._found:
            xtables.restore(tools, kubechains.removal(rules))


def leftovers(host: Host) -> Leftovers | None:
    """What there is beside the tables of a host; None: nothing."""
    found = [
        (tools, rules)
        for tools in xtables.find()
        if tools.variant != host.variant or tools.family not in host.tables
        # Whoever chose the variant has said that these cannot be read.
        if not xtables.missing_rights(tools.variant)
        for rules in _tables(tools)
    ]
    return Leftovers(found) if found else None


def _tables(tools: Tools) -> Iterator[TableRules]:
    if tools.variant == "legacy" and not xtables.legacy_tables(tools.family):
        return
    listing = xtables.save(tools, kubechains.read)
    yield from (rules for rules in listing.tables if not rules.empty)


def clean_up() -> Cleanup:
    """Take all away that is ours, in both variants.  Raises KernelError: the rest is still there."""
    removed: list[str] = []
    for tools in xtables.find():
        found = list(_tables(tools))
        if not any(rules.table == MARKER.table and MARKER.chain in rules.chains for rules in found):
            continue
        removed += _take(tools, found)
        if tools.family == "IPv4":
            removed += _take_guard(tools)
    if removed:
        removed += _take_counters()
    return Cleanup(removed=tuple(removed))


def _take(tools: Tools, found: Sequence[TableRules]) -> Iterator[str]:
    """The mark goes last, with the nat table: whoever is killed on the way finds the rest by it."""
    if tools.variant == "legacy":
        try:
            asked = reader(tools, xtables.LOCK_SECONDS)
        except KernelError:
            # No python-iptables: the tools do it as well.
            pass
        else:
            try:
                yield from asked.cleanup()
            finally:
                asked.close()
            return
    for rules in sorted(found, key=lambda rules: rules.table == MARKER.table):
        xtables.restore(tools, kubechains.removal(rules))
        yield from kubechains.tell(rules, str(tools))


def _take_counters() -> Iterator[str]:
    try:
        with counting.Counting() as kernel:
            yield from (f"nfacct counter {name}" for name in kernel.delete())
    except KernelError:
        return


class _Guard(NamedTuple):
    rules: tuple[str, ...] = ()
    jumps: tuple[str, ...] = ()
    kubelet: bool = False


def _take_guard(tools: Tools) -> Iterator[str]:
    """The guard of localhost node ports, if it is ours alone; not while packets to loopback addresses are routed."""
    found: _Guard = xtables.save(tools, _find_guard)
    if found.kubelet or not found.rules or set(found.rules) != set(_guard_rules()):
        return
    if ROUTE_LOCALNET.exists() and ROUTE_LOCALNET.read_text().strip() != "0":
        try:
            ROUTE_LOCALNET.write_text("0\n")
        except OSError as error:
            yield (
                f"{tools} filter: chain KUBE-FIREWALL stays: without it net.ipv4.conf.all.route_localnet, which cannot be "
                f"set to 0 ({error.strerror}), would open loopback addresses to other hosts"
            )
            return
        yield "net.ipv4.conf.all.route_localnet = 1"
    lines = ["*filter", ":KUBE-FIREWALL - [0:0]", *(f"-D {jump}" for jump in found.jumps)]
    xtables.restore(tools, "\n".join((*lines, "-X KUBE-FIREWALL", "COMMIT", "")))
    yield f"{tools} filter: chain KUBE-FIREWALL"


def _guard_rules() -> tuple[str, ...]:
    options = Options(localhost_node_ports=True)
    shape = shape_of(HostState(node_name="any"), "IPv4", options, Features(), comments=True)
    return frame(shape).chains[GUARD]


def _find_guard(lines: Iterable[str]) -> _Guard:
    rules: list[str] = []
    jumps: list[str] = []
    kubelet, table = False, ""
    for line in lines:
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(":"):
            kubelet = kubelet or line[1:].partition(" ")[0] in _KUBELETS
        elif table == "filter" and line.startswith("-A KUBE-FIREWALL "):
            rules.append(line.removeprefix("-A KUBE-FIREWALL ").strip())
        elif table == "filter" and "KUBE-FIREWALL" in line and kubechains.target_of(line) == GUARD.chain:
            jumps.append(line.removeprefix("-A ").strip())
    return _Guard(tuple(rules), tuple(jumps), kubelet)
