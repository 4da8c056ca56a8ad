"""Numbers of Service ports: given late, given back, kept over a restart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxycore.testing.states import frontend, name_of, numbered, service
from proxycore_nft import layout, program
from proxycore_nft.entry import TooMany
from proxycore_nft.program import Indexes, Stage, Table
from proxycore_nft.transaction import Transaction


def test_a_freed_index_is_given_again_only_after_all_others():
    indexes = Indexes(1, 10, "things")
    first = [indexes.take() for _ in range(4)]
    indexes.used.discard(2)
    later = [indexes.take() for _ in range(6)]
    assert first + later == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert indexes.take() == 2


def test_when_all_are_used_the_refusal_says_how_many_there_are():
    indexes = Indexes(1, 3, "Service ports with session affinity")
    for _ in range(3):
        indexes.take()
    with pytest.raises(TooMany, match="more than 3 Service ports with session affinity"):
        indexes.take()
    indexes.used.discard(2)
    assert indexes.take() == 2


@given(st.lists(st.integers(-1, 12), max_size=60))
def test_no_index_is_given_twice_at_a_time(choices):
    indexes = Indexes(1, 8, "things")
    held: list[int] = []
    for choice in choices:
        if choice < 0 or not held:
            if len(held) < 8:
                held.append(indexes.take())
        else:
            indexes.used.discard(held.pop(choice % len(held)))
        assert len(set(held)) == len(held)
        assert indexes.used == set(held)
        assert all(1 <= index <= 8 for index in held)


def test_a_claimed_index_is_not_given_to_another():
    indexes = Indexes(1, 8, "things")
    assert indexes.claim(3)
    assert not indexes.claim(3)
    assert not indexes.claim(9)
    assert not indexes.claim(0)
    assert 3 not in [indexes.take() for _ in range(7)]


def test_with_affinity_and_without_come_from_ranges_apart():
    table = Table("IPv4", "T")
    stage = Stage(table, Transaction())
    stage.put(numbered(1).name, numbered(1))
    stage.put(numbered(2).name, numbered(2, affinity=10))
    stage.finish()
    stage.commit()
    assert table.entries[numbered(1).name].index > layout.STICKY_MASK
    assert 0 < table.entries[numbered(2).name].index <= layout.STICKY_MASK


def test_rolling_back_gives_back_every_index_and_changes_nothing_else():
    table = Table("IPv4", "T")
    stage = Stage(table, Transaction())
    stage.put(numbered(1).name, numbered(1))
    stage.commit()
    before = (dict(table.entries), dict(table.classes), set(table.plain.used), set(table.sticky.used))
    refused = Stage(table, Transaction())
    refused.put(numbered(2).name, numbered(2, 5))
    refused.put(numbered(1).name, numbered(1, affinity=10))
    refused.put(numbered(3).name, numbered(3, affinity=10))
    refused.finish()
    refused.roll_back()
    assert (table.entries, table.classes, table.plain.used, table.sticky.used) == before


def test_affinity_turned_on_frees_the_old_index_once_in_force():
    table = Table("IPv4", "T")
    stage = Stage(table, Transaction())
    stage.put(numbered(1).name, numbered(1))
    stage.commit()
    old = table.entries[numbered(1).name].index
    stage = Stage(table, Transaction())
    stage.put(numbered(1).name, numbered(1, affinity=10))
    assert old in table.plain.used
    stage.commit()
    assert table.plain.used == set()
    assert table.sticky.used == {table.entries[numbered(1).name].index}


def test_a_service_that_does_not_fit_leaves_nothing_staged(monkeypatch):
    monkeypatch.setattr(layout, "POOL_MAX", 3)
    _assert_refused_without_trace(numbered(1, 4))


def test_a_service_that_no_class_is_left_for_leaves_nothing_staged(monkeypatch):
    monkeypatch.setattr(layout, "CLASS_MAX", layout.FIRST_CLASS - 1)
    _assert_refused_without_trace(numbered(1, 4))


def _assert_refused_without_trace(state) -> None:
    table = Table("IPv4", "T")
    transaction = Transaction()
    stage = Stage(table, transaction)
    with pytest.raises(TooMany):
        stage.put(state.name, state)
    assert table.plain.used == set()
    assert stage.entries == {}
    stage.finish()
    assert transaction.operations == 0


def test_a_service_that_outgrows_the_backend_keeps_its_last_state(monkeypatch):
    table = Table("IPv4", "T")
    stage = Stage(table, Transaction())
    stage.put(numbered(1).name, numbered(1, 2))
    stage.commit()
    entry = table.entries[numbered(1).name]
    monkeypatch.setattr(layout, "CLASS_MAX", layout.FIRST_CLASS)
    transaction = Transaction()
    stage = Stage(table, transaction)
    with pytest.raises(TooMany, match="different endpoint counts"):
        stage.put(numbered(1).name, numbered(1, 3))
    stage.finish()
    stage.commit()
    assert transaction.operations == 0
    assert table.entries == {numbered(1).name: entry}
    assert table.plain.used == {entry.index}


def test_a_new_service_does_not_take_what_another_will_claim():
    """After a restart indexes are claimed one by one; those not yet claimed are not free."""
    old, new = numbered(1), service(name_of("new"), frontend("172.30.9.9"), cluster=["10.9.9.9:80"])
    before = Table("IPv4", "T")
    stage = Stage(before, Transaction())
    stage.put(old.name, old)
    stage.commit()
    index = before.entries[old.name].index
    table = Table("IPv4", "T")
    table.remembered = {before.entries[old.name].frontends[0][0]: index}
    table.keep_indexes()
    stage = Stage(table, Transaction())
    stage.put(new.name, new)
    stage.put(old.name, old)
    stage.commit()
    assert table.entries[old.name].index == index
    assert table.entries[new.name].index != index


def test_host_sets_are_those_of_the_skeleton():
    assert set(program.HOST_SETS) == {"node-addresses", "local-pods", "service-cidrs"}
