"""Real packets fare as the model says: drawn Services, the backend's rules in either variant, every kind of client."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxycore.api import HostState, LocalPodsByInterface, ServiceState
from proxycore.testing.flows import Traffic
from proxycore.testing.lab import ClientKind, Lab, Place
from proxycore.testing.responder import join_host_port
from proxycore.testing.scenario import Expect, ExpectEndpoints, ExpectVerdict, Flow
from proxycore.testing.states import HOST, host

from .meaning import OTHER_PORT, UNTOUCHED, Chances, Model, Probe, probes_of
from .node import FAMILIES, Node
from .test_model import state_of

pytestmark = pytest.mark.root

NUMBERS = range(6)
HOSTS = (HOST, host(detect_local=LocalPodsByInterface("pods", prefix=True)), host(detect_local=None))
KINDS: dict[str, tuple[ClientKind, Place]] = {
    "pod": ("pod", "pods"),
    "node": ("node", "node"),
    "outside": ("external", "world"),
    "admitted": ("external", "world"),
    "pod elsewhere": ("remote-pod", "overlay"),
}
PLACES: dict[str | None, tuple[ClientKind, Place]] = {
    "pods0": ("pod", "pods"),
    "pods7": ("pod", "pods"),
    "eth0": ("remote-pod", "overlay"),
}


def kind_and_place(probe: Probe) -> tuple[ClientKind, Place]:
    client = probe.client
    return KINDS[client.what] if client.what in KINDS else PLACES[client.interface]


def expectation(chances: Chances, sticky: bool) -> Expect:
    if {result[0] for result in chances} == {"to"}:
        masquerade = {
            join_host_port(str(address), int(str(port))): bool(masqueraded)
            for _, address, port, masqueraded in chances
        }
        return ExpectEndpoints(tuple(masquerade), masquerade, sticky and len(masquerade) > 1)
    [result] = chances
    if result == UNTOUCHED:
        return ExpectVerdict("unproxied")
    return ExpectVerdict("drop" if result == ("drop",) else "reject")


def flows_of(state: ServiceState, model: Model, facts: HostState) -> Iterator[tuple[Probe, Flow]]:
    for probe in probes_of(state, facts):
        packet = probe.packet
        if probe.after is not None or probe.walled or probe.client.what == "localhost":
            continue
        chances = model.answer(probe)
        assert isinstance(chances, dict)
        kind, _ = kind_and_place(probe)
        expect = expectation(chances, state.affinity_seconds is not None)
        proto = "udp" if packet.protocol == "udp" else "tcp"
        yield (
            probe,
            Flow(str(probe), kind, packet.source, 0, packet.destination, packet.port, proto, expect),
        )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_every_client_gets_what_the_model_says(xtables_lock: Path, variant: str, seed: int):
    chance = random.Random(seed)
    facts = HOSTS[seed % len(HOSTS)]
    states = [state_of(chance, number, number, family) for number in NUMBERS for family in FAMILIES]
    with Lab([80, OTHER_PORT, *(1000 + number for number in NUMBERS)]) as lab:
        node = Node(lab.node, variant, facts)
        traffic = Traffic(lab)
        try:
            node.run(*states, treeFrom=4)
            models = {family: Model(states, family, facts) for family in FAMILIES}
            asked = [
                (state, *pair)
                for state in states
                for pair in flows_of(state, models[state.name.family], facts)
            ]
            lab.put({probe.packet.source: kind_and_place(probe)[1] for _, probe, _ in asked} | _homes(states))
            together = [flow for state, _, flow in asked if state.affinity_seconds is None]
            assert len({str(flow.expect) for flow in together}) > 10
            said = list(traffic.judge(together).values())
            # Connections of one client at once might be kept at different endpoints.
            for state, _, flow in asked:
                if state.affinity_seconds is not None:
                    said += traffic.judge([flow]).values()
            assert said == []
        finally:
            traffic.close()
            node.close()


def _homes(states: list[ServiceState]) -> dict[str, Place]:
    """Where endpoints live."""
    return {
        end.address: "pods" if end.is_local or end.node is None else "overlay"
        for state in states
        for end in state.endpoints
    }
