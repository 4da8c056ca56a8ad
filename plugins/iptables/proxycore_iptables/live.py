"""What the backend asks of one family's iptables, and the real one behind it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from proxycore.api import Family
from proxycore.kernel import xtables
from proxycore.kernel.xtables import LockHeld, RestoreRefused, Tools, Variant

from .listing import Listing, read
from .program import Section
from .rules import Place, Rules, TableName
from .ruleset import KEPT_WHOLE, ours

__all__ = ["Live", "LockHeld", "Counted", "RestoreRefused", "ToolTables"]

READ_TABLES: tuple[TableName, ...] = ("filter", "mangle", "nat")


class Counted(NamedTuple):
    """A rule's counters."""

    place: Place
    rule: str
    packets: int


class Live(Protocol):
    """Tables of one family; the real one and the fake pass the same tests."""

    family: Family
    variant: Variant

    def read(self, keep: Collection[str] = ()) -> Listing:
        """Everything that is there; rules of the chains in `keep` by their text."""

    def restore(self, text: str, sections: Sequence[Section]) -> None:
        """Bring input into force.  Raises RestoreRefused, LockHeld, KernelError as proxycore.kernel.xtables does."""

    def rules(self, place: Place) -> Rules | None:
        """Rules of one chain; None: there is none."""

    def counters(self, chains: Collection[Place]) -> Iterable[Counted]:
        """Counters of the rules of these chains."""


class ToolTables:
    """Tables through iptables-save and iptables-restore."""

    def __init__(self, tools: Tools, *, lock_seconds: int) -> None:
        self.family = tools.family
        self.variant = tools.variant
        self.tools = tools
        self._lock_seconds = lock_seconds

    def read(self, keep: Collection[str] = ()) -> Listing:
        wanted = {*KEPT_WHOLE, *keep}
        return xtables.save(self.tools, lambda lines: read(lines, ours=ours, keep=wanted), tables=READ_TABLES)

    def restore(self, text: str, sections: Sequence[Section]) -> None:
        xtables.restore(self.tools, text, self._lock_seconds)

    def rules(self, place: Place) -> Rules | None:
        if self.variant == "nft":
            return xtables.list_chain(self.tools, place.table, place.chain)
        listing = self.read({place.chain})
        if not listing.has_chain(place.table, place.chain):
            return None
        return listing.rules(place.table, place.chain)

    def counters(self, chains: Collection[Place]) -> Iterable[Counted]:
        raise NotImplementedError


Lives = Mapping[Family, Live]
