"""From exec to a programmed node, and what the command line costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import cluster
from .measure import median
from .proxy import Proxy
from .report import Row


def run(*, full: bool) -> Iterator[Row]:
    for argv in (["--help"], ["--version"]):
        seconds = [_cpu_of([sys.executable, "-m", "proxycore", *argv]) for _ in range(5)]
        yield Row(what=f"proxyctl {argv[0]}", value=median(seconds), unit="s CPU", bar=0.3)
    with tempfile.TemporaryDirectory() as folder:
        for services, bar in ((1, None), (10_000, 5)):
            path = Path(folder, f"{services}.json")
            cluster.write_list(path, services)
            walls = []
            for _ in range(5 if full else 3):
                with Proxy(f"file:{path}") as proxy:
                    walls.append(proxy.wait_programmed(services))
            label = f"proxyctl run, exec to programmed, {services:,} x {cluster.ENDPOINTS}"
            yield Row(what=label, value=median(walls), unit="s", bar=bar, note="JSON file")


def _cpu_of(argv: list[str]) -> float:
    """CPU seconds of a process, its children included."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, argv
    return usage.ru_utime + usage.ru_stime
