"""Namespaces, and the backend on the real nf_tables or on the fake."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from proxycore.testing.netns import Namespace

from .node import Node


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A network namespace of the test's own."""
    with Namespace("nft") as made:
        yield made


@pytest.fixture
def node(namespace: Namespace) -> Iterator[Node]:
    """The backend on the real nf_tables of a namespace of its own; not started."""
    made = Node(namespace)
    yield made
    made.close()
