"""Run a command in a guest: `python -m proxycore.testing.uml [OPTIONS] -- COMMAND ...`.

Its streams and its exit status are passed on.  124: it did not end in time; 125: there is no result, and standard error says why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import BinaryIO

from ...errors import KernelError
from .guest import MEMORY, MODULES, NO_RESULT, TIMED_OUT, TIMEOUT_SECONDS, Guest, GuestTimeout


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m proxycore.testing.uml", description="Run a command in a guest of user-mode Linux."
    )
    made.add_argument("--mem", default=MEMORY, help="memory of the guest (default: %(default)s)")
    made.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"until it is killed, with status {TIMED_OUT} (default: %(default)g)",
    )
    made.add_argument(
        "--out", action="append", default=[], metavar="DIR", help="a folder where writes stay; repeatable"
    )
    made.add_argument(
        "--modules",
        help="kernel modules to load instead of IPVS and what goes with it ('' for none, which saves a second)",
    )
    made.add_argument("--verbose", action="store_true", help="say what the guest's console said")
    made.add_argument("command", nargs="+")
    return made


def main(arguments: Sequence[str]) -> int:
    asked = parser().parse_args(arguments)
    modules = MODULES if asked.modules is None else asked.modules.split()
    try:
        with Guest(asked.command, writable=asked.out, modules=modules, memory=asked.mem) as guest:
            if guest.missing and (asked.verbose or asked.modules):
                _say(f"not in this kernel: {' '.join(guest.missing)}")
            try:
                return guest.wait(
                    _writer(sys.stdout.buffer), _writer(sys.stderr.buffer), timeout=asked.timeout
                )
            finally:
                if asked.verbose:
                    _say(f"console: {guest.console(1000)}")
    except GuestTimeout as error:
        _say(str(error))
        return TIMED_OUT
    except (KernelError, ValueError, OSError) as error:
        _say(str(error))
        return NO_RESULT


def _writer(stream: BinaryIO) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        stream.write(data)
        stream.flush()

    return write


def _say(text: str) -> None:
    print(f"uml: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
