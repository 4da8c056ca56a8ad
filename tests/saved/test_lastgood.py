"""Falling back on the saved state, and going back to the live source."""

from __future__ import annotations

import os
import threading

import pytest

from proxycore import logs, statefile
from proxycore.errors import SourceError
from proxycore.objects import Metadata, Node
from proxycore.savedstate import dump
from proxycore.saver import Saver
from proxycore.source import (
    Applied,
    Deleted,
    Health,
    Listed,
    Replaced,
    SourceContext,
    Synced,
    Trouble,
)
from proxycore.sources.lastgood import Fallback, plugin
from proxycore.store import Store
from proxycore.testing.build import NODE, endpoint_slice, service

SECONDS = 20.0
NODE_OBJECT = Node(metadata=Metadata(name=NODE))
ORIGIN = "https://10.0.0.1:6443"
NEVER = 1000.0


class Scripted:
    """A source that delivers what a test puts."""

    def __init__(self):
        self.sink = None
        self.running = threading.Event()
        self.stopped = threading.Event()

    def run(self, sink):
        self.sink = sink
        self.running.set()
        assert self.stopped.wait(SECONDS)

    def stop(self):
        self.stopped.set()

    def put(self, *events):
        assert self.running.wait(SECONDS)
        self.sink.put(list(events))


class Sink:
    """Keeps deliveries, and the store that they make."""

    def __init__(self):
        self.store = Store(NODE)
        self.deliveries = []
        self._changed = threading.Condition()

    def put(self, events):
        with self._changed:
            self.deliveries.append(events)
            for event in events:
                self.store.apply(event)
            self._changed.notify_all()

    @property
    def events(self):
        return [event for events in self.deliveries for event in events]

    def wait_for(self, condition):
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), SECONDS), self.deliveries

    @property
    def names(self):
        return sorted(name for _, name in self.store.services)


def synced(sink):
    return any(isinstance(event, Synced) for event in sink.events)


class Rig:
    def __init__(self, path):
        self.path = str(path)
        self.source = Scripted()
        self.sink = Sink()
        self.fallback = None
        self.thread = None

    def save(self, *objects, node=NODE, origin=ORIGIN, complete=True):
        store = Store(NODE)
        for item in objects:
            store.apply(Applied(item))
        statefile.write(self.path, dump(store.contents(), node=node, origin=origin, saved_at=1000.0))
        if not complete:
            statefile.mark_incomplete(self.path, node, origin)

    def start(self, wait_seconds=0.0):
        self.fallback = Fallback(
            self.source,
            self.path,
            node=NODE,
            origin=ORIGIN,
            wait_seconds=wait_seconds,
            log=logs.get("test"),
            clock=lambda: 1060.0,
        )
        self.thread = threading.Thread(target=self.fallback.run, args=(self.sink,), daemon=True)
        self.thread.start()

    def stop(self):
        if self.thread is not None:
            self.fallback.stop()
            self.thread.join(SECONDS)
            assert not self.thread.is_alive()


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path / "state")
    yield rig
    rig.stop()


def test_the_saved_state_is_served_when_the_source_does_not_come(rig):
    rig.save(service("web"))
    rig.start()
    rig.sink.wait_for(synced)
    assert rig.sink.names == ["web"]
    assert (
        Health("stale", "serving the state that was saved at 1970-01-01T00:16:40Z", 1000.0) in rig.sink.events
    )


def test_it_is_served_at_once_when_the_source_says_that_it_is_out_of_reach(rig):
    rig.save(service("web"))
    rig.start(wait_seconds=NEVER)
    rig.source.put(Health("stale", "connection refused"))
    rig.sink.wait_for(synced)
    rig.source.put(Health("stale", "connection refused"))
    assert rig.sink.events[-1] == Health(
        "stale", "serving the state that was saved at 1970-01-01T00:16:40Z; connection refused", 1000.0
    )


