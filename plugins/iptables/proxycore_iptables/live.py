"""What the backend asks of one family's iptables, and the real one behind it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from proxycore.api import Family, KernelError
from proxycore.kernel import xtables
from proxycore.kernel.xtables import LockHeld, RestoreRefused, Tools, Variant

from .listing import Listing, read
from .program import Section
from .reader import Counts, Reader, reader
from .rules import TABLES, Jump, Place, Rules
from .ruleset import KEPT_WHOLE, shown

__all__ = ["Live", "LockHeld", "RestoreRefused", "ToolTables"]


class Live(Protocol):
    """Tables of one family; the real one and the fake pass the same tests."""

    family: Family
    variant: Variant
    name: str

    def read(self, keep: Collection[str] = ()) -> Listing:
        """Everything that is there; rules of the chains in `keep` by their text.

        Raises KernelError: it cannot be read, or a table of ours holds rules that this variant of the tools cannot show.
        """

    def restore(self, text: str, sections: Sequence[Section]) -> None:
        """Bring input into force.  Raises RestoreRefused, LockHeld, KernelError as proxycore.kernel.xtables does."""

    def rules(self, places: Collection[Place]) -> dict[Place, Rules]:
        """Rules of those of these chains that are there."""

    def counters(self) -> Counts:
        """Counters of every rule of our chains, by table and chain."""

    def assert_jumps(self, jumps: Sequence[Jump]) -> None:
        """Put rules at the head of built-in chains where they are missing.  Raises LockHeld, KernelError."""

    def close(self) -> None:
        """End what was started for this."""


def check_readable(name: str, listing: Listing) -> None:
    """A table that the tool leaves out looks like an empty one.  Raises KernelError."""
    hidden = sorted(set(TABLES).intersection(listing.incompatible))
    if hidden:
        raise KernelError(
            f"{name} cannot read table {' and '.join(hidden)}: somebody put rules there with nft, which iptables cannot show; "
            f"see `nft list ruleset`, and move them to a table of their own"
        )


class ToolTables:
    """Tables through iptables-save and iptables-restore, and in legacy python-iptables in a worker process."""

    def __init__(self, tools: Tools, *, lock_seconds: int) -> None:
        self.family = tools.family
        self.variant = tools.variant
        self.tools = tools
        self.name = str(tools)
        self._lock_seconds = lock_seconds
        self._reader: Reader | None = None

    def read(self, keep: Collection[str] = ()) -> Listing:
        wanted = {*KEPT_WHOLE, *keep}
        listing = xtables.save(self.tools, lambda lines: read(lines, ours=shown, keep=wanted))
        check_readable(self.name, listing)
        return listing

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

    def _asked(self) -> Reader:
        if self._reader is None:
            self._reader = reader(self.tools, self._lock_seconds)
        return self._reader

    def counters(self) -> Counts:
        return self._asked().counters()

    def assert_jumps(self, jumps: Sequence[Jump]) -> None:
        self._asked().assert_jumps(jumps)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
