"""Which flows are stale, decided without a kernel."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from proxycore.backend import ApplyResult, Failure
from proxycore.changes import UNKNOWN, ChangeBatch, HostChange, change
from proxycore.kernel.flow import Flow, packed
from proxycore.model import (
    Endpoint,
    Frontend,
    FrontendKind,
    HostState,
    NodePortAddresses,
    PoolName,
    Route,
    Routes,
    ServicePortName,
    ServiceState,
)
from proxycore.observers.staleflows import FlowIndex, is_certain, stale

DNS = ServicePortName("kube-system", "dns", "dns", "UDP", "IPv4")
OTHER = ServicePortName("default", "other", "", "UDP", "IPv4")
ROUTES = Routes(**{who: Route(PoolName.CLUSTER, False) for who in ("local_pod", "node", "outside")})
HOST = HostState(
    node_name="here",
    node_addresses=("192.0.2.1", "192.0.2.2", "fd00::1"),
    node_ports_ipv4=NodePortAddresses(all_local=True),
)
NODE_PORT = 30053


def frontend(address: str | None, port: int, protocol: str = "UDP") -> Frontend:
    kind = FrontendKind.NODE_PORT if address is None else FrontendKind.CLUSTER_IP
    return Frontend(kind=kind, address=address, port=port, protocol=protocol, routes=ROUTES)


def state(
    *endpoints: str | Endpoint,
    name: ServicePortName = DNS,
    at: tuple = (("10.96.0.10", 53), (None, NODE_PORT)),
):
    return ServiceState(
        name=name,
        frontends=tuple(frontend(*where) for where in at),
        endpoints=tuple(e if isinstance(e, Endpoint) else Endpoint(address=e, port=53) for e in endpoints),
    )


def flow(to: str, by: str, port: int = 53, by_port: int = 53, zone: int = 0) -> Flow:
    client = packed("10.0.0.99")
    return Flow(
        client, 4000, packed(to), port, packed(by), by_port, client, 4000, 0, zone, zone, 1
    )  # fmt: skip


def apply(index: FlowIndex, *states: ServiceState | None, name: ServicePortName = DNS, **result) -> bool:
    changes = tuple(change(s.name if s else name, UNKNOWN, s) for s in states)
    return index.update(
        ChangeBatch(
            generation=1, changes=changes, full=result.pop("full", False), host=result.pop("host", None)
        ),
        ApplyResult(generation=1, **result),
    )


def indexed(*states: ServiceState, host: HostState = HOST) -> FlowIndex:
    index = FlowIndex(host)
    apply(index, *states)
    return index


def is_stale(index: FlowIndex, candidate: Flow) -> bool:
    return list(stale([candidate], index.snapshot())) == [candidate]


def test_a_flow_to_a_serving_endpoint_stays_and_one_to_another_goes():
    index = indexed(state("10.0.0.1", "10.0.0.2"))
    assert not is_stale(index, flow("10.96.0.10", "10.0.0.2"))
    assert is_stale(index, flow("10.96.0.10", "10.0.0.3"))
    assert is_stale(index, flow("10.96.0.10", "10.0.0.2", by_port=5353))


def test_serving_counts_and_neither_readiness_nor_place_does():
    draining = Endpoint(address="10.0.0.1", port=53, ready=False, serving=True, terminating=True)
    remote = Endpoint(address="10.0.0.2", port=53, is_local=False, node="elsewhere")
    published = Endpoint(address="10.0.0.3", port=53, ready=True, serving=False)
    dead = Endpoint(address="10.0.0.4", port=53, ready=False, serving=False)
    index = indexed(state(draining, remote, published, dead))
    kept = [is_stale(index, flow("10.96.0.10", f"10.0.0.{n}")) for n in (1, 2, 3, 4)]
    assert kept == [False, False, False, True]


def test_without_endpoints_every_flow_goes():
    index = indexed(state())
    assert is_stale(index, flow("10.96.0.10", "10.0.0.1"))
    assert is_stale(index, flow("10.96.0.10", "10.96.0.10"))


def test_a_flow_from_before_the_service_had_anyone_goes():
    index = indexed(state("10.0.0.1"))
    untranslated = flow("10.96.0.10", "10.96.0.10")
    assert is_stale(index, untranslated)
    assert is_certain(untranslated, index.snapshot())


def test_an_untranslated_flow_of_another_zone_is_not_ours():
    index = indexed(state("10.0.0.1"))
    assert not is_stale(index, flow("10.96.0.10", "10.96.0.10", zone=7))
    assert is_stale(index, flow("10.96.0.10", "10.0.0.9", zone=7))


def test_an_endpoint_that_is_the_frontend_itself_stays():
    index = indexed(state(Endpoint(address="192.0.2.1", port=NODE_PORT)))
    assert not is_stale(index, flow("192.0.2.1", "192.0.2.1", NODE_PORT, NODE_PORT))


def test_a_node_port_is_one_only_at_the_nodes_own_addresses():
    index = indexed(state("10.0.0.1"))
    assert is_stale(index, flow("192.0.2.2", "10.0.0.9", NODE_PORT))
    assert not is_stale(index, flow("8.8.8.8", "8.8.8.8", NODE_PORT, NODE_PORT))
    assert not is_stale(index, flow("8.8.8.8", "10.0.0.9", NODE_PORT))
    assert not is_stale(index, flow("fd00::1", "fd00::9", NODE_PORT))


def test_node_port_addresses_narrow_it_down_and_follow_the_host():
    narrow = HostState(
        node_name="here",
        node_addresses=HOST.node_addresses,
        node_ports_ipv4=NodePortAddresses(addresses=("192.0.2.1",)),
    )
    index = indexed(state("10.0.0.1"), host=narrow)
    candidate = flow("192.0.2.2", "10.0.0.9", NODE_PORT)
    assert not is_stale(index, candidate)
    assert apply(index, host=HostChange(before=narrow, after=HOST))
    assert is_stale(index, candidate)
    assert not apply(index, host=HostChange(before=HOST, after=narrow))
    assert not is_stale(index, candidate)


def test_other_ports_addresses_and_protocols_are_let_be():
    tcp = ServicePortName("kube-system", "dns", "dns-tcp", "TCP", "IPv4")
    index = indexed(
        state("10.0.0.1"),
        ServiceState(name=tcp, frontends=(frontend("10.96.0.11", 53, "TCP"),), endpoints=()),
    )
    assert not is_stale(index, flow("10.96.0.10", "10.0.0.9", 54))
    assert not is_stale(index, flow("10.96.0.11", "10.0.0.9"))
    assert not is_stale(index, flow("10.96.0.12", "10.96.0.12"))


def test_a_deleted_service_takes_flows_to_its_former_endpoints_along():
    index = indexed(state("10.0.0.1"))
    assert apply(index, None)
    assert is_stale(index, flow("10.96.0.10", "10.0.0.1"))
    assert is_stale(index, flow("192.0.2.1", "10.0.0.1", NODE_PORT))
    assert not is_stale(index, flow("192.0.2.1", "10.0.0.77", NODE_PORT)), "someone else's host port"
    assert not is_stale(index, flow("10.96.0.10", "10.96.0.10"))
    index.settle()
    assert is_stale(index, flow("10.96.0.10", "10.0.0.1")), "a packet may have been on its way"
    index.settle()
    assert not is_stale(index, flow("10.96.0.10", "10.0.0.1"))
    assert not index


def test_endpoints_lost_before_the_deletion_count_as_former_until_cleaned():
    index = indexed(state("10.0.0.1"))
    apply(index, state())
    apply(index, None)
    assert is_stale(index, flow("10.96.0.10", "10.0.0.1"))


def test_a_frontend_that_is_dropped_or_goes_to_another_service():
    index = indexed(state("10.0.0.1"))
    moved = state("10.0.0.2", name=OTHER, at=(("10.96.0.10", 53),))
    assert apply(index, state("10.0.0.1", at=((None, NODE_PORT),)), moved)
    assert is_stale(index, flow("10.96.0.10", "10.0.0.1"))
    assert not is_stale(index, flow("10.96.0.10", "10.0.0.2"))
    assert not is_stale(index, flow("192.0.2.1", "10.0.0.1", NODE_PORT))


def test_what_failed_is_judged_by_what_is_in_force():
    index = indexed(state("10.0.0.1"))
    assert not apply(index, state("10.0.0.2"), failed=(Failure(name=DNS, why="no"),))
    assert not is_stale(index, flow("10.96.0.10", "10.0.0.1"))
    assert is_stale(index, flow("10.96.0.10", "10.0.0.2"))


def test_what_is_half_done_is_not_judged_until_it_is_known():
    index = indexed(state("10.0.0.1"))
    apply(index, state("10.0.0.2"), unknown=(DNS,))
    for server in ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.96.0.10"):
        assert not is_stale(index, flow("10.96.0.10", server))
    assert apply(index, state("10.0.0.2"))
    assert is_stale(index, flow("10.96.0.10", "10.0.0.1"))
    assert is_certain(flow("10.96.0.10", "10.0.0.1"), index.snapshot())
    assert not is_stale(index, flow("10.96.0.10", "10.0.0.2"))


def test_what_became_unsupported_is_gone():
    index = indexed(state("10.0.0.1"))
    assert apply(index, state("10.0.0.1", "10.0.0.2"), unsupported=(Failure(name=DNS, why="no"),))
    assert is_stale(index, flow("10.96.0.10", "10.0.0.1"))
    assert not is_stale(index, flow("10.96.0.10", "10.0.0.2"))
    assert len(index) == 0


def test_a_full_batch_is_everything():
    index = indexed(state("10.0.0.1"), state("10.0.0.5", name=OTHER, at=(("10.96.0.20", 53),)))
    assert apply(index, state("10.0.0.1"), full=True)
    assert is_stale(index, flow("10.96.0.20", "10.0.0.5"))
    assert not is_stale(index, flow("10.96.0.10", "10.0.0.1"))
    assert len(index) == 1


def test_only_losses_and_first_endpoints_ask_for_a_look():
    index = FlowIndex(HOST)
    assert apply(index, state())
    assert apply(index, state("10.0.0.1"))
    assert not apply(index, state("10.0.0.1"))
    assert not apply(index, state("10.0.0.1", "10.0.0.2"))
    assert apply(index, state("10.0.0.2"))
    assert apply(index, state("10.0.0.2", at=(("10.96.0.10", 53), (None, NODE_PORT), ("203.0.113.1", 53))))
    assert not apply(index, None, name=OTHER)


def test_a_flow_at_an_unknown_server_is_looked_at_again():
    index = indexed(state("10.0.0.1"))
    assert not is_certain(flow("10.96.0.10", "10.0.0.7"), index.snapshot())
    apply(index, state("10.0.0.2"))
    assert is_certain(flow("10.96.0.10", "10.0.0.1"), index.snapshot())
    index.settle()
    assert not is_certain(flow("10.96.0.10", "10.0.0.1"), index.snapshot())


def test_families_are_those_with_frontends():
    six = ServicePortName("kube-system", "dns", "dns", "UDP", "IPv6")
    index = FlowIndex(HOST)
    assert index.families() == ()
    apply(index, state("10.0.0.1"))
    assert index.families() == ("IPv4",)
    apply(index, state(Endpoint(address="fd00::53", port=53), name=six, at=(("fd00:96::a", 53),)))
    assert index.families() == ("IPv4", "IPv6")
    assert is_stale(index, flow("fd00:96::a", "fd00::54"))
    assert not is_stale(index, flow("fd00:96::a", "fd00::53"))


# -- model: the incremental index judges as one made from scratch ---------------------------------------------------

NAMES = [ServicePortName("ns", f"s{n}", "", "UDP", "IPv4") for n in range(3)]
SERVERS = [f"10.0.0.{n}" for n in range(1, 5)]
endpoints = st.sets(st.sampled_from(SERVERS))
steps = st.lists(
    st.tuples(st.integers(0, 2), st.none() | st.tuples(endpoints, st.booleans(), st.booleans())), max_size=12
)
FLOWS = [
    flow(f"10.96.0.{n}", server) for n in range(3) for server in (*SERVERS, f"10.96.0.{n}", "10.0.0.99")
] + [flow("192.0.2.1", server, NODE_PORT + n) for n in range(3) for server in (*SERVERS, "10.0.0.99")]


def made(number: int, what: tuple[set[str], bool, bool]) -> ServiceState:
    servers, cluster_ip, node_port = what
    at = [(f"10.96.0.{number}", 53)] * cluster_ip + [(None, NODE_PORT + number)] * node_port
    return state(*sorted(servers), name=NAMES[number], at=tuple(at))


@settings(deadline=None)
@given(steps)
def test_incremental_equals_from_scratch_once_settled(history: list):
    index, final = FlowIndex(HOST), {}
    for number, what in history:
        after = made(number, what) if what else None
        apply(index, after, name=NAMES[number])
        final[number] = after
    index.settle()
    index.settle()
    scratch = indexed(*(after for after in final.values() if after))
    assert list(stale(FLOWS, index.snapshot())) == list(stale(FLOWS, scratch.snapshot()))
    assert index.families() == scratch.families()
    assert len(index) == len(scratch)


@settings(deadline=None)
@given(steps)
def test_flows_to_what_serves_are_never_stale_and_leftovers_always_are(history: list):
    index, final = FlowIndex(HOST), {}
    served: set[Flow] = set()
    for number, what in history:
        after = made(number, what) if what else None
        asked = apply(index, after, name=NAMES[number])
        final[number] = after
        right = set()
        for known in final.values():
            for one in known.frontends if known else ():
                where = ("192.0.2.1", one.port) if one.address is None else (one.address, one.port)
                right |= {flow(where[0], endpoint.address, where[1]) for endpoint in known.endpoints}
        leftovers = served - right
        assert not right & set(stale(FLOWS, index.snapshot()))
        assert leftovers <= set(stale(FLOWS, index.snapshot()))
        assert all(is_certain(one, index.snapshot()) for one in leftovers)
        assert asked or not leftovers
        if asked:
            index.settle()
            served = set()
        served |= right
