"""Finding and taking away what kube-proxy left: on the real kernel, beside what belongs to others."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from proxycore.errors import KernelError
from proxycore.kernel import kubeproxy, xtables
from proxycore.testing.netns import Namespace

from .rules import IPVS, PREFIX, SETS, VARIANTS, Served, kube_proxy, load, others, saved

pytestmark = pytest.mark.root

SERVICES = (
    Served("default/web:http", "172.30.0.41", ("10.180.0.1:8080", "10.180.0.2:8080"), 30041, "5.6.7.8"),
    Served("default/none:http", "172.30.0.42"),
    Served("default/web6:http", "fd00:172:30::41", ("[fd00:10::1]:8080",), 30041),
)
POD_CIDR = {"IPv4": "10.0.0.0/8", "IPv6": "fd00:10::/64"}


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace("census") as made:
        yield made


def load_kube_proxy(namespace: Namespace, variant: str) -> None:
    for family in PREFIX:
        load(namespace, variant, family, kube_proxy(SERVICES, family, pod_cidr=POD_CIDR[family]))


def clean(namespace: Namespace, **options) -> list[str]:
    told: list[str] = []

    def work() -> None:
        kubeproxy.remove(kubeproxy.census(**options), told.append)

    namespace.call(work)
    return told


def listings(namespace: Namespace) -> dict[tuple[str, str], str]:
    return {(variant, family): saved(namespace, variant, family) for variant in VARIANTS for family in PREFIX}


def test_an_empty_namespace_has_nothing(namespace):
    found = namespace.call(kubeproxy.census)
    assert found == kubeproxy.Census()
    assert (found.found, found.removable, found.at_work) == (False, False, False)


@pytest.mark.parametrize("uses_mark", [False, True])
def test_all_of_kube_proxys_goes_and_all_of_others_stays(namespace, uses_mark):
    """Both variants and families at once."""
    for variant in VARIANTS:
        for family in PREFIX:
            load(namespace, variant, family, others(family, uses_mark=uses_mark))
    before = listings(namespace)
    assert all("KUBE-KUBELET-CANARY" in text for text in before.values())
    for variant in VARIANTS:
        load_kube_proxy(namespace, variant)
    found = namespace.call(kubeproxy.census)
    assert len(found.rules) == 12
    assert (found.removable, found.at_work, found.unread) == (True, True, ())
    told = clean(namespace)
    assert listings(namespace) == before
    assert sum("-j KUBE-SERVICES" in line for line in told) == 4 * 4
    assert not namespace.call(kubeproxy.census).found
    assert clean(namespace) == []


def test_filter_rules_go_first(namespace):
    load_kube_proxy(namespace, "legacy")
    load_kube_proxy(namespace, "nft")
    tables = [rules.table for _, rules in namespace.call(kubeproxy.census).rules]
    assert tables == ["filter"] * 4 + ["mangle", "nat"] * 4


def test_what_the_backend_in_force_owns_is_not_looked_at(namespace):
    load_kube_proxy(namespace, "nft")
    namespace.run(["nft", "add", "table", "ip6", "kube-proxy"])
    assert not namespace.call(lambda: kubeproxy.census(without=("iptables", "nftables"))).found
    assert namespace.call(lambda: kubeproxy.census(without=("iptables",))).nft_tables == (
        ("ip6", "kube-proxy"),
    )


def test_tables_of_the_nftables_mode(namespace):
    for family in ("ip", "ip6", "inet"):
        namespace.run(["nft", "add", "table", family, "kube-proxy"])
        namespace.run(["nft", "add", "table", family, "kube-proxy-of-mine"])
    assert clean(namespace) == ["nftables: table ip kube-proxy", "nftables: table ip6 kube-proxy"]
    left = namespace.run(["nft", "list", "tables"]).stdout
    assert sorted(left.split("\n"))[1:] == [
        "table inet kube-proxy",
        "table inet kube-proxy-of-mine",
        "table ip kube-proxy-of-mine",
        "table ip6 kube-proxy-of-mine",
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_ipvs_mode_leaves(namespace, variant):
    """A bridge stands for the dummy link, which not every kernel has; virtual servers need IPVS."""
    namespace.run(["ipset", "restore"], stdin=SETS)
    load(namespace, variant, "IPv4", IPVS)
    namespace.ip(
        ["link", "add", "kube-ipvs0", "type", "bridge"],
        ["addr", "add", "172.30.0.41/32", "dev", "kube-ipvs0"],
        ["addr", "add", "fd00:172:30::41/128", "dev", "kube-ipvs0", "nodad"],
    )
    found = namespace.call(kubeproxy.census)
    assert found.link
    assert len(found.sets) == 5
    told = clean(namespace)
    assert told[-1] == "link kube-ipvs0"
    assert sorted(line for line in told if line.startswith("IP set"))[0] == "IP set KUBE-6-CLUSTER-IP"
    assert namespace.run(["ipset", "list", "-n"]).stdout.split() == ["KUBE-OF-MINE"]
    assert "KUBE" not in saved(namespace, variant, "IPv4")
    assert "kube-ipvs0" not in namespace.run(["ip", "link"]).stdout
    assert not namespace.call(kubeproxy.census).found


def test_a_set_that_others_use_stays_and_the_rest_goes(namespace, monkeypatch):
    monkeypatch.setattr(kubeproxy, "_SET_SECONDS", 0.1)
    namespace.run(["ipset", "restore"], stdin=SETS)
    namespace.run(
        [
            "iptables-legacy",
            "-w",
            "-A",
            "INPUT",
            "-m",
            "set",
            "--match-set",
            "KUBE-IPVS-IPS",
            "dst",
            "-j",
            "DROP",
        ]
    )
    with pytest.raises(
        KernelError, match="KUBE-IPVS-IPS cannot be destroyed: rules or other sets refer to it"
    ):
        clean(namespace)
    assert sorted(namespace.run(["ipset", "list", "-n"]).stdout.split()) == ["KUBE-IPVS-IPS", "KUBE-OF-MINE"]


def test_without_the_tools_it_says_what_it_cannot_reach(namespace, monkeypatch):
    load_kube_proxy(namespace, "nft")
    load_kube_proxy(namespace, "legacy")
    monkeypatch.setattr(xtables, "find", lambda: ())
    found = namespace.call(kubeproxy.census)
    assert (found.found, found.removable) == (True, False)
    assert [("iptables-nft-save" in line, "filter, mangle, nat" in line) for line in found.out_of_reach] == [
        (True, True)
    ] * 2
    assert len(found.unread) == 2
    assert all("iptables-legacy-save" in line for line in found.unread)


def test_a_table_that_iptables_cannot_read_is_named(namespace):
    load_kube_proxy(namespace, "nft")
    namespace.run(
        ["nft", "add", "rule", "ip", "nat", "PREROUTING", "numgen", "random", "mod", "2", "1", "accept"]
    )
    found = namespace.call(kubeproxy.census)
    if not found.out_of_reach:
        pytest.skip("this iptables reads what it does not know")
    [line] = found.out_of_reach
    assert "iptables-nft table nat, which holds rules that iptables cannot read" in line


def test_a_failing_tool_is_told_and_no_obstacle(namespace, monkeypatch):
    load_kube_proxy(namespace, "legacy")
    tools = [found._replace(save="false") if found.family == "IPv6" else found for found in xtables.find()]
    monkeypatch.setattr(xtables, "find", lambda: tuple(tools))
    found = namespace.call(kubeproxy.census)
    assert {tool.family for tool, _ in found.rules} == {"IPv4"}
    [reason] = found.unread
    assert "ip6tables-legacy cannot be read: false ended with 1" in reason


def test_a_foreign_rule_that_came_meanwhile_is_not_lost(namespace):
    """Looked, then an operator inserts a rule before kube-proxy's jumps, then the removal is written."""
    load_kube_proxy(namespace, "legacy")
    found = namespace.call(kubeproxy.census)
    namespace.run(["iptables-legacy", "-w", "-I", "FORWARD", "1", "-s", "9.9.9.9", "-j", "DROP"])
    namespace.call(lambda: kubeproxy.remove(found, lambda line: None))
    assert saved(namespace, "legacy", "IPv4").count("-A ") == 1
    assert "-A FORWARD -s 9.9.9.9/32 -j DROP" in saved(namespace, "legacy", "IPv4")


