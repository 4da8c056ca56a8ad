"""What the fake API server holds: objects by resource, a versioned log with a floor, selectors that really select."""

from __future__ import annotations

import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

LOG_LIMIT = 50_000
"""Changes that are kept; beyond, the older half is forgotten."""
ObjectKey = tuple[str, str]
"""Namespace and name."""


class Resource(NamedTuple):
    """A kind of object as the API serves it; `empty`: what a bookmark's object holds besides metadata."""

    kind: str
    api_version: str
    plural: str
    namespaced: bool
    empty: str = ""

    @property
    def path(self) -> str:
        """Where all objects of the kind are listed."""
        group = "api" if "/" not in self.api_version else "apis"
        return f"/{group}/{self.api_version}/{self.plural}"

    @property
    def prefix(self) -> bytes:
        """What a watched object starts with; objects in lists do without."""
        return f'{{"kind":"{self.kind}","apiVersion":"{self.api_version}",'.encode()


RESOURCES = (
    Resource("Service", "v1", "services", True, ',"spec":{},"status":{"loadBalancer":{}}'),
    Resource("Node", "v1", "nodes", False, ',"spec":{},"status":{"nodeInfo":{}}'),
    Resource(
        "EndpointSlice",
        "discovery.k8s.io/v1",
        "endpointslices",
        True,
        ',"addressType":"","endpoints":null,"ports":null',
    ),
    Resource("ServiceCIDR", "networking.k8s.io/v1", "servicecidrs", False, ',"spec":{},"status":{}'),
    Resource("Event", "events.k8s.io/v1", "events", True),
)
BY_KIND = {resource.kind: resource for resource in RESOURCES}
BY_PLURAL = {resource.plural: resource for resource in RESOURCES}


class Stored(NamedTuple):
    """One version of an object: its JSON without kind and apiVersion, and what selectors ask for."""

    version: int
    item: bytes
    labels: Mapping[str, Any]
    fields: Mapping[str, Any]


class Entry(NamedTuple):
    """One change of the log; `before` and `after` are None where the object was not, or is not, there."""

    version: int
    kind: str
    key: ObjectKey
    before: Stored | None
    after: Stored | None


Selector = Callable[[Stored], bool]
Event = tuple[str, bytes]
"""Type and object of a watch event."""


class Gone(Exception):
    """The version, or the continue token, is older than what is kept."""


_TERM = re.compile(r"(?P<no>!)?(?P<key>[^=!]+)(?:(?P<op>!=|==?)(?P<value>.*))?\Z")


def selector(labels: str, fields: str) -> Selector:
    """What `labelSelector` and `fieldSelector` of a request select.  Raises ValueError: it is none that we know."""
    tests: list[Callable[[Stored], bool]] = []
    for text in filter(None, labels.split(",")):
        tests.append(_label_test(text))
    for text in filter(None, fields.split(",")):
        tests.append(_field_test(text))
    return lambda stored: all(test(stored) for test in tests)


def _label_test(text: str) -> Selector:
    match = _TERM.match(text.strip())
    if match is None:
        raise ValueError(f"unable to parse requirement: {text!r}")
    key, value = match["key"].strip(), match["value"]
    if match["op"] is None:
        wanted = match["no"] is None
        return lambda stored: (key in stored.labels) is wanted
    equal = match["op"] != "!="
    return lambda stored: (stored.labels.get(key) == value) is equal


def _field_test(text: str) -> Selector:
    match = _TERM.match(text.strip())
    if match is None or match["op"] is None or match["key"] not in ("metadata.name", "spec.clusterIP"):
        raise ValueError(f"field label not supported: {text!r}")
    key, value, equal = match["key"], match["value"], match["op"] != "!="
    return lambda stored: (stored.fields.get(key) == value) is equal


