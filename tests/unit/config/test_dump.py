"""A configuration is written as it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from proxycore.config import Loaded, dump, load

KUBE_PROXY = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

Write = Callable[..., Path]
Read = Callable[[str], Loaded]

SECTIONS = """\
iptables: {masqueradeBit: 1, masqueradeAll: true, syncPeriod: 11s, minSyncPeriod: 1s}
ipvs: {syncPeriod: 22s, minSyncPeriod: 2s, scheduler: lc, excludeCIDRs: [10.1.1.1/8], strictARP: true,
       tcpTimeout: 1s, tcpFinTimeout: 2s, udpTimeout: 3s}
nftables: {masqueradeBit: 3, syncPeriod: 33s, minSyncPeriod: 3s}
"""


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"mode: nftables\n{SECTIONS}",
        f"mode: ipvs\n{SECTIONS}---\nbackend: other\n",
        "hostnameOverride: '08'\nlogging: {vmodule: [{filePattern: 'a=\"\\x7f\\u00e9', verbosity: 3}]}",
        "featureGates: {A: true}\n---\nsource: 'file:/a b\\t#'\nbackendOptions: {iptables: {'yes': [~, 1.5, no, '0o17']}}",
        "detectLocalMode: NodeCIDR\nbindAddress: '::'\n---\nverifyInterval: 1.5ms\nobservers: {disabled: [x]}",
    ],
)
def test_what_is_written_reads_as_the_same_configuration(read: Read, write: Write, text: str) -> None:
    loaded = read(text)
    for origins in (False, True):
        again = load([write(dump(loaded, origins=origins), "again.yaml")])
        assert again.config == loaded.config
        assert again.values == loaded.values


def test_origins_stand_beside_the_fields(write: Write) -> None:
    path = write(f"{KUBE_PROXY}oomScoreAdj: 5\n")
    lines = dump(load([path], {"mode": "ipvs"}, {"PROXYCORE_SOURCE": "file:/m"}), origins=True).splitlines()
    assert lines[:3] == KUBE_PROXY.splitlines() + ["featureGates: {}  # default"]
    assert {f"oomScoreAdj: 5  # {path}", "mode: ipvs  # flag", 'source: "file:/m"  # environment'} < set(
        lines
    )
