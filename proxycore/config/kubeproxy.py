"""The fields of kube-proxy's own document, KubeProxyConfiguration, kubeproxy.config.k8s.io/v1alpha1."""

from __future__ import annotations

from .duration import SECOND
from .field import Field, Type

INT32 = (1 << 31) - 1
MODES = {"iptables": "iptables", "ipvs": "ipvs", "nftables": "nft"}
"""kube-proxy's modes, and the backend that each stands for."""
DEFAULT_MODE = "iptables"

_MIN_SYNC = "a positive value is honoured; kube-proxy's default of 1s is not applied: changes need not wait"
_SYNC = "limits the back-off after a failure and says how long work may wait before the proxy is unwell"
_WINDOWS = "it is for Windows"
_JSON = "JSON is always used"
_PROTOBUF = "application/vnd.kubernetes.protobuf"
_ENCODINGS = ("application/json", _PROTOBUF, f"{_PROTOBUF},application/json", f"application/json,{_PROTOBUF}")
_KEPT = "0s: the system's value stays"


def _field(path: str, type_: Type, default: object, note: str = "", **more: object) -> Field:
    return Field(path=path, type=type_, default=default, note=note, **more)  # type: ignore[arg-type]


def _live(path: str, type_: Type, default: object, note: str = "", **more: object) -> Field:
    return _field(path, type_, default, note, reload="live", **more)


def _ignored(path: str, type_: Type, default: object, note: str, **more: object) -> Field:
    return _field(path, type_, default, note, treatment="ignored", **more)


_GENERAL = (
    _live(
        "featureGates",
        "bools",
        {},
        "see the table of gates",
        treatment="differently",
        flags=("feature-gates",),
    ),
    _field(
        "clientConnection.kubeconfig",
        "text",
        "",
        "for the source `kubernetes`; empty: `KUBECONFIG`, then the pod's service account, then `~/.kube/config`",
        flags=("kubeconfig",),
    ),
    _ignored("clientConnection.acceptContentTypes", "text", "", _JSON, harmless=_ENCODINGS),
    _ignored(
        "clientConnection.contentType",
        "text",
        _PROTOBUF,
        _JSON,
        flags=("kube-api-content-type",),
        harmless=_ENCODINGS,
    ),
    _field(
        "clientConnection.qps",
        "number",
        5.0,
        "watches do not count; negative: no limit",
        flags=("kube-api-qps",),
    ),
    _field("clientConnection.burst", "int", 10, flags=("kube-api-burst",), minimum=0),
    _live("logging.format", "text", "text", flags=("logging-format",), choices=("text", "json")),
    _ignored(
        "logging.flushFrequency",
        "duration",
        5 * SECOND,
        "each line is written at once",
        flags=("log-flush-frequency",),
    ),
    _live(
        "logging.verbosity",
        "int",
        0,
        "4 and more: debugging lines",
        treatment="differently",
        flags=("v",),
        minimum=0,
    ),
    _ignored("logging.vmodule", "any", [], "verbosity is one for all modules", flags=("vmodule",)),
    _ignored("logging.options", "any", {}, "lines go to standard error, unbuffered"),
    _field(
        "hostnameOverride", "text", "", "lower-cased; empty: the host's name", flags=("hostname-override",)
    ),
    _live(
        "bindAddress",
        "text",
        "0.0.0.0",
        "names the node's primary address, binds nothing",
        flags=("bind-address",),
    ),
    _live(
        "healthzBindAddress",
        "text",
        "",
        "empty: `0.0.0.0:10256`, or `[::]:10256` if bindAddress is IPv6; without a port: 10256",
        flags=("healthz-bind-address",),
    ),
    _live(
        "metricsBindAddress",
        "text",
        "",
        "empty: `127.0.0.1:10249`, or `[::1]:10249` if bindAddress is IPv6; without a port: 10249",
        flags=("metrics-bind-address",),
    ),
    _field(
        "bindAddressHardFail",
        "bool",
        False,
        "an address that cannot be opened at the start ends the proxy; else it is tried again",
        flags=("bind-address-hard-fail",),
    ),
    _ignored("enableProfiling", "bool", False, "there are no Go profiles to serve", flags=("profiling",)),
    _ignored(
        "showHiddenMetricsForVersion",
        "text",
        "",
        "no metric is hidden",
        flags=("show-hidden-metrics-for-version",),
    ),
    _field(
        "mode",
        "text",
        "",
        "empty: iptables; `nftables` is the backend nft; `backend` overrules it",
        flags=("proxy-mode",),
        choices=tuple(MODES),
    ),
)

