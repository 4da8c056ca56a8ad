"""Lists on standard output, as a table for people or as JSON or YAML for programs.

Tables cut nothing; columns marked wide appear with `-o wide` only.  JSON and YAML hold every column, under
the names in lower camel case and with their own types.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from .exits import printable


class Format(StrEnum):
    """Forms of a list."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"


class Column(NamedTuple):
    """A column: `key` names the value in a row; the heading is the key in capitals."""

    key: str
    wide: bool = False

    @property
    def heading(self) -> str:
        return "".join(f" {char}" if char.isupper() else char for char in self.key).upper()


Row = Mapping[str, object]


def show(rows: Iterable[Row], columns: Sequence[Column], format: Format, empty: str = "") -> None:
    """Print a list.  `empty` is what people are told, on standard error, where a table would have no row."""
    data = [{column.key: row.get(column.key) for column in columns} for row in rows]
    if format in (Format.JSON, Format.YAML):
        emit(structured(data, format))
    elif data:
        emit(table(data, [column for column in columns if format is Format.WIDE or not column.wide]))
    elif empty:
        print(empty, file=sys.stderr)


def structured(data: object, format: Format) -> str:
    """A value as JSON or YAML text."""
    if format is Format.JSON:
        return json.dumps(data, indent=2) + "\n"
    import yaml

    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=False)
    return text


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Aligned columns with a heading, as kubectl prints them."""
    lines = [[column.heading for column in columns]]
    lines += [[_cell(row[column.key]) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return "".join(
        "   ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() + "\n"
        for line in lines
    )


def emit(text: str) -> None:
    """Data for standard output.  Raises BrokenPipeError: its reader went away."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _cell(value: object) -> str:
    if value is None or value == "" or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ",".join(_cell(item) for item in value)
    return printable(str(value))
