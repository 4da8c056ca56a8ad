"""Which UDP flows are stale: a pure decision over an index of what has been programmed.

UDP has no end of connection, so a conntrack entry lives as long as its client keeps sending, and as long as it lives
translation rules are not asked again.  Semantics: kube-proxy's conntrack reconciler, which compares whole flows with
the serving endpoints of their frontend; here a node port is recognised only at the node's own addresses, and a
Service that is gone is cleaned up too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ..backend import ApplyResult
from ..changes import ChangeBatch
from ..kernel.flow import Flow, packed
from ..model import FAMILIES, Family, HostState, ServicePortName, ServiceState, family_of

Target = tuple[bytes, int]
"""A packed address and a port."""

_Dialled = Target | tuple[Family, int]
"""What an entry is found by: address and port, or, of a node port, family and port."""

_TOMBSTONE_ROUNDS = 2


class Entry(NamedTuple):
    """One Service port at its frontends.

    `serving`: endpoints that its flows may be at; None: not known, its flows are let be.  `former`: endpoints that it
    had since the last settle() and does not have any more.  `gone`: the frontends are not the Service's any more.
    """

    dialled: frozenset[_Dialled]
    serving: frozenset[Target] | None
    former: frozenset[Target] = frozenset()
    gone: bool = False


class Snapshot(NamedTuple):
    """A FlowIndex as it was at one moment: any thread may judge by it while the index goes on."""

    dialled: Mapping[_Dialled, tuple[Entry, ...]]
    local: frozenset[bytes]

    def claims(self, flow: Flow) -> tuple[Entry, ...]:
        """The entries whose frontend this flow was sent to."""
        found = self.dialled.get(flow[2:4], ())
        if flow.destination in self.local:
            family: Family = "IPv4" if len(flow.destination) == 4 else "IPv6"
            found += self.dialled.get((family, flow.destination_port), ())
        return found


class FlowIndex:
    """Frontends of UDP Services and the endpoints that may serve their flows, kept up with what is programmed."""

    def __init__(self, host: HostState | None = None) -> None:
        self._entries: dict[ServicePortName, Entry] = {}
        self._tombstones: list[tuple[Entry, int]] = []
        self._dialled: dict[_Dialled, tuple[Entry, ...]] = {}
        self._local: frozenset[bytes] = frozenset()
        if host is not None:
            self.set_host(host)

    def __len__(self) -> int:
        """Number of UDP Service ports known."""
        return len(self._entries)

    def __bool__(self) -> bool:
        """Can there be stale flows at all?"""
        return bool(self._dialled)

    def families(self) -> tuple[Family, ...]:
        """Families in which there may be stale flows."""
        found = {_family_of(dialled) for dialled in self._dialled}
        return tuple(family for family in FAMILIES if family in found)

    def set_host(self, host: HostState) -> bool:
        """Follow the node's addresses; True if node ports now answer at one where they did not."""
        addresses: set[str] = set()
        for family in FAMILIES:
            ports = host.node_ports(family)
            addresses.update(
                (a for a in host.node_addresses if family_of(a) == family)
                if ports.all_local
                else ports.addresses
            )
        local = frozenset(map(packed, addresses))
        grown = not local <= self._local
        self._local = local
        return grown

    def update(self, batch: ChangeBatch, result: ApplyResult) -> bool:
        """Take over what came into force; True if flows may have become stale by it.

        A failed Service keeps its last state.  One that is half done is let be until it is known again.  One that a
        full batch does not hold is gone; the quarantined are in it with the state that they keep.
        """
        failed = {failure.name for failure in result.failed}
        unsupported = {failure.name for failure in result.unsupported}
        unknown = set(result.unknown)
        stale = batch.host is not None and self.set_host(batch.host.after)
        if batch.full:
            present = {change.name for change in batch.changes}
            for name in [name for name in self._entries if name not in present]:
                stale = self._set(name, None) or stale
        for change in batch.changes:
            name = change.name
            if name.protocol != "UDP" or name in failed:
                continue
            if name in unknown:
                self._suspend(name, change.after)
            else:
                stale = self._set(name, None if name in unsupported else change.after) or stale
        return stale

    def settle(self) -> None:
        """All flows have been judged by this index and the stale ones are gone."""
        for name, entry in list(self._entries.items()):
            if entry.former:
                self._replace(name, entry._replace(former=frozenset()))
        # A packet that was on its way through the old rules may have made a flow just after the last look.
        old, self._tombstones = self._tombstones, []
        for entry, rounds in old:
            self._drop(entry)
            if rounds > 1:
                self._tombstones.append((entry, rounds - 1))
                self._add(entry)

    def snapshot(self) -> Snapshot:
        """All that flows are judged by, as it is now.  Costs far less than to judge."""
        return Snapshot(self._dialled.copy(), self._local)

    def _set(self, name: ServicePortName, state: ServiceState | None) -> bool:
        old = self._entries.get(name)
        if state is None:
            if old is None:
                return False
            self._replace(name, None)
            self._bury(old, old.dialled)
            return True
        new = _entry(state)
        if old is not None:
            before = (old.serving or frozenset()) | old.former
            new = new._replace(former=before - (new.serving or frozenset()))
            if new == old:
                return False
        self._replace(name, new)
        if old is None:
            return True
        left = old.dialled - new.dialled
        if left:
            self._bury(old, left)
        return bool(
            left
            or new.dialled - old.dialled
            or old.serving is None
            or old.serving - (new.serving or frozenset())
            # Its clients have been refused so far, or their packets went elsewhere untranslated.
            or not old.serving
        )

    def _suspend(self, name: ServicePortName, state: ServiceState | None) -> None:
        old = self._entries.get(name)
        new = _entry(state) if state is not None else Entry(frozenset(), None)
        if old is not None:
            before = (old.serving or frozenset()) | old.former
            new = new._replace(
                dialled=new.dialled | old.dialled, former=before | (new.serving or frozenset())
            )
        self._replace(name, new._replace(serving=None))

    def _bury(self, entry: Entry, dialled: frozenset[_Dialled]) -> None:
        former = entry.former | (entry.serving or frozenset())
        tombstone = Entry(dialled, frozenset(), former, gone=True)
        self._tombstones.append((tombstone, _TOMBSTONE_ROUNDS))
        self._add(tombstone)

    def _replace(self, name: ServicePortName, entry: Entry | None) -> None:
        old = self._entries.pop(name, None)
        if old is not None:
            self._drop(old)
        if entry is not None:
            self._entries[name] = entry
            self._add(entry)

    def _add(self, entry: Entry) -> None:
        for dialled in entry.dialled:
            self._dialled[dialled] = (*self._dialled.get(dialled, ()), entry)

    def _drop(self, entry: Entry) -> None:
        for dialled in entry.dialled:
            rest = tuple(other for other in self._dialled[dialled] if other is not entry)
            if rest:
                self._dialled[dialled] = rest
            else:
                del self._dialled[dialled]


