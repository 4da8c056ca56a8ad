"""kube-proxy's flags: how each is written, what it is for, and when it counts.

Nothing heavy is imported here, since the help is made of it.
"""

from __future__ import annotations

import textwrap
from typing import Literal, NamedTuple

from .pflags import Shape

Kind = Literal["bool", "text", "list", "pairs", "version"]
"""`list` and `pairs` may be repeated, and add up; of the others the last one counts."""

Role = Literal["job", "always", "setting", "nothing"]
"""`job`: says what to do.  `always`: counts beside --config too.  `setting`: does not.  `nothing`: has no effect at all."""


class KubeFlag(NamedTuple):
    """One flag; `value` is what its value is called in the help."""

    name: str
    kind: Kind
    role: Role
    value: str
    help: str
    letter: str = ""

    @property
    def shape(self) -> Shape:
        return Shape(self.letter, "true" if self.kind in ("bool", "version") else "")

    @property
    def written(self) -> str:
        """As the help shows it."""
        names = f"-{self.letter}, --{self.name}" if self.letter else f"--{self.name}"
        if self.kind == "version":
            return f"{names}[=raw]"
        return names if self.kind == "bool" else f"{names} {self.value}"


def _on(name: str, role: Role, help: str) -> KubeFlag:
    return KubeFlag(name, "bool", role, "", help)


def _text(name: str, value: str, help: str, role: Role = "setting", letter: str = "") -> KubeFlag:
    return KubeFlag(name, "text", role, value, help, letter)


_KLOG = "klog's; lines always go to standard error"

GROUPS: dict[str, tuple[KubeFlag, ...]] = {
    "What to do": (
        _text(
            "config", "FILE", "The configuration file; other flags then count only where it says so.", "job"
        ),
        _text("write-config-to", "FILE", "Write the configuration, defaults included, and exit.", "job"),
        _on("cleanup", "job", "Remove everything that proxycore has programmed, and exit."),
        _on("init-only", "job", "Do once what needs all rights, and exit."),
        KubeFlag("version", "version", "job", "", "Print the version and exit."),
        KubeFlag("help", "bool", "job", "", "Print this text and exit.", "h"),
    ),
    "Logging (beside --config too)": (
        _text("v", "N", "Verbosity; from 4 on, a line for each Service.", "always", "v"),
        _text("vmodule", "PATTERN=N,...", "Without effect: verbosity is one for all modules.", "always"),
        _text("logging-format", "text|json", "Form of log lines.", "always"),
        _text("log-flush-frequency", "DURATION", "Without effect: lines are written at once.", "always"),
        _on("log-text-split-stream", "always", "Without effect: lines go to standard error."),
        _on("log-json-split-stream", "always", "Without effect: lines go to standard error."),
        _text("log-text-info-buffer-size", "SIZE", "Without effect: nothing is buffered.", "always"),
        _text("log-json-info-buffer-size", "SIZE", "Without effect: nothing is buffered.", "always"),
    ),
    "The node and the API server": (
        _text(
            "hostname-override",
            "NAME",
            "This node (beside --config too). Default: the host's name.",
            "always",
        ),
        _text("master", "URL", "The API server (beside --config too); overrules the kubeconfig's.", "always"),
        _text("kubeconfig", "FILE", "Default: KUBECONFIG, the pod's service account, ~/.kube/config."),
        _text("kube-api-qps", "N", "Requests a second."),
        _text("kube-api-burst", "N", "Requests at once."),
        _text("kube-api-content-type", "TYPE", "Without effect: JSON is always used."),
        _text("config-sync-period", "DURATION", "Without effect: nothing is fetched again on a timer."),
        _text("bind-address", "IP", "The node's primary address; binds nothing."),
        _text("oom-score-adj", "N", "-1000 to 1000."),
    ),
    "Mode": (
        _text("proxy-mode", "MODE", "iptables (default), ipvs or nftables, whose backend is called nft."),
        KubeFlag("feature-gates", "pairs", "setting", "NAME=BOOL,...", "See docs/configuration.md."),
        _on("masquerade-all", "setting", "Masquerade all traffic to cluster IPs."),
        _text("iptables-masquerade-bit", "N", "Bit of the packet's mark, 0 to 31, for iptables and ipvs."),
        _on("iptables-localhost-nodeports", "setting", "Node ports on loopback addresses too. Default: on."),
        _text("iptables-sync-period", "DURATION", "For iptables and nftables."),
        _text("iptables-min-sync-period", "DURATION", "For iptables and nftables. Default here: no pause."),
        _text("ipvs-sync-period", "DURATION", "As above, for ipvs."),
        _text("ipvs-min-sync-period", "DURATION", "As above, for ipvs."),
        _text("ipvs-scheduler", "NAME", "Default: rr."),
        KubeFlag("ipvs-exclude-cidrs", "list", "setting", "CIDR,...", "Virtual servers to leave alone."),
        _on("ipvs-strict-arp", "setting", "Answer ARP for an address on its own interface only."),
        _text("ipvs-tcp-timeout", "DURATION", "0s: the system's value stays."),
        _text("ipvs-tcpfin-timeout", "DURATION", "0s: the system's value stays."),
        _text("ipvs-udp-timeout", "DURATION", "0s: the system's value stays."),
    ),
    "Traffic": (
        _text("cluster-cidr", "CIDR[,CIDR]", "Addresses of pods, one range of each family."),
        _text("detect-local-mode", "MODE", "ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix."),
        _text("pod-bridge-interface", "NAME", "For BridgeInterface."),
        _text("pod-interface-name-prefix", "PREFIX", "For InterfaceNamePrefix."),
        KubeFlag(
            "nodeport-addresses", "list", "setting", "CIDR,...", "Where node ports are served; `primary` too."
        ),
    ),
    "Ports": (
        _text("healthz-bind-address", "IP:PORT", "Default: 0.0.0.0:10256; empty: off."),
        _text("healthz-port", "PORT", "Deprecated. Port where the address has none; 0: off."),
        _text("metrics-bind-address", "IP:PORT", "Default: 127.0.0.1:10249; empty: off."),
        _text("metrics-port", "PORT", "Deprecated. Port where the address has none; 0: off."),
        _on("bind-address-hard-fail", "setting", "End when an address cannot be opened."),
        _on("profiling", "setting", "Without effect: there are no Go profiles."),
        _text("show-hidden-metrics-for-version", "VERSION", "Without effect: no metric is hidden."),
    ),
    "Connection tracking": (
        _text("conntrack-max-per-core", "N", "0: the limit stays."),
        _text("conntrack-min", "N", "At least so much, whatever the line above says."),
        _text("conntrack-tcp-timeout-established", "DURATION", "0s: the system's value stays."),
        _text("conntrack-tcp-timeout-close-wait", "DURATION", "0s: the system's value stays."),
        _on("conntrack-tcp-be-liberal", "setting", "Let packets outside the window pass."),
        _text("conntrack-udp-timeout", "DURATION", "0s: the system's value stays."),
        _text("conntrack-udp-timeout-stream", "DURATION", "0s: the system's value stays."),
    ),
    "Accepted, warned about, and without effect": (
        _on("add-dir-header", "nothing", _KLOG),
        _on("alsologtostderr", "nothing", _KLOG),
        _text("log-backtrace-at", "PLACE", _KLOG, "nothing"),
        _text("log-dir", "DIR", _KLOG, "nothing"),
        _text("log-file", "FILE", _KLOG, "nothing"),
        _text("log-file-max-size", "N", _KLOG, "nothing"),
        _on("logtostderr", "nothing", _KLOG),
        _on("one-output", "nothing", _KLOG),
        _on("skip-headers", "nothing", _KLOG),
        _on("skip-log-headers", "nothing", _KLOG),
        _text("stderrthreshold", "N", _KLOG, "nothing"),
        _text("boot-id-file", "FILE", "nothing reads it", "nothing"),
        _text("machine-id-file", "FILE", "nothing reads it", "nothing"),
        _text("proxy-port-range", "RANGE", "kube-proxy has not used it since its user-space mode went"),
    ),
}

