"""The runner is sharp: rules written by hand, right and wrong, are judged for what they are."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from proxycore.backend import Capability
from proxycore.testing import conformance
from proxycore.testing.conformance import CANARY_ADDRESS, CANARY_ENDPOINT, CANARY_PORTS, run_scenario
from proxycore.testing.scenario import ExpectEndpoints, Render, Scenario, parse

pytestmark = pytest.mark.root

# Stands for `proxyctl run`: loads a ruleset, then lives until SIGTERM.
STAND_IN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("loading", flush=True)
subprocess.run(["nft", "-f", sys.argv[1]], check=True)
while True:
    signal.pause()
"""

SCENARIO = """
- name: by-hand
  objects:
  - apiVersion: v1
    kind: Service
    metadata: {namespace: ns1, name: svc1}
    spec: {type: ClusterIP, clusterIP: 172.30.0.41, ports: [{protocol: TCP, port: 80}]}
  - apiVersion: discovery.k8s.io/v1
    kind: EndpointSlice
    metadata: {namespace: ns1, name: svc1-1, labels: {kubernetes.io/service-name: svc1}}
    addressType: IPv4
    endpoints:
    - {addresses: [10.180.0.1], nodeName: test-node}
    - {addresses: [10.180.1.1], nodeName: remote}
    ports: [{name: '', protocol: TCP, port: 8080}]
  flows:
  - {name: pod, from: {kind: pod}, to: {ip: 172.30.0.41, port: 80, proto: tcp},
     expect: {endpoints: ['10.180.0.1:8080', '10.180.1.1:8080'], masq: false}}
  - {name: pod UDP, from: {kind: pod}, to: {ip: 172.30.0.41, port: 53, proto: udp},
     expect: {endpoints: ['10.180.0.1:8080', '10.180.1.1:8080'], masq: false}}
  - {name: external, from: {kind: external}, to: {ip: 172.30.0.41, port: 80, proto: tcp},
     expect: {endpoints: ['10.180.0.1:8080', '10.180.1.1:8080'], masq: true}}
  - {name: node, from: {kind: node}, to: {ip: 172.30.0.41, port: 80, proto: tcp},
     expect: {endpoints: ['10.180.0.1:8080', '10.180.1.1:8080'], masq: true}}
  - {name: hairpin, from: {kind: pod, ip: 10.180.0.1}, to: {ip: 172.30.0.41, port: 80, proto: tcp},
     expect: {endpoints: ['10.180.0.1:8080', '10.180.1.1:8080'],
              masq: {'10.180.0.1:8080': true, '10.180.1.1:8080': false}}}
  - {name: refused, from: {kind: pod}, to: {ip: 172.30.0.42, port: 80, proto: tcp}, expect: {result: reject}}
  - {name: refused UDP, from: {kind: node}, to: {ip: 172.30.0.42, port: 53, proto: udp}, expect: {result: reject}}
  - {name: refused node, from: {kind: node}, to: {ip: 172.30.0.42, port: 80, proto: tcp}, expect: {result: reject}}
  - {name: dropped, from: {kind: pod}, to: {ip: 172.30.0.43, port: 80, proto: tcp}, expect: {result: drop}}
  - {name: dropped UDP, from: {kind: node}, to: {ip: 172.30.0.43, port: 53, proto: udp}, expect: {result: drop}}
  - {name: alone, from: {kind: pod}, to: {ip: 172.30.0.44, port: 80, proto: tcp}, expect: {result: unproxied}}
  - {name: no listener, from: {kind: external}, to: {ip: 192.168.0.2, port: 80, proto: tcp},
     expect: {result: unproxied}}
  - {name: sticky, from: {kind: pod}, to: {ip: 172.30.0.45, port: 80, proto: tcp},
     expect: {endpoints: ['10.180.0.1:8080', '10.180.1.1:8080'], sticky: true}}
  - {name: connection, from: {kind: pod}, to: {ip: 172.30.0.45, port: 80, proto: tcp}, conn: a,
     expect: {endpoints: ['10.180.1.1:8080']}}
  - {name: connection again, from: {kind: pod}, to: {ip: 172.30.0.45, port: 80, proto: tcp}, conn: a,
     expect: {endpoints: ['10.180.1.1:8080']}}
  - {name: fixed port, from: {kind: external, port: 45001}, to: {ip: 172.30.0.45, port: 53, proto: udp},
     expect: {endpoints: ['10.180.1.1:8080']}}
  render: {contains: ['172.30.0.41', 'tcp:80', sctp], absent: ['172.30.0.99']}
"""

