"""The mirror as rows, to be held against a dump: what each set and map should contain, and whose it is."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from proxycore.api import Counters, Drift, KernelObject, ServicePortName

from . import classes, layout, native
from .entry import Entry, Slots
from .kernel import Element, Kernel
from .program import HOST_SETS, Table

SERVICE_SETS = (
    "frontends",
    "node-ports",
    "pools",
    "endpoints",
    "slots",
    "sticky-endpoints",
    "local-sticky-endpoints",
    "cluster-ips",
    "firewalled",
    "allowed-sources",
    "hairpin",
)
DRIFT_SHOWN = 200
"""So many differences are named one by one; more are only counted."""

_slot_key = struct.Struct("=II").pack
_slot = struct.Struct("=I").pack


class Row(NamedTuple):
    """One element.  `value` is the data, the chain of a verdict, or the end of an interval's key; None in a plain set."""

    set: str
    key: bytes
    value: bytes | str | None
    owner: ServicePortName | None


def endpoints_of(table: Table) -> dict[bytes, bytes | None]:
    """What the map `endpoints` should hold."""
    found: dict[bytes, bytes | None] = {}
    for item in table.entries.values():
        if item.affinity_seconds:
            continue
        index = layout.number(item.index)
        for slots, first in ((item.cluster, 0), (item.local, layout.LOCAL_SLOT)):
            if slots is not None:
                for slot, target in enumerate(slots.targets, first):
                    found[index + _slot(slot)] = target
    return found


def service_rows(
    table: Table, name: ServicePortName, item: Entry, *, endpoints: bool = True
) -> Iterator[Row]:
    """Elements of one Service port; those that it shares with others included, those of `endpoints` on demand."""
    for key, ticket in item.frontends:
        yield Row("frontends", key, layout.number(ticket), name)
    for key, ticket in item.node_ports:
        yield Row("node-ports", key, layout.number(ticket), name)
    for key, ranges in item.firewall:
        yield Row("firewalled", key, None, name)
        for first, last in ranges:
            yield Row("allowed-sources", first, last, name)
    for address in item.cluster_ips:
        yield Row("cluster-ips", address, None, name)
    for address in sorted(item.hairpin):
        yield Row("hairpin", address + address, None, name)
    for slots, local in ((item.cluster, False), (item.local, True)):
        if slots is not None:
            yield from _pool_rows(table, name, item, slots, local, endpoints)


def _pool_rows(
    table: Table, name: ServicePortName, item: Entry, slots: Slots, local: bool, endpoints: bool
) -> Iterator[Row]:
    number = slots.refusal
    if slots.targets:
        number = table.classes[classes.Class(len(slots.targets), local, item.affinity_seconds)]
    key = layout.number(item.index | (layout.LOCAL if local else 0))
    yield Row("pools", key, layout.number(number << layout.CLASS_SHIFT | item.index), name)
    first = layout.LOCAL_SLOT if local else 0
    if not item.affinity_seconds:
        for slot, target in enumerate(slots.targets if endpoints else (), first):
            yield Row("endpoints", _slot_key(item.index, slot), target, name)
        return
    where = "local-sticky-endpoints" if local else "sticky-endpoints"
    for slot, handle in enumerate(slots.handles, first):
        yield Row("slots", _slot_key(item.index, slot), layout.number(handle), name)
    for handle, target in dict(zip(slots.handles, slots.targets, strict=True)).items():
        yield Row(where, layout.number(handle), target, name)


def table_rows(table: Table) -> Iterator[Row]:
    """Every element that the table should have, but for what clients and the skeleton put there; shared ones repeat."""
    for name, item in table.entries.items():
        yield from service_rows(table, name, item)
    for wanted, number in table.classes.items():
        yield Row("classes", classes.key(number), wanted.chain, None)


def value_of(item: Element) -> bytes | str | None:
    """What a Row calls value."""
    if item.key_end is not None:
        return item.key_end
    return item.chain if item.chain is not None else item.data


def compare_verdicts(table: Table, kernel: Kernel) -> list[Drift]:
    """How the verdict maps differ; they belong to the table itself.  Raises KernelError: a set cannot be read."""
    rows = [
        Row("refusals", classes.key(layout.REJECT), "reject-client", None),
        Row("refusals", classes.key(layout.DROP), "", None),
    ]
    rows += [Row("classes", classes.key(number), item.chain, None) for item, number in table.classes.items()]
    return _shorten(_compare(table, kernel, ("refusals", "classes"), rows))


