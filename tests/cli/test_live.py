"""Commands that last, as processes: what they leave, how signals end them, who reads them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from .conftest import Installed, Run

SECONDS = 30.0
"""Only how long a failing test may hang."""


def lines_until(stream: IO[str], word: str) -> list[str]:
    """Read up to a line with the word in it."""
    lines = []
    for line in stream:
        lines.append(line)
        if word in line:
            return lines
    raise AssertionError(f"{word!r} was never said:\n{''.join(lines)}")


def test_record_ends_by_itself_after_a_time(installed: Installed, proxyctl: Run) -> None:
    file = installed.kernel.with_name("today.rec")
    code, out, err = proxyctl("record", "--source", f"file:{installed.manifests}", "--for", "0.01", file)
    assert (code, out) == (0, "")
    assert err.endswith(f"events recorded to {file}\n")
    assert file.read_text().startswith('{"proxycoreRecording":1')


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_programs_and_leaves_it_when_a_signal_ends_it(
    installed: Installed, number: signal.Signals
) -> None:
    process = installed.popen(
        "run", "--backend", "mem", "--source", f"file:{installed.manifests}", "--safe", "--log-format", "json"
    )
    with process:
        assert process.stderr is not None
        assert process.stdout is not None
        try:
            lines = lines_until(process.stderr, '"synced"')
            process.send_signal(number)
            assert process.wait(SECONDS) == 0
            assert process.stdout.read() == ""
        finally:
            process.kill()
    assert installed.kernel.read_text() == "shop/web:http\n"
    assert all(line.startswith("{") for line in lines)


STUBBORN = """
import signal, sys
from proxycore.signals import stopping
with stopping(lambda: print("stopping", flush=True)):
    print("ready", flush=True)
    while True:
        signal.pause()
"""


def test_the_second_signal_ends_the_process_at_once() -> None:
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "stopping\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(SECONDS) == 128 + signal.SIGINT
        finally:
            process.kill()


HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def test_handlers_come_back() -> None:
    from proxycore.signals import stopping

    before = [signal.getsignal(number) for number in HANDLED]
    with stopping(lambda: None):
        assert signal.getsignal(signal.SIGTERM) is not before[0]
        assert signal.getsignal(signal.SIGHUP) is before[2]
    with stopping(lambda: None, lambda: None):
        assert signal.getsignal(signal.SIGHUP) is not before[2]
    assert [signal.getsignal(number) for number in HANDLED] == before


FOLLOWING = """
import sys, threading
from proxycore import logs
from proxycore.options import resolve
from proxycore.reload import Reloader
from proxycore.signals import stopping

logs.configure("text", 4, sys.stdout)
done = threading.Event()
reloader = Reloader(resolve(sys.argv[1:], {}, {}), lambda difference, loaded: None, logs.get("config"))
with stopping(done.set, reloader.request):
    reloader.start()
    print("ready", flush=True)
    while not done.wait(0.05):
        pass
reloader.stop()
print("stopped", flush=True)
"""


def test_the_hang_up_signal_reads_the_configuration_again(tmp_path: Path) -> None:
    file = tmp_path / "c"
    head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
    file.write_text(head)
    command = [sys.executable, "-c", FOLLOWING, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines_until(process.stdout, "ready")
            for _ in range(3):
                process.send_signal(signal.SIGHUP)
                lines_until(process.stdout, "nothing changed")
            file.write_text(f"{head}oomScoreAdj: low\n")
            lines_until(process.stdout, f"{file}:3: oomScoreAdj: must be a whole number")
            process.send_signal(signal.SIGHUP)
            lines_until(process.stdout, f"{file}:3: oomScoreAdj: must be a whole number")
            process.send_signal(signal.SIGTERM)
            lines_until(process.stdout, "stopped")
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()


def test_a_recording_renders_as_its_source_does(installed: Installed, proxyctl: Run) -> None:
    file = installed.kernel.with_name("today.rec")
    with installed.popen("record", "--source", f"file:{installed.manifests}", "-") as process:
        assert process.stdout is not None
        try:
            lines = lines_until(process.stdout, '"synced"')
            process.send_signal(signal.SIGINT)
            rest, err = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "events recorded to standard output" in err
    file.write_text("".join(lines) + rest)
    rendered = proxyctl("render", "--backend", "mem", "--source", f"recording:{file}")
    assert rendered.code == 0
    assert rendered.out == proxyctl("render", "--backend", "mem", installed.manifests).out


def test_a_reader_that_went_away_ends_it_quietly(installed: Installed) -> None:
    read, write = os.pipe()
    os.close(read)
    with installed.popen("config", "show", stdout=write) as process:
        os.close(write)
        _, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (141, "")


def test_help_for_a_reader_that_went_away(installed: Installed) -> None:
    read, write = os.pipe()
    os.close(read)
    with installed.popen("--help", stdout=write) as process:
        os.close(write)
        _, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (141, "")
