"""EndpointSlices as the core keeps them: endpoints by port number, sorted; and the merge of all slices of a Service.

A slice is taken apart once, when it arrives.  The same tuple of endpoints then serves every Service port and pool that
uses exactly these, so that resolving a Service of one slice copies nothing.

Semantics: EndpointSlice as kube-proxy reads it.  Only `addresses[0]` counts; `ready` and `serving` unset mean true,
`terminating` unset means false; a port without a name or number is ignored.
"""

from __future__ import annotations

from _socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import repeat
from sys import intern
from typing import NamedTuple

import msgspec

from . import canonical
from .model import Endpoint, Family, Protocol
from .objects import (
    LABEL_SERVICE_NAME,
    Conditions,
    EndpointSlice,
    Hints,
    Metadata,
    Named,
    SliceEndpoint,
    SlicePort,
)
from .problems import summarised

PortKey = tuple[str, Protocol]


class EndpointHints(NamedTuple):
    """For which zones and nodes an endpoint is meant."""

    zones: frozenset[str]
    nodes: frozenset[str]


class PortLayout(NamedTuple):
    """The ports of a slice.  `columns`: for each named port the indexes into `numbers`, the distinct port numbers."""

    numbers: tuple[int, ...]
    columns: Mapping[PortKey, tuple[int, ...]]
    problems: tuple[str, ...]


