"""The health and metrics ports, on kube-proxy's addresses and paths.

A server reads the published facts and nothing else, on a thread of its own: it answers while the engine hangs, and no
client can cost the engine anything.  The metrics page is written on yet another thread, so that a collector of a plugin
that hangs does not keep the health endpoints from answering.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry

from . import healthbody, logs
from .errors import ConfigError, KernelError
from .health import CHECKS, ENDPOINTS, Endpoint, Verdict, judge
from .httpserver import EVERYWHERE, Address, Answer, HTTPServer, Request, plain
from .metrics import families
from .metrics.build import build_info
from .metrics.exposition import CONTENT_TYPE, Collector, expose
from .metrics.values import Values
from .status import Facts, ServerStatus

TICK_SECONDS = 5.0
"""So often an address that is taken is tried again, and checks are looked at to know since when they are red."""
INFORMATION = "information"
"""`type` of a check that gates nothing, at /metrics/slis."""

_NOSNIFF = ("X-Content-Type-Options", "nosniff")
_JSON = (("Content-Type", "application/json"), _NOSNIFF)
_TEXT = (("Content-Type", "text/plain; charset=utf-8"), _NOSNIFF)

Handler = Callable[[Request], Answer | Awaitable[Answer]]


class _Port(NamedTuple):
    """One address that is wanted: what it is for, how it is configured, what answers there."""

    field: str
    text: str
    handlers: Mapping[str, Handler]


class Servers:
    """All methods may be called from any thread; sockets belong to the network namespace of the first serve()."""

    def __init__(
        self,
        facts: Callable[[], Facts],
        registry: CollectorRegistry,
        *,
        mode: Callable[[], str],
        configz: Callable[[], Mapping[str, Any]],
    ) -> None:
        """`mode` is what /proxyMode says, `configz` what /configz shows, by API group.  Nothing is opened yet."""
        self._facts = facts
        self._registry = registry
        self._log = logs.get("servers")
        self._history = History()
        self._answers = {endpoint: {"200": 0, "503": 0} for endpoint in ENDPOINTS}
        self._results = {
            (name, type_, status): 0
            for name in CHECKS
            for type_ in _types(name)
            for status in ("success", "error")
        }
        self._collector = Collector(families.SERVED, self._served)
        indicators = CollectorRegistry()
        indicators.register(Collector(families.INDICATORS, self._indicators))
        self._health: Mapping[str, Handler] = self._probes(in_full=False)
        self._metrics: Mapping[str, Handler] = {
            **self._probes(in_full=True),
            "/metrics": _Scrape(registry),
            "/metrics/slis": lambda _: Answer(HTTPStatus.OK, _exposed(), expose(indicators)),
            "/proxyMode": lambda _: Answer(HTTPStatus.OK, _TEXT, mode().encode()),
            "/configz": lambda _: Answer(HTTPStatus.OK, _JSON, _json(configz())),
            "/version": lambda _: Answer(HTTPStatus.OK, _JSON, _json(version_body())),
        }
        # Held by whoever opens and closes.
        self._lock = threading.Lock()
        self._server: HTTPServer | None = None
        self._wanted: dict[Address, _Port] = {}
        self._status: tuple[ServerStatus, ...] = ()
        self._closing = threading.Event()
        self._keeper: threading.Thread | None = None

    def serve(self, healthz: str | None, metrics: str | None, hard_fail: bool) -> None:
        """Listen at these addresses, `address:port` each, None: not at all; what has not changed stays as it is.

        One that is taken is tried again in the background.  Raises ConfigError: an address is none, nothing was touched;
        with `hard_fail` KernelError: an address cannot be opened, the others are.
        """
        wanted: dict[Address, _Port] = {}
        for field, text, handlers in (
            ("healthzBindAddress", healthz, self._health),
            ("metricsBindAddress", metrics, self._metrics),
        ):
            if text is None:
                continue
            address = parse_address(text, field)
            if address in wanted:
                raise ConfigError(f"{text} is the address of {wanted[address].field} already", field=field)
            wanted[address] = _Port(field, text, handlers)
        with self._lock:
            if self._closing.is_set():
                return
            if self._server is None:
                self._server = HTTPServer("servers")
                self._registry.register(self._collector)
                self._keeper = threading.Thread(target=self._keep, name="servers-keeper", daemon=True)
                self._keeper.start()
            self._wanted = wanted
            refused = self._open()
        if hard_fail:
            for address, error in refused.items():
                port = wanted[address]
                raise KernelError(
                    f"{port.field}: {port.text} cannot be opened: {error.strerror or error}; "
                    "free it, choose another one, or set bindAddressHardFail: false to go on without it",
                    errno=error.errno or 0,
                )

    def status(self) -> tuple[ServerStatus, ...]:
        """Each address that is wanted, as it is configured."""
        return self._status

    def close(self) -> None:
        """Close everything and end the threads; doing it twice does no harm."""
        self._closing.set()
        with self._lock:
            server, self._server = self._server, None
            if server is not None:
                self._registry.unregister(self._collector)
                server.close()
            self._status = ()
        if self._keeper is not None:
            self._keeper.join(10)

    # -- listening; the lock is held -----------------------------------------------------------------------------

    def _open(self) -> dict[Address, OSError]:
        assert self._server is not None
        before = self._server.listening()
        refused = self._server.serve(
            {address: partial(respond, port.handlers) for address, port in self._wanted.items()}
        )
        for address in sorted(before - self._server.listening()):
            self._log.info("closed", address=str(address))
        told = {status.address: status.problem for status in self._status}
        for address, port in self._wanted.items():
            if address in refused:
                why = refused[address].strerror or str(refused[address])
                if told.get(port.text) != why:
                    self._log.error(
                        "cannot be opened, trying again",
                        field=port.field,
                        address=port.text,
                        error=why,
                        seconds=TICK_SECONDS,
                    )
            elif address not in before:
                self._log.info("serving", field=port.field, address=port.text)
        self._status = tuple(
            ServerStatus(
                address=port.text,
                problem=(refused[address].strerror or str(refused[address])) if address in refused else "",
            )
            for address, port in self._wanted.items()
        )
        return refused

    def _keep(self) -> None:
        while not self._closing.wait(TICK_SECONDS):
            # Whatever fails here is somebody else's and shows elsewhere; the thread must live on.
            with contextlib.suppress(Exception):
                facts = self._facts()
                self._history.since(judge(facts), facts.now)
            if any(status.problem for status in self._status):
                with self._lock, contextlib.suppress(Exception):
                    if self._server is not None:
                        self._open()

    # -- health ----------------------------------------------------------------------------------------------------

    def _probes(self, *, in_full: bool) -> dict[str, Handler]:
        return {f"/{endpoint}": partial(self._probe, endpoint, in_full) for endpoint in ENDPOINTS}

    def _probe(self, endpoint: Endpoint, in_full: bool, request: Request) -> Answer:
        facts = self._facts()
        verdict = judge(facts)
        since = self._history.since(verdict, facts.now)
        status = HTTPStatus.OK if verdict.healthy(endpoint) else HTTPStatus.SERVICE_UNAVAILABLE
        self._answers[endpoint][str(status.value)] += 1
        for name, type_, well in results(verdict):
            if type_ in (endpoint, INFORMATION):
                self._results[name, type_, "success" if well else "error"] += 1
        if "verbose" in parse_qs(request.query, keep_blank_values=True):
            text = healthbody.verbose_body(endpoint, facts, verdict, since, in_full=in_full)
            return Answer(status, _TEXT, text)
        return Answer(status, _JSON, healthbody.json_body(endpoint, facts, verdict, since, in_full=in_full))

    def _served(self) -> Values:
        names = {
            "healthz": "kubeproxy_proxy_healthz_total",
            "livez": "kubeproxy_proxy_livez_total",
            "readyz": "proxycore_proxy_readyz_total",
        }
        return {
            names[endpoint]: {(code,): number for code, number in counts.items()}
            for endpoint, counts in self._answers.items()
        }

    def _indicators(self) -> Values:
        now = {(name, type_): well for name, type_, well in results(judge(self._facts()))}
        return {"kubernetes_healthcheck": now, "kubernetes_healthchecks_total": dict(self._results)}


class History:
    """Since when each check has been as it is: what the facts do not tell is remembered from look to look."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: dict[str, tuple[bool, float]] = {}

    def since(self, verdict: Verdict, now: float) -> dict[str, float]:
        """Seconds since the epoch, by the check's name; `now` is the time of the verdict."""
        with self._lock:
            for check in verdict.checks:
                known = self._since.get(check.name)
                if check.age_seconds is not None:
                    self._since[check.name] = (check.healthy, now - check.age_seconds)
                elif known is None or known[0] != check.healthy:
                    self._since[check.name] = (check.healthy, now)
            return {name: began for name, (_, began) in self._since.items()}


