"""What every test run of this repository obeys, those of the plugins included."""

from __future__ import annotations

import os

import pytest

pytest_plugins = ["proxycore.testing.uml.grouptests"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under xdist, tests that need root run one after the other: they share the machine's kernel.

    They come first, as one worker has them all and the others do the rest meanwhile.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.xdist_group("root"))
    items.sort(key=lambda item: item.get_closest_marker("root") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip(
            "needs root: run `sudo ./dev test`, or inside `unshare --user --map-root-user --net --mount`"
        )