class SliceEndpoints(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One EndpointSlice for one node.  `family` is None when no family can use the slice.

    `endpoints` has one tuple for each of `layout.numbers`; all hold the same addresses in the order of the text
    `ip:port`.  `hints` runs beside them, or is None when no endpoint has any.
    """

    namespace: str
    name: str
    service: str
    family: Family | None
    layout: PortLayout
    endpoints: tuple[tuple[Endpoint, ...], ...]
    hints: tuple[EndpointHints | None, ...] | None = None
    problems: tuple[str, ...] = ()


class Merged(NamedTuple):
    """Endpoints of one Service port in one family, sorted by the text `ip:port`, with their hints if any has some."""

    endpoints: tuple[Endpoint, ...]
    hints: tuple[EndpointHints | None, ...] | None


NOTHING = Merged((), None)


@lru_cache(maxsize=4096)
def _layout(ports: tuple[SlicePort, ...] | None) -> PortLayout:
    numbers: list[int] = []
    columns: dict[PortKey, tuple[int, ...]] = {}
    problems = []
    for port in ports or ():
        if port.name is None:
            problems.append("a port without a name is ignored")
        elif not port.port:
            problems.append(f"port {port.name!r} without a number is ignored")
        elif not 0 < port.port < 65536:
            problems.append(f"port {port.name!r} is ignored: {port.port} is no port number")
        else:
            if port.port not in numbers:
                numbers.append(port.port)
            key: PortKey = (port.name, port.protocol or "TCP")
            columns[key] = tuple(dict.fromkeys((*columns.get(key, ()), numbers.index(port.port))))
    return PortLayout(tuple(numbers), columns, tuple(problems))


@lru_cache(maxsize=8192)
def _hints(hints: Hints) -> EndpointHints | None:
    zones = frozenset(zone.name for zone in hints.for_zones or ())
    nodes = frozenset(node.name for node in hints.for_nodes or ())
    return EndpointHints(zones, nodes) if zones or nodes else None


def _checked_address(endpoint: SliceEndpoint, family: Family) -> str:
    """The endpoint's canonical address, of that family.  Raises ValueError, with the reason."""
    if not endpoint.addresses:
        raise ValueError("an endpoint without an address is ignored")
    try:
        address = canonical.usable_address(endpoint.addresses[0])
    except ValueError as error:
        raise ValueError(f"an endpoint is ignored: {error}") from None
    if (":" in address) is not (family == "IPv6"):
        raise ValueError(f"an endpoint is ignored: {address} is not of the slice's address type {family}")
    return address


def preference(endpoint: Endpoint) -> tuple[bool, bool, bool, bool]:
    """Sorts the statements that several slices (or one) make about the same `ip:port`; the lowest one holds.

    Local before remote, then ready, then serving, then not terminating.  After that the slice's name decides, then the
    place in the slice.  kube-proxy prefers local ones too and leaves the rest to chance.
    """
    return not endpoint.is_local, not endpoint.ready, not endpoint.serving, endpoint.terminating


def parse(item: EndpointSlice, node_name: str) -> SliceEndpoints:
    """Take a slice apart, as node `node_name` sees it."""
    metadata = item.metadata
    service = metadata.labels.get(LABEL_SERVICE_NAME, "") if metadata.labels else ""
    if item.address_type not in ("IPv4", "IPv6"):
        return SliceEndpoints(
            namespace=metadata.namespace,
            name=metadata.name,
            service=service,
            family=None,
            layout=_layout(None),
            endpoints=(),
            problems=(f"the slice is ignored: its addressType is {item.address_type!r}, not IPv4 or IPv6",),
        )
    family: Family = "IPv6" if item.address_type == "IPv6" else "IPv4"
    layout = _layout(item.ports)
    problems = list(layout.problems)
    first_port = layout.numbers[0] if layout.numbers else 0
    rows, hints = _rows(item.endpoints or (), family, first_port, node_name, problems)
    order = sorted(rows)
    first = tuple(map(rows.__getitem__, order))
    return SliceEndpoints(
        namespace=metadata.namespace,
        name=metadata.name,
        service=service,
        family=family,
        layout=layout,
        endpoints=(first,)
        if len(layout.numbers) == 1
        else tuple(
            [first if number == first_port else _with_port(first, number) for number in layout.numbers]
        ),
        hints=tuple([hints.get(key) for key in order]) if hints else None,
        problems=summarised(problems) if problems else (),
    )


def _rows(
    endpoints: Iterable[SliceEndpoint], family: Family, port: int, node_name: str, problems: list[str]
) -> tuple[dict[str, Endpoint], dict[str, EndpointHints]]:
    """Endpoints, and the hints of those that have some, by address and terminator: as `ip:port` sorts.

    This runs once for each endpoint of the cluster; hence one flat loop, which calls nothing written in Python for an
    ordinary endpoint.
    """
    rows: dict[str, Endpoint] = {}
    hints: dict[str, EndpointHints] = {}
    ipv4 = family == "IPv4"
    address_family = AF_INET if ipv4 else AF_INET6
    unusual = canonical.UNUSUAL_FIRST_OCTETS if ipv4 else canonical.UNUSUAL_FIRST_OCTETS_IPV6
    terminator = ":" if ipv4 else "]"
    for item in endpoints:
        try:
            address = item.addresses[0]  # type: ignore[index]
            packed = inet_pton(address_family, address)
            if packed[0] in unusual:
                address = _checked_address(item, family)
            elif not ipv4:
                address = inet_ntop(AF_INET6, packed)
        except (OSError, ValueError, TypeError, IndexError):
            try:
                address = _checked_address(item, family)
            except ValueError as error:
                problems.append(str(error))
                continue
        node, zone, conditions = item.node_name, item.zone, item.conditions
        if node is not None:
            node = intern(node)
        if zone is not None:
            zone = intern(zone)
        if conditions is None:
            endpoint = Endpoint(address=address, port=port, is_local=node == node_name, zone=zone, node=node)
        else:
            endpoint = Endpoint(
                address=address,
                port=port,
                is_local=node == node_name,
                ready=conditions.ready is not False,
                serving=conditions.serving is not False,
                terminating=conditions.terminating is True,
                zone=zone,
                node=node,
            )
        key = address + terminator
        known = rows.setdefault(key, endpoint)
        if known is not endpoint:
            if preference(known) <= preference(endpoint):
                continue
            hints.pop(key, None)
            rows[key] = endpoint
        if item.hints is not None:
            hint = _hints(item.hints)
            if hint is not None:
                hints[key] = hint
    return rows, hints


def _with_port(endpoints: tuple[Endpoint, ...], port: int) -> tuple[Endpoint, ...]:
    return tuple(
        [
            Endpoint(
                address=e.address,
                port=port,
                is_local=e.is_local,
                ready=e.ready,
                serving=e.serving,
                terminating=e.terminating,
                zone=e.zone,
                node=e.node,
            )
            for e in endpoints
        ]
    )


def unparse(item: SliceEndpoints) -> EndpointSlice:
    """The API object that parse() makes the same of on its node, but for what was ignored in the first place."""
    numbers, columns = item.layout.numbers, item.layout.columns
    first = item.endpoints[0] if item.endpoints else ()
    return EndpointSlice(
        metadata=Metadata(item.name, item.namespace, labels={LABEL_SERVICE_NAME: item.service}),
        address_type=item.family or "",
        endpoints=tuple(map(_unparsed, first, item.hints or repeat(None, len(first)))),
        ports=tuple(
            [
                SlicePort(name, protocol, number)
                for place, number in enumerate(numbers)
                for (name, protocol), places in columns.items()
                if place in places
            ]
        ),
    )


def _unparsed(endpoint: Endpoint, hints: EndpointHints | None) -> SliceEndpoint:
    plain = endpoint.ready and endpoint.serving and not endpoint.terminating
    return SliceEndpoint(
        (endpoint.address,),
        None if plain else Conditions(endpoint.ready, endpoint.serving, endpoint.terminating),
        endpoint.node,
        endpoint.zone,
        hints
        and Hints(
            tuple([Named(zone) for zone in sorted(hints.zones)]) or None,
            tuple([Named(node) for node in sorted(hints.nodes)]) or None,
        ),
    )


def merge(slices: Sequence[SliceEndpoints], family: Family, port: PortKey) -> Merged:
    """The endpoints that all slices together give one Service port.  The order of `slices` does not matter."""
    parts = [
        (item, column)
        for item in slices
        if item.family == family and port in item.layout.columns
        for column in item.layout.columns[port]
    ]
    if not parts:
        return NOTHING
    if len(parts) == 1:
        item, column = parts[0]
        return Merged(item.endpoints[column], item.hints)
    rows: dict[str, Endpoint] = {}
    total = 0
    for item, column in parts:
        endpoints = item.endpoints[column]
        total += len(endpoints)
        rows.update(zip(_texts(item, column), endpoints, strict=True))
    if len(rows) < total:
        parts.sort(key=lambda part: (part[0].namespace, part[0].name))
        rows = _preferred(parts)
    order = sorted(rows)
    return Merged(tuple([rows[text] for text in order]), _merged_hints(parts, rows, order))


def _texts(item: SliceEndpoints, column: int) -> list[str]:
    """The text `ip:port` of each endpoint."""
    ending = f"{':' if item.family == 'IPv4' else ']:'}{item.layout.numbers[column]}"
    return [endpoint.address + ending for endpoint in item.endpoints[column]]


def _preferred(parts: list[tuple[SliceEndpoints, int]]) -> dict[str, Endpoint]:
    rows: dict[str, Endpoint] = {}
    for item, column in parts:
        for text, endpoint in zip(_texts(item, column), item.endpoints[column], strict=True):
            known = rows.get(text)
            if known is None or preference(endpoint) < preference(known):
                rows[text] = endpoint
    return rows


def _merged_hints(
    parts: list[tuple[SliceEndpoints, int]], rows: dict[str, Endpoint], order: list[str]
) -> tuple[EndpointHints | None, ...] | None:
    """Each endpoint's hints, from the slice that the endpoint was taken from."""
    if all(item.hints is None for item, _ in parts):
        return None
    hints: dict[str, EndpointHints | None] = {}
    for item, column in parts:
        endpoints = item.endpoints[column]
        for text, endpoint, hint in zip(
            _texts(item, column), endpoints, item.hints or repeat(None, len(endpoints)), strict=True
        ):
            if rows[text] is endpoint:
                hints[text] = hint
    return tuple([hints[text] for text in order])