class _Scrape:
    """Writes the metrics page on a thread of its own, one at a time: who asks meanwhile gets the same page."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._log = logs.get("servers")
        # For the server's thread alone.
        self._under_way: asyncio.Future[Answer] | None = None

    async def __call__(self, _: Request) -> Answer:
        if self._under_way is None:
            loop = asyncio.get_running_loop()
            page: asyncio.Future[Answer] = loop.create_future()
            threading.Thread(target=self._write, args=(loop, page), name="scrape", daemon=True).start()
            self._under_way = page
        # Shielded: that one who waits for it goes away is nothing to the others.
        return await asyncio.shield(self._under_way)

    def _write(self, loop: asyncio.AbstractEventLoop, page: asyncio.Future[Answer]) -> None:
        try:
            answer = Answer(HTTPStatus.OK, _exposed(), expose(self._registry))
        except Exception as error:  # noqa: BLE001  whatever happens, who waits gets an answer
            self._log.exception("the metrics page failed by a bug", error)
            answer = plain(HTTPStatus.INTERNAL_SERVER_ERROR)

        def done() -> None:
            self._under_way = None
            page.set_result(answer)

        # The server may have been closed meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(done)


def respond(handlers: Mapping[str, Handler], request: Request) -> Answer | Awaitable[Answer]:
    """Answer by path; only GET and HEAD are understood."""
    handler = handlers.get(request.path)
    if handler is None:
        return plain(HTTPStatus.NOT_FOUND)
    if request.method not in ("GET", "HEAD"):
        refusal = plain(HTTPStatus.METHOD_NOT_ALLOWED)
        return refusal._replace(headers=(*refusal.headers, ("Allow", "GET, HEAD")))
    return handler(request)


def results(verdict: Verdict) -> list[tuple[str, str, bool]]:
    """Each check's name, each endpoint that it may turn red (or `INFORMATION`), and whether it is well in that respect."""
    return [
        (check.name, type_, check.healthy or (type_ != INFORMATION and type_ not in check.gates))
        for check in verdict.checks
        for type_ in _types(check.name)
    ]


def _types(name: str) -> list[str]:
    return sorted(CHECKS[name]) or [INFORMATION]


def parse_address(text: str, field: str) -> Address:
    """`10.0.0.1:80`, `[::1]:80`.  Like kube-proxy's, an address that stands for all stands for those of both families.

    Raises ConfigError.
    """
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ip_address(bare)
        if (address.version == 6) == (bare == host) or not port.isascii() or not port.isdigit():
            raise ValueError
        number = int(port)
    except ValueError:
        number = 0
    if not 1 <= number <= 65535:
        raise ConfigError(
            f"{text!r} is no address with a port, such as 127.0.0.1:80 or [::1]:80", field=field
        )
    return Address(EVERYWHERE if address.is_unspecified else str(address), number)


def version_body() -> dict[str, str]:
    """What Kubernetes' own servers say at /version, about us."""
    words = {key: key.split("_") for key in build_info()}
    return {
        first + "".join(map(str.capitalize, rest)): value
        for (first, *rest), value in zip(words.values(), build_info().values(), strict=True)
    }


def _exposed() -> tuple[tuple[str, str], ...]:
    return (("Content-Type", CONTENT_TYPE), _NOSNIFF)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, default=_as_json).encode()


def _as_json(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)
