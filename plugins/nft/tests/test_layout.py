"""Tickets, keys and classes: the bits that rules and elements must agree on."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxycore.api import Endpoint, PoolName, Route, Routes
from proxycore.testing.states import frontend
from proxycore_nft import classes, layout
from proxycore_nft.classes import Class

ROUTES = [Route(pool, masquerade) for pool in PoolName for masquerade in (False, True)]


@pytest.mark.parametrize(("pod", "node", "outside"), list(itertools.product(ROUTES, repeat=3)))
def test_a_ticket_says_what_each_client_gets(pod, node, outside):
    value = layout.ticket(
        0xABCDE, frontend("172.30.0.1", routes=Routes(local_pod=pod, node=node, outside=outside))
    )
    assert value & layout.INDEX_MASK == 0xABCDE
    for route, masquerade, local in (
        (pod, layout.MASQUERADE_POD, layout.LOCAL_POD),
        (node, layout.MASQUERADE_NODE, layout.LOCAL_NODE),
        (outside, layout.MASQUERADE_OUTSIDE, layout.LOCAL_OUTSIDE),
    ):
        assert bool(value & masquerade) == route.masquerade
        assert bool(value & local) == (route.pool is PoolName.LOCAL)
    # Which pool is taken is decided on the packet's way.
    assert not value & layout.LOCAL
    assert 0 <= value <= 0xFFFFFFFF


def test_no_two_parts_of_a_ticket_share_a_bit():
    parts = [
        layout.INDEX_MASK,
        layout.LOCAL,
        layout.MASQUERADE_POD,
        layout.MASQUERADE_NODE,
        layout.MASQUERADE_OUTSIDE,
        layout.LOCAL_POD,
        layout.LOCAL_NODE,
        layout.LOCAL_OUTSIDE,
    ]
    assert sum(parts) == _union(parts)
    assert layout.POOL_MASK == layout.INDEX_MASK | layout.LOCAL


def test_class_and_index_fill_a_pool_element():
    assert layout.CLASS_MASK & layout.INDEX_MASK == 0
    assert layout.CLASS_MASK | layout.INDEX_MASK == 0xFFFFFFFF
    assert layout.CLASS_MAX << layout.CLASS_SHIFT == layout.CLASS_MASK
    assert layout.REJECT < layout.FIRST_CLASS > layout.DROP


def test_index_and_ordinal_fill_a_handle():
    assert layout.STICKY_MASK | layout.ORDINAL_MAX << layout.ORDINAL_SHIFT == 0xFFFFFFFF


def _union(parts: list[int]) -> int:
    result = 0
    for part in parts:
        result |= part
    return result


def test_keys_are_registers_of_four_bytes():
    assert layout.frontend_key("10.0.0.1", "TCP", 80) == bytes([10, 0, 0, 1, 6, 0, 0, 0, 0, 80, 0, 0])
    assert layout.node_port_key("SCTP", 30000) == bytes([132, 0, 0, 0]) + struct.pack(">HH", 30000, 0)
    assert len(layout.frontend_key("fd00::1", "UDP", 53)) == 24
    assert layout.target_bytes("10.0.0.1", 443) == bytes([10, 0, 0, 1]) + struct.pack(">HH", 443, 0)


@given(st.lists(st.tuples(st.ip_addresses(v=6), st.integers(1, 65535)), max_size=5))
def test_many_targets_at_once_are_the_same_as_one_by_one(pairs):
    endpoints = [Endpoint(address=str(address), port=port) for address, port in pairs]
    assert layout.targets_bytes(endpoints) == [layout.target_bytes(e.address, e.port) for e in endpoints]


# -- classes --

CLASSES = st.builds(
    Class,
    size=st.integers(1, layout.POOL_MAX),
    local=st.booleans(),
    affinity_seconds=st.integers(0, 86400),
)


@given(CLASSES)
def test_a_class_is_read_back_from_its_chain(item):
    assert classes.parse_chain(item.chain) == item


@pytest.mark.parametrize(
    "name",
    [
        "services",
        "endpoints-first",
        "local-endpoints-first",
        "sticky-known-10",
        "endpoints-3-4",
        "endpoints-",
        "",
    ],
)
def test_other_chains_are_no_classes(name):
    assert classes.parse_chain(name) is None


@given(CLASSES)
def test_neighbours_differ_by_one_endpoint(item):
    near = classes.neighbours([item])
    assert near == {
        item._replace(size=size) for size in (item.size - 1, item.size + 1) if 1 <= size <= layout.POOL_MAX
    }


@pytest.mark.parametrize("family", ["ip", "ip6"])
@pytest.mark.parametrize(
    "item", [Class(1, False), Class(7, True), Class(1, False, 10), Class(9, True, 10800)]
)
def test_every_chain_that_a_class_goes_to_is_made_with_it_or_in_the_skeleton(family, item):
    made = classes.bodies(family, "T", item, 9, classes.helpers(item))
    text = "\n".join(classes.text(family, item, set()))
    chains = {line.split()[1] for line in text.splitlines() if line.startswith("chain")}
    side = "local-" if item.local else ""
    goes_to = {
        word
        for line in text.splitlines()
        for verb in ("goto ", "jump ")
        if verb in line
        for word in [line.split(verb)[1]]
    }
    assert goes_to <= chains | {f"{side}endpoints-first"}
    assert set(classes.helpers(item)) == chains - {item.chain}
    again = classes.bodies(family, "T", item._replace(size=item.size + 1), 10, ())
    # Only the class's own chain and element: helpers are shared.
    assert len(again) < len(made) or not item.affinity_seconds
