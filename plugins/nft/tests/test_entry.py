"""One Service port as elements: slots, handles, comments."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxycore.api import FrontendKind, WhenEmpty
from proxycore.testing.states import (
    EXTERNAL_LOCAL,
    endpoint,
    frontend,
    name_of,
    node_port,
    numbered,
    pool,
    service,
)
from proxycore_nft import encode, entry, layout
from proxycore_nft.entry import TooMany, build, keep_in_place, safe_comment
from proxycore_nft.kernel import parse_element

TARGETS = st.lists(st.sampled_from([bytes([65 + n]) for n in range(8)]), max_size=12)


@given(TARGETS, TARGETS)
def test_slots_hold_what_is_wanted_and_as_few_as_possible_change(old, wanted):
    slots = keep_in_place(old, wanted)
    assert Counter(slots) == Counter(wanted)
    changed = sum(before != after for before, after in zip(old, slots, strict=False))
    assert changed == _fewest_changes(old, wanted)


def _fewest_changes(old: list[bytes], wanted: list[bytes]) -> int:
    """Of the slots that remain, those whose endpoint is not wanted (so often) any more: no order can keep more."""
    common = min(len(old), len(wanted))
    return common - (Counter(old[:common]) & Counter(wanted)).total()


@given(st.lists(st.binary(min_size=1, max_size=2), unique=True, max_size=12), st.data())
def test_taking_one_endpoint_away_rewrites_at_most_one_slot(old, data):
    if not old:
        return
    gone = data.draw(st.sampled_from(old))
    slots = keep_in_place(old, [target for target in old if target != gone])
    assert sum(a != b for a, b in zip(slots, old, strict=False)) <= 1


def test_an_endpoint_of_weight_three_stands_three_times():
    state = service(
        name_of(),
        frontend("172.30.0.1"),
        cluster=pool(endpoint("10.0.0.1:80", weight=3), endpoint("10.0.0.2:80")),
    )
    made = build(state, 70000, None)
    heavy, light = layout.target_bytes("10.0.0.1", 80), layout.target_bytes("10.0.0.2", 80)
    assert made.cluster is not None
    assert Counter(made.cluster.targets) == {heavy: 3, light: 1}


def test_endpoints_with_different_ports_keep_theirs():
    state = service(name_of(), frontend("172.30.0.1"), cluster=["10.0.0.1:80", "10.0.0.2:8080"])
    made = build(state, 70000, None)
    assert made.cluster is not None
    assert set(made.cluster.targets) == {
        layout.target_bytes("10.0.0.1", 80),
        layout.target_bytes("10.0.0.2", 8080),
    }


# -- handles --


def _handles(item: entry.Entry) -> dict[bytes, int]:
    assert item.cluster is not None
    return dict(zip(item.cluster.targets, item.cluster.handles, strict=True))


def test_a_handle_names_the_index_and_stays_with_its_endpoint():
    first = build(numbered(1, 3, affinity=10), 5, None)
    assert {handle & layout.STICKY_MASK for handle in _handles(first).values()} == {5}
    second = build(numbered(1, 5, affinity=10), 5, first)
    assert _handles(second).items() >= _handles(first).items()
    assert len(set(_handles(second).values())) == 5


def test_a_removed_endpoints_handle_is_not_given_again_for_65535_endpoints():
    made = build(numbered(1, 1, affinity=10), 5, None)
    seen: list[int] = []
    for turn in range(1, 200):
        seen.extend(_handles(made).values())
        made = build(numbered(1, 1, affinity=10, first=turn % 2 * 100), 5, made)
    assert len(seen) == len(set(seen))


def test_ordinals_come_round_and_pass_over_those_in_use():
    made = build(numbered(1, 2, affinity=10), 5, None)
    near_the_end = entry.Entry(
        **{name: getattr(made, name) for name in made.__struct_fields__ if name != "last_ordinal"},
        last_ordinal=layout.ORDINAL_MAX,
    )
    grown = build(numbered(1, 3, affinity=10), 5, near_the_end)
    ordinals = sorted(handle >> layout.ORDINAL_SHIFT for handle in _handles(grown).values())
    # 1 and 2 are in use, and 0 is never given: a handle of 0 would be index 0's.
    assert ordinals == [1, 2, 3]


def test_one_endpoint_in_both_pools_has_one_handle():
    state = service(
        name_of(),
        frontend("192.0.2.1", kind=FrontendKind.LOAD_BALANCER_IP, routes=EXTERNAL_LOCAL),
        cluster=["10.0.0.1:80", "10.0.0.2:80"],
        local=pool(endpoint("10.0.0.2:80", local=True)),
        affinity=10,
    )
    made = build(state, 5, None)
    assert made.local is not None
    assert made.local.handles == (_handles(made)[layout.target_bytes("10.0.0.2", 80)],)


def test_affinity_that_comes_with_a_new_index_starts_afresh():
    before = build(numbered(1, 2), 70000, None)
    after = build(numbered(1, 2, affinity=10), 5, before)
    assert {handle & layout.STICKY_MASK for handle in _handles(after).values()} == {5}
    gone = build(numbered(1, 2), 70001, after)
    assert gone.cluster is not None
    assert gone.cluster.handles == ()


def test_too_many_endpoints_in_a_pool_are_refused_by_number(monkeypatch):
    monkeypatch.setattr(layout, "POOL_MAX", 3)
    build(numbered(1, 3), 70000, None)
    with pytest.raises(TooMany, match="4 endpoints in one pool; the nft backend holds 3"):
        build(numbered(1, 4), 70000, None)


def test_too_many_endpoints_with_affinity_are_refused(monkeypatch):
    monkeypatch.setattr(layout, "ORDINAL_MAX", 3)
    with pytest.raises(TooMany, match="with affinity in one Service port"):
        build(numbered(1, 4, affinity=10), 5, None)


# -- what is taken from a state --


def test_only_endpoints_that_may_be_here_are_hairpins():
    state = service(
        name_of(),
        frontend("172.30.0.1"),
        cluster=pool(
            endpoint("10.0.0.1:80", local=True),
            endpoint("10.0.0.2:80", node=None),
            endpoint("10.0.0.3:80", node="far"),
        ),
    )
    assert build(state, 70000, None).hairpin == {
        layout.address_bytes("10.0.0.1"),
        layout.address_bytes("10.0.0.2"),
    }


def test_an_empty_pool_says_what_clients_get():
    for when_empty, number in ((WhenEmpty.REJECT, layout.REJECT), (WhenEmpty.DROP, layout.DROP)):
        state = service(name_of(), frontend("172.30.0.1"), cluster=pool(when_empty=when_empty))
        made = build(state, 70000, None)
        assert made.cluster == entry.Slots((), (), number)


def test_only_cluster_ips_are_cluster_ips():
    made = build(
        service(
            name_of(),
            frontend("172.30.0.1"),
            frontend("192.0.2.1", kind=FrontendKind.EXTERNAL_IP),
            frontend("192.0.2.2", kind=FrontendKind.LOAD_BALANCER_IP),
            node_port(30080),
        ),
        70000,
        None,
    )
    assert made.cluster_ips == (layout.address_bytes("172.30.0.1"),)
    assert len(made.frontends) == 3
    assert made.node_ports == ((layout.node_port_key("TCP", 30080), made.frontends[0][1]),)


def test_source_ranges_that_overlap_are_merged():
    ranges = ["10.0.0.0/8", "10.1.0.0/16", "192.0.2.0/25", "192.0.2.128/25", "198.51.100.7/32"]
    made = build(
        service(name_of(), frontend("192.0.2.1", kind=FrontendKind.LOAD_BALANCER_IP, source_ranges=ranges)),
        70000,
        None,
    )
    [(key, found)] = made.firewall
    shown = [(first[len(key) :], last[len(key) :]) for first, last in found]
    assert shown == [
        (bytes([10, 0, 0, 0]), bytes([10, 255, 255, 255])),
        (bytes([192, 0, 2, 0]), bytes([192, 0, 2, 255])),
        (bytes([198, 51, 100, 7]), bytes([198, 51, 100, 7])),
    ]


def test_no_admitted_source_is_not_the_same_as_all_are_admitted():
    admit_all = build(service(name_of(), frontend("192.0.2.1")), 70000, None)
    admit_none = build(service(name_of(), frontend("192.0.2.1", source_ranges=[])), 70000, None)
    assert admit_all.firewall == ()
    assert admit_none.firewall == ((layout.frontend_key("192.0.2.1", "TCP", 80), ()),)


# -- comments --

HOSTILE = [
    'a"b',
    "line\nbreak",
    "nul\0byte",
    "back\\slash",
    "{ } ; # $include",
    "ünïcödé-服务",
    "x" * 253,
    "\x1b[31m",
    "'; flush ruleset",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_name_becomes_a_harmless_comment(text):
    _assert_harmless(safe_comment(text))


@given(st.text())
def test_every_name_becomes_a_harmless_comment(text):
    _assert_harmless(safe_comment(text))


def _assert_harmless(shown: str) -> None:
    assert len(shown.encode()) <= 120
    assert shown.isascii()
    assert shown.isprintable()
    assert not set(shown) & set("\"'\\{};#$* \t")
    raw = encode.element(b"\0\0\0\1", b"\0\0\0\2", encode.comment(shown))
    parsed = parse_element(memoryview(raw)[4:])
    assert parsed.comment == shown


def test_a_usual_name_is_shown_as_it_is():
    assert safe_comment("kube-system/kube-dns:dns-tcp") == "kube-system/kube-dns:dns-tcp"
