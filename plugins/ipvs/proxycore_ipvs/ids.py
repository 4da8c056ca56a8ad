"""Numbers for Service ports, and for the target ports of those with session affinity.  One of each for a family.

A number is part of the marks of virtual servers.  It keeps its Service port until that is gone and its servers too: a new
one with the same number would inherit their connections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from proxycore.api import Protocol, ServicePortName

from .marks import LAST_CLASS, Marks


class Exhausted(Exception):
    """Every number is somebody's; nothing was changed."""


class FrontendKey(NamedTuple):
    """What the sets map: address (None for a node port), protocol and port."""

    address: str | None
    protocol: Protocol
    port: int


class Ids:
    """Who has which number.  `numbers`: all that may be given, as `Marks.numbers`."""

    def __init__(self, numbers: range) -> None:
        self._numbers = numbers
        self._next = numbers.start
        self._of: dict[ServicePortName, int] = {}
        self._holder: dict[int, ServicePortName | None] = {}
        self._leaving: dict[int, ServicePortName | None] = {}

    def __len__(self) -> int:
        """How many numbers cannot be given to anyone now."""
        return len(self._holder)

    def get(self, name: ServicePortName) -> int | None:
        """The number of a Service port, also while it is leaving."""
        return self._of.get(name)

    def holder(self, number: int) -> ServicePortName | None:
        """Whose number it is, or was when its servers were made; None: unknown, or nobody's."""
        return self._holder.get(number)

    @property
    def leaving(self) -> Mapping[int, ServicePortName | None]:
        """Numbers kept only for servers that still have connections, and whose they were, where that is known."""
        return self._leaving

    def take(self, name: ServicePortName) -> int:
        """The number of a Service port; a new one if it has none.  Raises Exhausted.

        One that is leaving gets its own back.
        """
        number = self._of.get(name)
        if number is None:
            number = self._free()
            self._of[name] = number
            self._holder[number] = name
        self._leaving.pop(number, None)
        return number

    def _free(self) -> int:
        """The next free number after the last one given, so that a number rests as long as possible."""
        if len(self._holder) >= len(self._numbers):
            raise Exhausted(f"all {len(self._numbers)} numbers of Service ports are in use")
        number = self._next
        while number in self._holder:
            number = number + 1 if number + 1 in self._numbers else self._numbers.start
        self._next = number + 1 if number + 1 in self._numbers else self._numbers.start
        return number

    def leave(self, name: ServicePortName) -> int | None:
        """A Service port is gone, its servers may not be.  Returns its number, None if it has none."""
        number = self._of.get(name)
        if number is not None:
            self._leaving[number] = name
        return number

    def settle(self, remaining: Collection[int], among: Iterable[int] | None = None) -> tuple[int, ...]:
        """Release numbers that are leaving and have no server; to be called once the deletes are done.

        `remaining`: numbers that still have one.  `among`: those looked at, None: all.  Returns what was released.
        """
        looked_at = self._leaving if among is None else among
        gone = tuple(number for number in looked_at if number in self._leaving and number not in remaining)
        for number in gone:
            name = self._leaving.pop(number)
            self._holder.pop(number)
            if name is not None and self._of.get(name) == number:
                self._of.pop(name)
        return gone

    @classmethod
    def recover(
        cls,
        marks: Marks,
        values: Mapping[FrontendKey, int],
        servers: Iterable[int],
        owners: Mapping[FrontendKey, ServicePortName],
    ) -> Ids:
        """Numbers as the kernel's sets and servers tell them.

        `values`: what the sets hold.  `servers`: marks of all virtual servers.  `owners`: who has which frontend now.  A
        number is given to the Service port that has most of its frontends; one that nobody has is leaving.
        """
        found = cls(marks.numbers)
        votes: Counter[tuple[int, ServicePortName]] = Counter()
        seen: set[int] = set()
        for key, value in values.items():
            parts = marks.take_apart(value)
            if parts is None or parts.reject:
                continue
            seen.add(parts.number)
            owner = owners.get(key)
            if owner is not None:
                votes[parts.number, owner] += 1
        seen.update(server[0] for mark in servers if (server := marks.server_of(mark)) is not None)
        for (number, name), _ in sorted(votes.items(), key=lambda item: (-item[1], item[0])):
            if name not in found._of and number not in found._holder:
                found._of[name] = number
                found._holder[number] = name
        for number in sorted(seen - found._holder.keys()):
            found._holder[number] = None
            found._leaving[number] = None
        if seen:
            after = max(seen) + 1
            found._next = after if after in found._numbers else found._numbers.start
        return found


class Target(NamedTuple):
    """Where all endpoints of a Service port listen."""

    protocol: Protocol
    port: int


class Classes:
    """Numbers 1 to 15 for target ports, for each protocol its own: rules name both.

    A class that nobody has any more goes on until settle(): sets may still name it.
    """

    def __init__(self, last: int = LAST_CLASS) -> None:
        self._last = last
        self._of: dict[Target, int] = {}
        self._users: dict[Target, set[ServicePortName]] = {}
        self._target: dict[ServicePortName, Target] = {}

    @property
    def rules(self) -> Mapping[Target, int]:
        """Every class that rules have to know."""
        return self._of

    def get(self, name: ServicePortName) -> int:
        """The class of a Service port, 0 if it has none."""
        target = self._target.get(name)
        return 0 if target is None else self._of[target]

    def take(self, name: ServicePortName, target: Target) -> int:
        """The class of a target port, for this Service port; what that had before it leaves.

        Raises Exhausted; the Service port then has none.
        """
        if self._target.get(name) == target:
            return self._of[target]
        self.leave(name)
        number = self._of.get(target)
        if number is None:
            used = {n for other, n in self._of.items() if other.protocol == target.protocol}
            number = next((n for n in range(1, self._last + 1) if n not in used), None)
            if number is None:
                raise Exhausted(
                    f"all {self._last} classes of {target.protocol} target ports with session affinity are in use"
                )
            self._of[target] = number
        self._users.setdefault(target, set()).add(name)
        self._target[name] = target
        return number

    def leave(self, name: ServicePortName) -> None:
        """A Service port is gone, or needs no class any more."""
        target = self._target.pop(name, None)
        if target is not None:
            self._users[target].discard(name)

    def settle(self) -> bool:
        """Forget classes that nobody has; to be called once no set names them.  Returns: there were such."""
        idle = [target for target in self._of if not self._users.get(target)]
        for target in idle:
            self._users.pop(target, None)
            self._of.pop(target)
        return bool(idle)

    def recover(self, target: Target, number: int) -> None:
        """A rule is there that gives the class this number; it stays if somebody takes it before settle()."""
        taken = {n for other, n in self._of.items() if other.protocol == target.protocol}
        if 1 <= number <= self._last and number not in taken and target not in self._of:
            self._of[target] = number
