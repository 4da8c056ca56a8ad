"""The desired state follows events, and work follows the change."""

from __future__ import annotations

import pytest

from proxycore.desired import Desired
from proxycore.errors import InternalError
from proxycore.model import LocalPodsByCIDR
from proxycore.objects import ANNOTATION_TRIGGER_TIME, ServicePort
from proxycore.source import Applied, Deleted
from proxycore.testing.build import NODE, endpoint, endpoint_slice, host, service


def text(changed):
    return {str(name): state and " ".join(map(str, state.endpoints)) for name, state in changed.items()}


def ready(*items, **facts):
    desired = Desired(NODE)
    desired.handle([Applied(item) for item in items], host(**facts))
    desired.take()
    return desired


def crowd(total):
    """A cluster of so many Services with an endpoint each."""
    for i in range(total):
        yield service(f"svc-{i}", cluster_ip=f"172.30.{i // 250}.{i % 250 + 1}")
        yield endpoint_slice(f"10.1.{i // 250}.{i % 250}", service=f"svc-{i}", name=f"svc-{i}-x")


def test_nothing_is_desired_before_the_node_is_known():
    desired = Desired(NODE)
    desired.handle([Applied(service()), Applied(endpoint_slice("10.0.0.1"))])
    assert desired.take() == {}
    assert desired.states == {}
    desired.handle([], host())
    assert text(desired.take()) == {"default/web:http": "10.0.0.1:8080"}


def test_take_tells_what_changed_since_the_last_take():
    desired = ready(service(), endpoint_slice("10.0.0.1"))
    desired.handle([Applied(endpoint_slice("10.0.0.1", "10.0.0.2"))])
    assert text(desired.take()) == {"default/web:http": "10.0.0.1:8080 10.0.0.2:8080"}
    assert desired.take() == {}
    desired.handle([Deleted("Service", "default", "web")])
    assert text(desired.take()) == {"default/web:http": None}
    assert desired.states == {}


def test_change_that_returns_disappears():
    desired = ready(service(), endpoint_slice("10.0.0.1"))
    desired.handle([Applied(endpoint_slice("10.0.0.2"))])
    assert len(desired.states) == 1  # settled in between
    desired.handle([Applied(endpoint_slice("10.0.0.1"))])
    assert desired.take() == {}
    desired.handle([Deleted("Service", "default", "web")])
    assert desired.states == {}
    desired.handle([Applied(service())])
    assert desired.take() == {}


def test_renamed_port_is_one_gone_and_one_new():
    desired = ready(service(), endpoint_slice("10.0.0.1"))
    desired.handle([Applied(service(ports=[ServicePort(port=80, name="www")]))])
    assert text(desired.take()) == {"default/web:http": None, "default/web:www": ""}


def test_slices_may_come_before_their_service():
    desired = ready(endpoint_slice("10.0.0.1"))
    assert desired.states == {}
    desired.handle([Applied(service())])
    assert text(desired.take()) == {"default/web:http": "10.0.0.1:8080"}


def test_burst_for_one_service_costs_one_resolution():
    desired = ready(*crowd(3))
    before = desired.resolved_total
    for i in range(50):
        desired.handle([Applied(endpoint_slice(f"10.9.0.{i}", service="svc-1", name="svc-1-x"))])
    assert len(desired.take()) == 1
    assert desired.resolved_total - before == 1


def test_facts_of_another_node_are_refused():
    desired = Desired(NODE)
    with pytest.raises(InternalError, match="node-b"):
        desired.handle([Applied(service())], host(node_name="node-b"))
    assert desired.store.services == {}


@pytest.mark.parametrize("size", [2, 60])
@pytest.mark.parametrize(
    "event",
    [
        Applied(endpoint_slice("10.9.9.9", service="svc-1", name="svc-1-x")),
        Applied(endpoint_slice("10.9.9.9", service="svc-1", name="svc-1-y")),
        Deleted("EndpointSlice", "default", "svc-1-x"),
        Applied(service("svc-1", cluster_ip="172.31.0.1")),
        Applied(service("new", cluster_ip="172.31.0.2")),
    ],
)
def test_one_event_resolves_one_service_whatever_the_cluster(size, event):
    desired = ready(*crowd(size))
    before = desired.resolved_total
    desired.handle([event])
    assert len(desired.take()) == 1
    assert desired.resolved_total - before == 1


@pytest.mark.parametrize(
    "event", [Deleted("Service", "default", "svc-1"), Applied(endpoint_slice(service="nobody"))]
)
def test_what_has_no_service_resolves_nothing(event):
    desired = ready(*crowd(2))
    before = desired.resolved_total
    desired.handle([event])
    desired.take()
    assert desired.resolved_total == before


def test_contested_address_resolves_only_the_service_of_the_event():
    rival = {"external_ips": ("1.2.3.4",)}
    old = service("old", cluster_ip="172.31.0.1", created="2024-01-01T00:00:00Z", **rival)
    young = service("young", cluster_ip="172.31.0.2", created="2024-02-01T00:00:00Z", **rival)
    desired = ready(old, young)
    assert desired.problems == {
        "Service default/young": ("1.2.3.4:80/TCP is not served: Service default/old has it",)
    }
    before = desired.resolved_total
    desired.handle([Deleted("Service", "default", "old")])
    changed = desired.take()
    assert {str(name): state and [str(f) for f in state.frontends] for name, state in changed.items()} == {
        "default/old:http": None,
        "default/young:http": ["172.31.0.2:80/tcp", "1.2.3.4:80/tcp"],
    }
    assert desired.resolved_total == before
    assert desired.problems == {}


