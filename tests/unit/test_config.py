"""Configuration: what is read, what wins, what is refused, what is only warned about."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxycore.config import Config, Conntrack, Loaded, dump, load
from proxycore.config.field import Field
from proxycore.config.fields import BY_PATH, ENVIRONMENT, FIELDS
from proxycore.errors import ConfigError

KUBE_PROXY = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
PROXYCORE = "apiVersion: proxycore.io/v1alpha1\nkind: ProxycoreConfiguration\n"

KUBEADM = (
    KUBE_PROXY
    + """\
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection: {acceptContentTypes: "", burst: 0, contentType: "", kubeconfig: /kubeconfig.conf, qps: 0}
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal: {bridgeInterface: "", interfaceNamePrefix: ""}
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables: {localhostNodePorts: null, masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
logging:
  flushFrequency: 0
  options: {json: {infoBufferSize: "0"}, text: {infoBufferSize: "0"}}
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables: {masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel: {enableDSR: false, forwardHealthCheckVip: false, networkName: "", rootHnsEndpointName: "", sourceVip: ""}
windowsRunAsService: false
"""
)

Write = Callable[..., Path]
Read = Callable[[str], Loaded]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def read(write: Write) -> Read:
    """A KubeProxyConfiguration and a ProxycoreConfiguration after `---`, without their heads."""

    def read(text: str) -> Loaded:
        first, _, second = text.partition("---\n")
        return load([write(f"{KUBE_PROXY}{first}\n---\n{PROXYCORE}{second}\n")])

    return read


@pytest.fixture
def refuse(read: Read, tmp_path: Path) -> Callable[[str], str]:
    """The error's text, the file's folder left out."""

    def refuse(text: str) -> str:
        with pytest.raises(ConfigError) as caught:
            read(text)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return refuse


@pytest.fixture
def warnings(read: Read, tmp_path: Path) -> Callable[[str], list[str]]:
    def warnings(text: str) -> list[str]:
        return [warning.replace(f"{tmp_path}/", "") for warning in read(text).warnings]

    return warnings


def changed(config: Config) -> dict[str, object]:
    """What differs from the defaults."""
    default = Config()
    return {
        name: getattr(config, name)
        for name in Config.__struct_fields__
        if getattr(config, name) != getattr(default, name)
    }


# -- defaults ---------------------------------------------------------------------------------------------------


def test_no_configuration_means_the_defaults() -> None:
    loaded = load()
    assert loaded.config == Config()
    assert loaded.warnings == ()
    assert set(loaded.origins.values()) == {"default"}


def test_every_field_has_a_value_and_an_origin() -> None:
    loaded = load()
    assert set(loaded.origins) == set(loaded.values) == set(BY_PATH)


def test_the_zero_and_null_values_of_kubeadm_mean_the_defaults(write: Write) -> None:
    path = write(KUBEADM)
    loaded = load([path])
    assert changed(loaded.config) == {"kubeconfig": "/kubeconfig.conf", "cluster_cidr": ("10.244.0.0/16",)}
    assert loaded.warnings == ()
    written = {field for field, origin in loaded.origins.items() if origin != "default"}
    assert written == {"bindAddress", "clientConnection.kubeconfig", "clusterCIDR"}


def test_zero_is_a_value_where_kube_proxy_holds_a_pointer(read: Read) -> None:
    loaded = read(
        "iptables: {masqueradeBit: 0, localhostNodePorts: false}\noomScoreAdj: 0\n"
        "conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}\n"
    )
    assert changed(loaded.config) == {
        "masquerade_bit": 0,
        "localhost_node_ports": False,
        "backend_options": {"localhostNodePorts": False},
        "oom_score_adj": 0,
        "conntrack": Conntrack(
            max_per_core=0, minimum=0, tcp_established_timeout_seconds=0.0, tcp_close_wait_timeout_seconds=0.0
        ),
    }


def test_everything_written_arrives(read: Read) -> None:
    loaded = read(
        """\
featureGates: {AllowServiceExternalIPs: false}
clientConnection: {kubeconfig: /k, qps: 50, burst: 100}
logging: {format: json, verbosity: 4}
hostnameOverride: Node-1
bindAddress: 2001:db8:0::1
healthzBindAddress: 127.0.0.1
metricsBindAddress: "[::1]:9000"
bindAddressHardFail: true
mode: nftables
nftables: {masqueradeBit: 3, masqueradeAll: true, syncPeriod: 1m, minSyncPeriod: 1500ms}
detectLocalMode: InterfaceNamePrefix
detectLocal: {interfaceNamePrefix: veth}
nodePortAddresses: [primary, 10.1.2.3/8, 10.9.9.9/8]
oomScoreAdj: -500
conntrack:
  maxPerCore: 1
  min: 2
  tcpEstablishedTimeout: 3s
  tcpCloseWaitTimeout: 4s
  tcpBeLiberal: true
  udpTimeout: 5s
  udpStreamTimeout: 6s
---
backendOptions: {nft: {slots: 8}, other: {x: 1}}
takeover: refuse
verifyInterval: 0s
ipFamilies: [IPv6]
observers: {enabled: [a, b], disabled: [c], options: {a: {x: 1}, b: null}}
"""
    )
    assert loaded.warnings == ()
    assert loaded.config == Config(
        backend="nft",
        mode="nftables",
        backend_options={"slots": 8},
        takeover="refuse",
        source="kubernetes",
        verify_interval_seconds=0.0,
        ip_families=("IPv6",),
        observers_enabled=("a", "b"),
        observers_disabled=("c",),
        observer_options={"a": {"x": 1}, "b": {}},
        feature_gates={"AllowServiceExternalIPs": False},
        allow_external_ips=False,
        kubeconfig="/k",
        client_qps=50.0,
        client_burst=100,
        log_format="json",
        log_verbosity=4,
        hostname_override="node-1",
        bind_address="2001:db8::1",
        healthz_bind_address="127.0.0.1:10256",
        metrics_bind_address="[::1]:9000",
        bind_address_hard_fail=True,
        oom_score_adj=-500,
        conntrack=Conntrack(
            max_per_core=1,
            minimum=2,
            tcp_established_timeout_seconds=3.0,
            tcp_close_wait_timeout_seconds=4.0,
            tcp_be_liberal=True,
            udp_timeout_seconds=5.0,
            udp_stream_timeout_seconds=6.0,
        ),
        masquerade_bit=3,
        masquerade_all=True,
        localhost_node_ports=False,
        sync_period_seconds=60.0,
        min_sync_period_seconds=1.5,
        detect_local_mode="InterfaceNamePrefix",
        bridge_interface="",
        interface_name_prefix="veth",
        cluster_cidr=(),
        node_port_addresses=("primary", "10.0.0.0/8"),
    )


# -- modes ------------------------------------------------------------------------------------------------------

SECTIONS = """\
iptables: {masqueradeBit: 1, masqueradeAll: true, syncPeriod: 11s, minSyncPeriod: 1s}
ipvs: {syncPeriod: 22s, minSyncPeriod: 2s, scheduler: lc, excludeCIDRs: [10.1.1.1/8], strictARP: true,
       tcpTimeout: 1s, tcpFinTimeout: 2s, udpTimeout: 3s}
nftables: {masqueradeBit: 3, syncPeriod: 33s, minSyncPeriod: 3s}
"""


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("iptables", ("iptables", 1, True, 11.0, 1.0, ("all",), True)),
        ("ipvs", ("ipvs", 1, True, 22.0, 2.0, ("all",), False)),
        ("nftables", ("nft", 3, False, 33.0, 3.0, ("primary",), False)),
    ],
)
def test_the_mode_chooses_backend_section_and_defaults(
    read: Read, mode: str, expected: tuple[object, ...]
) -> None:
    config = read(f"mode: {mode}\n{SECTIONS}").config
    assert expected == (
        config.backend,
        config.masquerade_bit,
        config.masquerade_all,
        config.sync_period_seconds,
        config.min_sync_period_seconds,
        config.node_port_addresses,
        config.localhost_node_ports,
    )


def test_the_settings_of_ipvs_reach_its_backend(read: Read) -> None:
    assert read(f"mode: ipvs\n{SECTIONS}---\nbackendOptions: {{ipvs: {{x: 1}}}}").config.backend_options == {
        "scheduler": "lc",
        "excludeCIDRs": ("10.0.0.0/8",),
        "strictARP": True,
        "tcpTimeoutSeconds": 1.0,
        "tcpFinTimeoutSeconds": 2.0,
        "udpTimeoutSeconds": 3.0,
        "x": 1,
    }


def test_options_that_are_all_zero_reach_the_backend(read: Read) -> None:
    options = read(
        "---\nbackend: other\nbackendOptions: {other: {limit: 0, on: false}}"
    ).config.backend_options
    assert options == {"limit": 0, "true": False}


def test_settings_of_other_modes_are_named_once_a_section(warnings: Callable[[str], list[str]]) -> None:
    assert warnings(f"mode: nftables\n{SECTIONS}") == [
        "c.yaml:4: iptables.masqueradeBit, iptables.masqueradeAll, iptables.syncPeriod, iptables.minSyncPeriod: "
        "have no effect: the backend is nft, with the settings of nftables",
        "c.yaml:5: ipvs.syncPeriod, ipvs.minSyncPeriod, ipvs.scheduler, ipvs.excludeCIDRs, ipvs.strictARP, "
        "ipvs.tcpTimeout, ipvs.tcpFinTimeout, ipvs.udpTimeout: "
        "have no effect: the backend is nft, with the settings of nftables",
    ]


def test_a_backend_of_a_third_party_takes_the_section_of_the_mode(read: Read, tmp_path: Path) -> None:
    loaded = read(f"mode: ipvs\n{SECTIONS}---\nbackend: other\nbackendOptions: {{other: {{x: 1}}}}\n")
    assert changed(loaded.config) == {
        "backend": "other",
        "mode": "ipvs",
        "backend_options": {"x": 1},
        "masquerade_bit": 1,
        "masquerade_all": True,
        "sync_period_seconds": 22.0,
        "min_sync_period_seconds": 2.0,
        "localhost_node_ports": False,
    }
    idle = "the backend is other, with the settings of ipvs"
    assert [warning.replace(f"{tmp_path}/", "") for warning in loaded.warnings] == [
        f"c.yaml:4: iptables.syncPeriod, iptables.minSyncPeriod: have no effect: {idle}",
        "c.yaml:5: ipvs.scheduler, ipvs.excludeCIDRs, ipvs.strictARP, ipvs.tcpTimeout, ipvs.tcpFinTimeout, "
        f"ipvs.udpTimeout: have no effect: {idle}",
        f"c.yaml:7: nftables.masqueradeBit, nftables.syncPeriod, nftables.minSyncPeriod: have no effect: {idle}",
    ]


def test_backend_overrules_mode_and_says_so(read: Read, tmp_path: Path) -> None:
    loaded = read("mode: iptables\n---\nbackend: nft\n")
    assert (loaded.config.backend, loaded.config.mode) == ("nft", "nftables")
    assert loaded.config.node_port_addresses == ("primary",)
    assert loaded.warnings == (
        f"{tmp_path}/c.yaml:3: mode: iptables gives way to backend nft, for which the settings of nftables hold",
    )


def test_a_mode_that_stands_higher_overrules_backend(write: Write) -> None:
    path = write(f"{PROXYCORE}backend: nft\n")
    assert load([path], {"proxy-mode": "ipvs"}).config.backend == "ipvs"
    assert load([path], {}, {"PROXYCORE_MODE": "ipvs"}).config.backend == "ipvs"
    assert load([path], {"backend": "other"}, {"PROXYCORE_MODE": "ipvs"}).config.backend == "other"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("mode: iptables", True),
        ("mode: iptables\niptables: {localhostNodePorts: false}", False),
        ("mode: iptables\nnodePortAddresses: [10.0.0.0/8]", False),
        ("mode: iptables\nnodePortAddresses: [10.0.0.0/8, 127.0.0.0/8]", True),
        ("mode: iptables\nnodePortAddresses: ['fd00::/8']", True),
        ("mode: iptables\nnodePortAddresses: [primary]", False),
        ("mode: ipvs", False),
        ("mode: nftables\nnodePortAddresses: [primary, localhost]", False),
        ("mode: nftables\nfeatureGates: {KubeProxyNFTablesLocalhostNodePorts: true}", False),
        (
            "mode: nftables\nnodePortAddresses: [all]\n"
            "featureGates: {KubeProxyNFTablesLocalhostNodePorts: true}",
            False,
        ),
        (
            "mode: nftables\nnodePortAddresses: [primary, localhost]\n"
            "featureGates: {KubeProxyNFTablesLocalhostNodePorts: true}",
            True,
        ),
    ],
)
def test_where_localhost_node_ports_are_wanted(read: Read, text: str, wanted: bool) -> None:
    assert read(text).config.localhost_node_ports is wanted


def test_the_default_of_min_sync_period_is_not_applied_but_a_written_one_is(read: Read) -> None:
    assert read("iptables: {minSyncPeriod: 0s}").config.min_sync_period_seconds == 0.0
    assert read("iptables: {minSyncPeriod: 1s}").config.min_sync_period_seconds == 1.0


# -- precedence -------------------------------------------------------------------------------------------------


def test_flag_goes_before_environment_before_file_before_default(write: Write) -> None:
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


def test_text_of_flags_and_environment_is_read_as_kube_proxys_flags_are() -> None:
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


# -- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mode: kernelspace", "mode: 'kernelspace' is none of iptables, ipvs, nftables (line 3)"),
        ("mode: 5", "mode: must be text, not 5 (line 3)"),
        ("mode: [ipvs]", "mode: must be text, not a list (line 3)"),
        ("\niptables:\n  masqueradeBit: 32", "iptables.masqueradeBit: 32 is not within 0 to 31 (line 5)"),
        ("nftables: {masqueradeBit: -1}", "nftables.masqueradeBit: -1 is not within 0 to 31 (line 3)"),
        (
            "nftables: {masqueradeBit: true}",
            "nftables.masqueradeBit: must be a whole number, not true (line 3)",
        ),
        (
            "iptables: {masqueradeAll: 'true'}",
            'iptables.masqueradeAll: must be true or false, not the text "true" (line 3)',
        ),
        ("iptables: [x]", "iptables: must be a mapping (line 3)"),
        ("iptables: {syncPeriod: 30}", "iptables.syncPeriod: 30 has no unit: write 30s for seconds (line 3)"),
        ("iptables: {syncPeriod: -1s}", "iptables.syncPeriod: -1s is negative (line 3)"),
        (
            "ipvs: {syncPeriod: 1s, minSyncPeriod: 2s}",
            "ipvs.minSyncPeriod: 2s is longer than syncPeriod, 1s (line 3)",
        ),
        ("ipvs: {udpTimeout: -1s}", "ipvs.udpTimeout: -1s is negative (line 3)"),
        (
            "ipvs: {excludeCIDRs: [10.0.0.1]}",
            "ipvs.excludeCIDRs: '10.0.0.1' is no CIDR such as 10.0.0.0/8 or fd00::/8 (line 3)",
        ),
        (
            "ipvs: {scheduler: 'r r'}",
            "ipvs.scheduler: 'r r' is not the name of a scheduler such as rr (line 3)",
        ),
        (
            "clusterCIDR: 10.0.0.0/8,11.0.0.0/8",
            "clusterCIDR: 10.0.0.0/8, 11.0.0.0/8: at most one CIDR of each family (line 3)",
        ),
        (
            "clusterCIDR: 10.0.0.0/33",
            "clusterCIDR: '10.0.0.0/33' is no CIDR such as 10.0.0.0/8 or fd00::/8 (line 3)",
        ),
        (
            "clusterCIDR: 10.0.0.0/255.0.0.0",
            "clusterCIDR: '10.0.0.0/255.0.0.0' is no CIDR such as 10.0.0.0/8 or fd00::/8 (line 3)",
        ),
        (
            "nodePortAddresses: [Primary]",
            "nodePortAddresses: 'Primary' is neither a CIDR nor one of primary, localhost, all (line 3)",
        ),
        (
            "nodePortAddresses: 10.0.0.0/8",
            'nodePortAddresses: must be a list of texts, not the text "10.0.0.0/8" (line 3)',
        ),
        (
            "detectLocalMode: Magic",
            "detectLocalMode: 'Magic' is none of ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix (line 3)",
        ),
        (
            "detectLocalMode: BridgeInterface",
            "detectLocal.bridgeInterface: is required by detectLocalMode BridgeInterface",
        ),
        (
            "detectLocalMode: InterfaceNamePrefix",
            "detectLocal.interfaceNamePrefix: is required by detectLocalMode InterfaceNamePrefix",
        ),
        (
            "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: 'a\"; drop'}",
            "detectLocal.bridgeInterface: 'a\"; drop' is no interface name: it must not hold /, : or blanks (line 4)",
        ),
        (
            "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: sixteen-bytes-xx}",
            "detectLocal.bridgeInterface: 'sixteen-bytes-xx' is no interface name: at most 15 bytes (line 4)",
        ),
        ("oomScoreAdj: -1001", "oomScoreAdj: -1001 is not within -1000 to 1000 (line 3)"),
        ("conntrack: {maxPerCore: -1}", "conntrack.maxPerCore: -1 is not within 0 to 2147483647 (line 3)"),
        ("conntrack: {udpTimeout: -1s}", "conntrack.udpTimeout: -1s is negative (line 3)"),
        ("bindAddress: node-1", "bindAddress: 'node-1' is no IP address (line 3)"),
        ("healthzBindAddress: localhost:80", "healthzBindAddress: 'localhost' is no IP address (line 3)"),
        (
            "healthzBindAddress: '0.0.0.0:0'",
            "healthzBindAddress: '0.0.0.0:0' has no port within 1 to 65535 (line 3)",
        ),
        ("metricsBindAddress: ':80'", "metricsBindAddress: '' is no IP address (line 3)"),
        ("hostnameOverride: a b", "hostnameOverride: 'a b' is no node name (line 3)"),
        ("logging: {format: xml}", "logging.format: 'xml' is none of text, json (line 3)"),
        ("clientConnection: {burst: -1}", "clientConnection.burst: -1 is less than 0 (line 3)"),
        (
            "featureGates: {X: 1}",
            "featureGates: must be a mapping of names to true or false, not a mapping (line 3)",
        ),
        ("---\ntakeover: now", "takeover: 'now' is none of auto, refuse, leave (line 7)"),
        ("---\nbackend: ../x", "backend: '../x' is not the name of a plugin (line 7)"),
        ("---\nsource: ':x'", "source: ':x' is not of the form NAME or NAME:ARGUMENT (line 7)"),
        (
            "---\nbackendOptions: [x]",
            "backendOptions: must be a mapping of plugin names to their settings (line 7)",
        ),
        (
            "---\nbackendOptions: {nft: 1}",
            "backendOptions: what stands under 'nft' must be a mapping of settings (line 7)",
        ),
        ("---\nipFamilies: [IPv5]", "ipFamilies: 'IPv5' is neither IPv4 nor IPv6 (line 7)"),
        ("---\nverifyInterval: -1s", "verifyInterval: -1s is negative (line 7)"),
        (
            "---\nobservers: {enabled: [a], disabled: [a]}",
            "observers.disabled: a: also in observers.enabled (line 7)",
        ),
    ],
)
def test_bad_values_are_refused_with_file_field_and_reason(
    refuse: Callable[[str], str], text: str, message: str
) -> None:
    where = "" if message.split(": ")[1].startswith("is required") else "c.yaml: "
    assert refuse(text) == f"{where}{message}"


def test_everything_wrong_is_said_at_once(write: Write, tmp_path: Path) -> None:
    path = write(
        f"{KUBE_PROXY}mode: x\nclusterCIDR: y\niptables: {{masqueradeBit: 99, syncPeriod: 1, minSyncPeriod: 5m}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load([path], {"oom-score-adj": "low"}, {"PROXYCORE_TAKEOVER": "now"})
    assert (caught.value.field, caught.value.file) == ("mode", str(path))
    assert str(caught.value).replace(f"{tmp_path}/", "") == (
        "c.yaml: mode: 'x' is none of iptables, ipvs, nftables (line 3); "
        "c.yaml: iptables.masqueradeBit: 99 is not within 0 to 31 (line 5); "
        "c.yaml: iptables.syncPeriod: 1 has no unit: write 1s for seconds (line 5); "
        "takeover: 'now' is none of auto, refuse, leave (PROXYCORE_TAKEOVER); "
        'oomScoreAdj: must be a whole number, not the text "low" (--oom-score-adj); '
        "c.yaml: clusterCIDR: 'y' is no CIDR such as 10.0.0.0/8 or fd00::/8 (line 4)"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no configuration"),
        ("- a\n", "is not a mapping with apiVersion and kind"),
        (
            "kind: ConfigMap\napiVersion: v1\n",
            "kind: is apiVersion 'v1', kind 'ConfigMap'; wanted is kubeproxy",
        ),
        (
            "apiVersion: kubeproxy.config.k8s.io/v1alpha2\nkind: KubeProxyConfiguration\n",
            "apiVersion: is apiVersion 'kubeproxy.config.k8s.io/v1alpha2'",
        ),
        (f"{PROXYCORE}---\n{PROXYCORE}", "kind: a second ProxycoreConfiguration; the first one stands at"),
        (
            f"{PROXYCORE}a: [\n",
            "is not YAML: while parsing a flow node, did not find expected node content (line 4)",
        ),
    ],
)
def test_bad_files_are_refused(write: Write, content: str, message: str) -> None:
    path = write(content)
    with pytest.raises(ConfigError) as caught:
        load([path])
    assert str(caught.value).startswith(f"{path}: {message}")
    assert caught.value.file == str(path)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    latin, large = tmp_path / "latin", tmp_path / "large"
    latin.write_bytes(b"a: 1\nb: \xe9\n")
    large.write_bytes(b"#" * ((1 << 20) + 1))
    for path, reason in (
        (tmp_path / "gone", "cannot be read: No such file or directory"),
        (tmp_path, "cannot be read: Is a directory"),
        (latin, "is not UTF-8 text (line 2)"),
        (large, "is longer than the 1048576 bytes that are read"),
    ):
        with pytest.raises(ConfigError) as caught:
            load([path])
        assert str(caught.value) == f"{path}: {reason}"


# -- warnings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "iptables: {masquradeBit: 1}",
            ["c.yaml:3: iptables.masquradeBit: is unknown and ignored; did you mean iptables.masqueradeBit?"],
        ),
        ("future: {a: 1}", ["c.yaml:3: future: is unknown and ignored"]),
        (
            "takeover: auto",
            ["c.yaml:3: takeover: is unknown and ignored; it belongs into a ProxycoreConfiguration"],
        ),
        (
            "iptables.masqueradeBit: 1",
            [
                "c.yaml:3: iptables.masqueradeBit: is unknown and ignored; did you mean iptables.masqueradeBit?"
            ],
        ),
        (
            "oomScoreAdj: 1\noomScoreAdj: 2",
            ["c.yaml:4: key 'oomScoreAdj' stands twice in one mapping; the last one counts"],
        ),
        (
            "enableProfiling: true",
            ["c.yaml:3: enableProfiling: has no effect: there are no Go profiles to serve"],
        ),
        (
            "logging: {flushFrequency: 1000000000}",
            ["c.yaml:3: logging.flushFrequency: has no effect: each line is written at once"],
        ),
        (
            "logging: {flushFrequency: 5s}\nconfigSyncPeriod: 15m\nclientConnection: {contentType: application/json}",
            [],
        ),
        (
            "featureGates: {NFTablesNetlink: true, KubeProxyIPVS: false, New: true, ServiceTrafficDistribution: false}",
            [
                "c.yaml:3: featureGates.KubeProxyIPVS: false has no effect: the backend ipvs is maintained here",
                "c.yaml:3: featureGates.New: true has no effect: it is unknown here",
                "c.yaml:3: featureGates.ServiceTrafficDistribution: false has no effect: settled",
            ],
        ),
        (
            "clusterCIDR: 10.0.0.0/8\ndetectLocalMode: BridgeInterface\n"
            "detectLocal: {bridgeInterface: b, interfaceNamePrefix: c}",
            [
                "c.yaml:5: detectLocal.interfaceNamePrefix: has no effect: detectLocalMode is BridgeInterface",
                "c.yaml:3: clusterCIDR: has no effect: detectLocalMode is BridgeInterface",
            ],
        ),
        (
            "clientConnection: {kubeconfig: /k, qps: 1}\n---\nsource: file:/m",
            [
                "c.yaml:3: clientConnection.kubeconfig, clientConnection.qps: have no effect: the source is file:/m",
            ],
        ),
    ],
)
def test_what_has_no_effect_is_named(
    warnings: Callable[[str], list[str]], text: str, expected: list[str]
) -> None:
    assert warnings(text) == expected


def some_value(field: Field) -> object:
    """A valid value that is not the default."""
    special: dict[str, object] = {
        "bindAddress": "10.0.0.1",
        "healthzBindAddress": "10.0.0.1:1",
        "metricsBindAddress": "10.0.0.1:1",
        "clusterCIDR": "10.0.0.0/8",
        "nodePortAddresses": ["10.0.0.0/8"],
        "ipvs.excludeCIDRs": ["10.0.0.0/8"],
        "ipFamilies": ["IPv4"],
        "iptables.syncPeriod": "40s",
        "backendOptions": {"iptables": {"x": 1}},
    }
    if field.path in special:
        return special[field.path]
    if field.choices:
        return next(
            choice for choice in field.choices if choice not in (field.default, "iptables", "BridgeInterface")
        )
    by_type: dict[str, object] = {
        "bool": not field.default,
        "int": 7,
        "number": 7.5,
        "duration": "20s",
        "text": "x",
        "list": ["x"],
        "bools": {"AllowServiceExternalIPs": False},
        "any": {"x": {"y": 1}},
    }
    return by_type[field.type]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.path)
def test_every_field_changes_something_or_is_named_in_a_warning(read: Read, field: Field) -> None:
    value: object = some_value(field)
    for part in reversed(field.path.split(".")):
        value = {part: value}
    text = yaml.safe_dump(value)
    loaded = read(text if field.document == "KubeProxyConfiguration" else f"---\n{text}")
    named = any(field.path in warning for warning in loaded.warnings)
    assert bool(changed(loaded.config)) != named
    assert (field.treatment == "ignored") <= named


# -- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"mode: nftables\n{SECTIONS}",
        f"mode: ipvs\n{SECTIONS}---\nbackend: other\n",
        "hostnameOverride: '08'\nlogging: {vmodule: [{filePattern: 'a=\"\\x7f\\u00e9', verbosity: 3}]}",
        "featureGates: {A: true}\n---\nsource: 'file:/a b\\t#'\nbackendOptions: {iptables: {'yes': [~, 1.5, no, '0o17']}}",
        "detectLocalMode: NodeCIDR\nbindAddress: '::'\n---\nverifyInterval: 1.5ms\nobservers: {disabled: [x]}",
    ],
)
def test_what_is_written_reads_as_the_same_configuration(read: Read, write: Write, text: str) -> None:
    loaded = read(text)
    for origins in (False, True):
        again = load([write(dump(loaded, origins=origins), "again.yaml")])
        assert again.config == loaded.config
        assert again.values == loaded.values


def test_origins_stand_beside_the_fields(write: Write) -> None:
    path = write(f"{KUBE_PROXY}oomScoreAdj: 5\n")
    lines = dump(load([path], {"mode": "ipvs"}, {"PROXYCORE_SOURCE": "file:/m"}), origins=True).splitlines()
    assert lines[:3] == KUBE_PROXY.splitlines() + ["featureGates: {}  # default"]
    assert {f"oomScoreAdj: 5  # {path}", "mode: ipvs  # flag", 'source: "file:/m"  # environment'} < set(
        lines
    )


# -- the table of fields ----------------------------------------------------------------------------------------


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


# -- anything at all --------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["10.0.0.0/8", "::1", "1.2.3.4:5", "30s", "0s", "nftables", "all", "primary", "BridgeInterface"]
    )
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
SECTION_NAMES = sorted({field.path.partition(".")[0] for field in FIELDS})
LEAF_NAMES = sorted({field.path.rpartition(".")[2] for field in FIELDS})
BODIES = st.dictionaries(
    st.sampled_from(SECTION_NAMES) | st.text(max_size=8),
    ANYTHING | st.dictionaries(st.sampled_from(LEAF_NAMES) | st.text(max_size=8), ANYTHING, max_size=4),
    max_size=6,
)
HEADS = st.sampled_from([KUBE_PROXY, PROXYCORE])


@given(head=HEADS, body=BODIES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_mapping_is_a_configuration_or_a_config_error(
    tmp_path: Path, head: str, body: dict[str, object]
) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(head + yaml.safe_dump(body))
    with contextlib.suppress(ConfigError):
        loaded = load([path])
        assert msgspec.convert(msgspec.to_builtins(loaded.config), Config) is not None


@given(environ=st.dictionaries(st.sampled_from(sorted(ENVIRONMENT)), st.text(max_size=20), max_size=5))
def test_any_environment_is_a_configuration_or_a_config_error(environ: dict[str, str]) -> None:
    with contextlib.suppress(ConfigError):
        load([], {}, environ)


@given(flags=st.dictionaries(st.sampled_from(sorted(BY_PATH)), ANYTHING, max_size=5))
@settings(deadline=None)
def test_any_flags_are_a_configuration_or_a_config_error(flags: dict[str, object]) -> None:
    with contextlib.suppress(ConfigError):
        load([], flags)
