"""Rules as kube-proxy's iptables and ipvs modes leave them, beside those of the kubelet and of others; for iptables-restore."""

from __future__ import annotations

import hashlib
from base64 import b32encode
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from proxycore.testing.netns import Namespace

MARK = "0x4000/0x4000"
VARIANTS = ("legacy", "nft")
OTHER_VARIANT = {"legacy": "nft", "nft": "legacy"}
PREFIX = {"IPv4": "iptables", "IPv6": "ip6tables"}


class Served(NamedTuple):
    """One Service port over TCP.  `endpoints`: `address:port`; none: it is refused.  `firewalled`: a VIP with source ranges."""

    name: str
    address: str
    endpoints: tuple[str, ...] = ()
    node_port: int = 0
    firewalled: str = ""

    @property
    def family(self) -> str:
        return "IPv6" if ":" in self.address else "IPv4"


def chain(kind: str, text: str) -> str:
    """kube-proxy's name for a chain of a Service or endpoint."""
    return f"KUBE-{kind}-{b32encode(hashlib.sha256(text.encode()).digest()).decode()[:16]}"


def kube_proxy(services: Sequence[Served], family: str, *, pod_cidr: str) -> str:
    """Input for restore: filter, mangle and nat as kube-proxy's iptables mode writes them."""
    served = [service for service in services if service.family == family]
    return "\n".join(
        (*_filter(served), "*mangle", ":KUBE-PROXY-CANARY - [0:0]", "COMMIT", *_nat(served, pod_cidr), "")
    )


def _filter(services: Sequence[Served]) -> Iterator[str]:
    yield "*filter"
    for name in (
        "EXTERNAL-SERVICES",
        "FORWARD",
        "NODEPORTS",
        "PROXY-CANARY",
        "PROXY-FIREWALL",
        "SERVICES",
    ):
        yield f":KUBE-{name} - [0:0]"
    new = "-m conntrack --ctstate NEW"
    for place, match, comment, target in (
        ("INPUT", new, "kubernetes externally-visible service portals", "EXTERNAL-SERVICES"),
        ("FORWARD", new, "kubernetes externally-visible service portals", "EXTERNAL-SERVICES"),
        ("INPUT", "", "kubernetes health check service ports", "NODEPORTS"),
        ("FORWARD", new, "kubernetes service portals", "SERVICES"),
        ("OUTPUT", new, "kubernetes service portals", "SERVICES"),
        ("FORWARD", "", "kubernetes forwarding rules", "FORWARD"),
        ("INPUT", new, "kubernetes load balancer firewall", "PROXY-FIREWALL"),
        ("OUTPUT", new, "kubernetes load balancer firewall", "PROXY-FIREWALL"),
        ("FORWARD", new, "kubernetes load balancer firewall", "PROXY-FIREWALL"),
    ):
        yield f'-I {place} {match} -m comment --comment "{comment}" -j KUBE-{target}'
    yield f'-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark {MARK} -j ACCEPT'
    yield (
        '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack '
        "--ctstate RELATED,ESTABLISHED -j ACCEPT"
    )
    for service in services:
        if not service.endpoints:
            yield (
                f'-A KUBE-SERVICES -d {service.address} -p tcp -m comment --comment "{service.name} has no endpoints" '
                "-m tcp --dport 80 -j REJECT"
            )
        if service.firewalled:
            yield (
                f'-A KUBE-PROXY-FIREWALL -d {service.firewalled} -p tcp -m comment --comment "{service.name} traffic not '
                'accepted" -m tcp --dport 80 -j DROP'
            )
    yield "COMMIT"


def _nat(services: Sequence[Served], pod_cidr: str) -> Iterator[str]:
    chains = ["KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ", "KUBE-PROXY-CANARY"]
    rules: list[str] = []
    for service in services:
        text = f"{service.name}tcp"
        svc, ext = chain("SVC", text), chain("EXT", text)
        comment = f'-m comment --comment "{service.name} cluster IP"'
        if not service.endpoints:
            continue
        chains += [svc, ext]
        rules += [
            f"-A KUBE-SERVICES -d {service.address} -p tcp {comment} -m tcp --dport 80 -j {svc}",
            f"-A {ext} -j KUBE-MARK-MASQ",
            f"-A {ext} -j {svc}",
            f"-A {svc} ! -s {pod_cidr} -d {service.address} -p tcp {comment} -m tcp --dport 80 -j KUBE-MARK-MASQ",
        ]
        if service.node_port:
            rules.append(f"-A KUBE-NODEPORTS -p tcp -m tcp --dport {service.node_port} -j {ext}")
        if service.firewalled:
            wall = chain("FW", text)
            chains.append(wall)
            rules.append(f"-A KUBE-SERVICES -d {service.firewalled} -p tcp -m tcp --dport 80 -j {wall}")
            rules.append(f"-A {wall} -s {pod_cidr} -j {ext}")
        for number, endpoint in enumerate(service.endpoints):
            sep = chain("SEP", text + endpoint)
            chains.append(sep)
            left = len(service.endpoints) - number
            chance = f"-m statistic --mode random --probability {1 / left:.10f}" if left > 1 else ""
            address = endpoint.rpartition(":")[0].strip("[]")
            rules += [
                f'-A {svc} -m comment --comment "{service.name} -> {endpoint}" {chance} -j {sep}',
                f"-A {sep} -s {address} -j KUBE-MARK-MASQ",
                f"-A {sep} -p tcp -m tcp -j DNAT --to-destination {endpoint}",
            ]
    yield "*nat"
    yield from (f":{name} - [0:0]" for name in chains)
    yield '-I OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES'
    yield '-I PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES'
    yield '-I POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING'
    yield from rules
    yield (
        '-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this '
        'chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS'
    )
    yield "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000"
    yield f"-A KUBE-POSTROUTING -m mark ! --mark {MARK} -j RETURN"
    yield "-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000"
    yield (
        '-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE '
        "--random-fully"
    )
    yield "COMMIT"


