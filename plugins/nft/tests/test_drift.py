"""What others do to our tables on the kernel: found at the next look, told whose it was, put right by the next batch."""

from __future__ import annotations

import re

import pytest

from proxycore.testing.states import full
from proxycore_nft import encode, layout, rows, skeleton
from proxycore_nft.kernel import Element

from .test_kernel import ALL

pytestmark = pytest.mark.root
TABLE = "proxycore"
PLAIN_SETS = sorted(set(rows.SERVICE_SETS) | {"node-addresses", "classes", "refusals"})
WITH_DATA = sorted(
    set(PLAIN_SETS) - {"cluster-ips", "firewalled", "allowed-sources", "hairpin", "node-addresses"}
)
STRUCTURE = {"classes", "refusals"}


@pytest.fixture
def settled(node):
    """Services of every kind in force, nothing suspected."""
    node.run(*ALL)
    node.verify()
    assert not node.verify().checked
    return node


def found(node) -> list[tuple[str | None, str]]:
    """What a look without `deep` finds: (Service, text); who is hit by a change of what all share is left out."""
    return [(service, what) for service, what in all_found(node) if not what.startswith(HIT)]


HIT = ("has no rules", "may not be served")


def all_found(node) -> list[tuple[str | None, str]]:
    node.backend._verify_after = 0.0
    verification = node.verify()
    assert verification.checked
    return [(str(drift.service) if drift.service else None, drift.what) for drift in verification.drift]


def put_right(node, *, rebuilt: bool) -> None:
    """The engine's answer to drift is a full batch; afterwards all is well, and a quiet second reads nothing."""
    before = {nft: node.kernel.tables(nft) for nft in ("ip", "ip6")}
    result = node.apply(full(*ALL, facts=None))
    assert result.outcome == "applied"
    node.assert_means(*ALL)
    assert node.verify(True).drift == ()
    assert not node.verify().checked
    after = {nft: node.kernel.tables(nft) for nft in ("ip", "ip6")}
    assert (after != before) == rebuilt
    assert all(len(tables) == 1 for tables in after.values())
    node.nft("list", "ruleset")


def owners(node, nft: str, name: str, key: bytes) -> set[str]:
    """Which Services have that element."""
    family = "IPv4" if nft == "ip" else "IPv6"
    mirror = node.backend._tables[family].mirror
    return {str(row.owner) for row in rows.table_rows(mirror) if row.set == name and row.key == key}


def delete(node, nft: str, name: str, element: Element) -> None:
    raw = encode.element(element.key)
    if element.key_end is not None:
        raw = encode.range_element(element.key, element.key_end)
    payload = encode.set_head(TABLE, name) + encode.nest(3, raw)
    node.kernel.commit([encode.Body(encode.DELSETELEM, 0, nft, payload)])


def add(node, nft: str, name: str, raw: bytes) -> None:
    payload = encode.set_head(TABLE, name) + encode.nest(3, raw)
    node.kernel.commit([encode.Body(encode.NEWSETELEM, encode.F_CREATE, nft, payload)])


@pytest.mark.parametrize("nft", ["ip", "ip6"])
@pytest.mark.parametrize("name", PLAIN_SETS)
def test_an_element_taken_out(nft, name, settled):
    element = settled.kernel.elements(nft, TABLE, name)[0]
    whose = owners(settled, nft, name, element.key)
    delete(settled, nft, name, element)
    [(service, what)] = found(settled)
    assert f"{nft} {TABLE} {name}" in what
    if name in (*STRUCTURE, "node-addresses"):
        assert service is None
    else:
        assert service in whose
        assert "missing element" in what
    put_right(settled, rebuilt=name in STRUCTURE)


