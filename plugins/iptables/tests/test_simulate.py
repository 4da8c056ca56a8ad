"""The interpreter of rules is right: packets that are really sent, through rules that are really there, fare as it says."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest

from proxycore.testing.flows import Traffic
from proxycore.testing.lab import CLIENT_ADDRESSES, LINKS, ClientKind, Lab
from proxycore.testing.responder import join_host_port
from proxycore.testing.scenario import Expect, ExpectEndpoints, ExpectVerdict, Flow, Transport

from .simulate import Ends, Outcome, Packet, Unknown, World, parse, simulate

INTERFACES: dict[ClientKind, str | None] = {
    "pod": "pods0",
    "node": None,
    "other-node": "eth0",
    "remote-pod": "ovl0",
    "external": "ext0",
}
LOCAL = frozenset(address.partition("/")[0] for link in LINKS for address in link.node)

RULES = """
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:EXTERNAL - [0:0]
:FORWARDED - [0:0]
:REFUSED - [0:0]
:WALL - [0:0]
-A INPUT -m conntrack --ctstate NEW -j WALL
-A INPUT -m conntrack --ctstate NEW -j EXTERNAL
-A INPUT -i ext0 -p tcp -m tcp --dport 32000 -j ACCEPT
-A INPUT -i ext0 -p tcp -m tcp --dport 32000:32009 -j DROP
-A FORWARD -m conntrack --ctstate NEW -j WALL
-A FORWARD -j FORWARDED
-A FORWARD -m conntrack --ctstate NEW -j REFUSED
-A FORWARD -m conntrack --ctstate NEW -j EXTERNAL
-A OUTPUT -m conntrack --ctstate NEW -j WALL
-A OUTPUT -m conntrack --ctstate NEW -j REFUSED
-A WALL -d 1.2.3.5/32 -p tcp -m tcp --dport 80 -j DROP
-A WALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A FORWARDED -m conntrack --ctstate INVALID -j DROP
-A FORWARDED -m mark --mark 0x4000/0x4000 -j ACCEPT
-A FORWARDED -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A REFUSED -d 172.30.0.43/32 -p tcp -m tcp --dport 80 -j REJECT --reject-with icmp-port-unreachable
-A REFUSED -d 172.30.0.43/32 -p udp -m udp --dport 53 -j REJECT --reject-with icmp-port-unreachable
-A REFUSED -d 172.30.0.44/32 -p tcp -m tcp --dport 80 -j DROP
-A EXTERNAL -p tcp -m addrtype --dst-type LOCAL -m tcp --dport 30081 -j DROP
-A EXTERNAL -d 10.180.1.9/32 -p tcp -m tcp --dport 8080 -j DROP
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:AFTER - [0:0]
:EXT - [0:0]
:FW - [0:0]
:MARK-IT - [0:0]
:NODE-PORTS - [0:0]
:SEP-1 - [0:0]
:SEP-2 - [0:0]
:SEP-3 - [0:0]
:SEP-A - [0:0]
:SEP-B - [0:0]
:SEP-U - [0:0]
:SERVICES - [0:0]
:STICKY - [0:0]
:SVC - [0:0]
:SVL - [0:0]
:TREE - [0:0]
:TREE-4 - [0:0]
-A PREROUTING -j SERVICES
-A OUTPUT -j SERVICES
-A POSTROUTING -j AFTER
-A AFTER -m mark ! --mark 0x4000/0x4000 -j RETURN
-A AFTER -j MARK --set-xmark 0x4000/0x0
-A AFTER -j MASQUERADE --random-fully
-A SERVICES -d 172.30.0.0/16 -g TREE
-A SERVICES -d 1.2.3.4/32 -p tcp -m tcp --dport 80 -j EXT
-A SERVICES -d 1.2.3.5/32 -p tcp -m tcp --dport 80 -j FW
-A SERVICES -m addrtype --dst-type LOCAL -j NODE-PORTS
-A TREE -d 172.30.0.32/28 -g TREE-4
-A TREE -d 172.30.0.40/29 -p tcp -m tcp --dport 81 -j SVL
-A TREE-4 -d 172.30.0.41/32 -p tcp -m tcp --dport 80 -j SVC
-A TREE-4 -d 172.30.0.41/32 -p udp -m udp --dport 53 -j SEP-U
-A TREE-4 -d 172.30.0.42/32 -p tcp -m tcp --dport 80 -j STICKY
-A TREE-4 -d 172.30.0.45/32 -p tcp -m comment --comment "she said \\"-j DROP\\"" -m tcp --dport 80 -j SEP-3
-A NODE-PORTS -p tcp -m tcp --dport 30080 -j EXT
-A EXT -i pods+ -j SVC
-A EXT -m addrtype --src-type LOCAL -j MARK-IT
-A EXT -m addrtype --src-type LOCAL -j SVC
-A EXT -j SVL
-A FW -s 203.0.113.0/25 -j EXT
-A SVC ! -s 10.0.0.0/8 -d 172.30.0.41/32 -p tcp -m tcp --dport 80 -j MARK-IT
-A SVC -m statistic --mode random --probability 0.50000000000 -j SEP-1
-A SVC -m statistic --mode random --probability 0.50000000000 -j SEP-2
-A SVC -j SEP-1
-A SVL -j SEP-2
-A STICKY -m recent --rcheck --seconds 600 --reap --name SEP-A --mask 255.255.255.255 --rsource -j SEP-A
-A STICKY -m recent --rcheck --seconds 600 --reap --name SEP-B --mask 255.255.255.255 --rsource -j SEP-B
-A STICKY -m statistic --mode random --probability 0.50000000000 -j SEP-A
-A STICKY -j SEP-B
-A SEP-1 -s 10.180.0.1/32 -j MARK-IT
-A SEP-1 -p tcp -m tcp -j DNAT --to-destination 10.180.0.1:8080
-A SEP-2 -s 10.180.1.1/32 -j MARK-IT
-A SEP-2 -p tcp -m tcp -j DNAT --to-destination 10.180.1.1:8080
-A SEP-3 -p tcp -m tcp -j DNAT --to-destination 10.180.1.9:8080
-A SEP-A -p tcp -m recent --set --name SEP-A --mask 255.255.255.255 --rsource -m tcp -j DNAT --to-destination 10.180.0.1:8080
-A SEP-B -p tcp -m recent --set --name SEP-B --mask 255.255.255.255 --rsource -m tcp -j DNAT --to-destination 10.180.1.1:8080
-A SEP-U -p udp -m udp -j DNAT --to-destination 10.180.0.1:8080
-A MARK-IT -j MARK --set-xmark 0x4000/0x4000
COMMIT
"""
CLIENTS: tuple[tuple[ClientKind, str], ...] = (
    *((kind, addresses[0]) for kind, addresses in CLIENT_ADDRESSES.items()),
    ("pod", "10.180.0.1"),
    ("remote-pod", "10.180.1.1"),
    ("external", "203.0.113.200"),
)
DIALLED = (
    ("172.30.0.41", 80, "tcp"),
    ("172.30.0.41", 53, "udp"),
    ("172.30.0.41", 81, "tcp"),
    ("172.30.0.48", 81, "tcp"),
    ("172.30.0.43", 80, "tcp"),
    ("172.30.0.43", 53, "udp"),
    ("172.30.0.44", 80, "tcp"),
    ("172.30.0.45", 80, "tcp"),
    ("1.2.3.4", 80, "tcp"),
    ("1.2.3.5", 80, "tcp"),
    ("192.168.0.2", 30080, "tcp"),
    ("192.168.1.2", 30080, "tcp"),
    ("192.168.0.2", 30081, "tcp"),
    ("192.168.0.2", 32000, "tcp"),
    ("192.168.0.2", 32001, "tcp"),
)


def expectation(ends: Ends) -> Expect:
    """What a client should see."""
    assert sum(ends.values()) == 1
    if {(end.verdict, end.translated) for end in ends} == {("accept", True)}:
        masquerade = {join_host_port(end.address, end.port): end.masqueraded for end in ends}
        return ExpectEndpoints(tuple(masquerade), masquerade)
    [verdict] = {end.verdict for end in ends}
    return ExpectVerdict("unproxied" if verdict == "accept" else verdict)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab([80, 81, 53, 8080]) as made:
        yield made


@pytest.mark.root
@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_packets_fare_as_it_says(lab, monkeypatch, tmp_path, variant):
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    lab.node.run([f"iptables-{variant}-restore"], stdin=RULES)
    saved = lab.node.run([f"iptables-{variant}-save"]).stdout
    assert sorted(line for line in saved.splitlines() if line.startswith("-A ")) == sorted(
        line for line in RULES.splitlines() if line.startswith("-A ")
    )
    lab.put({"10.180.1.1": "overlay"})
    ruleset, world = parse(saved), World(LOCAL)
    flows = []
    for kind, source in CLIENTS:
        for address, port, protocol in DIALLED:
            proto: Transport = "udp" if protocol == "udp" else "tcp"
            packet = Packet(source, address, port, protocol, INTERFACES[kind])
            expect = expectation(simulate(ruleset, packet, world))
            name = f"{kind} {source} {address}:{port}"
            flows.append(Flow(name, kind, source, 0, address, port, proto, expect))
    said = [str(flow.expect) for flow in flows]
    assert len(set(said)) > 10
    traffic = Traffic(lab)
    try:
        assert list(traffic.judge(flows).values()) == []
    finally:
        traffic.close()


@pytest.mark.root
@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_lists_of_sources(lab, monkeypatch, tmp_path, variant):
    """Who is in a list comes back to the endpoint whose it is."""
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    lab.node.run([f"iptables-{variant}-restore"], stdin=RULES)
    traffic = Traffic(lab)
    ruleset = parse(RULES)
    seen = set()
    for last in range(10, 26):
        source = f"10.0.0.{last}"
        packet = Packet(source, "172.30.0.42", 80, interface="pods0")
        first = {end.address: end for end in simulate(ruleset, packet, World(LOCAL))}
        assert set(first) == {"10.180.0.1", "10.180.1.1"}
        either = ExpectEndpoints(("10.180.0.1:8080", "10.180.1.1:8080"), sticky=True)
        flow = Flow(f"first {source}", "pod", source, 0, "172.30.0.42", 80, "tcp", either)
        assert traffic.judge([flow]) == {}
        lists = {
            name: source in lab.node.run(["cat", f"/proc/net/xt_recent/{name}"]).stdout
            for name in ("SEP-A", "SEP-B")
        }
        [kept] = [end for end in first.values() if lists[next(iter(end.remembered))]]
        seen.add(kept.address)
        memory = {name: {source: 1.0} for name in kept.remembered}
        again = expectation(simulate(ruleset, packet, World(LOCAL, memory)))
        assert again == ExpectEndpoints((f"{kept.address}:8080",), {f"{kept.address}:8080": False})
        assert traffic.judge([Flow("again", "pod", source, 0, "172.30.0.42", 80, "tcp", again)]) == {}
        late = {name: {source: 601.0} for name in kept.remembered}
        assert simulate(ruleset, packet, World(LOCAL, late)).keys() == set(first.values())
    assert len(seen) == 2


# -- what packets do not tell --


def one_table(*lines: str, table: str = "nat") -> str:
    return "\n".join((f"*{table}", ":PREROUTING ACCEPT [0:0]", ":A - [0:0]", ":B - [0:0]", *lines, "COMMIT"))


PACKET = Packet("10.0.0.2", "172.30.0.1", 80, interface="pods0")


def test_chances_are_those_of_the_kernel():
    third = "-m statistic --mode random --probability 0.33333333349 -j DNAT --to-destination"
    rules = one_table(
        f"-A PREROUTING {third} 10.0.0.1:80",
        "-A PREROUTING -m statistic --mode random --probability 0.50000000000 -j DNAT --to-destination 10.0.0.2:80",
        "-A PREROUTING -j DNAT --to-destination 10.0.0.3:80",
    )
    ends = simulate(parse(rules), PACKET, World())
    assert {end.address: float(chance) for end, chance in ends.items()} == pytest.approx(
        {"10.0.0.1": 1 / 3, "10.0.0.2": 1 / 3, "10.0.0.3": 1 / 3}, abs=1e-8
    )
    assert sum(ends.values()) == Fraction(1)


def test_going_to_a_chain_does_not_come_back_but_jumping_does():
    dnat = "-A PREROUTING -j DNAT --to-destination 10.0.0.1:1"
    gone = parse(
        one_table("-A PREROUTING -j A", "-A A -g B", "-A A -j DNAT --to-destination 9.9.9.9:9", dnat)
    )
    assert simulate(gone, PACKET, World()) == {Outcome("accept", "10.0.0.1", 1, True): 1}
    back = parse(
        one_table("-A PREROUTING -j A", "-A A -j B", "-A A -j DNAT --to-destination 9.9.9.9:9", dnat)
    )
    assert simulate(back, PACKET, World()) == {Outcome("accept", "9.9.9.9", 9, True): 1}
    left = parse(one_table("-A PREROUTING -g A", dnat))
    assert simulate(left, PACKET, World()) == {Outcome("accept", "172.30.0.1", 80): 1}


def test_a_packet_that_is_not_new_is_not_translated():
    rules = parse(one_table("-A PREROUTING -j DNAT --to-destination 9.9.9.9:9"))
    packet = Packet("10.0.0.2", "172.30.0.1", 80, interface="pods0", state="ESTABLISHED")
    assert simulate(rules, packet, World()) == {Outcome("accept", "172.30.0.1", 80): 1}


def test_the_node_calling_itself_passes_input_too():
    rules = parse(
        "*filter\n:INPUT DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n-A INPUT -i lo -p tcp -m tcp --dport 80 -j ACCEPT\nCOMMIT\n"
    )
    world = World(frozenset(["192.168.0.2"]))
    for port, verdict in ((80, "accept"), (81, "drop")):
        ends = simulate(rules, Packet("192.168.0.2", "192.168.0.2", port), world)
        assert {end.verdict for end in ends} == {verdict}


@pytest.mark.parametrize(
    ("rule", "error"),
    [
        ("-m limit --limit 1/sec -j ACCEPT", Unknown),
        ("-p icmp -j ACCEPT", Unknown),
        ("-o eth0 -j ACCEPT", Unknown),
        ("-m addrtype --dst-type BROADCAST -j ACCEPT", Unknown),
        ("-j NOWHERE", ValueError),
        ("-m statistic --mode nth --every 2 --packet 0 -j ACCEPT", Unknown),
        ("-m recent --update --name X --mask 255.255.255.255 --rsource -j ACCEPT", Unknown),
    ],
)
def test_what_it_does_not_know_it_does_not_pass_over(rule, error):
    with pytest.raises(error):
        parse(one_table(f"-A PREROUTING {rule}"))


def test_other_tables_must_be_empty():
    rules = parse(one_table("-A PREROUTING -j ACCEPT", table="mangle"))
    with pytest.raises(Unknown):
        simulate(rules, PACKET, World())


def test_chains_that_nothing_leads_to():
    rules = parse(one_table("-A PREROUTING -j A"))
    assert rules.unreachable("nat") == {"B"}
