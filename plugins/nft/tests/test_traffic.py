"""Clients do not notice: restarts, new tables, a proxy that is killed, a ruleset that somebody flushes."""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from proxycore.testing.clients import Clients, ask, pod_call, wait_until
from proxycore.testing.cluster import Cluster
from proxycore.testing.lab import Lab
from proxycore.testing.states import context, endpoint, frontend, full, host, name_of, pool, service
from proxycore_nft import layout
from proxycore_nft.kernel import NetlinkKernel

from .meaning import actual
from .node import Node

pytestmark = pytest.mark.root

VIP, STICKY_VIP = "172.30.0.41", "172.30.0.42"
VIP6 = "fd00:172:30::41"
CALL, STICKY_CALL, CALL6 = map(pod_call, (VIP, STICKY_VIP, VIP6))

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
def lab() -> Iterator[Lab]:
    with Lab([80, 8080]) as made:
        made.node.run(["nft", "-f", "-"], stdin=WATCH)
        yield made


def untranslated(lab: Lab) -> int:
    text = lab.node.run(["nft", "list", "counters", "table", "inet", "watch"]).stdout
    [packets] = re.findall(r"packets (\d+)", text)
    return int(packets)


# -- the backend, again and again --

TARGETS = [f"10.180.0.{n}:8080" for n in range(1, 6)]
TARGETS6 = [f"[fd00:10::{n}]:8080" for n in range(1, 4)]
SERVICES = [
    service(name_of("web"), frontend(VIP), cluster=TARGETS),
    service(
        name_of("sticky"),
        frontend(STICKY_VIP),
        cluster=pool(*(endpoint(target, local=True) for target in TARGETS)),
        affinity=600,
    ),
    service(name_of("web", family="IPv6"), frontend(VIP6), cluster=TARGETS6),
]


def test_restarts_and_new_tables_under_traffic(lab):
    """Twenty processes one after the other, every third with another masquerade bit, and one after somebody's hand."""
    node = Node(lab.node)
    try:
        node.run(*SERVICES)
        with Clients(lab, [CALL, STICKY_CALL, CALL6]) as clients:
            clients.wait_for_more(7)
            tables = set()
            for turn in range(20):
                if turn == 10:
                    node.nft("add", "rule", "ip", next(iter(node.kernel.tables("ip"))), "client", "counter")
                node.start(host(masquerade_bit=3 + turn // 3))
                clients.wait_for_more(1)
                order = SERVICES if turn % 2 else SERVICES[::-1]
                assert node.apply(full(*order, facts=node.facts)).outcome == "applied"
                tables |= node.kernel.tables("ip")
                clients.wait_for_more(2)
        assert clients.failures == []
        assert untranslated(lab) == 0
        assert len(clients.answers[STICKY_CALL]) == 1, "a sticky client has moved"
        assert set(clients.answers[CALL]) == set(TARGETS)
        assert set(clients.answers[CALL6]) == set(TARGETS6)
        assert tables == set(layout.TABLES)
    finally:
        node.close()


def test_without_a_proxy_all_goes_on_and_after_cleaning_up_nothing_does(lab):
    node = Node(lab.node)
    try:
        node.run(*SERVICES)
        node.backend.proxycore_backend_stop()
        assert {ask(lab, CALL) for _ in range(60)} == set(TARGETS)
        assert len({ask(lab, STICKY_CALL) for _ in range(10)}) == 1
        node.call("cleanup", context())
        assert node.kernel.tables("ip") == set()
        # Routed to the outside, where any address answers as itself.
        assert ask(lab, CALL) == f"{VIP}:80"
    finally:
        node.close()


# -- the whole proxy --


def in_force(kernel: NetlinkKernel) -> dict[int, Counter[bytes]]:
    """Targets by number of the Service, as the kernel has them; raises for whatever is half done."""
    frontends = actual(kernel, "IPv4")["frontends"]
    found = {}
    for number, vip in enumerate((VIP, STICKY_VIP)):
        *_, cluster, local = frontends[layout.frontend_key(vip, "TCP", 80)]
        assert local is None
        found[number] = cluster[1]
    assert len(frontends) == 2
    return found


def await_in_force(cluster: Cluster, kernel: NetlinkKernel) -> None:
    wanted = {
        number: Counter(layout.target_bytes(address, 8080) for address in addresses)
        for number, addresses in cluster.endpoints.items()
    }

    def there() -> bool:
        with contextlib.suppress(AssertionError, KeyError, ValueError):
            return in_force(kernel) == wanted
        return False

    wait_until(there, cluster.said)


@pytest.fixture
def cluster(lab, tmp_path) -> Cluster:
    made = Cluster(lab, tmp_path, [VIP, STICKY_VIP])
    made.set_endpoints(0, ["10.180.0.1", "10.180.0.2"])
    made.set_endpoints(1, ["10.180.0.3"])
    return made


@pytest.fixture
def kernel(lab) -> Iterator[NetlinkKernel]:
    made = lab.node.call(NetlinkKernel)
    yield made
    made.close()


def test_killed_at_any_moment_and_started_again(cluster, lab, kernel):
    """Whatever was half done by the one is put right by the next; meanwhile no connection fails."""
    chance = random.Random(7)

    def churn() -> None:
        for number in (0, 1):
            count = chance.choice([1, 2, 5, 9, 10, 30])
            cluster.set_endpoints(number, [f"10.180.0.{n + 1}" for n in chance.sample(range(200), count)])

    with cluster.proxy():
        await_in_force(cluster, kernel)
    with Clients(lab, [CALL, STICKY_CALL]) as clients:
        clients.wait_for_more(5)
        for turn in range(8):
            # Every other one finds a table that it cannot adopt, so that it builds another beside it.
            cluster.configure("nft", values={"nftables": {"masqueradeBit": 14 + turn // 2 % 2}})
            with cluster.proxy() as proxy:
                if turn % 2:
                    await_in_force(cluster, kernel)
                    for _ in range(chance.randrange(3, 30)):
                        churn()
                        time.sleep(chance.random() * 0.01)
                else:
                    time.sleep(chance.random() * 0.8)
                assert proxy.ended() is None
                # Leaving the block kills it, whatever it is doing.
        with cluster.proxy():
            await_in_force(cluster, kernel)
            clients.wait_for_more(5)
    assert clients.failures == []
    assert untranslated(lab) == 0
    assert clients.total() > 50
    for nft in ("ip", "ip6"):
        assert len(kernel.tables(nft) & set(layout.TABLES)) == 1


def test_a_flushed_ruleset_is_back_by_itself(cluster, lab, kernel):
    with cluster.proxy() as proxy:
        await_in_force(cluster, kernel)
        assert ask(lab, CALL) in ("10.180.0.1:8080", "10.180.0.2:8080")
        lab.node.run(["nft", "flush", "ruleset"])
        deadline = time.monotonic() + 5.0
        while True:
            with contextlib.suppress(OSError):
                if ask(lab, CALL) in ("10.180.0.1:8080", "10.180.0.2:8080"):
                    break
            assert time.monotonic() < deadline, proxy.tail()
        await_in_force(cluster, kernel)
        assert proxy.stop() is None
