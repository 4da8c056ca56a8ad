"""The observer `events`: what becomes an Event, and how it is posted."""

from __future__ import annotations

import threading
import time

import pytest

from proxycore.apiclient import Limiter
from proxycore.backend import BackendInfo
from proxycore.changes import ChangeBatch, ServiceChange
from proxycore.model import HostState, ServicePortName
from proxycore.observer import ObserverContext
from proxycore.observers import events
from proxycore.observers.events import AGAIN_SECONDS, Judge, Note, event, refused_services
from proxycore.plugins import load_observers
from proxycore.source import APIServer
from proxycore.status import Facts, Status
from proxycore.testing.apiserver import FakeAPIServer


def port(name="web", port="http", protocol="TCP", family="IPv4"):
    return ServicePortName("shop", name, port, protocol, family)


def gone(*names):
    changes = tuple(ServiceChange(name=name, before=None, after=None) for name in names)
    return ChangeBatch(generation=1, changes=changes)


NOTHING = ChangeBatch(generation=1, changes=())


@pytest.fixture
def server():
    with FakeAPIServer() as fake:
        yield fake


@pytest.fixture
def observer(server, monkeypatch):
    monkeypatch.setattr(events, "GATHER_SECONDS", 0.0)
    monkeypatch.setattr(events, "RETRY_SECONDS", (0.01, 0.05))
    made = events.plugin()
    made.status = Status()
    yield made
    began = time.monotonic()
    made.proxycore_observer_stop()
    assert time.monotonic() - began < 5


def context(server, observer, **changes):
    values = {
        "host": HostState(node_name="n1"),
        "backend": BackendInfo(name="nft", summary="", api="", capabilities=frozenset()),
        "healthy": lambda: True,
        "facts": lambda: Facts(now=0.0, monotonic=0.0, status=observer.status),
        "mode": "nftables",
        "api_server": APIServer(master=server.url, qps=0.0),
        **changes,
    }
    return ObserverContext(**values)


def reasons(server):
    return [value["reason"] for value in server.events]


# -- what is worth an Event --


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def judge(clock):
    return Judge(Limiter(0.1, 5, clock), clock)


WEB, DB = ("shop", "web"), ("shop", "db")


def test_a_refused_service_is_told_once_and_so_is_that_it_is_mended(judge):
    assert judge.notes({WEB: "why"}) == [Note(WEB, "NotProgrammed", "why", warning=True)]
    assert judge.notes({WEB: "why"}) == []
    assert [(note.service, note.reason) for note in judge.notes({})] == [(WEB, "Programmed")]
    assert judge.notes({}) == []


def test_a_deleted_service_is_not_mended(judge):
    judge.notes({WEB: "why", DB: "why"})
    assert judge.notes({DB: "why"}, frozenset({WEB})) == []


def test_another_reason_is_told_after_a_while(judge, clock):
    judge.notes({WEB: "why"})
    clock.now += AGAIN_SECONDS - 1
    assert judge.notes({WEB: "other"}) == []
    clock.now += 1
    assert judge.notes({WEB: "other"}) == [Note(WEB, "NotProgrammed", "other", warning=True)]


def test_a_storm_is_five_events_and_a_summary_and_stays_so(judge, clock):
    storm = {("shop", f"s{number:04}"): "the table is full" for number in range(3000)}
    notes = judge.notes(storm)
    assert [note.service is None for note in notes] == [False] * 5 + [True]
    assert notes[-1].note == (
        "3000 Services are not programmed on this node, shop/s0005, shop/s0006, shop/s0007 among them: the table is full"
    )
    for _ in range(100):
        clock.now += 10
        assert judge.notes(storm) == []
    del storm["shop", "s2000"]
    assert judge.notes(storm) == []
    over = judge.notes({})
    assert len(over) <= 6
    assert over[-1] == Note(None, "Programmed", "All Services are programmed on this node again")
    assert judge.notes({}) == []


