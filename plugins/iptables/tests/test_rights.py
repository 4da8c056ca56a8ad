"""A run with no more rights than the documentation asks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from proxycore.testing.clients import wait_until
from proxycore.testing.netns import Namespace

pytestmark = pytest.mark.root

SERVICE = """\
apiVersion: v1
kind: Service
metadata: {namespace: default, name: web}
spec:
  clusterIP: 172.30.0.41
  clusterIPs: [172.30.0.41]
  ports: [{name: http, port: 80}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: default, name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints: [{addresses: [10.180.0.1], conditions: {ready: true}}]
ports: [{name: http, port: 80}]
"""
CONFIG = """\
apiVersion: proxycore.io/v1alpha1
kind: ProxycoreConfiguration
backend: iptables
backendOptions: {iptables: {variant: %s}}
"""


def limited(tmp_path: Path, variant: str, rights: str) -> list[str]:
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "web.yaml").write_text(SERVICE)
    (tmp_path / "config.yaml").write_text(CONFIG % variant)
    return [
        *("setpriv", f"--bounding-set=-all,{rights}", f"--inh-caps=-all,{rights}"),
        *(sys.executable, "-m", "proxycore", "run", "--config", str(tmp_path / "config.yaml")),
        *("--source", f"file:{tmp_path / 'objects'}"),
    ]


@pytest.mark.parametrize(
    ("variant", "rights"), [("nft", "+net_admin"), ("legacy", "+net_admin,+net_raw")], ids=["nft", "legacy"]
)
def test_a_run_needs_no_more(variant, rights, tmp_path, monkeypatch):
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    with Namespace("rights") as namespace:
        log = tmp_path / "log"
        with log.open("w") as out:
            process = namespace.popen(
                limited(tmp_path, variant, rights), stdout=out, stderr=subprocess.STDOUT
            )
        try:
            save = [f"iptables-{variant}-save"]
            wait_until(lambda: "10.180.0.1:80" in namespace.run(save).stdout, log.read_text)
            flush = [f"iptables-{variant}", "-w", "5", "-t", "nat", "-F", "KUBE-SERVICES"]
            namespace.run(flush)
            wait_until(lambda: "172.30.0.41/32" in namespace.run(save).stdout, log.read_text)
        finally:
            process.terminate()
            process.wait(20)
        assert "cannot" not in log.read_text().replace("cannot be set", "")


def test_without_raw_sockets_legacy_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    with Namespace("rights") as namespace:
        done = namespace.run(limited(tmp_path, "legacy", "+net_admin"), check=False)
    assert done.returncode != 0
    assert "CAP_NET_RAW" in done.stderr
