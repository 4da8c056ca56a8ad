"""One Service port as the kernel holds it: which elements, in which slots.  Pure; knows nothing of other Services."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

import msgspec

from proxycore.api import Endpoint, Frontend, FrontendKind, Pool, ServiceState, WhenEmpty

from . import layout

Range = tuple[bytes, bytes]


class TooMany(Exception):
    """The Service port does not fit the layout; the message says what there is too much of."""


class Slots(msgspec.Struct, frozen=True, gc=False):
    """A pool's endpoints in the order of their slots.

    `targets`: map data `address . port`; an endpoint of weight w stands w times.  `handles`: the same endpoints' handles, with
    affinity only.  `refusal`: class number while there is none.
    """

    targets: tuple[bytes, ...] = ()
    handles: tuple[int, ...] = ()
    refusal: int = layout.REJECT


class Entry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Everything that stands in the maps for one Service port."""

    index: int
    affinity_seconds: int
    comment: str
    frontends: tuple[tuple[bytes, int], ...]
    node_ports: tuple[tuple[bytes, int], ...]
    firewall: tuple[tuple[bytes, tuple[Range, ...]], ...]
    cluster_ips: tuple[bytes, ...]
    hairpin: frozenset[bytes]
    cluster: Slots | None
    local: Slots | None
    last_ordinal: int = 0


_UNSAFE = re.compile(r"[^a-zA-Z0-9\-._/:]")


def safe_comment(name: str) -> str:
    """A Service port's name as an element comment: no quotes, no control characters, at most 120 bytes."""
    return _UNSAFE.sub("?", name[:120])


def keep_in_place(old: Sequence[bytes], wanted: Sequence[bytes]) -> tuple[bytes, ...]:
    """Order `wanted` so that as few slots as possible change: stay, then fill holes, then move from the end.

    Both may hold one target several times (weights).
    """
    if not old:
        return tuple(wanted)
    missing: dict[bytes, int] = {}
    for target in wanted:
        missing[target] = missing.get(target, 0) + 1
    slots = list(old)
    holes: list[int] = []
    for position, target in enumerate(slots):
        left = missing.get(target, 0)
        if left == 1:
            del missing[target]
        elif left:
            missing[target] = left - 1
        else:
            holes.append(position)
    fresh = [target for target, times in missing.items() for _ in range(times)]
    for target in fresh:
        if holes:
            slots[holes.pop(0)] = target
        else:
            slots.append(target)
    for hole in reversed(holes):
        last = slots.pop()
        if hole < len(slots):
            slots[hole] = last
    return tuple(slots)


def _targets(endpoints: Sequence[Endpoint]) -> list[bytes]:
    result = layout.targets_bytes(endpoints)
    if [e.weight for e in endpoints].count(1) != len(endpoints):
        result = [t for t, e in zip(result, endpoints, strict=True) for _ in range(e.weight)]
    if len(result) > layout.POOL_MAX:
        raise TooMany(f"{len(result)} endpoints in one pool; the nft backend holds {layout.POOL_MAX}")
    return result


def _slots(pool: Pool | None, old: Slots | None) -> Slots | None:
    if pool is None:
        return None
    refusal = layout.DROP if pool.when_empty is WhenEmpty.DROP else layout.REJECT
    return Slots(keep_in_place(old.targets if old else (), _targets(pool.endpoints)), (), refusal)


def _collapse(ranges: Sequence[str]) -> list[tuple[bytes, bytes]]:
    """First and last address of each range, overlaps merged (the kernel refuses overlapping intervals)."""
    networks = [ipaddress.ip_network(r, strict=False) for r in ranges]
    merged = ipaddress.collapse_addresses(networks)  # type: ignore[type-var]
    return [(n.network_address.packed, n.broadcast_address.packed) for n in merged]


def _firewall(frontend: Frontend, key: bytes) -> tuple[bytes, tuple[Range, ...]] | None:
    if frontend.source_ranges is None:
        return None
    return key, tuple((key + first, key + last) for first, last in _collapse(frontend.source_ranges))


def _hairpin(state: ServiceState, old: Entry | None) -> frozenset[bytes]:
    """Addresses of endpoints in use that are, or may be, on this node: only those can be their own client here."""
    found: set[bytes] = set()
    for pool in (state.cluster, state.local):
        if pool is not None:
            found.update(
                [layout.address_bytes(e.address) for e in pool.endpoints if e.is_local or e.node is None]
            )
    if old is not None and old.hairpin == found:
        return old.hairpin
    return frozenset(found) if found else _NOBODY


_NOBODY: frozenset[bytes] = frozenset()


def build(state: ServiceState, index: int, old: Entry | None) -> Entry:
    """The entry for a state; slots stay as near to `old`'s as can be.

    Raises TooMany.  `old` may have another index: its slots are then only a hint for the order.
    """
    frontends: list[tuple[bytes, int]] = []
    node_ports: list[tuple[bytes, int]] = []
    firewall: list[tuple[bytes, tuple[Range, ...]]] = []
    cluster_ips: list[bytes] = []
    for frontend in state.frontends:
        ticket = layout.ticket(index, frontend)
        if frontend.address is None:
            node_ports.append((layout.node_port_key(frontend.protocol, frontend.port), ticket))
            continue
        key = layout.frontend_key(frontend.address, frontend.protocol, frontend.port)
        frontends.append((key, ticket))
        if frontend.kind is FrontendKind.CLUSTER_IP:
            cluster_ips.append(layout.address_bytes(frontend.address))
        wall = _firewall(frontend, key)
        if wall is not None:
            firewall.append(wall)
    cluster = _slots(state.cluster, old.cluster if old else None)
    local = _slots(state.local, old.local if old else None)
    last_ordinal = 0
    if state.affinity_seconds:
        cluster, local, last_ordinal = _with_handles(index, cluster, local, old)
    return Entry(
        index=index,
        affinity_seconds=state.affinity_seconds or 0,
        comment=safe_comment(str(state.name)),
        frontends=tuple(frontends),
        node_ports=tuple(node_ports),
        firewall=tuple(firewall),
        cluster_ips=tuple(cluster_ips),
        hairpin=_hairpin(state, old),
        cluster=cluster,
        local=local,
        last_ordinal=last_ordinal,
    )


def _with_handles(
    index: int, cluster: Slots | None, local: Slots | None, old: Entry | None
) -> tuple[Slots | None, Slots | None, int]:
    """Give each endpoint a handle: its old one, or an ordinal that this Service port has not used for long.

    A removed endpoint's handle is not given again at once, so that what clients remember of it is just a miss.
    """
    known: dict[bytes, int] = {}
    last = 0
    if old is not None and old.index == index:
        last = old.last_ordinal
        for slots in (old.cluster, old.local):
            if slots is not None and slots.handles:
                known.update(zip(slots.targets, slots.handles, strict=True))
    used = set(known.values())
    wanted: dict[bytes, int] = {}
    for slots in (cluster, local):
        for target in slots.targets if slots else ():
            if target in wanted:
                continue
            handle = known.get(target)
            if handle is None:
                for _ in range(layout.ORDINAL_MAX):
                    last = last % layout.ORDINAL_MAX + 1
                    handle = last << layout.ORDINAL_SHIFT | index
                    if handle not in used:
                        break
                else:
                    raise TooMany("more than 65,535 endpoints with affinity in one Service port")
                used.add(handle)
            wanted[target] = handle

    def place(slots: Slots | None) -> Slots | None:
        if slots is None:
            return None
        return Slots(slots.targets, tuple(wanted[t] for t in slots.targets), slots.refusal)

    return place(cluster), place(local), last
