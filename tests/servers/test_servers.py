"""The health and metrics ports over real HTTP on loopback."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import MappingProxyType

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from proxycore import httpserver, servers
from proxycore.errors import ConfigError, KernelError
from proxycore.health import CHECKS, judge
from proxycore.httpserver import Address
from proxycore.metrics.exposition import Registry
from proxycore.model import ServicePortName
from proxycore.servers import History, Servers, parse_address
from proxycore.source import Health
from proxycore.status import Facts, NodeStatus, ServerStatus, Status

PATIENCE = 20.0
WELL = Status(
    synced=True,
    started=True,
    applied_total=1,
    families=("IPv4", "IPv6"),
    last_success=1_700_000_000.0,
    node=NodeStatus(eligible=True, why=""),
)
PORT_NAME = ServicePortName("shop", "web", "http", "TCP", "IPv4")


def free_port(host: str = "127.0.0.1") -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


class Answered:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    def json(self):
        return json.loads(self.body)


def ask(address: str, path: str, method: str = "GET") -> Answered:
    client = http.client.HTTPConnection(address, timeout=PATIENCE)
    try:
        client.request(method, path)
        return Answered(client.getresponse())
    finally:
        client.close()


def is_open(address: str) -> bool:
    try:
        ask(address, "/livez")
    except ConnectionRefusedError:
        return False
    return True


class Proxy:
    """Servers over facts that a test changes."""

    def __init__(self) -> None:
        self.status = WELL
        self.more: dict[str, object] = {}
        self.mode = "nftables"
        self.configz: object = {"kubeproxy.config.k8s.io": {"mode": "nftables"}, "proxycore.io": {}}
        self.registry = Registry()
        self.servers = Servers(
            self.facts, self.registry, mode=lambda: self.mode, configz=lambda: self.configz
        )
        self.health = f"127.0.0.1:{free_port()}"
        self.metrics = f"127.0.0.1:{free_port()}"

    def facts(self) -> Facts:
        return Facts(now=time.time(), monotonic=time.monotonic(), status=self.status, **self.more)

    def now(self, **status) -> None:
        self.status = msgspec.structs.replace(WELL, **status)

    def serve(self, hard_fail: bool = False) -> None:
        self.servers.serve(self.health, self.metrics, hard_fail)

    def series(self, path: str = "/metrics") -> dict[tuple, float]:
        text = ask(self.metrics, path).body.decode()
        return {
            (s.name, *sorted(s.labels.items())): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy()
    yield made
    made.servers.close()


# -- health --------------------------------------------------------------------------------------------------------


def test_healthz_is_kube_proxys(proxy: Proxy):
    proxy.serve()
    answer = ask(proxy.health, "/healthz")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    body = answer.json()
    assert list(body) == ["lastUpdated", "currentTime", "nodeEligible", "healthy", "status", "checks"]
    assert body["lastUpdated"] == body["currentTime"]
    assert body["status"] == {
        family: {"lastUpdated": "2023-11-14T22:13:20.000000Z", "healthy": True} for family in ("IPv4", "IPv6")
    }
    assert tuple(body["checks"]) == tuple(CHECKS)


@pytest.mark.parametrize(
    ("status", "codes"),
    [
        ({}, {"/livez": 200, "/readyz": 200, "/healthz": 200}),
        ({"applied_total": 0}, {"/livez": 200, "/readyz": 503, "/healthz": 503}),
        ({"node": NodeStatus(why="leaving")}, {"/livez": 200, "/readyz": 200, "/healthz": 503}),
        ({"source": Health("stale", "refused")}, {"/livez": 200, "/readyz": 503, "/healthz": 200}),
        ({"pending_since": 0.0}, {"/livez": 503, "/readyz": 503, "/healthz": 503}),
    ],
)
def test_codes_on_both_addresses(proxy: Proxy, status, codes):
    proxy.serve()
    proxy.now(**status)
    proxy.more = {"sync_period_seconds": 0.001}
    for address in (proxy.health, proxy.metrics):
        assert {path: ask(address, path).status for path in codes} == codes


def test_a_hung_engine_is_told(proxy: Proxy):
    """Nothing that answers needs the engine's thread: it is told as what it is."""
    proxy.serve()
    proxy.more = {"engine_silent_seconds": 3600.0}
    answer = ask(proxy.health, "/livez")
    assert answer.status == 503
    engine = answer.json()["checks"]["engine"]
    assert engine["detail"] == "its loop has not turned for 3600 s, past the deadline of 30 s"
    assert not engine["healthy"]


