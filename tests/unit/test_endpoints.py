"""Which endpoints count, how slices merge, and which of them a client may get."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest

from proxycore.model import WhenEmpty
from proxycore.objects import ServicePort, SliceEndpoint, SlicePort
from proxycore.problems import LISTED
from proxycore.resolve import resolve
from proxycore.testing.build import NODE, endpoint, endpoint_slice, host, pool_text, service

BOTH_LOCAL = service(
    type="NodePort",
    ports=[ServicePort(port=80, name="http", node_port=30080)],
    external_traffic_policy="Local",
)
INTERNAL_LOCAL = service(internal_traffic_policy="Local")


def state(*slices, item=None, **facts):
    (one,) = resolve(item or service(), slices, host(**facts)).states
    return one


def known(*slices, **facts):
    return [str(e) for e in state(*slices, **facts).endpoints]


def reasons(*slices):
    return [tuple(problem) for problem in resolve(service(), slices, host()).problems]


def cluster(*endpoints, item=None, **facts):
    return pool_text(state(endpoint_slice(*endpoints), item=item, **facts).cluster)


def local(*endpoints, item=BOTH_LOCAL, **facts):
    return pool_text(state(endpoint_slice(*endpoints), item=item, **facts).local)


# What a slice says


def test_only_the_first_address_counts():
    two = SliceEndpoint(addresses=("10.0.0.1", "10.0.0.2"))
    assert known(endpoint_slice(two)) == ["10.0.0.1:8080"]


def test_endpoint_without_address_is_ignored():
    nothing = endpoint_slice(SliceEndpoint(), SliceEndpoint(addresses=()), "10.0.0.1")
    assert known(nothing) == ["10.0.0.1:8080"]
    assert reasons(nothing) == [("EndpointSlice default/web-1", "an endpoint without an address is ignored")]


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "169.254.0.1", "224.0.0.1", "0.0.0.0", "255.255.255.255", "10.0.0", "fd00::1", "name"],
)
def test_impossible_address_is_refused(address):
    item = endpoint_slice(address, "10.0.0.1")
    assert known(item) == ["10.0.0.1:8080"]
    ((subject, reason),) = reasons(item)
    assert subject == "EndpointSlice default/web-1"
    assert address in reason


@pytest.mark.parametrize("address", ["::1", "fe80::1", "ff02::1", "::", "10.0.0.1", "::ffff:10.0.0.1"])
def test_impossible_ipv6_address_is_refused(address):
    item = service(cluster_ip="fd00:172::1")
    assert state(endpoint_slice(address, family="IPv6"), item=item).endpoints == ()


def test_addresses_are_canonical():
    assert known(endpoint_slice("010.0.0.01")) == ["10.0.0.1:8080"]
    item = service(cluster_ip="fd00:172::1")
    assert str(state(endpoint_slice("FD00:0::1", family="IPv6"), item=item).endpoints[0]) == "[fd00::1]:8080"


def test_slice_of_another_family_or_kind_of_address_does_not_count():
    assert known(endpoint_slice("fd00::1", family="IPv6")) == []
    fqdn = endpoint_slice("web.example.com", family="FQDN")
    assert known(fqdn) == []
    assert reasons(fqdn)[0][1].startswith("the slice is ignored: its addressType is 'FQDN'")


@pytest.mark.parametrize(
    ("port", "why"),
    [
        (SlicePort(name="http"), "port 'http' without a number is ignored"),
        (SlicePort(name="http", port=0), "port 'http' without a number is ignored"),
        (SlicePort(port=80), "a port without a name is ignored"),
        (SlicePort(name="http", port=70000), "port 'http' is ignored: 70000 is no port number"),
    ],
)
def test_port_without_name_or_number_is_ignored(port, why):
    item = endpoint_slice("10.0.0.1", ports=[port])
    assert known(item) == []
    assert reasons(item) == [("EndpointSlice default/web-1", why)]


def test_many_mistakes_of_one_slice_are_summarised():
    item = endpoint_slice(*(f"bad{i}" for i in range(100)))
    assert len(reasons(item)) == LISTED + 1
    assert reasons(item)[-1][1] == f"and {100 - LISTED} more like these"


def test_unset_conditions_mean_ready_serving_and_not_terminating():
    (one,) = state(endpoint_slice("10.0.0.1")).endpoints
    assert (one.ready, one.serving, one.terminating) == (True, True, False)
    (one,) = state(endpoint_slice(endpoint("10.0.0.1", terminating=True))).endpoints
    assert (one.ready, one.serving, one.terminating) == (True, True, True)
    (one,) = state(endpoint_slice(endpoint("10.0.0.1", ready=False))).endpoints
    assert (one.ready, one.serving, one.terminating) == (False, True, False)


def test_local_is_who_names_this_node():
    endpoints = state(
        endpoint_slice(endpoint("10.0.0.1", NODE), endpoint("10.0.0.2", "other"), "10.0.0.3")
    ).endpoints
    assert [(e.is_local, e.node) for e in endpoints] == [(True, NODE), (False, "other"), (False, None)]


def test_zone_and_node_are_kept():
    (one,) = state(endpoint_slice(endpoint("10.0.0.1", "other", zone="zone-b"))).endpoints
    assert (one.node, one.zone) == ("other", "zone-b")


# Merging


def test_endpoints_sort_by_the_text_of_address_and_port():
    first = endpoint_slice("10.0.0.2", "10.0.0.1")
    second = endpoint_slice("10.0.0.10", "10.0.0.11", name="web-2")
    assert known(first, second) == ["10.0.0.10:8080", "10.0.0.11:8080", "10.0.0.1:8080", "10.0.0.2:8080"]
    item = service(cluster_ip="fd00:172::1")
    six = state(endpoint_slice("fd00::1", "fd00::1:1", family="IPv6"), item=item)
    assert [str(e) for e in six.endpoints] == ["[fd00::1:1]:8080", "[fd00::1]:8080"]


def test_one_slice_may_give_a_port_two_numbers():
    ports = [SlicePort(name="http", port=8080), SlicePort(name="http", port=8081)]
    assert known(endpoint_slice("10.0.0.1", ports=ports)) == ["10.0.0.1:8080", "10.0.0.1:8081"]


def test_same_address_with_other_ports_is_another_endpoint():
    other = endpoint_slice("10.0.0.1", name="web-2", ports=[SlicePort(name="http", port=9090)])
    assert known(endpoint_slice("10.0.0.1"), other) == ["10.0.0.1:8080", "10.0.0.1:9090"]


def test_endpoint_in_two_slices_counts_once_and_survives_one_of_them():
    first, second = endpoint_slice("10.0.0.1"), endpoint_slice("10.0.0.1", "10.0.0.2", name="web-2")
    assert known(first, second) == ["10.0.0.1:8080", "10.0.0.2:8080"]
    assert known(second) == ["10.0.0.1:8080", "10.0.0.2:8080"]


BEST_FIRST = [
    endpoint("10.0.0.1", NODE),
    endpoint("10.0.0.1", NODE, ready=False),
    endpoint("10.0.0.1", "other", ready=True),
    endpoint("10.0.0.1", "other", ready=False),
    endpoint("10.0.0.1", "other", ready=False, terminating=True),
    endpoint("10.0.0.1", "other", ready=False, serving=False),
]


@pytest.mark.parametrize(("better", "worse"), list(pairwise(BEST_FIRST)))
def test_of_duplicates_local_then_ready_then_serving_then_staying_wins(better, worse):
    expected = state(endpoint_slice(better)).endpoints
    for one, other in ((better, worse), (worse, better)):
        assert state(endpoint_slice(one), endpoint_slice(other, name="web-2")).endpoints == expected
        assert state(endpoint_slice(one, other)).endpoints == expected


def test_order_of_slices_does_not_matter():
    slices = [
        endpoint_slice(endpoint("10.0.0.1", "x", zones=["a"])),
        endpoint_slice(endpoint("10.0.0.1", "y", zones=["b"]), name="web-2"),
        endpoint_slice(endpoint("10.0.0.2", "z", zones=["b"]), name="web-3"),
    ]
    found = {state(*order, zone="b") for order in permutations(slices)}
    assert len(found) == 1
    (one,) = found
    assert one.endpoints[0].node == "x", "equally good: the slice that comes first by name"
    assert pool_text(one.cluster) == "10.0.0.2:8080", "the hints of the slice that won count"


# Pools


def test_pool_of_everything_shares_the_tuple():
    one = state(endpoint_slice("10.0.0.1", "10.0.0.2"))
    assert one.cluster is not None
    assert one.cluster.endpoints is one.endpoints


def test_only_ready_endpoints_are_in_the_pools():
    endpoints = [endpoint("10.0.0.1", NODE), endpoint("10.0.0.2", NODE, ready=False)]
    assert cluster(*endpoints) == local(*endpoints) == "10.0.0.1:8080"


def test_pools_are_unused_where_no_frontend_leads_to_them():
    assert local("10.0.0.1", item=service()) == "unused"
    assert cluster("10.0.0.1", item=INTERNAL_LOCAL) == "unused"


def test_cluster_policy_falls_back_to_serving_terminating_endpoints():
    endpoints = [
        endpoint("10.0.0.1", ready=False, serving=True, terminating=True),
        endpoint("10.0.0.2", ready=False, serving=False, terminating=True),
        endpoint("10.0.0.3", ready=False, serving=True, terminating=False),
    ]
    assert cluster(*endpoints) == "10.0.0.1:8080"
    assert cluster(*endpoints, "10.0.0.4") == "10.0.0.4:8080"


def test_local_policy_falls_back_by_itself():
    endpoints = [
        endpoint("10.0.0.1", NODE, ready=False, terminating=True),
        endpoint("10.0.0.2", "other"),
        endpoint("10.0.0.3", "other", ready=False, terminating=True),
    ]
    assert cluster(*endpoints, item=BOTH_LOCAL) == "10.0.0.2:8080"
    assert local(*endpoints) == "10.0.0.1:8080"
    assert local(*endpoints, endpoint("10.0.0.4", NODE)) == "10.0.0.4:8080"


def test_nothing_anywhere_is_refused():
    for endpoints in ((), [endpoint("10.0.0.1", NODE, ready=False)]):
        assert cluster(*endpoints) == local(*endpoints) == local(*endpoints, item=INTERNAL_LOCAL) == "reject"


def test_something_elsewhere_is_silence_under_policy_local():
    for elsewhere in (
        endpoint("10.0.0.1", "other"),
        endpoint("10.0.0.1", "other", ready=False, terminating=True),
    ):
        assert local(elsewhere) == local(elsewhere, item=INTERNAL_LOCAL) == "drop"
        assert cluster(elsewhere) == "10.0.0.1:8080"


def test_empty_cluster_pool_is_always_refused():
    assert state(endpoint_slice()).cluster.when_empty is WhenEmpty.REJECT


# Topology

A = endpoint("10.0.0.1", "n1", zones=["zone-a"])
B = endpoint("10.0.0.2", "n2", zones=["zone-b"])
BOTH = endpoint("10.0.0.3", "n3", zones=["zone-a", "zone-b"])


def test_zone_hints_narrow_to_the_zone():
    assert cluster(A, B, BOTH, zone="zone-a") == "10.0.0.1:8080 10.0.0.3:8080"


@pytest.mark.parametrize("zone", [None, "", "zone-x"])
def test_zone_that_no_hint_names_sees_all(zone):
    assert cluster(A, B, zone=zone) == "10.0.0.1:8080 10.0.0.2:8080"


def test_one_missing_zone_hint_disables_zones():
    assert cluster(A, B, "10.0.0.9", zone="zone-a") == "10.0.0.1:8080 10.0.0.2:8080 10.0.0.9:8080"


def test_hints_of_unready_endpoints_do_not_matter():
    unready = endpoint("10.0.0.9", ready=False)
    assert cluster(A, B, unready, zone="zone-a") == "10.0.0.1:8080"
    only = endpoint("10.0.0.4", "n4", ready=False, zones=["zone-a"])
    assert cluster(B, only, zone="zone-a") == "10.0.0.2:8080"


def test_node_hints_come_before_zone_hints():
    here = endpoint("10.0.0.1", "n1", zones=["zone-b"], nodes=[NODE])
    there = endpoint("10.0.0.2", "n2", zones=["zone-a"], nodes=["n2"])
    assert cluster(here, there, zone="zone-a") == "10.0.0.1:8080"


def test_node_hints_fall_back_to_zone_hints():
    one = endpoint("10.0.0.1", "n1", zones=["zone-a"], nodes=["n1"])
    other = endpoint("10.0.0.2", "n2", zones=["zone-b"], nodes=["n2"])
    assert cluster(one, other, zone="zone-a") == "10.0.0.1:8080"
    without = endpoint("10.0.0.3", "n3", zones=["zone-b"])
    here = endpoint("10.0.0.4", "n4", zones=["zone-a"], nodes=[NODE])
    assert cluster(here, without, zone="zone-b") == "10.0.0.3:8080"


def test_topology_does_not_apply_to_the_local_pool():
    mine = endpoint("10.0.0.1", NODE, zones=["zone-b"])
    assert local(mine, A, zone="zone-a") == "10.0.0.1:8080"


def test_topology_does_not_apply_to_terminating_endpoints():
    gone = [
        endpoint(f"10.0.0.{i}", ready=False, terminating=True, zones=[zone])
        for i, zone in ((1, "zone-a"), (2, "zone-b"))
    ]
    assert cluster(*gone, zone="zone-a") == "10.0.0.1:8080 10.0.0.2:8080"


def test_zone_of_the_endpoint_itself_is_not_used():
    assert cluster(
        endpoint("10.0.0.1", zone="zone-a"), endpoint("10.0.0.2", zone="zone-b"), zone="zone-a"
    ) == ("10.0.0.1:8080 10.0.0.2:8080")


def test_hints_follow_their_endpoints_through_a_merge():
    first, second = endpoint_slice(B, A), endpoint_slice(BOTH, name="web-2")
    assert pool_text(state(first, second, zone="zone-a").cluster) == "10.0.0.1:8080 10.0.0.3:8080"
    bare = endpoint_slice("10.0.0.9", name="web-3")
    assert len(state(first, second, bare, zone="zone-a").cluster.endpoints) == 4


def test_hints_of_a_losing_duplicate_do_not_count():
    loser = endpoint("10.0.0.1", "n1", zones=["zone-a"])
    winner = endpoint("10.0.0.1", NODE)
    assert (
        cluster(loser, winner, B, zone="zone-b")
        == cluster(winner, B, zone="zone-b")
        == "10.0.0.1:8080 10.0.0.2:8080"
    )