def test_one_that_comes_and_goes_is_limited(judge):
    total = sum(len(judge.notes({WEB: "why"})) + len(judge.notes({})) for _ in range(1000))
    assert total <= 7


def test_ports_of_a_service_are_put_together():
    status = Status(
        quarantined={port(): "full", port(family="IPv6"): "full", port(port="", protocol="UDP"): "odd"},
        unsupported={port("db", "sctp", "SCTP"): "needs SCTP"},
    )
    assert refused_services(status) == {
        DB: "sctp/SCTP IPv4: needs SCTP",
        WEB: "http/TCP IPv4, http/TCP IPv6: full; UDP IPv4: odd",
    }


# -- the Event --


def test_an_event_on_a_service():
    value = event(Note(WEB, "NotProgrammed", "why", warning=True), "2026-01-02T03:04:05.000006Z", "n1")
    name = value["metadata"].pop("name")
    assert name.startswith("web.")
    assert value == {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"namespace": "shop"},
        "eventTime": "2026-01-02T03:04:05.000006Z",
        "reportingController": "proxycore",
        "reportingInstance": "proxycore-n1",
        "action": "ProgramService",
        "reason": "NotProgrammed",
        "regarding": {"apiVersion": "v1", "kind": "Service", "name": "web", "namespace": "shop"},
        "note": "why",
        "type": "Warning",
    }


@pytest.mark.parametrize(
    "service",
    [
        ("../../api", "x"),
        ("shop", "x/../y"),
        ("shop", "X"),
        ("", "x"),
        ("shop", ""),
        ("a" * 64, "x"),
        ("shop", "x\n"),
    ],
)
def test_a_name_that_is_none_becomes_no_event(service):
    assert event(Note(service, "NotProgrammed", "why"), "now", "n1") is None


def test_long_texts_are_cut_to_what_the_api_takes():
    value = event(Note(WEB, "NotProgrammed", "ü" * 2000), "now", "n" * 200)
    assert len(value["note"].encode()) <= 1024
    assert value["note"].endswith("ü...")
    assert len(value["reportingInstance"]) == 128


# -- posting --


def test_starting_is_told_on_the_node(server, observer):
    observer.proxycore_observer_start(context(server, observer))
    server.until(lambda s: s.events)
    (value,) = server.events
    assert (value["reason"], value["type"], value["action"]) == ("Starting", "Normal", "StartKubeProxy")
    assert value["regarding"] == {"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "n1"}
    assert value["metadata"]["namespace"] == "default"
    assert value["note"].startswith("Starting proxycore ")
    assert value["note"].endswith("with the nft backend, for mode nftables")


def test_refused_and_mended(server, observer):
    observer.proxycore_observer_start(context(server, observer))
    observer.status = Status(quarantined={port(): "the kernel refuses"})
    observer.proxycore_observer_applied(NOTHING)
    server.until(lambda s: reasons(s) == ["Starting", "NotProgrammed"])
    assert server.events[-1]["note"] == "http/TCP IPv4: the kernel refuses"
    assert server.events[-1]["metadata"]["namespace"] == "shop"
    observer.status = Status()
    observer.proxycore_observer_applied(NOTHING)
    server.until(lambda s: reasons(s) == ["Starting", "NotProgrammed", "Programmed"])


def test_refused_and_deleted(server, observer):
    observer.proxycore_observer_start(context(server, observer))
    observer.status = Status(quarantined={port(): "no", port("db"): "no"})
    observer.proxycore_observer_failed(NOTHING)
    server.until(lambda s: len(s.events) == 3)
    observer.status = Status()
    observer.proxycore_observer_applied(gone(port()))
    server.until(lambda s: len(s.events) == 4)
    assert server.events[-1]["regarding"]["name"] == "db"


def test_what_is_mended_without_a_batch_is_noticed(server, observer, monkeypatch):
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.05)
    observer.proxycore_observer_start(context(server, observer))
    observer.status = Status(quarantined={port(): "no"})
    observer.proxycore_observer_failed(NOTHING)
    server.until(lambda s: len(s.events) == 2)
    observer.status = Status()
    server.until(lambda s: reasons(s)[-1] == "Programmed")


