"""Which Services count, what they open, and whom they masquerade."""

from __future__ import annotations

import pytest

from proxycore.model import FrontendKind, LocalPodsByCIDR, LocalPodsByInterface
from proxycore.objects import (
    ClientIPConfig,
    LoadBalancerIngress,
    Service,
    ServicePort,
    SessionAffinityConfig,
    SlicePort,
)
from proxycore.resolve import resolve
from proxycore.testing.build import (
    HTTP,
    NODE,
    endpoint,
    endpoint_slice,
    frontend_text,
    host,
    service,
    state_text,
)

NODE_PORT = ServicePort(port=80, name="http", protocol="TCP", node_port=30080)


def states(item, *slices, **facts):
    return resolve(item, slices, host(**facts)).states


def reasons(item, *slices, **facts):
    return [problem.reason for problem in resolve(item, slices, host(**facts)).problems]


def frontends(item, kind=None, **facts):
    (state,) = states(item, **facts)
    return [frontend for frontend in state.frontends if kind is None or frontend.kind is kind]


# Which Services are proxied


@pytest.mark.parametrize(
    "item",
    [
        service(cluster_ip=None),
        service(cluster_ip=""),
        service(cluster_ip="None"),
        service(cluster_ip="172.30.0.1", type="ExternalName"),
        Service(metadata=service().metadata),
    ],
)
def test_services_without_cluster_ip_or_of_type_external_name_are_skipped(item):
    assert resolve(item, [endpoint_slice("10.0.0.1")], host()) == ((), (), False)


def test_family_of_cluster_ip_decides_without_ip_families():
    (state,) = states(service(cluster_ip="fd00:172::1", cluster_ips=("fd00:172::1", "172.30.0.1")))
    assert (state.name.family, state.frontends[0].address) == ("IPv6", "fd00:172::1")


def test_cluster_ip_beside_the_family_counts():
    both = states(
        service(
            cluster_ip="fd00:172::1", cluster_ips=("fd00:172::1", "172.30.0.1"), ip_families=("IPv6", "IPv4")
        )
    )
    assert {state.name.family: state.frontends[0].address for state in both} == {
        "IPv4": "172.30.0.1",
        "IPv6": "fd00:172::1",
    }


def test_family_without_cluster_ip_ignores_everything_of_the_service():
    (state,) = states(
        service(
            type="LoadBalancer", external_ips=("2001:db8::9",), ingress=["2001:db8::8"], ports=[NODE_PORT]
        ),
        endpoint_slice("fd00::1", family="IPv6"),
    )
    assert state.name.family == "IPv4"
    assert [str(frontend) for frontend in state.frontends] == ["172.30.0.1:80/tcp", "*:30080/tcp"]
    assert state.endpoints == ()


def test_family_that_the_node_lacks_is_not_served():
    item = service(cluster_ips=("172.30.0.1", "fd00:172::1"), ip_families=("IPv4", "IPv6"))
    assert [state.name.family for state in states(item, families=("IPv6",))] == ["IPv6"]


@pytest.mark.parametrize("address", ["172.30.0", "127.0.0.1", "fd00::1"])
def test_impossible_cluster_ip_takes_its_family_out(address):
    item = service(cluster_ip=address, cluster_ips=(address,), ip_families=("IPv4",))
    assert states(item) == ()
    assert "is ignored, and its family with it" in reasons(item)[0]


def test_cluster_ip_is_canonical():
    assert frontends(service(cluster_ip="172.030.0.01"))[0].address == "172.30.0.1"


# Ports


def test_service_port_joins_slice_ports_by_name_and_protocol():
    item = service(
        ports=[ServicePort(port=53, name="dns", protocol="UDP"), ServicePort(port=53, name="dns-tcp")]
    )
    udp, tcp = states(
        item,
        endpoint_slice(
            "10.0.0.1",
            ports=[
                SlicePort(name="dns", protocol="UDP", port=5353),
                SlicePort(name="dns", protocol="TCP", port=1),
            ],
        ),
        endpoint_slice("10.0.0.2", name="web-2", ports=[SlicePort(name="dns-tcp", port=5354)]),
    )
    assert [str(e) for e in udp.endpoints] == ["10.0.0.1:5353"]
    assert [str(e) for e in tcp.endpoints] == ["10.0.0.2:5354"]
    assert str(udp.name) == "default/web:dns"


