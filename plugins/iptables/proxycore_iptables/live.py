"""What the backend asks of one family's iptables, and the real one behind it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from proxycore.api import Family
from proxycore.kernel import xtables
from proxycore.kernel.xtables import LockHeld, RestoreRefused, Tools, Variant

from .listing import Counted, Listing, counters, read
from .program import Section
from .rules import Place, Rules, TableName
from .ruleset import KEPT_WHOLE, shown

__all__ = ["Counted", "Live", "LockHeld", "RestoreRefused", "ToolTables"]

READ_TABLES: tuple[TableName, ...] = ("filter", "mangle", "nat")


class Live(Protocol):
    """Tables of one family; the real one and the fake pass the same tests."""

    family: Family
    variant: Variant
    name: str

    def read(self, keep: Collection[str] = ()) -> Listing:
        """Everything that is there; rules of the chains in `keep` by their text."""

    def restore(self, text: str, sections: Sequence[Section]) -> None:
        """Bring input into force.  Raises RestoreRefused, LockHeld, KernelError as proxycore.kernel.xtables does."""

    def rules(self, places: Collection[Place]) -> dict[Place, Rules]:
        """Rules of those of these chains that are there."""

    def counters(self, wanted: Callable[[str, str], bool]) -> list[Counted]:
        """Counters of the rules of nat whose table and chain are wanted."""


class ToolTables:
    """Tables through iptables-save and iptables-restore."""

    def __init__(self, tools: Tools, *, lock_seconds: int) -> None:
        self.family = tools.family
        self.variant = tools.variant
        self.tools = tools
        self.name = str(tools)
        self._lock_seconds = lock_seconds

    def read(self, keep: Collection[str] = ()) -> Listing:
        wanted = {*KEPT_WHOLE, *keep}
        return xtables.save(
            self.tools, lambda lines: read(lines, ours=shown, keep=wanted), tables=READ_TABLES
        )

    def restore(self, text: str, sections: Sequence[Section]) -> None:
        xtables.restore(self.tools, text, self._lock_seconds)

    def rules(self, places: Collection[Place]) -> dict[Place, Rules]:
        found: dict[Place, Rules] = {}
        if self.variant == "nft":
            for place in places:
                rules = xtables.list_chain(self.tools, place.table, place.chain)
                if rules is not None:
                    found[place] = rules
            return found
        listing = self.read({place.chain for place in places})
        for place in places:
            rules = listing.table(place.table).rules.get(place.chain)
            if rules is not None:
                found[place] = rules
        return found

    def counters(self, wanted: Callable[[str, str], bool]) -> list[Counted]:
        return xtables.save(
            self.tools,
            lambda lines: [item for item in counters(lines) if wanted(item.table, item.chain)],
            tables=("nat",),
            counters=True,
        )


Lives = Mapping[Family, Live]
