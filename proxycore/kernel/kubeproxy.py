"""What kube-proxy left in this network namespace, in any of its modes, and taking it away.

Nothing that cannot be told to be kube-proxy's is touched, and no kernel module is loaded for looking.  Each step of a removal
leaves what the later ones need to find their part, so that one that was killed can be taken up again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from ipaddress import ip_address, ip_network
from typing import Literal

import msgspec

from .. import kubechains
from ..errors import KernelError
from ..kubechains import TableRules
from ..model import Family, Protocol
from . import ipsets, ipvs, links, nftables, xtables
from .conntrack import Conntrack
from .flow import packed
from .ipvs import VirtualServer
from .nftables import NftFamily
from .xtables import Tools, Variant

Part = Literal["nftables", "iptables", "ipvs"]
"""What belongs together, by kube-proxy's mode; `ipvs` are virtual servers, sets and the link."""

NFT_TABLE = "kube-proxy"
LINK = "kube-ipvs0"
_NFT: dict[Family, NftFamily] = {"IPv4": "ip", "IPv6": "ip6"}
_VARIANTS: tuple[Variant, ...] = ("legacy", "nft")
_SETS = (
    "LOOP-BACK",
    "CLUSTER-IP",
    "EXTERNAL-IP",
    "EXTERNAL-IP-LOCAL",
    "LOAD-BALANCER",
    "LOAD-BALANCER-LOCAL",
    "LOAD-BALANCER-FW",
    "LOAD-BALANCER-SOURCE-CIDR",
    "LOAD-BALANCER-SOURCE-IP",
    "NODE-PORT-TCP",
    "NODE-PORT-LOCAL-TCP",
    "NODE-PORT-UDP",
    "NODE-PORT-LOCAL-UDP",
    "NODE-PORT-SCTP-HASH",
    "NODE-PORT-LOCAL-SCTP-HASH",
    "HEALTH-CHECK-NODE-PORT",
    "IPVS-IPS",
)
_LONGEST_SET_NAME = 31
SETS = tuple(f"KUBE-{name}" for name in _SETS) + tuple(f"KUBE-6-{name}"[:_LONGEST_SET_NAME] for name in _SETS)
"""Names of kube-proxy's sets: the kernel's limit cuts those for IPv6."""
_NODE_PORT_SETS: Mapping[Protocol, tuple[str, ...]] = {
    "TCP": ("KUBE-NODE-PORT-TCP", "KUBE-6-NODE-PORT-TCP"),
    "UDP": ("KUBE-NODE-PORT-UDP", "KUBE-6-NODE-PORT-UDP"),
    "SCTP": ("KUBE-NODE-PORT-SCTP-HASH", "KUBE-6-NODE-PORT-SCTP-HASH"),
}
_IPS_DST_NAT = 1 << 5
"""Bit of a flow whose destination connection tracking itself translates."""
_SET_SECONDS = 5.0
"""So long the kernel may take to notice that nothing refers to a set any more."""

Told = Callable[[str], None]


