"""The iptables backend's place: this version programs nothing, and every call that should says so."""

from __future__ import annotations

from proxycore.api import (
    ApplyResult,
    BackendContext,
    BackendInfo,
    ChangeBatch,
    PluginError,
    Probe,
    Started,
    hookimpl,
)

MISSING = "the iptables backend is not written yet"


class Planned:
    """A backend that claims no capability and refuses to start."""

    @hookimpl
    def proxycore_backend_describe(self) -> BackendInfo:
        return BackendInfo(
            name="iptables",
            summary="not available yet: planned (netfilter rules written by iptables-restore)",
            api=">=0.1,<0.2",
            capabilities=frozenset(),
        )

    @hookimpl
    def proxycore_backend_probe(self, context: BackendContext) -> Probe:
        return Probe(problems=(MISSING,))

    @hookimpl
    def proxycore_backend_start(self, context: BackendContext) -> Started:
        raise PluginError("iptables", MISSING)

    @hookimpl
    def proxycore_backend_apply(self, batch: ChangeBatch) -> ApplyResult:
        raise PluginError("iptables", MISSING)


def plugin() -> Planned:
    """Factory that the entry point names."""
    return Planned()
