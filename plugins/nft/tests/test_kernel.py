"""The backend on the kernel's own nf_tables: what operators see, who else lives there, what survives."""

from __future__ import annotations

import errno
import json
import re
import socket

import pytest

from proxycore.api import FrontendKind, KernelError, NodePortAddresses, WhenEmpty
from proxycore.testing.states import (
    EXTERNAL_LOCAL,
    batch,
    context,
    endpoint,
    frontend,
    full,
    host,
    name_of,
    node_port,
    numbered,
    pool,
    service,
)
from proxycore_nft import encode, layout, skeleton
from proxycore_nft.kernel import NetlinkKernel

from .meaning import live_table, number

pytestmark = pytest.mark.root
SO_SNDBUFFORCE = 32


def everything(family="IPv4", affinity=None):
    """A Service with every kind of frontend, and one without endpoints."""
    four = family == "IPv4"
    vips = ["172.30.0.41", "192.0.2.10"] if four else ["fd00:172:30::41", "2001:db8:5::10"]
    ranges = ["198.51.100.0/24", "203.0.113.7/32"] if four else ["2001:db8:9::/64", "2001:db8:a::7/128"]
    near, far = ("10.0.0.1:80", "10.0.1.1:80") if four else ("[fd00:10::1]:80", "[fd00:10:0:1::1]:80")
    suffix = f"-{affinity}" if affinity else ""
    shift = 1 if affinity else 0
    web = service(
        name_of(f"web{suffix}", family=family),
        frontend(vips[0], 80 + shift),
        frontend(
            vips[1],
            80 + shift,
            kind=FrontendKind.LOAD_BALANCER_IP,
            routes=EXTERNAL_LOCAL,
            source_ranges=ranges,
        ),
        node_port(30080 + shift, routes=EXTERNAL_LOCAL),
        cluster=pool(endpoint(near, local=True), endpoint(far)),
        local=pool(endpoint(near, local=True)),
        affinity=affinity,
    )
    empty = service(
        name_of(f"empty{suffix}", "", "UDP", family=family),
        frontend(vips[0], 5300 + shift, protocol="UDP"),
        cluster=pool(when_empty=WhenEmpty.DROP),
    )
    return [web, empty]


ALL = [
    state for family in ("IPv4", "IPv6") for affinity in (None, 10) for state in everything(family, affinity)
]


# -- what operators see --


@pytest.mark.parametrize("facts", [host(), host(node_ports_ipv4=NodePortAddresses(all_local=True))])
def test_nft_lists_every_table_as_text_and_json(facts, node):
    node.run(*ALL, numbered(7, 40), numbered(7, 40, family="IPv6", affinity=77), facts=facts)
    text = node.nft("list", "ruleset")
    assert "172.30.0.41 . tcp . 80" in text
    assert 'comment "default/web:http"' in text
    assert "sticky-40-77" in text
    listed = json.loads(node.nft("-j", "list", "ruleset"))["nftables"]
    names = {entry["map"]["name"] for entry in listed if "map" in entry}
    assert {"frontends", "affinity"} <= names
    # One statement (deleting from a map) is in no version's JSON; the listing of each table alone works as well.
    for nft in ("ip", "ip6"):
        for name in ("frontends", "affinity", "endpoints"):
            node.nft("list", "map", nft, "proxycore", name)


def test_a_started_table_is_seen_by_no_packet(node):
    node.start()
    assert "hook" not in node.nft("list", "ruleset")


def test_probing_leaves_no_trace(node):
    before = node.ruleset()
    found = node.call("probe", context())
    assert found.problems == ()
    assert found.facts["nft"].startswith("v")
    assert node.ruleset() == before


def test_a_plan_says_what_is_done_and_after_it_nothing_is_left_to_do(node):
    given = full(*ALL)
    plan = node.call("plan", context(), given)
    assert {operation.verb for operation in plan} == {"add"}
    assert node.ruleset() == ""
    node.run(*ALL)
    assert node.call("plan", context(), given) == ()
    smaller = node.call("plan", context(), full(*ALL[1:]))
    assert {operation.verb for operation in smaller} == {"delete"}
    assert {operation.service for operation in node.call("plan", context(), full(*ALL, numbered(3, 2)))} == {
        "default/s3:http"
    }


def test_what_is_shown_of_a_service_is_in_the_kernel(node):
    node.run(*ALL)
    text = node.nft("list", "ruleset")
    for state in ALL:
        shown = node.call("inspect", state.name)
        assert {item.place.split()[2] for item in shown} >= {"frontends", "cluster-ips", "pools"}
        for item in shown:
            if item.place.endswith("cluster-ips"):
                assert item.native in text
    web = node.call("inspect", ALL[0].name)
    assert any("192.0.2.10 . tcp . 80 . 198.51.100.0-198.51.100.255" in item.native for item in web)


