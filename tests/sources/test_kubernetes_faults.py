"""The source `kubernetes` with an API server that misbehaves in every way that one was seen to."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from proxycore.source import Applied, Deleted, Health, Listed, Trouble
from proxycore.sources import reflector
from proxycore.testing.apiserver import FakeAPIServer

from .conftest import Collected
from .kubernetes_run import (
    count,
    endpoint_slice,
    followed,
    live,
    node,
    ports,
    service,
    service_cidr,
    source_of,
    stale,
)

STOP_SECONDS = 3.0
LISTED = 4
"""Objects that the first lists deliver."""
"""Generous: the machine may be busy.  Unwoken, each of the waits below takes longer."""


@pytest.fixture
def server():
    with FakeAPIServer() as fake:
        fake.apply(node())
        fake.apply(service("web"))
        fake.apply(endpoint_slice("web-1", "web", "10.1.0.1"))
        fake.apply(service_cidr())
        yield fake


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits of seconds become short ones."""
    monkeypatch.setattr(reflector, "LIST_SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(reflector, "BACK_OFF_SECONDS", (0.02, 0.2))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- the server is not there --


def test_a_server_that_is_away_at_the_start_is_waited_for():
    server = FakeAPIServer(port=free_port())
    server.apply(service("web"))
    with followed(server) as sink:
        sink.until(stale)
        assert sink.health.reason.startswith(
            f"API server {server.url}: connection refused; nothing was heard of "
        )
        assert not sink.synced
        with server:
            sink.until(live)
            assert ports(sink) == {"web": 80}
            assert count(sink, Health) == 2


def test_a_restart_in_mid_watch_loses_nothing(server):
    with followed(server) as sink:
        sink.until(live)
        server.stop()
        sink.until(stale)
        assert "connection refused; last heard of" in sink.health.reason
        server.apply(service("web", port=81))
        server.apply(service("db", "10.0.0.2"))
        server.delete("Service", "default", "db")
        server.start()
        sink.until(lambda s: live(s) and ports(s) == {"web": 81})
        # The watch went on from its version: nothing was listed again, and every change was told.
        assert server.count("services", "list") == 1
        assert [type(e) for e in sink.events if isinstance(e, Applied | Deleted)][LISTED:] == [
            Applied,
            Applied,
            Deleted,
        ]


def test_a_short_absence_is_told_once(server):
    with followed(server) as sink:
        sink.until(live)
        for _ in range(2):
            server.stop()
            sink.until(stale)
            server.start()
            sink.until(live)
        assert [event.state for event in sink.events if isinstance(event, Health)] == [
            "live",
            "stale",
        ] * 2 + ["live"]


def test_a_black_hole_makes_stale_and_ends(server):
    server.black_hole()
    with followed(server) as sink:
        sink.until(stale)
        assert "no byte came for too long" in sink.health.reason
        server.black_hole(False)
        sink.until(live)


# -- it answers, but not with what was asked for --


@pytest.mark.parametrize("verb", ["list", "watch"])
@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_statuses(server, verb, status):
    fault = server.fail("services", verb, status=status, times=None, message="for no reason")
    with followed(server) as sink:
        sink.until(lambda s: stale(s) and s.synced is (verb == "watch"))
        assert f"answers {status} for services: for no reason" in sink.health.reason
        fault.over()
        sink.until(live)
        assert ports(sink) == {"web": 80}
        assert count(sink, Health) == 2


def test_retry_after_is_honoured(server):
    server.fail("services", "list", status=429, retry_after=1)
    began = time.monotonic()
    with followed(server) as sink:
        sink.until(live)
        assert time.monotonic() - began >= 1
        assert server.count("services", "list") == 2


def test_a_body_that_is_no_status_does_no_harm(server):
    server.fail("services", "list", status=502, body=b"<html>Bad Gateway</html>" * 10_000)
    server.fail("services", "list", status=301, body=b"")
    with followed(server) as sink:
        sink.until(live)
        said = [event.reason for event in sink.events if isinstance(event, Health)]
        assert [reason.partition("; ")[0].rpartition(": ")[2] for reason in said] == [
            "answers 502 for services",
            "answers 301 for services",
            "",
        ]


def test_a_list_that_is_behind_is_asked_for_without_a_version(server):
    server.fail("services", "list", status=500, message="Too large resource version")
    with followed(server) as sink:
        sink.until(live)
        asked = [
            request.query
            for request in server.requests
            if (request.resource, request.verb) == ("services", "list")
        ]
        assert [query.get("resourceVersion") for query in asked] == ["0", None]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"not JSON",
        b'{"kind":"PodList","metadata":{"resourceVersion":"5"},"items":[]}',
        b'{"kind":"ServiceList","metadata":{},"items":[]}',
        b'{"kind":"ServiceList","metadata":{"resourceVersion":"5"},"items":[{"metadata":{"name":"x"}}',
        b'{"kind":"ServiceList","metadata":{"resourceVersion":"5"},"items":{}}',
    ],
)
def test_what_is_no_list_is_asked_for_again(server, body):
    server.fail("services", "list", body=body)
    with followed(server) as sink:
        sink.until(live)
        assert ports(sink) == {"web": 80}
        assert count(sink, Listed) == 4


