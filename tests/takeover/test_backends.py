"""A node goes from one backend of ours to another while clients dial: no connection fails, and nothing is left behind."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from proxycore.testing.clients import Call, Clients, ask, connected, pod_call, wait_until, who
from proxycore.testing.cluster import Cluster
from proxycore.testing.conformance import problems
from proxycore.testing.lab import Lab
from proxycore.testing.process import ProxyProcess

from .rules import PREFIX, VARIANTS, saved

pytestmark = pytest.mark.root

CALLS = (
    pod_call("172.30.0.41"),
    pod_call("fd00:172:30::41"),
    Call("node", "192.168.0.2", "172.30.0.41"),
    Call("external", "203.0.113.2", "192.168.0.2", 30041),
)
RUNS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "legacy": ("iptables", {"variant": "legacy"}),
    "nft": ("iptables", {"variant": "nft"}),
    "nftables": ("nft", {}),
}
"""By a name for people: backend and options."""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab([80, 8080]) as made:
        yield made


@pytest.fixture
def cluster(lab: Lab, tmp_path: Path) -> Cluster:
    made = Cluster(lab, tmp_path, ["172.30.0.41", "fd00:172:30::41"], node_ports={0: 30041})
    made.set_endpoints(0, ["10.180.0.1"])
    made.set_endpoints(1, ["fd00:10::1"])
    return made


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


def places(lab: Lab) -> set[str]:
    """Where there are rules for the Services: names of RUNS."""
    found = {
        variant
        for variant in VARIANTS
        for family in PREFIX
        if "KUBE-SERVICES" in saved(lab.node, variant, family)
    }
    tables = lab.node.run(["nft", "list", "tables"]).stdout
    return found | ({"nftables"} if "proxycore" in tables else set())


@contextlib.contextmanager
def running(cluster: Cluster, name: str) -> Iterator[ProxyProcess]:
    """A proxy that has everything in force, and everything of others removed; it is ended like by an operator."""
    backend, options = RUNS[name]
    cluster.configure(backend, options)
    with cluster.proxy() as proxy:
        wait_until(lambda: proxy.ended() is not None or places(cluster.lab) == {name}, cluster.said)
        assert proxy.ended() is None, cluster.said()
        yield proxy
        assert proxy.stop() is None, proxy.tail()


def is_served(lab: Lab) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return {ask(lab, call) for call in CALLS} == {"10.180.0.1:8080", "[fd00:10::1]:8080"}
    return False


@pytest.mark.parametrize(("there", "back"), list(itertools.permutations(RUNS, 2)))
def test_from_one_to_another_and_back(cluster, lab, streams, there, back):
    for name in (there, back):
        if reason := problems(*RUNS[name]):
            pytest.skip(f"{name}: {reason}")
    with running(cluster, there):
        wait_until(lambda: is_served(lab), cluster.said)
        streams(CALLS)
    with Clients(lab, CALLS) as clients:
        for turn, name in enumerate((back, there, back), start=2):
            clients.wait_for_more(2)
            with running(cluster, name):
                cluster.set_endpoints(0, [f"10.180.0.{turn}"])
                cluster.set_endpoints(1, [f"fd00:10::{turn}"])
                wanted = (f"10.180.0.{turn}:8080", f"[fd00:10::{turn}]:8080")

                def answered(wanted: tuple[str, str] = wanted) -> bool:
                    """By the new one, at its own endpoints."""
                    return all(set(wanted) & set(clients.answers[call]) for call in CALLS)

                wait_until(lambda: answered() or clients.failures, cluster.said)
                clients.wait_for_more(3)
                streams(CALLS)
    assert clients.failures == []
    assert answered()
