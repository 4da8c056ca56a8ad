"""Requests to an API server: what they are, what is counted, how they fail, how they are ended."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from proxycore.apiclient import BUCKETS, Limiter, Requests, Unreachable, chunks, connect, discard, read
from proxycore.apiclient import client as apiclient
from proxycore.source import APIServer
from proxycore.testing.apiserver import FakeAPIServer
from proxycore.testing.apitls import Authority

from .kubernetes_run import node, service


@pytest.fixture
def server():
    with FakeAPIServer() as fake:
        fake.apply(node())
        yield fake


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def client_of():
    """Clients that are closed with the test."""
    made = []

    def make(server, **settings):
        settings = {"qps": 0.0, "master": server if isinstance(server, str) else server.url, **settings}
        client = connect(APIServer(**settings), user_agent="agent/1", environment={})
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


def test_what_is_asked_and_answered(server, client_of):
    client = client_of(server)
    assert client.server == server.url
    response = client.get(
        "/api/v1/nodes", [("fieldSelector", "metadata.name=n1"), ("limit", "5")], headers={"X-A": "b"}
    )
    assert response.status == 200
    assert b'"n1"' in b"".join(chunks(response, 7))
    (request,) = server.requests
    assert (request.method, request.path) == ("GET", "/api/v1/nodes")
    assert request.query == {"fieldSelector": "metadata.name=n1", "limit": "5"}
    assert (request.user_agent, request.headers["x-a"], request.authorization) == ("agent/1", "b", "")
    assert request.headers["accept"] == "application/json"


def test_a_connection_is_used_again(server, client_of):
    client = client_of(server)
    for _ in range(5):
        assert b"NodeList" in read(client.get("/api/v1/nodes"))
        assert read(client.get("/api/v1/no-such")) != b""
    assert server.connections_total == 1
    discard(client.get("/api/v1/nodes"))
    read(client.get("/api/v1/nodes"))
    assert server.connections_total == 2


def test_a_status_is_no_error_and_nothing_is_repeated_behind_our_back(server, client_of):
    server.fail(None, None, status=429, retry_after=3)
    assert client_of(server).get("/api/v1/nodes").status == 429
    assert len(server.requests) == 1


def test_post(server, client_of):
    value = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": "a.1", "namespace": "default"},
        "eventTime": "2026-01-01T00:00:00.000000Z",
        "reportingController": "x",
        "reportingInstance": "x-1",
        "action": "A",
        "reason": "R",
        "type": "Normal",
        "note": "ä",
    }
    response = client_of(server).post("/apis/events.k8s.io/v1/namespaces/default/events", value)
    assert response.status == 201
    read(response)
    (event,) = server.events
    assert event["note"] == "ä"


def test_sockets_are_probed_while_they_are_silent(server, client_of):
    response = client_of(server).get(
        "/api/v1/nodes", [("watch", "1"), ("resourceVersion", "1001")], limited=False
    )
    sock = response.connection.sock
    tcp = socket.IPPROTO_TCP
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
    assert [sock.getsockopt(tcp, option) for option in options] == [10, 5, 3, 25_000]
    assert sock.getsockopt(tcp, socket.TCP_NODELAY)
    assert sock.gettimeout() == 30
    apiclient.allow_silence(response, 500)
    assert sock.gettimeout() == 500
    discard(response)


# -- failures, in words --


def reason(client, path="/api/v1/nodes", timeout=(2, 0.2)):
    with pytest.raises(Unreachable) as caught:
        for _ in chunks(client.get(path, timeout=timeout)):
            pass
    return str(caught.value)


def test_nobody_listens(client_of):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        assert reason(client_of(f"http://127.0.0.1:{probe.getsockname()[1]}")) == "connection refused"


def test_a_name_that_is_none(client_of):
    assert reason(client_of("http://nobody.invalid:1")).startswith("its name cannot be resolved: ")


def test_silence(server, client_of):
    fault = server.fail(hang="headers", times=None)
    assert reason(client_of(server)) == "no byte came for too long"
    fault.over()


def test_a_cut(server, client_of):
    server.fail(cut=20, times=None)
    assert reason(client_of(server)).startswith("the connection broke")


def test_no_tls_where_tls_is_expected(client_of):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(1 << 16)

        thread = threading.Thread(target=answer)
        thread.start()
        said = reason(client_of(f"https://127.0.0.1:{listener.getsockname()[1]}"))
        thread.join()
    assert said.startswith("TLS: ")
    assert "_ssl.c" not in said


def test_an_authority_that_is_not_trusted(authority, client_of):
    with FakeAPIServer(authority=authority) as secure:
        said = reason(client_of(secure))
        assert "certificate verify failed" in said
        assert "\n" not in said


def test_a_certificate_for_another_name(authority, tmp_path):
    with FakeAPIServer(authority=authority) as secure:
        where = secure.url.replace("127.0.0.1", "127.0.0.2")
        path = secure.kubeconfig(tmp_path / "kubeconfig", server=where)
        # Also bound elsewhere, so that the name alone is wrong.
        with FakeAPIServer(bind="127.0.0.2", port=secure.port, authority=authority) as other:
            other.tls_context = secure.tls_context
            client = connect(APIServer(kubeconfig=path), user_agent="x", environment={})
            assert "127.0.0.2" in reason(client)
            named = other.kubeconfig(tmp_path / "named", cluster={"tls-server-name": "localhost"})
            client = connect(APIServer(kubeconfig=named), user_agent="x", environment={})
            assert client.get("/api/v1/nodes").status == 200
            client.close()


# -- the end --


@pytest.mark.parametrize(
    "how", [{"hang": "headers"}, {"hang": "body", "after": 10}, {"hang": "body", "close": True}]
)
@pytest.mark.parametrize("secure", [False, True])
def test_close_wakes_whoever_waits(authority, client_of, tmp_path, how, secure):
    with FakeAPIServer(authority=authority if secure else None) as server:
        fault = server.fail(**how)
        client = client_of(server, kubeconfig=server.kubeconfig(tmp_path / "kubeconfig"), master="")
        failed = []

        def ask():
            try:
                for _ in chunks(client.get("/api/v1/nodes", timeout=(60, 60))):
                    pass
            except Unreachable as error:
                failed.append(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        server.until(lambda s: s.requests)
        client.close()
        thread.join(5)
        assert not thread.is_alive()
        # An answer without a length ends where the connection does: there is no telling that it was cut.
        assert failed or how.get("close")
        with pytest.raises(Unreachable, match="closed"):
            client.get("/api/v1/nodes")
        fault.over()


def test_close_wakes_a_handshake(server, client_of, tmp_path):
    server.black_hole()
    client = client_of(server.url.replace("http", "https"))
    failed = []

    def ask():
        try:
            client.get("/api/v1/nodes", timeout=(60, 60))
        except Unreachable as error:
            failed.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    server.until(lambda s: s.connections_total)
    client.close()
    thread.join(5)
    assert not thread.is_alive()
    assert failed


def test_no_descriptor_is_left(authority, tmp_path, client_of):
    def descriptors():
        gc.collect()
        return set(os.listdir("/proc/self/fd"))

    with FakeAPIServer(authority=authority) as server:
        certificate = authority.client("me")
        path = server.kubeconfig(tmp_path / "kubeconfig", client=certificate, data=True)
        server.apply(service("a"))
        before = descriptors()
        for how in ({}, {"close": True}, {"cut": 30}, {"hang": "headers"}, {"hang": "body"}):
            client = connect(APIServer(kubeconfig=path), user_agent="x", environment={})
            fault = server.fail(**how)
            with suppress(Unreachable):
                read(client.get("/api/v1/services", timeout=(2, 0.1)))
            client.close()
            fault.over()
            del client
        server.stop()
        listening = 1
        assert len(descriptors()) <= len(before) - listening


# -- pace and counts --


def test_the_limiter_lets_a_burst_pass_and_then_a_rate():
    now = [100.0]
    limiter = Limiter(2.0, 3, lambda: now[0])
    assert [limiter.reserve() for _ in range(5)] == [0.0, 0.0, 0.0, 0.5, 1.0]
    now[0] += 1.0
    assert limiter.reserve() == 0.5
    now[0] += 1000.0
    assert [limiter.allows() for _ in range(4)] == [True, True, True, False]
    now[0] += 0.5
    assert [limiter.allows() for _ in range(2)] == [True, False]


@pytest.mark.parametrize(("qps", "burst"), [(0.0, 10), (-1.0, 10), (5.0, 0)])
def test_no_limit(qps, burst):
    limiter = Limiter(qps, burst, lambda: 0.0)
    assert {limiter.reserve() for _ in range(100)} == {0.0}
    assert limiter.allows()


def test_who_waits_for_its_turn_is_woken_by_the_end(server, client_of):
    client = client_of(server, qps=0.001, burst=1)
    read(client.get("/api/v1/nodes"))
    read(client.get("/api/v1/nodes", limited=False))
    failed = threading.Event()

    def ask():
        with pytest.raises(Unreachable):
            client.get("/api/v1/nodes")
        failed.set()

    threading.Thread(target=ask, daemon=True).start()
    assert not failed.wait(0.1)
    client.close()
    assert failed.wait(5)
    assert len(server.requests) == 2


def test_counts_are_cumulative_as_prometheus_has_them():
    requests = Requests()
    for code, seconds in (("200", 0.001), ("200", 0.3), ("500", 100.0)):
        requests.record("GET", "h:1", code, seconds)
    requests.record("POST", "h:1", "201", 0.005)
    counts = requests.snapshot()
    assert counts.requests == {
        ("200", "GET", "h:1"): 2,
        ("500", "GET", "h:1"): 1,
        ("201", "POST", "h:1"): 1,
    }
    histogram = counts.durations["GET", "h:1"]
    assert len(histogram.counts) == len(BUCKETS) + 1
    assert dict(zip((*BUCKETS, "+Inf"), histogram.counts, strict=True)) == {
        **dict.fromkeys((0.005, 0.025, 0.1, 0.25), 1),
        **dict.fromkeys((0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0), 2),
        "+Inf": 3,
    }
    assert (histogram.count, round(histogram.sum, 3)) == (3, 100.301)
    assert counts.durations["POST", "h:1"].counts[0] == 1


def test_every_request_is_counted(server, client_of, monkeypatch):
    monkeypatch.setattr(apiclient, "REQUESTS", Requests())
    client = client_of(server)
    read(client.get("/api/v1/nodes"))
    read(client.get("/nothing"))
    server.stop()
    with pytest.raises(Unreachable):
        client.get("/api/v1/nodes")
    host = server.url.removeprefix("http://")
    counts = apiclient.REQUESTS.snapshot()
    assert counts.requests == {
        ("200", "GET", host): 1,
        ("404", "GET", host): 1,
        ("<error>", "GET", host): 1,
    }
    assert counts.durations["GET", host].count == 3


def test_the_heavy_half_of_the_package_stays_unloaded(server):
    script = (
        "import sys\nfrom proxycore.apiclient import *\nfrom proxycore.source import APIServer\n"
        "assert 'kubernetes' not in sys.modules\n"
        f"client = connect(APIServer(master={server.url!r}), user_agent='x', environment={{}})\n"
        "assert 'kubernetes' not in sys.modules\n"
        "client.get('/api/v1/nodes').read()\n"
        "print(sorted(name for name in sys.modules if name.startswith('kubernetes.client.')))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )
    loaded = done.stdout
    assert "kubernetes.client.rest" in loaded
    assert "core_v1_api" not in loaded
    assert "v1_service" not in loaded
