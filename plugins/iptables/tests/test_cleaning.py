"""Cleaning up on the real iptables: all of ours, nothing of others', also when it is killed on the way."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from proxycore.errors import KernelError
from proxycore.kernel import xtables, xtlock
from proxycore.testing.states import HOST, context, frontend, name_of, node_port, numbered, service
from proxycore_iptables import cleaning, counting

from .node import FAMILIES, Node

pytestmark = pytest.mark.root

GUARD = (
    '-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" '
    "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
)
JUMPS = {"-A INPUT -j KUBE-FIREWALL", "-A OUTPUT -j KUBE-FIREWALL"}
STATES = (
    service(
        name_of(), frontend("172.30.0.41"), node_port(30041), cluster=("10.180.0.1:8080", "10.180.0.2:8080")
    ),
    numbered(7, 2),
    numbered(8, 2, family="IPv6"),
)
LOCALNET = "*nat\n:KUBE-SVC-LOCALNET - [0:0]\nCOMMIT\n"
MARK = ":KUBE-SVC-PROXYCORE "
OTHER = {"legacy": "nft", "nft": "legacy"}


def clean(node: Node) -> tuple[str, ...]:
    return tuple(node.call("cleanup", context(HOST, options={"variant": node.variant})).removed)


def route_localnet(node: Node, value: str | None = None) -> str:
    def work() -> str:
        if value is not None:
            cleaning.ROUTE_LOCALNET.write_text(value)
        return cleaning.ROUTE_LOCALNET.read_text().strip()

    return node.namespace.call(work)


def counters(node: Node) -> set[str]:
    def work() -> set[str]:
        with counting.Counting() as kernel:
            return set(kernel.packets())

    return node.namespace.call(work)


def firewall(node: Node) -> set[str]:
    """All that is in the guard's chain, and leads there."""
    return {line for line in node.ruleset().splitlines() if line.startswith("-A") and "KUBE-FIREWALL" in line}


@pytest.fixture
def served(node: Node) -> Node:
    """Rules with the guard, and the setting as a run makes it."""
    again(node)
    assert firewall(node) == {GUARD, *JUMPS}
    return node


def test_nothing_is_left(served):
    removed = clean(served)
    for family in FAMILIES:
        assert not [line for line in served.ruleset(family).splitlines() if "KUBE" in line]
    assert route_localnet(served) == "0"
    assert counters(served) == set()
    assert "net.ipv4.conf.all.route_localnet = 1" in removed
    assert f"iptables-{served.variant} filter: chain KUBE-FIREWALL" in removed
    assert f"iptables-{served.variant} nat: chains KUBE-SVC-LOCALNET, KUBE-SVC-PROXYCORE" in removed
    assert clean(served) == ()


def test_a_setting_that_others_made_stays_and_its_guard_too(served):
    """The run found it set: what guards against its consequences may have been the reason."""
    served.iptables("-t", "nat", "-X", "KUBE-SVC-LOCALNET")
    [line] = [line for line in clean(served) if "KUBE-FIREWALL" in line]
    assert "was not set by a run of ours" in line
    assert route_localnet(served) == "1"
    assert firewall(served) == {GUARD, *JUMPS}
    assert clean(served) == ()


def test_rules_of_others_lead_to_the_guards_chain(served):
    served.iptables("-A", "FORWARD", "-j", "KUBE-FIREWALL")
    served.iptables("-A", "INPUT", "-p", "tcp", "-j", "KUBE-FIREWALL")
    removed = clean(served)
    assert firewall(served) == {"-A FORWARD -j KUBE-FIREWALL", "-A INPUT -p tcp -j KUBE-FIREWALL"}
    assert ":KUBE-FIREWALL " in served.ruleset()
    assert any("KUBE-FIREWALL, which stays because of -A " in line for line in removed)
    assert route_localnet(served) == "0"


