"""Connections since the start, whatever becomes of the rules that count them, and what there is of one Service port."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from proxycore.api import Counters, NodePortAddresses, ServiceState
from proxycore.testing.states import (
    HOST,
    context,
    frontend,
    full,
    host,
    name_of,
    node_port,
    service,
)
from proxycore_iptables import counts
from proxycore_iptables.backend import IptablesBackend
from proxycore_iptables.counts import Totals
from proxycore_iptables.fake import FakeHost, FakeTables
from proxycore_iptables.live import Live
from proxycore_iptables.names import endpoint_chain_of, text_of
from proxycore_iptables.ruleset import Ruleset

from .node import Node

WEB = service(name_of("web"), frontend("172.30.0.41"), cluster=["10.180.0.1:8080", "10.180.0.2:8080"])
ONE, OTHER, THIRD = (("nat", endpoint_chain_of(text_of(WEB.name), f"10.180.0.{n}:8080")) for n in (1, 2, 3))


class Counting:
    """A backend on fake tables, and its totals."""

    def __init__(self, *states: ServiceState) -> None:
        self.fake = FakeHost("nft", ["IPv4"])
        self.live: FakeTables = self.fake.tables["IPv4"]
        self.backend = IptablesBackend(open_host=self.fake.open, clock=lambda: 0.0)
        given = msgspec.structs.replace(context(HOST), families=("IPv4",))
        self.backend.proxycore_backend_start(given)
        self.apply(*states)
        self.totals = Totals()

    def apply(self, *states: ServiceState) -> None:
        assert self.backend.proxycore_backend_apply(full(*states)).outcome == "applied"

    @property
    def ruleset(self) -> Ruleset:
        return self.backend._rulesets["IPv4"]

    def meet(self, place: tuple[str, str], packets: int) -> None:
        """So many connections meet the last rule of a chain."""
        table, chain = place
        rule = self.live.tables[table][chain][-1]
        self.live.met[table, chain, rule] = self.live.met.get((table, chain, rule), 0) + packets

    def meet_frontend(self, packets: int) -> None:
        [rule] = [rule for rule in self.live.tables["nat"]["KUBE-SERVICES"] if "172.30.0.41" in rule]
        key = "nat", "KUBE-SERVICES", rule
        self.live.met[key] = self.live.met.get(key, 0) + packets

    def rewrite(self, place: tuple[str, str]) -> None:
        """Somebody writes a chain anew as it is: its rules begin to count at none."""
        self.live.met = {key: count for key, count in self.live.met.items() if key[:2] != place}

    def read(self) -> Counters:
        [found] = self.totals.read(self.ruleset, self.live)
        assert found.name == WEB.name
        return found

    def one(self) -> int:
        """Connections to the first endpoint."""
        return self.read().by_endpoint["10.180.0.1:8080"]


@pytest.fixture
def counting() -> Counting:
    return Counting(WEB)


def test_connections_by_endpoint_and_by_frontend(counting):
    counting.meet(ONE, 3)
    counting.meet(OTHER, 4)
    counting.meet_frontend(7)
    assert counting.read() == Counters(
        name=WEB.name,
        connections=7,
        by_frontend={"172.30.0.41:80/tcp": 7},
        by_endpoint={"10.180.0.1:8080": 3, "10.180.0.2:8080": 4},
    )


def test_a_chain_that_is_rewritten_goes_on_counting(counting):
    counting.meet(ONE, 3)
    assert counting.one() == 3
    counting.rewrite(ONE)
    assert counting.one() == 3
    counting.meet(ONE, 2)
    assert counting.one() == 5
    counting.rewrite(ONE)
    counting.meet(ONE, 1)
    assert counting.one() == 6


def foreign_rule(live: FakeTables) -> Callable[[], None]:
    """Returns what takes it away."""
    for table, chain in (ONE, ("nat", "KUBE-SERVICES")):
        live.tables[table][chain].insert(0, "-p udp -j RETURN")
    return lambda: [live.tables[table][chain].pop(0) for table, chain in (ONE, ("nat", "KUBE-SERVICES"))]


def without_chain(live: FakeTables) -> Callable[[], None]:
    table, chain = ONE
    rules = live.tables[table].pop(chain)
    root = live.tables["nat"].pop("KUBE-SERVICES")
    return lambda: live.tables[table].update({chain: rules, "KUBE-SERVICES": root})


@pytest.mark.parametrize("disturb", [foreign_rule, without_chain])
def test_a_chain_that_is_not_as_it_should_be_keeps_its_last_values(counting, disturb):
    counting.meet(ONE, 3)
    counting.meet_frontend(3)
    before = counting.read()
    mend = disturb(counting.live)
    assert counting.read() == before
    assert counting.read() == before
    mend()
    assert counting.read() == before
    counting.meet(ONE, 1)
    assert counting.one() == 4


def test_a_chain_that_was_never_right_counts_from_when_it_is(counting):
    mend = foreign_rule(counting.live)
    counting.meet(ONE, 3)
    assert counting.read().connections == 0
    mend()
    assert counting.one() == 3


def test_the_first_reading_of_adopted_rules_is_where_they_begin(counting):
    counting.meet(ONE, 100)
    counting.meet_frontend(100)
    counting.totals = Totals(adopted=["IPv4"])
    assert (counting.read().connections, counting.read().by_frontend) == (0, {"172.30.0.41:80/tcp": 0})
    counting.meet(ONE, 2)
    counting.meet(OTHER, 1)
    counting.meet_frontend(3)
    assert counting.read() == Counters(
        name=WEB.name,
        connections=3,
        by_frontend={"172.30.0.41:80/tcp": 3},
        by_endpoint={"10.180.0.1:8080": 2, "10.180.0.2:8080": 1},
    )
    counting.rewrite(ONE)
    assert counting.one() == 2
    # What comes later has not counted before.
    more = service(WEB.name, *WEB.frontends, cluster=["10.180.0.1:8080", "10.180.0.3:8080"])
    counting.apply(more)
    counting.meet(THIRD, 5)
    assert counting.read().by_endpoint["10.180.0.3:8080"] == 5


def test_adopted_rules_of_which_the_first_reading_says_nothing(counting):
    counting.meet(ONE, 100)
    counting.totals = Totals(adopted=["IPv4"])
    mend = foreign_rule(counting.live)
    assert counting.read().connections == 0
    mend()
    assert counting.one() == 0
    counting.meet(ONE, 2)
    assert counting.one() == 2


def test_a_reading_before_anything_is_in_force_is_no_first_one(counting):
    counting.meet(ONE, 100)
    totals = Totals(adopted=["IPv4"])
    fresh = Ruleset("IPv4", counting.ruleset.options, counting.fake.features["IPv4"])
    assert totals.read(fresh, counting.live) == ()
    counting.totals = totals
    assert counting.one() == 0


def test_an_endpoint_that_goes_and_comes_back_counts_anew(counting):
    counting.meet(ONE, 3)
    assert counting.one() == 3
    counting.apply(service(WEB.name, *WEB.frontends, cluster=["10.180.0.2:8080"]))
    assert counting.read().connections == 0
    counting.apply(WEB)
    counting.meet(ONE, 1)
    assert counting.one() == 1


# -- what there is --


class OneByOne:
    """Live tables that say how they were asked."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self.name = live.name
        self.asked: list[str] = []

    def rules(self, places):
        self.asked.append("rules")
        return self._live.rules(places)

    def read(self, keep=()):
        self.asked.append("read")
        return self._live.read(keep)


