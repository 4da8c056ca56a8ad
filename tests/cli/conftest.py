"""A backend that keeps all in memory, installed as a distribution of its own, and manifests of one Service."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from proxycore.cli import main

BACKEND = '''
from proxycore.api import *
from pathlib import Path


class Plugin:
    """Its kernel is the file that the variable names: a line for each Service port."""

    @hookimpl
    def proxycore_backend_describe(self):
        return BackendInfo(name="mem", summary="keeps all in a file", api=">=0.1,<0.2",
                           capabilities=frozenset({Capability.IPV4, Capability.TCP}), conntrack=False)

    @hookimpl
    def proxycore_backend_probe(self, context):
        if wrong := os.environ.get("MADE_UP_WRONG"):
            raise ConfigError("is wrong", field=wrong)
        return Probe(facts={"colour": "blue"}, problems=PROBLEMS)

    @hookimpl
    def proxycore_backend_start(self, context):
        return Started()

    @hookimpl
    def proxycore_backend_apply(self, batch):
        with open(PATH, "w") as file:
            file.writelines(f"{change.name}\\n" for change in batch.changes if change.after)
        return ApplyResult(generation=batch.generation, operations=len(batch.changes))

    @hookimpl
    def proxycore_backend_render(self, context, batch):
        assert batch.full
        return "".join(f"{c.name} {c.after.frontends[0]} {c.after.cluster.endpoints[0]}\\n" for c in batch.changes)

    @hookimpl
    def proxycore_backend_plan(self, batch):
        try:
            held = Path(PATH).read_text().splitlines()
        except FileNotFoundError:
            held = []
        names = [str(change.name) for change in batch.changes]
        return tuple(Operation(verb="add", native=f"line {name}", service=name) for name in names if name not in held)

    @hookimpl
    def proxycore_backend_cleanup(self):
        try:
            removed = tuple(Path(PATH).read_text().splitlines())
            os.unlink(PATH)
        except FileNotFoundError:
            return Cleanup()
        return Cleanup(removed=removed)


import os

PATH = os.environ["MADE_UP_KERNEL"]
PROBLEMS = tuple(filter(None, [os.environ.get("MADE_UP_PROBLEM")]))
'''
TOML = """
name = "mem"
summary = "keeps all in a file"
api = ">=0.1,<0.2"
capabilities = ["ipv4", "tcp"]
conntrack = false
requires_root = false
"""
MANIFESTS = """
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.80
  clusterIPs: [10.96.0.80]
  ipFamilies: [IPv4]
  ports: [{name: http, port: 80, protocol: TCP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints: [{addresses: [10.244.1.7], conditions: {ready: true}}]
"""


class Installed(NamedTuple):
    """Where things are; `environ` makes a child process see the made-up distribution."""

    site: Path
    kernel: Path
    manifests: Path
    environ: dict[str, str]

    def popen(self, *arguments: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "proxycore", *arguments],
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    site = tmp_path / "site"
    add_distribution(site, "mem", BACKEND, TOML)
    folder = tmp_path / "manifests"
    folder.mkdir()
    (folder / "web.yaml").write_text(MANIFESTS)
    kernel = tmp_path / "kernel"
    for name in [name for name in os.environ if name.startswith("PROXYCORE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MADE_UP_KERNEL", str(kernel))
    monkeypatch.syspath_prepend(site)
    yield Installed(site, kernel, folder, {**os.environ, "PYTHONPATH": str(site)})
    for module in [name for name in sys.modules if name.startswith("made_up_")]:
        del sys.modules[module]


def add_distribution(site: Path, name: str, code: str, toml: str) -> None:
    """What pip would leave behind."""
    package = site / f"made_up_{name}"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    (package / "backend.toml").write_text(toml)
    info = site / f"made_up_{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: made-up-{name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[proxycore.backends]\n{name} = made_up_{name}:Plugin\n")
    importlib.invalidate_caches()


@pytest.fixture
def proxyctl(installed: Installed, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
