"""The desired state depends on the objects that are there, and on nothing of how they came."""

from __future__ import annotations

import msgspec
from hypothesis import event, given, settings
from hypothesis import strategies as st

from proxycore.claims import claim_key
from proxycore.desired import Desired
from proxycore.model import PoolName
from proxycore.objects import LABEL_SERVICE_NAME, is_ours, kind_of
from proxycore.resolve import resolve
from proxycore.source import Applied, Deleted, Listed, Replaced
from proxycore.testing import strategies
from proxycore.testing.build import NODE, host

MANY = settings(max_examples=150, deadline=None)
FEWER = settings(max_examples=80, deadline=None)


class World:
    """The objects that are there, kept in the simplest way."""

    def __init__(self):
        self.objects = {}

    def apply(self, happened):
        match happened:
            case Applied(object=item):
                self.objects[kind_of(item), item.metadata.namespace, item.metadata.name] = item
            case Deleted(kind=kind, namespace=namespace, name=name):
                self.objects.pop((kind, namespace, name), None)
            case Replaced(kind=kind, objects=items):
                self.objects = {key: item for key, item in self.objects.items() if key[0] != kind}
                for item in items:
                    self.apply(Applied(item))
            case Listed(kind=kind, names=names):
                self.objects = {
                    key: item for key, item in self.objects.items() if key[0] != kind or key[1:] in names
                }


def from_scratch(objects, facts):
    desired = Desired(NODE)
    desired.handle([Applied(item) for item in objects], facts)
    return desired


def outcome(desired):
    return dict(desired.states), {subject: set(reasons) for subject, reasons in desired.problems.items()}


@MANY
@given(
    st.lists(
        st.tuples(
            st.lists(strategies.events(), max_size=4), st.one_of(st.none(), strategies.hosts()), st.booleans()
        ),
        max_size=8,
    )
)
def test_incremental_equals_from_scratch(steps):
    desired, world, followed, facts = Desired(NODE), World(), {}, host()
    desired.handle([], facts)
    for happened, new_facts, taken in steps:
        desired.handle(happened, new_facts)
        facts = new_facts or facts
        for one in happened:
            world.apply(one)
        if taken:
            for name, state in desired.take().items():
                assert followed.get(name) != state, "take() tells changes only"
                if state is None:
                    del followed[name]
                else:
                    followed[name] = state
            assert followed == desired.states
            assert outcome(desired) == outcome(from_scratch(world.objects.values(), facts))
    desired.take()
    assert outcome(desired) == outcome(from_scratch(world.objects.values(), facts))
    event(f"states: {min(len(desired.states), 5)}")


@FEWER
@given(
    st.lists(st.one_of(strategies.services(), strategies.endpoint_slices()), max_size=12),
    strategies.hosts(),
    st.data(),
)
def test_order_and_batching_do_not_matter(items, facts, data):
    objects = {(kind_of(item), item.metadata.namespace, item.metadata.name): item for item in items}
    expected = outcome(from_scratch(objects.values(), facts))
    desired = Desired(NODE)
    desired.handle([], facts)
    for item in data.draw(st.permutations(list(objects.values()))):
        desired.handle([Applied(item)])
        if data.draw(st.booleans()):
            desired.take()
    assert outcome(desired) == expected


@FEWER
@given(st.lists(strategies.events(), max_size=10), strategies.hosts())
def test_what_is_said_twice_changes_nothing(happened, facts):
    desired, world = Desired(NODE), World()
    desired.handle(happened, facts)
    desired.take()
    for one in happened:
        world.apply(one)
    before = desired.resolved_total
    kinds = ("Service", "EndpointSlice")
    again = [Applied(item) for item in world.objects.values()]
    again += [
        Replaced(kind, tuple(item for key, item in world.objects.items() if key[0] == kind)) for kind in kinds
    ]
    desired.handle(again, msgspec.structs.replace(facts))
    assert desired.take() == {}
    assert desired.resolved_total == before


@FEWER
@given(
    st.lists(strategies.services(), max_size=8),
    st.lists(strategies.endpoint_slices(), max_size=6),
    strategies.hosts(),
)
def test_every_address_and_port_has_one_owner_and_every_route_a_pool(services, slices, facts):
    desired = from_scratch([*services, *slices], facts)
    owners = {}
    for name, state in desired.states.items():
        assert name == state.name
        used = set()
        for frontend in state.frontends:
            assert owners.setdefault(claim_key(name.family, frontend), name) == name
            used |= {
                route.pool
                for route in (frontend.routes.local_pod, frontend.routes.node, frontend.routes.outside)
            }
        assert len(set(state.frontends)) == len(state.frontends)
        assert used == {pool for pool in PoolName if state.pool(pool) is not None}
        known = set(state.endpoints)
        assert len({(e.address, e.port) for e in known}) == len(state.endpoints)
        assert list(map(str, state.endpoints)) == sorted(map(str, state.endpoints))
        for pool in (state.cluster, state.local):
            if pool is not None:
                assert set(pool.endpoints) <= known
                assert list(map(str, pool.endpoints)) == sorted(map(str, pool.endpoints))


@FEWER
@given(strategies.services(), st.lists(strategies.endpoint_slices(), max_size=4), strategies.hosts())
def test_resolving_alone_is_what_desired_says_of_a_lonely_service(service, slices, facts):
    owner = service.metadata
    mine = {}
    for item in slices:
        metadata = msgspec.structs.replace(
            item.metadata, namespace=owner.namespace, labels={LABEL_SERVICE_NAME: owner.name}
        )
        mine[metadata.name] = msgspec.structs.replace(item, metadata=metadata)
    desired = from_scratch([service, *mine.values()], facts)
    expected = resolve(service, mine.values(), facts).states if is_ours(service) else ()
    assert tuple(desired.states.values()) == expected
