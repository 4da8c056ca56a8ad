"""Reading YAML and JSON that strangers wrote: plain values only, with limits, and errors that name the line.

Scalars mean what Kubernetes' own tools take them for: YAML 1.1 booleans and octal numbers, but neither dates
nor base 60; keys of mappings are always text.  Text that starts with `{` is tried as JSON first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec
import yaml
from yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from .errors import DecodeError

MAX_BYTES = 64 << 20
MAX_ALIASES = 1000
MAX_DEPTH = 64
MAX_ALIASED_VALUES = 100_000
"""How many values aliases may stand for in all: aliases of aliases multiply, ten lines can mean a billion."""

Path = tuple[str | int, ...]


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """One document of a stream.

    `line` is where its value starts, from 1.  `item_lines`: where each entry of a top-level `items` list starts
    (empty for JSON).  `lines`: where each value stands, by path; only filled on demand, and never for JSON.
    """

    line: int
    value: object
    item_lines: tuple[int, ...] = ()
    lines: Mapping[Path, int] = {}


class _Events(Protocol):
    def get_event(self) -> Any: ...


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CORE = "tag:yaml.org,2002:"
_WORDS: dict[str, object] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {word: True for name in ("yes", "true", "on") for word in (name, name.capitalize(), name.upper())}
_WORDS |= {word: False for name in ("no", "false", "off") for word in (name, name.capitalize(), name.upper())}
_WORDS |= {sign + name: float(sign + "inf") for sign in ("", "+", "-") for name in (".inf", ".Inf", ".INF")}
_WORDS |= {name: float("nan") for name in (".nan", ".NaN", ".NAN")}
_INTEGER = re.compile(r"[-+]?(?:0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)\Z")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?\Z")
_NUMERIC_START = frozenset("+-.0123456789")
_MAX_DIGITS = 400


def load_documents(
    text: str,
    *,
    where: str,
    max_bytes: int = MAX_BYTES,
    max_aliases: int = MAX_ALIASES,
    max_depth: int = MAX_DEPTH,
    allow_duplicates: bool = False,
    with_lines: bool = False,
) -> list[Document]:
    """Every document of a YAML stream, or of one or more JSON texts; empty documents are left out.

    `where` names the text in errors, a file as a rule.  A key that stands twice in one YAML mapping is
    refused, unless `allow_duplicates`: then the last one counts, as it always does in JSON.

    Raises DecodeError with `where:line` and a reason; nothing of the text is usable then.
    """
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    if size > max_bytes:
        raise DecodeError(where, f"is {size} bytes long; at most {max_bytes} are read")
    text = text.removeprefix("\ufeff")
    if text.lstrip()[:1] == "{":
        documents = _load_json(text, where, max_depth)
        if documents is not None:
            return documents
    try:
        return _Builder(where, max_aliases, max_depth, allow_duplicates, with_lines).documents(text)
    except _NotYAML as error:
        raise (_json_error(text, where) if _meant_as_json(text, where) else None) or error from None


class _NotYAML(DecodeError):
    """The text is wrong as YAML, rather than beyond a limit."""


def _meant_as_json(text: str, where: str) -> bool:
    """By the file's name, where it tells; else by how the text begins."""
    if where.endswith((".yaml", ".yml")):
        return False
    return where.endswith(".json") or _JSON_START.match(text) is not None


_JSON_START = re.compile(r'\s*\{\s*"')


def _json_error(text: str, where: str) -> DecodeError | None:
    """What a JSON parser says to it, None if it is JSON."""
    decoder = json.JSONDecoder()
    position = 0
    try:
        while (position := _end_of_space(text, position)) < len(text):
            position = decoder.raw_decode(text, position)[1]
    except json.JSONDecodeError as error:
        reason = f"{error.msg[:1].lower()}{error.msg[1:]} (column {error.colno})"
        return DecodeError(f"{where}:{error.lineno}", f"is not JSON: {reason}")
    except RecursionError:
        return None
    return None


def _load_json(text: str, where: str, max_depth: int) -> list[Document] | None:
    """The JSON values of a text, None if it is not JSON."""
    try:
        documents = [Document(line=_line_of(text, 0), value=msgspec.json.decode(text))]
    except RecursionError:
        raise DecodeError(where, f"is nested deeper than {max_depth} levels") from None
    except (msgspec.DecodeError, UnicodeEncodeError):
        found = _load_json_stream(text, where, max_depth)
        if found is None:
            return None
        documents = found
    for document in documents:
        if _depth_exceeds(document.value, max_depth):
            raise DecodeError(f"{where}:{document.line}", f"is nested deeper than {max_depth} levels")
    return documents


