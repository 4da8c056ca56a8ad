"""What batches amount to in metrics."""

from __future__ import annotations

import msgspec
import pytest

from proxycore.backend import ApplyResult, Failure
from proxycore.changes import SNAPSHOT, UNKNOWN, ChangeBatch, HostChange, ServiceChange, change
from proxycore.metrics.recorder import InForce, Lacks, Recorder, lacks
from proxycore.metrics.values import Histogram
from proxycore.model import (
    Endpoint,
    Frontend,
    FrontendKind,
    HostState,
    Pool,
    PoolName,
    Route,
    Routes,
    ServicePortName,
    ServiceState,
    WhenEmpty,
)

NOW = 1_800_000_000.0
HOST = HostState(node_name="here")


def name(service: str = "web", family: str = "IPv4", port: str = "http") -> ServicePortName:
    return ServicePortName("shop", service, port, "TCP", family)


def routes(pool: PoolName) -> Routes:
    return Routes(**{who: Route(pool, False) for who in ("local_pod", "node", "outside")})


CLUSTER_IP = Frontend(
    kind=FrontendKind.CLUSTER_IP,
    address="10.96.0.1",
    port=80,
    protocol="TCP",
    routes=routes(PoolName.CLUSTER),
)
INTERNAL_LOCAL = msgspec.structs.replace(CLUSTER_IP, routes=routes(PoolName.LOCAL))
NODE_PORT_LOCAL = msgspec.structs.replace(INTERNAL_LOCAL, kind=FrontendKind.NODE_PORT, address=None)
ELSEWHERE = Pool(when_empty=WhenEmpty.DROP)
NOWHERE = Pool(when_empty=WhenEmpty.REJECT)
HERE = Pool(endpoints=(Endpoint(address="10.0.0.1", port=80, is_local=True),), when_empty=WhenEmpty.DROP)


def state(of: ServicePortName, *frontends: Frontend, local: Pool | None = None) -> ServiceState:
    return ServiceState(name=of, frontends=frontends or (CLUSTER_IP,), local=local)


def put(state: ServiceState, trigger: float | None = None, before: object = None) -> ServiceChange:
    return msgspec.structs.replace(change(state.name, before, state), trigger_time=trigger)


def gone(of: ServicePortName, trigger: float | None = None) -> ServiceChange:
    return msgspec.structs.replace(change(of, UNKNOWN, None), trigger_time=trigger)


def batch(*changes: ServiceChange, full: bool = False, **more) -> ChangeBatch:
    return ChangeBatch(generation=1, changes=changes, full=full, **more)


APPLIED = ApplyResult(generation=1)
REJECTED = ApplyResult(generation=1, outcome="rejected", operations=2)


def exceptions(**more) -> ApplyResult:
    return ApplyResult(generation=1, **more)


# -- Service ports in force, and those without local endpoints -----------------------------------------------------


@pytest.mark.parametrize(
    ("frontends", "local", "expected"),
    [
        ([CLUSTER_IP], None, Lacks()),
        ([INTERNAL_LOCAL], ELSEWHERE, Lacks(internal=True)),
        ([INTERNAL_LOCAL], HERE, Lacks()),
        ([INTERNAL_LOCAL], NOWHERE, Lacks()),
        ([CLUSTER_IP, NODE_PORT_LOCAL], ELSEWHERE, Lacks(external=True)),
        ([INTERNAL_LOCAL, NODE_PORT_LOCAL], ELSEWHERE, Lacks(internal=True, external=True)),
    ],
)
def test_who_lacks_local_endpoints(frontends, local, expected):
    assert lacks(state(name(), *frontends, local=local)) == expected


def in_force(force: InForce) -> tuple[int, int, int]:
    return force.ports("IPv4"), force.lacking("IPv4", "internal"), force.lacking("IPv4", "external")


LACKING = state(name(), INTERNAL_LOCAL, NODE_PORT_LOCAL, local=ELSEWHERE)


