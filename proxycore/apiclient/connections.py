"""Connections that another thread can end at any moment: while they are made, while they wait, while they are read.

urllib3 closes a connection only between reads, so that whoever waits for a byte waits on.  Here a second descriptor of each
socket is kept, and shutting that down wakes the reader.
"""

from __future__ import annotations

import os
import socket
import threading
import weakref
from contextlib import suppress
from typing import Any, ClassVar

from urllib3 import PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError


class Handles:
    """The sockets of one client's connections; `close()` ends them all, from any thread, and keeps new ones from being made."""

    def __init__(self) -> None:
        # A connection may be collected, and its descriptor closed, while this thread holds the lock.
        self._lock = threading.RLock()
        self._open: weakref.WeakKeyDictionary[HTTPConnection, weakref.finalize[[int], HTTPConnection]] = (
            weakref.WeakKeyDictionary()
        )
        self._descriptors: weakref.WeakKeyDictionary[HTTPConnection, int] = weakref.WeakKeyDictionary()
        self.closed = False

    def add(self, connection: HTTPConnection, made: socket.socket) -> None:
        """Note the socket of a connection, in place of an earlier one.  Raises OSError: all is closed."""
        with self._lock:
            self.drop(connection)
            if self.closed:
                raise OSError("the client is closed")
            descriptor = os.dup(made.fileno())
            self._descriptors[connection] = descriptor
            self._open[connection] = weakref.finalize(connection, os.close, descriptor)

    def drop(self, connection: HTTPConnection) -> None:
        """Forget a connection that is over."""
        with self._lock:
            finalize = self._open.pop(connection, None)
            self._descriptors.pop(connection, None)
            if finalize is not None:
                finalize()

    def close(self) -> None:
        """End every connection now."""
        with self._lock:
            self.closed = True
            # The list holds the connections, so that none of the descriptors is closed meanwhile.
            for _, descriptor in list(self._descriptors.items()):
                handle = socket.socket(fileno=descriptor)
                with suppress(OSError):
                    handle.shutdown(socket.SHUT_RDWR)
                handle.detach()


class _Noted(HTTPConnection):
    """What both kinds of connection share."""

    handles: ClassVar[Handles]
    _answering = False

    def _new_conn(self) -> socket.socket:
        """As urllib3's own, with the socket noted before it connects."""
        host = self.host.strip("[]")
        try:
            found = socket.getaddrinfo(host, self.port, 0, socket.SOCK_STREAM)
        except OSError as error:
            raise NameResolutionError(self.host, self, error) from error  # type: ignore[arg-type]
        problem: OSError = OSError("no address")
        for family, kind, protocol, _, address in found:
            made = socket.socket(family, kind, protocol)
            try:
                for option in self.socket_options or ():
                    made.setsockopt(*option)
                made.settimeout(self.timeout if isinstance(self.timeout, int | float) else None)
                self.handles.add(self, made)
                made.connect(address)
                if self.handles.closed:
                    raise OSError("the client is closed")
                return made
            except OSError as error:
                problem = error
                self.handles.drop(self)
                made.close()
        if isinstance(problem, TimeoutError):
            raise ConnectTimeoutError(self, f"no connection within {self.timeout} s") from problem
        raise NewConnectionError(self, str(problem)) from problem

    def getresponse(self) -> Any:
        self._answering = True
        try:
            return super().getresponse()
        finally:
            self._answering = False

    def close(self) -> None:
        super().close()
        # An answer that ends with its connection is read from the socket after the connection has been closed.
        if not self._answering:
            self.handles.drop(self)


class _NotedTLS(_Noted, HTTPSConnection):
    pass


def note(manager: PoolManager, handles: Handles) -> None:
    """Have every connection that the manager makes from now on noted in `handles`."""
    bound: dict[str, Any] = {"handles": handles}
    plain = type("NotedConnection", (_Noted,), bound)
    secure = type("NotedTLSConnection", (_NotedTLS,), bound)
    manager.pool_classes_by_scheme = {
        "http": type("NotedPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("NotedTLSPool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
    }