def test_unnamed_port_joins_the_empty_name():
    (state,) = states(
        service(ports=[ServicePort(port=80)]), endpoint_slice("10.0.0.1", ports=[SlicePort(name="", port=80)])
    )
    assert str(state.name) == "default/web"
    assert [str(e) for e in state.endpoints] == ["10.0.0.1:80"]


def test_first_of_colliding_ports_wins():
    item = service(
        ports=[
            HTTP,
            ServicePort(port=81, name="http"),
            ServicePort(port=80, name="other"),
            ServicePort(port=80, name="udp", protocol="UDP"),
        ]
    )
    assert [(s.name.port, s.frontends[0].port) for s in states(item)] == [("http", 80), ("udp", 80)]
    assert len(reasons(item)) == 2
    assert all("an earlier port has its name or number" in reason for reason in reasons(item))


def test_first_of_colliding_node_ports_wins():
    item = service(type="NodePort", ports=[NODE_PORT, ServicePort(port=81, name="b", node_port=30080)])
    assert [len(state.frontends) for state in states(item)] == [2, 1]
    assert reasons(item) == ["node port 30080/TCP is ignored: an earlier port has it"]


@pytest.mark.parametrize("number", [0, -1, 65536])
def test_impossible_port_number_is_ignored(number):
    item = service(ports=[HTTP, ServicePort(port=number, name="bad")])
    assert [state.name.port for state in states(item)] == ["http"]
    assert reasons(item) == [f"port 'bad' is ignored: {number} is no port number"]


def test_problems_name_the_service():
    (problem,) = resolve(service(external_ips=("x",)), [], host()).problems
    assert problem == ("Service default/web", "external IP 'x' is ignored: 'x' is not an IP address")


# Frontends


def test_load_balancer_service_opens_everything():
    (state,) = states(
        service(
            type="LoadBalancer",
            external_ips=("192.168.99.11",),
            ingress=["1.2.3.4", "5.6.7.8"],
            ports=[NODE_PORT],
        ),
        endpoint_slice("10.0.0.2", "10.0.0.10"),
    )
    assert state_text(state).splitlines() == [
        "default/web:http TCP IPv4",
        "ClusterIP 172.30.0.1:80/tcp pod=cluster node=cluster+masquerade outside=cluster+masquerade",
        "LoadBalancerIP 1.2.3.4:80/tcp pod=cluster+masquerade node=cluster+masquerade outside=cluster+masquerade",
        "LoadBalancerIP 5.6.7.8:80/tcp pod=cluster+masquerade node=cluster+masquerade outside=cluster+masquerade",
        "ExternalIP 192.168.99.11:80/tcp pod=cluster+masquerade node=cluster+masquerade outside=cluster+masquerade",
        "NodePort *:30080/tcp pod=cluster+masquerade node=cluster+masquerade outside=cluster+masquerade",
        "cluster: 10.0.0.10:8080 10.0.0.2:8080",
        "local: unused",
    ]


def test_ingress_counts_with_an_ip_of_mode_vip_only():
    item = service(
        type="LoadBalancer",
        ingress=[
            LoadBalancerIngress(ip="1.1.1.1"),
            LoadBalancerIngress(ip="1.1.1.2", ip_mode="VIP"),
            LoadBalancerIngress(ip="1.1.1.3", ip_mode="Proxy"),
            LoadBalancerIngress(),
        ],
    )
    assert [f.address for f in frontends(item, FrontendKind.LOAD_BALANCER_IP)] == ["1.1.1.1", "1.1.1.2"]


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "169.254.1.1", "224.0.0.1", "300.1.1.1", ""])
def test_impossible_external_ip_is_refused_with_its_reason(address):
    item = service(external_ips=(address, "192.168.99.11"))
    assert [f.address for f in frontends(item, FrontendKind.EXTERNAL_IP)] == ["192.168.99.11"]
    assert reasons(item)[0].startswith(f"external IP {address!r} is ignored: ")


