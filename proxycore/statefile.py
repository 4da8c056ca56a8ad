"""The file of the last known good state: written whole or not at all, readable by its owner alone."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from .errors import SourceError
from .savedstate import COMPLETE_OFFSET, HEADER_BYTES, Header, Saved, check, check_owner, load, split

DEFAULT_PATH = "/var/lib/proxycore/state"
MAX_FILE_BYTES = 1 << 30
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def read(path: str) -> Saved | None:
    """What the file holds, None if there is none.

    Raises SourceError naming the file: it is damaged, none of ours, or another user's; it stays as it is.
    """
    data = _bytes(path)
    return None if data is None else load(data, path)


def read_header(path: str) -> Header | None:
    """The header of a file that is whole, None if there is none.  Raises SourceError as read() does."""
    data = _bytes(path)
    return None if data is None else check(data, path)[0]


def _bytes(path: str) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise SourceError(f"{path}: is not a regular file")
    with open(descriptor, "rb") as file:
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
            raise SourceError(
                f"{path}: others than its owner could have written it (uid {found.st_uid}, mode "
                f"{stat.S_IMODE(found.st_mode):04o}); it is not used"
            )
        if found.st_size > MAX_FILE_BYTES:
            raise SourceError(f"{path}: has {found.st_size} bytes, which no state of a node has")
        try:
            return file.read()
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}") from None


def write(path: str, data: bytes) -> None:
    """Replace the file; the old one stays until the new one is on the disk.

    Raises OSError: the old file is as it was.
    """
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, mode=0o700, exist_ok=True)
    temporary = f"{path}.new"
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    where = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(where)
    finally:
        os.close(where)


def mark_incomplete(path: str, node: str, origin: str) -> None:
    """Say in the file, if it is this node's, that changes have come since it was written.

    Raises OSError, but not where there is no file.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | _FLAGS)
    except FileNotFoundError:
        return
    try:
        header, _ = split(os.pread(descriptor, HEADER_BYTES, 0), path)
        check_owner(header, path, node, origin)
        if header.complete:
            os.pwrite(descriptor, b"0", COMPLETE_OFFSET)
    except SourceError:
        return
    finally:
        os.close(descriptor)


def can_be_marked(path: str) -> bool:
    """Could mark_incomplete() have written to it?  Where it could not, nobody knows what came after it."""
    try:
        os.close(os.open(path, os.O_WRONLY | _FLAGS))
    except OSError:
        return False
    return True


def set_aside(path: str) -> str:
    """Give a file that cannot be used another name, under which people can look at it; that name."""
    name = f"{path}.refused"
    os.rename(path, name)
    return name
