"""AddressWatch against a namespace's interfaces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest

from proxycore.host import InterfaceAddress
from proxycore.kernel.addresses import Addresses, AddressWatch
from proxycore.testing.netns import Namespace

pytestmark = pytest.mark.root

LO4 = InterfaceAddress(address="127.0.0.1", prefix_length=8, interface="lo", scope="host")
LO6 = InterfaceAddress(address="::1", prefix_length=128, interface="lo", scope="host")


class Follower:
    """A running watch, and what it has told."""

    def __init__(self, watch: AddressWatch) -> None:
        self.watch = watch
        self.told: SimpleQueue[Addresses] = SimpleQueue()
        self.thread = threading.Thread(target=watch.run, args=(self.told.put,))

    def until(self, wanted: Callable[[Addresses], bool]) -> Addresses:
        """Skip what is told until it is as wanted; queue.Empty after ten seconds."""
        while True:
            addresses = self.told.get(timeout=10)
            if wanted(addresses):
                return addresses


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace("addresses") as made:
        made.sysctl({"ipv6/conf/default/accept_dad": 0})
        made.ip(
            ["link", "add", "uplink", "type", "veth", "peer", "name", "peer"],
            ["link", "set", "peer", "addrgenmode", "none", "up"],
            ["link", "set", "uplink", "addrgenmode", "none", "up"],
        )
        yield made


@pytest.fixture
def follower(namespace: Namespace) -> Iterator[Follower]:
    with namespace.call(AddressWatch) as watch:
        follower = Follower(watch)
        follower.thread.start()
        yield follower
        watch.stop()
        follower.thread.join(10)
        assert not follower.thread.is_alive()


def names(addresses: Addresses) -> set[str]:
    return {entry.address for entry in addresses}


def test_what_is_there_is_told_first(follower: Follower):
    assert follower.told.get(timeout=10) == (LO4, LO6)


def test_addresses_come_and_go(namespace: Namespace, follower: Follower):
    namespace.ip(
        ["address", "add", "192.0.2.1/24", "dev", "uplink"], ["address", "add", "fd00::1/64", "dev", "uplink"]
    )
    found = follower.until(lambda told: {"192.0.2.1", "fd00::1"} <= names(told))
    assert (
        InterfaceAddress(address="192.0.2.1", prefix_length=24, interface="uplink", scope="global") in found
    )
    assert InterfaceAddress(address="fd00::1", prefix_length=64, interface="uplink", scope="global") in found
    namespace.ip(["address", "del", "192.0.2.1/24", "dev", "uplink"])
    assert names(follower.until(lambda told: "192.0.2.1" not in names(told))) == {
        "127.0.0.1",
        "::1",
        "fd00::1",
    }


def test_a_renamed_interface_takes_its_addresses_along(namespace: Namespace, follower: Follower):
    namespace.ip(["address", "add", "192.0.2.1/24", "dev", "uplink"])
    follower.until(lambda told: "192.0.2.1" in names(told))
    namespace.ip(["link", "set", "uplink", "down"], ["link", "set", "uplink", "name", "wan0"])
    found = follower.until(lambda told: any(entry.interface == "wan0" for entry in told))
    assert not any(entry.interface == "uplink" for entry in found)


def test_a_removed_interface_takes_its_addresses_away(namespace: Namespace, follower: Follower):
    namespace.ip(["address", "add", "192.0.2.1/24", "dev", "uplink"])
    follower.until(lambda told: "192.0.2.1" in names(told))
    namespace.ip(["link", "del", "uplink"])
    assert follower.until(lambda told: "192.0.2.1" not in names(told)) == (LO4, LO6)


def test_primary_before_secondary_and_own_end_of_a_point_to_point_link(namespace: Namespace):
    namespace.ip(
        ["address", "add", "192.0.2.9/24", "dev", "uplink"],
        ["address", "add", "192.0.2.1/24", "dev", "uplink"],
        ["address", "add", "198.51.100.1", "peer", "198.51.100.2/32", "dev", "uplink"],
    )
    with namespace.call(AddressWatch) as watch:
        found = [entry.address for entry in watch.current() if entry.interface == "uplink"]
    assert set(found) == {"192.0.2.9", "192.0.2.1", "198.51.100.1"}
    assert found.index("192.0.2.9") < found.index("192.0.2.1")


def test_an_address_that_is_still_probed_does_not_count_yet(namespace: Namespace):
    # A link without a carrier never ends probing.
    namespace.ip(["link", "add", "a0", "type", "veth", "peer", "name", "b0"])
    namespace.sysctl({"ipv6/conf/a0/accept_dad": 1, "ipv6/conf/a0/dad_transmits": 1})
    namespace.ip(
        ["link", "set", "a0", "addrgenmode", "none", "up"], ["address", "add", "fd00::7/64", "dev", "a0"]
    )
    with namespace.call(AddressWatch) as watch:
        assert "fd00::7" not in names(watch.current())
        follower = Follower(watch)
        follower.thread.start()
        try:
            namespace.ip(["link", "set", "b0", "addrgenmode", "none", "up"])
            follower.until(lambda told: "fd00::7" in names(told))
        finally:
            watch.stop()
            follower.thread.join(10)


def test_a_burst_beyond_the_receive_buffer_ends_in_the_right_state(namespace: Namespace):
    with namespace.call(AddressWatch) as watch:
        watch._events.socket.setsockopt(1, 33, 4096)
        blocked, entered = threading.Event(), threading.Event()
        told: SimpleQueue[Addresses] = SimpleQueue()

        def slow(addresses: Addresses) -> None:
            told.put(addresses)
            entered.set()
            assert blocked.wait(20)

        thread = threading.Thread(target=watch.run, args=(slow,))
        thread.start()
        try:
            assert entered.wait(10)
            namespace.ip(*(["address", "add", f"10.9.0.{n}/32", "dev", "uplink"] for n in range(1, 251)))
            blocked.set()
            while len(told.get(timeout=10)) != 252:
                pass
        finally:
            blocked.set()
            watch.stop()
            thread.join(10)
        assert not thread.is_alive()


def test_stop_before_run(namespace: Namespace):
    with namespace.call(AddressWatch) as watch:
        watch.stop()
        told: list[Addresses] = []
        watch.run(told.append)
        assert told == [(LO4, LO6)]
