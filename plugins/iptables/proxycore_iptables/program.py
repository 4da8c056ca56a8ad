"""Input for `iptables-restore --noflush`, piece by piece, with what each piece changes and whose each line is.

Pure.  A piece is valid alone: chains come before what jumps to them, and leave after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from proxycore.api import ServicePortName

from .dispatch import edit
from .rules import Jump, Rule, Rules, TableName, length, mark

Present = dict[TableName, dict[str, int]]
"""Marks of the chains that are in the kernel, by table."""


class Line(NamedTuple):
    """One line of input.  `owner`: the Service port at fault if it is refused; None: nobody's."""

    text: str
    owner: ServicePortName | None = None


class Section(NamedTuple):
    """What happens to one table in one commit.

    `marks`: chains with their content afterwards, None for those that go.  `entries`: how many more entries a table of the
    legacy variant has afterwards: a chain counts two beside its rules.  `ensured`, `dropped`: rules of chains that are not
    ours, put there and taken away.
    """

    table: TableName
    lines: tuple[Line, ...]
    marks: Mapping[str, int | None]
    entries: int = 0
    ensured: tuple[Jump, ...] = ()
    dropped: tuple[Jump, ...] = ()


class Piece(NamedTuple):
    """One run of the tool; sections are committed one after the other."""

    sections: tuple[Section, ...]

    @property
    def text(self) -> str:
        parts = []
        for section in self.sections:
            parts.append(f"*{section.table}\n")
            parts += [f"{line.text}\n" for line in section.lines]
            parts.append("COMMIT\n")
        return "".join(parts)

    def line(self, number: int) -> Line | None:
        """The line of that number in the text, from 1; None for those that only frame a section."""
        for section in self.sections:
            if number - 2 in range(len(section.lines)):
                return section.lines[number - 2]
            number -= len(section.lines) + 2
        return None

    @property
    def owners(self) -> tuple[ServicePortName, ...]:
        """Whose lines there are, each once."""
        found = {line.owner: None for section in self.sections for line in section.lines if line.owner}
        return tuple(found)


class Draft:
    """A section in the making, for a table of which `present` is known."""

    def __init__(self, table: TableName, present: Mapping[str, int]) -> None:
        self.table = table
        self._present = present
        self._declared: list[Line] = []
        self._rules: list[Line] = []
        self._removed: list[Line] = []
        self.marks: dict[str, int | None] = {}
        self._entries = 0
        self._ensured: list[Jump] = []
        self._dropped: list[Jump] = []

    @property
    def chains(self) -> int:
        """How many chains are touched."""
        return len(self.marks)

    def __bool__(self) -> bool:
        return bool(self._declared or self._rules or self._removed)

    def _known(self, chain: str) -> int | None:
        return self.marks[chain] if chain in self.marks else self._present.get(chain)

    def _account(self, chain: str, after: int | None) -> None:
        before = self._known(chain)
        self._entries -= 0 if before is None else length(before) + 2
        self._entries += 0 if after is None else length(after) + 2
        self.marks[chain] = after

    def write(
        self, chain: str, rules: Rules, owner: ServicePortName | Mapping[Rule, ServicePortName] | None = None
    ) -> None:
        """The chain holds exactly these rules, whether it was there or not."""
        of = owner.get if isinstance(owner, Mapping) else None
        whole = None if of else owner
        self._declared.append(Line(f":{chain} - [0:0]", whole))  # type: ignore[arg-type]
        if of is None:
            self._rules += [Line(f"-A {chain} {rule}", whole) for rule in rules]  # type: ignore[arg-type]
        else:
            self._rules += [Line(f"-A {chain} {rule}", of(rule)) for rule in rules]
        self._account(chain, mark(rules))

    def change(self, chain: str, before: Rules, after: Rules, owners: Mapping[Rule, ServicePortName]) -> None:
        """The same for a chain that holds `before`, by single rules where that is less."""
        lines = edit(before, after, chain)
        if lines is None:
            self.write(chain, after, owners)
            return
        skip = len(f"-A {chain} ")
        for text in lines:
            rule = text[skip:]
            if text.startswith("-I"):
                rule = rule.partition(" ")[2]
            self._rules.append(Line(text, owners.get(rule)))
        self._account(chain, mark(after))

    def remove(self, chain: str) -> None:
        """The chain goes; nothing may lead to it any more, what goes in the same section excepted."""
        self._declared.append(Line(f":{chain} - [0:0]"))
        self._removed.append(Line(f"-X {chain}"))
        self._account(chain, None)

    def ensure(self, jump: Jump, *, at_end: bool = False) -> None:
        """Put a rule at the head (or the end) of a chain that is not ours."""
        self._rules.append(Line(f"{'-A' if at_end else '-I'} {jump.chain} {jump.rule}"))
        self._entries += 1
        self._ensured.append(jump)

    def declare(self, chain: str) -> None:
        """Make a chain that others may fill, too."""
        # Not by its name alone, which would empty it if it came meanwhile.
        self._rules.append(Line(f"-N {chain}"))
        self._entries += 2

    def drop(self, jump: Jump) -> None:
        """Take a rule out of a chain that is not ours."""
        self._rules.append(Line(f"-D {jump.chain} {jump.rule}"))
        self._entries -= 1
        self._dropped.append(jump)

    def section(self) -> Section:
        return Section(
            self.table,
            (*self._declared, *self._rules, *self._removed),
            self.marks,
            self._entries,
            tuple(self._ensured),
            tuple(self._dropped),
        )


def pieces(drafts: Iterable[Draft], *, together: bool) -> Iterator[Piece]:
    """Drafts as one piece, or each as a piece of its own; empty ones left out."""
    sections = [draft.section() for draft in drafts if draft]
    if together:
        if sections:
            yield Piece(tuple(sections))
        return
    for section in sections:
        yield Piece((section,))


_LAST = {"KUBE-SEP": 3, "KUBE-SVC": 2, "KUBE-SVL": 2, "KUBE-EXT": 1, "KUBE-XLB": 1, "KUBE-FW-": 0}


def leaving(chains: Iterable[str], tree: Callable[[str], bool]) -> list[str]:
    """Chains in the order in which they may go: what jumps before what is jumped to."""
    return sorted(chains, key=lambda name: (-1 if tree(name) else _LAST.get(name[:8], 0), name))


def union(before: Rules, after: Rules) -> Rules:
    """What refuses untranslated packets of either state: in force while translation changes from one to the other."""
    known = set(after)
    return (*after, *(rule for rule in before if rule not in known))
