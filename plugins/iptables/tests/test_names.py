"""Names of chains."""

from __future__ import annotations

import base64
import hashlib

from hypothesis import given
from hypothesis import strategies as st

from proxycore.testing.states import endpoint, name_of
from proxycore_iptables import names

WEB = name_of("svc1", "p80", namespace="ns1")


def test_names_are_kube_proxys():
    assert names.service_chain(WEB) == "KUBE-SVC-XPGD46QRK7WJZT7O"
    assert names.local_chain(WEB) == "KUBE-SVL-XPGD46QRK7WJZT7O"
    assert names.external_chain(WEB) == "KUBE-EXT-XPGD46QRK7WJZT7O"
    assert names.firewall_chain(WEB) == "KUBE-FW-XPGD46QRK7WJZT7O"
    assert names.endpoint_chain_of(names.text_of(WEB), "10.180.0.1:80") == "KUBE-SEP-SXIVWICOYRO3J4NJ"


def test_protocol_and_port_name_tell_apart():
    ports = [WEB, WEB._replace(protocol="UDP"), WEB._replace(port=""), WEB._replace(port="p81")]
    assert len({names.service_chain(port) for port in ports}) == len(ports)


def test_text_of_an_unnamed_port_has_no_colon():
    assert names.text_of(WEB._replace(port="", protocol="SCTP")) == "ns1/svc1sctp"


def test_ipv6_endpoints_stand_in_brackets():
    name = name_of(family="IPv6")
    assert names.endpoint_chain_of(
        names.text_of(name), str(endpoint("[fd00::1]:80"))
    ) == names.endpoint_chain_of("default/web:httptcp", "[fd00::1]:80")


def test_variants_have_names_of_their_own():
    for chain in (names.external_chain, names.firewall_chain):
        assert len({chain(WEB), chain(WEB, " a"), chain(WEB, " b")}) == 3


@given(st.text())
def test_hash_is_the_head_of_base32_of_sha256(text):
    assert names.hashed(text) == base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:16]
