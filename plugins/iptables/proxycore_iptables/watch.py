"""Telling our own changes of the rules from those of others, without reading the rules."""

from __future__ import annotations

from collections.abc import Sequence

from proxycore.api import Family

from .program import Section
from .stamp import Stamp, Stamps


class Watch:
    """Follows the stamps over our own changes.

    A change by others shows as a stamp that is not the one after our last change; one that falls within a change of
    ours shows by the number of commits (nft) or of entries (legacy).
    """

    def __init__(self, stamps: Stamps) -> None:
        self._stamps = stamps
        self._known: Stamp | None = None
        self._foreign = True

    def close(self) -> None:
        self._stamps.close()

    def before(self) -> Stamp:
        """Called before a change of ours."""
        now = self._stamps.read()
        if now != self._known:
            self._foreign = True
        return now

    def after(self, before: Stamp, family: Family, sections: Sequence[Section]) -> Stamp:
        """Called after a change of ours that held; returns what the next one is to be told."""
        now = self._stamps.read()
        if now.generation is not None and before.generation is not None:
            self._foreign = self._foreign or now.generation != before.generation + len(sections)
        else:
            for table in {section.table for section in sections}:
                more = sum(section.entries for section in sections if section.table == table)
                was, is_now = before.entries(family, table), now.entries(family, table)
                # A table that our change has made has entries of its own.
                if was is not None and is_now != was + more:
                    self._foreign = True
        self._known = now
        return now

    def lost(self) -> None:
        """A change of ours may have been partly made."""
        self._foreign = True

    def changed(self) -> bool:
        """Have others changed something since the last settle(), as far as can be told?"""
        return self._foreign or self._stamps.read() != self._known

    def look(self) -> Stamp:
        """Called before everything is read."""
        return self._stamps.read()

    def settle(self, looked: Stamp) -> None:
        """What was read after `looked` is known now; what has changed since is not."""
        self._known = looked
        self._foreign = False
