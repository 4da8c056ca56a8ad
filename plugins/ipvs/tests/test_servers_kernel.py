"""IPVS of the kernel: batches, pyroute2, ipvsadm and the kernel in memory side by side; connections and counters."""

from __future__ import annotations

import errno
import random
import socket
import struct
import sys
import time

import pytest

from proxycore.testing.netns import Namespace
from proxycore_ipvs.fake import SCHEDULERS, FakeKernel
from proxycore_ipvs.kernel import NetlinkKernel, read_all
from proxycore_ipvs.plain import PlainKernel
from proxycore_ipvs.servers import (
    DIRECT,
    HASHED,
    ONE_PACKET,
    PERSISTENT,
    SCHEDULER_FLAGS,
    TUNNEL,
    AddDestination,
    AddServer,
    ByAddress,
    ByMark,
    DeleteDestination,
    DeleteServer,
    Destination,
    Server,
    SetDestination,
    SetServer,
)

from .inside import Inside

pytestmark = [pytest.mark.root, pytest.mark.ipvs]

HOST = "10.0.0.1"
VIP = "10.96.0.1"
WEB = ByAddress("TCP", VIP, 80)


def plan(kernel):
    """All that is there, without counters, and without the order of destinations."""
    return {
        key: (state.server, frozenset(found.destination for found in destinations))
        for key, (state, destinations) in read_all(kernel).items()
    }


