"""Both readers give the same answers about the same rules, of both families."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterator

import pytest

from proxycore.errors import KernelError
from proxycore.kernel import xtables
from proxycore.kernel.xtables import LockHeld
from proxycore.kernel.xtlock import held
from proxycore.testing.netns import Namespace
from proxycore_iptables import reader as readers
from proxycore_iptables import worker
from proxycore_iptables.frame import frame
from proxycore_iptables.reader import Count, Reader, census_of
from proxycore_iptables.rules import Jump
from proxycore_iptables.shape import Shape

from .edge import load, run_with, saved, tools_of

pytestmark = pytest.mark.root
TOOLS = ["iptables-legacy", "iptables-nft", "ip6tables-legacy", "ip6tables-nft"]
SVC, SEP = "KUBE-SVC-XPGD46QRK7WJZT7O", "KUBE-SEP-SXIVWICOYRO3J4NJ"
OURS = (
    "*filter",
    ":KUBE-SERVICES - [0:0]",
    ":KUBE-FORWARD - [0:0]",
    ":KUBE-FIREWALL - [0:0]",
    ":FOREIGN - [0:0]",
    "-A INPUT -j KUBE-FIREWALL",
    '-A INPUT -m comment --comment "not -j KUBE-FORWARD" -j FOREIGN',
    '-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    "-A FORWARD -j KUBE-FORWARD",
    "-A FORWARD -j ACCEPT",
    "-A KUBE-FIREWALL -j DROP",
    "-A KUBE-FORWARD -j ACCEPT",
    "COMMIT",
    "*nat",
    ":KUBE-SERVICES - [0:0]",
    ":KUBE-MARK-MASQ - [0:0]",
    f":{SVC} - [0:0]",
    f":{SEP} - [0:0]",
    ":FOREIGN - [0:0]",
    '-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    "-A PREROUTING -j FOREIGN",
    "-A OUTPUT -j RETURN",
    '-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    "-A POSTROUTING -p tcp -g KUBE-MARK-MASQ",
    "-A FOREIGN -p udp -j KUBE-MARK-MASQ",
    f"-A FOREIGN -p udp -j {SVC}",
    f"-A FOREIGN -p tcp -j {SVC}",
    "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000",
    f"-A KUBE-SERVICES -p tcp -m tcp --dport 80 -j {SVC}",
    f"-A {SVC} -m statistic --mode random --probability 0.5 -j {SEP}",
    f"-A {SVC} -j {SEP}",
    f"-A {SEP} -p tcp -j RETURN",
    "COMMIT",
)


@pytest.fixture
def namespace(tmp_path, monkeypatch) -> Iterator[Namespace]:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    with Namespace("reader") as made:
        yield made


class Tables:
    """A reader and its tables."""

    def __init__(self, namespace: Namespace, name: str) -> None:
        self.namespace = namespace
        self.name = name
        self.variant = tools_of(name).variant
        self.family = tools_of(name).family
        self.reader: Reader = namespace.call(lambda: readers.reader(tools_of(name), 2))

    def call(self, what: str, *arguments):
        return self.namespace.call(lambda: getattr(self.reader, what)(*arguments))

    def load(self, *lines: str) -> None:
        load(self.namespace, self.name, *lines)

    def saved(self) -> list[str]:
        return saved(self.namespace, self.name)


@pytest.fixture(params=TOOLS)
def tables(request, namespace) -> Iterator[Tables]:
    made = Tables(namespace, request.param)
    yield made
    made.reader.close()
    made.reader.close()


@pytest.fixture(params=["iptables-legacy", "ip6tables-legacy"])
def legacy(request, namespace) -> Iterator[Tables]:
    made = Tables(namespace, request.param)
    yield made
    made.reader.close()


def test_all_extensions_load_here_and_nothing_is_made(tables):
    assert tables.call("probe") == {}
    if tables.variant == "legacy":
        assert tables.namespace.call(lambda: xtables.legacy_tables(tables.family)) == frozenset()
    else:
        assert tables.namespace.run(["nft", "list", "ruleset"]).stdout == ""


def test_what_does_not_load_is_named(tables, monkeypatch):
    known = readers.extensions(tables.family)
    missing = (
        known[0]._replace(name="nosuch", rule="-m nosuch"),
        known[-3]._replace(options=("random-wholly",), rule="-j MASQUERADE --random-wholly"),
        known[-1]._replace(name="NOSUCH", rule="-j NOSUCH --x 1"),
    )
    monkeypatch.setattr(readers, "extensions", lambda family: (*known, *missing))
    found = tables.call("probe")
    assert set(found) == {"nosuch", "MASQUERADE --random-wholly", "NOSUCH"}
    assert "random-wholly" in found["MASQUERADE --random-wholly"]
    assert "nosuch" in found["nosuch"]
    # The nft variant's tool takes it for a chain, and stumbles over the option.
    assert ("NOSUCH" if tables.variant == "legacy" else 'unknown option "--x"') in found["NOSUCH"]


@pytest.mark.parametrize(
    ("kind", "name", "options"), [("match", "ipvs", "--ipvs"), ("target", "LED", "--led-trigger-id x")]
)
def test_what_the_kernel_lacks_is_named(tables, monkeypatch, kind, name, options):
    """The tools only warn of it."""
    rule = f"{'-m' if kind == 'match' else '-j'} {name} {options}"
    done = tables.namespace.run(
        [tools_of(tables.name).restore, "--noflush"],
        stdin=f"*nat\n:A - [0:0]\n-A A {rule}\nCOMMIT\n",
        check=False,
    )
    if done.returncode == 0:
        pytest.skip(f"the kernel has {name}")
    monkeypatch.setattr(readers, "extensions", lambda family: [readers.Extension(kind, name, rule)])
    found = tables.call("probe")
    assert set(found) == {name}
    assert name in found[name]
    assert "kernel" in found[name]


def test_census(tables):
    assert tables.call("census") == {}
    tables.load(*OURS)
    assert tables.call("census") == {
        "filter": {"KUBE-SERVICES": 1, "KUBE-FORWARD": 1},
        "nat": {"KUBE-SERVICES": 2, "KUBE-MARK-MASQ": 2, SVC: 2, SEP: 0},
    }


def test_counters(tables):
    tables.load(*OURS)
    address, family = ("127.0.0.1", socket.AF_INET) if tables.family == "IPv4" else ("::1", socket.AF_INET6)
    target = "-A KUBE-SERVICES -p udp -m udp --dport 9 -j ACCEPT"
    tables.load("*nat", "-D OUTPUT -j RETURN", target, "-A KUBE-SERVICES -p udp -j ACCEPT", "COMMIT")
    with tables.namespace.socket(family, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"xyz", (address, 9))
    header = 28 if tables.family == "IPv4" else 48
    found = tables.call("counters")
    assert found["nat", "KUBE-SERVICES"] == (Count(0, 0), Count(1, header + 3), Count(0, 0))
    assert found["nat", SVC] == (Count(0, 0),) * 2
    assert set(found) == {
        ("nat", "KUBE-SERVICES"), ("nat", "KUBE-MARK-MASQ"), ("nat", SVC), ("nat", SEP),
    }  # fmt: skip


def test_cleanup_takes_ours_and_leaves_what_others_use(tables):
    tables.load(*OURS)
    name = tables.name
    told = tables.call("cleanup")
    assert f"{name} filter: chains KUBE-FORWARD, KUBE-SERVICES" in told or (
        f"{name} filter: chains KUBE-SERVICES, KUBE-FORWARD" in told
    )
    assert f"{name} nat: chains KUBE-SERVICES, 1 of Services and endpoints" in told
    assert any(
        line.startswith(f"{name} nat: rules of chain {SVC}, which stays because of -A FOREIGN ")
        for line in told
    )
    assert len([line for line in told if " rule -A " in line]) == 4
    found = tables.saved()
    chains = sorted(line.split(" ")[0] for line in found if line.startswith(":"))
    assert chains == [":FOREIGN", ":FOREIGN", ":KUBE-FIREWALL", ":KUBE-MARK-MASQ", f":{SVC}"]
    assert sorted(line for line in found if line.startswith("-A")) == sorted(
        [
            "-A INPUT -j KUBE-FIREWALL",
            '-A INPUT -m comment --comment "not -j KUBE-FORWARD" -j FOREIGN',
            "-A FORWARD -j ACCEPT",
            "-A KUBE-FIREWALL -j DROP",
            "-A PREROUTING -j FOREIGN",
            "-A OUTPUT -j RETURN",
            "-A POSTROUTING -p tcp -g KUBE-MARK-MASQ",
            "-A FOREIGN -p udp -j KUBE-MARK-MASQ",
            f"-A FOREIGN -p udp -j {SVC}",
            f"-A FOREIGN -p tcp -j {SVC}",
            "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000",
        ]
    )
    assert tables.call("cleanup") == ()
    assert tables.saved() == found


# -- jumps --


def jumps_of(family: str) -> tuple[Jump, ...]:
    return frame(Shape(family=family, localhost_node_ports=family == "IPv4")).jumps


def prepare(tables: Tables) -> tuple[Jump, ...]:
    """The chains that jumps lead to, and one foreign rule in each built-in chain."""
    jumps = jumps_of(tables.family)
    for table in ("filter", "nat"):
        targets = {jump.rule.rsplit(" ", 1)[1] for jump in jumps if jump.table == table}
        chains = {jump.chain for jump in jumps if jump.table == table}
        tables.load(
            f"*{table}",
            *(f":{target} - [0:0]" for target in sorted(targets)),
            *(f"-A {chain} -p udp -j ACCEPT" for chain in sorted(chains)),
            "COMMIT",
        )
    return jumps


def rules_in(tables: Tables, table: str, chain: str) -> tuple[str, ...] | None:
    return tables.namespace.call(lambda: xtables.list_chain(tools_of(tables.name), table, chain))


def test_missing_jumps_come_first_in_their_order(tables):
    jumps = prepare(tables)
    assert tables.call("assert_jumps", jumps) == jumps
    for table, chain in dict.fromkeys((jump.table, jump.chain) for jump in jumps):
        wanted = [jump.rule for jump in jumps if (jump.table, jump.chain) == (table, chain)][::-1]
        assert rules_in(tables, table, chain) == (*wanted, "-p udp -j ACCEPT")
    assert tables.call("assert_jumps", jumps) == ()
    assert tables.call("assert_jumps", ()) == ()


def test_jumps_that_the_tools_wrote_are_recognised(tables):
    jumps = prepare(tables)
    for jump in jumps[::2]:
        tables.load(f"*{jump.table}", f"-A {jump.chain} {jump.rule}", "COMMIT")
    before = tables.saved()
    assert tables.call("assert_jumps", jumps[::2]) == ()
    assert tables.saved() == before
    assert tables.call("assert_jumps", jumps) == jumps[1::2]
    assert tables.call("assert_jumps", jumps) == ()


def test_the_text_of_a_jump_may_differ(tables):
    prepare(tables)
    jump = Jump("nat", "PREROUTING", '-m comment --comment "x"  --jump KUBE-SERVICES')
    tables.load("*nat", "-A PREROUTING -m comment --comment x -j KUBE-SERVICES", "COMMIT")
    if tables.variant == "legacy":
        jump = jump._replace(rule=jump.rule.replace("--jump", "-j"))
    assert tables.call("assert_jumps", (jump,)) == ()


def test_a_rule_that_nearly_is_the_jump_does_not_do(tables):
    jumps = prepare(tables)
    [jump] = [found for found in jumps if (found.table, found.chain) == ("nat", "PREROUTING")]
    for other in (
        jump.rule.replace("-j", "-g"),
        jump.rule.replace("portals", "portal"),
        f"-p tcp {jump.rule}",
    ):
        tables.load("*nat", f"-A PREROUTING {other}", "COMMIT")
    assert tables.call("assert_jumps", (jump,)) == (jump,)


def test_a_jump_to_no_chain_is_an_error_and_changes_nothing(tables):
    jumps = prepare(tables)
    before = tables.saved()
    bad = Jump("nat", "OUTPUT", "-j KUBE-NO-SUCH")
    [good] = [jump for jump in jumps if (jump.table, jump.chain) == ("nat", "OUTPUT")]
    with pytest.raises(KernelError, match="KUBE-NO-SUCH"):
        tables.call("assert_jumps", (good, bad))
    assert tables.saved() == before


# -- legacy alone --


def test_no_table_is_made_for_looking(legacy):
    legacy.load(*OURS)
    for what in ("census", "counters", "cleanup"):
        legacy.call(what)
    with pytest.raises(KernelError, match=f"there is no {legacy.family} table mangle"):
        legacy.call("assert_jumps", (Jump("mangle", "OUTPUT", "-j RETURN"),))
    assert legacy.namespace.call(lambda: xtables.legacy_tables(legacy.family)) == {"filter", "nat"}


def test_the_lock_is_respected(legacy):
    jumps = prepare(legacy)
    before = legacy.saved()
    with held(0):
        for what, arguments in (("assert_jumps", (jumps,)), ("cleanup", ())):
            with pytest.raises(LockHeld, match=r"held by process \d+ "):
                legacy.call(what, *arguments)
        # Reading needs no lock.
        legacy.call("census")
    assert legacy.saved() == before
    assert legacy.call("assert_jumps", jumps) == jumps


def test_a_program_that_takes_no_lock_gets_in_between():
    """The worker's part, in this process: a commit that the kernel refuses is tried again with what is there then."""

    class Table:
        def __init__(self, commits: list[bool]) -> None:
            self.commits = commits

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def commit(self) -> bool:
            return self.commits.pop(0)

    class Raw:
        family = "IPv4"

        def __init__(self, *commits: bool) -> None:
            self.commits = list(commits)
            self.opened = 0

        def open(self, name: str) -> Table:
            self.opened += 1
            return Table(self.commits)

    raw = Raw(False, False, True)
    assert worker.changed(raw, "nat", lambda table: ["x"]) == ["x"]
    assert raw.opened == 3
    unlucky = Raw(*[False] * 9)
    with pytest.raises(KernelError, match="IPv4 table nat was changed by others 5 times"):
        worker.changed(unlucky, "nat", lambda table: ["x"])
    assert unlucky.opened == 5
    # Nothing to change, nothing to commit.
    assert worker.changed(Raw(), "nat", lambda table: []) == []


