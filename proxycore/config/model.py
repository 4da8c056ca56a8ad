"""The configuration as everything else sees it: resolved, defaulted, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from ..model import Family

DetectLocalMode = Literal["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"]
Takeover = Literal["auto", "refuse", "leave"]


class Conntrack(msgspec.Struct, frozen=True, kw_only=True):
    """Connection tracking of the host; 0 (False) everywhere means that the system's value stays.

    The table's limit is `max_per_core` times the CPUs, at least `minimum`, and is only ever raised.
    """

    max_per_core: int = 32768
    minimum: int = 131072
    tcp_established_timeout_seconds: float = 86400.0
    tcp_close_wait_timeout_seconds: float = 3600.0
    tcp_be_liberal: bool = False
    udp_timeout_seconds: float = 0.0
    udp_stream_timeout_seconds: float = 0.0


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be configured, with the defaults of the mode; `Config()` stands for no configuration.

    `mode` is kube-proxy's mode whose settings hold, `backend` the plugin that runs, which may be a third party's.
    `backend_options`: what the backend gets, kube-proxy's own settings for its mode included.
    `ip_families`: empty: what the host can do.  `observers_enabled`: None: all that are installed.
    `healthz_bind_address`, `metrics_bind_address`: `address:port`, None: off.
    `cluster_cidr`: canonical, at most one of each family.
    `node_port_addresses`: canonical CIDRs, `primary`, `localhost`, `all`; never empty.
    `min_sync_period_seconds`: 0 unless somebody wrote a positive value.  `verify_interval_seconds`: 0: never.
    `localhost_node_ports`: node ports are wanted on loopback addresses.
    `kube_context`: context of the kubeconfig; `master`: URL that overrules the kubeconfig's.
    `stale_after_seconds`: so long the API server may be out of reach before the node is not ready.
    `saved_state_file`: the last known good state on disk; empty: the usual place, `none`: not kept.
    `saved_state_wait_seconds`: at start the source has so long before the saved state is served.
    """

    backend: str = "iptables"
    mode: Literal["iptables", "ipvs", "nftables"] = "iptables"
    backend_options: Mapping[str, Any] = msgspec.field(default_factory=lambda: {"localhostNodePorts": True})
    takeover: Takeover = "auto"
    source: str = "kubernetes"
    verify_interval_seconds: float = 1.0
    ip_families: tuple[Family, ...] = ()
    observers_enabled: tuple[str, ...] | None = None
    observers_disabled: tuple[str, ...] = ()
    observer_options: Mapping[str, Mapping[str, Any]] = {}

    feature_gates: Mapping[str, bool] = {}
    allow_external_ips: bool = True
    kubeconfig: str = ""
    kube_context: str = ""
    master: str = ""
    client_qps: float = 5.0
    client_burst: int = 10
    stale_after_seconds: float = 60.0
    saved_state_file: str = ""
    saved_state_wait_seconds: float = 1.0
    log_format: Literal["text", "json"] = "text"
    log_verbosity: int = 0
    hostname_override: str = ""
    bind_address: str = "0.0.0.0"
    healthz_bind_address: str | None = "0.0.0.0:10256"
    metrics_bind_address: str | None = "127.0.0.1:10249"
    bind_address_hard_fail: bool = False
    oom_score_adj: int = -999
    conntrack: Conntrack = Conntrack()

    masquerade_bit: int = 14
    masquerade_all: bool = False
    localhost_node_ports: bool = True
    sync_period_seconds: float = 30.0
    min_sync_period_seconds: float = 0.0
    detect_local_mode: DetectLocalMode = "ClusterCIDR"
    bridge_interface: str = ""
    interface_name_prefix: str = ""
    cluster_cidr: tuple[str, ...] = ()
    node_port_addresses: tuple[str, ...] = ("all",)

    def node_name(self, hostname: str) -> str:
        """This node's name: the override, else the host's name, in lower case."""
        return self.hostname_override or hostname.strip().lower()


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration and where it came from.

    `warnings`: a sentence each, for people.  By field path (`iptables.masqueradeBit`): `origins`, which are `flag`,
    `environment`, `default` or a file's name, and `values`, those in force, durations in nanoseconds.
    `places`: where exactly, for what is no default: file and line, the variable, the flag as it was written.
    """

    config: Config
    warnings: tuple[str, ...] = ()
    origins: Mapping[str, str] = {}
    values: Mapping[str, object] = {}
    places: Mapping[str, str] = {}

    def origin_and_place(self, path: str) -> str:
        """`file (config.conf:3)`, `environment (PROXYCORE_MODE)`, `flag (--set mode)` or `default`."""
        origin, place = self.origins.get(path, "default"), self.places.get(path)
        if origin in ("flag", "environment", "default"):
            return f"{origin} ({place})" if place else origin
        return f"file ({place or origin})"
