"""From changed Services to a transaction.  Pure: the mirror of what the kernel holds, and the difference to what it should.

A `Stage` collects one batch: it builds new entries and the transaction, and changes the mirror only when told that the kernel
has accepted; so a refused batch leaves mirror and kernel alike.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from proxycore.api import Family, ServicePortName, ServiceState

from . import classes, encode, entry, layout
from .classes import Class
from .entry import Entry, Slots, TooMany
from .transaction import Elements, Transaction

HOST_SETS = ("node-addresses", "local-pods", "service-cidrs")
INTERVAL_SETS = ("local-pods", "service-cidrs")


class Indexes:
    """Numbers of Service ports; a freed one is given again as late as can be, so that no packet under way meets a stranger's."""

    def __init__(self, first: int, last: int, what: str) -> None:
        self._first, self._last, self._what = first, last, what
        self._next = first
        self.used: set[int] = set()
        self.kept: frozenset[int] = frozenset()
        """Those of an earlier run: only to be claimed, as long as there are others."""

    def take(self) -> int:
        count = self._last - self._first + 1
        if len(self.used) >= count:
            raise TooMany(f"more than {count} {self._what}")
        if len(self.used) + len(self.kept) >= count:
            self.kept = frozenset()
        while self._next in self.used or self._next in self.kept:
            self._advance()
        index = self._next
        self._advance()
        self.used.add(index)
        return index

    def follow(self, earlier: Indexes) -> None:
        self._next = earlier._next

    def keep(self, known: Iterable[int]) -> None:
        """What an earlier run gave out goes to nobody who does not claim it; replaces what was kept before."""
        self.kept = frozenset(index for index in known if self._first <= index <= self._last)

    def _advance(self) -> None:
        self._next = self._next + 1 if self._next < self._last else self._first

    def claim(self, index: int) -> bool:
        """Mark an index that the kernel already uses; False if it is taken or not of this range."""
        if not self._first <= index <= self._last or index in self.used:
            return False
        self.used.add(index)
        self._next = max(self._next, index)
        return True


class Table:
    """Mirror of one family's table."""

    def __init__(self, family: Family, name: str) -> None:
        self.family = family
        self.nft = layout.NFT_FAMILY[family]
        self.name = name
        self.entries: dict[ServicePortName, Entry] = {}
        self.classes: dict[Class, int] = {}
        self.chains: set[str] = set()
        self.cluster_ips: dict[bytes, int] = {}
        self.hairpin: dict[bytes, int] = {}
        self.host: dict[str, tuple[bytes, ...]] = {name: () for name in HOST_SETS}
        self.sticky = Indexes(1, layout.STICKY_MASK, "Service ports with session affinity")
        self.plain = Indexes(layout.STICKY_MASK + 1, layout.INDEX_MASK, "Service ports")
        self.remembered: dict[bytes, int] = {}
        """Frontend key -> index, read from the kernel at start: a Service port keeps its index over a restart."""
        self.remembered_handles: dict[int, dict[bytes, int]] = {}
        """index -> target -> handle, read from the kernel at start."""
        self.remembered_slots: dict[tuple[int, bool], tuple[bytes, ...]] = {}
        """(index, local pool) -> targets by slot, read from the kernel for a plan."""

    def indexes(self, sticky: bool) -> Indexes:
        return self.sticky if sticky else self.plain

    def follow(self, earlier: Table) -> None:
        """Give out indexes from where another mirror of the same Services has stopped."""
        self.sticky.follow(earlier.sticky)
        self.plain.follow(earlier.plain)

    def keep_indexes(self) -> None:
        """Give what an earlier run gave out to nobody but those who come again."""
        for indexes in (self.sticky, self.plain):
            indexes.keep(self.remembered.values())

    def forget_earlier_run(self) -> None:
        """Everybody has come again who was to come."""
        self.remembered, self.remembered_handles, self.remembered_slots = {}, {}, {}
        self.keep_indexes()


_DATA_SIZE = {"ip": 8, "ip6": 20}
_ENDPOINT = {family: encode.DataElements(8, size) for family, size in _DATA_SIZE.items()}
_SLOT = encode.DataElements(8, 4)
_SLOT_KEY = encode.KeyElements(8)
_HANDLE = {family: encode.DataElements(4, size) for family, size in _DATA_SIZE.items()}
_POOL = encode.DataElements(4, 4)
_FRONTEND = {
    ("ip", "frontends"): encode.DataElements(12, 4),
    ("ip6", "frontends"): encode.DataElements(24, 4),
    ("ip", "node-ports"): encode.DataElements(8, 4),
    ("ip6", "node-ports"): encode.DataElements(8, 4),
}
_pack_number = struct.Struct("=I").pack
_pack_slot = struct.Struct("=II").pack
_SLOTS_AHEAD = 256
"""Slots whose part of an element is packed once and for all."""


