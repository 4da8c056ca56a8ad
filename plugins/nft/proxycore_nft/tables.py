"""One family's table in the kernel: how it comes to be, how a batch reaches it, how it is found to be damaged and mended.

There is one way in: changes are staged against the mirror, and the kernel gets either just the difference, or everything
anew in the same transaction (the first time, and after damage to elements), or a new table beside the old one whose hooks
replace the old one's in one transaction (another skeleton, damage to chains or rules).  No packet meets a half-filled table.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence

from proxycore.api import (
    Counters,
    Drift,
    Family,
    HostState,
    KernelError,
    KernelObject,
    ServicePortName,
    ServiceState,
)

from . import adopt, classes, encode, layout, rows, skeleton
from .entry import Entry, TooMany
from .host import host_elements
from .kernel import Kernel, Refused
from .program import Stage, Table
from .skeleton import Shape
from .transaction import Run, Transaction

TooManyList = list[tuple[ServicePortName, str]]


class LiveTable:
    """The kernel's table of one family and its mirror."""

    def __init__(self, kernel: Kernel, family: Family, shape: Shape) -> None:
        self.kernel = kernel
        self.family = family
        self.nft = layout.NFT_FAMILY[family]
        self.shape = shape
        self.mirror = Table(family, layout.TABLES[0])
        self.commits = 0
        """Generations that we have caused."""
        self.last_runs: list[Run | None] = []
        """Whose elements stood in each message of the transaction that was refused last."""
        self.hooked = False
        """This table carries traffic; otherwise it does after the next batch."""
        self._replaces: str | None = None
        self._dirty = True
        """The kernel's elements may differ from the mirror: the next batch writes all of them."""
        self._broken = False
        """Chains or rules differ: the next batch builds a new table."""
        self._rules: dict[str, str] = {}
        self._chains: dict[str, bool] = {}
        self._near: set[classes.Class] = set()

    @property
    def sound(self) -> bool:
        """Nothing is known to be wrong."""
        return self.hooked and not self._dirty and not self._broken

    # -- the table itself --

    def open(self) -> str | None:
        """Take over what is there, or make an empty table that sees no packet yet; returns a line about what was found."""
        found = adopt.survey(self.kernel, self.nft)
        live = next((table for table in found if table.hooked), None)
        for other in found:
            if other is not live:
                self._load(f"delete table {self.nft} {other.name}\n")
        if live is None:
            self._create(layout.TABLES[0])
            return None
        fits = live.complete and live.digest == skeleton.digest(self.shape)
        if fits:
            self.mirror = Table(self.family, live.name)
            try:
                adopt.recall_classes(self.kernel, self.nft, live.name, self.mirror)
                count = adopt.recall(self.kernel, self.nft, live.name, self.mirror)
            except KernelError:
                fits = False
            else:
                self.hooked = True
                self._remember_structure()
                return f"table {self.nft} {live.name}, {count} frontends"
        self._create(next(name for name in layout.TABLES if name != live.name))
        count = adopt.recall(self.kernel, self.nft, live.name, self.mirror)
        self._replaces = live.name
        return f"table {self.nft} {live.name} of another version, {count} frontends"

    def _create(self, name: str) -> None:
        """An empty table without hooks, with the usual classes, and its mirror."""
        if name in self.kernel.tables(self.nft):
            self._load(f"delete table {self.nft} {name}\n")
        self._load(skeleton.table_text(self.shape, name))
        self.mirror = Table(self.family, name)
        self.hooked = False
        self._dirty = True
        transaction = Transaction()
        stage = Stage(self.mirror, transaction)
        for usual in classes.USUAL:
            stage.make_class(usual)
        self._commit(transaction)
        stage.commit()

    def _load(self, text: str) -> None:
        self.kernel.load(text)
        self.commits += 1

    def _commit(self, transaction: Transaction) -> None:
        bodies, self.last_runs = transaction.messages()
        if bodies:
            self.kernel.commit(bodies)
            self.commits += 1
        self.last_runs = []

    def _remember_structure(self) -> None:
        self._chains = self.kernel.chains(self.nft, self.mirror.name)
        self._rules = self.kernel.rules(self.nft, self.mirror.name)

    def _switch(self) -> None:
        """Give this table the hooks, and take the old table away, in one transaction."""
        text = skeleton.hook_text(self.shape, self.mirror.name)
        old = self._replaces
        if old is not None and old in self.kernel.tables(self.nft):
            text += f"delete table {self.nft} {old}\n"
        self._load(text)
        self.hooked = True
        self._replaces = None
        self._remember_structure()

    # -- batches --

    def apply(
        self, changes: Mapping[ServicePortName, ServiceState | None], *, host: HostState, full: bool
    ) -> tuple[int, TooManyList]:
        """Bring changes and the host's facts into force; with `full`, nothing else than these changes' Services.

        Returns the number of kernel operations, and the Services that do not fit with the reason.  Raises Refused: nothing
        was changed, `last_runs` tells whose elements each message held.  Raises KernelError: unknown what holds; the next
        call writes everything.
        """
        shape = skeleton.shape_of(host, self.family)
        difference = Transaction()
        stage = Stage(self.mirror, difference)
        too_many = self._stage(stage, changes, full)
        elements = host_elements(host, self.family)
        if self._broken or shape != self.shape:
            stage.finish()
            self.shape = shape
            return self._rebuild(stage, elements), too_many
        if full or self._dirty or not self.hooked:
            return self._rewrite(stage, elements), too_many
        stage.host(elements)
        stage.finish()
        try:
            self._commit(difference)
        except Refused as refused:
            if not _out_of_step(refused):
                stage.roll_back()
                raise
            return self._rewrite(stage, elements), too_many
        except KernelError:
            stage.roll_back()
            self._dirty = True
            raise
        self._accepted(stage)
        return difference.operations, too_many

    def _stage(
        self, stage: Stage, changes: Mapping[ServicePortName, ServiceState | None], full: bool
    ) -> TooManyList:
        too_many: TooManyList = []
        if full:
            for name in [n for n in self.mirror.entries if n not in changes]:
                stage.put(name, None)
        for name, state in changes.items():
            try:
                stage.put(name, state)
            except TooMany as reason:
                too_many.append((name, str(reason)))
        return too_many

    def _accepted(self, stage: Stage, *, remember: bool = True) -> None:
        stage.commit()
        self.mirror.forget_earlier_run()
        if stage.new_classes:
            self._near |= classes.neighbours(stage.new_classes) - self.mirror.classes.keys()
            if remember:
                self._remember_structure()

    def _rewrite(self, stage: Stage, elements: Mapping[str, tuple[bytes, ...]]) -> int:
        """All elements anew in one transaction, clients' affinity excepted."""
        if self.mirror.name not in self.kernel.tables(self.nft):
            if not stage.finished:
                stage.finish()
            return self._rebuild(stage, elements)
        if self.mirror.entries or stage.finished:
            whole = Transaction()
            whole.rules = stage.tx.rules
            shadow = Table(self.family, self.mirror.name)
            shadow.classes = {**self.mirror.classes, **stage.new_classes}
            shadow.chains = self.mirror.chains | stage.new_chains
            writer = Stage(shadow, whole)
            self._restore(writer, stage)
        else:
            # Nothing was known before: what is staged is everything.
            whole = stage.tx
            writer = stage
        for name in rows.SERVICE_SETS:
            whole.flush(self.nft, self.mirror.name, name)
        self.mirror.host = dict.fromkeys(self.mirror.host, ())
        for name in elements:
            if not elements[name]:
                whole.flush(self.nft, self.mirror.name, name)
        writer.host(elements)
        writer.finish()
        if self._replaces is not None:
            self._carry_affinity(whole, self._replaces)
        try:
            self._commit(whole)
        except KernelError:
            stage.roll_back()
            self._dirty = True
            raise
        switched = not self.hooked
        if switched:
            self._switch()
        self._accepted(stage, remember=not switched)
        self.mirror.host.update(elements)
        self._dirty = False
        return whole.operations

    def _restore(self, writer: Stage, stage: Stage) -> None:
        for name, item in self._final(stage):
            writer.restore(name, item)

    def _final(self, stage: Stage) -> Iterable[tuple[ServicePortName, Entry]]:
        """Every entry as it will be after the staged batch."""
        for name, item in {**self.mirror.entries, **stage.entries}.items():
            if item is not None:
                yield name, item

    def _rebuild(self, stage: Stage, elements: Mapping[str, tuple[bytes, ...]]) -> int:
        """A new table beside this one, filled, then switched to."""
        old, old_mirror = self.mirror.name, self.mirror
        entries = dict(self._final(stage))
        stage.roll_back()
        try:
            self._create(next(name for name in layout.TABLES if name != old))
            transaction = Transaction()
            writer = Stage(self.mirror, transaction)
            for name, item in entries.items():
                writer.restore(name, item)
            writer.host(elements)
            writer.finish()
            self._carry_affinity(transaction, old)
            self._commit(transaction)
            self._replaces = old
            self._switch()
        except KernelError:
            self.mirror, self._broken, self.hooked = old_mirror, True, True
            raise
        writer.commit()
        self._near |= classes.neighbours(writer.new_classes) - self.mirror.classes.keys()
        self._dirty = self._broken = False
        return transaction.operations

    def _carry_affinity(self, transaction: Transaction, old: str) -> None:
        for item in adopt.affinity(self.kernel, self.nft, old):
            element = encode.timed_element(item.key, item.data or b"", item.timeout, item.expiration)
            transaction.add(self.nft, self.mirror.name, "affinity", element)

    # -- between batches --

    def prepare_classes(self) -> None:
        """Make the classes that will be wanted when a pool grows or shrinks by one."""
        wanted = self._near - self.mirror.classes.keys()
        self._near = set()
        if not wanted or not self.sound:
            return
        transaction = Transaction()
        stage = Stage(self.mirror, transaction)
        try:
            for item in sorted(wanted):
                stage.make_class(item)
            self._commit(transaction)
        except (TooMany, KernelError):
            # They are made when they are needed.
            return
        stage.commit()
        self._remember_structure()

    def verify(self) -> list[Drift]:
        """Compare everything with the kernel; what is found decides how the next batch is written."""
        if not self.hooked:
            return []
        where = f"table {self.nft} {self.mirror.name}"
        if self.mirror.name not in self.kernel.tables(self.nft):
            self._broken = True
            return [Drift(service=None, what=f"{where} is gone")]
        drift: list[Drift] = []
        chains = self.kernel.chains(self.nft, self.mirror.name)
        rules = self.kernel.rules(self.nft, self.mirror.name)
        for chain in sorted({*chains, *self._chains}):
            if chains.get(chain) != self._chains.get(chain):
                drift.append(
                    Drift(service=None, what=f"{where}: chain {chain} was added, removed or unhooked")
                )
            elif rules.get(chain) != self._rules.get(chain):
                drift.append(Drift(service=None, what=f"{where}: the rules of chain {chain} were changed"))
        if drift:
            self._broken = True
        try:
            elements = rows.compare(self.mirror, self.kernel)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            self._broken = True
            return [*drift, Drift(service=None, what=f"{where}: a set is gone")]
        if elements:
            self._dirty = True
        return drift + elements

    def inspect(self, name: ServicePortName) -> tuple[KernelObject, ...]:
        """The elements of one Service port that are in the kernel now."""
        item = self.mirror.entries.get(name)
        if item is None:
            return ()
        by_set: dict[str, list[bytes]] = {}
        for row in rows.service_rows(self.mirror, name, item):
            by_set.setdefault(row.set, []).append(row.key)
        return tuple(rows.objects(self.kernel, self.nft, self.mirror.name, by_set))

    def counters(self) -> Sequence[Counters]:
        """New connections per frontend since the table was last rewritten."""
        packets = {
            (where, e.key): e.packets
            for where in ("frontends", "node-ports")
            for e in self.kernel.elements(self.nft, self.mirror.name, where)
        }
        return [rows.counters(self.nft, name, item, packets) for name, item in self.mirror.entries.items()]


def _out_of_step(refused: Refused) -> bool:
    """Is the kernel not what the mirror says?  Then a complete rewrite helps, and no Service is to blame."""
    return all(r.errno in (errno.ENOENT, errno.EEXIST) for r in refused.refusals)
