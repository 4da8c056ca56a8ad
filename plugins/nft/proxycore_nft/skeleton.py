"""The constant part of a table: its sets, maps and chains, as text that `nft -f` loads and an operator can read.

Everything that changes while we run is a set element.  What depends on configuration (the masquerade bit, an interface name,
"node ports on all addresses") is in the text; another text has another digest, and the table is then replaced as a whole.
Chains are named as in kube-proxy's nftables mode where they mean the same.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

import msgspec

from proxycore.api import ConfigError, Family, HostState, LocalPodsByInterface

from . import classes, layout

DIGEST_PREFIX = "skeleton-"
AFFINITY_SIZE = 262144
"""Clients remembered per family; further ones are balanced anew with each connection."""

SET_NAMES = frozenset(
    {
        *("frontends", "node-ports", "pools", "classes", "endpoints"),
        *("slots", "sticky-endpoints", "local-sticky-endpoints", "affinity", "refusals"),
        *("cluster-ips", "node-addresses", "local-pods", "service-cidrs"),
        *("firewalled", "allowed-sources", "hairpin"),
    }
)
"""All sets and maps of a table."""


class Hook(NamedTuple):
    """Where a base chain stands; numbers are the kernel's (NF_INET_*, NF_ACCEPT)."""

    type: str
    number: int
    priority: int
    policy: int = 1


HOOKS: dict[str, tuple[Hook, str]] = {
    "filter-prerouting-pre-dnat": (Hook("filter", 0, -110), "hook prerouting priority dstnat - 10"),
    "filter-output-pre-dnat": (Hook("filter", 3, -110), "hook output priority -110"),
    "nat-prerouting": (Hook("nat", 0, -100), "hook prerouting priority dstnat"),
    "nat-output": (Hook("nat", 3, -100), "hook output priority -100"),
    "filter-input": (Hook("filter", 1, 0), "hook input priority filter"),
    "filter-forward": (Hook("filter", 2, 0), "hook forward priority filter"),
    "filter-output": (Hook("filter", 3, 0), "hook output priority filter"),
    "nat-postrouting": (Hook("nat", 4, 100), "hook postrouting priority srcnat"),
}
"""Base chains, and what follows their type in text."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What the text of one family's table depends on."""

    family: Family
    masquerade_bit: int
    node_ports_everywhere: bool
    pod_interface: str | None = None
    pod_interface_prefix: bool = False


def shape_of(host: HostState, family: Family) -> Shape:
    """The shape that a host needs.  Raises ConfigError for an interface name that Linux does not allow."""
    detect = host.detect_local
    by_interface = detect if isinstance(detect, LocalPodsByInterface) else None
    if by_interface is not None and not re.fullmatch(r"[A-Za-z0-9_.:@-]{1,15}", by_interface.name):
        raise ConfigError(f"{by_interface.name!r} is not the name of an interface", field="detectLocal")
    return Shape(
        family=family,
        masquerade_bit=host.masquerade_bit,
        node_ports_everywhere=host.node_ports(family).all_local,
        pod_interface=by_interface.name if by_interface else None,
        pod_interface_prefix=by_interface.prefix if by_interface else False,
    )


def digest(shape: Shape) -> str:
    """Identity of the text and of the layout that its elements follow; part of a chain's name in the kernel."""
    samples = [classes.Class(2, local, seconds) for local in (False, True) for seconds in (0, 1)]
    chains = [line for item in samples for line in classes.text("ip", item, set())]
    whole = f"{layout.VERSION}\n{table_text(shape, 'T', '')}{hook_text(shape, 'T')}{chains}"
    return hashlib.sha256(whole.encode()).hexdigest()[:12]


