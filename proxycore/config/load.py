"""Putting configuration together: flag before environment before file before default."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from ..errors import ConfigError
from .documents import Problem, Setting, Written, read_files
from .field import Field
from .fields import BY_PATH, ENVIRONMENT, FIELDS
from .model import Loaded
from .resolve import Resolver
from .values import check, is_zero, typed_text

_PREFIX = "PROXYCORE_"
FILES_VARIABLE = "PROXYCORE_CONFIG"
"""Names configuration files, commas between them; it is no field."""


class Flag(NamedTuple):
    """A flag's value, and how the flag was written, for messages."""

    value: object
    where: str


# A Service named proxycore, or proxycore-something, leaves such variables in every pod of its namespace.
_SERVICE_LINK = re.compile(r"PROXYCORE_(?:.*_)?(?:SERVICE_(?:HOST|PORT)(?:_.*)?|PORT(?:_[0-9]+_.*)?)\Z")


def load(
    files: Sequence[Path] = (),
    flags: Mapping[str, object] = MappingProxyType({}),
    environ: Mapping[str, str] = MappingProxyType({}),
) -> Loaded:
    """The configuration that these files, flags and environment variables make.

    `flags`: by the field's path (`nftables.masqueradeBit`), by its name in command lines (`verify-interval`), or by
    kube-proxy's flag (`masquerade-all`); `_` may stand for `-`; None: not given.

    A value may be a Flag, which says how the flag was written.

    Raises ConfigError for everything that is wrong at once, with the first field in `.field` and warnings in
    `.warnings`; nothing was touched.
    """
    written = read_files(files)
    settings = dict(written.settings)
    settings.update(_environment(environ, written))
    settings.update(_flags(flags, written))
    broken = {problem.field for problem in written.problems}
    resolver = Resolver({path: value for path, value in settings.items() if path not in broken}, broken)
    config = resolver.config()
    problems = written.problems + [p for p in resolver.problems if not _follows(p, broken)]
    if problems or config is None:
        raise _error(problems, files, written.warnings + resolver.warnings)
    return Loaded(
        config=config,
        warnings=tuple(written.warnings + resolver.warnings),
        origins=resolver.origins,
        values=resolver.values,
        places=resolver.places,
    )


def _follows(problem: Problem, broken: Set[str | None]) -> bool:
    """Is it about a field that is only missing because it, its section or its document could not be read?"""
    section = (problem.field or "").partition(".")[0]
    return not problem.where and not broken.isdisjoint({None, "kind", "apiVersion", section, problem.field})


def _error(problems: list[Problem], files: Sequence[Path], warnings: list[str]) -> ConfigError:
    """One error for all problems, in the order of the files' lines; the first one's file and field are the error's."""
    order = {str(file): number for number, file in reversed(list(enumerate(files)))}
    problems = sorted(problems, key=lambda p: (order.get(p.file or "", len(order)), _line(p)))
    first = problems[0]
    lines = [_sentence(problem) for problem in problems]
    return ConfigError(field=first.field, file=first.file, lines=lines, warnings=warnings)


def _line(problem: Problem) -> int:
    line = problem.where.removeprefix(f"{problem.file}:")
    return int(line) if problem.file is not None and line.isdigit() else 0


def _sentence(problem: Problem) -> str:
    """`file:line: field: reason`, or the variable or flag in the place of file and line."""
    where, field = problem.where, problem.field
    if problem.file is None and field and re.search(rf"(\A--|\s){re.escape(field)}\Z", where):
        field = None  # named already
    return ": ".join(part for part in (where, field, problem.reason) if part)


def _environment(environ: Mapping[str, str], written: Written) -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    for name, text in environ.items():
        if not name.startswith(_PREFIX) or name == FILES_VARIABLE:
            continue
        field = ENVIRONMENT.get(name)
        if field is None:
            if not _SERVICE_LINK.match(name):
                close = difflib.get_close_matches(name, ENVIRONMENT, n=1, cutoff=0.8)
                hint = f"; did you mean {close[0]}?" if close else ""
                written.warnings.append(f"{name}: is unknown and ignored{hint}")
        elif text.strip():
            _take(field, text, name, "environment", written, found)
    return found


def _flags(flags: Mapping[str, object], written: Written) -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    for name, given in flags.items():
        value, where = given if isinstance(given, Flag) else (given, f"--{name.replace('_', '-')}")
        if value is None:
            continue
        fields = _FLAGS.get(name.replace("_", "-")) or ((BY_PATH[name],) if name in BY_PATH else ())
        if not fields:
            close = difflib.get_close_matches(name, [*_FLAGS, *BY_PATH], n=1, cutoff=0.7)
            hint = f"; did you mean {close[0]}?" if close else ""
            written.problems.append(Problem(None, name, where, f"is no field and no flag{hint}"))
        for field in fields:
            _take(field, value, where, "flag", written, found, shared=len(fields) > 1)
    return found


def _take(
    field: Field,
    raw: object,
    where: str,
    origin: str,
    written: Written,
    found: dict[str, Setting],
    *,
    shared: bool = False,
) -> None:
    try:
        value = typed_text(field, raw)
        if field.zero_is_default and is_zero(value):
            value = field.default
        check(field, value)
    except ValueError as error:
        written.problems.append(Problem(None, field.path, where, str(error)))
        return
    found[field.path] = Setting(value, origin, where, None, shared)


def _flag_names() -> dict[str, tuple[Field, ...]]:
    names: dict[str, tuple[Field, ...]] = {}
    for field in FIELDS:
        own = field.environment.removeprefix(_PREFIX).lower().replace("_", "-")
        for name in dict.fromkeys((*field.flags, own)):
            names[name] = (*names.get(name, ()), field)
    return names


_FLAGS = _flag_names()
