"""One form for all texts of a rule."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxycore_iptables.normal import normal

from .spellings import COMMON, IPV4, IPV6, NAT_IPV4, NAT_IPV6

FOURS = (*COMMON, *IPV4, *NAT_IPV4)
SIXES = (*COMMON, *IPV6, *NAT_IPV6)


@pytest.mark.parametrize("group", [*FOURS, *IPV6, *NAT_IPV6], ids=lambda group: group[0])
def test_all_spellings_of_a_rule_have_one_form(group):
    assert {normal(rule) for rule in group} == {normal(group[0])}


@pytest.mark.parametrize("groups", [FOURS, SIXES], ids=["IPv4", "IPv6"])
def test_rules_that_do_something_else_have_other_forms(groups):
    forms: dict[str, tuple[str, ...]] = {}
    for group in groups:
        assert forms.setdefault(normal(group[0]), group) == group


@pytest.mark.parametrize("rule", [rule for group in (*FOURS, *SIXES) for rule in group])
def test_a_form_is_its_own_form(rule):
    assert normal(normal(rule)) == normal(rule)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "-m recent --rcheck --name A -m unknown --name B",
            "-m recent --rcheck --name B -m unknown --name A",
        ),
        ("-m recent --rcheck -m unknown --name B", "-m recent --rcheck --name B -m unknown"),
        ("-m unknown --a 1 --b 2 -j T", "-m unknown --b 2 --a 1 -j T"),
        ("-m unknown ! --a 1 -j T", "-m unknown --a 1 -j T"),
        ("-m limit --limit 1/s -m recent --set -j T", "-m recent --set -m limit --limit 1/s -j T"),
        (
            "-m recent --set --name A -m recent --set --name B",
            "-m recent --set --name B -m recent --set --name A",
        ),
        ("-m mark --mark 0x1/0x0 -j T", "-m mark --mark 0x1 -j T"),
        ("-j MARK --set-xmark 0x4000/0x0", "-j MARK --set-xmark 0x4000/0x4000"),
        (
            "-m statistic --mode random --probability 0.5",
            "-m statistic --mode random --probability 0.500000002",
        ),
        ("-j T", "-g T"),
        ("-j CONNMARK --set-mark 1", "-j CONNMARK --set-xmark 1/1"),
        ('-m comment --comment "a  b" -j T', '-m comment --comment "a b" -j T'),
        ("-m comment --comment --jump -j T", "-m comment --comment -j -j T"),
        ("-s 10.0.0.0/8 -j T", "! -s 10.0.0.0/8 -j T"),
        ("! -s 0.0.0.0/0 -j T", "-j T"),
        ("-s 10.0.0.1,10.0.0.2 -j T", "-s 10.0.0.1 -j T"),
    ],
)
def test_what_differs_stays_different(one, other):
    assert normal(one) != normal(other)


@pytest.mark.parametrize("rule", ['-m comment --comment "open -j T', '"'])
def test_what_is_no_rule_stays_as_it_is(rule):
    assert normal(rule) == rule


def test_unknown_options_stay_as_they_are():
    rule = '-p tcp -m unknown --b "b c" --a ! --f g -m tcp --dport 80 -j OTHER --on 1 --off'
    assert normal(rule) == rule


@pytest.mark.parametrize("count", [2, 3, 7, 100, 1000, 9999, 20_000])
def test_chances_of_equal_shares_are_told_from_one_another(count):
    def form(chance):
        return normal(f"-m statistic --mode random --probability {chance:.11f} -j T")

    step = 1 / 2**31
    assert form(1 / count) == form(1 / count + step) == form(1 / count - step)
    assert len({form(1 / count), form(1 / (count + 1)), form(1 / (count - 1))}) == 3
    assert form(1 / count) != form(1 / count + 3 * step)


WORDS = """
! -s -d -p -m -j -g -i 10.0.0.1 fd00::1 tcp 6 --dport 80 comment --comment mark --mark 0x1/1 recent --name --set
statistic --mode random --probability 0.3 MARK --set-mark --or-mark unknown --unknown --syn T [fd::1]:2 DNAT
--to-destination /0 --tcp-flags ALL conntrack --ctstate NEW,INVALID -c = --dport=1: --every "a" ""
"""


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS.split()), max_size=14))
def test_any_words_have_a_form_that_is_its_own(words):
    form = normal(" ".join(words))
    assert normal(form) == form


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_has_a_form(text):
    normal(text)
