"""Chains that choose one of N endpoints: one set of rules per distinct endpoint count, not per Service.

`numgen random mod N` needs N in the rule, so pools are sorted into classes by (endpoint count, which pool, affinity timeout).
A new rule that refers to a filled map makes the kernel walk that map, so classes that will be wanted soon are made early:
the usual counts with the table, and the neighbours of each count in use right after it was first needed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from . import encode, layout
from .encode import Body, register

USUAL_COUNTS = range(1, 17)


class Class(NamedTuple):
    """Pools of `size` endpoints; `affinity_seconds` 0 means none."""

    size: int
    local: bool
    affinity_seconds: int = 0

    @property
    def chain(self) -> str:
        side = "local-" if self.local else ""
        if self.affinity_seconds:
            return f"{side}sticky-{self.size}-{self.affinity_seconds}"
        return f"{side}endpoints-{self.size}"


_CHAIN = re.compile(r"(local-)?(?:endpoints-(\d+)|sticky-(\d+)-(\d+))")


def parse_chain(name: str) -> Class | None:
    """The class that a chain of that name serves."""
    match = _CHAIN.fullmatch(name)
    if match is None:
        return None
    local, plain, sticky, seconds = match.groups()
    return Class(int(plain or sticky), local is not None, int(seconds or 0))


USUAL = tuple(Class(count, local) for count in USUAL_COUNTS for local in (False, True))


def neighbours(wanted: Iterable[Class]) -> set[Class]:
    """The classes one endpoint below and above."""
    near: set[Class] = set()
    for item in wanted:
        if item.size > 1:
            near.add(item._replace(size=item.size - 1))
        if item.size < layout.POOL_MAX:
            near.add(item._replace(size=item.size + 1))
    return near


def key(number: int) -> bytes:
    """Key of the map `classes`."""
    return layout.number(number << layout.CLASS_SHIFT)


def helpers(item: Class) -> tuple[str, ...]:
    """Chains that a class shares with the other endpoint counts of its timeout."""
    if not item.affinity_seconds:
        return ()
    side = "local-" if item.local else ""
    return f"{side}sticky-known-{item.affinity_seconds}", f"{side}sticky-new-{item.affinity_seconds}"


def bodies(family: str, table: str, item: Class, number: int, missing: Collection[str]) -> list[Body]:
    """Messages that make a class; `missing`: those of its helper chains that are not there yet."""
    made: list[Body] = []
    rules: list[Body] = []

    def chain(name: str, *lines: tuple[bytes, ...]) -> None:
        made.append(encode.new_chain(family, table, name))
        rules.extend(encode.new_rule(family, table, name, line) for line in lines)

    if item.affinity_seconds:
        for name, lines in _affinity_helpers(family, item).items():
            if name in missing:
                chain(name, *lines)
        chain(item.chain, *_sticky_lines(family, item))
    else:
        chain(item.chain, *_plain_lines(family, item))
    head = encode.set_head(table, "classes")
    entry = encode.verdict_element(key(number), item.chain)
    rules.append(Body(encode.NEWSETELEM, encode.F_CREATE, family, head + encode.nest(3, entry)))
    return made + rules


_STRIP_CLASS = (
    encode.load_priority(register(0)),
    encode.bit_and(register(0), layout.INDEX_MASK),
    encode.store_priority(register(0)),
)


def _offset(item: Class) -> int:
    return layout.LOCAL_SLOT if item.local else 0


def _target(family: str) -> tuple[int, int]:
    """Registers that hold address and port after a look-up into register 8."""
    return register(8), register(9 if family == "ip" else 12)


def _plain_lines(family: str, item: Class) -> list[tuple[bytes, ...]]:
    """meta priority set meta priority & index; dnat to meta priority . numgen random mod N map @endpoints; goto first."""
    side = "local-" if item.local else ""
    lines: list[tuple[bytes, ...]] = [_STRIP_CLASS]
    if item.size > 1:
        lines.append(
            (
                encode.load_priority(register(0)),
                encode.random_number(register(1), item.size, _offset(item)),
                encode.look_up("endpoints", register(0), register(8)),
                encode.translate(family, *_target(family)),
            )
        )
    lines.append((encode.go(f"{side}endpoints-first"),))
    return lines


def _client_and_index(family: str, mask: bool) -> tuple[tuple[bytes, ...], int]:
    """Loads `saddr . index` into registers from 0 on; returns the number of words used."""
    words = 1 if family == "ip" else 4
    loads: tuple[bytes, ...] = (
        encode.load_source(family, register(0)),
        encode.load_priority(register(words)),
    )
    if mask:
        loads += (encode.bit_and(register(words), layout.STICKY_MASK),)
    return loads, words + 1


def _use_handle(family: str, item: Class) -> tuple[bytes, ...]:
    """dnat to meta priority map @sticky-endpoints"""
    side = "local-" if item.local else ""
    return (
        encode.load_priority(register(0)),
        encode.look_up(f"{side}sticky-endpoints", register(0), register(8)),
        encode.translate(family, *_target(family)),
    )


def _affinity_helpers(family: str, item: Class) -> dict[str, list[tuple[bytes, ...]]]:
    """Chains shared by all endpoint counts of one timeout: a client that is known, and one that gets an endpoint."""
    side = "local-" if item.local else ""
    masked, _ = _client_and_index(family, mask=True)
    plain, _ = _client_and_index(family, mask=False)
    handle = encode.load_priority(register(8))
    refresh = (
        *masked,
        handle,
        encode.remember(
            "affinity", encode.DYNSET_UPDATE, register(0), register(8), item.affinity_seconds * 1000
        ),
    )
    to_index = (
        encode.load_priority(register(0)),
        encode.bit_and(register(0), layout.STICKY_MASK),
        encode.store_priority(register(0)),
    )
    forget = (*plain, handle, encode.remember("affinity", encode.DYNSET_DELETE, register(0), register(8)))
    return {
        f"{side}sticky-known-{item.affinity_seconds}": [
            refresh,
            _use_handle(family, item),
            to_index,
            forget,
        ],
        # A handle may be gone before it is used; slot 0 is always there, as for pools without affinity.
        f"{side}sticky-new-{item.affinity_seconds}": [
            refresh,
            _use_handle(family, item),
            to_index,
            _draw(item, 1),
            _use_handle(family, item),
        ],
    }


def _draw(item: Class, size: int) -> tuple[bytes, ...]:
    """meta priority set meta priority . numgen random mod SIZE map @slots"""
    return (
        encode.load_priority(register(0)),
        encode.random_number(register(1), size, _offset(item)),
        encode.look_up("slots", register(0), register(8)),
        encode.store_priority(register(8)),
    )


def _sticky_lines(family: str, item: Class) -> list[tuple[bytes, ...]]:
    """A known client goes to its endpoint; else one is drawn, remembered and used."""
    side = "local-" if item.local else ""
    plain, _ = _client_and_index(family, mask=False)
    known = (
        *plain,
        encode.look_up("affinity", register(0), register(8)),
        encode.store_priority(register(8)),
        encode.go(f"{side}sticky-known-{item.affinity_seconds}", encode.VERDICT_JUMP),
    )

    def draw(size: int) -> tuple[bytes, ...]:
        return (*_draw(item, size), encode.go(f"{side}sticky-new-{item.affinity_seconds}"))

    lines = [_STRIP_CLASS, known, draw(item.size)]
    if item.size > 1:
        lines.append(draw(1))
    return lines


def text(family: str, item: Class, helpers: set[str]) -> list[str]:
    """The chains of a class as `nft list` shows them; helper chains that `helpers` does not hold yet come first."""
    side = "local-" if item.local else ""
    offset = f" offset {layout.LOCAL_SLOT}" if item.local else ""
    strip = f"meta priority set meta priority & 0x{layout.INDEX_MASK:08x}"
    if not item.affinity_seconds:
        lines = [strip]
        if item.size > 1:
            draw = f"meta priority . numgen random mod {item.size}{offset} map @endpoints"
            lines.append(f"dnat {family} to {draw}")
        lines.append(f"goto {side}endpoints-first")
        return _chain_text(item.chain, lines)
    seconds = item.affinity_seconds
    shown: list[str] = []
    use = f"dnat {family} to meta priority map @{side}sticky-endpoints"
    index = f"meta priority & 0x{layout.STICKY_MASK:08x}"
    first = f"meta priority set meta priority . numgen random mod 1{offset} map @slots"
    refresh = f"update @affinity {{ {family} saddr . {index} timeout {seconds}s : meta priority }}"
    forget = f"delete @affinity {{ {family} saddr . meta priority : meta priority }}"
    for name, lines in (
        (f"{side}sticky-known-{seconds}", [refresh, use, f"meta priority set {index}", forget]),
        (f"{side}sticky-new-{seconds}", [refresh, use, f"meta priority set {index}", first, use]),
    ):
        if name not in helpers:
            helpers.add(name)
            shown += _chain_text(name, lines)
    lines = [
        strip,
        f"meta priority set {family} saddr . meta priority map @affinity jump {side}sticky-known-{seconds}",
    ]
    for size in dict.fromkeys((item.size, 1)):
        draw = f"meta priority . numgen random mod {size}{offset} map @slots"
        lines.append(f"meta priority set {draw} goto {side}sticky-new-{seconds}")
    return shown + _chain_text(item.chain, lines)


def _chain_text(name: str, lines: list[str]) -> list[str]:
    return [f"chain {name} {{", *(f"\t{line}" for line in lines), "}"]
