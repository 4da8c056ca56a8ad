"""A system on which nothing is done: it answers like one beneath it, or like an empty one, and notes what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

from proxycore.api import Family

from .kernel import Kernel
from .netrules import TABLES
from .options import Options
from .routing import Part, Routing
from .servers import (
    AddDestination,
    AddServer,
    DeleteDestination,
    DeleteServer,
    DestinationState,
    Key,
    Operation,
    Refusal,
    ServerState,
    SetDestination,
    SetServer,
    Timeouts,
)
from .setkernel import Sets
from .sets import Entry, EntryRefusal, Mark, Members, SetSpec, SetState, line
from .system import System
from .tables import NOTHING, Found, Tables

Verb = Literal["add", "delete", "replace"]
T = TypeVar("T")


class Step(NamedTuple):
    """What would be done by which tool, to a server of this key if it is one."""

    verb: Verb
    tool: str
    native: str
    key: Key | None = None


class Rehearsal:
    """`under` None: an empty system whose iptables can do all."""

    def __init__(self, families: Iterable[Family], under: System | None = None) -> None:
        self.steps: list[Step] = []
        self._under = under
        self.kernel: Kernel = _Kernel(self.steps, under)
        self.sets: Sets = _Sets(self.steps, under)
        self.routing: Routing = _Routing(self.steps, under)
        self.tables: Mapping[Family, Tables] = {
            family: _Tables(self.steps, family, under) for family in families
        }

    def prepare(self, options: Options) -> None:
        pass

    def checks_marks(self) -> bool:
        return self._under is not None and self._under.checks_marks()

    def close(self) -> None:
        pass


def _verb(operation: Operation) -> Verb:
    match operation:
        case AddServer() | AddDestination():
            return "add"
        case SetServer() | SetDestination():
            return "replace"
        case DeleteServer() | DeleteDestination():
            return "delete"


class _Kernel:
    def __init__(self, steps: list[Step], under: System | None) -> None:
        self._steps = steps
        self._under = under.kernel if under is not None else None

    def run(self, operations: Sequence[Operation]) -> tuple[Refusal, ...]:
        for each in operations:
            key = each.server.key if isinstance(each, AddServer | SetServer) else each.key
            self._steps.append(Step(_verb(each), "ipvsadm", str(each), key))
        return ()

    def servers(self) -> list[ServerState]:
        return self._under.servers() if self._under else []

    def server(self, key: Key) -> ServerState | None:
        return self._under.server(key) if self._under else None

    def destinations(self, key: Key) -> list[DestinationState]:
        return self._under.destinations(key) if self._under else []

    def timeouts(self) -> Timeouts:
        return self._under.timeouts() if self._under else Timeouts()

    def set_timeouts(self, wanted: Timeouts) -> None:
        pass

    def close(self) -> None:
        pass


class _Sets:
    def __init__(self, steps: list[Step], under: System | None) -> None:
        self._steps = steps
        self._under = under.sets if under is not None else None

    def _note(self, verb: Verb, native: str) -> None:
        self._steps.append(Step(verb, "ipset", native))

    def states(self) -> Mapping[str, SetState]:
        return self._under.states() if self._under else {}

    def create(self, spec: SetSpec, *, hash_size: int | None = None) -> bool:
        self._note("add", str(spec))
        return True

    def destroy(self, name: str) -> bool:
        self._note("delete", f"destroy {name}")
        return True

    def swap(self, name: str, other: str) -> None:
        self._note("replace", f"swap {name} {other}")

    def members(self, spec: SetSpec) -> dict[Entry, Mark | None]:
        return self._under.members(spec) if self._under else {}

    def add(self, spec: SetSpec, members: Members, *, exclusive: bool = False) -> tuple[EntryRefusal, ...]:
        for entry, mark in members.items():
            self._note("add", line(spec.name, entry, mark))
        return ()

    def delete(
        self, spec: SetSpec, entries: Iterable[Entry], *, exclusive: bool = False
    ) -> tuple[EntryRefusal, ...]:
        for entry in entries:
            self._note("delete", f"del {spec.name} {entry}")
        return ()

    def close(self) -> None:
        pass


class _Routing:
    def __init__(self, steps: list[Step], under: System | None) -> None:
        self._steps = steps
        self._under = under.routing if under is not None else None

    def present(self, wanted: Collection[Part]) -> frozenset[Part]:
        return self._under.present(wanted) if self._under else frozenset()

    def add(self, part: Part) -> None:
        self._steps.append(Step("add", "ip", str(part)))

    def delete(self, part: Part) -> None:
        self._steps.append(Step("delete", "ip", str(part).replace(" add ", " del ")))


class _Tables:
    def __init__(self, steps: list[Step], family: Family, under: System | None) -> None:
        self._steps = steps
        self._under = under.tables[family] if under is not None else None
        self.name = "ip6tables" if family == "IPv6" else "iptables"
        self.has_security = self._asked(lambda tables: tables.has_security, True)
        self.random_fully = self._asked(lambda tables: tables.random_fully, True)

    def _asked(self, ask: Callable[[Tables], T], otherwise: T) -> T:
        return ask(self._under) if self._under is not None else otherwise

    def read(self) -> Found:
        return self._asked(lambda tables: tables.read(), NOTHING)

    def load(self, text: str) -> None:
        table = TABLES[0]
        for rule in text.splitlines():
            if rule.startswith("*"):
                table = rule[1:]  # type: ignore[assignment]
            elif rule != "COMMIT":
                verb: Verb = "replace" if rule.startswith(":") else "add"
                self._steps.append(Step(verb, f"{self.name}-restore --noflush", f"{table}: {rule}"))