def test_impossible_load_balancer_address_is_refused_with_its_reason():
    item = service(type="LoadBalancer", ingress=["127.0.0.1"])
    assert frontends(item, FrontendKind.LOAD_BALANCER_IP) == []
    assert reasons(item) == ["load-balancer address '127.0.0.1' is ignored: 127.0.0.1 is a loopback address"]


def test_external_ips_are_split_by_family_and_canonical():
    item = service(external_ips=("192.168.099.11", "2001:DB8::9", "192.168.99.11"))
    assert [f.address for f in frontends(item, FrontendKind.EXTERNAL_IP)] == ["192.168.99.11"]


def test_external_ips_are_not_served_where_the_gate_is_off():
    item = service(type="NodePort", external_ips=("192.168.99.11",))
    assert frontends(item, FrontendKind.EXTERNAL_IP, external_ips=False) == []
    assert reasons(item, external_ips=False) == [
        "external IPs are not served here (feature gate AllowServiceExternalIPs is off)"
    ]


def test_address_that_is_both_keeps_its_firewall():
    item = service(
        type="LoadBalancer",
        ingress=["1.2.3.4"],
        external_ips=("1.2.3.4",),
        load_balancer_source_ranges=("203.0.113.0/24",),
    )
    assert [(f.kind, f.source_ranges) for f in frontends(item)[1:]] == [
        (FrontendKind.LOAD_BALANCER_IP, ("203.0.113.0/24",))
    ]


def test_external_ip_may_be_the_nodes_own_but_not_at_ports_it_needs():
    item = service(
        external_ips=("192.168.0.2",),
        ports=[HTTP, ServicePort(port=22, name="ssh"), ServicePort(port=22, name="u", protocol="UDP")],
    )
    http, ssh, udp = states(item)
    assert [len(state.frontends) for state in (http, ssh, udp)] == [2, 1, 2]
    assert "192.168.0.2 port 22/TCP is ignored: the address is this node's own" in reasons(item)[0]
    assert len(states(item, node_addresses=())[1].frontends) == 2


def test_node_port_that_the_node_needs_is_refused():
    item = service(type="NodePort", ports=[ServicePort(port=80, name="http", node_port=10250)])
    assert frontends(item, FrontendKind.NODE_PORT) == []
    assert reasons(item) == ["node port 10250/TCP is ignored: the node needs that port itself"]
    assert len(resolve(item, [], host(), reserved_ports=frozenset()).states[0].frontends) == 2


# Source ranges


def ranges(item, **facts):
    return [f.source_ranges for f in frontends(item, FrontendKind.LOAD_BALANCER_IP, **facts)]


def balanced(*cidrs, **spec):
    return service(type="LoadBalancer", ingress=["1.2.3.4"], load_balancer_source_ranges=cidrs, **spec)


def test_source_ranges_are_trimmed_and_canonical():
    assert ranges(balanced(" 203.0.113.7/25", "010.0.0.0/8 ")) == [("203.0.113.0/25", "10.0.0.0/8")]


def test_source_ranges_guard_load_balancer_addresses_only():
    item = balanced("203.0.113.0/25", external_ips=("192.168.99.11",), ports=[NODE_PORT])
    assert [(f.kind.value, f.source_ranges) for f in frontends(item)] == [
        ("ClusterIP", None),
        ("LoadBalancerIP", ("203.0.113.0/25",)),
        ("ExternalIP", None),
        ("NodePort", None),
    ]