@pytest.mark.parametrize(("endpoints", "how"), [(3, "rules"), (200, "read")])
def test_many_chains_are_read_at_once(endpoints, how):
    state = service(
        WEB.name, *WEB.frontends, cluster=[f"10.180.{n // 100}.{n % 100 + 1}:8080" for n in range(endpoints)]
    )
    counting = Counting(state)
    live = OneByOne(counting.live)
    found = counts.inspect(counting.ruleset, live, state.name)
    assert live.asked == [how]
    assert len(found) == 1 + 1 + endpoints + 2 * endpoints
    assert counts.inspect(counting.ruleset, counting.live, state.name) == found
    [mine] = [item for item in found if item.place == "iptables-nft nat KUBE-SERVICES"]
    assert mine.native.startswith("-A KUBE-SERVICES -d 172.30.0.41/32 ")


@pytest.mark.root
@pytest.mark.parametrize("most", [0, 1000])
def test_a_node_port_on_loopback_is_shown_whichever_way_it_is_read(
    node: Node, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """The tools print two blanks before the name of its counter."""
    monkeypatch.setattr(counts, "_ONE_BY_ONE", most)
    state = service(WEB.name, *WEB.frontends, node_port(30041), cluster=["10.180.0.1:8080"])
    everywhere = NodePortAddresses(all_local=True)
    node.run(state, facts=host(node_ports_ipv4=everywhere), localhostNodePorts=True)
    shown = [item.native for item in node.call("inspect", state.name) if "--nfacct-name" in item.native]
    assert len(shown) == node.ruleset().count("-m nfacct --nfacct-name  localhost_nps_accepted_pkts")
    assert shown
