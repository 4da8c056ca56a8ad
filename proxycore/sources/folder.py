"""A folder of manifest files, or a single one, as it is on disk at this moment."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
import time
from concurrent.futures import Future
from typing import NamedTuple

from .manifests import Manifest, broken, parse
from .watches import CONTENTS, NAMES, Lookup, Resolved, resolve

SUFFIXES = (".yaml", ".yml", ".json")
MAX_BYTES = 256 << 20
"""The size of a file that is read at all; YAML has a limit of its own."""
LARGE_BYTES = 4 << 20
"""From this size on parsing may take so long that a stop must not wait for it."""
MISSING = "does not exist"
_RACY_NS = 50_000_000
"""A file changed so shortly before it was read may change again without its time stamp showing it."""


class Seen(NamedTuple):
    """What a file was when it was read last; `signature` None: look at the content again to be sure."""

    signature: tuple[int, ...] | None
    digest: bytes | None


def is_manifest(name: str) -> bool:
    """Is an entry of the folder read?  Hidden ones are not: editors and Kubernetes' volumes keep theirs there."""
    return name.endswith(SUFFIXES) and not name.startswith(".")


class Folder:
    """Finds the files and reads those that changed.

    A file's key is its path as the user would write it: the argument and the name in it.  A single file is
    its own key.
    """

    def __init__(self, argument: str, stopped: threading.Event) -> None:
        self._stopped = stopped
        self.argument = argument if argument == "/" else argument.rstrip("/")
        self.root = Resolved((), None)
        self.directory: str | None = None
        """The real path of the folder; None while it is missing or a single file is meant."""
        self.links: dict[str, Resolved] = {}
        self.seen: dict[str, Seen] = {}

    def locate(self) -> str:
        """Find out where the argument leads now; why it leads nowhere, else empty."""
        self.root = resolve(os.path.abspath(self.argument))
        self.directory = None
        if self.root.path is None:
            return MISSING
        try:
            mode = os.stat(self.root.path).st_mode
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        if stat.S_ISDIR(mode):
            self.directory = self.root.path
        elif not stat.S_ISREG(mode):
            return "is neither a directory nor a regular file"
        return ""

    def list(self) -> list[str]:
        """Keys of all files, sorted; notes where links lead.  Raises OSError when the folder cannot be listed."""
        self.links.clear()
        if self.directory is None:
            return [self.argument]
        found = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if not is_manifest(entry.name):
                    continue
                key = self.key(entry.name)
                if entry.is_symlink():
                    self.links[key] = resolve(entry.name, self.directory)
                elif entry.is_dir(follow_symlinks=False):
                    continue
                found.append(key)
        return sorted(found)

    def key(self, name: str) -> str:
        return os.path.join(self.argument, name)

    def path(self, key: str) -> str:
        """Where to open a file."""
        if self.directory is None:
            return self.root.path or self.argument
        return os.path.join(self.directory, os.path.basename(key))

    def wanted(self) -> dict[str, int]:
        """Directories to be watched, with the inotify mask for each."""
        wanted: dict[str, int] = {}

        def add(directory: str, mask: int) -> None:
            wanted[directory] = wanted.get(directory, 0) | mask

        for directory, _ in self.root.lookups:
            add(directory, NAMES)
        if self.directory is not None:
            add(self.directory, CONTENTS)
        elif self.root.path is not None:
            add(os.path.dirname(self.root.path), CONTENTS)
        elif self.root.lookups:
            add(self.root.lookups[-1][0], CONTENTS)
        for link in self.links.values():
            for directory, _ in link.lookups:
                add(directory, NAMES)
            if link.lookups:
                add(link.lookups[-1][0], CONTENTS)
        return wanted

    def dependents(self) -> dict[Lookup, set[str]]:
        """Which linked files come by an entry of a directory."""
        index: dict[Lookup, set[str]] = {}
        for key, link in self.links.items():
            for lookup in link.lookups:
                index.setdefault(lookup, set()).add(key)
        return index

    def exists(self, key: str) -> bool:
        """Is there an entry of that name?  Notes whether it is a link and where that leads."""
        path = self.path(key)
        try:
            mode = os.lstat(path).st_mode
        except OSError:
            self.links.pop(key, None)
            return False
        if stat.S_ISLNK(mode) and self.directory is not None:
            self.links[key] = resolve(os.path.basename(key), self.directory)
        else:
            self.links.pop(key, None)
        return not stat.S_ISDIR(mode)

    def unchanged(self, key: str) -> bool:
        """Is the file, going by its inode and times, surely what was read last?"""
        seen = self.seen.get(key)
        if seen is None or seen.signature is None:
            return False
        try:
            return _signature(os.stat(self.path(key))) == seen.signature
        except OSError:
            return False

    def read(self, key: str) -> Manifest | None:
        """What a file says now, None if its content is what was read last."""
        before = self.seen.get(key)
        try:
            data, signature = _read(self.path(key))
        except OSError as error:
            reason = "is a link that leads nowhere" if error.errno == errno.ENOENT else f"{error.strerror}"
            self.seen[key] = Seen(None, None)
            return broken(f"cannot be read: {reason}; what it last said stays in force")
        digest = hashlib.blake2b(data, digest_size=16).digest()
        self.seen[key] = Seen(signature, digest)
        if before is not None and before.digest == digest:
            return None
        return parse(data) if len(data) < LARGE_BYTES else self._parse_aside(data)

    def _parse_aside(self, data: bytes) -> Manifest | None:
        """Parse on another thread, which is left behind when the source is stopped meanwhile (then None)."""
        future: Future[Manifest] = Future()

        def run() -> None:
            try:
                future.set_result(parse(data))
            except Exception as error:  # noqa: BLE001 - it is raised again where the result is asked for
                future.set_exception(error)

        threading.Thread(target=run, name="parse", daemon=True).start()
        while not self._stopped.is_set():
            try:
                return future.result(timeout=0.1)
            except TimeoutError:
                continue
        return None


def _read(path: str) -> tuple[bytes, tuple[int, ...] | None]:
    """Content and signature of a regular file.  Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        if status.st_size > MAX_BYTES:
            raise OSError(errno.EFBIG, f"has {status.st_size} bytes; at most {MAX_BYTES} are read")
        data = file.read(MAX_BYTES)
    racy = abs(time.time_ns() - status.st_mtime_ns) < _RACY_NS
    return data, None if racy else _signature(status)


def _signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