def compare(table: Table, kernel: Kernel) -> list[Drift]:
    """How the kernel's elements differ from the mirror.  Raises KernelError: a set cannot be read."""
    # Nearly all elements are endpoints, and nearly always they agree: then nobody asks whose they are.
    agree = endpoints_of(table) == {
        item.key: item.data for item in kernel.elements(table.nft, table.name, "endpoints")
    }
    names = [name for name in SERVICE_SETS if not (agree and name == "endpoints")]
    rows = (
        row
        for name, item in table.entries.items()
        for row in service_rows(table, name, item, endpoints=not agree)
    )
    drift = _compare(table, kernel, names, rows)
    for name in HOST_SETS:
        there = sorted((e.key, e.flags) for e in kernel.elements(table.nft, table.name, name))
        want = sorted((e.key, e.flags) for e in map(native.element_from_bytes, table.host[name]))
        if there != want:
            drift.append(
                Drift(service=None, what=f"{table.nft} {table.name} {name}: other elements than ours")
            )
    return _shorten(drift)


def _compare(table: Table, kernel: Kernel, names: Sequence[str], expected: Iterable[Row]) -> list[Drift]:
    wanted: dict[str, dict[bytes, Row]] = {name: {} for name in names}
    for row in expected:
        wanted[row.set][identity(row.set, row.key, row.value)] = row
    drift: list[Drift] = []
    for name, rows in wanted.items():
        present = kernel.elements(table.nft, table.name, name)
        for item in present:
            row_wanted = rows.pop(identity_of(name, item), None)
            if row_wanted is None:
                drift.append(_drift(table, "foreign element", name, item, None))
            elif row_wanted.value != value_of(item):
                drift.append(_drift(table, "changed element", name, item, row_wanted.owner))
        for row in rows.values():
            drift.append(_drift(table, "missing element", name, _as_element(row), row.owner))
        if len(drift) > DRIFT_SHOWN:
            break
    return drift


def identity(name: str, key: bytes, value: bytes | str | None) -> bytes:
    """What tells elements of one set apart: the key, and of an interval also its end."""
    return key + value if name == "allowed-sources" and isinstance(value, bytes) else key


def identity_of(name: str, item: Element) -> bytes:
    """The same for a dumped element; a one-field interval's two marks are told apart by their flag."""
    if name in HOST_SETS:
        return item.key + bytes([item.flags & 1])
    return identity(name, item.key, value_of(item))


def _as_element(row: Row) -> Element:
    if isinstance(row.value, str):
        return Element(row.key, chain=row.value)
    if row.set == "allowed-sources":
        return Element(row.key, key_end=row.value)
    return Element(row.key, row.value)


def row_text(table: Table, row: Row, comment: str = "") -> str:
    """The row as nft writes it."""
    return native.element_text(table.nft, row.set, _as_element(row)._replace(comment=comment))


def _drift(table: Table, what: str, name: str, item: Element, owner: ServicePortName | None) -> Drift:
    shown = native.element_text(table.nft, name, item)
    return Drift(service=owner, what=f"{what} in {table.nft} {table.name} {name}: {shown}")


def _shorten(drift: list[Drift]) -> list[Drift]:
    if len(drift) <= DRIFT_SHOWN:
        return drift
    return [*drift[:DRIFT_SHOWN], Drift(service=None, what=f"and at least {len(drift) - DRIFT_SHOWN} more")]


def objects(kernel: Kernel, nft: str, table: str, by_set: dict[str, list[bytes]]) -> Iterator[KernelObject]:
    """Those of the elements with these keys that the kernel has."""
    for name, keys in by_set.items():
        if name == "allowed-sources":
            # An interval is not found by its first key alone in every kernel.
            found = [e for e in kernel.elements(nft, table, name) if e.key in keys]
        else:
            found = kernel.find(nft, table, name, keys)
        for item in found:
            yield KernelObject(
                kind="element",
                place=f"{nft} {table} {name}",
                native=native.element_text(nft, name, item),
            )


def counters(nft: str, name: ServicePortName, item: Entry, packets: dict[tuple[str, bytes], int]) -> Counters:
    """Connections per frontend of one Service port."""
    found = {
        native.key_text(nft, where, key): packets.get((where, key), 0)
        for where, frontends in (("frontends", item.frontends), ("node-ports", item.node_ports))
        for key, _ in frontends
    }
    return Counters(name=name, connections=sum(found.values()), by_frontend=found)
