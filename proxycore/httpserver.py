"""A small HTTP server for health checks and metrics: many listeners, one thread, tight limits.

It is reachable from outside the node, so no client may cost much memory or time: a request's head is limited to
`HEADER_BYTES`, an idle connection is closed, bodies are not understood.  Connections are limited too, and then it is
not the newcomer who has to go but the one who has been idle longest: otherwise whoever holds connections without saying
anything would shut out the load balancers.
It sits on bare sockets since asyncio's streams lose a connection that comes while their server closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
from collections.abc import Awaitable, Callable, Collection, Coroutine
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from . import logs

HEADER_BYTES = 8192
SILENT_SECONDS = 3.0
"""How long a client may take to its first byte."""
IDLE_SECONDS = 10.0
"""How long a request's head may take, and how long a client may wait before its next request."""
WRITE_SECONDS = 5.0
ANSWER_SECONDS = 30.0
"""How long a responder that is waited for may take."""
CONNECTIONS = 128
"""To one listener."""
ALL_CONNECTIONS = 512
"""To all listeners: the process needs its file descriptors for other things."""
DRAINED_BYTES = 65536
ACCEPT_PAUSE_SECONDS = 1.0
_BACKLOG = 128

T = TypeVar("T")


EVERYWHERE = "*"
"""The host that stands for every address of both families."""


class Request(NamedTuple):
    """What was asked: method, path and query as they were sent, still percent-encoded; the query without its `?`."""

    method: str
    path: str
    query: str
    keep: bool
    """The connection may go on afterwards."""


class Answer(NamedTuple):
    """What a listener says to one request.  Header names and values must be free of control characters."""

    status: HTTPStatus
    headers: tuple[tuple[str, str], ...]
    body: bytes


class Address(NamedTuple):
    """Where to listen: `0.0.0.0` and `::` mean every address of that family alone, `*` those of both."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Responder = Callable[[Request], Answer | Awaitable[Answer]]
"""Called on the server's thread, must not block; what takes longer is handed back to be waited for."""


