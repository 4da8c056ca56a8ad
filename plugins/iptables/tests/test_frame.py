"""What is there once, as text."""

from __future__ import annotations

from typing import Any

import pytest

from proxycore.api import NodePortAddresses
from proxycore_iptables.frame import FORWARD, GUARD, MARK_MASQ, POSTROUTING, frame
from proxycore_iptables.rules import MARKER, SERVICES
from proxycore_iptables.shape import Shape

LAST = '-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" '


def shape(**given: Any) -> Shape:
    return Shape(**{"family": "IPv4", "node_ports": NodePortAddresses(all_local=True), **given})


def top_down(made, table, chain):
    """Targets of the jumps of a built-in chain, as they will stand in it."""
    found = [
        jump.rule.rpartition(" ")[2] for jump in made.jumps if (jump.table, jump.chain) == (table, chain)
    ]
    return found[::-1]


def test_jumps_come_to_stand_in_kube_proxys_order():
    made = frame(shape(localhost_node_ports=True))
    assert top_down(made, "filter", "FORWARD") == [
        "KUBE-PROXY-FIREWALL",
        "KUBE-FORWARD",
        "KUBE-SERVICES",
        "KUBE-EXTERNAL-SERVICES",
    ]
    assert top_down(made, "filter", "INPUT") == [
        "KUBE-FIREWALL",
        "KUBE-PROXY-FIREWALL",
        "KUBE-NODEPORTS",
        "KUBE-EXTERNAL-SERVICES",
    ]
    assert top_down(made, "filter", "OUTPUT") == ["KUBE-FIREWALL", "KUBE-PROXY-FIREWALL", "KUBE-SERVICES"]
    assert top_down(made, "nat", "OUTPUT") == top_down(made, "nat", "PREROUTING") == ["KUBE-SERVICES"]
    assert top_down(made, "nat", "POSTROUTING") == ["KUBE-POSTROUTING"]


def test_guard_of_loopback_is_there_only_with_node_ports_on_it():
    guarded = frame(shape(localhost_node_ports=True))
    assert guarded.chains[GUARD] == (
        '! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" '
        "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
    )
    plain = frame(shape())
    assert GUARD not in plain.chains
    assert not any("KUBE-FIREWALL" in jump.rule for jump in plain.jumps)


def test_marker_is_empty():
    assert frame(shape()).chains[MARKER] == ()


def test_mark_is_set_tested_and_taken_away():
    made = frame(shape(masquerade_bit=0)).chains
    assert made[MARK_MASQ] == ("-j MARK --set-xmark 0x1/0x1",)
    assert made[POSTROUTING] == (
        "-m mark ! --mark 0x1/0x1 -j RETURN",
        "-j MARK --set-xmark 0x1/0x0",
        '-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully',
    )


def test_masquerade_without_random_ports_where_iptables_has_none():
    assert frame(shape(random_fully=False)).chains[POSTROUTING][-1].endswith(" -j MASQUERADE")


@pytest.mark.parametrize(
    ("given", "first"),
    [
        ({}, "-m conntrack --ctstate INVALID -j DROP"),
        (
            {"nfacct": True},
            "-m conntrack --ctstate INVALID -m nfacct --nfacct-name ct_state_invalid_dropped_pkts -j DROP",
        ),
        (
            {"drop_invalid": False},
            '-m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT',
        ),
    ],
)
def test_invalid_packets(given, first):
    assert frame(shape(**given)).chains[FORWARD][0] == first


@pytest.mark.parametrize(
    ("given", "tail"),
    [
        ({}, [f"! -d 127.0.0.0/8 {LAST}-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"]),
        ({"family": "IPv6"}, [f"! -d ::1/128 {LAST}-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"]),
        ({"localhost_node_ports": True}, [f"{LAST}-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"]),
        (
            {"node_ports": NodePortAddresses(addresses=("192.168.0.2", "192.168.1.2"))},
            [f"-d 192.168.0.2/32 {LAST}-j KUBE-NODEPORTS", f"-d 192.168.1.2/32 {LAST}-j KUBE-NODEPORTS"],
        ),
        (
            {
                "localhost_node_ports": True,
                "node_ports": NodePortAddresses(addresses=("127.0.0.1", "192.168.0.2")),
            },
            [f"-d 192.168.0.2/32 {LAST}-j KUBE-NODEPORTS", f"-d 127.0.0.0/8 {LAST}-j KUBE-NODEPORTS"],
        ),
        ({"node_ports": NodePortAddresses()}, []),
    ],
)
def test_node_ports_come_last(given, tail):
    assert list(frame(shape(**given)).tails[SERVICES]) == tail
