"""Scenario files: every mistake is named, nothing is guessed."""

from __future__ import annotations

import pytest

from proxycore.backend import Capability
from proxycore.errors import ConfigError
from proxycore.testing.lab import endpoint_place, usual_place
from proxycore.testing.needs import flow_needs, scenario_needs
from proxycore.testing.scenario import configuration, load, parse

FLOW = "{name: f, from: {kind: pod}, to: {ip: 1.2.3.4, port: 80, proto: tcp}, expect: {result: drop}}"
ONE = "- name: one\n  objects: []\n  flows:\n  - " + FLOW + "\n"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: one", "name: one\n  nmae: x", "test: one: unknown keys: nmae"),
        ("objects: []", "flows: []", "objects is missing"),
        ("objects: []", "objects: [{kind: Service}]", "an object needs kind and metadata.name"),
        ("kind: pod", "kind: pot", "one: f.from: kind must be one of pod, node"),
        ("1.2.3.4", "1.2.3", "'1.2.3' does not appear to be an IPv4 or IPv6 address"),
        ("port: 80", "port: http", "port must not be 'http'"),
        ("proto: tcp", "proto: sctp", "proto must be one of tcp, udp"),
        ("result: drop", "result: dropped", "result must be one of reject, drop, unproxied"),
        ("result: drop", "masq: true", "needs endpoints, result or http_status"),
        ("result: drop", "endpoints: [10.0.0.1]", "an endpoint is written ip:port"),
        ("result: drop", "endpoints: ['1.1.1.1:1'], masq: {'1.1.1.2:1': true}", "masq names an endpoint"),
        ("result: drop", "http_status: 200", "to.http and http_status go together"),
        ("kind: pod", "kind: pod, ip: '::1'", "of different families"),
        ("- name: one", "- name: one\n  objects: []\n- name: one", "two scenarios are named 'one'"),
        ("- name: one", "name: one", "not YAML"),
    ],
)
def test_mistakes_are_named(old, new, said):
    assert old in ONE
    with pytest.raises(ConfigError) as error:
        parse(ONE.replace(old, new, 1), "test")
    assert said in str(error.value)
    assert "test" in str(error.value)


def test_defaults_and_overlay():
    (one,) = parse(
        ONE.replace("objects", "config: {nftables: {masqueradeAll: true}, mode: x}\n  objects"), "test"
    )
    made = configuration(one, "nft")
    assert made["nftables"] == {"minSyncPeriod": "0s", "syncPeriod": "30s", "masqueradeAll": True}
    assert made["mode"] == "x"
    (plain,) = parse(ONE, "test")
    assert configuration(plain, "ipvs")["mode"] == "ipvs"
    assert "mode" not in configuration(plain, "third-party")
    assert plain.flows[0].source == "10.0.0.2"


def test_needs_follow_from_objects_and_flows():
    by_id = {scenario.id: scenario for scenario in load()}
    assert scenario_needs(by_id["sctp/sctp-nodeport"]) >= {Capability.SCTP, Capability.NODE_PORT}
    ranges = scenario_needs(by_id["ipv6/source-ranges"])
    assert ranges >= {Capability.IPV6, Capability.SOURCE_RANGES, Capability.LOAD_BALANCER_IP}
    assert Capability.IPV4 not in ranges
    assert Capability.ROUTE_BY_CLIENT in scenario_needs(by_id["traffic_policy/etp-local"])
    (hairpin,) = (f for f in by_id["clusterip/clusterip-general"].flows if f.name == "hairpin over UDP")
    assert flow_needs(hairpin) == {Capability.IPV4, Capability.UDP, Capability.HAIRPIN, Capability.MASQUERADE}


@pytest.mark.parametrize(
    ("address", "node", "place"),
    [
        ("10.180.0.9", None, "pods"),
        ("10.180.1.9", None, "overlay"),
        ("10.180.1.9", "test-node", "pods"),
        ("fd00:10::5", None, "pods"),
        ("fd00:10:180::1", None, "overlay"),
        ("fd00:10:180::1", "test-node", "pods"),
        ("198.51.100.1", None, "overlay"),
        ("192.168.0.3", "other", "nodes"),
        ("192.168.0.2", "test-node", "node"),
    ],
)
def test_endpoints_have_their_place(address, node, place):
    assert endpoint_place(address, node) == place


def test_all_else_is_the_world():
    assert [usual_place(a) for a in ("8.8.8.8", "172.30.0.1", "2600:5200::1")] == ["world"] * 3
