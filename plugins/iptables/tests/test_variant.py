"""Which kind of iptables is the host's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from proxycore.errors import KernelError
from proxycore.kernel import nftables, xtables
from proxycore.testing.netns import Namespace
from proxycore_iptables import variant
from proxycore_iptables.variant import Chosen, Found

from .edge import load, run_with

pytestmark = pytest.mark.root
BOTH = ("IPv4", "IPv6")


@pytest.fixture
def namespace(tmp_path, monkeypatch) -> Iterator[Namespace]:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    with Namespace("variant") as made:
        yield made


def choose(namespace: Namespace, wanted="auto", families=BOTH, without=()) -> Chosen:
    tools = [found for found in xtables.find() if str(found) not in without]
    return namespace.call(lambda: variant.choose(families, wanted, lambda: tools))


def canary(namespace: Namespace, name: str, chain: str = "KUBE-KUBELET-CANARY") -> None:
    load(namespace, name, "*mangle", f":{chain} - [0:0]", "COMMIT")


def rules(namespace: Namespace, name: str, number: int, chain: str = "FOREIGN") -> None:
    load(namespace, name, "*nat", f":{chain} - [0:0]", *[f"-A {chain} -j RETURN"] * number, "COMMIT")


def tables_there(namespace: Namespace) -> set[str]:
    def read() -> set[str]:
        with nftables.NfTables() as kernel:
            return {
                *(f"{family} {name}" for family in ("ip", "ip6") for name in kernel.tables(family)),
                *(f"legacy {name}" for family in BOTH for name in xtables.legacy_tables(family) or ()),
            }

    return namespace.call(read)


def test_nothing_there_is_nft_and_stays_nothing(namespace):
    chosen = choose(namespace)
    assert (chosen.variant, chosen.why, chosen.others) == ("nft", "there are no rules yet", ())
    assert {family: str(tools) for family, tools in chosen.tools.items()} == {
        "IPv4": "iptables-nft",
        "IPv6": "ip6tables-nft",
    }
    assert tables_there(namespace) == set()


@pytest.mark.parametrize("chain", ["KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT"])
@pytest.mark.parametrize("name", ["ip6tables-legacy", "iptables-nft", "iptables-legacy"])
def test_a_chain_of_the_kubelet_outweighs_rules(namespace, name, chain):
    canary(namespace, name, chain)
    other = "iptables-legacy" if name.endswith("nft") else "iptables-nft"
    rules(namespace, other, 3)
    chosen = choose(namespace)
    assert chosen.variant == name.partition("-")[2]
    assert chosen.why == f"the kubelet uses it (chain {chain})"
    assert chosen.others == (f"3 {other} rules",)


def test_nft_comes_first_of_two_such_chains(namespace):
    canary(namespace, "iptables-legacy")
    canary(namespace, "ip6tables-nft")
    chosen = choose(namespace)
    assert chosen.variant == "nft"
    assert chosen.others == ("0 iptables-legacy rules, KUBE-* chains among them",)


def test_such_a_chain_in_another_table_says_nothing(namespace):
    load(namespace, "iptables-legacy", "*filter", ":KUBE-KUBELET-CANARY - [0:0]", "COMMIT")
    assert choose(namespace).variant == "nft"


def test_more_rules_win(namespace):
    rules(namespace, "iptables-legacy", 2, "KUBE-SERVICES")
    rules(namespace, "iptables-nft", 1)
    chosen = choose(namespace)
    assert (chosen.variant, chosen.why) == ("legacy", "2 rules are there, 1 in iptables-nft")
    assert chosen.others == ("1 iptables-nft rule",)
    rules(namespace, "ip6tables-nft", 1)
    chosen = choose(namespace)
    assert (chosen.variant, chosen.why) == ("nft", "2 rules are there, 2 in iptables-legacy")
    assert chosen.others == ("2 iptables-legacy rules, KUBE-* chains among them",)
    # Rules of a family that is not ours do not count.
    assert choose(namespace, families=("IPv4",)).variant == "legacy"


def test_the_configuration_decides(namespace):
    canary(namespace, "iptables-nft")
    chosen = choose(namespace, "legacy")
    assert (chosen.variant, chosen.why) == ("legacy", "the configuration says legacy")
    assert chosen.others == ("0 iptables-nft rules, KUBE-* chains among them",)
    assert "legacy filter" not in tables_there(namespace)


def test_without_programs_it_says_what_to_install(namespace):
    with pytest.raises(KernelError, match=r"ip6tables-nft-restore are not installed \(package iptables\)$"):
        namespace.call(lambda: variant.choose(BOTH, "auto", lambda: ()))
    with pytest.raises(
        KernelError,
        match=r"^the programs ip6tables-nft-save, ip6tables-nft-restore are not installed \(package iptables\); "
        r"here there are those of ip6tables-legacy, iptables-legacy, iptables-nft$",
    ):
        choose(namespace, "nft", without=("ip6tables-nft",))
    assert choose(namespace, "nft", ("IPv4",), without=("ip6tables-nft",)).variant == "nft"


def test_only_one_is_here(namespace):
    rules(namespace, "iptables-nft", 4)
    chosen = choose(namespace, without=("iptables-nft", "ip6tables-nft"))
    assert chosen.variant == "legacy"
    assert chosen.why == "iptables-nft cannot be used: its programs are not installed"
    assert chosen.others == ("iptables-nft tables nat, and no iptables-nft-save to read them",)


def test_one_that_does_not_work(namespace):
    tools = [
        found._replace(save="/bin/false") if found.variant == "nft" else found for found in xtables.find()
    ]
    chosen = namespace.call(lambda: variant.choose(BOTH, "auto", lambda: tools))
    assert chosen.variant == "legacy"
    assert chosen.why == "iptables-nft cannot be used: /bin/false ended with 1: it said nothing"
    with pytest.raises(KernelError, match=r"^iptables-nft does not work here: /bin/false"):
        namespace.call(lambda: variant.choose(BOTH, "nft", lambda: tools))
    rules(namespace, "ip6tables-nft", 1)
    with pytest.raises(KernelError, match=r"^ip6tables-nft has tables here that cannot be read: /bin/false"):
        namespace.call(lambda: variant.choose(BOTH, "auto", lambda: tools))


CODE = """
from proxycore.errors import KernelError
from proxycore_iptables import variant
try:
    print(variant.choose(("IPv4", "IPv6"), WANTED).variant)
