"""Reading configuration files: documents taken apart into settings by field path."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from ..errors import DecodeError
from ..yamlio import Document, load_documents
from .field import API_VERSIONS, Field
from .fields import BY_PATH
from .values import check, describe, is_blank, is_zero, typed

MAX_BYTES = 1 << 20
MAX_ALIASES = 100


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong.  `where` says where it stands: a file and line, an environment variable, a flag."""

    file: str | None
    field: str | None
    where: str
    reason: str


class Setting(msgspec.Struct, frozen=True):
    """A value that somebody has set.  `origin`: a file's name, `environment` or `flag`; `where`: more precisely."""

    value: object
    origin: str
    where: str
    file: str | None = None
    shared: bool = False
    """Set by a flag that serves several fields, some of which may not matter in the mode."""


class Written(msgspec.Struct):
    """Everything found in files, and everything wrong or odd about it; grows as files are read."""

    settings: dict[str, Setting] = {}
    problems: list[Problem] = []
    warnings: list[str] = []
    seen: dict[str, str] = {}
    """Where a document of each kind stands."""


_SECTIONS: dict[str, frozenset[str]] = {
    kind: frozenset(
        path.rpartition(".")[0] for path, field in BY_PATH.items() if field.document == kind and "." in path
    )
    for kind in API_VERSIONS
}


def read_files(files: Sequence[Path]) -> Written:
    """All settings of these files; a file that cannot be read or is not YAML is a problem."""
    written = Written()
    for file in files:
        documents = _load(file, written)
        if documents is None:
            continue
        for document in documents:
            _take_document(document, str(file), written)
        if not documents:
            written.problems.append(Problem(str(file), None, str(file), "holds no configuration"))
    return written


def fingerprint(files: Sequence[Path]) -> str:
    """What tells one content of these files from another; that a file cannot be read is a content too."""
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(b"content" + hashlib.sha256(stream.read(MAX_BYTES + 1)).digest())
        except (OSError, ValueError) as error:
            digest.update(f"error {error}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _load(file: Path, written: Written) -> list[Document] | None:
    text = _read(file, written)
    if text is None:
        return None
    try:
        return _parse(text, file)
    except DecodeError as strict:
        # As kube-proxy does: strictly first, and if only that fails (a key twice), leniently and with a warning.
        try:
            documents = _parse(text, file, allow_duplicates=True)
        except DecodeError:
            written.problems.append(Problem(str(file), None, strict.subject, strict.reason))
            return None
        written.warnings.append(f"{strict}; the last one counts")
        return documents


def _parse(text: str, file: Path, *, allow_duplicates: bool = False) -> list[Document]:
    return load_documents(
        text,
        where=str(file),
        max_bytes=MAX_BYTES,
        max_aliases=MAX_ALIASES,
        allow_duplicates=allow_duplicates,
        with_lines=True,
    )


def _read(file: Path, written: Written) -> str | None:
    where = str(file)
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) <= MAX_BYTES:
            return data.decode()
        reason = f"is longer than the {MAX_BYTES} bytes that are read"
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f"{file}:{line}"
        reason = "is not UTF-8 text"
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {error.strerror if isinstance(error, OSError) else error}"
    written.problems.append(Problem(str(file), None, where, reason))
    return None


def _take_document(document: Document, file: str, written: Written) -> None:
    where = f"{file}:{document.line}"
    body = document.value
    if not isinstance(body, Mapping):
        written.problems.append(Problem(file, None, where, "is not a mapping with apiVersion and kind"))
        return
    version, kind = body.get("apiVersion"), body.get("kind")
    wanted = API_VERSIONS.get(kind) if isinstance(kind, str) else None
    if wanted is None or version != wanted:
        known = " or ".join(f"{api}, kind {name}" for name, api in API_VERSIONS.items())
        reason = f"is apiVersion {version!r}, kind {kind!r}; wanted is {known}"
        written.problems.append(Problem(file, "kind" if wanted is None else "apiVersion", where, reason))
        return
    assert isinstance(kind, str)
    if kind in written.seen:
        reason = f"a second {kind}; the first one stands at {written.seen[kind]}"
        written.problems.append(Problem(file, "kind", where, reason))
        return
    written.seen[kind] = where
    rest = {key: value for key, value in body.items() if key not in ("apiVersion", "kind")}
    _Section(kind, file, document, written).take(rest, ())


class _Section:
    """Walks one document."""

    def __init__(self, kind: str, file: str, document: Document, written: Written) -> None:
        self._kind = kind
        self._file = file
        self._document = document
        self._written = written

    def take(self, mapping: Mapping[str, object], path: tuple[str, ...]) -> None:
        for key, value in mapping.items():
            self._take(path + (key,), value)

    def _take(self, path: tuple[str, ...], value: object) -> None:
        name = ".".join(path)
        field = BY_PATH.get(name) if not any("." in part for part in path) else None
        if field is not None and field.document == self._kind:
            self._set(field, path, value)
        elif name in _SECTIONS[self._kind]:
            if isinstance(value, Mapping):
                self.take(value, path)
            elif value is not None:
                self._problem(name, path, "must be a mapping")
        else:
            self._written.warnings.append(
                f"{self._where(path)}: {name}: is unknown and ignored{self._hint(name)}"
            )

    def _set(self, field: Field, path: tuple[str, ...], value: object) -> None:
        if value is None:
            return
        if field.type == "bools" and isinstance(value, Mapping):
            value = self._bools(field, path, value)
        try:
            decoded = typed(field, value)
            unset = is_blank if field.treatment == "ignored" else is_zero
            if field.zero_is_default and unset(decoded):
                return
            check(field, decoded)
        except ValueError as error:
            self._problem(field.path, path, str(error))
            return
        where = self._where(path)
        self._written.settings[field.path] = Setting(decoded, self._file, where, self._file)

    def _bools(self, field: Field, path: tuple[str, ...], value: Mapping[str, object]) -> dict[str, bool]:
        """Those that are booleans; each of the others is a problem of its own."""
        found: dict[str, bool] = {}
        for name, part in value.items():
            if isinstance(part, bool):
                found[name] = part
            else:
                reason = f"must be true or false, not {describe(part)}"
                self._problem(f"{field.path}.{name}", (*path, name), reason)
        return found

    def _problem(self, field: str, path: tuple[str, ...], reason: str) -> None:
        self._written.problems.append(Problem(self._file, field, self._where(path), reason))

    def _where(self, path: tuple[str, ...]) -> str:
        line = self._document.lines.get(path)
        return f"{self._file}:{line}" if line else self._file

    def _hint(self, name: str) -> str:
        known = [path for path, field in BY_PATH.items() if field.document == self._kind]
        close = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.8)
        if close:
            return f"; did you mean {close[0]}?"
        elsewhere = BY_PATH.get(name)
        return f"; it belongs into a {elsewhere.document}" if elsewhere else ""