_BY_MODE = (
    _field(
        "iptables.masqueradeBit",
        "int",
        14,
        "for ipvs too",
        flags=("iptables-masquerade-bit",),
        zero_is_default=False,
        minimum=0,
        maximum=31,
    ),
    _live("iptables.masqueradeAll", "bool", False, "for ipvs too", flags=("masquerade-all",)),
    _field(
        "iptables.localhostNodePorts",
        "bool",
        True,
        "IPv4 only, where nodePortAddresses reach loopback",
        flags=("iptables-localhost-nodeports",),
        zero_is_default=False,
    ),
    _live(
        "iptables.syncPeriod",
        "duration",
        30 * SECOND,
        _SYNC,
        treatment="differently",
        flags=("iptables-sync-period",),
    ),
    _live(
        "iptables.minSyncPeriod",
        "duration",
        0,
        _MIN_SYNC,
        treatment="differently",
        flags=("iptables-min-sync-period",),
    ),
    _live(
        "ipvs.syncPeriod",
        "duration",
        30 * SECOND,
        _SYNC,
        treatment="differently",
        flags=("ipvs-sync-period",),
    ),
    _live("ipvs.minSyncPeriod", "duration", 0, flags=("ipvs-min-sync-period",)),
    _field("ipvs.scheduler", "text", "rr", flags=("ipvs-scheduler",)),
    _field("ipvs.excludeCIDRs", "list", (), flags=("ipvs-exclude-cidrs",)),
    _field("ipvs.strictARP", "bool", False, flags=("ipvs-strict-arp",)),
    _field(
        "ipvs.tcpTimeout",
        "duration",
        0,
        _KEPT,
        flags=("ipvs-tcp-timeout",),
    ),
    _field(
        "ipvs.tcpFinTimeout",
        "duration",
        0,
        _KEPT,
        flags=("ipvs-tcpfin-timeout",),
    ),
    _field(
        "ipvs.udpTimeout",
        "duration",
        0,
        _KEPT,
        flags=("ipvs-udp-timeout",),
    ),
    _field("nftables.masqueradeBit", "int", 14, zero_is_default=False, minimum=0, maximum=31),
    _live("nftables.masqueradeAll", "bool", False, flags=("masquerade-all",)),
    _live(
        "nftables.syncPeriod",
        "duration",
        30 * SECOND,
        _SYNC,
        treatment="differently",
        flags=("iptables-sync-period",),
    ),
    _live(
        "nftables.minSyncPeriod",
        "duration",
        0,
        _MIN_SYNC,
        treatment="differently",
        flags=("iptables-min-sync-period",),
    ),
)

_TRAFFIC = (
    _live(
        "detectLocalMode",
        "text",
        "ClusterCIDR",
        flags=("detect-local-mode",),
        choices=("ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"),
    ),
    _live("detectLocal.bridgeInterface", "text", "", flags=("pod-bridge-interface",)),
    _live("detectLocal.interfaceNamePrefix", "text", "", flags=("pod-interface-name-prefix",)),
    _live(
        "clusterCIDR",
        "text",
        "",
        "one CIDR, or one of each family with a comma between",
        flags=("cluster-cidr",),
    ),
    _live(
        "nodePortAddresses",
        "list",
        (),
        "CIDRs, `primary`, `localhost`, `all`; empty: `primary` for nftables, else `all`",
        flags=("nodeport-addresses",),
    ),
    _live(
        "oomScoreAdj",
        "int",
        -999,
        flags=("oom-score-adj",),
        zero_is_default=False,
        minimum=-1000,
        maximum=1000,
    ),
    _live(
        "conntrack.maxPerCore",
        "int",
        32768,
        "times the CPUs, at least `conntrack.min`; 0: the limit stays as it is; it is only ever raised",
        flags=("conntrack-max-per-core",),
        zero_is_default=False,
        minimum=0,
        maximum=INT32,
    ),
    _live(
        "conntrack.min",
        "int",
        131072,
        flags=("conntrack-min",),
        zero_is_default=False,
        minimum=0,
        maximum=INT32,
    ),
    _live(
        "conntrack.tcpEstablishedTimeout",
        "duration",
        24 * 3600 * SECOND,
        _KEPT,
        flags=("conntrack-tcp-timeout-established",),
        zero_is_default=False,
    ),
    _live(
        "conntrack.tcpCloseWaitTimeout",
        "duration",
        3600 * SECOND,
        _KEPT,
        flags=("conntrack-tcp-timeout-close-wait",),
        zero_is_default=False,
    ),
    _live(
        "conntrack.tcpBeLiberal",
        "bool",
        False,
        "false: the system's value stays",
        flags=("conntrack-tcp-be-liberal",),
    ),
    _live("conntrack.udpTimeout", "duration", 0, _KEPT, flags=("conntrack-udp-timeout",)),
    _live("conntrack.udpStreamTimeout", "duration", 0, _KEPT, flags=("conntrack-udp-timeout-stream",)),
    _ignored(
        "configSyncPeriod",
        "duration",
        900 * SECOND,
        "nothing is fetched again on a timer",
        flags=("config-sync-period",),
    ),
    _ignored(
        "portRange",
        "text",
        "",
        "kube-proxy has not used it since its user-space mode went",
        flags=("proxy-port-range",),
    ),
    _ignored("windowsRunAsService", "bool", False, _WINDOWS),
    _ignored("winkernel.networkName", "text", "", _WINDOWS),
    _ignored("winkernel.sourceVip", "text", "", _WINDOWS),
    _ignored("winkernel.enableDSR", "bool", False, _WINDOWS),
    _ignored("winkernel.rootHnsEndpointName", "text", "", _WINDOWS),
    _ignored("winkernel.forwardHealthCheckVip", "bool", False, _WINDOWS),
)

KUBE_PROXY_FIELDS: tuple[Field, ...] = _GENERAL + _BY_MODE + _TRAFFIC
