"""Numbers of Service ports and classes of target ports, over histories."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from proxycore.api import PoolName
from proxycore.testing.states import name_of
from proxycore_ipvs.ids import Classes, Exhausted, FrontendKey, Ids, Target
from proxycore_ipvs.marks import REJECTED, Marks, Parts

MARKS = Marks()
A, B, C = name_of("a"), name_of("b"), name_of("c")


class Histories(RuleBasedStateMachine):
    """Service ports come, leave, come back; servers stay for a while, as told by `serving`."""

    NAMES = tuple(name_of(f"s{n}") for n in range(8))
    NUMBERS = range(1, 6)

    def __init__(self):
        super().__init__()
        self.ids = Ids(self.NUMBERS)
        self.present = {}
        self.serving = {}

    @rule(name=st.sampled_from(NAMES))
    def come(self, name):
        before = self.ids.get(name)
        held = set(self.present.values()) | set(self.serving)
        try:
            number = self.ids.take(name)
        except Exhausted:
            assert name not in self.present
            assert len(held) == len(self.NUMBERS)
            return
        assert before in (None, number)
        if before is None:
            assert number not in held
        self.present[name] = number
        self.serving[number] = name

    @rule(name=st.sampled_from(NAMES))
    def leave(self, name):
        assert self.ids.leave(name) == self.ids.get(name)
        self.present.pop(name, None)

    @rule(numbers=st.sets(st.sampled_from(NUMBERS)))
    def servers_go(self, numbers):
        for number in numbers - set(self.present.values()):
            self.serving.pop(number, None)
        among = None if len(numbers) % 2 else numbers
        for number in self.ids.settle(self.serving.keys(), among):
            assert number not in self.serving
        if among is None:
            assert set(self.ids.leaving) <= set(self.serving)

    @rule()
    def settle(self):
        self.ids.settle(self.serving.keys())

    @invariant()
    def numbers_are_held_by_one(self):
        assert len(set(self.present.values())) == len(self.present)
        for name, number in self.present.items():
            assert self.ids.get(name) == number
            assert self.ids.holder(number) == name
            assert number not in self.ids.leaving

    @invariant()
    def what_has_servers_is_not_free(self):
        for number, name in self.serving.items():
            assert self.ids.holder(number) == name


TestHistories = Histories.TestCase


def test_a_number_rests_as_long_as_it_can():
    ids = Ids(range(1, 4))
    assert [ids.take(A), ids.take(B)] == [1, 2]
    ids.leave(A)
    assert ids.settle(()) == (1,)
    assert ids.take(C) == 3
    assert ids.take(A) == 1


def test_one_that_comes_back_gets_its_number_again():
    ids = Ids(MARKS.numbers)
    number = ids.take(A)
    ids.leave(A)
    assert ids.settle({number}) == ()
    assert dict(ids.leaving) == {number: A}
    assert ids.take(A) == number
    assert ids.settle(()) == ()
    assert ids.get(A) == number


def test_when_all_are_taken_nothing_changes():
    ids = Ids(range(1, 3))
    ids.take(A)
    ids.take(B)
    with pytest.raises(Exhausted, match="all 2 numbers"):
        ids.take(C)
    assert (len(ids), ids.get(C)) == (2, None)


def _value(number, **flags):
    return MARKS.compose(Parts(number=number, **flags))


def test_numbers_are_read_back_from_sets_and_servers():
    a1, a2, b1 = (FrontendKey(f"172.30.0.{n}", "TCP", 80) for n in (1, 2, 3))
    node_port, gone = FrontendKey(None, "TCP", 30080), FrontendKey("172.30.0.9", "UDP", 53)
    values = {
        a1: _value(7, masquerade_others=True),
        a2: _value(7, short=True, pool=PoolName.LOCAL, dropped=True),
        b1: _value(7),
        node_port: _value(9, port_class=3),
        gone: _value(11),
        FrontendKey("172.30.0.4", "TCP", 1): MARKS.compose(REJECTED),
        FrontendKey("172.30.0.5", "TCP", 1): 0x1234,
    }
    servers = [MARKS.server(n, PoolName.CLUSTER) for n in (7, 13)] + [0x8000, 1, 0xC0000005]
    owners = {a1: A, a2: A, b1: B, node_port: B}
    ids = Ids.recover(MARKS, values, servers, owners)
    assert (ids.get(A), ids.get(B), ids.get(C)) == (7, 9, None)
    assert dict(ids.leaving) == {11: None, 13: None}
    assert ids.take(C) == 14
    assert ids.settle({13}) == (11,)


_KEYS = [FrontendKey(f"172.30.0.{n}", "TCP", 80) for n in range(6)]


@given(
    st.dictionaries(st.sampled_from(_KEYS), st.integers(1, 4)),
    st.dictionaries(st.sampled_from(_KEYS), st.sampled_from([A, B, C])),
    st.sets(st.integers(1, 5)),
)
def test_whatever_is_found_no_number_is_given_twice(numbers, owners, serving):
    servers = [MARKS.server(n, PoolName.LOCAL) for n in serving]
    values = {key: _value(number) for key, number in numbers.items()}
    ids = Ids.recover(MARKS, values, servers, owners)
    got = [ids.get(name) for name in (A, B, C)]
    given_out = [number for number in got if number is not None]
    assert len(set(given_out)) == len(given_out)
    assert set(given_out).isdisjoint(ids.leaving)
    assert {*given_out, *ids.leaving} == {*numbers.values(), *serving}
    assert ids.take(name_of("new")) not in {*numbers.values(), *serving}


def test_a_restart_finds_what_was_there():
    ids = Ids(MARKS.numbers)
    names = [name_of(f"s{n}") for n in range(20)]
    owners = {FrontendKey(f"172.30.1.{n}", "TCP", 80): name for n, name in enumerate(names)}
    values = {key: _value(ids.take(name)) for key, name in owners.items()}
    again = Ids.recover(MARKS, values, (), owners)
    assert [again.get(name) for name in names] == [ids.get(name) for name in names]
    assert not again.leaving


HTTP, DNS = Target("TCP", 8080), Target("UDP", 53)


def test_classes_are_shared_and_each_protocol_has_its_own():
    classes = Classes()
    assert [classes.take(A, HTTP), classes.take(B, HTTP), classes.take(C, DNS)] == [1, 1, 1]
    assert dict(classes.rules) == {HTTP: 1, DNS: 1}
    classes.leave(A)
    assert (classes.get(A), classes.get(B), classes.settle()) == (0, 1, False)


def test_a_class_goes_on_until_no_set_names_it():
    classes = Classes(last=1)
    classes.take(A, HTTP)
    with pytest.raises(Exhausted, match="all 1 classes of TCP target ports"):
        classes.take(A, Target("TCP", 9090))
    assert classes.get(A) == 0
    assert dict(classes.rules) == {HTTP: 1}
    assert classes.settle()
    assert classes.take(A, Target("TCP", 9090)) == 1


def test_there_are_fifteen_classes():
    classes = Classes()
    numbers = [classes.take(name_of(f"s{n}"), Target("TCP", 8000 + n)) for n in range(15)]
    assert numbers == list(range(1, 16))
    with pytest.raises(Exhausted):
        classes.take(A, HTTP)
    assert classes.take(A, DNS) == 1


def test_classes_that_rules_know_stay_if_somebody_takes_them():
    classes = Classes()
    classes.recover(HTTP, 4)
    classes.recover(Target("TCP", 9090), 4)
    classes.recover(DNS, 16)
    assert dict(classes.rules) == {HTTP: 4}
    assert classes.take(A, HTTP) == 4
    assert not classes.settle()