def test_rules_of_others_in_the_guards_chain_keep_what_leads_there(served):
    drop = "-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP"
    served.iptables(*drop.split())
    clean(served)
    assert firewall(served) == {drop, *JUMPS}


@pytest.mark.parametrize("chain", ["KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT"])
def test_a_kubelets_guard_stays(served, chain):
    """And the setting, on which it may count."""
    served.iptables("-t", "mangle", "-N", chain)
    told = clean(served)
    assert firewall(served) == {GUARD, *JUMPS}
    assert route_localnet(served) == "1"
    tools = f"iptables-{served.variant}"
    seen = f"there is a kubelet (chain {chain} in {tools} mangle)"
    assert f"net.ipv4.conf.all.route_localnet stays 1: {seen}" in told
    [line] = [line for line in told if "KUBE-FIREWALL" in line]
    assert line.startswith(f"{tools} filter: chain KUBE-FIREWALL and -A ")
    assert all(jump in line for jump in JUMPS)
    assert line.endswith(seen)
    assert MARK not in served.ruleset()
    assert clean(served) == ()


def test_a_kubelet_of_the_other_variant_keeps_the_setting_and_so_the_guard(served):
    other = Node(served.namespace, OTHER[served.variant])
    other.iptables("-t", "mangle", "-N", "KUBE-KUBELET-CANARY")
    told = clean(served)
    assert firewall(served) == {GUARD, *JUMPS}
    assert route_localnet(served) == "1"
    assert any("stays for the kubelet's sake" in line for line in told)


def test_a_held_lock_is_waited_for_before_anything_is_touched(served, monkeypatch):
    monkeypatch.setattr(xtables, "LOCK_SECONDS", 0.2)
    other = Node(served.namespace, OTHER[served.variant])
    before = [without_times(each.ruleset(family)) for each in (served, other) for family in FAMILIES]
    numbers = counters(served)
    with xtlock.held(0):
        if served.variant == "nft":
            assert clean(served)
            return
        with pytest.raises(
            KernelError, match=r"^nothing was changed: the xtables lock .* was held by process \d+ "
        ):
            clean(served)
    assert [without_times(each.ruleset(family)) for each in (served, other) for family in FAMILIES] == before
    assert route_localnet(served) == "1"
    assert counters(served) == numbers
    assert clean(served)
    assert "KUBE" not in served.ruleset()


def without_times(text: str) -> list[str]:
    return [line.partition(" [")[0] for line in text.splitlines() if not line.startswith("#")]


def test_a_chain_that_stays_for_a_rule_of_others_is_named_with_it(served):
    served.iptables("-t", "nat", "-N", "CNI-SETMARK")
    rule = "-A CNI-SETMARK -s 10.1.0.0/16 -j KUBE-MARK-MASQ"
    served.iptables("-t", "nat", *rule.split())
    served.iptables("-t", "nat", "-A", "CNI-SETMARK", "-j", "KUBE-SERVICES")
    told = clean(served)
    tools = f"iptables-{served.variant} nat:"
    assert f"{tools} chain KUBE-MARK-MASQ stays because of {rule}" in told
    [line] = [line for line in told if "KUBE-SERVICES, which stays" in line]
    assert line.startswith(f"{tools} rules of chain ")
    assert sum("stays because of" in line for line in told) == 2
    assert {name for table, name in served.chains() if name.startswith("KUBE-")} == {
        "KUBE-MARK-MASQ",
        "KUBE-SERVICES",
    }


def test_without_the_mark_nothing_is_touched(served):
    served.iptables("-t", "nat", "-X", "KUBE-SVC-PROXYCORE")
    served.iptables("-t", "nat", "-X", "KUBE-SVC-PROXYCORE", family="IPv6")
    before = [without_times(served.ruleset(family)) for family in FAMILIES]
    assert clean(served) == ()
    assert [without_times(served.ruleset(family)) for family in FAMILIES] == before
    assert route_localnet(served) == "1"
    assert counters(served)


