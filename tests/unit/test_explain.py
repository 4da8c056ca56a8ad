"""Every decision is told with its reason."""

from __future__ import annotations

from proxycore.explain import explain
from proxycore.objects import LoadBalancerIngress, ServicePort
from proxycore.testing.build import NODE, endpoint, endpoint_slice, host, service

BALANCED = service(
    type="LoadBalancer",
    ingress=[LoadBalancerIngress(ip="1.2.3.4")],
    external_traffic_policy="Local",
    health_check_node_port=30000,
    load_balancer_source_ranges=("203.0.113.0/24",),
)


def told(item, *slices, client="outside", lost=None, **facts):
    return {
        decision.text: decision.because
        for decision in explain(item, slices, host(**facts), client, lost=lost)
    }


def test_service_that_is_not_proxied_says_why():
    assert told(service(cluster_ip="None")) == {"Service default/web is not proxied": "it is headless"}
    assert told(service(type="ExternalName")) == {
        "Service default/web is not proxied": "its type is ExternalName"
    }


def test_family_that_is_not_served_says_why():
    assert told(service(), families=("IPv4",))["Service default/web is not served over IPv6"] == (
        "this node does not have that family"
    )
    assert told(service())["Service default/web is not served over IPv6"] == (
        "it has no usable port or no cluster IP of that family"
    )


def test_endpoints_are_in_a_pool_or_not_for_a_reason():
    lines = told(
        BALANCED,
        endpoint_slice(
            endpoint("10.0.0.1", NODE),
            endpoint("10.0.0.2", "node-b"),
            "10.0.0.3",
            endpoint("10.0.0.4", NODE, ready=False),
            endpoint("10.0.0.5", NODE, ready=False, terminating=True),
        ),
    )
    assert {
        text: because for text, because in lines.items() if "local pool" in text and "endpoint" in text
    } == {
        "endpoint 10.0.0.1:8080 is in the local pool": "it is ready",
        "endpoint 10.0.0.2:8080 is not in the local pool": "it is on node node-b",
        "endpoint 10.0.0.3:8080 is not in the local pool": "its slice names no node",
        "endpoint 10.0.0.4:8080 is not in the local pool": "it is not ready",
        "endpoint 10.0.0.5:8080 is not in the local pool": "it is terminating, and others are ready",
    }
    assert lines["endpoint 10.0.0.2:8080 is in the cluster pool"] == "it is ready"


def test_terminating_fall_back_and_topology_are_reasons():
    lines = told(service(), endpoint_slice(endpoint("10.0.0.1", ready=False, terminating=True)))
    assert lines["endpoint 10.0.0.1:8080 is in the cluster pool"] == (
        "it is terminating and still serving, and no endpoint is ready"
    )
    near = endpoint_slice(endpoint("10.0.0.1", zones=["a"]), endpoint("10.0.0.2", zones=["b"]))
    lines = told(service(), near, zone="a")
    assert lines["default/web:http prefers near endpoints (PreferSameZone)"]
    assert lines["endpoint 10.0.0.2:8080 is not in the cluster pool"] == "it is hinted for other zones"


def test_route_and_masquerading_depend_on_the_client():
    slices = [endpoint_slice(endpoint("10.0.0.1", NODE))]
    vip = "LoadBalancerIP 1.2.3.4:80/TCP"
    outside = told(BALANCED, *slices)
    assert (
        outside[f"a client from elsewhere that dials {vip} takes the local pool"]
        == "externalTrafficPolicy is Local"
    )
    pod = told(BALANCED, *slices, client="local_pod")
    assert pod[f"a pod of this node that dials {vip} takes the cluster pool"] == (
        "externalTrafficPolicy is Local, but a pod of this node is served as if its packets had gone out and come back"
    )
    node = told(BALANCED, *slices, client="node")
    assert node["its address is masqueraded"] == (
        "externalTrafficPolicy is Local, and the node dials an address that is not its own"
    )
    assert told(service(), *slices, detect_local=None)[
        "its address is kept, unless it is the chosen endpoint itself"
    ] == ("without a detector of local pods no traffic to a cluster IP is masqueraded")


def test_firewall_is_told():
    assert told(BALANCED)["LoadBalancerIP 1.2.3.4:80/TCP admits only 203.0.113.0/24"] == (
        "of loadBalancerSourceRanges of this family"
    )


def test_empty_pool_says_what_clients_get():
    vip = "LoadBalancerIP 1.2.3.4:80/TCP"
    assert told(BALANCED)[f"new connections to {vip} are refused"] == "no endpoint can be used on any node"
    lines = told(BALANCED, endpoint_slice(endpoint("10.0.0.1", "node-b")))
    assert lines[f"new connections to {vip} are dropped"] == "endpoints exist, but none on this node"


def test_lost_claim_and_ignored_parts_are_told():
    item = service(external_ips=("1.2.3.4", "bad"), ports=[ServicePort(port=80, name="http")])
    lines = told(item, lost={("IPv4", "1.2.3.4", 80, "TCP"): ("kube-system", "ingress")})
    assert lines["ExternalIP 1.2.3.4:80/TCP is not served for this Service"] == (
        "Service kube-system/ingress has the better claim"
    )
    assert "external IP 'bad' is ignored" in lines["something of Service default/web is ignored"]


def test_detector_that_is_missing_is_told_to_pods():
    lines = told(service(), client="local_pod", detect_local=None)
    assert lines["nobody counts as a pod of this node over IPv4"] == (
        "no detector of local pods is configured for that family"
    )
