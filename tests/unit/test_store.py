"""Which events touch which Services."""

from __future__ import annotations

from proxycore.objects import (
    ANNOTATION_TRIGGER_TIME,
    LABEL_HEADLESS,
    LABEL_PROXY_NAME,
    Metadata,
    Node,
    ServiceCIDR,
    ServiceCIDRSpec,
)
from proxycore.source import Applied, Deleted, Health, Replaced, Synced, Trouble
from proxycore.store import CLEAN, Store
from proxycore.testing.build import NODE, endpoint_slice, service

WEB = ("default", "web")


def services(dirty):
    assert not dirty.node
    assert not dirty.service_cidrs
    return set(dirty.services)


def node(name=NODE, **labels):
    return Node(metadata=Metadata(name=name, labels=labels))


def cidr(name, *cidrs):
    return ServiceCIDR(metadata=Metadata(name=name), spec=ServiceCIDRSpec(cidrs=cidrs))


def test_new_and_changed_objects_touch_their_service():
    store = Store(NODE)
    assert services(store.apply(Applied(service()))) == {WEB}
    assert services(store.apply(Applied(service(session_affinity="ClientIP")))) == {WEB}
    assert services(store.apply(Applied(endpoint_slice("10.0.0.1")))) == {WEB}
    assert services(store.apply(Applied(endpoint_slice("10.0.0.2")))) == {WEB}


def test_what_is_known_already_is_no_change():
    store = Store(NODE)
    for item in (
        service(),
        endpoint_slice("10.0.0.1"),
        endpoint_slice("10.0.0.1", name="web-2"),
        node(),
        cidr("a", "10.0.0.0/8"),
    ):
        assert store.apply(Applied(item)) != CLEAN
        assert store.apply(Applied(item)) == CLEAN


def test_deletion_of_the_unknown_is_no_change():
    store = Store(NODE)
    for kind in ("Service", "EndpointSlice", "Node", "ServiceCIDR"):
        assert store.apply(Deleted(kind, "default", "x")) == CLEAN


def test_deletion_touches_the_service():
    store = Store(NODE)
    store.apply(Applied(service()))
    store.apply(Applied(endpoint_slice("10.0.0.1")))
    assert services(store.apply(Deleted("EndpointSlice", "default", "web-1"))) == {WEB}
    assert services(store.apply(Deleted("Service", "default", "web"))) == {WEB}


def test_slices_of_a_service_are_kept_by_name():
    store = Store(NODE)
    for name in ("web-2", "web-1", "web-3"):
        store.apply(Applied(endpoint_slice("10.0.0.1", name=name)))
    assert [item.name for item in store.slices(WEB)] == ["web-1", "web-2", "web-3"]
    store.apply(Applied(endpoint_slice("10.0.0.9", name="web-2")))
    store.apply(Deleted("EndpointSlice", "default", "web-1"))
    assert [str(item.endpoints[0][0]) for item in store.slices(WEB)] == ["10.0.0.9:8080", "10.0.0.1:8080"]


def test_slice_that_changes_its_service_touches_both():
    store = Store(NODE)
    store.apply(Applied(endpoint_slice("10.0.0.1")))
    assert services(store.apply(Applied(endpoint_slice("10.0.0.1", service="other")))) == {
        WEB,
        ("default", "other"),
    }
    assert store.slices(WEB) == ()
    assert len(store.slices(("default", "other"))) == 1


def test_namespaces_are_apart():
    store = Store(NODE)
    store.apply(Applied(endpoint_slice("10.0.0.1")))
    assert services(store.apply(Applied(endpoint_slice("10.0.0.1", namespace="b")))) == {("b", "web")}


def test_label_for_another_proxy_is_as_good_as_deletion():
    for label in (LABEL_PROXY_NAME, LABEL_HEADLESS):
        store = Store(NODE)
        store.apply(Applied(service()))
        assert services(store.apply(Applied(service(labels={label: ""})))) == {WEB}
        assert store.services == {}
        assert store.apply(Applied(service(labels={label: "x"}))) == CLEAN
        assert services(store.apply(Applied(service()))) == {WEB}
        store.apply(Applied(endpoint_slice("10.0.0.1")))
        assert services(store.apply(Applied(endpoint_slice("10.0.0.1", labels={label: "x"})))) == {WEB}
        assert store.slices(WEB) == ()


