"""A netlink socket that is replaced after an answer that did not come, or came in part."""

from __future__ import annotations

import errno as errnos
from collections.abc import Iterator
from contextlib import contextmanager

from proxycore.api import KernelError
from proxycore.kernel.netlink import Message, NetlinkSocket

ANSWER_SECONDS = 30.0


class Link:
    """A socket of the calling thread's network namespace.  Raises KernelError if there is none to be had."""

    def __init__(self, protocol: int) -> None:
        self._protocol = protocol
        self.socket = self._open()

    def _open(self) -> NetlinkSocket:
        return NetlinkSocket(
            self._protocol,
            receive_buffer_bytes=8 << 20,
            send_buffer_bytes=1 << 20,
            timeout_seconds=ANSWER_SECONDS,
        )

    def close(self) -> None:
        """Close; doing it twice does no harm."""
        self.socket.close()

    @contextmanager
    def during(self, doing: str) -> Iterator[NetlinkSocket]:
        """The socket, to send requests and read all their answers.

        If that is left by an error, answers may still come; so the next request has a socket of its own.  A time-out becomes a
        KernelError about what was being done.
        """
        try:
            yield self.socket
        except TimeoutError as error:
            self._replace()
            raise KernelError(
                f"cannot {doing}: the kernel does not answer", errno=errnos.ETIMEDOUT
            ) from error
        except BaseException:
            self._replace()
            raise

    def _replace(self) -> None:
        self.socket.close()
        self.socket = self._open()


def answers(socket: NetlinkSocket, seq: int) -> Iterator[Message]:
    """Messages with this sequence number, for as long as they are asked for; waits for each."""
    while True:
        for reply in socket.receive():
            if reply.seq == seq:
                yield reply