# -- 410 --


def test_410_by_status_and_by_event_lists_again(server):
    for fault in ({"status": 410}, {"gone": True}):
        with followed(server) as sink:
            sink.until(live)
            lists = server.count("services", "list")
            server.fail("services", "watch", **fault)
            server.end_watches("services")
            sink.until(lambda s: count(s, Listed) == 5)
            server.until(lambda s: s.watches("services") == 1)
            assert server.count("services", "list") == lists + 1
            newest = [r for r in server.requests if (r.resource, r.verb) == ("services", "list")][-1]
            assert "resourceVersion" not in newest.query
            assert [event.state for event in sink.events if isinstance(event, Health)] == ["live"]


def test_listing_again_deletes_what_has_vanished(server):
    server.apply(service("db", "10.0.0.2"))
    with followed(server) as sink:
        sink.until(live)
        server.stop()
        server.delete("Service", "default", "db")
        server.apply(service("new", "10.0.0.3"))
        server.compact()
        server.start()
        sink.until(lambda s: ports(s) == {"web": 80, "new": 80})
        assert count(sink, Deleted) == 0


def test_a_page_that_has_expired_begins_the_list_again(server, monkeypatch):
    monkeypatch.setattr(reflector, "LIMIT", 2)
    for number in range(5):
        server.apply(service(f"s{number}", f"10.0.2.{number}"))
    server.fail(
        "services", "list", page=True, status=410, message="The provided continue parameter is too old"
    )
    with followed(server) as sink:
        sink.until(live)
        assert len(ports(sink)) == 6
        asked = [r.query for r in server.requests if (r.resource, r.verb) == ("services", "list")]
        assert ["continue" in query for query in asked] == [False, True, False, True, True]
        assert "resourceVersion" not in asked[2]


def test_a_server_that_forgets_at_once_is_not_stormed(server):
    fault = server.fail("services", "watch", gone=True, times=None)
    with followed(server) as sink:
        sink.until(stale)
        assert "it forgets changes faster than they can be followed" in sink.health.reason
        fault.over()
        # Only after it has lasted is such a watch trusted; an event is proof too.
        server.until(lambda s: s.watches("services") == 1)
        server.apply(service("db", "10.0.0.2"))
        sink.until(lambda s: live(s) and "db" in ports(s))


def test_watches_that_end_at_once_are_stale_until_one_lasts(server, monkeypatch):
    monkeypatch.setattr(reflector, "SHORT_SECONDS", 0.3)
    fault = server.fail("services", "watch", cut=0, times=None)
    with followed(server) as sink:
        sink.until(stale)
        assert "its watches end as soon as they begin" in sink.health.reason
        fault.over()
        sink.until(live)


# -- connections that hang or break --


@pytest.mark.parametrize("verb", ["list", "watch"])
def test_headers_that_never_come(server, verb):
    fault = server.fail("services", verb, hang="headers")
    with followed(server) as sink:
        sink.until(live)
        assert ports(sink) == {"web": 80}
        assert server.count("services", verb) == 2
    fault.over()


def test_a_list_that_stalls(server):
    fault = server.fail("services", "list", hang="body", after=120)
    with followed(server) as sink:
        sink.until(live)
        assert server.count("services", "list") == 2
    fault.over()


def test_a_watch_that_stalls_is_given_up_after_its_time(server, monkeypatch):
    monkeypatch.setattr(reflector, "WATCH_SECONDS", (0, 0))
    monkeypatch.setattr(reflector, "WATCH_SILENCE_SECONDS", 0.3)
    fault = server.fail("services", "watch", hang="body", after=20)
    with followed(server) as sink:
        sink.until(lambda s: s.synced)
        server.apply(service("db", "10.0.0.2"))
        sink.until(lambda s: "db" in ports(s))
        assert count(sink, Applied) == LISTED + 1
    fault.over()


