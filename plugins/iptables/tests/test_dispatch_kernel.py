"""Shared chains and edits in the kernel, in both variants."""

from __future__ import annotations

import ipaddress
import random

import pytest

from proxycore.kubechains import TREE
from proxycore.testing.netns import Namespace
from proxycore_iptables.counting import Counting
from proxycore_iptables.dispatch import LEVELS, Shared, edit
from proxycore_iptables.rules import SERVICES, Entry
from proxycore_iptables.words import LOCALHOST_COUNTER

from .tables import VARIANTS, Tables

pytestmark = pytest.mark.root


@pytest.fixture(params=VARIANTS)
def tables(request, tmp_path):
    """IPv4 and IPv6 tables of a namespace."""
    with Namespace("edit") as namespace:
        yield {
            family: Tables(namespace, request.param, family, tmp_path / "lock") for family in ("IPv4", "IPv6")
        }


RULES = (
    '-d 10.0.0.1/32 -p tcp -m comment --comment "a/b:c cluster IP" -m tcp --dport 80 -j T',
    "-m statistic --mode random --probability 0.33333333349 -j T",
    "-m statistic --mode random --probability 0.50000000000 -j T",
    "-m recent --rcheck --seconds 60 --reap --name KUBE-SEP-A --mask 255.255.255.255 --rsource -j T",
    "-m recent --rcheck --seconds 60 --reap --name KUBE-SEP-B --mask 255.255.255.255 --rsource -j T",
    "-p tcp -m recent --set --name KUBE-SEP-A --mask 255.255.255.255 --rsource -m tcp"
    " -j DNAT --to-destination 10.0.0.9:80",
    "-s 10.0.0.9/32 -j T",
    "-m mark ! --mark 0x4000/0x4000 -j RETURN",
    "-j MARK --set-xmark 0x4000/0x0",
    "-j MARK --set-xmark 0x4000/0x4000",
    '-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully',
    "-m addrtype --dst-type LOCAL -j T",
    "! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j T",
    "-m conntrack --ctstate NEW -j T",
    "-i veth+ -j T",
    "! -s 10.0.0.0/8 -d 10.96.0.1/32 -p udp -m udp --dport 53 -j T",
    '-s 192.0.2.0/24 -m comment --comment "a \\"quoted\\" one" -j T',
    "-p sctp -m sctp --dport 7 -j T",
    f"-d 127.0.0.0/8 -p tcp -m tcp --dport 7 -m nfacct --nfacct-name  {LOCALHOST_COUNTER} -j T",
    *(f"-d 10.96.0.{n}/32 -p tcp -m tcp --dport 80 -j T" for n in range(2, 20)),
)


def count():
    """Make the counter that one of the rules needs."""
    with Counting() as counting:
        counting.ensure((LOCALHOST_COUNTER,))


def test_edits_take_every_kind_of_rule_out_and_put_it_back(tables):
    tool = tables["IPv4"]
    tool.namespace.call(count)
    tool.restore(
        "\n".join(["*nat", ":T - [0:0]", ":C - [0:0]", *(f"-A C {rule}" for rule in RULES), "COMMIT", ""])
    )
    held = tool.rules("nat")["C"]
    assert held == RULES
    choice = random.Random(1)
    for _ in range(40):
        wanted = [rule for rule in RULES if choice.random() < (0.88 if rule in held else 0.95)]
        # What stays keeps its order as those of a shared chain do.
        lines = edit(held, tuple(wanted), "C")
        assert lines is not None
        tool.restore("\n".join(["*nat", *lines, "COMMIT", ""]))
        held = tool.rules("nat")["C"]
        assert held == tuple(wanted)


def _deep(family):
    """Entries that use all levels, four or more neighbours at each."""
    if family == "IPv4":
        wholes = [(10 << 24) | (1 << (28 - 4 * depth)) for depth in range(1, 8)] + [10 << 24]
        addresses = [str(ipaddress.IPv4Address(whole)) for whole in wholes]
    else:
        addresses = [str(ipaddress.IPv6Address((0xFD << 120) | (1 << (124 - 4 * n)))) for n in range(2, 26)]
    bits = 32 if family == "IPv4" else 128
    return [
        Entry(
            ipaddress.ip_address(address).packed,
            port,
            "tcp",
            "",
            0,
            f"-d {address}/{bits} -p tcp -m tcp --dport {port} -j EXT",
        )
        for address in addresses
        for port in range(1, 7)
    ]


@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_the_deepest_tree_is_accepted_and_reads_back_as_written(tables, family):
    tool = tables[family]
    shared = Shared(SERVICES, ("-m addrtype --dst-type LOCAL -j EXT",), 1)
    shared.change((), _deep(family))
    chains = {"MARKED": (), "SEP": ("-j MARKED",), "SVC": ("-j SEP",), "EXT": ("-j SVC",)} | shared.chains()
    lines = [f":{name} - [0:0]" for name in chains]
    lines += [f"-A {name} {rule}" for name, rules in chains.items() for rule in rules]
    lines += [f"-A {name} -j {SERVICES.chain}" for name in ("PREROUTING", "OUTPUT")]
    tool.restore("\n".join(["*nat", *lines, "COMMIT", ""]))
    found = tool.rules("nat")
    assert {name: found[name] for name in chains} == chains

    def depth(name):
        below = [rule.rpartition(" ")[2] for rule in found[name] if f"-j {TREE}" in rule]
        return 0 if not below else 1 + max(map(depth, below))

    assert depth(SERVICES.chain) == LEVELS
