"""Shared chains: rows, trees, what a batch changes; and edits of a chain."""

from __future__ import annotations

import ipaddress
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxycore.kubechains import TREE
from proxycore_iptables.dispatch import INLINE, LEVELS, Shared, edit, node_name
from proxycore_iptables.rules import SERVICES, Entry

ROOT = SERVICES.chain
TAIL = ("-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS",)


def entry(address, port=80, owner="ns/s:p", turn=0):
    """A rule for an address, or for a node port when it is empty."""
    packed = ipaddress.ip_address(address).packed if address else b""
    to = f"-d {address}/{8 * len(packed)} " if address else ""
    return Entry(packed, port, "tcp", owner, turn, f"{to}-p tcp -m tcp --dport {port} -j KUBE-{owner}-{turn}")


def shared(entries=(), tree_from=5, tail=TAIL):
    made = Shared(SERVICES, tail, tree_from)
    made.change((), entries)
    return made


def rules(*entries):
    return tuple(entry.rule for entry in entries)


# What chains hold


def test_a_row_is_in_order_and_ends_with_the_tail():
    a, b, c = entry("10.96.0.9"), entry("10.96.0.10"), entry("10.96.0.10", 443)
    plain = entry("", 30000)
    made = shared([c, plain, b, a])
    assert made.chains() == {ROOT: rules(plain, a, b, c) + TAIL}
    assert len(made) == 4


def test_same_frontends_stand_by_owner_and_turn():
    entries = [entry("10.0.0.1", owner=owner, turn=turn) for owner in ("a/a:", "b/a:") for turn in (0, 1, 2)]
    assert shared(reversed(entries), tree_from=None).chains()[ROOT] == rules(*entries) + TAIL


def test_few_entries_of_a_range_stand_in_the_chain_above():
    near = [entry(f"10.96.0.{n}") for n in range(1, 6)]
    far = [entry("203.0.113.1", port) for port in (80, 443)]
    assert shared(near + far).chains() == {
        node_name(near[0].address, 7): rules(*near),
        ROOT: ("-d 10.96.0.0/28 -j KUBE-SVC-TREE.0a600000.28", *rules(*far), *TAIL),
    }


def test_ranges_nest_and_skip_what_all_have_in_common():
    entries = [entry(f"10.96.{net}.{n}") for net in (0, 16) for n in range(1, 6)]
    chains = shared(entries).chains()
    assert list(chains) == [
        "KUBE-SVC-TREE.0a600000.28",
        "KUBE-SVC-TREE.0a601000.28",
        "KUBE-SVC-TREE.0a600000.16",
        ROOT,
    ]
    assert chains["KUBE-SVC-TREE.0a600000.16"] == (
        "-d 10.96.0.0/28 -j KUBE-SVC-TREE.0a600000.28",
        "-d 10.96.16.0/28 -j KUBE-SVC-TREE.0a601000.28",
    )
    assert chains[ROOT] == ("-d 10.96.0.0/16 -j KUBE-SVC-TREE.0a600000.16", *TAIL)


def test_many_ports_of_one_address_are_a_row_of_their_own():
    entries = [entry("10.96.0.1", port) for port in range(1, 8)]
    chains = shared(entries).chains()
    assert chains == {
        "KUBE-SVC-TREE.0a600001.32": rules(*entries),
        ROOT: ("-d 10.96.0.1/32 -j KUBE-SVC-TREE.0a600001.32", *TAIL),
    }


@pytest.mark.parametrize("count", [4, 5, 6])
def test_the_number_of_entries_with_an_address_alone_decides_for_the_tree(count):
    entries = [entry(f"10.96.0.{n}") for n in range(1, count + 1)]
    plain = [entry("", port) for port in range(1, 6)]
    assert (len(shared(entries + plain).chains()) > 1) == (count >= 5)
    assert len(shared(entries, tree_from=None).chains()) == 1


def test_names_are_short_enough_and_differ():
    address = ipaddress.ip_address("fd00:10:96::a:1").packed
    names = {node_name(address, digits) for digits in range(1, 33)}
    assert len(names) == 32
    assert all(re.fullmatch(r"KUBE-SVC-TREE\.[A-Z2-7]{14}", name) for name in names)
    assert max(map(len, names)) == 28
    assert node_name(address, 8) == node_name(ipaddress.ip_address("fd00:10:ffff::").packed, 8)


def test_addresses_in_ipv6_stop_at_the_deepest_level_allowed():
    # Each address leaves the common prefix one digit later than the one before, with enough neighbours for a chain.
    entries = []
    for depth in range(2, 30):
        base = (0xFD << 120) | (1 << (124 - 4 * depth))
        entries += [entry(str(ipaddress.IPv6Address(base)), port) for port in range(1, INLINE + 2)]
    chains = shared(entries).chains()
    assert _depth(chains, ROOT) == LEVELS
    assert sorted(_reached(chains)) == sorted(rules(*entries) + TAIL)