def test_slice_without_a_service_is_ignored():
    store = Store(NODE)
    assert store.apply(Applied(endpoint_slice("10.0.0.1", service=""))) == CLEAN
    store.apply(Applied(endpoint_slice("10.0.0.1")))
    assert services(store.apply(Applied(endpoint_slice("10.0.0.1", service="")))) == {WEB}


def test_replaced_drops_what_it_does_not_hold():
    store = Store(NODE)
    for name in ("a", "b", "c"):
        store.apply(Applied(service(name)))
    changed = service("b", session_affinity="ClientIP")
    assert services(store.apply(Replaced("Service", (service("a"), changed)))) == {
        ("default", "b"),
        ("default", "c"),
    }
    assert set(store.services) == {("default", "a"), ("default", "b")}
    store.apply(Applied(endpoint_slice("10.0.0.1")))
    assert services(store.apply(Replaced("EndpointSlice", ()))) == {WEB}
    assert services(store.apply(Replaced("Service", ()))) == {("default", "a"), ("default", "b")}


def test_only_our_own_node_counts():
    store = Store(NODE)
    assert store.apply(Applied(node("other"))) == CLEAN
    assert store.apply(Applied(node())).node
    assert store.apply(Applied(node(zone="a"))).node
    assert store.apply(Deleted("Node", "", "other")) == CLEAN
    assert store.apply(Replaced("Node", (node("other"),))).node
    assert store.node is None


def test_service_cidrs_are_canonical_and_sorted():
    store = Store(NODE)
    assert store.apply(Applied(cidr("b", "172.30.0.1/16", "fd00::/108", "nonsense"))).service_cidrs
    assert store.apply(Applied(cidr("a", "10.96.0.0/12"))).service_cidrs
    assert store.apply(Applied(cidr("c", "10.96.0.0/12"))) == CLEAN
    assert store.service_cidrs == ("10.96.0.0/12", "172.30.0.0/16", "fd00::/108")
    assert store.apply(Deleted("ServiceCIDR", "", "c")) == CLEAN
    assert store.apply(Deleted("ServiceCIDR", "", "b")).service_cidrs
    assert store.service_cidrs == ("10.96.0.0/12",)
    assert store.apply(Replaced("ServiceCIDR", ())).service_cidrs
    assert store.service_cidrs == ()


def test_trigger_time_comes_from_the_slice():
    store = Store(NODE)
    times = {}
    for text in ("1970-01-01T00:01:40Z", "1970-01-01T00:00:40.123456789+00:00", "soon", ""):
        changed = endpoint_slice(f"10.0.0.{len(times) + 1}", annotations={ANNOTATION_TRIGGER_TIME: text})
        times[text] = dict(store.apply(Applied(changed)).trigger_times)
    assert list(times.values()) == [{WEB: 100.0}, {WEB: 40.123456}, {}, {}]
    assert store.apply(Deleted("EndpointSlice", "default", "web-1")).trigger_times == {}


def test_replaced_keeps_the_earliest_trigger_time():
    store = Store(NODE)
    slices = tuple(
        endpoint_slice(
            "10.0.0.1", name=name, annotations={ANNOTATION_TRIGGER_TIME: f"1970-01-01T00:00:{seconds}Z"}
        )
        for name, seconds in (("web-1", "30"), ("web-2", "20"))
    )
    assert store.apply(Replaced("EndpointSlice", slices)).trigger_times == {WEB: 20.0}


def test_events_about_the_source_touch_nothing():
    store = Store(NODE)
    for event in (Synced(), Trouble("file.yaml:3", "bad"), Health("stale")):
        assert store.apply(event) == CLEAN


def test_nothing_is_kept_of_what_is_gone():
    store = Store(NODE)
    counted = ("node_name", "version")
    empty = {name: value for name, value in vars(store).items() if name not in counted}
    for i in range(20):
        store.apply(Applied(service(f"job-{i}")))
        store.apply(Applied(endpoint_slice("10.0.0.1", service=f"job-{i}", name=f"job-{i}-x")))
        store.apply(Applied(endpoint_slice("10.0.0.1", service=f"job-{i}", name=f"job-{i}-y")))
        store.apply(Deleted("Service", "default", f"job-{i}"))
        store.apply(Deleted("EndpointSlice", "default", f"job-{i}-y"))
        store.apply(Deleted("EndpointSlice", "default", f"job-{i}-x"))
    assert {name: value for name, value in vars(store).items() if name not in counted} == empty
    assert not any(empty.values())
