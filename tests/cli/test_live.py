"""Commands that last, as processes: what they leave, how signals end them, who reads them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from .conftest import Installed, Run

SECONDS = 30.0
"""Only how long a failing test may hang."""


HARMLESS = [
    word
    for setting in (
        "takeover=leave", "conntrack.maxPerCore=0", "conntrack.min=0", "conntrack.tcpEstablishedTimeout=0s",
        "conntrack.tcpCloseWaitTimeout=0s", "healthzBindAddress=", "metricsBindAddress=",
    )
    for word in ("--set", setting)
]  # fmt: skip
"""A run that leaves the machine's own network and its ports alone."""


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
        "run", "--backend", "mem", "--source", f"file:{installed.manifests}", "--safe", "--log-format", "json",
        *HARMLESS,
    )  # fmt: skip
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_daemon_set_of_kube_proxys_runs_and_follows_its_config_map(installed: Installed) -> None:
    folder = installed.kernel.with_name("kube-proxy")
    folder.mkdir()
    text = (
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
        "conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}\n"
        f"healthzBindAddress: 127.0.0.1:{free_port()}\nmetricsBindAddress: 127.0.0.1:{free_port()}\n"
    )

    def swap(version: str, more: str) -> None:
        (folder / version).mkdir()
        (folder / version / "config.conf").write_text(text + more)
        (folder / "new").symlink_to(version)
        (folder / "new").rename(folder / "..data")

    swap("..1", "clusterCIDR: 10.244.0.0/16\n")
    (folder / "config.conf").symlink_to("..data/config.conf")
    variables = {
        "PROXYCORE_BACKEND": "mem",
        "PROXYCORE_SOURCE": f"file:{installed.manifests}",
        "PROXYCORE_TAKEOVER": "leave",
    }
    installed.environ.update(variables)
    with installed.popen(
        "kube-proxy", f"--config={folder}/config.conf", "--hostname-override=node-7", "-v=4"
    ) as process:
        assert process.stderr is not None
        try:
            started = lines_until(process.stderr, "msg=synced")
            assert any("msg=starting" in line and "node=node-7" in line for line in started)
            process.send_signal(signal.SIGHUP)
            lines_until(process.stderr, "nothing changed")
            swap("..2", "clusterCIDR: 10.0.0.0/8\nmode: ipvs\n")
            lines = lines_until(process.stderr, "field=clusterCIDR")
            assert 'effect="at once"' in lines[-1]
            assert "old=10.244.0.0/16 new=10.0.0.0/8" in lines[-1]
            swap("..3", "clusterCIDR: 10.0.0.0/33\n")
            lines_until(process.stderr, "config.conf:6: clusterCIDR: '10.0.0.0/33' is no CIDR")
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=SECONDS)
            assert process.returncode == 0
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
