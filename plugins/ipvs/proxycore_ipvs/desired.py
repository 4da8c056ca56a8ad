"""What all Service ports and the node want together, kept up to date as each of them changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

from proxycore.api import ServicePortName

from .entries import MAPS, Entry
from .plane import Objects, VirtualServer
from .servers import ByMark

Owner = ServicePortName | str
"""A Service port, or a word for what is there once."""
_NOTHING = Objects()
K = TypeVar("K")
V = TypeVar("V")


class Touched(NamedTuple):
    """Keys of servers and entries that may have changed."""

    servers: frozenset[ByMark] = frozenset()
    entries: frozenset[Entry] = frozenset()


class Desired:
    """Objects by owner.  Entries that several owners want go with the last; a value belongs to who put it last."""

    def __init__(self) -> None:
        self._of: dict[Owner, Objects] = {}
        self._servers: dict[ByMark, VirtualServer] = {}
        self._values: dict[Entry, tuple[Owner, int | None]] = {}
        self._wanting: dict[Entry, int] = {}

    @property
    def owners(self) -> frozenset[Owner]:
        """Whoever wants something."""
        return frozenset(self._of)

    def get(self, owner: Owner) -> Objects | None:
        """What an owner wants."""
        return self._of.get(owner)

    def holder(self, entry: Entry) -> Owner | None:
        """Whose value an entry has; None: nobody's."""
        held = self._values.get(entry)
        return held[0] if held is not None else None

    def put(self, owner: Owner, objects: Objects | None) -> Touched:
        """From now on the owner wants this; None: nothing.  Returns what of it is not as before."""
        before, after = self._of.get(owner, _NOTHING), objects or _NOTHING
        servers = _differing(before.servers, after.servers)
        entries = _differing(before.entries, after.entries)
        for key in servers:
            if key in after.servers:
                self._servers[key] = after.servers[key]
            else:
                self._servers.pop(key, None)
        for entry in entries:
            self._enter(owner, entry, before, after)
        if objects is None:
            self._of.pop(owner, None)
        else:
            self._of[owner] = objects
        return Touched(frozenset(servers), frozenset(entries))

    def _enter(self, owner: Owner, entry: Entry, before: Objects, after: Objects) -> None:
        if entry.set.kind in MAPS:
            if entry in after.entries:
                self._values[entry] = (owner, after.entries[entry])
            elif entry in self._values and self._values[entry][0] == owner:
                self._values.pop(entry)
            return
        count = self._wanting.get(entry, 0) + (entry in after.entries) - (entry in before.entries)
        if count > 0:
            self._wanting[entry] = count
        else:
            self._wanting.pop(entry, None)

    def everything(self) -> Objects:
        """All that is wanted."""
        entries: dict[Entry, int | None] = {entry: value for entry, (_, value) in self._values.items()}
        entries.update(dict.fromkeys(self._wanting))
        return Objects(dict(self._servers), entries)

    def part(self, touched: Iterable[Touched]) -> Objects:
        """Of all that is wanted, what these name."""
        servers: dict[ByMark, VirtualServer] = {}
        entries: dict[Entry, int | None] = {}
        for each in touched:
            servers.update({key: self._servers[key] for key in each.servers if key in self._servers})
            for entry in each.entries:
                if entry in self._values:
                    entries[entry] = self._values[entry][1]
                elif entry in self._wanting:
                    entries[entry] = None
        return Objects(servers, entries)


def _differing(before: Mapping[K, V], after: Mapping[K, V]) -> set[K]:
    """Keys of one mapping alone, or with another value."""
    found = before.keys() ^ after.keys()
    return found | {key for key in before.keys() & after.keys() if before[key] != after[key]}