def test_counts_follow_changes():
    force = InForce()
    force.take(batch(put(LACKING), put(state(name("api")))), APPLIED)
    assert in_force(force) == (2, 1, 1)
    force.take(batch(put(state(name(), INTERNAL_LOCAL, local=HERE))), APPLIED)
    assert in_force(force) == (2, 0, 0)
    force.take(batch(put(LACKING)), APPLIED)
    force.take(batch(gone(name())), APPLIED)
    assert in_force(force) == (1, 0, 0)
    force.take(batch(gone(name())), APPLIED)
    assert in_force(force) == (1, 0, 0), "what was not there cannot go"


def test_what_did_not_come_into_force_keeps_what_it_had():
    force = InForce()
    force.take(batch(put(LACKING)), APPLIED)
    other = put(state(name()))
    for result in (exceptions(failed=(Failure(name=name(), why="no"),)), exceptions(unknown=(name(),))):
        assert force.take(batch(other), result) == []
        assert in_force(force) == (1, 1, 1)
    assert force.take(batch(other), exceptions(unsupported=(Failure(name=name(), why="no"),))) == []
    assert in_force(force) == (0, 0, 0), "of what is unsupported nothing is in force"


def test_a_full_batch_corrects():
    force = InForce()
    force.take(
        batch(put(LACKING), put(state(name("api"))), put(state(name("db"), INTERNAL_LOCAL, local=ELSEWHERE))),
        APPLIED,
    )
    assert in_force(force) == (3, 2, 1)
    force.take(
        batch(put(LACKING), put(state(name("db"))), full=True),
        exceptions(failed=(Failure(name=name("db"), why="no"),)),
    )
    assert in_force(force) == (2, 2, 1)
    force.take(batch(full=True), APPLIED)
    assert in_force(force) == (0, 0, 0)


def test_families_are_counted_apart():
    force = InForce()
    force.take(batch(put(LACKING), put(state(name(family="IPv6")))), APPLIED)
    assert in_force(force) == (1, 1, 1)
    assert (force.ports("IPv6"), force.lacking("IPv6", "internal")) == (1, 0)


# -- durations and failures ----------------------------------------------------------------------------------------


def recorder(mode: str = "nftables") -> Recorder:
    return Recorder(("IPv4", "IPv6"), mode)


def count(recorder: Recorder, metric: str, *labels: str):
    value = recorder.values()[metric][labels]
    return (value.count, value.sum) if isinstance(value, Histogram) else value


SYNC, FULL, PARTIAL = (
    f"kubeproxy_sync_{kind}proxy_rules_duration_seconds" for kind in ("", "full_", "partial_")
)
PROGRAMMING = "kubeproxy_network_programming_duration_seconds"


def test_a_batch_counts_for_the_families_that_it_is_about():
    made = recorder()
    made.applied(batch(put(state(name()))), APPLIED, 0.5, NOW)
    assert count(made, SYNC, "IPv4") == count(made, PARTIAL, "IPv4") == (1, 0.5)
    assert count(made, SYNC, "IPv6") == count(made, FULL, "IPv4") == (0, 0.0)
    made.applied(batch(full=True), APPLIED, 0.25, NOW)
    assert count(made, SYNC, "IPv4") == (2, 0.75)
    assert count(made, SYNC, "IPv6") == count(made, FULL, "IPv6") == (1, 0.25)
    assert count(made, PARTIAL, "IPv6") == (0, 0.0)
    made.applied(batch(host=HostChange(before=None, after=HOST)), APPLIED, 0.5, NOW)
    assert count(made, PARTIAL, "IPv6") == (1, 0.5)


@pytest.mark.parametrize(
    ("mode", "metric"),
    [
        ("nftables", "kubeproxy_sync_proxy_rules_nftables_sync_failures_total"),
        ("iptables", "kubeproxy_sync_proxy_rules_iptables_restore_failures_total"),
        ("ipvs", "kubeproxy_sync_proxy_rules_iptables_restore_failures_total"),
    ],
)
def test_failures_by_mode(mode: str, metric: str):
    made = recorder(mode)
    made.applied(batch(put(LACKING)), APPLIED, 0.5, NOW)
    made.failed(batch(put(state(name()), NOW - 1)), REJECTED, 0.25)
    assert count(made, metric, "IPv4") == 1
    assert count(made, metric, "IPv6") == 0
    assert count(made, SYNC, "IPv4") == (2, 0.75), "a failure takes its time too"
    assert count(made, PROGRAMMING, "IPv4") == (0, 0.0)
    assert count(made, "kubeproxy_sync_proxy_rules_no_local_endpoints_total", "IPv4", "internal") == 1
    assert count(made, "proxycore_batches_total", "rejected") == 1
    others = {m for m in made.values() if "failures" in m} - {metric}
    assert others == set()


