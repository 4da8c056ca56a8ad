"""Counters by name, in the kernel."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from proxycore.errors import KernelError
from proxycore.kernel import xtables
from proxycore.kernel.xtlock import held
from proxycore.testing.netns import Namespace
from proxycore_iptables import counting
from proxycore_iptables.counting import Counting
from proxycore_iptables.words import INVALID_COUNTER, LOCALHOST_COUNTER

from .edge import load, run_with, saved, tools_of

pytestmark = pytest.mark.root
TOOLS = ["iptables-legacy", "iptables-nft", "ip6tables-legacy", "ip6tables-nft"]


@pytest.fixture
def namespace(tmp_path, monkeypatch) -> Iterator[Namespace]:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    with Namespace("counting") as made:
        yield made


@pytest.fixture
def counters(namespace) -> Iterator[Counting]:
    with namespace.call(Counting) as made:
        yield made


@pytest.mark.parametrize("name", TOOLS)
def test_packets_are_counted(namespace, counters, name):
    assert counters.packets() == {}
    assert counters.ensure() == (INVALID_COUNTER, LOCALHOST_COUNTER)
    address, family = (
        ("127.0.0.1", socket.AF_INET) if name.startswith("iptables") else ("::1", socket.AF_INET6)
    )
    rule = f"-A OUTPUT -p udp -m udp --dport 9 -m nfacct --nfacct-name {LOCALHOST_COUNTER} -j DROP"
    load(namespace, name, "*filter", rule, "COMMIT")
    with namespace.socket(family, socket.SOCK_DGRAM) as sender:
        for _ in range(3):
            with pytest.raises(PermissionError):
                sender.sendto(b"x", (address, 9))
    assert counters.packets() == {INVALID_COUNTER: 0, LOCALHOST_COUNTER: 3}
    # What is there goes on counting.
    assert counters.ensure() == ()
    assert counters.packets((LOCALHOST_COUNTER,)) == {LOCALHOST_COUNTER: 3}
    with pytest.raises(KernelError, match=f"{LOCALHOST_COUNTER} cannot be deleted: .*busy") as caught:
        counters.delete((LOCALHOST_COUNTER,))
    assert caught.value.errno == errno.EBUSY
    load(namespace, name, "*filter", rule.replace("-A", "-D"), "COMMIT")
    assert counters.delete() == (INVALID_COUNTER, LOCALHOST_COUNTER)
    assert counters.delete() == ()
    assert counters.packets() == {}


def test_only_what_is_ours_is_touched(counters):
    counters.ensure(("foreign",))
    counters.ensure()
    assert set(counters.packets()) == {INVALID_COUNTER, LOCALHOST_COUNTER}
    counters.delete()
    assert counters.packets(("foreign",)) == {"foreign": 0}


@pytest.mark.parametrize("name", TOOLS)
def test_they_are_available_and_looking_leaves_nothing(namespace, counters, name):
    load(namespace, name, "*filter", ":A - [0:0]", "-A A -j DROP", "COMMIT")
    before = namespace.run(["nft", "list", "ruleset"]).stdout, saved(namespace, name)
    assert namespace.call(lambda: counting.problem(tools_of(name))) is None
    assert namespace.call(lambda: counting.available(tools_of(name)))
    assert (namespace.run(["nft", "list", "ruleset"]).stdout, saved(namespace, name)) == before
    assert counters.packets() == {}


def test_a_tool_without_the_extension(namespace, tmp_path):
    tools = tools_of("iptables-nft")
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho \"Couldn't load match \\`nfacct'\" >&2\nexit 2\n")
    failing.chmod(0o755)
    said = namespace.call(lambda: counting.problem(tools._replace(command=str(failing))))
    assert said.startswith("iptables-nft cannot count with nfacct: ")
    assert "Couldn't load match" in said


def test_a_kernel_without_them(namespace, monkeypatch):
    monkeypatch.setattr(counting, "_GET", 0xEE << 8)
    said = namespace.call(lambda: counting.problem(tools_of("iptables-nft")))
    assert said.startswith("the kernel has no nfacct counters: ")
    assert not namespace.call(lambda: counting.available(tools_of("iptables-nft")))


@pytest.mark.parametrize("name", ["iptables-legacy", "ip6tables-legacy"])
def test_looking_makes_no_table_and_waits_for_no_lock(namespace, name):
    with held(1):
        assert namespace.call(lambda: counting.problem(tools_of(name))) is None
    assert namespace.call(lambda: xtables.legacy_tables(tools_of(name).family)) == frozenset()


CODE = """
from proxycore.kernel import xtables
from proxycore_iptables import counting
tools = next(t for t in xtables.find() if str(t) == NAME)
print(counting.problem(tools))
with counting.Counting() as counters:
    counters.ensure((INVALID,))
    print(counters.packets())
"""


@pytest.mark.parametrize(
    ("name", "capabilities"), [("iptables-legacy", "net_admin,net_raw"), ("iptables-nft", "net_admin")]
)
def test_rights(namespace, name, capabilities):
    code = CODE.replace("NAME", repr(name)).replace("INVALID", repr(INVALID_COUNTER))
    assert run_with(namespace, capabilities, code) == f"None\n{{'{INVALID_COUNTER}': 0}}\n"
