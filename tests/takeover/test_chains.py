"""What of a listing is kube-proxy's, without any kernel."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


# -- in pieces --


def named(kind: str, number: int) -> str:
    return (
        f"KUBE-{kind}-{number:016d}".replace("0", "A").replace("1", "Z").replace("8", "X").replace("9", "Y")
    )


@st.composite
def rulesets(draw) -> dict[str, list[str]]:
    """Chains of nat with where their rules lead to, in any order, as proxycore, or kube-proxy of any age, makes them."""
    counts = st.integers(0, 7)
    kinds = {
        kind: [named(kind, n) for n in range(draw(counts))]
        for kind in ("FW", "EXT", "XLB", "SVC", "SVL", "SEP")
    }
    trees = [f"KUBE-SVC-TREE.{n:08x}.8" for n in range(draw(counts))]

    def some(*of: str) -> list[str]:
        names = [name for kind in of for name in kinds[kind]]
        return draw(st.lists(st.sampled_from(names), max_size=3)) if names else []

    found = {
        tree: draw(st.lists(st.sampled_from(trees[n + 1 :] or ["KUBE-MARK-MASQ"]), max_size=2))
        for n, tree in enumerate(trees)
    }
    for tree in trees:
        found[tree] = [*found[tree], *some("FW", "EXT", "SVC", "SVL")]
    for name in kinds["FW"]:
        found[name] = some("EXT", "XLB", "SVC")
    for name in (*kinds["EXT"], *kinds["XLB"]):
        found[name] = ["KUBE-MARK-MASQ", *some("SVC", "SVL", "SEP")]
    for name in (*kinds["SVC"], *kinds["SVL"]):
        found[name] = ["KUBE-MARK-MASQ", *some("SEP")]
    for name in kinds["SEP"]:
        found[name] = ["KUBE-MARK-MASQ"]
    found["KUBE-SERVICES"] = ["KUBE-NODEPORTS", *trees[:1], *some("SVC", "FW")]
    found["KUBE-NODEPORTS"] = some("EXT")
    found["KUBE-MARK-MASQ"] = []
    for name in kubechains.MARKERS:
        found[name] = []
    return dict(draw(st.permutations(list(found.items()))))


@given(
    chains=rulesets(),
    size=st.integers(1, 50),
    used=st.sampled_from([None, "KUBE-MARK-MASQ", "KUBE-NODEPORTS", "KUBE-SVC-PROXYCORE"]),
)
def test_in_pieces_no_chain_goes_that_something_leads_to_and_the_markers_are_last(chains, size, used):
    foreign = f"-A MINE -j {used}"
    rules = kubechains.TableRules(
        table="nat",
        chains=tuple(chains),
        jumps=("-A OUTPUT -j KUBE-SERVICES", "-A PREROUTING -j KUBE-SERVICES"),
        used={used: foreign} if used else {},
        filled=frozenset(name for name, leads in chains.items() if leads),
    )
    there = {name: list(leads) for name, leads in chains.items()}
    there |= {"OUTPUT": ["KUBE-SERVICES"], "PREROUTING": ["KUBE-SERVICES"], "MINE": [used] if used else []}
    texts = list(kubechains.removals(rules, size))
    for number, text in enumerate(texts):
        for line in text.splitlines():
            if line.startswith(":"):
                there[line[1:].partition(" ")[0]] = []
            elif line.startswith("-D"):
                there[line.split()[1]].remove(line.split()[-1])
            elif line.startswith("-X"):
                name = line.split()[1]
                assert there.pop(name) == []
                assert name not in itertools.chain.from_iterable(there.values())
        if number == 0:
            # No packet comes to kube-proxy's part from the first input on.
            assert there["OUTPUT"] == there["PREROUTING"] == []
            assert not there.get("KUBE-SERVICES")
    assert set(there) - {"OUTPUT", "PREROUTING", "MINE"} == ({used} if used else set())
    if len(chains) > 2 * size:
        touched = [sum(line.startswith((":", "-X")) for line in text.splitlines()) for text in texts]
        assert len(texts) > 2
        assert max(touched) <= max(2 * size, 2 * 5)


def test_few_chains_go_at_once_and_legacy_always():
    [nat] = kubechains.read(LISTING.splitlines()[:15]).tables
    assert list(kubechains.removals(nat, 1000)) == list(kubechains.removals(nat)) == [kubechains.removal(nat)]
    many = kubechains.TableRules(table="nat", chains=tuple(named("SVC", n) for n in range(2500)))
    assert len(list(kubechains.removals(many))) == 1
    assert list(kubechains.removals(kubechains.TableRules(table="nat"), 1)) == []


def test_the_markers_can_stay_till_the_end():
    rules = kubechains.TableRules(
        table="nat",
        chains=("KUBE-SVC-LOCALNET", "KUBE-SERVICES", "KUBE-SVC-PROXYCORE"),
        jumps=("-A OUTPUT -j KUBE-SERVICES",),
    )
    rest, markers = kubechains.without_markers(rules), kubechains.markers(rules)
    assert (rest.chains, rest.jumps) == (("KUBE-SERVICES",), rules.jumps)
    assert (markers.chains, markers.jumps) == (("KUBE-SVC-LOCALNET", "KUBE-SVC-PROXYCORE"), ())
    assert kubechains.without_markers(markers).empty
    assert [*kubechains.tell(markers, "iptables-nft")] == [
        "iptables-nft nat: chains KUBE-SVC-LOCALNET, KUBE-SVC-PROXYCORE"
    ]
