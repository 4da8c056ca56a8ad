"""What the backend does to a host beside its rules, and what it can do without."""

from __future__ import annotations

import pytest

from proxycore.kernel import xtables
from proxycore.kernel.xtables import Variant
from proxycore.testing.netns import Namespace
from proxycore.testing.states import context, frontend, full, name_of, service
from proxycore_iptables.counting import Counting

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


@pytest.mark.parametrize("readable", [True, False])
def test_what_is_in_the_other_variant(
    node: Node, namespace: Namespace, monkeypatch: pytest.MonkeyPatch, readable: bool
) -> None:
    """It goes; what we have no right to read is no obstacle, and stays."""
    other: Variant = "legacy" if node.variant == "nft" else "nft"
    namespace.run([f"iptables-{other}-restore", "--noflush"], stdin=THEIRS)
    rights, save = xtables.missing_rights, xtables.save

    def lacking(variant: Variant) -> tuple[str, ...]:
        return ("CAP_NET_RAW",) if variant == other else rights(variant)

    def saved(tools: xtables.Tools, *arguments, **more):  # type: ignore[no-untyped-def]
        assert tools.variant != other, "it is known that this cannot be read"
        return save(tools, *arguments, **more)

    if not readable:
        monkeypatch.setattr(xtables, "missing_rights", lacking)
        monkeypatch.setattr(xtables, "save", saved)
    node.run(WEB)
    assert not node.verify().drift
    left = namespace.run([f"iptables-{other}-save"]).stdout
    assert ("KUBE-SERVICES" in left) == (not readable)
    assert ("which go once ours are in force" in (node.adopted or "")) == readable
