"""nfnetlink messages of nf_tables, as bytes.

Only what the backend sends: elements of sets and maps, chains, and the few expressions of its endpoint-count rules.  Layout:
linux/netfilter/nfnetlink.h, nf_tables.h.  Numbers inside attributes are big-endian, set keys and data are raw registers:
addresses and ports in network order, `meta priority` and `numgen` values in the host's.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from proxycore.kernel import netlink

NFPROTO = {"ip": 2, "ip6": 10}
SUBSYSTEM = 10 << 8

GETTABLE = 1
NEWCHAIN, GETCHAIN = 3, 4
NEWRULE, GETRULE = 6, 7
GETSET = 10
NEWSETELEM, GETSETELEM, DELSETELEM = 12, 13, 14
BATCH_BEGIN, BATCH_END = 0x10, 0x11

F_REQUEST, F_ACK, F_CREATE, F_APPEND = 1, 4, 0x400, 0x800
NESTED = 0x8000

ELEM_KEY, ELEM_DATA, ELEM_FLAGS, ELEM_TIMEOUT, ELEM_EXPIRATION = 1, 2, 3, 4, 5
ELEM_USERDATA, ELEM_EXPR, ELEM_KEY_END = 6, 7, 10
ELEM_INTERVAL_END = 1
DATA_VALUE, DATA_VERDICT = 1, 2
VERDICT_JUMP, VERDICT_GOTO = -3 & 0xFFFFFFFF, -4 & 0xFFFFFFFF

LIST_PAYLOAD_MAX = 65535 - 4
"""A nested attribute's length is 16 bits: one message holds at most this many bytes of elements."""

pack = struct.pack
attr = netlink.attribute
nest = netlink.nested


def text(kind: int, value: str) -> bytes:
    """One attribute that holds a NUL-terminated name."""
    return attr(kind, value.encode() + b"\0")


def u32(kind: int, value: int) -> bytes:
    """One attribute that holds a big-endian number."""
    return attr(kind, pack(">I", value))


class Body(NamedTuple):
    """One message of a batch before it gets its sequence number."""

    kind: int
    flags: int
    family: str
    payload: bytes


def header(kind: int, flags: int, family: str, size: int, sequence: int) -> bytes:
    """nlmsghdr and nfgenmsg of an nf_tables message whose payload has `size` bytes."""
    return pack(
        "=IHHIIBBH", 20 + size, kind | SUBSYSTEM, flags | F_REQUEST, sequence, 0, NFPROTO[family], 0, 0
    )


def batch_edge(kind: int, sequence: int) -> bytes:
    """BATCH_BEGIN or BATCH_END."""
    return pack("=IHHIIBBH", 20, kind, F_REQUEST, sequence, 0, 0, 0, socket.htons(10))


def frame(bodies: Sequence[Body], first: int) -> bytes:
    """A whole batch.  Message k has sequence number `first + 1 + k`; only the last one asks for an acknowledgement."""
    parts = [batch_edge(BATCH_BEGIN, first)]
    last = len(bodies) - 1
    for position, body in enumerate(bodies):
        flags = body.flags | (F_ACK if position == last else 0)
        parts.append(header(body.kind, flags, body.family, len(body.payload), first + 1 + position))
        parts.append(body.payload)
    parts.append(batch_edge(BATCH_END, first + 2 + last))
    return b"".join(parts)


# -- elements --


def comment(value: str) -> bytes:
    """Attribute that makes `nft list` show a comment; at most 127 bytes, printable ASCII without quotes."""
    raw = value.encode("ascii", "replace")[:126] + b"\0"
    return attr(ELEM_USERDATA, pack("=BB", 0, len(raw)) + raw)


def key_attribute(key: bytes, kind: int = ELEM_KEY) -> bytes:
    return nest(kind, attr(DATA_VALUE, key))


def element(key: bytes, data: bytes | None = None, *extra: bytes) -> bytes:
    """One element: of a set (no data) or of a data map."""
    value = b"" if data is None else nest(ELEM_DATA, attr(DATA_VALUE, data))
    return nest(1, key_attribute(key), value, *extra)


def range_element(first: bytes, last: bytes) -> bytes:
    """An element of a concatenated interval set: all keys from `first` to `last`, field by field, inclusive."""
    return nest(1, key_attribute(first), key_attribute(last, ELEM_KEY_END))


def verdict_element(key: bytes, chain: str) -> bytes:
    """An element of a verdict map: go to `chain`."""
    verdict = nest(DATA_VERDICT, u32(1, VERDICT_GOTO), text(2, chain))
    return nest(1, key_attribute(key), nest(ELEM_DATA, verdict))


def timed_element(key: bytes, data: bytes, timeout_ms: int, left_ms: int) -> bytes:
    """An element that expires after `left_ms` of its `timeout_ms`."""
    return element(
        key, data, attr(ELEM_TIMEOUT, pack(">Q", timeout_ms)), attr(ELEM_EXPIRATION, pack(">Q", left_ms))
    )


