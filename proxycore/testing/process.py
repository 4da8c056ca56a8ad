"""The proxy under test: `proxyctl run` as a process of its own in the node's namespace, and the folder it follows."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .lab import NODE_NAME, Lab
from .scenario import ObjectName

PROXYCTL = (sys.executable, "-m", "proxycore")
STOP_SECONDS = 10.0
LOG_LINES = 40


class Manifests:
    """A folder with one YAML file for each API object, changed as a careful writer does: by rename and by unlink."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._scratch = folder.with_name(f".{folder.name}-new")
        self._files: dict[ObjectName, Path] = {}
        self._numbers = itertools.count(1)
        folder.mkdir()

    def apply(self, item: Mapping[str, Any]) -> None:
        """Write an object; it replaces the one of its name in one step."""
        import yaml

        name = ObjectName.of(item)
        path = self._files.setdefault(
            name, self.folder / f"{next(self._numbers):04d}-{name.kind.lower()}.yaml"
        )
        # By way of JSON: an alias in the scenario's text must not become one in the manifest.
        self._scratch.write_text(yaml.safe_dump(json.loads(json.dumps(item)), sort_keys=False))
        self._scratch.rename(path)

    def delete(self, name: ObjectName) -> None:
        """Unlink an object's file.  Raises KeyError: it was never applied."""
        self._files.pop(name).unlink()


class ProxyProcess:
    """One run of the proxy, from enter to exit; `log` gets its stderr and stdout.

    `command` is what stands for `proxyctl`; the arguments of `run` are added to it.
    """

    def __init__(
        self,
        lab: Lab,
        *,
        backend: str,
        folder: Path,
        config: Path,
        log: Path,
        command: Sequence[str] = PROXYCTL,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._lab = lab
        self._log = log
        self._environment = {**os.environ, **(environment or {})}
        self.argv = [*command, "run", "--backend", backend, "--source", f"file:{folder}"]
        self.argv += ["--node-name", NODE_NAME, "--config", str(config)]

    def __enter__(self) -> ProxyProcess:
        with self._log.open("wb") as log:
            self._process = self._lab.node.popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def ended(self) -> str | None:
        """That the process has ended by itself, in a sentence; None while it runs."""
        status = self._process.poll()
        return None if status is None else f"the proxy ended by itself with status {status}"

    def stop(self) -> str | None:
        """End it as an operator would.  None when it ends in time and with status 0, else what happened instead."""
        if (ended := self.ended()) is not None:
            return ended
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return f"the proxy did not end within {STOP_SECONDS:g} s of SIGTERM"
        return None if status == 0 else f"the proxy ended with status {status} after SIGTERM"

    def tail(self) -> str:
        """The last lines of what it said."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
