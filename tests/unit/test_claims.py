"""One address and port has one owner."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest

from proxycore.claims import Claims, claim_text
from proxycore.objects import ServicePort
from proxycore.resolve import resolve
from proxycore.testing.build import HTTP, endpoint, endpoint_slice, host, pool_text, service


def claimant(item):
    key = (item.metadata.namespace, item.metadata.name)
    slices = [endpoint_slice("10.0.0.1", endpoint("10.0.0.2", "node-a"))]
    return key, resolve(item, slices, host()).states, item.metadata.creation_timestamp


def granted(claims, item):
    key, states, _ = claimant(item)
    return [str(frontend) for state in claims.granted(key, states) for frontend in state.frontends]


OLD, YOUNG = "2024-01-01T00:00:00Z", "2024-06-01T00:00:00Z"
IP = "172.30.0.7"
BY_CLUSTER_IP = service("a-cluster", cluster_ip=IP, created=YOUNG)
BY_BALANCER = service("b-balancer", cluster_ip="172.30.0.2", type="LoadBalancer", ingress=[IP], created=YOUNG)
BY_EXTERNAL_IP = service("c-external", cluster_ip="172.30.0.3", external_ips=(IP,), created=OLD)
OLDER = service("z-old", cluster_ip="172.30.0.4", external_ips=(IP,), created="2023-12-31T23:59:59+00:30")
NAMESAKE = service("d-external", cluster_ip="172.30.0.5", external_ips=(IP,), created=OLD)
AGELESS = service("a-ageless", cluster_ip="172.30.0.6", external_ips=(IP,))
IN_ORDER = [BY_CLUSTER_IP, BY_BALANCER, OLDER, BY_EXTERNAL_IP, NAMESAKE, AGELESS]


@pytest.mark.parametrize(("winner", "loser"), list(pairwise(IN_ORDER)))
def test_kind_then_age_then_name_decide(winner, loser):
    for order in ((winner, loser), (loser, winner)):
        claims = Claims()
        for item in order:
            claims.update(*claimant(item))
        assert f"{IP}:80/tcp" in granted(claims, winner)
        assert f"{IP}:80/tcp" not in granted(claims, loser)


def test_winner_does_not_depend_on_the_order_of_events():
    results = set()
    for order in permutations(IN_ORDER[:5]):
        claims = Claims()
        for item in order:
            claims.update(*claimant(item))
        results.add(tuple(tuple(granted(claims, item)) for item in IN_ORDER[:5]))
    assert len(results) == 1


def test_loser_gets_it_when_the_owner_leaves():
    claims = Claims()
    for item in IN_ORDER:
        claims.update(*claimant(item))
    for gone, heir in pairwise(IN_ORDER):
        key, states, _ = claimant(gone)
        assert claims.owner(("IPv4", IP, 80, "TCP")) == key
        changed = claims.update(key, (), None)
        assert {key, claimant(heir)[0]} <= changed
        assert f"{IP}:80/tcp" in granted(claims, heir)
        assert claims.granted(key, states) is states


def test_update_names_only_those_for_whom_something_changed():
    claims = Claims()
    assert claims.update(*claimant(NAMESAKE)) == {("default", "d-external")}
    assert claims.update(*claimant(service("other", cluster_ip="172.30.0.99"))) == {("default", "other")}
    assert claims.update(*claimant(NAMESAKE)) == set()
    assert claims.update(*claimant(BY_EXTERNAL_IP)) == {("default", "c-external"), ("default", "d-external")}
    assert claims.lost(("default", "d-external")) == {("IPv4", IP, 80, "TCP"): ("default", "c-external")}


def test_new_creation_time_is_another_claim():
    claims = Claims()
    claims.update(*claimant(BY_EXTERNAL_IP))
    claims.update(*claimant(NAMESAKE))
    key, states, _ = claimant(BY_EXTERNAL_IP)
    assert claims.update(key, states, YOUNG) == {("default", "c-external"), ("default", "d-external")}
    assert f"{IP}:80/tcp" in granted(claims, NAMESAKE)


def test_ports_and_protocols_are_claimed_apart():
    claims = Claims()
    udp = service("u", cluster_ip=IP, ports=[ServicePort(port=80, name="u", protocol="UDP")])
    other = service("p", cluster_ip=IP, ports=[ServicePort(port=81, name="p")])
    for item in (BY_CLUSTER_IP, udp, other):
        claims.update(*claimant(item))
    assert [granted(claims, item) for item in (BY_CLUSTER_IP, udp, other)] == [
        [f"{IP}:80/tcp"],
        [f"{IP}:80/udp"],
        [f"{IP}:81/tcp"],
    ]


def test_node_ports_are_claimed_by_family():
    port = ServicePort(port=80, name="http", node_port=30080)
    four = service("four", type="NodePort", ports=[port])
    six = service("six", cluster_ip="fd00:172::1", type="NodePort", ports=[port])
    rival = service("rival", cluster_ip="172.30.0.9", type="NodePort", ports=[port])
    claims = Claims()
    for item in (four, six, rival):
        claims.update(*claimant(item))
    assert "*:30080/tcp" in granted(claims, four)
    assert "*:30080/tcp" in granted(claims, six)
    assert granted(claims, rival) == ["172.30.0.9:80/tcp"]


def test_lost_frontends_take_their_pools_along():
    claims = Claims()
    claims.update(*claimant(service("first", cluster_ip="172.30.0.9", external_ips=(IP,), created=OLD)))
    loser = service(
        "second",
        cluster_ip="172.30.0.10",
        internal_traffic_policy="Local",
        external_ips=(IP,),
        ports=[HTTP, ServicePort(port=81, name="alt")],
        created=YOUNG,
    )
    key, states, created = claimant(loser)
    claims.update(key, states, created)
    lost, kept = claims.granted(key, states)
    assert [str(f) for f in lost.frontends] == ["172.30.0.10:80/tcp"]
    assert (pool_text(lost.cluster), pool_text(lost.local)) == ("unused", "10.0.0.2:8080")
    assert kept is states[1]


@pytest.mark.parametrize("order", [IN_ORDER, IN_ORDER[::-1]])
def test_claims_leave_nothing_behind(order):
    claims = Claims()
    for item in IN_ORDER:
        claims.update(*claimant(item))
    for item in order:
        claims.update(claimant(item)[0], (), None)
    assert not any(vars(claims).values())


def test_claims_have_a_text():
    assert claim_text(("IPv4", "10.0.0.1", 80, "TCP")) == "10.0.0.1:80/TCP"
    assert claim_text(("IPv6", "fd00::1", 80, "UDP")) == "[fd00::1]:80/UDP"
    assert claim_text(("IPv6", None, 30080, "SCTP")) == "node port 30080/SCTP"