def test_a_source_that_comes_in_time_is_all_there_is(rig):
    rig.save(service("old"))
    rig.start(wait_seconds=NEVER)
    rig.source.put(Replaced("Service", (service("new"),)))
    rig.source.put(Replaced("EndpointSlice", ()), Synced(), Health("live"))
    rig.sink.wait_for(synced)
    assert rig.sink.names == ["new"]
    assert not any(isinstance(event, Health) and event.state == "stale" for event in rig.sink.events)


def test_the_live_lists_take_the_place_of_the_saved_state(rig):
    rig.save(service("web"), service("gone", cluster_ip="172.30.0.2"))
    rig.start()
    rig.sink.wait_for(synced)
    rig.source.put(Applied(service("web", cluster_ip="172.30.0.9")))
    assert rig.sink.names == ["gone", "web"]
    rig.source.put(Applied(service("new", cluster_ip="172.30.0.3")))
    rig.source.put(Listed("Service", frozenset({("default", "web"), ("default", "new")})))
    assert rig.sink.names == ["new", "web"]
    rig.source.put(Replaced("EndpointSlice", ()), Synced(), Health("live"))
    rig.source.put(Deleted("Service", "default", "web"))
    assert rig.sink.names == ["new"]


def test_what_the_source_has_spoken_of_is_not_taken_back(rig):
    rig.save(
        service("web"),
        service("db", cluster_ip="172.30.0.2"),
        service("gone", cluster_ip="172.30.0.4"),
        endpoint_slice("10.0.0.1"),
    )
    rig.start(wait_seconds=NEVER)
    newer = service("web", cluster_ip="172.30.0.9")
    rig.source.put(Applied(newer), Deleted("Service", "default", "gone"), Replaced("EndpointSlice", ()))
    rig.source.put(Health("stale", "the connection broke"))
    rig.sink.wait_for(synced)
    assert rig.sink.names == ["db", "web"]
    assert rig.sink.store.services["default", "web"] == newer
    assert rig.sink.store.slices(("default", "web")) == ()


def test_of_an_object_that_cannot_be_read_the_last_known_one_is_served(rig):
    rig.save(service("web"), service("db", cluster_ip="172.30.0.2"))
    rig.start(wait_seconds=NEVER)
    rig.source.put(
        Trouble("Service default/db", "spec.ports[0].port: expected int"),
        Replaced("Service", (service("web"),)),
        Synced(),
    )
    rig.sink.wait_for(synced)
    assert rig.sink.names == ["db", "web"]
    told = Trouble("Service default/db", "spec.ports[0].port: expected int", harmless=True)
    assert told in rig.sink.events


def test_of_an_object_that_was_never_good_nothing_is(rig):
    rig.start(wait_seconds=NEVER)
    rig.source.put(
        Trouble("Service default/db", "no"),
        Trouble("Service default/x", "no"),
        Trouble("Service default/x", ""),
    )
    rig.source.put(Replaced("Service", (service("web"),)), Synced())
    rig.sink.wait_for(synced)
    assert rig.sink.names == ["web"]
    troubles = [event for event in rig.sink.events if isinstance(event, Trouble)]
    assert troubles == [Trouble("Service default/db", "no")]


def test_an_incomplete_state_is_told_until_the_source_is_live(rig):
    rig.save(service("web"), complete=False)
    rig.start()
    rig.sink.wait_for(synced)
    subject = f"saved state {rig.path}"
    assert Trouble(subject, "changes that came after it was written are not in it") in rig.sink.events
    rig.source.put(Replaced("Service", ()), Synced())
    assert Trouble(subject, "") in rig.sink.events


def wait_for_problem(rig):
    pause = threading.Event()
    for _ in range(int(SECONDS / 0.01)):
        if rig.fallback.problem:
            return
        pause.wait(0.01)
    raise AssertionError("no problem was found")


