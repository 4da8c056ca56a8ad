"""Exit codes, and how errors become one line on standard error and such a code.

The table of codes in `proxyctl --help` and docs/cli.md is `TABLE`.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from enum import IntEnum


class Exit(IntEnum):
    """What a caller may rely on."""

    OK = 0
    FAILED = 1
    USAGE = 2
    DIFFERENT = 3
    UNAVAILABLE = 4
    INTERRUPTED = 130
    NOBODY_READS = 141


TABLE: dict[Exit, str] = {
    Exit.OK: "done; for `plan`: the kernel already holds it",
    Exit.FAILED: "failed; the message says what holds now",
    Exit.USAGE: "wrong usage or configuration; nothing was touched",
    Exit.DIFFERENT: "`plan` found differences",
    Exit.UNAVAILABLE: "a plugin is missing, broken or planned; nothing was touched",
    Exit.INTERRUPTED: "interrupted (128 + signal)",
    Exit.NOBODY_READS: "the reader of standard output went away",
}

TRACEBACK = "PROXYCTL_TRACEBACK"
"""Environment variable: when set, an error's traceback is printed too."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with everything escaped that could move a cursor, end a line or turn its direction."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def say(message: str) -> None:
    """A message for the person at the terminal, on standard error."""
    print(f"proxyctl: {printable(message)}", file=sys.stderr)


def exit_code(error: Exception) -> Exit:
    """The code for an error that ended a command."""
    from ..errors import ConfigError, PluginError

    if isinstance(error, ConfigError):
        return Exit.USAGE
    return Exit.UNAVAILABLE if isinstance(error, PluginError) else Exit.FAILED


def report(error: Exception) -> Exit:
    """Say why a command ended, and give its code."""
    from ..errors import ConfigError, InternalError, ProxyError

    if os.environ.get(TRACEBACK):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, ConfigError):
        for warning in error.warnings:
            say(f"warning: {warning}")
        for line in error.lines:
            say(f"error: {line}")
    elif isinstance(error, ProxyError) and not isinstance(error, InternalError):
        say(f"error: {error}{_hint(error)}")
    elif isinstance(error, OSError) and error.strerror:
        say(f"error: {': '.join(str(part) for part in (error.filename, error.strerror) if part)}")
    else:
        from ..cell import cause_of

        say(f"internal error, please report it ({TRACEBACK}=1 shows more): {cause_of(error)}")
    return exit_code(error)


def _hint(error: Exception) -> str:
    """What helps against a kernel that says no to us."""
    if getattr(error, "errno", 0) in (errno.EPERM, errno.EACCES) and os.geteuid() != 0:
        return "; run it as root, or with the rights that `proxyctl backends -o wide` lists under NEEDS"
    return ""


def hang_up() -> Exit:
    """Nobody reads standard output any more: nothing may be written to it, not even at the interpreter's end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    return Exit.NOBODY_READS