@pytest.mark.parametrize("reset", [False, True])
def test_a_watch_that_is_cut(server, reset):
    with followed(server) as sink:
        sink.until(live)
        for number in range(3):
            server.cut_watches("services", reset=reset)
            server.apply(service("web", port=90 + number))
            sink.until(lambda s, n=number: ports(s)["web"] == 90 + n)
        assert count(sink, Applied) == LISTED + 3
        assert server.count("services", "list") == 1
        assert count(sink, Health) == 1


def test_a_line_in_halves_and_bytes_one_by_one(server):
    server.fail("services", "watch", dribble=1)
    with followed(server) as sink:
        sink.until(live)
        server.apply(service("db", "10.0.0.2"))
        sink.until(lambda s: "db" in ports(s))
        line = (
            b'{"type":"ADDED","object":{"kind":"Service","apiVersion":"v1","metadata":{"name":"half",'
            b'"namespace":"default","resourceVersion":"2000"},"spec":{"clusterIP":"10.0.0.7","ports":[{"port":7}]}}}\n'
        )
        server.order(line[:50], "services")
        server.order(line[50:] + line[:9], "services")
        sink.until(lambda s: ports(s).get("half") == 7)
        server.cut_watches("services")
        # The other half never comes: it was no event.
        server.until(lambda s: s.count("services", "watch") == 2)
        assert count(sink, Applied) == LISTED + 2


@pytest.mark.parametrize(
    "how", [{"close": True}, {"chunk": 7}, {"chunk": 1 << 16}, {"pretty": True}, {"dribble": 3}]
)
def test_bodies_of_every_make(server, how):
    server.fail(None, None, times=None, **how)
    for number in range(20):
        server.apply(service(f"s{number}", f"10.0.2.{number}"))
    with followed(server) as sink:
        sink.until(live)
        assert len(ports(sink)) == 21
        server.apply(service("db", "10.0.0.2"))
        sink.until(lambda s: "db" in ports(s))


# -- events and objects that are not understood --


def event_line(kind, item, type_="ADDED"):
    return f'{{"type":"{type_}","object":{{"kind":"{kind}","apiVersion":"v1",{item}}}}}\n'.encode()


@pytest.mark.parametrize(
    "line",
    [
        event_line("Service", '"metadata":{"name":"x","resourceVersion":"1"}', "RENAMED"),
        event_line("Gadget", '"metadata":{"name":"x","namespace":"default","resourceVersion":"1"}'),
        event_line("Service", '"metadata":null'),
        event_line("Service", '"metadata":{"resourceVersion":"1"}'),
        event_line("Service", '"metadata":{"resourceVersion":"1"}', "DELETED"),
        event_line("Service", '"metadata":{"name":"unheard-of","resourceVersion":"1"}', "DELETED"),
        event_line("Service", '"metadata":7'),
        b'{"type":7,"object":{}}\n',
        b"[]\n",
        b"{}\n",
        b"\n\n",
        b"this is not JSON\n",
        b'{"type":"ERROR","object":{"kind":"Status","code":500,"message":"etcd has moved"}}\n',
        b'{"type":"ERROR","object":{"kind":"Status"}}\n',
    ],
)
def test_an_event_that_is_none_of_ours_harms_nobody(server, line):
    with followed(server) as sink:
        sink.until(live)
        server.order(line, "services")
        server.apply(service("db", "10.0.0.2"))
        sink.until(lambda s: "db" in ports(s))
        assert count(sink, Listed) == 4
        assert count(sink, Deleted) == 0
        sink.until(live)


BAD = service("bad") | {"spec": {"clusterIP": "10.0.0.9", "ports": [{"port": "eighty"}]}}


def test_an_undecodable_object_in_the_first_list_is_set_aside(server):
    server.apply(BAD)
    with followed(server) as sink:
        sink.until(live)
        assert ports(sink) == {"web": 80}
        assert sink.troubles == {"Service default/bad": "spec.ports[0].port: expected `int`, got `str`"}
        trouble = next(event for event in sink.events if isinstance(event, Trouble))
        assert not trouble.harmless
        # Told before anything of its kind can be programmed.
        assert sink.events.index(trouble) < next(
            i for i, e in enumerate(sink.events) if isinstance(e, Listed) and e.kind == "Service"
        )
        server.apply(service("bad", "10.0.0.9"))
        sink.until(lambda s: not s.troubles)
        assert ports(sink) == {"web": 80, "bad": 80}


