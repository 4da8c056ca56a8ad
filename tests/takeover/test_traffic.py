"""A node changes hands while clients dial: no connection fails, and what was open stays open."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxycore.kernel import kubeproxy
from proxycore.testing.clients import Call, Clients, connected, pod_call, wait_until, who
from proxycore.testing.lab import NODE_NAME, Lab
from proxycore.testing.process import Manifests, ProxyProcess
from proxycore.testing.scenario import DEFAULT_NODE

from .rules import PREFIX, VARIANTS, Served, kube_proxy, load, others, saved

pytestmark = pytest.mark.root

SERVICES = (
    Served("default/web:http", "172.30.0.41", ("10.180.0.1:8080", "10.180.0.2:8080"), 30041),
    Served("default/more:http", "172.30.0.43", ("10.180.0.3:8080",)),
    Served("default/web6:http", "fd00:172:30::41", ("[fd00:10::1]:8080",), 30042),
)
POD_CIDR = {"IPv4": "10.0.0.0/8", "IPv6": "fd00:10::/64"}
CALLS = (
    pod_call("172.30.0.41"),
    pod_call("172.30.0.43"),
    Call("node", "192.168.0.2", "172.30.0.41"),
    Call("external", "203.0.113.2", "192.168.0.2", 30041),
    pod_call("fd00:172:30::41"),
    Call("external", "2600:5200::1", "2001:db8::1", 30042),
)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab([80, 8080]) as made:
        yield made


class Node:
    """The API objects of SERVICES in a folder, and `proxyctl run` beside it."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.log = directory / "log"
        self._directory = directory
        self._manifests = Manifests(directory / "objects")
        self._manifests.apply(DEFAULT_NODE)
        for service in SERVICES:
            for item in objects(service):
                self._manifests.apply(item)

    def proxy(self, takeover: str) -> ProxyProcess:
        config = self._directory / "config.yaml"
        config.write_text(
            yaml.safe_dump_all(
                [
                    {
                        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                        "kind": "KubeProxyConfiguration",
                        "hostnameOverride": NODE_NAME,
                        "mode": "nftables",
                        "detectLocalMode": "ClusterCIDR",
                        "clusterCIDR": ",".join(POD_CIDR.values()),
                        "nodePortAddresses": ["192.168.0.2/32", "2001:db8::1/128"],
                        "conntrack": {"maxPerCore": 0, "min": 0},
                        "healthzBindAddress": "",
                        "metricsBindAddress": "",
                    },
                    {
                        "apiVersion": "proxycore.io/v1alpha1",
                        "kind": "ProxycoreConfiguration",
                        "takeover": takeover,
                    },
                ]
            )
        )
        return ProxyProcess(
            self.lab, backend="nft", folder=self._manifests.folder, config=config, log=self.log
        )

    def await_in_force(self) -> None:
        """Every frontend is in a table of the backend's."""

        def there() -> bool:
            rules = self.lab.node.run(["nft", "list", "tables"]).stdout.split()
            names = {name for name in rules if name.startswith("proxycore")}
            text = "".join(
                self.lab.node.run(["nft", "list", "table", family, name], check=False).stdout
                for name in names
                for family in ("ip", "ip6")
            )
            return all(service.address in text for service in SERVICES)

        wait_until(there, lambda: self.log.read_text()[-3000:])


def objects(service: Served) -> Iterator[dict[str, Any]]:
    namespace, _, name = service.name.partition(":")[0].partition("/")
    port: dict[str, Any] = {"name": "http", "protocol": "TCP", "port": 80}
    if service.node_port:
        port["nodePort"] = service.node_port
    yield {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {
            "type": "NodePort" if service.node_port else "ClusterIP",
            "clusterIP": service.address,
            "clusterIPs": [service.address],
            "ipFamilies": [service.family],
            "ports": [port],
        },
    }
    yield {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": namespace,
            "name": f"{name}-1",
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": service.family,
        "endpoints": [
            {
                "addresses": [endpoint.rpartition(":")[0].strip("[]")],
                "conditions": {"ready": True},
                "nodeName": NODE_NAME,
            }
            for endpoint in service.endpoints
        ],
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
    }


def load_all(lab: Lab, variant: str) -> None:
    for family in PREFIX:
        load(lab.node, variant, family, kube_proxy(SERVICES, family, pod_cidr=POD_CIDR[family]))


