"""IP sets and their entries: frozen values.

`str()` of an entry, and `line()`, are what `ipset` prints and takes.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec

from proxycore.api import Family, Protocol
from proxycore.kernel.ipsets import BUSY

KINDS = ("hash:ip", "hash:net", "hash:ip,port", "hash:ip,port,ip", "hash:ip,port,net", "bitmap:port")
LONGEST_NAME = 31
DEFAULT_MAX_ENTRIES = 65536


class SetSpec(msgspec.Struct, frozen=True):
    """What a set is made as.

    `kind` is one of KINDS, except for others' sets.  `skbinfo`: entries carry marks.  `max_entries` is 0 for bitmaps, which
    hold all ports from 0 to 65535 and have no family: it is IPv4 by convention.
    """

    name: str
    kind: str
    family: Family = "IPv4"
    skbinfo: bool = False
    max_entries: int = DEFAULT_MAX_ENTRIES

    def __str__(self) -> str:
        words = [f"create {self.name} {self.kind}"]
        if self.kind == "bitmap:port":
            words.append("range 0-65535")
        else:
            version = "inet6" if self.family == "IPv6" else "inet"
            words.append(f"family {version} maxelem {self.max_entries}")
        if self.skbinfo:
            words.append("skbinfo")
        return " ".join(words)


def bitmap(name: str, *, skbinfo: bool = False) -> SetSpec:
    """A set of ports."""
    return SetSpec(name, "bitmap:port", skbinfo=skbinfo, max_entries=0)


class SetState(NamedTuple):
    """A set as the kernel has it; `references` counts the rules and sets that name it."""

    spec: SetSpec
    entries: int
    references: int


class Entry(NamedTuple):
    """An entry of a set of any kind; what the kind does not have stays empty.

    `address` is a network in `hash:net` (`10.0.0.0/8`, no host bits, and not of length 0).  `second` is the third part of a
    kind of three: an address or a network.
    """

    address: str = ""
    protocol: Protocol | None = None
    port: int = 0
    second: str = ""

    def __str__(self) -> str:
        if not self.address:
            return str(self.port)
        if self.protocol is None:
            return self.address
        words = [self.address, f"{self.protocol.lower()}:{self.port}"]
        return ",".join([*words, self.second] if self.second else words)


class Mark(NamedTuple):
    """The firewall mark that an entry gives a packet: its bits in the mask become those of the value."""

    value: int
    mask: int = 0xFFFFFFFF

    def __str__(self) -> str:
        return hex(self.value) if self.mask == 0xFFFFFFFF else f"{self.value:#x}/{self.mask:#x}"


Members = Mapping[Entry, Mark | None]
"""Content of a set.  None: the entry has no mark, which is not the same as mark 0."""


def line(name: str, entry: Entry, mark: Mark | None = None) -> str:
    """The line by which `ipset restore` adds an entry."""
    return f"add {name} {entry}" + (f" skbmark {mark}" if mark is not None else "")


def halves(network: str) -> tuple[str, ...]:
    """A network as sets can hold it: that of length 0, which they refuse, in two."""
    address, _, length = network.partition("/")
    if int(length or -1) != 0:
        return (network,)
    return ("::/1", "8000::/1") if ":" in address else ("0.0.0.0/1", "128.0.0.0/1")


TYPE_MISMATCH, SECOND_MISSING, EXIST, INVALID_CIDR, INVALID_FAMILY, NO_SKBINFO = (
    4102,
    4101,
    4103,
    4104,
    4106,
    4114,
)
UNKNOWN_KIND, FULL = 4098, 4352
"""Numbers of the kernel's sets beyond those of errno.h.  FULL is for hashes; bitmaps say by it that a port is out of range."""

_TEXTS = {
    4097: "the kernel does not understand the request",
    UNKNOWN_KIND: "the kernel has no sets of this kind",
    4099: "there are too many sets",
    BUSY: "rules or other sets refer to it",
    SECOND_MISSING: "the second set is missing, or the name is taken",
    TYPE_MISMATCH: "the sets are of different kinds",
    EXIST: "the entry is there already, or not there",
    INVALID_CIDR: "no prefix length that a set can hold",
    INVALID_FAMILY: "the set is of the other family",
    4109: "an IPv4 address is expected",
    4110: "an IPv6 address is expected",
    NO_SKBINFO: "the set was made without skbinfo",
    FULL: "the set is full",
    4354: "no such protocol",
}

Reason = Literal["exists", "missing", "full", "other"]


def text_of_error(number: int) -> str:
    """What an error of a set means, in words."""
    return _TEXTS.get(number) or f"{errnos.errorcode.get(number, 'error')} ({number})"


class EntryRefusal(NamedTuple):
    """One entry could not be added (`added`), or deleted; `errno` is the kernel's number."""

    entry: Entry
    errno: int
    added: bool

    @property
    def reason(self) -> Reason:
        if self.errno == EXIST:
            return "exists" if self.added else "missing"
        return "full" if self.errno == FULL and self.entry.address else "other"

    def __str__(self) -> str:
        why = self.reason if self.reason != "other" else text_of_error(self.errno)
        return f"{'add' if self.added else 'del'} {self.entry}: {why}"
