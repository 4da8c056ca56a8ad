"""The backend's hooks: from a batch to the kernel's acknowledgement."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

from proxycore.api import (
    ApplyResult,
    BackendContext,
    BackendInfo,
    Capability,
    ChangeBatch,
    Cleanup,
    Counters,
    Drift,
    Failure,
    Family,
    HostState,
    KernelError,
    KernelObject,
    Operation,
    Probe,
    ServicePortName,
    ServiceState,
    Started,
    Verification,
    hookimpl,
)

from . import adopt, layout, offline, skeleton
from .kernel import Kernel, NetlinkKernel, Refused
from .tables import LiveTable
from .transaction import owner_at

CAPABILITIES = frozenset(Capability) - {Capability.LOCALHOST_NODE_PORT}
VERIFY_SHARE = 0.1
"""While foreign changes to nf_tables go on, reading ours back takes at most this share of the time."""
VERIFY_PAUSE_MAX = 4.0


class NftBackend:
    """One instance serves one network namespace, on one thread."""

    def __init__(
        self,
        open_kernel: Callable[[], Kernel] = NetlinkKernel,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_kernel = open_kernel
        self._clock = clock
        self._kernel: Kernel | None = None
        self._tables: dict[Family, LiveTable] = {}
        self._host: HostState | None = None
        self._base = 0
        """Generations of the ruleset that others have caused."""
        self._verify_after = 0.0

    # -- facts --

    @hookimpl
    def proxycore_backend_describe(self) -> BackendInfo:
        return BackendInfo(
            name="nft",
            summary="nf_tables maps, written by netlink; a change costs the same at 100 and at 30,000 Services",
            api=">=0.1,<0.2",
            capabilities=CAPABILITIES,
            needs=("kernel 5.13", "nft 1.0.1", "CAP_NET_ADMIN"),
        )

    @hookimpl
    def proxycore_backend_probe(self, context: BackendContext) -> Probe:
        return offline.probe(self._open_kernel, context)

    # -- life --

    @hookimpl
    def proxycore_backend_start(self, context: BackendContext) -> Started:
        self._kernel = self._open_kernel()
        self._host = context.host
        notes: list[str] = []
        for family in context.families:
            table = LiveTable(self._kernel, family, skeleton.shape_of(context.host, family))
            note = table.open()
            if note:
                notes.append(note)
            self._tables[family] = table
        for nft in {"ip", "ip6"} - {table.mirror.nft for table in self._tables.values()}:
            self._drop_family(nft)
        self._base = self._require().generation() - sum(table.commits for table in self._tables.values())
        return Started(adopted="; ".join(notes) or None)

    def _drop_family(self, nft: str) -> None:
        """A family that is served no more: what an earlier run left of it goes."""
        kernel = self._require()
        for name in sorted(kernel.tables(nft) & set(layout.TABLES)):
            kernel.load(f"delete table {nft} {name}\n")

    @hookimpl
    def proxycore_backend_stop(self) -> None:
        if self._kernel is not None:
            self._kernel.close()
            self._kernel = None

    def _require(self) -> Kernel:
        if self._kernel is None:
            raise KernelError("the nft backend is not started")
        return self._kernel

    def _expected(self) -> int:
        """The ruleset's generation if nobody but us has changed it."""
        return self._base + sum(table.commits for table in self._tables.values())

    # -- changes --

    @hookimpl
    def proxycore_backend_apply(self, batch: ChangeBatch) -> ApplyResult:
        self._require()
        if batch.host is not None:
            self._host = batch.host.after
        host = self._host
        assert host is not None
        by_family: dict[Family, dict[ServicePortName, ServiceState | None]] = {f: {} for f in self._tables}
        failed: list[Failure] = []
        for change in batch.changes:
            if change.name.family in by_family:
                by_family[change.name.family][change.name] = change.after
        operations = 0
        for family, changes in by_family.items():
            table = self._tables[family]
            if not changes and batch.host is None and not batch.full and table.sound:
                continue
            try:
                done, too_many = table.apply(changes, host=host, full=batch.full)
            except Refused as refused:
                return self._rejected(batch, table, refused)
            operations += done
            failed.extend(Failure(name=name, why=why) for name, why in too_many)
        return ApplyResult(generation=batch.generation, failed=tuple(failed), operations=operations)

    def _rejected(self, batch: ChangeBatch, table: LiveTable, refused: Refused) -> ApplyResult:
        culprits: dict[ServicePortName, str] = {}
        for refusal in refused.refusals:
            run = table.last_runs[refusal.position] if refusal.position < len(table.last_runs) else None
            owner = None
            if run is not None:
                owners = set(run.owners)
                if refusal.offset is not None:
                    owner = owner_at(run, refusal.offset)
                elif len(owners) == 1:
                    owner = owners.pop()
            if owner is None:
                return ApplyResult(generation=batch.generation, outcome="rejected", message=str(refused))
            reason = refusal.text or errno.errorcode.get(refusal.errno, str(refusal.errno))
            culprits.setdefault(
                owner, f"nf_tables refused its elements of {run.table_set if run else '?'}: {reason}"
            )
        return ApplyResult(
            generation=batch.generation,
            outcome="rejected",
            culprits=tuple(Failure(name=name, why=why) for name, why in culprits.items()),
            message=str(refused),
        )

    # -- offline --

    @hookimpl
    def proxycore_backend_render(self, context: BackendContext, batch: ChangeBatch) -> str:
        return offline.render(context, batch)

    @hookimpl
    def proxycore_backend_plan(self, context: BackendContext, batch: ChangeBatch) -> tuple[Operation, ...]:
        kernel = self._open_kernel()
        try:
            return offline.plan(kernel, context, batch)
        finally:
            kernel.close()

    # -- truth --

    @hookimpl
    def proxycore_backend_verify(self, deep: bool) -> Verification:
        kernel = self._require()
        generation = kernel.generation()
        if generation == self._expected() and not deep:
            for table in self._tables.values():
                table.prepare_classes()
            return Verification(checked=False)
        began = self._clock()
        if began < self._verify_after and not deep:
            return Verification(checked=False)
        drift: list[Drift] = []
        for table in self._tables.values():
            drift.extend(table.verify())
        took = self._clock() - began
        self._verify_after = self._clock() + min(took / VERIFY_SHARE, VERIFY_PAUSE_MAX)
        self._base += generation - self._expected()
        return Verification(checked=True, drift=tuple(drift))

    @hookimpl
    def proxycore_backend_inspect(self, name: ServicePortName) -> tuple[KernelObject, ...]:
        self._require()
        table = self._tables.get(name.family)
        return table.inspect(name) if table is not None else ()

    @hookimpl
    def proxycore_backend_counters(self) -> tuple[Counters, ...]:
        self._require()
        return tuple(item for table in self._tables.values() for item in table.counters())

    @hookimpl
    def proxycore_backend_cleanup(self, context: BackendContext) -> Cleanup:
        kernel = self._open_kernel()
        removed: list[str] = []
        try:
            for nft in ("ip", "ip6"):
                for live in adopt.survey(kernel, nft):
                    kernel.load(f"delete table {nft} {live.name}\n")
                    removed.append(f"table {nft} {live.name}")
        finally:
            kernel.close()
        return Cleanup(removed=tuple(removed))
