"""The backend against a fake nf_tables, through any history: batches, restarts, refusals, faults and foreign hands.

After every batch that was applied the kernel must mean what the resolved Services say; see meaning.py.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from proxycore.api import (
    Endpoint,
    Family,
    FrontendKind,
    HostState,
    KernelError,
    LocalPodsByInterface,
    Pool,
    ServicePortName,
    ServiceState,
    WhenEmpty,
)
from proxycore.testing.states import (
    EXTERNAL_LOCAL,
    HOST,
    IN_CLUSTER,
    batch,
    context,
    frontend,
    full,
    host,
    name_of,
    node_port,
    service,
)
from proxycore_nft import layout, rows
from proxycore_nft.backend import NftBackend
from proxycore_nft.fake import FakeKernel, FakeTable
from proxycore_nft.kernel import Element

from .meaning import actual, expected

FAMILIES: tuple[Family, Family] = ("IPv4", "IPv6")
HOSTS = [
    HOST,
    host(node_addresses=("192.168.0.7",), service_cidrs=()),
    host(detect_local=None),
    host(masquerade_bit=3),
    host(detect_local=LocalPodsByInterface("cni0")),
]
NAMES = [name_of(f"s{number}", family=family) for number in range(4) for family in FAMILIES]


def vip(family: Family, number: int) -> str:
    return f"172.30.0.{number + 1}" if family == "IPv4" else f"fd00:172:30::{number + 1:x}"


def address(family: Family, number: int) -> str:
    return f"10.0.0.{number + 1}" if family == "IPv4" else f"fd00:10::{number + 1:x}"


class Spec(NamedTuple):
    """A Service port in few words, so that a failing history can be read."""

    first: int = 0
    count: int = 0
    affinity: int | None = None
    local: bool = False
    ranges: bool = False
    shared: bool = False
    drop: bool = False
    weighted: bool = False
    other_port: bool = False


SPECS = st.builds(
    Spec,
    first=st.integers(0, 5),
    count=st.integers(0, 20),
    affinity=st.sampled_from([None, None, 10, 10800]),
    local=st.booleans(),
    ranges=st.booleans(),
    shared=st.booleans(),
    drop=st.booleans(),
    weighted=st.booleans(),
    other_port=st.booleans(),
)


def state_of(name: ServicePortName, place: int, spec: Spec) -> ServiceState:
    """A Service port whose frontends nobody else has: `place` chooses them."""
    family = name.family
    endpoints = [
        Endpoint(
            address=address(family, n),
            port=8080 if spec.other_port and n == spec.first else 80,
            is_local=n % 3 == 0,
            node=("test-node", "far", None)[n % 3],
            weight=3 if spec.weighted and n == spec.first + 1 else 1,
        )
        for n in range(spec.first, spec.first + spec.count)
    ]
    cluster = Pool(
        endpoints=tuple(sorted(endpoints, key=str)),
        when_empty=WhenEmpty.DROP if spec.drop else WhenEmpty.REJECT,
    )
    made = [frontend(vip(family, place))]
    local = None
    if spec.shared:
        made.append(frontend(vip(family, 99), 1000 + place))  # An address that others have too.
    if spec.local:
        local = Pool(endpoints=tuple(e for e in cluster.endpoints if e.is_local), when_empty=WhenEmpty.DROP)
        ranges = ["198.51.100.0/24"] if family == "IPv4" else ["2001:db8:9::/64", "2001:db8:a::/64"]
        made += [
            frontend(
                vip(family, 50 + place),
                kind=FrontendKind.LOAD_BALANCER_IP,
                routes=EXTERNAL_LOCAL,
                source_ranges=ranges if spec.ranges else None,
            ),
            node_port(30000 + place, routes=EXTERNAL_LOCAL if spec.drop else IN_CLUSTER),
        ]
    return service(name, *made, cluster=cluster, local=local, affinity=spec.affinity)


def snapshot(kernel: FakeKernel) -> dict[Any, Any]:
    return {
        place: (
            dict(table.chains),
            {chain: list(rules) for chain, rules in table.rules.items()},
            {n: dict(s.elements) for n, s in table.sets.items()},
        )
        for place, table in kernel.state.items()
    }


class History(RuleBasedStateMachine):
    """One proxy after the other on one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = FakeKernel()
        self.host: HostState = HOSTS[0]
        self.desired: dict[ServicePortName, ServiceState] = {}
        self.places: dict[ServicePortName, int] = {name: n // 2 for n, name in enumerate(NAMES)}
        self.in_force = False
        self.need_full = True

    @initialize()
    def start(self) -> None:
        self.backend = NftBackend(open_kernel=lambda: self.kernel)
        self.backend.proxycore_backend_start(context(self.host))
        self.in_force, self.need_full = False, True

    # -- batches --

    def _apply(
        self, changes: dict[ServicePortName, ServiceState | None], *, as_full: bool, facts: HostState
    ) -> Any:
        wanted = {**self.desired, **changes}
        if as_full or self.need_full:
            given = full(*(state for state in wanted.values() if state is not None), facts=facts)
        else:
            given = batch(
                *(state for state in changes.values() if state is not None),
                removed=[name for name, state in changes.items() if state is None],
                facts=facts if facts != self.host else None,
            )
        return self.backend.proxycore_backend_apply(given)

    def _accept(self, changes: dict[ServicePortName, ServiceState | None], facts: HostState) -> None:
        self.desired = {
            name: state for name, state in {**self.desired, **changes}.items() if state is not None
        }
        self.host = facts
        self.in_force, self.need_full = True, False

    def _draw_changes(self, data: st.DataObject) -> dict[ServicePortName, ServiceState | None]:
        changes: dict[ServicePortName, ServiceState | None] = {}
        for number in data.draw(st.lists(st.integers(0, len(NAMES) - 1), unique=True, max_size=4), "numbers"):
            name = NAMES[number]
            gone = name in self.desired and data.draw(st.integers(0, 3)) == 0
            changes[name] = None if gone else state_of(name, self.places[name], data.draw(SPECS))
        return changes

    @rule(data=st.data(), as_full=st.booleans())
    def change(self, data: st.DataObject, as_full: bool) -> None:
        changes = self._draw_changes(data)
        result = self._apply(changes, as_full=as_full, facts=self.host)
        assert (result.outcome, result.failed) == ("applied", ())
        self._accept(changes, self.host)

    @rule(facts=st.sampled_from(HOSTS), data=st.data())
    def change_host(self, facts: HostState, data: st.DataObject) -> None:
        changes = self._draw_changes(data)
        result = self._apply(changes, as_full=False, facts=facts)
        assert result.outcome == "applied"
        self._accept(changes, facts)

    @rule(family=st.sampled_from(FAMILIES), data=st.data())
    def swap_frontends(self, family: Family, data: st.DataObject) -> None:
        """Two Services exchange their addresses in one batch."""
        mine = [name for name in NAMES if name.family == family]
        first, second = data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=2, unique=True))
        one, other = mine[first], mine[second]
        self.places[one], self.places[other] = self.places[other], self.places[one]
        changes: dict[ServicePortName, ServiceState | None] = {
            name: state_of(name, self.places[name], data.draw(SPECS)) for name in (one, other)
        }
        assert self._apply(changes, as_full=False, facts=self.host).outcome == "applied"
        self._accept(changes, self.host)

    @rule()
    def again(self) -> None:
        """Nothing changed: nothing is done."""
        if not self.in_force:
            return
        changes: dict[ServicePortName, ServiceState | None] = dict(self.desired)
        result = self._apply(changes, as_full=False, facts=self.host)
        assert (result.outcome, result.operations) == ("applied", 0)

    @rule()
    def quiet_second(self) -> None:
        """The engine's call between batches; it may make classes, and finds nothing."""
        if self.in_force:
            assert self.backend.proxycore_backend_verify(False).drift == ()

    # -- interruptions --

    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        """Nothing is touched by the start; indexes and handles are the same after the first batch."""
        known = self._entries() if self.in_force else {}
        if data.draw(st.booleans()):
            self.backend.proxycore_backend_stop()
        before = snapshot(self.kernel)
        self.start()
        for place, held in before.items():
            if any(held[0].values()):
                assert snapshot(self.kernel)[place] == held
        self.change(data, True)
        now = self._entries()
        for name, (index, handles) in known.items():
            if name in now and bool(now[name][1]) == bool(handles):
                assert now[name][0] == index
                kept = now[name][1]
                assert {t: h for t, h in kept.items() if t in handles}.items() <= handles.items()

    def _entries(self) -> dict[ServicePortName, tuple[int, dict[bytes, int]]]:
        """Index and handles of every Service port that has endpoints."""
        found = {}
        for table in self.backend._tables.values():
            for name, entry in table.mirror.entries.items():
                handles: dict[bytes, int] = {}
                for slots in (entry.cluster, entry.local):
                    if slots is not None:
                        handles |= dict(zip(slots.targets, slots.handles, strict=False))
                if entry.cluster is not None and entry.cluster.targets:
                    found[name] = entry.index, handles
        return found

    @rule(data=st.data(), where=st.sampled_from(["frontends", "endpoints", "pools", "slots"]))
    def refusal(self, data: st.DataObject, where: str) -> None:
        """The kernel refuses an element of one Service: nothing changes, and that Service is named."""
        changes = self._draw_changes(data)
        if not changes:
            return
        refused: list[bytes] = []

        def refuse(name: str, key: bytes) -> str | None:
            if name == where and not refused:
                refused.append(key)
            return "no such luck" if name == where and key in refused else None

        before, mirrors = snapshot(self.kernel), self._mirrors()
        self.kernel.refuse = refuse
        result = self._apply(changes, as_full=False, facts=self.host)
        self.kernel.refuse = lambda name, key: None
        if not refused:
            assert result.outcome == "applied"
            self._accept(changes, self.host)
            return
        assert result.outcome == "rejected"
        assert result.culprits is not None
        assert {culprit.name for culprit in result.culprits} <= set(changes) | set(self.desired)
        # Both families may have a Service port of that index.
        assert 1 <= len(result.culprits) <= 2
        for place, held in before.items():
            if any(held[0].values()):
                assert snapshot(self.kernel)[place] == held
        assert self._mirrors() == mirrors

    @staticmethod
    def _check(found: object, wanted: object) -> None:
        assert found == wanted or (isinstance(found, str) and str(wanted) in found)

    def _mirrors(self) -> dict[str, Any]:
        return {
            family: (dict(table.mirror.entries), set(table.mirror.plain.used), set(table.mirror.sticky.used))
            for family, table in self.backend._tables.items()
        }

    @rule(data=st.data(), number=st.sampled_from([errno.ENOBUFS, errno.EMSGSIZE, errno.ETIMEDOUT]))
    def fault(self, data: st.DataObject, number: int) -> None:
        """The transaction fails as a whole; what is sent afterwards converges."""
        changes = self._draw_changes(data)
        self.kernel.fail_next = number
        try:
            result = self._apply(changes, as_full=False, facts=self.host)
        except KernelError as error:
            self._check(error.errno, number)
            self.in_force = False
        else:
            assert result.outcome == "applied"
            self._accept(changes, self.host)
        self.kernel.fail_next = None

    @rule(data=st.data())
    def lost(self, data: st.DataObject) -> None:
        """The transaction is done, but the answer never comes: what it did that is wanted no more is undone later."""
        changes = self._draw_changes(data)
        self.kernel.lose_next = True
        try:
            result = self._apply(changes, as_full=False, facts=self.host)
        except KernelError as error:
            self._check(error.errno, errno.ETIMEDOUT)
            self.in_force = False
        else:
            assert result.outcome == "applied"
            self._accept(changes, self.host)
        self.kernel.lose_next = False

    # -- foreign hands --

    def _live(self, data: st.DataObject) -> tuple[tuple[str, str], FakeTable]:
        places = sorted(place for place, table in self.kernel.state.items() if any(table.chains.values()))
        place = data.draw(st.sampled_from(places))
        return place, self.kernel.state[place]

    def _found(self, *words: str) -> None:
        """The next look finds it, and the next full batch puts it right."""
        self.kernel.number += 1
        self.backend._verify_after = 0.0
        found = self.backend.proxycore_backend_verify(False)
        assert found.checked
        assert any(all(word in drift.what for word in words) for drift in found.drift), found
        self.need_full = True
        self.in_force = False

    @precondition(lambda self: self.in_force)
    @rule(data=st.data())
    def take_an_element(self, data: st.DataObject) -> None:
        (_, _), table = self._live(data)
        names = sorted(name for name, held in table.sets.items() if held.elements and name != "affinity")
        name = data.draw(st.sampled_from(names))
        places = sorted(table.sets[name].elements, key=repr)
        place = places[data.draw(st.integers(0, len(places) - 1))]
        del table.sets[name].elements[place]
        self._found(name)

    @precondition(lambda self: self.in_force)
    @rule(data=st.data())
    def change_an_element(self, data: st.DataObject) -> None:
        (_, _), table = self._live(data)
        names = sorted(
            name
            for name, held in table.sets.items()
            if name != "affinity" and any(e.data is not None for e in held.elements.values())
        )
        if not names:
            return
        name = data.draw(st.sampled_from(names))
        elements = table.sets[name].elements
        places = sorted((p for p, e in elements.items() if e.data is not None), key=repr)
        place = places[data.draw(st.integers(0, len(places) - 1))]
        value = elements[place].data
        assert value is not None
        elements[place] = elements[place]._replace(data=bytes([value[0] ^ 1]) + value[1:])
        self._found(name, "changed element")

    @precondition(lambda self: self.in_force)
    @rule(data=st.data(), name=st.sampled_from(["endpoints", "slots", "pools"]))
    def add_an_element(self, data: st.DataObject, name: str) -> None:
        (nft, _), table = self._live(data)
        size = 4 if name == "pools" else 8
        data_size = {"endpoints": 8 if nft == "ip" else 20}.get(name, 4)
        key = bytes(size - 4) + b"\xff\xff\xff\xff"
        table.sets[name].elements[key, None, 0] = Element(key, bytes(data_size))
        self._found(name, "foreign element")

    @precondition(lambda self: self.in_force)
    @rule(data=st.data())
    def flush_a_chain(self, data: st.DataObject) -> None:
        _, table = self._live(data)
        chain = data.draw(st.sampled_from(sorted(name for name, rules in table.rules.items() if rules)))
        table.rules[chain] = []
        self._found(chain, "rules")

    @precondition(lambda self: self.in_force)
    @rule(data=st.data(), everything=st.booleans())
    def delete_a_table(self, data: st.DataObject, everything: bool) -> None:
        place, _ = self._live(data)
        for gone in list(self.kernel.state) if everything else [place]:
            del self.kernel.state[gone]
        self._found("gone")

    # -- what always holds --

    @invariant()
    def kernel_means_what_is_desired(self) -> None:
        if not self.in_force:
            return
        for family in FAMILIES:
            assert actual(self.kernel, family) == expected(self.desired.values(), family, self.host)

    @invariant()
    def kernel_is_what_the_mirror_says(self) -> None:
        if not self.in_force:
            return
        for table in self.backend._tables.values():
            held = self.kernel.state[table.nft, table.mirror.name].sets
            wanted: dict[str, dict[bytes, object]] = {name: {} for name in (*rows.SERVICE_SETS, "classes")}
            for row in rows.table_rows(table.mirror):
                wanted[row.set][rows.identity(row.set, row.key, row.value)] = row.value
            for name, rows_wanted in wanted.items():
                found = {rows.identity_of(name, e): rows.value_of(e) for e in held[name].elements.values()}
                assert found == rows_wanted, name
        assert len(self.kernel.state) == len(FAMILIES)

    @invariant()
    def nothing_is_found_wrong(self) -> None:
        if self.in_force:
            assert self.backend.proxycore_backend_verify(True).drift == ()

    @invariant()
    def indexes_are_unique(self) -> None:
        if not self.in_force:
            return
        for table in self.backend._tables.values():
            mirror = table.mirror
            taken = [entry.index for entry in mirror.entries.values()]
            assert len(taken) == len(set(taken))
            assert mirror.plain.used | mirror.sticky.used == set(taken)
            assert all(
                (entry.index <= layout.STICKY_MASK) == bool(entry.affinity_seconds)
                for entry in mirror.entries.values()
            )

    def teardown(self) -> None:
        """However it came about: it is what a start from nothing makes."""
        if not self.in_force:
            return
        fresh = FakeKernel()
        backend = NftBackend(open_kernel=lambda: fresh)
        backend.proxycore_backend_start(context(self.host))
        backend.proxycore_backend_apply(full(*self.desired.values(), facts=self.host))
        for family in FAMILIES:
            assert actual(self.kernel, family) == actual(fresh, family)


History.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=12,
    # To shorten a failing history takes minutes; they can be read as they are.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestHistory: Callable[[], Any] = History.TestCase
