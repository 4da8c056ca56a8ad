"""`proxyctl`: the command line.

It parses, calls one function, prints; what it decides is only how things look.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    from .app import run_command_line

    return run_command_line(arguments)