class Killed(BaseException):
    """Instead of the next step."""


def test_killed_at_any_place_and_done_again(served, monkeypatch):
    """Between any two things that are changed: until the last one, the next clean-up finds the rest."""
    monkeypatch.setattr(cleaning, "chunk_of", lambda tools: 2)
    # Steps can be counted where they are all in this process.
    monkeypatch.setattr(cleaning, "reader", no_reader)
    left = [1000]

    def step(function):
        def or_killed(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*arguments)

        return or_killed

    monkeypatch.setattr(xtables, "restore", step(xtables.restore))
    monkeypatch.setattr(counting.Counting, "delete", step(counting.Counting.delete))
    knob = SimpleNamespace(
        read_text=cleaning.ROUTE_LOCALNET.read_text, write_text=step(cleaning.ROUTE_LOCALNET.write_text)
    )
    for steps in range(1000):
        left[0] = steps
        try:
            with monkeypatch.context() as patched:
                patched.setattr(cleaning, "ROUTE_LOCALNET", knob)
                clean(served)
        except Killed:
            pass
        else:
            break
        finally:
            left[0] = 1000
        assert any(MARK in served.ruleset(family) for family in FAMILIES)
        assert clean(served)
        for family in FAMILIES:
            assert "KUBE" not in served.ruleset(family), steps
        assert route_localnet(served) == "0"
        assert counters(served) == set()
        again(served)
    assert steps > (11 if served.variant == "legacy" else 17)


def no_reader(*arguments):
    raise KernelError("there is no python-iptables")


def again(node: Node) -> None:
    """As the fixture has it."""
    node.run(*STATES, localhostNodePorts=True)
    node.iptables("restore", "--noflush", stdin=LOCALNET)
    route_localnet(node, "1")


def test_what_a_killed_clean_up_left_of_guard_setting_and_counters_goes_though_the_rest_is_gone(served):
    """Only the marks are there."""
    served.call("stop")
    for family in FAMILIES:
        served.iptables("restore", family=family, stdin="*nat\n:KUBE-SVC-PROXYCORE - [0:0]\nCOMMIT\n")
    served.iptables("restore", "--noflush", stdin=LOCALNET)
    assert clean(served)
    assert firewall(served) == set()
    assert route_localnet(served) == "0"
    assert counters(served) == set()
    assert "KUBE" not in served.ruleset() + served.ruleset("IPv6")


@pytest.mark.parametrize("variant", ["nft"])
@pytest.mark.parametrize("table", ["nat", "filter"])
def test_a_table_that_iptables_cannot_read_is_named_and_nothing_touched(served, table):
    served.namespace.run(["nft", "add", "rule", "ip", table, "OUTPUT", "fib daddr type local counter accept"])
    if "incompatible" not in served.ruleset():
        pytest.skip("this iptables reads what it does not know")
    before = served.namespace.run(["nft", "list", "ruleset"]).stdout
    with pytest.raises(
        KernelError, match=rf"iptables-nft cannot read table {table}.*nft -a list table ip {table}"
    ):
        clean(served)
    assert served.namespace.run(["nft", "list", "ruleset"]).stdout == before
    assert route_localnet(served) == "1"
    served.namespace.run(["nft", "flush", "chain", "ip", table, "OUTPUT"])
    assert clean(served)
    assert "KUBE" not in served.ruleset()


@pytest.mark.parametrize("variant", ["nft"])
def test_a_table_of_others_that_iptables_cannot_read_is_no_obstacle(served):
    served.namespace.run(["nft", "add", "table", "ip", "mangle"])
    served.namespace.run(["nft", "add", "chain", "ip", "mangle", "MINE"])
    served.namespace.run(
        ["nft", "add", "rule", "ip", "mangle", "MINE", "fib daddr type local counter accept"]
    )
    assert clean(served)
    assert "KUBE" not in served.ruleset()
