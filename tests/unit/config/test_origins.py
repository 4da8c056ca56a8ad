"""Which origin wins, and what flags and environment variables may say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from proxycore.config import Config, Conntrack, load
from proxycore.config.fields import BY_PATH, ENVIRONMENT, FIELDS
from proxycore.errors import ConfigError

KUBE_PROXY = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
PROXYCORE = "apiVersion: proxycore.io/v1alpha1\nkind: ProxycoreConfiguration\n"

Write = Callable[..., Path]
Changed = Callable[[Config], dict[str, object]]


def test_flag_goes_before_environment_before_file_before_default(changed: Changed, write: Write) -> None:
    path = write(f"{KUBE_PROXY}oomScoreAdj: 1\nclusterCIDR: 10.0.0.0/8\nhostnameOverride: file\n")
    environ = {
        "PROXYCORE_OOM_SCORE_ADJ": "2",
        "PROXYCORE_CLUSTER_CIDR": "11.0.0.0/8",
        "PROXYCORE_TAKEOVER": "",
    }
    loaded = load([path], {"oom-score-adj": 3, "hostname_override": None}, environ)
    assert changed(loaded.config) == {
        "oom_score_adj": 3,
        "cluster_cidr": ("11.0.0.0/8",),
        "hostname_override": "file",
    }
    assert {field: origin for field, origin in loaded.origins.items() if origin != "default"} == {
        "oomScoreAdj": "flag",
        "clusterCIDR": "environment",
        "hostnameOverride": str(path),
    }


@pytest.mark.parametrize("name", ["masquerade-all", "masquerade_all"])
@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_kube_proxys_flags_serve_every_mode_that_they_serve_there(name: str, mode: str) -> None:
    loaded = load([], {"mode": mode, name: True, "iptables-sync-period": "10s"})
    assert (loaded.config.masquerade_all, loaded.config.sync_period_seconds) == (True, 10.0)
    assert loaded.warnings == ()


def test_a_flag_by_path_sets_just_that_field() -> None:
    loaded = load([], {"mode": "nftables", "nftables.syncPeriod": "10s"})
    assert loaded.values["iptables.syncPeriod"] == 30 * 10**9
    assert loaded.config.sync_period_seconds == 10.0


def test_a_flag_can_switch_off_what_a_file_switches_on(write: Write) -> None:
    path = write(f"{KUBE_PROXY}iptables: {{masqueradeAll: true}}\nclusterCIDR: 10.0.0.0/8\n")
    assert load([path], {"masquerade-all": "false", "cluster-cidr": ""}).config == Config()


def test_an_empty_flag_switches_a_port_off() -> None:
    config = load([], {"healthz-bind-address": "", "metrics-bind-address": ""}).config
    assert (config.healthz_bind_address, config.metrics_bind_address) == (None, None)


def test_text_of_flags_and_environment_is_read_as_kube_proxys_flags_are(changed: Changed) -> None:
    environ = {
        "PROXYCORE_FEATURE_GATES": "AllowServiceExternalIPs=false, LoadBalancerIPMode=1",
        "PROXYCORE_NODE_PORT_ADDRESSES": "10.0.0.0/8, fd00::/8",
        "PROXYCORE_CONNTRACK_TCP_BE_LIBERAL": "T",
        "PROXYCORE_CLIENT_CONNECTION_QPS": "7.5",
        "PROXYCORE_BACKEND_OPTIONS": '{"iptables": {"x": [1]}}',
        "PROXYCORE_IPTABLES_SYNC_PERIOD": "1m",
    }
    assert changed(load([], {}, environ).config) == {
        "feature_gates": {"AllowServiceExternalIPs": False, "LoadBalancerIPMode": True},
        "allow_external_ips": False,
        "node_port_addresses": ("10.0.0.0/8", "fd00::/8"),
        "localhost_node_ports": False,
        "conntrack": Conntrack(tcp_be_liberal=True),
        "client_qps": 7.5,
        "backend_options": {"localhostNodePorts": False, "x": [1]},
        "sync_period_seconds": 60.0,
    }


def test_a_misspelt_variable_is_named_but_service_links_are_not() -> None:
    environ = {
        "PROXYCORE_BAKEND": "nft",
        "PROXYCORE_SERVICE_HOST": "10.0.0.1",
        "PROXYCORE_PORT_80_TCP_ADDR": "10.0.0.1",
        "PROXYCORE_WEB_SERVICE_PORT_HTTP": "80",
        "PATH": "/bin",
    }
    assert load([], {}, environ).warnings == (
        "PROXYCORE_BAKEND: is unknown and ignored; did you mean PROXYCORE_BACKEND?",
    )


def test_an_unknown_flag_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="masqurade-all: is no field and no flag; did you mean masquerade-all"
    ):
        load([], {"masqurade-all": True})


def test_two_files_may_share_the_two_documents(write: Write) -> None:
    files = [write(f"{KUBE_PROXY}mode: ipvs\n", "a.yaml"), write(f"{PROXYCORE}takeover: leave\n", "b.yaml")]
    loaded = load(files)
    assert (loaded.config.backend, loaded.config.takeover) == ("ipvs", "leave")
    assert (loaded.origins["mode"], loaded.origins["takeover"]) == (str(files[0]), str(files[1]))


def test_json_is_read_too(write: Write) -> None:
    text = '{"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "oomScoreAdj": 5}'
    assert load([write(text)]).config.oom_score_adj == 5


def test_names_of_fields_and_variables_are_unique() -> None:
    assert len(BY_PATH) == len(ENVIRONMENT) == len(FIELDS)


def test_names_of_variables_follow_from_the_paths() -> None:
    assert [
        BY_PATH[path].environment for path in ("iptables.masqueradeBit", "ipvs.excludeCIDRs", "clusterCIDR")
    ] == [
        "PROXYCORE_IPTABLES_MASQUERADE_BIT",
        "PROXYCORE_IPVS_EXCLUDE_CIDRS",
        "PROXYCORE_CLUSTER_CIDR",
    ]
