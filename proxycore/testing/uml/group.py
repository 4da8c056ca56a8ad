"""The tests of one guest, as the host sees them: handed over together, reported one by one."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from ...errors import KernelError
from . import guest

INSIDE = "PROXYCORE_GUEST_TESTS"
"""Set in the guest only: the host's folder for names and news."""
REQUIRE = "PROXYCORE_REQUIRE_IPVS"
WANTED, NEWS = "wanted.json", "news.jsonl"
HINT = " (modprobe ip_vs may change that)"
FOREVER_SECONDS = 1e6
POLL_SECONDS = 0.05
TAIL_BYTES = 4000
_PHASES = ("setup", "call", "teardown")


class Group:
    """The tests of one guest, under way from the beginning.  close() it."""

    def __init__(
        self,
        config: pytest.Config,
        items: Sequence[pytest.Item],
        names: Sequence[str],
        silence_seconds: float,
    ) -> None:
        self._config = config
        self._silence_seconds = silence_seconds
        self._folder = Path(tempfile.mkdtemp(prefix="px-tests-"))
        (self._folder / WANTED).write_text(json.dumps(names))
        news = self._folder / NEWS
        news.touch()
        self._news = news.open("rb")
        self._heard = time.monotonic()
        self._part = b""
        self._reports: defaultdict[str, list[pytest.TestReport]] = defaultdict(list)
        self._running = ""
        self._said = b""
        self._end: str | None = None
        self._is_unavailable = False
        files = dict.fromkeys(str(item.path) for item in items)
        self._guest: guest.Guest | None = None
        self._thread = threading.Thread(target=self._watch, name="ipvs-guest")
        try:
            self._guest = guest.Guest(
                [sys.executable, "-m", "pytest", *_options(config), *files],
                writable=[self._folder],
                environment=_environment(self._folder),
                directory=config.invocation_params.dir,
            )
        except (KernelError, OSError) as error:
            self._end = str(error)
        else:
            self._thread.start()

    def _watch(self) -> None:
        """Wait for the guest, on a thread of its own."""
        assert self._guest is not None
        try:
            status = self._guest.wait(self._hear, self._hear, timeout=FOREVER_SECONDS)
        except KernelError as error:
            self._is_unavailable = isinstance(error, guest.GuestUnavailable)
            self._end = self._end or str(error)
        else:
            self._end = f"the guest's pytest ended with {status}"
            self._guest.close()

    def _hear(self, data: bytes) -> None:
        self._said = (self._said + data)[-TAIL_BYTES:]

    def reports(self, name: str, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """The reports of one test, as they come; a failure naming the reason in place of those that never will."""
        last = ""
        while last != "teardown":
            # In this order: what was written before the end is read after it.
            end = self._end
            self._read()
            waiting = self._reports.pop(name, [])
            for report in waiting:
                last = report.when or ""
                yield report
            if waiting:
                continue
            if end is not None:
                if self._is_unavailable and not os.environ.get(REQUIRE):
                    said = (
                        str(item.path),
                        item.location[1] or 0,
                        f"Skipped: no IPVS in this kernel{HINT}, and {end}",
                    )
                    yield _report(name, item, "setup", "skipped", said)
                else:
                    yield self._failure(name, item, end, last)
                return
            if time.monotonic() > self._heard + self._silence_seconds:
                self._end = f"the guest was silent for {self._silence_seconds:g} s and was ended"
                self.close()
            time.sleep(POLL_SECONDS)

    def _read(self) -> None:
        """Take in what the guest has written."""
        data = b"" if self._news.closed else self._news.read()
        if not data:
            return
        self._heard = time.monotonic()
        *lines, self._part = (self._part + data).split(b"\n")
        for line in lines:
            news = json.loads(line)
            if "started" in news:
                self._running = news["started"]
            else:
                report = self._revived(news["report"])
                self._reports[report.nodeid].append(report)
                if report.when == "teardown":
                    self._running = ""

    def _revived(self, data: dict[str, Any]) -> pytest.TestReport:
        report: pytest.TestReport = self._config.hook.pytest_report_from_serializable(
            config=self._config, data=data
        )
        if isinstance(report.longrepr, list):  # File, line and reason of a skip: JSON knows no tuples.
            report.longrepr = tuple(report.longrepr)
        return report

    def _failure(self, name: str, item: pytest.Item, reason: str, last: str) -> pytest.TestReport:
        """The report in place of the one that should have come after `last`."""
        phase = _PHASES[_PHASES.index(last) + 1] if last else "call"
        if self._running:
            reason += f", while {self._running} ran"
        return _report(name, item, phase, "failed", reason, self._said.decode(errors="replace"))

    def close(self) -> None:
        """End the guest, whatever it does; twice does no harm."""
        self._end = self._end or "the guest was ended"
        if self._guest is not None:
            self._guest.close()
            self._thread.join()
        self._read()
        self._news.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _report(
    name: str,
    item: pytest.Item,
    when: str,
    outcome: Literal["failed", "skipped"],
    said: str | tuple[str, int, str],
    output: str = "",
) -> pytest.TestReport:
    sections = [("Last words of the guest's pytest", output)] if output else []
    keywords: dict[str, Literal[1]] = dict.fromkeys(item.keywords, 1)
    return pytest.TestReport(name, item.location, keywords, outcome, said, when, sections)  # type: ignore[arg-type]


def _options(config: pytest.Config) -> list[str]:
    """The options of the host's run that change what a report says, or how tests are collected."""
    option = config.option
    made = [
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"--rootdir={config.rootpath}",
        f"--tb={option.tbstyle}",
    ]
    if config.inipath is not None:
        made.append(f"--config-file={config.inipath}")
    if option.showlocals:
        made.append("--showlocals")
    if option.verbose > 0:
        made.append("-" + "v" * option.verbose)
    if option.runxfail:
        made.append("--runxfail")
    if getattr(option, "timeout", None):
        made.append(f"--timeout={option.timeout}")
    made += [f"--override-ini={setting}" for setting in option.override_ini or ()]
    made += [word for setting in option.pythonwarnings or () for word in ("-W", setting)]
    return made


def _environment(folder: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTEST_XDIST") and name not in ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")
    }
    return {**kept, INSIDE: str(folder)}
