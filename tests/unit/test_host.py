"""What the configuration means on a node: addresses, node ports, local pods, ServiceCIDRs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from proxycore.config import Config
from proxycore.host import HostResolution, InterfaceAddress, resolve_host
from proxycore.model import (
    FAMILIES,
    DetectLocal,
    Family,
    HostState,
    LocalPodsByCIDR,
    LocalPodsByInterface,
    NodePortAddresses,
)
from proxycore.objects import (
    Metadata,
    Node,
    NodeAddress,
    NodeSpec,
    NodeStatus,
    ServiceCIDR,
    ServiceCIDRSpec,
)

ALL = NodePortAddresses(all_local=True)
NONE = NodePortAddresses()


def at(interface: str, *addresses: str, scope: str = "global") -> list[InterfaceAddress]:
    return [
        InterfaceAddress(
            address=address,
            prefix_length=int(length),
            interface=interface,
            scope=scope,  # type: ignore[arg-type]
        )
        for address, _, length in (text.partition("/") for text in addresses)
    ]


INTERFACES = [
    *at("lo", "127.0.0.1/8", "::1/128", scope="host"),
    *at("eth0", "192.168.0.9/24", "192.168.0.10/24", "fd00::9/64"),
    *at("eth0", "fe80::9/64", scope="link"),
    *at("eth1", "10.0.0.9/8"),
    *at("kube-ipvs0", "10.96.0.1/32", "fd96::1/128"),
]


def a_node(
    *addresses: str,
    labels: dict[str, str] | None = None,
    cidrs: tuple[str, ...] | None = None,
    cidr: str | None = None,
) -> Node:
    """A Node whose addresses are `InternalIP=10.0.0.1`."""
    return Node(
        metadata=Metadata(name="node-1", labels=labels),
        spec=NodeSpec(pod_cidr=cidr, pod_cidrs=cidrs),
        status=NodeStatus(
            addresses=tuple(
                NodeAddress(type=kind, address=text)
                for kind, _, text in (entry.partition("=") for entry in addresses)
            )
        ),
    )


def service_cidr(name: str, *cidrs: str) -> ServiceCIDR:
    return ServiceCIDR(metadata=Metadata(name=name), spec=ServiceCIDRSpec(cidrs=cidrs))


NODE = a_node("Hostname=node-1", "ExternalIP=203.0.113.9", "InternalIP=192.168.0.9", "InternalIP=fd00::9")
QUIET = Config(cluster_cidr=("10.244.0.0/16", "fd10::/48"))


def resolve(
    config: Config = QUIET,
    node: Node | None = NODE,
    addresses: Sequence[InterfaceAddress] = INTERFACES,
    service_cidrs: Sequence[ServiceCIDR] = (),
    families: Sequence[Family] = FAMILIES,
) -> HostResolution:
    return resolve_host(config, "node-1", node, addresses, service_cidrs, families)


def with_config(**settings: object) -> Config:
    return Config(**{"cluster_cidr": QUIET.cluster_cidr, **settings})  # type: ignore[arg-type]


def node_ports(*entries: str, **more: object) -> tuple[NodePortAddresses, NodePortAddresses, tuple[str, ...]]:
    config = with_config(node_port_addresses=entries, localhost_node_ports=False)
    found = resolve(config, **more)  # type: ignore[arg-type]
    return found.state.node_ports_ipv4, found.state.node_ports_ipv6, found.warnings


def exactly(*addresses: str) -> NodePortAddresses:
    return NodePortAddresses(addresses=addresses)


def test_the_whole_state_of_an_ordinary_node() -> None:
    node = a_node(
        "InternalIP=192.168.0.9",
        "InternalIP=fd00::9",
        labels={"topology.kubernetes.io/zone": "z1", "other": "x"},
    )
    config = with_config(masquerade_all=True, masquerade_bit=3)
    cidrs = [
        service_cidr("b", "10.96.0.0/12", "fd96::/108"),
        service_cidr("a", "10.96.0.0/12", "10.32.0.0/24"),
    ]
    assert resolve(config, node, service_cidrs=cidrs) == HostResolution(
        state=HostState(
            node_name="node-1",
            families=("IPv4", "IPv6"),
            node_ips=("192.168.0.9", "fd00::9"),
            node_addresses=("10.0.0.9", "192.168.0.9", "192.168.0.10", "fd00::9"),
            node_ports_ipv4=ALL,
            node_ports_ipv6=ALL,
            service_cidrs=("10.32.0.0/24", "10.96.0.0/12", "fd96::/108"),
            detect_local=LocalPodsByCIDR(("10.244.0.0/16", "fd10::/48")),
            masquerade_all=True,
            masquerade_bit=3,
            zone="z1",
        )
    )


def test_nothing_known_is_a_state_too() -> None:
    assert resolve(Config(), None, (), (), ("IPv4",)) == HostResolution(
        state=HostState(node_name="node-1", families=("IPv4",), node_ports_ipv4=ALL),
        warnings=(
            "detectLocalMode ClusterCIDR: clusterCIDR has no CIDR for IPv4: no source is known as a local pod",
        ),
    )


def test_the_order_of_interfaces_does_not_change_the_addresses() -> None:
    assert resolve(addresses=INTERFACES[::-1]) == resolve()


# -- families -------------------------------------------------------------------------------------------------------


def test_a_family_that_the_host_lacks_is_left_out_everywhere() -> None:
    found = resolve(families=("IPv4",), service_cidrs=[service_cidr("a", "10.96.0.0/12", "fd96::/108")])
    assert found == HostResolution(
        state=HostState(
            node_name="node-1",
            families=("IPv4",),
            node_ips=("192.168.0.9",),
            node_addresses=("10.0.0.9", "192.168.0.9", "192.168.0.10"),
            node_ports_ipv4=ALL,
            service_cidrs=("10.96.0.0/12",),
            detect_local=LocalPodsByCIDR(("10.244.0.0/16",)),
        )
    )


def test_the_configuration_may_want_fewer_families() -> None:
    config = with_config(ip_families=("IPv6",))
    assert resolve(config).state.families == ("IPv6",)
    assert resolve(config, families=("IPv4",)).state.families == ()


# -- the primary address --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bind", "node", "expected"),
    [
        (
            "0.0.0.0",
            a_node("InternalIP=10.0.0.1", "InternalIP=10.0.0.2", "ExternalIP=1.1.1.1"),
            ("10.0.0.1", "fd00::9"),
        ),
        ("0.0.0.0", a_node("ExternalIP=1.1.1.1", "InternalIP=10.0.0.1"), ("10.0.0.1", "fd00::9")),
        ("0.0.0.0", a_node("ExternalIP=1.1.1.1", "InternalIP=fd00::1"), ("1.1.1.1", "fd00::1")),
        ("0.0.0.0", a_node("InternalIP=FD00:0::1", "InternalIP=nonsense"), ("192.168.0.9", "fd00::1")),
        ("10.9.9.9", a_node("InternalIP=10.0.0.1", "InternalIP=fd00::1"), ("10.9.9.9", "fd00::1")),
        ("fd99::1", a_node("InternalIP=10.0.0.1", "InternalIP=fd00::1"), ("10.0.0.1", "fd99::1")),
        ("::", a_node("InternalIP=10.0.0.1", "InternalIP=fd00::1"), ("10.0.0.1", "fd00::1")),
        ("0.0.0.0", None, ("192.168.0.9", "fd00::9")),
        ("0.0.0.0", Node(metadata=Metadata(name="node-1")), ("192.168.0.9", "fd00::9")),
    ],
)
def test_bind_address_goes_before_internal_before_external_before_interfaces(
    bind: str, node: Node | None, expected: tuple[str, ...]
) -> None:
    assert resolve(with_config(bind_address=bind), node).state.node_ips == expected


def test_only_global_addresses_of_interfaces_are_taken_as_primary() -> None:
    addresses = [*at("eth0", "169.254.1.1/16", scope="link"), *at("eth1", "10.0.0.9/8")]
    assert resolve(node=None, addresses=addresses).state.node_ips == ("10.0.0.9",)
    assert resolve(node=None, addresses=INTERFACES[:2]).state.node_ips == ()


# -- nodePortAddresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "ipv4", "ipv6"),
    [
        (("all",), ALL, ALL),
        (("primary",), exactly("192.168.0.9"), exactly("fd00::9")),
        (("0.0.0.0/0", "::/0"), ALL, ALL),
        (("10.0.0.0/8", "0.0.0.0/0", "fd00::/8"), ALL, exactly("fd00::9")),
        (("192.168.0.0/16", "fd00::/8"), exactly("192.168.0.9", "192.168.0.10"), exactly("fd00::9")),
        (("192.168.0.10/32", "fd00::/8"), exactly("192.168.0.10"), exactly("fd00::9")),
        (("primary", "10.0.0.0/8"), exactly("10.0.0.9", "192.168.0.9"), exactly("fd00::9")),
        (("primary", "localhost", "127.0.0.0/8"), exactly("192.168.0.9"), exactly("fd00::9")),
        (("10.0.0.0/8", "all"), ALL, ALL),
    ],
)
def test_where_node_ports_answer(
    entries: tuple[str, ...], ipv4: NodePortAddresses, ipv6: NodePortAddresses
) -> None:
    assert node_ports(*entries) == (ipv4, ipv6, ())


def test_a_family_without_entry_answers_everywhere_and_is_named() -> None:
    assert node_ports("10.0.0.0/8") == (
        exactly("10.0.0.9"),
        ALL,
        ("nodePortAddresses has no entry for IPv6: node ports answer on all IPv6 addresses of this node",),
    )


def test_entries_that_match_nothing_close_the_family_and_are_named() -> None:
    assert node_ports("172.16.0.0/12", "fd00::/8", "localhost") == (
        NONE,
        exactly("fd00::9"),
        (
            "nodePortAddresses (172.16.0.0/12, localhost) matches no IPv4 address of this node beyond loopback: "
            "node ports are closed to IPv4",
        ),
    )


def test_link_local_and_service_addresses_are_never_node_ports() -> None:
    assert node_ports("fe80::/10", "10.96.0.0/12", "fd96::/16", "10.0.0.0/8")[:2] == (
        exactly("10.0.0.9"),
        NONE,
    )


def test_addresses_of_services_bound_to_loopback_interfaces_are_the_nodes_own() -> None:
    assert node_ports("10.0.0.0/8", "fd00::/8", addresses=[*at("lo", "10.1.1.1/32"), *INTERFACES])[
        0
    ] == exactly("10.0.0.9", "10.1.1.1")


def test_primary_follows_the_node_even_where_no_interface_has_its_address() -> None:
    assert node_ports("primary", node=a_node("ExternalIP=203.0.113.9", "InternalIP=fd00::9"))[:2] == (
        exactly("203.0.113.9"),
        exactly("fd00::9"),
    )


def test_a_loopback_address_is_no_primary_for_node_ports() -> None:
    assert node_ports("primary", node=a_node("InternalIP=127.0.0.1", "InternalIP=fd00::9")) == (
        NONE,
        exactly("fd00::9"),
        (
            "nodePortAddresses (primary) matches no IPv4 address of this node beyond loopback: "
            "node ports are closed to IPv4",
        ),
    )


def test_a_guessed_primary_is_named_where_it_opens_node_ports() -> None:
    assert node_ports("primary", node=a_node("InternalIP=fd00::9")) == (
        exactly("192.168.0.9"),
        exactly("fd00::9"),
        (
            "Node node-1 names no IPv4 address: 192.168.0.9 of eth0 is taken as primary; "
            "bindAddress would name another",
        ),
    )


def test_loopback_alone_is_no_mistake_where_localhost_node_ports_are_on() -> None:
    config = with_config(node_port_addresses=("localhost",), localhost_node_ports=True)
    found = resolve(config)
    assert (found.state.node_ports_ipv4, found.state.node_ports_ipv6, found.warnings) == (NONE, NONE, ())


# -- local pods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            Config(cluster_cidr=("10.244.0.0/16", "fd10::/48")),
            LocalPodsByCIDR(("10.244.0.0/16", "fd10::/48")),
        ),
        (
            Config(cluster_cidr=("fd10::/48", "10.244.0.0/16")),
            LocalPodsByCIDR(("10.244.0.0/16", "fd10::/48")),
        ),
        (Config(detect_local_mode="NodeCIDR"), LocalPodsByCIDR(("10.1.0.0/24", "fd01::/64"))),
        (Config(detect_local_mode="BridgeInterface", bridge_interface="cni0"), LocalPodsByInterface("cni0")),
        (
            Config(detect_local_mode="InterfaceNamePrefix", interface_name_prefix="veth"),
            LocalPodsByInterface("veth", prefix=True),
        ),
    ],
)
def test_how_local_pods_are_told(config: Config, expected: DetectLocal) -> None:
    node = a_node(
        "InternalIP=10.0.0.1", cidrs=("10.1.0.0/24", "10.2.0.0/24", "fd01::/64"), cidr="10.9.0.0/24"
    )
    found = resolve(config, node)
    assert (found.state.detect_local, found.warnings) == (expected, ())


def test_the_old_single_pod_cidr_serves_where_there_is_no_list() -> None:
    found = resolve(Config(detect_local_mode="NodeCIDR"), a_node(cidr="10.1.0.7/24"), families=("IPv4",))
    assert found.state.detect_local == LocalPodsByCIDR(("10.1.0.0/24",))


@pytest.mark.parametrize(
    ("config", "node", "warning"),
    [
        (
            Config(),
            NODE,
            "detectLocalMode ClusterCIDR: clusterCIDR has no CIDR for IPv4 and IPv6: no source is known as a local pod",
        ),
        (
            Config(detect_local_mode="NodeCIDR"),
            NODE,
            "detectLocalMode NodeCIDR: spec.podCIDRs of the Node has no CIDR for IPv4 and IPv6: "
            "no source is known as a local pod",
        ),
        (
            Config(detect_local_mode="NodeCIDR"),
            None,
            "detectLocalMode NodeCIDR: no Node object is there yet, so that spec.podCIDRs has no CIDR "
            "for IPv4 and IPv6: no source is known as a local pod",
        ),
    ],
)
def test_without_a_cidr_nobody_is_a_local_pod_and_that_is_said(
    config: Config, node: Node | None, warning: str
) -> None:
    found = resolve(config, node)
    assert (found.state.detect_local, found.warnings) == (None, (warning,))


def test_a_family_without_cidr_is_named_only_where_services_have_that_family() -> None:
    config = Config(cluster_cidr=("10.244.0.0/16",))
    single = resolve(config, service_cidrs=[service_cidr("a", "10.96.0.0/12")])
    dual = resolve(config, service_cidrs=[service_cidr("a", "10.96.0.0/12", "fd96::/108")])
    assert single.warnings == ()
    assert dual.warnings == (
        "detectLocalMode ClusterCIDR: clusterCIDR has no CIDR for IPv6: no source is known as a local pod",
    )
    assert single.state.detect_local == dual.state.detect_local == LocalPodsByCIDR(("10.244.0.0/16",))


def test_a_pod_cidr_that_is_none_is_named() -> None:
    found = resolve(Config(detect_local_mode="NodeCIDR"), a_node(cidrs=("10.1.0.0/24", "x")))
    assert found.state.detect_local == LocalPodsByCIDR(("10.1.0.0/24",))
    assert found.warnings == ("spec.podCIDRs of the Node: 'x' is no CIDR and is ignored",)


# -- zone -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "zone"),
    [(None, None), ({}, None), ({"topology.kubernetes.io/zone": ""}, None), ({"zone": "x"}, None)],
)
def test_a_node_without_the_label_has_no_zone(labels: dict[str, str] | None, zone: str | None) -> None:
    assert resolve(node=a_node("InternalIP=192.168.0.9", labels=labels)).state.zone == zone
