"""pytest plugin: tests marked `ipvs` run where there is IPVS.

On a host whose kernel has it they run as any test.  Elsewhere they are collected here, run one after the other by a single pytest
in a single guest, and reported here, each under its own name, as if they had run here.  Choosing (-k, -m, node ids) and
stopping (-x) is the host's affair.  Where there is no guest either they are skipped, or fail if PROXYCORE_REQUIRE_IPVS is set.

    host                                       guest
    Outside  -- wanted.json: names ----------> Inside: keeps these of what it collects, in this order
             <- news.jsonl: starts, reports --         writes each to the disk of the host at once

Their fixtures run in the guest only.  Under xdist they are one group, so one worker has one guest.
"""

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
from typing import Any

import pytest

from ...errors import KernelError
from ...kernel import ipvs
from . import guest

INSIDE = "PROXYCORE_GUEST_TESTS"
"""Set in the guest only: the host's folder for names and news."""
REQUIRE = "PROXYCORE_REQUIRE_IPVS"
GROUP = "ipvs-guest"
HINT = " (modprobe ip_vs may change that)"
TEST_SECONDS = 300.0
"""The longest that a test may take where pytest-timeout does not say."""
GRACE_SECONDS = 60.0
FOREVER_SECONDS = 1e6
POLL_SECONDS = 0.05
TAIL_BYTES = 4000
_PHASES = ("setup", "call", "teardown")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "ipvs: needs IPVS in the kernel; runs in a guest of user-mode Linux where the host's has none",
    )
    # Not for a pytest that one of the tests starts.
    folder = os.environ.pop(INSIDE, None)
    role = Inside(config, Path(folder)) if folder else Outside(config)
    config.pluginmanager.register(role, "proxycore-ipvs-tests")


class Inside:
    """In the guest: run what the host wants, and tell it what comes of it."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self.config = config
        self.wanted: list[str] = json.loads((folder / "wanted.json").read_text())
        self.news = folder / "news.jsonl"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = {item.nodeid: item for item in items}
        items[:] = [found[name] for name in self.wanted if name in found]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._tell({"started": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._tell(
            {"report": self.config.hook.pytest_report_to_serializable(config=self.config, report=report)}
        )

    def _tell(self, news: dict[str, Any]) -> None:
        with self.news.open("a") as file:
            file.write(json.dumps(news) + "\n")
            file.flush()
            os.fsync(file.fileno())  # The guest's kernel would keep it for half a minute.


class Outside:
    """On the host: tests marked `ipvs` are handed to a guest when the first of them is due."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.names: dict[pytest.Item, str] = {}
        self.silence_seconds = GRACE_SECONDS + TEST_SECONDS
        self.group: Group | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        marked = [item for item in items if item.get_closest_marker("ipvs")]
        if not marked or ipvs.there():
            return
        if (reason := guest.problem()) is not None:
            if not os.environ.get(REQUIRE):
                for item in marked:
                    item.add_marker(pytest.mark.skip(reason=f"no IPVS in this kernel{HINT}, and {reason}"))
            return
        self.names = {item: item.nodeid for item in marked}
        limits = [_limit(item) for item in marked]
        self.silence_seconds = GRACE_SECONDS + max(limits)
        if self.config.pluginmanager.hasplugin("timeout"):
            for item in marked:
                # It is kept in the guest, where it can interrupt the test.
                item.add_marker(pytest.mark.timeout(0), append=False)
        # Behind the others, as the guest goes on by itself and would disturb them.
        items.sort(key=lambda item: item in self.names)

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_finish(self) -> Iterator[None]:
        """Have xdist keep the tests of the guest on one worker: it takes what stands behind a name's last @ for its group.

        Only while it tells its scheduler the names, so that they stay what they are without xdist.  Its own marker for groups
        is of no effect since pytest 9.2, which does not read the `_nodeid` that it writes.
        """
        if getattr(self.config.option, "loadgroup", False):
            for item, name in self.names.items():
                _rename(item, f"{name}@{GROUP}")
        yield
        for item, name in self.names.items():
            _rename(item, name)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if os.environ.get(REQUIRE) and item.get_closest_marker("ipvs") and not ipvs.there():
            pytest.fail(f"no IPVS in this kernel{HINT}, and {guest.problem()}", pytrace=False)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if item not in self.names:
            return None
        if self.group is None:
            chosen = [one for one in item.session.items if one in self.names]
            self.group = Group(self.config, chosen, [self.names[one] for one in chosen], self.silence_seconds)
        name = self.names[item]
        item.ihook.pytest_runtest_logstart(nodeid=name, location=item.location)
        for report in self.group.reports(name, item):
            item.ihook.pytest_runtest_logreport(report=report)
        if item.session.shouldfail or item.session.shouldstop:
            nextitem = None
        # What the test before has left set up, since it has this one's package or class.
        left = pytest.CallInfo.from_call(
            lambda: item.session._setupstate.teardown_exact(nextitem), when="teardown"
        )
        if left.excinfo is not None:
            item.ihook.pytest_runtest_logreport(report=pytest.TestReport.from_item_and_call(item, left))
        item.ihook.pytest_runtest_logfinish(nodeid=name, location=item.location)
        return True

    def pytest_sessionfinish(self) -> None:
        if self.group is not None:
            self.group.close()

    def pytest_unconfigure(self) -> None:
        self.pytest_sessionfinish()


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
        (self._folder / "wanted.json").write_text(json.dumps(names))
        news = self._folder / "news.jsonl"
        news.touch()
        self._news = news.open("rb")
        self._heard = time.monotonic()
        self._part = b""
        self._reports: defaultdict[str, list[pytest.TestReport]] = defaultdict(list)
        self._running = ""
        self._said = b""
        self._end: str | None = None
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
        sections = [("Last words of the guest's pytest", self._said.decode(errors="replace"))]
        return pytest.TestReport(
            nodeid=name,
            location=item.location,
            keywords=dict.fromkeys(item.keywords, 1),
            outcome="failed",
            longrepr=reason,
            when=phase,  # type: ignore[arg-type]
            sections=sections if self._said else [],
        )

    def close(self) -> None:
        """End the guest, whatever it does; twice does no harm."""
        self._end = self._end or "the guest was ended"
        if self._guest is not None:
            self._guest.close()
            self._thread.join()
        self._read()
        self._news.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _rename(item: pytest.Item, name: str) -> None:
    if hasattr(item, "_id"):
        item._id = type(item._id).parse(name)
    else:
        item._nodeid = name  # type: ignore[attr-defined]


def _limit(item: pytest.Item) -> float:
    """How long a test may take, in seconds, by its marker or pytest-timeout's setting."""
    marker = item.get_closest_marker("timeout")
    if marker is not None and marker.args:
        return float(marker.args[0])
    asked = getattr(item.config.option, "timeout", None)
    try:
        return float(asked or item.config.getini("timeout") or TEST_SECONDS)
    except ValueError:
        return TEST_SECONDS


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
