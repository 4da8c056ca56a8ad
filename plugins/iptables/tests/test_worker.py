"""A worker that hangs, dies or talks nonsense does no harm."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxycore.errors import KernelError
from proxycore.testing.netns import Namespace
from proxycore_iptables.link import Link

from .edge import load, saved

pytestmark = pytest.mark.root


@pytest.fixture
def namespace(tmp_path, monkeypatch) -> Iterator[Namespace]:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    with Namespace("worker") as made:
        yield made


@contextlib.contextmanager
def linked(family="IPv4", script: str | None = None) -> Iterator[Link]:
    """A link; to a worker that does as a script says, with `out` for its answers."""
    start = "import os, sys, time\nout = os.fdopen(int(sys.argv[2]), 'w', buffering=1)\n"
    command = None if script is None else (sys.executable, "-c", start + script)
    link = Link(family, command)
    try:
        yield link
    finally:
        link.close()


def ended(pid: int | None, seconds: float = 10.0) -> bool:
    """Has a process that is not our child ended?"""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


READY = """print('{"value": "ready"}', file=out)\n"""


def test_answers_however_long_and_in_pieces():
    script = READY + (
        "for line in sys.stdin:\n"
        "    out.write('{\"val'); out.flush(); time.sleep(0.05)\n"
        "    out.write('ue\": \"' + 'x' * 3_000_000 + '\"}\\n'); out.flush()\n"
    )
    with linked(script=script) as link:
        for _ in range(2):
            assert link.ask(30, "talk") == "x" * 3_000_000


def test_one_that_does_not_answer_is_killed_and_another_one_started():
    with linked(script=READY + "sys.stdin.readline(); time.sleep(600)") as link:
        first = link.pid
        with pytest.raises(KernelError, match=r"did not count within 0\.2 s and was killed$"):
            link.ask(0.2, "count")
        assert link.pid is None
        assert not Path("/proc", str(first)).exists()
        with pytest.raises(KernelError, match="did not count"):
            link.ask(0.2, "count")


def test_one_that_dies_is_quoted():
    with (
        linked(script=READY + "sys.stdin.readline(); raise SystemExit('no luck today')") as link,
        pytest.raises(KernelError, match=r"ended with 1 \(no luck today\) as it was to count$"),
    ):
        link.ask(10, "count")


def test_one_that_is_killed_is_started_again(namespace):
    with contextlib.closing(namespace.call(lambda: Link("IPv4"))) as link:
        assert link.ask(30, "census") == {}
        first = link.pid
        os.kill(first, signal.SIGKILL)
        with pytest.raises(KernelError, match=r"ended with -9 as it was to census"):
            link.ask(30, "census")
        assert link.ask(30, "census") == {}
        assert link.pid != first


def test_nonsense_is_an_error_of_one_question():
    with linked() as link:
        first = link.pid
        with pytest.raises(KernelError, match="KeyError: 'dance'"):
            link.ask(30, "dance")
        with pytest.raises(KernelError, match="ValidationError"):
            link.ask(30, "census", jumps=7)
        assert link.ask(30, "census") == {}
        assert link.pid == first


def test_close_ends_it():
    link = Link("IPv4")
    pid = link.pid
    link.ask(30, "census")
    link.close()
    link.close()
    assert not Path("/proc", str(pid)).exists()


def test_it_lives_in_the_namespace_of_the_thread_that_made_it(namespace):
    load(namespace, "iptables-legacy", "*nat", ":KUBE-SERVICES - [0:0]", "COMMIT")
    with contextlib.closing(namespace.call(lambda: Link("IPv4"))) as link:
        assert link.ask(30, "census") == {"nat": {"KUBE-SERVICES": 0}}
        assert os.stat(f"/proc/{link.pid}/ns/net").st_ino == os.fstat(namespace.fd).st_ino


def test_a_family_each():
    """Both in one process would break the second one's NAT targets."""
    extensions = [("target", "DNAT", ()), ("target", "MASQUERADE", ("random-fully",))]
    with linked("IPv4") as one, linked("IPv6") as other:
        assert one.ask(30, "probe", extensions=extensions) == {}
        assert other.ask(30, "probe", extensions=extensions) == {}
        assert one.ask(30, "probe", extensions=extensions) == {}


