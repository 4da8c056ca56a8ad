"""IPVS in memory, and the kernel's in namespaces of their own where it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from proxycore.api import KernelError
from proxycore.testing.netns import Namespace
from proxycore_ipvs.fake import FakeKernel
from proxycore_ipvs.kernel import NetlinkKernel
from proxycore_ipvs.plain import PlainKernel

from .inside import Inside

KINDS = {"netlink": NetlinkKernel, "plain": PlainKernel}
REAL = (pytest.mark.root, pytest.mark.ipvs)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A network namespace of the test's own."""
    with Namespace("ipvs") as made:
        yield made


@pytest.fixture
def opened(namespace: Namespace) -> Iterator[Callable[[str], Any]]:
    """Opens the kernel's IPVS in the namespace of the test, in the way that is named."""
    made = []

    def start(kind: str) -> Any:
        try:
            made.append(Inside(namespace, KINDS[kind]))
        except KernelError as error:
            pytest.skip(f"this kernel has no IPVS: {error}")
        return made[-1]

    yield start
    for kernel in made:
        kernel.close()


@pytest.fixture(params=["fake", *(pytest.param(kind, marks=REAL) for kind in KINDS)])
def kernel(request: pytest.FixtureRequest) -> Any:
    """Each of the kernels in turn, empty."""
    if request.param == "fake":
        return FakeKernel()
    return request.getfixturevalue("opened")(request.param)
