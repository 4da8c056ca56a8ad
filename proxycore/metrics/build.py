"""What we are: it never changes while we run."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from importlib import metadata

from ..config.gates import GATES
from .values import Values

STAGES: Mapping[str, str] = {
    "AllowServiceExternalIPs": "DEPRECATED",
    "KubeProxyIPVS": "DEPRECATED",
    "KubeProxyNFTablesLocalhostNodePorts": "ALPHA",
    "NFTablesNetlink": "BETA",
}
"""Stages of gates in Kubernetes 1.37; settled ones have none."""


def constant(backend: str, mode: str, *, external_ips: bool) -> Values:
    """All that is declared as CONSTANT."""
    build = build_info()
    return {
        "kubernetes_build_info": {tuple(build.values()): 1},
        "kubernetes_feature_enabled": {
            (gate, STAGES.get(gate, "")): external_ips if gate == "AllowServiceExternalIPs" else value
            for gate, (_, value, _) in GATES.items()
        },
        "proxycore_info": {(version(), backend, mode): 1},
    }


def version() -> str:
    """Our own, as installed."""
    return metadata.version("proxycore")


def build_info() -> dict[str, str]:
    """What we are, by the labels of kubernetes_build_info.  It is our own version: no Kubernetes was built with us."""
    major, minor, *_ = f"{version()}.".split(".")
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    return {
        "major": major,
        "minor": minor,
        "git_version": f"v{version()}",
        "git_commit": "",
        "git_tree_state": "",
        "build_date": "",
        "go_version": "",
        "compiler": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": f"{sys.platform}/{machine}",
    }
