"""Others write rules at the same time: nobody's changes are lost, ours and theirs are told apart."""

from __future__ import annotations

import random
import subprocess

import pytest

from proxycore.api import Verification
from proxycore.testing.clients import wait_until
from proxycore.testing.states import batch, frontend, full, host, name_of, numbered, service

from .node import Node

pytestmark = pytest.mark.root

FOREIGN = 60
LOOP = """
n=1
while [ $n -le {count} ]; do
  {tool} -w 5 -A INPUT -s 198.51.100.$n/32 -j ACCEPT || exit 1
  {tool} -w 5 -t nat -N THEIRS-$n || exit 1
  {tool} -w 5 -t nat -A THEIRS-$n -s 198.51.100.$n/32 -j ACCEPT || exit 1
  {tool} -w 5 -t nat -A PREROUTING -s 198.51.100.$n/32 -j THEIRS-$n || exit 1
  n=$((n + 1))
done
"""


def foreign_rules(node: Node) -> dict[tuple[str, str], list[str]]:
    return {
        place: [rule for rule in rules if "198.51.100." in rule]
        for place, rules in node.chains().items()
        if any("198.51.100." in rule for rule in rules)
    }


def test_two_writers_at_once(node):
    """Batches, starts and full batches of ours, while a script adds chains and rules of its own."""
    chance = random.Random(5)
    states = {number: numbered(number, 2) for number in range(20)}
    node.run(*states.values(), treeFrom=10)
    script = LOOP.format(count=FOREIGN, tool=f"iptables-{node.variant}")
    writer = node.namespace.popen(["sh", "-c", script], stderr=subprocess.PIPE, text=True)
    turns = 0
    while writer.poll() is None or turns < 12:
        turns += 1
        number = chance.randrange(30)
        if number in states and chance.random() < 0.5:
            gone = states.pop(number)
            result = node.apply(batch(removed=[gone.name]))
        elif turns % 10:
            states[number] = numbered(number, chance.randint(1, 4))
            result = node.apply(batch(states[number]))
        else:
            node.start(host(masquerade_bit=4 + turns // 10 % 2))
            result = node.apply(full(*states.values(), facts=node.facts))
        assert (result.outcome, result.failed) == ("applied", ()), result.message
        if not turns % 3:
            assert node.verify(False).drift == ()
    _, said = writer.communicate()
    assert writer.returncode == 0, said
    assert node.verify(True).drift == ()
    found = foreign_rules(node)
    assert len(found.pop(("filter", "INPUT"))) == FOREIGN
    assert len(found.pop(("nat", "PREROUTING"))) == FOREIGN
    assert found == {
        ("nat", f"THEIRS-{n}"): [f"-s 198.51.100.{n}/32 -j ACCEPT"] for n in range(1, FOREIGN + 1)
    }
    node.assert_means(*states.values())


def looked(node: Node) -> Verification:
    """What the engine hears when the backend next looks: not at every call, while others keep changing rules."""
    found: list[Verification] = []

    def checked() -> bool:
        found.append(node.verify(False))
        return found[-1].checked

    wait_until(checked)
    return found[-1]


@pytest.mark.parametrize(
    "harm",
    [
        "-t nat -D PREROUTING -m comment --comment|kubernetes service portals|-j KUBE-SERVICES",
        "-t nat -F KUBE-SERVICES",
        "-t nat -A KUBE-MARK-MASQ -j ACCEPT",
        "-t nat -R KUBE-POSTROUTING 2 -j MARK --set-xmark 0x8000/0x0",
        "-t filter -F KUBE-FORWARD",
        "-t filter -I KUBE-SERVICES -s 10.0.0.9/32 -j ACCEPT",
    ],
)
def test_what_others_do_to_our_rules_is_seen_and_put_right(node, harm):
    states = [service(name_of(), frontend("172.30.0.1"), cluster=["10.0.0.1:80"])]
    node.run(*states)
    assert node.verify(False).drift == ()
    before = node.chains()
    words = [
        word
        for part, piece in enumerate(harm.split("|"))
        for word in ([piece] if part == 1 else piece.split())
    ]
    node.iptables("-w", "5", *words)
    assert node.chains() != before
    # In a legacy table a change that keeps the number of rules shows only when all is read.
    found = node.verify(True) if node.variant == "legacy" and "-R" in words else looked(node)
    assert found.drift
    if not found.repaired:
        assert node.apply(full(*states, facts=node.facts)).outcome == "applied"
    assert node.chains() == before
    assert node.verify(True).drift == ()


def test_rules_of_others_are_not_ours(node):
    """What others add beside ours is no drift, and a full batch leaves it where it is."""
    states = [service(name_of(), frontend("172.30.0.1"), cluster=["10.0.0.1:80"])]
    node.run(*states)
    for words in (
        "-I FORWARD -s 198.51.100.1/32 -j ACCEPT",
        "-A INPUT -s 198.51.100.2/32 -j DROP",
        "-t nat -I PREROUTING -s 198.51.100.3/32 -j ACCEPT",
        "-t nat -I POSTROUTING -s 198.51.100.4/32 -j ACCEPT",
    ):
        node.iptables("-w", "5", *words.split())
    before = node.chains()
    assert node.verify(True).drift == ()
    assert node.apply(full(*states, facts=node.facts)).operations == 0
    node.run(*states)
    assert node.chains() == before
