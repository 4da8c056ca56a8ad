"""What any kernel does with IP sets: the one in memory, and this machine's by batches and by pyroute2."""

from __future__ import annotations

import errno

import pytest

from proxycore.api import KernelError
from proxycore.kernel.ipsets import BUSY
from proxycore.testing.netns import Namespace
from proxycore_ipvs import setwire
from proxycore_ipvs.fakesets import FakeSets
from proxycore_ipvs.plainsets import PlainSets
from proxycore_ipvs.setkernel import NetlinkSets
from proxycore_ipvs.sets import (
    EXIST,
    FULL,
    INVALID_CIDR,
    KINDS,
    NO_SKBINFO,
    SECOND_MISSING,
    TYPE_MISMATCH,
    Entry,
    EntryRefusal,
    Mark,
    SetSpec,
    SetState,
    bitmap,
    halves,
    line,
)

from .inside import Inside

REAL = {"netlink": NetlinkSets, "plain": PlainSets}
MARK, REJECT = Mark(0x48000001), Mark(0x80000000)


@pytest.fixture(params=["fake", *(pytest.param(kind, marks=pytest.mark.root) for kind in REAL)])
def sets(request):
    """Each of the kernels in turn, without any set."""
    if request.param == "fake":
        yield FakeSets()
        return
    inside = Inside(request.getfixturevalue("namespace"), REAL[request.param])
    yield inside
    inside.close()


def spec_of(kind: str, family: str = "IPv4", *, skbinfo: bool = False) -> SetSpec:
    return bitmap("s", skbinfo=skbinfo) if kind == "bitmap:port" else SetSpec("s", kind, family, skbinfo)


def entries_of(spec: SetSpec) -> list[Entry]:
    """Some entries for each kind."""
    six = spec.family == "IPv6"
    one, two = ("fd00::1", "fd00:0:0:1::") if six else ("10.0.0.1", "192.168.0.9")
    net, narrow = ("fd00:1::/64", "fd00::7/128") if six else ("10.1.0.0/16", "10.0.0.7/32")
    wide = ("8000::/1") if six else ("128.0.0.0/1")
    flows = [(one, "TCP", 80), (one, "UDP", 80), (one, "SCTP", 80), (one, "TCP", 65535), (two, "TCP", 80)]
    return {
        "hash:ip": [Entry(one), Entry(two)],
        "hash:net": [Entry(net), Entry(narrow), Entry(wide)],
        "hash:ip,port": [Entry(*flow) for flow in flows],
        "hash:ip,port,ip": [Entry(*flow, end) for flow in flows for end in (one, two)],
        "hash:ip,port,net": [Entry(*flow, end) for flow in flows for end in (net, narrow, wide)],
        "bitmap:port": [Entry(port=0), Entry(port=80), Entry(port=65535)],
    }[spec.kind]


SHAPES = [
    spec_of(kind, family, skbinfo=skbinfo)
    for kind in KINDS
    for family in ("IPv4", "IPv6")
    for skbinfo in (False, True)
    if kind != "bitmap:port" or family == "IPv4"
]


@pytest.mark.parametrize("spec", SHAPES, ids=str)
def test_entries_come_and_go(sets, spec):
    wanted = {
        entry: (MARK, REJECT, Mark(0), Mark(0x4000, 0x4000))[n % 4] if spec.skbinfo else None
        for n, entry in enumerate(entries_of(spec))
    }
    assert sets.create(spec) is True
    assert sets.states() == {"s": SetState(spec, 0, 0)}
    assert sets.members(spec) == {}
    assert sets.add(spec, wanted) == ()
    assert sets.members(spec) == wanted
    assert sets.states() == {"s": SetState(spec, len(wanted), 0)}
    gone = list(wanted)[::2]
    assert sets.delete(spec, gone) == ()
    assert sets.members(spec) == {entry: mark for entry, mark in wanted.items() if entry not in gone}


def test_sizes(sets):
    assert sets.create(SetSpec("small", "hash:ip", max_entries=2))
    assert sets.create(SetSpec("large", "hash:ip", max_entries=1 << 20), hash_size=1 << 16)
    assert {name: state.spec.max_entries for name, state in sets.states().items()} == {
        "small": 2,
        "large": 1 << 20,
    }


def test_a_name_is_taken_by_any_set(sets):
    assert sets.create(spec_of("hash:ip")) is True
    assert sets.create(spec_of("hash:ip")) is False
    assert sets.create(spec_of("hash:net")) is False
    assert sets.states()["s"].spec == spec_of("hash:ip")


@pytest.mark.parametrize("name", ["", "n" * 32])
def test_a_name_has_its_length(sets, name):
    with pytest.raises(ValueError):
        sets.create(SetSpec(name, "hash:ip"))
    assert sets.states() == {}


def test_destroying(sets):
    sets.create(spec_of("hash:ip"))
    sets.add(spec_of("hash:ip"), {Entry("10.0.0.1"): None})
    assert (sets.destroy("s"), sets.destroy("s"), sets.states()) == (True, False, {})


