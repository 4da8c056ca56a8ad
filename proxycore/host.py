"""What the configuration means on this node now: from Node object, interfaces and ServiceCIDRs to a HostState.

Semantics: kube-proxy's nodePortAddresses, bindAddress and detectLocalMode.  Unlike there, all of it follows the node.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from .config.model import Config
from .frontends import RESERVED_PORTS
from .model import (
    DetectLocal,
    Family,
    HostState,
    LocalPodsByCIDR,
    LocalPodsByInterface,
    NodePortAddresses,
    Protocol,
    family_of,
)
from .objects import LABEL_ZONE, Node, ServiceCIDR
from .status import NodeStatus

Scope = Literal["global", "site", "link", "host"]

VIRTUAL_INTERFACES = frozenset({"kube-ipvs0"})
"""Interfaces that hold addresses of Services, put there by kube-proxy's ipvs mode: they are not the node's own."""

AUTOSCALER_TAINT = "ToBeDeletedByClusterAutoscaler"

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class InterfaceAddress(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One address of one interface; `scope` is the kernel's (RT_SCOPE_UNIVERSE is `global`)."""

    address: str
    prefix_length: int
    interface: str
    scope: Scope = "global"


class HostResolution(msgspec.Struct, frozen=True, kw_only=True):
    """The node's facts, and a sentence about each thing in the configuration that they leave without effect."""

    state: HostState
    warnings: tuple[str, ...] = ()


def reserved_ports(config: Config) -> frozenset[tuple[int, Protocol]]:
    """Ports that no Service may take from the node: the usual ones, and our own as configured."""
    own = {
        int(address.rpartition(":")[2])
        for address in (config.healthz_bind_address, config.metrics_bind_address)
        if address
    }
    return RESERVED_PORTS | {(port, "TCP") for port in own}


def node_status(node: Node | None) -> NodeStatus:
    """May load balancers and the autoscaler count on this node?  Semantics: KEP-3836 and kube-proxy's /healthz."""
    if node is None:
        return NodeStatus()
    if node.metadata.deletion_timestamp is not None:
        return NodeStatus(why=f"Node {node.metadata.name} is being deleted")
    if any(taint.key == AUTOSCALER_TAINT for taint in (node.spec.taints if node.spec else None) or ()):
        return NodeStatus(why=f"Node {node.metadata.name} has the taint {AUTOSCALER_TAINT}")
    return NodeStatus(eligible=True, why="")


def resolve_host(
    config: Config,
    node_name: str,
    node: Node | None,
    addresses: Sequence[InterfaceAddress],
    service_cidrs: Sequence[ServiceCIDR],
    families: Sequence[Family],
) -> HostResolution:
    """The facts that rules depend on.

    `node` is None while nobody has told about it.  `addresses` in the kernel's order, in which an interface's primary
    address comes first.  `families`: what kernel and backend can do, of which the configuration may want fewer.
    """
    wanted = tuple(family for family in families if not config.ip_families or family in config.ip_families)
    own = _own_addresses(addresses, wanted)
    warnings: list[str] = []
    known_cidrs = _service_cidrs(service_cidrs, wanted)
    primary = {family: _primary(config, node, own, family, warnings) for family in wanted}
    node_ports = {family: _node_ports(config, family, primary[family], own, warnings) for family in wanted}
    state = HostState(
        node_name=node_name,
        families=wanted,
        node_ips=tuple(address for address in primary.values() if address is not None),
        node_addresses=tuple(sorted({entry.address for entry in own}, key=_order)),
        node_ports_ipv4=node_ports.get("IPv4", NodePortAddresses()),
        node_ports_ipv6=node_ports.get("IPv6", NodePortAddresses()),
        service_cidrs=known_cidrs,
        detect_local=_detect_local(config, node, wanted, known_cidrs, warnings),
        masquerade_all=config.masquerade_all,
        masquerade_bit=config.masquerade_bit,
        external_ips=config.allow_external_ips,
        zone=(node.metadata.labels or {}).get(LABEL_ZONE) or None if node else None,
    )
    return HostResolution(state=state, warnings=tuple(warnings))


def _order(address: str) -> tuple[int, int]:
    parsed = ipaddress.ip_address(address)
    return parsed.version, int(parsed)


def _own_addresses(
    addresses: Iterable[InterfaceAddress], families: Sequence[Family]
) -> list[InterfaceAddress]:
    """Those under which others can reach the node: not loopback, and not IPv6 link-local, which needs an interface."""
    found = []
    for entry in addresses:
        parsed = ipaddress.ip_address(entry.address)
        unusable = parsed.is_loopback or (parsed.version == 6 and parsed.is_link_local)
        if (
            not unusable
            and entry.interface not in VIRTUAL_INTERFACES
            and family_of(entry.address) in families
        ):
            found.append(entry)
    return found


# -- the node's primary address -------------------------------------------------------------------------------------


def _primary(
    config: Config,
    node: Node | None,
    own: Sequence[InterfaceAddress],
    family: Family,
    warnings: list[str],
) -> str | None:
    """bindAddress if it names one; else the Node's, internal before external; else the first one of an interface."""
    bind = ipaddress.ip_address(config.bind_address)
    if not bind.is_unspecified and family_of(config.bind_address) == family:
        return config.bind_address
    told = _node_object_address(node, family)
    if told is not None:
        return told
    guessed = next(
        (entry for entry in own if family_of(entry.address) == family and entry.scope == "global"), None
    )
    if guessed is None:
        return None
    if node is not None and "primary" in config.node_port_addresses:
        warnings.append(
            f"Node {node.metadata.name} names no {family} address: {guessed.address} of {guessed.interface} is taken "
            "as primary; bindAddress would name another"
        )
    return guessed.address


