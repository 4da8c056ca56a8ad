"""The constant text: what it depends on, that it hangs together, and that nft takes it."""

from __future__ import annotations

import re
import subprocess

import msgspec
import pytest

from proxycore.api import ConfigError, LocalPodsByCIDR, LocalPodsByInterface, NodePortAddresses
from proxycore.testing.states import host
from proxycore_nft import layout, skeleton
from proxycore_nft.fake import FakeKernel
from proxycore_nft.native import _FIELDS
from proxycore_nft.rows import SERVICE_SETS
from proxycore_nft.skeleton import Shape, digest, hook_text, shape_of, table_text

USUAL = Shape(family="IPv4", masquerade_bit=14, node_ports_everywhere=False)
OTHERS = [
    msgspec.structs.replace(USUAL, family="IPv6"),
    msgspec.structs.replace(USUAL, masquerade_bit=15),
    msgspec.structs.replace(USUAL, node_ports_everywhere=True),
    msgspec.structs.replace(USUAL, pod_interface="cni0"),
    msgspec.structs.replace(USUAL, pod_interface="cni0", pod_interface_prefix=True),
    msgspec.structs.replace(USUAL, pod_interface="cni1"),
]


def test_every_facet_of_the_configuration_has_a_digest_of_its_own():
    assert {f.name for f in msgspec.structs.fields(Shape)} == {
        "family",
        "masquerade_bit",
        "node_ports_everywhere",
        "pod_interface",
        "pod_interface_prefix",
    }
    assert len({digest(shape) for shape in (USUAL, *OTHERS)}) == 1 + len(OTHERS)


def test_another_layout_of_the_elements_has_another_digest(monkeypatch):
    before = digest(USUAL)
    monkeypatch.setattr(layout, "VERSION", layout.VERSION + 1)
    assert digest(USUAL) != before


def test_the_digest_does_not_depend_on_the_tables_name():
    for name in layout.TABLES:
        assert f"chain {skeleton.DIGEST_PREFIX}{digest(USUAL)} " in table_text(USUAL, name)


@pytest.mark.parametrize(
    "facts",
    [
        {"node_name": "other"},
        {"node_ips": ("192.168.0.9",)},
        {"node_addresses": ("192.168.0.9",)},
        {"node_ports_ipv4": NodePortAddresses(addresses=("192.168.0.9",))},
        {"service_cidrs": ()},
        {"detect_local": LocalPodsByCIDR(("10.9.0.0/16",))},
        {"detect_local": None},
        {"masquerade_all": True},
        {"zone": "b"},
    ],
    ids=lambda facts: next(iter(facts)),
)
def test_facts_that_are_elements_do_not_change_the_skeleton(facts):
    for family in ("IPv4", "IPv6"):
        assert shape_of(host(**facts), family) == shape_of(host(), family)


def test_facts_that_are_rules_change_the_skeleton():
    assert shape_of(host(masquerade_bit=3), "IPv4").masquerade_bit == 3
    everywhere = host(node_ports_ipv6=NodePortAddresses(all_local=True))
    assert not shape_of(everywhere, "IPv4").node_ports_everywhere
    assert shape_of(everywhere, "IPv6").node_ports_everywhere
    by_name = shape_of(host(detect_local=LocalPodsByInterface("cni", prefix=True)), "IPv4")
    assert (by_name.pod_interface, by_name.pod_interface_prefix) == ("cni", True)
    assert 'iifname "cni*" goto client-pod' in table_text(by_name, "T")


@pytest.mark.parametrize("name", ['a" accept', "x\ny", "", "a b", "longer-than-15-bytes", "a*", "a;b"])
def test_an_interface_that_is_no_name_never_reaches_the_text(name):
    with pytest.raises(ConfigError, match="is not the name of an interface"):
        shape_of(host(detect_local=LocalPodsByInterface(name)), "IPv4")


@pytest.mark.parametrize("shape", [USUAL, *OTHERS])
def test_every_chain_set_and_map_that_is_named_is_there(shape):
    text = table_text(shape, "T") + hook_text(shape, "T")
    kernel = FakeKernel()
    kernel.load(text)
    table = kernel.state[layout.NFT_FAMILY[shape.family], "T"]
    assert set(re.findall(r"@([\w-]+)", text)) <= table.sets.keys()
    assert set(re.findall(r"\b(?:goto|jump) ([\w-]+)", text)) <= table.chains.keys()
    assert [name for name in table.chains if table.chains[name]] == list(skeleton.HOOKS)
    # A set that nothing reads, or that cannot be shown to people, is a mistake.
    assert table.sets.keys() == set(_FIELDS["ip"]) == skeleton.SET_NAMES
    assert (
        set(SERVICE_SETS)
        | {"refusals", "classes", "affinity"}
        | {
            "node-addresses",
            "local-pods",
            "service-cidrs",
        }
        == table.sets.keys()
    )


def test_without_hooks_a_table_sees_no_packet():
    assert "hook" not in table_text(USUAL, "T")


@pytest.mark.root
@pytest.mark.parametrize("shape", [USUAL, *OTHERS])
def test_nft_takes_the_text(shape, namespace):
    text = table_text(shape, "T") + hook_text(shape, "T")
    namespace.run(["nft", "--check", "-f", "-"], stdin=text)


def test_nft_is_called_as_the_tests_do():
    """Without rights the text is at least parsed by the same program: its absence would make the rest a lie."""
    assert subprocess.run(["nft", "--version"], capture_output=True, check=True).stdout.startswith(
        b"nftables"
    )