class Census(msgspec.Struct, frozen=True, kw_only=True):
    """What there is of kube-proxy's.

    `rules`: by tool, filter tables first.  `out_of_reach`: what is there and cannot be removed, a sentence each;
    `unread`: where we could not look, and why.
    """

    nft_tables: tuple[tuple[NftFamily, str], ...] = ()
    rules: tuple[tuple[Tools, TableRules], ...] = ()
    servers: tuple[VirtualServer, ...] = ()
    sets: tuple[str, ...] = ()
    link: bool = False
    out_of_reach: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def removable(self) -> bool:
        """Is there anything that remove() would take away?"""
        return bool(
            self.nft_tables or any(not rules.empty for _, rules in self.rules) or self.servers
        ) or bool(self.sets or self.link)

    @property
    def found(self) -> bool:
        """Is there anything at all?"""
        return self.removable or bool(self.out_of_reach)

    @property
    def at_work(self) -> bool:
        """If this comes back after it was removed: does it take a running kube-proxy to make it?"""
        return bool(self.nft_tables or self.servers or self.link) or any(
            kubechains.is_at_work(rules) for _, rules in self.rules
        )

    def summary(self) -> tuple[str, ...]:
        """What was found, a short phrase each."""
        return tuple(self._summary())

    def _summary(self) -> Iterator[str]:
        yield from (f"nftables table {family} {name}" for family, name in self.nft_tables)
        for tools, rules in self.rules:
            if not rules.empty:
                yield f"{len(rules.chains)} KUBE-* chains in {tools} table {rules.table}"
        if self.servers:
            yield f"{len(self.servers)} IPVS virtual servers"
        if self.sets:
            yield f"{len(self.sets)} KUBE-* IP sets"
        if self.link:
            yield f"link {LINK}"
        yield from self.out_of_reach

    def warnings(self) -> tuple[str, ...]:
        """What will be missed once this is gone."""
        return tuple(
            f"{tools} drops forwarded packets that no rule accepts (policy of chain FORWARD), and kube-proxy's rules that "
            "accept traffic of Services go: accept forwarded traffic of pods by a rule of your own"
            for tools, rules in self.rules
            if "FORWARD" in rules.policy_drop and "KUBE-FORWARD" in rules.chains
        )


def census(
    *, without: Collection[Part] = (), held: Collection[str] = (), exclude_cidrs: Collection[str] = ()
) -> Census:
    """Look for what kube-proxy left in the network namespace of this thread.

    `without`: parts that the backend in force owns itself.  `held`: what it owns of the part `iptables`, by names of tools
    such as `iptables-nft`.  `exclude_cidrs`: virtual servers on these addresses are
    somebody else's, as kube-proxy's `ipvs.excludeCIDRs` says.  Raises KernelError: netlink cannot be used here.
    """
    out_of_reach: list[str] = []
    unread: list[str] = []
    nft_tables: list[tuple[NftFamily, str]] = []
    rules: list[tuple[Tools, TableRules]] = []
    chains: dict[Family, frozenset[tuple[str, str]]] = {}
    with nftables.NfTables() as kernel:
        for family, nft in _NFT.items():
            if "nftables" not in without and NFT_TABLE in kernel.tables(nft):
                nft_tables.append((nft, NFT_TABLE))
            if "iptables" not in without:
                chains[family] = frozenset(
                    (table, chain)
                    for table, chain in kernel.chains(nft)
                    if kubechains.is_kube_proxys(table, chain)
                )
    if "iptables" not in without:
        rules, out_of_reach, unread = _iptables(chains, held)
    servers, sets, link = _ipvs(exclude_cidrs) if "ipvs" not in without else ((), (), False)
    return Census(
        nft_tables=tuple(nft_tables),
        rules=tuple(rules),
        servers=servers,
        sets=sets,
        link=link,
        out_of_reach=tuple(out_of_reach),
        unread=tuple(unread),
    )


def _iptables(
    chains: Mapping[Family, frozenset[tuple[str, str]]], held: Collection[str]
) -> tuple[list[tuple[Tools, TableRules]], list[str], list[str]]:
    """Rules that the tools can read; what they cannot is told in a sentence."""
    tools = {(found.variant, found.family): found for found in xtables.find()}
    rules: list[tuple[Tools, TableRules]] = []
    out_of_reach: list[str] = []
    unread: list[str] = []
    for family in _NFT:
        for variant in _VARIANTS:
            if xtables.name_of(variant, family) in held:
                continue
            legacy = xtables.legacy_tables(family) if variant == "legacy" else frozenset()
            seen = {table for table, _ in chains.get(family, ())} if variant == "nft" else set()
            if not seen and legacy is not None and not legacy & kubechains.SHARED.keys():
                continue
            tool = tools.get((variant, family))
            if tool is None:
                if seen:
                    out_of_reach.append(
                        f"KUBE-* chains in {family} tables {', '.join(sorted(seen))} of nf_tables, which need the programs "
                        "iptables-nft-save and iptables-nft-restore (package iptables)"
                    )
                elif legacy:
                    unread.append(
                        f"{family} tables of iptables-legacy are there and no iptables-legacy-save to read them"
                    )
                continue
            try:
                listing = xtables.save(tool, kubechains.read)
            except KernelError as error:
                (out_of_reach if seen else unread).append(f"{tool} cannot be read: {error}")
                continue
            rules.extend((tool, found) for found in listing.tables)
            out_of_reach.extend(
                f"KUBE-* chains in {tool} table {table}, which holds rules that iptables cannot read: "
                f"{xtables.advice_for_unreadable(family, table)}"
                for table in listing.unreadable
                if table in seen
            )
    rules.sort(key=lambda pair: pair[1].table != "filter")
    return rules, out_of_reach, unread


