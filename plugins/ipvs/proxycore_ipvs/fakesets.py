"""IP sets in memory, for tests: the kernel's rules about names, kinds, sizes, references and entries."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable

from proxycore.api import KernelError
from proxycore.kernel.ipsets import BUSY

from . import setwire
from .sets import (
    EXIST,
    FULL,
    INVALID_CIDR,
    INVALID_FAMILY,
    NO_SKBINFO,
    SECOND_MISSING,
    TYPE_MISMATCH,
    Entry,
    EntryRefusal,
    Mark,
    Members,
    SetSpec,
    SetState,
    text_of_error,
)

_Content = dict[Entry, Mark | None]


class FakeSets:
    """IP sets of one namespace.

    `references`: how many rules name a set.  `refuse(entry)`: the number that the kernel gives for it, 0: none.
    """

    def __init__(self) -> None:
        self.references: dict[str, int] = {}
        self.refuse: Callable[[Entry], int] = lambda entry: 0
        self._specs: dict[str, SetSpec] = {}
        self._contents: dict[str, _Content] = {}

    def states(self) -> dict[str, SetState]:
        return {
            name: SetState(spec, len(self._contents[name]), self.references.get(name, 0))
            for name, spec in self._specs.items()
        }

    def create(self, spec: SetSpec, *, hash_size: int | None = None) -> bool:
        setwire.create(spec, 1, hash_size)
        if spec.name in self._specs:
            return False
        self._specs[spec.name], self._contents[spec.name] = spec, {}
        return True

    def destroy(self, name: str) -> bool:
        if name not in self._specs:
            return False
        if self.references.get(name):
            raise _refused(BUSY)
        del self._specs[name], self._contents[name]
        return True

    def swap(self, name: str, other: str) -> None:
        self._known(name)
        if other not in self._specs:
            raise _refused(SECOND_MISSING)
        one, two = self._specs[name], self._specs[other]
        if (one.kind, one.family) != (two.kind, two.family):
            raise _refused(TYPE_MISMATCH)
        # All but the names and the references is exchanged.
        self._specs[name], self._specs[other] = _named(two, name), _named(one, other)
        contents = self._contents
        contents[name], contents[other] = contents[other], contents[name]

    def members(self, spec: SetSpec) -> _Content:
        return dict(self._known(spec.name))

    def add(self, spec: SetSpec, members: Members, *, exclusive: bool = False) -> tuple[EntryRefusal, ...]:
        pack = setwire.packer(spec, marked=True)
        for entry, mark in members.items():
            pack(entry, mark, 1)
        content, kept = self._known(spec.name), self._specs[spec.name]
        if members and (kept.kind, kept.family) != (spec.kind, spec.family):
            raise _refused(INVALID_FAMILY)
        refusals = []
        for entry, mark in members.items():
            number = self.refuse(entry) or self._why_not(kept, content, entry, mark, exclusive)
            if number:
                refusals.append(EntryRefusal(entry, number, True))
            else:
                # Without bits to set the kernel keeps no mark.
                content[entry] = mark if kept.skbinfo and mark != Mark(0, 0) else None
        return tuple(refusals)

    def delete(
        self, spec: SetSpec, entries: Iterable[Entry], *, exclusive: bool = False
    ) -> tuple[EntryRefusal, ...]:
        wanted, pack = list(entries), setwire.packer(spec, marked=False)
        for entry in wanted:
            pack(entry, None, 1)
        content = self._known(spec.name)
        refusals = []
        for entry in wanted:
            number = self.refuse(entry)
            if not number and entry in content:
                del content[entry]
            elif number or exclusive:
                refusals.append(EntryRefusal(entry, number or EXIST, False))
        return tuple(refusals)

    def close(self) -> None:
        pass

    @staticmethod
    def _why_not(spec: SetSpec, content: _Content, entry: Entry, mark: Mark | None, exclusive: bool) -> int:
        network = entry.address if spec.kind == "hash:net" else entry.second
        if network.endswith("/0"):
            return INVALID_CIDR
        if mark is not None and not spec.skbinfo:
            return NO_SKBINFO
        if entry in content:
            return EXIST if exclusive else 0
        return FULL if spec.max_entries and len(content) >= spec.max_entries else 0

    def _known(self, name: str) -> _Content:
        if name not in self._contents:
            raise KernelError(f"there is no set {name}", errno=errno.ENOENT)
        return self._contents[name]


def _refused(number: int) -> KernelError:
    return KernelError(text_of_error(number), errno=number)


def _named(spec: SetSpec, name: str) -> SetSpec:
    return SetSpec(name, spec.kind, spec.family, spec.skbinfo, spec.max_entries)
