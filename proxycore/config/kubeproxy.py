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
_NO_PORTS = "no health and metrics ports are served"
_NO_SYSCTLS = "connection tracking is left as the host has it"
_NO_API = "the API server is not asked"


def _field(path: str, type_: Type, default: object, note: str = "", **more: object) -> Field:
    return Field(path=path, type=type_, default=default, note=note, **more)  # type: ignore[arg-type]


def _ignored(path: str, type_: Type, default: object, note: str, **more: object) -> Field:
    return _field(path, type_, default, note, treatment="ignored", **more)


def _missing(path: str, type_: Type, default: object, note: str, **more: object) -> Field:
    """What this version lacks, though it will have it: saying nothing of it would mislead."""
    return _ignored(path, type_, default, f"{note} in this version", default_acts=True, **more)


_GENERAL = (
    _field(
        "featureGates",
        "bools",
        {},
        "see the table of gates",
        treatment="differently",
        flags=("feature-gates",),
    ),
    _missing("clientConnection.kubeconfig", "text", "", _NO_API, flags=("kubeconfig",)),
    _ignored(
        "clientConnection.acceptContentTypes",
        "text",
        "",
        f"{_NO_API} in this version",
        harmless=("application/json",),
    ),
    _ignored(
        "clientConnection.contentType",
        "text",
        "application/vnd.kubernetes.protobuf",
        f"{_NO_API} in this version",
        flags=("kube-api-content-type",),
        harmless=("application/json",),
    ),
    _missing("clientConnection.qps", "number", 5.0, _NO_API, flags=("kube-api-qps",)),
    _missing(
        "clientConnection.burst",
        "int",
        10,
        _NO_API,
        flags=("kube-api-burst",),
        minimum=0,
    ),
    _field("logging.format", "text", "text", flags=("logging-format",), choices=("text", "json")),
    _ignored(
        "logging.flushFrequency",
        "duration",
        5 * SECOND,
        "each line is written at once",
        flags=("log-flush-frequency",),
    ),
    _field(
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
    _field(
        "bindAddress",
        "text",
        "0.0.0.0",
        "names the node's primary address, binds nothing",
        flags=("bind-address",),
    ),
    _missing(
        "healthzBindAddress",
        "text",
        "",
        _NO_PORTS,
        flags=("healthz-bind-address",),
    ),
    _missing(
        "metricsBindAddress",
        "text",
        "",
        _NO_PORTS,
        flags=("metrics-bind-address",),
    ),
    _missing(
        "bindAddressHardFail",
        "bool",
        False,
        _NO_PORTS,
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
    _field("iptables.masqueradeAll", "bool", False, "for ipvs too", flags=("masquerade-all",)),
    _field(
        "iptables.localhostNodePorts",
        "bool",
        True,
        "IPv4 only, where nodePortAddresses reach loopback",
        flags=("iptables-localhost-nodeports",),
        zero_is_default=False,
    ),
    _field(
        "iptables.syncPeriod",
        "duration",
        30 * SECOND,
        _SYNC,
        treatment="differently",
        flags=("iptables-sync-period",),
    ),
    _field(
        "iptables.minSyncPeriod",
        "duration",
        0,
        _MIN_SYNC,
        treatment="differently",
        flags=("iptables-min-sync-period",),
    ),
    _field(
        "ipvs.syncPeriod",
        "duration",
        30 * SECOND,
        _SYNC,
        treatment="differently",
        flags=("ipvs-sync-period",),
    ),
    _field("ipvs.minSyncPeriod", "duration", 0, flags=("ipvs-min-sync-period",)),
    _field("ipvs.scheduler", "text", "rr", flags=("ipvs-scheduler",)),
    _field("ipvs.excludeCIDRs", "list", (), flags=("ipvs-exclude-cidrs",)),
    _field("ipvs.strictARP", "bool", False, flags=("ipvs-strict-arp",)),
    _field(
        "ipvs.tcpTimeout",
        "duration",
        0,
        "0s: the system's value stays",
        flags=("ipvs-tcp-timeout",),
    ),
    _field(
        "ipvs.tcpFinTimeout",
        "duration",
        0,
        "0s: the system's value stays",
        flags=("ipvs-tcpfin-timeout",),
    ),
    _field(
        "ipvs.udpTimeout",
        "duration",
        0,
        "0s: the system's value stays",
        flags=("ipvs-udp-timeout",),
    ),
    _field("nftables.masqueradeBit", "int", 14, zero_is_default=False, minimum=0, maximum=31),
    _field("nftables.masqueradeAll", "bool", False, flags=("masquerade-all",)),
    _field(
        "nftables.syncPeriod",
        "duration",
        30 * SECOND,
        _SYNC,
        treatment="differently",
        flags=("iptables-sync-period",),
    ),
    _field(
        "nftables.minSyncPeriod",
        "duration",
        0,
        _MIN_SYNC,
        treatment="differently",
        flags=("iptables-min-sync-period",),
    ),
)

_TRAFFIC = (
    _field(
        "detectLocalMode",
        "text",
        "ClusterCIDR",
        flags=("detect-local-mode",),
        choices=("ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"),
    ),
    _field("detectLocal.bridgeInterface", "text", "", flags=("pod-bridge-interface",)),
    _field("detectLocal.interfaceNamePrefix", "text", "", flags=("pod-interface-name-prefix",)),
    _field(
        "clusterCIDR",
        "text",
        "",
        "one CIDR, or one of each family with a comma between",
        flags=("cluster-cidr",),
    ),
    _field(
        "nodePortAddresses",
        "list",
        (),
        "CIDRs, `primary`, `localhost`, `all`; empty: `primary` for nftables, else `all`",
        flags=("nodeport-addresses",),
    ),
    _missing(
        "oomScoreAdj",
        "int",
        -999,
        "the score stays as it is",
        flags=("oom-score-adj",),
        zero_is_default=False,
        minimum=-1000,
        maximum=1000,
    ),
    _missing(
        "conntrack.maxPerCore",
        "int",
        32768,
        _NO_SYSCTLS,
        flags=("conntrack-max-per-core",),
        zero_is_default=False,
        minimum=0,
        maximum=INT32,
    ),
    _missing(
        "conntrack.min",
        "int",
        131072,
        _NO_SYSCTLS,
        flags=("conntrack-min",),
        zero_is_default=False,
        minimum=0,
        maximum=INT32,
    ),
    _missing(
        "conntrack.tcpEstablishedTimeout",
        "duration",
        24 * 3600 * SECOND,
        _NO_SYSCTLS,
        flags=("conntrack-tcp-timeout-established",),
        zero_is_default=False,
    ),
    _missing(
        "conntrack.tcpCloseWaitTimeout",
        "duration",
        3600 * SECOND,
        _NO_SYSCTLS,
        flags=("conntrack-tcp-timeout-close-wait",),
        zero_is_default=False,
    ),
    _missing("conntrack.tcpBeLiberal", "bool", False, _NO_SYSCTLS, flags=("conntrack-tcp-be-liberal",)),
    _missing(
        "conntrack.udpTimeout",
        "duration",
        0,
        _NO_SYSCTLS,
        flags=("conntrack-udp-timeout",),
    ),
    _missing(
        "conntrack.udpStreamTimeout",
        "duration",
        0,
        _NO_SYSCTLS,
        flags=("conntrack-udp-timeout-stream",),
    ),
    _ignored(
        "configSyncPeriod",
        "duration",
        900 * SECOND,
        "nothing is fetched again on a timer",
        flags=("config-sync-period",),
    ),
    _ignored("portRange", "text", "", "kube-proxy has not used it since its user-space mode went"),
    _ignored("windowsRunAsService", "bool", False, _WINDOWS),
    _ignored("winkernel.networkName", "text", "", _WINDOWS),
    _ignored("winkernel.sourceVip", "text", "", _WINDOWS),
    _ignored("winkernel.enableDSR", "bool", False, _WINDOWS),
    _ignored("winkernel.rootHnsEndpointName", "text", "", _WINDOWS),
    _ignored("winkernel.forwardHealthCheckVip", "bool", False, _WINDOWS),
)

KUBE_PROXY_FIELDS: tuple[Field, ...] = _GENERAL + _BY_MODE + _TRAFFIC
