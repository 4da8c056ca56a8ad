"""The latest objects, and which Services a new one touches.

Nothing is resolved here.  Slices are kept taken apart (`SliceEndpoints`), because that is a third of the memory of the
objects, and grouped by Service.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from . import canonical
from .frontends import ServiceKey
from .objects import (
    ANNOTATION_TRIGGER_TIME,
    LABEL_SERVICE_NAME,
    APIObject,
    EndpointSlice,
    Kind,
    Metadata,
    Node,
    Service,
    ServiceCIDR,
    is_ours,
)
from .slices import SliceEndpoints, parse
from .source import Applied, Deleted, Event, Listed, Replaced
from .timestamps import seconds_of

_NO_TIMES: Mapping[ServiceKey, float] = {}


class Dirty(msgspec.Struct, frozen=True, gc=False):
    """What an event touched.  `trigger_times`: of the Services whose slices say when their change began."""

    services: tuple[ServiceKey, ...] = ()
    node: bool = False
    service_cidrs: bool = False
    trigger_times: Mapping[ServiceKey, float] = _NO_TIMES


CLEAN = Dirty()


class Contents(NamedTuple):
    """Everything that a Store holds."""

    services: tuple[Service, ...]
    slices: tuple[SliceEndpoints, ...]
    node: Node | None
    service_cidrs: tuple[ServiceCIDR, ...]


class Store:
    """Objects as they are known now, for node `node_name`.

    An object that is not for this proxy (`is_ours`) is as good as deleted.
    """

    def __init__(self, node_name: str) -> None:
        self.node_name = node_name
        self.version = 0
        """Raised whenever something changes."""
        self.node: Node | None = None
        self.services: dict[ServiceKey, Service] = {}
        self._slices: dict[ServiceKey, tuple[SliceEndpoints, ...]] = {}
        self._owner: dict[tuple[str, str], str] = {}  # namespace and name of a slice: name of its Service
        self._service_cidrs: dict[str, ServiceCIDR] = {}

    def apply(self, event: Event) -> Dirty:
        """Take an event in.  What says the same as what is known, or deletes the unknown, touches nothing."""
        if type(event) is Applied:  # almost all are, and a pattern costs more
            touched = self._applied(event.object)
            if touched is not CLEAN:
                self.version += 1
            return touched
        match event:
            case Deleted(kind=kind, namespace=namespace, name=name):
                touched = self._deleted(kind, namespace, name)
            case Replaced(kind=kind, objects=items):
                touched = self._replaced(kind, items)
            case Listed(kind=kind, names=names):
                touched = self._merged(
                    [self._deleted(kind, *key) for key in self._known(kind) if key not in names]
                )
            case _:
                return CLEAN
        if touched != CLEAN:
            self.version += 1
        return touched

    def contents(self) -> Contents:
        """All that is known, to be read on another thread: the values are frozen, the collections are copies."""
        slices = itertools.chain.from_iterable(self._slices.values())
        return Contents(tuple(self.services.values()), tuple(slices), self.node, self.service_cidr_objects)

    def slices(self, service: ServiceKey) -> tuple[SliceEndpoints, ...]:
        """All slices of a Service, by name."""
        return self._slices.get(service, ())

    @property
    def service_cidr_objects(self) -> tuple[ServiceCIDR, ...]:
        """All ServiceCIDRs."""
        return tuple(self._service_cidrs.values())

    @property
    def service_cidrs(self) -> tuple[str, ...]:
        """Canonical CIDRs of all ServiceCIDRs, sorted; those that cannot be read are left out."""
        found = set()
        for item in self._service_cidrs.values():
            for text in (item.spec.cidrs if item.spec else None) or ():
                try:
                    found.add(canonical.cidr(text))
                except ValueError:
                    continue
        return tuple(sorted(found))

    def _applied(self, item: APIObject) -> Dirty:
        if isinstance(item, EndpointSlice):
            return self._slice_applied(item)
        metadata = item.metadata
        if isinstance(item, Node):
            if metadata.name != self.node_name or item == self.node:
                return CLEAN
            self.node = item
            return Dirty(node=True)
        if isinstance(item, ServiceCIDR):
            if self._service_cidrs.get(metadata.name) == item:
                return CLEAN
            before = self.service_cidrs
            self._service_cidrs[metadata.name] = item
            return Dirty(service_cidrs=True) if self.service_cidrs != before else CLEAN
        key = (metadata.namespace, metadata.name)
        if not is_ours(item):
            return self._deleted("Service", *key)
        # Labels and annotations were looked at just now; kubectl alone writes a copy of the whole Service into them.
        kept = Service(
            Metadata(metadata.name, metadata.namespace, creation_timestamp=metadata.creation_timestamp),
            item.spec,
            item.status,
        )
        if self.services.get(key) == kept:
            return CLEAN
        self.services[key] = kept
        return Dirty((key,))

    def _slice_applied(self, item: EndpointSlice) -> Dirty:
        metadata = item.metadata
        namespace, name, labels = metadata.namespace, metadata.name, metadata.labels
        if not labels or not labels.get(LABEL_SERVICE_NAME) or not is_ours(item):
            return self._deleted("EndpointSlice", namespace, name)
        parsed = parse(item, self.node_name)
        key = (namespace, parsed.service)
        former = self._owner.get((namespace, name))
        touched: tuple[ServiceKey, ...] = (key,)
        if former == parsed.service:
            known = self._slices[key]
            if len(known) == 1:
                if known[0] == parsed:
                    return CLEAN
                self._slices[key] = (parsed,)
            else:
                if parsed in known:
                    return CLEAN
                self._slices[key] = tuple([parsed if other.name == name else other for other in known])
        else:
            if former is not None:
                touched = (key, (namespace, former))
                self._drop_slice((namespace, former), name)
            self._owner[namespace, name] = parsed.service
            known = self._slices.get(key, ())
            self._slices[key] = (
                tuple(sorted((*known, parsed), key=lambda one: one.name)) if known else (parsed,)
            )
        annotations = metadata.annotations
        began = seconds_of(annotations.get(ANNOTATION_TRIGGER_TIME)) if annotations else None
        if began is None:
            return Dirty(touched)
        return Dirty(touched, trigger_times=dict.fromkeys(touched, began))

    def _drop_slice(self, service: ServiceKey, name: str) -> None:
        left = tuple([other for other in self._slices[service] if other.name != name])
        if left:
            self._slices[service] = left
        else:
            del self._slices[service]

    def _deleted(self, kind: Kind, namespace: str, name: str) -> Dirty:
        key = (namespace, name)
        if kind == "Service":
            return Dirty((key,)) if self.services.pop(key, None) is not None else CLEAN
        if kind == "EndpointSlice":
            service = self._owner.pop(key, None)
            if service is None:
                return CLEAN
            self._drop_slice((namespace, service), name)
            return Dirty(((namespace, service),))
        if kind == "Node":
            if name != self.node_name or self.node is None:
                return CLEAN
            self.node = None
            return Dirty(node=True)
        before = self.service_cidrs
        self._service_cidrs.pop(name, None)
        return Dirty(service_cidrs=True) if self.service_cidrs != before else CLEAN

    def _replaced(self, kind: Kind, items: tuple[APIObject, ...]) -> Dirty:
        present = {(item.metadata.namespace, item.metadata.name) for item in items}
        parts = [self._deleted(kind, *key) for key in self._known(kind) if key not in present]
        parts += [self._applied(item) for item in items]
        return self._merged(parts)

    def _merged(self, parts: list[Dirty]) -> Dirty:
        times: dict[ServiceKey, float] = {}
        for part in parts:
            for service, began in part.trigger_times.items():
                times[service] = min(began, times.get(service, began))
        return Dirty(
            tuple(dict.fromkeys(key for part in parts for key in part.services)),
            any(part.node for part in parts),
            any(part.service_cidrs for part in parts),
            times,
        )

    def _known(self, kind: Kind) -> list[tuple[str, str]]:
        if kind == "Service":
            return list(self.services)
        if kind == "EndpointSlice":
            return list(self._owner)
        if kind == "Node":
            return [] if self.node is None else [(self.node.metadata.namespace, self.node.metadata.name)]
        return [("", name) for name in self._service_cidrs]
