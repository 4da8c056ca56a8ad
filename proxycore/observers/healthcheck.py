"""Observer `health-check-ports`: tells load balancers over HTTP whether this node has endpoints of a Service.

For each LoadBalancer Service of external policy Local it answers at the Service's healthCheckNodePort, once the
Service is programmed.  Semantics: kube-proxy's service health server; unlike there, one listener serves both families
of a dual-stack Service.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from functools import partial
from http import HTTPStatus
from typing import NamedTuple

from .. import logs
from ..backend import ApplyResult
from ..changes import ChangeBatch
from ..hookspecs import hookimpl
from ..httpserver import Address, Answer, HTTPServer, Request, Responder
from ..model import FAMILIES, Family, HostState, ServicePortName, ServiceState, family_of
from ..observer import ObserverContext

_RETRY_SECONDS = (1.0, 30.0)
_ANY: dict[Family, str] = {"IPv4": "0.0.0.0", "IPv6": "::"}

ServiceName = tuple[str, str]
"""Namespace and name."""


class HealthCheck(NamedTuple):
    """One Service's health check: where it answers, and with how many local endpoints."""

    port: int
    families: tuple[Family, ...]
    local_endpoints: int


def health_check(states: Iterable[ServiceState]) -> HealthCheck | None:
    """What the states of one Service's ports, in all families, amount to; None: it has no health-check port.

    Counted are distinct addresses of local ready endpoints over all ports.  A dual-stack pod has one in each family,
    so the families are not added up: the larger count is the number of pods.
    """
    port: int | None = None
    local: dict[Family, set[str]] = {}
    for state in states:
        if state.health_check_node_port is None:
            continue
        port = state.health_check_node_port
        addresses = local.setdefault(state.name.family, set())
        addresses.update(e.address for e in state.endpoints if e.is_local and e.ready)
    if port is None:
        return None
    families = tuple(family for family in FAMILIES if family in local)
    return HealthCheck(port, families, max(map(len, local.values())))


def listening_addresses(check: HealthCheck, host: HostState) -> tuple[Address, ...]:
    """Where a health check answers: at the node-port addresses of its Service's families."""
    found: list[Address] = []
    for family in check.families:
        ports = host.node_ports(family)
        hosts = (_ANY[family],) if ports.all_local else ports.addresses
        found += (Address(where, check.port) for where in hosts if family_of(where) == family)
    return tuple(found)


def answer(service: ServiceName, local_endpoints: int, healthy: bool) -> Answer:
    """kube-proxy's answer, header by header and key by key."""
    body = {
        "service": {"namespace": service[0], "name": service[1]},
        "localEndpoints": local_endpoints,
        "serviceProxyHealthy": healthy,
    }
    headers = (
        ("Content-Type", "application/json"),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Load-Balancing-Endpoint-Weight", str(local_endpoints)),
    )
    status = HTTPStatus.OK if local_endpoints > 0 and healthy else HTTPStatus.SERVICE_UNAVAILABLE
    return Answer(status, headers, (json.dumps(body, indent="\t") + "\n").encode())