def test_prefixes_that_the_c_library_prints_in_another_way():
    entries = [entry(f"::ffff:10.0.0.{n}") for n in range(1, 7)]
    assert "-d ::ffff:10.0.0.0/124 -j " in shared(entries).chains()[ROOT][0]


def _depth(chains, name):
    """How many chains lie below one, one below the other."""
    below = [rule.rpartition(" ")[2] for rule in chains[name] if TREE in rule]
    return 0 if not below else 1 + max(_depth(chains, name) for name in below)


def _reached(chains, name=ROOT, inside="::/0"):
    """The rules of entries in the order in which a packet meets them; every prefix must lie within that above it."""
    for text in chains[name]:
        match = re.fullmatch(r"-d (\S+) -j (KUBE-SVC-TREE\.\S+)", text)
        if not match:
            yield text
            continue
        prefix = ipaddress.ip_network(match[1])
        if inside != "::/0":
            assert prefix.subnet_of(ipaddress.ip_network(inside))
        for below in _reached(chains, match[2], match[1]):
            assert ipaddress.ip_network(re.match(r"-d (\S+)", below)[1]).subnet_of(prefix)
            yield below


# What a batch changes


def test_everything_is_pending_at_first_and_nothing_after():
    made = shared([entry(f"10.96.0.{n}") for n in range(1, 7)])
    assert made.pending() == {name: (None, rules) for name, rules in made.chains().items()}
    made.accept()
    assert made.pending() == {}


def test_a_change_that_changes_nothing_has_nothing_rendered(monkeypatch):
    made = shared([entry(f"10.96.0.{n}") for n in range(1, 7)])
    made.accept()
    monkeypatch.setattr(Shared, "_rendered", lambda *_: pytest.fail("rendered for nothing"))
    made.change((), ())
    assert made.pending() == {}
    made.change([entry("10.96.0.1")], [entry("10.96.0.1")])
    assert made.pending() == {}


def test_nodes_come_before_the_chain_that_jumps_there_and_go_after_it():
    made = shared([entry(f"10.96.0.{n}") for n in range(1, 5)])
    assert list(made.pending()) == [ROOT]
    made.accept()
    made.change((), [entry("10.96.0.5")])
    assert list(made.pending()) == ["KUBE-SVC-TREE.0a600000.28", ROOT]
    made.accept()
    made.change([entry("10.96.0.1")], ())
    pending = made.pending()
    assert list(pending) == [ROOT, "KUBE-SVC-TREE.0a600000.28"]
    assert pending["KUBE-SVC-TREE.0a600000.28"][1] is None


def test_a_batch_that_is_given_up_leaves_no_trace():
    made = shared([entry(f"10.96.0.{n}") for n in range(1, 7)])
    made.accept()
    before = made.chains()
    made.change([entry("10.96.0.1")], [entry("10.1.0.1")])
    made.give_up()
    assert made.chains() == before
    assert made.pending() == {}


def test_a_first_batch_that_is_given_up_leaves_an_empty_chain():
    made = shared([entry("10.96.0.1")])
    made.give_up()
    assert made.chains() == {ROOT: TAIL}
    assert made.pending() == {ROOT: (None, TAIL)}


@pytest.mark.parametrize("tree_from", [None, 2, 100])
def test_an_entry_too_much_or_too_few_is_an_error_that_changes_nothing(tree_from):
    held = [entry(f"10.96.{n}.1") for n in range(6)]
    made = shared(held, tree_from)
    before = made.chains()
    for removed, added in (
        ([entry("10.96.0.2")], []),
        ([entry("10.97.0.1")], []),
        ([], [held[3]]),
        ([held[0]], [held[1]]),
    ):
        with pytest.raises(KeyError):
            made.change(removed, added)
        assert made.chains() == before
    made.change([held[0]], [held[0]])
    assert made.chains() == before


def test_one_change_among_many_touches_the_chains_above_it_alone():
    made = shared([entry(f"10.{96 + n // 65536}.{n // 256 % 256}.{n % 256}") for n in range(0, 150_000, 10)])
    made.accept()
    made.change((), [entry("10.97.3.3")])
    pending = made.pending()
    assert [name.rpartition(".")[2] for name in pending] == ["24"]
    ((before, after),) = pending.values()
    assert len(after) == len(before) + 1
    # Not even looked at are all others, also when the whole tree gets a chain above it.
    made.change((), [entry("10.1.0.1")])
    looked_at = made._rendered(made._wanted, made._accepted)
    assert len(looked_at) < 12
    assert len(made.chains()) > 500


ADDRESSES = [
    *(f"10.96.0.{n}" for n in range(12)),
    *(f"10.96.{n}.1" for n in range(0, 128, 24)),
    "10.1.0.1",
    "10.96.0.200",
    "203.0.113.1",
    "",
]
DEEP = [str(ipaddress.IPv6Address((0xFD << 120) | (1 << (124 - 4 * depth)))) for depth in range(2, 26)]


