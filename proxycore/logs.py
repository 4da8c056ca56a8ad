"""Structured logs on the standard library: one line an entry, `key=value` text or JSON.

Values come from the API and from plugins; a line holds no character of theirs that could end it, open a new
field or move a terminal's cursor.  Keys are Kubernetes' (`service=ns/name`).

Fields of a line: `time` (RFC 3339, UTC, milliseconds), `level`, `msg`, `logger`, then the entry's own.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, TextIO

Format = Literal["text", "json"]

DEBUG_VERBOSITY = 4
"""kube-proxy's `-v` from which on entries per Service are printed; 0 to 3 are all the same."""

LIBRARY_VERBOSITY = 6
"""`-v` from which on libraries may say what they are doing; below, only their warnings appear."""

_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+,*\[\]<>()~-]+")
_RESERVED = frozenset({"time", "level", "msg", "logger"})
_LIBRARIES = ("urllib3", "kubernetes", "pyroute2", "asyncio")


class Log:
    """A logger whose entries are a fixed message and named fields.

    The message says what happened and never holds data; data goes into fields, which are written escaped.
    """

    __slots__ = ("_fields", "_logger")

    def __init__(self, logger: logging.Logger, fields: Mapping[str, object] | None = None) -> None:
        self._logger = logger
        self._fields = dict(fields or {})

    def bind(self, **fields: object) -> Log:
        """A logger that adds these fields to every entry."""
        return Log(self._logger, {**self._fields, **fields})

    def debug(self, message: str, /, **fields: object) -> None:
        self._write(logging.DEBUG, message, fields)

    def info(self, message: str, /, **fields: object) -> None:
        self._write(logging.INFO, message, fields)

    def warning(self, message: str, /, **fields: object) -> None:
        self._write(logging.WARNING, message, fields)

    def error(self, message: str, /, **fields: object) -> None:
        self._write(logging.ERROR, message, fields)

    def exception(self, message: str, error: BaseException, /, **fields: object) -> None:
        """An error with its traceback, which becomes one escaped field."""
        self._write(logging.ERROR, message, fields, error)

    def debugs(self) -> bool:
        """Are entries per Service printed?  Ask before working out their fields."""
        return self._logger.isEnabledFor(logging.DEBUG)

    def _write(
        self, level: int, message: str, fields: dict[str, object], error: BaseException | None = None
    ) -> None:
        if self._logger.isEnabledFor(level):
            merged = {**self._fields, **fields} if self._fields else fields
            # The message goes in as an argument, so that a percent sign in it is never a conversion.
            self._logger.log(level, "%s", message, extra={"fields": merged}, exc_info=error)


def get(name: str) -> Log:
    """The logger of that name below `proxycore`, for example `engine`."""
    return Log(logging.getLogger(f"proxycore.{name}"))


def level_of(verbosity: int) -> int:
    """Level for kube-proxy's `-v`."""
    return logging.DEBUG if verbosity >= DEBUG_VERBOSITY else logging.INFO


def configure(format: Format = "text", verbosity: int = 0, stream: TextIO | None = None) -> None:
    """Send every entry of this process, libraries' and plugins' included, to `stream` (standard error)."""
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(JSONFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, _Handler):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level_of(verbosity))
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(
            logging.NOTSET if verbosity >= LIBRARY_VERBOSITY else logging.WARNING
        )


class _Handler(logging.StreamHandler[TextIO]):
    """A reader of our log that went away must not disturb the proxy."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError | ValueError):
            super().handleError(record)


class TextFormatter(logging.Formatter):
    """`time=… level=info msg=synced logger=engine changes=3`; values quoted as JSON strings where needed."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{_key(key)}={_text(value)}" for key, value in _entries(record).items())


class JSONFormatter(logging.Formatter):
    """One JSON object a line; numbers and booleans stay what they are."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({_key(key): _json(value) for key, value in _entries(record).items()})


def quote(value: str | int | float | bool | None) -> str:
    """The value as it stands behind `key=`: bare if it cannot be mistaken, else an ASCII-only JSON string."""
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else json.dumps(value)
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return repr(value)  # as json.dumps() does after a tenfold time
    return json.dumps(value)


def _entries(record: logging.LogRecord) -> dict[str, object]:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    entries: dict[str, object] = {
        "time": f"{stamp}.{int(record.created % 1 * 1000):03d}Z",
        "level": record.levelname.lower(),
        "msg": record.getMessage(),
        "logger": record.name.removeprefix("proxycore."),
    }
    fields = getattr(record, "fields", None)
    if isinstance(fields, Mapping):
        for key, value in fields.items():
            entries[f"{key}_" if key in _RESERVED else key] = value
    if record.exc_info and record.exc_info[1] is not None:
        entries["traceback"] = logging.Formatter().formatException(record.exc_info)
    return entries


@lru_cache(maxsize=1024)
def _key(key: str) -> str:
    return key if _PLAIN.fullmatch(key) else json.dumps(key)


def _text(value: object) -> str:
    """Items of a list are quoted one by one, so that a comma in one of them does not make two."""
    if isinstance(value, (list, tuple)) and type(value).__str__ is object.__str__:
        return "[" + ",".join(_item(_scalar(item)) for item in value) + "]"
    return quote(_scalar(value))


def _item(value: str | int | float | bool | None) -> str:
    return json.dumps(value) if isinstance(value, str) and "," in value else quote(value)


def _json(value: object) -> object:
    if isinstance(value, list | tuple) and type(value).__str__ is object.__str__:
        return [_scalar(item) for item in value]
    return _scalar(value)


def _scalar(value: object) -> str | int | float | bool | None:
    """The value as JSON can hold it: no infinity; an object by its text, or its type if that fails."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else str(value)
    try:
        return str(value)
    except Exception:  # noqa: BLE001  a plugin's __str__ must not cost us the entry
        return f"<{type(value).__name__}>"
