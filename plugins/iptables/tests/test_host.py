"""What the backend does to a host beside its rules, and what it can do without."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from proxycore.errors import KernelError
from proxycore.kernel import xtables, xtlock
from proxycore.kernel.xtables import Variant
from proxycore.kubechains import is_kube_proxys, target_of
from proxycore.testing.netns import Namespace
from proxycore.testing.states import context, frontend, full, name_of, service
from proxycore_iptables.counting import Counting

from .edge import tools_of
from .node import Node

pytestmark = pytest.mark.root

WEB = service(name_of("web"), frontend("172.30.0.41"), cluster=["10.180.0.1:8080"])
THEIRS = "*nat\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j KUBE-SERVICES\nCOMMIT\n"


def counters(namespace: Namespace) -> set[str]:
    def read() -> set[str]:
        with Counting() as kernel:
            return set(kernel.packets())

    return namespace.call(read)


def test_a_plan_makes_no_counters_and_a_start_does(node: Node, namespace: Namespace) -> None:
    given = context(node.facts, options={"variant": node.variant})
    operations = node.call("plan", given, full(WEB, facts=node.facts))
    assert any("172.30.0.41" in operation.native for operation in operations)
    assert counters(namespace) == set()
    assert "KUBE-" not in node.ruleset()
    uses = {name for name in ("ct_state_invalid_dropped_pkts",) if any(name in o.native for o in operations)}
    node.run(WEB)
    assert uses <= counters(namespace)
    assert node.call("plan", given, full(WEB, facts=node.facts)) == ()


def tables_of(namespace: Namespace) -> str:
    """Names of the legacy tables that exist, and everything in nf_tables."""
    legacy = namespace.run(["cat", "/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"]).stdout
    return legacy + namespace.run(["nft", "list", "ruleset"]).stdout


@pytest.mark.parametrize("locked", [False, True])
def test_a_plan_and_a_probe_make_no_tables(node: Node, namespace: Namespace, locked: bool) -> None:
    """And wait for no lock."""
    given = context(node.facts, options={"variant": node.variant, "lockSeconds": 1})
    assert tables_of(namespace) == ""
    with xtlock.held(1) if locked else contextlib.nullcontext():
        operations = node.call("plan", given, full(WEB, facts=node.facts))
        probed = node.call("probe", given)
    assert any("172.30.0.41" in operation.native for operation in operations)
    assert (probed.problems, probed.warnings) == ((), ())
    assert probed.facts == {
        "iptables": node.variant,
        "chosen because": f"the configuration says {node.variant}",
    }
    assert tables_of(namespace) == ""
    # What was found holds for what is written.
    node.run(WEB)
    assert "MASQUERADE --random-fully" in node.ruleset()
    assert any("--random-fully" in operation.native for operation in operations)


def test_a_probe_tells_what_there_is(namespace: Namespace, xtables_lock: Path) -> None:
    node = Node(namespace, "legacy")
    with contextlib.closing(node):
        node.run(WEB)
    node.iptables("restore", "--noflush", stdin="*nat\n-A OUTPUT -p tcp -j KUBE-MARK-MASQ\nCOMMIT\n")
    before = node.chains()
    probed = node.call("probe", context(node.facts, options={"variant": "legacy"}))
    said = re.fullmatch(
        r"(\d+) \(rules in other chains that lead there: (\d+)\) of iptables-legacy, \d+ \(.*\) of ip6tables-legacy",
        probed.facts["chains"],
    )
    assert said is not None, probed.facts
    chains = {place for place in node.chains() if is_kube_proxys(*place)}
    leading = [
        rule
        for place, rules in node.chains().items()
        if place not in chains
        for rule in rules
        if (place[0], target_of(f"-A X {rule}")) in chains
    ]
    assert "-p tcp -j KUBE-MARK-MASQ" in leading
    assert [int(said[1]), int(said[2])] == [len(chains), len(leading)]
    assert node.chains() == before


@pytest.mark.parametrize("name", ["iptables-legacy", "iptables-nft", "ip6tables-legacy", "ip6tables-nft"])
def test_what_a_tool_lacks(namespace: Namespace, tmp_path: Path, name: str) -> None:
    tools = tools_of(name)
    found = namespace.call(
        lambda: [
            xtables.lacks(tools, "-j", "MASQUERADE", "--random-fully"),
            xtables.lacks(tools, "-j", "MASQUERADE", "--random-full"),
            xtables.lacks(tools, "-m", "tcp", "--dport"),
            xtables.lacks(tools, "-m", "nosuch", "--dport"),
        ]
    )
    assert found[:2] == ["", "MASQUERADE has no option --random-full"]
    assert "Couldn't load match `nosuch'" in found[3]
    # As 1.8.8 and later say it of a kernel that has no such thing.
    fake = tmp_path / "tool"
    fake.write_text(
        "#!/bin/sh\necho ' --dport'\n"
        "echo 'Warning: Extension x revision 0 not supported, missing kernel module?' >&2\n"
    )
    fake.chmod(0o755)
    said = namespace.call(lambda: xtables.lacks(tools._replace(command=str(fake)), "-m", "x", "--dport"))
    assert said == "Warning: Extension x revision 0 not supported, missing kernel module?"
    with pytest.raises(KernelError, match=f"the program {name} is not installed"):
        xtables.lacks(tools._replace(command=""), "-m", "tcp", "--dport")
    with pytest.raises(KernelError, match=r"cannot run .*/none: No such file"):
        xtables.lacks(tools._replace(command=str(tmp_path / "none")), "-m", "tcp", "--dport")


def test_the_other_variant_is_left_alone(node: Node, namespace: Namespace) -> None:
    """It is not the backend that takes away what is there: others may have chosen it."""
    other: Variant = "legacy" if node.variant == "nft" else "nft"
    namespace.run([f"iptables-{other}-restore", "--noflush"], stdin=THEIRS)
    node.run(WEB)
    assert not node.verify().drift
    assert "-A PREROUTING -j KUBE-SERVICES" in namespace.run([f"iptables-{other}-save"]).stdout
