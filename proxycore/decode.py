"""API JSON, and values parsed from YAML, to the objects that a proxy reads.

Unknown fields are skipped; what the API would refuse in a field that we read is refused, naming the field.
Nothing is said about addresses or combinations of fields: those are judged where they are used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from .errors import DecodeError
from .objects import (
    API_VERSIONS,
    APIObject,
    EndpointSlice,
    Kind,
    Metadata,
    Node,
    Service,
    ServiceCIDR,
    kind_of,
)

Path = tuple[str | int, ...]
Key = tuple[Kind, str, str]
"""Kind, namespace and name: what an object is known by."""

NAMESPACED: frozenset[Kind] = frozenset({"Service", "EndpointSlice"})
MAX_LIST_DEPTH = 8
"""Lists may hold lists, as kubectl has it; more levels than this are nobody's."""

MAX_SHOWN = 600
"""Characters of an object's name in a message."""

_TYPES: dict[Kind, type[APIObject]] = {
    "Service": Service,
    "EndpointSlice": EndpointSlice,
    "Node": Node,
    "ServiceCIDR": ServiceCIDR,
}
_DECODERS: dict[Kind, msgspec.json.Decoder[APIObject]] = {
    kind: msgspec.json.Decoder(kind_type) for kind, kind_type in _TYPES.items()
}
_ENCODER = msgspec.json.Encoder()
_PREFIXES: dict[Kind, bytes] = {
    kind: b'{"apiVersion":"' + version.encode() + b'",' for kind, version in API_VERSIONS.items()
}
_MESSAGE = re.compile(r"(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`)?", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|(\[\.\.\.\])")
_UNQUOTED = re.compile(r"Expected `str(?: \| null)?`, got `(?:bool|int|float)`")
_MALFORMED = (msgspec.DecodeError, ValueError, RecursionError)


class FieldError(DecodeError):
    """A DecodeError that knows the field, as steps from the object down; empty for the object itself."""

    def __init__(self, subject: str, reason: str, path: Path = ()) -> None:
        super().__init__(subject, reason)
        self.path = path


class _Head(msgspec.Struct, rename="camel", gc=False):
    """What an object says it is."""

    kind: str | None = None
    api_version: str | None = None


class _List(msgspec.Struct, rename="camel"):
    kind: str | None = None
    api_version: str | None = None
    items: list[msgspec.Raw] | None = None


class Misfit(NamedTuple):
    """An object that cannot be understood: its JSON, a view into the document, and what is wrong with it."""

    raw: msgspec.Raw
    error: FieldError


_HEAD = msgspec.json.Decoder(_Head)
_LIST = msgspec.json.Decoder(_List)


def key_of(item: APIObject) -> Key:
    """Kind, namespace and name of an object."""
    return kind_of(item), item.metadata.namespace, item.metadata.name


def describe(key: Key) -> str:
    """The object as messages name it, on one line: `Service default/web`, `Node n1`."""
    kind, namespace, name = key
    text = f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"
    if not text.isprintable():
        text = text.encode("unicode_escape").decode()
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def decode_bytes(kind: Kind, data: bytes | msgspec.Raw) -> APIObject:
    """One object of a known kind from its JSON; `kind` and `apiVersion` in it need not be there.

    Raises DecodeError naming the object and the field.
    """
    try:
        item = _DECODERS[kind].decode(data)
    except _MALFORMED as error:
        return _decode_again(kind, data, error)
    return item if item.metadata.namespace and kind in NAMESPACED else _normal(kind, item)


def _decode_again(kind: Kind, data: bytes | msgspec.Raw, error: Exception) -> APIObject:
    """The slow way: through plain values, which can be searched for the object's name."""
    try:
        value = msgspec.json.decode(data)
    except _MALFORMED as worse:
        raise FieldError(kind, f"is not JSON: {_plain(worse)}") from None
    if not isinstance(value, dict):
        raise FieldError(kind, f"expected an object, got {_type_name(value)}") from error
    return _convert(kind, value, kind)


def decode_value(value: object, where: str) -> APIObject | None:
    """One object from plain values, as YAML gives them; None if its kind and apiVersion are not ones we read.

    `where` names the place (file and line) while the object's name is not known.  A namespaced object
    without a namespace is in `default`.  Raises DecodeError naming the object, or `where`, and the field.
    """
    if not isinstance(value, dict):
        raise FieldError(where, f"expected an object with apiVersion and kind, got {_type_name(value)}")
    kind = _known_kind(value.get("kind"), value.get("apiVersion"), where)
    return None if kind is None else _convert(kind, value, where)


def items_of(value: object) -> Iterator[object]:
    """The objects that a document holds: itself, or those of a `List` or `ServiceList`.

    Raises DecodeError for a list whose `items` is none.
    """
    for _, item in located_items(value):
        yield item


def located_items(value: object, path: Path = ()) -> Iterator[tuple[Path, object]]:
    """As `items_of`, each with its place in the document: `("items", 3)`."""
    if not isinstance(value, dict) or not _is_list(value.get("kind")):
        yield path, value
        return
    items = value.get("items")
    if items is not None and not isinstance(items, list):
        raise FieldError(
            str(value["kind"]), f"items: expected a list, got {_type_name(items)}", (*path, "items")
        )
    if len(path) >= 2 * MAX_LIST_DEPTH:
        raise FieldError(str(value["kind"]), f"lists are nested deeper than {MAX_LIST_DEPTH} levels", path)
    kind = value["kind"].removesuffix("List")
    for index, item in enumerate(items or ()):
        if kind and isinstance(item, dict) and "kind" not in item:
            item = {"kind": kind, "apiVersion": value.get("apiVersion"), **item}
        yield from located_items(item, (*path, "items", index))


def decode_json(data: bytes) -> Iterator[APIObject | Misfit]:
    """Every object of ours in one JSON document, lists included, without building plain values on the way.

    Raises DecodeError if the text is not JSON as a whole.
    """
    raw = msgspec.Raw(data)
    try:
        found = _LIST.decode(raw)
    except msgspec.ValidationError:
        yield from _json_item(raw, _Head(), 0)
    except _MALFORMED as error:
        raise FieldError("", f"is not JSON: {_plain(error)}") from None
    else:
        yield from _json_list(found, 0) if _is_list(found.kind) else _json_item(raw, _Head(), 0)


def _json_list(found: _List, depth: int) -> Iterator[APIObject | Misfit]:
    outer = _Head(str(found.kind).removesuffix("List"), found.api_version)
    for item in found.items or ():
        try:
            head = _HEAD.decode(item)
            if head.kind is None:
                head = outer
            if head.kind in _DECODERS and API_VERSIONS[head.kind] == head.api_version:
                yield _normal(head.kind, _DECODERS[head.kind].decode(item))
                continue
        except _MALFORMED:
            pass
        yield from _json_item(item, outer, depth + 1)


def _json_item(raw: msgspec.Raw, outer: _Head, depth: int) -> Iterator[APIObject | Misfit]:
    try:
        head = _HEAD.decode(raw)
        if head.kind is None and outer.kind:
            head = outer
        if not _is_list(head.kind):
            kind = _known_kind(head.kind, head.api_version, "")
            if kind is not None:
                yield decode_bytes(kind, raw)
        elif depth >= MAX_LIST_DEPTH:
            yield Misfit(raw, FieldError("", f"lists are nested deeper than {MAX_LIST_DEPTH} levels"))
        else:
            yield from _json_list(_LIST.decode(raw), depth)
    except FieldError as error:
        yield Misfit(raw, error)
    except _MALFORMED as error:
        yield Misfit(raw, _field_error("", error))


def identify(value: object) -> Key | None:
    """What an object would be known by, though the rest of it be wrong; None if that cannot be told."""
    if not isinstance(value, dict):
        return None
    kind, metadata = value.get("kind"), value.get("metadata")
    if not isinstance(kind, str) or kind not in _TYPES or not isinstance(metadata, dict):
        return None
    name, namespace = metadata.get("name"), metadata.get("namespace")
    if not isinstance(name, str) or not name or not isinstance(namespace, str | None):
        return None
    return kind, (namespace or "default") if kind in NAMESPACED else "", name


def encode(item: APIObject) -> bytes:
    """The object as API JSON, `apiVersion` and `kind` included; holds only the fields that we read."""
    return _PREFIXES[kind_of(item)] + _ENCODER.encode(item)[1:]


def _is_list(kind: object) -> bool:
    return isinstance(kind, str) and kind.endswith("List")


def _known_kind(kind: object, version: object, where: str) -> Kind | None:
    for name, value in (("kind", kind), ("apiVersion", version)):
        if value is None or value == "":
            raise FieldError(where, f"{name} is missing")
        if not isinstance(value, str):
            raise FieldError(where, f"{name}: expected `str`, got {_type_name(value)}", (name,))
    for known, known_version in API_VERSIONS.items():
        if kind == known:
            return known if version == known_version else None
    return None


def _convert(kind: Kind, value: dict[str, object], where: str) -> APIObject:
    value = {**value, "kind": kind}
    metadata = value.get("metadata")
    if isinstance(metadata, dict) and metadata.get("namespace", "") is None:
        value["metadata"] = {**metadata, "namespace": ""}
    key = identify(value)
    subject = describe(key) if key else where
    try:
        item: APIObject = msgspec.convert(value, _TYPES[kind])
        _ENCODER.encode(item)
    except UnicodeEncodeError:
        raise FieldError(subject, "holds half of a surrogate pair, which is not text") from None
    except _MALFORMED as error:
        raise _field_error(subject, error) from None
    return _normal(kind, item)


def _normal(kind: Kind, item: APIObject) -> APIObject:
    """The object with the namespace that the API would give it."""
    metadata = item.metadata
    if kind in NAMESPACED:
        if metadata.namespace:
            return item
        return _with_metadata(item, msgspec.structs.replace(metadata, namespace="default"))
    return (
        _with_metadata(item, msgspec.structs.replace(metadata, namespace="")) if metadata.namespace else item
    )


def _with_metadata(item: APIObject, metadata: Metadata) -> APIObject:
    return msgspec.structs.replace(item, metadata=metadata)


def _field_error(subject: str, error: Exception) -> FieldError:
    """msgspec's message with the field first: `spec.ports[0].port: expected `int`, got `str``."""
    message = str(error)
    match = _MESSAGE.fullmatch(message)
    assert match is not None
    what = match["what"]
    if _UNQUOTED.fullmatch(what):
        what += "; put it in quotes"
    what = what[:1].lower() + what[1:]
    if not match["path"]:
        return FieldError(subject, what)
    path = _path(match["path"])
    return FieldError(
        subject, f"{match['path'].lstrip('.')}: {'a key: ' if match['key'] else ''}{what}", path
    )


def _path(text: str) -> Path:
    steps: list[str | int] = []
    for match in _STEP.finditer(text):
        if match[3]:
            break
        steps.append(match[1] if match[1] is not None else int(match[2]))
    return tuple(steps)


def _plain(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = str(error).removeprefix("JSON is malformed: ")
    return text[:1].lower() + text[1:]


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
