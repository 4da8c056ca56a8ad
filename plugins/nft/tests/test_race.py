"""Many connections begin while their Service changes at full speed: none is left untranslated, none meets a stranger.

A packet looks up three maps, and a transaction may fall between two of them.  PROXYCORE_SYNS sets how many SYNs each test
sends; a million takes about a minute and was the bar for the design.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxycore.api import ChangeBatch, Family, PoolName, Route, Routes
from proxycore.testing.netns import Namespace, close_all, veth
from proxycore.testing.states import batch, endpoint, frontend, name_of, numbered, pool, service

from .node import Node

pytestmark = pytest.mark.root

SYNS = int(os.environ.get("PROXYCORE_SYNS", "200000"))
BURST = 50_000
"""Between bursts conntrack is emptied: its table is of one size for the whole host."""
SENDER = str(Path(__file__).parent / "synsender.py")
MACS = [f"02:00:00:00:00:0{number}" for number in range(1, 5)]

WATCH = """
table inet watch {
	counter untranslated { }
	counter ours { }
	counter strangers { }
	counter refusals { }
	chain forward {
		type filter hook forward priority -300;
		ip daddr 172.30.0.0/16 counter name untranslated
		ip6 daddr fd00:172:30::/108 counter name untranslated
		ip daddr 10.1.9.0/24 counter name strangers
		ip6 daddr fd00:10::9:0:0/96 counter name strangers
		ip6 daddr fd00:10:0:0:9::/80 counter name strangers
		ip daddr 10.0.0.0/8 counter name ours
		ip6 daddr fd00:10::/64 counter name ours
	}
	chain output {
		type filter hook output priority 300;
		meta l4proto tcp counter name refusals
	}
}
"""


SWALLOW = """
table inet sink {
	chain swallow {
		type filter hook prerouting priority -400;
		drop
	}
}
"""


class Storm:
    """client -- node -- sink; the node forwards, the sink swallows."""

    def __init__(self) -> None:
        self.client, self.at_node, self.sink = (Namespace(label) for label in ("client", "node", "sink"))
        try:
            self._connect()
            self.node = Node(self.at_node)
        except BaseException:
            close_all((self.client, self.at_node, self.sink))
            raise

    def _connect(self) -> None:
        off = {
            "ipv6/conf/default/accept_dad": 0,
            "ipv6/conf/all/accept_dad": 0,
            "ipv4/conf/all/rp_filter": 0,
            "ipv4/conf/default/rp_filter": 0,
        }
        for namespace in (self.client, self.at_node, self.sink):
            namespace.sysctl(off)
        veth(self.client, "node0", MACS[0], self.at_node, "client0", MACS[1])
        veth(self.sink, "node0", MACS[2], self.at_node, "sink0", MACS[3])
        self._address(
            self.client, "node0", "192.0.2.2/24", "2001:db8:1::2/64", "192.0.2.1", "2001:db8:1::1", MACS[1]
        )
        self._address(
            self.at_node, "sink0", "192.168.0.2/24", "2001:db8::1/64", "192.168.0.9", "2001:db8::9", MACS[2]
        )
        self.at_node.ip(["addr", "add", "192.0.2.1/24", "dev", "client0"])
        self.at_node.sysctl(
            {
                "ipv4/ip_forward": 1,
                "ipv6/conf/all/forwarding": 1,
            }
        )
        # What is not translated has somewhere to go, too.
        self.sink.run(
            ["nft", "-f", "-"],
            stdin=SWALLOW,
        )
        self.at_node.run(["nft", "-f", "-"], stdin=WATCH)

    @staticmethod
    def _address(
        namespace: Namespace, device: str, four: str, six: str, via4: str, via6: str, mac: str
    ) -> None:
        namespace.ip(["addr", "add", four, "dev", device], ["addr", "add", six, "dev", device, "nodad"])
        for via in (via4, via6):
            namespace.ip(["neigh", "replace", via, "lladdr", mac, "nud", "permanent", "dev", device])
        namespace.ip(["route", "add", "default", "via", via4, "dev", device])
        namespace.ip(["route", "add", "default", "via", via6, "dev", device], ipv6=True)

    def close(self) -> None:
        self.node.close()
        close_all((self.client, self.at_node, self.sink))

    def blow(self, address: str, change: Callable[[int], ChangeBatch]) -> int:
        """Send SYNS to port 80 of that address while one change after the other is applied; returns how many changes."""
        # Nothing in a SYN's checksum is right; that is not what is tested.
        self.at_node.sysctl({"netfilter/nf_conntrack_checksum": 0})
        changes = itertools.count()
        apply = self.node.backend.proxycore_backend_apply
        done = 0
        for first in range(0, SYNS, BURST):
            count = min(BURST, SYNS - first)
            sender = self.client.popen([sys.executable, "-I", SENDER, address, "80", str(count), str(first)])
            while sender.poll() is None:
                done = next(changes)
                assert apply(change(done)).outcome == "applied"
            assert sender.returncode == 0
            self.at_node.run(["conntrack", "-F"])
        return done

    def counted(self) -> dict[str, int]:
        text = self.at_node.run(["nft", "list", "counters", "table", "inet", "watch"]).stdout
        return {name: int(packets) for name, packets in re.findall(r"counter (\w+) \{\s*packets (\d+)", text)}


@pytest.fixture
def storm() -> Iterator[Storm]:
    made = Storm()
    try:
        yield made
    finally:
        made.close()


def assert_all_arrived(storm: Storm, changes: int) -> None:
    counted = storm.counted()
    assert counted == {"untranslated": 0, "strangers": 0, "refusals": 0, "ours": SYNS}
    assert changes > SYNS / 1000, "too few changes to prove anything"


VIP = {"IPv4": "172.30.0.2", "IPv6": "fd00:172:30::2"}


@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
@pytest.mark.parametrize("counts", [(10, 9), (1, 2)], ids=["10-9", "1-2"])
def test_endpoint_counts_that_flip(counts, family: Family, storm):
    stranger = numbered(9, 10, family=family)
    storm.node.run(numbered(1, counts[0], family=family), stranger)
    changes = storm.blow(VIP[family], lambda turn: batch(numbered(1, counts[turn % 2 == 0], family=family)))
    assert_all_arrived(storm, changes)


def test_endpoint_counts_that_flip_with_affinity(storm):
    """Every client is new; what it keeps to is put into a map on its way."""
    storm.node.run(numbered(1, 10, affinity=1), numbered(9, 10, affinity=1))
    changes = storm.blow(VIP["IPv4"], lambda turn: batch(numbered(1, 9 + turn % 2, affinity=1)))
    assert_all_arrived(storm, changes)


def test_local_pools_that_flip(storm):
    """Slots of the local pool, by another class and another first slot."""
    local = Route(PoolName.LOCAL, False)
    routes = Routes(local_pod=local, node=local, outside=local)

    def state(count: int):
        targets = [endpoint(f"10.1.1.{n + 1}:80", local=True) for n in range(count)]
        return service(
            numbered(1).name,
            frontend("172.30.0.2", routes=routes),
            cluster=pool("10.1.9.1:80"),
            local=pool(*targets),
        )

    storm.node.run(state(10), numbered(9, 10))
    changes = storm.blow(VIP["IPv4"], lambda turn: batch(state(1 + turn % 7)))
    assert_all_arrived(storm, changes)


def test_two_services_that_exchange_their_addresses(storm):
    """Endpoints of both are right at any moment, nobody else's are."""

    def states(turn: int):
        vips = ["172.30.0.2", "172.30.0.3"][:: 1 if turn % 2 else -1]
        return [
            service(name_of("one"), frontend(vips[0]), cluster=["10.1.1.1:80", "10.1.1.2:80"]),
            service(name_of("two"), frontend(vips[1]), cluster=["10.1.2.1:80", "10.1.2.2:80", "10.1.2.3:80"]),
        ]

    storm.node.run(*states(0), numbered(9, 10))
    changes = storm.blow(VIP["IPv4"], lambda turn: batch(*states(turn + 1)))
    assert_all_arrived(storm, changes)