def test_an_object_that_goes_bad_keeps_its_last_state_until_it_is_mended_or_gone(server):
    server.apply(service("bad", "10.0.0.9"))
    with followed(server) as sink:
        sink.until(live)
        server.apply(BAD)
        sink.until(lambda s: s.troubles)
        assert ports(sink) == {"web": 80, "bad": 80}
        server.apply(BAD | {"metadata": {**BAD["metadata"], "annotations": {"a": "b"}}})
        server.apply(service("db", "10.0.0.2"))
        sink.until(lambda s: "db" in ports(s))
        assert count(sink, Trouble) == 1
        server.delete("Service", "default", "bad")
        sink.until(lambda s: not s.troubles)
        assert ports(sink) == {"web": 80, "db": 80}


def test_listing_again_keeps_the_last_state_of_what_is_bad_and_drops_what_is_gone(server):
    server.apply(service("bad", "10.0.0.9"))
    server.apply(service("gone", "10.0.0.8"))
    with followed(server) as sink:
        sink.until(live)
        server.stop()
        server.apply(BAD)
        server.delete("Service", "default", "gone")
        server.apply(service("new", "10.0.0.3"))
        server.compact()
        server.start()
        sink.until(lambda s: "new" in ports(s) and s.troubles)
        assert ports(sink) == {"web": 80, "bad": 80, "new": 80}
        server.stop()
        server.delete("Service", "default", "bad")
        server.compact()
        server.start()
        sink.until(lambda s: not s.troubles)
        assert ports(sink) == {"web": 80, "new": 80}


def test_an_object_without_a_name_deletes_nothing(server):
    with followed(server) as sink:
        sink.until(live)
        body = (
            b'{"kind":"ServiceList","metadata":{"resourceVersion":"5000"},"items":[{"metadata":{"name":7}}]}'
        )
        server.fail("services", "list", body=body)
        server.fail("services", "watch", status=410)
        server.end_watches("services")
        sink.until(lambda s: s.troubles)
        assert sink.troubles == {"services without a name": "1 of the list cannot be read"}
        assert ports(sink) == {"web": 80}


def test_a_null_list_is_an_empty_one(server):
    server.apply(endpoint_slice("empty", "web") | {"endpoints": None, "ports": None})
    with followed(server) as sink:
        sink.until(live)
        assert ("EndpointSlice", "default", "empty") in sink.objects


# -- the end --


def stops_in(source, sink, ready):
    thread = threading.Thread(target=source.run, args=(sink,), daemon=True)
    thread.start()
    ready()
    began = time.monotonic()
    source.stop()
    thread.join(STOP_SECONDS)
    assert not thread.is_alive()
    return time.monotonic() - began


def no_thread_is_left():
    deadline = time.monotonic() + STOP_SECONDS
    while any(thread.name.startswith("watch-") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("fault", [{"hang": "headers"}, {"hang": "body", "after": 60}, {"status": 500}])
@pytest.mark.parametrize("verb", ["list", "watch"])
def test_stop_wakes_whoever_waits(server, verb, fault, monkeypatch):
    monkeypatch.setattr(reflector, "LIST_SILENCE_SECONDS", 60)
    monkeypatch.setattr(reflector, "BACK_OFF_SECONDS", (60, 60))
    held = server.fail(None, verb, times=None, **fault)
    stops_in(source_of(server), Collected(), lambda: server.until(lambda s: s.count("services", verb) >= 1))
    no_thread_is_left()
    held.over()


def test_stop_wakes_a_quiet_watch(server):
    sink = Collected()
    stops_in(source_of(server), sink, lambda: sink.until(live))
    no_thread_is_left()


def test_stop_wakes_who_waits_for_a_connection(monkeypatch):
    """A listener whose queue is full leaves a client without an answer to its first packet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fill = [socket.socket() for _ in range(4)]
        for one in fill:
            one.setblocking(False)
            one.connect_ex(address)
        server = FakeAPIServer(port=address[1])
        source = source_of(server)
        # Threads that still wait for a connection after the others have gone would show here.
        stops_in(source, Collected(), lambda: time.sleep(0.3))
        no_thread_is_left()
        for one in fill:
            one.close()


def test_nothing_is_delivered_after_the_end(server):
    sink = Collected()
    stops_in(source_of(server), sink, lambda: sink.until(live))
    seen = len(sink.events)
    server.apply(service("db", "10.0.0.2"))
    no_thread_is_left()
    assert len(sink.events) == seen