def test_a_state_that_could_not_have_been_marked_counts_as_incomplete(rig, monkeypatch):
    """A disk that turned read-only: whatever came after the last write is in the kernel alone."""
    monkeypatch.setattr("proxycore.sources.lastgood.can_be_marked", lambda path: False)
    rig.save(service("web"))
    rig.start()
    rig.sink.wait_for(synced)
    told = [event for event in rig.sink.events if isinstance(event, Trouble)]
    assert [trouble.subject for trouble in told] == [f"saved state {rig.path}"]
    assert not told[0].harmless
    assert not told[0].tolerable


@pytest.mark.parametrize(
    ("whose", "said"),
    [({"node": "other"}, "is the state of node 'other'"), ({"origin": "https://x"}, "'https://x'")],
)
def test_a_foreign_state_is_refused_and_stays(rig, whose, said):
    rig.save(service("web"), **whose)
    rig.start()
    wait_for_problem(rig)
    assert said in rig.fallback.problem
    rig.source.put(Replaced("Service", ()), Synced())
    rig.sink.wait_for(synced)
    assert rig.sink.names == []
    assert os.path.exists(rig.path)


def test_a_damaged_state_is_refused_by_name(rig):
    rig.save(service("web"))
    with open(rig.path, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"xxx")
    rig.start()
    wait_for_problem(rig)
    assert rig.fallback.problem == f"{rig.path}: is damaged: its checksum is wrong"
    assert rig.sink.deliveries == []


def test_a_kind_that_cannot_be_had_is_as_it_was_saved(rig):
    rig.save(service("web"), NODE_OBJECT)
    rig.start(wait_seconds=NEVER)
    forbidden = Trouble("API resource nodes", "403", tolerable=True, kind="Node")
    rig.source.put(forbidden, Replaced("Service", ()), Replaced("EndpointSlice", ()), Synced())
    rig.sink.wait_for(synced)
    assert rig.sink.names == []
    assert rig.sink.store.node == NODE_OBJECT


def test_what_a_source_without_lists_has_not_spoken_of_is_gone(rig):
    rig.save(service("web"), service("gone", cluster_ip="172.30.0.2"))
    rig.start()
    rig.sink.wait_for(synced)
    rig.source.put(Applied(service("web")), Synced())
    assert rig.sink.names == ["web"]
    assert Health("live") in rig.sink.events


def test_a_trouble_that_is_over_before_is_none_and_one_after_passes(rig):
    rig.save(service("web"))
    rig.start(wait_seconds=NEVER)
    rig.source.put(Trouble("Service default/web", "no"), Trouble("Service default/web", ""))
    rig.source.put(Applied(service("web", cluster_ip="172.30.0.9")), Synced())
    rig.source.put(Trouble("Service default/x", "no"), Trouble("Service default/x", ""))
    troubles = [event for event in rig.sink.events if isinstance(event, Trouble)]
    assert [trouble.subject for trouble in troubles] == ["Service default/x"] * 2
    assert rig.sink.store.services["default", "web"].spec.cluster_ip == "172.30.0.9"


def test_nothing_older_comes_after_what_many_threads_say(rig):
    """Reflectors are many; whichever comes to Synced, what is saved must not overwrite what another one said."""
    rig.save(*(service(f"s{n}", cluster_ip=f"172.30.1.{n}") for n in range(20)))
    rig.start(wait_seconds=0.001)
    assert rig.source.running.wait(SECONDS)

    def speak(numbers):
        for n in numbers:
            rig.source.sink.put([Trouble(f"Service default/s{n}", "no")])
            rig.source.sink.put([Trouble(f"Service default/s{n}", "")])
            rig.source.sink.put([Applied(service(f"s{n}", cluster_ip=f"172.30.2.{n}"))])

    threads = [threading.Thread(target=speak, args=(range(k, 20, 4),)) for k in range(4)]
    for thread in threads:
        thread.start()
    rig.source.put(Synced())
    for thread in threads:
        thread.join(SECONDS)
    rig.source.put(Listed("Service", frozenset(("default", f"s{n}") for n in range(20))))
    ips = {name: item.spec.cluster_ip for (_, name), item in rig.sink.store.services.items()}
    assert ips == {f"s{n}": f"172.30.2.{n}" for n in range(20)}
    open_troubles = {}
    for event in rig.sink.events:
        if isinstance(event, Trouble):
            open_troubles[event.subject] = event.reason
    assert not any(open_troubles.values())


