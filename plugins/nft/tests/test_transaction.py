"""A transaction's messages: order, size, and who owns which byte; and the encoding of elements."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxycore.api import LocalPodsByCIDR, LocalPodsByInterface
from proxycore.kernel.netlink import attributes, parse_attributes, text_of
from proxycore.testing.states import host, name_of
from proxycore_nft import encode
from proxycore_nft.host import host_elements
from proxycore_nft.kernel import Element, _parse_list, parse_element
from proxycore_nft.program import interval_elements
from proxycore_nft.transaction import Transaction, owner_at

NAMES = [name_of(f"s{n}") for n in range(5)]


def _elements(body: encode.Body) -> list[Element]:
    found: list[Element] = []
    _parse_list(memoryview(body.payload), found)
    return found


def test_the_order_is_rules_flushes_deletions_additions():
    transaction = Transaction()
    transaction.add("ip", "T", "pools", encode.element(b"key1", b"new1"))
    transaction.delete("ip", "T", "pools", encode.element(b"key1"))
    transaction.flush("ip", "T", "hairpin")
    transaction.rules.append(encode.new_chain("ip", "T", "endpoints-9"))
    bodies, runs = transaction.messages()
    assert [body.kind for body in bodies] == [
        encode.NEWCHAIN,
        encode.DELSETELEM,
        encode.DELSETELEM,
        encode.NEWSETELEM,
    ]
    assert 3 not in parse_attributes(bodies[1].payload)
    assert [run is not None for run in runs] == [False, False, True, True]
    assert transaction.operations == 4


@pytest.mark.parametrize("size", [4, 16, 40])
def test_elements_that_do_not_fit_one_message_are_spread_over_several(size):
    transaction = Transaction()
    count = 5000
    keys = [number.to_bytes(size, "big") for number in range(count)]
    for number, key in enumerate(keys):
        transaction.add("ip", "T", "endpoints", encode.element(key, b"data"), NAMES[number % 5])
    bodies, runs = transaction.messages()
    assert len(bodies) > 1
    for body in bodies:
        (length,) = struct.unpack_from("=H", body.payload, len(encode.set_head("T", "endpoints")))
        assert length == len(body.payload) - len(encode.set_head("T", "endpoints")) <= 65535
    assert [item.key for body in bodies for item in _elements(body)] == keys
    assert [owner for run in runs if run for owner in run.owners] == [NAMES[n % 5] for n in range(count)]
    # Messages are filled: one less would not do.
    assert (len(bodies) - 1) * encode.LIST_PAYLOAD_MAX < count * len(encode.element(keys[0], b"data")) + len(
        bodies
    ) * 100


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(10, 100))
def test_runs_hold_all_elements_and_each_fits(sizes, room):
    elements = [bytes(size) for size in sizes]
    runs = list(encode.pack_elements(elements, max(room, max(sizes, default=1))))
    assert [n for start, stop in runs for n in range(start, stop)] == list(range(len(sizes)))
    for start, stop in runs:
        assert sum(sizes[start:stop]) <= max(room, max(sizes))


def test_an_offset_of_the_kernel_leads_to_the_service():
    """Offsets count from the message's header, and point at the element's attribute."""
    transaction = Transaction()
    for number, name in enumerate(NAMES):
        note = encode.comment("x" * number * 7)
        transaction.add("ip", "T", "frontends", encode.element(bytes([number] * 12), b"data", note), name)
    [body], [run] = transaction.messages()
    assert run is not None
    message = encode.header(body.kind, 0, "ip", len(body.payload), 1) + body.payload
    for number, name in enumerate(NAMES):
        at = message.index(bytes([number] * 12))
        start = message.rindex(struct.pack("=H", 1 | encode.NESTED), 0, at - 7) - 2
        for offset in (start, at):
            assert owner_at(run, offset) == name
    assert owner_at(run, len(message)) is None
    # The names of table and set come first: a set that is not there is nobody's fault.
    assert owner_at(run, run.head - 1) is None


def test_a_batch_numbers_its_messages_and_asks_for_one_answer():
    bodies = [encode.new_chain("ip6", "T", f"c{n}") for n in range(3)]
    raw = memoryview(encode.frame(bodies, 100))
    seen = []
    while raw:
        size, kind, flags, sequence, _ = struct.unpack_from("=IHHII", raw)
        seen.append((kind & 0xFF, bool(flags & encode.F_ACK), sequence))
        raw = raw[size:]
    assert seen == [
        (encode.BATCH_BEGIN, False, 100),
        (encode.NEWCHAIN, False, 101),
        (encode.NEWCHAIN, False, 102),
        (encode.NEWCHAIN, True, 103),
        (encode.BATCH_END, False, 104),
    ]


# -- elements --


@given(st.integers(1, 10), st.integers(0, 5), st.data())
def test_the_quick_encoders_write_the_same_bytes(key_words, data_words, data):
    key = data.draw(st.binary(min_size=4 * key_words, max_size=4 * key_words))
    value = data.draw(st.binary(min_size=4 * data_words, max_size=4 * data_words))
    quick = encode.DataElements(len(key), len(value))
    note = encode.comment("default/web:http")
    assert quick.element(key, value) == encode.element(key, value)
    assert quick.element_with(key, value, note) == encode.element(key, value, note)
    assert encode.KeyElements(len(key)).element(key) == encode.element(key)


@given(
    st.lists(
        st.tuples(st.binary(min_size=8, max_size=8), st.binary(min_size=8, max_size=8)),
        min_size=1,
        max_size=9,
    )
)
def test_a_list_of_plain_elements_is_read_back(pairs):
    payload = encode.set_head("T", "endpoints") + encode.nest(3, *(encode.element(k, v) for k, v in pairs))
    found: list[Element] = []
    _parse_list(memoryview(payload), found)
    assert found == [Element(key, value) for key, value in pairs]


def test_a_list_of_mixed_elements_is_read_back():
    items = [
        encode.element(b"key1", b"dat1"),
        encode.verdict_element(b"key2", "endpoints-3"),
        encode.element(b"key3", b"dat3", encode.comment("a/b:c")),
        encode.timed_element(b"key4", b"dat4", 10000, 4000),
        encode.range_element(b"key5", b"key6"),
    ]
    found: list[Element] = []
    _parse_list(memoryview(encode.set_head("T", "x") + encode.nest(3, *items)), found)
    assert found == [
        Element(b"key1", b"dat1"),
        Element(b"key2", chain="endpoints-3"),
        Element(b"key3", b"dat3", comment="a/b:c"),
        Element(b"key4", b"dat4", timeout=10000, expiration=4000),
        Element(b"key5", key_end=b"key6"),
    ]


@pytest.mark.parametrize(
    ("first", "last", "marks"),
    [
        ("10.0.0.0", "10.255.255.255", [(bytes([10, 0, 0, 0]), 0), (bytes([11, 0, 0, 0]), 1)]),
        ("10.0.0.1", "10.0.0.1", [(bytes([10, 0, 0, 1]), 0), (bytes([10, 0, 0, 2]), 1)]),
        # After the last address there is none to mark: the interval stays open.
        ("240.0.0.0", "255.255.255.255", [(bytes([240, 0, 0, 0]), 0)]),
        ("0.0.0.0", "255.255.255.255", [(bytes(4), 0)]),
    ],
)
def test_an_interval_is_its_start_and_the_mark_after_its_end(first, last, marks):
    raw = [bytes(map(int, address.split("."))) for address in (first, last)]
    made = [parse_element(memoryview(item)[4:]) for item in interval_elements([(raw[0], raw[1])])]
    assert [(item.key, item.flags) for item in made] == marks


def test_intervals_of_the_node_are_merged_and_in_order():
    facts = host(
        service_cidrs=("172.31.0.0/16", "172.30.0.0/16", "fd00:2::/64", "10.96.0.0/12", "10.100.0.0/16"),
        detect_local=LocalPodsByCIDR(("10.0.0.0/8", "fd00::/64")),
    )
    sets = {family: host_elements(facts, family) for family in ("IPv4", "IPv6")}
    keys = [parse_element(memoryview(item)[4:]).key for item in sets["IPv4"]["service-cidrs"]]
    assert keys == [bytes(x) for x in ([10, 96, 0, 0], [10, 112, 0, 0], [172, 30, 0, 0], [172, 32, 0, 0])]
    assert len(sets["IPv6"]["service-cidrs"]) == len(sets["IPv6"]["local-pods"]) == 2
    assert len(sets["IPv4"]["node-addresses"]) == 1


def test_local_pods_by_interface_need_no_element():
    assert host_elements(host(detect_local=LocalPodsByInterface("cni0")), "IPv4")["local-pods"] == ()


def test_names_in_messages_are_terminated():
    body = encode.new_rule("ip", "T", "services", [encode.go("client")])
    found = parse_attributes(body.payload)
    assert text_of(found[2]) == "services"
    [(_, expression)] = list(attributes(found[4]))
    assert text_of(parse_attributes(expression)[1]) == "immediate"
