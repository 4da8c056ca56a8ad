"""Knobs of a network namespace: real files of the kernel's, read back."""

from __future__ import annotations

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
