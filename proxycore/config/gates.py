"""kube-proxy's feature gates, and what becomes of each."""

from __future__ import annotations

from .field import Treatment

Gate = tuple[Treatment, bool, str]
"""Treatment, value that holds here, and the reason."""

GATES: dict[str, Gate] = {
    "AllowServiceExternalIPs": ("obeyed", True, "off: no external IP is served"),
    "KubeProxyNFTablesLocalhostNodePorts": (
        "ignored",
        False,
        "the backend nft has no node ports on loopback addresses in this version",
    ),
    "KubeProxyIPVS": ("ignored", True, "no gate holds a backend back"),
    "NFTablesNetlink": ("ignored", True, "nftables is always spoken to over netlink"),
    "NFTablesProxyMode": ("ignored", True, "settled"),
    "TopologyAwareHints": ("ignored", True, "settled"),
    "ServiceTrafficDistribution": ("ignored", True, "settled"),
    "PreferSameTrafficDistribution": ("ignored", True, "settled"),
    "MultiCIDRServiceAllocator": ("ignored", True, "settled"),
    "LoadBalancerIPMode": ("ignored", True, "settled"),
    "KubeProxyDrainingTerminatingNodes": ("ignored", True, "settled"),
    "ProxyTerminatingEndpoints": ("ignored", True, "settled"),
    "MinimizeIPTablesRestore": ("ignored", True, "settled"),
    "IPTablesOwnershipCleanup": ("ignored", True, "settled"),
    "ServiceInternalTrafficPolicy": ("ignored", True, "settled"),
}
