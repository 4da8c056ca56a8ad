"""Requests to the Kubernetes API server.  The only module that touches the `kubernetes` package, and urllib3 through it.

The package makes a client of a configuration: authentication, TLS, proxies.  None of its API or model classes is named
here: they cost a second and 50 MB.  It is imported at the first request.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from .. import logs
from ..errors import SourceError
from ..source import APIServer
from . import execplugin, kubeconfig
from .counts import NO_CODE, REQUESTS
from .kubeconfig import Access
from .limiter import Limiter

if TYPE_CHECKING:
    from urllib3.response import HTTPResponse

    from .connections import Handles

REFRESH_SECONDS = 10.0
"""Configuration and credentials are read anew at most this often."""
RETRY_SECONDS = 1.0
"""The same after they could not be had."""
EXPIRY_MARGIN_SECONDS = 60.0
"""So long before they expire credentials are fetched anew."""
CONNECT_SECONDS = 5.0
KEEPALIVE = (10, 5, 3)
"""A silent connection is probed after 10 s, every 5 s; it is over after 3 probes."""
USER_TIMEOUT_MILLISECONDS = 25_000
Query = Iterable[tuple[str, str]]
Timeout = tuple[float, float]
"""Seconds: to connect, and without a byte."""


class Unreachable(SourceError):
    """No answer came, or it ended before its end.  The message says why, and does not name the server."""


class _Session(NamedTuple):
    """A client of the package, and what it was made of."""

    api: Any
    host: str
    built_at: float
    expires_at: float | None
    stamps: tuple[object, ...]


class APIClient:
    """Requests to one API server, from any thread; see `connect`."""

    def __init__(
        self,
        settings: APIServer,
        access: Access,
        user_agent: str,
        *,
        environment: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.server = access.server
        self.identity = _identity(access)
        """By which a cluster is known: every one may have the same URL, and none another's authority."""
        self._settings = settings
        self._access = access
        self._user_agent = user_agent
        self._environment = environment
        self._clock = clock
        self._limiter = Limiter(settings.qps, settings.burst)
        self._log = logs.get("kubernetes")
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._handles: Handles | None = None
        self._session: _Session | None = None
        self._not_before = 0.0
        self._problem = ""

    def get(
        self,
        path: str,
        query: Query = (),
        timeout: Timeout = (CONNECT_SECONDS, 30.0),
        headers: Mapping[str, str] | None = None,
        *,
        limited: bool = True,
    ) -> HTTPResponse:
        """The unread response, whatever its status.

        Read it to its end, by `chunks()` or `read()`, or `discard()` it.  `limited`: waits its turn as qps and burst have
        it; not for watches.  After a 401 it is tried again once, if newer credentials can be had.
        Raises Unreachable: there was no answer.  Raises SourceError: there are no credentials.
        """
        return self._request("GET", path, list(query), timeout, headers, None, limited)

    def post(self, path: str, body: Any, timeout: Timeout = (CONNECT_SECONDS, 30.0)) -> HTTPResponse:
        """Create an object from plain values; as `get()`."""
        return self._request("POST", path, [], timeout, {"Content-Type": "application/json"}, body, True)

    def close(self) -> None:
        """End every request under way at once, and refuse new ones.  From any thread, and twice."""
        self._closed.set()
        handles = self._handles
        if handles is not None:
            handles.close()

    def _request(
        self,
        method: str,
        path: str,
        query: list[tuple[str, str]],
        timeout: Timeout,
        headers: Mapping[str, str] | None,
        body: Any,
        limited: bool,
    ) -> HTTPResponse:
        if limited and (pause := self._limiter.reserve()) > 0:
            self._closed.wait(pause)
        session = self._current()
        response = self._send(session, method, path, query, timeout, headers, body)
        if response.status == 401:
            newer = self._renewed(session)
            if newer is not None:
                discard(response)
                response = self._send(newer, method, path, query, timeout, headers, body)
        return response

    def _send(
        self,
        session: _Session,
        method: str,
        path: str,
        query: list[tuple[str, str]],
        timeout: Timeout,
        headers: Mapping[str, str] | None,
        body: Any,
    ) -> HTTPResponse:
        if self._closed.is_set():
            raise Unreachable("the client is closed")
        began = time.monotonic()
        code = NO_CODE
        try:
            call = session.api.param_serialize(
                method,
                path,
                query_params=query,
                header_params={"Accept": "application/json", **(headers or {})},
                body=body,
                auth_settings=["BearerToken"],
            )
            response: HTTPResponse = session.api.call_api(*call, _request_timeout=timeout).response
            code = str(response.status)
        except Exception as error:
            raise Unreachable(reason_of(error)) from error
        finally:
            REQUESTS.record(method, session.host, code, time.monotonic() - began)
        return response

    # -- credentials --

    def _current(self) -> _Session:
        """The session for the next request, made anew if it is outdated."""
        with self._lock:
            session = self._session
            now = self._clock()
            if session is not None and (
                now < self._not_before or not self._is_outdated(session, now) or self._closed.is_set()
            ):
                return session
            if session is None and now < self._not_before:
                raise SourceError(self._problem)
            try:
                return self._build()
            except SourceError:
                if session is None or _is_past(session.expires_at):
                    raise
                return session

    def _renewed(self, refused: _Session) -> _Session | None:
        """A newer session than one whose credentials were refused, if it can be had now."""
        with self._lock:
            if self._session is not refused:
                return self._session
            now = self._clock()
            if now - refused.built_at < REFRESH_SECONDS or now < self._not_before or self._closed.is_set():
                return None
            try:
                return self._build()
            except SourceError:
                return None

    def _is_outdated(self, session: _Session, now: float) -> bool:
        if _is_past(session.expires_at):
            return True
        if now - session.built_at < REFRESH_SECONDS:
            return False
        return _is_past(session.expires_at, EXPIRY_MARGIN_SECONDS) or session.stamps != _stamps(self._access)

    def _build(self) -> _Session:
        """Read configuration and credentials anew.  Raises SourceError: the session is what it was."""
        began = self._clock()
        try:
            access = kubeconfig.load(self._settings, self._environment)
            # Before the files are used: what is written from now on is newer.
            stamps = _stamps(access)
            credential = None
            if access.exec is not None and not access.token:
                credential = execplugin.run(access, self._closed)
            api = self._make(access, credential)
        except SourceError as error:
            self._not_before = self._clock() + RETRY_SECONDS
            if str(error) != self._problem:
                self._log.warning("no new credentials for the API server", reason=str(error))
            self._problem = str(error)
            raise
        if self._session is not None:
            self._session.api.close()
            self._log.info("credentials for the API server were read anew")
        self._problem = ""
        self._not_before = 0.0
        self._access = access
        expires = credential.expires_at if credential else None
        self._session = _Session(api, urlsplit(access.server).netloc, began, expires, stamps)
        return self._session

    def _make(self, access: Access, credential: execplugin.Credential | None) -> Any:
        try:
            from kubernetes import config
            from kubernetes.client import ApiClient, Configuration
        except ImportError as error:
            raise SourceError(f"the package kubernetes cannot be imported: {error}") from error
        from .connections import Handles, note

        if self._handles is None:
            self._handles = Handles()
            if self._closed.is_set():
                self._handles.close()
        files: list[int] = []
        try:
            configuration = Configuration()
            configuration.retries = False
            configuration.socket_options = _socket_options()
            values = _values(access, credential, files)
            load: Callable[..., None] = config.load_kube_config_from_dict
            load(values, client_configuration=configuration, persist_config=False)
            api = ApiClient(configuration)
            api.user_agent = self._user_agent
        except Exception as error:
            for descriptor in files:
                os.close(descriptor)
            raise SourceError(f"{access.origin}: {reason_of(error)}") from error
        # Not sooner: each new connection reads them.
        for descriptor in files:
            weakref.finalize(api, os.close, descriptor)
        note(api.rest_client.pool_manager, self._handles)
        return api