def stale(flows: Iterable[Flow], index: Snapshot) -> Iterator[Flow]:
    """The flows to delete, in their order.

    A flow is judged only if it was sent to a frontend.  It stays if its server is a serving endpoint, ready or
    terminating, whatever the traffic policy.  Else it goes: translated to anyone else, or never translated since the
    Service had nobody then (in the default zone only: in others an untranslated flow may be another's bookkeeping).
    At a frontend that is nobody's any more only flows to its former endpoints go.
    """
    claims = index.claims
    for flow in flows:
        entries = claims(flow)
        if entries and _is_stale(flow, entries):
            yield flow


def is_certain(flow: Flow, index: Snapshot) -> bool:
    """Is a stale flow stale whatever is programmed just now, behind the index's back?

    Not so if its server is unknown: it may be an endpoint so new that the index does not have it yet.
    """
    server = flow[4:6]
    return not _translated(flow) or any(server in entry.former for entry in index.claims(flow))


def _is_stale(flow: Flow, entries: tuple[Entry, ...]) -> bool:
    server = flow[4:6]
    # The common case first: nearly every flow is right.
    for entry in entries:
        if entry.serving is None or server in entry.serving:
            return False
    if all(entry.gone for entry in entries):
        return _translated(flow) and any(server in entry.former for entry in entries)
    return _translated(flow) or flow.zone == flow.reply_zone == 0


def _translated(flow: Flow) -> bool:
    return flow[4:6] != flow[2:4]


def _entry(state: ServiceState) -> Entry:
    family = state.name.family
    dialled: set[_Dialled] = set()
    for frontend in state.frontends:
        if frontend.address is None:
            dialled.add((family, frontend.port))
        else:
            dialled.add((packed(frontend.address), frontend.port))
    serving = frozenset(
        (packed(endpoint.address), endpoint.port)
        for endpoint in state.endpoints
        if endpoint.serving or endpoint.ready
    )
    return Entry(frozenset(dialled), serving)


def _family_of(dialled: _Dialled) -> Family:
    where = dialled[0]
    if isinstance(where, bytes):
        return "IPv4" if len(where) == 4 else "IPv6"
    return where
