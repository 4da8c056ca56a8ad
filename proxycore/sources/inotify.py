"""inotify(7): the kernel's word on what happens in directories.

A thin layer over the three system calls, which Python's standard library lacks; no thread, no policy.
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache
from typing import Any, NamedTuple

IN_ATTRIB = 0x4
IN_CLOSE_WRITE = 0x8
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
IN_UNMOUNT = 0x2000
IN_Q_OVERFLOW = 0x4000
IN_IGNORED = 0x8000
IN_ONLYDIR = 0x1000000
IN_MASK_ADD = 0x20000000
IN_ISDIR = 0x40000000

_HEADER = struct.Struct("iIII")
_BUFFER_BYTES = 1 << 16


class InotifyEvent(NamedTuple):
    """The watch it belongs to, what happened, what ties the halves of a rename, the entry's name."""

    wd: int
    mask: int
    cookie: int
    name: str


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, path: str | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


class Inotify:
    """One inotify instance; `fileno()` is readable when there are events.

    Raises OSError: EMFILE when `fs.inotify.max_user_instances` is reached.
    """

    def __init__(self) -> None:
        self._fd = _checked(_libc().inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def fileno(self) -> int:
        return self._fd

    def add(self, path: str, mask: int) -> int:
        """Watch a path; the number of the watch.  One inode has one watch, whatever path led to it.

        Raises OSError: ENOSPC when `fs.inotify.max_user_watches` is reached.
        """
        return _checked(_libc().inotify_add_watch(self._fd, os.fsencode(path), ctypes.c_uint32(mask)), path)

    def remove(self, wd: int) -> None:
        """End a watch; nothing happens if it has ended by itself."""
        _libc().inotify_rm_watch(self._fd, wd)

    def read(self) -> list[InotifyEvent]:
        """All events that wait, in their order; returns at once."""
        events: list[InotifyEvent] = []
        while True:
            try:
                data = os.read(self._fd, _BUFFER_BYTES)
            except BlockingIOError:
                return events
            position = 0
            while position < len(data):
                wd, mask, cookie, size = _HEADER.unpack_from(data, position)
                position += _HEADER.size
                name = os.fsdecode(data[position : position + size].rstrip(b"\0"))
                position += size
                events.append(InotifyEvent(wd, mask, cookie, name))

    def close(self) -> None:
        """Give back the instance and its watches."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