def test_strangers_that_come_and_go(storm):
    """Indexes are freed and taken all the time; none of them is the one that a packet on its way has read."""
    storm.node.run(numbered(1, 5))

    def change(turn: int) -> ChangeBatch:
        targets = [f"10.1.9.{n + 1}:80" for n in range(5)]
        stranger = service(name_of(f"stranger-{turn % 3}"), frontend("172.30.0.9"), cluster=targets)
        gone = name_of(f"stranger-{(turn - 1) % 3}")
        return batch(stranger, numbered(1, 4 + turn % 2), removed=[gone])

    changes = storm.blow(VIP["IPv4"], change)
    assert_all_arrived(storm, changes)


def test_full_batches_and_new_tables(storm):
    """Everything is written anew, and every tenth time into a new table."""
    storm.node.run(numbered(1, 5), numbered(9, 10))
    from proxycore.testing.states import full, host

    def change(turn: int) -> ChangeBatch:
        if turn % 10 == 5:
            facts = host(masquerade_bit=turn // 10 % 2 + 3)
            return full(numbered(1, 4 + turn % 2), numbered(9, 10), facts=facts)
        return full(numbered(1, 4 + turn % 2), numbered(9, 10), facts=None)

    backend = storm.node.backend
    apply = backend.proxycore_backend_apply
    storm.node.backend.proxycore_backend_apply = lambda given: storm.at_node.call(lambda: apply(given))
    storm.blow(VIP["IPv4"], change)
    assert storm.counted() == {"untranslated": 0, "strangers": 0, "refusals": 0, "ours": SYNS}


def _with_affinity_or_without(turn: int) -> ChangeBatch:
    return batch(numbered(1, 5, affinity=10 if turn % 2 else None))


def _one_service_after_the_other(turn: int) -> ChangeBatch:
    targets = [f"10.1.1.{n + 1}:80" for n in range(5)]
    state = service(name_of(f"web-{turn % 3}"), frontend(numbered(1).frontends[0].address), cluster=targets)
    return batch(state, removed=[name_of(f"web-{(turn - 1) % 3}"), numbered(1).name])


@pytest.mark.parametrize("change", [_with_affinity_or_without, _one_service_after_the_other])
def test_an_address_that_gets_another_index(change, storm):
    """A packet that has read the old index finds nothing there any more, and looks again."""
    storm.node.run(numbered(1, 5), numbered(9, 10))
    assert_all_arrived(storm, storm.blow(VIP["IPv4"], change))


def test_the_watch_sees_what_is_not_translated(storm):
    """Without the rule for a pool that shrank meanwhile, some would be: the tests above can fail."""
    storm.node.run(numbered(1, 1), numbered(9, 10))
    storm.node.nft("flush", "chain", "ip", "proxycore", "endpoints-first")
    storm.blow(VIP["IPv4"], lambda turn: batch(numbered(1, 1 + turn % 2)))
    assert storm.counted()["untranslated"] > 0


def test_sender_is_a_program(namespace):
    """It fails loudly where it cannot send."""
    done = namespace.call(
        lambda: subprocess.run(
            [sys.executable, "-I", SENDER, "192.0.2.1", "80", "1", "0"], capture_output=True, check=False
        )
    )
    assert done.returncode != 0
