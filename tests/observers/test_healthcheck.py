"""Health-check node ports over real HTTP, in a namespace."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import time
from collections.abc import Iterator

import pytest

from proxycore import httpserver
from proxycore.backend import ApplyResult, BackendInfo, Failure
from proxycore.changes import UNKNOWN, ChangeBatch, HostChange, change
from proxycore.httpserver import Address
from proxycore.model import Endpoint, HostState, NodePortAddresses, ServicePortName, ServiceState
from proxycore.observer import ObserverContext
from proxycore.observers import healthcheck
from proxycore.observers.healthcheck import HealthCheck, health_check, listening_addresses
from proxycore.testing.netns import Namespace

PATIENCE = 20.0
EVERYWHERE = NodePortAddresses(all_local=True)


def host(v4: NodePortAddresses = EVERYWHERE, v6: NodePortAddresses = EVERYWHERE) -> HostState:
    return HostState(node_name="here", node_ports_ipv4=v4, node_ports_ipv6=v6)


def state(
    *endpoints: Endpoint,
    port: int | None = 30000,
    family: str = "IPv4",
    service: str = "web",
    of: str = "http",
) -> ServiceState:
    name = ServicePortName("shop", service, of, "TCP", family)
    return ServiceState(name=name, endpoints=endpoints, health_check_node_port=port)


def local(address: str, port: int = 80, **more) -> Endpoint:
    return Endpoint(address=address, port=port, is_local=True, node="here", **more)


REMOTE = Endpoint(address="10.0.1.1", port=80, node="elsewhere")

# -- what is counted and where it listens ---------------------------------------------------------------------------


def test_distinct_local_ready_addresses_are_counted_over_all_ports():
    draining = local("10.0.0.3", ready=False, serving=True, terminating=True)
    states = [
        state(local("10.0.0.1"), local("10.0.0.2"), REMOTE, draining),
        state(
            local("10.0.0.2", 443), local("10.0.0.4", 443), local("10.0.0.5", 443, ready=False), of="https"
        ),
    ]
    assert health_check(states) == HealthCheck(30000, ("IPv4",), 3)


def test_a_dual_stack_pod_counts_once():
    states = [
        state(local("10.0.0.1"), local("10.0.0.2")),
        state(local("fd00::1"), local("fd00::2"), local("fd00::3"), family="IPv6"),
    ]
    assert health_check(states) == HealthCheck(30000, ("IPv4", "IPv6"), 3)


def test_without_a_port_there_is_no_check():
    assert health_check([state(local("10.0.0.1"), port=None)]) is None
    assert health_check([]) is None


def test_it_listens_at_the_node_port_addresses_of_its_families():
    both = HealthCheck(30000, ("IPv4", "IPv6"), 0)
    assert listening_addresses(both, host()) == (Address("0.0.0.0", 30000), Address("::", 30000))
    some = host(NodePortAddresses(addresses=("192.0.2.1", "192.0.2.2")), NodePortAddresses())
    assert listening_addresses(both, some) == (Address("192.0.2.1", 30000), Address("192.0.2.2", 30000))
    assert listening_addresses(HealthCheck(1, ("IPv6",), 0), host()) == (Address("::", 1),)


# -- the observer ---------------------------------------------------------------------------------------------------


class Proxy:
    """A namespace, an observer in it, and a client."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.healthy = True
        self.generation = 0
        self.observer = healthcheck.plugin()
        info = BackendInfo(name="test", summary="", api="0.1", capabilities=frozenset())
        context = ObserverContext(host=host(), backend=info, healthy=lambda: self.healthy)
        namespace.call(lambda: self.observer.proxycore_observer_start(context))

    def applied(
        self, *states: ServiceState | ServicePortName, full: bool = False, to: HostState | None = None, **more
    ):
        self.generation += 1
        changes = tuple(
            change(s, UNKNOWN, None) if isinstance(s, ServicePortName) else change(s.name, UNKNOWN, s)
            for s in states
        )
        batch = ChangeBatch(
            generation=self.generation,
            changes=changes,
            full=full,
            host=HostChange(before=None, after=to) if to else None,
        )
        self.observer.proxycore_observer_applied(batch, ApplyResult(generation=self.generation, **more))

    def connect(self, address: str = "127.0.0.1", port: int = 30000) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        opened = self.namespace.socket(family, socket.SOCK_STREAM)
        try:
            opened.settimeout(PATIENCE)
            opened.connect((address, port))
        except BaseException:
            opened.close()
            raise
        return opened

    def is_open(self, address: str = "127.0.0.1", port: int = 30000) -> bool:
        try:
            self.connect(address, port).close()
        except ConnectionRefusedError:
            return False
        return True

    def wait_open(self, address: str = "127.0.0.1") -> None:
        until = time.monotonic() + PATIENCE
        while not self.is_open(address) and time.monotonic() < until:
            time.sleep(0.01)

    def ask(self, address: str = "127.0.0.1", port: int = 30000, path: str = "/", method: str = "GET"):
        client = http.client.HTTPConnection(address, port)
        client.sock = self.connect(address, port)
        try:
            client.request(method, path)
            response = client.getresponse()
            return response, response.read()
        finally:
            client.close()

    def status_and_count(self, *args: object) -> tuple[int, int]:
        response, body = self.ask(*args)
        return response.status, json.loads(body)["localEndpoints"]

    def raw(self, data: bytes) -> bytes:
        """Everything that comes back for these bytes until the server closes."""
        found = b""
        # A server that turns us away may reset the connection at any point.
        with self.connect() as opened, contextlib.suppress(OSError):
            opened.sendall(data)
            opened.shutdown(socket.SHUT_WR)
            while part := opened.recv(65536):
                found += part
        return found


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Namespace("health") as namespace:
        made = Proxy(namespace)
        yield made
        made.observer.proxycore_observer_stop()


