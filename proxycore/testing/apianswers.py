"""One connection of the fake API server: requests in, answers out."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections import deque
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from .apifaults import NO_FAULT, Body, Ended, Fault, reset
from .apistore import BY_PLURAL, Gone, Resource, Selector, selector

if TYPE_CHECKING:
    from .apiserver import FakeAPIServer

_REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "AlreadyExists",
    410: "Expired",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
}


class Request(NamedTuple):
    """A request as it was logged; `resource` is the plural, empty where the path is none of ours."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    resource: str
    namespace: str
    verb: str

    @property
    def user_agent(self) -> str:
        return self.headers.get("user-agent", "")

    @property
    def authorization(self) -> str:
        return self.headers.get("authorization", "")


class Watch:
    """One watch that is being served.

    `orders` is what the test wants of it: bytes are sent as a chunk of their own, "end" ends it cleanly, "cut" and
    "reset" without a last chunk.
    """

    def __init__(self, resource: Resource) -> None:
        self.resource = resource
        self.version = 0
        """It has been told everything up to this."""
        self.orders: deque[bytes | str] = deque()


class Connection:
    """Serves one client's connection, on a thread of its own, until it ends."""

    def __init__(self, server: FakeAPIServer, raw: socket.socket) -> None:
        self._server = server
        self.socket = raw
        self.ended = False
        self._user = ""

    def close(self) -> None:
        """End it from another thread."""
        self.ended = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def serve(self) -> None:
        """Answer requests until the client, the server or a fault ends it."""
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            context = self._server.tls_context
            if context is not None:
                self.socket.settimeout(10)
                self.socket = context.wrap_socket(self.socket, server_side=True)
                self.socket.settimeout(None)
                self._user = _common_name(self.socket)
            with self.socket.makefile("rb") as stream:
                while not self.ended and (request := _read(stream)) is not None:
                    self._answer(request)
        except (Ended, OSError, ValueError):
            pass
        finally:
            self.ended = True
            self.socket.close()

    def _is_over(self) -> bool:
        return self.ended

    def _answer(self, request: Request) -> None:
        fault = self._server.take(request)
        if fault.hang == "headers":
            fault.wait(self._is_over)
        body = Body(self.socket, fault, self._is_over)
        if not self._server.admits(request.authorization, self._user):
            self._status(body, 401, "Unauthorized")
        elif fault.status is not None or (fault.gone and request.verb != "watch"):
            self._status(body, fault.status or 410, fault.message, fault)
        elif not request.resource or request.resource in self._server.unserved:
            self._status(body, 404, "the server could not find the requested resource")
        elif request.verb == "create":
            self._create(body, request)
        else:
            try:
                select = selector(
                    request.query.get("labelSelector", ""), request.query.get("fieldSelector", "")
                )
            except ValueError as error:
                self._status(body, 400, str(error))
                return
            resource = BY_PLURAL[request.resource]
            if request.verb == "watch":
                self._watch(body, resource, select, request, fault)
                if fault.close:
                    raise Ended
            else:
                self._list(body, resource, select, request, fault)

    def _head(self, status: int, *extra: str) -> None:
        lines = (f"HTTP/1.1 {status} {_REASONS.get(status, 'OK')}", "Content-Type: application/json", *extra)
        try:
            self.socket.sendall("\r\n".join((*lines, "", "")).encode())
        except OSError as error:
            raise Ended from error

    def _status(self, body: Body, status: int, message: str, fault: Fault = NO_FAULT) -> None:
        data = fault.body if fault.body is not None else msgspec.json.encode(status_value(status, message))
        extra = [] if fault.retry_after is None else [f"Retry-After: {fault.retry_after:g}"]
        self._head(status, f"Content-Length: {len(data)}", *extra)
        body.send(data)

    def _create(self, body: Body, request: Request) -> None:
        try:
            value = msgspec.json.decode(request.body)
        except msgspec.DecodeError as error:
            self._status(body, 400, str(error))
            return
        problem = event_problem(value, request.namespace)
        if problem:
            self._status(body, 422, problem)
            return
        self._server.store.apply(value)
        data = msgspec.json.encode(value)
        self._head(201, f"Content-Length: {len(data)}")
        body.send(data)

    # -- lists --

    def _list(self, body: Body, resource: Resource, select: Selector, request: Request, fault: Fault) -> None:
        query = request.query
        token = query.get("continue", "")
        wanted = query.get("resourceVersion", "")
        store = self._server.store
        limit = int(query.get("limit", "0"))
        if wanted.isdigit() and int(wanted) > store.version:
            self._status(body, 500, "Too large resource version")
            return
        if wanted == "0" and not token and not self._server.pages_from_cache:
            limit = 0
        try:
            version, items, following, left = store.page(resource, select, limit, token)
        except Gone:
            self._status(body, 410, "The provided continue parameter is too old")
            return
        metadata: dict[str, Any] = {"resourceVersion": str(version)}
        if following:
            metadata |= {"continue": following, "remainingItemCount": left}
        head = msgspec.json.encode(
            {"kind": f"{resource.kind}List", "apiVersion": resource.api_version, "metadata": metadata}
        )
        data = head[:-1] + b',"items":' + (b"[" + b",".join(items) + b"]" if items else b"null") + b"}\n"
        if fault.pretty:
            data = msgspec.json.format(data, indent=2)
        self._send(body, data if fault.body is None else fault.body, fault)

    def _send(self, body: Body, data: bytes, fault: Fault) -> None:
        if fault.close:
            self._head(200, "Connection: close")
            body.send(data)
            raise Ended
        if fault.chunk is None:
            self._head(200, f"Content-Length: {len(data)}")
            body.send(data)
            return
        self._head(200, "Transfer-Encoding: chunked")
        for start in range(0, len(data), fault.chunk):
            body.chunk(data[start : start + fault.chunk])
        body.chunk(b"")

    # -- watches --

    def _watch(
        self, body: Body, resource: Resource, select: Selector, request: Request, fault: Fault
    ) -> None:
        head = "Connection: close" if fault.close else "Transfer-Encoding: chunked"
        wanted = request.query.get("resourceVersion", "")
        deadline = time.monotonic() + float(request.query.get("timeoutSeconds") or 1800)
        store = self._server.store
        if fault.gone:
            wanted = "1"
        watch = Watch(resource)
        with self._server.watching(watch):
            try:
                with store.changed:
                    if wanted in ("", "0"):
                        version, events = store.current(resource, select)
                    else:
                        version, events = store.since(resource, select, int(wanted))
                    watch.version = int(wanted or "0") or version
            except Gone:
                self._head(200, head)
                _too_old(body, wanted)
                return
            # Not sooner: who sees the head may count on the watch's having begun.
            self._head(200, head)
            body.send(b"")
            while True:
                for kind, value in events:
                    body.chunk(b'{"type":"' + kind.encode() + b'","object":' + value + b"}\n")
                behind = False
                with store.changed:
                    while not (self.ended or watch.orders or store.version > version):
                        left = deadline - time.monotonic()
                        if left <= 0:
                            break
                        store.changed.wait(min(left, 1.0))
                    late = not watch.orders and store.version <= version
                    watch.version = version
                    try:
                        if version:
                            version, events = store.since(resource, select, version, open_watch=True)
                    except Gone:
                        behind = True
                    orders = list(watch.orders) if not events else []
                    if orders:
                        watch.orders.clear()
                if self.ended:
                    raise Ended
                if behind:
                    _too_old(body, str(version))
                    return
                if not events and self._obey(body, orders):
                    body.chunk(b"")
                    return
                if late and time.monotonic() >= deadline:
                    body.chunk(b"")
                    return

    def _obey(self, body: Body, orders: list[bytes | str]) -> bool:
        """Do what the test wants; True: the watch ends cleanly."""
        for order in orders:
            if isinstance(order, bytes):
                body.chunk(order)
            elif order == "end":
                return True
            else:
                if order == "reset":
                    reset(self.socket)
                raise Ended
        return False