def listings(lab: Lab) -> dict[tuple[str, str], str]:
    return {(variant, family): saved(lab.node, variant, family) for variant in VARIANTS for family in PREFIX}


@pytest.fixture
def streams(lab) -> Iterator[Callable[..., None]]:
    """Opens one connection for each call the first time, and proves that they live each time."""
    opened: list[socket.socket] = []
    with contextlib.ExitStack() as stack:

        def prove(calls: Sequence[Call] = CALLS) -> None:
            if not opened:
                opened.extend(stack.enter_context(connected(lab, call)) for call in calls)
            for made in opened:
                who(made)

        yield prove


@pytest.mark.parametrize("variant", VARIANTS)
def test_taking_over_from_the_iptables_mode(lab, tmp_path, streams, variant):
    for family in PREFIX:
        for other in VARIANTS:
            load(lab.node, other, family, others(family))
    before = listings(lab)
    load_all(lab, variant)
    node = Node(lab, tmp_path)
    with Clients(lab, CALLS) as clients:
        clients.wait_for_more()
        streams()
        with node.proxy("auto") as proxy:
            node.await_in_force()
            clients.wait_for_more()
            wait_until(lambda: not lab.node.call(kubeproxy.census).found, proxy.tail)
            clients.wait_for_more()
            streams()
            assert proxy.stop() is None, proxy.tail()
        clients.wait_for_more()
    assert clients.failures == []
    assert listings(lab) == before
    assert not lab.node.call(kubeproxy.census).found
    assert set(clients.answers[CALLS[0]]) == set(SERVICES[0].endpoints)


def test_killed_while_taking_over_and_started_again(lab, tmp_path, streams):
    """At another place each time, with rules of both variants to remove."""
    node = Node(lab, tmp_path)
    for variant in VARIANTS:
        load_all(lab, variant)
    with Clients(lab, CALLS) as clients:
        clients.wait_for_more()
        streams()
        for removals in (0, 1, 4, 30):
            if removals:
                for variant in VARIANTS:
                    load_all(lab, variant)
            with node.proxy("auto") as proxy:
                wait_until(
                    lambda least=removals: node.log.read_text().count("msg=removed") >= least, proxy.tail
                )
                # Leaving the block kills it, whatever it is doing.
            clients.wait_for_more()
            with node.proxy("auto") as proxy:
                node.await_in_force()
                wait_until(lambda: not lab.node.call(kubeproxy.census).found, proxy.tail)
            clients.wait_for_more()
        streams()
    assert clients.failures == []


def test_leaving_lets_both_work(lab, tmp_path, streams):
    load_all(lab, "nft")
    before = listings(lab)
    node = Node(lab, tmp_path)
    with Clients(lab, CALLS) as clients:
        clients.wait_for_more()
        streams()
        with node.proxy("leave") as proxy:
            node.await_in_force()
            clients.wait_for_more()
            streams()
            assert proxy.stop() is None, proxy.tail()
    assert clients.failures == []
    assert listings(lab) == before


def refused(node: Node) -> str:
    """What a run says that ends by itself."""
    with node.proxy("refuse") as proxy:
        wait_until(lambda: proxy.ended() is not None, proxy.tail)
        assert "status 1" in str(proxy.ended()), proxy.tail()
        return proxy.tail()


@pytest.mark.parametrize("kind", ["iptables", "nftables"])
def test_refusing_touches_nothing(lab, tmp_path, kind):
    if kind == "iptables":
        load_all(lab, "legacy")
    else:
        lab.node.run(["nft", "add", "table", "ip", "kube-proxy"])
    before = listings(lab), lab.node.run(["nft", "list", "ruleset"]).stdout
    said = refused(Node(lab, tmp_path))
    assert said.count("takeover: refuse") == 1
    assert (listings(lab), lab.node.run(["nft", "list", "ruleset"]).stdout) == before


