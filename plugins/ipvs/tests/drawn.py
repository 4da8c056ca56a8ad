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

ADDRESSES: dict[Family, tuple[str, ...]] = {
    "IPv4": ("10.0.0.2", "10.0.0.3", "10.9.0.4", "192.168.7.5"),
    "IPv6": ("fd00:10::2", "fd00:10::3", "fd00:9::4", "64:ff9b::5"),
}
RANGES: dict[Family, tuple[str, ...]] = {
    "IPv4": ("198.51.100.0/24", "10.0.0.0/25", "192.168.0.2/32", "0.0.0.0/0"),
    "IPv6": ("2600:5200:1::/48", "fd00:10::/112", "2001:db8::1/128", "::/0"),
}
_BOTH = st.booleans()
_ANY = st.builds(
    Routes,
    **{
        client: st.builds(Route, st.sampled_from(PoolName), _BOTH)
        for client in ("local_pod", "node", "outside")
    },
)
USUAL = st.one_of(
    st.builds(lambda a, b, c: internal_routes(local=a, detector=b, masquerade_all=c), _BOTH, _BOTH, _BOTH),
    st.builds(lambda a, b: external_routes(local=a, detector=b), _BOTH, _BOTH),
)
ROUTES = st.one_of(USUAL, _ANY)


def pools(family: Family, least_weight: int = 0) -> st.SearchStrategy[Pool]:
    """Pools of up to four endpoints."""
    one = st.builds(
        Endpoint,
        address=st.sampled_from(ADDRESSES[family]),
        port=st.sampled_from((80, 8080)),
        is_local=_BOTH,
        node=st.just(NODE),
        weight=st.sampled_from((1, 1, 1, 1, least_weight, 2, 7)),
    )
    unique = st.lists(one, max_size=4, unique_by=str)
    return st.builds(
        lambda found, verdict: Pool(endpoints=tuple(sorted(found, key=str)), when_empty=verdict),
        unique,
        st.sampled_from(WhenEmpty),
    )


def _frontend(
    family: Family, protocol: Protocol, kind: FrontendKind, number: int, place: int
) -> st.SearchStrategy[Frontend]:
    address = f"172.30.{number}.{place}" if family == "IPv4" else f"fd00:172:30::{number}:{place}"
    is_node_port = kind is FrontendKind.NODE_PORT
    ranges = st.one_of(
        st.none(), st.lists(st.sampled_from(RANGES[family]), max_size=2, unique=True).map(tuple)
    )
    return st.builds(
        Frontend,
        kind=st.just(kind),
        address=st.just(None if is_node_port else address),
        port=st.just(30000 + 10 * number + place) if is_node_port else st.sampled_from((80, 443)),
        protocol=st.just(protocol),
        routes=ROUTES,
        source_ranges=st.none() if is_node_port else ranges,
    )


def _state(family: Family, number: int) -> st.SearchStrategy[ServiceState]:
    def of(protocol: Protocol) -> st.SearchStrategy[ServiceState]:
        kinds = st.lists(st.sampled_from(FrontendKind), min_size=1, max_size=4)
        frontends = kinds.flatmap(
            lambda found: st.tuples(
                *(_frontend(family, protocol, kind, number, n) for n, kind in enumerate(found, 1))
            )
        )
        return st.builds(
            lambda frontends, cluster, local, affinity: ServiceState(
                name=ServicePortName("ns", f"svc{number}", "", protocol, family),
                frontends=frontends,
                cluster=cluster,
                local=local,
                endpoints=cluster.endpoints,
                affinity_seconds=affinity,
            ),
            frontends,
            pools(family),
            pools(family),
            st.sampled_from((None, None, 60)),
        )

    protocols: st.SearchStrategy[Protocol] = st.sampled_from(("TCP", "UDP", "SCTP"))
    return protocols.flatmap(of)


def states(family: Family, largest: int = 2) -> st.SearchStrategy[tuple[ServiceState, ...]]:
    """Services whose frontends do not collide; their names differ by number."""
    return st.integers(1, largest).flatmap(
        lambda count: st.tuples(*(_state(family, number) for number in range(1, count + 1)))
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
    everywhere = NodePortAddresses(all_local=True)
    listed = (
        {},
        {"node_ports_ipv4": everywhere, "node_ports_ipv6": everywhere},
        {
            "node_ports_ipv4": NodePortAddresses(addresses=("192.168.0.2", "192.168.1.2", "127.0.0.1")),
            "node_ports_ipv6": NodePortAddresses(addresses=("2001:db8::1", "2001:db8:1::1", "::1")),
        },
    )
    return st.builds(
        lambda detector, ports, bit: host(detect_local=detector, masquerade_bit=bit, **ports),
        st.sampled_from(detectors),
        st.sampled_from(listed),
        st.sampled_from((14, 14, 5, 21, 30)),
    )
