"""The iptables backend of proxycore: Services as rules in kube-proxy's chains."""

from __future__ import annotations

__version__ = "0.1.0"


def plugin() -> object:
    """Entry point: the backend's plugin object."""
    from .backend import IptablesBackend

    return IptablesBackend()
