"""The source `kubernetes` with an API server that behaves."""

from __future__ import annotations

import threading

import pytest

from proxycore.decode import key_of
from proxycore.errors import SourceError
from proxycore.plugins import load_source
from proxycore.source import APIServer, Applied, Deleted, Health, Listed, SourceContext, Synced
from proxycore.sources import reflector
from proxycore.sources.kubernetes import OURS, USER_AGENT
from proxycore.testing.apiserver import FakeAPIServer

from .conftest import Collected
from .kubernetes_run import (
    count,
    endpoint_slice,
    followed,
    live,
    node,
    ports,
    running,
    service,
    service_cidr,
    source_of,
)


@pytest.fixture
def server():
    with FakeAPIServer() as fake:
        fake.apply(node())
        fake.apply(service("web"))
        fake.apply(endpoint_slice("web-1", "web", "10.1.0.1"))
        fake.apply(service_cidr())
        yield fake


def test_first_each_kind_as_a_whole_then_synced_then_live(server):
    with followed(server) as sink:
        sink.until(live)
        assert {key[0] for key in sink.objects} == {"Service", "EndpointSlice", "Node", "ServiceCIDR"}
        assert [type(event) for event in sink.events[-2:]] == [Synced, Health]
        listed = [event.kind for event in sink.events if isinstance(event, Listed)]
        assert sorted(listed) == sorted({key[0] for key in sink.objects})
        assert count(sink, Applied) == len(sink.objects)
        assert sink.troubles == {}


def test_an_empty_cluster_is_synced(server):
    with FakeAPIServer() as empty, followed(empty) as sink:
        sink.until(live)
        assert sink.objects == {}


def test_it_asks_as_kube_proxy_does(server):
    with followed(server) as sink:
        sink.until(live)
        asked = {(request.resource, request.verb): request for request in server.requests}
    assert len(asked) == 8
    lists = {resource: request.query for (resource, verb), request in asked.items() if verb == "list"}
    first = {"limit": "500", "resourceVersion": "0"}
    assert lists == {
        "services": {**first, "labelSelector": OURS, "fieldSelector": "spec.clusterIP!=None"},
        "endpointslices": {**first, "labelSelector": OURS},
        "nodes": {**first, "fieldSelector": "metadata.name=n1"},
        "servicecidrs": {**first, "labelSelector": OURS},
    }
    for (resource, verb), request in asked.items():
        if verb == "watch":
            assert request.query["allowWatchBookmarks"] == "true"
            assert request.query["resourceVersion"] == str(server.store.version)
            assert 300 <= int(request.query["timeoutSeconds"]) <= 600
            assert {k: v for k, v in request.query.items() if "Selector" in k} == {
                k: v for k, v in lists[resource].items() if "Selector" in k
            }
    assert OURS == "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless"


def test_selectors_leave_out_what_is_not_for_us(server):
    server.apply(service("headless", "None"))
    server.apply(service("other", **{"service.kubernetes.io/service-proxy-name": ""}))
    server.apply(node("n2"))
    with followed(server) as sink:
        sink.until(live)
        assert set(ports(sink)) == {"web"}
        assert ("Node", "", "n2") not in sink.objects
        # A Service that becomes another proxy's is gone for us, and there again when it is given back.
        server.apply(service("web", **{"service.kubernetes.io/service-proxy-name": "x"}))
        sink.until(lambda s: "web" not in ports(s))
        server.apply(service("web"))
        sink.until(lambda s: "web" in ports(s))


def test_changes_come_as_they_happen_and_once(server):
    with followed(server) as sink:
        sink.until(live)
        server.apply(service("db", "10.0.0.2"))
        server.apply(service("web", port=81))
        server.delete("EndpointSlice", "default", "web-1")
        server.delete("Service", "default", "db")
        sink.until(lambda s: set(s.names) == {"web", "n1", "kubernetes"} and ports(s) == {"web": 81})
        later = sink.events[sink.events.index(Health("live")) + 1 :]
        assert [type(event) for event in later].count(Applied) == 2
        assert [type(event) for event in later].count(Deleted) == 2
        assert len(later) == 4


def test_events_of_one_chunk_are_delivered_together(server):
    with followed(server) as sink:
        sink.until(live)
        version = server.store.version
        lines = [
            f'{{"type":"ADDED","object":{{"kind":"Service","apiVersion":"v1","metadata":{{"name":"s{i}",'
            f'"namespace":"default","resourceVersion":"{version}"}},"spec":{{"clusterIP":"10.0.1.{i}",'
            '"ports":[{"port":1}]}}}\n'
            for i in range(5)
        ]
        server.order("".join(lines).encode(), "services")
        sink.until(lambda s: "s4" in s.names)
        assert [len(batch) for batch in sink.batches if isinstance(batch[0], Applied)][-1] == 5


@pytest.mark.parametrize("pages_from_cache", [True, False])
def test_pages_and_whole_lists_say_the_same(server, pages_from_cache, monkeypatch):
    monkeypatch.setattr(reflector, "LIMIT", 7)
    server.pages_from_cache = pages_from_cache
    for number in range(50):
        server.apply(service(f"s{number}", f"10.0.2.{number}"))
    with followed(server) as sink:
        sink.until(live)
        assert set(ports(sink)) == {"web", *(f"s{number}" for number in range(50))}
        assert count(sink, Listed) == 4
        assert server.count("services", "list") == (8 if pages_from_cache else 1)


