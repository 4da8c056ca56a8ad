"""What a set of manifest files says: parsing one file, and the rules for all of them together."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping

import msgspec

from ..decode import (
    FieldError,
    Key,
    Misfit,
    decode_bytes,
    decode_json,
    decode_value,
    describe,
    encode,
    identify,
    key_of,
    located_items,
)
from ..errors import DecodeError
from ..objects import APIObject, Kind, kind_of
from ..source import Applied, Deleted, Event, Trouble
from ..yamlio import Document, load_documents

MAX_REASONS = 5
"""Mistakes that one line's Trouble spells out."""
MAX_LOCATED_BYTES = 4 << 20
"""Larger files with a mistake are not read a second time for the line of the very field."""

LARGE_JSON_BYTES = 1 << 20
_BYTE = re.compile(r"\(byte (\d+)\)")


class Found(msgspec.Struct, frozen=True, gc=False):
    """An object and the line at which it starts, 0 if that is not known.

    The object is kept as compressed JSON, in a tenth of the memory: it is needed once to be delivered, and again only
    when it stands in several files.
    """

    kind: Kind
    packed: bytes
    line: int

    @classmethod
    def of(cls, item: APIObject, line: int) -> Found:
        return cls(kind_of(item), zlib.compress(encode(item), level=1), line)

    @property
    def object(self) -> APIObject:
        return decode_bytes(self.kind, zlib.decompress(self.packed))


News = Event | Found
"""What is to be delivered.  A Found stands for `Applied` of its object, which is made at the last moment."""


def event_of(news: News) -> Event:
    return Applied(news.object) if isinstance(news, Found) else news


class Problem(msgspec.Struct, frozen=True):
    """A mistake in a file.  `key`: the object it is in, None if that cannot be told.  `line` is 0 if unknown.

    `hides`: an object is missing because of it; what the file last said about that object stays in force.
    """

    line: int
    reason: str
    key: Key | None = None
    hides: bool = True


class Manifest(msgspec.Struct, frozen=True):
    """What one file says.  `broken`: nothing of it could be read."""

    objects: dict[Key, Found] = {}
    problems: tuple[Problem, ...] = ()
    broken: bool = False


def broken(reason: str, line: int = 0) -> Manifest:
    """A file of which nothing could be read."""
    return Manifest(problems=(Problem(line, reason),), broken=True)


def parse(data: bytes) -> Manifest:
    """What the bytes of a YAML or JSON file say, mistakes included; raises nothing."""
    if data[:1] == b"{" or data.lstrip()[:1] == b"{":
        try:
            return _parse_json(data)
        except DecodeError as error:
            # Flow-style YAML and several JSON texts begin so too, but what is large is cut or damaged JSON.
            if len(data) >= LARGE_JSON_BYTES and "trailing characters" not in error.reason:
                return broken(error.reason, _line_of_byte(data, error.reason))
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return broken(f"is not text: {error.reason} at byte {error.start}", line)
    try:
        documents = load_documents(text, where="")
    except DecodeError as error:
        return broken(error.reason, _line_in(error.subject))
    return _parse_documents(text, documents)


def _parse_json(data: bytes) -> Manifest:
    collected = _Collected()
    position = 0
    for item in decode_json(data):
        if not isinstance(item, Misfit):
            collected.add(key_of(item), Found.of(item, 0))
            continue
        raw, error = item
        found = data.find(bytes(raw), position)
        position = max(found, position)
        try:
            key = identify(msgspec.json.decode(raw))
        except (msgspec.DecodeError, ValueError, RecursionError):
            key = None
        line = data.count(b"\n", 0, found) + 1 if found >= 0 else 0
        collected.problems.append(Problem(line, _reason(error), key))
    return collected.manifest()


def _parse_documents(text: str, documents: Iterable[Document]) -> Manifest:
    collected = _Collected()
    for number, document in enumerate(documents):
        try:
            for path, value in located_items(document.value):
                line = document.line
                if len(path) == 2 and isinstance(path[1], int) and path[1] < len(document.item_lines):
                    line = document.item_lines[path[1]]
                try:
                    item = decode_value(value, "")
                except FieldError as error:
                    line = _line_of_field(text, number, (*path, *error.path)) or line
                    collected.problems.append(Problem(line, _reason(error), identify(value)))
                else:
                    if item is not None:
                        collected.add(key_of(item), Found.of(item, line))
        except FieldError as error:
            collected.problems.append(Problem(document.line, _reason(error)))
    return collected.manifest()


def _line_of_field(text: str, number: int, path: tuple[str | int, ...]) -> int:
    """The line of a field, or of the nearest thing around it, by reading the text once more; 0: not known."""
    if len(text) > MAX_LOCATED_BYTES:
        return 0
    lines = load_documents(text, where="", with_lines=True)[number].lines
    while path and path not in lines:
        path = path[:-1]
    return lines[path] if path else 0


def _line_of_byte(data: bytes, reason: str) -> int:
    match = _BYTE.search(reason)
    return data.count(b"\n", 0, int(match[1]) if match else len(data)) + 1


def _line_in(subject: str) -> int:
    line = subject.rpartition(":")[2]
    return int(line) if line.isdecimal() else 0


def _reason(error: DecodeError) -> str:
    return f"{error.subject}: {error.reason}" if error.subject else error.reason


