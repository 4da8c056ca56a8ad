"""Real iptables through any history of batches and restarts: what comes of it is what a start from nothing makes.

Of each variant; a fake kernel could not tell what the tools make of the input.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence

import pytest

from proxycore.api import (
    UNKNOWN,
    Family,
    FrontendKind,
    HostState,
    LocalPodsByInterface,
    NodePortAddresses,
    ServicePortName,
    ServiceState,
    WhenEmpty,
)
from proxycore.changes import change
from proxycore.testing.netns import Namespace
from proxycore.testing.states import (
    EXTERNAL_LOCAL,
    HOST,
    batch,
    endpoint,
    frontend,
    host,
    name_of,
    node_port,
    pool,
    service,
)

from .node import FAMILIES, Chains, Node

pytestmark = pytest.mark.root

EVERYWHERE = NodePortAddresses(all_local=True)
HOSTS: Sequence[HostState] = (
    HOST,
    host(detect_local=None),
    host(detect_local=LocalPodsByInterface("cni0"), masquerade_bit=3),
    host(node_ports_ipv4=EVERYWHERE, node_ports_ipv6=EVERYWHERE),
)
NUMBERS = range(12)
TREE_FROM = 6
STEPS = 14


def state_of(chance: random.Random, number: int, place: int, family: Family) -> ServiceState:
    """A Service port whose frontends nobody else has: `place` chooses them."""
    v4 = family == "IPv4"
    kind = chance.choice([FrontendKind.LOAD_BALANCER_IP, FrontendKind.EXTERNAL_IP])
    ranges = ["198.51.100.0/24"] if v4 else ["2001:db8:9::/64", "2001:db8:a::/64"]
    made = [
        frontend(f"172.30.{place % 3}.{place + 1}" if v4 else f"fd00:172:30::{place % 3 + 1}:{place + 1:x}")
    ]
    is_local = chance.random() < 0.4
    routes = {"routes": EXTERNAL_LOCAL} if is_local else {}
    if chance.random() < 0.5:
        walled = kind is FrontendKind.LOAD_BALANCER_IP and chance.random() < 0.5
        made.append(
            frontend(
                "192.0.2.7" if v4 else "2001:db8:5::7",
                1000 + place,
                kind=kind,
                source_ranges=ranges if walled else None,
                **routes,  # type: ignore[arg-type]
            )
        )
    if chance.random() < 0.5:
        made.append(node_port(30000 + place, **routes))  # type: ignore[arg-type]
    ends = [
        endpoint(
            f"10.{number}.0.{n + 1}:80" if v4 else f"[fd00:10::{number + 1:x}:{n + 1:x}]:80",
            local=n % 2 == 0,
            weight=chance.choice([1, 1, 1, 3]),
        )
        for n in chance.sample(range(6), chance.choice([0, 1, 1, 2, 3, 5]))
    ]
    when_empty = chance.choice(list(WhenEmpty))
    local = pool(*(e for e in ends if e.is_local), when_empty=WhenEmpty.DROP) if is_local else None
    return service(
        name_of(f"s{number}", family=family),
        *made,
        cluster=pool(*ends, when_empty=when_empty),
        local=local,
        affinity=chance.choice([None, None, 600]),
    )


class History:
    """What happens to a node; `desired` should be in force after every step."""

    def __init__(self, node: Node, seed: int) -> None:
        self.node = node
        self.chance = random.Random(seed)
        self.desired: dict[ServicePortName, ServiceState] = {}
        self.places = {number: number for number in NUMBERS}

    def step(self) -> str:
        """Something happens; returns what."""
        steps = [self.change] * 3 + [self.swap, self.facts, self.restart, self.unsure]
        step = self.chance.choice(steps)
        step()
        return step.__name__

    def _apply(
        self, changes: dict[ServicePortName, ServiceState | None], facts: HostState | None = None
    ) -> None:
        states = [state for state in changes.values() if state is not None]
        removed = [name for name, state in changes.items() if state is None]
        result = self.node.apply(batch(*states, removed=removed, facts=facts))
        assert (result.outcome, result.failed) == ("applied", ()), result.message
        self._accept(changes)

    def _accept(self, changes: dict[ServicePortName, ServiceState | None]) -> None:
        for name, state in changes.items():
            if state is None:
                self.desired.pop(name, None)
            else:
                self.desired[name] = state

    def _changes(self, most: int = 5) -> dict[ServicePortName, ServiceState | None]:
        changes: dict[ServicePortName, ServiceState | None] = {}
        for number in self.chance.sample(NUMBERS, self.chance.randint(1, most)):
            family = self.chance.choice(FAMILIES)
            name = name_of(f"s{number}", family=family)
            gone = name in self.desired and self.chance.random() < 0.4
            changes[name] = None if gone else state_of(self.chance, number, self.places[number], family)
        return changes

    def change(self) -> None:
        self._apply(self._changes(8 if self.chance.random() < 0.5 else 2))

    def swap(self) -> None:
        """Two Services exchange their frontends in one batch."""
        one, other = self.chance.sample(NUMBERS, 2)
        self.places[one], self.places[other] = self.places[other], self.places[one]
        self._apply(
            {
                name_of(f"s{number}", family=family): state_of(
                    self.chance, number, self.places[number], family
                )
                for number in (one, other)
                for family in FAMILIES
            }
        )

    def facts(self) -> None:
        facts = self.chance.choice(HOSTS)
        self._apply(self._changes(2) if self.chance.random() < 0.5 else {}, facts)

    def restart(self) -> None:
        """Another process, which finds what the one before left, and perhaps other Services."""
        if self.chance.random() < 0.5:
            self._accept(self._changes())
        self.node.run(*self.desired.values())
        assert self.node.adopted is not None

    def unsure(self) -> None:
        """The engine does not know what came of the last batch."""
        changes = self._changes(3)
        given = batch(*self.desired.values())
        sent = tuple(change(name, UNKNOWN, state) for name, state in changes.items() if state is not None)
        if sent:
            assert self.node.apply(_with(given, sent)).outcome == "applied"
            self._accept({item.name: item.after for item in sent})


def _with(given: object, changes: object) -> object:
    import msgspec

    return msgspec.structs.replace(given, changes=changes)  # type: ignore[type-var]


def from_nothing(node: Node, states: Sequence[ServiceState], other: Node) -> dict[Family, Chains]:
    """The chains that a node of its own gets for the same states."""
    other.facts = node.facts
    for family in FAMILIES:
        other.iptables("restore", family=family, stdin="*filter\nCOMMIT\n*nat\nCOMMIT\n")
    other.run(*states)
    return {family: other.chains(family) for family in FAMILIES}


@pytest.mark.parametrize("seed", range(3))
def test_any_history_ends_where_a_start_from_nothing_does(node, seed):
    # Not in between: comments come and go with a delay, so that they tell of the past.
    options = {"treeFrom": TREE_FROM, "commentsUpTo": 0 if seed == 1 else 1000}
    node.run(**options)
    history = History(node, seed)
    with (
        Namespace("other") as namespace,
        contextlib.closing(Node(namespace, node.variant, **options)) as other,
    ):
        trees = set()
        for _ in range(STEPS):
            history.step()
            wanted = from_nothing(node, list(history.desired.values()), other)
            for family in FAMILIES:
                chains = node.chains(family)
                assert chains == wanted[family]
                trees.add(any("KUBE-SVC-TREE" in chain for _, chain in chains))
            assert node.verify(True).drift == ()
    assert trees == {True, False}
    node.assert_means(*history.desired.values())