def test_pages_do_not_wait_for_their_turn(server, monkeypatch):
    monkeypatch.setattr(reflector, "LIMIT", 1)
    for number in range(30):
        server.apply(service(f"s{number}", f"10.0.2.{number}"))
    # A second request would have to wait for a quarter of an hour.
    with followed(server, qps=0.001, burst=4) as sink:
        sink.until(live)
        assert len(ports(sink)) == 31


def test_bookmarks_advance_the_version_and_say_nothing(server):
    with followed(server) as sink:
        sink.until(live)
        before = len(sink.events)
        server.apply({"kind": "Event", "metadata": {"name": "raises-the-version"}})
        server.bookmark()
        server.end_watches()
        server.until(lambda s: s.count("services", "watch") == 2 and s.watches("endpointslices") == 1)
        # Only a client that took the bookmark in can go on after this.
        assert [r.query["resourceVersion"] for r in server.requests if r.verb == "watch"][4:] == [
            str(server.store.version)
        ] * len([r for r in server.requests if r.verb == "watch"][4:])
        server.apply(service("db", "10.0.0.2"))
        sink.until(lambda s: "db" in s.names)
        assert len(sink.events) == before + 1


def test_a_watch_that_ends_is_taken_up_without_a_word(server):
    with followed(server) as sink:
        sink.until(live)
        for number in range(3):
            server.apply(service("web", port=90 + number))
            sink.until(lambda s, n=number: ports(s)["web"] == 90 + n)
            server.end_watches("services")
            server.until(
                lambda s, n=number: s.count("services", "watch") == n + 2 and s.watches("services") == 1
            )
        assert [event for event in sink.events if isinstance(event, Health)] == [Health("live")]
        assert server.count("services", "list") == 1


def test_service_cidrs_are_not_everywhere(server):
    server.unserved = {"servicecidrs"}
    with followed(server) as sink:
        sink.until(live)
        assert {key[0] for key in sink.objects} == {"Service", "EndpointSlice", "Node"}
        assert sink.troubles == {}
        assert server.count("servicecidrs", "list") == 1


@pytest.mark.parametrize("resource", ["nodes", "servicecidrs"])
def test_what_a_proxy_can_do_without_may_be_forbidden(server, resource, monkeypatch):
    monkeypatch.setattr(reflector, "RARELY_SECONDS", 0.05)
    monkeypatch.setattr(reflector, "DENIED_SECONDS", 0.0)
    server.fail(resource, "list", status=403, times=3, message="no such right")
    with followed(server) as sink:
        sink.until(lambda s: s.synced and s.troubles)
        (subject, reason), *others = sink.troubles.items()
        assert (subject, others) == (f"API resource {resource}", [])
        assert "no such right" in reason
        assert "deploy/rbac.yaml" in reason
        # It is looked for again, and the trouble is over when it is there.
        sink.until(lambda s: not s.troubles and live(s))
        assert len({key[0] for key in sink.objects}) == 4


@pytest.mark.parametrize("resource", ["nodes", "servicecidrs"])
def test_a_server_that_does_not_know_its_roles_yet_is_asked_again_soon(server, resource, monkeypatch):
    monkeypatch.setattr(reflector, "RARELY_SECONDS", 1000.0)
    server.fail(resource, "list", status=403, times=2)
    with followed(server) as sink:
        sink.until(live)
        assert len({key[0] for key in sink.objects}) == 4
        assert sink.troubles == {}


def test_the_rest_waits_only_so_long_for_what_it_can_do_without(server, monkeypatch):
    monkeypatch.setattr("proxycore.sources.watchhealth.GRACE_SECONDS", 0.2)
    fault = server.fail("nodes", "list", status=500, times=None)
    with followed(server) as sink:
        sink.until(lambda s: s.synced)
        assert sink.troubles["API resource nodes"].endswith("going on without")
        fault.over()
        sink.until(lambda s: live(s) and not s.troubles)
        assert ("Node", "", "n1") in sink.objects


def test_nothing_is_synced_without_services(server):
    fault = server.fail("services", "list", status=403, times=None)
    with followed(server) as sink:
        sink.until(lambda s: s.health)
        assert "answers 403 for services" in sink.health.reason
        assert not sink.synced
        fault.over()
        sink.until(live)


def test_stop_ends_at_once_whatever_is_going_on(server, monkeypatch):
    source, sink = source_of(server), Collected()
    source.stop()
    thread = threading.Thread(target=source.run, args=(sink,), daemon=True)
    thread.start()
    thread.join(1.0)
    assert not thread.is_alive()
    assert sink.events == []
    source.stop()


def test_a_sink_that_fails_ends_the_source(server):
    class Full:
        def put(self, events):
            raise SourceError("no space left")

    source = source_of(server)
    with pytest.raises(SourceError, match="no space left"):
        source.run(Full())


def test_the_plugin_opens_with_the_context_of_its_argument(server, tmp_path):
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    cell = load_source("kubernetes")
    settings = APIServer(kubeconfig=kubeconfig, context="nowhere", qps=0.0)
    source = cell.open(SourceContext(argument="fake", node_name="n1", api_server=settings))
    assert source.origin == server.url
    with running(source) as sink:
        sink.until(live)
    assert server.requests[0].user_agent == USER_AGENT
    with pytest.raises(SourceError, match="there is no context 'nowhere'; it has fake"):
        cell.open(SourceContext(argument="", node_name="n1", api_server=settings))


def test_keys_are_those_of_the_store(server):
    with followed(server) as sink:
        sink.until(live)
        assert all(key_of(item) == key for key, item in sink.objects.items())