def test_changes_of_others_between_two_calls_are_kept(legacy):
    jumps = prepare(legacy)
    legacy.call("assert_jumps", jumps[:3])
    # As many rules as before, so that the kernel would not notice an old copy being written.
    legacy.load("*filter", "-D INPUT -p udp -j ACCEPT", "-A INPUT -p sctp -j ACCEPT", "COMMIT")
    legacy.call("assert_jumps", jumps)
    assert (rules_in(legacy, "filter", "INPUT") or ())[-1] == "-p sctp -j ACCEPT"


def test_a_rule_with_a_mistake_is_refused_and_not_mended(legacy):
    prepare(legacy)
    before = legacy.saved()
    for rule in (
        "-m nosuch -j KUBE-SERVICES",
        "-p tcp -m tcp --dport x -j KUBE-SERVICES",
        "-m conntrack --ctstate OLD -j KUBE-SERVICES",
        "-m recent --name x -j KUBE-SERVICES",
        "-x y -j KUBE-SERVICES",
    ):
        with pytest.raises(KernelError, match="python-iptables cannot make the rule"):
            legacy.call("assert_jumps", (Jump("filter", "FORWARD", rule),))
    assert legacy.saved() == before


def test_without_python_iptables_it_says_what_to_install(namespace, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "iptc" else find_spec(name))
    with pytest.raises(KernelError, match="python-iptables is not installed: pip install python-iptables"):
        namespace.call(lambda: readers.reader(tools_of("iptables-legacy"), 2))
    namespace.call(lambda: readers.reader(tools_of("iptables-nft"), 2)).close()