class HTTPServer:
    """Listeners by address, served by a thread of its own in the network namespace of the one who makes it.

    `name` is the thread's.
    """

    def __init__(self, name: str) -> None:
        self._log = logs.get(name)
        self._told: set[str] = set()
        self._listeners: dict[Address, socket.socket] = {}
        self._responders: dict[Address, Responder] = {}
        self._conversations: dict[asyncio.Task[None], Address] = {}
        # Those of each listener that were not told to end, the longest idle first.
        self._idle: dict[Address, dict[asyncio.Task[None], None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def listening(self) -> frozenset[Address]:
        """Addresses with an open listener."""
        return frozenset(self._listeners)

    def serve(self, wanted: dict[Address, Responder]) -> dict[Address, OSError]:
        """Listen at exactly these addresses; a listener that stays keeps its connections.

        Returns the addresses where it is not possible, with the reason.  A listener that stays gets its new responder.
        """
        return self._call(self._serve(wanted))

    def close(self) -> None:
        """Close everything and end the thread; doing it twice does no harm."""
        if self._loop.is_closed():
            return
        self._call(self._serve({}))
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
            if address not in self._listeners:
                try:
                    self._listeners[address] = _listener(address)
                    self._idle[address] = {}
                except OSError as error:
                    refused[address] = error
                    continue
                self._admit(address)
        return refused

    async def _shut(self, addresses: Collection[Address]) -> None:
        for address in addresses:
            listener = self._listeners.pop(address)
            del self._idle[address]
            self._loop.remove_reader(listener)
            listener.close()
        ending = [task for task, address in self._conversations.items() if address in addresses]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    def _admit(self, address: Address) -> None:
        if address in self._listeners:
            self._loop.add_reader(self._listeners[address], self._accept, address)

    def _accept(self, address: Address) -> None:
        listener = self._listeners[address]
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:
            # Out of file descriptors or memory; the listener stays readable, so it would be asked at once again.
            self._loop.remove_reader(listener)
            self._loop.call_later(ACCEPT_PAUSE_SECONDS, self._admit, address)
            return
        self._make_room(address)
        connection.setblocking(False)
        task = self._loop.create_task(self._converse(address, connection))
        self._conversations[task] = address
        self._idle[address][task] = None

        def over(task: asyncio.Task[None]) -> None:
            # Here and not in the task: one that is cancelled before its first step never runs.
            connection.close()
            del self._conversations[task]
            self._idle.get(address, {}).pop(task, None)

        task.add_done_callback(over)

    def _make_room(self, address: Address) -> None:
        """End what has been idle longest, of this listener if that is full, of the one with the most if all together are."""
        crowd = self._idle[address]
        if len(crowd) < CONNECTIONS:
            if sum(map(len, self._idle.values())) < ALL_CONNECTIONS:
                return
            crowd = max(self._idle.values(), key=len)
        task = next(iter(crowd))
        del crowd[task]
        task.cancel()

    async def _converse(self, address: Address, connection: socket.socket) -> None:
        task = asyncio.current_task()
        assert task is not None
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(SILENT_SECONDS):
                buffer = bytearray(await self._loop.sock_recv(connection, 4096))
            if not buffer:
                return
            while True:
                async with asyncio.timeout(IDLE_SECONDS):
                    head = await self._read_head(connection, buffer)
                if head is None:
                    return
                crowd = self._idle[address]
                # Only whole requests count: one that trickles in is idle.
                if crowd.pop(task, task) is None:
                    crowd[task] = None
                keep, reply = await self._reply_to(address, head)
                async with asyncio.timeout(WRITE_SECONDS):
                    await self._loop.sock_sendall(connection, reply)
                    if not keep:
                        await self._part(connection)
                        return

    async def _read_head(self, connection: socket.socket, buffer: bytearray) -> bytes | None:
        """A request up to its empty line, taken out of `buffer`, or all there is of one too long; None: no more."""
        while (end := buffer.find(b"\r\n\r\n")) < 0 and len(buffer) <= HEADER_BYTES:
            data = await self._loop.sock_recv(connection, 4096)
            if not data:
                return None
            buffer += data
        length = end + 4 if end >= 0 else len(buffer)
        head = bytes(buffer[:length])
        del buffer[:length]
        return head

    async def _part(self, connection: socket.socket) -> None:
        """Close in order: what we did not read would make the kernel reset the connection and lose our answer."""
        connection.shutdown(socket.SHUT_WR)
        left = DRAINED_BYTES
        while left > 0 and (data := await self._loop.sock_recv(connection, 4096)):
            left -= len(data)

    async def _reply_to(self, address: Address, head: bytes) -> tuple[bool, bytes]:
        """May the connection go on after this, and the bytes of the answer to one request."""
        if len(head) > HEADER_BYTES:
            return False, _reply(plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE), keep=False)
        request = _parse(head)
        if request is None:
            return False, _reply(plain(HTTPStatus.BAD_REQUEST), keep=False)
        keep = request.keep and request.method in ("GET", "HEAD")
        return keep, _reply(
            await self._ask(self._responders[address], request), keep=keep, head_only=request.method == "HEAD"
        )

    async def _ask(self, responder: Responder, request: Request) -> Answer:
        try:
            answer = responder(request)
            if isinstance(answer, Answer):
                return answer
            async with asyncio.timeout(ANSWER_SECONDS):
                return await answer
        except TimeoutError:
            return plain(HTTPStatus.SERVICE_UNAVAILABLE, f"no answer within {ANSWER_SECONDS:g} s")
        except Exception as error:  # noqa: BLE001  a bug behind one path must not cost the connection, or the server
            why = f"{type(error).__name__}: {error}"
            if why not in self._told and len(self._told) < 100:
                self._told.add(why)
                self._log.exception("a request failed by a bug", error)
            return plain(HTTPStatus.INTERNAL_SERVER_ERROR)


def _parse(head: bytes) -> Request | None:
    """A request without its other headers; None: it is not HTTP/1."""
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
    target = words[1].decode("latin-1")
    if not target.startswith("/"):
        # The form for proxies, `http://host/path`; or `*`, which leads nowhere.
        try:
            parts = urlsplit(target)
        except ValueError:
            return None
        return Request(words[0].decode("ascii"), parts.path or "/", parts.query, keep)
    path, _, query = target.partition("?")
    return Request(words[0].decode("ascii"), path, query, keep)


def plain(status: HTTPStatus, text: str = "") -> Answer:
    """A line of text, the status by its name if none is given."""
    body = f"{text or status.phrase}\n".encode()
    return Answer(
        status,
        (("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff")),
        body,
    )


def _reply(answer: Answer, *, keep: bool, head_only: bool = False) -> bytes:
    status = answer.status
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    lines += (f"{name}: {value}" for name, value in answer.headers)
    lines.append(f"Date: {formatdate(usegmt=True)}")
    lines.append(f"Content-Length: {len(answer.body)}")
    if not keep:
        lines.append("Connection: close")
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    return head if head_only else head + answer.body


def _listener(address: Address) -> socket.socket:
    if address.host != EVERYWHERE:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        return _open(family, address.host, address.port)
    try:
        return _open(socket.AF_INET6, "::", address.port, both=True)
    except OSError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
        # This kernel has no IPv6.
        return _open(socket.AF_INET, "0.0.0.0", address.port)


def _open(family: socket.AddressFamily, host: str, port: int, *, both: bool = False) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
