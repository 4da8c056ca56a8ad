"""Namespaces, and the backend on real iptables of either variant."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from proxycore.testing.conformance import problems
from proxycore.testing.netns import Namespace

from .node import Node


@pytest.fixture(params=["legacy", "nft"])
def variant(request: pytest.FixtureRequest) -> str:
    """Of iptables."""
    variant = str(request.param)
    if request.node.get_closest_marker("root") and (reason := unfit(variant)):
        pytest.skip(reason)
    return variant


@cache
def unfit(variant: str) -> str:
    """Why this host cannot carry the variant; empty if it can."""
    return problems("iptables", {"variant": variant})


@pytest.fixture
def xtables_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The lock of the legacy variant is of the test's own: the usual one is the whole host's."""
    path = tmp_path / "xtables.lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(path))
    return path


@pytest.fixture
def namespace(xtables_lock: Path) -> Iterator[Namespace]:
    """A network namespace of the test's own."""
    with Namespace("iptables") as made:
        yield made


@pytest.fixture
def node(namespace: Namespace, variant: str) -> Iterator[Node]:
    """The backend on the real iptables of a namespace of its own; not started."""
    made = Node(namespace, variant)
    yield made
    made.close()
