"""Changes of anybody show in the stamp."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from proxycore.errors import KernelError
from proxycore.kernel import xtables
from proxycore.testing.netns import Namespace
from proxycore_iptables import stamp
from proxycore_iptables.stamp import Stamp

from .edge import load, run_with

pytestmark = pytest.mark.root
PREFIXES = {"IPv4": "iptables", "IPv6": "ip6tables"}


@pytest.fixture
def namespace(tmp_path, monkeypatch) -> Iterator[Namespace]:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    with Namespace("stamp") as made:
        yield made


class Watch:
    def __init__(self, namespace: Namespace, variant, families) -> None:
        self.namespace = namespace
        self.stamps = namespace.call(lambda: stamp.stamps(variant, families))

    def read(self) -> Stamp:
        return self.namespace.call(self.stamps.read)


@pytest.fixture
def watching(namespace) -> Iterator[Callable[..., Watch]]:
    made: list[Watch] = []

    def watch(variant, families=("IPv4", "IPv6")) -> Watch:
        made.append(Watch(namespace, variant, families))
        return made[-1]

    yield watch
    for one in made:
        one.stamps.close()


@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_every_change_shows(namespace, watching, variant, family):
    watch = watching(variant)
    tool = f"{PREFIXES[family]}-{variant}"
    seen = [watch.read()]
    for change in (
        [":A - [0:0]"],
        ["-A A -j RETURN"],
        ["-A A -p tcp -m tcp --dport 80 -j RETURN"],
        ["-I OUTPUT -j A"],
        ["-D OUTPUT -j A"],
        [":B - [0:0]", "-D A -j RETURN"],
        ["-X B"],
        # The same number of entries in another chain.
        [":A - [0:0]", "-A OUTPUT -p tcp -m tcp --dport 80 -j RETURN"],
    ):
        load(namespace, tool, "*nat", *change, "COMMIT")
        now = watch.read()
        assert now != seen[-1]
        assert watch.read() == now
        seen.append(now)


def test_numbers_of_legacy_entries(namespace, watching):
    watch = watching("legacy")
    assert watch.read() == Stamp()
    assert watch.read().entries("IPv4", "nat") is None
    load(
        namespace,
        "iptables-legacy",
        "*nat",
        "COMMIT",
        "*filter",
        ":A - [0:0]",
        ":B - [0:0]",
        *["-A A -j B"] * 3,
        "COMMIT",
    )
    load(namespace, "ip6tables-legacy", "*nat", ":A - [0:0]", "-A OUTPUT -j A", "COMMIT")
    # A built-in chain has its policy, another one a head and a return, the table an end.
    now = watch.read()
    assert now.entries("IPv4", "nat") == 4 + 1
    assert now.entries("IPv4", "filter") == 3 + 2 * 2 + 3 + 1
    assert now.entries("IPv6", "nat") == 4 + 2 + 1 + 1
    # Asking makes no table.
    assert namespace.call(lambda: xtables.legacy_tables("IPv4")) == {"nat", "filter"}
    assert now.entries("IPv6", "filter") is None
    assert len(now.tables["IPv4", "nat"].hooks) == len(now.tables["IPv4", "nat"].policies) == 4


def test_one_family_alone(namespace, watching):
    watch = watching("legacy", ("IPv6",))
    load(namespace, "iptables-legacy", "*nat", ":A - [0:0]", "COMMIT")
    assert watch.read() == Stamp()


@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_another_namespace_does_not_show(namespace, watching, variant):
    watch = watching(variant)
    before = watch.read()
    with Namespace("other") as other:
        load(other, f"iptables-{variant}", "*nat", ":A - [0:0]", "COMMIT")
    assert watch.read() == before


def test_each_commit_is_one_generation(namespace, watching):
    watch = watching("nft")
    load(namespace, "iptables-nft", "*nat", ":A - [0:0]", "COMMIT")
    first = watch.read().generation
    load(
        namespace,
        "iptables-nft",
        "*nat",
        ":B - [0:0]",
        "-A A -j B",
        "COMMIT",
        "*filter",
        ":C - [0:0]",
        "COMMIT",
    )
    assert watch.read().generation == first + 2
    assert watch.read().entries("IPv4", "nat") is None


CODE = """
from proxycore.errors import KernelError
from proxycore_iptables.stamp import stamps
try:
    print(stamps(VARIANT, ("IPv4", "IPv6")).read())
except KernelError as error:
    print(error.errno, error)
"""


@pytest.mark.parametrize(
    ("variant", "capabilities", "said"),
    [
        ("legacy", "net_admin,net_raw", "Stamp(generation=None, tables={('IPv4', 'nat'): TableStamp(entries=7,"),
        ("legacy", "net_admin", "1 cannot open a raw IPv4 socket: Operation not permitted; that needs CAP_NET_RAW, which"),
        ("legacy", "net_raw", "1 cannot ask for IPv4 table nat: Operation not permitted; that needs CAP_NET_ADMIN, which"),
        ("nft", "net_admin", "Stamp(generation="),
        ("nft", "net_raw", "1 cannot read the ruleset's generation: Operation not permitted"),
    ],
)  # fmt: skip
def test_rights(namespace, variant, capabilities, said):
    load(namespace, f"iptables-{variant}", "*nat", ":A - [0:0]", "COMMIT")
    assert run_with(namespace, capabilities, CODE.replace("VARIANT", repr(variant))).startswith(said)


def test_a_closed_one_reads_nothing(namespace, watching):
    watch = watching("legacy")
    watch.stamps.close()
    watch.stamps.close()
    assert watch.read() == Stamp()
    nft = watching("nft")
    nft.stamps.close()
    with pytest.raises(KernelError):
        nft.read()
