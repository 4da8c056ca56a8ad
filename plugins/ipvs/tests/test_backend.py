"""The backend on a host in memory."""

from __future__ import annotations

import msgspec
import pytest

from proxycore.api import ConfigError, Endpoint, KernelError, Pool, PoolName
from proxycore.kernel.xtables import LockHeld
from proxycore.testing.states import (
    EXTERNAL_LOCAL,
    HOST,
    batch,
    context,
    frontend,
    full,
    host,
    name_of,
    node_port,
    service,
)
from proxycore_ipvs.backend import IpvsBackend
from proxycore_ipvs.fakesystem import FakeSystem
from proxycore_ipvs.servers import AddDestination, AddServer, ByMark, SetDestination

WEB = name_of("web")
DNS = name_of("dns", protocol="UDP")
A, B, C = "10.0.1.1:80", "10.0.1.2:80", "10.0.1.3:80"


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def system():
    return FakeSystem()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def backend(system, clock):
    return started(system, clock)


def started(system, clock, **options):
    made = IpvsBackend(open_system=system.open, clock=clock)
    made.proxycore_backend_start(context(options=options))
    return made


def web(*endpoints, name=WEB, **more):
    at = frontend("172.30.0.1", protocol=name.protocol)
    return service(name, at, cluster=endpoints, **more)


def apply(backend, given):
    result = backend.proxycore_backend_apply(given)
    assert (result.outcome, result.failed, result.unknown) == ("applied", (), ()), result
    return result


def weights(system):
    return {
        f"{each.destination.address}:{each.destination.port}": each.destination.weight
        for state in system.servers.servers()
        for each in system.servers.destinations(state.server.key)
    }


def key(system):
    (state,) = system.servers.servers()
    return state.server.key


def test_a_change_costs_what_it_changes(backend, system):
    apply(backend, full(web(A, B)))
    system.servers.runs.clear()
    loads = {family: len(tables.loads) for family, tables in system.chains.items()}
    result = apply(backend, batch(web(A, B, C)))
    assert [len(run) for run in system.servers.runs] == [1]
    assert result.operations == 2
    assert {family: len(tables.loads) for family, tables in system.chains.items()} == loads


def test_a_restart_writes_nothing(backend, system, clock):
    state = service(
        WEB,
        frontend("172.30.0.1"),
        node_port(30080, routes=EXTERNAL_LOCAL),
        cluster=[A, B],
        local=[A],
        affinity=30,
    )
    apply(backend, full(state, web(A, name=DNS)))
    before = system.dump()
    backend.proxycore_backend_stop()
    system.servers.runs.clear()
    again = IpvsBackend(open_system=system.open, clock=clock)
    assert again.proxycore_backend_start(context()).adopted
    assert apply(again, full(state, web(A, name=DNS))).operations == 0
    assert system.servers.runs == []
    assert system.dump() == before


def test_an_endpoint_drains_until_its_connections_end(backend, system, clock):
    apply(backend, full(web(A)))
    at = system.servers.open(key(system))
    apply(backend, batch(web(B)))
    assert weights(system) == {A: 0, B: 1}
    clock.now += 1
    assert backend.proxycore_backend_verify(True).drift == ()
    assert weights(system) == {A: 0, B: 1}
    system.servers.end(key(system), at)
    system.servers.forget(key(system), at)
    clock.now += 1
    backend.proxycore_backend_verify(False)
    assert weights(system) == {B: 1}


def test_a_deadline_ends_what_drains(backend, system, clock):
    apply(backend, full(web(A)))
    system.servers.open(key(system))
    apply(backend, batch(web(B)))
    clock.now = 899.0
    backend.proxycore_backend_verify(False)
    assert weights(system) == {A: 0, B: 1}
    clock.now = 901.0
    backend.proxycore_backend_verify(False)
    assert weights(system) == {B: 1}


