"""The rules on iptables-legacy: they load, are printed as they are written, and go without a trace."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from proxycore.testing.netns import Namespace
from proxycore_ipvs import netrules
from proxycore_ipvs.contents import spec_of
from proxycore_ipvs.entries import SetKind, SetName
from proxycore_ipvs.ids import Target
from proxycore_ipvs.marks import Marks
from proxycore_ipvs.netrules import Jump, Place, jumps, load, rules, unload
from proxycore_ipvs.shape import Shape

pytestmark = [pytest.mark.root, pytest.mark.ipvs]
CLASSES = {Target("UDP", 53): 1, Target("TCP", 8080): 1, Target("SCTP", 80): 15}
SHAPES = {
    "cidr": Shape(family="IPv4", local_pods="-s 10.0.0.0/8"),
    "bridge": Shape(family="IPv4", local_pods="-i cni0", marks=Marks.with_masquerade_bit(21)),
    "none": Shape(family="IPv4", random_fully=False),
    "everyone": Shape(family="IPv4", local_pods="-s 0.0.0.0/0"),
    "cidr6": Shape(family="IPv6", local_pods="-s fd00:10::/64"),
    "mapped6": Shape(family="IPv6", local_pods="-s ::1:0/112"),
    "prefix6": Shape(family="IPv6", local_pods="-i veth+"),
}


class Node:
    """iptables-legacy of one family in a namespace."""

    def __init__(self, namespace: Namespace, shape: Shape) -> None:
        self.namespace = namespace
        self.shape = shape
        self.program = "iptables-legacy" if shape.family == "IPv4" else "ip6tables-legacy"

    def restore(self, text: str) -> None:
        self.namespace.run([f"{self.program}-restore", "--noflush"], stdin=text)

    def saved(self) -> list[str]:
        return str(self.namespace.run([f"{self.program}-save"]).stdout).splitlines()

    def there(self) -> tuple[Mapping[Place, tuple[str, ...]], set[Jump]]:
        """Our chains, and the jumps to them."""
        table, chains, found = "", {}, set()
        for line in self.saved():
            if line.startswith("*"):
                table = line[1:]
            elif line.startswith(":PX-"):
                chains[Place(table, line[1:].split()[0])] = []
            elif line.startswith("-A "):
                _, chain, rule = line.split(" ", 2)
                if chain.startswith("PX-"):
                    chains[Place(table, chain)].append(rule)
                else:
                    found.add(Jump(table, chain, rule.removeprefix("-j ")))
        return {place: tuple(found) for place, found in chains.items()}, found


@pytest.fixture(params=SHAPES)
def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Node:
    """With all sets there."""
    shape = SHAPES[request.param]
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    if shutil.which("iptables-legacy") is None:
        pytest.skip("iptables-legacy is not installed")
    namespace: Namespace = request.getfixturevalue("namespace")
    made = Node(namespace, shape)
    with_security = namespace.run([made.program, "-t", "security", "-S"], check=False).returncode == 0
    made.shape = msgspec.structs.replace(shape, security=with_security)
    text = "".join(f"{spec_of(SetName(shape.family, kind))}\n" for kind in SetKind)
    namespace.run(["ipset", "restore"], stdin=text)
    return made


def test_what_is_loaded_is_printed_as_it_is_written(node):
    wanted = rules(node.shape, CLASSES, ("TCP", "UDP", "SCTP"))
    node.restore(load(wanted, jumps(node.shape)))
    chains, found = node.there()
    assert chains == wanted
    assert found == set(jumps(node.shape))

    fewer = rules(node.shape, {}, ())
    node.restore(load(fewer))
    chains, found = node.there()
    assert chains == fewer
    assert found == set(jumps(node.shape))

    node.restore(unload(list(chains), found))
    assert node.there() == ({}, set())
    # Nothing refers to the sets any more.
    node.namespace.run(["ipset", "destroy"])


def test_routes_lead_marked_packets_here(node):
    for each in netrules.policy_routes(node.shape):
        node.namespace.run(str(each).split())
    version = "-4" if node.shape.family == "IPv4" else "-6"
    ours = f"{node.shape.marks.ours:#x}"
    listed = str(node.namespace.run(["ip", version, "rule"]).stdout)
    assert [line.split(":")[0] for line in listed.splitlines() if f"fwmark {ours}/{ours}" in line] == [
        "299",
        "300",
    ]
    routes = str(node.namespace.run(["ip", version, "route", "show", "table", "310"]).stdout)
    assert "local default dev lo" in routes


def test_the_sysctls_are_there(node):
    for each in netrules.SYSCTLS:
        path = Path("/proc/sys") / each.path
        node.namespace.call(lambda path=path, each=each: path.write_text(each.value))
        assert node.namespace.call(lambda path=path: path.read_text().strip()) == each.value
