"""Edges to other owners' objects: tables, sets, links and iptables' programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from proxycore.errors import KernelError
from proxycore.kernel import ipsets, links, xtables
from proxycore.kernel.nftables import NfTables
from proxycore.testing.netns import Namespace


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace("foreign") as made:
        yield made


@pytest.mark.root
def test_tables_and_chains_of_one_family_and_not_of_another(namespace):
    namespace.run(
        ["nft", "-f", "-"], stdin="table ip a { chain x {}; }; table ip6 a { chain y {}; }; table inet b {}"
    )
    with namespace.call(NfTables) as kernel:
        assert kernel.tables("ip") == kernel.tables("ip6") == {"a"}
        assert kernel.chains("ip") == {("a", "x")}
        assert kernel.chains("ip6") == {("a", "y")}
        assert kernel.delete_table("ip6", "a")
        assert not kernel.delete_table("ip6", "a")
        assert not kernel.delete_table("ip", "b")
        assert (kernel.tables("ip"), kernel.tables("ip6")) == ({"a"}, frozenset())


@pytest.mark.root
def test_deleting_what_is_not_ours_to_delete_is_an_error(namespace):
    """Another process owns the table, as its flag says."""
    owner = namespace.popen(["nft", "-i"], stdin=-1, stdout=-1, text=True)
    owner.stdin.write("add table ip owned { flags owner; }\nlist tables\n")
    owner.stdin.flush()
    line = owner.stdout.readline()
    if "owned" not in line:
        owner.kill()
        owner.communicate()
        pytest.skip(f"this nft cannot own a table: {line!r}")
    with (
        namespace.call(NfTables) as kernel,
        pytest.raises(KernelError, match="table ip owned cannot be deleted"),
    ):
        kernel.delete_table("ip", "owned")
    owner.kill()
    owner.communicate()


@pytest.mark.root
def test_sets(namespace):
    namespace.run(
        ["ipset", "restore"],
        stdin="create a bitmap:port range 0-65535\ncreate b hash:ip,port\ncreate c hash:ip\ncreate d list:set\n"
        "add a 30001\nadd a 1\nadd a 65535\nadd b 10.0.0.1,sctp:30003\nadd c 10.0.0.1\nadd d c\n",
    )
    with namespace.call(ipsets.IPSets) as kernel:
        assert kernel.names() == {"a", "b", "c", "d"}
        assert [kernel.ports(name) for name in "abcx"] == [
            {1, 30001, 65535},
            {30003},
            frozenset(),
            frozenset(),
        ]
        with pytest.raises(KernelError, match="rules or other sets refer to it") as caught:
            kernel.destroy("c")
        assert caught.value.errno == ipsets.BUSY
        assert [kernel.destroy(name) for name in "abdcx"] == [True, True, True, True, False]
        assert kernel.names() == frozenset()


@pytest.mark.root
def test_ports_of_a_set_larger_than_one_message(namespace):
    lines = "".join(f"add a {port}\n" for port in range(1, 60001))
    namespace.run(["ipset", "restore"], stdin=f"create a bitmap:port range 0-65535\n{lines}")
    with namespace.call(ipsets.IPSets) as kernel:
        assert kernel.ports("a") == set(range(1, 60001))


@pytest.mark.root
def test_links_and_their_addresses(namespace):
    namespace.ip(
        ["link", "add", "x0", "type", "bridge"],
        ["addr", "add", "10.0.0.1/24", "dev", "x0"],
        ["addr", "add", "fd00::1/64", "dev", "x0", "nodad"],
    )
    assert namespace.call(links.addresses_by_link)["x0"] == {"10.0.0.1", "fd00::1"}
    assert namespace.call(lambda: links.delete_link("x0"))
    assert not namespace.call(lambda: links.delete_link("x0"))
    assert set(namespace.call(links.addresses_by_link)) == {"lo"}
    with pytest.raises(KernelError, match="link lo cannot be deleted"):
        namespace.call(lambda: links.delete_link("lo"))


def which(folder: Path, *names: str):
    for name in names:
        prefix = name.partition("-")[0]
        file = folder / name
        file.write_text(
            f"#!/bin/sh\necho {prefix} v1.8.9 '({'nf_tables' if prefix == 'iptables' else 'legacy'})'\n"
        )
        file.chmod(0o755)
    return lambda name: str(folder / name) if (folder / name).exists() else None


def test_programs_by_their_own_names(tmp_path):
    found = xtables.find(
        which(tmp_path, "iptables-nft-save", "iptables-nft-restore", "ip6tables-legacy-save", "iptables-save")
    )
    # One that can read and not write is of no use.
    assert [str(tools) for tools in found] == ["iptables-nft"]


def test_plain_programs_are_asked_which_they_are(tmp_path):
    names = ("iptables-save", "iptables-restore", "ip6tables-save", "ip6tables-restore")
    found = xtables.find(which(tmp_path, *names))
    assert [str(tools) for tools in found] == ["iptables-nft", "ip6tables-legacy"]
    assert found[0].restore == str(tmp_path / "iptables-restore")


def test_without_programs_there_are_none():
    assert xtables.find(lambda name: None) == ()


def test_a_program_that_is_gone_or_fails_is_named(tmp_path):
    gone = xtables.Tools("nft", "IPv4", str(tmp_path / "no-save"), str(tmp_path / "no-restore"))
    with pytest.raises(KernelError, match=r"cannot run .*no-save: No such file"):
        xtables.save(gone, list)
    with pytest.raises(KernelError, match=r"cannot run .*no-restore"):
        xtables.restore(gone, "")
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\ncat > /dev/null\necho '# a comment' >&2\necho line 3 failed >&2\nexit 4\n")
    failing.chmod(0o755)
    with pytest.raises(KernelError, match=r"failing ended with 4: line 3 failed$"):
        xtables.restore(gone._replace(restore=str(failing)), "x")
    with pytest.raises(KernelError, match=r"failing ended with 4: line 3 failed$"):
        xtables.save(gone._replace(save=str(failing)), list)


def test_one_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(xtables, "READ_SECONDS", 0.1)
    hanging = tmp_path / "hanging"
    hanging.write_text("#!/bin/sh\nexec sleep 600\n")
    hanging.chmod(0o755)
    with pytest.raises(KernelError, match=r"did not end within 0\.1 s"):
        xtables.save(xtables.Tools("nft", "IPv4", str(hanging), ""), list)
