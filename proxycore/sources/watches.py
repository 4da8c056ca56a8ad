"""Which directories must be watched to know that a path leads elsewhere, and what happened in them."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import NamedTuple

from .inotify import (
    IN_ATTRIB,
    IN_CLOSE_WRITE,
    IN_CREATE,
    IN_DELETE,
    IN_DELETE_SELF,
    IN_IGNORED,
    IN_MASK_ADD,
    IN_MOVE_SELF,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    IN_ONLYDIR,
    IN_Q_OVERFLOW,
    IN_UNMOUNT,
    Inotify,
)

Lookup = tuple[str, str]
"""A directory, as its real path, and the name of an entry of it."""

NAMES = IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_DELETE_SELF | IN_MOVE_SELF
"""Enough to notice that a name stands for something else."""
CONTENTS = NAMES | IN_CLOSE_WRITE | IN_ATTRIB
"""And that a file's content or rights changed."""

_MAX_LINKS = 40
_LOST = IN_IGNORED | IN_UNMOUNT | IN_DELETE_SELF | IN_MOVE_SELF


class Resolved(NamedTuple):
    """How the kernel comes to a path: the entries that it looks up, and the real path or None."""

    lookups: tuple[Lookup, ...]
    path: str | None


class Change(NamedTuple):
    """Something happened to an entry of a watched directory; `cookie` ties the two halves of a rename."""

    directory: str
    name: str
    mask: int
    cookie: int


class Changes(NamedTuple):
    """What happened since the last time.

    `lost`: directories whose watch ended or leads elsewhere.  `overflow`: the kernel dropped events.
    """

    entries: list[Change]
    lost: set[str]
    overflow: bool


def resolve(path: str, start: str = "/") -> Resolved:
    """Follow a path from `start`, itself a real path, links included; stops where it leads nowhere."""
    current = start
    pending = path.split("/")[::-1]
    if path.startswith("/"):
        current = "/"
    lookups: list[Lookup] = []
    links = 0
    while pending:
        name = pending.pop()
        if name in ("", "."):
            continue
        if name == "..":
            current = os.path.dirname(current)
            continue
        lookups.append((current, name))
        target = os.path.join(current, name)
        try:
            link = os.readlink(target)
        except OSError as error:
            if error.errno != errno.EINVAL:
                return Resolved(tuple(lookups), None)
            current = target
            continue
        links += 1
        if links > _MAX_LINKS:
            return Resolved(tuple(lookups), None)
        if link.startswith("/"):
            current = "/"
        pending.extend(link.split("/")[::-1])
    return Resolved(tuple(lookups), current)


class Watches:
    """The inotify watches of a set of directories, by their real paths."""

    def __init__(self) -> None:
        self._inotify = Inotify()
        self._directories: dict[int, set[str]] = {}
        self._wanted: Mapping[str, int] | None = None

    def fileno(self) -> int:
        return self._inotify.fileno()

    def close(self) -> None:
        self._inotify.close()

    def follow(self, wanted: Mapping[str, int], *, again: bool = False) -> bool:
        """Watch exactly these directories, each with its mask; False if one of them is not there (any more).

        Watches that stand already are left alone; `again` sets them anew, since a path may have come to lead
        to another directory.  A directory that may not be read is left out.
        Raises OSError when the kernel has no watch to give (ENOSPC, ENOMEM).
        """
        if not again and wanted == self._wanted:
            return True
        complete = True
        found: dict[int, set[str]] = {}
        for directory, mask in wanted.items():
            try:
                wd = self._inotify.add(directory, mask | IN_ONLYDIR)
                if wd in found:
                    self._inotify.add(directory, mask | IN_ONLYDIR | IN_MASK_ADD)
            except (FileNotFoundError, NotADirectoryError):
                complete = False
                continue
            except PermissionError:
                continue
            found.setdefault(wd, set()).add(directory)
        for wd in self._directories.keys() - found.keys():
            self._inotify.remove(wd)
        self._directories = found
        self._wanted = dict(wanted) if complete else None
        return complete

    def read(self) -> Changes:
        """What happened since the last time; returns at once."""
        entries: list[Change] = []
        lost: set[str] = set()
        overflow = False
        for event in self._inotify.read():
            if event.mask & IN_Q_OVERFLOW:
                overflow = True
                continue
            directories = self._directories.get(event.wd, ())
            if event.mask & _LOST:
                lost.update(directories)
                if event.mask & IN_IGNORED and self._directories.pop(event.wd, None) is not None:
                    self._wanted = None
                continue
            for directory in directories:
                entries.append(Change(directory, event.name, event.mask, event.cookie))
        return Changes(entries, lost, overflow)