def test_verbose(proxy: Proxy):
    proxy.serve()
    proxy.now(source=Health("stale", "connection refused"))
    answer = ask(proxy.health, "/readyz?verbose")
    assert answer.status == 503
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    lines = answer.body.decode().splitlines()
    assert lines[0] == "[+]engine ok"
    assert "[-]source failed: stale: connection refused" in lines
    assert lines[-1] == "readyz check failed"
    assert ask(proxy.health, "/readyz?verbose=true").body == answer.body


def test_names_of_services_are_for_the_metrics_address_alone(proxy: Proxy):
    proxy.serve()
    proxy.now(quarantined={PORT_NAME: "refused"})
    for path in ("/healthz", "/healthz?verbose"):
        assert b"shop/web" not in ask(proxy.health, path).body
        assert b"shop/web" in ask(proxy.metrics, path).body


def test_since_when_a_check_is_red_is_remembered(proxy: Proxy):
    proxy.serve()
    proxy.now(drift_unrepaired=True)
    first = ask(proxy.health, "/livez").json()
    since = first["checks"]["drift"]["since"]
    assert since == first["currentTime"]
    later = ask(proxy.health, "/livez").json()
    assert later["currentTime"] > first["currentTime"]
    assert later["checks"]["drift"]["since"] == since
    proxy.now()
    assert ask(proxy.health, "/livez").json()["checks"]["drift"]["since"] > since


def test_history_prefers_what_the_facts_tell():
    history = History()
    status = msgspec.structs.replace(WELL, source_since=900.0)
    facts = Facts(now=1000.0, monotonic=0.0, status=status)
    assert history.since(judge(facts), 1000.0)["source"] == 900.0
    assert history.since(judge(facts), 1001.0)["engine"] == 1000.0


def test_checks_are_looked_at_although_nobody_asks(proxy: Proxy, monkeypatch):
    monkeypatch.setattr(servers, "TICK_SECONDS", 0.01)
    looked = threading.Event()
    facts = proxy.facts

    def broken_at_first() -> Facts:
        if not looked.is_set():
            looked.set()
            raise RuntimeError("not yet")
        return facts()

    monkeypatch.setattr(proxy.servers, "_facts", broken_at_first)
    proxy.now(drift_unrepaired=True)
    proxy.serve()
    assert looked.wait(PATIENCE)
    wait_until(lambda: "drift" in proxy.servers._history._since)
    assert proxy.servers._history._since["drift"][0] is False


def test_probes_are_counted(proxy: Proxy):
    proxy.serve()
    ask(proxy.health, "/healthz")
    proxy.now(applied_total=0)
    ask(proxy.health, "/healthz")
    ask(proxy.health, "/livez")
    ask(proxy.metrics, "/livez?verbose", "HEAD")
    series = proxy.series()
    found = {
        key[1:]: value for key, value in series.items() if key[0].endswith(("healthz_total", "livez_total"))
    }
    assert series["kubeproxy_proxy_healthz_total", ("code", "200")] == 1
    assert series["kubeproxy_proxy_healthz_total", ("code", "503")] == 1
    assert series["kubeproxy_proxy_livez_total", ("code", "200")] == 2
    assert series["kubeproxy_proxy_livez_total", ("code", "503")] == 0
    assert series["proxycore_proxy_readyz_total", ("code", "200")] == 0
    assert len(found) == 2, "only codes"


