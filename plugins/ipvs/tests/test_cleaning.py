"""Taking away what is ours and nothing else, on a host in memory."""

from __future__ import annotations

from proxycore.api import FAMILIES
from proxycore.testing.states import HOST, context, frontend, full, name_of, node_port, service
from proxycore_ipvs import cleaning
from proxycore_ipvs.backend import IpvsBackend
from proxycore_ipvs.fakesystem import FakeSystem
from proxycore_ipvs.netrules import MAIN_TABLE, PolicyRule
from proxycore_ipvs.servers import AddServer, ByAddress, ByMark, Server
from proxycore_ipvs.sets import SetSpec
from proxycore_ipvs.shape import shape_of

FOREIGN = (ByMark("IPv4", 7), ByAddress("TCP", "192.0.2.1", 80), ByAddress("UDP", "2001:db8::9", 53))
FOREIGN_RULE = PolicyRule("IPv4", 299, 0x100, 0x100, MAIN_TABLE)


def others(system):
    """What somebody else has there."""
    assert system.servers.run([AddServer(Server(key)) for key in FOREIGN]) == ()
    assert system.entries.create(SetSpec("theirs", "hash:ip"))
    system.routes.add(FOREIGN_RULE)
    for tables in system.chains.values():
        tables.load("*mangle\n:THEIRS - [0:0]\n-A PREROUTING -j THEIRS\nCOMMIT\n")


def clean_up(system):
    shapes = [shape_of(HOST, family) for family in FAMILIES]
    found = []
    for tables in system.chains.values():
        found += cleaning.take_rules(tables)
    found += cleaning.take_servers(system.servers, shapes)
    found += cleaning.take_routes(system.routes, shapes)
    found += cleaning.take_sets(system.entries)
    return found


def test_only_what_is_ours_goes_and_all_of_it():
    system, alone = FakeSystem(), FakeSystem()
    others(system)
    others(alone)
    backend = IpvsBackend(open_system=system.open)
    backend.proxycore_backend_start(context())
    states = [
        service(
            name_of("web", family="IPv4"), frontend("172.30.0.1"), node_port(30080), cluster=["10.0.1.1:80"]
        ),
        service(
            name_of("six", family="IPv6"), frontend("fd00:172:30::1"), cluster=["[fd00:10::1]:80"], affinity=9
        ),
    ]
    assert backend.proxycore_backend_apply(full(*states)).outcome == "applied"
    backend.proxycore_backend_stop()
    removed = clean_up(system)
    told = "\n".join(removed)
    for text in (
        "rule -A PREROUTING -j PX-SERVICES",
        "virtual server -f 1073741825 -6",
        "set PX6-VIP",
        "pref 300",
    ):
        assert text in told
    left, expected = system.dump(), alone.dump()
    for part in ("servers", "sets", "routing"):
        assert left[part] == expected[part]
    lines = [line for lines in left["rules"].values() for line in lines]
    assert not [line for line in lines if "PX" in line]
    assert lines.count("-A PREROUTING -j THEIRS") == 2
    assert clean_up(system) == []
