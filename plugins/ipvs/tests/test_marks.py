"""The bits of the mark: none has two meanings, and what is composed can be taken apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxycore.api import PoolName
from proxycore_ipvs.marks import REJECTED, Marks, Parts, gathered, spread

MARKS = Marks()
_PARTS = st.builds(
    Parts,
    number=st.integers(1, (1 << 18) - 1),
    pool=st.sampled_from(PoolName),
    masquerade=st.booleans(),
    masquerade_others=st.booleans(),
    short=st.booleans(),
    dropped=st.booleans(),
    port_class=st.integers(0, 15),
    reject=st.just(False),
)
_LAYOUTS = st.integers(0, 31).filter(lambda bit: bit != 15).map(Marks.with_masquerade_bit)


@given(_LAYOUTS, _PARTS)
def test_what_is_composed_can_be_taken_apart(marks, parts):
    value = marks.compose(parts)
    assert value & marks.ours
    assert not value & marks.reject
    assert marks.take_apart(value) == parts
    assert marks.server_of(marks.server(parts.number, parts.pool)) == (parts.number, parts.pool)
    assert marks.take_apart(marks.compose(REJECTED)) == REJECTED


@given(_LAYOUTS)
def test_bits_do_not_overlap_wherever_the_masquerade_bit_is(marks):
    masks = list(marks.masks().values())
    assert sum(masks) == sum(mask.bit_count() and mask for mask in masks)
    assert sum(mask.bit_count() for mask in masks) == (sum(masks)).bit_count()
    assert marks.server_mask < 0x80000000
    assert not marks.number & (0x8000 | marks.masquerade)


@given(_LAYOUTS, st.integers(0, 0xFFFFFFFF))
def test_a_mark_that_is_not_ours_is_not_taken_for_ours(marks, mark):
    parts = marks.take_apart(mark)
    if parts is not None:
        assert marks.compose(parts) == mark
    server = marks.server_of(mark)
    if server is not None:
        assert marks.server(*server) == mark


def test_the_usual_layout():
    assert MARKS.server(1, PoolName.CLUSTER) == 0x40000001
    assert MARKS.server((1 << 18) - 1, PoolName.LOCAL) == 0x500F3FFF
    assert MARKS.server_mask == 0x500F3FFF
    assert MARKS.transient == 0x0CF04000
    assert MARKS.remembered == 0x40F04000
    assert MARKS.compose_class(1) == 0x40100000
    assert MARKS.server_of(0x40000000) is None
    assert len(MARKS.numbers) == (1 << 18) - 1


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"masquerade": 0x1}, "number: 0x1 has another meaning already"),
        ({"ours": 0x60000000}, "ours: 0x60000000 has 2 bits, it takes 1"),
        ({"number": 0x77FFF}, "number: 0x4000 has another meaning already"),
        ({"number": 0x0007BFFF}, "number: 0x8000 is the kubelet's"),
        ({"number": 0x3FFF}, "number: 0x3fff has 14 bits, it takes 18"),
        ({"ours": 0x80000000, "reject": 0x40000000}, "ours: marks of servers have to be below 0x80000000"),
        ({"short": 0}, "short: 0x0 is not in"),
        ({"reject": 0x100000000}, "reject: 0x100000000 is not in"),
    ],
)
def test_a_layout_that_cannot_work_is_refused(changed, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        Marks(**changed)
    assert str(caught.value).startswith("mark bits ")


def test_bits_of_others_are_found():
    assert MARKS.overlaps({"Calico": 0xFFFF0000, "kubelet": 0x8000, "Cilium": 0x0F00}) == (
        "Calico uses mark bits 0xffff0000, among them ours 0x40000000 (ours), 0x80000000 (reject), "
        "0x20000000 (dropped), 0x10000000 (local), 0x8000000 (masquerade_others), 0x4000000 (short), "
        "0xf00000 (port_class), 0xf0000 (number)",
        "Cilium uses mark bits 0xf00, among them ours 0xf00 (number)",
    )


def test_numbers_have_to_fit():
    with pytest.raises(ValueError, match="has no room"):
        MARKS.server(1 << 18, PoolName.CLUSTER)
    with pytest.raises(ValueError, match="not the number of a Service port"):
        MARKS.server(0, PoolName.CLUSTER)
    with pytest.raises(ValueError, match="class"):
        MARKS.compose_class(16)


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF))
def test_spreading_is_undone_by_gathering(number, mask):
    number &= (1 << mask.bit_count()) - 1
    assert gathered(spread(number, mask), mask) == number
    assert spread(number, mask) & ~mask == 0
