"""The encoder's bytes against those of pyroute2, and how requests are packed."""

from __future__ import annotations

import struct
from socket import AF_INET, AF_INET6, inet_pton

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.generic.ipvs import ipvsmsg

from proxycore.kernel.netlink import attributes, messages
from proxycore_ipvs import plain, wire
from proxycore_ipvs.servers import (
    DIRECT,
    MASQUERADE,
    PERSISTENT,
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

NESTS = {(wire.SERVICE,), (wire.DEST,)}
TUNNEL_OPTIONS = {(wire.DEST, kind) for kind in (13, 14, 15)}
"""pyroute2 gives them always; without them the kernel takes zeros."""

ADDRESSES = (wire.SERVICE, wire.SVC_ADDR), (wire.DEST, wire.DEST_ADDR)

v4 = st.ip_addresses(v=4).map(str)
v6 = st.ip_addresses(v=6).map(str)
ports = st.integers(0, 65535)
u32 = st.integers(0, 0xFFFFFFFF)


def keys(addresses, family):
    by_address = st.builds(ByAddress, st.sampled_from(("TCP", "UDP", "SCTP")), addresses, ports)
    return by_address | st.builds(ByMark, st.just(family), st.integers(1, 0xFFFFFFFF))


def servers(keys, lengths):
    schedulers = st.sampled_from(("rr", "wrr", "lblcr"))
    return st.builds(Server, keys, schedulers, u32, u32, st.none() | lengths)


def destinations(addresses):
    return st.builds(Destination, addresses, ports, u32, st.sampled_from((MASQUERADE, TUNNEL, DIRECT)))


all_keys = keys(v4, "IPv4") | keys(v6, "IPv6")
all_servers = servers(keys(v4, "IPv4"), st.integers(0, 32)) | servers(keys(v6, "IPv6"), st.integers(1, 128))
all_destinations = destinations(v4) | destinations(v6)


def flat(buffer, above=()):
    """Attributes as {path: payload}."""
    found = {}
    for kind, payload in attributes(buffer):
        path = (*above, kind)
        assert path not in found
        found |= flat(payload, path) if path in NESTS else {path: bytes(payload)}
    return found


def by_pyroute2(command, *parts):
    message = ipvsmsg()
    message["cmd"], message["version"] = command, wire.VERSION
    message["attrs"] = [(name, value) for name, value in zip(NAMES, parts, strict=False)]
    message.encode()
    return bytes(message.data)[16:]


NAMES = "IPVS_CMD_ATTR_SERVICE", "IPVS_CMD_ATTR_DEST"


def by_us(operation):
    (datagram,) = wire.datagrams([operation], 30, 1)
    (message,) = messages(memoryview(datagram.data))
    return bytes(message.body)


def same(ours, theirs):
    assert ours[:4] == theirs[:4], "command and version"
    found = flat(theirs[4:])
    # pyroute2 gives four bytes of an IPv4 address, and the kernel has zeros behind them.
    found |= {path: found[path].ljust(16, b"\0") for path in ADDRESSES if path in found}
    left_out = {path: found.pop(path) for path in TUNNEL_OPTIONS if path in found}
    assert flat(ours[4:]) == found
    assert not any(map(any, left_out.values()))


@given(all_servers)
def test_a_server(server):
    same(by_us(AddServer(server)), by_pyroute2(wire.NEW_SERVICE, plain.service(server).dump_nla()))
    same(by_us(SetServer(server)), by_pyroute2(wire.SET_SERVICE, plain.service(server).dump_nla()))


@given(all_keys)
def test_a_servers_key(key):
    theirs = by_pyroute2(wire.DEL_SERVICE, plain.service_key(key).dump_key())
    same(by_us(DeleteServer(key)), theirs)


@given(all_keys, all_destinations)
def test_a_destination(key, destination):
    parts = plain.service_key(key).dump_key(), plain.destination(destination).dump_nla()
    same(by_us(AddDestination(key, destination)), by_pyroute2(wire.NEW_DEST, *parts))
    same(by_us(SetDestination(key, destination)), by_pyroute2(wire.SET_DEST, *parts))


@given(all_keys, all_destinations)
def test_a_destinations_name(key, destination):
    body = by_us(DeleteDestination(key, destination.address, destination.port))
    family = AF_INET6 if ":" in destination.address else AF_INET
    assert body[0] == wire.DEL_DEST
    found = flat(body[4:])
    assert {path: value for path, value in found.items() if path[0] == wire.DEST} == {
        (wire.DEST, wire.DEST_ADDR): inet_pton(family, destination.address).ljust(16, b"\0"),
        (wire.DEST, wire.DEST_PORT): struct.pack(">H", destination.port),
        (wire.DEST, wire.DEST_ADDR_FAMILY): struct.pack("=H", family),
    }


@given(st.lists(st.tuples(all_keys, all_destinations), max_size=40), st.integers(200, 2000))
def test_packing_keeps_order_and_asks_once_a_datagram(pairs, limit):
    operations = [AddDestination(key, destination) for key, destination in pairs]
    packed = list(wire.datagrams(operations, 30, 7, limit))
    assert all(len(datagram.data) <= limit for datagram in packed)
    found = [list(messages(memoryview(datagram.data))) for datagram in packed]
    for datagram, requests in zip(packed, found, strict=True):
        assert [request.flags for request in requests[:-1]] == [1] * (len(requests) - 1)
        assert (requests[-1].flags, requests[-1].seq) == (5, datagram.last)
    requests = [request for some in found for request in some]
    assert [request.seq for request in requests] == list(range(7, 7 + len(operations)))
    assert [bytes(request.body) for request in requests] == [by_us(operation) for operation in operations]
    assert {request.type for request in requests} <= {30}


def test_a_datagram_is_filled():
    key = ByMark("IPv4", 1)
    one = AddDestination(key, Destination("10.0.0.1", 80))
    length = len(next(wire.datagrams([one], 30, 1)).data)
    packed = list(wire.datagrams([one] * 10, 30, 1, 4 * length))
    assert [len(datagram.data) // length for datagram in packed] == [4, 4, 2]


@pytest.mark.parametrize(
    ("operation", "line"),
    [
        (AddServer(Server(ByMark("IPv4", 7))), "-A -f 7 -s rr"),
        (DeleteServer(ByMark("IPv6", 7)), "-D -f 7 -6"),
        (
            SetServer(Server(ByAddress("TCP", "fd00::1", 80), "wrr", PERSISTENT, 60, 64)),
            "-E -t [fd00::1]:80 -s wrr -p 60 -M 64",
        ),
        (
            AddServer(Server(ByAddress("UDP", "10.0.0.1", 53), "mh", PERSISTENT | 0x18, 60, 24)),
            "-A -u 10.0.0.1:53 -s mh -p 60 -M 255.255.255.0 -b flag-1,flag-2",
        ),
        (
            AddDestination(ByMark("IPv4", 7), Destination("10.0.0.1", 80, 0)),
            "-a -f 7 -r 10.0.0.1:80 -m -w 0",
        ),
    ],
)
def test_operations_read_as_ipvsadm_would_have_them(operation, line):
    assert str(operation) == line
