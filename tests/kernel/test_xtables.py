"""What the iptables tools are asked and what they say, in both variants and families."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from errno import EPERM
from pathlib import Path

import pytest

from proxycore.errors import KernelError
from proxycore.kernel import nftables, xtables, xtlock
from proxycore.kernel.xtables import LockHeld, RestoreRefused, Tools
from proxycore.testing.netns import Namespace

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def namespace(tmp_path, monkeypatch) -> Iterator[Namespace]:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    with Namespace("xtables") as made:
        yield made


@pytest.fixture(params=["iptables-legacy", "iptables-nft", "ip6tables-legacy", "ip6tables-nft"])
def tools(request) -> Tools:
    return next(found for found in xtables.find() if str(found) == request.param)


def legacy() -> Tools:
    return next(found for found in xtables.find() if str(found) == "iptables-legacy")


@pytest.fixture
def holder(tmp_path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the xtables lock until it is ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "xtables.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_command_comes_with_the_tools(tmp_path):
    for name in (
        "iptables-nft-save",
        "iptables-nft-restore",
        "iptables-nft",
        "ip6tables-nft-save",
        "ip6tables-nft-restore",
    ):
        (tmp_path / name).touch()
    found = xtables.find(lambda name: str(tmp_path / name) if (tmp_path / name).exists() else None)
    assert [tools.command for tools in found] == [str(tmp_path / "iptables-nft"), ""]
    with pytest.raises(KernelError, match=r"ip6tables-nft is not installed \(package iptables\)"):
        xtables.list_chain(found[1], "nat", "A")


# -- what other versions say --


@pytest.mark.parametrize(
    ("said", "lines"),
    [
        # 1.8.2, nft
        ("iptables-restore v1.8.2 (nf_tables): \nline 3: RULE_APPEND failed (No such file or directory): rule in chain A\n", [3]),
        ("iptables-restore v1.8.2 (nf_tables): unknown option \"--foo\"\nError occurred at line: 7\nTry `ipt\n", [7]),
        # 1.8.4, legacy
        ("iptables-restore: line 9 failed\n", [9]),
        ("iptables-restore v1.8.4 (legacy): Couldn't load target `X':No such file\n\nError occurred at line: 12\n", [12]),
        # 1.8.7, nft: more than one, each on a line of its own
        (
            "iptables-restore v1.8.7 (nf_tables): \nline 4: CHAIN_USER_DEL failed (Device or resource busy): chain B\n"
            "line 6: RULE_DELETE failed (No such file or directory): rule in chain A\n",
            [4, 6],
        ),
        # 1.8.9 and later, nft: the reason behind it
        ("iptables-nft-restore: line 2 failed: No chain/target/match by that name.\n", [2]),
        ("ip6tables-restore v1.8.11 (nf_tables): \nline 5: TABLE_FLUSH failed (Operation not supported): table nat\n", [5]),
        # A comment or a value in the text says nothing.
        ('iptables-restore v1.8.9 (legacy): unknown option "line 4 failed"\nError occurred at line: 3\n', [3]),
        ("Another app is currently holding the xtables lock. Stopped waiting after 2s.\n", []),
        ("", []),
    ],
)  # fmt: skip
def test_lines_that_are_named(said, lines):
    assert list(xtables.refused_lines(said)) == lines


@pytest.mark.parametrize(
    ("status", "said", "held"),
    [
        # Up to 1.8.7 with -w, and without.
        (
            4,
            "Another app is currently holding the xtables lock; still 1s 0us time ahead to have a chance to grab the lock...\n"
            "Another app is currently holding the xtables lock. Stopped waiting after 2s.\n",
            True,
        ),
        (
            4,
            "Another app is currently holding the xtables lock. Perhaps you want to use the -w option?\n",
            True,
        ),
        (
            4,
            "Can't lock /run/xtables.lock: Resource temporarily unavailable\n"
            "Another app is currently holding the xtables lock. Stopped waiting after 1s.\n",
            True,
        ),
        # The hint comes after it.
        (
            4,
            "Another app is currently holding the xtables lock. Stopped waiting after 1s.\n\n"
            "Try `iptables-restore -h' or 'iptables-restore --help' for more information.\n",
            True,
        ),
        # They waited, had it in the end, and were refused for another reason.
        (
            1,
            "Another app is currently holding the xtables lock; still 4s 0us time ahead to have a chance to grab the lock...\n"
            "iptables-restore: line 9 failed\n",
            False,
        ),
        (
            4,
            "Another app is currently holding the xtables lock; still 4s 0us time ahead to have a chance to grab the lock...\n"
            "iptables-restore: line 9 failed\n",
            False,
        ),
        (
            2,
            "Another app is currently holding the xtables lock; still 4s 0us time ahead to have a chance to grab the lock...\n"
            'iptables-restore v1.8.4 (legacy): unknown option "--x"\nError occurred at line: 3\n'
            "Try `iptables-restore -h' or 'iptables-restore --help' for more information.\n",
            False,
        ),
        (
            4,
            "Another app is currently holding the xtables lock; still 4s 0us time ahead to have a chance to grab the lock...\n"
            "iptables-restore: Memory allocation problem.\n",
            False,
        ),
        # They waited, and were ended as they did.
        (
            4,
            "Another app is currently holding the xtables lock; still 4s 0us time ahead to have a chance to grab the lock...\n",
            False,
        ),
        # A comment in the input that says so.
        (
            2,
            'iptables-restore v1.8.9 (legacy): unknown option "Another app is currently holding the xtables lock. x"\n'
            "Error occurred at line: 3\n",
            False,
        ),
        (4, "line 3: RULE_APPEND failed (Invalid argument): rule in chain X\n", False),
        (4, "Fatal: can't open lock file /run/xtables.lock: Permission denied\n", False),
        (1, "iptables-restore: line 9 failed\n", False),
        (4, "", False),
    ],
)
def test_a_lock_that_is_held(status, said, held):
    assert xtables.is_lock_held(status, said) is held


def test_who_waited_for_the_lock_and_was_refused(tmp_path):
    """What it said while it waited is no part of the reason."""
    failing = tmp_path / "failing"
    failing.write_text(
        "#!/bin/sh\ncat >/dev/null\n"
        'echo "Another app is currently holding the xtables lock; still 1s 0us time ahead..." >&2\n'
        'echo "Bad argument \\`z\'" >&2\necho "Error occurred at line: 2" >&2\nexit 2\n'
    )
    failing.chmod(0o755)
    with pytest.raises(RestoreRefused) as caught:
        xtables.restore(legacy()._replace(restore=str(failing)), "*nat\n-A X z\nCOMMIT\n", 1)
    assert (caught.value.line, caught.value.said) == (2, "Bad argument `z' / Error occurred at line: 2")


def test_who_holds_a_file():
    table = (
        "1: FLOCK  ADVISORY  WRITE 27460 fe:00:2146440 0 EOF\n"
        "1: -> FLOCK  ADVISORY  WRITE 27461 fe:00:2146440 0 EOF\n"
        "2: POSIX  ADVISORY  WRITE 9 fe:00:7 0 EOF\n"
        "3: FLOCK  ADVISORY  WRITE 11 fe:01:2146440 0 EOF\n"
        "4: FLOCK  ADVISORY  WRITE 0 fe:00:2146440 0 EOF\n"
        "5: LEASE  ACTIVE    READ 12 fe:00:2146440 0 EOF\n"
        "6: FLOCK\n"
        "7: FLOCK  ADVISORY  WRITE 13 <none>:0 0 EOF\n"
    )
    assert xtlock.parse_locks(table, 0xFE, 0, 2146440) == (27460,)
    assert xtlock.parse_locks(table, 0xFE, 0, 7) == (9,)


# -- the real tools --


@pytest.mark.root
def test_a_restore_comes_into_force_and_is_read_back(namespace, tools):
    rules = ('-m comment --comment "a b" -j RETURN', "-p tcp -m tcp --dport 80 -j ACCEPT")
    text = "*nat\n:KT - [0:0]\n" + "".join(f"-A KT {rule}\n" for rule in rules) + "COMMIT\n"
    namespace.call(lambda: xtables.restore(tools, text, 1))
    assert namespace.call(lambda: xtables.list_chain(tools, "nat", "KT")) == rules
    assert namespace.call(lambda: xtables.list_chain(tools, "nat", "OUTPUT")) == ()
    assert namespace.call(lambda: xtables.list_chain(tools, "nat", "NOPE")) is None
    lines = namespace.call(lambda: xtables.save(tools, list))
    assert [line for line in lines if line.startswith("-A")] == [f"-A KT {rule}\n" for rule in rules]


@pytest.mark.root
def test_some_tables_with_counters(namespace, tools):
    text = "*nat\n:N - [0:0]\nCOMMIT\n*filter\n:F - [0:0]\n-A F -j DROP\nCOMMIT\n"
    namespace.call(lambda: xtables.restore(tools, text))
    lines = namespace.call(lambda: xtables.save(tools, list, tables=["filter"], counters=True))
    assert "[0:0] -A F -j DROP\n" in lines
    assert "*nat\n" not in lines
    both = namespace.call(lambda: xtables.save(tools, list, tables=("nat", "mangle", "filter")))
    # A table that is not there is not listed, and above all not made.
    assert [line.strip() for line in both if line.startswith("*")] == ["*nat", "*filter"]
    if tools.variant == "legacy":
        assert namespace.call(lambda: xtables.legacy_tables(tools.family)) == {"nat", "filter"}


@pytest.mark.root
def test_a_reader_may_leave_early_and_its_errors_come_through(namespace, tools):
    namespace.call(lambda: xtables.restore(tools, "*nat\n:N - [0:0]\nCOMMIT\n"))
    assert namespace.call(lambda: xtables.save(tools, next)).startswith("#")

    def broken(lines):
        next(iter(lines))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        namespace.call(lambda: xtables.save(tools, broken, tables=["nat"]))


def refused(namespace: Namespace, tools: Tools, *lines: str) -> RestoreRefused:
    with pytest.raises(RestoreRefused) as caught:
        namespace.call(lambda: xtables.restore(tools, "\n".join(lines) + "\n", 1))
    return caught.value


@pytest.mark.root
@pytest.mark.parametrize(
    "rule", ["-A B --foo", "-A B -m nosuch -j ACCEPT", "-A NOPE -j ACCEPT", "-D B -j DROP", f":{'B' * 32} - [0:0]"]
)  # fmt: skip
def test_a_line_that_the_tool_cannot_read_is_named(namespace, tools, rule):
    found = refused(
        namespace, tools, "*filter", ":A - [0:0]", "COMMIT", "*mangle", ":B - [0:0]", rule, "COMMIT"
    )
    if found.line is None:
        # In legacy it is the COMMIT that finds out about a rule that is not there.
        assert tools.variant == "legacy"
        assert rule.startswith(("-D", "-A NOPE"))
    else:
        assert (found.line, found.lines) == (6, (6,))
        assert f"line 6 is `{rule}`" in str(found)
    assert found.said in str(found)
    assert found.errno == 0
    # The table before it holds, its own does not.
    assert namespace.call(lambda: xtables.list_chain(tools, "filter", "A")) == ()
    assert namespace.call(lambda: xtables.list_chain(tools, "mangle", "B")) is None


@pytest.mark.root
def test_a_rule_that_the_kernel_refuses(namespace, tools):
    found = refused(
        namespace, tools, "*filter", ":A - [0:0]", "-A A -j ACCEPT", "-A A -j MASQUERADE", "COMMIT",
    )  # fmt: skip
    # Legacy tells no more than the table.
    assert found.line == (None if tools.variant == "legacy" else 4)
    assert namespace.call(lambda: xtables.list_chain(tools, "filter", "A")) is None


@pytest.mark.root
def test_all_lines_that_the_kernel_refuses(namespace):
    tools = next(found for found in xtables.find() if str(found) == "iptables-nft")
    found = refused(
        namespace, tools, "*filter", ":A - [0:0]", "-A A -j MASQUERADE", "-A A -j DROP", "-A A -j MASQUERADE", "COMMIT"
    )  # fmt: skip
    assert found.lines == (3, 5)


@pytest.mark.root
def test_a_whole_table_that_is_refused_has_no_line(namespace, tools):
    found = refused(namespace, tools, "*nosuch", ":A - [0:0]", "COMMIT")
    assert found.line is None
    assert "nosuch" in found.said


@pytest.mark.root
def test_trying_changes_nothing(namespace, tools):
    namespace.call(lambda: xtables.restore(tools, "*filter\n:A - [0:0]\n-A A -j DROP\nCOMMIT\n"))

    def state() -> tuple[int, list[str]]:
        with nftables.NfTables() as kernel:
            return kernel.generation(), [
                line for line in xtables.save(tools, list) if not line.startswith("#")
            ]

    before = namespace.call(state)
    good, bad = "*filter\n:A - [0:0]\n-A A -j ACCEPT\nCOMMIT\n", "*filter\n-A A -m nosuch\nCOMMIT\n"
    namespace.call(lambda: xtables.restore(tools, good, test=True))
    with pytest.raises(RestoreRefused, match="nosuch") as caught:
        namespace.call(lambda: xtables.restore(tools, bad, test=True))
    assert caught.value.line == 2
    assert namespace.call(state) == before


def test_a_warning_is_a_refusal_of_a_trial_alone(tmp_path):
    warning = "Warning: Extension nfacct revision 0 not supported, missing kernel module?"
    warning_tool = tmp_path / "warning"
    warning_tool.write_text(f"#!/bin/sh\ncat >/dev/null\necho '{warning}' >&2\n")
    warning_tool.chmod(0o755)
    tools = Tools("nft", "IPv4", "", str(warning_tool))
    with pytest.raises(RestoreRefused, match="missing kernel module") as caught:
        xtables.restore(tools, "*nat\nCOMMIT\n", test=True)
    assert (caught.value.line, caught.value.said) == (None, warning)
    xtables.restore(tools, "*nat\nCOMMIT\n")


@pytest.mark.root
def test_the_holder_of_the_lock_is_named(namespace, holder, tmp_path):
    with pytest.raises(LockHeld) as caught:
        namespace.call(lambda: xtables.restore(legacy(), "*filter\n:A - [0:0]\nCOMMIT\n", 1))
    assert [found.pid for found in caught.value.holders] == [holder.pid]
    assert f"held by process {holder.pid} ({sys.executable} -c" in str(caught.value)
    assert str(tmp_path / "xtables.lock") in str(caught.value)
    holder.communicate("")
    namespace.call(lambda: xtables.restore(legacy(), "*filter\n:A - [0:0]\nCOMMIT\n", 1))


@pytest.mark.root
def test_nft_takes_no_lock(namespace, holder):
    tools = next(found for found in xtables.find() if str(found) == "iptables-nft")
    namespace.call(lambda: xtables.restore(tools, "*filter\n:A - [0:0]\nCOMMIT\n", 1))
    assert namespace.call(lambda: xtables.list_chain(tools, "filter", "A")) == ()


def test_our_own_lock(tmp_path, monkeypatch, holder):
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    with pytest.raises(LockHeld, match=f"process {holder.pid}"), xtlock.held(0.05):
        raise AssertionError("entered")
    holder.communicate("")
    with xtlock.held(0.05), pytest.raises(LockHeld), xtlock.held(0):
        raise AssertionError("entered")
    with xtlock.held(0):
        pass
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "no" / "lock"))
    with (
        pytest.raises(KernelError, match=r"cannot open the xtables lock .*no/lock: No such file"),
        xtlock.held(0),
    ):
        raise AssertionError("entered")


@pytest.mark.root
@pytest.mark.parametrize("capabilities", ["", "net_admin", "net_admin,net_raw"])
def test_rights(namespace, tools, capabilities, tmp_path):
    """The tools need two capabilities in legacy, one in nft, and the error says which is missing."""
    (tmp_path / "xtables.lock").touch()
    code = (
        "from proxycore.kernel import xtables\n"
        f"tools = next(t for t in xtables.find() if str(t) == {str(tools)!r})\n"
        "try:\n    xtables.restore(tools, '*filter\\n:A - [0:0]\\n-A A -j DROP\\nCOMMIT\\n')\n"
        "    print(xtables.save(tools, lambda lines: sum('-A A' in line for line in lines), tables=['filter']))\n"
        "except xtables.KernelError as error:\n    print(error.errno, error)\n"
    )
    said = namespace.run([*with_only(capabilities), sys.executable, "-c", code]).stdout
    enough = {"legacy": "net_admin,net_raw", "nft": "net_admin"}[tools.variant]
    if capabilities.startswith(enough):
        assert said == "1\n"
    else:
        missing = [f"CAP_{name.upper()}" for name in enough.split(",") if name not in capabilities.split(",")]
        assert said.startswith(f"{EPERM} ")
        assert f"needs {' and '.join(missing)}, which this process lacks" in said


def with_only(capabilities: str) -> list[str]:
    """A command that starts another with these capabilities alone."""
    words = "".join(f",+{name}" for name in capabilities.split(",") if name)
    return ["setpriv", f"--bounding-set=-all{words}", f"--inh-caps=-all{words}", "--"]


# -- tools that hang --

CALLS = {
    "restore": lambda tools: xtables.restore(tools, "*nat\nCOMMIT\n"),
    "save": lambda tools: xtables.save(tools, list),
}
LEFT_ALONE = """
import sys, threading
from proxycore.kernel import xtables
tools = xtables.Tools("nft", "IPv4", sys.argv[2], sys.argv[2])
if sys.argv[3] == "alone":
    xtables._guard = lambda: ()
