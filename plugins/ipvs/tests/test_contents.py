"""The data plane's entries in sets: in memory, and in this machine's kernel."""

from __future__ import annotations

import errno

import pytest

from proxycore.api import KernelError
from proxycore_ipvs.contents import SetRefusal, change_entries, kernel_entry, our_entry, read_entries, spec_of
from proxycore_ipvs.diff import DeleteEntry, PutEntry
from proxycore_ipvs.entries import MAPS, Entry, SetKind, SetName, node_port, vip
from proxycore_ipvs.fakesets import FakeSets
from proxycore_ipvs.setkernel import NetlinkSets
from proxycore_ipvs.sets import INVALID_CIDR, Mark

from .inside import Inside

NAMES = [SetName(family, kind) for family in ("IPv4", "IPv6") for kind in SetKind]


@pytest.fixture(params=["fake", pytest.param("netlink", marks=pytest.mark.root)])
def sets(request):
    """With all the sets of the data plane."""
    if request.param == "fake":
        made = FakeSets()
    else:
        made = Inside(request.getfixturevalue("namespace"), NetlinkSets)
    for name in NAMES:
        assert made.create(spec_of(name))
    yield made
    made.close()


def entries_of(name: SetName) -> list[Entry]:
    one, net = ("fd00::1", "fd00:1::/64") if name.family == "IPv6" else ("10.0.0.1", "10.1.0.0/16")
    match name.type:
        case "bitmap:port":
            protocol = {"NP-tcp": "TCP", "NP-udp": "UDP", "NP-sctp": "SCTP"}[name.kind.value]
            return [node_port(name.family, protocol, port) for port in (0, 30000)]
        case "hash:ip":
            return [Entry(name, one)]
        case "hash:net":
            return [Entry(name, net)]
        case "hash:ip,port":
            return [Entry(name, one, protocol, 80) for protocol in ("TCP", "UDP", "SCTP")]
        case "hash:ip,port,net":
            return [Entry(name, one, "TCP", 80, net)]
        case "hash:ip,port,ip":
            return [Entry(name, one, "TCP", 80, one)]


EVERYTHING = {
    entry: 0x48000000 + number if name.kind in MAPS else None
    for number, name in enumerate(NAMES)
    for entry in entries_of(name)
}


def test_sets_are_made_as_ipset_would_by_our_text():
    assert [str(spec_of(name)) for name in NAMES] == [name.creation for name in NAMES]


def test_an_entry_reads_the_same_in_either_form():
    for entry in EVERYTHING:
        assert str(kernel_entry(entry)) == entry.element
        assert our_entry(entry.set, kernel_entry(entry)) == entry


def test_all_entries_come_change_and_go(sets):
    assert change_entries(sets, [PutEntry(entry, value) for entry, value in EVERYTHING.items()]) == ()
    assert read_entries(sets, NAMES) == EVERYTHING
    changed = {entry: value + 1 for entry, value in EVERYTHING.items() if value is not None}
    gone = [entry for entry, value in EVERYTHING.items() if value is None]
    operations = [PutEntry(entry, value) for entry, value in changed.items()]
    assert change_entries(sets, [*operations, *map(DeleteEntry, [*gone, *gone[:1]])]) == ()
    assert read_entries(sets, NAMES) == changed


def test_a_refusal_names_its_operation(sets):
    cidrs = [SetName(family, SetKind.CIDR) for family in ("IPv4", "IPv6")]
    nets = [Entry(cidrs[0], "0.0.0.0/0"), Entry(cidrs[1], "::/0"), Entry(cidrs[0], "10.0.0.0/8")]
    there = PutEntry(vip("IPv4", "10.0.0.1", "TCP", 80), 7)
    operations = [there, *map(PutEntry, nets), there]
    assert change_entries(sets, operations) == (
        SetRefusal(1, operations[1], INVALID_CIDR),
        SetRefusal(2, operations[2], INVALID_CIDR),
    )
    assert read_entries(sets, [*cidrs, there.entry.set]) == {nets[2]: None, there.entry: 7}


def test_a_mark_that_we_did_not_write_is_no_value(sets):
    entry = vip("IPv6", "fd00::1", "UDP", 53)
    for mark in (None, Mark(7, 0xFF)):
        assert sets.add(spec_of(entry.set), {kernel_entry(entry): mark}) == ()
        assert read_entries(sets, [entry.set]) == {entry: None}


def test_a_set_that_is_missing(sets):
    name = SetName("IPv4", SetKind.CIDR)
    sets.destroy(str(name))
    with pytest.raises(KernelError) as caught:
        change_entries(sets, [PutEntry(Entry(name, "10.0.0.0/8"))])
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(KernelError) as caught:
        read_entries(sets, [name])
    assert caught.value.errno == errno.ENOENT


def test_the_order_of_kinds_is_kept():
    done = []

    class Recording(FakeSets):
        def add(self, spec, members, *, exclusive=False):
            done.append((spec.name, len(members)))
            return super().add(spec, members, exclusive=exclusive)

        def delete(self, spec, entries, *, exclusive=False):
            done.append((spec.name, -len(entries)))
            return super().delete(spec, entries, exclusive=exclusive)

    sets = Recording()
    for name in NAMES:
        sets.create(spec_of(name))
    node4, node6 = (SetName(family, SetKind.NODE) for family in ("IPv4", "IPv6"))
    nodes = [Entry(node4, "10.0.0.1"), Entry(node6, "fd00::1"), Entry(node4, "10.0.0.2")]
    frontend = vip("IPv4", "10.0.0.1", "TCP", 80)
    operations = [*map(PutEntry, nodes), PutEntry(frontend, 1), *map(DeleteEntry, [frontend, *nodes])]
    assert change_entries(sets, operations) == ()
    assert done == [
        ("PX4-NODE", 2),
        ("PX6-NODE", 1),
        ("PX4-VIP", 1),
        ("PX4-VIP", -1),
        ("PX4-NODE", -2),
        ("PX6-NODE", -1),
    ]