# -- the source `saved` ----------------------------------------------------------------------------------------------


def test_the_file_is_a_source_by_itself(rig):
    rig.save(service("web"))
    source = plugin().proxycore_source_open(SourceContext(argument=rig.path, node_name=NODE))
    source.run(rig.sink)
    assert rig.sink.names == ["web"]
    assert synced(rig.sink)


@pytest.mark.parametrize("argument", ["", "/nowhere/state"])
def test_a_file_that_is_not_there_is_said(argument):
    with pytest.raises(SourceError, match=r"there is no such file|needs a file"):
        plugin().proxycore_source_open(SourceContext(argument=argument, node_name=NODE))


# -- the saver -------------------------------------------------------------------------------------------------------


class Keeper:
    """A saver whose objects a test sets."""

    def __init__(self, path, monkeypatch):
        monkeypatch.setattr("proxycore.saver.QUIET_SECONDS", 0.0)
        self.path = str(path)
        self.store = Store(NODE)
        self.live = threading.Event()
        self.saver = Saver(
            self.path,
            node=NODE,
            origin=ORIGIN,
            read=self.store.contents,
            live=self.live,
            log=logs.get("test"),
        )

    def change(self, item):
        self.store.apply(Applied(item))
        self.saver.changed()

    @property
    def names(self):
        found = statefile.read(self.path)
        return [] if found is None else sorted(i.metadata.name for i in found.lists[0].objects)

    def wait_for(self, condition):
        pause = threading.Event()
        for _ in range(int(SECONDS / 0.01)):
            if condition():
                return
            pause.wait(0.01)
        raise AssertionError(self.saver.status())


@pytest.fixture
def keeper(tmp_path, monkeypatch):
    keeper = Keeper(tmp_path / "lib" / "state", monkeypatch)
    keeper.saver.start()
    yield keeper
    keeper.saver.stop()


def test_what_is_live_is_written(keeper):
    keeper.live.set()
    keeper.change(service("web"))
    keeper.wait_for(lambda: keeper.names == ["web"])
    keeper.change(service("db", cluster_ip="172.30.0.2"))
    keeper.wait_for(lambda: keeper.names == ["db", "web"])
    status = keeper.saver.status()
    assert status.path == keeper.path
    assert status.saved_at is not None
    assert status.problem == ""


def test_what_is_not_live_is_not_written_not_even_at_the_end(keeper):
    keeper.change(service("web"))
    keeper.saver.stop()
    assert not os.path.exists(keeper.path)


def test_the_end_writes_what_is_not_written_yet(keeper, monkeypatch):
    monkeypatch.setattr("proxycore.saver.QUIET_SECONDS", NEVER)
    keeper.live.set()
    keeper.change(service("web"))
    keeper.saver.stop()
    assert keeper.names == ["web"]


def test_a_file_that_cannot_be_used_is_kept(keeper):
    statefile.write(keeper.path, b"somebody's")
    keeper.live.set()
    keeper.change(service("web"))
    keeper.wait_for(lambda: keeper.saver.status().saved_at is not None)
    with open(f"{keeper.path}.refused") as file:
        assert file.read() == "somebody's"
    assert keeper.names == ["web"]


def test_a_disk_that_takes_nothing_is_told_and_tried_again(keeper, monkeypatch):
    monkeypatch.setattr("proxycore.saver.RETRY_SECONDS", (0.0, 0.0))
    keeper.saver._pause = 0.0
    real = statefile.write
    full = threading.Event()
    full.set()

    def write(path, data):
        if full.is_set():
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr("proxycore.saver.write", write)
    keeper.live.set()
    keeper.change(service("web"))
    keeper.wait_for(lambda: keeper.saver.status().problem == "No space left on device")
    full.clear()
    keeper.wait_for(lambda: keeper.saver.status().problem == "" and keeper.names == ["web"])
