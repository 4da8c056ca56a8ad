"""Policy rules and routes of a namespace, with `ip` as witness."""

from __future__ import annotations

import pytest

from proxycore.api import FAMILIES, KernelError
from proxycore.testing.netns import Namespace
from proxycore_ipvs.netrules import MAIN_TABLE, LocalRoute, PolicyRule, policy_routes
from proxycore_ipvs.routing import NetlinkRouting
from proxycore_ipvs.shape import Shape

from .inside import Inside

pytestmark = pytest.mark.root


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_and_routes_come_and_go(namespace: Namespace, family):
    parts = policy_routes(Shape(family=family))
    version = "-4" if family == "IPv4" else "-6"
    routing = Inside(namespace, NetlinkRouting)
    before = namespace.run(["ip", version, "rule"]).stdout
    assert routing.present(parts) == frozenset()
    for part in parts:
        routing.add(part)
    assert routing.present(parts) == frozenset(parts)
    rules = namespace.run(["ip", version, "rule"]).stdout
    assert "299:\tfrom all fwmark 0x40000000/0x40000000 iif lo lookup main" in rules
    assert "300:\tfrom all fwmark 0x40000000/0x40000000 lookup 310" in rules
    route = namespace.run(["ip", version, "route", "show", "table", "310"]).stdout
    assert "local default dev lo" in route
    with pytest.raises(KernelError, match="pref 299"):
        routing.add(parts[1])
    for part in parts:
        routing.delete(part)
    assert routing.present(parts) == frozenset()
    assert namespace.run(["ip", version, "rule"]).stdout == before


@pytest.mark.parametrize("family", FAMILIES)
def test_what_only_looks_alike_is_not_taken_for_ours(namespace: Namespace, family):
    version = "-4" if family == "IPv4" else "-6"
    route, _, rule = parts = policy_routes(Shape(family=family))
    assert isinstance(route, LocalRoute)
    assert isinstance(rule, PolicyRule)
    for words in (
        ["rule", "add", "pref", "300", "fwmark", "0x40000000/0x40000001", "lookup", "310"],
        ["rule", "add", "pref", "301", "fwmark", "0x40000000/0x40000000", "lookup", "310"],
        ["rule", "add", "pref", "299", "fwmark", "0x40000000/0x40000000", "lookup", str(MAIN_TABLE)],
        ["route", "add", "blackhole", "default", "table", "310"],
    ):
        namespace.run(["ip", version, *words])
    assert Inside(namespace, NetlinkRouting).present(parts) == frozenset()
