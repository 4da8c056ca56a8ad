"""One proxy in a network namespace: two would undo each other's work without noticing.

The sign is an abstract Unix socket: its name belongs to the network namespace, needs no file, and goes with the process
however that ends.  Anybody may take such a name, so only a holder of our own user id counts.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import NamedTuple

from ..errors import KernelError

NAME = "\0proxycore/run"
WAIT_SECONDS = 10.0
"""So long a successor waits for its predecessor to end."""
_PAUSE_SECONDS = 0.1
_PEER = struct.Struct("iII")


class Holder(NamedTuple):
    """The process that holds the name; `pid` is 0 when it is in a process namespace that we cannot see."""

    pid: int
    uid: int


def claim(wait_seconds: float = WAIT_SECONDS) -> socket.socket | None:
    """Take the name for this process, until let_go().

    None: somebody of another user id has it, which is no proxy of ours.  Raises KernelError: another proxy runs here, and has
    not ended within `wait_seconds`; nothing was touched.
    """
    sign = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    end = time.monotonic() + wait_seconds
    while True:
        try:
            sign.bind(NAME)
        except OSError:
            found = holder()
            if found is not None and found.uid != os.geteuid():
                sign.close()
                return None
            if time.monotonic() >= end:
                sign.close()
                who = f" (pid {found.pid})" if found and found.pid else ""
                raise KernelError(
                    f"another proxyctl run{who} is at work in this network namespace: stop it first, two would undo "
                    "each other's work"
                ) from None
            time.sleep(_PAUSE_SECONDS)
        else:
            sign.listen(16)
            threading.Thread(target=_greet, args=(sign,), name="presence", daemon=True).start()
            return sign


def _greet(sign: socket.socket) -> None:
    """Take visitors off the queue, until the sign is closed; they only want to know who we are."""
    while True:
        try:
            visitor, _ = sign.accept()
        except OSError:
            return
        visitor.close()


def let_go(sign: socket.socket) -> None:
    """Give the name back."""
    # A thread in accept() keeps the socket alive past close().
    with suppress(OSError):
        sign.shutdown(socket.SHUT_RDWR)
    sign.close()


def holder() -> Holder | None:
    """Who holds the name; None when nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as visitor:
        visitor.settimeout(1.0)
        try:
            visitor.connect(NAME)
            raw = visitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        except OSError:
            return None
    pid, uid, _ = _PEER.unpack(raw)
    return Holder(pid, uid)
