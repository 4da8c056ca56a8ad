"""A backend that runs on a fake nf_tables."""

from __future__ import annotations

from collections.abc import Callable

from proxycore.api import (
    HostState,
    KernelError,
    ServicePortName,
    ServiceState,
)
from proxycore.testing.states import HOST, context, full
from proxycore_nft.backend import NftBackend
from proxycore_nft.fake import FakeKernel

from .meaning import actual, expected


class FailingKernel(FakeKernel):
    """Can be told to refuse text, too."""

    def __init__(self) -> None:
        super().__init__()
        self.refuse_text: Callable[[str], bool] = lambda text: False

    def load(self, text: str) -> None:
        if self.refuse_text(text):
            raise KernelError("nft refused the skeleton: out of luck")
        super().load(text)


class Clock:
    """Time that only the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def started(kernel: FakeKernel, facts: HostState = HOST, clock: Clock | None = None) -> NftBackend:
    backend = NftBackend(open_kernel=lambda: kernel, clock=clock or Clock())
    backend.proxycore_backend_start(context(facts))
    return backend


def running(*states: ServiceState, facts: HostState = HOST) -> tuple[FailingKernel, NftBackend]:
    """A backend with these Services in force."""
    kernel = FailingKernel()
    backend = started(kernel, facts)
    assert backend.proxycore_backend_apply(full(*states, facts=facts)).outcome == "applied"
    return kernel, backend


def entry_of(backend: NftBackend, name: ServicePortName):
    return backend._tables[name.family].mirror.entries[name]


def assert_means(kernel: FakeKernel, *states: ServiceState, facts: HostState = HOST) -> None:
    for family in ("IPv4", "IPv6"):
        assert actual(kernel, family) == expected(states, family, facts)
