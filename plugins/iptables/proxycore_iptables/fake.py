"""iptables in memory, for tests: one family's tables with the kernel's rules about references, and faults on demand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from proxycore.api import BackendContext, Family, KernelError
from proxycore.kernel.xtables import LockHeld, RestoreRefused, Variant
from proxycore.kubechains import target_of

from .listing import Listing, read
from .program import Section
from .reader import Count, Counts
from .rules import Jump, Place, Rules
from .ruleset import KEPT_WHOLE, shown
from .shape import Features, Options
from .stamp import Stamp
from .watch import Watch

BUILT_IN: Mapping[str, tuple[str, ...]] = {
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
}
_EXTENSIONS = frozenset({"ACCEPT", "DROP", "RETURN", "REJECT", "DNAT", "MARK", "MASQUERADE"})
Chains = dict[str, list[str]]


class FakeTables:
    """Tables of one family.

    `refuse_line(rule)`: the tool names the line of such a rule; `refuse_commit(rule)`: the kernel refuses the table and
    nobody is named.  `die_after`: so many sections are committed, then the process is gone (KernelError), once.
    `lock_after`: so many are committed, then somebody else has the lock (LockHeld), once; 0: from the start.
    `incompatible`: tables that the tool cannot read, and leaves out of its listing.  `met`: packets that met a rule, by
    table, chain and rule; none once its chain was rewritten.
    """

    def __init__(self, family: Family, variant: Variant = "nft") -> None:
        self.family: Family = family
        self.variant: Variant = variant
        self.name = f"{'iptables' if family == 'IPv4' else 'ip6tables'}-{variant}"
        self.tables: dict[str, Chains] = {t: {c: [] for c in chains} for t, chains in BUILT_IN.items()}
        self.commits = 0
        self.texts: list[str] = []
        self.refuse_line: Callable[[str], bool] = lambda rule: False
        self.refuse_commit: Callable[[str], bool] = lambda rule: False
        self.die_after: int | None = None
        self.lock_after: int | None = None
        self.incompatible: set[str] = set()
        self.met: dict[tuple[str, str, str], int] = {}

    # -- Live --

    def read(self, keep: Collection[str] = ()) -> Listing:
        return read(self.save().splitlines(), ours=shown, keep={*KEPT_WHOLE, *keep})

    def rules(self, places: Collection[Place]) -> dict[Place, Rules]:
        return {
            place: tuple(self.tables[place.table][place.chain])
            for place in places
            if place.chain in self.tables[place.table]
        }

    def counters(self) -> Counts:
        return {
            (table, chain): tuple(Count(self.met.get((table, chain, rule), 0), 0) for rule in rules)
            for table, chains in self.tables.items()
            for chain, rules in chains.items()
            if table == "nat" and shown(table, chain)
        }

    def assert_jumps(self, jumps: Sequence[Jump]) -> None:
        for jump in jumps:
            rules = self.tables[jump.table][jump.chain]
            if jump.rule not in rules:
                rules.insert(0, jump.rule)
                self.commits += 1

    def close(self) -> None:
        pass

    def restore(self, text: str, sections: Sequence[Section]) -> None:
        self.texts.append(text)
        table, chains = "", Chains()
        rewritten: set[str] = set()
        done = 0
        for number, line in enumerate(text.splitlines(), start=1):
            if line.startswith("*"):
                # The tool takes the lock for each table anew.
                if done == self.lock_after:
                    self.lock_after = None
                    raise LockHeld(1, (), "fake.lock")
                table, rewritten = line[1:], set()
                chains = {chain: list(rules) for chain, rules in self.tables[table].items()}
            elif line == "COMMIT":
                self._commit(table, chains, number)
                self.met = {
                    key: count
                    for key, count in self.met.items()
                    if key[0] != table or (key[1] not in rewritten and key[2] in chains.get(key[1], ()))
                }
                done += 1
                if done == self.die_after:
                    self.die_after = None
                    raise KernelError("killed")
            else:
                self._line(chains, line, number)
                if line.startswith(":"):
                    rewritten.add(line[1:].partition(" ")[0])

    def save(self) -> str:
        """As `iptables-save` prints it."""
        lines = []
        for table, chains in self.tables.items():
            if table in self.incompatible:
                lines.append(f"# Table `{table}' is incompatible, use 'nft' tool.")
                continue
            lines.append(f"*{table}")
            lines += [f":{chain} {'ACCEPT' if chain in BUILT_IN[table] else '-'} [0:0]" for chain in chains]
            lines += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
            lines.append("COMMIT")
        return "\n".join(lines)

    # -- its inside --

    def _line(self, chains: Chains, line: str, number: int) -> None:
        if line.startswith(":"):
            chains[line[1:].partition(" ")[0]] = []
            return
        verb, chain, rule = (line.split(" ", 2) + [""])[:3]
        if verb == "-N":
            if chain in chains:
                raise _refused(number, f"chain {chain} exists")
            chains[chain] = []
            return
        if verb == "-X":
            if chains.get(chain):
                raise _refused(number, f"chain {chain} is not empty")
            if chain not in chains:
                raise _refused(number, f"no chain {chain}")
            user = next((name for name, rules in chains.items() if _leads(name, rules, chain)), None)
            if user is not None:
                raise _refused(number, f"chain {chain} is in use by {user}")
            del chains[chain]
            return
        if chain not in chains:
            raise _refused(number, f"no chain {chain}")
        if verb == "-D":
            if rule not in chains[chain]:
                raise _refused(number, f"no such rule in {chain}")
            chains[chain].remove(rule)
            return
        place = len(chains[chain])
        if verb == "-I":
            place = 0
            first, _, rest = rule.partition(" ")
            if first.isdigit():
                place, rule = int(first) - 1, rest
        if place > len(chains[chain]):
            raise _refused(number, f"index of insertion too big in {chain}")
        if self.refuse_line(rule):
            raise _refused(number, "bad value")
        chains[chain].insert(place, rule)

    def _commit(self, table: str, chains: Chains, number: int) -> None:
        for chain, rules in chains.items():
            for rule in rules:
                target = target_of(f"-A {chain} {rule}")
                if target not in chains and target not in _EXTENSIONS and target is not None:
                    raise _refused(
                        None, f"line {number} failed: {chain} leads to {target}, which is not there"
                    )
                if self.refuse_commit(rule):
                    raise _refused(None, f"line {number} failed")
        if chains != self.tables[table]:
            self.commits += 1
        self.tables[table] = chains


def _leads(name: str, rules: Iterable[str], to: str) -> bool:
    return any(to in rule and target_of(f"-A {name} {rule}") == to for rule in rules)


def _refused(line: int | None, said: str) -> RestoreRefused:
    return RestoreRefused(f"refused: {said}", line=line, lines=(line,) if line else (), said=said)


class FakeStamps:
    """The number of commits of all families."""

    def __init__(self, tables: Collection[FakeTables]) -> None:
        self._tables = tables

    def read(self) -> Stamp:
        return Stamp(generation=sum(tables.commits for tables in self._tables))

    def close(self) -> None:
        pass


class FakeHost:
    """A host of fake tables, which outlive the backend."""

    def __init__(self, variant: Variant = "nft", families: Sequence[Family] = ("IPv4", "IPv6")) -> None:
        self.variant: Variant = variant
        self.tables = {family: FakeTables(family, variant) for family in families}
        self.features = {family: Features() for family in families}
        self.watch = Watch(FakeStamps(self.tables.values()))

    def open(self, context: BackendContext, options: Options) -> FakeHost:
        """For IptablesBackend(open_host=...)."""
        self.watch = Watch(FakeStamps(self.tables.values()))
        return self

    def prepare(self) -> None: ...

    def figures(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None:
        pass
