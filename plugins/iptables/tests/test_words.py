"""Pieces of rules."""

from __future__ import annotations

import ipaddress
import re

from hypothesis import given
from hypothesis import strategies as st

from proxycore_iptables.words import COMMENT_BYTES, chances, comment, printed, safe, source


def shares(weights):
    """What each rule of a row comes to get of all new connections."""
    left = 1.0
    for match in chances(weights):
        chance = float(match.split()[-1]) if match else 1.0
        yield left * chance
        left *= 1 - chance


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_every_endpoint_gets_its_share(weights):
    found = list(shares(weights))
    assert len(found) == len(weights)
    assert all(abs(got - w / sum(weights)) < 1e-7 for got, w in zip(found, weights, strict=True))


def test_thousands_of_equal_endpoints_get_equal_shares():
    assert all(abs(share - 1 / 3000) < 1e-7 for share in shares([1] * 3000))


def test_chances_do_not_depend_on_what_was_asked_before():
    first = chances([1] * 3)
    chances([1] * 50)
    assert chances([1] * 3) == first


def test_no_endpoint_is_without_a_chance_or_takes_all():
    small, large = (float(chances([w, v])[0].split()[-1]) for w, v in ((1, 10**15), (10**15, 1)))
    assert small > 0
    assert large < 1


@given(st.text(max_size=400))
def test_a_comment_is_one_word_within_the_kernels_room(text):
    match = re.fullmatch(r'-m comment --comment (?:"([^"\\\n]*)"|([\w-]+)) ', comment(safe(f"a/{text}")))
    assert match is not None
    assert len((match[1] or match[2]).encode()) <= COMMENT_BYTES


@given(st.ip_addresses())
def test_printed_addresses_are_the_same_addresses(address):
    assert ipaddress.ip_address(printed(str(address))) == address


def test_addresses_that_the_c_library_writes_otherwise():
    texts = ("::1:2", "::ab:cdef", "::1", "::", "::1:2:3", "64:ff9b::1:2")
    assert [printed(text) for text in texts] == [
        "::0.1.0.2",
        "::0.171.205.239",
        "::1",
        "::",
        "::1:2:3",
        "64:ff9b::1:2",
    ]


def test_every_address_needs_no_match():
    assert source("0.0.0.0/0") == source("::/0") == ""
    assert source("::1:2/128") == "-s ::0.1.0.2/128 "
