"""Real packets through the whole data plane fare as the model says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from proxycore.api import FAMILIES, Family, FrontendKind, HostState, LocalPodsByCIDR, ServiceState, WhenEmpty
from proxycore.policy import external_routes, internal_routes
from proxycore.testing.clients import Call, ask, connected, who
from proxycore.testing.flows import Traffic
from proxycore.testing.lab import CLIENT_ADDRESSES, CLIENT_PLACES, ClientKind, Lab
from proxycore.testing.netns import Namespace
from proxycore.testing.responder import join_host_port
from proxycore.testing.scenario import Expect, ExpectEndpoints, ExpectVerdict, Flow
from proxycore.testing.states import endpoint, frontend, host, name_of, node_port, pool, service
from proxycore_ipvs import diff, netrules
from proxycore_ipvs.contents import change_entries, read_entries, spec_of
from proxycore_ipvs.desired import Desired
from proxycore_ipvs.diff import Drain, Held
from proxycore_ipvs.entries import NODE_PORTS, SetKind, SetName
from proxycore_ipvs.host import render_host
from proxycore_ipvs.ids import Classes, Ids, Target
from proxycore_ipvs.kernel import NetlinkKernel, read_all
from proxycore_ipvs.plane import Objects, render, target_of
from proxycore_ipvs.setkernel import NetlinkSets
from proxycore_ipvs.shape import Shape, shape_of

from .meaning import wanted
from .simulate import DROP, UNTOUCHED, Outcome, Packet

pytestmark = [pytest.mark.root, pytest.mark.ipvs, pytest.mark.slow]

FACTS = host(detect_local=LocalPodsByCIDR(("10.0.0.0/24", "fd00:10::/64")))
INTERFACES: dict[ClientKind, str | None] = {
    "pod": "pods0",
    "node": None,
    "external": "ext0",
    "remote-pod": "ovl0",
}
OTHER_PORT = 9


def install(found: Sequence[ServiceState], facts: HostState, family: Family) -> str:
    """Sets and servers, in the calling thread's namespace, where nothing is before.  Returns the text of the rules."""
    shape = shape_of(facts, family)
    ids, classes, desired = Ids(shape.marks.numbers), Classes(), Desired()
    desired.put("node", Objects(entries=render_host(facts, family)))
    for state in found:
        target = target_of(state, shape)
        number = classes.take(state.name, target) if isinstance(target, Target) else 0
        objects = render(state, shape, ids.take(state.name), number)
        assert objects.unsupported == ()
        desired.put(state.name, objects)
    plan = diff.plan(Held(), desired.everything(), marks=shape.marks, now=0.0, drain_seconds=60, draining={})
    with NetlinkSets() as sets, NetlinkKernel() as kernel:
        for kind in SetKind:
            assert sets.create(spec_of(SetName(family, kind)))
        assert kernel.run(plan.first) == ()
        assert change_entries(sets, plan.sets) == ()
    return netrules.load(netrules.rules(shape, classes.rules, tuple(NODE_PORTS)), netrules.jumps(shape))


def arrange(namespace: Namespace, found: Sequence[ServiceState], facts: HostState, family: Family) -> None:
    for each in netrules.SYSCTLS:
        path = Path("/proc/sys") / each.path
        namespace.call(lambda path=path, each=each: path.write_text(each.value))
    text = namespace.call(lambda: install(found, facts, family))
    for each in netrules.policy_routes(shape_of(facts, family)):
        namespace.run(str(each).split())
    program = "iptables" if family == "IPv4" else "ip6tables"
    namespace.run([f"{program}-legacy-restore", "--noflush"], stdin=text)


def states_of(family: Family) -> list[ServiceState]:
    v4 = family == "IPv4"

    def at(number: int) -> str:
        return f"172.30.0.{number}" if v4 else f"fd00:172:30::{number}"

    def outside(number: int) -> str:
        return f"198.18.0.{number}" if v4 else f"2001:db8:5::{number}"

    def end(text: str, port: int, *, local: bool = False) -> object:
        return endpoint(f"{text}:{port}" if v4 else f"[{text}]:{port}", local=local)

    here, there = ("10.0.0.2", "10.180.1.5") if v4 else ("fd00:10::2", "fd00:10:180::5")
    inside = internal_routes(local=False, detector=True, masquerade_all=False)
    near = internal_routes(local=True, detector=True, masquerade_all=False)
    cluster, local = (external_routes(local=value, detector=True) for value in (False, True))
    ranges = ("203.0.113.0/24",) if v4 else ("2600:5200::/32",)
    both = pool(end(here, 8080, local=True), end(there, 8080))
    silent = pool(when_empty=WhenEmpty.DROP)
    external, balancer = FrontendKind.EXTERNAL_IP, FrontendKind.LOAD_BALANCER_IP
    web, dns, sticky, far, none = (
        name_of(text, protocol="UDP" if text == "dns" else "TCP", family=family)
        for text in ("web", "dns", "sticky", "far", "none")
    )
    return [
        service(
            web,
            frontend(at(1), routes=inside),
            frontend(outside(1), kind=external, routes=cluster),
            frontend(outside(2), kind=balancer, routes=local, source_ranges=ranges),
            node_port(30080, routes=local),
            cluster=both,
            local=pool(end(here, 8080, local=True)),
        ),
        service(
            dns,
            frontend(at(2), 53, protocol="UDP", routes=near),
            node_port(30053, protocol="UDP", routes=cluster),
            cluster=both,
            local=pool(end(here, 8080, local=True)),
        ),
        service(
            sticky,
            frontend(at(3), routes=inside),
            frontend(at(33), 8080, kind=external, routes=cluster),
            node_port(30081, routes=cluster),
            cluster=both,
            affinity=600,
        ),
        service(
            far,
            frontend(at(4), routes=near),
            frontend(outside(4), kind=balancer, routes=local),
            node_port(30084, routes=local),
            cluster=pool(end(there, 8080)),
            local=silent,
        ),
        service(none, frontend(at(5), routes=inside), node_port(30085, routes=cluster), cluster=pool()),
    ]