def _tails(first: int, between: bytes) -> tuple[bytes, ...]:
    """What follows the index in the elements of the slots from `first` on, up to the data."""
    return tuple(_pack_number(first + slot) + between for slot in range(_SLOTS_AHEAD))


_TAILS = {
    (first, data): _tails(first, data.between)
    for first in (0, layout.LOCAL_SLOT)
    for data in (*_ENDPOINT.values(), _SLOT)
}


class Stage:
    """One batch for one table."""

    def __init__(self, table: Table, transaction: Transaction) -> None:
        self.table = table
        self.tx = transaction
        self.entries: dict[ServicePortName, Entry | None] = {}
        self.new_classes: dict[Class, int] = {}
        self.new_chains: set[str] = set()
        self.ahead: set[Class] = set()
        """Those of the new classes that no pool has yet."""
        self._taken: list[tuple[Indexes, int]] = []
        self._freed: list[tuple[Indexes, int]] = []
        self._cluster_ips: dict[bytes, int] = {}
        self._hairpin: dict[bytes, int] = {}
        self._host: dict[str, tuple[bytes, ...]] = {}
        self._adding: dict[str, Elements] = {}

    # -- Services --

    def put(self, name: ServicePortName, state: ServiceState | None) -> None:
        """Bring one Service port to `state`.  Raises TooMany: nothing was staged for it."""
        old = self.table.entries.get(name)
        new = None
        if state is not None:
            index = self._index_for(state, old)
            try:
                new = entry.build(state, index, self._hint(state, index, old))
                self._make_classes(new)
            except TooMany:
                self._untake(index)
                raise
        if old is not None and (new is None or new.index != old.index):
            self._freed.append((self.table.indexes(bool(old.affinity_seconds)), old.index))
        self.entries[name] = new
        self._references(old, new)
        if old is None and new is not None:
            self._write_new(name, new)
        else:
            self._write(name, old, new)

    def restore(self, name: ServicePortName, item: Entry) -> None:
        """Write an entry that is known already, all of it."""
        self.entries[name] = item
        self.table.indexes(bool(item.affinity_seconds)).used.add(item.index)
        self._references(None, item)
        self._write_new(name, item)

    def _index_for(self, state: ServiceState, old: Entry | None) -> int:
        sticky = bool(state.affinity_seconds)
        if old is not None and bool(old.affinity_seconds) == sticky:
            return old.index
        indexes = self.table.indexes(sticky)
        index = self._remembered_index(state, indexes) if old is None and self.table.remembered else None
        if index is None:
            index = indexes.take()
        self._taken.append((indexes, index))
        return index

    def _remembered_index(self, state: ServiceState, indexes: Indexes) -> int | None:
        for frontend in state.frontends:
            if frontend.address is None:
                key = layout.node_port_key(frontend.protocol, frontend.port)
            else:
                key = layout.frontend_key(frontend.address, frontend.protocol, frontend.port)
            index = self.table.remembered.get(key)
            if index is not None and indexes.claim(index):
                return index
        return None

    def _hint(self, state: ServiceState, index: int, old: Entry | None) -> Entry | None:
        """What build() starts from: the old entry, or what was read from the kernel."""
        table = self.table
        if old is not None or not (table.remembered_handles or table.remembered_slots):
            return old
        handles: dict[bytes, int] = {}
        if state.affinity_seconds:
            handles = table.remembered_handles.get(index, {})
        cluster, local = (table.remembered_slots.get((index, side)) for side in (False, True))
        if handles and cluster is None:
            # Targets as a pool of their own: only handles are taken from it, the slots are laid out anew.
            cluster = tuple(handles)
        if cluster is None and local is None:
            return None

        def slots(targets: tuple[bytes, ...] | None) -> Slots | None:
            if targets is None:
                return None
            return Slots(targets, tuple(handles[t] for t in targets) if handles else ())

        return Entry(
            index=index,
            affinity_seconds=state.affinity_seconds or 0,
            comment="",
            frontends=(),
            node_ports=(),
            firewall=(),
            cluster_ips=(),
            hairpin=frozenset(),
            cluster=slots(cluster),
            local=slots(local),
            last_ordinal=max((handle >> layout.ORDINAL_SHIFT for handle in handles.values()), default=0),
        )

    def _untake(self, index: int) -> None:
        if self._taken and self._taken[-1][1] == index:
            indexes, _ = self._taken.pop()
            indexes.used.discard(index)

    def _references(self, old: Entry | None, new: Entry | None) -> None:
        """Addresses that several Service ports share are in their sets as long as one of them is."""
        for counts, before, after in (
            (self._cluster_ips, old.cluster_ips if old else (), new.cluster_ips if new else ()),
            (self._hairpin, old.hairpin if old else (), new.hairpin if new else ()),
        ):
            if before is after or before == after:
                continue
            for address in before:
                counts[address] = counts.get(address, 0) - 1
            for address in after:
                counts[address] = counts.get(address, 0) + 1

    def _into(self, where: str) -> Elements:
        """Elements to be put into a set."""
        found = self._adding.get(where)
        if found is None:
            found = self._adding[where] = self.tx.adding(self.table.nft, self.table.name, where)
        return found

    def _write_new(self, name: ServicePortName, item: Entry) -> None:
        """All elements of a Service port of which the kernel has none: what a full load consists of."""
        nft = self.table.nft
        note = encode.comment(item.comment)
        for where, frontends in (("frontends", item.frontends), ("node-ports", item.node_ports)):
            if frontends:
                shape = _FRONTEND[nft, where]
                into = self._into(where)
                for key, value in frontends:
                    into.bodies.append(shape.element_with(key, _pack_number(value), note))
                    into.owners.append(name)
        if item.firewall:
            self._walls(name, (), item.firewall)
        pools = self._into("pools")
        for slots, local in ((item.cluster, False), (item.local, True)):
            if slots is None:
                continue
            number = self._class(slots, local, item.affinity_seconds, create=True)
            key_number = item.index | layout.LOCAL if local else item.index
            pools.bodies.append(
                _POOL.element(
                    _pack_number(key_number), _pack_number(number << layout.CLASS_SHIFT | item.index)
                )
            )
            pools.owners.append(name)
            if slots.targets:
                self._fill(name, item, None, slots, "local" if local else "cluster")

    def _write(self, name: ServicePortName, old: Entry | None, new: Entry | None) -> None:
        self._frontends(
            "frontends", name, old, new, old.frontends if old else (), new.frontends if new else ()
        )
        self._frontends(
            "node-ports", name, old, new, old.node_ports if old else (), new.node_ports if new else ()
        )
        self._walls(name, old.firewall if old else (), new.firewall if new else ())
        self._pools(name, old, new)
        self._slots(name, old, new, "cluster")
        self._slots(name, old, new, "local")

    def _frontends(
        self,
        where: str,
        name: ServicePortName,
        old: Entry | None,
        new: Entry | None,
        before: tuple[tuple[bytes, int], ...],
        after: tuple[tuple[bytes, int], ...],
    ) -> None:
        if before == after:
            return
        have, want = dict(before), dict(after)
        nft, table = self.table.nft, self.table.name
        for key, value in have.items():
            if want.get(key) != value:
                self.tx.delete(nft, table, where, encode.element(key), name)
        if new is None:
            return
        note = encode.comment(new.comment)
        layout_of = _FRONTEND[nft, where]
        for key, value in after:
            if have.get(key) != value:
                self.tx.add(nft, table, where, layout_of.element_with(key, _pack_number(value), note), name)

    def _walls(
        self,
        name: ServicePortName,
        before: tuple[tuple[bytes, tuple[entry.Range, ...]], ...],
        after: tuple[tuple[bytes, tuple[entry.Range, ...]], ...],
    ) -> None:
        if before == after:
            return
        nft, table = self.table.nft, self.table.name
        have, want = dict(before), dict(after)
        for key, ranges in have.items():
            if key not in want:
                self.tx.delete(nft, table, "firewalled", encode.element(key), name)
            for item in set(ranges) - set(want.get(key, ())):
                self.tx.delete(nft, table, "allowed-sources", encode.range_element(*item), name)
        for key, ranges in want.items():
            if key not in have:
                self.tx.add(nft, table, "firewalled", encode.element(key), name)
            for item in sorted(set(ranges) - set(have.get(key, ()))):
                self.tx.add(nft, table, "allowed-sources", encode.range_element(*item), name)

    def _pools(self, name: ServicePortName, old: Entry | None, new: Entry | None) -> None:
        have, want = self._pool_rows(old, create=False), self._pool_rows(new, create=True)
        if have == want:
            return
        nft, table = self.table.nft, self.table.name
        for key, value in have.items():
            if want.get(key) != value:
                self.tx.delete(nft, table, "pools", encode.element(_pack_number(key)), name)
        if new is None:
            return
        for key, value in want.items():
            if have.get(key) != value:
                self.tx.add(nft, table, "pools", _POOL.element(_pack_number(key), _pack_number(value)), name)

    def _pool_rows(self, item: Entry | None, create: bool) -> dict[int, int]:
        """Elements of `pools`: index with pool bit -> class and index."""
        rows: dict[int, int] = {}
        if item is None:
            return rows
        for slots, local in ((item.cluster, False), (item.local, True)):
            if slots is not None:
                rows[item.index | (layout.LOCAL if local else 0)] = (
                    self._class(slots, local, item.affinity_seconds, create) << layout.CLASS_SHIFT
                ) | item.index
        return rows

    def _class(self, slots: Slots, local: bool, affinity_seconds: int, create: bool) -> int:
        if not slots.targets:
            return slots.refusal
        wanted = Class(len(slots.targets), local, affinity_seconds)
        number = self.table.classes.get(wanted) or self.new_classes.get(wanted)
        if number is None and create:
            number = self.make_class(wanted)
        return number or 0

    def _make_classes(self, item: Entry) -> None:
        """Those that an entry needs.  Raises TooMany; so it comes before anything is staged for that Service port."""
        for slots, local in ((item.cluster, False), (item.local, True)):
            if slots is not None:
                self._class(slots, local, item.affinity_seconds, create=True)

    def make_class(self, wanted: Class) -> int:
        """Stage a class's chains and rules; they come before all elements in the transaction."""
        used = self.table.classes.values()
        number = max(used, default=layout.FIRST_CLASS - 1) + 1 + len(self.new_classes)
        if number > layout.CLASS_MAX:
            raise TooMany(
                f"more than {layout.CLASS_MAX - layout.FIRST_CLASS} different endpoint counts and affinity timeouts"
            )
        missing = [
            name
            for name in classes.helpers(wanted)
            if name not in self.table.chains and name not in self.new_chains
        ]
        self.tx.rules.extend(classes.bodies(self.table.nft, self.table.name, wanted, number, missing))
        self.new_chains.update(missing)
        self.new_classes[wanted] = number
        return number

    def make_neighbours(self) -> None:
        """Make the classes that will be wanted next while the maps are empty: later each takes a walk through them."""
        unusual = self.new_classes.keys() - set(classes.USUAL)
        for item in sorted(classes.neighbours(unusual) - self.new_classes.keys()):
            if item not in self.table.classes:
                try:
                    self.make_class(item)
                except TooMany:
                    return
                self.ahead.add(item)

    def _slots(self, name: ServicePortName, old: Entry | None, new: Entry | None, side: str) -> None:
        before: Slots | None = getattr(old, side) if old else None
        after: Slots | None = getattr(new, side) if new else None
        moved = old is not None and new is not None and old.index != new.index
        if moved:
            assert old is not None
            self._fill(name, old, before, None, side)
            before = None
        if before == after:
            return
        owner = new if new is not None else old
        assert owner is not None
        self._fill(name, owner, before, after, side)

    def _fill(
        self, name: ServicePortName, item: Entry, before: Slots | None, after: Slots | None, side: str
    ) -> None:
        """Elements of one pool from `before` to `after`, for the same index."""
        local = side == "local"
        first = layout.LOCAL_SLOT if local else 0
        nft, table = self.table.nft, self.table.name
        if item.affinity_seconds:
            have = tuple([_pack_number(handle) for handle in before.handles]) if before else ()
            want = tuple([_pack_number(handle) for handle in after.handles]) if after else ()
            where, shape = "slots", _SLOT
            self._handles(name, before, after, "local-sticky-endpoints" if local else "sticky-endpoints")
        else:
            have = before.targets if before else ()
            want = after.targets if after else ()
            where, shape = "endpoints", _ENDPOINT[nft]
        prefix = shape.before + _pack_number(item.index)
        tails = _TAILS[first, shape]
        new = self._into(where)
        if not have and len(want) <= _SLOTS_AHEAD:
            new.bodies += [prefix + tail + value for tail, value in zip(tails, want, strict=False)]
            new.owners += [name] * len(want)
            return
        changed = [
            slot
            for slot in range(max(len(have), len(want)))
            if slot >= len(have) or slot >= len(want) or have[slot] != want[slot]
        ]
        gone = [slot for slot in changed if slot < len(have)]
        if gone:
            old = self.tx.deleting(nft, table, where)
            old.bodies += [_SLOT_KEY.element(_pack_slot(item.index, first + slot)) for slot in gone]
            old.owners += [name] * len(gone)
        added = [slot for slot in changed if slot < len(want)]
        new.bodies += [prefix + _pack_number(first + slot) + shape.between + want[slot] for slot in added]
        new.owners += [name] * len(added)

    def _handles(self, name: ServicePortName, before: Slots | None, after: Slots | None, where: str) -> None:
        """handle -> endpoint, for those that a client may keep to in this pool."""
        have = dict(zip(before.handles, before.targets, strict=True)) if before else {}
        want = dict(zip(after.handles, after.targets, strict=True)) if after else {}
        nft, table = self.table.nft, self.table.name
        for handle, target in have.items():
            if want.get(handle) != target:
                self.tx.delete(nft, table, where, encode.element(_pack_number(handle)), name)
        for handle, target in want.items():
            if have.get(handle) != target:
                self.tx.add(nft, table, where, _HANDLE[nft].element(_pack_number(handle), target), name)

    # -- what is shared --

    def host(self, wanted: Mapping[str, tuple[bytes, ...]], *, anew: bool = False) -> None:
        """Bring the sets about the node to `wanted`: ready-made elements by set name.

        `anew`: they have been flushed, whatever the mirror says.
        """
        for name, elements in wanted.items():
            if not anew:
                if self.table.host[name] == elements:
                    continue
                self.tx.flush(self.table.nft, self.table.name, name)
            self._host[name] = elements
            for item in elements:
                self.tx.add(self.table.nft, self.table.name, name, item)

    def finish(self) -> None:
        """Write the shared sets; to be called once, after the last put()."""
        for where, counts, changes, key_of in (
            ("cluster-ips", self.table.cluster_ips, self._cluster_ips, bytes),
            ("hairpin", self.table.hairpin, self._hairpin, _twice),
        ):
            if not changes:
                continue
            added: list[bytes] = []
            for address, change in changes.items():
                before = counts.get(address, 0)
                if before == 0 and before + change > 0:
                    added.append(key_of(address))
                elif before > 0 and before + change == 0:
                    self.tx.delete(self.table.nft, self.table.name, where, encode.element(key_of(address)))
            if added:
                shape = encode.KeyElements(len(added[0]))
                into = self._into(where)
                into.bodies += [shape.element(key) for key in added]
                into.owners += [None] * len(added)

    def commit(self) -> None:
        """The kernel has accepted: the mirror follows."""
        table = self.table
        for name, item in self.entries.items():
            if item is None:
                table.entries.pop(name, None)
            else:
                table.entries[name] = item
        for counts, changes in ((table.cluster_ips, self._cluster_ips), (table.hairpin, self._hairpin)):
            for address, change in changes.items():
                count = counts.get(address, 0) + change
                if count:
                    counts[address] = count
                else:
                    counts.pop(address, None)
        for indexes, index in self._freed:
            indexes.used.discard(index)
        table.classes.update(self.new_classes)
        table.chains |= self.new_chains
        table.host.update(self._host)

    def roll_back(self) -> None:
        """The kernel has refused: give back what was taken."""
        for indexes, index in self._taken:
            indexes.used.discard(index)


def _twice(address: bytes) -> bytes:
    return address + address


def interval_elements(ranges: Iterable[tuple[bytes, bytes]]) -> tuple[bytes, ...]:
    """Elements of a one-field interval set: the first address, and the one after the last marked as an end."""
    result: list[bytes] = []
    end_flag = encode.attr(encode.ELEM_FLAGS, struct.pack(">I", encode.ELEM_INTERVAL_END))
    for first, last in ranges:
        result.append(encode.element(first))
        after = int.from_bytes(last, "big") + 1
        if after < 1 << (8 * len(last)):
            result.append(encode.element(after.to_bytes(len(last), "big"), None, end_flag))
    return tuple(result)