def test_family_without_ranges_has_no_firewall():
    item = service(
        type="LoadBalancer",
        cluster_ips=("172.30.0.1", "fd00:172::1"),
        ip_families=("IPv4", "IPv6"),
        ingress=["1.2.3.4", "2001:db8:f::4"],
        load_balancer_source_ranges=("203.0.113.0/25",),
    )
    assert {s.name.family: s.frontends[1].source_ranges for s in states(item)} == {
        "IPv4": ("203.0.113.0/25",),
        "IPv6": None,
    }


def test_unreadable_source_range_is_ignored():
    assert ranges(balanced("203.0.113.0/25", "nonsense")) == [("203.0.113.0/25",)]
    assert reasons(balanced("203.0.113.0/25", "nonsense")) == [
        "a source range is ignored: 'nonsense' is not a CIDR"
    ]


def test_a_list_of_source_ranges_of_which_none_can_be_read_admits_nobody():
    assert ranges(balanced("nonsense")) == [()]
    assert reasons(balanced("nonsense")) == [
        "a source range is ignored: 'nonsense' is not a CIDR",
        "no source range can be read: nobody is admitted to its load-balancer addresses",
    ]


def test_ranges_that_admit_the_node_admit_the_address_itself():
    item = balanced("192.168.0.0/24")
    assert ranges(item) == [("192.168.0.0/24", "1.2.3.4/32")]
    assert ranges(item, node_ips=("10.9.9.9",)) == [("192.168.0.0/24",)]


def test_source_ranges_do_not_overlap():
    assert ranges(balanced("10.1.0.0/16", "10.0.0.0/8", "10.0.0.0/8")) == [("10.0.0.0/8",)]
    assert ranges(balanced("1.2.0.0/16", "192.168.0.2/32")) == [("1.2.0.0/16", "192.168.0.2/32")]


def test_range_of_all_addresses_is_no_firewall():
    assert ranges(balanced("10.0.0.0/8", "0.0.0.0/0")) == [None]


# Policies and masquerading


def routes(item, kind=FrontendKind.CLUSTER_IP, **facts):
    (frontend,) = frontends(item, kind, **facts)
    return frontend_text(frontend).split(" ", 2)[2]


LOCAL_NODE_PORT = service(type="NodePort", ports=[NODE_PORT], external_traffic_policy="Local")


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, "pod=cluster node=cluster+masquerade outside=cluster+masquerade"),
        (
            {"detect_local": LocalPodsByInterface("cni0")},
            "pod=cluster node=cluster+masquerade outside=cluster+masquerade",
        ),
        ({"detect_local": None}, "pod=cluster node=cluster outside=cluster"),
        ({"detect_local": LocalPodsByCIDR(("fd00::/32",))}, "pod=cluster node=cluster outside=cluster"),
        (
            {"masquerade_all": True},
            "pod=cluster+masquerade node=cluster+masquerade outside=cluster+masquerade",
        ),
        (
            {"masquerade_all": True, "detect_local": None},
            "pod=cluster+masquerade node=cluster+masquerade outside=cluster+masquerade",
        ),
    ],
)
def test_cluster_ip_is_masqueraded_for_those_who_are_no_local_pods(facts, expected):
    assert routes(service(), **facts) == expected


def test_internal_policy_local_takes_the_local_pool():
    item = service(internal_traffic_policy="Local")
    assert routes(item) == "pod=local node=local+masquerade outside=local+masquerade"
    (state,) = states(item, endpoint_slice("10.0.0.1"))
    assert state.cluster is None


def test_external_policy_cluster_is_always_masqueraded():
    item = service(type="NodePort", ports=[NODE_PORT])
    assert routes(item, FrontendKind.NODE_PORT) == (
        "pod=cluster+masquerade node=cluster+masquerade outside=cluster+masquerade"
    )


def test_external_policy_local_keeps_the_source_and_cuts_short_on_the_node():
    assert (
        routes(LOCAL_NODE_PORT, FrontendKind.NODE_PORT) == "pod=cluster node=cluster+masquerade outside=local"
    )
    assert routes(LOCAL_NODE_PORT) == "pod=cluster node=cluster+masquerade outside=cluster+masquerade"


