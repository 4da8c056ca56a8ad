"""Hypothesis strategies for resolved Services of every kind that the model allows, and for nodes."""

from __future__ import annotations

from hypothesis import strategies as st

from proxycore.api import (
    Endpoint,
    Family,
    Frontend,
    FrontendKind,
    HostState,
    LocalPodsByCIDR,
    LocalPodsByInterface,
    NodePortAddresses,
    Pool,
    PoolName,
    Protocol,
    Route,
    Routes,
    ServicePortName,
    ServiceState,
    WhenEmpty,
)
from proxycore.policy import external_routes, internal_routes
from proxycore.testing.states import NODE, host

_ROUTES = st.builds(
    Routes,
    **{
        client: st.builds(Route, st.sampled_from(PoolName), st.booleans())
        for client in ("local_pod", "node", "outside")
    },
)
_BOTH = st.booleans()
_USUAL = st.one_of(
    st.builds(lambda a, b, c: internal_routes(local=a, detector=b, masquerade_all=c), _BOTH, _BOTH, _BOTH),
    st.builds(lambda a, b: external_routes(local=a, detector=b), _BOTH, _BOTH),
)


def _endpoints(family: Family) -> st.SearchStrategy[tuple[Endpoint, ...]]:
    texts = (
        ("10.0.0.2", "10.0.0.3", "10.9.0.4", "192.168.7.5")
        if family == "IPv4"
        else (
            "fd00:10::2",
            "fd00:10::3",
            "fd00:9::4",
            "64:ff9b::5",
        )
    )
    one = st.builds(
        Endpoint,
        address=st.sampled_from(texts),
        port=st.sampled_from((80, 8080)),
        is_local=_BOTH,
        node=st.just(NODE),
        weight=st.sampled_from((1, 1, 1, 1, 0, 2, 7)),
    )
    unique = st.lists(one, max_size=4, unique_by=str)
    return unique.map(lambda found: tuple(sorted(found, key=str)))


def _frontends(family: Family, protocol: Protocol, number: int) -> st.SearchStrategy[tuple[Frontend, ...]]:
    v4 = family == "IPv4"
    ranges = (
        ("198.51.100.0/24", "10.0.0.0/25", "192.168.0.2/32")
        if v4
        else (
            "2600:5200:1::/48",
            "fd00:10::/112",
            "2001:db8::1/128",
        )
    )
    admitted = st.one_of(st.none(), st.lists(st.sampled_from(ranges), max_size=2, unique=True).map(tuple))

    def one(kind: FrontendKind, place: int) -> st.SearchStrategy[Frontend]:
        address = f"172.30.{number}.{place}" if v4 else f"fd00:172:30::{number}:{place}"
        port = 80
        if kind is FrontendKind.NODE_PORT:
            port = 30000 + 10 * number + place
        return st.builds(
            Frontend,
            kind=st.just(kind),
            address=st.just(None if kind is FrontendKind.NODE_PORT else address),
            port=st.just(port),
            protocol=st.just(protocol),
            routes=st.one_of(_USUAL, _ROUTES),
            source_ranges=admitted,
        )

    kinds = st.lists(st.sampled_from(FrontendKind), min_size=1, max_size=4)
    return kinds.flatmap(lambda found: st.tuples(*(one(kind, n) for n, kind in enumerate(found, 1))))


def _states(family: Family, number: int) -> st.SearchStrategy[ServiceState]:
    def of(protocol: Protocol) -> st.SearchStrategy[ServiceState]:
        pool = st.builds(Pool, endpoints=_endpoints(family), when_empty=st.sampled_from(WhenEmpty))
        return st.builds(
            lambda frontends, cluster, local, affinity, health: ServiceState(
                name=ServicePortName("ns", f"svc{number}", "", protocol, family),
                frontends=frontends,
                cluster=cluster,
                local=local,
                endpoints=cluster.endpoints,
                affinity_seconds=affinity,
                health_check_node_port=health,
            ),
            _frontends(family, protocol, number),
            pool,
            pool,
            st.sampled_from((None, None, 60)),
            st.sampled_from((None, None, 32000)),
        )

    protocols: st.SearchStrategy[Protocol] = st.sampled_from(("TCP", "UDP", "SCTP"))
    return protocols.flatmap(of)


def states(family: Family, largest: int = 2) -> st.SearchStrategy[tuple[ServiceState, ...]]:
    """Services whose frontends do not collide."""
    return st.integers(1, largest).flatmap(
        lambda count: st.tuples(*(_states(family, number) for number in range(1, count + 1)))
    )


def hosts() -> st.SearchStrategy[HostState]:
    """Nodes that tell local pods in every way, and serve node ports in every way."""
    detectors = (
        None,
        LocalPodsByCIDR(("10.0.0.0/24", "fd00:10::/112")),
        LocalPodsByCIDR(("0.0.0.0/0", "::/0")),
        LocalPodsByInterface("cni0"),
        LocalPodsByInterface("veth", prefix=True),
    )
    listed = (
        {},
        {
            "node_ports_ipv4": NodePortAddresses(all_local=True),
            "node_ports_ipv6": NodePortAddresses(all_local=True),
        },
        {
            "node_ports_ipv4": NodePortAddresses(addresses=("192.168.0.2", "192.168.1.2")),
            "node_ports_ipv6": NodePortAddresses(addresses=("2001:db8::1", "2001:db8:1::1")),
        },
    )
    return st.builds(
        lambda detector, ports: host(detect_local=detector, **ports),
        st.sampled_from(detectors),
        st.sampled_from(listed),
    )