def data_element_prefix(key_size: int, data_size: int) -> tuple[bytes, bytes]:
    """What stands before the key and between key and data in an element of fixed sizes (multiples of four)."""
    key_value, data_value = 4 + key_size, 4 + data_size
    total = 4 + (4 + key_value) + (4 + data_value)
    before = pack("=HHHHHH", total, 1 | NESTED, 4 + key_value, ELEM_KEY | NESTED, key_value, DATA_VALUE)
    between = pack("=HHHH", 4 + data_value, ELEM_DATA | NESTED, data_value, DATA_VALUE)
    return before, between


class DataElements:
    """Elements of one data map, quickly: what does not change is packed once."""

    def __init__(self, key_size: int, data_size: int) -> None:
        self.before, self.between = data_element_prefix(key_size, data_size)
        self._total = 4 + (8 + key_size) + (8 + data_size)
        self._inner = self.before[4:]

    def element(self, key: bytes, data: bytes) -> bytes:
        """Key and data alone."""
        return self.before + key + self.between + data

    def element_with(self, key: bytes, data: bytes, extra: bytes) -> bytes:
        """With further attributes, already packed."""
        return (
            pack("=HH", self._total + len(extra), 1 | NESTED)
            + self._inner
            + key
            + self.between
            + data
            + extra
        )


class KeyElements:
    """Elements by key alone, as deletions and plain sets need them."""

    def __init__(self, key_size: int) -> None:
        value = 4 + key_size
        self.before = pack("=HHHHHH", 8 + value, 1 | NESTED, 4 + value, ELEM_KEY | NESTED, value, DATA_VALUE)

    def element(self, key: bytes) -> bytes:
        return self.before + key


def set_head(table: str, name: str) -> bytes:
    return text(1, table) + text(2, name)


def pack_elements(elements: Sequence[bytes], room: int = LIST_PAYLOAD_MAX) -> Iterator[tuple[int, int]]:
    """Cut a list of elements into runs `[start, stop)` that each fit one message."""
    if not elements:
        return
    longest = max(map(len, elements))
    each = max(1, room // longest)
    for start in range(0, len(elements), each):
        yield start, min(start + each, len(elements))


# -- chains, rules and expressions --


def new_chain(family: str, table: str, name: str) -> Body:
    return Body(NEWCHAIN, F_CREATE, family, text(1, table) + text(3, name))


def new_rule(family: str, table: str, chain: str, expressions: Iterable[bytes]) -> Body:
    payload = text(1, table) + text(2, chain) + nest(4, *expressions)
    return Body(NEWRULE, F_CREATE | F_APPEND, family, payload)


def register(word: int) -> int:
    """The 32-bit register number `word` (NFT_REG32_00 is 8)."""
    return 8 + word


def _expression(name: str, *attributes: bytes) -> bytes:
    return nest(1, text(1, name), nest(2, *attributes))


META_PRIORITY = 2


def load_priority(dest: int) -> bytes:
    return _expression("meta", u32(2, META_PRIORITY), u32(1, dest))


def store_priority(source: int) -> bytes:
    return _expression("meta", u32(2, META_PRIORITY), u32(3, source))


def load_source(family: str, dest: int) -> bytes:
    """Source address of the packet."""
    offset, size = (12, 4) if family == "ip" else (8, 16)
    return _expression("payload", u32(1, dest), u32(2, 1), u32(3, offset), u32(4, size))


def bit_and(word: int, mask: int) -> bytes:
    """Keep the bits of `mask` of a host-order number."""
    value, zero = attr(DATA_VALUE, pack("=I", mask)), attr(DATA_VALUE, pack("=I", 0))
    return _expression("bitwise", u32(1, word), u32(2, word), u32(3, 4), nest(4, value), nest(5, zero))


def random_number(dest: int, modulus: int, offset: int) -> bytes:
    """`numgen random mod modulus offset offset`."""
    return _expression("numgen", u32(1, dest), u32(2, modulus), u32(3, 1), u32(4, offset))


def look_up(name: str, source: int, dest: int) -> bytes:
    """Map lookup; a miss ends the rule."""
    return _expression("lookup", text(1, name), u32(2, source), u32(3, dest))


def translate(family: str, address: int, port: int) -> bytes:
    """Destination NAT to the address and port in those registers."""
    return _expression("nat", u32(1, 1), u32(2, NFPROTO[family]), u32(3, address), u32(5, port))


DYNSET_UPDATE, DYNSET_DELETE = 1, 2


def remember(name: str, operation: int, key: int, data: int, timeout_ms: int = 0) -> bytes:
    """Update (refresh, or insert if absent; present data is kept) or delete an element from the packet path."""
    timeout = attr(6, pack(">Q", timeout_ms)) if timeout_ms else b""
    return _expression("dynset", text(1, name), u32(3, operation), u32(4, key), u32(5, data), timeout)


def go(chain: str, code: int = VERDICT_GOTO) -> bytes:
    """Unconditional goto or jump."""
    verdict = nest(DATA_VERDICT, u32(1, code), text(2, chain))
    return _expression("immediate", u32(1, 0), nest(2, verdict))
