"""Knobs of a network namespace: real files of the kernel's, read back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from proxycore import logs
from proxycore.config.model import Config, Conntrack
from proxycore.hostplan import CONNTRACK_MAX, Setting, plan
from proxycore.hostsetup import prepare
from proxycore.kernel import sysctl
from proxycore.testing.netns import Namespace

pytestmark = pytest.mark.root

NETFILTER = Path("/proc/sys/net/netfilter")
KNOBS = {
    "nf_conntrack_tcp_timeout_established": 4321,
    "nf_conntrack_tcp_timeout_close_wait": 77,
    "nf_conntrack_tcp_be_liberal": 1,
    "nf_conntrack_udp_timeout": 33,
    "nf_conntrack_udp_timeout_stream": 144,
}
CONFIG = Config(
    conntrack=Conntrack(
        max_per_core=0,
        tcp_established_timeout_seconds=4321,
        tcp_close_wait_timeout_seconds=77,
        tcp_be_liberal=True,
        udp_timeout_seconds=33,
        udp_stream_timeout_seconds=144,
    )
)


@pytest.fixture
def namespace():
    with Namespace("sysctl") as made:
        yield made


def read() -> dict[str, int]:
    return {knob: int((NETFILTER / knob).read_text()) for knob in KNOBS}


def net_only(config: Config, cpus: int = 1) -> tuple[Setting, ...]:
    return tuple(setting for setting in plan(config, cpus) if not setting.ours)


def test_timeouts_are_set_in_this_namespace_and_in_no_other(namespace):
    outside = read()
    outcome = namespace.call(lambda: sysctl.apply(net_only(CONFIG)))
    assert outcome.left == ()
    assert {w.setting.name: w.setting.value for w in outcome.written} == KNOBS
    assert namespace.call(read) == KNOBS
    assert read() == outside
    assert namespace.call(lambda: sysctl.apply(net_only(CONFIG))) == sysctl.Outcome()


def test_a_namespace_cannot_set_the_machines_limit_and_that_is_no_error(namespace):
    """Also with --init-only: whoever runs in a namespace has no say in it, and needs none."""
    before = Path(CONNTRACK_MAX).read_text()
    limit = Setting(CONNTRACK_MAX, 1 << 30, True, "a test")
    # The kernel would refuse it even if it were writable: only the first namespace may.
    outcome = namespace.call(lambda: sysctl.apply((limit,)))
    assert [left.cause for left in outcome.left] == ["namespace"]
    assert Path(CONNTRACK_MAX).read_text() == before
    big = Config(conntrack=Conntrack(max_per_core=1 << 20))
    assert namespace.call(lambda: prepare(big, log=logs.get("host"), strict=True, cpus=1))
    assert Path(CONNTRACK_MAX).read_text() == before


def test_a_number_out_of_range_is_refused_by_the_kernel(namespace):
    knob = Setting("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal", 7, False, "a test")
    [left] = namespace.call(lambda: sysctl.apply((knob,))).left
    assert left.cause == "refused"


def test_online_cpus():
    assert sysctl.online_cpus() >= 1


READ_ONLY = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    'mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec "$@"',
    "sh",
)
"""As in a container without all rights."""
RUN = (sys.executable, "-m", "proxycore", "run", "--backend", "nft", "--log-format", "json")


def config_file(tmp_path: Path, seconds: int) -> str:
    file = tmp_path / "config.yaml"
    file.write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\n"
        "kind: KubeProxyConfiguration\n"
        f"conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: {seconds}s, tcpCloseWaitTimeout: 0s}}\n"
    )
    return str(file)


def init_only(namespace: Namespace, tmp_path: Path, *before: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "objects").mkdir()
    words = [*before, *RUN, "--init-only", "--source", f"file:{tmp_path / 'objects'}"]
    return namespace.run([*words, "--config", config_file(tmp_path, 4321)], check=False)


def test_init_only_sets_them_and_ends(namespace, tmp_path):
    done = init_only(namespace, tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert namespace.call(read)["nf_conntrack_tcp_timeout_established"] == 4321
    assert namespace.run(["nft", "list", "tables"]).stdout == "", "it programs nothing"


def test_init_only_without_the_rights_ends_with_an_error(namespace, tmp_path):
    done = init_only(namespace, tmp_path, *READ_ONLY)
    assert done.returncode == 1
    [line] = [entry for text in done.stderr.splitlines() if (entry := json.loads(text))["level"] == "error"]
    assert line["knob"] == "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established"
    assert "Read-only file system" in line["error"]
    assert "privileged" in line["do"]
    assert namespace.call(read)["nf_conntrack_tcp_timeout_established"] != 4321


NOT_STRICT = """
import sys
from proxycore import hostsetup, logs
from proxycore.config.model import Config, Conntrack
logs.configure("json")
conntrack = Conntrack(max_per_core=0, tcp_established_timeout_seconds=4321, udp_timeout_seconds=33)
config = Config(conntrack=conntrack, oom_score_adj=-998)
sys.exit(0 if hostsetup.prepare(config, log=logs.get("host"), strict=False) else 9)
"""


def test_without_the_rights_a_run_says_so_in_one_line_and_goes_on(namespace):
    bare = ("setpriv", "--bounding-set", "-all,+net_admin", "--inh-caps", "-all")
    done = namespace.run([*READ_ONLY, *bare, sys.executable, "-c", NOT_STRICT])
    [line] = [json.loads(text) for text in done.stderr.splitlines()]
    assert line["level"] == "info"
    assert [knob.partition("=")[0] for knob in line["knobs"]] == [
        "nf_conntrack_tcp_timeout_established",
        "nf_conntrack_tcp_timeout_close_wait",
        "nf_conntrack_udp_timeout",
        "oom_score_adj",
    ]
    assert "--init-only" in line["do"]
