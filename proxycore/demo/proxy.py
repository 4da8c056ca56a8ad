"""The real thing: `proxyctl run` as a process of its own inside the node's namespace."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from ..errors import ProxyError
from .lab import NODE, Lab

PROXYCTL = (sys.executable, "-m", "proxycore")
STOP_SECONDS = 10.0
LOG_LINES = 30


class Proxy:
    """`proxyctl run` on `folder`, from enter to stop(); its messages go to `log`."""

    def __init__(
        self,
        lab: Lab,
        command: Sequence[str] = PROXYCTL,
        *,
        backend: str,
        folder: Path,
        config: Path,
        log: Path,
    ) -> None:
        self._lab = lab
        self._log = log
        self._command = command
        self.arguments = ["run", "--backend", backend, "--source", f"file:{folder}"]
        self.arguments += ["--node-name", NODE, "--config", str(config)]

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = self._lab.node.popen(
                [*self._command, *self.arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def check(self) -> None:
        """Raises ProxyError with the end of its log when the process has ended by itself."""
        status = self._process.poll()
        if status is not None:
            raise ProxyError(
                f"`proxyctl {' '.join(self.arguments)}` ended with status {status}:\n{self.tail()}"
            )

    def stop(self) -> None:
        """End it as an operator would.  Raises ProxyError when it does not end cleanly in time."""
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise ProxyError(
                f"proxyctl did not end within {STOP_SECONDS:g} s of SIGTERM:\n{self.tail()}"
            ) from None
        if status != 0:
            raise ProxyError(f"proxyctl ended with status {status} after SIGTERM:\n{self.tail()}")

    def tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
