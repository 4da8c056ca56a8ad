"""Reading many netlink messages of the same shape by one unpack each.

The kernel writes the attributes of a kind of message in one order.  The shape is learnt from the first message, as a
format of `struct`; each later one is read by it, and its attribute headers are compared with those learnt.  A message of
another shape is learnt in its turn: that costs time, and never correctness.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from proxycore.kernel.netlink import NLA_TYPE_MASK

T = TypeVar("T")
Path = tuple[int, ...]
"""Types of attributes, from the outermost to the one meant."""

Positions = Mapping[Path, int]
"""Where the fields of a message hold an attribute's value."""

Fields = tuple[Any, ...]
Build = Callable[[Fields], T]

_HEADER = struct.Struct("=HH")
_SHAPES = 64
_INTEGERS = {1: "B3x", 2: "H2x", 4: "I", 8: "Q"}


class Shape(NamedTuple):
    """One way in which attributes follow each other; fields alternate between headers and values."""

    form: struct.Struct
    headers: Fields
    positions: Positions


def learn(
    buffer: memoryview, offset: int, length: int, nests: Collection[Path], raw: Collection[Path]
) -> Shape:
    """The shape of the attributes in a piece of a buffer.

    `nests` hold attributes; values of those in `raw`, and of odd sizes, are bytes, all others integers in the host's order.
    """
    forms: list[str] = ["="]
    headers: list[int] = []
    positions: dict[Path, int] = {}

    def walk(start: int, end: int, above: Path) -> None:
        while start + 4 <= end:
            size, kind = _HEADER.unpack_from(buffer, start)
            if size < 4 or start + size > end:
                return
            path = (*above, kind & NLA_TYPE_MASK)
            headers.append(int.from_bytes(buffer[start : start + 4], sys.byteorder))
            positions[path] = 2 * len(headers) - 1
            if path in nests:
                forms.append("I0s")
                walk(start + 4, start + size, path)
            else:
                forms.append("I" + _value_form(size - 4, path in raw))
            start += (size + 3) & ~3

    walk(offset, offset + length, ())
    return Shape(struct.Struct("".join(forms)), tuple(headers), positions)


def _value_form(size: int, raw: bool) -> str:
    if size in _INTEGERS and not raw:
        return _INTEGERS[size]
    padding = -size & 3
    return f"{size}s{padding}x" if padding else f"{size}s"


class Reader(Generic[T]):
    """Attributes in, values out.  `plan` gets the positions of a new shape and returns what makes a value of its fields."""

    def __init__(
        self, nests: Collection[Path], raw: Collection[Path], plan: Callable[[Positions], Build[T]]
    ) -> None:
        self._nests, self._raw, self._plan = frozenset(nests), frozenset(raw), plan
        self._known: dict[int, tuple[struct.Struct, Fields, Build[T]]] = {}
        self.learnt = 0
        """How often a shape was learnt."""

    def read(self, buffer: memoryview, offset: int, length: int) -> T:
        """The value of `length` bytes of attributes at `offset`.  Raises what `plan` and its product raise."""
        known = self._known.get(length)
        if known is not None:
            form, headers, build = known
            fields = form.unpack_from(buffer, offset)
            if fields[::2] == headers:
                return build(fields)
        shape = learn(buffer, offset, length, self._nests, self._raw)
        build = self._plan(shape.positions)
        self.learnt += 1
        if len(self._known) >= _SHAPES:
            self._known.clear()
        self._known[length] = shape.form, shape.headers, build
        return build(shape.form.unpack_from(buffer, offset))