def _too_old(body: Body, version: str) -> None:
    """End a watch that cannot go on from its version."""
    gone = msgspec.json.encode(status_value(410, f"too old resource version: {version}"))
    body.chunk(b'{"type":"ERROR","object":' + gone + b"}\n")
    body.chunk(b"")


def status_value(code: int, message: str) -> dict[str, Any]:
    """A Status object."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": _REASONS.get(code, "Unknown"),
        "code": code,
    }


def event_problem(value: Any, namespace: str) -> str:
    """What the API would have against a new events.k8s.io/v1 Event; empty if nothing."""
    if not isinstance(value, dict) or value.get("kind") != "Event":
        return "kind: must be Event"
    if value.get("apiVersion") != "events.k8s.io/v1":
        return "apiVersion: must be events.k8s.io/v1"
    metadata = value.get("metadata") or {}
    if metadata.get("namespace") != namespace or not metadata.get("name"):
        return "metadata: name and namespace are required, and must be those of the path"
    regarding = value.get("regarding") or {}
    if regarding.get("namespace", "default") != namespace:
        return "regarding.namespace: does not match event.namespace"
    for field in ("eventTime", "reportingController", "reportingInstance", "action", "reason"):
        if not value.get(field):
            return f"{field}: Required value"
    if len(value["reason"]) > 128 or len(value["action"]) > 128 or len(value["reportingInstance"]) > 128:
        return "reason, action, reportingInstance: may have at most 128 characters"
    if len(value.get("note", "").encode()) > 1024:
        return "note: may have at most 1024 bytes"
    if value.get("type") not in ("Normal", "Warning"):
        return "type: must be Normal or Warning"
    return ""


def _read(stream: BinaryIO) -> Request | None:
    """The next request; None: there is no other."""
    line = stream.readline(65537)
    if not line.strip():
        return None
    method, target, _ = line.decode("latin-1").split(" ", 2)
    headers: dict[str, str] = {}
    while (line := stream.readline(65537)).strip():
        name, _, text = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = text.strip()
    body = stream.read(int(headers.get("content-length", "0")))
    parts = urlsplit(target)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    resource, namespace = _resource(unquote(parts.path))
    if method == "POST":
        verb = "create"
    else:
        verb = "watch" if query.get("watch", "") in ("1", "true") else "list"
    return Request(method, parts.path, query, headers, body, resource, namespace, verb)


def _resource(path: str) -> tuple[str, str]:
    steps = path.strip("/").split("/")
    version = 2 if steps[0] == "api" else 3
    rest = steps[version:]
    namespace = ""
    if len(rest) == 3 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    resource = BY_PLURAL.get(rest[0]) if len(rest) == 1 else None
    if resource is None or "/".join(steps[1:version]) != resource.api_version:
        return "", ""
    return resource.plural, namespace


def _common_name(connection: socket.socket) -> str:
    assert isinstance(connection, ssl.SSLSocket)
    subject: Any = (connection.getpeercert() or {}).get("subject", ())
    return next((value for part in subject for key, value in part if key == "commonName"), "")