def _node_object_address(node: Node | None, family: Family) -> str | None:
    listed = (node.status.addresses if node and node.status else None) or ()
    for kind in ("InternalIP", "ExternalIP"):
        for entry in listed:
            if entry.type == kind and (address := _canonical(entry.address)) and family_of(address) == family:
                return address
    return None


def _canonical(text: str) -> str | None:
    try:
        return str(ipaddress.ip_address(text.strip()))
    except ValueError:
        return None


# -- nodePortAddresses ----------------------------------------------------------------------------------------------


def _node_ports(
    config: Config,
    family: Family,
    primary: str | None,
    own: Sequence[InterfaceAddress],
    warnings: list[str],
) -> NodePortAddresses:
    """Where node ports answer: everywhere, if an entry says so or the family has none; else where entries match."""
    entries = config.node_port_addresses
    networks = [
        ipaddress.ip_network(entry) for entry in entries if "/" in entry and family_of(entry) == family
    ]
    if "all" in entries or any(network.prefixlen == 0 for network in networks):
        return NodePortAddresses(all_local=True)
    if not networks and "primary" not in entries and "localhost" not in entries:
        warnings.append(
            f"nodePortAddresses has no entry for {family}: node ports answer on all {family} addresses of this node"
        )
        return NodePortAddresses(all_local=True)
    found = {
        entry.address
        for entry in own
        if family_of(entry.address) == family and _within(entry.address, networks)
    }
    if "primary" in entries and primary is not None and not ipaddress.ip_address(primary).is_loopback:
        found.add(primary)
    if (
        not found
        and not config.localhost_node_ports
        and any(family_of(entry.address) == family for entry in own)
    ):
        shown = ", ".join(entry for entry in entries if "/" not in entry or family_of(entry) == family)
        warnings.append(
            f"nodePortAddresses ({shown}) matches no {family} address of this node beyond loopback: "
            f"node ports are closed to {family}"
        )
    return NodePortAddresses(addresses=tuple(sorted(found, key=_order)))


def _within(address: str, networks: Iterable[_Network]) -> bool:
    parsed = ipaddress.ip_address(address)
    return any(parsed in network for network in networks)


# -- local pods -----------------------------------------------------------------------------------------------------


def _detect_local(
    config: Config,
    node: Node | None,
    families: Sequence[Family],
    service_cidrs: Sequence[str],
    warnings: list[str],
) -> DetectLocal | None:
    mode = config.detect_local_mode
    if mode == "BridgeInterface":
        return LocalPodsByInterface(config.bridge_interface)
    if mode == "InterfaceNamePrefix":
        return LocalPodsByInterface(config.interface_name_prefix, prefix=True)
    if mode == "ClusterCIDR":
        origin, listed = "clusterCIDR", config.cluster_cidr
    else:
        origin = "spec.podCIDRs of the Node" if node else "no Node object is there yet, so that spec.podCIDRs"
        listed = _pod_cidrs(node, warnings)
    cidrs = _first_of_each(listed, families)
    missing = [family for family in families if all(family_of(cidr) != family for cidr in cidrs)]
    # Most clusters have one family though the host can do two: only Services of the other one make it a loss.
    expected = {family_of(cidr) for cidr in service_cidrs} if cidrs else set(missing)
    lost = [family for family in missing if family in expected]
    if lost:
        warnings.append(
            f"detectLocalMode {mode}: {origin} has no CIDR for {' and '.join(lost)}: no source is known as a local pod"
        )
    return LocalPodsByCIDR(cidrs) if cidrs else None


def _pod_cidrs(node: Node | None, warnings: list[str]) -> tuple[str, ...]:
    spec = node.spec if node else None
    if spec is None:
        return ()
    listed = spec.pod_cidrs or ((spec.pod_cidr,) if spec.pod_cidr else ())
    return tuple(_networks(listed, "spec.podCIDRs of the Node", warnings))


def _first_of_each(cidrs: Sequence[str], families: Sequence[Family]) -> tuple[str, ...]:
    first: dict[Family, str] = {}
    for cidr in cidrs:
        first.setdefault(family_of(cidr), cidr)
    return tuple(first[family] for family in families if family in first)


def _networks(texts: Iterable[str], origin: str, warnings: list[str]) -> list[str]:
    found = []
    for text in texts:
        try:
            found.append(str(ipaddress.ip_network(text.strip(), strict=False)))
        except ValueError:
            warnings.append(f"{origin}: {text!r} is no CIDR and is ignored")
    return found


def _service_cidrs(objects: Iterable[ServiceCIDR], families: Sequence[Family]) -> tuple[str, ...]:
    """All ranges of all objects; the API server has checked them, so that what is no CIDR is simply none."""
    texts = (text for item in objects for text in (item.spec.cidrs if item.spec else None) or ())
    known = {cidr for cidr in _networks(texts, "ServiceCIDR", []) if family_of(cidr) in families}
    return tuple(sorted(known, key=lambda cidr: (_order(cidr.partition("/")[0]), cidr)))
