"""What runs in the demo's pods: servers that say which pod they are and whom they see as their client."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Iterable
from typing import Self

from .lab import Lab, family
from .manifests import Pod

BACKLOG = 128


class Answerers:
    """All servers of all pods on one thread: a socket stays in the namespace that it was made in.

    TCP: each line is answered by one line `POD PEER-ADDRESS`, as often as the client asks.  UDP: the same for each datagram.
    """

    def __init__(self, lab: Lab, pods: Iterable[Pod]) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake, waker = socket.socketpair()
        self._selector.register(waker, selectors.EVENT_READ, None)
        self._waker = waker
        for pod in pods:
            for protocol, port in pod.ports:
                for address in lab.addresses(pod):
                    kind = socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM
                    server = lab.place(pod.name).socket(family(address), kind)
                    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    server.bind((address, port))
                    if kind == socket.SOCK_STREAM:
                        server.listen(BACKLOG)
                    server.setblocking(False)
                    self._selector.register(server, selectors.EVENT_READ, pod.name)
        self._thread = threading.Thread(target=self._serve, name="answerers", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wake.send(b"x")
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        self._wake.close()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                ready = key.fileobj
                assert isinstance(ready, socket.socket)
                if ready is self._waker:
                    return
                try:
                    self._answer(ready, key.data)
                except OSError:  # the client is gone
                    if ready.type == socket.SOCK_STREAM and not _listens(ready):
                        self._drop(ready)

    def _answer(self, ready: socket.socket, pod_name: str) -> None:
        if ready.type == socket.SOCK_DGRAM:
            _, peer = ready.recvfrom(512)
            ready.sendto(f"{pod_name} {peer[0]}\n".encode(), peer)
        elif _listens(ready):
            connection, _ = ready.accept()
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, pod_name)
        elif asked := ready.recv(512):
            answer = f"{pod_name} {ready.getpeername()[0]}\n".encode()
            ready.sendall(answer * asked.count(b"\n"))
        else:
            self._drop(ready)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()


def _listens(server: socket.socket) -> bool:
    return bool(server.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
