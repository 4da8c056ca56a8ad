"""The health endpoints and the other paths over real HTTP on loopback."""

from __future__ import annotations

import threading
from types import MappingProxyType

import msgspec
import pytest

from proxycore import servers
from proxycore.health import CHECKS, judge
from proxycore.model import ServicePortName
from proxycore.servers import History
from proxycore.source import Health
from proxycore.status import Facts, NodeStatus

PORT_NAME = ServicePortName("shop", "web", "http", "TCP", "IPv4")

# -- health --------------------------------------------------------------------------------------------------------


def test_healthz_is_kube_proxys(proxy):
    proxy.serve()
    answer = proxy.ask(proxy.health, "/healthz")
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
def test_codes_on_both_addresses(proxy, status, codes):
    proxy.serve()
    proxy.now(**status)
    proxy.more = {"sync_period_seconds": 0.001}
    for address in (proxy.health, proxy.metrics):
        assert {path: proxy.ask(address, path).status for path in codes} == codes


def test_a_hung_engine_is_told(proxy):
    """Nothing that answers needs the engine's thread: it is told as what it is."""
    proxy.serve()
    proxy.more = {"engine_silent_seconds": 3600.0}
    answer = proxy.ask(proxy.health, "/livez")
    assert answer.status == 503
    engine = answer.json()["checks"]["engine"]
    assert engine["detail"] == "its loop has not turned for 3600 s, past the deadline of 30 s"
    assert not engine["healthy"]


def test_verbose(proxy):
    proxy.serve()
    proxy.now(source=Health("stale", "connection refused"))
    answer = proxy.ask(proxy.health, "/readyz?verbose")
    assert answer.status == 503
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    lines = answer.body.decode().splitlines()
    assert lines[0] == "[+]engine ok"
    assert "[-]source failed: stale" in lines
    assert "connection refused" not in answer.body.decode()
    assert lines[-1] == "readyz check failed"
    assert proxy.ask(proxy.health, "/readyz?verbose=true").body == answer.body


def test_particulars_are_for_the_metrics_address_alone(proxy):
    proxy.serve()
    proxy.now(quarantined={PORT_NAME: "refused"})
    for path in ("/healthz", "/healthz?verbose"):
        assert b"shop/web" not in proxy.ask(proxy.health, path).body
        assert b"shop/web" in proxy.ask(proxy.metrics, path).body


def test_since_when_a_check_is_red_is_remembered(proxy):
    proxy.serve()
    proxy.now(drift_unrepaired=True)
    first = proxy.ask(proxy.health, "/livez").json()
    since = first["checks"]["drift"]["since"]
    assert since == first["currentTime"]
    later = proxy.ask(proxy.health, "/livez").json()
    assert later["currentTime"] > first["currentTime"]
    assert later["checks"]["drift"]["since"] == since
    proxy.now()
    assert proxy.ask(proxy.health, "/livez").json()["checks"]["drift"]["since"] > since


def test_history_prefers_what_the_facts_tell(proxy):
    history = History()
    status = msgspec.structs.replace(proxy.WELL, source_since=900.0)
    facts = Facts(now=1000.0, monotonic=0.0, status=status)
    assert history.since(judge(facts), 1000.0)["source"] == 900.0
    assert history.since(judge(facts), 1001.0)["engine"] == 1000.0


def test_checks_are_looked_at_although_nobody_asks(proxy, monkeypatch):
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
    assert looked.wait(proxy.PATIENCE)
    proxy.wait_until(lambda: "drift" in proxy.servers._history._since)
    assert proxy.servers._history._since["drift"][0] is False


def test_probes_are_counted(proxy):
    proxy.serve()
    proxy.ask(proxy.health, "/healthz")
    proxy.now(applied_total=0)
    proxy.ask(proxy.health, "/healthz")
    proxy.ask(proxy.health, "/livez")
    proxy.ask(proxy.metrics, "/livez?verbose", "HEAD")
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
def test_other_paths_of_the_health_address(proxy, path: str):
    proxy.serve()
    assert proxy.ask(proxy.health, path).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_other_methods(proxy, method: str):
    proxy.serve()
    for address, path in ((proxy.health, "/livez"), (proxy.metrics, "/metrics")):
        answer = proxy.ask(address, path, method)
        assert answer.status == 405
        assert answer.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "path", ["/livez", "/metrics", "/metrics/slis", "/configz", "/proxyMode", "/version"]
)
def test_head_is_get_without_a_body(proxy, path: str):
    proxy.serve()
    answer = proxy.ask(proxy.metrics, path, "HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert int(answer.headers["Content-Length"]) > 0
    assert answer.headers["Content-Type"] == proxy.ask(proxy.metrics, path).headers["Content-Type"]


def test_an_absolute_target_is_understood(proxy):
    proxy.serve()
    assert proxy.ask(proxy.health, f"http://{proxy.health}/readyz?verbose").body.endswith(
        b"readyz check passed\n"
    )


def test_proxy_mode(proxy):
    proxy.serve()
    answer = proxy.ask(proxy.metrics, "/proxyMode")
    assert answer.body == b"nftables"
    assert answer.headers["Content-Type"].startswith("text/plain")


def test_configz(proxy):
    proxy.serve()
    proxy.configz = {
        "kubeproxy.config.k8s.io": MappingProxyType({"clusterCIDR": ("10.0.0.0/8",)}),
        "proxycore.io": {},
    }
    answer = proxy.ask(proxy.metrics, "/configz")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == {"kubeproxy.config.k8s.io": {"clusterCIDR": ["10.0.0.0/8"]}, "proxycore.io": {}}


def test_version(proxy):
    proxy.serve()
    body = proxy.ask(proxy.metrics, "/version").json()
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


def test_service_level_indicators(proxy):
    proxy.serve()
    proxy.now(source=Health("stale", "refused"))
    proxy.ask(proxy.health, "/readyz")
    proxy.ask(proxy.health, "/readyz")
    proxy.ask(proxy.health, "/livez")
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


def test_a_check_that_does_not_turn_an_endpoint_red_is_well_there(proxy):
    proxy.serve()
    proxy.now(pending_since=0.0, refused="no such device")
    proxy.more = {"sync_period_seconds": 0.001}
    series = proxy.series("/metrics/slis")
    assert series["kubernetes_healthcheck", ("name", "pending"), ("type", "livez")] == 1
    assert series["kubernetes_healthcheck", ("name", "pending"), ("type", "readyz")] == 0
