"""A host in memory, for tests: IPVS, sets, policy routing, and iptables as far as our chains go."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from proxycore.api import FAMILIES, BackendContext, Family, KernelError
from proxycore.kernel.xtables import RestoreRefused

from .fake import FakeKernel
from .fakesets import FakeSets
from .kernel import Kernel
from .options import Options
from .routing import Part, Routing
from .setkernel import Sets
from .system import set_timeouts
from .tables import Found, Tables, read

_SET = re.compile(r"--(?:match|map)-set (\S+) ")


class FakeTables:
    """Tables of one family, with rules of others if a test puts them there.  `loads`: every input so far."""

    def __init__(self, family: Family, sets: FakeSets) -> None:
        self.name = "fake iptables"
        self.has_security = self.random_fully = True
        self.loads: list[str] = []
        self.tables: dict[str, dict[str, list[str]]] = {}
        self._family = family
        self._sets = sets

    def lines(self) -> Iterable[str]:
        """As iptables-save prints them."""
        for table, chains in self.tables.items():
            yield f"*{table}"
            yield from (f":{chain} - [0:0]" for chain in chains)
            yield from (f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules)
            yield "COMMIT"

    def read(self) -> Found:
        return read(self.lines())

    def load(self, text: str) -> None:
        self.loads.append(text)
        table = ""
        work: dict[str, list[str]] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if line.startswith("*"):
                table = line[1:]
                work = {chain: list(rules) for chain, rules in self.tables.get(table, {}).items()}
            elif line == "COMMIT":
                self.tables[table] = work
            elif not self._do(work, line):
                raise RestoreRefused(f"line {number}: {line}", line=number, lines=(number,), said="refused")
        self._count()

    def _do(self, work: dict[str, list[str]], line: str) -> bool:
        verb, _, rest = line.partition(" ")
        chain, _, rule = rest.partition(" ")
        if verb.startswith(":"):
            work[verb[1:]] = []
            return True
        if verb == "-X":
            return work.pop(chain, None) == []
        rules = work.setdefault(chain, [])
        if any(name not in self._sets.states() for name in _SET.findall(rule)):
            return False
        if verb == "-D":
            if rule not in rules:
                return False
            rules.remove(rule)
        elif verb == "-I":
            rules.insert(0, rule)
        else:
            rules.append(rule)
        return True

    def _count(self) -> None:
        """Sets that rules of this family name cannot be destroyed."""
        start = "PX4-" if self._family == "IPv4" else "PX6-"
        kept = {name: n for name, n in self._sets.references.items() if not name.startswith(start)}
        for line in self.lines():
            for name in _SET.findall(line):
                kept[name] = kept.get(name, 0) + 1
        self._sets.references = kept


class FakeRouting:
    """`parts`: what is there."""

    def __init__(self) -> None:
        self.parts: set[Part] = set()
        self.writes = 0

    def present(self, wanted: Collection[Part]) -> frozenset[Part]:
        return frozenset(self.parts & set(wanted))

    def add(self, part: Part) -> None:
        if part in self.parts:
            raise KernelError(f"{part}: File exists")
        self.writes += 1
        self.parts.add(part)

    def delete(self, part: Part) -> None:
        if part not in self.parts:
            raise KernelError(f"{part}: No such file or directory")
        self.writes += 1
        self.parts.remove(part)


class FakeSystem:
    """It outlives the backends that are opened on it."""

    def __init__(self) -> None:
        self.marks_checked = False
        self.servers = FakeKernel()
        self.entries = FakeSets()
        self.routes = FakeRouting()
        self.chains = {family: FakeTables(family, self.entries) for family in FAMILIES}
        self.kernel: Kernel = self.servers
        self.sets: Sets = self.entries
        self.routing: Routing = self.routes
        self.tables: Mapping[Family, Tables] = self.chains

    def open(self, context: BackendContext, options: Options) -> FakeSystem:
        return self

    def prepare(self, options: Options) -> None:
        set_timeouts(self.kernel, options)

    def checks_marks(self) -> bool:
        return self.marks_checked

    def close(self) -> None:
        pass

    def dump(self) -> dict[str, object]:
        """All that is there, to be compared."""
        return {
            "servers": {
                state.server: {each.destination for each in self.servers.destinations(state.server.key)}
                for state in self.servers.servers()
            },
            "sets": {name: self.entries.members(state.spec) for name, state in self.entries.states().items()},
            "rules": {family: list(tables.lines()) for family, tables in self.chains.items()},
            "routing": set(self.routes.parts),
        }
