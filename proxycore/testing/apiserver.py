"""A fake Kubernetes API server, for tests, measurements and the demo: real sockets, and every misbehaviour on demand.

    with FakeAPIServer() as server:
        server.apply({"kind": "Service", "metadata": {"name": "web"}, "spec": {"clusterIP": "10.0.0.1"}})
        server.fail("services", "watch", cut=100)
        ... a client of server.url ...
        assert server.requests[0].resource == "services"

It lists and watches Services, EndpointSlices, Nodes and ServiceCIDRs with selectors, pages, versions, bookmarks and
compaction as a real one does, and takes events.k8s.io/v1 Events.  It knows no other verbs and validates nothing else.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from .apianswers import Connection, Request, Watch
from .apifaults import NO_FAULT, Fault, Verb
from .apistore import BY_KIND, BY_PLURAL, ObjectKey, ObjectStore
from .apitls import Authority, Certificate

PATIENCE_SECONDS = 20.0


class FakeAPIServer:
    """Started by `with`, or `start()`.

    `bind` and `port` (0: any) say where it listens; `listener` is a socket that the caller made instead, in another
    network namespace perhaps.  `authority` makes it speak TLS.  `tokens`: bearer tokens that it accepts, and
    `users`: common names of client certificates; None for both: everybody is let in.
    `pages_from_cache`: `limit` is honoured for resourceVersion=0 too; older servers do not.
    `unserved`: plurals that it answers 404 for.
    """

    def __init__(
        self,
        *,
        bind: str = "127.0.0.1",
        port: int = 0,
        listener: socket.socket | None = None,
        authority: Authority | None = None,
        tokens: Iterable[str] | None = None,
        users: Iterable[str] | None = None,
        pages_from_cache: bool = True,
        unserved: Iterable[str] = (),
    ) -> None:
        self.store = ObjectStore()
        self.authority = authority
        self.tokens = None if tokens is None else set(tokens)
        self.users = None if users is None else set(users)
        self.pages_from_cache = pages_from_cache
        self.unserved = set(unserved)
        self.requests: list[Request] = []
        self.connections_total = 0
        self.tls_context: ssl.SSLContext | None = None
        self.port = port
        self._bind = bind
        self._given = listener
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._faults: list[Fault] = []
        self._watches: list[Watch] = []
        self._connections: dict[Connection, threading.Thread] = {}
        self._silent = False
        if authority is not None:
            self.tls_context = _tls_context(authority, authority.server(bind))

    # -- life --

    def start(self, listener: socket.socket | None = None) -> FakeAPIServer:
        """Listen, at the same port as before if it was stopped; objects, log and faults are still there."""
        given = listener or self._given
        if given is None:
            family = socket.AF_INET6 if ":" in self._bind else socket.AF_INET
            given = socket.socket(family, socket.SOCK_STREAM)
            given.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            given.bind((self._bind, self.port))
            given.listen(128)
        self._given = None
        self.port = given.getsockname()[1]
        self._listener = given
        self._acceptor = threading.Thread(target=self._accept, args=(given,), name="fake-api", daemon=True)
        self._acceptor.start()
        return self

    def stop(self) -> None:
        """Close the listening socket and every connection, keeping the state.  A listener of the caller's is closed too."""
        listener, self._listener = self._listener, None
        if listener is not None:
            _shut(listener)
        if self._acceptor is not None:
            self._acceptor.join(PATIENCE_SECONDS)
            self._acceptor = None
        with self.store.changed:
            open_ones = dict(self._connections)
            for connection in open_ones:
                connection.close()
            self.store.changed.notify_all()
        for thread in open_ones.values():
            thread.join(PATIENCE_SECONDS)

    def __enter__(self) -> FakeAPIServer:
        return self.start() if self._listener is None else self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it is reached."""
        host = f"[{self._bind}]" if ":" in self._bind else self._bind
        return f"{'https' if self.tls_context else 'http'}://{host}:{self.port}"

    def kubeconfig(
        self,
        path: str | os.PathLike[str],
        *,
        user: Mapping[str, Any] | None = None,
        client: Certificate | None = None,
        data: bool = False,
        server: str = "",
        cluster: Mapping[str, Any] | None = None,
    ) -> str:
        """Write a kubeconfig and return its path.

        `user`: fields of the user; `client`: its certificate.  `data`: certificates stand in the file itself.
        `cluster`: further fields of the cluster.
        """
        place: dict[str, Any] = {"server": server or self.url, **(cluster or {})}
        person = dict(user or {})
        files = (
            [] if client is None else [("client-certificate", client.certificate), ("client-key", client.key)]
        )
        for field, file in files:
            person |= _file_field(field, file, data)
        if self.authority is not None:
            place |= _file_field("certificate-authority", self.authority.ca, data)
        value = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": place}],
            "users": [{"name": "me", "user": person}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "me"}}],
        }
        temporary = f"{os.fspath(path)}.new"
        with open(temporary, "w") as file_object:
            json.dump(value, file_object)
        os.replace(temporary, path)
        return os.fspath(path)

    # -- objects --

    def apply(self, value: Mapping[str, Any]) -> int:
        """Create or replace an object; the version that it has now."""
        return self.store.apply(value)

    def delete(self, kind: str, namespace: str, name: str) -> int:
        """Delete an object; the version of that.  Raises KeyError: it is not there."""
        return self.store.delete(kind, namespace, name)

    def get(self, kind: str) -> dict[ObjectKey, dict[str, Any]]:
        """All objects of a kind, by namespace and name."""
        return self.store.get(kind)

    @property
    def events(self) -> list[dict[str, Any]]:
        """Events that clients have created, in their order."""
        return sorted(self.get("Event").values(), key=lambda value: int(value["metadata"]["resourceVersion"]))

    def compact(self) -> None:
        """Forget the past: watches from an older version, and continue tokens, are refused from now on."""
        with self.store.changed:
            told = [watch.version for watch in self._watches if watch.version]
            self.store.compact(keep=min(told, default=None))

    # -- misbehaviour --

    def fail(self, resource: str | None = None, verb: Verb | None = None, **how: Any) -> Fault:
        """Misbehave; see `Fault`.  The oldest fault that fits a request is used."""
        fault = Fault(resource, verb, **how)
        with self.store.changed:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """End all faults."""
        with self.store.changed:
            for fault in self._faults:
                fault.over()
            self._faults.clear()

    def black_hole(self, silent: bool = True) -> None:
        """Accept connections and say nothing at all on new ones."""
        self._silent = silent

    def bookmark(self, resource: str | None = None) -> None:
        """Send a bookmark of the present version to every watch."""
        for kind in BY_KIND.values():
            if resource in (None, kind.plural):
                value = (
                    f'{{"type":"BOOKMARK","object":{{"kind":"{kind.kind}","apiVersion":"{kind.api_version}",'
                    f'"metadata":{{"resourceVersion":"{self.store.version}","creationTimestamp":null}}{kind.empty}}}}}\n'
                )
                self.order(value.encode(), kind.plural)

    def end_watches(self, resource: str | None = None) -> None:
        """End watches as a server does when their time is over."""
        self.order("end", resource)

    def cut_watches(self, resource: str | None = None, *, reset: bool = False) -> None:
        """End the connections of watches, without a last chunk."""
        self.order("reset" if reset else "cut", resource)

    def order(self, what: bytes | str, resource: str | None = None) -> None:
        """Have every watch of a resource send these bytes as a chunk, or `end`, `cut` or `reset`."""
        with self.store.changed:
            for watch in self._watches:
                if resource in (None, watch.resource.plural):
                    watch.orders.append(what)
            self.store.changed.notify_all()

    # -- what is going on --

    def watches(self, resource: str) -> int:
        """How many watches of a resource are open."""
        with self.store.changed:
            return sum(watch.resource.plural == resource for watch in self._watches)

    def until(self, holds: Callable[[FakeAPIServer], bool]) -> None:
        """Wait until `holds(self)`.  Raises TimeoutError: it does not come."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self.store.changed:
            while not holds(self):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"never came; requests: {[r.path for r in self.requests[-8:]]}")
                self.store.changed.wait(0.05)

    def count(self, resource: str, verb: str) -> int:
        """How many such requests there were."""
        with self.store.changed:
            return sum((r.resource, r.verb) == (resource, verb) for r in self.requests)

    # -- for connections --

    def take(self, request: Request) -> Fault:
        """Log a request; the fault that it meets."""
        with self.store.changed:
            self.requests.append(request)
            self.store.changed.notify_all()
            for fault in self._faults:
                if fault.fits(request.resource, request.verb, "continue" in request.query):
                    fault.used += 1
                    return fault
        return NO_FAULT

    def admits(self, authorization: str, user: str) -> bool:
        """May this client in?"""
        if self.tokens is None and self.users is None:
            return True
        scheme, _, token = authorization.partition(" ")
        return (scheme.lower() == "bearer" and token in (self.tokens or ())) or user in (self.users or ())

    @contextmanager
    def watching(self, watch: Watch) -> Iterator[None]:
        """A watch is open while inside."""
        with self.store.changed:
            self._watches.append(watch)
            self.store.changed.notify_all()
        try:
            yield
        finally:
            with self.store.changed:
                self._watches.remove(watch)
                self.store.changed.notify_all()

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while self._listener is listener:
                try:
                    raw, _ = listener.accept()
                except OSError:
                    return
                connection = Connection(self, raw)
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                with self.store.changed:
                    self.connections_total += 1
                    if self._listener is not listener:
                        raw.close()
                        return
                    self._connections[connection] = thread
                thread.start()

    def _serve(self, connection: Connection) -> None:
        try:
            if self._silent:
                while not connection.ended:
                    time.sleep(0.02)
                connection.socket.close()
                return
            connection.serve()
        finally:
            with self.store.changed:
                self._connections.pop(connection, None)
                self.store.changed.notify_all()


def plural_of(kind: str) -> str:
    """`services` for `Service`."""
    return BY_KIND[kind].plural


def path_of(plural: str) -> str:
    """`/api/v1/services` for `services`."""
    return BY_PLURAL[plural].path


def _file_field(field: str, file: os.PathLike[str], data: bool) -> dict[str, str]:
    if not data:
        return {field: os.fspath(file)}
    with open(file, "rb") as stream:
        return {f"{field}-data": base64.b64encode(stream.read()).decode()}


def _tls_context(authority: Authority, server: Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate, server.key)
    context.load_verify_locations(authority.ca)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _shut(listener: socket.socket) -> None:
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
