"""What is written is what is read back, letter by letter: both variants, both families."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxycore.api import FrontendKind, LocalPodsByCIDR, LocalPodsByInterface, NodePortAddresses, WhenEmpty
from proxycore.policy import external_routes, internal_routes
from proxycore.testing.netns import Namespace
from proxycore.testing.states import endpoint, frontend, host, name_of, node_port, pool, service
from proxycore_iptables.counting import Counting
from proxycore_iptables.rules import TABLES
from proxycore_iptables.shape import Features, Options, Shape, shape_of

from .drawn import hosts, states
from .tables import FAMILIES, VARIANTS, Tables
from .written import chains_of, text_of

pytestmark = pytest.mark.root

COUNTER = "--nfacct-name "
ALL = NodePortAddresses(all_local=True)
LISTED = NodePortAddresses(addresses=("192.168.0.2", "192.168.1.2"))


@pytest.fixture(scope="module", params=list(itertools.product(VARIANTS, FAMILIES)), ids="-".join)
def tables(request, tmp_path_factory):
    """The tables of one variant and family; and which family."""
    variant, family = request.param
    with Namespace("text") as namespace:
        namespace.call(_make_counters)
        yield Tables(namespace, variant, family, tmp_path_factory.mktemp("text") / "lock"), family


def _make_counters() -> None:
    with Counting() as counting:
        counting.ensure()


def assert_read_back(tables, services, shape):
    """Load it all into fresh tables, and compare."""
    chains = chains_of(services, shape)
    tables.restore(text_of(chains), "--noflush", "-w", "5")
    try:
        for table in TABLES:
            # Of this match alone the blanks differ between releases.
            found = {
                chain: tuple(rule.replace(f"{COUNTER} ", COUNTER) for rule in rules)
                for chain, rules in tables.rules(table).items()
            }
            assert found == {place.chain: rules for place, rules in chains.items() if place.table == table}
    finally:
        tables.restore("".join(f"*{table}\nCOMMIT\n" for table in TABLES), "-w", "5")


def address(family, number):
    return f"172.30.7.{number}" if family == "IPv4" else f"fd00:172:30::{number:x}"


def targets(family, count):
    if family == "IPv4":
        return [f"10.0.{n // 250}.{n % 250 + 1}:8080" for n in range(count)]
    return [f"[fd00:10::{n + 1:x}]:8080" for n in range(count)]


@pytest.mark.parametrize(
    "facts",
    [
        {"detect_local": None, "node_ports_ipv4": ALL, "node_ports_ipv6": ALL},
        {"detect_local": LocalPodsByInterface("cni0"), "masquerade_bit": 0},
        {"detect_local": LocalPodsByInterface("veth", prefix=True), "masquerade_bit": 31},
        {"detect_local": LocalPodsByInterface("abcdefghijklmno", prefix=True)},
        {"detect_local": LocalPodsByCIDR(("0.0.0.0/0", "::/0")), "node_ports_ipv4": LISTED},
        {"node_ports_ipv4": NodePortAddresses(), "node_ports_ipv6": NodePortAddresses()},
    ],
    ids=["nobody", "interface", "prefix", "long prefix", "everybody", "no node ports"],
)
@pytest.mark.parametrize("counted", [False, True], ids=["plain", "counted"])
def test_services_of_every_kind_and_the_frame(tables, facts, counted):
    tables, family = tables
    node = host(**facts)
    shape = shape_of(
        node,
        family,
        Options(localhost_node_ports=counted, drop_invalid="always" if counted else "never"),
        Features(nfacct=counted, random_fully=counted),
        comments=counted,
    )
    ranges = ("203.0.113.0/25", "198.51.100.7/32") if family == "IPv4" else ("2600:5200::/33", "::1:2/128")
    local = external_routes(local=True, detector=True)
    made = [
        service(
            name_of(f"web{number}", family=family),
            frontend(
                address(family, 4 * number + 1),
                routes=internal_routes(local=False, detector=True, masquerade_all=False),
            ),
            frontend(address(family, 4 * number + 2), kind=FrontendKind.EXTERNAL_IP, routes=local),
            frontend(
                address(family, 4 * number + 3),
                kind=FrontendKind.LOAD_BALANCER_IP,
                routes=local,
                source_ranges=ranges,
            ),
            node_port(30000 + number, routes=local),
            cluster=cluster,
            local=pool(*cluster[:number], when_empty=WhenEmpty.DROP),
            affinity=number * 60 or None,
        )
        for number, cluster in enumerate((targets(family, 3), targets(family, 1), []))
    ]
    assert_read_back(tables, made, shape)


@pytest.mark.parametrize("protocol", ["TCP", "UDP", "SCTP"])
def test_protocols(tables, protocol):
    tables, family = tables
    one = service(
        name_of(protocol=protocol, family=family),
        frontend(address(family, 1), protocol=protocol),
        node_port(30000, protocol=protocol),
        cluster=targets(family, 2),
    )
    assert_read_back(tables, [one], Shape(family=family, node_ports=ALL))


def test_chances_of_many_endpoints(tables):
    tables, family = tables
    one = service(name_of(family=family), frontend(address(family, 1)), cluster=targets(family, 2000))
    assert_read_back(tables, [one], Shape(family=family, comments=False))


@pytest.mark.parametrize("weights", [(1, 2, 3), (1, 10**9, 1), (10**12, 1, 7), (5, 5, 5), (0, 3, 0)])
def test_chances_of_weights(tables, weights):
    tables, family = tables
    ends = [endpoint(text, weight=w) for text, w in zip(targets(family, 3), weights, strict=True)]
    one = service(name_of(family=family), frontend(address(family, 1)), cluster=pool(*ends))
    assert_read_back(tables, [one], Shape(family=family))


@pytest.mark.parametrize("tables", [(variant, "IPv6") for variant in VARIANTS], indirect=True, ids=VARIANTS)
@pytest.mark.parametrize(
    "text",
    ["::2", "::1:2", "::ab:cdef", "64:ff9b::1:2", "fd00:1:0:1:1:1:1:1", "1::", "fe80:0:0:1::1", "::1:2:3"],
)
def test_addresses_that_have_two_texts(tables, text):
    tables, _ = tables
    one = service(
        name_of(family="IPv6"),
        frontend(text, kind=FrontendKind.LOAD_BALANCER_IP, source_ranges=(f"{text}/128", "::/96")),
        cluster=[f"[{text}]:80"],
    )
    two = service(name_of("other", family="IPv6"), frontend(text, 81), cluster=[])
    shape = Shape(family="IPv6", node_ports=NodePortAddresses(addresses=(text,)), local_pods=f"-s {text}/128")
    assert_read_back(tables, [one, two], shape)


@pytest.mark.parametrize(
    "name",
    [
        "x" * 300,
        'a"b',
        "a'b",
        "a\\",
        "-j DROP",
        "--comment",
        "a\n-A INPUT -j DROP",
        "a\nCOMMIT",
        "ü",
        " ",
        "",
        "!",
        "[0:0]",
        "a->b",
        "\0",
        "#",
        "$(x)",
    ],
)
def test_names_that_no_api_server_would_take(tables, name):
    tables, family = tables
    one = service(
        name_of(name, name, family=family, namespace=name),
        frontend(address(family, 1)),
        frontend(address(family, 2), kind=FrontendKind.LOAD_BALANCER_IP, source_ranges=()),
        node_port(30000, routes=external_routes(local=True, detector=True)),
        cluster=targets(family, 2),
        local=pool(when_empty=WhenEmpty.DROP),
        affinity=60,
    )
    assert_read_back(tables, [one], Shape(family=family, node_ports=ALL))


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.data(), hosts(), st.booleans())
def test_drawn_services(tables, data, node, comments):
    tables, family = tables
    shape = shape_of(node, family, Options(), Features(), comments=comments)
    assert_read_back(tables, data.draw(states(family)), shape)