elif not xtables._guard():
    sys.exit("setpriv is not used")
calls = {"restore": lambda: xtables.restore(tools, "*nat\\nCOMMIT\\n"), "save": lambda: xtables.save(tools, list)}
threading.Thread(target=calls[sys.argv[1]]).start()
"""


def script(folder: Path, *lines: str) -> str:
    """A program that first writes its process id to the file `pid` in the folder."""
    path = folder / "hanging"
    path.write_text(
        "\n".join(("#!/bin/sh", f"echo $$ >{folder}/new && mv {folder}/new {folder}/pid", *lines, ""))
    )
    path.chmod(0o755)
    return str(path)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def has_ended(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_one_that_hangs_is_killed_and_named(tmp_path, monkeypatch, call, variant):
    """With what it started, if it is a script around another program that holds its output open."""
    monkeypatch.setattr(xtables, "WRITE_SECONDS", 1.0)
    monkeypatch.setattr(xtables, "READ_SECONDS", 1.0)
    program = script(tmp_path, f"sleep 600 & echo $! >{tmp_path}/child; wait")
    with pytest.raises(KernelError) as caught:
        CALLS[call](Tools(variant, "IPv4", program, program))
    pid, child = (int((tmp_path / name).read_text()) for name in ("pid", "child"))
    assert str(caught.value).startswith(
        f"{program} (process {pid}) did not end within 1 s and was killed: see "
    )
    assert f"whether `{program}` ends when it is run by hand" in str(caught.value)
    assert (xtlock.path() in str(caught.value)) is (variant == "legacy")
    assert has_ended(pid)
    wait_for(lambda: has_ended(child))


def test_one_that_cannot_be_killed_is_not_waited_for(tmp_path, monkeypatch):
    """As one that hangs inside the kernel."""
    monkeypatch.setattr(xtables, "WRITE_SECONDS", 1.0)
    monkeypatch.setattr(xtables, "KILLED_SECONDS", 0.01)
    spared: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(xtables, "_kill", spared.append)
    with pytest.raises(KernelError) as caught:
        xtables.restore(Tools("nft", "IPv4", "", script(tmp_path, "exec sleep 600")), "")
    [process] = spared
    assert f"(process {process.pid}) did not end within 1 s and was killed, but hangs in the kernel" in str(
        caught.value
    )
    assert f"`cat /proc/{process.pid}/stack`" in str(caught.value)
    process.kill()
    process.wait()


@pytest.mark.parametrize("said", ["echo unknown option >&2; exit 1", "exec sleep 0"])
def test_a_setpriv_that_cannot_is_not_used(tmp_path, monkeypatch, said):
    """As that of busybox."""
    program = tmp_path / "setpriv"
    program.write_text(f"#!/bin/sh\n{said}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert bool(xtables._guard.__wrapped__()) is said.endswith("0")
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert xtables._guard.__wrapped__() == ()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("how", ["setpriv", "alone"])
def test_none_is_left_behind(tmp_path, call, how):
    """Whoever called it is killed without a chance to do anything about it."""
    program = script(tmp_path, "exec sleep 600")
    with subprocess.Popen([sys.executable, "-c", LEFT_ALONE, call, program, how]) as caller:
        try:
            wait_for((tmp_path / "pid").exists)
            pid = int((tmp_path / "pid").read_text())
            assert not has_ended(pid)
            assert os.getpgid(pid) == pid
        finally:
            caller.kill()
    wait_for(lambda: has_ended(pid))
