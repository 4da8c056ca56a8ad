"""Writing a configuration as the two documents that load() reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import yaml

from .duration import format_duration
from .field import API_VERSIONS, Field
from .fields import FIELDS
from .model import Loaded

PRECEDENCE = "flag > environment > file > default"
"""What goes before what."""

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9._/-]*\Z")
_AMBIGUOUS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})


def dump(
    loaded: Loaded,
    *,
    origins: bool = False,
    places: bool = False,
    documents: Sequence[str] = tuple(API_VERSIONS),
) -> str:
    """The configuration in force as YAML: a KubeProxyConfiguration and a ProxycoreConfiguration, or one of these.

    Every field is there, defaults included; load() of the text gives the same Config, but for a port
    that an empty flag switched off, which a file cannot say.  `origins` adds to each field a
    comment that says where its value comes from; `places` says it to the line, and what goes before what.
    """

    def comment(path: str) -> str:
        if places:
            return loaded.origin_and_place(path)
        return loaded.origins.get(path, "default") if origins else ""

    head = f"# {PRECEDENCE}\n" if places else ""
    return head + "---\n".join(
        "".join(f"{line}\n" for line in _document(kind, loaded, comment)) for kind in documents
    )


def _document(kind: str, loaded: Loaded, comment: Callable[[str], str]) -> Iterator[str]:
    yield f"apiVersion: {API_VERSIONS[kind]}"
    yield f"kind: {kind}"
    section = ""
    fields = [field for field in FIELDS if field.document == kind]
    # Sections in one piece: a section's first field says where it stands.
    order = {path: number for number, path in reversed(list(enumerate(_section(field) for field in fields)))}
    for _, field in sorted(enumerate(fields), key=lambda item: (_place(item, order), item[0])):
        *sections, name = field.path.split(".")
        if sections and sections[0] != section:
            section = sections[0]
            yield f"{section}:"
        said = comment(field.path)
        indent = "  " if sections else ""
        value = text_of(field, loaded.values.get(field.path, field.default))
        yield f"{indent}{name}: {value}{f'  # {_comment(said)}' if said else ''}"


def _section(field: Field) -> str:
    return field.path.partition(".")[0]


def _place(item: tuple[int, Field], order: Mapping[str, int]) -> int:
    return order[_section(item[1])]


def text_of(field: Field, value: object) -> str:
    """A field's value on one line, as a file would hold it."""
    if field.type == "duration" and isinstance(value, int):
        return format_duration(value)
    return flow(value)


def _comment(origin: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in origin)


def flow(value: object) -> str:
    """A value on one line of YAML, which yamlio reads back as it was."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return yaml.safe_dump(value).split("\n", 1)[0]
        case str():
            return _text(value)
        case Mapping():
            return "{" + ", ".join(f"{_text(str(key))}: {flow(part)}" for key, part in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(flow(part) for part in value) + "]"
    raise TypeError(f"{type(value).__name__} is no configuration value")


def _text(text: str) -> str:
    if _PLAIN.match(text) and text.lower() not in _AMBIGUOUS:
        return text
    return yaml.safe_dump(text, default_style='"', width=1 << 30).rstrip("\n")
