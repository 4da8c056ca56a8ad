"""What a source says once, resolved for this node, without an engine: for `render` and `plan`."""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Sequence
from typing import NamedTuple

from .backend import BackendContext, BackendInfo, Capability
from .changes import ChangeBatch, HostChange, change
from .config import Config
from .desired import Desired
from .errors import SourceError
from .host import InterfaceAddress, reserved_ports, resolve_host
from .model import FAMILIES, Family, HostState
from .objects import Node
from .source import Event, Health, Source, Synced, Trouble

SYNC_SECONDS = 60.0
"""How long a source may take to deliver what is there."""


class Offline(NamedTuple):
    """A backend's context and one full batch.

    `troubles`: what could not be read; `ignored`: parts of objects that have no effect.  A sentence each.
    """

    context: BackendContext
    batch: ChangeBatch
    troubles: tuple[str, ...]
    ignored: tuple[str, ...]


class _Collector:
    """A sink that keeps everything up to Synced, then ends the source."""

    def __init__(self, source: Source) -> None:
        self.events: list[Event] = []
        self.synced = False
        self.reason = ""
        self._source = source

    def put(self, events: list[Event]) -> None:
        if self.synced or self.reason:
            return
        for event in events:
            if isinstance(event, Synced):
                self.synced = True
                break
            if isinstance(event, Health) and event.state == "stale":
                self.reason = event.reason or "it is not available"
            else:
                self.events.append(event)
        if self.synced or self.reason:
            self._source.stop()


def collect(source: Source, timeout: float = SYNC_SECONDS) -> list[Event]:
    """Run a source until everything that is there has been delivered; those events.

    Raises SourceError: it did not come so far; nothing was touched.
    """
    collector = _Collector(source)
    timer = threading.Timer(timeout, source.stop)
    timer.daemon = True
    timer.start()
    try:
        source.run(collector)
    finally:
        timer.cancel()
    if not collector.synced:
        raise SourceError(
            collector.reason
            or f"the source has not delivered everything within {timeout:g} s, or ended before"
        )
    return collector.events


def load_states(
    source: Source,
    config: Config,
    node_name: str,
    families: Sequence[Family] = FAMILIES,
    addresses: Sequence[InterfaceAddress] | None = None,
) -> Offline:
    """The full batch that a first programming would bring, and the context for it.

    `addresses` are the interfaces'; None: this is not the node, and what its Node object names stands for them.
    Raises SourceError as collect() does.
    """
    events = collect(source)
    desired = Desired(node_name, reserved_ports=reserved_ports(config))
    desired.handle(events)
    store = desired.store
    resolution = resolve_host(
        config,
        node_name,
        store.node,
        _named_by(store.node) if addresses is None else addresses,
        store.service_cidr_objects,
        families,
    )
    host = resolution.state
    desired.handle((), host)
    batch = ChangeBatch(
        generation=1,
        changes=tuple(change(name, None, state) for name, state in sorted(desired.states.items())),
        host=HostChange(before=None, after=host),
        full=True,
        reason="start",
    )
    ignored = [f"{subject}: {reason}" for subject, reasons in desired.problems.items() for reason in reasons]
    return Offline(
        context=context_of(config, host),
        batch=batch,
        troubles=_last_troubles(events),
        ignored=(*resolution.warnings, *ignored),
    )


def families_for(info: BackendInfo) -> tuple[Family, ...]:
    """The families that a backend claims."""
    claims = {"IPv4": Capability.IPV4, "IPv6": Capability.IPV6}
    return tuple(family for family in FAMILIES if claims[family] in info.capabilities)


def _last_troubles(events: list[Event]) -> tuple[str, ...]:
    """What could not be read and was not mended later."""
    reasons: dict[str, str] = {}
    for event in events:
        if isinstance(event, Trouble):
            reasons[event.subject] = event.reason
    return tuple(f"{subject}: {reason}" for subject, reason in reasons.items() if reason)


def _named_by(node: Node | None) -> list[InterfaceAddress]:
    """Addresses of a Node object, as if they were on an interface."""
    listed = (node.status.addresses if node and node.status else None) or ()
    found = []
    for entry in listed:
        try:
            address = ipaddress.ip_address(entry.address.strip())
        except ValueError:
            continue  # a host name
        found.append(
            InterfaceAddress(address=str(address), prefix_length=address.max_prefixlen, interface="node")
        )
    return found


def context_of(config: Config, host: HostState) -> BackendContext:
    """What a backend is told at start."""
    return BackendContext(
        host=host, families=host.families, options=config.backend_options, takeover=config.takeover
    )
