"""The engine, with a backend that the test answers for.  Nothing waits for time to pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest

from proxycore import logs
from proxycore.api import (
    ApplyResult,
    BackendContext,
    BackendInfo,
    ChangeBatch,
    Drift,
    Failure,
    HostState,
    KernelError,
    ObserverContext,
    ServicePortName,
    Started,
    Verification,
    hookimpl,
)
from proxycore.cell import BackendCell, Cell
from proxycore.dispatch import BackendRunner, ObserverRunner
from proxycore.engine import PAUSE_MAX, Engine
from proxycore.hookspecs import BackendSpec, ObserverSpec
from proxycore.inbox import EngineSettings
from proxycore.objects import (
    EndpointSlice,
    Metadata,
    Node,
    Service,
    ServiceCIDR,
    ServicePort,
    ServiceSpec,
    SliceEndpoint,
    SlicePort,
)
from proxycore.source import Applied, Deleted, Synced, Trouble

SECONDS = 10.0
LOG = logs.get("test")
INFO = BackendInfo(name="b", summary="", api="", capabilities=frozenset())


def service(name: str, address: str) -> Applied:
    return Applied(
        Service(
            metadata=Metadata(name=name, namespace="ns"),
            spec=ServiceSpec(cluster_ip=address, ports=(ServicePort(port=80),)),
        )
    )


def endpoints(name: str, *addresses: str) -> Applied:
    return Applied(
        EndpointSlice(
            metadata=Metadata(name=name, namespace="ns", labels={"kubernetes.io/service-name": name}),
            address_type="IPv4",
            endpoints=tuple(SliceEndpoint(addresses=(address,)) for address in addresses),
            ports=(SlicePort(name="", port=8080, protocol="TCP"),),
        )
    )


def name_of(name: str) -> ServicePortName:
    return ServicePortName("ns", name, "", "TCP", "IPv4")


class Backend:
    """Hands each batch to the test and waits for its answer."""

    def __init__(self) -> None:
        self.batches: SimpleQueue[ChangeBatch] = SimpleQueue()
        self.answers: SimpleQueue[Callable[[ChangeBatch], ApplyResult]] = SimpleQueue()
        self.starts: SimpleQueue[Exception | None] = SimpleQueue()
        self.verifications: SimpleQueue[Verification] = SimpleQueue()
        self.stopped = threading.Event()
        self.adopted: str | None = None

    @hookimpl
    def proxycore_backend_describe(self) -> BackendInfo:
        return INFO

    @hookimpl
    def proxycore_backend_start(self, context: BackendContext) -> Started:
        error = None if self.starts.empty() else self.starts.get()
        if error is not None:
            raise error
        return Started(adopted=self.adopted)

    @hookimpl
    def proxycore_backend_apply(self, batch: ChangeBatch) -> ApplyResult:
        self.batches.put(batch)
        return self.answers.get(timeout=SECONDS)(batch)

    @hookimpl
    def proxycore_backend_verify(self, deep: bool) -> Verification:
        return Verification(checked=False) if self.verifications.empty() else self.verifications.get()

    @hookimpl
    def proxycore_backend_stop(self) -> None:
        self.stopped.set()

    def next(self) -> ChangeBatch:
        return self.batches.get(timeout=SECONDS)

    def accept(self) -> None:
        self.answers.put(lambda batch: ApplyResult(generation=batch.generation))


class Observer:
    def __init__(self) -> None:
        self.applied: SimpleQueue[tuple[ChangeBatch, ApplyResult]] = SimpleQueue()
        self.failed: SimpleQueue[ChangeBatch] = SimpleQueue()
        self.drifts: SimpleQueue[Verification] = SimpleQueue()
        self.context: ObserverContext | None = None

    @hookimpl
    def proxycore_observer_start(self, context: ObserverContext) -> None:
        self.context = context

    @hookimpl
    def proxycore_observer_applied(self, batch: ChangeBatch, result: ApplyResult) -> None:
        self.applied.put((batch, result))

    @hookimpl
    def proxycore_observer_failed(self, batch: ChangeBatch, result: ApplyResult) -> None:
        self.failed.put(batch)

    @hookimpl
    def proxycore_observer_drift(self, verification: Verification) -> None:
        self.drifts.put(verification)


class Rig:
    def __init__(self, *, start_errors: int = 0, adopted: str | None = None) -> None:
        self.backend = Backend()
        self.backend.adopted = adopted
        for _ in range(start_errors):
            self.backend.starts.put(KernelError("not yet"))
        self.observer = Observer()
        self.host = HostState(node_name="n", families=("IPv4",))
        cell = BackendCell(self.backend, BackendSpec, name="b", distribution="test 1")
        cell.info = INFO
        self.engine = Engine(
            settings=EngineSettings(node_name="n", families=("IPv4",), verify_interval_seconds=0.001),
            host_of=self.host_of,
            backend=lambda deliver: BackendRunner(cell, deliver, log=LOG),
            backend_info=INFO,
            observers=lambda snapshot: [
                ObserverRunner(
                    Cell(self.observer, ObserverSpec, name="o", distribution="test 1"), snapshot, log=LOG
                )
            ],
            log=LOG,
        )
        self.nodes: SimpleQueue[Node | None] = SimpleQueue()
        self.thread = threading.Thread(target=self.engine.run, daemon=True)
        self.thread.start()

    def host_of(self, node: Node | None, service_cidrs: object) -> HostState:
        return self.host

    def put(self, *events: Applied | Deleted | Synced | Trouble) -> None:
        self.engine.sink.put(list(events))

    def close(self) -> None:
        for _ in range(10):
            self.backend.accept()
        self.engine.stop()
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_nothing_is_programmed_before_the_source_is_complete(rig: Rig) -> None:
    rig.put(service("a", "172.30.0.1"))
    rig.put(service("b", "172.30.0.2"), Synced())
    batch = rig.backend.next()
    assert batch.full
    assert batch.host is not None
    assert {change.name for change in batch.changes} == {name_of("a"), name_of("b")}


def test_an_empty_source_still_brings_a_full_batch(rig: Rig) -> None:
    rig.put(Synced())
    batch = rig.backend.next()
    assert (batch.full, batch.changes) == (True, ())


def test_changes_during_a_batch_are_gathered_into_the_next(rig: Rig) -> None:
    rig.put(service("a", "172.30.0.1"), Synced())
    rig.backend.next()
    rig.put(endpoints("a", "10.0.0.1"))
    rig.put(endpoints("a", "10.0.0.1", "10.0.0.2"))
    rig.put(service("b", "172.30.0.2"))
    rig.engine.healthy()
    _wait_until(lambda: rig.engine._ledger.pending >= {name_of("b")})
    rig.backend.accept()
    batch = rig.backend.next()
    assert not batch.full
    by_name = {change.name: change for change in batch.changes}
    assert set(by_name) == {name_of("a"), name_of("b")}
    assert [e.address for e in by_name[name_of("a")].cluster.added] == ["10.0.0.1", "10.0.0.2"]


def test_a_backend_that_asks_for_a_rest_gets_it_while_changes_gather(rig: Rig) -> None:
    rig.put(service("a", "172.30.0.1"), Synced())
    rig.backend.next()
    rig.backend.answers.put(lambda batch: ApplyResult(generation=batch.generation, pause_seconds=60.0))
    _wait_until(lambda: rig.engine.status.applied_total == 1)
    rig.put(service("b", "172.30.0.2"))
    _wait_until(lambda: name_of("b") in rig.engine._ledger.pending)
    assert rig.engine._pause_seconds == PAUSE_MAX
    assert rig.engine._may_start_at() == rig.engine._last_end + PAUSE_MAX
    rig.engine._pause_seconds = 0.0
    rig.put(service("c", "172.30.0.3"))
    assert {change.name for change in rig.backend.next().changes} == {name_of("b"), name_of("c")}


def test_figures_of_the_node_are_published(rig: Rig) -> None:
    rig.put(service("a", "172.30.0.1"), Synced())
    rig.backend.next()
    rig.backend.accept()
    for _ in range(5000):
        rig.backend.verifications.put(Verification(checked=False, figures={"things": 7}))
    _wait_until(lambda: rig.engine.status.figures == {"things": 7})


def test_a_change_that_is_undone_meanwhile_is_never_sent(rig: Rig) -> None:
    rig.put(service("a", "172.30.0.1"), Synced())
    rig.backend.next()
    rig.put(service("b", "172.30.0.2"))
    rig.put(Deleted("Service", "ns", "b"))
    rig.put(service("c", "172.30.0.3"))
    _wait_until(lambda: name_of("c") in rig.engine._ledger.pending)
    rig.backend.accept()
    assert [change.name for change in rig.backend.next().changes] == [name_of("c")]


def test_a_named_culprit_is_set_aside_and_all_others_are_served_at_once(rig: Rig) -> None:
    rig.put(service("good", "172.30.0.1"), service("bad", "172.30.0.2"), Synced())
    rig.backend.next()
    rig.backend.answers.put(
        lambda batch: ApplyResult(
            generation=batch.generation,
            outcome="rejected",
            culprits=(Failure(name=name_of("bad"), why="says the kernel"),),
        )
    )
    second = rig.backend.next()
    rig.backend.accept()
    assert [change.name for change in second.changes] == [name_of("good")]
    assert rig.observer.failed.get(timeout=SECONDS).generation == 1
    _wait_until(lambda: rig.engine.status.applied_total == 1)
    assert dict(rig.engine.status.quarantined) == {name_of("bad"): "says the kernel"}
    # A Service that is set aside does not make the proxy unwell.
    assert rig.engine.status.pending_since is None
    assert rig.engine.healthy()


def test_an_exception_makes_every_service_of_the_batch_unknown() -> None:
    rig = Rig()
    try:
        rig.put(service("a", "172.30.0.1"), Synced())
        rig.backend.next()
        rig.backend.accept()

        def fail(batch: ChangeBatch) -> ApplyResult:
            raise KernelError("lost")

        _wait_until(lambda: rig.engine.status.applied_total == 1)
        rig.put(endpoints("a", "10.0.0.1"))
        rig.backend.next()
        rig.backend.answers.put(fail)
        again = rig.backend.next()
        assert [type(change.before).__name__ for change in again.changes] == ["Unknown"]
    finally:
        rig.close()


def test_drift_is_told_and_brings_a_full_batch(rig: Rig) -> None:
    rig.put(service("a", "172.30.0.1"), Synced())
    rig.backend.next()
    rig.backend.verifications.put(
        Verification(checked=True, drift=(Drift(service=name_of("a"), what="an element is gone"),))
    )
    rig.backend.accept()
    repair = rig.backend.next()
    assert (repair.full, repair.reason) == (True, "drift")
    assert [change.name for change in repair.changes] == [name_of("a")]
    assert rig.observer.drifts.get(timeout=SECONDS).drift[0].service == name_of("a")


def test_a_change_of_the_node_reaches_backend_and_observers(rig: Rig) -> None:
    rig.put(Synced())
    rig.backend.next()
    rig.backend.accept()
    rig.observer.applied.get(timeout=SECONDS)
    before = rig.host
    rig.host = HostState(node_name="n", families=("IPv4",), node_addresses=("192.0.2.1",))
    rig.engine.host_may_have_changed()
    batch = rig.backend.next()
    assert batch.host is not None
    assert (batch.host.before, batch.host.after) == (before, rig.host)


def test_a_backend_that_cannot_start_is_started_again() -> None:
    rig = Rig(start_errors=2)
    try:
        rig.put(Synced())
        assert rig.backend.next().full
    finally:
        rig.close()
    assert rig.backend.stopped.is_set()


def test_not_healthy_before_the_first_programming(rig: Rig) -> None:
    assert not rig.engine.healthy()
    rig.put(Synced())
    rig.backend.next()
    assert not rig.engine.healthy()
    rig.backend.accept()
    rig.observer.applied.get(timeout=SECONDS)
    _wait_until(rig.engine.healthy)
    assert rig.observer.context is not None
    assert rig.observer.context.healthy()


def test_what_an_earlier_run_left_stays_while_something_cannot_be_read() -> None:
    rig = Rig(adopted="table ip proxycore, 8 frontends")
    try:
        rig.put(service("a", "172.30.0.1"), Trouble("b.yaml:3", "is not YAML"), Synced())
        _wait_until(lambda: rig.engine.status.held)
        assert rig.backend.batches.empty()
        rig.put(service("b", "172.30.0.2"), Trouble("b.yaml:3", ""))
        assert {change.name for change in rig.backend.next().changes} == {name_of("a"), name_of("b")}
    finally:
        rig.close()


def test_a_trouble_that_hides_nothing_holds_up_nothing() -> None:
    rig = Rig(adopted="table ip proxycore, 8 frontends")
    try:
        rig.put(Trouble("Service ns/a", "stands in two files", harmless=True), Synced())
        assert rig.backend.next().full
    finally:
        rig.close()


def test_on_a_new_node_one_broken_file_does_not_hold_up_the_others(rig: Rig) -> None:
    rig.put(service("a", "172.30.0.1"), Trouble("b.yaml:3", "is not YAML"), Synced())
    assert [change.name for change in rig.backend.next().changes] == [name_of("a")]


def test_a_snapshot_holds_what_is_in_force(rig: Rig) -> None:
    rig.put(service("a", "172.30.0.1"), Synced())
    rig.backend.next()
    rig.backend.accept()
    rig.observer.applied.get(timeout=SECONDS)
    snapshot = rig.engine._ask_snapshot()
    assert snapshot is not None
    assert snapshot.full
    assert snapshot.host is not None
    assert [change.name for change in snapshot.changes] == [name_of("a")]


def test_a_snapshot_keeps_a_service_of_which_nobody_knows(rig: Rig) -> None:
    rig.put(service("a", "172.30.0.1"), Synced())
    rig.backend.next()
    rig.backend.accept()
    rig.observer.applied.get(timeout=SECONDS)

    def fail(batch: ChangeBatch) -> ApplyResult:
        raise KernelError("lost")

    rig.put(endpoints("a", "10.0.0.1"))
    rig.backend.next()
    rig.backend.answers.put(fail)
    rig.observer.failed.get(timeout=SECONDS)
    snapshot = rig.engine._ask_snapshot()
    assert snapshot is not None
    assert [change.name for change in snapshot.changes] == [name_of("a")]


def test_a_service_cidr_or_node_object_asks_for_the_host_again(rig: Rig) -> None:
    rig.put(Synced())
    rig.backend.next()
    rig.backend.accept()
    rig.observer.applied.get(timeout=SECONDS)
    rig.host = HostState(node_name="n", families=("IPv4",), service_cidrs=("172.30.0.0/16",))
    rig.put(Applied(ServiceCIDR(metadata=Metadata(name="c"))))
    batch = rig.backend.next()
    assert batch.host is not None
    assert batch.host.after.service_cidrs == ("172.30.0.0/16",)


def test_drift_is_looked_for_while_services_change_all_the_time(rig: Rig) -> None:
    rig.put(service("a", "172.30.0.1"), Synced())
    rig.backend.next()
    rig.backend.verifications.put(
        Verification(checked=True, drift=(Drift(service=None, what="the table is gone"),))
    )
    # From now on a change is pending whenever the backend has finished one.
    for number in range(2, 30):
        rig.put(endpoints("a", f"10.0.0.{number}"))
        _wait_until(lambda: bool(rig.engine._ledger.pending))
        rig.backend.accept()
        if rig.backend.next().reason == "drift":
            return
    raise AssertionError("never verified")


def test_a_snapshot_does_not_claim_the_batch_under_way(rig: Rig) -> None:
    rig.put(service("a", "172.30.0.1"), Synced())
    rig.backend.next()
    rig.backend.accept()
    rig.observer.applied.get(timeout=SECONDS)
    rig.put(service("b", "172.30.0.2"))
    under_way = rig.backend.next()
    snapshot = rig.engine._ask_snapshot()
    assert snapshot is not None
    assert [change.name for change in snapshot.changes] == [name_of("a")]
    assert snapshot.generation < under_way.generation


def test_a_start_under_way_is_not_asked_for_again(rig: Rig) -> None:
    rig.put(service("a", "172.30.0.1"), Synced())
    rig.backend.next()
    # Nothing but a failed start makes it due again.
    assert rig.engine._start_at == float("inf")


def _wait_until(condition: Callable[[], bool]) -> None:
    """Poll, as there is nothing to wait on; only a failing test takes long."""
    event = threading.Event()
    for _ in range(2000):
        if condition():
            return
        event.wait(0.005)
    raise AssertionError("did not come true")
