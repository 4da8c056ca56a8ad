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
ANSWER_SECONDS = 1.0
"""So long a holder may take to answer."""
_PAUSE_SECONDS = 0.1
_LOOK_AGAIN_SECONDS = 0.005
_PEER = struct.Struct("iII")
_greeters: dict[socket.socket, threading.Thread] = {}
"""The thread that answers visitors, by sign."""


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
            sign.listen(128)
            greeter = threading.Thread(target=_greet, args=(sign,), name="presence", daemon=True)
            _greeters[sign] = greeter
            greeter.start()
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
    # A thread in accept() keeps the socket alive past close(), until it has noticed.
    with suppress(OSError):
        sign.shutdown(socket.SHUT_RDWR)
    sign.close()
    greeter = _greeters.pop(sign, None)
    if greeter is not None:
        greeter.join(ANSWER_SECONDS)


def holder() -> Holder | None:
    """Who holds the name; None when nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as visitor:
        visitor.settimeout(ANSWER_SECONDS)
        end = time.monotonic() + ANSWER_SECONDS
        while True:
            try:
                visitor.connect(NAME)
                raw = visitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            except BlockingIOError:
                # The kernel does not let one wait in a full queue: it is held, and its holder is busy.
                if time.monotonic() >= end:
                    return None
                time.sleep(_LOOK_AGAIN_SECONDS)
            except OSError:
                return None
            else:
                break
    pid, uid, _ = _PEER.unpack(raw)
    return Holder(pid, uid)