def table_text(shape: Shape, table: str, mark: str | None = None) -> str:
    """Everything but the hooks: loaded alone, it sees no packet."""
    if mark is None:
        mark = DIGEST_PREFIX + digest(shape)
    f = layout.NFT_FAMILY[shape.family]
    key = f"{f} daddr . meta l4proto . th dport"
    port = "meta l4proto . th dport"
    protocols = "meta l4proto { tcp, udp, sctp }"
    bit = f"0x{1 << shape.masquerade_bit:08x}"
    reject, drop = layout.REJECT << layout.CLASS_SHIFT, layout.DROP << layout.CLASS_SHIFT
    loopback = "127.0.0.0/8" if f == "ip" else "::1"
    if shape.node_ports_everywhere:
        at_node = f"fib daddr type local {f} daddr != {loopback}"
    else:
        at_node = f"{f} daddr @node-addresses"
    by_interface = ""
    if shape.pod_interface:
        star = "*" if shape.pod_interface_prefix else ""
        by_interface = f'iifname "{shape.pod_interface}{star}" goto %s'

    def by_client(chain: str) -> str:
        lines = [f"\t\t{by_interface % (chain + '-pod')}\n"] if by_interface else []
        lines.append(f"\t\t{f} saddr @local-pods goto {chain}-pod\n")
        lines.append(f"\t\tfib saddr type local goto {chain}-node\n")
        lines.append(f"\t\tgoto {chain}-outside\n")
        return "".join(lines)

    def client(name: str, masquerade: int, local: int) -> str:
        return f"""
	chain client-{name} {{
		meta priority & 0x{masquerade:08x} != 0 meta mark set meta mark | {bit}
		meta priority & 0x{local:08x} != 0 meta priority set meta priority | 0x{layout.LOCAL:08x}
		goto choose-pool
	}}
	chain refuse-{name} {{
		meta priority & 0x{local:08x} != 0 meta priority set meta priority | 0x{layout.LOCAL:08x}
		goto refuse-by-pool
	}}"""

    marker = f"\n\tchain {mark} {{\n\t}}" if mark else ""
    return f"""\
table {f} {table} {{
	comment "Services of this node, kept by proxycore; changes made by hand are undone"
	map frontends {{
		comment "cluster, external and load-balancer addresses: ticket of the Service port"
		typeof {key} : meta priority
		counter
	}}
	map node-ports {{
		comment "node ports: ticket of the Service port"
		typeof {port} : meta priority
		counter
	}}
	map pools {{
		comment "Service port and pool: class (how many endpoints, with affinity or not) and index"
		typeof meta priority : meta priority
	}}
	map classes {{
		comment "class: the chain that chooses one of so many endpoints"
		typeof meta priority : verdict
	}}
	map endpoints {{
		comment "Service port and slot: endpoint; slots of the local pool start at {layout.LOCAL_SLOT}"
		typeof meta priority . numgen random mod 65536 : {f} daddr . th dport
	}}
	map slots {{
		comment "Service port with affinity and slot: handle of the endpoint"
		typeof meta priority . numgen random mod 65536 : meta priority
	}}
	map sticky-endpoints {{
		comment "handle: endpoint, in the cluster pool"
		typeof meta priority : {f} daddr . th dport
	}}
	map local-sticky-endpoints {{
		comment "handle: endpoint, in the local pool"
		typeof meta priority : {f} daddr . th dport
	}}
	map affinity {{
		comment "client and Service port: handle of the endpoint that it keeps to"
		typeof {f} saddr . meta priority : meta priority
		size {AFFINITY_SIZE}
		flags dynamic,timeout
	}}
	map refusals {{
		comment "class of an empty pool: what new connections get"
		typeof meta priority : verdict
	}}
	set cluster-ips {{
		comment "their other ports are rejected"
		typeof {f} daddr
	}}
	set node-addresses {{
		comment "addresses that serve node ports"
		typeof {f} daddr
	}}
	set local-pods {{
		comment "sources that are pods of this node"
		typeof {f} saddr
		flags interval
	}}
	set service-cidrs {{
		comment "addresses of these that no Service has are dropped"
		typeof {f} daddr
		flags interval
	}}
	set firewalled {{
		comment "load-balancer frontends with source ranges"
		typeof {key}
	}}
	set allowed-sources {{
		comment "who may reach them"
		typeof {key} . {f} saddr
		flags interval
	}}
	set hairpin {{
		comment "endpoints that may be their own client"
		typeof {f} saddr . {f} daddr
	}}{marker}
	chain reject-client {{
		meta l4proto tcp reject with tcp reset
		reject
	}}
	chain endpoints-first {{
		comment "a pool that shrank while the packet was under way: slot 0 is always there"
		{protocols} dnat {f} to meta priority . numgen random mod 1 map @endpoints
	}}
	chain local-endpoints-first {{
		{protocols} dnat {f} to meta priority . numgen random mod 1 offset {layout.LOCAL_SLOT} map @endpoints
	}}
	chain choose-pool {{
		meta priority set meta priority & 0x{layout.POOL_MASK:08x}
		meta priority set meta priority map @pools
		meta priority & 0x{layout.CLASS_MASK:08x} vmap @classes
	}}
	chain refuse-by-pool {{
		comment "with endpoints: its Service changed while the packet was under way; the client tries again"
		meta priority set meta priority & 0x{layout.POOL_MASK:08x}
		meta priority set meta priority map @pools
		meta priority & 0x{layout.CLASS_MASK:08x} vmap @refusals
		drop
	}}\
{client("pod", layout.MASQUERADE_POD, layout.LOCAL_POD)}\
{client("node", layout.MASQUERADE_NODE, layout.LOCAL_NODE)}\
{client("outside", layout.MASQUERADE_OUTSIDE, layout.LOCAL_OUTSIDE)}
	chain client {{
{by_client("client")}\
	}}
	chain refuse-client {{
{by_client("refuse")}\
	}}
	chain frontend {{
		comment "not translated: something changed while the packet was under way, so it is looked up again"
		jump client
		meta priority set {key} map @frontends goto client
	}}
	chain node-port {{
		jump client
		meta priority set {port} map @node-ports goto client
	}}
	chain services {{
		meta priority set {key} map @frontends goto frontend
		{at_node} meta priority set {port} map @node-ports goto node-port
	}}
	chain no-endpoints {{
		comment "new connections to a frontend that were not translated"
		meta priority set {key} map @frontends goto refuse-client
		{at_node} meta priority set {port} map @node-ports goto refuse-client
	}}
	chain unserved {{
		jump no-endpoints
		{f} daddr @cluster-ips goto reject-client
		{f} daddr @service-cidrs drop
	}}
	chain source-ranges {{
		{key} @firewalled {key} . {f} saddr != @allowed-sources drop
	}}
	chain masquerading {{
		ct status & dnat == dnat meta priority set none
		meta mark & {bit} != 0 meta mark set meta mark ^ {bit} masquerade fully-random
		ct status & dnat == dnat {f} saddr . {f} daddr @hairpin masquerade fully-random
	}}
}}
add element {f} {table} refusals {{ 0x{reject:08x} : goto reject-client, 0x{drop:08x} : drop }}
"""


def hook_text(shape: Shape, table: str, *, hooked: bool = True) -> str:
    """The base chains: once they are loaded, the table carries traffic.  Not `hooked`: the same rules in plain chains."""
    f = layout.NFT_FAMILY[shape.family]
    untranslated = "ct state new ct status & dnat != dnat"
    rules = {
        "filter-prerouting-pre-dnat": "ct state new goto source-ranges",
        "filter-output-pre-dnat": "ct state new goto source-ranges",
        "nat-prerouting": "goto services",
        "nat-output": "goto services",
        "filter-input": f"{untranslated} goto no-endpoints",
        "filter-forward": f"{untranslated} goto unserved",
        "filter-output": f"{untranslated} goto unserved",
        "nat-postrouting": "goto masquerading",
    }
    lines = [f"table {f} {table} {{\n"]
    for name, (hook, where) in HOOKS.items():
        head = f"type {hook.type} {where}; " if hooked else ""
        lines.append(f"\tchain {name} {{ {head}{rules[name]}; }}\n")
    return "".join(lines) + "}\n"