def test_a_storm_of_refusals_is_a_handful_of_requests(server, observer, monkeypatch):
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.02)
    observer.proxycore_observer_start(context(server, observer))
    observer.status = Status(quarantined={port(f"s{number}"): "full" for number in range(3000)})
    for _ in range(200):
        observer.proxycore_observer_failed(NOTHING)
    most = 1 + events.BURST + 1
    server.until(lambda s: len(s.events) >= most)
    assert server.events[-1]["regarding"]["kind"] == "Node"
    assert len(server.requests) <= most + 1


def test_nothing_without_an_api_server(server, observer):
    observer.proxycore_observer_start(context(server, observer, api_server=None))
    observer.proxycore_observer_applied(NOTHING)
    assert observer._worker is None


def test_an_api_server_that_cannot_be_found_is_said_and_harmless(observer, server, caplog):
    observer.proxycore_observer_start(
        context(server, observer, api_server=APIServer(kubeconfig="no-such-file"))
    )
    observer.proxycore_observer_applied(NOTHING)
    assert caplog.messages == ["no Events are written"]


def test_it_is_tried_again_while_the_server_is_away(server, observer, caplog):
    server.stop()
    observer.proxycore_observer_start(context(server, observer))
    _until(lambda: observer.failed_total >= 2, 20)
    server.start()
    _until(lambda: observer.posted_total == 1, 20)
    assert len(server.events) == 1
    assert caplog.messages.count("cannot write an Event; more of this kind are only counted") == 1
    assert observer.dropped_total == 0


def test_an_event_that_fails_again_and_again_is_given_up(server, observer):
    server.fail("events", "create", status=503, times=events.TRIES)
    observer.proxycore_observer_start(context(server, observer))
    observer.status = Status(quarantined={port(): "no"})
    observer.proxycore_observer_applied(NOTHING)
    server.until(lambda s: s.events)
    assert reasons(server) == ["NotProgrammed"]
    assert observer.dropped_total == 1


def test_a_namespace_that_is_being_deleted_keeps_no_other_waiting(server, observer):
    observer.proxycore_observer_start(context(server, observer))
    server.until(lambda s: s.events)
    server.fail("events", "create", status=403)
    observer.status = Status(quarantined={port(): "no", port("db"): "no"})
    observer.proxycore_observer_applied(NOTHING)
    server.until(lambda s: len(s.events) == 2)
    assert server.count("events", "create") == 3


def test_without_the_right_it_is_not_tried_again_soon(server, observer):
    server.fail("events", "create", status=403, times=None)
    observer.proxycore_observer_start(context(server, observer))
    server.until(lambda s: s.requests)
    observer.status = Status(quarantined={port(): "no"})
    observer.proxycore_observer_applied(NOTHING)
    with pytest.raises(AssertionError):
        _until(lambda: len(server.requests) > 1, 0.2)


def test_hooks_do_not_wait_for_a_server_that_hangs(server, observer):
    fault = server.fail("events", "create", hang="headers", times=None)
    observer.proxycore_observer_start(context(server, observer))
    server.until(lambda s: s.requests)
    done = threading.Event()

    def call():
        for _ in range(100):
            observer.proxycore_observer_failed(NOTHING)
        observer.proxycore_observer_stop()
        done.set()

    threading.Thread(target=call, daemon=True).start()
    assert done.wait(5)
    fault.over()


def test_it_is_installed_and_its_hooks_fit():
    loaded = load_observers(["events"])
    assert [cell.name for cell in loaded.cells] == ["events"]
    assert loaded.problems == ()


def _until(holds, seconds):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
