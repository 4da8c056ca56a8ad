"""What elements mean, read back from a kernel, and what resolved Services should come to: to be held against each other.

Slots, indexes, class numbers and handles do not show; which endpoints each kind of client gets at each frontend does.
Reading also proves that nothing is left over: every element must belong to a frontend.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable
from typing import Any

from proxycore.api import (
    Family,
    Frontend,
    FrontendKind,
    HostState,
    Pool,
    PoolName,
    Route,
    ServiceState,
    WhenEmpty,
)
from proxycore_nft import classes, layout
from proxycore_nft.host import host_elements
from proxycore_nft.kernel import Element, Kernel
from proxycore_nft.native import element_from_bytes
from proxycore_nft.program import HOST_SETS

Meaning = dict[str, Any]


def number(raw: bytes | None) -> int:
    return int(struct.unpack("=I", raw or b"")[0])


# -- what should be --


def _route(route: Route) -> tuple[bool, bool]:
    return route.masquerade, route.pool is PoolName.LOCAL


def _pool(pool: Pool | None, affinity: int | None) -> object:
    if pool is None:
        return None
    if not pool.endpoints:
        return "drop" if pool.when_empty is WhenEmpty.DROP else "reject"
    targets = Counter({layout.target_bytes(e.address, e.port): e.weight for e in pool.endpoints})
    return affinity or 0, targets


def _key(frontend: Frontend) -> bytes:
    if frontend.address is None:
        return layout.node_port_key(frontend.protocol, frontend.port)
    return layout.frontend_key(frontend.address, frontend.protocol, frontend.port)


def expected(states: Iterable[ServiceState], family: Family, host: HostState) -> Meaning:
    """What one family's table should mean."""
    mine = [state for state in states if state.name.family == family]
    frontends: dict[bytes, object] = {}
    walls: dict[bytes, object] = {}
    for state in mine:
        pools = _pool(state.cluster, state.affinity_seconds), _pool(state.local, state.affinity_seconds)
        for f in state.frontends:
            routes = f.routes
            frontends[_key(f)] = (
                _route(routes.local_pod),
                _route(routes.node),
                _route(routes.outside),
                *pools,
            )
            if f.source_ranges is not None and f.address is not None:
                walls[_key(f)] = len(f.source_ranges)
    nodes = {
        name: sorted((e.key, e.flags) for e in map(element_from_bytes, made))
        for name, made in host_elements(host, family).items()
    }
    return {
        "frontends": frontends,
        "walls": walls,
        "cluster-ips": {
            layout.address_bytes(f.address)
            for state in mine
            for f in state.frontends
            if f.address is not None and f.kind is FrontendKind.CLUSTER_IP
        },
        "hairpin": {
            layout.address_bytes(e.address) * 2
            for state in mine
            for pool in (state.cluster, state.local)
            if pool is not None
            for e in pool.endpoints
            if e.is_local or e.node is None
        },
        **nodes,
    }


# -- what is --


class _Table:
    """Elements of one table, taken out as they are found to mean something."""

    def __init__(self, kernel: Kernel, nft: str, name: str) -> None:
        self.kernel, self.nft, self.name = kernel, nft, name
        self.pools = self.map("pools")
        self.endpoints = self.map("endpoints")
        self.slots = self.map("slots")
        self.handles = {False: self.map("sticky-endpoints"), True: self.map("local-sticky-endpoints")}
        self.used: set[tuple[str, bytes]] = set()
        self.classes = {
            number(e.key) >> layout.CLASS_SHIFT: classes.parse_chain(e.chain or "")
            for e in self.all("classes")
        }

    def all(self, name: str) -> list[Element]:
        return self.kernel.elements(self.nft, self.name, name)

    def map(self, name: str) -> dict[bytes, bytes]:
        found = {e.key: e.data or b"" for e in self.all(name)}
        return found

    def pool(self, index: int, local: bool) -> object:
        key = layout.number(index | (layout.LOCAL if local else 0))
        if key not in self.pools:
            return None
        self.used.add(("pools", key))
        value = number(self.pools[key])
        assert value & layout.INDEX_MASK == index
        which = value >> layout.CLASS_SHIFT
        if which in (layout.REJECT, layout.DROP):
            return "drop" if which == layout.DROP else "reject"
        found = self.classes[which]
        assert found is not None
        assert found.local == local
        first = layout.LOCAL_SLOT if local else 0
        targets = Counter(self._target(index, first + slot, found) for slot in range(found.size))
        return found.affinity_seconds, targets

    def _target(self, index: int, slot: int, found: classes.Class) -> bytes:
        key = struct.pack("=II", index, slot)
        if not found.affinity_seconds:
            self.used.add(("endpoints", key))
            return self.endpoints[key]
        self.used.add(("slots", key))
        handle = self.slots[key]
        assert number(handle) & layout.STICKY_MASK == index
        self.used.add((f"handles {found.local}", handle))
        return self.handles[found.local][handle]

    def left_over(self) -> set[tuple[str, bytes]]:
        everything = {("pools", key) for key in self.pools}
        everything |= {("endpoints", key) for key in self.endpoints}
        everything |= {("slots", key) for key in self.slots}
        for local, known in self.handles.items():
            everything |= {(f"handles {local}", handle) for handle in known}
        return everything - self.used


def _client(ticket: int, masquerade: int, local: int) -> tuple[bool, bool]:
    return bool(ticket & masquerade), bool(ticket & local)


def live_table(kernel: Kernel, nft: str) -> str:
    """The one table that carries traffic."""
    [name] = [
        name
        for name in layout.TABLES
        if name in kernel.tables(nft) and any(kernel.chains(nft, name).values())
    ]
    return name


def actual(kernel: Kernel, family: Family) -> Meaning:
    """What one family's table means.  Fails for elements that mean nothing."""
    nft = layout.NFT_FAMILY[family]
    table = _Table(kernel, nft, live_table(kernel, nft))
    frontends: dict[bytes, object] = {}
    for element in (*table.all("frontends"), *table.all("node-ports")):
        ticket = number(element.data)
        index = ticket & layout.INDEX_MASK
        frontends[element.key] = (
            _client(ticket, layout.MASQUERADE_POD, layout.LOCAL_POD),
            _client(ticket, layout.MASQUERADE_NODE, layout.LOCAL_NODE),
            _client(ticket, layout.MASQUERADE_OUTSIDE, layout.LOCAL_OUTSIDE),
            table.pool(index, False),
            table.pool(index, True),
        )
    assert table.left_over() == set()
    allowed = table.all("allowed-sources")
    walls = {e.key: sum(1 for item in allowed if item.key.startswith(e.key)) for e in table.all("firewalled")}
    assert sum(walls.values()) == len(allowed)
    return {
        "frontends": frontends,
        "walls": walls,
        "cluster-ips": {e.key for e in table.all("cluster-ips")},
        "hairpin": {e.key for e in table.all("hairpin")},
        **{name: sorted((e.key, e.flags) for e in table.all(name)) for name in HOST_SETS},
    }
