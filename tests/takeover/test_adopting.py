"""The backend iptables goes on with kube-proxy's chains, and kube-proxy with ours: clients do not notice."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from proxycore.plugins import load_backend
from proxycore.testing.clients import Call, Clients, ask, connected, pod_call, wait_until, who
from proxycore.testing.cluster import Cluster
from proxycore.testing.conformance import problems
from proxycore.testing.lab import Lab
from proxycore.testing.states import HOST, context

from .rules import OTHER_VARIANT, PREFIX, VARIANTS, Served, kube_proxy, load, others, saved

pytestmark = pytest.mark.root

SERVICES = (
    Served("default/web0:http", "172.30.0.41", ("10.180.0.1:8080", "10.180.0.2:8080"), 30041),
    Served("default/web1:http", "fd00:172:30::41", ("[fd00:10::1]:8080",)),
    # Enough for a chain of the tree.
    *(Served(f"default/web{n}:http", f"172.30.0.{40 + n}", ("10.180.0.3:8080",)) for n in range(2, 7)),
)
GONE = Served("default/gone:http", "172.30.0.99", ("10.180.0.9:8080",), 30099)
POD_CIDR = {"IPv4": "10.0.0.0/8", "IPv6": "fd00:10::/64"}
CALLS = (
    pod_call("172.30.0.41"),
    pod_call("fd00:172:30::41"),
    Call("node", "192.168.0.2", "172.30.0.41"),
    Call("external", "203.0.113.2", "192.168.0.2", 30041),
)
KUBE_PROXY_REMOVES = re.compile(r"^:(KUBE-(?:SVC|SVL|FW|EXT|SEP)-\S+)", re.MULTILINE)
"""Chains of nat that kube-proxy takes for those of a Service."""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    with Lab([80, 8080]) as made:
        yield made


@pytest.fixture
def cluster(lab: Lab, tmp_path: Path) -> Cluster:
    made = Cluster(lab, tmp_path, [service.address for service in SERVICES], node_ports={0: 30041})
    for number, service in enumerate(SERVICES):
        made.set_endpoints(
            number, [endpoint.rpartition(":")[0].strip("[]") for endpoint in service.endpoints]
        )
    return made


@pytest.fixture
def streams(lab: Lab) -> Iterator[Callable[[], None]]:
    """Opens one connection for each call the first time, and proves that they live each time."""
    opened: list[socket.socket] = []
    with contextlib.ExitStack() as stack:

        def prove() -> None:
            if not opened:
                opened.extend(stack.enter_context(connected(lab, call)) for call in CALLS)
            for made in opened:
                who(made)

        yield prove


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    options = {"variant": request.param}
    if reason := problems("iptables", options):
        pytest.skip(reason)
    return request.param


def sync_of_kube_proxy(lab: Lab, variant: str, services: Sequence[Served], *, first: bool) -> None:
    """Write everything; but for the first one on a node, jumps are there, and chains of Services that are not known go."""
    for family in PREFIX:
        text = kube_proxy(services, family, pod_cidr=POD_CIDR[family])
        if not first:
            text = "\n".join(line for line in text.splitlines() if not line.startswith("-I ")) + "\n"
            there = KUBE_PROXY_REMOVES.findall(saved(lab.node, variant, family))
            gone = [chain for chain in there if f":{chain} " not in text]
            nat = text.index("*nat\n") + len("*nat\n")
            declared = "".join(f":{chain} - [0:0]\n" for chain in gone)
            removed = "".join(f"-X {chain}\n" for chain in gone)
            text = f"{text[:nat]}{declared}{text[nat:].removesuffix('COMMIT' + chr(10))}{removed}COMMIT\n"
        load(lab.node, variant, family, text)


def everything(lab: Lab, variant: str) -> str:
    return "\n".join(saved(lab.node, variant, family) for family in PREFIX)


def test_from_kube_proxy_and_back(lab, cluster, streams, variant):
    for family in PREFIX:
        load(lab.node, variant, family, others(family))
    kubelets = {line for line in everything(lab, variant).splitlines() if line[:1] in "-:"}
    sync_of_kube_proxy(lab, variant, (*SERVICES, GONE), first=True)
    cluster.configure("iptables", {"treeFrom": 1})
    with Clients(lab, CALLS) as clients:
        clients.wait_for_more()
        streams()
        with cluster.proxy() as proxy:
            wait_until(
                lambda: (
                    all("KUBE-SVC-PROXYCORE" in saved(lab.node, variant, f) for f in PREFIX)
                    and "KUBE-PROXY-CANARY" not in everything(lab, variant)
                ),
                proxy.tail,
            )
            assert "of kube-proxy's chains" in cluster.said()
            assert "KUBE-SVC-TREE." in everything(lab, variant)
            assert "172.30.0.99" not in everything(lab, variant)
            assert kubelets <= set(everything(lab, variant).splitlines())
            streams()
            cluster.set_endpoints(0, ["10.180.0.4"])
            wait_until(lambda: clients.answers[CALLS[0]]["10.180.0.4:8080"], proxy.tail)
            clients.wait_for_more()
            assert proxy.stop() is None, proxy.tail()
        sync_of_kube_proxy(lab, variant, SERVICES, first=False)
        clients.wait_for_more()
        streams()
        after = everything(lab, variant)
        assert "PROXYCORE" not in after
        assert "TREE" not in after
        backend = load_backend("iptables")
        cleaned = lab.node.call(lambda: backend.call("proxycore_backend_cleanup", context=context(HOST)))
        assert cleaned.removed == ()
        assert everything(lab, variant) == after
        assert ask(lab, CALLS[0]) in SERVICES[0].endpoints
    assert clients.failures == []
    # Of this name kube-proxy leaves nothing that it does not know.
    assert kubelets - set(after.splitlines()) == {":KUBE-SVC-OFMYOWN -"}


@pytest.mark.parametrize("where", VARIANTS)
def test_refusing_to_adopt(lab, cluster, variant, where):
    """Whichever variant holds kube-proxy's rules; ours are adopted all the same."""
    cluster.configure("iptables", {"variant": variant}, more={"takeover": "refuse"})
    sync_of_kube_proxy(lab, where, SERVICES, first=True)
    before = {name: everything(lab, name) for name in VARIANTS}
    with cluster.proxy() as proxy:
        wait_until(lambda: proxy.ended() is not None, proxy.tail)
        assert "status 1" in str(proxy.ended()), proxy.tail()
        assert f"KUBE-* chains in iptables-{where} table nat" in proxy.tail()
    assert {name: everything(lab, name) for name in VARIANTS} == before
    for family in PREFIX:
        load(lab.node, where, family, "*nat\n:KUBE-SVC-PROXYCORE - [0:0]\nCOMMIT\n")
    with cluster.proxy() as proxy:
        wait_until(lambda: "msg=synced" in cluster.said(), proxy.tail)
        assert proxy.stop() is None, proxy.tail()