def test_batches_changes_and_operations():
    made = recorder()
    changes = (put(state(name("a"))), put(state(name("b")), before=state(name("b"))), gone(name("c")))
    made.applied(batch(*changes), ApplyResult(generation=1, operations=5), 0.1, NOW)
    made.applied(
        batch(*changes), exceptions(failed=(Failure(name=name("a"), why="no"),), operations=2), 0.1, NOW
    )
    made.failed(batch(*changes), REJECTED, 0.1)
    assert [count(made, "proxycore_batches_total", o) for o in ("applied", "partial", "rejected")] == [
        1,
        1,
        1,
    ]
    assert [count(made, "proxycore_changes_total", k) for k in ("added", "updated", "removed")] == [1, 2, 2]
    assert count(made, "proxycore_kernel_operations_total") == 9


def test_network_programming_is_observed_once_for_each_service_family_and_trigger():
    made = recorder()
    made.applied(
        batch(
            put(state(name(port="http")), NOW - 2),
            put(state(name(port="https")), NOW - 2),
            put(state(name(port="other")), NOW - 3),
            put(state(name("api")), NOW - 2),
            put(state(name("api", family="IPv6")), NOW - 4),
            put(state(name("untold"))),
            gone(name("gone"), NOW - 100),
        ),
        APPLIED,
        0.1,
        NOW,
    )
    assert count(made, PROGRAMMING, "IPv4") == (3, 7.0)
    assert count(made, PROGRAMMING, "IPv6") == (1, 4.0)


def test_what_did_not_come_into_force_has_not_been_programmed():
    made = recorder()
    changes = batch(
        put(state(name("a")), NOW - 1), put(state(name("b")), NOW - 1), put(state(name("c")), NOW - 1)
    )
    result = exceptions(
        failed=(Failure(name=name("a"), why="no"),),
        unknown=(name("b"),),
        unsupported=(Failure(name=name("c"), why="no"),),
    )
    made.applied(changes, result, 0.1, NOW)
    assert count(made, PROGRAMMING, "IPv4") == (0, 0.0)


def test_a_trigger_in_the_future_counts_as_now():
    made = recorder()
    made.applied(batch(put(state(name()), NOW + 5), oldest_trigger_time=NOW + 5), APPLIED, 0.1, NOW)
    assert count(made, PROGRAMMING, "IPv4") == (1, 0.0)
    assert count(made, "proxycore_trigger_to_kernel_seconds") == (1, 0.0)


def test_trigger_to_kernel_is_the_batchs():
    made = recorder()
    made.applied(batch(put(state(name())), oldest_trigger_time=NOW - 2), APPLIED, 0.1, NOW)
    made.applied(batch(put(state(name()))), APPLIED, 0.1, NOW)
    assert count(made, "proxycore_trigger_to_kernel_seconds") == (1, 2.0)


def test_being_brought_up_to_date_is_no_batch():
    made = recorder()
    sent = batch(put(LACKING, NOW - 1), full=True, reason=SNAPSHOT, oldest_trigger_time=NOW - 1)
    made.applied(sent, APPLIED, 0.0, NOW)
    values = made.values()
    assert values["proxycore_service_ports"]["IPv4",] == 1
    assert count(made, SYNC, "IPv4") == count(made, PROGRAMMING, "IPv4") == (0, 0.0)
    assert (
        sum(values["proxycore_batches_total"].values())
        == sum(values["proxycore_changes_total"].values())
        == 0
    )


def test_histogram_counts_what_is_at_most_a_bound():
    made = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        made.observe(value)
    assert (made.counts, made.sum, made.count) == ([2, 2, 1], 7.5, 5)
    copy = made.copy()
    made.observe(0.5)
    assert (copy.counts, copy.sum) == ([2, 2, 1], 7.5)
