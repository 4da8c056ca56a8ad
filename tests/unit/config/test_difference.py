"""What a new configuration changes, and what a proxy that runs takes over of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxycore.config import Config, Loaded, difference, load, merged
from proxycore.config.field import Field
from proxycore.config.fields import BY_PATH, FIELDS
from proxycore.errors import ConfigError

KUBE_PROXY = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

Write = Callable[..., Path]
Read = Callable[[str], Loaded]

LIVE = {
    "featureGates",
    "logging.format",
    "logging.verbosity",
    "bindAddress",
    "healthzBindAddress",
    "metricsBindAddress",
    "iptables.masqueradeAll",
    "iptables.syncPeriod",
    "iptables.minSyncPeriod",
    "ipvs.syncPeriod",
    "ipvs.minSyncPeriod",
    "nftables.masqueradeAll",
    "nftables.syncPeriod",
    "nftables.minSyncPeriod",
    "detectLocalMode",
    "detectLocal.bridgeInterface",
    "detectLocal.interfaceNamePrefix",
    "clusterCIDR",
    "nodePortAddresses",
    "oomScoreAdj",
    "conntrack.maxPerCore",
    "conntrack.min",
    "conntrack.tcpEstablishedTimeout",
    "conntrack.tcpCloseWaitTimeout",
    "conntrack.tcpBeLiberal",
    "conntrack.udpTimeout",
    "conntrack.udpStreamTimeout",
    "apiServer.staleAfter",
    "verifyInterval",
}


def told(old: Loaded, new: Loaded) -> list[tuple[str, str, str, str]]:
    return [(c.path, c.old, c.new, c.effect) for c in difference(old, new).changes]


def test_exactly_these_fields_take_effect_at_once() -> None:
    assert {field.path for field in FIELDS if field.reload == "live"} == LIVE


def test_the_same_configuration_differs_in_nothing(read: Read) -> None:
    text = "mode: nftables\nclusterCIDR: 10.0.0.0/8\n---\nbackendOptions: {nft: {x: 1}}\n"
    assert not difference(read(text), read(text))
    assert merged(read(text), read(text)) == read(text)


def test_fields_are_told_with_both_values_where_the_new_one_stands_and_when_it_counts(
    read: Read, tmp_path: Path
) -> None:
    old = read("mode: nftables\nclusterCIDR: 10.0.0.0/8\nnftables: {masqueradeBit: 3}\n")
    new = read("mode: nftables\nclusterCIDR: 11.0.0.0/8\nconfigSyncPeriod: 1m\n---\nverifyInterval: 5s\n")
    found = difference(old, new)
    assert told(old, new) == [
        ("nftables.masqueradeBit", "3", "14", "restart"),
        ("clusterCIDR", "10.0.0.0/8", "11.0.0.0/8", "live"),
        ("configSyncPeriod", "15m0s", "1m0s", "none"),
        ("verifyInterval", "1s", "5s", "live"),
    ]
    assert [change.origin for change in found.changes[:2]] == ["default", f"file ({tmp_path}/c.yaml:4)"]
    assert (found.live, found.needs_restart) == (
        ("clusterCIDR", "verifyInterval"),
        ("nftables.masqueradeBit",),
    )


def test_values_are_told_as_flags_would_say_them(read: Read) -> None:
    new = read("nodePortAddresses: [10.0.0.0/8, primary]\nhostnameOverride: a\nfeatureGates: {A: true}")
    assert {path: (old, new) for path, old, new, _ in told(read(""), new)} == {
        "featureGates": ("{}", "{A: true}"),
        "hostnameOverride": ("", "a"),
        "nodePortAddresses": ("all", "10.0.0.0/8,primary"),
    }


def test_what_needs_a_restart_stays_and_the_rest_is_taken_over(read: Read) -> None:
    old = read("mode: nftables\nclusterCIDR: 10.0.0.0/8\n---\nsource: file:/a\ntakeover: leave\n")
    new = read("mode: nftables\nclusterCIDR: 11.0.0.0/8\n---\nsource: file:/b\n")
    both = merged(old, new)
    assert (
        both.config
        == read("mode: nftables\nclusterCIDR: 11.0.0.0/8\n---\nsource: file:/a\ntakeover: leave\n").config
    )
    assert both.origins["takeover"] == old.origins["takeover"]
    assert difference(both, new).needs_restart == ("source", "takeover")
    assert difference(both, new).live == ()


def test_settings_of_idle_modes_have_no_effect(read: Read) -> None:
    new = read("mode: nftables\niptables: {syncPeriod: 1m}\nipvs: {scheduler: lc}\n")
    assert {effect for *_, effect in told(read("mode: nftables"), new)} == {"none"}


def test_while_another_mode_waits_the_running_one_keeps_its_settings(read: Read) -> None:
    old = read("mode: nftables\nnftables: {masqueradeAll: true, syncPeriod: 1m}\nclusterCIDR: 10.0.0.0/8\n")
    new = read("mode: iptables\niptables: {masqueradeAll: true}\nclusterCIDR: 11.0.0.0/8\n")
    both = merged(old, new).config
    assert (both.mode, both.backend) == ("nftables", "nft")
    assert (both.masquerade_all, both.sync_period_seconds) == (True, 60.0)
    assert both.node_port_addresses == ("primary",)
    assert both.cluster_cidr == ("11.0.0.0/8",)
    assert dict((path, effect) for path, _, _, effect in told(old, new)) == {
        "mode": "restart",
        "iptables.masqueradeAll": "restart",
        "nftables.masqueradeAll": "restart",
        "nftables.syncPeriod": "restart",
        "clusterCIDR": "live",
        "nodePortAddresses": "restart",
        "backend": "restart",
    }


def test_written_node_port_addresses_are_taken_over_beside_a_mode_that_waits(read: Read) -> None:
    both = merged(read("mode: nftables"), read("mode: ipvs\nnodePortAddresses: [10.0.0.0/8]")).config
    assert (both.backend, both.node_port_addresses) == ("nft", ("10.0.0.0/8",))


def test_addresses_that_would_change_an_option_of_the_backend_wait(read: Read) -> None:
    old, new = read("mode: iptables"), read("mode: iptables\nnodePortAddresses: [10.0.0.0/8]\noomScoreAdj: 1")
    assert merged(old, new).config.backend_options == old.config.backend_options
    assert [(path, effect) for path, _, _, effect in told(old, new)] == [
        ("nodePortAddresses", "restart"),
        ("oomScoreAdj", "live"),
    ]
    again = read("mode: iptables\nnodePortAddresses: [10.0.0.0/8, 127.0.0.0/8]")
    assert merged(old, again).config.node_port_addresses == ("10.0.0.0/8", "127.0.0.0/8")


@pytest.mark.parametrize(
    ("gates", "effect"), [("AllowServiceExternalIPs: false", "live"), ("LoadBalancerIPMode: false", "none")]
)
def test_gates_that_are_not_obeyed_have_no_effect(read: Read, gates: str, effect: str) -> None:
    (change,) = difference(read(""), read(f"featureGates: {{{gates}}}")).changes
    assert (change.path, change.effect) == ("featureGates", effect)


def test_default_addresses_follow_the_bind_address(read: Read) -> None:
    old, new = read(""), read("bindAddress: '::1'")
    assert merged(old, new).config.healthz_bind_address == "[::]:10256"
    assert difference(old, new).live == ("bindAddress", "healthzBindAddress", "metricsBindAddress")


def test_a_port_that_a_flag_switched_off_stays_off(write: Write) -> None:
    path = write(f"{KUBE_PROXY}oomScoreAdj: 1\n")
    old = load([path], {"healthz-bind-address": "", "mode": "ipvs"})
    new = load([write(f"{KUBE_PROXY}oomScoreAdj: 2\n")], {"healthz-bind-address": "", "mode": "ipvs"})
    both = merged(old, new)
    assert (both.config.healthz_bind_address, both.config.oom_score_adj) == (None, 2)
    assert both.config == new.config


def some(field: Field) -> list[object]:
    """A few valid values of a field, the default's first."""
    values: dict[str, list[object]] = {
        "bindAddress": ["0.0.0.0", "10.0.0.1", "::1"],
        "healthzBindAddress": ["", "10.0.0.1:1"],
        "metricsBindAddress": ["", "10.0.0.1:1"],
        "clusterCIDR": ["", "10.0.0.0/8"],
        "nodePortAddresses": ["", "10.0.0.0/8", "127.0.0.0/8,primary", "all"],
        "ipvs.excludeCIDRs": ["", "10.0.0.0/8"],
        "ipFamilies": ["", "IPv4"],
        "backend": ["", "nft", "other", "ipvs"],
        "backendOptions": ["{}", '{"nft": {"x": 1}, "iptables": {"y": 1}, "other": {"z": 1}}'],
        "detectLocalMode": ["ClusterCIDR", "NodeCIDR"],
        "lastKnownGood.file": ["", "/x"],
        "observers.enabled": ["", "a"],
        "observers.disabled": ["", "b"],
    }
    if field.path in values:
        return values[field.path]
    if field.choices:
        return [field.default, *field.choices]
    by_type: dict[str, list[object]] = {
        "bool": [False, True],
        "int": [7, 8],
        "number": [7.5],
        "duration": ["20s", "30s"] if field.path.endswith(".syncPeriod") else ["1s", "2s"],
        "text": ["", "x"],
        "list": ["", "x"],
        "bools": ["", "AllowServiceExternalIPs=false"],
        "any": ["{}", '{"x": {"y": 1}}'],
    }
    return by_type[field.type]


