"""The backend inside a network namespace, on the real nf_tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from proxycore.api import (
    ApplyResult,
    ChangeBatch,
    HostState,
    ServiceState,
    Verification,
)
from proxycore.testing.netns import Namespace
from proxycore.testing.states import HOST, context, full
from proxycore_nft.backend import NftBackend
from proxycore_nft.kernel import Kernel, NetlinkKernel

from .meaning import actual, expected

T = TypeVar("T")


class Node:
    """One namespace, and one backend after the other in it."""

    def __init__(self, namespace: Namespace, facts: HostState = HOST) -> None:
        self.namespace = namespace
        self.facts = facts
        self.kernel = namespace.call(NetlinkKernel)
        self.backend = NftBackend()
        self.adopted: str | None = None

    def close(self) -> None:
        self.backend.proxycore_backend_stop()
        self.kernel.close()

    def start(
        self, facts: HostState | None = None, *, open_kernel: Callable[[], Kernel] | None = None
    ) -> None:
        """A new backend; the one before is stopped, as a process that ends."""
        self.backend.proxycore_backend_stop()
        self.facts = facts or self.facts
        self.backend = NftBackend(open_kernel) if open_kernel else NftBackend()
        started = self.namespace.call(lambda: self.backend.proxycore_backend_start(context(self.facts)))
        self.adopted = started.adopted

    def apply(self, batch: ChangeBatch) -> ApplyResult:
        result = self.namespace.call(lambda: self.backend.proxycore_backend_apply(batch))
        if batch.host is not None and result.outcome == "applied":
            self.facts = batch.host.after
        return result

    def run(self, *states: ServiceState, facts: HostState | None = None) -> None:
        """Start, and bring these Services into force."""
        self.start(facts)
        result = self.apply(full(*states, facts=self.facts))
        assert (result.outcome, result.failed) == ("applied", ())

    def verify(self, deep: bool = False) -> Verification:
        return self.namespace.call(lambda: self.backend.proxycore_backend_verify(deep))

    def call(self, name: str, *arguments: Any) -> Any:
        """Any other hook."""
        return self.namespace.call(lambda: getattr(self.backend, f"proxycore_backend_{name}")(*arguments))

    def nft(self, *words: str, stdin: str = "") -> str:
        return self.namespace.run(["nft", *words], stdin=stdin).stdout

    def ruleset(self) -> str:
        """Everything there is, with handles, without counters."""
        return self.nft("-a", "-s", "list", "ruleset")

    def assert_means(self, *states: ServiceState) -> None:
        for family in ("IPv4", "IPv6"):
            assert actual(self.kernel, family) == expected(states, family, self.facts)
