"""What a Service port stands for: values, servers, entries; and what the marks cannot say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxycore.api import FrontendKind, NodePortAddresses, PoolName, Route, Routes, WhenEmpty
from proxycore.policy import external_routes, internal_routes
from proxycore.testing.states import endpoint, frontend, host, name_of, node_port, pool, service
from proxycore_ipvs.entries import Entry, SetKind, SetName
from proxycore_ipvs.fates import CLASSES, DROP, REJECT, Fate, flags_for, meaning, usual
from proxycore_ipvs.host import node_port_addresses, render_host
from proxycore_ipvs.ids import Target
from proxycore_ipvs.plane import Unsupported, render, target_of
from proxycore_ipvs.servers import PERSISTENT, ByMark
from proxycore_ipvs.shape import Shape

SHAPE = Shape(family="IPv4", local_pods="-s 10.0.0.0/8")
NO_DETECTOR = Shape(family="IPv4")
NAME = name_of()
SILENT = pool(when_empty=WhenEmpty.DROP)
NOBODY = pool()
SOME = pool("10.0.0.1:80", "10.0.0.2:80")


def lines(objects):
    return sorted(f"{e}{'' if value is None else f' 0x{value:x}'}" for e, value in objects.entries.items())


def value(routes, cluster=SOME, local=SOME, *, shape=SHAPE, number=1):
    """The value of a frontend with these routes."""
    state = service(NAME, frontend("192.0.2.1", routes=routes), cluster=cluster, local=local)
    objects = render(state, shape, number)
    found = objects.entries.get(Entry(SetName("IPv4", SetKind.VIP), "192.0.2.1", "TCP", 80))
    return objects.unsupported[0].reason if found is None else f"0x{found:x}"


INTERNAL = internal_routes(local=False, detector=True, masquerade_all=False)
INTERNAL_LOCAL = internal_routes(local=True, detector=True, masquerade_all=False)
EXTERNAL = external_routes(local=False, detector=True)
EXTERNAL_LOCAL = external_routes(local=True, detector=True)


@pytest.mark.parametrize(
    ("routes", "cluster", "local", "wanted"),
    [
        (INTERNAL, SOME, None, "0x48000001"),
        (INTERNAL, NOBODY, None, "0x80000000"),
        (INTERNAL_LOCAL, None, SOME, "0x58000001"),
        (INTERNAL_LOCAL, None, SILENT, "0x78000001"),
        (INTERNAL_LOCAL, None, NOBODY, "0x80000000"),
        (EXTERNAL, SOME, None, "0x40004001"),
        (EXTERNAL, NOBODY, None, "0x80000000"),
        (EXTERNAL_LOCAL, SOME, SOME, "0x54000001"),
        (EXTERNAL_LOCAL, SOME, SILENT, "0x74000001"),
        (EXTERNAL_LOCAL, NOBODY, NOBODY, "0x80000000"),
        (internal_routes(local=False, detector=True, masquerade_all=True), SOME, None, "0x40004001"),
    ],
)
def test_values_of_the_usual_frontends(routes, cluster, local, wanted):
    assert value(routes, cluster, local) == wanted


def test_without_a_detector_nobody_is_another():
    assert (
        value(internal_routes(local=False, detector=False, masquerade_all=False), shape=NO_DETECTOR)
        == "0x40000001"
    )
    assert value(external_routes(local=True, detector=False), shape=NO_DETECTOR) == "0x54000001"


def test_what_no_mark_says_is_told():
    routes = Routes(
        local_pod=Route(PoolName.LOCAL, False),
        node=Route(PoolName.CLUSTER, False),
        outside=Route(PoolName.LOCAL, True),
    )
    assert value(routes) == (
        "no mark says local pod: the local pool, node: the cluster pool, outside: the local pool masqueraded"
    )
    assert value(EXTERNAL_LOCAL, SOME, NOBODY).endswith("outside: rejected")


_FATES = st.one_of(
    st.just(REJECT), st.just(DROP), st.builds(Fate, st.sampled_from(PoolName), st.booleans(), st.none())
)
_ROUTE = st.builds(Route, st.sampled_from(PoolName), st.booleans())


@given(st.tuples(_FATES, _FATES, _FATES), st.builds(Routes, local_pod=_ROUTE, node=_ROUTE, outside=_ROUTE))
def test_flags_mean_what_was_wanted(wanted, routes):
    for classes in (CLASSES, CLASSES[1:], CLASSES[:1]):
        mine = tuple(fate for fate, name in zip(wanted, CLASSES, strict=True) if name in classes)
        flags = flags_for(mine, usual(routes, classes), classes)
        if flags is not None:
            assert meaning(flags, classes) == mine
        elif REJECT not in mine and classes == CLASSES[:1]:
            pytest.fail("with one class everything can be said")


@given(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_whatever_kubernetes_asks_for_can_be_said(internal, local, detector, masquerade_all, here):
    """Pools as the policies choose them: the cluster pool is empty only if the local one is."""
    shape = SHAPE if detector else NO_DETECTOR
    routes = (
        internal_routes(local=local, detector=detector, masquerade_all=masquerade_all)
        if internal
        else external_routes(local=local, detector=detector)
    )
    for cluster, mine in ((SOME, SOME if here else SILENT), (NOBODY, NOBODY)):
        assert value(routes, cluster, mine, shape=shape).startswith("0x")


def test_a_service_with_everything():
    ranges = ("198.51.100.0/24", "0.0.0.0/0", "203.0.113.1/32")
    state = service(
        NAME,
        frontend("172.30.0.1", routes=INTERNAL),
        frontend("192.0.2.1", kind=FrontendKind.EXTERNAL_IP, routes=EXTERNAL_LOCAL),
        frontend(
            "203.0.113.1", kind=FrontendKind.LOAD_BALANCER_IP, routes=EXTERNAL_LOCAL, source_ranges=ranges
        ),
        node_port(30080, routes=EXTERNAL_LOCAL),
        cluster=["10.0.0.1:8080", "10.0.0.2:8080"],
        local=["10.0.0.1:8080"],
    )
    objects = render(state, SHAPE, 0x4001)
    assert objects.unsupported == ()
    assert lines(objects) == [
        "PX4-CIP 172.30.0.1",
        "PX4-FW 203.0.113.1,tcp:80",
        "PX4-FWS 203.0.113.1,tcp:80,0.0.0.0/1",
        "PX4-FWS 203.0.113.1,tcp:80,128.0.0.0/1",
        "PX4-FWS 203.0.113.1,tcp:80,198.51.100.0/24",
        "PX4-FWS 203.0.113.1,tcp:80,203.0.113.1/32",
        "PX4-LOOP 10.0.0.1,tcp:8080,10.0.0.1",
        "PX4-LOOP 10.0.0.2,tcp:8080,10.0.0.2",
        "PX4-NP-tcp 30080 0x54010001",
        "PX4-VIP 172.30.0.1,tcp:80 0x48010001",
        "PX4-VIP 192.0.2.1,tcp:80 0x54010001",
        "PX4-VIP 203.0.113.1,tcp:80 0x54010001",
    ]
    assert {
        str(each.server): [*map(str, each.destinations.values())] for each in objects.servers.values()
    } == {
        f"-f {0x40010001} -s rr": ["-r 10.0.0.1:8080 -m -w 1", "-r 10.0.0.2:8080 -m -w 1"],
        f"-f {0x50010001} -s rr": ["-r 10.0.0.1:8080 -m -w 1"],
    }


def test_whom_nobody_may_dial_has_a_firewall_and_nobody_is_admitted():
    lb = frontend("203.0.113.1", kind=FrontendKind.LOAD_BALANCER_IP, routes=EXTERNAL, source_ranges=())
    kinds = [entry.set.kind for entry in render(service(NAME, lb, cluster=SOME), SHAPE, 1).entries]
    assert SetKind.FIREWALLED in kinds
    assert SetKind.ADMITTED not in kinds


def test_weights_need_a_scheduler_that_knows_them():
    weighted = pool(
        endpoint("10.0.0.1:80", weight=3), endpoint("10.0.0.2:80"), endpoint("10.0.0.3:80", weight=0)
    )
    state = service(NAME, frontend("172.30.0.1"), cluster=weighted)
    (server,) = render(state, SHAPE, 1).servers.values()
    assert server.server.scheduler == "wrr"
    assert [each.weight for each in server.destinations.values()] == [3, 1, 0]


def test_a_pool_of_weightless_endpoints_is_empty():
    idle = pool(endpoint("10.0.0.1:80", weight=0))
    objects = render(service(NAME, frontend("172.30.0.1"), cluster=idle), SHAPE, 1)
    assert objects.servers == {}
    assert lines(objects) == ["PX4-CIP 172.30.0.1", "PX4-VIP 172.30.0.1,tcp:80 0x80000000"]


def test_affinity_needs_the_target_port_to_be_told():
    state = service(NAME, frontend("172.30.0.1"), cluster=["10.0.0.1:8080"], affinity=60)
    target = target_of(state, SHAPE)
    assert target == Target("TCP", 8080)
    objects = render(state, SHAPE, 1, 3)
    assert "PX4-VIP 172.30.0.1,tcp:80 0x48300001" in lines(objects)
    (server,) = objects.servers.values()
    assert (server.server.flags, server.server.timeout_seconds) == (PERSISTENT, 60)


def test_affinity_needs_no_class_where_the_target_port_is_dialled():
    state = service(NAME, frontend("172.30.0.1"), node_port(30080), cluster=["10.0.0.1:80"], affinity=60)
    assert target_of(state, SHAPE) == Target("TCP", 80)
    assert {line.rpartition(" ")[2] for line in lines(render(state, SHAPE, 1, 2)) if " 0x" in line} == {
        "0x48000001",
        "0x48200001",
    }
    alone = service(NAME, frontend("172.30.0.1"), cluster=["10.0.0.1:80"], affinity=60)
    assert target_of(alone, SHAPE) is None
    (server,) = render(alone, SHAPE, 1).servers.values()
    assert server.server.flags == PERSISTENT


@pytest.mark.parametrize(
    ("endpoints", "reason"),
    [
        (
            ["10.0.0.1:8080", "10.0.0.2:8081"],
            "no session affinity: endpoints listen on different ports (8080, 8081)",
        ),
        (["10.0.0.1:8080"], "no session affinity: no class is left for target port 8080/TCP"),
    ],
)
def test_a_service_whose_affinity_cannot_be_had_is_served_without(endpoints, reason):
    state = service(NAME, frontend("172.30.0.1"), cluster=endpoints, affinity=60)
    objects = render(state, SHAPE, 1)
    assert objects.unsupported == (Unsupported(None, reason),)
    (server,) = objects.servers.values()
    assert server.server.flags == 0
    assert "PX4-VIP 172.30.0.1,tcp:80 0x48000001" in lines(objects)


def test_a_node_port_with_source_ranges_is_not_served():
    walled = frontend(None, 30080, kind=FrontendKind.NODE_PORT, source_ranges=("10.0.0.0/8",))
    objects = render(service(NAME, walled, cluster=SOME), SHAPE, 1)
    assert [str(each) for each in objects.unsupported] == [
        "*:30080/tcp: a node port cannot have source ranges"
    ]
    assert objects.entries == {}
    assert objects.servers == {}


def test_node_ports_are_on_the_addresses_there_are_but_loopback():
    facts = host(node_addresses=("192.168.0.2", "10.0.0.1", "2001:db8::1"))
    everywhere = NodePortAddresses(all_local=True)
    assert node_port_addresses(
        host(node_addresses=facts.node_addresses, node_ports_ipv4=everywhere), "IPv4"
    ) == (
        "192.168.0.2",
        "10.0.0.1",
    )
    listed = NodePortAddresses(addresses=("127.0.0.1", "192.168.0.2"))
    assert node_port_addresses(host(node_ports_ipv4=listed), "IPv4") == ("192.168.0.2",)


def test_the_entries_of_the_node():
    facts = host(service_cidrs=("172.30.0.0/16", "::/0"))
    assert [str(entry) for family in ("IPv4", "IPv6") for entry in render_host(facts, family)] == [
        "PX4-NODE 192.168.0.2",
        "PX4-CIDR 172.30.0.0/16",
        "PX6-NODE 2001:db8::1",
        "PX6-CIDR ::/1",
        "PX6-CIDR 8000::/1",
    ]


def test_families_have_servers_of_their_own():
    state = service(name_of(family="IPv6"), frontend("fd00:172:30::1"), cluster=["[fd00::1]:80"])
    assert list(render(state, Shape(family="IPv6"), 1).servers) == [ByMark("IPv6", 0x40000001)]