def connect(
    settings: APIServer, *, user_agent: str, environment: Mapping[str, str] | None = None
) -> APIClient:
    """A client for the API server that `settings` and `environment` (that of the process) lead to; see `kubeconfig.load`.

    Nothing is sent and no exec plugin is run before the first request.
    Raises SourceError naming what is wrong with the configuration, or everywhere that was looked for one.
    """
    environment = os.environ if environment is None else environment
    access = kubeconfig.load(settings, environment)
    return APIClient(settings, access, user_agent, environment=environment)


def chunks(response: HTTPResponse, size: int | None = None) -> Iterator[bytes]:
    """The body as it comes; without `size` each chunk as it was sent.

    Raises Unreachable: it ended before its end, or no byte came for too long.
    """
    try:
        if response.chunked or size is not None:
            yield from response.stream(size)
        else:
            while data := response.read1(1 << 16):
                yield data
    except Exception as error:
        raise Unreachable(reason_of(error)) from error


def read(response: HTTPResponse, limit: int = 1 << 16) -> bytes:
    """The first `limit` bytes of the body; what comes after is given up.

    Raises Unreachable: it ended before its end, or no byte came for too long.
    """
    try:
        data = response.read(limit)
    except Exception as error:
        raise Unreachable(reason_of(error)) from error
    discard(response)
    return data


