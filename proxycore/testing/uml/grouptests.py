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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ...kernel import ipvs
from . import guest
from .group import HINT, INSIDE, NEWS, REQUIRE, WANTED, Group

GROUP = "ipvs-guest"
TEST_SECONDS = 300.0
"""The longest that a test may take where pytest-timeout does not say."""
GRACE_SECONDS = 60.0


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
        self.wanted: list[str] = json.loads((folder / WANTED).read_text())
        self.news = folder / NEWS

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
