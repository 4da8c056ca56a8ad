"""Addresses and CIDRs have one text."""

from __future__ import annotations

import ipaddress
from socket import AF_INET6, inet_ntop

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxycore import canonical


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("010.000.0.01", "10.0.0.1"),
        ("FD00:0:0:0::1", "fd00::1"),
        ("fd00:0:0:1::0", "fd00:0:0:1::"),
        ("::1:2", "::1:2"),
        ("::", "::"),
        ("::1", "::1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::ffff:a00:1", "10.0.0.1"),
        ("::ffff:010.0.0.1", "10.0.0.1"),
        ("64:ff9b::010.0.0.1", "64:ff9b::a00:1"),
    ],
)
def test_addresses_have_one_text(text, expected):
    assert canonical.address(text) == expected
    assert canonical.address(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", " 10.0.0.1", "10.0.0.1 ", "10.0.0", "10.0.0.256", "10.0.0.1/32", "1e1.0.0.1", "10.0.0.-1", "fe80::1%eth0",
        "::g", "1:2:3:4:5:6:7:8:9", "example.com", "10.0.0.1\n", "10.0.0.1\0", "\u0661.0.0.1", "\ud800", "::1::", "[::1]",
        "0x0a.0.0.1", "9" * 40 + ".0.0.1",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match="is not an IP address"):
        canonical.address(text)


@given(st.ip_addresses(v=4))
def test_any_ipv4_address_keeps_its_text(address):
    assert canonical.address(str(address)) == str(address)
    assert canonical.pack(str(address)) == address.packed


@given(st.ip_addresses(v=6))
def test_any_ipv6_address_gets_the_shortest_text(address):
    expected = str(address.ipv4_mapped or address.compressed)
    assert canonical.address(address.exploded) == expected
    assert canonical.address(str(address).upper()) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("127.0.0.1", "loopback"),
        ("127.255.0.9", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("169.254.169.254", "link-local"),
        ("fe80::1", "link-local"),
        ("febf::1", "link-local"),
        ("224.0.0.1", "multicast"),
        ("239.1.1.1", "multicast"),
        ("ff02::1", "multicast"),
        ("0.0.0.0", "unspecified"),
        ("::", "unspecified"),
        ("255.255.255.255", "broadcast"),
    ],
)
def test_special_addresses_are_neither_endpoint_nor_frontend(text, why):
    with pytest.raises(ValueError, match=why):
        canonical.usable_address(text)


@pytest.mark.parametrize(
    "text", ["169.253.0.1", "126.0.0.1", "223.255.255.255", "240.0.0.1", "fec0::1", "fe00::1", "::2"]
)
def test_neighbours_of_special_addresses_are_usable(text):
    assert canonical.usable_address(text) == text


@given(st.ip_addresses(v=4))
def test_only_unusual_first_octets_need_a_second_look(address):
    if address.packed[0] not in canonical.UNUSUAL_FIRST_OCTETS:
        assert canonical.special(address.packed) is None


@given(st.ip_addresses(v=6))
def test_only_unusual_first_octets_of_ipv6_need_a_second_look(address):
    if address.packed[0] not in canonical.UNUSUAL_FIRST_OCTETS_IPV6:
        assert canonical.special(address.packed) is None
        assert canonical.address(str(address)) == inet_ntop(AF_INET6, address.packed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("010.0.0.0/8", "10.0.0.0/8"),
        ("10.0.0.1/32", "10.0.0.1/32"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("FD00::1/64", "fd00::/64"),
        ("::/0", "::/0"),
        ("::ffff:10.1.0.0/112", "10.1.0.0/16"),
    ],
)
def test_cidrs_have_one_text_without_host_bits(text, expected):
    assert canonical.cidr(text) == expected
    assert canonical.cidr(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "10.0.0.0",
        "10.0.0.0/",
        "10.0.0.0/33",
        "::/129",
        "::ffff:10.0.0.0/95",
        "10.0.0.0/-1",
        "10.0.0.0/٨",
        "/8",
        "x/8",
    ],
)
def test_what_is_no_cidr_is_refused(text):
    with pytest.raises(ValueError):
        canonical.cidr(text)


@given(st.ip_addresses(v=4), st.integers(0, 32), st.ip_addresses(v=4), st.integers(0, 32))
def test_containing_agrees_with_ipaddress(first, bits, second, other_bits):
    outer = ipaddress.ip_network((first, bits), strict=False)
    inner = ipaddress.ip_network((second, other_bits), strict=False)
    assert canonical.contains(str(outer), str(second)) == (second in outer)
    assert canonical.contains(str(outer), str(inner)) == inner.subnet_of(outer)
    assert canonical.contains(str(outer), str(inner.supernet())) == inner.supernet().subnet_of(outer)


def test_families_do_not_contain_each_other():
    assert not canonical.contains("::/0", "10.0.0.1")
    assert not canonical.contains("0.0.0.0/0", "fd00::1")


def test_only_outermost_cidrs_are_kept():
    cidrs = ["10.1.0.0/16", "192.168.0.0/24", "10.0.0.0/8", "10.0.0.0/8", "10.1.2.3/32"]
    assert canonical.outermost(cidrs) == ("192.168.0.0/24", "10.0.0.0/8")
