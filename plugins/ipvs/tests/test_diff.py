"""From what is there to what should be: it converges, and no step leaves the map naming a server that is not there."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from proxycore.api import WhenEmpty
from proxycore.testing.states import frontend, name_of, pool, service
from proxycore_ipvs import diff
from proxycore_ipvs.desired import Desired, Touched
from proxycore_ipvs.diff import DeleteEntry, Drain, Held, PutEntry
from proxycore_ipvs.entries import Entry, SetKind, SetName
from proxycore_ipvs.fake import FakeKernel
from proxycore_ipvs.fates import classes_of, meaning
from proxycore_ipvs.ids import Classes, Ids, Target
from proxycore_ipvs.kernel import read_all
from proxycore_ipvs.netrules import PORTS, classes_in, rules
from proxycore_ipvs.plane import Objects, owners, render, target_of, values_in
from proxycore_ipvs.servers import (
    PERSISTENT,
    AddDestination,
    AddServer,
    ByAddress,
    ByMark,
    DeleteServer,
    Destination,
    Server,
    SetDestination,
)
from proxycore_ipvs.shape import Shape

from .drawn import states

SHAPE = Shape(family="IPv4", local_pods="-s 10.0.0.0/24")
MARKS = SHAPE.marks
FOREIGN = (
    AddServer(Server(ByAddress("TCP", "192.0.2.1", 80))),
    AddDestination(ByAddress("TCP", "192.0.2.1", 80), Destination("10.0.0.1", 80)),
    AddServer(Server(ByMark("IPv4", 7))),
    AddServer(Server(ByMark("IPv4", 0x40000000))),
    AddServer(Server(ByMark("IPv4", 0x40008001))),
)


class Node:
    """IPVS and sets in memory, on which plans are carried out step by step."""

    def __init__(self):
        self.kernel = FakeKernel()
        self.entries = {}
        self.draining = {}
        self.now = 0.0
        assert not self.kernel.run(FOREIGN)

    def held(self):
        return Held(diff.held_servers(read_all(self.kernel), MARKS), dict(self.entries))

    def plan(self, wanted, held=None, **options):
        return diff.plan(
            held or self.held(),
            wanted,
            marks=MARKS,
            now=self.now,
            drain_seconds=60,
            draining=self.draining,
            **options,
        )

    def carry_out(self, plan, each=lambda: None):
        for operation in plan.first:
            assert self.kernel.run([operation]) == ()
            each()
        for operation in plan.sets:
            if isinstance(operation, PutEntry):
                self.entries[operation.entry] = operation.value
            else:
                del self.entries[operation.entry]
            each()
        for operation in plan.last:
            assert self.kernel.run([operation]) == ()
            each()
        self.draining = dict(plan.draining)

    def foreign(self):
        return [str(s.server) for s in self.kernel.servers() if not diff.is_ours(s.server.key, MARKS)]

    def check_the_map(self):
        """Every value leads each class of client to a server that has somebody to answer."""
        there = read_all(self.kernel)
        for entry, value in self.entries.items():
            parts = MARKS.take_apart(value) if value is not None else None
            if parts is None:
                continue
            for fate in meaning(parts, classes_of(SHAPE)):
                if fate.pool is None:
                    continue
                key = ByMark("IPv4", MARKS.server(parts.number, fate.pool))
                assert key in there, f"{entry} names {key}"
                weights = [each.destination.weight for each in there[key][1]]
                assert any(weights), f"nobody answers {entry} at {key}"


def brought_up(desired, ids, classes, found):
    """Puts what these Services want, and nothing else, into `desired`."""
    names = {state.name for state in found}
    for name in desired.owners - names:
        desired.put(name, None)
        ids.leave(name)
        classes.leave(name)
    touched = []
    for state in found:
        target = target_of(state, SHAPE)
        number = 0
        if isinstance(target, Target):
            number = classes.take(state.name, target)
        else:
            classes.leave(state.name)
        touched.append(desired.put(state.name, render(state, SHAPE, ids.take(state.name), number)))
    return touched


def as_wanted(node, wanted):
    """Beside what drains."""
    held = node.held()
    assert held.entries == wanted.entries
    for key, virtual in wanted.servers.items():
        there = held.servers[key]
        assert there.server == virtual.server
        for at, destination in virtual.destinations.items():
            assert there.destinations[at][0] == destination
    extra = {
        Drain(key, *at)
        for key, there in held.servers.items()
        for at in there.destinations
        if key not in wanted.servers or at not in wanted.servers[key].destinations
    }
    assert extra == set(node.draining)
    for key, address, port in extra:
        assert held.servers[key].destinations[address, port][0].weight == 0


@given(st.lists(states("IPv4", 3), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_it_converges_and_the_map_never_names_what_is_not_there(histories):
    node, desired, ids, classes = Node(), Desired(), Ids(range(1, 30)), Classes()
    for found in histories:
        brought_up(desired, ids, classes, found)
        wanted = desired.everything()
        plan = node.plan(wanted)
        node.carry_out(plan, node.check_the_map)
        as_wanted(node, wanted)
        ids.settle(plan.remaining)
        node.now += 10
    node.now += 60
    node.carry_out(node.plan(wanted), node.check_the_map)
    assert node.draining == {}
    as_wanted(node, wanted)
    plan = node.plan(wanted)
    assert plan.is_empty
    ids.settle(plan.remaining)
    assert not ids.leaving
    assert node.foreign() == [
        str(operation.server) for operation in FOREIGN if isinstance(operation, AddServer)
    ]


@given(st.lists(states("IPv4", 3), min_size=2, max_size=4))
@settings(max_examples=60, deadline=None)
def test_looking_at_what_was_touched_comes_to_the_same(histories):
    whole, part = Node(), Node()
    desired, ids, classes = Desired(), Ids(range(1, 30)), Classes()
    for found in histories:
        before = desired.owners
        gone = [name for name in before if name not in {state.name for state in found}]
        touched = [desired.put(name, None) for name in gone]
        for name in gone:
            ids.leave(name)
            classes.leave(name)
        touched += brought_up(desired, ids, classes, found)
        whole.carry_out(whole.plan(desired.everything()))
        # What drains is looked at each time.
        touched.append(Touched(frozenset(drain.key for drain in part.draining)))
        keys = frozenset().union(*(each.servers for each in touched))
        elements = frozenset().union(*(each.entries for each in touched))
        held = part.held()
        restricted = Held(
            {key: there for key, there in held.servers.items() if key in keys},
            {entry: value for entry, value in held.entries.items() if entry in elements},
        )
        part.carry_out(part.plan(desired.part(touched), restricted))
        assert part.entries == whole.entries
        assert part.draining == whole.draining
        assert read_all(part.kernel).keys() == read_all(whole.kernel).keys()


@given(states("IPv4", 3), st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_a_restart_that_finds_all_as_it_was_changes_nothing(found, used_before):
    """A new process has what the kernel holds, and nothing else."""
    node, desired, classes = Node(), Desired(), Classes()
    ids = Ids(range(1, 60))
    for number in range(used_before):
        ids.take(name_of(f"old{number}"))
        ids.leave(name_of(f"old{number}"))
        ids.settle(())
    brought_up(desired, ids, classes, found)
    node.carry_out(node.plan(desired.everything()))
    ports = rules(SHAPE, classes.rules)[PORTS]

    held = node.held()
    marks = [key.mark for key in held.servers]
    again = Ids.recover(MARKS, values_in(held.entries), marks, owners(found))
    assert not again.leaving
    known = Classes()
    for target, number in classes_in(ports, MARKS).items():
        known.recover(target, number)
    anew = Desired()
    brought_up(anew, again, known, found)
    assert node.plan(anew.everything(), held).is_empty
    assert not known.settle()
    assert known.rules == classes.rules


NAME = name_of()
ONE, TWO = "10.0.0.1:80", "10.0.0.2:80"
KEY = ByMark("IPv4", 0x40000001)


def _web(*endpoints, protocol="TCP", **options):
    name = name_of(protocol=protocol)
    state = service(
        name,
        frontend("172.30.0.1", protocol=protocol),
        cluster=pool(*endpoints, when_empty=WhenEmpty.REJECT),
        **options,
    )
    return render(state, SHAPE, 1)


def _held(objects, connections=0, weight=None):
    return Held(
        {
            key: diff.HeldServer(
                each.server,
                {
                    at: (Destination(*at, d.weight if weight is None else weight), connections)
                    for at, d in each.destinations.items()
                },
            )
            for key, each in objects.servers.items()
        },
        objects.entries,
    )


def _plan(held, wanted, now=0.0, draining=None):
    return diff.plan(held, wanted, marks=MARKS, now=now, drain_seconds=60, draining=draining)


def test_a_new_service_as_text():
    assert str(_plan(Held(), _web(ONE, TWO))).splitlines() == [
        f"-A -f {0x40000001} -s rr",
        f"-a -f {0x40000001} -r 10.0.0.1:80 -m -w 1",
        f"-a -f {0x40000001} -r 10.0.0.2:80 -m -w 1",
        "add PX4-LOOP 10.0.0.1,tcp:80,10.0.0.1",
        "add PX4-LOOP 10.0.0.2,tcp:80,10.0.0.2",
        "add PX4-VIP 172.30.0.1,tcp:80 skbmark 0x48000001",
        "add PX4-CIP 172.30.0.1",
    ]


def test_a_service_that_goes_keeps_its_connections():
    plan = _plan(_held(_web(ONE), connections=2), Objects())
    assert str(plan).splitlines() == [
        "del PX4-CIP 172.30.0.1",
        "del PX4-VIP 172.30.0.1,tcp:80",
        "del PX4-LOOP 10.0.0.1,tcp:80,10.0.0.1",
        f"-e -f {0x40000001} -r 10.0.0.1:80 -m -w 0",
    ]
    assert plan.draining == {Drain(KEY, "10.0.0.1", 80): 60.0}
    assert plan.remaining == {1}
    later = Held(_held(_web(ONE), connections=2, weight=0).servers)
    assert _plan(later, Objects(), 59.0, plan.draining).is_empty
    over = _plan(later, Objects(), 60.0, plan.draining)
    assert over.last == (DeleteServer(KEY),)
    assert over.remaining == frozenset()
    idle = Held(_held(_web(ONE), weight=0).servers)
    assert _plan(idle, Objects(), 1.0, plan.draining).last == (DeleteServer(KEY),)


def test_one_that_comes_back_while_it_drains_gets_its_weight_again():
    held = Held({**_held(_web(ONE, TWO), connections=2, weight=0).servers}, _web(ONE, TWO).entries)
    plan = _plan(held, _web(ONE, TWO), draining={Drain(KEY, "10.0.0.1", 80): 5.0})
    assert plan.first == tuple(SetDestination(KEY, Destination(f"10.0.0.{n}", 80)) for n in (1, 2))
    assert (plan.sets, plan.last, plan.draining) == ((), (), {})


def test_after_a_restart_what_drains_has_all_its_time():
    held = _held(_web(ONE, TWO), connections=2, weight=0)
    plan = _plan(held, _web(TWO), now=100.0)
    assert plan.draining == {Drain(KEY, "10.0.0.1", 80): 160.0}


def test_udp_does_not_drain():
    held = _held(_web(ONE, TWO, protocol="UDP"), connections=2)
    gone = _plan(held, _web(TWO, protocol="UDP"))
    assert [str(each) for each in gone.last] == [f"-d -f {0x40000001} -r 10.0.0.1:80"]
    assert _plan(held, Objects()).last == (DeleteServer(KEY),)


def test_what_rises_comes_before_what_falls():
    held = _held(_web(ONE, TWO))
    low = Held(
        {
            KEY: diff.HeldServer(
                held.servers[KEY].server,
                {
                    ("10.0.0.1", 80): (Destination("10.0.0.1", 80), 0),
                    ("10.0.0.2", 80): (Destination("10.0.0.2", 80, 0), 0),
                },
            )
        },
        held.entries,
    )
    assert [str(each)[-4:] for each in _plan(low, _web(TWO)).first] == ["-w 1", "-w 0"]


def test_another_scheduler_or_affinity_changes_the_server_in_place():
    held = _held(_web(ONE))
    assert [str(each) for each in _plan(held, _web(ONE, affinity=60)).first] == [
        f"-E -f {0x40000001} -s rr -p 60"
    ]
    flagged = diff.HeldServer(Server(KEY, "rr", 0x2, 300, 24), held.servers[KEY].destinations)
    assert _plan(Held({KEY: flagged}, held.entries), _web(ONE)).is_empty
    masked = diff.HeldServer(Server(KEY, "rr", PERSISTENT, 60, 24), held.servers[KEY].destinations)
    assert len(_plan(Held({KEY: masked}, held.entries), _web(ONE, affinity=60)).first) == 1


def test_a_firewall_stands_before_what_it_protects():
    def kinds(plan):
        return [each.entry.set.kind for each in plan.sets]

    walled = render(
        service(NAME, frontend("192.0.2.1", source_ranges=("10.0.0.0/8",)), cluster=[ONE]), SHAPE, 1
    )
    order = [kind for kind in kinds(_plan(Held(), walled)) if kind not in (SetKind.LOOP, SetKind.CLUSTER_IPS)]
    assert order == [SetKind.ADMITTED, SetKind.FIREWALLED, SetKind.VIP]
    gone = [kind for kind in kinds(_plan(_held(walled), Objects())) if kind in order]
    assert gone == order[::-1]


def test_what_two_want_goes_with_the_last():
    desired = Desired()
    a, b = _web(ONE), render(service(name_of("b"), frontend("172.30.0.1", 443), cluster=[ONE]), SHAPE, 2)
    desired.put(NAME, a)
    desired.put(name_of("b"), b)
    shared = Entry(SetName("IPv4", SetKind.LOOP), "10.0.0.1", "TCP", 80, "10.0.0.1")
    touched = desired.put(NAME, None)
    assert shared in touched.entries
    assert shared in desired.part([touched]).entries
    last = desired.put(name_of("b"), None)
    assert desired.part([last]) == desired.everything() == Objects()


def test_a_frontend_that_changes_hands_has_the_value_of_its_new_owner():
    desired = Desired()
    entry = Entry(SetName("IPv4", SetKind.VIP), "172.30.0.1", "TCP", 80)
    mine, others = _web(ONE), render(service(name_of("b"), frontend("172.30.0.1"), cluster=[ONE]), SHAPE, 2)
    desired.put(NAME, mine)
    desired.put(name_of("b"), others)
    desired.put(NAME, None)
    assert desired.everything().entries[entry] == 0x48000002
    assert DeleteEntry(entry) not in _plan(_held(mine), desired.everything()).sets
