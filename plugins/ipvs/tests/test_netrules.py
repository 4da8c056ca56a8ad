"""The text of the rules, routes and sysctls."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxycore.api import ConfigError, LocalPodsByCIDR, LocalPodsByInterface
from proxycore.testing.states import host
from proxycore_ipvs import netrules
from proxycore_ipvs.entries import SetKind
from proxycore_ipvs.ids import Target
from proxycore_ipvs.marks import Marks
from proxycore_ipvs.netrules import (
    CHAINS,
    JUMPS,
    MAPPED,
    NODEPORTS,
    PORTS,
    SERVICES,
    classes_in,
    jumps,
    load,
    rules,
    unload,
)
from proxycore_ipvs.shape import Shape, shape_of

GOLDEN = Path(__file__).parent / "golden"
CLASSES = {Target("UDP", 53): 1, Target("TCP", 8080): 1, Target("TCP", 80): 2}
SHAPES = {
    "ipv4": Shape(family="IPv4", local_pods="-s 10.0.0.0/8"),
    "ipv6": Shape(family="IPv6", local_pods="-i veth+", security=False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_whole_text(name):
    shape = SHAPES[name]
    text = load(rules(shape, CLASSES, ("TCP", "UDP")), jumps(shape))
    text += unload(list(rules(shape)), jumps(shape))
    text += "".join(f"{each}\n" for each in netrules.policy_routes(shape))
    assert text == (GOLDEN / f"{name}.rules").read_text()


@pytest.mark.parametrize(
    "shape", [*SHAPES.values(), Shape(family="IPv4", marks=Marks.with_masquerade_bit(21))]
)
def test_classes_are_read_back(shape):
    written = rules(shape, CLASSES)[PORTS]
    assert classes_in([*written, "-j ACCEPT"], shape.marks) == CLASSES
    assert classes_in(written, Marks.with_masquerade_bit(20)) == {}


def _mapped(**options):
    return rules(Shape(family="IPv4", **options))[MAPPED]


def test_without_a_detector_no_rule_asks_for_local_pods():
    with_one, without = _mapped(local_pods="-i cni0"), _mapped()
    assert [rule for rule in with_one if "-i cni0" in rule] == [
        "-i cni0 -m mark --mark 0x4000000/0x4000000 -j MARK --set-xmark 0x0/0x34000000",
        "! -i cni0 -m mark --mark 0x8000000/0x8000000 -j MARK --set-xmark 0x4000/0x4000",
    ]
    assert without == tuple(rule for rule in with_one if "-i cni0" not in rule)


def test_where_everyone_is_a_local_pod_nobody_is_another():
    found = _mapped(local_pods="-s 0.0.0.0/0")
    assert found[0] == "-m mark --mark 0x4000000/0x4000000 -j MARK --set-xmark 0x0/0x34000000"
    assert not any("0x8000000/0x8000000" in rule for rule in found)


def test_addresses_are_written_as_they_are_printed():
    assert _mapped(local_pods="-s ::1:0/112")[0].startswith("-s ::0.1.0.0/112 -m mark")


def test_rules_name_sets_of_node_ports_only_where_there_are_some():
    assert rules(Shape(family="IPv6"))[NODEPORTS] == ()
    assert rules(Shape(family="IPv6"), node_ports=("SCTP",))[NODEPORTS] == (
        "-p sctp -j SET --map-set PX6-NP-sctp dst --map-mark",
    )


def test_without_a_security_table_nothing_names_it():
    shape = Shape(family="IPv4", security=False)
    assert "security" not in load(rules(shape), jumps(shape))
    assert "security" in load(rules(Shape(family="IPv4")), JUMPS)


def test_without_random_ports_masquerading_is_plain():
    assert "--random-fully" not in load(rules(Shape(family="IPv4", random_fully=False)))


def test_another_layout_of_the_mark_is_in_every_rule():
    text = load(rules(Shape(family="IPv4", marks=Marks.with_masquerade_bit(30)), CLASSES))
    assert "--mark 0x4000/0x4000 -g PX-MAPPED" in text
    assert "-m connmark --mark 0x40004000/0x40004000 -j MASQUERADE" in text
    assert "-j MARK --set-xmark 0x40000000/0x74000000" in text
    assert "--mark 0x0/0x80004000 -m set --match-set PX4-NODE dst" in text


def test_every_set_is_named_and_every_chain_is_reached():
    shape = SHAPES["ipv4"]
    chains = rules(shape, CLASSES, ("TCP", "UDP", "SCTP"))
    text = load(chains, jumps(shape))
    for kind in SetKind:
        assert f" PX4-{kind.value} " in text
    assert tuple(chains) == CHAINS
    for place in chains:
        assert any(f"{how} {place.chain}\n" in text for how in ("-j", "-g"))


def test_only_what_is_there_is_taken_away():
    assert unload([SERVICES], [JUMPS[0]]) == (
        "*mangle\n:PX-SERVICES - [0:0]\n-X PX-SERVICES\nCOMMIT\n*filter\n-D INPUT -j PX-REJECT\nCOMMIT\n"
    )
    assert unload([], []) == ""


def test_only_missing_jumps_are_made():
    assert load({}, [JUMPS[-1]]) == "*mangle\n-I OUTPUT -j PX-OUTPUT\nCOMMIT\n"


def test_every_sysctl_says_why():
    assert [each.path.rpartition("/")[2] for each in netrules.SYSCTLS] == [
        "conntrack",
        "expire_nodest_conn",
        "expire_quiescent_template",
        "conn_reuse_mode",
    ]
    assert all(each.why and each.value == "1" for each in netrules.SYSCTLS)


@pytest.mark.parametrize(
    ("detector", "v4", "v6"),
    [
        (None, "", ""),
        (LocalPodsByCIDR(("fd00:10::/64",)), "", "-s fd00:10::/64"),
        (LocalPodsByInterface("cni0"), "-i cni0", "-i cni0"),
        (LocalPodsByInterface("veth", prefix=True), "-i veth+", "-i veth+"),
        (LocalPodsByInterface("a" * 15, prefix=True), f"-i {'a' * 15}", f"-i {'a' * 15}"),
    ],
)
def test_how_a_local_pod_is_told(detector, v4, v6):
    facts = host(detect_local=detector)
    assert (shape_of(facts, "IPv4").local_pods, shape_of(facts, "IPv6").local_pods) == (v4, v6)


def test_facts_that_make_no_rules_are_refused():
    with pytest.raises(ConfigError, match="interface"):
        shape_of(host(detect_local=LocalPodsByInterface("a b")), "IPv4")
    shape = shape_of(host(masquerade_bit=21), "IPv4")
    assert shape.marks.masquerade == 1 << 21
