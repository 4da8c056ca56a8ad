"""A small HTTP server for health checks: many listeners, one thread, tight limits.

It is reachable from outside the node, so a client can hold neither memory nor time: requests are cut at
`HEADER_BYTES`, a connection is closed when idle, when the cap is reached the newcomer is turned away, bodies are not
read.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar

HEADER_BYTES = 8192
IDLE_SECONDS = 10.0
WRITE_SECONDS = 5.0
CONNECTIONS = 256
_BACKLOG = 128

T = TypeVar("T")


class Answer(NamedTuple):
    """What a listener says to any path.  Header names and values must be free of control characters."""

    status: HTTPStatus
    headers: tuple[tuple[str, str], ...]
    body: bytes


class Address(NamedTuple):
    """Where to listen: `0.0.0.0` and `::` mean every address of that family alone."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Responder = Callable[[], Answer]


class HealthServer:
    """Listeners by address, served by a thread of its own in the network namespace of the one who makes it."""

    def __init__(self) -> None:
        self._listeners: dict[Address, asyncio.Server] = {}
        self._responders: dict[Address, Responder] = {}
        self._connections: dict[Address, set[asyncio.StreamWriter]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="health-server", daemon=True)
        self._thread.start()

    def listening(self) -> frozenset[Address]:
        """Addresses with an open listener."""
        return frozenset(self._listeners)

    def serve(self, wanted: dict[Address, Responder]) -> dict[Address, OSError]:
        """Listen at exactly these addresses; a listener that stays keeps its connections.

        Returns the addresses where it is not possible, with the reason.  Responders are called on the server's
        thread for each request and must not block.
        """
        return self._call(self._serve(wanted))

    def close(self) -> None:
        """Close everything and end the thread; doing it twice does no harm."""
        if self._loop.is_closed():
            return
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        if not self._thread.is_alive():
            self._loop.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _serve(self, wanted: dict[Address, Responder]) -> dict[Address, OSError]:
        # Close first: a port may move to another Service or from one address to all of them.
        await self._shut([address for address in self._listeners if address not in wanted])
        self._responders = dict(wanted)
        refused: dict[Address, OSError] = {}
        for address in wanted:
            if address in self._listeners:
                continue
            try:
                await self._open(address)
            except OSError as error:
                refused[address] = error
        return refused

    async def _end(self) -> None:
        await self._shut(list(self._listeners))
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _open(self, address: Address) -> None:
        listener = _listener(address)

        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._converse(address, reader, writer)

        try:
            self._listeners[address] = await asyncio.start_server(
                accepted, sock=listener, limit=HEADER_BYTES, backlog=_BACKLOG
            )
        except BaseException:
            listener.close()
            raise

    async def _shut(self, addresses: Iterable[Address]) -> None:
        for address in addresses:
            self._listeners.pop(address).close()
            for writer in self._connections.pop(address, set()):
                writer.transport.abort()

    async def _converse(
        self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if sum(map(len, self._connections.values())) >= CONNECTIONS or address not in self._listeners:
            writer.transport.abort()
            return
        own = self._connections.setdefault(address, set())
        own.add(writer)
        try:
            while await self._exchange(address, reader, writer):
                pass
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass
        finally:
            own.discard(writer)
            with contextlib.suppress(OSError):
                writer.close()

    async def _exchange(
        self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer one request; False: that was the last one of this connection."""
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            await _reply(writer, _plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE), keep=False)
            return False
        request = _parse(head)
        if request is None:
            await _reply(writer, _plain(HTTPStatus.BAD_REQUEST), keep=False)
            return False
        responder = self._responders.get(address)
        if responder is None:
            return False
        keep = request.keep and request.method in ("GET", "HEAD")
        await _reply(writer, responder(), keep=keep, head_only=request.method == "HEAD")
        return keep


class _Request(NamedTuple):
    method: str
    keep: bool


def _parse(head: bytes) -> _Request | None:
    """The parts of a request that matter here; None: it is not HTTP/1."""
    first, *lines = head[:-4].split(b"\r\n")
    words = first.split(b" ")
    if (
        len(words) != 3
        or words[2] not in (b"HTTP/1.0", b"HTTP/1.1")
        or not words[0].isalpha()
        or not words[1]
    ):
        return None
    keep = words[2] == b"HTTP/1.1"
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or name != name.strip():
            return None
        match name.lower(), value.strip().lower():
            case b"connection", b"close":
                keep = False
            case b"transfer-encoding", _:
                keep = False
            case b"content-length", length if length != b"0":
                # The body stays unread, so what follows could not be told from it.
                keep = False
    return _Request(words[0].decode("ascii"), keep)


def _plain(status: HTTPStatus) -> Answer:
    return Answer(status, (("Content-Type", "text/plain; charset=utf-8"),), f"{status.phrase}\n".encode())


async def _reply(
    writer: asyncio.StreamWriter, answer: Answer, *, keep: bool, head_only: bool = False
) -> None:
    status = answer.status
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    lines += (f"{name}: {value}" for name, value in answer.headers)
    lines.append(f"Date: {formatdate(usegmt=True)}")
    lines.append(f"Content-Length: {len(answer.body)}")
    if not keep:
        lines.append("Connection: close")
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    writer.write(head if head_only else head + answer.body)
    async with asyncio.timeout(WRITE_SECONDS):
        await writer.drain()


def _listener(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address.host, address.port))
    except BaseException:
        listener.close()
        raise
    return listener