def _ipvs(exclude_cidrs: Collection[str]) -> tuple[tuple[VirtualServer, ...], tuple[str, ...], bool]:
    """Virtual servers as kube-proxy makes them, its sets, and whether its link is there."""
    addresses = links.addresses_by_link()
    bound = addresses.pop(LINK, None)
    sets: tuple[str, ...] = ()
    node_ports: dict[Protocol, set[int]] = {}
    if ipsets.there():
        with ipsets.IPSets() as kernel:
            names = kernel.names()
            sets = tuple(name for name in SETS if name in names)
            for protocol, candidates in _NODE_PORT_SETS.items():
                for name in names.intersection(candidates):
                    node_ports.setdefault(protocol, set()).update(kernel.ports(name))
    if not ipvs.there():
        return (), sets, bound is not None
    local = frozenset().union(*addresses.values())
    excluded = [ip_network(cidr, strict=False) for cidr in exclude_cidrs]

    def is_kube_proxys(server: VirtualServer) -> bool:
        address = ip_address(server.address)
        if any(address in network for network in excluded):
            return False
        if bound is not None and server.address in bound:
            return True
        return server.address in local and server.port in node_ports.get(server.protocol, ())

    with ipvs.Ipvs() as virtual:
        servers = tuple(sorted(filter(is_kube_proxys, virtual.servers())))
    return servers, sets, bound is not None


def open_connections(found: Census) -> int:
    """Connections that are open through the virtual servers; UDP has none that one could wait for."""
    servers = [server for server in found.servers if server.protocol != "UDP"]
    try:
        return ipvs.active_connections(servers) if servers else 0
    except OSError:
        return 0


def remove(found: Census, told: Told) -> None:
    """Take away what the census found: remove_rules(), then remove_ipvs().  Raises KernelError as these do."""
    remove_rules(found, told)
    remove_ipvs(found, told)


def remove_rules(found: Census, told: Told) -> None:
    """Take away rules and tables; `told` gets a line for each thing that is gone.

    Filter rules go first, so that nothing is refused any more that should work; then nf_tables' tables, then the other rules;
    one commit a table in legacy, in pieces with iptables-nft where there are many chains.  Raises KernelError: the rest is
    still there; look again and go on.
    """
    for tools, rules in found.rules:
        if rules.table == "filter":
            _remove_rules(tools, rules, told)
    if found.nft_tables:
        with nftables.NfTables() as kernel:
            for family, name in found.nft_tables:
                if kernel.delete_table(family, name):
                    told(f"nftables: table {family} {name}")
    for tools, rules in found.rules:
        if rules.table != "filter":
            _remove_rules(tools, rules, told)


def remove_ipvs(found: Census, told: Told) -> None:
    """Take away virtual servers, then the sets and the link, which they are known by.

    TCP connections through a virtual server end with it; UDP flows go over to the rules in force.
    Raises KernelError: the rest is still there; it also tells so at the end, when a set is still used.
    """
    if found.servers:
        _release_flows(found.servers, told)
        with ipvs.Ipvs() as virtual:
            for server in found.servers:
                if virtual.delete(server):
                    told(f"IPVS: virtual server {server}")
    stuck = _remove_sets(found.sets, told)
    if found.link and links.delete_link(LINK):
        told(f"link {LINK}")
    if stuck is not None:
        raise stuck


