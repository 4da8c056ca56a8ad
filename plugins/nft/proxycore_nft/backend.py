"""The backend's hooks: from a batch to the kernel's acknowledgement."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence

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
    Started,
    Verification,
    hookimpl,
)

from . import adopt, layout, offline, skeleton
from .kernel import Kernel, NetlinkKernel, NotSent, Refused
from .tables import LiveTable, out_of_step
from .transaction import Run, Transaction, owner_at

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
        self._own = 0
        """Generations that batches have caused; those that tables caused by themselves they count."""
        self._verify_after = 0.0
        self._runs: list[Run | None] = []
        """Whose elements stood in each message of the transaction that was refused last."""

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
        self.proxycore_backend_stop()
        self._kernel = self._open_kernel()
        self._tables = {}
        self._host = context.host
        self._base = self._kernel.generation()
        notes: list[str] = []
        for family in context.families:
            table = LiveTable(self._kernel, family, skeleton.shape_of(context.host, family))
            note = table.open()
            if note:
                notes.append(note)
            self._tables[family] = table
        for nft in {"ip", "ip6"} - {table.mirror.nft for table in self._tables.values()}:
            self._drop_family(nft)
        return Started(adopted="; ".join(notes) or None)

    def _drop_family(self, nft: str) -> None:
        """A family that is served no more: what an earlier run left of it goes."""
        kernel = self._require()
        for name in sorted(kernel.tables(nft) & set(layout.TABLES)):
            kernel.load(f"delete table {nft} {name}\n")
            self._base += 1

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
        return self._base + self._own + sum(table.commits for table in self._tables.values())

    # -- changes --

    @hookimpl
    def proxycore_backend_apply(self, batch: ChangeBatch) -> ApplyResult:
        self._require()
        if batch.host is not None:
            self._host = batch.host.after
        trusted = [table for table in self._tables.values() if not table.doubtful]
        for attempt in range(3):
            try:
                return self._apply(batch)
            except Refused as refused:
                # The kernel may not be what we remember; then no Service is to blame, and writing everything helps.
                # What is missing even then is a set or a chain: that takes a new table.
                whole = batch.full or attempt > 0
                gone = all(refusal.errno == errno.ENOENT for refusal in refused.refusals)
                if attempt == 2 or not out_of_step(refused) or (whole and not gone):
                    self._give_up()
                    if attempt and not gone:
                        # Refused whole as well: Services contradict each other, mirror and kernel do not.
                        for table in trusted:
                            table.trust()
                    return rejected(batch, refused, self._runs)
                self._give_up(doubtful=True, broken=whole)
            except KernelError as error:
                self._give_up(doubtful=not isinstance(error, NotSent))
                raise
            except BaseException:
                self._give_up(doubtful=True)
                raise
        raise AssertionError("unreachable")

    def _give_up(self, *, doubtful: bool = False, broken: bool = False) -> None:
        for table in self._tables.values():
            table.give_up(doubtful=doubtful, broken=broken)

    def _apply(self, batch: ChangeBatch) -> ApplyResult:
        """One transaction for both families; then, where a table is new, one that gives it the hooks.

        Raises Refused, KernelError: what was staged has to be given up.
        """
        kernel = self._require()
        host = self._host
        assert host is not None
        transaction = Transaction()
        failed: list[Failure] = []
        self._runs = []
        for family, table in self._tables.items():
            changes = {c.name: c.after for c in batch.changes if c.name.family == family}
            too_many = table.stage(transaction, changes, host=host, full=batch.full)
            failed.extend(Failure(name=name, why=why) for name, why in too_many)
        bodies, self._runs = transaction.messages()
        if bodies:
            kernel.commit(bodies)
            self._own += 1
        self._runs = []
        for table in self._tables.values():
            table.accept()
        self._switch()
        return ApplyResult(
            generation=batch.generation, failed=tuple(failed), operations=transaction.operations
        )

    def _switch(self) -> None:
        """New tables get the hooks, then those that they replace go; a packet may meet both, but never neither."""
        tables = self._tables.values()
        text = "".join(table.switch_text() for table in tables)
        if text:
            self._load(text)
            for table in tables:
                table.switched()
        text = "".join(table.leave_text() for table in tables)
        if text:
            self._load(text)
        for table in tables:
            table.left()

    def _load(self, text: str) -> None:
        self._require().load(text)
        self._own += 1

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


def rejected(batch: ChangeBatch, refused: Refused, runs: Sequence[Run | None]) -> ApplyResult:
    """Name the Services whose elements the kernel refused; nobody, if one refusal is not about a Service's element."""
    culprits: dict[ServicePortName, str] = {}
    for refusal in refused.refusals:
        # A fault of the transaction as a whole comes with the number of its first or last mark.
        run = runs[refusal.position] if 0 <= refusal.position < len(runs) else None
        owner = None
        if run is not None:
            if refusal.offset is not None:
                owner = owner_at(run, refusal.offset)
            elif len(set(run.owners)) == 1:
                owner = run.owners[0]
        if run is None or owner is None:
            return ApplyResult(generation=batch.generation, outcome="rejected", message=str(refused))
        reason = refusal.text or errno.errorcode.get(refusal.errno, str(refusal.errno))
        culprits.setdefault(owner, f"nf_tables refused its elements of {run.table_set}: {reason}")
    return ApplyResult(
        generation=batch.generation,
        outcome="rejected",
        culprits=tuple(Failure(name=name, why=why) for name, why in culprits.items()),
        message=str(refused),
    )