def test_an_endpoint_that_comes_back_only_gets_its_weight(backend, system, clock):
    apply(backend, full(web(A, B)))
    system.servers.open(key(system))
    apply(backend, batch(web(B)))
    system.servers.runs.clear()
    apply(backend, batch(web(A, B)))
    ((operation,),) = system.servers.runs
    assert isinstance(operation, SetDestination)
    assert weights(system) == {A: 1, B: 1}
    clock.now = 2000.0
    assert backend.proxycore_backend_verify(True).drift == ()
    assert weights(system) == {A: 1, B: 1}


def test_a_service_that_goes_drains_and_gives_back_its_number(backend, system, clock):
    apply(backend, full(web(A)))
    first = key(system)
    system.servers.open(first)
    apply(backend, batch(removed=[WEB]))
    assert weights(system) == {A: 0}
    other = name_of("other")
    apply(backend, batch(service(other, frontend("172.30.0.2"), cluster=[B])))
    assert {state.server.key for state in system.servers.servers()} > {first}
    clock.now = 901.0
    backend.proxycore_backend_verify(False)
    assert weights(system) == {B: 1}
    assert key(system) != first
    assert backend.proxycore_backend_verify(True).drift == ()


def test_udp_endpoints_go_at_once(backend, system):
    apply(backend, full(web(A, name=DNS)))
    apply(backend, batch(web(B, name=DNS)))
    assert weights(system) == {B: 1}


def test_a_udp_endpoint_that_still_serves_keeps_its_flows(backend, system):
    ending = Endpoint(address="10.0.1.1", port=80, ready=False, serving=True, terminating=True)
    state = web(B, name=DNS)
    apply(backend, full(web(A, name=DNS)))
    apply(backend, batch(msgspec.structs.replace(state, endpoints=(ending, *state.endpoints))))
    assert weights(system) == {A: 0, B: 1}
    assert backend.proxycore_backend_verify(True).drift == ()
    apply(backend, batch(state))
    assert weights(system) == {B: 1}


def test_one_that_is_refused_fails_alone_and_keeps_what_it_had(backend, system):
    apply(backend, full(web(A)))
    before = system.dump()["servers"]
    system.servers.refuse = lambda operation: (
        22 if isinstance(operation, AddDestination) and operation.destination.address == "10.0.1.3" else 0
    )
    other = name_of("other")
    result = backend.proxycore_backend_apply(
        batch(web(A, C), service(other, frontend("172.30.0.2"), cluster=[B]))
    )
    assert [failure.name for failure in result.failed] == [WEB]
    assert "10.0.1.3" in result.failed[0].why
    assert weights(system) == {A: 1, B: 1}
    assert before.items() <= system.dump()["servers"].items()
    system.servers.refuse = lambda operation: 0
    apply(backend, batch(web(A, C)))
    assert weights(system) == {A: 1, B: 1, C: 1}


def test_one_that_is_refused_leaves_its_frontend_to_whom_it_went(backend, system):
    apply(backend, full(web(A)))
    system.servers.refuse = lambda operation: (
        22 if isinstance(operation, AddDestination) and operation.destination.address == "10.0.1.3" else 0
    )
    other = name_of("other")
    moved = service(WEB, frontend("172.30.0.2"), cluster=[C])
    result = backend.proxycore_backend_apply(
        batch(moved, service(other, frontend("172.30.0.1"), cluster=[B]))
    )
    assert [failure.name for failure in result.failed] == [WEB]
    text = "\n".join(each.native for each in backend.proxycore_backend_inspect(other))
    assert "172.30.0.1,tcp:80" in text
    assert "10.0.1.2:80" in text
    members = system.entries.members(_spec(system, "PX4-VIP"))
    assert [entry.address for entry in members] == ["172.30.0.1"]
    assert backend.proxycore_backend_verify(True).drift == ()


def test_a_new_one_that_is_refused_leaves_nothing(backend, system):
    apply(backend, full())
    empty = system.dump()
    system.servers.refuse = lambda operation: 12 if isinstance(operation, AddServer) else 0
    result = backend.proxycore_backend_apply(batch(web(A)))
    assert [failure.name for failure in result.failed] == [WEB]
    assert system.dump() == empty


