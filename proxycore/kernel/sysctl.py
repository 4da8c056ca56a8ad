"""Knobs of the host: files with one number each, below /proc and /sys.

`/proc/sys/net` shows the network namespace of the thread that opens it.  What the kernel keeps once for the whole machine
is read-only in any namespace but the first, also for root.
"""

from __future__ import annotations

import errno as errnos
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ..hostplan import Setting

Cause = Literal["namespace", "denied", "missing", "refused"]


class Written(NamedTuple):
    """A knob that was changed, and the number that it had."""

    setting: Setting
    before: int


class Left(NamedTuple):
    """A knob that could not be set, why, and as what kind of reason it counts.

    `namespace`: nobody may write it in this network namespace; `denied`: we may not; `missing`: there is no such file;
    `refused`: the kernel does not take that number.
    """

    setting: Setting
    cause: Cause
    why: str


class Outcome(NamedTuple):
    """What apply() did; knobs that held the number already, or follow one that could not be set, are in neither list."""

    written: tuple[Written, ...] = ()
    left: tuple[Left, ...] = ()


def online_cpus() -> int:
    """CPUs that are switched on, whether this process may run on them or not."""
    return max(os.sysconf("SC_NPROCESSORS_ONLN"), 1)


def apply(settings: Sequence[Setting], root: Path = Path("/")) -> Outcome:
    """Write each knob that differs; one that cannot be written does not keep the others from it.  Raises nothing.

    `root`: where /proc and /sys are, for tests.
    """
    written: list[Written] = []
    left: list[Left] = []
    for setting in settings:
        if any(done.setting.path == setting.follows for done in left):
            continue
        done = _set(setting, root / setting.path.lstrip("/"))
        if isinstance(done, Left):
            left.append(done)
        elif done is not None:
            written.append(done)
    return Outcome(tuple(written), tuple(left))


def differs(setting: Setting, root: Path = Path("/")) -> bool:
    """Is there such a knob, and would apply() try to change it?"""
    try:
        before = int((root / setting.path.lstrip("/")).read_text())
    except (OSError, ValueError):
        return False
    return before != setting.value and not (setting.only_raise and before > setting.value)


def _set(setting: Setting, path: Path) -> Written | Left | None:
    try:
        before = int(path.read_text())
        if before == setting.value or (setting.only_raise and before > setting.value):
            return None
        # Not by truncating and buffering: the kernel answers to the write itself.
        with path.open("r+b", buffering=0) as knob:
            knob.write(b"%d\n" % setting.value)
    except ValueError:
        return Left(setting, "refused", "its file holds no number")
    except OSError as error:
        return Left(setting, _cause(error, path), error.strerror or str(error))
    return Written(setting, before)


def _cause(error: OSError, path: Path) -> Cause:
    if error.errno in (errnos.ENOENT, errnos.ENOTDIR):
        return "missing"
    # The kernel's word for a parameter that only the first namespace may change.
    if error.errno == errnos.EOPNOTSUPP:
        return "namespace"
    if error.errno in (errnos.EACCES, errnos.EPERM, errnos.EROFS):
        # A mounted file system that is read-only leaves the mode as it is; only a namespace takes the bits away.
        return "namespace" if not _has_write_bit(path) else "denied"
    return "refused"


def _has_write_bit(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & 0o222)
    except OSError:
        return True
