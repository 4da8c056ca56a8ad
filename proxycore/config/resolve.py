"""From settings of every origin to one checked Config."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from typing import Any

from ..model import FAMILIES
from .documents import Problem, Setting
from .duration import SECOND, format_duration
from .field import Field
from .fields import BY_PATH, FIELDS
from .gates import GATES
from .kubeproxy import DEFAULT_MODE, MODES
from .model import Config, Conntrack
from .values import (
    check_interface,
    families,
    is_blank,
    join_host_port,
    parse_address,
    parse_cidr,
    parse_endpoint,
    parse_url,
)

HEALTHZ_PORT = 10256
METRICS_PORT = 10249
NOT_KEPT = "none"
ADDRESS_WORDS = ("primary", "localhost", "all")

_BACKEND_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_NODE_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?\Z")
_SOURCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}(:.*)?\Z", re.DOTALL)
_SCHEDULER = re.compile(r"[a-z][a-z0-9_]{0,14}\Z")
_RANK = {"default": 0, "environment": 2, "flag": 3}
_OWN_EXTRAS = {"iptables": ("localhostNodePorts",), "ipvs": ("scheduler", "excludeCIDRs", "strictARP", "tcpTimeout",
               "tcpFinTimeout", "udpTimeout"), "nftables": ()}  # fmt: skip


class Resolver:
    """Turns settings into a Config; `problems` and `warnings` are complete once config() has returned.

    `broken`: paths that were written but could not be read, so that their default says nothing.
    """

    def __init__(self, settings: Mapping[str, Setting], broken: Container[str | None] = ()) -> None:
        self._broken = broken
        self._settings = settings
        self.values: dict[str, Any] = {field.path: field.default for field in FIELDS}
        self.values.update((path, setting.value) for path, setting in settings.items())
        self.origins = {path: self._origin(path) for path in BY_PATH}
        self.places = {path: setting.where for path, setting in settings.items()}
        self.problems: list[Problem] = []
        self.warnings: list[str] = []

    def config(self) -> Config | None:
        """The configuration, None when there are problems."""
        values = self.values
        backend, mode = self._choose_backend()
        node_port_addresses = self._node_port_addresses(backend)
        cluster_cidr = self._cluster_cidr()
        gates = values["featureGates"]
        localhost = self._localhost_node_ports(mode, node_port_addresses)
        fields: dict[str, Any] = {
            "backend": backend,
            "mode": mode,
            "backend_options": self._backend_options(backend, mode, localhost),
            "takeover": values["takeover"],
            "source": self._matching("source", _SOURCE, "of the form NAME or NAME:ARGUMENT"),
            "verify_interval_seconds": self._seconds("verifyInterval"),
            "ip_families": self._ip_families(),
            "observers_enabled": values["observers.enabled"] or None,
            "observers_disabled": values["observers.disabled"],
            "observer_options": self._options("observers.options"),
            "feature_gates": gates,
            "allow_external_ips": gates.get("AllowServiceExternalIPs", True),
            "kubeconfig": values["clientConnection.kubeconfig"],
            "client_qps": values["clientConnection.qps"],
            "client_burst": values["clientConnection.burst"],
            "kube_context": values["apiServer.context"],
            "master": self._master(),
            "stale_after_seconds": self._seconds("apiServer.staleAfter"),
            "saved_state_file": self._saved_state_file(),
            "saved_state_wait_seconds": self._seconds("lastKnownGood.wait"),
            "log_format": values["logging.format"],
            "log_verbosity": values["logging.verbosity"],
            "hostname_override": self._hostname(),
            **self._addresses(),
            "bind_address_hard_fail": values["bindAddressHardFail"],
            "oom_score_adj": values["oomScoreAdj"],
            "conntrack": self._conntrack(),
            **self._masquerading(mode),
            **self._pace(mode),
            "localhost_node_ports": localhost,
            "detect_local_mode": values["detectLocalMode"],
            **self._interfaces(),
            "cluster_cidr": cluster_cidr,
            "node_port_addresses": node_port_addresses,
        }
        self._check_observers()
        self._warn_about_gates()
        self._warn_about_ignored()
        self._warn_about_other_modes(backend, mode)
        return None if self.problems else Config(**fields)

    # -- settings -----------------------------------------------------------------------------------------------

    def _origin(self, path: str) -> str:
        setting = self._settings.get(path)
        return setting.origin if setting else "default"

    def _rank(self, path: str) -> int:
        return _RANK.get(self.origins[path], 1)

    def _problem(self, path: str, reason: str) -> None:
        setting = self._settings.get(path)
        where = setting.where if setting else ""
        self.problems.append(Problem(setting.file if setting else None, path, where, reason))

    def _try(self, path: str, function: Callable[[str], str], text: str) -> str | None:
        try:
            return function(text)
        except ValueError as error:
            self._problem(path, str(error))
            return None

    def _matching(self, path: str, pattern: re.Pattern[str], wanted: str) -> str:
        text: str = self.values[path]
        if not pattern.match(text):
            self._problem(path, f"{text!r} is not {wanted}")
        return text

    def _seconds(self, path: str) -> float:
        nanoseconds: int = self.values[path]
        return nanoseconds / SECOND

    def _unsure(self, *paths: str) -> bool:
        """Is one of these wrong, or may it have been written where it could not be read?"""
        if any(problem.field in paths for problem in self.problems):
            return True
        return any(path in self._broken for path in (*paths, None, "kind", "apiVersion"))

    def _written(self, path: str) -> bool:
        """Has somebody set it to something that differs from the default?"""
        setting = self._settings.get(path)
        return setting is not None and not setting.shared and setting.value != BY_PATH[path].default

    # -- backend ------------------------------------------------------------------------------------------------

    def _choose_backend(self) -> tuple[str, str]:
        """The backend, and the mode whose settings hold.  What stands higher decides; at equal height, `backend`."""
        mode: str = self.values["mode"]
        backend: str = self.values["backend"]
        if not backend or (mode and self._rank("mode") > self._rank("backend")):
            mode = mode or DEFAULT_MODE
            return self._chosen(MODES[mode], mode, "mode")
        self._matching("backend", _BACKEND_NAME, "the name of a plugin")
        own_mode = next((name for name, plugin in MODES.items() if plugin == backend), None)
        if own_mode and mode and mode != own_mode:
            self.warnings.append(
                f"{self._settings['mode'].where}: mode: {mode} gives way to backend {backend}, "
                f"for which the settings of {own_mode} hold"
            )
        return self._chosen(backend, own_mode or mode or DEFAULT_MODE, "backend")

    def _chosen(self, backend: str, mode: str, decisive: str) -> tuple[str, str]:
        """One of the two fields has decided about both; the other then comes from where that one does."""
        for path, value in (("mode", mode), ("backend", backend)):
            if self.values[path] != value:
                self.values[path], self.origins[path] = value, self.origins[decisive]
                self.places.pop(path, None)
                if decisive in self.places:
                    self.places[path] = self.places[decisive]
        return backend, mode

    def _backend_options(self, backend: str, mode: str, localhost: bool) -> dict[str, Any]:
        """kube-proxy's settings that only this backend knows, and over them those written for it."""
        ipvs = self._ipvs()
        options: dict[str, Any] = {}
        if MODES[mode] == backend:
            if mode == "ipvs":
                options = ipvs
            elif mode == "iptables":
                options = {"localhostNodePorts": localhost}
        return {**options, **self._options("backendOptions").get(backend, {})}

    def _ipvs(self) -> dict[str, Any]:
        cidrs = [
            self._try("ipvs.excludeCIDRs", parse_cidr, text) for text in self.values["ipvs.excludeCIDRs"]
        ]
        return {
            "scheduler": self._matching("ipvs.scheduler", _SCHEDULER, "the name of a scheduler such as rr"),
            "excludeCIDRs": tuple(cidr for cidr in cidrs if cidr),
            "strictARP": self.values["ipvs.strictARP"],
            "tcpTimeoutSeconds": self._seconds("ipvs.tcpTimeout"),
            "tcpFinTimeoutSeconds": self._seconds("ipvs.tcpFinTimeout"),
            "udpTimeoutSeconds": self._seconds("ipvs.udpTimeout"),
        }

    def _options(self, path: str) -> dict[str, Mapping[str, Any]]:
        """Settings by plugin name."""
        value = self.values[path]
        if not isinstance(value, Mapping):
            self._problem(path, "must be a mapping of plugin names to their settings")
            return {}
        for name, options in value.items():
            if options is not None and not isinstance(options, Mapping):
                self._problem(path, f"what stands under {name!r} must be a mapping of settings")
                return {}
        return {name: options or {} for name, options in value.items()}

    def _check_observers(self) -> None:
        both = sorted(set(self.values["observers.enabled"]) & set(self.values["observers.disabled"]))
        if both:
            self._problem("observers.disabled", f"{', '.join(both)}: also in observers.enabled")

    def _ip_families(self) -> tuple[str, ...]:
        value: tuple[str, ...] = self.values["ipFamilies"]
        for name in value:
            if name not in FAMILIES:
                self._problem("ipFamilies", f"{name!r} is neither IPv4 nor IPv6")
        if len(set(value)) < len(value):
            self._problem("ipFamilies", "names a family twice")
        return value

    # -- the source ---------------------------------------------------------------------------------------------

    def _master(self) -> str:
        text: str = self.values["apiServer.master"]
        url = self._try("apiServer.master", parse_url, text) if text else ""
        self.values["apiServer.master"] = url or ""
        return url or ""

    def _saved_state_file(self) -> str:
        text: str = self.values["lastKnownGood.file"]
        if text not in ("", NOT_KEPT) and not text.startswith("/"):
            self._problem("lastKnownGood.file", f"{text!r} is neither an absolute path nor {NOT_KEPT}")
        if "\0" in text:
            self._problem("lastKnownGood.file", f"{text!r} is no path")
        return text

    # -- addresses ----------------------------------------------------------------------------------------------

    def _hostname(self) -> str:
        name: str = self.values["hostnameOverride"].lower()
        if name and not _NODE_NAME.match(name):
            self._problem("hostnameOverride", f"{name!r} is no node name")
        return name

    def _addresses(self) -> dict[str, str | None]:
        bind = self._try("bindAddress", parse_address, self.values["bindAddress"]) or "0.0.0.0"
        any_address, loopback = ("::", "::1") if ":" in bind else ("0.0.0.0", "127.0.0.1")
        healthz = self._listener("healthzBindAddress", any_address, HEALTHZ_PORT)
        metrics = self._listener("metricsBindAddress", loopback, METRICS_PORT)
        if healthz is not None and healthz == metrics:
            self._problem("metricsBindAddress", f"{metrics} is the address of healthzBindAddress, too")
        return {"bind_address": bind, "healthz_bind_address": healthz, "metrics_bind_address": metrics}

    def _listener(self, path: str, host: str, port: int) -> str | None:
        text: str = self.values[path]
        if text:
            self.values[path] = self._try(path, lambda value: parse_endpoint(value, port), text) or ""
            return self.values[path] or None
        if self.origins[path] == "flag":
            return None
        self.values[path] = join_host_port(host, port)
        return join_host_port(host, port)

    def _cluster_cidr(self) -> tuple[str, ...]:
        parts = (
            [part.strip() for part in self.values["clusterCIDR"].split(",")]
            if self.values["clusterCIDR"]
            else []
        )
        cidrs = [cidr for part in parts if (cidr := self._try("clusterCIDR", parse_cidr, part))]
        if len(set(families(cidrs))) < len(cidrs):
            self._problem("clusterCIDR", f"{', '.join(cidrs)}: at most one CIDR of each family")
        return tuple(cidrs)

    def _node_port_addresses(self, backend: str) -> tuple[str, ...]:
        path = "nodePortAddresses"
        found: list[str] = []
        for text in self.values[path]:
            word = text if text in ADDRESS_WORDS else None
            if word is None and "/" not in text:
                self._problem(path, f"{text!r} is neither a CIDR nor one of {', '.join(ADDRESS_WORDS)}")
                continue
            entry = word or self._try(path, parse_cidr, text)
            if entry and entry not in found:
                found.append(entry)
        if not self.values[path]:
            found = ["primary" if backend == MODES["nftables"] else "all"]
        self.values[path] = tuple(found)
        return tuple(found)

    def _localhost_node_ports(self, mode: str, addresses: tuple[str, ...]) -> bool:
        """In iptables mode, for IPv4 only, and where the list reaches loopback: without IPv4 it stands for all of it."""
        if mode != "iptables":
            return False
        ipv4 = [entry for entry in addresses if ":" not in entry]
        words = ("all", "localhost", "0.0.0.0/0")
        reached = not ipv4 or any(entry in words or entry.startswith("127.") for entry in ipv4)
        return bool(self.values["iptables.localhostNodePorts"]) and reached

    def _interfaces(self) -> dict[str, str]:
        mode: str = self.values["detectLocalMode"]
        found: dict[str, str] = {}
        for name, path, wanting in (
            ("bridge_interface", "detectLocal.bridgeInterface", "BridgeInterface"),
            ("interface_name_prefix", "detectLocal.interfaceNamePrefix", "InterfaceNamePrefix"),
        ):
            text = self.values[path]
            found[name] = text if mode == wanting else ""
            if text:
                try:
                    check_interface(text)
                except ValueError as error:
                    self._problem(path, str(error))
                if mode != wanting and not self._unsure("detectLocalMode"):
                    self._no_effect([path], f"detectLocalMode is {mode}")
            elif mode == wanting:
                self._problem(path, f"is required by detectLocalMode {mode}")
        if mode != "ClusterCIDR" and not self._unsure("detectLocalMode") and self._written("clusterCIDR"):
            self._no_effect(["clusterCIDR"], f"detectLocalMode is {mode}")
        return found

    # -- the host and the pace ----------------------------------------------------------------------------------

    def _conntrack(self) -> Conntrack:
        return Conntrack(
            max_per_core=self.values["conntrack.maxPerCore"],
            minimum=self.values["conntrack.min"],
            tcp_established_timeout_seconds=self._seconds("conntrack.tcpEstablishedTimeout"),
            tcp_close_wait_timeout_seconds=self._seconds("conntrack.tcpCloseWaitTimeout"),
            tcp_be_liberal=self.values["conntrack.tcpBeLiberal"],
            udp_timeout_seconds=self._seconds("conntrack.udpTimeout"),
            udp_stream_timeout_seconds=self._seconds("conntrack.udpStreamTimeout"),
        )

    def _masquerading(self, mode: str) -> dict[str, Any]:
        section = "nftables" if mode == "nftables" else "iptables"
        return {
            "masquerade_bit": self.values[f"{section}.masqueradeBit"],
            "masquerade_all": self.values[f"{section}.masqueradeAll"],
        }

    def _pace(self, mode: str) -> dict[str, Any]:
        for section in MODES:
            longest, shortest = self.values[f"{section}.syncPeriod"], self.values[f"{section}.minSyncPeriod"]
            if shortest > longest and f"{section}.syncPeriod" not in self._broken:
                self._problem(
                    f"{section}.minSyncPeriod",
                    f"{format_duration(shortest)} is longer than syncPeriod, {format_duration(longest)}",
                )
        return {
            "sync_period_seconds": self._seconds(f"{mode}.syncPeriod"),
            "min_sync_period_seconds": self._seconds(f"{mode}.minSyncPeriod"),
        }

    # -- warnings -----------------------------------------------------------------------------------------------

    def _no_effect(self, paths: list[str], reason: str) -> None:
        where = self._settings[paths[0]].where
        verb = "has" if len(paths) == 1 else "have"
        self.warnings.append(f"{where}: {', '.join(paths)}: {verb} no effect: {reason}")

    def _warn_about_gates(self) -> None:
        for name, value in sorted(self.values["featureGates"].items()):
            treatment, held, reason = GATES.get(name, ("ignored", None, "it is unknown here"))
            if treatment == "ignored" and value is not held:
                self._no_effect_of_gate(name, value, reason)

    def _no_effect_of_gate(self, name: str, value: bool, reason: str) -> None:
        where = self._settings["featureGates"].where
        self.warnings.append(f"{where}: featureGates.{name}: {str(value).lower()} has no effect: {reason}")

    def _warn_about_ignored(self) -> None:
        for field in FIELDS:
            ignored = field.treatment == "ignored" and self._written(field.path)
            if ignored and not self._is_harmless(field):
                self._no_effect([field.path], field.note)

    def _is_harmless(self, field: Field) -> bool:
        value = self.values[field.path]
        return is_blank(value) or value in field.harmless

    def _warn_about_other_modes(self, backend: str, mode: str) -> None:
        """Settings of a mode that is not in use, named once for each section."""
        if self._unsure("mode", "backend"):
            return
        for section in MODES:
            idle = [
                path
                for path in BY_PATH
                if path.startswith(f"{section}.") and self._written(path) and not serves(path, backend, mode)
            ]
            if idle:
                self._no_effect(idle, f"the backend is {backend}, with the settings of {mode}")


def serves(path: str, backend: str, mode: str) -> bool:
    """Does a field matter to a backend in this mode?  Those outside the sections of modes always do."""
    section, _, name = path.partition(".")
    if section not in MODES:
        return True
    if section == mode:
        return name not in _OWN_EXTRAS[section] or MODES[mode] == backend
    return section == "iptables" and mode == "ipvs" and name.startswith("masquerade")
