"""What of a listing is kube-proxy's, without any kernel."""

from __future__ import annotations

import pytest

from proxycore import kubechains

HASH = "XPGD46QRK7WJZT7O"


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ("nat", "KUBE-SERVICES"),
        ("nat", f"KUBE-SVC-{HASH}"),
        ("nat", f"KUBE-XLB-{HASH}"),
        ("nat", "KUBE-FIRE-WALL"),
        ("filter", "KUBE-PROXY-FIREWALL"),
        ("mangle", "KUBE-PROXY-CANARY"),
    ],
)
def test_chains_of_kube_proxy(table, name):
    assert kubechains.is_kube_proxys(table, name)


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ("filter", "KUBE-FIREWALL"),
        ("nat", "KUBE-MARK-DROP"),
        ("nat", "KUBE-KUBELET-CANARY"),
        ("mangle", "KUBE-IPTABLES-HINT"),
        ("mangle", "KUBE-SERVICES"),
        ("raw", "KUBE-PROXY-CANARY"),
        ("filter", f"KUBE-SVC-{HASH}"),
        ("nat", f"KUBE-SVC-{HASH[:-1]}"),
        ("nat", f"KUBE-SVC-{HASH}X"),
        ("nat", f"KUBE-SVC-{HASH.lower()}"),
        ("nat", f"MY-KUBE-SVC-{HASH}"),
        ("nat", f"KUBE-SVCT-{HASH}"),
        # The kubelet's policies and network policy controllers.
        ("filter", "KUBE-ROUTER-FORWARD"),
        ("filter", f"KUBE-NWPLCY-{HASH}"),
    ],
)
def test_chains_of_others(table, name):
    assert not kubechains.is_kube_proxys(table, name)


@pytest.mark.parametrize(
    ("rule", "target"),
    [
        ("-A PREROUTING -j KUBE-SERVICES", "KUBE-SERVICES"),
        ("-A PREROUTING -g KUBE-SERVICES", "KUBE-SERVICES"),
        ('-A INPUT -m comment --comment "x -j KUBE-SERVICES" -j ACCEPT', "ACCEPT"),
        ("-A INPUT -m comment --comment -j -j ACCEPT", "ACCEPT"),
        (r'-A INPUT -m comment --comment "a \" -j KUBE-SERVICES" -j DROP', "DROP"),
        ('-A INPUT -m comment --comment "it\'s" -j DROP', "DROP"),
        ("-A INPUT -m comment --comment KUBE-SERVICES", None),
        ('-A INPUT -m comment --comment "open', None),
    ],
)
def test_where_a_rule_leads(rule, target):
    assert kubechains.target_of(rule) == target


LISTING = f"""
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:CNI - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-{HASH} - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -p tcp -j KUBE-SVC-{HASH}
-A CNI -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SERVICES -d 10.96.0.1/32 -j KUBE-SVC-{HASH}
-A KUBE-SVC-{HASH} -j KUBE-MARK-MASQ
COMMIT
*filter
:FORWARD DROP [0:0]
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
-A KUBE-FORWARD -j ACCEPT
COMMIT
*raw
:PREROUTING ACCEPT [0:0]
COMMIT
# Table `mangle' is incompatible, use 'nft' tool.
"""


def test_a_listing_and_what_goes_of_it():
    listing = kubechains.read(LISTING.splitlines(keepends=True))
    assert [rules.table for rules in listing.tables] == ["filter", "nat"]
    assert listing.unreadable == ("mangle",)
    forward, nat = listing.tables
    assert forward.policy_drop == ("FORWARD",)
    assert kubechains.removal(forward) == (
        "*filter\n:KUBE-FORWARD - [0:0]\n-D FORWARD -j KUBE-FORWARD\n-X KUBE-FORWARD\nCOMMIT\n"
    )
    # A plugin's mark stays whole; a chain that an operator's rule leads to stays, but leads nowhere any more.
    assert kubechains.removal(nat) == (
        "*nat\n"
        ":KUBE-SERVICES - [0:0]\n"
        f":KUBE-SVC-{HASH} - [0:0]\n"
        '-D PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES\n'
        "-X KUBE-SERVICES\n"
        "COMMIT\n"
    )
    told = list(kubechains.tell(nat, "iptables-nft"))
    assert told[1] == "iptables-nft nat: chains KUBE-SERVICES"
    assert told[2].endswith(f"which stays because of -A OUTPUT -p tcp -j KUBE-SVC-{HASH}")


def test_once_done_nothing_is_left_to_do():
    rest = f"""
*nat
:OUTPUT ACCEPT [0:0]
:CNI - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-{HASH} - [0:0]
-A OUTPUT -p tcp -j KUBE-SVC-{HASH}
-A CNI -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
COMMIT
"""
    [nat] = kubechains.read(rest.splitlines()).tables
    assert nat.empty
    assert kubechains.removal(nat) == ""
    assert not kubechains.is_at_work(nat)


@pytest.mark.parametrize(
    ("chains", "at_work"),
    [
        (("KUBE-POSTROUTING", "KUBE-MARK-MASQ"), False),
        (("KUBE-POSTROUTING", "KUBE-PROXY-CANARY"), True),
        ((f"KUBE-SVC-{HASH}",), True),
    ],
)
def test_what_shows_a_kube_proxy_at_work(chains, at_work):
    assert kubechains.is_at_work(kubechains.TableRules(table="nat", chains=chains)) == at_work
