"""What any kernel does with servers and destinations: the one in memory, and the real one by batches and by pyroute2."""

from __future__ import annotations

import errno

import pytest

from proxycore_ipvs.kernel import read_all
from proxycore_ipvs.servers import (
    DIRECT,
    ONE_PACKET,
    PERSISTENT,
    SCHEDULER_FLAGS,
    AddDestination,
    AddServer,
    ByAddress,
    ByMark,
    DeleteDestination,
    DeleteServer,
    Destination,
    Refusal,
    Server,
    SetDestination,
    SetServer,
    Timeouts,
)

WEB, WEB6 = ByAddress("TCP", "10.96.0.1", 80), ByAddress("TCP", "fd00:96::1", 80)
DNS, SIP = ByAddress("UDP", "10.96.0.1", 80), ByAddress("SCTP", "10.96.0.1", 80)
MARK, MARK6 = ByMark("IPv4", 0x40000001), ByMark("IPv6", 0x40000001)
KEYS = (WEB, WEB6, DNS, SIP, MARK, MARK6)
POD, POD2 = Destination("10.0.0.1", 8080), Destination("10.0.0.2", 8080)
POD6 = Destination("fd00::1", 8080)


def servers_of(kernel):
    return {state.server.key: state.server for state in kernel.servers()}


def destinations_of(kernel, key):
    return [state.destination for state in kernel.destinations(key)]


def pod(key):
    return POD6 if key.family == "IPv6" else POD


def test_nothing_is_there_at_first(kernel):
    assert (list(kernel.servers()), list(kernel.destinations(WEB)), kernel.server(WEB)) == ([], [], None)


def test_servers_differ_by_family_mark_protocol_address_and_port(kernel):
    wanted = {
        key: Server(key)
        for key in (*KEYS, ByMark("IPv4", 1), ByMark("IPv4", 0xFFFFFFFF), WEB._replace(port=8080))
    }
    assert kernel.run([AddServer(server) for server in wanted.values()]) == ()
    assert servers_of(kernel) == wanted


@pytest.mark.parametrize(
    "server",
    [
        Server(WEB, "wrr"),
        Server(WEB, "mh", flags=SCHEDULER_FLAGS[0] | SCHEDULER_FLAGS[1]),
        Server(WEB, flags=PERSISTENT, timeout_seconds=10800),
        Server(WEB, flags=PERSISTENT, timeout_seconds=60, prefix_length=24),
        Server(WEB, flags=PERSISTENT, timeout_seconds=60, prefix_length=0),
        Server(WEB6, flags=PERSISTENT, timeout_seconds=60, prefix_length=64),
        Server(MARK, flags=PERSISTENT, timeout_seconds=60),
        Server(MARK6, flags=PERSISTENT, timeout_seconds=60),
        Server(DNS, flags=ONE_PACKET),
    ],
    ids=str,
)
def test_what_is_written_is_read(kernel, server):
    assert kernel.run([AddServer(server)]) == ()
    assert [state.server for state in kernel.servers()] == [server]
    assert kernel.server(server.key).server == server
    changed = Server(server.key, "lc")
    assert kernel.run([SetServer(changed)]) == ()
    assert servers_of(kernel) == {server.key: changed}


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_destination_comes_changes_and_goes(kernel, key):
    first = pod(key)
    assert kernel.run([AddServer(Server(key)), AddDestination(key, first)]) == ()
    (state,) = kernel.destinations(key)
    assert (state.destination, state.active, state.inactive, state.persistent) == (first, 0, 0, 0)
    assert set(state.counters) == {0}
    idle = Destination(first.address, first.port, weight=0)
    assert kernel.run([SetDestination(key, idle)]) == ()
    assert destinations_of(kernel, key) == [idle]
    assert kernel.run([DeleteDestination(key, first.address, first.port)]) == ()
    assert destinations_of(kernel, key) == []


def test_destinations_are_told_apart_by_address_and_port(kernel):
    wanted = {POD, POD2, Destination(POD.address, 0), Destination(POD.address, 65535, 100, DIRECT)}
    assert kernel.run([AddServer(Server(MARK)), *(AddDestination(MARK, one) for one in wanted)]) == ()
    assert set(destinations_of(kernel, MARK)) == wanted


def test_destinations_are_read_newest_first(kernel):
    pods = [Destination(f"10.0.0.{n}", 80) for n in (5, 1, 4, 2, 3)]
    kernel.run([AddServer(Server(MARK)), *(AddDestination(MARK, one) for one in pods)])
    kernel.run([DeleteDestination(MARK, "10.0.0.5", 80), AddDestination(MARK, pods[0])])
    kernel.run([SetDestination(MARK, Destination("10.0.0.1", 80, 0))])
    found = [destination.address[-1] for destination in destinations_of(kernel, MARK)]
    assert found == ["5", "3", "2", "4", "1"]


def test_changing_a_server_leaves_its_destinations(kernel):
    kernel.run([AddServer(Server(MARK)), AddDestination(MARK, POD)])
    assert kernel.run([SetServer(Server(MARK, flags=PERSISTENT, timeout_seconds=60))]) == ()
    assert destinations_of(kernel, MARK) == [POD]


