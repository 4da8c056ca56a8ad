"""An API server at the other end: a start with it, a start without it, one change, memory."""

from __future__ import annotations

import http.client
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from statistics import quantiles

from proxycore.testing.apiserver import FakeAPIServer

from . import cluster
from .measure import median, memory_mb
from .proxy import Proxy
from .report import Row

SERVICES = 10_000
CHANGES = 300
METRICS_PORT = 10249
NETLINK_NETFILTER, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES = 12, 270, 1, 7


def run(*, full: bool) -> Iterator[Row]:
    for services in (1, SERVICES):
        with FakeAPIServer() as server, tempfile.TemporaryDirectory() as folder:
            _fill(server, services)
            yield from _of(server, Path(folder), services, 5 if full else 3)


def _fill(server: FakeAPIServer, services: int) -> None:
    server.apply({"kind": "Node", "apiVersion": "v1", "metadata": {"name": cluster.NODE}})
    for number in range(services):
        server.apply(cluster.service(number))
        server.apply(cluster.endpoint_slice(number))


def _of(server: FakeAPIServer, folder: Path, services: int, runs: int) -> Iterator[Row]:
    large = services == SERVICES
    what = f"{services:,} x {cluster.ENDPOINTS}"
    kubeconfig = server.kubeconfig(folder / "kubeconfig")
    options = ("--kubeconfig", kubeconfig, "--set", f"lastKnownGood.file={folder / 'state'}")
    walls = []
    for _ in range(runs):
        with Proxy("kubernetes", *options) as proxy:
            walls.append(proxy.wait_programmed(services))
    yield Row(
        what=f"proxyctl run, exec to programmed, {what}",
        value=median(walls),
        unit="s",
        bar=5 if large else None,
        note="API server on loopback",
    )
    with Proxy("kubernetes", *options) as proxy:
        proxy.wait_programmed(services)
        while not (folder / "state").exists():
            time.sleep(0.05)
        time.sleep(3.0)
        yield Row(
            what=f"resident, {what}",
            value=memory_mb(proxy.pid),
            unit="MB",
            bar=150 if large else 80,
            note="API server on loopback",
        )
        yield Row(what=f"resident, at most, {what}", value=memory_mb(proxy.pid, "VmHWM"), unit="MB")
        with _Commits() as commits:
            delays = [commits.after(partial(_change, server, services, number)) for number in range(CHANGES)]
        cuts = quantiles(delays, n=100)
        yield Row(what=f"one change, server to kernel, p50, {what}", value=cuts[49] * 1e3, unit="ms")
        yield Row(what=f"one change, server to kernel, p99, {what}", value=cuts[98] * 1e3, unit="ms")
        scrapes = [_scrape() for _ in range(20)]
        yield Row(what=f"one scrape of /metrics, {what}", value=median(scrapes) * 1e3, unit="ms")
    server.stop()
    walls = []
    for _ in range(runs):
        subprocess.run(["nft", "flush", "ruleset"], check=True)
        with Proxy("kubernetes", *options) as proxy:
            walls.append(proxy.wait_programmed(services))
    yield Row(
        what=f"start without the API server, exec to served from the disk, {what}",
        value=median(walls),
        unit="s",
        bar=2,
    )


def _change(server: FakeAPIServer, services: int, number: int) -> None:
    server.apply(cluster.endpoint_slice(number * 7 % services, shift=number + 1))


class _Commits:
    """The ruleset's commits, as the kernel tells of them."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES)
        self._socket.settimeout(10.0)

    def __enter__(self) -> _Commits:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def after(self, change: Callable[[], object]) -> float:
        """Seconds from the change until a commit."""
        time.sleep(0.01)
        self._socket.setblocking(False)
        with suppress(BlockingIOError):
            while self._socket.recv(1 << 16):
                pass
        self._socket.settimeout(10.0)
        began = time.perf_counter()
        change()
        self._socket.recv(1 << 16)
        return time.perf_counter() - began


def _scrape() -> float:
    began = time.perf_counter()
    with closing(http.client.HTTPConnection("127.0.0.1", METRICS_PORT)) as connection:
        connection.request("GET", "/metrics")
        connection.getresponse().read()
    return time.perf_counter() - began