def test_an_entry_that_a_set_refuses_is_its_services_fault(backend, system):
    system.entries.refuse = lambda entry: 4352 if entry.address == "172.30.0.1" and entry.port else 0
    result = backend.proxycore_backend_apply(full(web(A)))
    assert [failure.name for failure in result.failed] == [WEB]
    assert weights(system) in ({}, {A: 0})


def test_a_scheduler_that_is_not_there_is_told(system, clock):
    with pytest.raises(KernelError, match="no scheduler nosuch"):
        started(system, clock, scheduler="nosuch")
    assert system.servers.servers() == []
    started(system, clock, scheduler="lc")
    assert system.servers.servers() == []


def test_a_scheduler_by_weights_that_is_not_there_fails_whom_it_concerns(backend, system):
    system.servers.schedulers = frozenset(["rr"])
    heavy = Endpoint(address="10.0.1.9", port=80, weight=5)
    pools = Pool(endpoints=(heavy, *web(A).cluster.endpoints))
    result = backend.proxycore_backend_apply(full(msgspec.structs.replace(web(A), cluster=pools)))
    assert "no scheduler" in result.failed[0].why


def test_what_others_take_away_is_told_and_put_right(backend, system, clock):
    state = service(WEB, frontend("172.30.0.1"), node_port(30080), cluster=[A, B])
    apply(backend, full(state))
    before = system.dump()
    assert not backend.proxycore_backend_verify(True).drift
    assert not backend.proxycore_backend_verify(False).checked
    system.servers.run([SetDestination(key(system), _destination(system, A, 7))])
    system.entries.delete(_spec(system, "PX4-VIP"), list(system.entries.members(_spec(system, "PX4-VIP"))))
    system.chains["IPv4"].load("*mangle\n-D PREROUTING -j PX-SERVICES\n:PX-KNOWN - [0:0]\nCOMMIT\n")
    system.routes.parts.pop()
    clock.now += 100
    found = backend.proxycore_backend_verify(False)
    told = "\n".join(f"{each.service}: {each.what}" for each in found.drift)
    assert f"{WEB}: " in told
    for text in ("-w 1", "PX4-VIP", "PX-KNOWN has other rules", "-A PREROUTING", "` is gone"):
        assert text in told
    assert not found.repaired
    apply(backend, full(state))
    assert system.dump()["servers"] == before["servers"]
    assert system.dump()["sets"] == before["sets"]
    assert system.dump()["routing"] == before["routing"]
    assert backend.proxycore_backend_verify(True).drift == ()


def _destination(system, text, weight):
    address, _, port = text.partition(":")
    found = next(
        each.destination
        for each in system.servers.destinations(key(system))
        if (each.destination.address, each.destination.port) == (address, int(port))
    )
    return type(found)(found.address, found.port, weight, found.method)


def _spec(system, name):
    return system.entries.states()[name].spec


def test_a_kernel_that_is_not_to_be_asked_rejects_and_nothing_is_lost(backend, system):
    apply(backend, full(web(A)))

    def fail(operations):
        raise KernelError("no answer")

    run, system.servers.run = system.servers.run, fail
    result = backend.proxycore_backend_apply(batch(web(A, B)))
    assert (result.outcome, result.culprits) == ("rejected", ())
    assert "no answer" in result.message
    system.servers.run = run
    apply(backend, batch(web(A, B)))
    assert weights(system) == {A: 1, B: 1}


def test_a_lock_that_somebody_holds_is_nobodys_fault(backend, system):
    def held(text):
        raise LockHeld(5, (), "/run/xtables.lock")

    for tables in system.chains.values():
        tables.load = held
    result = backend.proxycore_backend_apply(full(web(A)))
    assert (result.outcome, result.culprits, result.unknown) == ("rejected", (), ())
    assert "lock" in result.message
    for tables in system.chains.values():
        del tables.load
    apply(backend, full(web(A)))
    assert weights(system) == {A: 1}


def test_the_nodes_addresses_are_followed(backend, system):
    apply(backend, full(service(WEB, node_port(30080), cluster=[A])))
    facts = host(node_ports_ipv4=HOST.node_ports_ipv4.__class__(addresses=("192.168.0.9",)))
    result = apply(backend, batch(facts=facts))
    assert result.operations == 2
    members = system.entries.members(_spec(system, "PX4-NODE"))
    assert [entry.address for entry in members] == ["192.168.0.9"]