pytestmark = pytest.mark.root


def test_the_answer_is_kube_proxys(proxy: Proxy):
    proxy.applied(state(local("10.0.0.1"), local("10.0.0.2"), REMOTE))
    response, body = proxy.ask(path="/any/path?at=all")
    assert response.status == 200
    assert response.getheader("Content-Type") == "application/json"
    assert response.getheader("X-Content-Type-Options") == "nosniff"
    assert response.getheader("X-Load-Balancing-Endpoint-Weight") == "2"
    assert body.decode() == (
        '{\n\t"service": {\n\t\t"namespace": "shop",\n\t\t"name": "web"\n\t},\n'
        '\t"localEndpoints": 2,\n\t"serviceProxyHealthy": true\n}\n'
    )


def test_the_count_follows_and_none_is_unavailable(proxy: Proxy):
    proxy.applied(state(local("10.0.0.1")))
    assert proxy.status_and_count() == (200, 1)
    proxy.applied(state(local("10.0.0.1"), local("10.0.0.2")))
    assert proxy.status_and_count() == (200, 2)
    proxy.applied(state(REMOTE, local("10.0.0.1", ready=False, terminating=True)))
    assert proxy.status_and_count() == (503, 0)


def test_an_unhealthy_proxy_is_unavailable_but_tells_the_count(proxy: Proxy):
    proxy.applied(state(local("10.0.0.1")))
    proxy.healthy = False
    response, body = proxy.ask()
    assert response.status == 503
    assert response.getheader("X-Load-Balancing-Endpoint-Weight") == "1"
    assert json.loads(body) == {
        "service": {"namespace": "shop", "name": "web"},
        "localEndpoints": 1,
        "serviceProxyHealthy": False,
    }


def test_it_opens_only_once_the_service_is_programmed(proxy: Proxy):
    web = state(local("10.0.0.1"))
    for exception in ({"failed": (Failure(name=web.name, why="no"),)}, {"unknown": (web.name,)}):
        proxy.applied(web, **exception)
        assert not proxy.is_open()
    proxy.applied(web, unsupported=(Failure(name=web.name, why="no"),))
    assert not proxy.is_open()
    proxy.applied(web)
    assert proxy.status_and_count() == (200, 1)
    proxy.applied(state(), failed=(Failure(name=web.name, why="no"),))
    assert proxy.status_and_count() == (200, 1), "what is in force still has its endpoint"


def test_it_closes_when_the_service_goes_or_its_policy_changes(proxy: Proxy):
    web = state(local("10.0.0.1"))
    proxy.applied(web)
    assert proxy.is_open()
    proxy.applied(state(local("10.0.0.1"), port=None))
    assert not proxy.is_open()
    proxy.applied(web)
    assert proxy.is_open()
    proxy.applied(web.name)
    assert not proxy.is_open()


