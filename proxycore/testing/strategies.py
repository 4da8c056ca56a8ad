"""Hypothesis strategies for API objects, events and facts of a node.

Everything is drawn from a small world, so that names, addresses and ports collide as often as they can.
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from ..model import HostState, LocalPodsByCIDR, LocalPodsByInterface, Protocol
from ..objects import (
    LABEL_PROXY_NAME,
    APIObject,
    EndpointSlice,
    LoadBalancerIngress,
    Service,
    ServicePort,
    SliceEndpoint,
    SlicePort,
)
from ..source import Applied, Deleted, Event, Listed, Replaced
from .build import NODE, endpoint, endpoint_slice, host, service

_NAMES = st.sampled_from(("a", "b", "c"))
_NAMESPACES = st.sampled_from(("x", "y"))
_VIPS = ("172.30.0.1", "172.30.0.2", "172.30.0.3", "fd00:172::1", "fd00:172::2")
_OUTSIDE = (*_VIPS, "1.2.3.4", "192.168.0.2", "2001:db8::9", "127.0.0.1", "nonsense", "01.2.3.4")
_ENDPOINTS = {
    "IPv4": ("10.0.0.1", "10.0.0.2", "10.0.0.10", "010.0.0.1", "127.0.0.1", "bad"),
    "IPv6": ("fd00::1", "fd00::2", "FD00::1", "fd00::1:1", "::1"),
    "FQDN": ("web.example.com",),
}
_PORT_NAMES = st.sampled_from(("http", "dns", None))
_PROTOCOLS: st.SearchStrategy[Protocol] = st.sampled_from(("TCP", "UDP"))
_ZONES = ("zone-a", "zone-b")
_NODES = (NODE, "node-b", None)


def _some(values: Sequence[str], largest: int = 2) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(values), max_size=largest).map(tuple)


def service_ports() -> st.SearchStrategy[tuple[ServicePort, ...]]:
    """Up to three ports, colliding in every way."""
    one = st.builds(
        ServicePort,
        port=st.sampled_from((80, 53, 22, 0)),
        name=_PORT_NAMES,
        protocol=st.one_of(st.none(), _PROTOCOLS),
        node_port=st.sampled_from((None, None, 0, 30080, 10250)),
    )
    return st.lists(one, max_size=3).map(tuple)


def services() -> st.SearchStrategy[Service]:
    """Services of every type, in order and not."""
    return st.builds(
        service,
        _NAMES,
        _NAMESPACES,
        cluster_ip=st.sampled_from((*_VIPS, *_VIPS, "None", None)),
        cluster_ips=st.one_of(st.none(), _some(_VIPS)),
        ip_families=st.sampled_from((None, None, ("IPv4",), ("IPv6",), ("IPv4", "IPv6"), ("IPv6", "IPv4"))),
        ports=service_ports(),
        type=st.sampled_from(("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")),
        external_ips=st.one_of(st.none(), _some(_OUTSIDE)),
        ingress=st.lists(
            st.builds(
                LoadBalancerIngress, st.sampled_from(_OUTSIDE), st.sampled_from((None, "VIP", "Proxy"))
            ),
            max_size=2,
        ),
        load_balancer_source_ranges=st.one_of(
            st.none(), _some(("192.168.0.0/16", " 1.0.0.0/8", "fd00::/8", "0.0.0.0/0", "?"))
        ),
        external_traffic_policy=st.sampled_from((None, "Cluster", "Local")),
        internal_traffic_policy=st.sampled_from((None, "Cluster", "Local")),
        health_check_node_port=st.sampled_from((None, 30000)),
        session_affinity=st.sampled_from((None, "None", "ClientIP")),
        created=st.sampled_from(
            (None, "2024-01-01T00:00:00Z", "2024-01-01T01:00:00+01:00", "2024-06-01T00:00:00Z")
        ),
        labels=st.sampled_from((None, None, None, {LABEL_PROXY_NAME: "other"})),
    )


def slice_endpoints(family: str) -> st.SearchStrategy[SliceEndpoint]:
    """Endpoints in every condition, here and elsewhere, hinted or not."""
    condition = st.sampled_from((None, True, False))
    return st.builds(
        endpoint,
        st.sampled_from(_ENDPOINTS[family]),
        st.sampled_from(_NODES),
        ready=condition,
        serving=condition,
        terminating=condition,
        zone=st.sampled_from((None, *_ZONES)),
        zones=_some(_ZONES),
        nodes=st.sampled_from(((), (), (NODE,), ("node-b",))),
    )


@st.composite
def endpoint_slices(draw: st.DrawFn) -> EndpointSlice:
    """Slices that overlap, move between Services, and hold mistakes."""
    family = draw(st.sampled_from(("IPv4", "IPv4", "IPv6", "FQDN")))
    port = st.builds(
        SlicePort,
        name=st.sampled_from(("http", "dns", "", None)),
        protocol=st.one_of(st.none(), _PROTOCOLS),
        port=st.sampled_from((8080, 8080, 5353, 0, None)),
    )
    return endpoint_slice(
        *draw(st.lists(slice_endpoints(family), max_size=4)),
        service=draw(st.one_of(_NAMES, _NAMES, st.just(""))),
        namespace=draw(_NAMESPACES),
        name=draw(st.sampled_from(("s1", "s2", "s3"))),
        family=family,
        ports=draw(st.lists(port, min_size=1, max_size=3)),
        labels=draw(st.sampled_from((None, None, None, {LABEL_PROXY_NAME: "other"}))),
    )


def hosts() -> st.SearchStrategy[HostState]:
    """Facts of node `node-a`."""
    return st.builds(
        host,
        zone=st.sampled_from((None, *_ZONES)),
        families=st.sampled_from((("IPv4", "IPv6"), ("IPv4",), ("IPv6", "IPv4"))),
        node_ips=st.sampled_from((("192.168.0.2",), ("1.2.3.9", "fd00::9"), ())),
        node_addresses=st.sampled_from((("192.168.0.2",), ("1.2.3.4", "172.30.0.1"), ())),
        detect_local=st.sampled_from(
            (
                None,
                LocalPodsByCIDR(("10.0.0.0/8",)),
                LocalPodsByCIDR(("10.0.0.0/8", "fd00::/32")),
                LocalPodsByInterface("cni0"),
            )
        ),
        masquerade_all=st.booleans(),
        service_cidrs=st.sampled_from(((), ("172.30.0.0/16",))),
    )


def _unique(items: Sequence[APIObject]) -> tuple[APIObject, ...]:
    return tuple({(item.metadata.namespace, item.metadata.name): item for item in items}.values())


def events() -> st.SearchStrategy[Event]:
    """Events about Services and EndpointSlices."""
    items: st.SearchStrategy[APIObject] = st.one_of(services(), endpoint_slices())
    return st.one_of(
        items.map(Applied),
        items.map(Applied),
        st.builds(Deleted, st.just("Service"), _NAMESPACES, _NAMES),
        st.builds(Deleted, st.just("EndpointSlice"), _NAMESPACES, st.sampled_from(("s1", "s2", "s3"))),
        st.builds(Replaced, st.just("Service"), st.lists(services(), max_size=3).map(_unique)),
        st.builds(Replaced, st.just("EndpointSlice"), st.lists(endpoint_slices(), max_size=3).map(_unique)),
        st.builds(
            Listed,
            st.sampled_from(("Service", "EndpointSlice")),
            st.frozensets(st.tuples(_NAMESPACES, st.sampled_from(("a", "b", "c", "s1", "s2", "s3")))),
        ),
    )