def _release_flows(servers: Collection[VirtualServer], told: Told) -> None:
    """Forget UDP flows that IPVS translates, so that the next packet of each meets the rules in force.

    To connection tracking they look like flows to the virtual address itself, and as long as a client goes on sending it would
    never look for a translation.  Before the servers go: a flow that is taken up again meanwhile is not theirs any more.
    """
    theirs = {(packed(server.address), server.port) for server in servers if server.protocol == "UDP"}
    if not theirs:
        return
    count = 0
    with Conntrack() as table:
        for family in _NFT:
            count += table.delete(
                flow
                for flow in table.udp_flows(family)
                if (flow.destination, flow.destination_port) in theirs and not flow.status & _IPS_DST_NAT
            )
    if count:
        told(f"connection tracking: {count} UDP flows through virtual servers")


def _remove_rules(tools: Tools, rules: TableRules, told: Told) -> None:
    if rules.empty:
        return
    for text in kubechains.removals(rules, chunk_of(tools)):
        xtables.restore(tools, text)
    for line in kubechains.tell(rules, str(tools)):
        told(line)


def chunk_of(tools: Tools) -> int | None:
    """So many chains are to be taken away at once; None: all, for legacy writes the whole table each time."""
    return None if tools.variant == "legacy" else kubechains.CHUNK


def strangers(held: Collection[str]) -> frozenset[str]:
    """Tools, of those that a backend of ours holds, whose rules are not ours any more: the marker is gone.

    kube-proxy removes it with its first sync.  What cannot be read is none.
    """
    chains = {str(tools): _telling(tools) for tools in xtables.find() if str(tools) in held}
    return frozenset(name for name, there in chains.items() if there == {"KUBE-SERVICES"})


def marked() -> frozenset[str]:
    """Names of the tools whose rules bear the marker; what cannot be read does not.  Quick, however many rules there are
    with iptables-nft."""
    found: set[str] = set()
    for tools in xtables.find():
        with contextlib.suppress(KernelError):
            if kubechains.MARKER in _telling(tools):
                found.add(str(tools))
    return frozenset(found)


_TELLING = ("KUBE-SERVICES", kubechains.MARKER)


def _telling(tools: Tools) -> frozenset[str]:
    """Which of these chains there are."""
    return _legacy_nat(tools) if tools.variant == "legacy" else _nft_nat(tools.family)


def _nft_nat(family: Family) -> frozenset[str]:
    with nftables.NfTables() as kernel:
        return frozenset(name for name in _TELLING if kernel.has_chain(_NFT[family], "nat", name))


def _legacy_nat(tools: Tools) -> frozenset[str]:
    if "nat" not in (xtables.legacy_tables(tools.family) or ()):
        return frozenset()
    declared = tuple(f":{name} " for name in _TELLING)

    def read(lines: Iterable[str]) -> frozenset[str]:
        return frozenset(line[1:].partition(" ")[0] for line in lines if line.startswith(declared))

    return xtables.save(tools, read, tables=("nat",))


def _remove_sets(names: Collection[str], told: Told) -> KernelError | None:
    """Destroy sets; the last error about those that are still used, which is returned so that the rest can go on."""
    if not names:
        return None
    stuck: KernelError | None = None
    end = time.monotonic() + _SET_SECONDS
    with ipsets.IPSets() as kernel:
        for name in names:
            while True:
                try:
                    if kernel.destroy(name):
                        told(f"IP set {name}")
                except KernelError as error:
                    # nf_tables lets go of what its deleted rules used a moment later.
                    if error.errno == ipsets.BUSY and time.monotonic() < end:
                        time.sleep(0.05)
                        continue
                    stuck = error
                break
    return stuck
