"""What the IPVS backend stands on is in the kernel that these tests get: virtual servers, sets with marks, iptables-legacy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxycore.kernel import ipvs
from proxycore.testing.lab import Lab
from proxycore.testing.netns import Namespace
from proxycore.testing.responder import join_host_port

pytestmark = [pytest.mark.root, pytest.mark.ipvs]

SCHEDULERS = ("rr", "wrr", "lc", "wlc", "fo", "ovf", "lblc", "lblcr", "dh", "sh", "mh", "sed", "nq")
FRONTENDS = {4: "172.30.0.10", 6: "fd00:172:30::10"}
ENDPOINTS = {4: ("10.180.0.5", "10.180.0.6"), 6: ("fd00:10::5", "fd00:10::6")}
OTHER_NODE = {4: "192.168.0.3", 6: "2001:db8::3"}
OURS = 0x40000000
MARK = OURS | 1

MANGLE = """\
*mangle
-A PREROUTING -j SET --map-set VIP dst,dst --map-mark
-A PREROUTING -m mark --mark 0x40000000/0x40000000 -j CONNMARK --save-mark --nfmask 0x40000000 --ctmask 0x40000000
-A OUTPUT -m ipvs --ipvs -m mark --mark 0x40000000/0x40000000 -j MARK --set-mark 0x0
COMMIT
*nat
-A POSTROUTING -m connmark --mark 0x40000000/0x40000000 -j MASQUERADE --random-fully
COMMIT
*security
-A INPUT -m mark --mark 0x40000000/0x40000000 -j MARK --set-xmark 0x0/0xaff0c000
COMMIT
"""


@pytest.fixture(autouse=True)
def _own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))


@pytest.fixture
def lab():
    with Lab([80, 8080]) as made:
        yield made


def ask(lab: Lab, kind: str, source: str, frontend: str, port: int) -> dict[str, str]:
    """Open a connection from a client to a frontend: who answered, at which address, and which peer it saw."""
    with lab.client(kind, "tcp", source) as client:
        client.settimeout(5)
        client.connect((frontend, port))
        client.sendall(b"?\n")
        return json.loads(client.recv(4096))


def family_of(number: int) -> list[str]:
    return ["-6"] if number == 6 else []


def test_the_kernel_has_ipvs():
    with Namespace("a") as a:
        assert a.call(ipvs.there)
        assert a.run(["ipvsadm", "-Ln"]).stdout.startswith("IP Virtual Server version")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduler(scheduler):
    with Namespace("a") as a:
        a.run(["ipvsadm", "-A", "-t", "172.30.0.10:80", "-s", scheduler])
        assert f"-s {scheduler}" in a.run(["ipvsadm", "-Sn"]).stdout


def test_a_namespace_has_servers_and_settings_of_its_own():
    with Namespace("a") as a, Namespace("b") as b:
        a.run(["ipvsadm", "-A", "-f", "7", "-s", "rr"])
        a.sysctl({"ipv4/vs/conntrack": 1, "ipv4/vs/expire_nodest_conn": 1, "ipv4/vs/conn_reuse_mode": 1})
        assert b.run(["ipvsadm", "-Sn"]).stdout == ""
        assert b.run(["cat", "/proc/sys/net/ipv4/vs/conntrack"]).stdout == "0\n"


def test_connections_through_a_virtual_server_made_by_pyroute2(lab):
    from pyroute2 import IPVS, IPVSDest, IPVSService

    service = {"addr": FRONTENDS[4], "port": 80, "protocol": 6}
    lab.node.ip(["addr", "add", f"{FRONTENDS[4]}/32", "dev", "lo"])

    def program() -> None:
        with IPVS() as kernel:
            kernel.service("add", service=IPVSService(sched_name="rr", **service))
            for address in ENDPOINTS[4]:
                destination = IPVSDest(addr=address, port=8080, fwd_method=0)
                kernel.dest("add", service=IPVSService(**service), dest=destination)

    lab.node.call(program)
    replies = [ask(lab, "pod", "10.0.0.2", FRONTENDS[4], 80) for _ in range(4)]
    assert sorted(reply["at"] for reply in replies) == [
        f"{address}:8080" for address in ENDPOINTS[4] for _ in range(2)
    ]
    assert {reply["peer"].rpartition(":")[0] for reply in replies} == {"10.0.0.2"}


@pytest.mark.parametrize("version", [4, 6])
def test_a_set_maps_a_frontend_to_the_mark_of_a_virtual_server(lab, version):
    """The frontend is no address of the node's: the mark alone brings its packets to IPVS."""
    node, frontend, family = lab.node, FRONTENDS[version], family_of(version)
    node.run(["ipset", "create", "VIP", "hash:ip,port", "family", f"inet{'6' * (version == 6)}", "skbinfo"])
    node.run(["ipset", "add", "VIP", f"{frontend},tcp:80", "skbmark", f"{MARK:#x}"])
    node.run(["ip6tables-legacy-restore" if family else "iptables-legacy-restore"], stdin=MANGLE)
    node.ip(
        ["rule", "add", "pref", "300", "fwmark", f"{OURS:#x}/{OURS:#x}", "lookup", "310"],
        ["route", "add", "local", "default", "dev", "lo", "table", "310"],
        ipv6=bool(family),
    )
    node.sysctl({"ipv4/vs/conntrack": 1})
    node.run(["ipvsadm", "-A", "-f", str(MARK), *family, "-s", "rr"])
    for address in ENDPOINTS[version]:
        node.run(["ipvsadm", "-a", "-f", str(MARK), *family, "-r", join_host_port(address, 8080), "-m"])

    replies = [ask(lab, "other-node", OTHER_NODE[version], frontend, 80) for _ in range(4)]
    assert {reply["at"] for reply in replies} == {join_host_port(one, 8080) for one in ENDPOINTS[version]}
    # Masqueraded, as the connection's mark says.
    assert not any(reply["peer"].startswith(join_host_port(OTHER_NODE[version], 0)[:-1]) for reply in replies)
    # Another port is not ours, and goes where it would go anyway.
    assert ask(lab, "other-node", OTHER_NODE[version], frontend, 8080)["by"] == "world"


