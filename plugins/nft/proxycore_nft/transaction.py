"""One atomic change of the tables: rules, then elements taken out, then elements put in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from proxycore.api import ServicePortName

from . import encode
from .encode import Body


class Run(NamedTuple):
    """Which Service each element of one message stands for; used to name the culprit of a refusal."""

    table_set: str
    elements: list[bytes]
    owners: list[ServicePortName | None]
    head: int
    """Bytes of the message before its first element."""


class Elements:
    """Elements of one set, to be put in or taken out; parallel lists of bytes and owners."""

    __slots__ = ("bodies", "owners")

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.owners: list[ServicePortName | None] = []


Verb = Literal["add", "delete"]


class Transaction:
    """Collects changes; the kernel gets them in one batch, so that all or none of it holds.

    A key that changes its data is deleted and added: the kernel refuses to overwrite, and in one batch no packet sees the gap.
    """

    def __init__(self) -> None:
        self.rules: list[Body] = []
        self.flushed: list[tuple[str, str, str]] = []
        self._deleted: dict[tuple[str, str, str], Elements] = {}
        self._added: dict[tuple[str, str, str], Elements] = {}

    def add(
        self, family: str, table: str, name: str, element: bytes, owner: ServicePortName | None = None
    ) -> None:
        self._put(self._added, family, table, name, element, owner)

    def delete(
        self, family: str, table: str, name: str, element: bytes, owner: ServicePortName | None = None
    ) -> None:
        self._put(self._deleted, family, table, name, element, owner)

    def adding(self, family: str, table: str, name: str) -> Elements:
        """The list itself, for hot loops."""
        return self._added.setdefault((family, table, name), Elements())

    def deleting(self, family: str, table: str, name: str) -> Elements:
        return self._deleted.setdefault((family, table, name), Elements())

    def flush(self, family: str, table: str, name: str) -> None:
        """Take out every element; comes before all else that concerns elements."""
        self.flushed.append((family, table, name))

    @staticmethod
    def _put(
        where: dict[tuple[str, str, str], Elements],
        family: str,
        table: str,
        name: str,
        element: bytes,
        owner: ServicePortName | None,
    ) -> None:
        entry = where.setdefault((family, table, name), Elements())
        entry.bodies.append(element)
        entry.owners.append(owner)

    @property
    def operations(self) -> int:
        """Kernel operations: rules, chains, flushes and single elements."""
        elements = sum(len(e.bodies) for group in (self._deleted, self._added) for e in group.values())
        return len(self.rules) + len(self.flushed) + elements

    def changes(self) -> Iterator[tuple[Verb, str, str, str, Elements]]:
        """(verb, family, table, set, elements), deletions first."""
        for (family, table, name), elements in self._deleted.items():
            yield "delete", family, table, name, elements
        for (family, table, name), elements in self._added.items():
            yield "add", family, table, name, elements

    def messages(self) -> tuple[list[Body], list[Run | None]]:
        """The batch's messages in order, and for each the elements that it carries."""
        bodies: list[Body] = list(self.rules)
        if self.flushed and not bodies:
            # To flush what is empty changes nothing, and the kernel counts no generation then; for this it always does.
            family, table, _ = self.flushed[0]
            bodies.append(encode.new_chain(family, table, "services"))
        runs: list[Run | None] = [None] * len(bodies)
        for family, table, name in self.flushed:
            bodies.append(Body(encode.DELSETELEM, 0, family, encode.set_head(table, name)))
            runs.append(None)
        for verb, family, table, name, elements in self.changes():
            head = encode.set_head(table, name)
            kind = encode.NEWSETELEM if verb == "add" else encode.DELSETELEM
            flags = encode.F_CREATE if verb == "add" else 0
            for start, stop in encode.pack_elements(elements.bodies):
                chosen = elements.bodies[start:stop]
                bodies.append(Body(kind, flags, family, head + encode.nest(3, *chosen)))
                runs.append(Run(name, chosen, elements.owners[start:stop], 20 + len(head) + 4))
        return bodies, runs

    def owners(self) -> set[ServicePortName]:
        """Every Service that the transaction concerns."""
        return {
            owner for _, _, _, _, elements in self.changes() for owner in elements.owners if owner is not None
        }


def owner_at(run: Run, offset: int) -> ServicePortName | None:
    """Whose element stands at that byte of the message (as the kernel's extended acknowledgement counts).

    None for the names of table and set, which come before the elements.
    """
    if offset < run.head:
        return None
    position = run.head
    for element, owner in zip(run.elements, run.owners, strict=True):
        position += len(element)
        if offset < position:
            return owner
    return None