class ObjectStore:
    """Objects and the log of their changes; every method may be called from any thread.

    `changed` is notified at each change.  The version is one number over all resources, as etcd's is.
    """

    def __init__(self, version: int = 1000) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.version = version
        self.floor = version
        self._kept = version
        """The log has every change after this version."""
        self._objects: dict[str, dict[ObjectKey, Stored]] = {resource.kind: {} for resource in RESOURCES}
        self._log: list[Entry] = []
        self._pages: dict[str, tuple[int, list[bytes]]] = {}

    def apply(self, value: Mapping[str, Any]) -> int:
        """Create or replace an object, of which anything but kind and names may be wrong; its new version."""
        resource = BY_KIND[value["kind"]]
        with self.changed:
            self.version += 1
            metadata = {**(value.get("metadata") or {}), "resourceVersion": str(self.version)}
            name = metadata["name"]
            namespace = metadata.setdefault("namespace", "default") if resource.namespaced else ""
            key = (namespace, name)
            before = self._objects[resource.kind].get(key)
            rest = {k: v for k, v in value.items() if k not in ("kind", "apiVersion", "metadata")}
            spec = value.get("spec")
            stored = Stored(
                self.version,
                msgspec.json.encode({"metadata": metadata, **rest}),
                metadata.get("labels") or {},
                {
                    "metadata.name": name,
                    "spec.clusterIP": spec.get("clusterIP") if isinstance(spec, dict) else None,
                },
            )
            self._objects[resource.kind][key] = stored
            self._note(Entry(self.version, resource.kind, key, before, stored))
            return self.version

    def delete(self, kind: str, namespace: str, name: str) -> int:
        """Delete an object.  Raises KeyError: it is not there."""
        key = (namespace if BY_KIND[kind].namespaced else "", name)
        with self.changed:
            before = self._objects[kind].pop(key)
            self.version += 1
            self._note(Entry(self.version, kind, key, before, None))
            return self.version

    def _note(self, entry: Entry) -> None:
        self._log.append(entry)
        if len(self._log) > LOG_LIMIT:
            self._kept = self._log[LOG_LIMIT // 2].version
            del self._log[: LOG_LIMIT // 2 + 1]
            self.floor = max(self.floor, self._kept)
        self.changed.notify_all()

    def compact(self, keep: int | None = None) -> None:
        """Forget the past and all continue tokens: an older version is "too old" from now on.

        `keep`: changes after this version stay for watches that are open, which compaction does not touch.
        """
        with self.changed:
            self.floor = self.version
            self._kept = max(self._kept, self.version if keep is None else keep)
            self._log = [entry for entry in self._log if entry.version > self._kept]
            self._pages.clear()

    def expire_pages(self) -> None:
        """Forget the continue tokens alone."""
        with self.changed:
            self._pages.clear()

    def get(self, kind: str) -> dict[ObjectKey, dict[str, Any]]:
        """All objects of a kind as plain values."""
        with self.changed:
            return {key: msgspec.json.decode(stored.item) for key, stored in self._objects[kind].items()}

    def page(
        self, resource: Resource, select: Selector, limit: int, token: str
    ) -> tuple[int, list[bytes], str, int]:
        """Version, items, next token (empty: that was all) and number of items that are left.

        Raises Gone: the token has expired.
        """
        with self.changed:
            if token:
                if token not in self._pages:
                    raise Gone
                version, items = self._pages[token]
            else:
                version = self.version
                items = [
                    stored.item
                    for _, stored in sorted(self._objects[resource.kind].items())
                    if select(stored)
                ]
            if not limit or len(items) <= limit:
                return version, items, "", 0
            following = f"{resource.plural}-{version}-{len(items) - limit}-{limit}"
            self._pages[following] = (version, items[limit:])
            return version, items[:limit], following, len(items) - limit

    def current(self, resource: Resource, select: Selector) -> tuple[int, list[Event]]:
        """Everything as ADDED events, which a watch from no version, or version 0, starts with."""
        with self.changed:
            found = [stored for stored in self._objects[resource.kind].values() if select(stored)]
            return self.version, [("ADDED", resource.prefix + stored.item[1:]) for stored in found]

    def since(
        self, resource: Resource, select: Selector, version: int, *, open_watch: bool = False
    ) -> tuple[int, list[Event]]:
        """Events after a version, and the version that they lead to.

        Raises Gone: it is too old; for a watch that is open only if it has fallen behind the log.
        """
        with self.changed:
            if version < (self._kept if open_watch else self.floor):
                raise Gone
            start = bisect_right(self._log, version, key=lambda entry: entry.version)
            events = []
            for entry in self._log[start:]:
                if entry.kind == resource.kind and (event := _event(resource, select, entry)):
                    events.append(event)
            return max(version, self.version), events


def _event(resource: Resource, select: Selector, entry: Entry) -> Event | None:
    """An object that leaves the selection is deleted for who watches it, one that enters is added."""
    was = entry.before is not None and select(entry.before)
    if entry.after is not None and select(entry.after):
        return ("MODIFIED" if was else "ADDED"), resource.prefix + entry.after.item[1:]
    if not was:
        return None
    assert entry.before is not None
    # The last state, at the version of the deletion.
    value = msgspec.json.decode(entry.before.item)
    value["metadata"]["resourceVersion"] = str(entry.version)
    return "DELETED", resource.prefix + msgspec.json.encode(value)[1:]
