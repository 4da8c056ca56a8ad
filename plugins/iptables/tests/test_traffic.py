"""Clients do not notice: restarts, other layouts, a proxy that is killed, rules that somebody flushes, a lock that is held."""

from __future__ import annotations

import contextlib
import fcntl
import random
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from proxycore.kubechains import SHARED, is_kube_proxys
from proxycore.testing.clients import Call, Clients, ask, connected, pod_call, wait_until, who
from proxycore.testing.cluster import Cluster
from proxycore.testing.lab import LINKS, Lab
from proxycore.testing.states import (
    batch,
    context,
    endpoint,
    frontend,
    full,
    host,
    name_of,
    node_port,
    numbered,
    pool,
    service,
)
from proxycore_iptables.rules import MARKER

from .node import Node
from .simulate import Packet, World, parse, simulate

pytestmark = pytest.mark.root

VIP, STICKY_VIP, VIP6 = "172.30.0.41", "172.30.0.42", "fd00:172:30::41"
WEB, STICKY, WEB6 = map(pod_call, (VIP, STICKY_VIP, VIP6))
CALLS = (
    WEB,
    STICKY,
    WEB6,
    Call("node", "192.168.0.2", VIP),
    Call("external", "203.0.113.2", "192.168.0.2", 30041),
)
LOCAL = frozenset(address.partition("/")[0] for link in LINKS for address in link.node)

WATCH = """
table inet watch {
	counter untranslated { }
	chain forward {
		type filter hook forward priority -300;
		ip daddr 172.30.0.0/16 counter name untranslated
		ip6 daddr fd00:172:30::/108 counter name untranslated
	}
}
"""


@pytest.fixture
def lab(xtables_lock: Path) -> Iterator[Lab]:
    with Lab([80, 8080]) as made:
        made.node.run(["nft", "-f", "-"], stdin=WATCH)
        yield made


def untranslated(lab: Lab) -> int:
    text = lab.node.run(["nft", "list", "counters", "table", "inet", "watch"]).stdout
    [packets] = re.findall(r"packets (\d+)", text)
    return int(packets)


@pytest.fixture
def streams(lab: Lab) -> Iterator[Callable[[Sequence[Call]], None]]:
    """Opens one connection for each call the first time, and proves that they live each time."""
    opened: list[socket.socket] = []
    with contextlib.ExitStack() as stack:

        def prove(calls: Sequence[Call]) -> None:
            if not opened:
                opened.extend(stack.enter_context(connected(lab, call)) for call in calls)
            for made in opened:
                who(made)

        yield prove


# -- the backend, again and again --

TARGETS = [f"10.180.0.{n}:8080" for n in range(1, 6)]
TARGETS6 = [f"[fd00:10::{n}]:8080" for n in range(1, 4)]
SERVICES = [
    service(name_of("web"), frontend(VIP), node_port(30041), cluster=TARGETS),
    service(
        name_of("sticky"),
        frontend(STICKY_VIP),
        cluster=pool(*(endpoint(target, local=True) for target in TARGETS)),
        affinity=600,
    ),
    service(name_of("web", family="IPv6"), frontend(VIP6), cluster=TARGETS6),
]


@pytest.fixture
def node(lab: Lab, variant: str) -> Iterator[Node]:
    made = Node(lab.node, variant)
    yield made
    made.close()


