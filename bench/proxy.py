"""`proxyctl run` as an operator starts it, on a file or on an API server."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from types import TracebackType

from . import cluster

PATIENCE_SECONDS = 120.0
_SYNCED = re.compile(r"msg=synced .*?changes=(\d+)")


class Proxy:
    """Runs while the context is entered; `began` is the moment before its exec."""

    def __init__(self, source: str, *options: str, keep: bool = False) -> None:
        """`source` and `options` as on the command line.  `keep`: the rules stay at the end."""
        argv = [sys.executable, "-m", "proxycore", "run", "--backend", "nft", "--source", source, *options]
        argv += ["--node-name", cluster.NODE, "--set", "clusterCIDR=10.0.0.0/8"]
        self._keep = keep
        self._said: list[str] = []
        self.began = time.perf_counter()
        self._process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
        if self._keep:
            return
        clean = [sys.executable, "-m", "proxycore", "cleanup", "--backend", "nft"]
        subprocess.run(clean, capture_output=True, check=False)

    def wait_programmed(self, services: int) -> float:
        """Seconds from exec until that many Service ports are in force."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line)
            found = _SYNCED.search(line)
            if found and int(found[1]) >= services:
                return time.perf_counter() - self.began
        raise RuntimeError(f"proxyctl run ended: {''.join(self._said[-5:])}")