except KernelError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("capabilities", "wanted", "said"),
    [
        ("net_admin", "auto", "nft"),
        ("net_admin,net_raw", "legacy", "legacy"),
        (
            "net_admin",
            "legacy",
            "iptables-legacy does not work here: it needs CAP_NET_RAW, which this process lacks",
        ),
        (
            "net_raw",
            "auto",
            "no iptables works here: iptables-legacy: it needs CAP_NET_ADMIN, which this process",
        ),
    ],
)
def test_rights(namespace, capabilities, wanted, said):
    assert run_with(namespace, capabilities, CODE.replace("WANTED", repr(wanted))).startswith(said)


def test_tables_that_need_a_right_we_lack_are_no_reason_for_the_other(namespace):
    rules(namespace, "iptables-legacy", 1)
    said = run_with(namespace, "net_admin", CODE.replace("WANTED", "'auto'"))
    assert said.startswith("iptables-legacy has tables here that cannot be read: it needs CAP_NET_RAW")


def test_a_listing():
    assert variant.scan(
        ["# x", "*nat\n", ":KUBE-SERVICES - [0:0]\n", "-A KUBE-SERVICES -j DROP\n", "*mangle\n", ":KUBE-IPTABLES-HINT - [0:0]\n"]
    ) == Found(rules=1, kube=True, hint="KUBE-IPTABLES-HINT")  # fmt: skip
    assert variant.scan(["*nat\n", ":KUBE-IPTABLES-HINT - [0:0]\n"]) == Found(kube=True)
