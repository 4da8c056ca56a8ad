"""The bits of the packet mark: which server a packet goes to, and what else is to become of it.

The value that a set maps a frontend to is such a mark.  Rules read the flags and take them away, so that what IPVS sees is
the mark of a virtual server, bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import msgspec

from proxycore.api import PoolName

ALL = 0xFFFFFFFF
KUBELET_DROP = 0x8000
"""The kubelet's rules drop packets that carry it."""
ID_BITS = 18
LAST_CLASS = 15
"""Classes of target ports are numbered from 1; 0 is none."""


@lru_cache(maxsize=64)
def _runs(mask: int) -> tuple[tuple[int, int, int], ...]:
    """Bits in a row, lowest first: where they begin in a mark, where in a number, and how many as a mask from bit 0."""
    found = []
    place = start = 0
    while mask >> start:
        if not mask >> start & 1:
            start += 1
            continue
        width = 1
        while mask >> start + width & 1:
            width += 1
        found.append((start, place, (1 << width) - 1))
        start, place = start + width, place + width
    return tuple(found)


def spread(number: int, mask: int) -> int:
    """A number written into the bits of a mask, lowest first.  Raises ValueError if it has no room there."""
    if number < 0 or number >> mask.bit_count():
        raise ValueError(f"{number} has no room in the bits 0x{mask:x}")
    found = 0
    for start, place, ones in _runs(mask):
        found |= (number >> place & ones) << start
    return found


def gathered(mark: int, mask: int) -> int:
    """The number that spread() wrote."""
    found = 0
    for start, place, ones in _runs(mask):
        found |= (mark >> start & ones) << place
    return found


class Parts(NamedTuple):
    """What a value of the map says, taken apart; with `reject` nothing else is set.

    `pool`: whose server it names.  `number`: of the Service port.  `masquerade`: everyone; `masquerade_others`: all but
    pods of this node.  `short`: pods of this node and the node itself take the cluster pool, the node masqueraded.
    `dropped`: whoever is left with `pool` is.  `port_class`: of the target port, 0 without one.
    """

    number: int = 0
    pool: PoolName = PoolName.CLUSTER
    masquerade: bool = False
    masquerade_others: bool = False
    short: bool = False
    dropped: bool = False
    port_class: int = 0
    reject: bool = False


REJECTED = Parts(reject=True)