def test_restarts_under_traffic(lab, node, streams):
    """A dozen processes one after the other, with another masquerade bit and other comments every third."""
    node.run(*SERVICES)
    before = node.chains()
    with Clients(lab, CALLS) as clients:
        clients.wait_for_more(10)
        streams(CALLS)
        for turn in range(12):
            node.start(host(masquerade_bit=3 + turn // 3), commentsUpTo=turn // 3 % 2 * 1000)
            clients.wait_for_more(1)
            order = SERVICES if turn % 2 else SERVICES[::-1]
            result = node.apply(full(*order, facts=node.facts))
            assert result.outcome == "applied"
            assert bool(result.operations) == (turn % 3 == 0), "what is there is not written again"
            clients.wait_for_more(3)
        streams(CALLS)
        node.run(*SERVICES, facts=host(), commentsUpTo=1000)
        streams(CALLS)
    assert clients.failures == []
    assert untranslated(lab) == 0
    assert len(clients.answers[STICKY]) == 1, "a sticky client has moved"
    assert set(clients.answers[WEB]) == set(TARGETS)
    assert set(clients.answers[WEB6]) == set(TARGETS6)
    assert node.chains() == before


def test_from_a_row_to_a_tree_and_back_under_traffic(lab, node, streams):
    """Batch by batch, so that there are trees of all shapes on the way."""
    node.run(*SERVICES, treeFrom=8)
    before = node.chains()
    more = [numbered(number + 250, 2) for number in range(30)]
    random.Random(3).shuffle(more)
    with Clients(lab, CALLS) as clients:
        clients.wait_for_more(3)
        streams(CALLS)
        for _ in range(2):
            for start in range(0, len(more), 3):
                assert node.apply(batch(*more[start : start + 3])).outcome == "applied"
                clients.wait_for_more(1)
            assert sum("KUBE-SVC-TREE" in chain for _, chain in node.chains()) > 2
            for start in range(0, len(more), 3):
                gone = [state.name for state in more[start : start + 3]]
                assert node.apply(batch(removed=gone)).outcome == "applied"
                clients.wait_for_more(1)
            assert node.chains() == before
        # All at once.
        assert node.apply(batch(*more)).outcome == "applied"
        clients.wait_for_more(2)
        assert node.apply(batch(removed=[state.name for state in more])).outcome == "applied"
        clients.wait_for_more(2)
        streams(CALLS)
    assert clients.failures == []
    assert untranslated(lab) == 0
    assert node.chains() == before


def test_pieces_one_after_the_other_under_traffic(lab, node):
    """A large load that is cut up: at no time is anybody without rules."""
    many = [numbered(number + 250, 3) for number in range(40)]
    node.run(*SERVICES, chainsPerRestore=10, treeFrom=8)
    with Clients(lab, CALLS) as clients:
        clients.wait_for_more(3)
        for bit in (5, 6):
            result = node.apply(full(*many, *SERVICES, facts=host(masquerade_bit=bit)))
            assert result.outcome == "applied"
            clients.wait_for_more(1)
            assert node.apply(full(*SERVICES, facts=host(masquerade_bit=bit + 10))).outcome == "applied"
            clients.wait_for_more(1)
    assert clients.failures == []
    assert untranslated(lab) == 0
    node.assert_means(*SERVICES)


def test_without_a_proxy_all_goes_on_and_after_cleaning_up_nothing_does(lab, node):
    nothing = {place for place, rules in node.chains().items() if rules or place[1].startswith("KUBE")}
    node.run(*SERVICES)
    node.backend.proxycore_backend_stop()
    assert {ask(lab, WEB) for _ in range(60)} == set(TARGETS)
    assert len({ask(lab, STICKY) for _ in range(10)}) == 1
    node.call("cleanup", context(options={"variant": node.variant}))
    assert {
        place for place, rules in node.chains().items() if rules or place[1].startswith("KUBE")
    } == nothing
    # Routed to the outside, where any address answers as itself.
    assert ask(lab, WEB) == f"{VIP}:80"


# -- the whole proxy --


def reached(lab: Lab, variant: str, vip: str) -> set[str]:
    """Endpoints that a pod may come to.  Raises ValueError for rules that are half done."""
    tool = f"{'ip6tables' if ':' in vip else 'iptables'}-{variant}-save"
    packet = Packet("10.0.0.2", vip, 80, interface="pods0")
    ends = simulate(parse(lab.node.run([tool]).stdout), packet, World(LOCAL))
    return {end.address for end in ends if end.translated}


def in_force(cluster: Cluster, variant: str) -> bool:
    with contextlib.suppress(ValueError):
        return all(
            reached(cluster.lab, variant, cluster.addresses[number]) == set(addresses)
            for number, addresses in cluster.endpoints.items()
        )
    return False


def left_over(lab: Lab, variant: str) -> set[str]:
    """Chains of endpoints and Services to which nothing leads."""
    unused = parse(lab.node.run([f"iptables-{variant}-save"]).stdout).unreachable("nat")
    return {
        chain
        for chain in unused
        if is_kube_proxys("nat", chain) and chain not in SHARED["nat"] and chain != MARKER.chain
    }


def await_in_force(cluster: Cluster, variant: str) -> None:
    wait_until(lambda: in_force(cluster, variant), cluster.said)


@pytest.fixture
def cluster(lab: Lab, tmp_path: Path, variant: str) -> Cluster:
    made = Cluster(lab, tmp_path, [VIP, STICKY_VIP], node_ports={0: 30041})
    made.configure("iptables", {"variant": variant})
    made.set_endpoints(0, ["10.180.0.1", "10.180.0.2"])
    made.set_endpoints(1, ["10.180.0.3"])
    return made


DIALLED = (WEB, STICKY, *CALLS[3:])


def test_killed_at_any_moment_and_started_again(cluster, lab, variant, streams):
    """Whatever was half done by the one is put right by the next; meanwhile no connection fails."""
    chance = random.Random(7)

    def churn() -> None:
        for number in (0, 1):
            count = chance.choice([1, 2, 5, 9, 10, 30])
            cluster.set_endpoints(number, [f"10.180.0.{n + 1}" for n in chance.sample(range(200), count)])

    with cluster.proxy():
        await_in_force(cluster, variant)
    with Clients(lab, DIALLED) as clients:
        clients.wait_for_more()
        streams(DIALLED)
        for turn in range(8):
            # Every other one finds rules that it must write anew.
            values = {"iptables": {"masqueradeBit": 14 + turn // 2 % 2}}
            options = {"variant": variant, "treeFrom": 1 + turn % 4, "chainsPerRestore": 3}
            cluster.configure("iptables", options, values)
            with cluster.proxy() as proxy:
                if turn % 2:
                    await_in_force(cluster, variant)
                    for _ in range(chance.randrange(3, 30)):
                        churn()
                        time.sleep(chance.random() * 0.01)
                else:
                    time.sleep(chance.random() * 0.8)
                assert proxy.ended() is None, proxy.tail()
                # Leaving the block kills it, whatever it is doing.
        with cluster.proxy():
            await_in_force(cluster, variant)
            clients.wait_for_more()
            streams(DIALLED)
            # Chains to which nothing leads any more go last.
            wait_until(lambda: not left_over(lab, variant), lambda: str(left_over(lab, variant)))
    assert clients.failures == []
    assert untranslated(lab) == 0


@pytest.mark.parametrize("table", ["nat", "filter", "both"])
def test_flushed_tables_are_back_by_themselves(cluster, lab, variant, table):
    with cluster.proxy() as proxy:
        await_in_force(cluster, variant)
        time.sleep(0.2)
        before = lab.node.run([f"iptables-{variant}-save"]).stdout
        for flushed in ("nat", "filter") if table == "both" else (table,):
            lab.node.run([f"iptables-{variant}", "-w", "5", "-t", flushed, "-F"])
            lab.node.run([f"iptables-{variant}", "-w", "5", "-t", flushed, "-X"])

        def rules(text: str) -> set[str]:
            return {line for line in text.splitlines() if line.startswith("-A ")}

        assert rules(lab.node.run([f"iptables-{variant}-save"]).stdout) != rules(before)
        wait_until(
            lambda: rules(lab.node.run([f"iptables-{variant}-save"]).stdout) == rules(before), proxy.tail
        )
        assert ask(lab, WEB) in ("10.180.0.1:8080", "10.180.0.2:8080")
        assert "the kernel was changed by somebody else" in cluster.said()
        assert proxy.stop() is None, proxy.tail()


@pytest.mark.parametrize("seconds", [2.0, 8.0])
def test_a_lock_that_is_held_for_some_seconds(cluster, lab, xtables_lock, variant, seconds):
    """Within the time that is waited, and beyond: what was asked for comes into force when it is free."""
    cluster.configure("iptables", {"variant": variant, "lockSeconds": 4})
    with cluster.proxy() as proxy:
        await_in_force(cluster, variant)
        with Clients(lab, DIALLED) as clients, (cluster.directory / "xtables.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            cluster.set_endpoints(0, ["10.180.0.7"])
            began = time.monotonic()
            wait_until(lambda: time.monotonic() - began > seconds or in_force(cluster, variant))
            # Only the legacy variant knows the lock.
            assert in_force(cluster, variant) == (variant == "nft")
            fcntl.flock(lock, fcntl.LOCK_UN)
            await_in_force(cluster, variant)
            clients.wait_for_more(2)
        assert clients.failures == []
        assert proxy.stop() is None, proxy.tail()
    assert ask(lab, WEB) == "10.180.0.7:8080"
