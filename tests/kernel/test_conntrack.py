"""Conntrack against the kernel's table, with `conntrack` and pyroute2 as witnesses."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator

import pytest

from proxycore.kernel import conntrack
from proxycore.kernel.conntrack import Conntrack
from proxycore.kernel.flow import Flow, endpoint_text, packed
from proxycore.testing.netns import Namespace

RULES = """
table ip t {
  chain output { type nat hook output priority -100
    ip daddr 10.96.0.10 udp dport 53 dnat to 127.0.0.1:5353
  }
  chain raw { type filter hook output priority -300
    udp dport 7777 ct zone set 5
    udp dport 8888 ct original zone set 6
    udp dport 8889 ct reply zone set 7
  }
}
table ip6 t {
  chain output { type nat hook output priority -100
    ip6 daddr fd00:96::10 udp dport 53 dnat to [::1]:5353
  }
}
"""


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace("conntrack") as made:
        made.run(["nft", "-f", "-"], stdin=RULES)
        made.ip(["route", "add", "default", "dev", "lo"])
        made.run(["ip", "-6", "route", "add", "default", "dev", "lo"])
        yield made


@pytest.fixture
def table(namespace: Namespace) -> Iterator[Conntrack]:
    with namespace.call(Conntrack) as opened:
        yield opened


def send(namespace: Namespace, source: tuple[str, int], *destinations: tuple[str, int]) -> None:
    family = socket.AF_INET6 if ":" in source[0] else socket.AF_INET
    with namespace.socket(family, socket.SOCK_DGRAM) as sender:
        sender.bind(source)
        for destination in destinations:
            sender.sendto(b"hello", destination)


def traffic(namespace: Namespace) -> None:
    send(
        namespace,
        ("127.0.0.1", 4000),
        ("127.0.0.1", 9999),
        ("127.0.0.1", 7777),
        ("127.0.0.1", 8888),
        ("127.0.0.1", 8889),
    )
    send(namespace, ("127.0.0.1", 4001), ("10.96.0.10", 53), ("10.1.2.3", 1))
    send(namespace, ("::1", 4000), ("::1", 9999), ("fd00:96::10", 53))
    with namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.connect(server.getsockname())


def seen_by_tool(namespace: Namespace, family: str) -> set[tuple[object, ...]]:
    done = namespace.run(["conntrack", "-L", "-p", "udp", "-f", family.lower(), "-o", "extended,id"])
    found = set()
    for line in done.stdout.splitlines():
        ends = re.findall(r"src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+)", line)
        zones = [re.search(rf" zone(?:-{way})?=(\d+)", line) for way in ("orig", "reply")]
        number = re.search(r" id=(\d+)", line)
        assert len(ends) == 2
        assert number
        found.add(
            (str(ends[0]), str(ends[1]), *(int(zone[1]) if zone else 0 for zone in zones), int(number[1]))
        )
    return found


def as_tool(flow: Flow) -> tuple[object, ...]:
    def end(source: bytes, source_port: int, destination: bytes, destination_port: int) -> str:
        addresses = (endpoint_text(a, 0).removesuffix(":0").strip("[]") for a in (source, destination))
        return str((*addresses, str(source_port), str(destination_port)))

    return end(*flow[:4]), end(*flow[4:8]), flow.zone, flow.reply_zone, flow.id


@pytest.mark.root
@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
@pytest.mark.parametrize("filtered", [True, False])
def test_the_same_flows_as_the_conntrack_tool_sees(
    namespace: Namespace, table: Conntrack, family: str, filtered: bool
):
    traffic(namespace)
    table._filter = filtered
    flows = table.udp_flows(family)
    assert len(flows) == {"IPv4": 6, "IPv6": 2}[family]
    assert {as_tool(flow) for flow in flows} == seen_by_tool(namespace, family)


@pytest.mark.root
def test_the_same_flows_as_pyroute2_sees(namespace: Namespace, table: Conntrack):
    traffic(namespace)
    code = (
        "from pyroute2 import NFCTSocket\n"
        "with NFCTSocket() as s:\n"
        " for m in s.dump():\n"
        "  o, r = m.get_attr('CTA_TUPLE_ORIG'), m.get_attr('CTA_TUPLE_REPLY')\n"
        "  p = o.get_attr('CTA_TUPLE_PROTO')\n"
        "  if p.get_attr('CTA_PROTO_NUM') != 17: continue\n"
        "  i, q, j = o.get_attr('CTA_TUPLE_IP'), r.get_attr('CTA_TUPLE_PROTO'), r.get_attr('CTA_TUPLE_IP')\n"
        "  print(i.get_attr('CTA_IP_V4_DST'), p.get_attr('CTA_PROTO_DST_PORT'), j.get_attr('CTA_IP_V4_SRC'),"
        " q.get_attr('CTA_PROTO_SRC_PORT'), m.get_attr('CTA_STATUS'))\n"
    )

    done = namespace.run([sys.executable, "-W", "ignore", "-c", code])
    ours = {
        f"{endpoint_text(f.destination, 0)[:-2]} {f.destination_port} "
        f"{endpoint_text(f.reply_source, 0)[:-2]} {f.reply_source_port} {f.status}"
        for f in table.udp_flows("IPv4")
    }
    assert set(done.stdout.splitlines()) == ours


@pytest.mark.root
def test_the_long_way_reads_the_same_as_the_short_one(
    namespace: Namespace, table: Conntrack, monkeypatch: pytest.MonkeyPatch
):
    traffic(namespace)
    for family in ("IPv4", "IPv6"):
        short = table.udp_flows(family)
        slow = conntrack._Layout(4 if family == "IPv4" else 16)
        slow.original = b""
        monkeypatch.setitem(conntrack._LAYOUTS, family, slow)
        assert table.udp_flows(family) == short != []


@pytest.mark.root
@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_exactly_the_given_flows_are_deleted(namespace: Namespace, table: Conntrack, family: str):
    traffic(namespace)
    flows = set(table.udp_flows(family))
    for gone in sorted(flows):
        assert table.delete([gone]) == 1
        flows.remove(gone)
        assert set(table.udp_flows(family)) == flows
    assert "tcp" in namespace.run(["conntrack", "-L", "-p", "tcp"]).stdout


@pytest.mark.root
def test_deleting_what_has_gone_is_no_failure(namespace: Namespace, table: Conntrack):
    traffic(namespace)
    flows = table.udp_flows("IPv4")
    assert table.delete(flows) == len(flows)
    assert table.delete(flows) == 0
    assert table.delete([]) == 0


@pytest.mark.root
def test_a_later_flow_to_another_server_stays(namespace: Namespace, table: Conntrack):
    send(namespace, ("127.0.0.1", 4001), ("10.96.0.10", 53))
    (old,) = table.udp_flows("IPv4")
    assert table.delete([old]) == 1
    other = "ip daddr 10.96.0.10 udp dport 53 dnat to 127.0.0.1:5454"
    namespace.run(["nft", "-f", "-"], stdin=f"flush chain ip t output\nadd rule ip t output {other}\n")
    send(namespace, ("127.0.0.1", 4001), ("10.96.0.10", 53))
    (new,) = table.udp_flows("IPv4")
    assert new[:4] == old[:4]
    assert (old.reply_source_port, new.reply_source_port) == (5353, 5454)
    assert table.delete([old]) == 0
    assert table.udp_flows("IPv4") == [new]


@pytest.mark.root
def test_many_flows_are_read_and_deleted(namespace: Namespace, table: Conntrack):
    send(namespace, ("127.0.0.1", 4002), *(("10.1.0.1", port) for port in range(1, 5001)))
    flows = table.udp_flows("IPv4")
    assert {flow.destination_port for flow in flows} == set(range(1, 5001))
    assert table.delete(flows[:3000]) == 3000
    assert set(table.udp_flows("IPv4")) == set(flows[3000:])


@pytest.mark.root
def test_a_refusal_names_the_flow(namespace: Namespace, table: Conntrack):
    send(namespace, ("127.0.0.1", 4002), ("10.1.0.1", 77))
    (flow,) = table.udp_flows("IPv4")
    impossible = flow._replace(reply_source=b"\0" * 16)
    with pytest.raises(conntrack.KernelError, match="cannot delete UDP flow"):
        table.delete([impossible])
    assert table.udp_flows("IPv4") == [flow]


def test_packed_addresses_and_their_text():
    assert packed("10.0.0.1") == socket.inet_aton("10.0.0.1")
    assert packed("fd00::1") == socket.inet_pton(socket.AF_INET6, "fd00::1")
    assert endpoint_text(packed("10.0.0.1"), 53) == "10.0.0.1:53"
    assert endpoint_text(packed("fd00::1"), 53) == "[fd00::1]:53"
