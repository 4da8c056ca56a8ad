"""The xtables lock: a file that tools of the legacy variant lock while they work on a table, one for the whole host.

The nft variant needs none.
"""

from __future__ import annotations

import contextlib
import errno as errnos
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import KernelError

DEFAULT_PATH = "/run/xtables.lock"
_POLL_SECONDS = 0.02
_LOCKS = Path("/proc/locks")


class Holder(NamedTuple):
    """A process that has the lock; `command` may be empty."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})" if self.command else f"process {self.pid}"


class LockHeld(KernelError):
    """Somebody else kept the xtables lock for longer than we waited; nothing was changed under it.

    `holders`: who has it, as far as that can be seen from our PID namespace.
    """

    def __init__(self, seconds: float, holders: tuple[Holder, ...], path: str) -> None:
        self.seconds = seconds
        self.holders = holders
        self.path = path
        who = ", ".join(map(str, holders)) or "a process that cannot be seen from here"
        super().__init__(
            f"the xtables lock {path} was held by {who} for more than {seconds:g} s: end it if it hangs, wait "
            "longer if it is slow",
            errno=errnos.EAGAIN,
        )


def path() -> str:
    """The lock's file, as the tools choose it."""
    return os.environ.get("XTABLES_LOCKFILE") or DEFAULT_PATH


def holders() -> tuple[Holder, ...]:
    """Who has the lock right now; empty where that cannot be seen."""
    try:
        status = os.stat(path())
        table = _LOCKS.read_text()
    except OSError:
        return ()
    return tuple(
        Holder(pid, _command_of(pid))
        for pid in parse_locks(table, os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    )


def parse_locks(table: str, major: int, minor: int, inode: int) -> tuple[int, ...]:
    """Processes that hold a file according to /proc/locks; those that wait for it (`->`) are left out."""
    found: dict[int, None] = {}
    for line in table.splitlines():
        words = line.split()
        if len(words) < 6 or words[1] not in ("FLOCK", "POSIX"):
            continue
        device = words[5].split(":")
        try:
            pid, place = int(words[4]), (int(device[0], 16), int(device[1], 16), int(device[2]))
        except (ValueError, IndexError):
            continue
        if place == (major, minor, inode) and pid > 0:
            found[pid] = None
    return tuple(found)


def _command_of(pid: int) -> str:
    try:
        words = Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").strip()
        text = words.decode("utf-8", "replace") or Path("/proc", str(pid), "comm").read_text().strip()
    except OSError:
        return ""
    return text if len(text) <= 100 else f"{text[:97]}..."


@contextlib.contextmanager
def held(seconds: float) -> Iterator[None]:
    """Hold the lock inside; `seconds` to wait for it.

    Raises LockHeld, and KernelError if the file cannot be opened: the block was not entered.
    """
    name = path()
    try:
        file = os.open(name, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise KernelError(
            f"cannot open the xtables lock {name}: {error.strerror}", errno=error.errno or 0
        ) from error
    try:
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise LockHeld(seconds, holders(), name) from None
                time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(file)
