"""The fake API server, by the standard library's own client."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import urllib.error
import urllib.request
from urllib.parse import urlencode

import pytest

from proxycore.testing.apiserver import FakeAPIServer, path_of, plural_of
from proxycore.testing.apistore import selector
from proxycore.testing.apitls import Authority

SERVICES = "/api/v1/services"


@pytest.fixture
def server():
    with FakeAPIServer() as fake:
        yield fake


def service(name, address="10.0.0.1", **labels):
    return {"kind": "Service", "metadata": {"name": name, "labels": labels}, "spec": {"clusterIP": address}}


def get(server, path=SERVICES, context=None, headers=None, **query):
    """Status and value of a list."""
    request = urllib.request.Request(f"{server.url}{path}?{urlencode(query)}", headers=headers or {})
    try:
        with urllib.request.urlopen(request, context=context, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


class Watching:
    """An open watch, read line by line."""

    def __init__(self, server, path=SERVICES, **query):
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        self._connection.request("GET", f"{path}?{urlencode({'watch': '1', **query})}")
        self.answer = self._connection.getresponse()

    def next(self):
        line = self.answer.readline()
        return json.loads(line) if line else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.answer.close()
        self._connection.close()


def names(value):
    return [item["metadata"]["name"] for item in value["items"] or ()]


def test_a_list_is_written_as_the_real_one_writes_it(server):
    version = server.apply(service("a"))
    with urllib.request.urlopen(server.url + SERVICES) as answer:
        data = answer.read()
    assert data.startswith(b'{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"')
    assert b'"items":[{"metadata":{"name":"a"' in data
    assert json.loads(data)["metadata"] == {"resourceVersion": str(version)}
    assert get(server, path_of("endpointslices"))[1]["items"] is None
    assert plural_of("EndpointSlice") == "endpointslices"


def test_pages_are_of_one_version(server):
    for number in range(5):
        server.apply(service(f"s{number}"))
    _, first = get(server, limit=2)
    assert (names(first), first["metadata"]["remainingItemCount"]) == (["s0", "s1"], 3)
    server.delete("Service", "default", "s2")
    _, second = get(server, limit=2, **{"continue": first["metadata"]["continue"]})
    assert names(second) == ["s2", "s3"]
    _, third = get(server, limit=2, **{"continue": second["metadata"]["continue"]})
    assert names(third) == ["s4"]
    assert "continue" not in third["metadata"]
    server.compact()
    assert get(server, limit=2, **{"continue": first["metadata"]["continue"]})[0] == 410


def test_an_old_server_ignores_the_limit_for_what_it_has_at_hand(server):
    server.pages_from_cache = False
    for number in range(5):
        server.apply(service(f"s{number}"))
    assert len(names(get(server, limit=2, resourceVersion="0")[1])) == 5
    assert len(names(get(server, limit=2)[1])) == 2
    assert get(server, limit=2, resourceVersion="999999")[0] == 500


def test_selectors_select(server):
    for item in (service("a", x="1"), service("b", "None"), service("c", "10.0.0.2", y="")):
        server.apply(item)
    assert names(get(server, labelSelector="!y,!z", fieldSelector="spec.clusterIP!=None")[1]) == ["a"]
    assert names(get(server, labelSelector="x=1")[1]) == ["a"]
    assert names(get(server, labelSelector="x!=1,y")[1]) == ["c"]
    assert names(get(server, fieldSelector="metadata.name=b")[1]) == ["b"]
    assert get(server, fieldSelector="spec.type=x")[0] == 400
    with pytest.raises(ValueError):
        selector("=", "")


def test_a_watch_from_a_version(server):
    version = server.apply(service("a"))
    server.apply(service("b"))
    with Watching(server, resourceVersion=version) as watch:
        seen = watch.next()
        assert (seen["type"], seen["object"]["metadata"]["name"], seen["object"]["kind"]) == (
            "ADDED",
            "b",
            "Service",
        )
        server.apply(service("b", "10.0.0.9"))
        assert watch.next()["type"] == "MODIFIED"
        deleted = server.delete("Service", "default", "b")
        seen = watch.next()
        assert (seen["type"], seen["object"]["metadata"]["resourceVersion"]) == ("DELETED", str(deleted))
        assert server.watches("services") == 1
        server.bookmark()
        seen = watch.next()
        assert (seen["type"], seen["object"]["metadata"]["resourceVersion"]) == ("BOOKMARK", str(deleted))
        server.end_watches()
        assert watch.next() is None
    server.until(lambda s: s.watches("services") == 0)


def test_what_leaves_the_selection_is_deleted_for_its_watchers(server):
    version = server.apply(service("a"))
    with Watching(server, resourceVersion=version, labelSelector="!hidden") as watch:
        server.apply(service("a", hidden="yes"))
        assert watch.next()["type"] == "DELETED"
        server.apply(service("a", "10.0.0.2", hidden="yes"))
        server.apply(service("a"))
        assert watch.next()["type"] == "ADDED"


def test_a_watch_of_the_past_is_refused_and_an_open_one_is_not_touched(server):
    version = server.apply(service("a"))
    with Watching(server, resourceVersion=version) as watch:
        for number in range(100):
            server.apply(service("a", f"10.0.1.{number}"))
            server.compact()
        assert [watch.next()["object"]["spec"]["clusterIP"] for _ in range(100)] == [
            f"10.0.1.{n}" for n in range(100)
        ]
    with Watching(server, resourceVersion=version) as watch:
        seen = watch.next()
        assert (watch.answer.status, seen["type"], seen["object"]["code"]) == (200, "ERROR", 410)
        assert watch.next() is None


def test_the_log_is_not_endless_and_a_watch_that_falls_behind_it_is_told(server, monkeypatch):
    monkeypatch.setattr("proxycore.testing.apistore.LOG_LIMIT", 10)
    version = server.apply(service("a"))
    with Watching(server, resourceVersion=version) as watch:
        with server.store.changed:
            for number in range(30):
                server.apply(service("a", f"10.0.1.{number}"))
        assert watch.next()["object"]["code"] == 410
        assert watch.next() is None
    with Watching(server, resourceVersion=server.store.version - 4) as watch:
        assert [watch.next()["object"]["spec"]["clusterIP"] for _ in range(4)] == [
            f"10.0.1.{n}" for n in range(26, 30)
        ]


def test_a_watch_ends_in_time_and_one_of_everything_begins_with_it(server):
    server.apply(service("a"))
    with Watching(server, timeoutSeconds="0") as watch:
        assert watch.next()["type"] == "ADDED"
        assert watch.next() is None


def test_cut_and_reset(server):
    for number in range(10):
        server.apply(service(f"s{number}"))
    server.fail("services", cut=100)
    with pytest.raises(http.client.IncompleteRead) as caught:
        get(server)
    assert len(caught.value.partial) == 100
    server.fail("services", cut=0, reset=True)
    with pytest.raises(ConnectionResetError):
        get(server)
    assert get(server)[0] == 200


def test_statuses_by_resource_and_verb(server):
    server.fail("services", "watch", status=403)
    server.fail("nodes", status=429, retry_after=7, times=2)
    assert get(server)[0] == 200
    assert get(server, watch="1")[0] == 403
    assert [get(server, "/api/v1/nodes")[0] for _ in range(3)] == [429, 429, 200]
    assert get(server, "/api/v1/pods")[0] == 404
    server.unserved = {"services"}
    assert get(server)[0] == 404


def test_hanging_and_going_on(server):
    server.apply(service("a"))
    fault = server.fail("services", hang="body", after=10)
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw,
        raw.makefile("rb") as stream,
    ):
        raw.sendall(f"GET {SERVICES} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        while stream.readline().strip():
            pass
        assert stream.read(10) == b'{"kind":"S'
        raw.settimeout(0.1)
        with pytest.raises(TimeoutError):
            stream.read(1)
    fault.over()
    server.heal()
    assert get(server)[0] == 200


def test_a_black_hole(server):
    server.black_hole()
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(TimeoutError):
            raw.recv(1)
    server.black_hole(False)
    assert get(server)[0] == 200


def test_a_restart_keeps_state_and_port(server):
    server.apply(service("a"))
    port = server.port
    server.stop()
    with pytest.raises(urllib.error.URLError):
        get(server)
    server.apply(service("b"))
    server.start()
    assert server.port == port
    assert names(get(server)[1]) == ["a", "b"]


def test_a_listener_of_the_callers():
    listener = socket.create_server(("127.0.0.1", 0))
    with FakeAPIServer(listener=listener) as server:
        assert server.port == listener.getsockname()[1]
        assert get(server)[0] == 200


def test_tokens_and_certificates(tmp_path):
    authority = Authority(tmp_path)
    trusting = ssl.create_default_context(cafile=str(authority.ca))
    with FakeAPIServer(authority=authority, tokens={"good"}, users={"me"}) as server:
        assert get(server, context=trusting)[0] == 401
        assert get(server, context=trusting, headers={"Authorization": "Bearer bad"})[0] == 401
        assert get(server, context=trusting, headers={"Authorization": "Bearer good"})[0] == 200
        server.tokens = {"better"}
        assert get(server, context=trusting, headers={"Authorization": "Bearer good"})[0] == 401
        made = authority.client("me")
        trusting.load_cert_chain(made.certificate, made.key)
        assert get(server, context=trusting)[0] == 200
        assert [request.authorization for request in server.requests] == [
            "",
            "Bearer bad",
            "Bearer good",
            "Bearer good",
            "",
        ]
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            get(server)


def test_events_are_held_to_the_rules_of_the_api(server):
    value = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": "a.1", "namespace": "shop"},
        "eventTime": "2026-01-01T00:00:00.000000Z",
        "reportingController": "x",
        "reportingInstance": "x-1",
        "action": "A",
        "reason": "R",
        "type": "Normal",
        "regarding": {"namespace": "shop"},
    }

    def post(**changes):
        data = json.dumps({**value, **changes}).encode()
        url = f"{server.url}/apis/events.k8s.io/v1/namespaces/shop/events"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data=data, method="POST")) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    assert post() == 201
    for wrong in (
        {"reason": ""},
        {"type": "Odd"},
        {"note": "x" * 1025},
        {"metadata": {"name": "a", "namespace": "other"}},
        {"regarding": {"namespace": "other"}},
        {"apiVersion": "v1"},
    ):
        assert post(**wrong) == 422
    assert [event["reason"] for event in server.events] == ["R"]
    assert server.requests[0].verb == "create"
