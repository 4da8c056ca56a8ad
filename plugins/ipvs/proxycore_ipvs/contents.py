"""The data plane's entries in the kernel's sets: what its names and values are there, reading them, changing them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from proxycore.api import Protocol

from . import sets as kernel_sets
from .diff import PutEntry, SetOperation
from .entries import MAPS, MOST_ENTRIES, NODE_PORTS, Entry, SetKind, SetName
from .setkernel import Sets
from .sets import Mark, SetSpec


class SetRefusal(NamedTuple):
    """Operation number `position` was refused; `errno` is the kernel's number."""

    position: int
    operation: SetOperation
    errno: int

    def __str__(self) -> str:
        return f"{self.operation}: {kernel_sets.text_of_error(self.errno)}"


def spec_of(name: SetName) -> SetSpec:
    """What a set of ours is made as."""
    skbinfo = name.kind in MAPS
    if name.type == "bitmap:port":
        return kernel_sets.bitmap(str(name), skbinfo=skbinfo)
    return SetSpec(str(name), name.type, name.family, skbinfo, MOST_ENTRIES)


def kernel_entry(entry: Entry) -> kernel_sets.Entry:
    """An entry as the sets have it."""
    return kernel_sets.Entry(entry.address or "", entry.protocol, entry.port or 0, entry.other or "")


def our_entry(name: SetName, entry: kernel_sets.Entry) -> Entry:
    """An entry that was read from a set of ours.  In a bitmap it is only a port; the protocol is the set's."""
    protocol = _PROTOCOLS.get(name.kind, entry.protocol)
    port = entry.port if "port" in name.type else None
    return Entry(name, entry.address or None, protocol, port, entry.second or None)


def _value(mark: Mark | None) -> int | None:
    """What is not written so by us counts as no value, so that it is written anew."""
    return mark.value if mark is not None and mark.mask == _WHOLE else None


_PROTOCOLS: dict[SetKind, Protocol] = {kind: protocol for protocol, kind in NODE_PORTS.items()}
_WHOLE = 0xFFFFFFFF


def read_entries(sets: Sets, names: Iterable[SetName]) -> dict[Entry, int | None]:
    """What is in these sets, with values.  Raises KernelError; ENOENT: one of them is not there."""
    return {
        our_entry(name, entry): _value(mark)
        for name in names
        for entry, mark in sets.members(spec_of(name)).items()
    }


def change_entries(sets: Sets, operations: Sequence[SetOperation]) -> tuple[SetRefusal, ...]:
    """Do all operations, in this order as far as sets of different kinds go; those refused, in the order given.

    An entry that is there gets the value; one that is not there need not be deleted.  All others hold.  Raises KernelError:
    a set is not there, or the kernel could not be asked; any of the operations may hold.
    """
    refused: list[SetRefusal] = []
    numbered = list(enumerate(operations))
    for (putting, _), run in groupby(
        numbered, key=lambda one: (isinstance(one[1], PutEntry), one[1].entry.set.kind)
    ):
        by_set: dict[SetName, dict[kernel_sets.Entry, int]] = {}
        for position, operation in run:
            by_set.setdefault(operation.entry.set, {})[kernel_entry(operation.entry)] = position
        for name, positions in by_set.items():
            spec = spec_of(name)
            if putting:
                found = sets.add(spec, {e: _mark(operations[p]) for e, p in positions.items()})
            else:
                found = sets.delete(spec, positions)
            refused += (
                SetRefusal(positions[one.entry], operations[positions[one.entry]], one.errno) for one in found
            )
    return tuple(sorted(refused, key=lambda one: one.position))


def _mark(operation: SetOperation) -> Mark | None:
    value = operation.value if isinstance(operation, PutEntry) else None
    return None if value is None else Mark(value)
