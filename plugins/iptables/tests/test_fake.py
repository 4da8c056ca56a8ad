"""The fake refuses what the tools and the kernel refuse, and shows what they show."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from proxycore.api import Family
from proxycore.kernel import xtlock
from proxycore.kernel.xtables import LockHeld, RestoreRefused
from proxycore.testing.netns import Namespace
from proxycore_iptables.fake import FakeTables
from proxycore_iptables.live import Live, ToolTables

from .edge import tools_of
from .node import chains_of

FILTER = "*filter\n:F - [0:0]\nCOMMIT\n"
BEFORE = "*nat\n:USED - [0:0]\n:FULL - [0:0]\n:EMPTY - [0:0]\n-A OUTPUT -p tcp -j USED\n-A FULL -j RETURN\nCOMMIT\n"
TEXTS = {
    "a chain in use goes": ("-X USED",),
    "a chain goes whose user goes first": ("-D OUTPUT -p tcp -j USED", "-X USED"),
    "a chain goes whose user goes afterwards": ("-X USED", "-D OUTPUT -p tcp -j USED"),
    "a chain with rules goes": ("-X FULL",),
    "a chain with rules goes emptied": (":FULL - [0:0]", "-X FULL"),
    "an empty chain goes": ("-X EMPTY",),
    "a chain goes that is not there": ("-X NONE",),
    "a chain is made": ("-N NEW", "-A NEW -j RETURN"),
    "a chain is made twice": ("-N NEW", "-N NEW"),
    "a chain is made that is there": ("-N EMPTY",),
    "a chain is made after it went": ("-X EMPTY", "-N EMPTY"),
    "a chain is declared that is there": (":FULL - [0:0]", "-A FULL -j ACCEPT"),
    "a rule leads nowhere": ("-A OUTPUT -j NONE",),
    "a rule goes that is not there": ("-D OUTPUT -j USED",),
    "a rule comes in a chain that is not there": ("-A NONE -j RETURN",),
    "a rule comes too far behind": ("-I FULL 3 -j RETURN",),
    "a rule comes at the end by its number": ("-I FULL 2 -j ACCEPT",),
}


def fill(live: Live, *texts: str) -> bool:
    """Bring these into force, one after the other; False: the last was refused."""
    for text in texts:
        try:
            live.restore(text, ())
        except RestoreRefused:
            assert text == texts[-1]
            return False
    return True


@pytest.mark.root
@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_both_refuse_the_same(namespace: Namespace, variant: str, family: Family) -> None:
    name = f"{'iptables' if family == 'IPv4' else 'ip6tables'}-{variant}"
    refused = set()
    for what, lines in TEXTS.items():
        text = "\n".join((FILTER + "*nat", *lines, "COMMIT", ""))
        fake, real = FakeTables(family), ToolTables(tools_of(name), lock_seconds=1)
        for table in ("filter", "nat"):
            namespace.run([f"{name}-restore"], stdin=f"*{table}\nCOMMIT\n")
        done = fill(fake, BEFORE, text)
        assert namespace.call(lambda real=real, text=text: fill(real, BEFORE, text)) is done, what
        shown = chains_of(namespace.run([f"{name}-save"]).stdout)
        wanted = chains_of(fake.save())
        assert {p: r for p, r in wanted.items() if p[0] != "mangle"} == {
            p: r for p, r in shown.items() if p[0] != "mangle"
        }, what
        # A table that stands before the one that is refused holds.
        assert ("filter", "F") in wanted
        if not done:
            refused.add(what)
    assert refused == {
        "a chain in use goes",
        "a chain goes whose user goes afterwards",
        "a chain with rules goes",
        "a chain goes that is not there",
        "a chain is made twice",
        "a chain is made that is there",
        "a rule leads nowhere",
        "a rule goes that is not there",
        "a rule comes in a chain that is not there",
        "a rule comes too far behind",
    }


def test_the_lock_may_be_lost_between_tables() -> None:
    fake = FakeTables("IPv4")
    fake.lock_after = 1
    with pytest.raises(LockHeld):
        fake.restore(FILTER + BEFORE, ())
    assert "F" in fake.tables["filter"]
    assert "USED" not in fake.tables["nat"]
    fake.restore(FILTER + BEFORE, ())
    assert "USED" in fake.tables["nat"]
    fake.lock_after = 0
    with pytest.raises(LockHeld):
        fake.restore("*filter\n-X F\nCOMMIT\n", ())
    assert "F" in fake.tables["filter"]


@pytest.mark.root
def test_the_tool_takes_the_lock_for_each_table(namespace: Namespace, xtables_lock: Path) -> None:
    """Whoever finds it held may have brought earlier tables into force."""
    with namespace.popen(
        ["iptables-legacy-restore", "--noflush", "-w", "1"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(FILTER)
        process.stdin.flush()
        end = time.monotonic() + 30
        while ":F -" not in namespace.run(["iptables-legacy-save"]).stdout:
            assert time.monotonic() < end
        with xtlock.held(10):
            _, said = process.communicate(BEFORE, timeout=30)
    assert (process.returncode, "currently holding the xtables lock." in said) == (4, True)
    shown = namespace.run(["iptables-legacy-save"]).stdout
    assert ":F -" in shown
    assert "USED" not in shown


@pytest.mark.root
def test_a_table_that_the_tool_cannot_read(namespace: Namespace) -> None:
    """It is left out of the listing, and can be written all the same."""
    name = "iptables-nft"
    real = ToolTables(tools_of(name), lock_seconds=1)
    namespace.run(["nft", "-f", "-"], stdin="table ip nat { chain OTHER { ct state new drop; }; }")
    fake = FakeTables("IPv4")
    fake.incompatible.add("nat")
    namespace.call(lambda: fill(real, FILTER + BEFORE))
    assert fill(fake, FILTER + BEFORE)
    shown = namespace.run([f"{name}-save"]).stdout
    [line] = [line for line in shown.splitlines() if "incompatible" in line]
    assert line in fake.save().splitlines()
    assert "*nat" not in shown
    assert "*nat" not in fake.save()
    assert "USED" in fake.tables["nat"]
    assert "chain USED" in namespace.run(["nft", "list", "ruleset"]).stdout


def test_what_met_a_rule_is_forgotten_when_its_chain_is_rewritten() -> None:
    fake = FakeTables("IPv4")
    fake.restore(
        "*nat\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -j RETURN\n-A KUBE-SERVICES -j ACCEPT\nCOMMIT\n", ()
    )
    place = "nat", "KUBE-SERVICES"
    fake.met[(*place, "-j ACCEPT")] = 3
    fake.restore("*nat\n-D KUBE-SERVICES -j RETURN\nCOMMIT\n", ())
    assert [count.packets for count in fake.counters()[place]] == [3]
    fake.restore("*nat\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -j ACCEPT\nCOMMIT\n", ())
    assert [count.packets for count in fake.counters()[place]] == [0]