class _Collected:
    """A Manifest in the making."""

    def __init__(self) -> None:
        self.objects: dict[Key, Found] = {}
        self.problems: list[Problem] = []

    def add(self, key: Key, found: Found) -> None:
        earlier = self.objects.get(key)
        self.objects[key] = found
        if earlier is not None:
            other = f", also at line {earlier.line}" if earlier.line else ""
            reason = f"{describe(key)}: stands twice in this file{other}; the last one counts"
            self.problems.append(Problem(found.line, reason, key, hides=False))

    def manifest(self) -> Manifest:
        return Manifest(self.objects, tuple(self.problems))


class ManifestSet:
    """The objects of many files, and the events that a change of some of them amounts to.

    An object that stands in several files is taken from the last of them by file name.  A mistake in a file
    leaves the object it is in as the file last said; while it cannot be told which object that is, nothing
    that the file said before goes.
    """

    def __init__(self) -> None:
        self._files: dict[str, dict[Key, Found]] = {}
        self._owners: dict[Key, list[str]] = {}
        self._current: dict[Key, bytes] = {}
        self._file_troubles: dict[str, dict[str, str]] = {}
        self._conflicts: dict[Key, str] = {}

    def change(self, updates: Mapping[str, Manifest | None]) -> list[Event]:
        """Take in new contents of files, None for a file that is gone; the events that follow, net of all."""
        return [event_of(news) for news in self.news(updates)]

    def news(self, updates: Mapping[str, Manifest | None]) -> list[News]:
        """The same, objects not yet unpacked.

        Each object is in it once at most; what goes comes last, so that on the way nothing is missing that has
        a new name.
        """
        touched: dict[Key, None] = {}
        events: list[News] = []
        for name in sorted(updates):
            manifest = updates[name]
            before = self._files.get(name, {})
            after = {} if manifest is None else _merged(before, manifest)
            self._own(name, before, after)
            if after:
                self._files[name] = after
            else:
                self._files.pop(name, None)
            touched.update(dict.fromkeys(before))
            touched.update(dict.fromkeys(after))
            events += self._report(name, manifest)
        for key in touched:
            events += self._settle(key)
        gone = [news for news in events if isinstance(news, Deleted)]
        return [news for news in events if not isinstance(news, Deleted)] + gone if gone else events

    def _own(self, name: str, before: Mapping[Key, Found], after: Mapping[Key, Found]) -> None:
        for key in before.keys() - after.keys():
            owners = self._owners[key]
            owners.remove(name)
            if not owners:
                del self._owners[key]
        for key in after.keys() - before.keys():
            owners = self._owners.setdefault(key, [])
            owners.append(name)
            owners.sort()

    def _settle(self, key: Key) -> list[News]:
        """What the current owners make of one object, compared with what was said of it last."""
        events: list[News] = []
        owners = self._owners.get(key, [])
        before = self._current.get(key)
        if not owners:
            if before is not None:
                del self._current[key]
                events.append(Deleted(*key))
        else:
            found = self._files[owners[-1]][key]
            if found.packed != before:
                self._current[key] = found.packed
                events.append(found)
        return [*events, *self._settle_conflict(key, owners)]

    def _settle_conflict(self, key: Key, owners: list[str]) -> list[Event]:
        reason = ""
        if len(owners) > 1:
            places = " and ".join(_place(name, self._files[name][key].line) for name in owners)
            reason = f"stands in {places}; the last by file name counts, {printable(owners[-1])}"
        if reason == self._conflicts.get(key, ""):
            return []
        if reason:
            self._conflicts[key] = reason
        else:
            del self._conflicts[key]
        return [Trouble(describe(key), reason, harmless=bool(reason))]

    def _report(self, name: str, manifest: Manifest | None) -> list[Event]:
        """Troubles of one file that are new, changed or over."""
        before = self._file_troubles.pop(name, {})
        after: dict[str, list[str]] = {}
        for problem in manifest.problems if manifest else ():
            after.setdefault(_place(name, problem.line), []).append(problem.reason)
        reasons = {subject: _joined(parts) for subject, parts in after.items()}
        if reasons:
            self._file_troubles[name] = reasons
        over: list[Event] = [Trouble(subject, "") for subject in before if subject not in reasons]
        return over + [
            Trouble(subject, reason) for subject, reason in reasons.items() if before.get(subject) != reason
        ]


def _place(name: str, line: int) -> str:
    return f"{printable(name)}:{line}" if line else printable(name)


def _merged(before: Mapping[Key, Found], manifest: Manifest) -> dict[Key, Found]:
    """What a file stands for, given what it said before."""
    if manifest.broken:
        return dict(before)
    hidden = {problem.key for problem in manifest.problems if problem.hides}
    if not hidden:
        return manifest.objects
    kept = {key: found for key, found in before.items() if key in hidden or None in hidden}
    return {**kept, **manifest.objects}


def _joined(reasons: list[str]) -> str:
    more = len(reasons) - MAX_REASONS
    return "; ".join(reasons[:MAX_REASONS]) + (f"; and {more} more" if more > 0 else "")


def printable(path: str) -> str:
    """A file name for a message: on one line, and text even where the name is not."""
    text = path.encode("utf-8", "backslashreplace").decode()
    return text if text.isprintable() else text.encode("unicode_escape").decode()