def discard(response: HTTPResponse) -> None:
    """Give up a response that nobody will read further."""
    try:
        connection: Any = response.connection
        if connection is not None and not response.closed:
            connection.close()
        response.release_conn()
        response.close()
    except Exception:  # noqa: BLE001  it is given up in any case
        return


def allow_silence(response: HTTPResponse, seconds: float) -> None:
    """Let so much time pass without a byte from now on; the request's own timeout also waited for the headers."""
    connection: Any = response.connection
    if connection is not None and connection.sock is not None:
        connection.sock.settimeout(seconds)


def reason_of(error: BaseException) -> str:
    """Why a request failed, in the fewest words that help."""
    kind = type(error).__name__
    cause = error.__cause__
    if kind == "NameResolutionError":
        return f"its name cannot be resolved: {_system_text(cause or error)}"
    if kind == "ConnectTimeoutError":
        return f"no connection within {CONNECT_SECONDS:g} s"
    if kind == "ReadTimeoutError":
        return "no byte came for too long"
    if kind == "NewConnectionError" and cause is not None:
        return _system_text(cause)
    if kind == "ProxyError" and len(error.args) > 1:
        return f"through the HTTP proxy: {reason_of(error.args[1])}"
    if kind == "ApiException":
        text = " ".join(str(getattr(error, "reason", "")).split())
        return re.sub(r" \(_ssl\.c:\d+\)", "", text).replace("SSLError ", "TLS: ", 1)
    if kind in ("ProtocolError", "IncompleteRead"):
        inner = error.args[1] if len(error.args) > 1 else cause
        return f"the connection broke{f': {_system_text(inner)}' if isinstance(inner, OSError) else ''}"
    return _system_text(error)


def _system_text(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    text = " ".join(text.split())
    return text[:1].lower() + text[1:300] if text[1:2].islower() else text[:300]


def jittered(seconds: float) -> float:
    """Half to all of a pause, so that nodes do not come back all at once."""
    return seconds * random.uniform(0.5, 1.0)


def _socket_options() -> list[tuple[int, int, int]]:
    idle, interval, count = KEEPALIVE
    return [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, count),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MILLISECONDS),
    ]


def _values(access: Access, credential: execplugin.Credential | None, files: list[int]) -> dict[str, Any]:
    """A kubeconfig with one context, as the package reads it: nothing in it has to be looked up, run or written to disk.

    Certificates that came as data get a descriptor of memory, added to `files`: nothing is left behind, however we end.
    """
    cluster: dict[str, Any] = {"server": access.server}
    if access.ca:
        cluster["certificate-authority"] = _path(access.ca, files)
    if access.insecure:
        cluster["insecure-skip-tls-verify"] = True
    if access.tls_server_name:
        cluster["tls-server-name"] = access.tls_server_name
    if access.proxy_url:
        cluster["proxy-url"] = access.proxy_url
    certificate, key, token = access.certificate, access.key, access.token
    if credential is not None:
        token = token or credential.token or ""
        if credential.client_certificate_data and credential.client_key_data:
            certificate = credential.client_certificate_data.encode()
            key = credential.client_key_data.encode()
    user: dict[str, Any] = {}
    if certificate:
        user["client-certificate"] = _path(certificate, files)
    if key:
        user["client-key"] = _path(key, files)
    if token:
        user["token"] = token
    elif access.username:
        user |= {"username": access.username, "password": access.password}
    elif access.auth_provider:
        user["auth-provider"] = access.auth_provider
    return {
        "current-context": "it",
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        "clusters": [{"name": "it", "cluster": cluster}],
        "users": [{"name": "it", "user": user}],
    }


def _identity(access: Access) -> str:
    """The server's URL, and a digest of the authority that vouches for it."""
    authority = access.ca
    if isinstance(authority, str) and authority:
        try:
            with open(authority, "rb") as file:
                authority = file.read()
        except OSError:
            return access.server
    if not authority or isinstance(authority, str):
        return access.server
    return f"{access.server} (authority {hashlib.sha256(authority).hexdigest()[:16]})"


def _path(value: str | bytes, files: list[int]) -> str:
    if isinstance(value, str):
        return value
    descriptor = os.memfd_create("proxycore-pem", os.MFD_CLOEXEC)
    files.append(descriptor)
    os.write(descriptor, value)
    return f"/proc/self/fd/{descriptor}"


def _stamps(access: Access) -> tuple[object, ...]:
    """What tells whether one of the files has changed."""
    return tuple(_stamp(file) for file in access.files)


def _stamp(file: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _is_past(expires_at: float | None, margin: float = 0.0) -> bool:
    return expires_at is not None and time.time() >= expires_at - margin