def test_what_is_there_already_is_written_anew(sets):
    spec = spec_of("hash:ip,port", skbinfo=True)
    sets.create(spec)
    one, two = entries_of(spec)[:2]
    sets.add(spec, {one: MARK})
    assert sets.add(spec, {one: REJECT, two: MARK}) == ()
    assert sets.members(spec) == {one: REJECT, two: MARK}
    assert sets.add(spec, {one: None}) == ()
    assert sets.delete(spec, [two, two]) == ()
    assert sets.members(spec) == {one: None}


def test_refused_entries_are_named_and_the_others_hold(sets):
    spec = spec_of("hash:ip", skbinfo=True)
    sets.create(spec)
    entries = [Entry(f"10.0.{n >> 8}.{n & 255}") for n in range(2000)]
    there = {*entries[::97], *entries[1000:1100]}
    assert sets.add(spec, dict.fromkeys(sorted(there), REJECT)) == ()
    refused = sets.add(spec, dict.fromkeys(entries, MARK), exclusive=True)
    assert refused == tuple(EntryRefusal(entry, EXIST, True) for entry in entries if entry in there)
    assert {refusal.reason for refusal in refused} == {"exists"}
    assert sets.members(spec) == {entry: REJECT if entry in there else MARK for entry in entries}
    sets.delete(spec, there)
    refused = sets.delete(spec, entries, exclusive=True)
    assert refused == tuple(EntryRefusal(entry, EXIST, False) for entry in entries if entry in there)
    assert {refusal.reason for refusal in refused} == {"missing"}
    assert sets.members(spec) == {}


@pytest.mark.root
@pytest.mark.parametrize("every", [1, 2, 10, 1000])
def test_refusals_cost_little_however_many_they_are(namespace, monkeypatch, every):
    sets, spec = Inside(namespace, NetlinkSets), spec_of("hash:ip")
    sets.create(spec)
    entries = [Entry(f"10.0.{n >> 8}.{n & 255}") for n in range(2000)]
    sets.add(spec, dict.fromkeys(entries[::every]))
    sent = []

    def change(name, packed, real=setwire.change):
        sent.append(len(packed))
        return real(name, packed)

    monkeypatch.setattr(setwire, "change", change)
    assert len(sets.add(spec, dict.fromkeys(entries), exclusive=True)) == len(entries[::every])
    assert sum(sent) <= 3 * len(entries)
    sets.close()


def test_a_full_set_refuses_what_is_too_much(sets):
    spec = SetSpec("s", "hash:ip", max_entries=2)
    sets.create(spec)
    one, two, three = entries = [Entry(f"10.0.0.{n}") for n in (1, 2, 3)]
    (refusal,) = sets.add(spec, dict.fromkeys(entries))
    assert (refusal, refusal.reason) == (EntryRefusal(three, FULL, True), "full")
    assert sets.members(spec) == {one: None, two: None}


@pytest.mark.parametrize("kind", ["hash:net", "hash:ip,port,net"])
@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_a_network_of_all_addresses_goes_in_by_halves(sets, kind, family):
    spec = spec_of(kind, family)
    sets.create(spec)
    everything = "::/0" if family == "IPv6" else "0.0.0.0/0"
    host = everything[:-2]

    def entry(network: str) -> Entry:
        return Entry(network) if kind == "hash:net" else Entry(host, "TCP", 80, network)

    assert sets.add(spec, {entry(everything): None}) == (EntryRefusal(entry(everything), INVALID_CIDR, True),)
    assert sets.add(spec, {entry(half): None for half in halves(everything)}) == ()
    assert len(sets.members(spec)) == 2
    assert halves("10.0.0.0/8") == ("10.0.0.0/8",)


def test_a_mark_needs_a_set_for_marks(sets):
    spec = spec_of("hash:ip")
    sets.create(spec)
    assert sets.add(spec, {Entry("10.0.0.1"): MARK, Entry("10.0.0.2"): None}) == (
        EntryRefusal(Entry("10.0.0.1"), NO_SKBINFO, True),
    )
    assert sets.members(spec) == {Entry("10.0.0.2"): None}


def test_sets_change_places(sets):
    old, new = SetSpec("old", "hash:ip", skbinfo=True), SetSpec("new", "hash:ip", max_entries=9)
    one, two = Entry("10.0.0.1"), Entry("10.0.0.2")
    sets.create(old)
    sets.create(new)
    sets.add(old, {one: MARK})
    sets.add(new, {two: None})
    sets.swap("old", "new")
    assert (sets.members(old), sets.members(new)) == ({two: None}, {one: MARK})
    states = sets.states()
    assert states["old"].spec == SetSpec("old", "hash:ip", max_entries=9)
    assert states["new"].spec == SetSpec("new", "hash:ip", skbinfo=True)


