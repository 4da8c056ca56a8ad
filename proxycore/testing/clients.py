"""Clients that dial without a pause while something happens to the proxy: who answered, and what failed."""

from __future__ import annotations

import errno
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .lab import CLIENT_ADDRESSES, ClientKind, Lab

CONNECT_SECONDS = 0.9
"""Less than it takes TCP to send its SYN again: one that got lost is a failure."""
PATIENCE_SECONDS = 30.0

# No TIME_WAIT: thousands of them would be left behind.
_RESET = b"\1\0\0\0\0\0\0\0"


class Call(NamedTuple):
    """Who dials what, over TCP."""

    kind: ClientKind
    source: str
    address: str
    port: int = 80


def pod_call(address: str, port: int = 80) -> Call:
    """By a pod of the node."""
    return Call("pod", CLIENT_ADDRESSES["pod"][":" in address], address, port)


def connected(lab: Lab, call: Call, seconds: float = CONNECT_SECONDS) -> socket.socket:
    """A connection.  Raises OSError when there is none after `seconds`."""
    made = lab.client(call.kind, "tcp", call.source)
    made.settimeout(seconds)
    try:
        made.connect((call.address, call.port))
    except BaseException:
        made.close()
        raise
    return made


def who(made: socket.socket) -> str:
    """Who answers on a connection, as `ip:port`.  Raises OSError or ValueError when nobody does."""
    made.sendall(b"who?\n")
    return str(json.loads(made.recv(4096))["at"])


def ask(lab: Lab, call: Call, seconds: float = CONNECT_SECONDS) -> str:
    """Connect, and ask who answers.  Raises OSError or ValueError when nobody does."""
    try:
        opened = connected(lab, call, seconds)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        # The port belongs to a connection of the client's own that is still open; nothing was sent.
        opened = connected(lab, call, seconds)
    with opened as made:
        answer = who(made)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    return answer


class Clients:
    """Dials everything in turn until the end of the block, and keeps who answered and what went wrong.

    `answers` by call; `failures` a line each.
    """

    def __init__(self, lab: Lab, calls: Sequence[Call]) -> None:
        self._lab, self._calls = lab, calls
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="clients", daemon=True)
        self.answers: dict[Call, Counter[str]] = {call: Counter() for call in calls}
        self.failures: list[str] = []

    def __enter__(self) -> Clients:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.is_set():
            for call in self._calls:
                try:
                    self.answers[call][ask(self._lab, call)] += 1
                except (OSError, ValueError) as error:
                    self.failures.append(f"{call}: {error!r}")

    def total(self) -> int:
        """How many calls were answered."""
        return sum(counts.total() for counts in self.answers.values())

    def rounds(self) -> int:
        """How often every call was answered."""
        return min(counts.total() for counts in self.answers.values())

    def wait_for_more(self, rounds: int = 5) -> None:
        """Every call was answered so many times more, or something failed."""
        wanted = self.rounds() + rounds
        wait_until(lambda: self.rounds() >= wanted or bool(self.failures))


def wait_until(true: Callable[[], object], what: Callable[[], str] = lambda: "") -> None:
    """Raises AssertionError with the text of `what` when it is not true after PATIENCE_SECONDS."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(what())
        time.sleep(0.005)