FLAGS: dict[str, KubeFlag] = {flag.name: flag for group in GROUPS.values() for flag in group}
SHAPES: dict[str, Shape] = {name: flag.shape for name, flag in FLAGS.items()}

_ABOUT = (
    "Be kube-proxy: its own command line, flag by flag, as DaemonSets use it. A program called kube-proxy, such as a link "
    "to proxyctl of that name, does the same.",
    "With --config, the file counts and other flags do not, but for those marked below; each that is passed over is named "
    "in a warning. Without it, flags make the configuration.",
    "What kube-proxy does not know, such as `backend` and `takeover`, stands in a second document of the same file, in a "
    "file that PROXYCORE_CONFIG names, or in variables such as PROXYCORE_BACKEND=nft and PROXYCORE_TAKEOVER=leave; "
    "`proxyctl config show` lists the fields. Variables for kube-proxy's own fields do not count here.",
    "Booleans stand alone, or with =true or =false; `_` in a name stands for `-`.",
)

EXAMPLES = (
    "proxyctl kube-proxy --config=/var/lib/kube-proxy/config.conf --hostname-override=node-1",
    "PROXYCORE_BACKEND=nft proxyctl kube-proxy --config=/var/lib/kube-proxy/config.conf -v=2",
    "proxyctl kube-proxy --proxy-mode=nftables --kubeconfig=/etc/kube.conf --cluster-cidr=10.244.0.0/16",
    "proxyctl kube-proxy --write-config-to=config.conf --proxy-mode=nftables",
    "proxyctl kube-proxy --cleanup",
)

_WIDTH = 100
_INDENT = 40


def help_text() -> str:
    """All flags in their groups, with examples."""
    lines = ["Usage: proxyctl kube-proxy [FLAGS]"]
    for paragraph in _ABOUT:
        lines += [
            "",
            *textwrap.wrap(
                paragraph, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
            ),
        ]
    for title, flags in GROUPS.items():
        lines += ["", f"{title}:"]
        for flag in flags:
            lines += _entry(flag)
    lines += ["", "Examples:", *(f"  {example}" for example in EXAMPLES), ""]
    return "\n".join(lines)


def _entry(flag: KubeFlag) -> list[str]:
    head = f"  {flag.written}"
    lines = [] if len(head) < _INDENT else [head]
    start = head.ljust(_INDENT) if len(head) < _INDENT else " " * _INDENT
    return lines + textwrap.wrap(
        flag.help, _WIDTH, initial_indent=start, subsequent_indent=" " * _INDENT, break_on_hyphens=False
    )
