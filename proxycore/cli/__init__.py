"""`proxyctl`: the command line.

It parses, calls one function, prints; what it decides is only how things look.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code.

    A program that is called `kube-proxy`, such as a link of that name, takes kube-proxy's command line.
    """
    from .app import run_command_line

    if arguments is None and os.path.basename(sys.argv[0]) == "kube-proxy":
        arguments = ["kube-proxy", *sys.argv[1:]]
    return run_command_line(arguments)
