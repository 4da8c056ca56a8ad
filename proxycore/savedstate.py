"""The last known good state as a file: everything that a node needs to serve Services while the API server is away.

Kept are the objects, not what they were resolved to: so a start with another configuration, in another zone or with another
version of proxycore resolves them as that asks for, by the one way that there is.

    {"proxycoreState":1,"complete":1,"node":…,"origin":…,"savedAt":…,"checksum":…}     one line
    zlib: one line of JSON for each kind of object, {"kind":…,"objects":[…]}

`complete` stands at a fixed place, so that one byte written there says that changes have come since; the checksum is over
all the rest.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable

import msgspec

from .decode import decode_bytes, encode
from .errors import DecodeError, SourceError
from .objects import APIObject, Kind
from .slices import unparse
from .source import Replaced
from .store import Contents

VERSION = 1
COMPLETE_OFFSET = len(b'{"proxycoreState":1,"complete":')
MAX_BYTES = 1 << 30
"""Of objects, uncompressed; a hundred times what a large cluster has."""
HEADER_BYTES = 64 << 10
_LEVEL = 1


class Header(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`origin`: where the objects came from, the API server's URL.  `saved_at`: seconds since the epoch.

    `complete`: 0 when objects have changed since.
    """

    proxycore_state: int
    complete: int
    node: str
    origin: str
    saved_at: float
    checksum: str


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """A state as read: its header, and a complete list of each kind of object."""

    header: Header
    lists: tuple[Replaced, ...]

    @property
    def objects(self) -> Iterable[APIObject]:
        """All objects."""
        return (item for found in self.lists for item in found.objects)


class _Kind(msgspec.Struct):
    proxycore_state: int = msgspec.field(name="proxycoreState")


class _List(msgspec.Struct):
    kind: Kind
    objects: list[msgspec.Raw]


_HEADER = msgspec.json.Decoder(Header)
_KIND = msgspec.json.Decoder(_Kind)
_LIST = msgspec.json.Decoder(_List)
_ENCODER = msgspec.json.Encoder()


def dump(contents: Contents, *, node: str, origin: str, saved_at: float) -> bytes:
    """The file's bytes, marked as complete."""
    kinds: tuple[tuple[Kind, Iterable[APIObject]], ...] = (
        ("Service", contents.services),
        ("EndpointSlice", map(unparse, contents.slices)),
        ("Node", (contents.node,) if contents.node else ()),
        ("ServiceCIDR", contents.service_cidrs),
    )
    packer = zlib.compressobj(_LEVEL)
    parts = []
    for kind, items in kinds:
        # One object after the other: all of them at once would be more memory than the process has otherwise.
        separator = b'{"kind":"%s","objects":[' % kind.encode()
        for item in items:
            parts.append(packer.compress(separator + encode(item)))
            separator = b","
        parts.append(packer.compress((b"" if separator == b"," else separator) + b"]}\n"))
    body = b"".join([*parts, packer.flush()])
    header = Header(
        proxycore_state=VERSION,
        complete=1,
        node=node,
        origin=origin,
        saved_at=saved_at,
        checksum=_checksum(node, origin, saved_at, body),
    )
    return _ENCODER.encode(header) + b"\n" + body


def load(data: bytes, where: str) -> Saved:
    """What the bytes hold.  Raises SourceError that begins with `where`: it is damaged, or none of ours."""
    header, body = check(data, where)
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(body, MAX_BYTES)
        if unpacker.unconsumed_tail or not unpacker.eof:
            raise SourceError(f"{where}: is damaged: it is cut short or longer than {MAX_BYTES} bytes")
        return Saved(header=header, lists=tuple(_replaced(line) for line in text.splitlines()))
    except (zlib.error, msgspec.MsgspecError, DecodeError, ValueError, RecursionError) as error:
        raise SourceError(f"{where}: is damaged: {error}") from None


def check(data: bytes, where: str) -> tuple[Header, bytes]:
    """Header and body of a file that is whole, without a look at the objects.  Raises SourceError as load() does."""
    header, body = split(data, where)
    if _checksum(header.node, header.origin, header.saved_at, body) != header.checksum:
        raise SourceError(f"{where}: is damaged: its checksum is wrong")
    return header, body


def check_owner(header: Header, where: str, node: str, origin: str) -> None:
    """Raises SourceError: it is another node's state, or another cluster's."""
    for what, theirs, ours in (("node", header.node, node), ("API server", header.origin, origin)):
        if theirs != ours:
            raise SourceError(f"{where}: is the state of {what} {theirs!r}, and this is {ours!r}")


def split(data: bytes, where: str) -> tuple[Header, bytes]:
    """Header and body.  Raises SourceError: it is no state of ours, or one of another version."""
    end = data.find(b"\n", 0, HEADER_BYTES)
    line = data[: max(end, 0)]
    try:
        version = _KIND.decode(line).proxycore_state
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise SourceError(f"{where}: is not a state that proxycore has saved") from None
    if version != VERSION:
        raise SourceError(
            f"{where}: has version {version} of the format; this proxycore reads version {VERSION}"
        )
    try:
        return _HEADER.decode(line), data[end + 1 :]
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise SourceError(f"{where}: is damaged: its header: {error}") from None


def _replaced(line: bytes) -> Replaced:
    found = _LIST.decode(line)
    return Replaced(found.kind, tuple([decode_bytes(found.kind, raw) for raw in found.objects]))


def _checksum(node: str, origin: str, saved_at: float, body: bytes) -> str:
    digest = hashlib.sha256(_ENCODER.encode([VERSION, node, origin, saved_at]))
    digest.update(body)
    return digest.hexdigest()
