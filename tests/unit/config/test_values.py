"""What configuration means: defaults, values, modes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from proxycore.config import Config, Conntrack, Loaded, load
from proxycore.config.fields import BY_PATH

KUBE_PROXY = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
PROXYCORE = "apiVersion: proxycore.io/v1alpha1\nkind: ProxycoreConfiguration\n"

Write = Callable[..., Path]
Read = Callable[[str], Loaded]
Warnings = Callable[[str], list[str]]
Changed = Callable[[Config], dict[str, object]]

KUBEADM = sorted((Path(__file__).parent / "data").glob("kubeadm-*.yaml"))
"""What kubeadm puts into its ConfigMap: zeroes and nulls stand for the default."""


def test_no_configuration_means_the_defaults() -> None:
    loaded = load()
    assert loaded.config == Config()
    assert loaded.warnings == ()
    assert set(loaded.origins.values()) == {"default"}


def test_every_field_has_a_value_and_an_origin() -> None:
    loaded = load()
    assert set(loaded.origins) == set(loaded.values) == set(BY_PATH)


@pytest.mark.parametrize("path", KUBEADM, ids=lambda path: path.stem)
def test_the_zero_and_null_values_of_kubeadm_mean_the_defaults(changed: Changed, path: Path) -> None:
    loaded = load([path])
    assert changed(loaded.config) == {
        "kubeconfig": "/var/lib/kube-proxy/kubeconfig.conf",
        "cluster_cidr": ("10.244.0.0/16",),
    }
    assert loaded.warnings == ()
    written = {field for field, origin in loaded.origins.items() if origin != "default"}
    assert written == {"bindAddress", "clientConnection.kubeconfig", "clusterCIDR"}


def test_the_files_of_several_kubeadms_are_tried() -> None:
    assert len(KUBEADM) == 2


def test_ports_are_on_the_family_of_bind_address(read: Read) -> None:
    def ports(text: str) -> tuple[str | None, str | None]:
        config = read(text).config
        return config.healthz_bind_address, config.metrics_bind_address

    assert ports("") == ("0.0.0.0:10256", "127.0.0.1:10249")
    assert ports("bindAddress: 10.0.0.1") == ("0.0.0.0:10256", "127.0.0.1:10249")
    assert ports("bindAddress: '::'") == ("[::]:10256", "[::1]:10249")
    assert ports("bindAddress: fd00::1\nhealthzBindAddress: 0.0.0.0") == ("0.0.0.0:10256", "[::1]:10249")
    assert ports("metricsBindAddress: '::'\nhealthzBindAddress: '[::]:1'") == ("[::]:1", "[::]:10249")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://10.0.0.1:6443", "https://10.0.0.1:6443"),
        ("http://[fd00::1]:8080/k8s", "http://[fd00::1]:8080/k8s"),
        ("10.0.0.1:6443", "https://10.0.0.1:6443"),
        ("api.internal", "https://api.internal"),
    ],
)
def test_the_address_of_the_api_server_is_a_url(text: str, url: str) -> None:
    loaded = load([], {"master": text})
    assert (loaded.config.master, loaded.values["apiServer.master"]) == (url, url)


def test_zero_is_a_value_where_kube_proxy_holds_a_pointer(changed: Changed, read: Read) -> None:
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
apiServer: {context: blue, master: "https://10.0.0.1:6443", staleAfter: 5m}
lastKnownGood: {file: /saved, wait: 0s}
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
        kube_context="blue",
        master="https://10.0.0.1:6443",
        stale_after_seconds=300.0,
        saved_state_file="/saved",
        saved_state_wait_seconds=0.0,
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


def test_settings_of_other_modes_are_named_once_a_section(warnings: Warnings) -> None:
    assert warnings(f"mode: nftables\n{SECTIONS}") == [
        "c.yaml:4: iptables.masqueradeBit, iptables.masqueradeAll, iptables.syncPeriod, iptables.minSyncPeriod: "
        "have no effect: the backend is nft, with the settings of nftables",
        "c.yaml:5: ipvs.syncPeriod, ipvs.minSyncPeriod, ipvs.scheduler, ipvs.excludeCIDRs, ipvs.strictARP, "
        "ipvs.tcpTimeout, ipvs.tcpFinTimeout, ipvs.udpTimeout: "
        "have no effect: the backend is nft, with the settings of nftables",
    ]


def test_a_backend_of_a_third_party_takes_the_section_of_the_mode(
    changed: Changed, read: Read, tmp_path: Path
) -> None:
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
            False,
        ),
    ],
)
def test_where_localhost_node_ports_are_wanted(read: Read, text: str, wanted: bool) -> None:
    assert read(text).config.localhost_node_ports is wanted


def test_the_default_of_min_sync_period_is_not_applied_but_a_written_one_is(read: Read) -> None:
    assert read("iptables: {minSyncPeriod: 0s}").config.min_sync_period_seconds == 0.0
    assert read("iptables: {minSyncPeriod: 1s}").config.min_sync_period_seconds == 1.0
