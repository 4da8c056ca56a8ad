"""Resident memory: the engine with the nft backend in this process, and `proxyctl run` as a process of its own."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import proxycore.runtime  # noqa: F401  the parts of a real process

from . import cluster
from .live import SETTLED_SECONDS, Live
from .measure import memory_mb
from .proxy import Proxy
from .report import Row

IDLE_MB, LOADED_MB = 80, 150
SERVICES = 10_000


def run(*, full: bool) -> Iterator[Row]:
    gc.freeze()
    with Live(1) as live:
        yield Row(what="engine and nft, idle", value=memory_mb(), unit="MB", bar=IDLE_MB)
        live.rest()
    with Live(SERVICES) as live:
        yield Row(what="engine and nft, 100,000 endpoints", value=memory_mb(), unit="MB", bar=LOADED_MB)
        yield Row(what="the same, at most", value=memory_mb(field="VmHWM"), unit="MB")
        before = memory_mb()
        for shift in range(1, 11 if full else 4):
            for start in range(0, SERVICES, 500):
                page = range(start, start + 500)
                live.apply([cluster.to_bytes(cluster.endpoint_slice(n, shift=shift)) for n in page])
        yield Row(
            what="gained after every Service has changed" + (" ten times" if full else " three times"),
            value=memory_mb() - before,
            unit="MB",
            bar=10,
        )
    for what, services, bar in (("idle", 1, IDLE_MB), ("100,000 endpoints", SERVICES, LOADED_MB)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "objects.json")
            cluster.write_list(path, services)
            with Proxy(f"file:{path}") as proxy:
                proxy.wait_programmed(services)
                time.sleep(SETTLED_SECONDS)
                yield Row(what=f"proxyctl run, {what}", value=memory_mb(proxy.pid), unit="MB", bar=bar)
                yield Row(
                    what=f"proxyctl run, {what}, at most", value=memory_mb(proxy.pid, "VmHWM"), unit="MB"
                )