def test_matches_targets_and_sets_of_the_design():
    with Namespace("a") as a:
        for command in (
            ["create", "NP", "bitmap:port", "range", "0-65535", "skbinfo"],
            ["create", "NODE", "hash:ip"],
            ["create", "CIDR", "hash:net"],
            ["create", "FW", "hash:ip,port"],
            ["create", "FWS", "hash:ip,port,net"],
            ["create", "LOOP", "hash:ip,port,ip"],
        ):
            a.run(["ipset", *command])
        for rule in (
            "-t mangle -A PREROUTING -m conntrack --ctdir REPLY -j RETURN",
            "-t mangle -A PREROUTING -m conntrack --ctstate DNAT -j RETURN",
            "-t mangle -A PREROUTING -m set ! --match-set FWS dst,dst,src -m conntrack --ctstate NEW -j DROP",
            "-t mangle -A PREROUTING -p sctp -j SET --map-set NP dst --map-mark",
            "-t mangle -A PREROUTING -m addrtype --src-type LOCAL -j MARK --set-xmark 0x4000/0x34004000",
            "-t nat -A PREROUTING -p tcp -m connmark --mark 0x40100000/0x40f00000 -j DNAT --to-destination :8080",
            "-t nat -A POSTROUTING -m ipvs --ipvs -m set --match-set LOOP dst,dst,src -j MASQUERADE --random-fully",
            "-t filter -A FORWARD -m mark --mark 0x80000000/0x80000000 -j REJECT",
        ):
            a.run(["iptables-legacy", *rule.split()])