# -- paths and methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/metrics", "/configz", "/healthz/", "/livez/engine", "//livez", "/%6civez"]
)
def test_other_paths_of_the_health_address(proxy: Proxy, path: str):
    proxy.serve()
    assert ask(proxy.health, path).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_other_methods(proxy: Proxy, method: str):
    proxy.serve()
    for address, path in ((proxy.health, "/livez"), (proxy.metrics, "/metrics")):
        answer = ask(address, path, method)
        assert answer.status == 405
        assert answer.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "path", ["/livez", "/metrics", "/metrics/slis", "/configz", "/proxyMode", "/version"]
)
def test_head_is_get_without_a_body(proxy: Proxy, path: str):
    proxy.serve()
    answer = ask(proxy.metrics, path, "HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert int(answer.headers["Content-Length"]) > 0
    assert answer.headers["Content-Type"] == ask(proxy.metrics, path).headers["Content-Type"]


def test_an_absolute_target_is_understood(proxy: Proxy):
    proxy.serve()
    assert ask(proxy.health, f"http://{proxy.health}/readyz?verbose").body.endswith(b"readyz check passed\n")


def test_proxy_mode(proxy: Proxy):
    proxy.serve()
    answer = ask(proxy.metrics, "/proxyMode")
    assert answer.body == b"nftables"
    assert answer.headers["Content-Type"].startswith("text/plain")


def test_configz(proxy: Proxy):
    proxy.serve()
    proxy.configz = {
        "kubeproxy.config.k8s.io": MappingProxyType({"clusterCIDR": ("10.0.0.0/8",)}),
        "proxycore.io": {},
    }
    answer = ask(proxy.metrics, "/configz")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == {"kubeproxy.config.k8s.io": {"clusterCIDR": ["10.0.0.0/8"]}, "proxycore.io": {}}


def test_version(proxy: Proxy):
    proxy.serve()
    body = ask(proxy.metrics, "/version").json()
    assert list(body) == [
        "major",
        "minor",
        "gitVersion",
        "gitCommit",
        "gitTreeState",
        "buildDate",
        "goVersion",
        "compiler",
        "platform",
    ]
    assert body["gitVersion"].startswith("v")


def test_service_level_indicators(proxy: Proxy):
    proxy.serve()
    proxy.now(source=Health("stale", "refused"))
    ask(proxy.health, "/readyz")
    ask(proxy.health, "/readyz")
    ask(proxy.health, "/livez")
    series = proxy.series("/metrics/slis")
    source = ("name", "source"), ("type", "readyz")
    assert series["kubernetes_healthcheck", *source] == 0
    assert (
        series["kubernetes_healthchecks_total", ("name", "source"), ("status", "error"), ("type", "readyz")]
        == 2
    )
    assert series["kubernetes_healthcheck", ("name", "engine"), ("type", "livez")] == 1
    engine = ("name", "engine"), ("status", "success")
    assert series["kubernetes_healthchecks_total", *engine, ("type", "livez")] == 1
    assert series["kubernetes_healthchecks_total", *engine, ("type", "healthz")] == 0
    assert series["kubernetes_healthcheck", ("name", "drift"), ("type", "information")] == 1


def test_a_check_that_does_not_turn_an_endpoint_red_is_well_there(proxy: Proxy):
    proxy.serve()
    proxy.now(pending_since=0.0, refused="no such device")
    proxy.more = {"sync_period_seconds": 0.001}
    series = proxy.series("/metrics/slis")
    assert series["kubernetes_healthcheck", ("name", "pending"), ("type", "livez")] == 1
    assert series["kubernetes_healthcheck", ("name", "pending"), ("type", "readyz")] == 0


# -- /metrics and those who break it -------------------------------------------------------------------------------


def test_content_type(proxy: Proxy):
    proxy.serve()
    assert (
        ask(proxy.metrics, "/metrics").headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    )


def test_another_observers_metrics_are_shown_as_the_go_client_would(proxy: Proxy):
    Counter("mine_total", "Mine.", registry=proxy.registry).inc()
    proxy.serve()
    text = ask(proxy.metrics, "/metrics").body.decode()
    assert "# TYPE mine_total counter\nmine_total 1.0\n" in text
    assert "_created" not in text


class Broken:
    def collect(self):
        raise RuntimeError("no")


class Copy:
    """Says what somebody else says already, which the registry cannot know beforehand."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counter = Counter("mine_total", "Mine.", registry=None)

    def collect(self):
        return self._counter.collect()


def test_a_broken_collector_costs_nobody_else_a_metric(proxy: Proxy, caplog):
    Counter("mine_total", "Mine.", registry=proxy.registry).inc()
    proxy.registry.register(Broken())
    proxy.registry.register(Copy(proxy.registry))
    proxy.serve()
    series = proxy.series()
    assert series["mine_total",] == 1
    assert series["proxycore_collector_failures_total",] == 2
    assert ask(proxy.metrics, "/metrics").body.count(b"\nmine_total ") == 1
    told = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(told) == 2, "once each"


class Hanging:
    def __init__(self) -> None:
        self.calls = 0
        self.let_go = threading.Event()

    def collect(self):
        self.calls += 1
        assert self.let_go.wait(PATIENCE)
        return []


def test_a_hanging_collector_does_not_keep_health_from_answering(proxy: Proxy, monkeypatch):
    hanging = Hanging()
    proxy.registry.register(hanging)
    proxy.serve()
    monkeypatch.setattr(httpserver, "ANSWER_SECONDS", 0.05)
    assert ask(proxy.metrics, "/metrics").status == 503
    assert ask(proxy.metrics, "/metrics").status == 503
    assert hanging.calls == 1, "no second one is started meanwhile"
    assert ask(proxy.metrics, "/livez").status == 200
    assert ask(proxy.health, "/livez").status == 200
    monkeypatch.setattr(httpserver, "ANSWER_SECONDS", PATIENCE)
    hanging.let_go.set()
    wait_until(lambda: ask(proxy.metrics, "/metrics").status == 200)


def test_who_asks_at_the_same_time_gets_the_same_page(proxy: Proxy):
    hanging = Hanging()
    proxy.registry.register(hanging)
    proxy.serve()
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(ask(proxy.metrics, "/metrics").status)) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(proxy.servers._server._conversations) == 5)
    hanging.let_go.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert found == [200] * 5
    assert hanging.calls <= 2, "one who comes late may have a page of its own"


def test_a_bug_behind_one_path_is_that_paths_alone(proxy: Proxy, caplog):
    proxy.serve()
    proxy.configz = {"x": {1j: 1}}
    for _ in range(3):
        assert ask(proxy.metrics, "/configz").status == 500
    assert ask(proxy.metrics, "/livez").status == 200
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1


def test_a_closed_server_forgets_a_page_that_is_being_written(proxy: Proxy):
    hanging = Hanging()
    proxy.registry.register(hanging)
    proxy.serve()
    client = socket.create_connection(tuple(proxy.metrics.split(":")), PATIENCE)
    client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    wait_until(lambda: hanging.calls)
    proxy.servers.close()
    assert client.recv(100) == b""
    client.close()
    writers = [thread for thread in threading.enumerate() if thread.name == "scrape"]
    hanging.let_go.set()
    for thread in writers:
        thread.join(PATIENCE)
        assert not thread.is_alive()


# -- addresses -----------------------------------------------------------------------------------------------------


def test_an_address_that_is_taken_is_told_once_and_served_when_free(proxy: Proxy, monkeypatch, caplog):
    monkeypatch.setattr(servers, "TICK_SECONDS", 0.02)
    host, port = proxy.health.split(":")
    tries: list[object] = []
    real = proxy.servers._open
    monkeypatch.setattr(proxy.servers, "_open", lambda: tries.append(refused := real()) or refused)
    with socket.socket() as squatter:
        squatter.bind((host, int(port)))
        squatter.listen()
        proxy.serve()
        taken, fine = proxy.servers.status()
        assert taken == ServerStatus(address=proxy.health, problem="Address already in use")
        assert fine == ServerStatus(address=proxy.metrics)
        assert ask(proxy.metrics, "/livez").status == 200
        wait_until(lambda: len(tries) >= 3)
    wait_until(lambda: not any(status.problem for status in proxy.servers.status()))
    assert ask(proxy.health, "/livez").status == 200
    told = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert [(r.fields["field"], r.fields["address"]) for r in told] == [("healthzBindAddress", proxy.health)]


def test_hard_fail_says_which_address_and_why(proxy: Proxy):
    host, port = proxy.metrics.split(":")
    with socket.socket() as squatter:
        squatter.bind((host, int(port)))
        squatter.listen()
        with pytest.raises(KernelError, match=r"metricsBindAddress: .* Address already in use") as raised:
            proxy.serve(hard_fail=True)
        assert proxy.metrics in str(raised.value)
        assert ask(proxy.health, "/livez").status == 200, "the other one is open"


def test_only_what_changed_is_bound_anew(proxy: Proxy):
    proxy.serve()
    client = http.client.HTTPConnection(proxy.health, timeout=PATIENCE)
    client.request("GET", "/livez")
    client.getresponse().read()
    kept = client.sock
    old = proxy.metrics
    proxy.metrics = f"127.0.0.1:{free_port()}"
    proxy.serve()
    assert not is_open(old)
    assert ask(proxy.metrics, "/proxyMode").status == 200
    client.request("GET", "/livez")
    assert client.getresponse().read()
    assert client.sock is kept, "the connection went on"
    client.close()
    assert [status.address for status in proxy.servers.status()] == [proxy.health, proxy.metrics]


def test_addresses_may_be_switched_off_and_change_places(proxy: Proxy):
    proxy.serve()
    proxy.servers.serve(None, proxy.health, False)
    assert ask(proxy.health, "/proxyMode").status == 200
    assert not is_open(proxy.metrics)
    proxy.servers.serve(None, None, False)
    assert not is_open(proxy.health)
    assert proxy.servers.status() == ()


def test_loopback_of_ipv6(proxy: Proxy):
    proxy.health = f"[::1]:{free_port('::1')}"
    proxy.serve(hard_fail=True)
    assert ask(proxy.health, "/livez").status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_an_address_that_stands_for_all_stands_for_both_families(proxy: Proxy, host: str):
    port = free_port()
    proxy.health = f"{host}:{port}"
    proxy.serve(hard_fail=True)
    assert ask(f"127.0.0.1:{port}", "/livez").status == 200
    assert ask(f"[::1]:{port}", "/livez").status == 200


def test_without_ipv6_it_is_ipv4(proxy: Proxy, monkeypatch):
    opened = httpserver._open

    def no_ipv6(family, *args, **more):
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return opened(family, *args, **more)

    monkeypatch.setattr(httpserver, "_open", no_ipv6)
    port = free_port()
    proxy.health = f"0.0.0.0:{port}"
    proxy.serve(hard_fail=True)
    assert ask(f"127.0.0.1:{port}", "/livez").status == 200


def test_one_address_cannot_be_both(proxy: Proxy):
    proxy.serve()
    with pytest.raises(ConfigError, match="is the address of healthzBindAddress already"):
        proxy.servers.serve(proxy.health, proxy.health, False)
    assert ask(proxy.metrics, "/livez").status == 200, "nothing was touched"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "::1:80",
        "[1.2.3.4]:80",
        "localhost:80",
        "127.0.0.1:٣",
    ],
)
def test_what_is_no_address_is_refused_before_anything_is_touched(proxy: Proxy, text: str):
    proxy.serve()
    with pytest.raises(ConfigError, match="healthzBindAddress"):
        proxy.servers.serve(text, None, False)
    assert ask(proxy.metrics, "/livez").status == 200


def test_addresses():
    assert parse_address("10.0.0.1:80", "x") == Address("10.0.0.1", 80)
    assert parse_address("[FD00::1]:80", "x") == Address("fd00::1", 80)
    assert parse_address("0.0.0.0:80", "x") == parse_address("[::]:80", "x") == Address("*", 80)


def test_close_ends_everything_and_twice_does_no_harm(proxy: Proxy):
    before = set(threading.enumerate())
    proxy.serve()
    proxy.servers.close()
    proxy.servers.close()
    assert not is_open(proxy.health)
    assert proxy.servers.status() == ()
    assert set(threading.enumerate()) - before == set()
    proxy.servers.serve(proxy.health, None, True)
    assert not is_open(proxy.health), "closed is closed"


def test_nothing_is_started_before_it_serves():
    before = set(threading.enumerate())
    made = Servers(lambda: None, Registry(), mode=str, configz=dict)
    assert set(threading.enumerate()) == before
    made.close()
