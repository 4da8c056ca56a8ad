"""Bodies of lists and lines of watches, decoded as they arrive.

Pure: bytes go in, objects come out.  One object that cannot be decoded is set aside, and all others are there.
"""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec

from ..decode import NAMESPACED, decode_bytes, describe
from ..errors import DecodeError, SourceError
from ..objects import APIObject, EndpointSlice, Kind, Node, Service, ServiceCIDR
from ..source import Applied, Deleted

PORTION_BYTES = 1 << 20
"""So much of a list is decoded at a time, while the rest of it is still on its way."""
MAX_LINE_BYTES = 64 << 20
_HEAD_BYTES = 1 << 16
_ITEMS = b'"items":['
_SEAM = b'},{"metadata":{'
"""Where one item ends and the next begins, as the API server writes it.

The same bytes inside of an object would be a cut that leaves brackets open, which the decoder refuses.
"""
_MALFORMED = (msgspec.DecodeError, ValueError, RecursionError)
_TYPES: dict[Kind, Any] = {
    "Service": Service,
    "EndpointSlice": EndpointSlice,
    "Node": Node,
    "ServiceCIDR": ServiceCIDR,
}

Names = tuple[str, str]
"""Namespace and name."""


class NotUnderstood(SourceError):
    """An answer as a whole is not what was asked for; nothing of it was used."""


class Misfit(NamedTuple):
    """An object that cannot be decoded.  `names` is None where not even its name can be told."""

    names: Names | None
    subject: str
    reason: str
    version: str = ""


class Skipped(NamedTuple):
    """A watch event that is none of ours."""

    what: str


class Refusal(NamedTuple):
    """An ERROR event: what the API server says instead of going on."""

    code: int
    message: str


class _Meta(msgspec.Struct, rename="camel", gc=False):
    name: str | None = None
    namespace: str | None = None
    resource_version: str = ""


class _Named(msgspec.Struct, gc=False):
    metadata: _Meta


class _ListMeta(msgspec.Struct, frozen=True, rename="camel", gc=False):
    resource_version: str = ""
    continue_: str | None = msgspec.field(name="continue", default=None)


class _RawList(msgspec.Struct, rename="camel"):
    kind: str | None = None
    metadata: _ListMeta = _ListMeta()
    items: list[msgspec.Raw] | None = None


class _Head(msgspec.Struct, gc=False):
    """What a watched object says about itself, or a Status about an error."""

    kind: str | None = None
    metadata: _Meta | None = None
    code: int | None = None
    message: str | None = None
    reason: str | None = None


class _Line(msgspec.Struct, gc=False):
    type: str
    object: _Head


class _RawLine(msgspec.Struct):
    object: msgspec.Raw


_list_of: Any = list
_NAMED = msgspec.json.Decoder(_Named)
_RAW_LIST = msgspec.json.Decoder(_RawList)
_RAWS = msgspec.json.Decoder(list[msgspec.Raw])
_LINE = msgspec.json.Decoder(_Line)
_RAW_LINE = msgspec.json.Decoder(_RawLine)
_ARRAYS = {kind: msgspec.json.Decoder(_list_of[found]) for kind, found in _TYPES.items()}
_LISTS = {
    kind: msgspec.json.Decoder(
        msgspec.defstruct(
            f"_{kind}List",
            [
                ("kind", str | None, None),
                ("metadata", _ListMeta, _ListMeta()),
                ("items", _list_of[found] | None, None),
            ],
        )
    )
    for kind, found in _TYPES.items()
}
_OBJECTS = {
    kind: msgspec.json.Decoder(msgspec.defstruct(f"_{kind}Line", [("object", found)]))
    for kind, found in _TYPES.items()
}