PARENT = """
import os, sys
from proxycore_iptables.link import Link
link = Link("IPv4")
link.ask(30, "census")
print(link.pid, flush=True)
sys.stdin.read()
os.kill(os.getpid(), 9)
"""


def test_it_dies_with_its_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert Path("/proc", str(pid)).exists()
        parent.communicate("")
    assert parent.returncode == -signal.SIGKILL
    assert ended(pid)


AT_WORK = """
import os, sys, threading
from proxycore_iptables.link import Link
worker = '''
import sys, time
from proxycore_iptables import worker
def hang(raw, request):
    print("hangs", file=sys.stderr)
    time.sleep(600)
worker._REQUESTS = {"hang": hang}
worker.main("IPv4", int(sys.argv[2]), int(sys.argv[3]))
'''
link = Link("IPv4", (sys.executable, "-c", worker))
print(link.pid, flush=True)
def die():
    while not os.pread(link._complaints.fileno(), 10, 0):
        pass
    os.kill(os.getpid(), 9)
threading.Thread(target=die).start()
link.ask(600, "hang")
"""


def test_it_dies_with_its_parent_while_at_work():
    done = subprocess.run(
        [sys.executable, "-c", AT_WORK], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert ended(int(done.stdout))


def test_standard_output_stays_ours(namespace, capfd):
    load(namespace, "iptables-legacy", "*nat", ":KUBE-SERVICES - [0:0]", "COMMIT")
    stop = threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        while not stop.is_set():
            os.write(1, b"x\n")
            written += 1
            time.sleep(0.0005)

    writer = threading.Thread(target=write)
    writer.start()
    with contextlib.closing(namespace.call(lambda: Link("IPv4"))) as link:
        rule = '-m conntrack --ctstate NEW -m comment --comment "a b" -j KUBE-SERVICES'
        for chain in ("OUTPUT", "PREROUTING"):
            assert link.ask(30, "assert_jumps", jumps=[("nat", chain, rule)]) == [["nat", chain, rule]]
    stop.set()
    writer.join()
    assert capfd.readouterr().out == "x\n" * written


IN_BETWEEN = """
import subprocess
from proxycore_iptables import worker
from proxycore_iptables.raw import Raw
opened = []
def change(table):
    opened.append(table)
    table.insert("OUTPUT", "-j OURS")
    if len(opened) < 3:
        subprocess.run(["iptables-legacy", "-w", "5", "-t", "nat", "-A", "OUTPUT", "-j", "RETURN"], check=True)
    return ["done"]
raw = Raw("IPv4")
print(worker.changed(raw, "nat", change), len(opened))
"""


def test_who_takes_no_lock_is_noticed_by_the_kernel_and_kept(namespace):
    load(namespace, "iptables-legacy", "*nat", ":OURS - [0:0]", "COMMIT")
    assert namespace.run([sys.executable, "-c", IN_BETWEEN]).stdout == "['done'] 3\n"
    rules = [line for line in saved(namespace, "iptables-legacy") if line.startswith("-A")]
    assert rules == ["-A OUTPUT -j OURS", "-A OUTPUT -j RETURN", "-A OUTPUT -j RETURN"]


def test_no_module_of_the_kernel_is_loaded_for_the_import():
    """python-iptables runs modprobe when it is imported, and ldconfig to find the extensions."""
    code = (
        "import subprocess\nran = []\n"
        "class Popen(subprocess.Popen):\n"
        "    def __init__(self, command, *a, **k):\n        ran.append(command)\n        super().__init__(command, *a, **k)\n"
        "subprocess.Popen = Popen\n"
        "from proxycore_iptables.raw import Raw\nraw = Raw('IPv4')\nprint([r for r in ran if 'ldconfig -p' not in str(r)])\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "modprobe" not in said
    assert "ldconfig', '-N'" not in said
