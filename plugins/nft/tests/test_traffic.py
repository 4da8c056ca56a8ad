"""Clients do not notice: restarts, new tables, a proxy that is killed, a ruleset that somebody flushes."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxycore.testing.lab import NODE_NAME, Lab
from proxycore.testing.process import Manifests, ProxyProcess
from proxycore.testing.scenario import DEFAULT_NODE
from proxycore.testing.states import context, endpoint, frontend, full, host, name_of, pool, service
from proxycore_nft import layout
from proxycore_nft.kernel import NetlinkKernel

from .meaning import actual
from .node import Node

pytestmark = pytest.mark.root

CONNECT_SECONDS = 0.9
"""Less than it takes TCP to send its SYN again: one that got lost is a failure."""
PATIENCE_SECONDS = 10.0
VIP, STICKY_VIP = "172.30.0.41", "172.30.0.42"
VIP6 = "fd00:172:30::41"
POD, POD6 = "10.0.0.2", "fd00:10::2"

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


def ask(lab: Lab, vip: str, port: int = 80) -> str:
    """Connect as a pod of this node and ask who answers.  Raises OSError when there is no answer at once."""
    with lab.client("pod", "tcp", POD6 if ":" in vip else POD) as made:
        made.settimeout(CONNECT_SECONDS)
        made.connect((vip, port))
        made.sendall(b"who?\n")
        answer = made.recv(4096)
        # No TIME_WAIT: thousands of them would be left behind.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    return str(json.loads(answer)["at"])


class Clients:
    """Connects to addresses in turn until the end of the block, and keeps who answered and what went wrong."""

    def __init__(self, lab: Lab, vips: list[str]) -> None:
        self._lab, self._vips = lab, vips
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="clients", daemon=True)
        self.answers: dict[str, Counter[str]] = {vip: Counter() for vip in vips}
        self.failures: list[str] = []

    def __enter__(self) -> Clients:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.is_set():
            for vip in self._vips:
                try:
                    self.answers[vip][ask(self._lab, vip)] += 1
                except OSError as error:
                    self.failures.append(f"{vip}: {error}")

    def total(self) -> int:
        return sum(counts.total() for counts in self.answers.values())

    def wait_for_more(self, count: int = 10) -> None:
        """So many more connections have been made."""
        wanted, deadline = self.total() + count, time.monotonic() + PATIENCE_SECONDS
        while self.total() < wanted and time.monotonic() < deadline:
            time.sleep(0.001)


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
        with Clients(lab, [VIP, STICKY_VIP, VIP6]) as clients:
            clients.wait_for_more(20)
            tables = set()
            for turn in range(20):
                if turn == 10:
                    node.nft("add", "rule", "ip", next(iter(node.kernel.tables("ip"))), "client", "counter")
                node.start(host(masquerade_bit=3 + turn // 3))
                clients.wait_for_more(3)
                order = SERVICES if turn % 2 else SERVICES[::-1]
                assert node.apply(full(*order, facts=node.facts)).outcome == "applied"
                tables |= node.kernel.tables("ip")
                clients.wait_for_more(6)
        assert clients.failures == []
        assert untranslated(lab) == 0
        assert len(clients.answers[STICKY_VIP]) == 1, "a sticky client has moved"
        assert set(clients.answers[VIP]) == set(TARGETS)
        assert set(clients.answers[VIP6]) == set(TARGETS6)
        assert tables == set(layout.TABLES)
    finally:
        node.close()


def test_without_a_proxy_all_goes_on_and_after_cleaning_up_nothing_does(lab):
    node = Node(lab.node)
    try:
        node.run(*SERVICES)
        node.backend.proxycore_backend_stop()
        assert {ask(lab, VIP) for _ in range(60)} == set(TARGETS)
        assert len({ask(lab, STICKY_VIP) for _ in range(10)}) == 1
        node.call("cleanup", context())
        assert node.kernel.tables("ip") == set()
        # Routed to the outside, where any address answers as itself.
        assert ask(lab, VIP) == f"{VIP}:80"
    finally:
        node.close()


# -- the whole proxy --


class Cluster:
    """API objects in a folder, and `proxyctl run` beside it."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.manifests = Manifests(directory / "objects")
        self._config = directory / "config.yaml"
        self._log = directory / "log"
        self.configure(masquerade_bit=14)
        self.manifests.apply(DEFAULT_NODE)
        for number, vip in enumerate((VIP, STICKY_VIP)):
            self.manifests.apply(
                {
                    "apiVersion": "v1",
                    "kind": "Service",
                    "metadata": {"namespace": "default", "name": f"web{number}"},
                    "spec": {
                        "type": "ClusterIP",
                        "clusterIP": vip,
                        "clusterIPs": [vip],
                        "ports": [{"name": "http", "protocol": "TCP", "port": 80}],
                    },
                }
            )
        self.endpoints: dict[int, list[str]] = {}

    def configure(self, *, masquerade_bit: int) -> None:
        """For the next start."""
        values = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "hostnameOverride": NODE_NAME,
            "mode": "nftables",
            "detectLocalMode": "ClusterCIDR",
            "clusterCIDR": "10.0.0.0/8,fd00:10::/64",
            "nodePortAddresses": ["192.168.0.2/32", "2001:db8::1/128"],
            "conntrack": {"maxPerCore": 0, "min": 0},
            "nftables": {"masqueradeBit": masquerade_bit},
        }
        self._config.write_text(yaml.safe_dump(values))

    def set_endpoints(self, number: int, addresses: list[str]) -> None:
        self.endpoints[number] = addresses
        item: dict[str, Any] = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "namespace": "default",
                "name": f"web{number}-1",
                "labels": {"kubernetes.io/service-name": f"web{number}"},
            },
            "addressType": "IPv4",
            "endpoints": [
                {"addresses": [address], "conditions": {"ready": True}, "nodeName": NODE_NAME}
                for address in addresses
            ],
            "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        }
        self.manifests.apply(item)

    def proxy(self) -> ProxyProcess:
        return ProxyProcess(
            self.lab, backend="nft", folder=self.manifests.folder, config=self._config, log=self._log
        )

    def in_force(self, kernel: NetlinkKernel) -> dict[int, Counter[bytes]]:
        """Targets by number of the Service, as the kernel has them; raises for whatever is half done."""
        frontends = actual(kernel, "IPv4")["frontends"]
        found = {}
        for number, vip in enumerate((VIP, STICKY_VIP)):
            *_, cluster, local = frontends[layout.frontend_key(vip, "TCP", 80)]
            assert local is None
            found[number] = cluster[1]
        assert len(frontends) == 2
        return found

    def await_in_force(self, kernel: NetlinkKernel) -> None:
        wanted = {
            number: Counter(layout.target_bytes(address, 8080) for address in addresses)
            for number, addresses in self.endpoints.items()
        }
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            with contextlib.suppress(AssertionError, KeyError, ValueError):
                if self.in_force(kernel) == wanted:
                    return
            assert time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.02)