@pytest.mark.parametrize("nft", ["ip", "ip6"])
@pytest.mark.parametrize("name", PLAIN_SETS)
def test_an_element_put_in(nft, name, settled):
    like = settled.kernel.elements(nft, TABLE, name)[0]
    key = bytes(byte ^ 0x55 for byte in like.key)
    if like.key_end is not None:
        raw = encode.range_element(key, key)
    elif like.chain is not None:
        raw = encode.verdict_element(key, "reject-client")
    else:
        raw = encode.element(key, like.data)
    add(settled, nft, name, raw)
    [(service, what)] = found(settled)
    assert service is None
    assert f"{nft} {TABLE} {name}" in what
    if name != "node-addresses":
        assert "foreign element" in what
    put_right(settled, rebuilt=name in STRUCTURE)


@pytest.mark.parametrize("nft", ["ip", "ip6"])
@pytest.mark.parametrize("name", WITH_DATA)
def test_an_element_with_other_data(nft, name, settled):
    element = settled.kernel.elements(nft, TABLE, name)[0]
    delete(settled, nft, name, element)
    if element.chain is not None:
        other = "source-ranges" if element.chain == "reject-client" else "reject-client"
        add(settled, nft, name, encode.verdict_element(element.key, other))
    else:
        add(settled, nft, name, encode.element(element.key, bytes(byte ^ 1 for byte in element.data)))
    [(service, what)] = found(settled)
    assert f"changed element in {nft} {TABLE} {name}" in what
    assert service in (owners(settled, nft, name, element.key) or {None}) or name in STRUCTURE
    put_right(settled, rebuilt=name in STRUCTURE)


@pytest.mark.parametrize("name", ["local-pods", "service-cidrs"])
@pytest.mark.parametrize("words", ["flush set", "add element"])
def test_intervals_about_the_node(name, words, settled):
    if words == "flush set":
        settled.nft("flush", "set", "ip", TABLE, name)
    else:
        settled.nft("add", "element", "ip", TABLE, name, "{", "203.0.113.0/24", "}")
    assert found(settled) == [(None, f"ip {TABLE} {name}: other elements than ours")]
    put_right(settled, rebuilt=False)


def _first_rule(node, chain: str) -> str:
    text = node.nft("-a", "list", "chain", "ip", TABLE, chain)
    return re.findall(r"^\t\t(?!type|comment).* # handle (\d+)$", text, re.MULTILINE)[0]


CHANGES_OF_RULES = {
    "services": lambda node: node.nft(
        "delete", "rule", "ip", TABLE, "services", "handle", _first_rule(node, "services")
    ),
    "client-pod": lambda node: node.nft("add", "rule", "ip", TABLE, "client-pod", "counter"),
    "masquerading": lambda node: node.nft("insert", "rule", "ip", TABLE, "masquerading", "accept"),
    "endpoints-2": lambda node: node.nft("flush", "chain", "ip", TABLE, "endpoints-2"),
    "sticky-known-10": lambda node: node.nft("flush", "chain", "ip", TABLE, "sticky-known-10"),
    "nat-prerouting": lambda node: node.nft("flush", "chain", "ip", TABLE, "nat-prerouting"),
    "filter-input": lambda node: node.nft("insert", "rule", "ip", TABLE, "filter-input", "accept"),
}


@pytest.mark.parametrize("chain", CHANGES_OF_RULES)
def test_rules_changed(chain, settled):
    CHANGES_OF_RULES[chain](settled)
    assert found(settled) == [(None, f"table ip {TABLE}: the rules of chain {chain} were changed")]
    put_right(settled, rebuilt=True)


def _delete_hook(node) -> None:
    node.nft("-f", "-", stdin=f"flush chain ip {TABLE} nat-output\ndelete chain ip {TABLE} nat-output\n")


def _hook_later(node) -> None:
    node.nft(
        "-f",
        "-",
        stdin=f"flush chain ip {TABLE} nat-output\ndelete chain ip {TABLE} nat-output\n"
        f"table ip {TABLE} {{ chain nat-output {{ type nat hook output priority -90; goto services; }}; }}\n",
    )


