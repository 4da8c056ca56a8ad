"""The rules of one Service port, as text.

After a change that is meant, write the files in `golden/` anew and read the difference:

    PROXYCORE_UPDATE_GOLDEN=1 python -m pytest plugins/iptables/tests/test_render.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxycore.api import (
    Frontend,
    FrontendKind,
    NodePortAddresses,
    PoolName,
    Route,
    Routes,
    ServiceState,
    WhenEmpty,
)
from proxycore.policy import external_routes, internal_routes
from proxycore.testing.states import endpoint, frontend, name_of, node_port, pool, service
from proxycore_iptables import names
from proxycore_iptables.render import render
from proxycore_iptables.rules import (
    FIREWALL,
    HEALTH_PORTS,
    NODE_PORTS,
    REFUSED,
    REFUSED_OUTSIDE,
    SERVICES,
    Place,
)
from proxycore_iptables.shape import Shape

from .written import written

GOLDEN = Path(__file__).parent / "golden"
WEB = name_of("web", "http", namespace="shop")
SVC, SVL = names.service_chain(WEB), names.local_chain(WEB)
EXT, FW = names.external_chain(WEB), names.firewall_chain(WEB)
INTERNAL = internal_routes(local=False, detector=True, masquerade_all=False)
INTERNAL_LOCAL = internal_routes(local=True, detector=True, masquerade_all=False)
CLUSTER = external_routes(local=False, detector=True)
LOCAL = external_routes(local=True, detector=True)
TWO = ("10.1.0.1:8080", "10.2.0.1:8080")
NONE_HERE = pool(when_empty=WhenEmpty.DROP)


def shape(**given: Any) -> Shape:
    defaults = {
        "family": "IPv4",
        "local_pods": "-s 10.0.0.0/8",
        "node_ports": NodePortAddresses(all_local=True),
    }
    return Shape(**{**defaults, **given})


def balancer(
    address: str = "203.0.113.9", port: int = 80, *, routes: Routes = CLUSTER, ranges=None
) -> Frontend:
    return frontend(address, port, kind=FrontendKind.LOAD_BALANCER_IP, routes=routes, source_ranges=ranges)


def rules(state: ServiceState, place: Place, **given: Any) -> list[str]:
    return [entry.rule for entry in sorted(render(state, shape(**given)).entries.get(place, ()))]


def chain(state: ServiceState, name: str, **given: Any) -> list[str]:
    return list(render(state, shape(**given)).chains[name])


# -- whole --


def compare(text: str, file: str) -> None:
    path = GOLDEN / file
    if os.environ.get("PROXYCORE_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_some_services_whole():
    services = [
        service(WEB, frontend("172.30.0.41", routes=INTERNAL), cluster=(*TWO, "10.3.0.1:8080")),
        service(
            name_of("dns", "dns", "UDP", namespace="kube-system"),
            frontend("172.30.0.10", 53, protocol="UDP", routes=INTERNAL_LOCAL),
            local=("10.1.0.53:53",),
        ),
        service(
            name_of("shopfront", "https", namespace="shop"),
            frontend("172.30.0.42", 443, routes=INTERNAL),
            balancer(port=443, routes=LOCAL, ranges=("198.51.100.0/24",)),
            frontend("192.0.2.7", 443, kind=FrontendKind.EXTERNAL_IP, routes=LOCAL),
            node_port(30443, routes=LOCAL),
            cluster=TWO,
            local=TWO[:1],
            affinity=10800,
        ),
        service(name_of("gone", "", namespace="shop"), frontend("172.30.0.43", routes=INTERNAL)),
        service(
            name_of("elsewhere", "", namespace="shop"),
            frontend("172.30.0.44", routes=INTERNAL),
            node_port(30044, routes=LOCAL),
            cluster=TWO[1:],
            local=NONE_HERE,
        ),
    ]
    compare(written(services, shape()), "services.rules")


def test_a_service_of_ipv6_whole():
    one = service(
        name_of("web", "http", namespace="shop", family="IPv6"),
        frontend("fd00:172:30::41", routes=INTERNAL),
        node_port(30080, routes=CLUSTER),
        cluster=("[fd00:10:1::1]:8080", "[fd00:10:2::1]:8080"),
        affinity=60,
    )
    compare(written([one], shape(family="IPv6", local_pods="-i cni0")), "services6.rules")


# -- cluster IPs --


@pytest.mark.parametrize(
    ("routes", "local_pods", "first"),
    [
        (INTERNAL, "-s 10.0.0.0/8", ["! -s 10.0.0.0/8 -d 172.30.0.41/32 -p tcp"]),
        (INTERNAL, "-i veth+", ["-d 172.30.0.41/32 ! -i veth+ -p tcp"]),
        (INTERNAL, "-s 0.0.0.0/0", []),
        (internal_routes(local=False, detector=False, masquerade_all=False), "", []),
        (
            internal_routes(local=False, detector=True, masquerade_all=True),
            "-s 10.0.0.0/8",
            ["-d 172.30.0.41/32 -p tcp"],
        ),
    ],
)
def test_who_is_masqueraded_at_a_cluster_ip(routes, local_pods, first):
    state = service(WEB, frontend("172.30.0.41", routes=routes), cluster=TWO)
    said = ' -m comment --comment "shop/web:http cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ'
    assert chain(state, SVC, local_pods=local_pods)[:-2] == [rule + said for rule in first]


def test_internal_policy_local_leads_to_the_local_chain():
    state = service(WEB, frontend("172.30.0.41", routes=INTERNAL_LOCAL), cluster=TWO, local=TWO[:1])
    made = render(state, shape())
    assert [name[:9] for name in made.chains] == ["KUBE-SEP-", "KUBE-SVL-"]
    assert rules(state, SERVICES)[0].endswith(f"-j {SVL}")


# -- external frontends --


def test_policy_local_sorts_clients():
    state = service(WEB, node_port(30080, routes=LOCAL), cluster=TWO, local=TWO[:1])
    what = "traffic for shop/web:http external destinations"
    assert chain(state, EXT) == [
        f'-s 10.0.0.0/8 -m comment --comment "pod {what}" -j {SVC}',
        f'-m comment --comment "masquerade LOCAL {what}" -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ',
        f'-m comment --comment "route LOCAL {what}" -m addrtype --src-type LOCAL -j {SVC}',
        f"-j {SVL}",
    ]


def test_policy_cluster_masquerades_everyone():
    state = service(WEB, node_port(30080, routes=CLUSTER), cluster=TWO)
    said = "masquerade traffic for shop/web:http external destinations"
    assert chain(state, EXT) == [f'-m comment --comment "{said}" -j KUBE-MARK-MASQ', f"-j {SVC}"]


def test_without_local_endpoints_those_outside_are_dropped_and_others_served():
    state = service(WEB, balancer(routes=LOCAL), cluster=TWO, local=NONE_HERE)
    assert [rule.rpartition(" ")[2] for rule in chain(state, EXT)] == [SVC, "KUBE-MARK-MASQ", SVC]
    said = "shop/web:http has no local endpoints"
    assert rules(state, REFUSED_OUTSIDE) == [
        f'-d 203.0.113.9/32 -p tcp -m comment --comment "{said}" -m tcp --dport 80 -j DROP'
    ]
    assert rules(state, REFUSED) == []


def test_other_routes_have_a_chain_of_their_own():
    here = Route(PoolName.LOCAL, False)
    odd = Routes(local_pod=here, node=here, outside=Route(PoolName.CLUSTER, True))
    state = service(
        WEB, balancer(routes=LOCAL), balancer("203.0.113.10", routes=odd), cluster=TWO, local=TWO[:1]
    )
    first, second = (rule.rpartition(" ")[2] for rule in rules(state, SERVICES))
    assert first == EXT != second
    assert second.startswith("KUBE-EXT-")
    assert [rule.rpartition(" ")[2] for rule in chain(state, second)] == [SVL, SVL, "KUBE-MARK-MASQ", SVC]


def test_a_class_without_endpoints_goes_back_before_others_are_served():
    odd = Routes(
        local_pod=Route(PoolName.LOCAL, False),
        node=Route(PoolName.CLUSTER, False),
        outside=Route(PoolName.CLUSTER, False),
    )
    state = service(WEB, balancer(routes=odd), cluster=TWO, local=NONE_HERE)
    said = "pod traffic for shop/web:http external destinations"
    assert chain(state, EXT) == [f'-s 10.0.0.0/8 -m comment --comment "{said}" -j RETURN', f"-j {SVC}"]


def test_verdicts_by_class_where_they_differ():
    odd = Routes(
        local_pod=Route(PoolName.LOCAL, False),
        node=Route(PoolName.CLUSTER, False),
        outside=Route(PoolName.CLUSTER, False),
    )
    state = service(WEB, balancer(routes=odd), local=NONE_HERE)
    made = rules(state, REFUSED_OUTSIDE)
    assert made[0].startswith("-s 10.0.0.0/8 -d 203.0.113.9/32 -p tcp ")
    assert [rule.partition(" -j ")[2] for rule in made] == [
        "DROP",
        "REJECT --reject-with icmp-port-unreachable",
    ]
    assert rules(state, SERVICES) == []


# -- nothing to send to --


def test_refusals_of_every_kind_of_frontend():
    state = service(
        WEB,
        frontend("172.30.0.41", routes=INTERNAL),
        frontend("192.0.2.7", kind=FrontendKind.EXTERNAL_IP, routes=CLUSTER),
        node_port(30080, routes=CLUSTER),
    )
    said = '-m comment --comment "shop/web:http has no endpoints"'
    verdict = "-j REJECT --reject-with icmp-port-unreachable"
    made = render(state, shape())
    assert made.chains == {}
    assert made.entries.keys() == {REFUSED, REFUSED_OUTSIDE}
    external = f"-d 192.0.2.7/32 -p tcp {said} -m tcp --dport 80 {verdict}"
    assert rules(state, REFUSED) == [f"-d 172.30.0.41/32 -p tcp {said} -m tcp --dport 80 {verdict}", external]
    assert rules(state, REFUSED_OUTSIDE) == [
        f"! -d 127.0.0.0/8 -p tcp {said} -m addrtype --dst-type LOCAL -m tcp --dport 30080 {verdict}",
        external,
    ]


@pytest.mark.parametrize(
    ("given", "heads"),
    [
        ({"localhost_node_ports": True}, ["-p tcp"]),
        (
            {"node_ports": NodePortAddresses(addresses=("192.0.2.1", "192.0.2.2"))},
            ["-d 192.0.2.1/32 -p tcp", "-d 192.0.2.2/32 -p tcp"],
        ),
        (
            {"node_ports": NodePortAddresses(addresses=("192.0.2.1",)), "localhost_node_ports": True},
            ["-d 192.0.2.1/32 -p tcp", "-d 127.0.0.0/8 -p tcp"],
        ),
        ({"node_ports": NodePortAddresses()}, []),
    ],
)
def test_refusals_at_node_ports(given, heads):
    made = rules(service(WEB, node_port(30080, routes=CLUSTER)), REFUSED_OUTSIDE, **given)
    assert [rule.partition(" -m comment")[0] for rule in made] == heads


def test_refusals_of_ipv6():
    state = service(name_of(family="IPv6"), frontend("fd00::1"))
    made = rules(state, REFUSED, family="IPv6", local_pods="")
    assert made[0].startswith("-d fd00::1/128 -p tcp ")
    assert made[0].endswith("-j REJECT --reject-with icmp6-port-unreachable")


# -- source ranges --


def test_source_ranges():
    state = service(WEB, balancer(ranges=("198.51.100.0/24", "203.0.113.9/32")), cluster=TWO)
    said = '-m comment --comment "shop/web:http loadbalancer IP"'
    assert rules(state, SERVICES) == [f"-d 203.0.113.9/32 -p tcp {said} -m tcp --dport 80 -j {FW}"]
    assert chain(state, FW) == [
        f"-s 198.51.100.0/24 {said} -j {EXT}",
        f"-s 203.0.113.9/32 {said} -j {EXT}",
        '-m comment --comment "other traffic to shop/web:http will be dropped by KUBE-PROXY-FIREWALL"',
    ]
    assert rules(state, FIREWALL) == [
        f'-d 203.0.113.9/32 -p tcp -m comment --comment "shop/web:http traffic not accepted by {FW}" '
        "-m tcp --dport 80 -j DROP"
    ]


def test_source_ranges_that_differ_have_chains_of_their_own():
    state = service(
        WEB,
        balancer(ranges=("198.51.100.0/24",)),
        balancer("203.0.113.10", ranges=("10.0.0.0/8",)),
        cluster=TWO,
    )
    first, second = (rule.rpartition(" ")[2] for rule in rules(state, SERVICES))
    assert first == FW != second
    assert chain(state, second)[0].startswith("-s 10.0.0.0/8 ")


def test_nobody_is_admitted():
    state = service(WEB, balancer(ranges=()), cluster=TWO)
    made = render(state, shape())
    assert made.chains == {}
    assert made.entries.keys() == {FIREWALL}
    assert rules(state, FIREWALL)[0].endswith("-j DROP")


def test_without_endpoints_only_those_admitted_hear_so():
    made = rules(service(WEB, balancer(ranges=("198.51.100.0/24",))), FIREWALL)
    assert [rule.partition(" -p ")[0] for rule in made] == [
        "-s 198.51.100.0/24 -d 203.0.113.9/32",
        "-d 203.0.113.9/32",
    ]
    assert [rule.rpartition(" ")[2] for rule in made] == ["RETURN", "DROP"]


# -- node ports, health --


def test_node_ports_on_localhost_are_counted_first():
    state = service(WEB, node_port(30080, routes=CLUSTER), cluster=TWO)
    plain = '-p tcp -m comment --comment "shop/web:http" -m tcp --dport 30080 '
    assert rules(state, NODE_PORTS) == [f"{plain}-j {EXT}"]
    assert rules(state, NODE_PORTS, localhost_node_ports=True) == [f"{plain}-j {EXT}"]
    assert rules(state, NODE_PORTS, localhost_node_ports=True, nfacct=True) == [
        f"-d 127.0.0.0/8 {plain}-m nfacct --nfacct-name localhost_nps_accepted_pkts -j {EXT}",
        f"{plain}-j {EXT}",
    ]


def test_health_ports_are_open_and_each_ports_own():
    made = []
    for protocol in ("TCP", "UDP"):
        state = service(WEB._replace(protocol=protocol), frontend("172.30.0.41", protocol=protocol))
        state = msgspec.structs.replace(state, health_check_node_port=32000)
        made += render(state, shape()).entries[HEALTH_PORTS]
    said = "shop/web:http health check node port"
    assert {entry.rule for entry in made} == {
        f'-p tcp -m comment --comment "{said}" -m tcp --dport 32000 -j ACCEPT'
    }
    assert len(set(made)) == 2


# -- endpoints --


def test_without_comments_those_of_endpoints_alone_are_gone():
    state = service(WEB, node_port(30080, routes=CLUSTER), frontend("172.30.0.41"), cluster=TWO, affinity=60)
    made = render(state, shape(comments=False)).chains
    commented = {name[:9] for name, rules in made.items() if any("--comment" in rule for rule in rules)}
    assert commented == {"KUBE-SVC-", "KUBE-EXT-"}
    assert ["--comment" in rule for rule in made[SVC]] == [True, False, False, False, False]


def test_weights():
    ends = [endpoint(f"10.1.0.{n}:80", weight=weight) for n, weight in enumerate((1, 0, 2, 1), 1)]
    made = chain(service(WEB, frontend("172.30.0.41"), cluster=pool(*ends)), SVC, comments=False)[1:]
    assert [rule.partition(" -j ")[0] for rule in made] == [
        "-m statistic --mode random --probability 0.25000000000",
        "-m statistic --mode random --probability 0.66666666651",
        f"-j {names.endpoint_chain_of(names.text_of(WEB), str(ends[3]))}",
    ]


def test_endpoints_of_no_weight_alone_are_none():
    state = service(WEB, frontend("172.30.0.41"), cluster=pool(endpoint("10.1.0.1:80", weight=0)))
    made = render(state, shape())
    assert made.chains == {}
    assert made.entries.keys() == {REFUSED}


def test_endpoint_chains_come_before_those_that_jump_to_them():
    state = service(
        WEB,
        frontend("172.30.0.41"),
        balancer(routes=LOCAL, ranges=("10.0.0.0/8",)),
        cluster=TWO,
        local=("10.1.0.1:8080", "10.9.0.1:8080"),
    )
    made = render(state, shape())
    seen = {"KUBE-MARK-MASQ"}
    for name, content in made.chains.items():
        targets = {rule.rpartition("-j ")[2].partition(" ")[0] for rule in content if "-j " in rule}
        assert targets - {"DNAT"} <= seen
        seen.add(name)
    assert [name[:9] for name in made.chains].count("KUBE-SEP-") == 3


def test_affinity_is_looked_up_before_the_draw_and_kept_by_each_endpoint():
    state = service(WEB, frontend("172.30.0.41"), cluster=TWO[:1], affinity=60)
    target = names.endpoint_chain_of(names.text_of(WEB), TWO[0])
    recent = f"--name {target} --mask 255.255.255.255 --rsource"
    assert chain(state, SVC, comments=False)[1:] == [
        f"-m recent --rcheck --seconds 60 --reap {recent} -j {target}",
        f"-j {target}",
    ]
    assert chain(state, target, comments=False) == [
        "-s 10.1.0.1/32 -j KUBE-MARK-MASQ",
        f"-p tcp -m recent --set {recent} -m tcp -j DNAT --to-destination 10.1.0.1:8080",
    ]
