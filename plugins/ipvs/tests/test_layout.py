"""Messages read by a learnt shape against the same attributes taken apart one by one."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxycore.api import KernelError
from proxycore.kernel.netlink import attribute, attributes, nested
from proxycore_ipvs import parse, wire
from proxycore_ipvs.layout import Reader, learn
from proxycore_ipvs.servers import ByAddress, ByMark, Counters, Destination, Server

NESTS = ((1,), (1, 2), (3,))
RAW = ((4,), (1, 4), (1, 2, 4))

LEAVES = ((4,), (5,), (6,), (1, 3), (1, 4), (1, 2, 4), (1, 2, 5), (1, 2, 7), (3, 4), (3, 6))
payloads = st.sampled_from((b"", b"\1", b"\1\2", b"rr\0", b"\1\2\3\4", b"wlc-x\0", b"\7" * 8, b"\xff" * 16))
values = st.dictionaries(st.sampled_from(LEAVES), payloads)
"""Payloads by path; their order is that in which they stand."""


def pack(leaves):
    """Attributes of the outermost level, with all below them."""
    found, done = b"", set()
    for path, payload in leaves.items():
        if len(path) == 1:
            found += attribute(path[0], payload)
        elif path[0] not in done:
            done.add(path[0])
            found += nested(path[0], pack({p[1:]: v for p, v in leaves.items() if p[0] == path[0] and p[1:]}))
    return found


def taken_apart(buffer, above=()):
    found = {}
    for kind, payload in attributes(buffer):
        path = (*above, kind)
        if path in NESTS:
            found |= {path: b"", **taken_apart(payload, path)}
        elif len(payload) in (1, 2, 4, 8) and path not in RAW:
            found[path] = int.from_bytes(payload, sys.byteorder)
        else:
            found[path] = bytes(payload)
    return found


def all_of(positions):
    return lambda fields: {path: fields[position] for path, position in positions.items()}


@given(values, values, st.sampled_from((b"", bytes(20))))
def test_what_is_read_is_what_is_there(one, other, before):
    reader = Reader(NESTS, RAW, all_of)
    for leaves in (one, other, one):
        body = pack(leaves)
        assert reader.read(memoryview(before + body), len(before), len(body)) == taken_apart(body)


def test_a_shape_is_learnt_once_and_values_may_differ():
    reader = Reader(NESTS, RAW, all_of)
    for value in range(20):
        body = memoryview(attribute(5, value.to_bytes(4, sys.byteorder)))
        assert reader.read(body, 0, len(body)) == {(5,): value}
    assert reader.learnt == 1


def test_another_shape_of_the_same_length_is_learnt_in_its_turn():
    reader = Reader(NESTS, RAW, all_of)
    one, other = attribute(5, b"\1\0\0\0"), attribute(6, b"\1\0\0\0")
    for body in (one, other, one):
        assert reader.read(memoryview(body), 0, len(body)) == taken_apart(body)
    assert reader.learnt == 3


def test_a_damaged_length_ends_the_shape():
    body = bytearray(attribute(5, b"\1\0\0\0") + attribute(6, b"\1\0\0\0"))
    body[8:10] = (99).to_bytes(2, sys.byteorder)
    assert list(learn(memoryview(body), 0, len(body), NESTS, RAW).positions) == [(5,)]


def stats(kind, size, values):
    return nested(
        kind, *(attribute(n, value.to_bytes(size, sys.byteorder)) for n, value in enumerate(values, 1))
    )


def u(size, value):
    return value.to_bytes(size, sys.byteorder)


def test_a_destination_in_another_order_and_with_more_to_it():
    body = nested(
        wire.DEST,
        stats(wire.DEST_STATS64, 8, (1 << 40, 2, 3, 4, 5, 6)),
        attribute(wire.DEST_ADDR_FAMILY, u(2, 10)),
        attribute(77, b"some news"),
        attribute(wire.DEST_ACTIVE_CONNS, u(4, 7)),
        attribute(wire.DEST_INACT_CONNS, u(4, 8)),
        attribute(wire.DEST_PERSIST_CONNS, u(4, 9)),
        attribute(wire.DEST_FWD_METHOD, u(4, 0)),
        attribute(wire.DEST_WEIGHT, u(4, 100)),
        attribute(wire.DEST_PORT, (8080).to_bytes(2, "big")),
        attribute(wire.DEST_ADDR, bytes.fromhex("fd" + 14 * "00" + "01")),
    )
    state = parse.destination_reader().read(memoryview(body), 0, len(body))
    assert state == (Destination("fd00::1", 8080, 100), 7, 8, 9, Counters(1 << 40, 2, 3, 4, 5))


def service(*parts, mask="ffffff00", family=2):
    return nested(
        wire.SERVICE,
        attribute(wire.SVC_AF, u(2, family)),
        *parts,
        attribute(wire.SVC_SCHED_NAME, b"wrr\0"),
        attribute(wire.SVC_FLAGS, u(4, 0x1B) + u(4, 0xFFFFFFFF)),
        attribute(wire.SVC_TIMEOUT, u(4, 60)),
        attribute(wire.SVC_NETMASK, bytes.fromhex(mask)),
        stats(wire.SVC_STATS64, 8, (1, 2, 3, 4, 5)),
    )


@pytest.mark.parametrize(
    ("mask", "length"),
    [("ffffffff", None), ("ffffff00", 24), ("80000000", 1), ("00000000", 0), ("ff00ff00", -1)],
)
def test_a_server_by_mark(mask, length):
    body = service(attribute(wire.SVC_FWMARK, u(4, 0xC0000001)), mask=mask)
    state = parse.server_reader().read(memoryview(body), 0, len(body))
    assert state.server == Server(ByMark("IPv4", 0xC0000001), "wrr", 0x19, 60, length)
    assert state.counters == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(("number", "length"), [(128, None), (64, 64), (1, 1)])
def test_a_server_by_address(number, length):
    body = service(
        attribute(wire.SVC_PROTOCOL, u(2, 132)),
        attribute(wire.SVC_ADDR, bytes.fromhex("fd" + 14 * "00" + "01")),
        attribute(wire.SVC_PORT, (80).to_bytes(2, "big")),
        family=10,
        mask=u(4, number).hex(),
    )
    state = parse.server_reader().read(memoryview(body), 0, len(body))
    assert state.server == Server(ByAddress("SCTP", "fd00::1", 80), "wrr", 0x19, 60, length)


def test_what_the_kernel_must_tell():
    body = nested(wire.DEST, attribute(wire.DEST_PORT, bytes(2)))
    with pytest.raises(KernelError, match="IPVS does not tell"):
        parse.destination_reader().read(memoryview(body), 0, len(body))
