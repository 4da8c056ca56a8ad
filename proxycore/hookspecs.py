"""The whole plugin contract.

Three kinds of plugin, each found by an entry point that names a zero-argument factory of the plugin object:

- a backend (`proxycore.backends`) turns batches into kernel state; exactly one is active and its hooks are called on one
  thread of its own, one at a time;
- an observer (`proxycore.plugins`) follows what has been programmed, on a thread of its own;
- a source (`proxycore.sources`) delivers Kubernetes objects.

Hooks only ever gain arguments; implement those that you need with `@hookimpl` and name only the arguments that you use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from .backend import (
        ApplyResult,
        BackendContext,
        BackendInfo,
        Cleanup,
        Counters,
        KernelObject,
        Operation,
        Probe,
        Started,
        Verification,
    )
    from .changes import ChangeBatch
    from .model import ServicePortName
    from .observer import ObserverContext
    from .source import Source, SourceContext

PROJECT = "proxycore"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class BackendSpec:
    """Hooks of a backend, in the order of its life."""

    @hookspec(firstresult=True)
    def proxycore_backend_describe(self) -> BackendInfo:  # type: ignore[empty-body]
        """Static facts; must agree with `backend.toml`.  Touches nothing."""

    @hookspec(firstresult=True)
    def proxycore_backend_probe(self, context: BackendContext) -> Probe:  # type: ignore[empty-body]
        """Can this host carry the backend?  Leaves no trace on the host.  Raises ConfigError: its options are wrong."""

    @hookspec(firstresult=True)
    def proxycore_backend_start(self, context: BackendContext) -> Started:  # type: ignore[empty-body]
        """Take ownership; adopt what a previous run left, so that traffic goes on.

        The next call is apply() with a full batch.  Raises KernelError: nothing was changed, the engine tries again.
        """

    @hookspec(firstresult=True)
    def proxycore_backend_apply(self, batch: ChangeBatch) -> ApplyResult:  # type: ignore[empty-body]
        """Bring a batch into force.

        An exception counts as "rejected, partly done": every Service of the batch is UNKNOWN afterwards.
        """

    @hookspec(firstresult=True)
    def proxycore_backend_render(self, context: BackendContext, batch: ChangeBatch) -> str:  # type: ignore[empty-body]
        """Native text of the state that a full batch stands for.  Needs no rights and touches nothing; start() was not called."""

    @hookspec(firstresult=True)
    def proxycore_backend_plan(  # type: ignore[empty-body]
        self, context: BackendContext, batch: ChangeBatch
    ) -> tuple[Operation, ...]:
        """Exact kernel operations from the live kernel to a full batch.  Changes nothing; start() was not called."""

    @hookspec(firstresult=True)
    def proxycore_backend_verify(self, deep: bool) -> Verification:  # type: ignore[empty-body]
        """Does the kernel still hold what was programmed?  Called about once a second; cheap when nothing foreign happened.

        `deep` asks for a comparison of everything.
        """

    @hookspec(firstresult=True)
    def proxycore_backend_inspect(self, name: ServicePortName) -> tuple[KernelObject, ...]:  # type: ignore[empty-body]
        """Kernel objects of one Service port, read from the kernel."""

    @hookspec(firstresult=True)
    def proxycore_backend_counters(self) -> tuple[Counters, ...]:  # type: ignore[empty-body]
        """Traffic per Service port, read from the kernel."""

    @hookspec(firstresult=True)
    def proxycore_backend_stop(self) -> None:
        """End, leaving everything in force: connections and new clients must not notice."""

    @hookspec(firstresult=True)
    def proxycore_backend_cleanup(self, context: BackendContext) -> Cleanup:  # type: ignore[empty-body]
        """Remove everything of ours, of any earlier run or version; start() was not called.  Nothing foreign is touched."""


class ObserverSpec:
    """Hooks of an observer; all are called on one thread of its own, one at a time."""

    @hookspec(firstresult=True)
    def proxycore_observer_start(self, context: ObserverContext) -> None:
        """Before the first batch."""

    @hookspec(firstresult=True)
    def proxycore_observer_applied(self, batch: ChangeBatch, result: ApplyResult, seconds: float) -> None:
        """A batch is in force, but for the exceptions in `result`, whose changes `batch` still holds.

        `seconds`: how long the backend took.  `batch.full` stands for the whole state: sent first, and again after this
        observer's queue overflowed, then with 0.0 seconds.
        """

    @hookspec(firstresult=True)
    def proxycore_observer_failed(self, batch: ChangeBatch, result: ApplyResult, seconds: float) -> None:
        """Nothing of this batch came into force; the engine tries again.  `seconds`: how long the backend took."""

    @hookspec(firstresult=True)
    def proxycore_observer_drift(self, verification: Verification) -> None:
        """The kernel was found to differ from what was programmed."""

    @hookspec(firstresult=True)
    def proxycore_observer_health(self, healthy: bool, reason: str) -> None:
        """The proxy's own health changed."""

    @hookspec(firstresult=True)
    def proxycore_observer_stop(self) -> None:
        """End; give back sockets and threads."""


class SourceSpec:
    """Hook of a source."""

    @hookspec(firstresult=True)
    def proxycore_source_open(self, context: SourceContext) -> Source:  # type: ignore[empty-body]
        """A source for what stands behind the colon of `--source NAME:ARGUMENT`.

        Raises SourceError when the argument cannot be used; nothing was started.
        """