# -- who else lives there --

FOREIGN = """
table inet cni {
	set peers {
		type ipv4_addr
		flags interval
		elements = { 10.0.0.0/8, 192.0.2.1 }
	}
	map proxycore {
		type ipv4_addr : verdict
		elements = { 192.0.2.7 : drop }
	}
	chain services {
		ip saddr @peers counter accept
	}
	chain input {
		type filter hook input priority 0; policy accept;
		jump services
	}
	chain nat-prerouting {
		type nat hook prerouting priority -100;
		ip daddr 192.0.2.99 tcp dport 80 dnat ip to 10.9.9.9
	}
}
table ip proxycore-mine {
	chain frontends {
	}
}
"""


def foreign(node) -> str:
    """All that is not ours, byte by byte, handles included."""
    parts = [
        node.nft("-a", "-s", "list", "table", *table) for table in (("inet", "cni"), ("ip", "proxycore-mine"))
    ]
    return "\n".join(parts)


def test_what_others_have_stays_byte_by_byte(node):
    node.nft("-f", "-", stdin=FOREIGN)
    commands = {4: "iptables-nft", 6: "ip6tables-nft"}
    for command in commands.values():
        node.namespace.run([command, "-t", "nat", "-A", "POSTROUTING", "-o", "eth7", "-j", "MASQUERADE"])
        node.namespace.run([command, "-A", "FORWARD", "-p", "tcp", "--dport", "77", "-j", "ACCEPT"])

    def others() -> str:
        return foreign(node) + "".join(
            re.sub("(?m)^#.*$", "", node.namespace.run([f"{command}-save"]).stdout)
            for command in commands.values()
        )

    before, everybody = others(), node.ruleset()
    node.run(*ALL)
    assert others() == before
    node.apply(batch(numbered(3, 5), removed=[ALL[0].name]))
    node.apply(full(*ALL[2:], facts=host(masquerade_bit=3)))
    node.run(*ALL)
    assert others() == before
    node.backend.proxycore_backend_stop()
    removed = node.call("cleanup", context()).removed
    assert len(removed) == 2
    assert node.ruleset() == everybody
    assert node.call("cleanup", context()).removed == ()


def test_cleaning_up_leaves_nothing_of_any_version(node):
    node.run(*ALL)
    node.nft(
        "-f", "-", stdin=skeleton.table_text(skeleton.shape_of(host(), "IPv6"), "proxycore-alt", "older")
    )
    node.backend.proxycore_backend_stop()
    removed = node.call("cleanup", context()).removed
    assert sorted(removed) == ["table ip proxycore", "table ip6 proxycore", "table ip6 proxycore-alt"]
    assert node.ruleset() == ""


# -- restarts --


def _entries(node):
    return {
        name: (entry.index, dict(zip(entry.cluster.targets, entry.cluster.handles, strict=False)))
        for table in node.backend._tables.values()
        for name, entry in table.mirror.entries.items()
    }


def test_a_restart_keeps_table_indexes_handles_and_classes(node):
    states = [*ALL, numbered(7, 40, affinity=77)]
    node.run(*states)
    known = _entries(node)
    structure = re.findall(r"(?m)^(?:table|\tchain).*# handle \d+$", node.ruleset())
    classes = dict(node.backend._tables["IPv4"].mirror.classes)
    node.run(*reversed(states))
    assert node.adopted is not None
    assert node.adopted.startswith("table ip proxycore, ")
    assert _entries(node) == known
    assert node.backend._tables["IPv4"].mirror.classes == classes
    assert re.findall(r"(?m)^(?:table|\tchain).*# handle \d+$", node.ruleset()) == structure
    assert not node.verify().checked
    node.assert_means(*states)


def remember_client(node, client: str, state, timeout_ms: int, left_ms: int) -> tuple[bytes, bytes]:
    """Put a client's choice into the map as a packet would: its endpoint is the Service's last one."""
    entry = node.backend._tables[state.name.family].mirror.entries[state.name]
    nft = layout.NFT_FAMILY[state.name.family]
    key = layout.address_bytes(client) + layout.number(entry.index)
    handle = layout.number(entry.cluster.handles[-1])
    element = encode.timed_element(key, handle, timeout_ms, left_ms)
    payload = encode.set_head(live_table(node.kernel, nft), "affinity") + encode.nest(3, element)
    node.kernel.commit([encode.Body(encode.NEWSETELEM, encode.F_CREATE, nft, payload)])
    return key, handle


