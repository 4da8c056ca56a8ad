"""Command lines as Go's pflag reads them, which kube-proxy's are.

Semantics: spf13/pflag with Kubernetes' word separators: `--name=value`, `--name value`, `-v=2`, `-v 2` and `-v2`; a flag with
a value of its own (a boolean) takes another one only behind `=`; `_` in a name stands for `-`; `--` ends the flags.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple


class Shape(NamedTuple):
    """How a flag is written: its letter, if it has one, and its value where none is given, if it may stand alone."""

    letter: str = ""
    alone: str = ""


class Given(NamedTuple):
    """A flag on a command line; `written`: its name there, dashes included."""

    name: str
    value: str
    written: str


class Parsed(NamedTuple):
    """Flags in their order, and what is none."""

    flags: tuple[Given, ...]
    rest: tuple[str, ...]


def parse(arguments: Sequence[str], shapes: Mapping[str, Shape]) -> Parsed:
    """Take a command line apart.  Raises ValueError with a sentence for people."""
    letters = {shape.letter: name for name, shape in shapes.items() if shape.letter}
    flags: list[Given] = []
    rest: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        if argument == "--":
            rest += pending
        elif argument.startswith("--"):
            flags.append(_long(argument, pending, shapes))
        elif argument.startswith("-") and argument != "-":
            flags += _short(argument, pending, shapes, letters)
        else:
            rest.append(argument)
    return Parsed(tuple(flags), tuple(rest))


def _long(argument: str, pending: Iterator[str], shapes: Mapping[str, Shape]) -> Given:
    written, equals, value = argument.partition("=")
    if written[2:3] in ("", "-"):
        raise ValueError(f"{argument}: is no flag")
    name = written[2:].replace("_", "-")
    shape = shapes.get(name)
    if shape is None:
        raise ValueError(f"{written}: there is no such flag{_hint(name, shapes)}")
    if not equals:
        value = shape.alone or _next(written, pending)
    return Given(name, value, written)


def _short(
    argument: str, pending: Iterator[str], shapes: Mapping[str, Shape], letters: Mapping[str, str]
) -> Iterator[Given]:
    """One or more letters behind a single dash, the last of which may have a value."""
    left = argument[1:]
    while left:
        letter, left = left[0], left[1:]
        written = f"-{letter}"
        name = letters.get(letter)
        if name is None:
            whole = argument[1:].partition("=")[0].replace("_", "-")
            hint = f"; did you mean --{whole}?" if whole in shapes else ""
            raise ValueError(f"{written} in {argument}: there is no such flag{hint}")
        shape = shapes[name]
        if left.startswith("="):
            value, left = left[1:], ""
        elif shape.alone:
            value = shape.alone
        elif left:
            value, left = left, ""
        else:
            value = _next(written, pending)
        yield Given(name, value, written)


def _next(written: str, pending: Iterator[str]) -> str:
    value = next(pending, None)
    if value is None:
        raise ValueError(f"{written}: needs a value")
    return value


def _hint(name: str, shapes: Mapping[str, Shape]) -> str:
    close = difflib.get_close_matches(name[:100], shapes, n=1, cutoff=0.7)
    return f"; did you mean --{close[0]}?" if close else ""
