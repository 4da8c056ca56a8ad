"""The guest runner: what a command gets and gives, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxycore.errors import KernelError
from proxycore.testing.uml import Guest, GuestTimeout, GuestUnavailable, guest, missing_modules, run

RUNNER = (sys.executable, "-m", "proxycore.testing.uml", "--modules", "")
EVERY_BYTE = bytes(range(256)) * 400
PATIENCE_SECONDS = 30.0


@pytest.fixture
def _booting() -> None:
    if (reason := guest.problem()) is not None:
        pytest.skip(reason)


def boots(test):
    """Marks a test that starts a guest."""
    return pytest.mark.root(pytest.mark.usefixtures("_booting")(test))


def processes_of(control: Path) -> list[int]:
    """Processes of a guest, by its folder in their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(control) in words:
                found.append(int(entry.name))
    return found


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_gone(control: Path) -> bool:
    return not processes_of(control) and not control.exists()


COMMAND = """
cat every-byte
cat every-byte >&2
test -t 1 || echo no terminal
echo "$GREETING; $(id -u); $HOME-"
read -r line || echo no input
echo kept >kept/file
echo gone >gone
rm every-byte
sleep 1000 &
exit 7
"""


@boots
def test_streams_status_files_and_environment(tmp_path):
    (tmp_path / "every-byte").write_bytes(EVERY_BYTE)
    (tmp_path / "kept").mkdir()
    done = run(
        ["sh", "-c", COMMAND],
        directory=tmp_path,
        writable=[tmp_path / "kept"],
        environment={"GREETING": 'it\'s "so"\nand so', "PATH": os.environ["PATH"]},
        modules=(),
    )
    said = b'no terminal\nit\'s "so"\nand so; 0; -\nno input\n'
    assert (done.stdout, done.stderr, done.status) == (EVERY_BYTE + said, EVERY_BYTE, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["every-byte", "kept"]
    assert (tmp_path / "kept" / "file").read_text() == "kept\n"


@boots
def test_a_slow_reader_gets_everything():
    got = bytearray()

    def read_slowly(data: bytes) -> None:
        got.extend(data)
        time.sleep(0.01)

    with Guest(["seq", "100000"], modules=()) as made:
        assert made.wait(got.extend, read_slowly) == 0
    assert bytes(got) == "".join(f"{number}\n" for number in range(1, 100001)).encode()


@boots
def test_a_command_that_does_not_end_in_time():
    with Guest(["sleep", "1000"], modules=()) as made:
        wait_until(lambda: processes_of(made.control) != [])
        with pytest.raises(GuestTimeout, match="did not end within 1 s"):
            made.wait(print, print, timeout=1)
        assert is_gone(made.control)


@boots
def test_a_kernel_that_dies_is_told_from_a_command_that_fails():
    with (
        Guest(["sh", "-c", "echo begun; sleep 1; echo c >/proc/sysrq-trigger"], modules=()) as made,
        pytest.raises(KernelError, match=r"the guest ended without a result: Kernel panic .*sysrq"),
    ):
        made.wait(print, print)
    assert is_gone(made.control)


@boots
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_runner(tmp_path, number):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [*RUNNER, "--", "sh", "-c", "echo running; exec sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as runner:
        try:
            assert runner.stdout.readline() == b"running\n"
            (control,) = tmp_path.glob("px-uml-*")
            assert processes_of(control) != []
        finally:
            runner.send_signal(number)
        assert runner.wait(PATIENCE_SECONDS) != 0
    wait_until(lambda: is_gone(control))
    assert list(tmp_path.iterdir()) == []


@boots
@pytest.mark.parametrize(
    ("options", "command", "status", "said"),
    [
        ([], ["sh", "-c", "printf out; printf err >&2; exit 3"], 3, "err"),
        (
            ["--modules", "dummy ip_nothing"],
            ["no-such-command"],
            127,
            "uml: not in this kernel: ip_nothing\n",
        ),
        (["--timeout", "0.5"], ["sleep", "1000"], 124, "uml: the guest's command did not end within 0.5 s\n"),
        (["--out", "/no/such"], ["true"], 125, "uml: not a folder that a guest can write to: /no/such\n"),
    ],
)
def test_the_command_line(options, command, status, said):
    done = subprocess.run([*RUNNER, *options, "--", *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "out" if status == 3 else "")
    assert done.stderr.startswith(said)


def test_modules_that_the_kernel_lacks_are_named(monkeypatch, tmp_path):
    (tmp_path / "modules.dep").write_text(
        "kernel/net/netfilter/ipvs/ip_vs.ko: kernel/x.ko\nkernel/nf-odd.ko:\n"
    )
    (tmp_path / "modules.builtin").write_text("kernel/net/core.ko\n")
    monkeypatch.setattr(guest, "_modules_at", lambda: tmp_path)
    assert missing_modules(["ip_vs", "nf_odd", "core", "ip_vs_twos"]) == ("ip_vs_twos",)


def test_what_to_install_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    guest.problem.cache_clear()
    try:
        with pytest.raises(KernelError, match=r"no linux\.uml .* here: apt-get install user-mode-linux kmod"):
            Guest(["true"])
    finally:
        guest.problem.cache_clear()


@boots
def test_where_user_mode_linux_does_not_start(monkeypatch, tmp_path):
    (tmp_path / "9.9").mkdir()
    for index in ("modules.dep", "modules.builtin"):
        (tmp_path / "9.9" / index).touch()
    kernel = tmp_path / "linux.uml"
    kernel.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo 9.9 && exit\necho ptrace: not permitted\nexit 1\n"
    )
    kernel.chmod(0o755)
    monkeypatch.setattr(guest, "MODULE_FOLDER", tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    guest._modules_at.cache_clear()
    try:
        with (
            Guest(["true"], modules=()) as made,
            pytest.raises(GuestUnavailable, match="does not start here: ptrace: not permitted"),
        ):
            made.wait(print, print)
        assert is_gone(made.control)
    finally:
        guest._modules_at.cache_clear()


MARK = b"\x1d\x1e0123"


@given(
    st.lists(st.sampled_from([b"\x1d", b"\x1d\x1e", b"\x1e", b"0", b"12", b"a", MARK[:-1]])),
    st.integers(0, 255),
    st.data(),
)
def test_a_stream_is_split_from_its_mark_however_it_comes(pieces, status, data):
    content = b"".join(pieces)
    if MARK in content:
        return
    whole = content + MARK + b"%03d" % status
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    got = bytearray()
    stream = guest._Stream(MARK, got.extend)
    ends = [
        stream.feed(whole[begin:end])
        for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)
        if begin < end
    ]
    assert (bytes(got), ends[-1], set(ends[:-1]) - {None}) == (content, status, set())


def test_bytes_that_cannot_begin_the_mark_go_on_at_once():
    got = bytearray()
    stream = guest._Stream(MARK, got.extend)
    stream.feed(b"prompt> ")
    assert bytes(got) == b"prompt> "