def test_a_rule_of_others_that_came_meanwhile_makes_it_look_again(namespace):
    load_kube_proxy(namespace, "nft")
    found = namespace.call(kubeproxy.census)
    namespace.run(["iptables-nft", "-N", "MINE", "-t", "nat"])
    namespace.run(["iptables-nft", "-A", "MINE", "-t", "nat", "-j", "KUBE-MARK-MASQ"])
    with pytest.raises(KernelError):
        namespace.call(lambda: kubeproxy.remove(found, lambda line: None))
    clean(namespace)
    assert not namespace.call(kubeproxy.census).removable
    assert "-A KUBE-MARK-MASQ" in saved(namespace, "nft", "IPv4")


def test_a_dropping_policy_is_warned_of(namespace):
    load_kube_proxy(namespace, "nft")
    assert namespace.call(kubeproxy.census).warnings() == ()
    namespace.run(["ip6tables-nft", "-P", "FORWARD", "DROP"])
    [warning] = namespace.call(kubeproxy.census).warnings()
    assert warning.startswith("ip6tables-nft drops forwarded packets")


SCRIPT = """
import sys
from proxycore.kernel import kubeproxy
kubeproxy.remove(kubeproxy.census(), lambda line: print(line, flush=True))
"""


@pytest.mark.parametrize("after_lines", [0, 1, 5, 20, 33])
def test_killed_in_the_middle_and_taken_up_again(namespace, after_lines):
    for variant in VARIANTS:
        for family in PREFIX:
            load(namespace, variant, family, others(family))
    before = listings(namespace)
    for variant in VARIANTS:
        load_kube_proxy(namespace, variant)
    namespace.run(["ipset", "restore"], stdin=SETS.replace("create KUBE-OF-MINE hash:ip\n", ""))
    namespace.ip(["link", "add", "kube-ipvs0", "type", "bridge"])
    process = namespace.popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True)
    for _ in range(after_lines):
        assert process.stdout.readline()
    if not after_lines:
        time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    clean(namespace)
    assert listings(namespace) == before
    assert not namespace.call(kubeproxy.census).found
