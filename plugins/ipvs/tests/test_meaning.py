"""Packets through rules, sets and servers fare as the model says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from proxycore.api import FAMILIES, Family, HostState, ServiceState
from proxycore_ipvs import netrules
from proxycore_ipvs.desired import Desired
from proxycore_ipvs.entries import NODE_PORTS
from proxycore_ipvs.host import render_host
from proxycore_ipvs.ids import Classes, Ids, Target
from proxycore_ipvs.plane import Objects, Unsupported, render, target_of
from proxycore_ipvs.servers import PERSISTENT
from proxycore_ipvs.shape import Shape, shape_of

from .drawn import hosts, states
from .meaning import local_addresses, packets, wanted
from .simulate import World


def programmed(
    found: Sequence[ServiceState], host: HostState, family: Family, *, security: bool = True
) -> tuple[Shape, Desired, Classes, list[Unsupported]]:
    """Everything that stands for the Services and the node."""
    shape = shape_of(host, family, security=security)
    ids, classes, desired = Ids(shape.marks.numbers), Classes(), Desired()
    desired.put("node", Objects(entries=render_host(host, family)))
    unsupported = []
    for state in found:
        target = target_of(state, shape)
        number = classes.take(state.name, target) if isinstance(target, Target) else 0
        objects = render(state, shape, ids.take(state.name), number)
        desired.put(state.name, objects)
        unsupported += objects.unsupported
    return shape, desired, classes, unsupported


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data(), host=hosts())
@settings(max_examples=60, deadline=None)
def test_every_packet_fares_as_the_model_says(family: Family, data: st.DataObject, host: HostState) -> None:
    found = data.draw(states(family))
    shape, desired, classes, unsupported = programmed(found, host, family, security=data.draw(st.booleans()))
    skipped = [each.frontend for each in unsupported if each.frontend is not None]
    event(f"frontends without an entry: {len(skipped)}")
    chains = netrules.rules(shape, classes.rules, node_ports=tuple(NODE_PORTS))
    world = World(shape, chains, desired.everything(), local_addresses(host))
    for packet in packets(found, host, family):
        expected = wanted(packet, found, host, family, skipped)
        if expected is not None:
            assert world.send(packet) == expected, str(packet)


@given(data=st.data(), host=hosts())
@settings(max_examples=60, deadline=None)
def test_affinity_is_what_servers_say(data: st.DataObject, host: HostState) -> None:
    found = data.draw(states("IPv4"))
    for state in found:
        _, desired, _, unsupported = programmed([state], host, "IPv4")
        told = any(each.frontend is None for each in unsupported)
        persistent = state.affinity_seconds is not None and not told
        for each in desired.everything().servers.values():
            assert bool(each.server.flags & PERSISTENT) == persistent
            assert each.server.timeout_seconds == (state.affinity_seconds if persistent else 0)