class Batches(RuleBasedStateMachine):
    """Whatever batches came, were accepted or given up: the chains are those of the set of entries."""

    pool = tuple(entry(address, port) for address in ADDRESSES for port in (80, 443, 8080))
    tree_from = 5

    def __init__(self):
        super().__init__()
        self.made = Shared(SERVICES, TAIL, self.tree_from)
        self.entries = set()
        self.kept = set()
        self.live = {}

    @rule(data=st.data(), size=st.integers(1, 20))
    def change(self, data, size):
        picked = data.draw(st.lists(st.sampled_from(self.pool), max_size=size, unique=True))
        removed = self.entries & set(picked)
        self.made.change(removed, set(picked) - removed)
        self.entries = self.entries ^ set(picked)

    @precondition(lambda self: self.entries)
    @rule()
    def clear(self):
        self.made.change(self.entries, ())
        self.entries = set()

    @rule()
    def write_and_accept(self):
        for name, (before, after) in self.made.pending().items():
            assert self.live.get(name) == before != after
            if after is None:
                assert not any(text.endswith(f"-j {name}") for rules in self.live.values() for text in rules)
                del self.live[name]
            else:
                self.live[name] = after
                assert _targets(after) <= self.live.keys()
        self.made.accept()
        self.kept = set(self.entries)
        assert self.live == self.made.chains()
        assert self.made.pending() == {}

    @rule()
    def give_up(self):
        self.made.give_up()
        self.entries = set(self.kept)

    @invariant()
    def equals_what_would_be_built_anew(self):
        assert self.made.chains() == shared(self.entries, self.tree_from).chains()
        assert len(self.made) == len(self.entries)

    @invariant()
    def every_entry_is_reached_once_and_in_order(self):
        assert tuple(_reached(self.made.chains())) == rules(*sorted(self.entries)) + TAIL


def _targets(rules):
    """The nodes that rules jump to."""
    return {text.rpartition(" ")[2] for text in rules if TREE in text}


class DeepBatches(Batches):
    """The same where levels run out."""

    pool = tuple(entry(address, port) for address in DEEP for port in range(1, 7))


TestBatches = Batches.TestCase
TestDeepBatches = DeepBatches.TestCase
for case in (TestBatches, TestDeepBatches):
    case.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


# Edits


def applied(before, lines, chain="C"):
    """What a chain holds after lines of restore input."""
    held = list(before)
    for line in lines:
        action, name, rest = line.split(" ", 2)
        assert name == chain
        if action == "-D":
            held.remove(rest)
        elif action == "-A":
            held.append(rest)
        else:
            place, text = rest.split(" ", 1)
            assert 1 <= int(place) <= len(held)
            held.insert(int(place) - 1, text)
    return tuple(held)


@settings(deadline=None)
@given(st.data())
def test_an_edit_does_what_a_rewrite_would(data):
    before = tuple(f"-p {n}" for n in range(data.draw(st.integers(0, 40))))
    kept = [text for text in before if data.draw(st.integers(0, 9))]
    for n in range(data.draw(st.integers(0, 8))):
        kept.insert(data.draw(st.integers(0, len(kept))), f"-j X{n}")
    lines = edit(before, tuple(kept), "C")
    if lines is not None:
        assert applied(before, lines) == tuple(kept)
        assert len(lines) == len(set(before) ^ set(kept)) <= len(kept) // 2
    else:
        assert len(kept) <= 8 or len(set(before) ^ set(kept)) > len(kept) // 2


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdefghijklmnop")), st.lists(st.sampled_from("abcdefghijklmnop")))
def test_an_edit_of_anything_is_right_or_none(before, after):
    lines = edit(tuple(before), tuple(after), "C")
    assert lines is None or applied(tuple(before), lines) == tuple(after)


MANY = tuple(f"-p {n}" for n in range(20))


def test_edits_as_text():
    assert edit(MANY, MANY, "C") == []
    assert edit(MANY, (*MANY, "-j X"), "C") == ["-A C -j X"]
    assert edit(MANY, ("-j X", *MANY), "C") == ["-I C 1 -j X"]
    assert edit(MANY, MANY[:3] + ("-j X", "-j Y") + MANY[4:], "C") == [
        "-D C -p 3",
        "-I C 4 -j X",
        "-I C 5 -j Y",
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (MANY[:8], MANY[:7]),
        (MANY, (*MANY[:10], *(f"-s {n}" for n in range(10)))),
        (MANY, (*MANY[:5], MANY[6], MANY[5], *MANY[7:])),
        ((*MANY, "-j X", "-j X"), (*MANY, "-j X")),
        (MANY, ()),
        ((), MANY),
    ],
    ids=["small", "much differs", "order", "twice", "emptied", "new"],
)
def test_a_rewrite_is_better(before, after):
    assert edit(before, after, "C") is None