ADDED = Served("default/added:http", "172.30.0.77", ("10.180.0.5:8080",))
"""Not among the source's objects, or not yet."""


def test_the_other_variants_rules_stay_until_ours_serve_all_and_then_go(lab, cluster, streams, variant):
    """A kube-proxy at work there adds a Service meanwhile, of which the source tells later."""
    other = OTHER_VARIANT[variant]
    for family in PREFIX:
        for each in VARIANTS:
            load(lab.node, each, family, others(family))
    # Of this name kube-proxy leaves nothing that it does not know.
    before = [line for line in everything(lab, other).splitlines() if "OFMYOWN" not in line]
    sync_of_kube_proxy(lab, other, (*SERVICES, GONE), first=True)
    cluster.configure("iptables", {"variant": variant})
    broken = cluster.manifests.folder / "9999-broken.yaml"
    broken.write_text("kind: [Service")
    calls = (*CALLS, pod_call(ADDED.address))
    with Clients(lab, CALLS) as clients:
        clients.wait_for_more()
        streams()
        with cluster.proxy() as proxy:
            wait_until(lambda: "stay until ours serve all" in cluster.said(), proxy.tail)
            assert "172.30.0.41" in everything(lab, variant)
            assert "172.30.0.99" in everything(lab, other)
            sync_of_kube_proxy(lab, other, (*SERVICES, ADDED), first=False)
            with Clients(lab, calls) as more:
                more.wait_for_more()
                assert "172.30.0.77" in everything(lab, other)
                cluster.add_service(ADDED.address, ["10.180.0.5"])
                wait_until(lambda: "172.30.0.77" in everything(lab, variant), proxy.tail)
                assert "172.30.0.77" in everything(lab, other)
                broken.unlink()
                wait_until(lambda: everything(lab, other).splitlines() == before, proxy.tail)
                more.wait_for_more()
            assert more.failures == []
            streams()
            assert "KUBE-SVC-PROXYCORE" in everything(lab, variant)
            assert proxy.stop() is None, proxy.tail()
        clients.wait_for_more()
    assert clients.failures == []


def test_killed_while_the_other_variants_rules_go_and_started_again(lab, cluster, variant):
    """No connection stays open: the clients come round to its port, in so many calls."""
    other = OTHER_VARIANT[variant]
    cluster.configure("iptables", {"variant": variant})
    sync_of_kube_proxy(lab, other, SERVICES, first=True)
    with Clients(lab, CALLS) as clients:
        clients.wait_for_more()
        for removals in (1, 4, 20):
            if "KUBE" not in everything(lab, other):
                sync_of_kube_proxy(lab, other, SERVICES, first=True)
            with cluster.proxy() as proxy:
                wait_until(
                    lambda least=removals: cluster.log.read_text().count("msg=removed") >= least, proxy.tail
                )
                # Leaving the block kills it.
            clients.wait_for_more()
            with cluster.proxy() as proxy:
                wait_until(lambda: "KUBE" not in everything(lab, other), proxy.tail)
                assert "KUBE-SVC-PROXYCORE" in everything(lab, variant)
            clients.wait_for_more()
    assert clients.failures == []


def test_a_kube_proxy_at_work_in_the_rules_that_are_ours_is_named(lab, cluster, variant):
    """Its syncs take our marker away, again and again."""
    cluster.configure("iptables", {"variant": variant})
    sync_of_kube_proxy(lab, variant, SERVICES, first=True)
    with Clients(lab, CALLS) as clients, cluster.proxy() as proxy:

        def named() -> bool:
            if "kube-proxy is still running" in cluster.log.read_text():
                return True
            if all("KUBE-SVC-PROXYCORE" in saved(lab.node, variant, family) for family in PREFIX):
                time.sleep(1.0)
                sync_of_kube_proxy(lab, variant, SERVICES, first=False)
            return False

        wait_until(lambda: "msg=synced" in cluster.said(), proxy.tail)
        clients.wait_for_more()
        wait_until(named, proxy.tail)
        assert "stop kube-proxy on this node" in cluster.log.read_text()
        assert proxy.stop() is None, proxy.tail()
    assert clients.failures == []