def test_the_way_back_by_the_mark_is_minded_where_the_kernel_looks_for_it(backend, system):
    apply(backend, full(web(A)))
    assert {str(part) for part in system.routes.parts if "pref 299" in str(part)} == set()
    system.marks_checked = True
    (drift,) = backend.proxycore_backend_verify(True).drift
    assert "pref 299 iif lo" in drift.what
    apply(backend, full(web(A)))
    (rule,) = (str(part) for part in system.routes.parts if "pref 299" in str(part))
    assert rule.startswith("ip -4 ")
    system.marks_checked = False
    apply(backend, full(web(A)))
    assert not [part for part in system.routes.parts if "pref 299" in str(part)]


def test_node_port_sets_come_with_the_first_node_port(backend, system):
    apply(backend, full(web(A)))
    assert "PX4-NP-tcp" not in system.entries.states()
    apply(backend, batch(service(WEB, node_port(30080), cluster=[A])))
    assert system.entries.states()["PX4-NP-tcp"].references == 1


def test_objects_and_counters_of_a_service(backend, system):
    apply(backend, full(web(A)))
    server = key(system)
    system.servers.open(server)
    (counters,) = backend.proxycore_backend_counters()
    assert (counters.name, counters.connections, counters.by_endpoint) == (WEB, 1, {A: 1})
    text = "\n".join(each.native for each in backend.proxycore_backend_inspect(WEB))
    assert f"-A -f {server.mark} -s rr" in text
    assert "-r 10.0.1.1:80 -m -w 1" in text
    assert f"172.30.0.1,tcp:80 skbmark 0x{server.mark | 0x08000000:x}" in text


def test_what_was_counted_before_the_start_is_not_counted(backend, system, clock):
    apply(backend, full(web(A)))
    system.servers.open(key(system))
    again = started(system, clock)
    apply(again, full(web(A)))
    system.servers.open(key(system))
    assert [each.connections for each in again.proxycore_backend_counters()] == [1]


def test_render_and_plan_change_nothing(system, clock):
    backend = IpvsBackend(open_system=system.open, clock=clock)
    text = backend.proxycore_backend_render(context(), full(web(A)))
    assert "-A -f 1073741825 -s rr" in text
    assert "create PX4-VIP hash:ip,port family inet maxelem 1048576 skbinfo" in text
    assert "add PX4-VIP 172.30.0.1,tcp:80 skbmark 0x48000001" in text
    assert "ip -4 rule add pref 300" in text
    empty = system.dump()
    plan = backend.proxycore_backend_plan(context(), full(web(A)))
    assert system.dump() == empty
    assert [each.service for each in plan if "ipvsadm" in each.native] == [str(WEB)] * 2
    backend.proxycore_backend_start(context())
    apply(backend, full(web(A)))
    assert backend.proxycore_backend_plan(context(), full(web(A))) == ()


def test_options():
    backend = IpvsBackend(open_system=FakeSystem().open)
    system = FakeSystem()
    backend = started(system, Clock(), tcpTimeoutSeconds=1200.0, udpTimeoutSeconds=0.0, scheduler="")
    apply(backend, full(web(A)))
    assert system.servers.timeouts()[:2] == (1200, 120)
    with pytest.raises(ConfigError, match="drainSeconds"):
        started(FakeSystem(), Clock(), drainSeconds=-1)
    with pytest.raises(ConfigError, match="nosuch"):
        started(FakeSystem(), Clock(), nosuch=1)


def test_a_local_pool_has_a_server_of_its_own(backend, system):
    state = service(WEB, node_port(30080, routes=EXTERNAL_LOCAL), cluster=[A, B], local=[A])
    apply(backend, full(state))
    marks = {state.server.key for state in system.servers.servers()}
    assert marks == {ByMark("IPv4", 0x40000001), ByMark("IPv4", 0x50000001)}
    assert PoolName.LOCAL.value == "local"
