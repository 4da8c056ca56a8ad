"""One family's table in the kernel: how it comes to be, how a batch reaches it, how it is found to be damaged and mended.

There is one way in: changes are staged against the mirror, and the kernel gets either just the difference, or everything
anew in the same transaction (the first time, and after damage to elements), or a new table beside the old one whose hooks
replace the old one's in one transaction (another skeleton, damage to chains or rules).  No packet meets a half-filled table.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

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
from .kernel import Kernel, NotSent, Refused
from .program import Stage, Table
from .skeleton import Shape
from .transaction import Transaction

TooManyList = list[tuple[ServicePortName, str]]
_ABSENT = object()


CLASSES_KEPT = 2000
"""With more classes than this a new table is made, which leaves out those that no pool has."""
CLASSES_AT_ONCE = 4
"""So many classes are made ahead in one go: on full maps each costs milliseconds."""


class Before(NamedTuple):
    """What a rebuild replaces, to return to if it fails."""

    mirror: Table
    shape: Shape
    replaces: str | None
    hooked: bool


class Staged(NamedTuple):
    """What a transaction holds for one table.  `host` is set where all elements are written anew."""

    stage: Stage
    host: Mapping[str, tuple[bytes, ...]] | None = None
    before: Before | None = None


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
        self.hooked = False
        """This table carries traffic; otherwise it does after the next batch."""
        self._replaces: str | None = None
        self._leaving: str | None = None
        """A table that was replaced and is still there."""
        self._dirty = True
        """The kernel's elements may differ from the mirror: the next batch writes all of them."""
        self._broken = False
        """Chains or rules differ: the next batch builds a new table."""
        self._rules: dict[str, str] = {}
        self._chains: dict[str, skeleton.Hook | None] = {}
        self._near: set[classes.Class] = set()
        self._classes_needed = 0
        """How many classes the last new table began with."""
        self._staged: Staged | None = None
        self._facts: tuple[HostState, Shape, Mapping[str, tuple[bytes, ...]]] | None = None

    @property
    def sound(self) -> bool:
        """Nothing is known to be wrong."""
        return self.hooked and not self._dirty and not self._broken

    # -- the table itself --

    def open(self) -> str | None:
        """Take over what is there, or make an empty table that sees no packet yet; returns a line about what was found."""
        found = adopt.survey(self.kernel, self.nft)
        # Two have hooks when a switch was interrupted; the newer one is then the one of our version.
        ours = skeleton.digest(self.shape)
        live = next((t for t in found if t.hooked and t.digest == ours), None)
        live = live or next((t for t in found if t.hooked), None)
        for other in found:
            if other is not live:
                self._load(f"delete table {self.nft} {other.name}\n")
        if live is None:
            self._create(layout.TABLES[0])
            return None
        why = "of another version"
        if live.digest == ours:
            if live.complete and self._adopt(live.name):
                self.hooked = True
                self._remember_structure()
                return f"table {self.nft} {live.name}, {len(self.mirror.remembered)} frontends"
            why = "changed by somebody else"
        self._create(_other(live.name))
        count = adopt.recall(self.kernel, self.nft, live.name, self.mirror)
        self._replaces = live.name
        return f"table {self.nft} {live.name} {why}, {count} frontends"

    def _adopt(self, name: str) -> bool:
        """Take over a live table if its chains and rules are as we make them; False if not.

        How the kernel shows a rule only it knows: so the same table is made beside it, compared and taken away.
        """
        self.mirror = Table(self.family, name)
        beside = _other(name)
        try:
            adopt.recall_classes(self.kernel, self.nft, name, self.mirror)
            adopt.recall(self.kernel, self.nft, name, self.mirror)
            plain = skeleton.hook_text(self.shape, beside, hooked=False)
            self._load(skeleton.table_text(self.shape, beside) + plain)
            transaction = Transaction()
            stage = Stage(Table(self.family, beside), transaction)
            for item in self.mirror.classes:
                stage.make_class(item)
            self._commit(transaction)
            kernel, nft = self.kernel, self.nft
            same = kernel.rules(nft, beside) == kernel.rules(nft, name)
            same = same and kernel.sets(nft, beside) == kernel.sets(nft, name)
            same = same and kernel.chains(nft, beside).keys() == kernel.chains(nft, name).keys()
            same = same and not rows.compare_verdicts(self.mirror, kernel)
            self._load(f"delete table {nft} {beside}\n")
        except (KernelError, TooMany):
            # Whatever it is that cannot be read or made: a new table does not need it.
            return False
        return same

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
        bodies, _ = transaction.messages()
        if bodies:
            self.kernel.commit(bodies)
            self.commits += 1

    def _remember_structure(self) -> None:
        self._chains = self.kernel.chains(self.nft, self.mirror.name)
        self._rules = self.kernel.rules(self.nft, self.mirror.name)

    def _remember_classes(self, stage: Stage) -> None:
        """Expect the chains of new classes too; the others as before, so that a foreign change to them is still seen."""
        for name in (stage.new_chains | {item.chain for item in stage.new_classes}) - self._chains.keys():
            self._chains[name] = None
            self._rules.update(self.kernel.rules(self.nft, self.mirror.name, name))

    # -- batches --

    def stage(
        self,
        transaction: Transaction,
        changes: Mapping[ServicePortName, ServiceState | None],
        *,
        host: HostState,
        full: bool,
    ) -> TooManyList:
        """Write into the transaction what brings changes and the host's facts into force.

        With `full`, nothing else than these changes' Services is in force afterwards.  Returns the Services that do not fit,
        with the reason.  The mirror follows with accept(), or stays as it is with give_up().
        Raises KernelError: a new table could not be made; nothing that sees packets was changed.
        """
        shape, elements = self._facts_of(host)
        # Where all is written anew, the difference is worked out only for the entries that it makes.
        known = bool(self.mirror.entries)
        if len(self.mirror.classes) > max(CLASSES_KEPT, self._classes_needed + CLASSES_KEPT // 2):
            # Most of them served pools that have another size by now; a new table has only those in use.
            self._broken = True
        whole = full or not self.sound or shape != self.shape
        there = not whole or self.mirror.name in self.kernel.tables(self.nft)
        rebuild = self._broken or shape != self.shape or not there
        stage = Stage(self.mirror, Transaction() if rebuild or (whole and known) else transaction)
        too_many = self._put_all(stage, changes, full)
        if not whole:
            stage.host(elements)
            stage.finish()
            self._staged = Staged(stage)
            return too_many
        if rebuild:
            self._stage_rebuild(transaction, stage, shape, elements)
        else:
            self._stage_rewrite(transaction, stage, elements)
        return too_many

    def _facts_of(self, host: HostState) -> tuple[Shape, Mapping[str, tuple[bytes, ...]]]:
        """Shape and elements that the node's facts ask for; worked out once as long as these do not change."""
        if self._facts is None or self._facts[0] is not host:
            self._facts = (host, skeleton.shape_of(host, self.family), host_elements(host, self.family))
        return self._facts[1:]

    def _put_all(
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

    def _stage_rewrite(
        self, transaction: Transaction, stage: Stage, elements: Mapping[str, tuple[bytes, ...]]
    ) -> None:
        """All elements anew, clients' affinity excepted."""
        writer = stage
        if stage.tx is not transaction:
            transaction.rules += stage.tx.rules
            shadow = Table(self.family, self.mirror.name)
            shadow.classes = {**self.mirror.classes, **stage.new_classes}
            shadow.chains = self.mirror.chains | stage.new_chains
            writer = Stage(shadow, transaction)
            for name, item in self._final(stage):
                writer.restore(name, item)
            stage.finish()
        for where in (*rows.SERVICE_SETS, *elements):
            transaction.flush(self.nft, self.mirror.name, where)
        writer.host(elements, anew=True)
        writer.finish()
        if self._replaces is not None:
            # An earlier try may have put some there, and clients may have moved since.
            transaction.flush(self.nft, self.mirror.name, "affinity")
            self._carry_affinity(transaction, self._replaces)
        if not self.hooked and writer is stage:
            writer.make_neighbours()
        self._staged = Staged(stage, host=elements)

    def _final(self, stage: Stage) -> Iterable[tuple[ServicePortName, Entry]]:
        """Every entry as it will be after the staged batch."""
        for name, item in {**self.mirror.entries, **stage.entries}.items():
            if item is not None:
                yield name, item

    def _stage_rebuild(
        self,
        transaction: Transaction,
        stage: Stage,
        shape: Shape,
        elements: Mapping[str, tuple[bytes, ...]],
    ) -> None:
        """A new table beside this one, filled by the transaction; it gets the hooks once that holds."""
        entries = dict(self._final(stage))
        stage.roll_back()
        before = Before(self.mirror, self.shape, self._replaces, self.hooked)
        old = before.mirror.name if self.hooked else self._replaces
        self.shape = shape
        try:
            self._create(next(name for name in layout.TABLES if name != (old or layout.TABLES[1])))
        except KernelError:
            self._return_to(before)
            raise
        self.mirror.follow(before.mirror)
        writer = Stage(self.mirror, transaction)
        for name, item in entries.items():
            writer.restore(name, item)
        writer.host(elements)
        writer.finish()
        self._replaces = old
        if old is not None:
            self._carry_affinity(transaction, old)
        writer.make_neighbours()
        self._staged = Staged(writer, before=before)

    def _return_to(self, before: Before) -> None:
        """The new table did not come to be: the old one is still what carries traffic."""
        self.mirror, self.shape, self._replaces, self.hooked = before
        self._broken = True

    def accept(self) -> None:
        """The kernel has taken the transaction: the mirror follows."""
        staged = self._take_staged()
        if staged is None:
            return
        staged.stage.commit()
        self.mirror.forget_earlier_run()
        if staged.host is not None:
            self.mirror.host.update(staged.host)
        if staged.stage.new_classes:
            self._near |= (
                classes.neighbours(staged.stage.new_classes.keys() - staged.stage.ahead)
                - self.mirror.classes.keys()
            )
            if self.hooked:
                self._remember_classes(staged.stage)
        if staged.host is not None or staged.before is not None:
            self._dirty = self._broken = False
            if staged.before is not None:
                self._classes_needed = len(self.mirror.classes)

    def trust(self) -> None:
        """What was doubtful has been tried and is not the mirror's fault."""
        self._dirty = False

    @property
    def doubtful(self) -> bool:
        """The next batch writes everything."""
        return self._dirty

    def give_up(self, *, doubtful: bool = False, broken: bool = False) -> None:
        """The kernel has refused the transaction: mirror and kernel are as before.

        `doubtful`: they may not be, so the next batch writes everything.  `broken`: not even that goes in, so the next batch
        makes a new table.
        """
        staged = self._take_staged()
        if staged is not None:
            staged.stage.roll_back()
            if staged.before is not None:
                self._return_to(staged.before)
            # Chains may have been made that are not in the mirror; to make them again would double their rules.
            broken = broken or (doubtful and bool(staged.stage.new_classes))
        self._dirty = self._dirty or doubtful
        self._broken = self._broken or broken

    def _take_staged(self) -> Staged | None:
        staged, self._staged = self._staged, None
        return staged

    def switch_text(self) -> str:
        """Text that gives this table the hooks; empty if it has them."""
        return "" if self.hooked else skeleton.hook_text(self.shape, self.mirror.name)

    def switched(self) -> None:
        """The switch text is in force."""
        if not self.hooked:
            self.hooked = True
            self._leaving, self._replaces = self._replaces, None
            self._remember_structure()

    def leave_text(self) -> str:
        """Text that takes away the table that this one has replaced; empty if there is none.

        It has to be another transaction than the switch: new hooks stand before old ones of the same priority, so that a
        packet could pass the new ones just before and the old ones just after both change.  Meeting both does no harm.
        """
        if self._leaving is None or self._leaving not in self.kernel.tables(self.nft):
            return ""
        return f"delete table {self.nft} {self._leaving}\n"

    def left(self) -> None:
        """The leave text is in force."""
        self._leaving = None

    def _carry_affinity(self, transaction: Transaction, old: str) -> None:
        for item in adopt.affinity(self.kernel, self.nft, old):
            element = encode.timed_element(item.key, item.data or b"", item.timeout, item.expiration)
            transaction.add(self.nft, self.mirror.name, "affinity", element)

    # -- between batches --

    def prepare_classes(self) -> None:
        """Make the classes that will be wanted when a pool grows or shrinks by one."""
        wanted = sorted(self._near - self.mirror.classes.keys())[:CLASSES_AT_ONCE]
        self._near = self._near - self.mirror.classes.keys() - set(wanted)
        if not wanted or not self.sound:
            return
        transaction = Transaction()
        stage = Stage(self.mirror, transaction)
        try:
            for item in wanted:
                stage.make_class(item)
            self._commit(transaction)
        except (TooMany, Refused, NotSent):
            # They are made when they are needed.
            return
        except KernelError:
            self._broken = True
            return
        stage.commit()
        self._remember_classes(stage)

    def verify(self) -> list[Drift]:
        """Compare everything with the kernel; what is found decides how the next batch is written."""
        if not self.hooked:
            return []
        where = f"table {self.nft} {self.mirror.name}"
        if self.mirror.name not in self.kernel.tables(self.nft):
            self._broken = True
            return [Drift(service=None, what=f"{where} is gone"), *self._all_hit("has no rules")]
        missing = skeleton.SET_NAMES - self.kernel.sets(self.nft, self.mirror.name)
        if missing:
            self._broken = True
            gone = [Drift(service=None, what=f"{where}: set {name} is gone") for name in sorted(missing)]
            return gone + self._all_hit(f"may not be served: {', '.join(sorted(missing))} is gone")
        drift: list[Drift] = []
        if self.mirror.name in self.kernel.dormant(self.nft):
            drift.append(Drift(service=None, what=f"{where} was made dormant"))
        chains = self.kernel.chains(self.nft, self.mirror.name)
        rules = self.kernel.rules(self.nft, self.mirror.name)
        for chain in sorted({*chains, *self._chains}):
            if chains.get(chain, _ABSENT) != self._chains.get(chain, _ABSENT):
                drift.append(
                    Drift(service=None, what=f"{where}: chain {chain} was added, removed or hooked otherwise")
                )
            elif rules.get(chain) != self._rules.get(chain):
                drift.append(Drift(service=None, what=f"{where}: the rules of chain {chain} were changed"))
        try:
            drift += rows.compare_verdicts(self.mirror, self.kernel)
            if drift:
                self._broken = True
                drift += self._all_hit("may not be served: chains, rules or verdicts were changed")
            elements = rows.compare(self.mirror, self.kernel)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            self._broken = True
            return [*drift, Drift(service=None, what=f"{where}: a set is gone")]
        if elements:
            self._dirty = True
        return drift + elements

    def _all_hit(self, how: str) -> list[Drift]:
        """Every Service port of the table, up to as many as are named one by one."""
        names = list(self.mirror.entries)
        shown = [
            Drift(service=name, what=f"{how} in {self.nft} {self.mirror.name}")
            for name in names[: rows.DRIFT_SHOWN]
        ]
        more = len(names) - len(shown)
        return shown + ([Drift(service=None, what=f"and {more} Service ports more")] if more > 0 else [])

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


def _other(name: str) -> str:
    """The table that takes turns with this one."""
    return next(other for other in layout.TABLES if other != name)


def out_of_step(refused: Refused) -> bool:
    """Is the kernel not what the mirror says?  Then a complete rewrite helps, and no Service is to blame."""
    return all(r.errno in (errno.ENOENT, errno.EEXIST) for r in refused.refusals)