def test_one_port_of_several_may_go(proxy: Proxy):
    proxy.applied(state(local("10.0.0.1")), state(local("10.0.0.2", 443), of="https"))
    assert proxy.status_and_count() == (200, 2)
    proxy.applied(state(of="https").name)
    assert proxy.status_and_count() == (200, 1)


def test_a_full_batch_closes_what_it_does_not_hold(proxy: Proxy):
    proxy.applied(state(local("10.0.0.1")), state(local("10.0.0.1"), service="api", port=30001))
    assert proxy.is_open()
    assert proxy.is_open(port=30001)
    proxy.applied(state(local("10.0.0.1"), service="api", port=30001), full=True)
    assert not proxy.is_open()
    assert proxy.is_open(port=30001)


def test_a_port_moves_to_another_service_in_one_batch(proxy: Proxy):
    proxy.applied(state(local("10.0.0.1")))
    proxy.applied(
        state(local("10.0.0.1"), port=30001), state(local("10.0.0.1"), local("10.0.0.2"), service="api")
    )
    assert proxy.status_and_count() == (200, 2)
    assert proxy.status_and_count("127.0.0.1", 30001) == (200, 1)


def test_one_port_serves_both_families(proxy: Proxy):
    proxy.applied(state(local("10.0.0.1")), state(local("fd00::1"), family="IPv6"))
    assert proxy.status_and_count("127.0.0.1") == proxy.status_and_count("::1") == (200, 1)
    proxy.applied(state(family="IPv6").name)
    assert proxy.is_open("127.0.0.1")
    assert not proxy.is_open("::1")


def test_addresses_follow_the_host(proxy: Proxy):
    proxy.namespace.ip(["address", "add", "192.0.2.1/24", "dev", "lo"])
    proxy.applied(state(local("10.0.0.1")))
    assert proxy.is_open("127.0.0.1")
    proxy.applied(to=host(NodePortAddresses(addresses=("192.0.2.1",))))
    assert proxy.is_open("192.0.2.1")
    assert not proxy.is_open("127.0.0.1")
    proxy.applied(to=host())
    assert proxy.is_open("127.0.0.1")