def _load_json_stream(text: str, where: str, max_depth: int) -> list[Document] | None:
    decoder = json.JSONDecoder()
    documents: list[Document] = []
    position = 0
    while (position := _end_of_space(text, position)) < len(text):
        try:
            value, end = decoder.raw_decode(text, position)
        except ValueError:
            return None
        except RecursionError:
            raise DecodeError(where, f"is nested deeper than {max_depth} levels") from None
        documents.append(Document(line=_line_of(text, position), value=value))
        position = end
    return documents


def _end_of_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


_SPACE = re.compile(r"\s*")


def _line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _depth_exceeds(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)  # type: ignore[attr-defined]
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return False
    return True


def _resolve(text: str) -> object:
    """What a plain scalar stands for."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in _NUMERIC_START:
        return text
    if len(text) <= _MAX_DIGITS:
        if _INTEGER.match(text):
            return _integer(text)
        if _FLOAT.match(text):
            return _float(text)
    return text


def _float(text: str) -> object:
    try:
        return float(text.replace("_", ""))
    except ValueError:
        return text


def _integer(text: str) -> object:
    digits = text.replace("_", "")
    bare = digits.lstrip("+-")
    try:
        if len(bare) > 1 and bare[0] == "0" and bare[1] not in "box":
            return int(digits[: len(digits) - len(bare)] + "0o" + bare, 8)
        return int(digits, 0)
    except ValueError:
        return text if not bare.isdigit() else float(digits)


class _Frame:
    """A mapping or sequence under construction.

    `size` counts the values in it, those behind aliases too.  `merging`: the next value stands behind `<<`.
    """

    __slots__ = ("anchor", "items", "key", "line", "merges", "merging", "size", "value")

    def __init__(self, value: dict[str, object] | list[object], anchor: str | None, line: int) -> None:
        self.value = value
        self.anchor = anchor
        self.line = line
        self.key: str | None = None
        self.size = 1
        self.merges: list[object] = []
        self.merging = False
        self.items: list[int] | None = None


class _Builder:
    """Turns parser events into values without recursion, so that no nesting can exhaust the stack."""

    def __init__(
        self, where: str, max_aliases: int, max_depth: int, allow_duplicates: bool, with_lines: bool
    ) -> None:
        self._where = where
        self._max_aliases = max_aliases
        self._max_depth = max_depth
        self._allow_duplicates = allow_duplicates
        self._with_lines = with_lines
        self._aliases = 0
        self._aliased = 0
        self._start_document()

    def _start_document(self) -> None:
        self._stack: list[_Frame] = []
        self._anchors: dict[str, tuple[object, int]] = {}
        self._lines: dict[Path, int] = {}
        self._item_lines: tuple[int, ...] = ()
        self._root: object = None
        self._root_line = 0

    def documents(self, text: str) -> list[Document]:
        loader = None
        try:
            loader = _LOADER(text)
            return self._documents(loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            reason = ", ".join(part for part in (error.context, error.problem) if part)
            raise self._not_yaml(mark.line + 1 if mark else 1, reason) from None
        except yaml.reader.ReaderError as error:
            raise self._not_yaml(_line_of(text, error.position), error.reason) from None
        except yaml.YAMLError as error:
            raise _NotYAML(self._where, f"is not YAML: {error}") from None
        except UnicodeError as error:
            raise DecodeError(self._where, f"is not text: {error}") from None
        finally:
            if loader is not None:
                loader.dispose()

    def _error(self, line: int, reason: str) -> DecodeError:
        return DecodeError(f"{self._where}:{line}", reason)

    def _not_yaml(self, line: int, reason: str) -> _NotYAML:
        return _NotYAML(f"{self._where}:{line}", f"is not YAML: {reason}")

    def _documents(self, loader: _Events) -> list[Document]:
        found: list[Document] = []
        get_event = loader.get_event
        while True:
            event = get_event()
            kind = type(event)
            if kind is ScalarEvent:
                tag = event.tag
                plain = tag is None and event.implicit[0]
                text = event.value
                if not plain or (text and text[0] not in _NUMERIC_START and text not in _WORDS):
                    value = text if tag is None else self._tagged(event)
                else:
                    value = _resolve(text)
                if event.anchor is not None:
                    self._anchors[event.anchor] = (value, 1)
                self._add(value, 1, event, plain)
            elif kind is MappingStartEvent:
                self._push({}, event, "map")
            elif kind is MappingEndEvent or kind is SequenceEndEvent:
                self._pop(event)
            elif kind is SequenceStartEvent:
                self._push([], event, "seq")
            elif kind is AliasEvent:
                self._alias(event)
            elif kind is DocumentStartEvent:
                self._start_document()
            elif kind is DocumentEndEvent:
                if self._root is not None:
                    found.append(
                        Document(
                            line=self._root_line,
                            value=self._root,
                            item_lines=self._item_lines,
                            lines=self._lines,
                        )
                    )
            elif kind is StreamEndEvent:
                return found

    def _tagged(self, event: Any) -> object:
        """The value of a scalar with an explicit tag."""
        tag = event.tag
        if tag in ("!", _CORE + "str"):
            return event.value
        value = _resolve(event.value)
        kind = tag.removeprefix(_CORE)
        expected = {"int": int, "bool": bool, "null": type(None), "float": float}.get(kind)
        if expected is None:
            raise self._error(
                event.start_mark.line + 1, f"tag {tag!r} is not allowed: only plain values are read"
            )
        if expected is float and type(value) is int:
            return float(value)
        if type(value) is not expected:
            raise self._error(
                event.start_mark.line + 1, f"{event.value!r} is not of the type {kind} that its tag says"
            )
        return value

    def _push(self, value: dict[str, object] | list[object], event: Any, kind: str) -> None:
        stack = self._stack
        line = event.start_mark.line + 1
        if len(stack) >= self._max_depth:
            raise self._error(line, f"is nested deeper than {self._max_depth} levels")
        if event.tag is not None and event.tag not in ("!", _CORE + kind):
            raise self._error(line, f"tag {event.tag!r} is not allowed: only plain values are read")
        frame = _Frame(value, event.anchor, line)
        if not stack:
            self._root_line = line
        else:
            parent = stack[-1]
            if parent.key is None and not parent.merging and type(parent.value) is dict:
                raise self._error(line, "a key must be a single value, not a list or mapping")
            if kind == "seq" and len(stack) == 1 and parent.key == "items":
                frame.items = []
            elif parent.items is not None:
                parent.items.append(line)
        stack.append(frame)

    def _pop(self, event: Any) -> None:
        frame = self._stack.pop()
        if frame.merges:
            self._merge(frame)
        if frame.anchor is not None:
            self._anchors[frame.anchor] = (frame.value, frame.size)
        if frame.items is not None:
            self._item_lines = tuple(frame.items)
        self._add(frame.value, frame.size, event, False, frame.line)

    def _merge(self, frame: _Frame) -> None:
        """Bring in the mappings behind `<<`; what the mapping says itself wins, then the earlier one."""
        target = frame.value
        assert isinstance(target, dict)
        for source in frame.merges:
            for mapping in source if isinstance(source, list) else [source]:
                if not isinstance(mapping, dict):
                    raise self._error(frame.line, "the value of << must be a mapping or a list of mappings")
                for key, value in mapping.items():
                    target.setdefault(key, value)

    def _alias(self, event: Any) -> None:
        line = event.start_mark.line + 1
        try:
            value, size = self._anchors[event.anchor]
        except KeyError:
            raise self._error(
                line, f"alias *{event.anchor} stands for nothing that is complete above it"
            ) from None
        self._aliases += 1
        self._aliased += size
        if self._aliases > self._max_aliases:
            raise self._error(line, f"has more than {self._max_aliases} aliases")
        if self._aliased > MAX_ALIASED_VALUES:
            raise self._error(line, f"has aliases that stand for more than {MAX_ALIASED_VALUES} values")
        self._add(value, size, event, False)

    def _add(self, value: object, size: int, event: Any, plain: bool, line: int = 0) -> None:
        """Put a finished value where it belongs: key, value of the last key, entry of a list, or document."""
        if not self._stack:
            self._root = value
            self._root_line = self._root_line or event.start_mark.line + 1
            return
        frame = self._stack[-1]
        frame.size += size
        container = frame.value
        if type(container) is list:
            container.append(value)
            if frame.items is not None and not line:
                frame.items.append(event.start_mark.line + 1)
            if self._with_lines:
                self._note(len(container) - 1, line or event.start_mark.line + 1)
            return
        assert type(container) is dict
        if frame.merging:
            frame.merges.append(value)
            frame.merging = False
        elif frame.key is None:
            self._add_key(frame, value, event, plain)
        else:
            container[frame.key] = value
            frame.key = None

    def _add_key(self, frame: _Frame, value: object, event: Any, plain: bool) -> None:
        line = event.start_mark.line + 1
        if plain and value == "<<":
            frame.merging = True
            return
        key = self._key_text(value, line)
        assert isinstance(frame.value, dict)
        if key in frame.value:
            if not self._allow_duplicates:
                raise self._error(line, f"key {key!r} stands twice in one mapping")
        else:
            frame.value[key] = None
        frame.key = key
        if self._with_lines:
            self._note(key, line)

    def _key_text(self, value: object, line: int) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int | float):
            return str(value)
        raise self._error(line, "a key must be text" if value is None else "a key must be a single value")

    def _note(self, last: str | int, line: int) -> None:
        """Remember the line of a value by its path."""
        path: list[str | int] = []
        for frame in self._stack[:-1]:
            path.append(
                frame.key if type(frame.value) is dict and frame.key is not None else len(frame.value)
            )
        path.append(last)
        self._lines[tuple(path)] = line