NFTABLES = """
table {family} kube-proxy {{
	comment "rules for kube-proxy"
	map service-ips {{
		type {address} . inet_proto . inet_service : verdict
		elements = {{ {vip} . tcp . 80 : goto service-ABCDEFGH-default/web/tcp/http }}
	}}
	map no-endpoint-services {{
		type {address} . inet_proto . inet_service : verdict
		elements = {{ {dead} . tcp . 80 : goto reject-chain }}
	}}
	map firewall-ips {{
		type {address} . inet_proto . inet_service : verdict
		elements = {{ {walled} . tcp . 80 : goto firewall-ABCDEFGH-default/web/tcp/http }}
	}}
	chain filter-prerouting-pre-dnat {{
		type filter hook prerouting priority -110; policy accept;
		ct state new jump firewall-check
	}}
	chain filter-output-pre-dnat {{
		type filter hook output priority -110; policy accept;
		ct state new jump firewall-check
	}}
	chain filter-forward {{
		type filter hook forward priority 0; policy accept;
		ct state new jump service-endpoints-check
	}}
	chain filter-output {{
		type filter hook output priority 0; policy accept;
		ct state new jump service-endpoints-check
	}}
	chain nat-prerouting {{
		type nat hook prerouting priority -100; policy accept;
		jump services
	}}
	chain nat-output {{
		type nat hook output priority -100; policy accept;
		jump services
	}}
	chain nat-postrouting {{
		type nat hook postrouting priority 100; policy accept;
		jump masquerading
	}}
	chain firewall-check {{
		{ip} daddr . meta l4proto . th dport vmap @firewall-ips
	}}
	chain service-endpoints-check {{
		{ip} daddr . meta l4proto . th dport vmap @no-endpoint-services
	}}
	chain services {{
		{ip} daddr . meta l4proto . th dport vmap @service-ips
		fib daddr type local meta l4proto tcp th dport {node_port} goto external-ABCDEFGH-default/web/tcp/http
	}}
	chain masquerading {{
		meta mark & 0x4000 != 0 meta mark set meta mark ^ 0x4000 masquerade fully-random
	}}
	chain reject-chain {{
		reject
	}}
	chain firewall-ABCDEFGH-default/web/tcp/http {{
		{ip} saddr != {source} drop
	}}
	chain external-ABCDEFGH-default/web/tcp/http {{
		meta mark set meta mark | 0x4000
		goto service-ABCDEFGH-default/web/tcp/http
	}}
	chain service-ABCDEFGH-default/web/tcp/http {{
		{ip} saddr != {pods} meta mark set meta mark | 0x4000
		meta l4proto tcp dnat to {endpoint}
	}}
}}
"""


def load_nftables(lab: Lab) -> None:
    """As kube-proxy's nftables mode has it, a little behind: `more` has no endpoints there, the first one a firewall."""
    for family, web in (("ip", SERVICES[0]), ("ip6", SERVICES[2])):
        text = NFTABLES.format(
            family=family,
            ip=family,
            address="ipv4_addr" if family == "ip" else "ipv6_addr",
            vip=web.address,
            dead=SERVICES[1].address if family == "ip" else "fd00:172:30::77",
            walled="5.6.7.8" if family == "ip" else "2001:db8:5::8",
            node_port=web.node_port,
            source="10.0.0.0/8" if family == "ip" else "fd00:10::/64",
            pods=POD_CIDR[web.family],
            endpoint=web.endpoints[0],
        )
        # Names with a slash are kube-proxy's own way; nft reads them in quotes of no kind.
        lab.node.run(["nft", "-f", "-"], stdin=text)


def test_taking_over_from_the_nftables_mode(lab, tmp_path, streams):
    load_nftables(lab)
    lab.node.run(["nft", "add", "table", "ip", "kube-proxy-of-mine"])
    stale = CALLS[1]
    with pytest.raises(ConnectionRefusedError):
        connected(lab, stale)
    node = Node(lab, tmp_path)
    calls = tuple(call for call in CALLS if call != stale)
    with Clients(lab, calls) as clients:
        clients.wait_for_more()
        streams(calls)
        with node.proxy("auto") as proxy:
            node.await_in_force()
            wait_until(lambda: not lab.node.call(kubeproxy.census).found, proxy.tail)
            clients.wait_for_more()
            streams(calls)
            wait_until(lambda: proxy.tail().count('what="nftables: table ip') == 2, proxy.tail)
            with connected(lab, stale) as made:
                assert who(made) == SERVICES[1].endpoints[0]
            assert proxy.stop() is None, proxy.tail()
    assert clients.failures == []
    assert "table ip kube-proxy-of-mine" in lab.node.run(["nft", "list", "tables"]).stdout