_pauses = threading.Lock()
_paused = 0
_was_enabled = False


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the garbage collector from looking at what is being decoded: that takes three times as long as decoding.

    For the whole process, so for moments only; several threads may be inside.
    """
    global _paused, _was_enabled
    with _pauses:
        if not _paused:
            _was_enabled = gc.isenabled()
            gc.disable()
        _paused += 1
    try:
        yield
    finally:
        with _pauses:
            _paused -= 1
            if not _paused and _was_enabled:
                gc.enable()


class ListReader:
    """Reads one list, or one page of it: `feed()` its body in pieces of any size, then `finish()`.

    `take()` gives what has been decoded so far; nothing is complete before `finish()` has returned.  `misfits` grow.
    """

    def __init__(self, kind: Kind) -> None:
        self.objects: list[APIObject] = []
        self.misfits: list[Misfit] = []
        self._kind = kind
        self._head: bytes | None = None
        self._rest = bytearray()
        self._want: float = PORTION_BYTES

    def feed(self, data: bytes) -> None:
        """Take the next piece of the body."""
        rest = self._rest
        rest += data
        if self._head is None:
            at = rest.find(_ITEMS, 0, _HEAD_BYTES)
            if at < 0:
                return  # no items, or written in another way: then it is decoded as a whole
            self._head = bytes(rest[: at + len(_ITEMS)])
            del rest[: at + len(_ITEMS)]
            if not self._is_ours(self._head):
                self._want = math.inf  # finish() says what is wrong with it
        if len(rest) < self._want:
            return
        at = rest.rfind(_SEAM)
        if at <= 0:
            self._want *= 2
            return
        try:
            self._take(b"[" + rest[: at + 1] + b"]")
        except _MALFORMED:
            self._want *= 2
        else:
            del rest[: at + 2]
            self._want = PORTION_BYTES

    def take(self) -> list[APIObject]:
        """What has been decoded since the last call."""
        objects, self.objects = self.objects, []
        return objects

    def _is_ours(self, head: bytes) -> bool:
        try:
            found = _RAW_LIST.decode(head + b"]}")
        except _MALFORMED:
            return False
        return found.kind == f"{self._kind}List" and bool(found.metadata.resource_version)

    def finish(self) -> tuple[str, str]:
        """The list's version, and the token of its next page, empty if this was the last.

        Raises NotUnderstood: it is not a list of the kind.
        """
        data = (self._head or b"") + self._rest
        self._rest = bytearray()
        try:
            with collector_paused():
                found: Any = _LISTS[self._kind].decode(data)
            if not self._are_placed(found.items or ()):
                raise ValueError
        except _MALFORMED:
            try:
                found = _RAW_LIST.decode(data)
            except _MALFORMED as error:
                raise NotUnderstood(f"its answer is not a list: {_first_words(error)}") from None
            self._one_by_one(found.items or ())
        else:
            self.objects += found.items or ()
        if found.kind != f"{self._kind}List":
            raise NotUnderstood(f"its answer is a {found.kind}, not a {self._kind}List")
        if not found.metadata.resource_version:
            raise NotUnderstood("its list has no resourceVersion")
        return found.metadata.resource_version, found.metadata.continue_ or ""

    def _take(self, data: bytes) -> None:
        """Raises what `_MALFORMED` holds: the data is not JSON, and nothing was taken."""
        try:
            with collector_paused():
                items: list[APIObject] = _ARRAYS[self._kind].decode(data)
            if self._are_placed(items):
                self.objects += items
                return
        except _MALFORMED:
            pass
        self._one_by_one(_RAWS.decode(data))

    def _are_placed(self, items: Any) -> bool:
        """Has each of them the namespace that the API gives it?"""
        if self._kind in NAMESPACED:
            return all([item.metadata.namespace for item in items])
        return not any([item.metadata.namespace for item in items])

    def _one_by_one(self, raws: Any) -> None:
        for raw in raws:
            try:
                self.objects.append(decode_bytes(self._kind, raw))
            except DecodeError as error:
                self.misfits.append(misfit(self._kind, raw, error))


class WatchReader:
    """Reads one watch: `feed()` its body in pieces of any size.

    `version`: of the last event, bookmarks included; from there the next watch goes on.  `refusal`: the ERROR event that
    the watch ended with.
    """

    def __init__(self, kind: Kind, version: str) -> None:
        self.version = version
        self.refusal: Refusal | None = None
        self._kind = kind
        self._rest = b""

    def feed(self, data: bytes) -> list[Applied | Deleted | Misfit | Skipped]:
        """What the lines say that are complete now.

        Raises NotUnderstood: a line is not JSON.  `version` is that of the last line before it.
        """
        first, *more = data.split(b"\n")
        if not more:
            self._rest += first
            if len(self._rest) > MAX_LINE_BYTES:
                raise NotUnderstood(f"a watch event is longer than {MAX_LINE_BYTES >> 20} MiB")
            return []
        lines = [self._rest + first, *more]
        self._rest = lines.pop()
        seen: list[Applied | Deleted | Misfit | Skipped] = []
        for line in lines:
            if line and self.refusal is None:
                self._read(line, seen)
        return seen

    def _read(self, line: bytes, seen: list[Applied | Deleted | Misfit | Skipped]) -> None:
        try:
            event = _LINE.decode(line)
        except msgspec.ValidationError as error:
            seen.append(Skipped(f"an event of an unknown shape: {_first_words(error)}"))
            return
        except _MALFORMED as error:
            raise NotUnderstood(f"a watch event is not JSON: {_first_words(error)}") from None
        head = event.object
        if event.type == "ERROR":
            self.refusal = Refusal(head.code or 0, head.message or head.reason or "no reason given")
            return
        metadata = head.metadata
        if head.kind != self._kind or metadata is None:
            seen.append(Skipped(f"an event of the unknown kind {head.kind!r}"))
            return
        if event.type == "ADDED" or event.type == "MODIFIED":
            seen.append(self._decode(line, metadata))
        elif event.type == "DELETED":
            names = _names(self._kind, metadata)
            if names is None:
                seen.append(Skipped("a deletion without a name"))
            else:
                seen.append(Deleted(self._kind, *names))
        elif event.type != "BOOKMARK":
            seen.append(Skipped(f"an event of the unknown type {event.type!r}"))
        if metadata.resource_version:
            self.version = metadata.resource_version

    def _decode(self, line: bytes, metadata: _Meta) -> Applied | Misfit:
        try:
            if metadata.namespace or self._kind not in NAMESPACED:
                found: Any = _OBJECTS[self._kind].decode(line)
                return Applied(found.object)
        except _MALFORMED:
            pass
        raw = _RAW_LINE.decode(line).object
        try:
            return Applied(decode_bytes(self._kind, raw))
        except DecodeError as error:
            return misfit(self._kind, raw, error)


def misfit(kind: Kind, raw: msgspec.Raw, error: DecodeError) -> Misfit:
    """An object that cannot be decoded, by its name as far as that can be told."""
    try:
        metadata = _NAMED.decode(raw).metadata
    except _MALFORMED:
        metadata = _Meta()
    names = _names(kind, metadata)
    subject = describe((kind, *names)) if names else f"a {kind} without a name"
    return Misfit(names, subject, error.reason, metadata.resource_version)


def _names(kind: Kind, metadata: _Meta) -> Names | None:
    if not metadata.name:
        return None
    return ((metadata.namespace or "default") if kind in NAMESPACED else ""), metadata.name


def _first_words(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).removeprefix("JSON is malformed: ")[:200]
