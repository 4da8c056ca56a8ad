"""Virtual servers of kube-proxy's ipvs mode: which are its own, and what becomes of connections through them.

The kernel under test need not have IPVS: a made-up one answers in its place.  Flows, links and sets are real.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from io import StringIO

import pytest

from proxycore import logs
from proxycore.kernel import ipvs, kubeproxy
from proxycore.kernel.conntrack import Conntrack
from proxycore.kernel.ipvs import VirtualServer, count_active
from proxycore.takeover import Takeover
from proxycore.testing.netns import Namespace

LISTING = """IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A60000A:0050 rr
  -> 0A010202:1F90      Masq    1      3          5
  -> 0A010203:1F90      Masq    1      4          0
TCP  0A60000B:0050 rr persistent 10800
  -> 0A010202:1F90      Masq    1      100        0
UDP  0A60000A:0050 rr
  -> 0A010202:14E9      Masq    1      1000       1
FWM  00000007 wlc
  -> 0A010202:14E9      Masq    1      10000      1
TCP  [fd00:0096:0000:0000:0000:0000:0000:0010]:0050 rr
  -> [fd00:0010:0000:0000:0000:0000:0000:0001]:1F90      Masq    1      20          0
"""


@pytest.mark.parametrize(
    ("servers", "count"),
    [
        ((), 0),
        ((VirtualServer("TCP", "10.96.0.10", 80),), 7),
        ((VirtualServer("TCP", "10.96.0.10", 80), VirtualServer("TCP", "fd00:96::10", 80)), 27),
        ((VirtualServer("UDP", "10.96.0.10", 80),), 1000),
        ((VirtualServer("TCP", "10.96.0.10", 81),), 0),
    ],
)
def test_open_connections_of_some_servers(servers, count):
    assert count_active(LISTING.splitlines(keepends=True), servers) == count


WEB = VirtualServer("TCP", "10.96.0.10", 80)
DNS = VirtualServer("UDP", "10.96.0.10", 53)
WEB6 = VirtualServer("TCP", "fd00:96::10", 80)
NODE_PORT = VirtualServer("TCP", "192.168.7.2", 30001)
OTHERS = (
    VirtualServer("TCP", "192.168.7.2", 443),
    VirtualServer("UDP", "192.168.7.2", 30001),
    VirtualServer("TCP", "172.16.0.1", 30001),
    VirtualServer("TCP", "10.96.0.99", 80),
)


class Kernel:
    """An IPVS that holds virtual servers, and a word for how many connections are open at each look."""

    def __init__(self) -> None:
        self.held = [WEB, DNS, WEB6, NODE_PORT, *OTHERS]
        self.open: list[int] = []

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def servers(self) -> tuple[VirtualServer, ...]:
        return tuple(self.held)

    def delete(self, server: VirtualServer) -> bool:
        self.held.remove(server)
        return True


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(ipvs, "there", lambda: True)
    monkeypatch.setattr(ipvs, "Ipvs", lambda: made)
    monkeypatch.setattr(ipvs, "active_connections", lambda servers: made.open.pop(0) if made.open else 0)
    monkeypatch.setattr("proxycore.takeover.other_backends", lambda chosen: ())
    monkeypatch.setattr("proxycore.takeover._DRAIN_LOOK_SECONDS", 0.001)
    return made


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace("ipvs") as made:
        made.ip(
            ["link", "add", "kube-ipvs0", "type", "bridge"],
            ["addr", "add", "10.96.0.10/32", "dev", "kube-ipvs0"],
            ["addr", "add", "10.96.0.99/32", "dev", "kube-ipvs0"],
            ["addr", "add", "fd00:96::10/128", "dev", "kube-ipvs0", "nodad"],
            ["addr", "add", "192.168.7.2/32", "dev", "lo"],
            ["route", "add", "default", "dev", "lo"],
        )
        made.run(
            ["ipset", "restore"],
            stdin="create KUBE-NODE-PORT-TCP bitmap:port range 0-65535\nadd KUBE-NODE-PORT-TCP 30001\n",
        )
        yield made


EXCLUDED = ("10.96.0.99/28",)


@pytest.mark.root
def test_which_virtual_servers_are_kube_proxys(namespace, kernel):
    found = namespace.call(lambda: kubeproxy.census(exclude_cidrs=EXCLUDED))
    assert set(found.servers) == {WEB, DNS, WEB6, NODE_PORT}
    assert found.at_work
    told: list[str] = []
    namespace.call(lambda: kubeproxy.remove(found, told.append))
    assert kernel.held == list(OTHERS)
    # What servers are known by goes after them, so that an interrupted removal can be taken up again.
    assert [line.partition(" ")[0] for line in told] == ["IPVS:"] * 4 + ["IP", "link"]


@pytest.mark.root
def test_without_its_link_and_sets_nothing_is_kube_proxys(namespace, kernel):
    namespace.ip(["link", "del", "kube-ipvs0"])
    namespace.run(["ipset", "destroy"])
    assert not namespace.call(kubeproxy.census).found


@pytest.mark.root
def test_udp_flows_of_ipvs_are_released_and_no_others(namespace, kernel):
    namespace.run(
        ["nft", "-f", "-"],
        stdin="""table ip t { chain output { type nat hook output priority -100
            udp sport 4003 ip daddr 10.96.0.10 dnat to 127.0.0.1:5353; }; }""",
    )
    with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 5353))
        for port, to in (
            (4001, ("10.96.0.10", 53)),
            (4002, ("10.96.0.10", 54)),
            (4003, ("10.96.0.10", 53)),
            (4004, ("192.168.7.2", 53)),
        ):
            with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.bind(("", port))
                client.sendto(b"x", to)
        found = namespace.call(lambda: kubeproxy.census(exclude_cidrs=EXCLUDED))
        told: list[str] = []
        namespace.call(lambda: kubeproxy.remove(found, told.append))
        with namespace.call(Conntrack) as table:
            left = {flow.source_port for flow in table.udp_flows("IPv4")}
    assert left == {4002, 4003, 4004}
    assert told[0] == "connection tracking: 1 UDP flows through virtual servers"


@pytest.fixture
def said() -> Iterator[StringIO]:
    stream = StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure(stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def made(**options: object) -> Takeover:
    return Takeover(
        "auto",
        backend="nft",
        log=logs.get("takeover"),
        exclude_cidrs=EXCLUDED,
        pauses=(0.01, 0.01),
        **options,
    )


@pytest.mark.root
def test_open_connections_have_time_to_end(namespace, kernel, said):
    kernel.open = [3, 2, 1]
    assert namespace.call(made().after_first_sync)
    assert kernel.open == []
    assert kernel.held == list(OTHERS)
    assert said.getvalue().count("have time to end") == 1
    assert "open=3" in said.getvalue()


@pytest.mark.root
def test_but_not_for_ever(namespace, kernel, said):
    kernel.open = [1] * 1_000_000
    assert namespace.call(made(drain_seconds=0.05).after_first_sync)
    assert kernel.open
    assert kernel.held == list(OTHERS)


@pytest.mark.root
def test_a_proxy_that_ends_leaves_them_for_the_next(namespace, kernel, said):
    takeover = made()

    def ended(found: object) -> int:
        takeover.stop()
        return 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubeproxy, "open_connections", ended)
        namespace.call(takeover.after_first_sync)
    assert WEB in kernel.held
    assert namespace.call(lambda: kubeproxy.census(exclude_cidrs=EXCLUDED)).link