def test_an_address_that_is_not_there_yet_is_tried_again(proxy: Proxy, monkeypatch, caplog):
    monkeypatch.setattr(healthcheck, "_RETRY_SECONDS", (0.02, 0.02))
    caplog.set_level(logging.INFO)
    proxy.applied(state(local("10.0.0.1")), to=host(NodePortAddresses(addresses=("192.0.2.1",))))
    (refused,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert refused.fields["service"] == "shop/web"
    assert refused.fields["address"] == "192.0.2.1:30000"
    proxy.namespace.ip(["address", "add", "192.0.2.1/24", "dev", "lo"])
    proxy.wait_open("192.0.2.1")
    assert proxy.status_and_count("192.0.2.1") == (200, 1)


def test_a_port_in_use_is_told_once_and_taken_when_free(proxy: Proxy, monkeypatch, caplog):
    monkeypatch.setattr(healthcheck, "_RETRY_SECONDS", (0.02, 0.02))
    caplog.set_level(logging.INFO)
    with proxy.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as squatter:
        squatter.bind(("0.0.0.0", 30000))
        squatter.listen()
        proxy.applied(state(local("10.0.0.1")))
        proxy.applied(state(local("10.0.0.1"), service="api", port=30001))
        assert proxy.status_and_count("127.0.0.1", 30001) == (200, 1)
        assert [r.fields["service"] for r in caplog.records if r.levelno == logging.ERROR] == ["shop/web"]
    proxy.wait_open()
    assert proxy.status_and_count() == (200, 1)


def test_two_services_with_one_port_do_not_disturb_each_other(proxy: Proxy, caplog):
    proxy.applied(state(local("10.0.0.1"), service="a"), state(service="b"))
    assert proxy.status_and_count() == (200, 1)
    assert "taken by Service shop/a" in str([r.fields for r in caplog.records])
    proxy.applied(state(service="a").name)
    assert proxy.status_and_count() == (503, 0)


def test_connections_are_kept_for_the_next_request(proxy: Proxy):
    proxy.applied(state(local("10.0.0.1")))
    client = http.client.HTTPConnection("127.0.0.1", 30000)
    client.sock = first = proxy.connect()
    for _ in range(3):
        client.request("GET", "/")
        assert client.getresponse().read()
        assert client.sock is first
    client.close()


def test_head_and_other_methods(proxy: Proxy):
    proxy.applied(state(local("10.0.0.1")))
    response, body = proxy.ask(method="HEAD")
    assert (response.status, body) == (200, b"")
    assert int(response.getheader("Content-Length")) > 0
    response, body = proxy.ask(method="POST")
    assert response.status == 200
    assert response.getheader("Connection") == "close"
    assert json.loads(body)["localEndpoints"] == 1


def test_http_1_0_is_answered_and_closed(proxy: Proxy):
    proxy.applied(state(local("10.0.0.1")))
    answered = proxy.raw(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert answered.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nConnection: close\r\n" in answered


@pytest.mark.parametrize(
    "garbage",
    [
        b"\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"G\0T / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\n : x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused(proxy: Proxy, garbage: bytes):
    proxy.applied(state(local("10.0.0.1")))
    assert proxy.raw(garbage).startswith(b"HTTP/1.1 400 ")
    assert proxy.status_and_count() == (200, 1)


def test_endless_headers_are_cut(proxy: Proxy):
    proxy.applied(state(local("10.0.0.1")))
    answered = proxy.raw(b"GET / HTTP/1.1\r\nX: " + b"x" * (2 * httpserver.HEADER_BYTES))
    assert answered == b"" or answered.startswith(b"HTTP/1.1 431 ")
    assert proxy.status_and_count() == (200, 1)


def test_a_silent_client_is_shown_out(proxy: Proxy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(httpserver, "IDLE_SECONDS", 0.05)
    proxy.applied(state(local("10.0.0.1")))
    with proxy.connect() as silent:
        silent.sendall(b"GET / HT")
        assert silent.recv(100) == b""


def test_a_client_that_says_nothing_is_shown_out_sooner(proxy: Proxy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(httpserver, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(httpserver, "IDLE_SECONDS", 1000.0)
    proxy.applied(state(local("10.0.0.1")))
    with proxy.connect() as silent:
        assert silent.recv(100) == b""


def ask(client: socket.socket) -> bool:
    """Is one request on an open connection answered?  False: it is closed."""
    try:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        return client.recv(10000).startswith(b"HTTP/1.1 200 ")
    except ConnectionError:
        return False


def test_when_full_the_longest_idle_has_to_go(proxy: Proxy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(httpserver, "CONNECTIONS", 2)
    proxy.applied(state(local("10.0.0.1")))
    with proxy.connect() as first, proxy.connect() as second:
        assert ask(first)
        assert ask(second)
        assert ask(first)
        second.sendall(b"GET / HTTP/1.1\r\nX: a beginning")
        with proxy.connect() as third:
            assert ask(third)
            assert ask(first)
            assert not ask(second)


def test_silent_clients_shut_nobody_out(proxy: Proxy):
    proxy.applied(state(local("10.0.0.1")))
    with contextlib.ExitStack() as crowd:
        for _ in range(2 * httpserver.CONNECTIONS):
            crowd.enter_context(proxy.connect())
        assert proxy.status_and_count() == (200, 1)


def test_clients_of_one_listener_do_not_cost_another_its_own(proxy: Proxy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(httpserver, "CONNECTIONS", 3)
    monkeypatch.setattr(httpserver, "ALL_CONNECTIONS", 4)
    proxy.applied(state(local("10.0.0.1")), state(local("10.0.0.1"), service="api", port=30001))
    with contextlib.ExitStack() as crowd:
        other = crowd.enter_context(proxy.connect(port=30001))
        assert ask(other)
        clients = [crowd.enter_context(proxy.connect()) for _ in range(6)]
        assert ask(clients[-1])
        second = crowd.enter_context(proxy.connect(port=30001))
        assert ask(second)
        assert ask(other)


def test_stop_closes_ports_and_connections(proxy: Proxy):
    proxy.applied(state(local("10.0.0.1")))
    with proxy.connect() as held:
        held.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert held.recv(10000)
        proxy.observer.proxycore_observer_stop()
        assert not proxy.is_open()
        assert held.recv(10000) == b""
    proxy.observer.proxycore_observer_stop()
