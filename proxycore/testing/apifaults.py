"""Misbehaviour that the fake API server shows on demand."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Literal

Verb = Literal["list", "watch", "create"]


class Ended(Exception):
    """The connection is over."""


class Fault:
    """What goes wrong with the next `times` requests that it fits; None: with all until `over()`.

    `resource` is the plural; None, as for `verb`: any.  `page`: only requests with (True), or without, a continue token.
    `status`: answer so, with `message`, `retry_after` in seconds, and `body` in place of the usual Status.
    `gone`: a watch begins with an ERROR event of code 410; a list is answered with 410.
    `cut`: the connection ends after so many bytes of the body, by a reset if `reset`.
    `hang`: nothing more is sent, before the headers, or after `after` bytes of the body, until `over()`.
    `dribble`: the body comes in pieces of so many bytes.  `chunk`: a list is cut into chunks of so many bytes.
    `pretty`: a list with white space between its parts.  `body`: sent in place of the list's own.
    """

    def __init__(
        self,
        resource: str | None = None,
        verb: Verb | None = None,
        *,
        times: int | None = 1,
        page: bool | None = None,
        status: int | None = None,
        message: str = "made to fail",
        retry_after: float | None = None,
        gone: bool = False,
        cut: int | None = None,
        reset: bool = False,
        hang: Literal["headers", "body"] | None = None,
        after: int = 0,
        dribble: int | None = None,
        chunk: int | None = None,
        pretty: bool = False,
        body: bytes | None = None,
        close: bool = False,
    ) -> None:
        self.resource = resource
        self.verb = verb
        self.times = times
        self.page = page
        self.status = status
        self.message = message
        self.retry_after = retry_after
        self.gone = gone
        self.cut = cut
        self.reset = reset
        self.hang = hang
        self.after = after
        self.dribble = dribble
        self.chunk = chunk
        self.pretty = pretty
        self.body = body
        self.close = close
        """The answer has no chunks and no length; it ends with the connection."""
        self.used = 0
        self._over = threading.Event()

    def fits(self, resource: str, verb: str, page: bool) -> bool:
        """Is it meant for such a request, and not used up?"""
        return (
            not self._over.is_set()
            and (self.times is None or self.used < self.times)
            and self.resource in (None, resource)
            and self.verb in (None, verb)
            and self.page in (None, page)
        )

    def over(self) -> None:
        """End the fault; who hangs on it goes on."""
        self._over.set()

    def wait(self, ended: Callable[[], bool]) -> None:
        """Hang until the fault is over.  Raises Ended: the connection is over before."""
        while not self._over.wait(0.02):
            if ended():
                raise Ended


NO_FAULT = Fault()


class Body:
    """Sends the body of an answer, as its fault has it."""

    def __init__(self, connection: socket.socket, fault: Fault, ended: Callable[[], bool]) -> None:
        self._connection = connection
        self._fault = fault
        self._ended = ended
        self._sent = 0

    def send(self, data: bytes) -> None:
        """Raises Ended: the connection is over, perhaps with a part of this sent."""
        fault = self._fault
        if fault.cut is not None and self._sent + len(data) >= fault.cut:
            self._pieces(data[: fault.cut - self._sent])
            if fault.reset:
                reset(self._connection)
            raise Ended
        if fault.hang == "body" and self._sent + len(data) > fault.after:
            first = max(0, fault.after - self._sent)
            self._pieces(data[:first])
            fault.wait(self._ended)
            data = data[first:]
        self._pieces(data)

    def chunk(self, data: bytes) -> None:
        """One chunk of a chunked body; an empty one ends it."""
        if self._fault.close:
            self.send(data)
        else:
            self.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _pieces(self, data: bytes) -> None:
        size = self._fault.dribble or len(data) or 1
        try:
            for start in range(0, len(data), size):
                self._connection.sendall(data[start : start + size])
        except (OSError, ValueError) as error:
            raise Ended from error
        self._sent += len(data)


def reset(connection: socket.socket) -> None:
    """Make the connection end by a reset when it is closed."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