CHANGES_OF_CHAINS = {
    "nat-output gone": (_delete_hook, "chain nat-output was"),
    "nat-output elsewhere": (_hook_later, "chain nat-output was"),
    "policy": (
        lambda node: node.nft("-f", "-", stdin=f"add chain ip {TABLE} filter-forward {{ policy drop; }}\n"),
        "chain filter-forward was",
    ),
    "another chain": (lambda node: node.nft("add", "chain", "ip", TABLE, "mine"), "chain mine was added"),
    "dormant": (
        lambda node: node.nft("-f", "-", stdin=f"add table ip {TABLE} {{ flags dormant; }}\n"),
        "was made dormant",
    ),
    "table": (lambda node: node.nft("delete", "table", "ip", TABLE), "is gone"),
    "ruleset": (lambda node: node.nft("flush", "ruleset"), "is gone"),
}


@pytest.mark.parametrize("change", CHANGES_OF_CHAINS)
def test_chains_and_tables_changed(change, settled):
    do, what = CHANGES_OF_CHAINS[change]
    do(settled)
    seen = found(settled)
    assert len(seen) == (2 if change == "ruleset" else 1)
    assert all(service is None and what in text for service, text in seen)
    put_right(settled, rebuilt=True)


@pytest.mark.parametrize("change", [*CHANGES_OF_CHAINS, *CHANGES_OF_RULES])
def test_the_same_while_no_proxy_runs(change, node):
    """At the next start; without hooks, or asleep, a table is as good as none."""
    node.run(*ALL)
    node.backend.proxycore_backend_stop()
    do = CHANGES_OF_RULES[change] if change in CHANGES_OF_RULES else CHANGES_OF_CHAINS[change][0]
    do(node)
    node.run(*ALL)
    gone = change in ("table", "ruleset")
    assert node.kernel.tables("ip") == {"proxycore" if gone else "proxycore-alt"}
    assert node.kernel.tables("ip6") == {"proxycore"}
    assert gone or "changed by somebody else" in node.adopted
    node.assert_means(*ALL)
    assert not node.verify().checked
    assert node.verify(True).drift == ()


def test_a_set_that_no_rule_needs_yet(node):
    """Only chains of Services with affinity refer to `slots`; until there is one, the map can be deleted."""
    plain = [state for state in ALL if state.affinity_seconds is None]
    node.run(*plain)
    node.verify()
    node.nft("delete", "map", "ip", TABLE, "slots")
    assert found(node) == [(None, f"table ip {TABLE}: set slots is gone")]
    assert node.apply(full(*ALL, facts=None)).outcome == "applied"
    node.assert_means(*ALL)
    node.run(*plain)
    node.backend.proxycore_backend_stop()
    name = next(iter(node.kernel.tables("ip")))
    assert node.kernel.sets("ip", name) == skeleton.SET_NAMES


def test_a_set_gone_under_a_full_batch(node):
    """Not found beforehand: the kernel refuses, and the backend makes a new table at once."""
    plain = [state for state in ALL if state.affinity_seconds is None]
    node.run(*plain)
    node.nft("delete", "map", "ip", TABLE, "slots")
    assert node.apply(full(*ALL, facts=None)).outcome == "applied"
    node.assert_means(*ALL)
    assert node.kernel.tables("ip") == {"proxycore-alt"}
    assert found(node) == []


def test_what_clients_put_in_is_no_drift(settled):
    key = layout.address_bytes("198.51.100.9") + layout.number(1)
    add(settled, "ip", "affinity", encode.timed_element(key, layout.number(1 << 16 | 1), 10_000, 5_000))
    assert found(settled) == []


def test_what_others_do_elsewhere_is_no_drift(settled):
    settled.nft("add", "table", "inet", "mine")
    assert found(settled) == []
    assert not settled.verify().checked


def test_every_service_is_named_when_its_table_is_gone(settled):
    mirror = settled.backend._tables["IPv4"].mirror
    names = {str(name) for name in mirror.entries}
    settled.nft("delete", "table", "ip", mirror.name)
    hit = {service for service, what in all_found(settled) if what == f"has no rules in ip {mirror.name}"}
    assert hit == names != set()
