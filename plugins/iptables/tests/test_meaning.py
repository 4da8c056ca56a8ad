"""Rules mean what the resolved Services say: whatever these are, packets are sent through the rules that stand for them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, event, given, settings
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
    Route,
    Routes,
    ServiceState,
    WhenEmpty,
)
from proxycore.testing.states import (
    EXTERNAL_LOCAL,
    IN_CLUSTER,
    endpoint,
    frontend,
    host,
    name_of,
    node_port,
    pool,
    service,
)
from proxycore_iptables.dispatch import Shared
from proxycore_iptables.frame import frame
from proxycore_iptables.render import render
from proxycore_iptables.rules import SERVICES, Place
from proxycore_iptables.shape import Features, Options, Shape, shape_of

from .meaning import actual, assert_means, difference, expected
from .written import chains_of, text_of

FAMILIES: tuple[Family, Family] = ("IPv4", "IPv6")


def assembled(states: Sequence[ServiceState], shape: Shape, tree_from: int | None) -> str:
    """All rules of one family, the dispatch of nat as a tree from so many on."""
    mine = [state for state in states if state.name.family == shape.family]
    chains = chains_of(mine, shape)
    shared = Shared(SERVICES, frame(shape).tails.get(SERVICES, ()), tree_from)
    entries = [entry for state in mine for entry in render(state, shape).entries.get(SERVICES, ())]
    shared.change((), entries)
    chains.update((Place("nat", chain), rules) for chain, rules in shared.chains().items())
    return text_of(chains)


def check(
    states: Sequence[ServiceState],
    facts: HostState,
    family: Family = "IPv4",
    *,
    options: Options | None = None,
    comments: bool = True,
    tree_from: int | None = None,
) -> None:
    shape = shape_of(facts, family, options or Options(), Features(), comments=comments)
    localhost = shape.localhost_node_ports
    assert_means(assembled(states, shape, tree_from), states, family, facts, localhost)


# -- one by one --

WEB = name_of()


def test_a_cluster_ip():
    check(
        [service(WEB, frontend("172.30.0.1"), cluster=["10.0.0.1:80", "10.9.0.1:80", "11.0.0.1:80"])], host()
    )


def test_nobody_is_a_local_pod():
    check([service(WEB, frontend("172.30.0.1"), cluster=["10.0.0.1:80"])], host(detect_local=None))


def test_what_is_refused_and_what_is_dropped():
    dropped = pool(when_empty=WhenEmpty.DROP)
    check(
        [
            service(WEB, frontend("172.30.0.1"), node_port(30080)),
            service(name_of("other"), frontend("172.30.0.2"), node_port(30081), cluster=dropped),
            service(
                name_of("far"),
                frontend("172.30.0.3"),
                frontend("1.2.3.4", kind=FrontendKind.LOAD_BALANCER_IP, routes=EXTERNAL_LOCAL),
                node_port(30082, routes=EXTERNAL_LOCAL),
                cluster=["10.9.0.1:80"],
                local=dropped,
            ),
        ],
        host(),
    )


def test_the_node_is_refused_at_external_addresses():
    check(
        [service(WEB, frontend("1.2.3.4", kind=FrontendKind.EXTERNAL_IP, routes=EXTERNAL_LOCAL), local=())],
        host(),
    )


def test_source_ranges():
    ranges = ["198.51.100.0/24", "10.0.0.0/30"]
    check(
        [
            service(
                WEB,
                frontend("172.30.0.1"),
                frontend("1.2.3.4", kind=FrontendKind.LOAD_BALANCER_IP, source_ranges=ranges),
                frontend("1.2.3.5", kind=FrontendKind.LOAD_BALANCER_IP, source_ranges=ranges[:1]),
                cluster=["10.0.0.1:80"],
            ),
            service(
                name_of("empty"),
                frontend("1.2.3.6", kind=FrontendKind.LOAD_BALANCER_IP, source_ranges=ranges),
            ),
        ],
        host(),
    )


def test_affinity_is_one_over_all_frontends():
    check(
        [
            service(
                WEB,
                frontend("172.30.0.1"),
                frontend("1.2.3.4", kind=FrontendKind.LOAD_BALANCER_IP, routes=EXTERNAL_LOCAL),
                node_port(30080),
                cluster=pool(endpoint("10.0.0.1:80", local=True), "10.9.0.1:80", "10.9.0.2:80"),
                local=pool(endpoint("10.0.0.1:80", local=True)),
                affinity=600,
            ),
        ],
        host(),
    )


def test_node_ports_on_some_addresses_and_on_all():
    states = [
        service(WEB, node_port(30080), cluster=["10.0.0.1:80"]),
        service(name_of("no"), node_port(30081)),
    ]
    addresses = ("192.168.0.2", "192.168.1.2", "2001:db8::1")
    check(states, host(node_addresses=addresses))
    every = NodePortAddresses(all_local=True)
    check(states, host(node_addresses=addresses, node_ports_ipv4=every, node_ports_ipv6=every))


def test_health_ports():
    state = service(WEB, frontend("172.30.0.1"), cluster=["10.0.0.1:80"])
    check([ServiceState(**{**_fields(state), "health_check_node_port": 32000})], host())


def _fields(state: ServiceState) -> dict[str, object]:
    return {name: getattr(state, name) for name in state.__struct_fields__}


# -- all together --

CLUSTER_OR_LOCAL = st.builds(Route, st.sampled_from(PoolName), st.booleans())
ROUTES = st.one_of(
    st.sampled_from([IN_CLUSTER, EXTERNAL_LOCAL]),
    st.builds(Routes, local_pod=CLUSTER_OR_LOCAL, node=CLUSTER_OR_LOCAL, outside=CLUSTER_OR_LOCAL),
)
RANGES: dict[Family, list[str]] = {
    "IPv4": ["198.51.100.0/24", "203.0.113.0/28", "10.0.0.0/30", "0.0.0.0/0", "192.168.0.2/32"],
    "IPv6": ["2001:db8:9::/64", "2600:5200::/120", "fd00:10::/126", "::/0"],
}
VIPS: dict[Family, list[str]] = {
    "IPv4": ["172.30.0.1", "172.30.0.2", "172.30.7.1", "1.2.3.4", "203.0.113.7"],
    "IPv6": ["fd00:172:30::1", "fd00:172:30::2", "fd00:172:30::7:1", "2001:db8:5::4", "::1:2"],
}
TARGETS: dict[Family, list[str]] = {
    "IPv4": ["10.0.0.1", "10.0.0.7", "10.9.0.1", "11.0.0.1", "192.168.0.2"],
    "IPv6": ["fd00:10::1", "fd00:10::7", "fd00:11::1", "2001:db8::7:1", "2001:db8::1"],
}
KINDS = [FrontendKind.CLUSTER_IP, FrontendKind.EXTERNAL_IP, FrontendKind.LOAD_BALANCER_IP]
DETECTORS = [
    LocalPodsByCIDR(("10.0.0.0/8", "fd00:10::/64")),
    LocalPodsByCIDR(("0.0.0.0/0", "::/0")),
    LocalPodsByCIDR(()),
    None,
    LocalPodsByInterface("cni0"),
    LocalPodsByInterface("veth", prefix=True),
]


@st.composite
def hosts(draw: st.DrawFn) -> HostState:
    every = NodePortAddresses(all_local=True)
    own = {"IPv4": ("192.168.0.2", "192.168.1.2"), "IPv6": ("2001:db8::1", "2001:db8:1::2")}
    count = draw(st.sampled_from([None, 1, 2]))
    some = {f: every if count is None else NodePortAddresses(addresses=own[f][:count]) for f in own}
    return host(
        node_addresses=own["IPv4"] + own["IPv6"],
        node_ports_ipv4=some["IPv4"],
        node_ports_ipv6=some["IPv6"],
        detect_local=draw(st.sampled_from(DETECTORS)),
        masquerade_bit=draw(st.sampled_from([14, 0, 31])),
    )


@st.composite
def pools(draw: st.DrawFn, family: Family) -> Pool:
    addresses = draw(st.lists(st.sampled_from(TARGETS[family]), unique=True, max_size=4))
    weights = draw(st.sampled_from([(1,), (1,), (1, 3), (0, 2, 1), (0,)]))
    made = [
        Endpoint(
            address=address,
            port=8080 + n % 2,
            is_local=draw(st.booleans()),
            node="here",
            weight=weights[n % len(weights)],
        )
        for n, address in enumerate(addresses)
    ]
    when_empty = draw(st.sampled_from(WhenEmpty))
    return Pool(endpoints=tuple(sorted(made, key=str)), when_empty=when_empty)


@st.composite
def services(draw: st.DrawFn, family: Family, number: int) -> ServiceState:
    """A Service port whose frontends nobody else has: by its number they have ports, or a protocol, of its own."""
    protocol = "UDP" if number % 2 else "TCP"
    port = 80 + number // 2
    made: list[Frontend] = []
    for address in draw(st.lists(st.sampled_from(VIPS[family]), unique=True, max_size=3)):
        ranges = draw(
            st.one_of(
                st.none(), st.none(), st.lists(st.sampled_from(RANGES[family]), unique=True, max_size=2)
            )
        )
        kind = draw(st.sampled_from(KINDS))
        made.append(
            frontend(
                address,
                port,
                kind=kind,
                protocol=protocol,
                routes=draw(ROUTES),
                source_ranges=ranges if kind is FrontendKind.LOAD_BALANCER_IP else None,
            )
        )
    if draw(st.booleans()):
        made.append(node_port(30080 + number // 2, protocol=protocol, routes=draw(ROUTES)))
    cluster, local = draw(pools(family)), draw(st.one_of(st.none(), pools(family)))
    if draw(st.booleans()):
        local = Pool(endpoints=tuple(e for e in cluster.endpoints if e.is_local), when_empty=WhenEmpty.DROP)
    state = service(
        name_of(f"s{number}", protocol=protocol, family=family),
        *made,
        cluster=cluster,
        local=local,
        affinity=draw(st.sampled_from([None, None, 10, 10800])),
    )
    health = 32000 + number if draw(st.booleans()) else None
    return ServiceState(**{**_fields(state), "health_check_node_port": health})


@st.composite
def several(draw: st.DrawFn) -> tuple[Family, list[ServiceState]]:
    family = draw(st.sampled_from(FAMILIES))
    count = draw(st.integers(1, 4))
    return family, [draw(services(family, number)) for number in range(count)]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(
    drawn=several(),
    facts=hosts(),
    comments=st.booleans(),
    tree_from=st.sampled_from([None, 1, 3]),
    localhost=st.booleans(),
)
def test_whatever_services_there_are(drawn, facts, comments, tree_from, localhost):
    family, states = drawn
    event(f"detector: {facts.detect_local}")
    options = Options(localhost_node_ports=localhost)
    check(states, facts, family, options=options, comments=comments, tree_from=tree_from)


def test_a_difference_is_seen():
    states = [service(WEB, frontend("172.30.0.1"), cluster=["10.0.0.1:80", "10.9.0.1:80"])]
    others = [service(WEB, frontend("172.30.0.1"), cluster=["10.0.0.1:80", "10.9.0.2:80"])]
    shape = shape_of(host(), "IPv4", Options(), Features(), comments=True)
    text = assembled(others, shape, None)
    said = difference(actual(text, states, "IPv4", host()), expected(states, "IPv4", host()))
    assert any("10.9.0.2 80" in line for line in said)


@pytest.mark.parametrize(
    "gone", ["-j KUBE-MARK-MASQ", "--src-type LOCAL", "-j REJECT", "-j DROP", "--probability", "--set "]
)
def test_a_missing_rule_is_seen(gone):
    states = [
        service(
            WEB,
            frontend("172.30.0.1"),
            frontend("1.2.3.4", kind=FrontendKind.LOAD_BALANCER_IP, routes=EXTERNAL_LOCAL),
            cluster=["10.0.0.1:80", "10.9.0.1:80"],
            local=pool(when_empty=WhenEmpty.DROP),
            affinity=10,
        ),
        service(name_of("none"), frontend("172.30.0.2")),
    ]
    shape = shape_of(host(), "IPv4", Options(), Features(), comments=True)
    whole = assembled(states, shape, None)
    assert_means(whole, states, "IPv4", host())
    lines = whole.splitlines()
    number = next(n for n, line in enumerate(lines) if gone in line and "INVALID" not in line)
    text = "\n".join(lines[:number] + lines[number + 1 :])
    assert difference(actual(text, states, "IPv4", host()), expected(states, "IPv4", host()))