def random_operations(seed: int, count: int):
    """A history among few names, so that much of it is refused."""
    draw = random.Random(seed)
    keys = [
        *(ByMark(family, mark) for family in ("IPv4", "IPv6") for mark in (1, 0xFFFFFFFF)),
        *(ByAddress(protocol, VIP, 80) for protocol in ("TCP", "UDP", "SCTP")),
        ByAddress("TCP", "fd00:96::1", 80),
    ]
    flags = (0, PERSISTENT, ONE_PACKET, *SCHEDULER_FLAGS)

    def server():
        key = draw.choice(keys)
        longest = 128 if key.family == "IPv6" else 32
        prefix = draw.choice((None, None, 24, longest - 1))
        return Server(
            key, draw.choice([*SCHEDULERS, "nosuch"]), draw.choice(flags), draw.choice((0, 60)), prefix
        )

    def destination():
        address = draw.choice(("10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "fd00::2"))
        return Destination(
            address, draw.choice((0, 80)), draw.choice((0, 1, 100)), draw.choice((0, 0, 0, TUNNEL, DIRECT))
        )

    def one():
        kind = draw.choices((0, 1, 2, 3, 4, 5), weights=(4, 2, 1, 8, 4, 3))[0]
        if kind < 2:
            return (AddServer, SetServer)[kind](server())
        key, other = draw.choice(keys), destination()
        if kind == 2:
            return DeleteServer(key)
        if kind == 5:
            return DeleteDestination(key, other.address, other.port)
        return (AddDestination, SetDestination)[kind - 3](key, other)

    return [one() for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_every_way_leaves_the_same_and_refuses_the_same(seed):
    operations = random_operations(seed, 400)
    found = []
    for make in (NetlinkKernel, PlainKernel):
        reading = NetlinkKernel if make is PlainKernel else PlainKernel
        with (
            Namespace("ipvs") as namespace,
            Inside(namespace, make) as kernel,
            Inside(namespace, reading) as other,
        ):
            refused = kernel.run(operations)
            assert read_all(other) == read_all(kernel)
            found.append(([(r.position, r.errno) for r in refused], plan(kernel)))
    fake = FakeKernel()
    refused = fake.run(operations)
    found.append(([(r.position, r.errno) for r in refused], plan(fake)))
    assert found[0] == found[1]
    assert found[0] == found[2]
    assert 50 < len(found[0][0]) < 350, "some of either"


def test_ipvsadm_takes_the_text_of_operations(namespace, opened):
    operations = [
        AddServer(Server(ByMark("IPv4", 0x40000001))),
        AddServer(Server(ByMark("IPv6", 0x40000001), "wrr")),
        AddServer(Server(WEB, flags=PERSISTENT, timeout_seconds=60, prefix_length=24)),
        AddServer(Server(ByAddress("UDP", VIP, 53), flags=ONE_PACKET)),
        AddServer(Server(ByAddress("SCTP", VIP, 53), "mh", SCHEDULER_FLAGS[0] | SCHEDULER_FLAGS[1])),
        AddServer(
            Server(ByAddress("TCP", "fd00::96", 80), flags=PERSISTENT, timeout_seconds=60, prefix_length=64)
        ),
        AddDestination(WEB, Destination("10.0.0.1", 8080, 0)),
        AddDestination(WEB, Destination("10.0.0.2", 80, 7, TUNNEL)),
        AddDestination(ByMark("IPv6", 0x40000001), Destination("fd00::1", 8080)),
        SetDestination(ByMark("IPv6", 0x40000001), Destination("fd00::1", 8080, 5)),
    ]
    kernel = opened("netlink")
    assert kernel.run(operations) == ()
    with Namespace("ipvsadm") as other, Inside(other, NetlinkKernel) as theirs:
        other.run(["ipvsadm", "-R"], stdin="".join(f"{operation}\n" for operation in operations))
        assert plan(theirs) == plan(kernel)


def test_shapes_are_learnt_once(namespace, opened):
    opened("netlink")
    keys = [ByMark("IPv4", number) for number in range(1, 301)]
    more = [ByAddress("TCP", "10.96.0.1", number) for number in range(1, 301)]

    def inside():
        with NetlinkKernel() as kernel:
            assert kernel.run([AddServer(Server(key)) for key in (*keys, *more)]) == ()
            assert kernel.run([AddDestination(keys[0], Destination(HOST, n)) for n in range(1, 301)]) == ()
            assert {state.server.key for state in kernel.servers()} == {*keys, *more}
            assert {state.destination.port for state in kernel.destinations(keys[0])} == {*range(1, 301)}
            return kernel._servers.learnt, kernel._destinations.learnt

    learnt = namespace.call(inside)
    assert learnt[0] <= 4
    assert learnt[1] <= 2


def test_the_kernels_own_flag_is_not_shown(opened):
    kernel = opened("netlink")
    kernel.run([AddServer(Server(WEB))])
    assert kernel.server(WEB).server.flags & HASHED == 0


def test_without_rights_every_operation_is_refused(namespace):
    code = (
        "import os, sys; from proxycore_ipvs.kernel import NetlinkKernel\n"
        "from proxycore_ipvs.servers import *\n"
        "kernel = NetlinkKernel(); os.setgid(65534); os.setuid(65534)\n"
        "found = kernel.run([AddServer(Server(ByMark('IPv4', n))) for n in (1, 2)])\n"
        "print([refusal.errno for refusal in found])\n"
    )
    done = namespace.run([sys.executable, "-c", code])
    # Rights are those of whoever sends.
    assert done.stdout.strip() == str([errno.EPERM] * 2)


class Node:
    """A node that is its own client, with two endpoints at addresses of its own."""

    ENDPOINTS = (("10.0.0.1", 8080), ("10.0.0.2", 8080))

    def __init__(self, namespace: Namespace, kernel) -> None:
        self.namespace, self.kernel = namespace, kernel
        namespace.ip(
            ["address", "add", f"{VIP}/32", "dev", "lo"],
            *(["address", "add", f"{address}/32", "dev", "lo"] for address, _ in self.ENDPOINTS),
        )
        self.listeners = {}
        for end in self.ENDPOINTS:
            listener = namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
            listener.bind(end)
            listener.listen()
            listener.settimeout(5)
            self.listeners[end] = listener

    def connect(self):
        """A connection to the server: the client's socket, the endpoint's, and which endpoint it is."""
        client = self.namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
        client.settimeout(5)
        client.connect((VIP, 80))
        for end, listener in self.listeners.items():
            listener.setblocking(False)
            try:
                return client, listener.accept()[0], end
            except BlockingIOError:
                continue
        raise AssertionError("connected to nobody")

    def close(self) -> None:
        for listener in self.listeners.values():
            listener.close()


def open_at(kernel):
    """Active and inactive connections of each destination."""
    return {
        (state.destination.address, state.destination.port): (state.active, state.inactive)
        for state in kernel.destinations(WEB)
    }


def eventually(read, wanted):
    """The kernel brings counters up to date every two seconds."""
    patience = time.monotonic() + 30
    while (found := read()) != wanted and time.monotonic() < patience:
        time.sleep(0.1)
    assert found == wanted


def reset(client):
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.fixture
def node(namespace, opened):
    made = Node(namespace, opened("netlink"))
    yield made
    made.close()


def test_a_destination_of_weight_0_keeps_its_connections_and_gets_no_more(node):
    kernel, fake = node.kernel, FakeKernel()
    both = kernel, fake
    held = []

    def do(*operations):
        assert kernel.run(operations) == fake.run(operations) == ()

    do(AddServer(Server(WEB)), *(AddDestination(WEB, Destination(*end)) for end in Node.ENDPOINTS))
    held += (node.connect(), node.connect())
    assert {fake.open(WEB), fake.open(WEB)} == {end for *_, end in held} == set(Node.ENDPOINTS)
    assert open_at(kernel) == open_at(fake) == dict.fromkeys(Node.ENDPOINTS, (1, 0))
    client, server, draining = held[0]
    (rest,) = set(Node.ENDPOINTS) - {draining}
    do(SetDestination(WEB, Destination(*draining, weight=0)))
    for _ in range(2):
        held.append(node.connect())
        assert held[-1][2] == fake.open(WEB) == rest
    client.sendall(b"still there")
    server.settimeout(5)
    assert server.recv(100) == b"still there"
    assert open_at(kernel) == open_at(fake) == {draining: (1, 0), rest: (3, 0)}
    # A destination that goes and comes again has the connections it had.
    do(DeleteDestination(WEB, *draining))
    do(AddDestination(WEB, Destination(*draining)))
    assert open_at(kernel) == open_at(fake) == {draining: (1, 0), rest: (3, 0)}
    for kernel in both:
        eventually(lambda kernel=kernel: kernel.server(WEB).counters.connections, 4)
    counters = node.kernel.server(WEB).counters
    assert counters.packets_in >= 2 * 4
    assert counters.bytes_in >= 40 * counters.packets_in
    for client, server, _ in held:
        reset(client)
        server.close()


def test_counters_of_destinations(node):
    node.kernel.run([AddServer(Server(WEB)), AddDestination(WEB, Destination(*Node.ENDPOINTS[0]))])
    client, server, _ = node.connect()

    def connections():
        (state,) = node.kernel.destinations(WEB)
        return state.counters.connections

    eventually(connections, 1)
    client.close()
    server.close()
