"""IP sets as netlink messages: entries packed by hand, many in one message, and read back.

Messages and attributes: `linux/netfilter/ipset/ip_set.h`.  Values are in network order, as the flag at their types says.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from operator import itemgetter
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton, ntohs
from typing import Any

from proxycore.api import Family, KernelError, Protocol
from proxycore.kernel.netlink import NLA_F_NESTED, NLA_F_NET_BYTEORDER, attribute, nested

from .layout import Build, Fields, Positions, Reader
from .sets import KINDS, LONGEST_NAME, Entry, Mark, SetSpec
from .wire import NUMBERS

SUBSYSTEM = 6 << 8
CREATE, DESTROY, SWAP, LIST, ADD, DEL, TYPE = (SUBSYSTEM | number for number in (2, 3, 6, 7, 9, 10, 13))
NFGENMSG_BYTES = 4
PROTOCOL_VERSION = 6

PROTOCOL, SETNAME, TYPENAME, REVISION, FAMILY, FLAGS, DATA, ADT, LINENO = range(1, 10)
IP, PORT_TO, CIDR, PORT, PROTO, CADT_FLAGS = 1, 5, 3, 4, 7, 8
MAXELEM, HASHSIZE, ELEMENTS, REFERENCES = 19, 18, 24, 25
IP2, CIDR2, SKBMARK = 20, 21, 27
LIST_HEADERS = 1 << 2
WITH_SKBINFO = 1 << 6

MESSAGE_BYTES = 56_000
"""All entries of a message are in one attribute, which has less than 65,536 bytes."""

_PROTOCOLS: dict[int, Protocol] = {number: protocol for protocol, number in NUMBERS.items()}
_PROTOCOL_BYTES: dict[Protocol | None, bytes] = {
    protocol: bytes((number,)) for protocol, number in NUMBERS.items()
}
_HEADER = struct.Struct("=HH")
_LINE = struct.Struct("=I")
_MARK = struct.Struct(">II")
_NET = NLA_F_NET_BYTEORDER


def request(name: str | None = None) -> bytes:
    """How every request begins: about no set, or about one.  Raises ValueError for a name that is too long."""
    body = bytes((AF_INET, 0, 0, 0)) + attribute(PROTOCOL, bytes((PROTOCOL_VERSION,)))
    if name is None:
        return body
    if not 0 < len(name) <= LONGEST_NAME:
        raise ValueError(f"a set's name has 1 to {LONGEST_NAME} characters: {name!r}")
    return body + attribute(SETNAME, name.encode() + b"\0")


def family_byte(spec: SetSpec) -> bytes:
    return bytes((AF_INET6 if spec.family == "IPv6" else AF_INET,))


def _u32(kind: int, value: int) -> bytes:
    return attribute(kind | _NET, struct.pack(">I", value))


def _u16(kind: int, value: int) -> bytes:
    return attribute(kind | _NET, struct.pack(">H", value))


def kind_request(spec: SetSpec) -> bytes:
    """Asks which revisions of a kind of sets there are."""
    return request() + attribute(TYPENAME, spec.kind.encode() + b"\0") + attribute(FAMILY, family_byte(spec))


def create(spec: SetSpec, revision: int, hash_size: int | None) -> bytes:
    """Raises ValueError for a kind that is not ours."""
    if spec.kind not in KINDS:
        raise ValueError(f"no kind of sets: {spec.kind}")
    data = []
    if spec.kind == "bitmap:port":
        data += [_u16(PORT, 0), _u16(PORT_TO, 65535)]
    else:
        data.append(_u32(MAXELEM, spec.max_entries))
        if hash_size is not None:
            data.append(_u32(HASHSIZE, hash_size))
    if spec.skbinfo:
        data.append(_u32(CADT_FLAGS, WITH_SKBINFO))
    return (
        request(spec.name)
        + attribute(TYPENAME, spec.kind.encode() + b"\0")
        + attribute(REVISION, bytes((revision,)))
        + attribute(FAMILY, family_byte(spec))
        + nested(DATA, *data)
    )


def swap(name: str, other: str) -> bytes:
    return request(name) + attribute(TYPENAME, other.encode() + b"\0")


def headers() -> bytes:
    """Asks for all sets without their entries."""
    return request() + _u32(FLAGS, LIST_HEADERS)


def change(name: str, entries: Sequence[bytes]) -> bytes:
    """Adds or deletes packed entries, in order; a refusal names the line of the first that is refused."""
    return request(name) + attribute(LINENO, bytes(4)) + nested(ADT, *entries)


Pack = Callable[[Entry, Mark | None, int], bytes]
"""An entry, its mark, and the number by which a refusal names it; 1 or more."""


def packer(spec: SetSpec, *, marked: bool) -> Pack:
    """How entries of a set are packed.  Its product raises ValueError for entries that are not of this kind and family."""
    six = spec.family == "IPv6"
    size, version = (16, 2) if six else (4, 1)

    def outer(kind: int) -> bytes:
        return _HEADER.pack(8 + size, kind | NLA_F_NESTED) + _HEADER.pack(4 + size, version | _NET)

    constants: list[bytes] = []
    sizes: list[int] = []

    def part(header: bytes, length: int) -> None:
        before = bytes(-sizes[-1] & 3) if sizes else b""
        constants.append(before + header)
        sizes.append(length)

    if spec.kind.startswith("hash:"):
        part(outer(IP), size)
    if spec.kind == "hash:net":
        part(_HEADER.pack(5, CIDR), 1)
    if "port" in spec.kind:
        part(_HEADER.pack(6, PORT | _NET), 2)
    if spec.kind.startswith("hash:ip,port"):
        part(_HEADER.pack(5, PROTO), 1)
    if spec.kind.count(",") == 2:
        part(outer(IP2), size)
    if spec.kind == "hash:ip,port,net":
        part(_HEADER.pack(5, CIDR2), 1)
    if marked:
        part(_HEADER.pack(12, SKBMARK | _NET), 8)
    part(_HEADER.pack(8, LINENO), 4)
    length = sum(map(len, constants)) + sum(sizes)
    constants[0] = _HEADER.pack(4 + length, DATA | NLA_F_NESTED) + constants[0]
    pieces: list[bytes] = [b""] * (2 * len(constants))
    pieces[::2] = constants
    values, family = _VALUES[spec.kind], spec.family

    def pack(entry: Entry, mark: Mark | None, number: int) -> bytes:
        try:
            found = values(entry, family)
            if marked:
                found += (_MARK.pack(*(mark or (0, 0))),)
            pieces[1::2] = (*found, _LINE.pack(number))
        except (OSError, KeyError, OverflowError, struct.error) as error:
            raise ValueError(f"no entry of a set of kind {spec.kind} and {family}: {entry}") from error
        return b"".join(pieces)

    return pack


def _raw(address: str, family: Family) -> bytes:
    return inet_pton(AF_INET6 if family == "IPv6" else AF_INET, address)


def _network(text: str, family: Family) -> tuple[bytes, bytes]:
    address, _, length = text.partition("/")
    return _raw(address, family), int(length).to_bytes(1, "big")


def _port(entry: Entry) -> bytes:
    return entry.port.to_bytes(2, "big")


def _flow(entry: Entry, family: Family) -> tuple[bytes, ...]:
    return _raw(entry.address, family), _port(entry), _PROTOCOL_BYTES[entry.protocol]


_VALUES: dict[str, Callable[[Entry, Family], tuple[bytes, ...]]] = {
    "hash:ip": lambda entry, family: (_raw(entry.address, family),),
    "hash:net": lambda entry, family: _network(entry.address, family),
    "hash:ip,port": _flow,
    "hash:ip,port,ip": lambda entry, family: (*_flow(entry, family), _raw(entry.second, family)),
    "hash:ip,port,net": lambda entry, family: (*_flow(entry, family), *_network(entry.second, family)),
    "bitmap:port": lambda entry, family: (_port(entry),),
}


def entry_reader(spec: SetSpec) -> Reader[tuple[Entry, Mark | None]]:
    """Reads the entries of a set's dump."""
    six = spec.family == "IPv6"
    af, version = (AF_INET6, 2) if six else (AF_INET, 1)
    kind = spec.kind

    def plan(positions: Positions) -> Build[tuple[Entry, Mark | None]]:
        def get(*path: int) -> Callable[[Fields], Any]:
            if path not in positions:
                raise KernelError(f"set {spec.name}: the kernel does not tell attribute {path} of an entry")
            return itemgetter(positions[path])

        def host(attribute: int) -> Callable[[Fields], str]:
            raw = get(attribute, version)
            return lambda fields: inet_ntop(af, raw(fields))

        def net(attribute: int, length: int) -> Callable[[Fields], str]:
            address, bits = host(attribute), get(length)
            return lambda fields: f"{address(fields)}/{bits(fields)}"

        mark = get(SKBMARK) if (SKBMARK,) in positions else None

        def marked(fields: Fields) -> Mark | None:
            return None if mark is None else Mark._make(_MARK.unpack(mark(fields)))

        if kind == "bitmap:port":
            port = get(PORT)
            return lambda fields: (Entry(port=ntohs(port(fields))), marked(fields))
        if kind in ("hash:ip", "hash:net"):
            first = host(IP) if kind == "hash:ip" else net(IP, CIDR)
            return lambda fields: (Entry(first(fields)), marked(fields))
        address, port, number = host(IP), get(PORT), get(PROTO)
        seconds = {"hash:ip,port,ip": lambda: host(IP2), "hash:ip,port,net": lambda: net(IP2, CIDR2)}
        second = seconds[kind]() if kind in seconds else None

        def build(fields: Fields) -> tuple[Entry, Mark | None]:
            protocol = _PROTOCOLS.get(number(fields))
            third = "" if second is None else second(fields)
            return Entry(address(fields), protocol, ntohs(port(fields)), third), marked(fields)

        return build

    raw = ((IP, 1), (IP, 2), (IP2, 1), (IP2, 2), (SKBMARK,))
    return Reader(nests=((IP,), (IP2,)), raw=raw, plan=plan)