def others(family: str, *, uses_mark: bool = False) -> str:
    """What the kubelet, a network plugin and an operator have; with `uses_mark`, a plugin that uses KUBE-MARK-MASQ."""
    local = "127.0.0.0/8" if family == "IPv4" else "::1/128"
    lines = [
        "*filter",
        ":KUBE-FIREWALL - [0:0]",
        ":KUBE-KUBELET-CANARY - [0:0]",
        ":OPERATOR - [0:0]",
        "-A INPUT -j KUBE-FIREWALL",
        "-A OUTPUT -j KUBE-FIREWALL",
        f'-A KUBE-FIREWALL ! -s {local} -d {local} -m comment --comment "block incoming localnet connections" -m conntrack '
        "! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
        '-A INPUT -m comment --comment "she said \\"no -j KUBE-SERVICES\\" to it" -p tcp --dport 9 -j OPERATOR',
        "-A OPERATOR -m comment --comment KUBE-SERVICES -j RETURN",
        "COMMIT",
        "*mangle",
        ":KUBE-KUBELET-CANARY - [0:0]",
        ":KUBE-IPTABLES-HINT - [0:0]",
        "COMMIT",
        "*nat",
        ":KUBE-KUBELET-CANARY - [0:0]",
        ":KUBE-MARK-DROP - [0:0]",
        ":CNI-HOSTPORT-SETMARK - [0:0]",
        ":KUBE-SVC-OFMYOWN - [0:0]",
        "-A KUBE-MARK-DROP -j MARK --or-mark 0x8000",
        "-A PREROUTING -p tcp --dport 9999 -j CNI-HOSTPORT-SETMARK",
        "COMMIT",
    ]
    if uses_mark:
        lines.insert(-1, "-A CNI-HOSTPORT-SETMARK -j KUBE-MARK-MASQ")
        lines.insert(-2, ":KUBE-MARK-MASQ - [0:0]")
        lines.insert(-2, "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000")
    return "\n".join((*lines, ""))


SETS = """
create KUBE-CLUSTER-IP hash:ip,port
create KUBE-6-CLUSTER-IP hash:ip,port family inet6
create KUBE-NODE-PORT-TCP bitmap:port range 0-65535
create KUBE-6-LOAD-BALANCER-SOURCE-CID hash:ip,port,net family inet6
create KUBE-IPVS-IPS hash:ip
create KUBE-OF-MINE hash:ip
add KUBE-CLUSTER-IP 172.30.0.41,tcp:80
add KUBE-NODE-PORT-TCP 30041
add KUBE-IPVS-IPS 172.30.0.41
"""

IPVS = """
*filter
:KUBE-FORWARD - [0:0]
:KUBE-IPVS-FILTER - [0:0]
:KUBE-IPVS-OUT-FILTER - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SOURCE-RANGES-FIREWALL - [0:0]
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A INPUT -m comment --comment "kubernetes health check rules" -j KUBE-NODE-PORT
-A INPUT -m comment --comment "kube-proxy firewall rules" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kube-proxy firewall rules" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes ipvs access filter" -j KUBE-IPVS-FILTER
-A OUTPUT -m comment --comment "kubernetes ipvs access filter" -j KUBE-IPVS-OUT-FILTER
-A KUBE-IPVS-FILTER -m set --match-set KUBE-CLUSTER-IP dst,dst -j RETURN
-A KUBE-IPVS-FILTER -m conntrack --ctstate NEW -m set --match-set KUBE-IPVS-IPS dst -j REJECT
-A KUBE-PROXY-FIREWALL -j KUBE-SOURCE-RANGES-FIREWALL
-A KUBE-SOURCE-RANGES-FIREWALL -j RETURN
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-LOAD-BALANCER - [0:0]
:KUBE-MARK-MASQ - [0:0]
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT
-A KUBE-NODE-PORT -p tcp -m set --match-set KUBE-NODE-PORT-TCP dst -j KUBE-MARK-MASQ
-A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
COMMIT
"""


def load(namespace: Namespace, variant: str, family: str, text: str) -> None:
    namespace.run([f"{PREFIX[family]}-{variant}-restore", "--noflush", "-w", "20"], stdin=text)


def saved(namespace: Namespace, variant: str, family: str) -> str:
    """What iptables-save says, without times and counters."""
    lines = namespace.run([f"{PREFIX[family]}-{variant}-save"]).stdout.splitlines()
    return "\n".join(line.partition(" [")[0] for line in lines if not line.startswith("#"))