def hinted(zone):
    return endpoint_slice(
        endpoint("10.0.0.1", zones=["zone-a"]), endpoint("10.0.0.2", zones=[zone]), service="hinted", name="h"
    )


def test_change_of_zone_resolves_only_services_with_hints():
    desired = ready(*crowd(5), service("hinted", cluster_ip="172.31.0.1"), hinted("zone-b"))
    before = desired.resolved_total
    desired.handle([], host(zone="zone-b"))
    (state,) = desired.take().values()
    assert [str(e) for e in state.cluster.endpoints] == ["10.0.0.2:8080"]
    assert desired.resolved_total - before == 1


def test_change_of_node_ips_resolves_only_services_with_source_ranges():
    guarded = service(
        "guarded",
        cluster_ip="172.31.0.1",
        type="LoadBalancer",
        ingress=["1.2.3.4"],
        load_balancer_source_ranges=("203.0.113.0/24",),
    )
    desired = ready(*crowd(5), guarded)
    before = desired.resolved_total
    desired.handle([], host(node_ips=("203.0.113.9",)))
    (state,) = desired.take().values()
    assert state.frontends[1].source_ranges == ("203.0.113.0/24", "1.2.3.4/32")
    assert desired.resolved_total - before == 1


def test_change_of_node_addresses_resolves_only_services_at_reserved_ports():
    ssh = service(
        "ssh",
        cluster_ip="172.31.0.1",
        external_ips=("192.168.7.7",),
        ports=[ServicePort(port=22, name="ssh")],
    )
    desired = ready(*crowd(5), ssh)
    before = desired.resolved_total
    desired.handle([], host(node_addresses=("192.168.7.7",)))
    (state,) = desired.take().values()
    assert [str(f) for f in state.frontends] == ["172.31.0.1:22/tcp"]
    assert desired.resolved_total - before == 1


@pytest.mark.parametrize(
    ("facts", "changed"),
    [
        ({"detect_local": None}, 5),
        ({"masquerade_all": True}, 5),
        ({"families": ("IPv6",)}, 5),
        ({"detect_local": LocalPodsByCIDR(("10.99.0.0/16", "fd00::/32"))}, 0),
        ({"masquerade_bit": 3}, 0),
        ({"service_cidrs": ("172.30.0.0/16",)}, 0),
    ],
)
def test_facts_that_every_service_depends_on_resolve_all_of_them(facts, changed):
    desired = ready(*crowd(5))
    before = desired.resolved_total
    desired.handle([], host(**facts))
    assert len(desired.take()) == changed
    assert desired.resolved_total - before == changed


def test_problems_come_and_go_with_their_objects():
    desired = ready(service(external_ips=("nonsense",)), endpoint_slice("127.0.0.1"))
    assert desired.problems == {
        "Service default/web": ("external IP 'nonsense' is ignored: 'nonsense' is not an IP address",),
        "EndpointSlice default/web-1": ("an endpoint is ignored: 127.0.0.1 is a loopback address",),
    }
    desired.handle([Applied(service())])
    assert list(desired.problems) == ["EndpointSlice default/web-1"]
    desired.handle([Deleted("EndpointSlice", "default", "web-1")])
    assert desired.problems == {}


def stamped(address, seconds, **fields):
    return endpoint_slice(
        address, annotations={ANNOTATION_TRIGGER_TIME: f"1970-01-01T00:00:{seconds:02}Z"}, **fields
    )


def test_oldest_trigger_time_of_what_changed():
    desired = ready(service(), service("other", cluster_ip="172.30.0.2"))
    assert desired.oldest_trigger_time is None
    desired.handle([Applied(stamped("10.0.0.1", 50))], arrived=70.0)
    desired.handle([Applied(stamped("10.0.0.2", 40, service="other", name="o"))], arrived=71.0)
    assert desired.oldest_trigger_time == 40.0
    desired.take()
    assert desired.oldest_trigger_time is None
    desired.handle([Deleted("EndpointSlice", "default", "o")], arrived=80.0)
    assert desired.oldest_trigger_time == 80.0


def test_trigger_time_of_what_changes_nothing_does_not_count():
    desired = ready(service())
    desired.handle([Applied(stamped("10.0.0.1", 50, service="nobody"))], arrived=70.0)
    assert desired.take() == {}
    assert desired.oldest_trigger_time is None


def test_trigger_time_before_the_start_is_not_believed():
    desired = Desired(NODE, started=60.0)
    desired.handle([Applied(service()), Applied(stamped("10.0.0.1", 50))], host(), arrived=70.0)
    assert desired.oldest_trigger_time == 70.0


def test_nothing_is_kept_of_what_is_gone():
    desired = ready()
    for _ in range(2):
        desired.handle([Applied(item) for item in crowd(10)])
        guarded = {"type": "LoadBalancer", "load_balancer_source_ranges": ("1.0.0.0/8",)}
        desired.handle([Applied(service("bad", external_ips=("x",), **guarded))])
        assert len(desired.take()) == 11
        for i in range(10):
            desired.handle(
                [Deleted("Service", "default", f"svc-{i}"), Deleted("EndpointSlice", "default", f"svc-{i}-x")]
            )
        desired.handle([Deleted("Service", "default", "bad")])
        assert set(desired.take().values()) == {None}
    kept = {name: value for name, value in vars(desired).items() if isinstance(value, dict | set) and value}
    assert kept == {}