@pytest.fixture
def cluster(lab, tmp_path) -> Cluster:
    made = Cluster(lab, tmp_path)
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
        cluster.await_in_force(kernel)
    with Clients(lab, [VIP, STICKY_VIP]) as clients:
        clients.wait_for_more()
        for turn in range(8):
            # Every other one finds a table that it cannot adopt, so that it builds another beside it.
            cluster.configure(masquerade_bit=14 + turn // 2 % 2)
            with cluster.proxy() as proxy:
                if turn % 2:
                    cluster.await_in_force(kernel)
                    for _ in range(chance.randrange(3, 30)):
                        churn()
                        time.sleep(chance.random() * 0.01)
                else:
                    time.sleep(chance.random() * 0.8)
                assert proxy.ended() is None
                # Leaving the block kills it, whatever it is doing.
        with cluster.proxy():
            cluster.await_in_force(kernel)
            clients.wait_for_more()
    assert clients.failures == []
    assert untranslated(lab) == 0
    assert clients.total() > 50
    for nft in ("ip", "ip6"):
        assert len(kernel.tables(nft) & set(layout.TABLES)) == 1


def test_a_flushed_ruleset_is_back_by_itself(cluster, lab, kernel):
    with cluster.proxy() as proxy:
        cluster.await_in_force(kernel)
        assert ask(lab, VIP) in ("10.180.0.1:8080", "10.180.0.2:8080")
        lab.node.run(["nft", "flush", "ruleset"])
        deadline = time.monotonic() + 5.0
        while True:
            with contextlib.suppress(OSError):
                if ask(lab, VIP) in ("10.180.0.1:8080", "10.180.0.2:8080"):
                    break
            assert time.monotonic() < deadline, proxy.tail()
        cluster.await_in_force(kernel)
        assert proxy.stop() is None