OFTEN = [BY_PATH[path] for path in ("mode", "backend", "nodePortAddresses", "backendOptions")]
SETS = st.lists(st.sampled_from([*FIELDS, *OFTEN * 8]), max_size=10).flatmap(
    lambda fields: st.fixed_dictionaries({field.path: st.sampled_from(some(field)) for field in fields})
)


@given(old=SETS, new=SETS)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_two_configurations_can_be_merged(old: dict[str, object], new: dict[str, object]) -> None:
    """Neither fails; no restart field moves; merging twice is merging once; what remains is what waits."""
    with contextlib.suppress(ConfigError):
        before, after = load([], old), load([], new)
        both = merged(before, after)
        found = difference(before, after)
        for path, field in BY_PATH.items():
            if field.reload == "restart" and field.treatment != "ignored":
                assert both.values[path] == before.values[path]
        assert merged(both, after) == both
        assert difference(both, after).needs_restart == found.needs_restart
        assert difference(both, after).live == ()
        assert both.config.backend_options == before.config.backend_options
        if not found.needs_restart:
            assert both.config == after.config


def test_a_merged_configuration_is_one_that_stands_by_itself(read: Read) -> None:
    both = merged(read(""), read("oomScoreAdj: 5"))
    assert isinstance(both.config, Config)
    assert set(both.origins) == set(both.values) == set(BY_PATH)
