"""The netlink socket against the kernel, in a namespace of its own, and its parsers against bytes."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest

from proxycore.errors import KernelError
from proxycore.kernel import netlink
from proxycore.kernel.netlink import NetlinkSocket
from proxycore.testing.netns import Namespace

GETLINK, GETADDR, NEWADDR = 18, 22, 20


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace("netlink") as made:
        yield made


def test_attributes_survive_packing_and_parsing():
    packed = netlink.attribute(3, b"eth0\0") + netlink.nested(5, netlink.attribute(1, b"\x01"))
    assert len(packed) % 4 == 0
    found = netlink.parse_attributes(packed)
    assert netlink.text_of(found[3]) == "eth0"
    assert bytes(netlink.parse_attributes(found[5])[1]) == b"\x01"


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_cut_attribute_is_left_out(cut: int):
    packed = netlink.attribute(1, b"abcd") + netlink.attribute(2, b"efgh")
    assert set(netlink.parse_attributes(packed[:-cut])) == ({1} if cut <= 8 else set())


def test_messages_of_one_datagram_and_a_damaged_rest():
    datagram = (
        netlink.message(20, 1, 7, b"abc") + netlink.message(21, 2, 8) + struct.pack("=IHHII", 4, 0, 0, 0, 0)
    )
    found = [(m.type, m.flags, m.seq, bytes(m.body)) for m in netlink.messages(memoryview(datagram))]
    assert found == [(20, 1, 7, b"abc"), (21, 2, 8, b"")]


def test_text_that_is_not_utf8_is_escaped():
    assert netlink.text_of(b"a\xffb\0junk") == "a\\xffb"


def _error(code: int, flags: int, rest: bytes) -> netlink.Message:
    request = struct.pack("=IHHII", 24, 20, 5, 99, 0)
    return netlink.Message(
        netlink.NLMSG_ERROR, flags, 99, memoryview(struct.pack("=i", code) + request + rest)
    )


def test_error_with_message_and_offset_behind_a_capped_request():
    rest = netlink.attribute(1, b"no such thing\0") + netlink.attribute(2, struct.pack("=I", 28))
    fault = netlink.error_of(_error(-errno.ENOENT, netlink.NLM_F_CAPPED | netlink.NLM_F_ACK_TLVS, rest))
    assert fault == (errno.ENOENT, "no such thing", 28, 99)
    assert str(fault) == "No such file or directory (ENOENT): no such thing"


def test_error_behind_the_whole_request():
    rest = b"12345678" + netlink.attribute(1, b"bad\0")
    fault = netlink.error_of(_error(-errno.EINVAL, netlink.NLM_F_ACK_TLVS, rest))
    assert fault == (errno.EINVAL, "bad", None, 99)


def test_acknowledgement_is_no_fault():
    assert netlink.error_of(_error(0, netlink.NLM_F_CAPPED, b"")) is None


def test_sequence_numbers_skip_zero_when_they_wrap():
    with NetlinkSocket(netlink.NETLINK_ROUTE) as socket:
        socket._sequence = 0xFFFFFFFE
        assert [socket.reserve(), socket.reserve(), socket.reserve(2)] == [0xFFFFFFFF, 1, 2]


def test_an_unknown_protocol_is_refused_with_its_errno():
    with pytest.raises(KernelError, match="open a netlink socket") as caught:
        NetlinkSocket(31)
    assert caught.value.errno == errno.EPROTONOSUPPORT


@pytest.mark.root
def test_the_kernel_says_why_it_refuses(namespace: Namespace):
    with namespace.call(lambda: NetlinkSocket(netlink.NETLINK_ROUTE, timeout_seconds=10)) as socket:
        fault = socket.transact(NEWADDR, struct.pack("=BBBBI", 2, 99, 0, 0, 1))
        assert fault is not None
        assert fault.errno == errno.EINVAL
        assert "prefix length" in fault.text


@pytest.mark.root
def test_a_dump_over_many_datagrams_is_complete(namespace: Namespace):
    wanted = {f"10.7.{n // 250}.{n % 250 + 1}" for n in range(1500)}
    namespace.ip(*(["address", "add", f"{address}/32", "dev", "lo"] for address in sorted(wanted)))
    with namespace.call(lambda: NetlinkSocket(netlink.NETLINK_ROUTE, timeout_seconds=10)) as socket:
        entries = socket.dump(GETADDR, struct.pack("=BBBBI", 2, 0, 0, 0, 0))
        found = {
            ".".join(map(str, netlink.parse_attributes(m.body[8:])[2])) for m in entries if m.type == NEWADDR
        }
        assert found == wanted | {"127.0.0.1"}


@pytest.mark.root
def test_lost_notifications_are_told(namespace: Namespace):
    def opened() -> NetlinkSocket:
        return NetlinkSocket(netlink.NETLINK_ROUTE, 0x10, receive_buffer_bytes=4096, timeout_seconds=10)

    with namespace.call(opened) as socket:
        namespace.ip(*(["address", "add", f"10.8.0.{n}/32", "dev", "lo"] for n in range(1, 200)))

        def drain() -> None:
            while True:
                list(socket.receive())

        with pytest.raises(netlink.Overrun) as caught:
            drain()
        assert caught.value.errno == errno.ENOBUFS


@pytest.mark.root
def test_a_refused_dump_raises(namespace: Namespace):
    with namespace.call(
        lambda: NetlinkSocket(netlink.NETLINK_ROUTE, strict=True, timeout_seconds=10)
    ) as socket:
        with pytest.raises(KernelError, match="refused"):
            socket.dump(GETADDR, struct.pack("=BBBBI", 2, 0, 0, 0, 4711))
        assert socket.dump(GETLINK, b"\0" * 16)
