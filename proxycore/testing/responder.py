"""Endpoints of the lab: servers that tell where they were reached and which peer they saw.

One thread answers for all namespaces: a socket keeps the namespace that it was made in.  Every server listens on the
wildcard address, so that an address need not be configured to answer, only routed there.

Over TCP each line gets one line back; a line that begins an HTTP request gets an HTTP response, so that curl works
too.  Over UDP each datagram gets one, from the address it was sent to.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .netns import Namespace

IP_PKTINFO = 8
IP_FREEBIND = 15
IPV6_FREEBIND = 78
BACKLOG = 1024
MAX_LINE = 4096


def join_host_port(address: str, port: int) -> str:
    """`10.0.0.1:80`, `[fd00::1]:80`."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@dataclass(frozen=True, slots=True)
class Listener:
    """One wildcard (or `address`) socket: the key by which it is opened once and closed again."""

    namespace: Namespace
    who: str
    port: int
    family: int
    kind: int
    address: str


class Responder:
    """A thread with any number of listeners.  close() ends it and every connection."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._listeners: dict[Listener, socket.socket] = {}
        self._closing = False
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._woken)
        self._thread = threading.Thread(target=self._serve, name="responder", daemon=True)
        self._thread.start()

    def listen(
        self, namespace: Namespace, who: str, ports: Iterable[int], addresses: Iterable[str] = ("",)
    ) -> None:
        """Answer as `who` on these TCP and UDP ports, of every address or of those given.

        Ports that this namespace listened on before and are not named any more are closed.  Raises OSError: a port is
        taken, or a given address is not local.
        """
        wanted = {
            Listener(namespace, who, port, family, kind, address)
            for port in ports
            for address in addresses
            for family in (socket.AF_INET, socket.AF_INET6)
            if not address or (family == socket.AF_INET6) == (":" in address)
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        }
        with self._lock:
            have = {listener for listener in self._listeners if listener.namespace is namespace}
        for listener in have - wanted:
            self._forget(listener)

        def open_all() -> None:
            for listener in wanted - have:
                self._open(listener)

        namespace.call(open_all)

    def _open(self, listener: Listener) -> None:
        made = socket.socket(listener.family, listener.kind)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if listener.family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                made.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
            else:
                made.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
            made.setblocking(False)
            if listener.kind == socket.SOCK_DGRAM:
                _ask_for_destination(made)
            made.bind((listener.address, listener.port))
            if listener.kind == socket.SOCK_STREAM:
                made.listen(BACKLOG)
        except BaseException:
            made.close()
            raise
        serve = self._accept if listener.kind == socket.SOCK_STREAM else self._answer_datagrams
        with self._lock:
            self._listeners[listener] = made
            self._selector.register(made, selectors.EVENT_READ, lambda: serve(made, listener.who))

    def _forget(self, listener: Listener) -> None:
        with self._lock:
            gone = self._listeners.pop(listener)
            self._selector.unregister(gone)
            gone.close()

    def close(self) -> None:
        """End the thread; close listeners and connections."""
        self._closing = True
        self._wake_writer.send(b"x")
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()
        self._wake_writer.close()
        self._listeners.clear()

    def _woken(self) -> None:
        self._wake_reader.recv(64)

    def _serve(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select():
                serve: Callable[[], None] = key.data
                # A listener may have been closed since select() returned.
                with self._lock, contextlib.suppress(OSError):
                    serve()

    def _accept(self, listening: socket.socket, who: str) -> None:
        for _ in range(BACKLOG):
            try:
                connection, peer = listening.accept()
            except BlockingIOError:
                return
            connection.setblocking(False)
            local = connection.getsockname()
            answer = _answer(who, "tcp", local[0], local[1], peer[0], peer[1])
            self._selector.register(
                connection, selectors.EVENT_READ, lambda c=connection, a=answer: self._answer_lines(c, a)
            )

    def _answer_lines(self, connection: socket.socket, answer: bytes) -> None:
        try:
            data = connection.recv(MAX_LINE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data.startswith(b"GET "):
            head = (
                f"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(answer)}\r\n\r\n"
            )
            with contextlib.suppress(OSError):
                connection.send(head.encode() + answer)
            data = b""
        lines = data.count(b"\n")
        if lines:
            with contextlib.suppress(OSError):
                connection.send(answer * lines)
        if not data:
            self._selector.unregister(connection)
            connection.close()

    def _answer_datagrams(self, receiving: socket.socket, who: str) -> None:
        for _ in range(BACKLOG):
            try:
                _, control, _, peer = receiving.recvmsg(MAX_LINE, 128)
            except BlockingIOError:
                return
            except OSError:
                continue  # An ICMP error for an earlier answer.
            local, reply_from = _destination(control)
            answer = _answer(who, "udp", local, receiving.getsockname()[1], peer[0], peer[1])
            with contextlib.suppress(OSError):
                receiving.sendmsg([answer], [reply_from], 0, peer)


def _answer(who: str, proto: str, address: str, port: int, peer: str, peer_port: int) -> bytes:
    told = {
        "by": who,
        "proto": proto,
        "at": join_host_port(address, port),
        "peer": join_host_port(peer, peer_port),
    }
    return json.dumps(told).encode() + b"\n"


def _ask_for_destination(receiving: socket.socket) -> None:
    if receiving.family == socket.AF_INET6:
        receiving.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        receiving.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def _destination(control: list[tuple[int, int, bytes]]) -> tuple[str, tuple[int, int, bytes]]:
    """Where a datagram was sent to, and the control message that sends the answer from there."""
    for level, kind, data in control:
        if level == socket.IPPROTO_IP and kind == IP_PKTINFO:
            address = data[8:12]
            return socket.inet_ntop(socket.AF_INET, address), (
                level,
                kind,
                struct.pack("=I4s4s", 0, address, address),
            )
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            address = data[:16]
            return socket.inet_ntop(socket.AF_INET6, address), (level, kind, struct.pack("=16sI", address, 0))
    raise OSError("the kernel did not say where a datagram was sent to")