def test_deleting_a_server_deletes_its_destinations_only(kernel):
    kernel.run([op for key in KEYS for op in (AddServer(Server(key)), AddDestination(key, pod(key)))])
    assert kernel.run([DeleteServer(MARK)]) == ()
    assert destinations_of(kernel, MARK) == []
    assert set(servers_of(kernel)) == set(KEYS) - {MARK}
    assert all(destinations_of(kernel, key) == [pod(key)] for key in KEYS if key != MARK)


def test_what_is_refused_and_why(kernel):
    kernel.run([AddServer(Server(WEB)), AddDestination(WEB, POD)])
    operations = (
        AddServer(Server(WEB, "wrr")),
        AddDestination(WEB, Destination(POD.address, POD.port, 7)),
        SetServer(Server(DNS)),
        DeleteServer(DNS),
        AddDestination(DNS, POD),
        SetDestination(DNS, POD),
        DeleteDestination(DNS, POD.address, POD.port),
        SetDestination(WEB, POD2),
        DeleteDestination(WEB, POD2.address, POD2.port),
        AddServer(Server(SIP, "nosuch")),
        SetServer(Server(WEB, "nosuch")),
        AddDestination(WEB, POD6),
        AddDestination(WEB, Destination(POD2.address, 1, weight=1 << 31)),
        AddDestination(WEB, POD2),
    )
    refusals = kernel.run(operations)
    assert [(refusal.position, refusal.errno, refusal.reason) for refusal in refusals] == [
        (0, errno.EEXIST, "exists"),
        (1, errno.EEXIST, "exists"),
        (2, errno.ESRCH, "no server"),
        (3, errno.ESRCH, "no server"),
        (4, errno.ESRCH, "no server"),
        (5, errno.ESRCH, "no server"),
        (6, errno.ESRCH, "no server"),
        (7, errno.ENOENT, "no destination"),
        (8, errno.ENOENT, "no destination"),
        (9, errno.ENOENT, "no scheduler"),
        (10, errno.ENOENT, "no scheduler"),
        (11, errno.EINVAL, "other"),
        (12, errno.ERANGE, "other"),
    ]
    assert all(refusal.operation == operations[refusal.position] for refusal in refusals)
    assert servers_of(kernel) == {WEB: Server(WEB)}, "a refused operation changes nothing"
    assert set(destinations_of(kernel, WEB)) == {POD, POD2}, "those behind a refused one are done"


def test_refusals_of_many_datagrams_name_their_operations(kernel):
    keys = [ByMark("IPv4", number) for number in range(1, 1001)]
    assert kernel.run([AddServer(Server(key)) for key in keys]) == ()
    again = [AddServer(Server(key)) for key in keys[::2]]
    others = [AddServer(Server(ByMark("IPv6", key.mark))) for key in keys[1::2]]
    mixed = [operation for pair in zip(again, others, strict=True) for operation in pair]
    refusals = kernel.run(mixed)
    assert [(refusal.position, refusal.operation) for refusal in refusals] == [
        *((2 * n, op) for n, op in enumerate(again))
    ]
    assert {refusal.reason for refusal in refusals} == {"exists"}
    assert len(kernel.servers()) == 1500


@pytest.mark.parametrize(
    "operation",
    [
        AddDestination(WEB, Destination("10.0.0.1", 65536)),
        AddDestination(WEB, Destination("10.0.0.256", 1)),
        AddDestination(WEB, Destination("10.0.0.1", 1, weight=-1)),
        AddServer(Server(ByMark("IPv4", 1 << 32))),
        AddServer(Server(WEB, prefix_length=33)),
        AddServer(Server(WEB6, prefix_length=0)),
    ],
    ids=str,
)
def test_a_value_without_room_leaves_nothing_done(kernel, operation):
    with pytest.raises(ValueError):
        kernel.run([AddServer(Server(DNS)), operation])
    assert kernel.servers() == []


def test_timeouts(kernel):
    assert kernel.timeouts() == Timeouts(900, 120, 300)
    kernel.set_timeouts(Timeouts(tcp=86400))
    assert kernel.timeouts() == Timeouts(86400, 120, 300)
    kernel.set_timeouts(Timeouts(901, 121, 301))
    assert kernel.timeouts() == Timeouts(901, 121, 301)


def test_everything_is_read_by_server(kernel):
    kernel.run([AddServer(Server(MARK)), AddServer(Server(WEB6)), AddDestination(WEB6, POD6)])
    found = read_all(kernel)
    assert {key: [s.destination for s in states] for key, (_, states) in found.items()} == {
        MARK: [],
        WEB6: [POD6],
    }


def test_a_refusal_says_which_and_why():
    refusal = Refusal(0, DeleteDestination(WEB6, "fd00::1", 8080), errno.ENOENT)
    assert str(refusal) == "-d -t [fd00:96::1]:80 -r [fd00::1]:8080: no destination (ENOENT)"