CODE = """
from proxycore.errors import KernelError
from proxycore.kernel import xtables
from proxycore_iptables.reader import reader
from proxycore_iptables.rules import Jump
try:
    made = reader(next(t for t in xtables.find() if str(t) == NAME), 2)
    print(made.probe(), len(made.census()), len(made.counters()))
    print(len(made.assert_jumps([Jump("nat", "INPUT", "-j KUBE-SERVICES")])), len(made.cleanup()) > 5)
except KernelError as error:
    print(error)
else:
    made.close()
"""


@pytest.mark.parametrize(
    ("name", "capabilities"), [("iptables-legacy", "net_admin,net_raw"), ("iptables-nft", "net_admin")]
)
def test_two_capabilities_are_enough_for_legacy_and_one_for_nft(namespace, name, capabilities, tmp_path):
    load(namespace, name, *OURS)
    assert run_with(namespace, capabilities, CODE.replace("NAME", repr(name))) == "{} 2 4\n1 True\n"


@pytest.mark.parametrize("capabilities", ["net_admin", "net_raw", ""])
def test_the_missing_capability_is_named(namespace, capabilities):
    load(namespace, "iptables-legacy", *OURS)
    said = run_with(namespace, capabilities, CODE.replace("NAME", "'iptables-legacy'"))
    assert said.startswith("iptables-legacy needs CAP_")
    for name in ("CAP_NET_ADMIN", "CAP_NET_RAW"):
        assert (name in said) is (name.removeprefix("CAP_").lower() not in capabilities.split(","))


# -- nft alone --


def test_a_table_that_the_tool_cannot_read(namespace):
    tables = Tables(namespace, "iptables-nft")
    tables.load(*OURS)
    namespace.run(["nft", "add", "rule", "ip", "nat", "FOREIGN", "fib daddr type local counter accept"])
    for what in ("census", "counters", "cleanup"):
        with pytest.raises(KernelError, match=r"iptables-nft cannot read table nat: .*with nft"):
            tables.call(what)
    # The others are clean all the same.
    assert not any("KUBE-FORWARD" in line for line in tables.saved() if line.startswith(":"))


def test_a_listing_of_others():
    lines = [
        "*nat",
        ":KUBE-SERVICES - [0:0]",
        "-A OUTPUT -g KUBE-SERVICES",
        '-A OUTPUT -m comment --comment "-j KUBE-SERVICES" -j RETURN',
        "-A OUTPUT -j KUBE-OTHER",
        "COMMIT",
        "*filter",
        "-A INPUT -j KUBE-SERVICES",
        "COMMIT",
        "# Table `raw' is incompatible, use 'nft' tool.",
    ]
    assert census_of(lines, "x") == {"nat": {"KUBE-SERVICES": 1}, "filter": {}}
