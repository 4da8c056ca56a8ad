"""nftables rules of the shapes that kube-proxy writes, as text for `nft -f`, for Services like those of `cluster`.

`CHAINS`: a chain per endpoint and a verdict map in each Service's chain (before Kubernetes 1.36).  `MAPS`: one rule with a
map of endpoints in each Service's chain (since).  Only what a ClusterIP Service needs is here, and the base chains with
their look-ups; names are as long as theirs.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from typing import Literal

from . import cluster

Shape = Literal["chains", "maps"]
TABLE = "ip kube-proxy"

SKELETON = f"""\
add table {TABLE}
add chain {TABLE} filter-prerouting {{ type filter hook prerouting priority -110 ; }}
add chain {TABLE} filter-input {{ type filter hook input priority -110 ; }}
add chain {TABLE} filter-forward {{ type filter hook forward priority -110 ; }}
add chain {TABLE} filter-output {{ type filter hook output priority -110 ; }}
add chain {TABLE} nat-prerouting {{ type nat hook prerouting priority -100 ; }}
add chain {TABLE} nat-output {{ type nat hook output priority -100 ; }}
add chain {TABLE} nat-postrouting {{ type nat hook postrouting priority 100 ; }}
add chain {TABLE} services
add chain {TABLE} masquerading
add chain {TABLE} mark-for-masquerade
add chain {TABLE} reject-chain
add chain {TABLE} cluster-ips-check
add chain {TABLE} firewall-check
add chain {TABLE} service-endpoints-check
add chain {TABLE} nodeport-endpoints-check
add set {TABLE} cluster-ips {{ type ipv4_addr ; }}
add set {TABLE} nodeport-ips {{ type ipv4_addr ; }}
add map {TABLE} service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict ; }}
add map {TABLE} service-nodeports {{ type inet_proto . inet_service : verdict ; }}
add map {TABLE} no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict ; }}
add map {TABLE} no-endpoint-nodeports {{ type inet_proto . inet_service : verdict ; }}
add map {TABLE} firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict ; }}
add rule {TABLE} mark-for-masquerade meta mark set mark or 0x4000
add rule {TABLE} masquerading meta mark and 0x4000 == 0 return
add rule {TABLE} masquerading meta mark set mark xor 0x4000
add rule {TABLE} masquerading masquerade fully-random
add rule {TABLE} services ip daddr . meta l4proto . th dport vmap @service-ips
add rule {TABLE} services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
add rule {TABLE} reject-chain reject
add rule {TABLE} cluster-ips-check ip daddr @cluster-ips reject
add rule {TABLE} firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule {TABLE} service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
add rule {TABLE} nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
add rule {TABLE} filter-prerouting ct state new jump firewall-check
add rule {TABLE} filter-input ct state new jump nodeport-endpoints-check
add rule {TABLE} filter-input ct state new jump service-endpoints-check
add rule {TABLE} filter-forward ct state new jump service-endpoints-check
add rule {TABLE} filter-forward ct state new jump cluster-ips-check
add rule {TABLE} filter-output ct state new jump service-endpoints-check
add rule {TABLE} filter-output ct state new jump firewall-check
add rule {TABLE} nat-prerouting jump services
add rule {TABLE} nat-output jump services
add rule {TABLE} nat-postrouting jump masquerading
"""


def _hashed(text: str) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:8] + "-" + text


def _service_chain(number: int) -> str:
    return "service-" + _hashed(f"ns-{number % cluster.NAMESPACES}/svc-{number}/tcp/http")


def _endpoint_chain(number: int, address: str) -> str:
    return "endpoint-" + _hashed(f"ns-{number % cluster.NAMESPACES}/svc-{number}/tcp/http__{address}/8080")


def _addresses(number: int, shift: int = 0) -> list[str]:
    return [endpoint.address for endpoint in cluster.state(number, shift=shift).endpoints]


def _service_rules(number: int, shape: Shape, addresses: list[str]) -> Iterator[str]:
    chain = f"{TABLE} {_service_chain(number)}"
    yield (
        f"add rule {chain} ip daddr {cluster.cluster_ip(number)} tcp dport 80 ip saddr != 10.0.0.0/8 "
        "jump mark-for-masquerade"
    )
    if shape == "maps":
        targets = " , ".join(f"{i} : {address} . 8080" for i, address in enumerate(addresses))
        yield f"add rule {chain} meta l4proto tcp dnat ip to numgen random mod {len(addresses)} map {{ {targets} }}"
    else:
        targets = " , ".join(f"{i} : goto {_endpoint_chain(number, a)}" for i, a in enumerate(addresses))
        yield f"add rule {chain} numgen random mod {len(addresses)} vmap {{ {targets} }}"


def _endpoint_rules(number: int, address: str) -> Iterator[str]:
    chain = f"{TABLE} {_endpoint_chain(number, address)}"
    yield f"add rule {chain} ip saddr {address} jump mark-for-masquerade"
    yield f"add rule {chain} meta l4proto tcp dnat to {address}:8080"


def load(services: int, shape: Shape) -> str:
    """Everything, in one transaction: chains before the rules that go to them."""
    chains, rules = [], []
    for number in range(services):
        addresses = _addresses(number)
        chains.append(f"add chain {TABLE} {_service_chain(number)}")
        if shape == "chains":
            for address in addresses:
                chains.append(f"add chain {TABLE} {_endpoint_chain(number, address)}")
                rules += _endpoint_rules(number, address)
        rules += _service_rules(number, shape, addresses)
        key = f"{cluster.cluster_ip(number)} . tcp . 80"
        rules.append(f"add element {TABLE} service-ips {{ {key} : goto {_service_chain(number)} }}")
        rules.append(f"add element {TABLE} cluster-ips {{ {cluster.cluster_ip(number)} }}")
    return SKELETON + "\n".join([*chains, *rules]) + "\n"


def replace_endpoint(number: int, shape: Shape, shift: int) -> str:
    """Another last endpoint: the Service's chain is rewritten; the stale endpoint chain would go later."""
    addresses = _addresses(number, shift)
    lines = [f"flush chain {TABLE} {_service_chain(number)}"]
    if shape == "chains":
        lines.append(f"add chain {TABLE} {_endpoint_chain(number, addresses[-1])}")
        lines += _endpoint_rules(number, addresses[-1])
    lines += _service_rules(number, shape, addresses)
    return "\n".join(lines) + "\n"
