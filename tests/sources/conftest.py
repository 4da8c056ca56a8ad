"""A sink that tests can wait on, and a file source that runs while a test does."""

from __future__ import annotations

import threading
import time

import pytest

from proxycore.decode import key_of
from proxycore.source import Applied, Deleted, Health, Listed, Replaced, Synced, Trouble
from proxycore.sources.files import FileSource

PATIENCE_SECONDS = 20.0


class Collected:
    """Keeps every event, and what they amount to."""

    def __init__(self):
        self.batches = []
        self.objects = {}
        self.troubles = {}
        self.health = None
        self.synced = False
        self.threads = set()
        self._changed = threading.Condition()

    def put(self, events):
        with self._changed:
            self.threads.add(threading.get_ident())
            self.batches.append(list(events))
            for event in events:
                self._take(event)
            self._changed.notify_all()

    def _take(self, event):
        match event:
            case Applied(item):
                self.objects[key_of(item)] = item
            case Deleted(kind, namespace, name):
                del self.objects[(kind, namespace, name)]
            case Replaced(kind, items):
                self.objects = {key: item for key, item in self.objects.items() if key[0] != kind}
                self.objects |= {key_of(item): item for item in items}
            case Listed(kind, names):
                self.objects = {
                    key: item for key, item in self.objects.items() if key[0] != kind or key[1:] in names
                }
            case Trouble(subject, ""):
                del self.troubles[subject]
            case Trouble(subject, reason):
                self.troubles[subject] = reason
            case Health():
                self.health = event
            case Synced():
                self.synced = True

    @property
    def events(self):
        return [event for batch in self.batches for event in batch]

    @property
    def names(self):
        return {name for _, _, name in self.objects}

    def until(self, holds):
        """Wait until `holds(self)`; fails the test, showing what there is, when that does not come."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self._changed:
            while not holds(self):
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    if holds(self):
                        return
                    pytest.fail(
                        f"never came: {self.names=} {self.troubles=} {self.health=} last={self.batches[-3:]}"
                    )


@pytest.fixture
def follow():
    """Start file sources on paths; each gives its sink.  All are stopped, and must end, with the test."""
    running = []

    def start(path):
        source, sink = FileSource(str(path)), Collected()
        thread = threading.Thread(target=source.run, args=(sink,), daemon=True)
        thread.start()
        running.append((source, thread))
        return sink

    yield start
    for source, thread in running:
        source.stop()
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


def service(name, address="10.0.0.1", port=80, namespace="default"):
    """The manifest of a Service."""
    return f"""\
apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: {namespace}
spec:
  clusterIP: {address}
  ports:
  - port: {port}
"""


@pytest.fixture(name="service")
def service_fixture():
    return service


@pytest.fixture
def sink():
    return Collected()


@pytest.fixture
def new_sink():
    return Collected


@pytest.fixture
def place():
    """Write a file elsewhere in the same file system and rename it into place."""

    def put(path, text):
        temporary = path.parent / f".{path.name}.new"
        temporary.write_text(text)
        temporary.rename(path)

    return put