def test_sets_of_another_kind_or_none_do_not_change_places(sets):
    sets.create(SetSpec("a", "hash:ip"))
    sets.create(SetSpec("b", "hash:net"))
    sets.create(SetSpec("c", "hash:ip", "IPv6"))
    for first, second, number in (
        ("a", "b", TYPE_MISMATCH),
        ("a", "c", TYPE_MISMATCH),
        ("none", "a", errno.ENOENT),
        ("a", "none", SECOND_MISSING),
    ):
        with pytest.raises(KernelError) as caught:
            sets.swap(first, second)
        assert caught.value.errno == number


def test_a_set_that_is_not_there(sets):
    spec = spec_of("hash:ip")
    for method, arguments in (("add", {Entry("10.0.0.1"): None}), ("delete", [Entry("10.0.0.1")])):
        with pytest.raises(KernelError) as caught:
            getattr(sets, method)(spec, arguments)
        assert caught.value.errno == errno.ENOENT


def test_lines_are_ipsets():
    assert line("s", Entry("10.0.0.1", "TCP", 80), MARK) == "add s 10.0.0.1,tcp:80 skbmark 0x48000001"
    assert line("s", Entry("fd00::1", "UDP", 53, "fd00::/64")) == "add s fd00::1,udp:53,fd00::/64"
    assert line("s", Entry(port=80), Mark(1, 3)) == "add s 80 skbmark 0x1/0x3"
    assert str(bitmap("s", skbinfo=True)) == "create s bitmap:port range 0-65535 skbinfo"


@pytest.mark.parametrize(
    ("spec", "entry"),
    [
        (spec_of("hash:ip"), Entry("fd00::1")),
        (spec_of("hash:ip"), Entry()),
        (spec_of("hash:ip", "IPv6"), Entry("10.0.0.1")),
        (spec_of("hash:net"), Entry("10.0.0.1")),
        (spec_of("hash:ip,port"), Entry("10.0.0.1")),
        (spec_of("hash:ip,port"), Entry("10.0.0.1", "TCP", 65536)),
        (spec_of("hash:ip,port,ip"), Entry("10.0.0.1", "TCP", 80)),
        (spec_of("bitmap:port"), Entry(port=-1)),
    ],
)
def test_an_entry_of_another_kind_leaves_nothing_done(sets, spec, entry):
    sets.create(spec)
    with pytest.raises(ValueError):
        sets.add(spec, dict.fromkeys([*entries_of(spec)[:1], entry]))
    with pytest.raises(ValueError):
        sets.delete(spec, [entry])
    assert sets.members(spec) == {}


def test_a_set_in_use_stays_in_memory():
    sets = FakeSets()
    sets.create(spec_of("hash:ip"))
    sets.references["s"] = 1
    with pytest.raises(KernelError) as caught:
        sets.destroy("s")
    assert (caught.value.errno, sets.states()["s"].references) == (BUSY, 1)


def lines_of(namespace: Namespace) -> list[str]:
    """What `ipset` says of all sets, without what differs from set to set by chance."""
    saved = namespace.run(["ipset", "save", "-sorted"]).stdout.splitlines()
    return [text.partition(" bucketsize ")[0] for text in saved]


@pytest.mark.root
@pytest.mark.parametrize("spec", SHAPES, ids=str)
def test_batch_pyroute2_and_ipset_leave_the_same_in_the_kernel(spec):
    wanted = {entry: MARK if spec.skbinfo else None for entry in entries_of(spec)}
    found = []
    for make in (NetlinkSets, PlainSets):
        with Namespace("sets") as namespace:
            inside = Inside(namespace, make)
            inside.create(spec)
            assert inside.add(spec, wanted) == ()
            found.append((lines_of(namespace), inside.members(spec), inside.states()))
            inside.close()
    with Namespace("sets") as namespace:
        text = "\n".join([str(spec), *(line(spec.name, entry, mark) for entry, mark in wanted.items()), ""])
        namespace.run(["ipset", "restore"], stdin=text)
        inside = Inside(namespace, NetlinkSets)
        found.append((lines_of(namespace), inside.members(spec), inside.states()))
        inside.close()
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) == 1 + len(wanted)


@pytest.mark.root
def test_a_set_in_use_stays(namespace):
    sets = Inside(namespace, NetlinkSets)
    sets.create(spec_of("hash:ip"))
    namespace.run(["ipset", "create", "list", "list:set"])
    namespace.run(["ipset", "add", "list", "s"])
    with pytest.raises(KernelError) as caught:
        sets.destroy("s")
    assert (caught.value.errno, sets.states()["s"].references) == (BUSY, 1)
    assert sets.states()["list"].spec.kind == "list:set"
    sets.close()


@pytest.mark.root
def test_many_entries(namespace):
    sets = Inside(namespace, NetlinkSets)
    spec = SetSpec("s", "hash:ip,port", "IPv6", True, 1 << 17)
    sets.create(spec)
    wanted = {Entry(f"fd00::{n:x}", "TCP", 1 + n % 60000): Mark(n) for n in range(1, 20001)}
    assert sets.add(spec, wanted) == ()
    assert sets.members(spec) == wanted
    assert sets.delete(spec, list(wanted)[1:], exclusive=True) == ()
    assert len(sets.members(spec)) == 1
    sets.close()