class HealthCheckObserver:
    """Keeps the programmed states of Services with a health-check port, and the listeners that they ask for."""

    def __init__(self) -> None:
        self._log = logs.get("health-check-ports")
        # Held by the hooks and by the timer that tries refused addresses again.
        self._lock = threading.Lock()
        self._context: ObserverContext | None = None
        self._host: HostState | None = None
        self._server: HTTPServer | None = None
        self._states: dict[ServiceName, dict[ServicePortName, ServiceState]] = {}
        self._checks: dict[ServiceName, HealthCheck] = {}
        self._told: dict[Address, str] = {}
        self._timer: threading.Timer | None = None
        self._pause = _RETRY_SECONDS[0]

    @hookimpl
    def proxycore_observer_start(self, context: ObserverContext) -> None:
        self._context = context
        self._host = context.host
        self._server = HTTPServer("health-check-ports")

    @hookimpl
    def proxycore_observer_applied(self, batch: ChangeBatch, result: ApplyResult) -> None:
        with self._lock:
            touched = self._take(batch, result)
            moved = batch.host is not None and batch.host.after != self._host
            if batch.host is not None:
                self._host = batch.host.after
            relisten = moved
            for service in touched:
                relisten = self._refresh(service) or relisten
            if relisten:
                self._pause = _RETRY_SECONDS[0]
                self._listen()

    @hookimpl
    def proxycore_observer_stop(self) -> None:
        with self._lock:
            server, self._server = self._server, None
            if self._timer is not None:
                self._timer.cancel()
        if server is not None:
            server.close()

    def _take(self, batch: ChangeBatch, result: ApplyResult) -> set[ServiceName]:
        """Take over what came into force; the Services that it touched.

        A Service port that failed or is half done keeps the state that it had; none, if it had none.
        """
        kept = {failure.name for failure in result.failed} | set(result.unknown)
        unsupported = {failure.name for failure in result.unsupported}
        touched: set[ServiceName] = set()
        if batch.full:
            present = {change.name for change in batch.changes}
            for ports in list(self._states.values()):
                for name in [name for name in ports if name not in present]:
                    touched |= self._put(name, None)
        for change in batch.changes:
            if change.name not in kept:
                after = None if change.name in unsupported else change.after
                touched |= self._put(change.name, after)
        return touched

    def _put(self, name: ServicePortName, state: ServiceState | None) -> set[ServiceName]:
        service = name.namespace, name.name
        if state is not None and state.health_check_node_port is not None:
            self._states.setdefault(service, {})[name] = state
            return {service}
        ports = self._states.get(service)
        if ports is None or ports.pop(name, None) is None:
            return set()
        if not ports:
            del self._states[service]
        return {service}

    def _refresh(self, service: ServiceName) -> bool:
        """Work out one Service's check anew; True if it is to be served elsewhere than before."""
        old = self._checks.get(service)
        new = health_check(self._states.get(service, {}).values())
        if new is None:
            self._checks.pop(service, None)
        else:
            # Requests read this from the server's thread; replacing an entry is atomic.
            self._checks[service] = new
        return (old and old[:2]) != (new and new[:2])

    def _respond(self, service: ServiceName, _: Request) -> Answer:
        """The same whatever is asked, as kube-proxy does."""
        assert self._context is not None
        check = self._checks.get(service)
        return answer(service, check.local_endpoints if check else 0, self._context.healthy())

    # -- listeners; the lock is held -------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self._server is None or self._host is None:
            return
        wanted: dict[Address, Responder] = {}
        owners: dict[Address, ServiceName] = {}
        for service, check in sorted(self._checks.items()):
            for address in listening_addresses(check, self._host):
                if address in owners:
                    self._tell(address, service, f"taken by Service {'/'.join(owners[address])}")
                    continue
                owners[address] = service
                wanted[address] = partial(self._respond, service)
        before = self._server.listening()
        refused = self._server.serve(wanted)
        for address, error in refused.items():
            self._tell(address, owners[address], error.strerror or str(error))
        for address in sorted(self._server.listening() - before):
            self._told.pop(address, None)
            self._log.info("health-check port open", service="/".join(owners[address]), address=str(address))
        for address in sorted(before - self._server.listening()):
            self._log.info("health-check port closed", address=str(address))
        self._told = {address: why for address, why in self._told.items() if address in wanted}
        self._try_again_later(refused)

    def _tell(self, address: Address, service: ServiceName, why: str) -> None:
        if self._told.get(address) != why:
            self._told[address] = why
            self._log.error(
                "health-check port cannot be opened, the load balancer will see this node as down",
                service="/".join(service),
                address=str(address),
                error=why,
            )

    def _try_again_later(self, refused: Mapping[Address, OSError]) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if refused:
            self._timer = threading.Timer(self._pause, self._try_again)
            self._timer.daemon = True
            self._timer.start()
            self._pause = min(2 * self._pause, _RETRY_SECONDS[1])

    def _try_again(self) -> None:
        with self._lock:
            self._listen()


def plugin() -> HealthCheckObserver:
    """Entry point of group `proxycore.plugins`."""
    return HealthCheckObserver()