BALANCED = "numgen inc mod 2 map { 0 : 10.180.0.1, 1 : 10.180.1.1 }:8080"
RULES = f"""
table ip hand {{
  map shown {{ type ipv4_addr . inet_proto . inet_service : verdict; elements = {{ 10.9.9.9 . sctp . 9 : drop }} }}
  map colon {{ type inet_proto . inet_service : verdict; elements = {{ tcp . 80 : drop }} }}
  chain dnats {{
    ip daddr {CANARY_ADDRESS} tcp dport 80 dnat to {CANARY_ENDPOINT}:{CANARY_PORTS[1]}
    ip daddr 172.30.0.41 ip protocol {{ tcp, udp }} dnat to {BALANCED}
    ip daddr 172.30.0.45 ip protocol {{ tcp, udp }} dnat to 10.180.1.1:8080
  }}
  chain prerouting {{ type nat hook prerouting priority dstnat; jump dnats; }}
  chain output {{ type nat hook output priority -100; jump dnats; }}
  chain postrouting {{
    type nat hook postrouting priority srcnat
    ct status dnat ip saddr != 10.0.0.0/8 masquerade
    ct status dnat ip saddr 10.180.0.1 ip daddr 10.180.0.1 masquerade
  }}
  chain refusals {{
    ip daddr 172.30.0.42 reject
    ip daddr 172.30.0.43 drop
  }}
  chain forward {{ type filter hook forward priority filter; jump refusals; }}
  chain filter-output {{ type filter hook output priority filter; jump refusals; }}
}}
"""


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """What is wrong stays wrong: no need to wait for it to get better."""
    monkeypatch.setattr(conformance, "START_SECONDS", 1.5)
    monkeypatch.setattr(conformance, "CHANGE_SECONDS", 1.0)


def scenario() -> Scenario:
    return parse(SCENARIO, "test")[0]


def judge(tmp_path: Path, rules: str, what: Scenario | None = None, **options):
    ruleset = tmp_path / "rules.nft"
    ruleset.write_text(rules)
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    command = (sys.executable, str(script), str(ruleset))
    return run_scenario(what or scenario(), "nft", command=command, **options)


def only(*names: str) -> Scenario:
    """The scenario cut down to these flows."""
    whole = scenario()
    flows = tuple(flow for flow in whole.flows if flow.name in names)
    assert len(flows) == len(names)
    return replace(whole, flows=flows, render=None)


def test_right_rules_pass_every_kind_of_expectation(tmp_path):
    report = judge(tmp_path, RULES)
    assert report.failures == ()
    assert report.skipped == ()
    assert report.passed


def test_without_rules_nothing_is_in_force(tmp_path):
    report = judge(tmp_path, "")
    assert len(report.failures) == 1
    assert "canary" in report.failures[0]
    assert report.log.splitlines() == ["loading"]