class Marks(msgspec.Struct, frozen=True, kw_only=True):
    """Which bits mean what.  Raises ValueError, when made, if that cannot work; it says why.

    `ours`: to be delivered to IPVS.  `reject`: refused, never together with `ours`.  The others are in the order of Parts.
    """

    ours: int = 0x40000000
    reject: int = 0x80000000
    dropped: int = 0x20000000
    local: int = 0x10000000
    masquerade_others: int = 0x08000000
    short: int = 0x04000000
    port_class: int = 0x00F00000
    masquerade: int = 0x00004000
    number: int = 0x000F3FFF

    def __post_init__(self) -> None:
        seen = 0
        for name, mask in self.masks().items():
            if not 0 < mask <= ALL:
                raise ValueError(f"mark bits {name}: 0x{mask:x} is not in 0x1 to 0x{ALL:x}")
            wanted = {"number": ID_BITS, "port_class": 4}.get(name, 1)
            if mask.bit_count() != wanted:
                raise ValueError(
                    f"mark bits {name}: 0x{mask:x} has {mask.bit_count()} bits, it takes {wanted}"
                )
            if mask & seen:
                raise ValueError(f"mark bits {name}: 0x{mask & seen:x} has another meaning already")
            seen |= mask
        if self.number & KUBELET_DROP:
            raise ValueError(f"mark bits number: 0x{KUBELET_DROP:x} is the kubelet's")
        # Tools print larger ones as negative numbers.
        for name in ("ours", "local", "number"):
            if getattr(self, name) & 0x80000000:
                raise ValueError(f"mark bits {name}: marks of servers have to be below 0x80000000")

    def masks(self) -> Mapping[str, int]:
        """Bits by name."""
        return {name: getattr(self, name) for name in self.__struct_fields__}

    @classmethod
    def with_masquerade_bit(cls, bit: int) -> Marks:
        """The usual bits, but for the masquerade mark at that bit, 0 to 31; what had that one before gets the usual one.

        Raises ValueError if the bits cannot be laid out so.
        """
        usual = cls()
        wanted = 1 << bit
        if wanted == usual.masquerade:
            return usual
        changed = {
            name: mask ^ wanted | usual.masquerade for name, mask in usual.masks().items() if mask & wanted
        }
        return msgspec.structs.replace(usual, masquerade=wanted, **changed)

    def overlaps(self, foreign: Mapping[str, int]) -> tuple[str, ...]:
        """Which of others' bits are ours too, a phrase each; `foreign`: masks by who uses them."""
        found = []
        for who, mask in foreign.items():
            shared = {name: mine & mask for name, mine in self.masks().items() if mine & mask}
            if shared:
                bits = ", ".join(f"0x{bits:x} ({name})" for name, bits in shared.items())
                found.append(f"{who} uses mark bits 0x{mask:x}, among them ours {bits}")
        return tuple(found)

    # -- servers --

    @property
    def server_mask(self) -> int:
        """Every bit that the mark of a virtual server may have."""
        return self.ours | self.local | self.number

    @property
    def transient(self) -> int:
        """Flags of a mapped packet that are gone before it comes to IPVS."""
        return self.masquerade_others | self.short | self.port_class | self.masquerade

    @property
    def remembered(self) -> int:
        """What the mark of a connection keeps: that it is ours, its class of target port, and whether it is masqueraded."""
        return self.ours | self.port_class | self.masquerade

    def server(self, number: int, pool: PoolName) -> int:
        """Mark of the virtual server of a Service port's pool.  Number 0 is nobody's: known connections carry it."""
        if number < 1:
            raise ValueError(f"{number} is not the number of a Service port")
        local = self.local if pool is PoolName.LOCAL else 0
        return self.ours | local | spread(number, self.number)

    def server_of(self, mark: int) -> tuple[int, PoolName] | None:
        """The number and pool whose server has that mark; None: it is not one of our servers."""
        if mark & ~self.server_mask or not mark & self.ours:
            return None
        number = gathered(mark, self.number)
        if number == 0:
            return None
        return number, PoolName.LOCAL if mark & self.local else PoolName.CLUSTER

    # -- values of the map --

    def compose(self, parts: Parts) -> int:
        """The value that says this.  Raises ValueError for a number or a class out of bounds."""
        if parts.reject:
            return self.reject
        value = self.server(parts.number, parts.pool) | spread(parts.port_class, self.port_class)
        for flag in ("masquerade", "masquerade_others", "short", "dropped"):
            if getattr(parts, flag):
                value |= getattr(self, flag)
        return value

    def take_apart(self, value: int) -> Parts | None:
        """The inverse; None: no value of ours."""
        if value == self.reject:
            return REJECTED
        flags = self.transient | self.dropped
        server = self.server_of(value & ~flags)
        if server is None:
            return None
        number, pool = server
        return Parts(
            number=number,
            pool=pool,
            masquerade=bool(value & self.masquerade),
            masquerade_others=bool(value & self.masquerade_others),
            short=bool(value & self.short),
            dropped=bool(value & self.dropped),
            port_class=gathered(value, self.port_class),
        )

    def compose_class(self, number: int) -> int:
        """What the mark of a connection of that class of target port has.  Raises ValueError if there is no such class."""
        if not 1 <= number <= LAST_CLASS:
            raise ValueError(f"{number} is not the number of a class of target ports")
        return self.ours | spread(number, self.port_class)

    @property
    def numbers(self) -> range:
        """Every number that a Service port may have."""
        return range(1, 1 << ID_BITS)