def test_external_policy_local_without_detector_knows_no_pods():
    expected = "pod=local node=cluster+masquerade outside=local"
    assert routes(LOCAL_NODE_PORT, FrontendKind.NODE_PORT, detect_local=None) == expected


def test_masquerade_all_does_not_touch_external_policy_local():
    expected = "pod=cluster node=cluster+masquerade outside=local"
    assert routes(LOCAL_NODE_PORT, FrontendKind.NODE_PORT, masquerade_all=True) == expected


def test_external_policy_local_counts_only_if_accessible_from_outside():
    (state,) = states(service(external_traffic_policy="Local"))
    assert state.local is None
    item = service(external_traffic_policy="Local", external_ips=("192.168.99.11",))
    assert routes(item, FrontendKind.EXTERNAL_IP) == "pod=cluster node=cluster+masquerade outside=local"


def test_stale_ingress_does_not_make_a_cluster_ip_service_accessible():
    item = service(external_traffic_policy="Local", ingress=["1.2.3.4"])
    assert routes(item, FrontendKind.LOAD_BALANCER_IP) == (
        "pod=cluster+masquerade node=cluster+masquerade outside=cluster+masquerade"
    )


def test_both_policies_local_need_both_pools():
    (state,) = states(
        service(
            type="NodePort",
            ports=[NODE_PORT],
            external_traffic_policy="Local",
            internal_traffic_policy="Local",
        ),
        endpoint_slice(endpoint("10.0.0.1", NODE), endpoint("10.0.0.2", "other")),
    )
    assert state_text(state).splitlines()[-2:] == [
        "cluster: 10.0.0.1:8080 10.0.0.2:8080",
        "local: 10.0.0.1:8080",
    ]


# Health check port and affinity


def test_health_check_node_port_is_for_load_balancers_of_policy_local():
    spec = {"ingress": ["1.2.3.4"], "health_check_node_port": 30000, "external_traffic_policy": "Local"}
    assert states(service(type="LoadBalancer", **spec))[0].health_check_node_port == 30000
    assert states(service(type="NodePort", **spec))[0].health_check_node_port is None
    spec["external_traffic_policy"] = "Cluster"
    assert states(service(type="LoadBalancer", **spec))[0].health_check_node_port is None


def test_missing_health_check_node_port_is_a_problem():
    item = service(type="LoadBalancer", external_traffic_policy="Local", ingress=["1.2.3.4"])
    assert states(item)[0].health_check_node_port is None
    assert "healthCheckNodePort 0 is no port number" in reasons(item)[0]


def test_client_ip_affinity_lasts_three_hours_unless_told():
    assert states(service())[0].affinity_seconds is None
    assert states(service(session_affinity="None"))[0].affinity_seconds is None
    assert states(service(session_affinity="ClientIP"))[0].affinity_seconds == 10800
    config = SessionAffinityConfig(client_ip=ClientIPConfig(timeout_seconds=7))
    item = service(session_affinity="ClientIP", session_affinity_config=config)
    assert states(item)[0].affinity_seconds == 7


@pytest.mark.parametrize(
    ("told", "used", "why"),
    [
        (86400, 86400, None),
        (86401, 86400, "86401 seconds is longer than a day, 86400 is used"),
        (10**17, 86400, f"{10**17} seconds is longer than a day, 86400 is used"),
        (1, 1, None),
        (0, 10800, "0 seconds is no time-out, 10800 is used"),
        (-5, 10800, "-5 seconds is no time-out, 10800 is used"),
    ],
)
def test_affinity_lasts_as_long_as_the_api_admits(told, used, why):
    config = SessionAffinityConfig(client_ip=ClientIPConfig(timeout_seconds=told))
    resolution = resolve(service(session_affinity="ClientIP", session_affinity_config=config), [], host())
    assert resolution.states[0].affinity_seconds == used
    assert [problem.reason for problem in resolution.problems] == (
        [f"sessionAffinityConfig: {why}"] if why else []
    )