WRONG = {
    "no masquerade": (
        "ip saddr != 10.0.0.0/8 masquerade",
        "ip saddr 1.2.3.4 masquerade",
        "external",
        "expected 10.180.0.1:8080 masqueraded and 10.180.1.1:8080 masqueraded, but ",
        "having seen 203.0.113.2:",
    ),
    "masquerade for all": (
        "ip saddr != 10.0.0.0/8 masquerade",
        "masquerade",
        "pod",
        "unmasqueraded, but ",
        ", masqueraded on try",
    ),
    "hairpin not masqueraded": (
        "ip saddr 10.180.0.1 ip daddr 10.180.0.1 masquerade",
        "ip saddr 1.1.1.1 masquerade",
        "hairpin",
        "but 10.180.0.1:8080 (pods) answered",
        "the client itself",
    ),
    "wrong endpoint": (
        "1 : 10.180.1.1 }",
        "1 : 10.180.1.9 }",
        "pod",
        "10.180.1.9:8080 (overlay) answered",
        "",
    ),
    "wrong port": (
        ":8080\n    ip daddr 172.30.0.45",
        ":53\n    ip daddr 172.30.0.45",
        "pod",
        "but it was refused (Connection refused)",
        "",
    ),
    "only one of two": (
        "numgen inc mod 2 map { 0 : 10.180.0.1, 1 : 10.180.1.1 }:8080",
        "10.180.0.1:8080",
        "pod",
        "after 60 tries",
        "10.180.1.1:8080 had answered 0 times",
    ),
    "drop for reject": (
        "172.30.0.42 reject",
        "172.30.0.42 drop",
        "refused",
        "expected a refusal, but nothing came",
        "",
    ),
    "accept for reject": (
        "172.30.0.42 reject",
        "172.30.0.49 reject",
        "refused",
        "172.30.0.42:80 (world)",
        "",
    ),
    "reject for drop": (
        "172.30.0.43 drop",
        "172.30.0.43 reject",
        "dropped",
        "silence, but it was refused",
        "",
    ),
    "accept for drop": ("172.30.0.43 drop", "172.30.0.49 drop", "dropped", "172.30.0.43:80 (world)", ""),
    "proxied for unproxied": (
        "172.30.0.41 ip",
        "{ 172.30.0.41, 172.30.0.44 } ip",
        "alone",
        "leaves it alone",
        "8080",
    ),
    "dropped for unproxied": ("172.30.0.43 drop", "172.30.0.44 drop", "alone", "but nothing came back", ""),
    "spread for sticky": ("to 10.180.1.1:8080", f"to {BALANCED}", "sticky", "expected to stick to one", ""),
    "no rule for UDP": ("ip protocol { tcp, udp }", "ip protocol tcp", "pod UDP", "(world) answered", ""),
    "wrong for fixed port": (
        "to 10.180.1.1:8080",
        "to 10.180.1.2:8080",
        "fixed port",
        "10.180.1.2:8080",
        "port 45001",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rules_are_named(tmp_path, case):
    right, wrong, flow, said, also = WRONG[case]
    rules = RULES.replace(right, wrong)
    assert rules != RULES
    report = judge(tmp_path, rules, only(flow))
    assert len(report.failures) == 1
    assert report.failures[0].startswith(f"{flow!r}: ")
    assert said in report.failures[0]
    assert also in report.failures[0]


def test_rules_text_is_searched(tmp_path):
    what = replace(
        only(), render=Render(contains=("172.30.0.41", "1.2.3.4"), absent=("172.30.0.45", "5.6.7.8"))
    )
    report = judge(tmp_path, RULES, what)
    assert report.failures == ("the rules lack '1.2.3.4'", "the rules still hold '172.30.0.45'")


def test_a_proxy_that_ends_is_reported_with_its_words(tmp_path):
    report = judge(tmp_path, "no ruleset", only("pod"))
    assert any("ended by itself with status 1" in failure for failure in report.failures)
    assert "syntax error" in report.log


def test_a_change_that_is_never_in_force_is_reported(tmp_path):
    (whole,) = parse(
        SCENARIO + "  steps:\n  - delete: [{kind: Service, namespace: ns1, name: svc1}]\n    flows: []\n",
        "test",
    )
    report = judge(tmp_path, RULES, replace(whole, flows=(), render=None))
    assert len(report.failures) == 1
    assert report.failures[0].startswith("step 1: not in force after 1 s: the canary Service")


def test_a_backend_is_held_only_to_what_it_claims(tmp_path):
    lacking = set(Capability) - {Capability.UDP, Capability.MASQUERADE, Capability.DROP}
    report = judge(tmp_path, RULES.replace("172.30.0.43 drop", "172.30.0.99 drop"), capabilities=lacking)
    assert report.failures == ("the rules still hold '172.30.0.99'",)
    skipped = {reason.partition(":")[0].strip("'"): reason for reason in report.skipped}
    assert set(skipped) >= {"pod UDP", "external", "node", "dropped", "hairpin", "refused UDP"}
    assert skipped["external"] == "'external': needs masquerade"
    without = judge(tmp_path, RULES, capabilities=set(Capability) - {Capability.CLUSTER_IP})
    assert without.skipped == ("needs cluster-ip",)


def test_expectations_reach_the_flows():
    flow = scenario().flows[4]
    assert flow.expect == ExpectEndpoints(
        ("10.180.0.1:8080", "10.180.1.1:8080"), {"10.180.0.1:8080": True, "10.180.1.1:8080": False}
    )
    assert (flow.kind, flow.source, flow.source_port) == ("pod", "10.180.0.1", 0)
