"""What the backend holds of the host while it runs: tables, named counters, the watch for changes of others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from proxycore.api import INVALID_DROPPED, LOCALHOST_NODE_PORTS_ACCEPTED, BackendContext, Family, KernelError
from proxycore.kernel import xtables
from proxycore.kernel.xtables import Tools, Variant

from . import counting
from .live import Live, ToolTables
from .shape import Features, Options
from .stamp import stamps
from .variant import choose
from .watch import Watch
from .words import INVALID_COUNTER, LOCALHOST_COUNTER

LIBERAL = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal")
_FIGURES = {
    INVALID_DROPPED: INVALID_COUNTER,
    LOCALHOST_NODE_PORTS_ACCEPTED: LOCALHOST_COUNTER,
}


class Host(Protocol):
    """The real one and the one of tests; belongs to the network namespace of the thread that made it."""

    variant: Variant
    tables: Mapping[Family, Live]
    features: Mapping[Family, Features]
    watch: Watch

    def prepare(self) -> None:
        """Make what rules refer to; called before the first change.  Raises KernelError."""

    def figures(self) -> Mapping[str, int]:
        """Counts of the node as a whole."""

    def close(self) -> None: ...


class RealHost:
    """This network namespace.  Making it makes no table, rule or counter; raises KernelError: what is missing."""

    def __init__(self, context: BackendContext, options: Options) -> None:
        chosen = choose(context.families, options.variant)
        self.variant = chosen.variant
        self.tools: Mapping[Family, Tools] = chosen.tools
        self.tables: Mapping[Family, Live] = {
            family: ToolTables(tools, lock_seconds=options.lock_seconds)
            for family, tools in chosen.tools.items()
        }
        named = {family: counting.available(tools) for family, tools in chosen.tools.items()}
        self._counting: counting.Counting | None = None
        if any(named.values()):
            self._counting = counting.Counting()
        liberal = is_liberal()
        self.features: Mapping[Family, Features] = {
            family: Features(
                random_fully=not _lacks_random_fully(tools), nfacct=named[family], liberal=liberal
            )
            for family, tools in chosen.tools.items()
        }
        self.watch = Watch(stamps(chosen.variant, context.families))

    def prepare(self) -> None:
        if self._counting is not None:
            self._counting.ensure()

    def figures(self) -> Mapping[str, int]:
        if self._counting is None:
            return {}
        try:
            packets = self._counting.packets()
        except KernelError:
            return {}
        return {figure: packets[name] for figure, name in _FIGURES.items() if name in packets}

    def close(self) -> None:
        for live in self.tables.values():
            live.close()
        self.watch.close()
        if self._counting is not None:
            self._counting.close()


def _lacks_random_fully(tools: Tools) -> str:
    """Why MASQUERADE has not this option; empty if it has, as in every kernel since 3.13."""
    return xtables.lacks(tools, "-j", "MASQUERADE", "--random-fully")


def is_liberal() -> bool:
    """Does connection tracking let pass TCP packets that are out of a window?"""
    try:
        return LIBERAL.read_text().strip() not in ("", "0")
    except OSError:
        return False