def remembered(node, nft: str) -> dict[bytes, tuple[bytes | None, int, int]]:
    found = node.kernel.elements(nft, live_table(node.kernel, nft), "affinity")
    return {item.key: (item.data, item.timeout, item.expiration) for item in found}


def _tamper(node, nft: str) -> None:
    node.nft("flush", "chain", nft, "proxycore", "services")


def _age(node, nft: str) -> None:
    """As another version of the text would be: its digest is the name of a chain."""
    [marker] = [c for c in node.kernel.chains(nft, "proxycore") if c.startswith(skeleton.DIGEST_PREFIX)]
    node.nft("rename", "chain", nft, "proxycore", marker, "skeleton-0123456789ab")


@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
@pytest.mark.parametrize("disturb", [None, _tamper, _age])
def test_a_table_that_is_replaced_hands_on_what_clients_keep_to(family, disturb, node):
    """It is replaced for another configuration, or for what was done to it while no proxy ran."""
    nft = layout.NFT_FAMILY[family]
    state = numbered(7, 5, family=family, affinity=600)
    client = "198.51.100.9" if family == "IPv4" else "2001:db8:77::9"
    node.run(*ALL, state)
    key, handle = remember_client(node, client, state, 600_000, 400_000)
    if disturb is not None:
        disturb(node, nft)
    node.run(*ALL, state, facts=host(masquerade_bit=5) if disturb is None else None)
    assert node.kernel.tables(nft) == {"proxycore-alt"}
    data, timeout, left = remembered(node, nft)[key]
    assert (data, timeout) == (handle, 600_000)
    assert 300_000 < left <= 400_000
    assert number(handle) in node.backend._tables[family].mirror.entries[state.name].cluster.handles
    node.assert_means(*ALL, state)
    node.nft("list", "ruleset")


def test_a_rewrite_leaves_what_clients_keep_to(node):
    state = numbered(7, 5, affinity=600)
    node.run(state)
    key, handle = remember_client(node, "198.51.100.9", state, 600_000, 400_000)
    node.apply(full(state, numbered(8, 3)))
    assert remembered(node, "ip")[key][0] == handle
    node.run(state)
    assert remembered(node, "ip")[key][0] == handle


# -- refusals and faults --


def test_the_kernel_names_the_service_that_it_refuses(node):
    node.run(numbered(1, 3), numbered(2, 3))
    before = node.nft("-s", "list", "ruleset")
    thief = service(name_of("thief"), *numbered(1).frontends, cluster=["10.9.9.9:80"])
    many = [numbered(n, 10) for n in range(10, 300)]
    result = node.apply(batch(*many[:150], thief, *many[150:]))
    assert result.outcome == "rejected"
    assert [(c.name, c.why) for c in result.culprits] == [
        (thief.name, "nf_tables refused its elements of frontends: EEXIST")
    ]
    assert node.nft("-s", "list", "ruleset") == before
    assert node.apply(batch(*many)).outcome == "applied"
    node.assert_means(numbered(1, 3), numbered(2, 3), *many)


def test_a_transaction_that_does_not_fit_the_socket_changes_nothing_and_can_be_sent_again(node):
    kernels: list[NetlinkKernel] = []

    def small() -> NetlinkKernel:
        kernels.append(NetlinkKernel())
        return kernels[-1]

    node.start(open_kernel=small)
    node.apply(full(numbered(1, 3)))
    send_buffer = kernels[0]._socket.socket
    send_buffer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    many = [numbered(n, 50) for n in range(10, 60)]
    with pytest.raises(KernelError, match=r"cannot send [0-9]+ bytes by netlink: Message too long") as caught:
        node.apply(batch(*many))
    assert caught.value.errno == errno.EMSGSIZE
    node.assert_means(numbered(1, 3))
    # What is small goes through: nothing was sent, so that nothing has to be written anew.
    result = node.apply(batch(numbered(1, 4)))
    assert (result.outcome, result.operations) == ("applied", 3)
    send_buffer.setsockopt(
        socket.SOL_SOCKET, socket.SO_SNDBUFFORCE if hasattr(socket, "SO_SNDBUFFORCE") else 32, 8 << 20
    )
    assert node.apply(batch(*many)).outcome == "applied"
    node.assert_means(numbered(1, 4), *many)


def test_many_messages_are_one_transaction(node):
    """20,000 endpoints do not fit one message."""
    states = [numbered(n, 100) for n in range(200)]
    node.start()
    before = node.kernel.generation()
    result = node.apply(full(*states))
    assert result.operations > 20_000
    assert node.kernel.generation() == before + 2, "elements, then hooks"
    node.assert_means(*states)


def test_without_nft_the_message_says_what_to_install(node, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match=r"nft is not installed \(package nftables\)"):
        node.start()
    assert "not installed" in node.call("probe", context()).problems[0]