def expectation(outcomes: set[Outcome], *, sticky: bool) -> Expect:
    if {outcome[0] for outcome in outcomes} == {"to"}:
        masquerade = {
            join_host_port(str(address), int(str(port))): bool(masqueraded)
            for _, address, port, masqueraded in outcomes
        }
        return ExpectEndpoints(tuple(masquerade), masquerade, sticky and len(masquerade) > 1)
    (outcome,) = outcomes
    if outcome == UNTOUCHED:
        return ExpectVerdict("unproxied")
    return ExpectVerdict("drop" if outcome == DROP else "reject")


def flows_of(found: Sequence[ServiceState], family: Family) -> Iterator[tuple[ServiceState, Flow]]:
    for kind, interface in INTERFACES.items():
        source = CLIENT_ADDRESSES[kind][family == "IPv6"]
        for state in found:
            for each in state.frontends:
                own = FACTS.node_addresses[family == "IPv6"]
                to = each.address or own
                proto = "udp" if each.protocol == "UDP" else "tcp"
                for port in (each.port, OTHER_PORT) if kind == "external" else (each.port,):
                    packet = Packet(source, interface, to, proto, port)
                    outcomes = wanted(packet, found, FACTS, family, ())
                    assert outcomes is not None
                    expect = expectation(outcomes, sticky=state.affinity_seconds is not None)
                    said = f"{kind} {source} -> {to} {port}/{proto}"
                    yield state, Flow(said, kind, source, 0, to, port, proto, expect)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_client_gets_what_the_model_says(
    family: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    found = states_of(family)
    asked = list(flows_of(found, family))
    with Lab([8080, OTHER_PORT]) as lab:
        traffic = Traffic(lab)
        try:
            arrange(lab.node, found, FACTS, family)
            places = {CLIENT_ADDRESSES[kind][family == "IPv6"]: CLIENT_PLACES[kind] for kind in INTERFACES}
            lab.put({source: place for source, place in places.items() if place != "node"})
            together = [flow for state, flow in asked if state.affinity_seconds is None]
            said = list(traffic.judge(together).values())
            for state, flow in asked:
                if state.affinity_seconds is not None:
                    said += traffic.judge([flow]).values()
            assert said == []
        finally:
            traffic.close()


def test_an_open_connection_outlives_its_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    call = Call("external", CLIENT_ADDRESSES["external"][0], "172.30.0.1")
    state = service(name_of(), frontend("172.30.0.1"), cluster=["10.180.1.5:8080"])
    shape = shape_of(FACTS, "IPv4")

    def step(wanted: Objects, now: float, draining: dict[Drain, float]) -> diff.Plan:
        with NetlinkSets() as sets, NetlinkKernel() as kernel:
            held = Held(
                diff.held_servers(read_all(kernel), shape.marks),
                read_entries(sets, [SetName("IPv4", kind) for kind in SetKind]),
            )
            plan = diff.plan(held, wanted, marks=shape.marks, now=now, drain_seconds=60, draining=draining)
            assert kernel.run(plan.first) == ()
            assert change_entries(sets, plan.sets) == ()
            assert kernel.run(plan.last) == ()
        return plan

    with Lab([8080]) as lab:
        lab.put({call.source: "world"})
        arrange(lab.node, [state], FACTS, "IPv4")
        with connected(lab, call) as made:
            assert who(made) == "10.180.1.5:8080"
            rest = Objects(entries=render_host(FACTS, "IPv4"))
            plan = lab.node.call(lambda: step(rest, 0.0, {}))
            assert list(plan.draining.values()) == [60.0]
            assert who(made) == "10.180.1.5:8080"
            with pytest.raises(OSError):
                connected(lab, call)
            again = lab.node.call(lambda: step(rest, 59.0, dict(plan.draining)))
            assert again.is_empty
            assert who(made) == "10.180.1.5:8080"
            back = lab.node.call(lambda: step(_with(rest, state, shape), 59.5, dict(again.draining)))
            assert not back.draining
            assert ask(lab, call) == who(made) == "10.180.1.5:8080"
            gone = lab.node.call(lambda: step(rest, 100.0, {}))
            over = lab.node.call(lambda: step(rest, 160.0, dict(gone.draining)))
            assert [str(each) for each in over.last] == [f"-D -f {0x40000001}"]
            assert over.remaining == frozenset()


def _with(rest: Objects, state: ServiceState, shape: Shape) -> Objects:
    objects = render(state, shape, 1)
    return Objects(objects.servers, {**rest.entries, **objects.entries})
