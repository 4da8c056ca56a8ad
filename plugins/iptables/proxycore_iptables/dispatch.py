"""Chains that every Service port adds to: in one row, or as a tree of address prefixes when there are many.

Pure.  The tree branches by 4 bits of the destination; the few rules of an address range stand in the chain above:

    KUBE-SERVICES
      -d 10.96.0.0/12 -j KUBE-SVC-TREE.0a600000.12
        -d 10.96.0.0/16 -j KUBE-SVC-TREE.0a600000.16
        -d 10.97.0.1/32 -p tcp ... -j KUBE-SVC-...
      the tail: node ports

Jumps come back, so that the tail is reached.  Nodes are values that share what did not change: a batch costs what it
touches, and giving it up costs nothing.
"""

from __future__ import annotations

import hashlib

# The C part alone, as in the core: the module around it brings selectors and the like.
from _socket import AF_INET, AF_INET6, inet_ntop
from base64 import b32encode
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from proxycore.kubechains import TREE

from .rules import Entry, Place, Rule, Rules

INLINE = 4
"""So many entries of one address range need no chain of their own."""
LEVELS = 8
"""So many nodes may lie one below the other: nf_tables allows 16 nested jumps, and those of a Service come after."""
_SMALL = 8
"""Chains with no more rules than this are rewritten: to edit one, the tool has to read it first."""


class Shared:
    """A shared chain and the nodes below it, as they are and as a batch wants them.

    `change` adds to the batch; `pending` is what is to be written; then `accept` says that it was, or
    `give_up` that it was not.  What the chains hold depends on the set of entries, the tail and `tree_from` alone.

    Args: `tail`: rules after all entries.  `tree_from`: so many entries with an address form a tree; None: they never do.
    Entries without an address stand in the root, before all others.
    """

    def __init__(self, root: Place, tail: Rules, tree_from: int | None) -> None:
        self.root = root
        self._tree_from = tree_from
        self._first = self._wanted = _State((), _ROOT, tail)
        self._accepted: _State | None = None

    def change(self, removed: Iterable[Entry], added: Iterable[Entry]) -> None:
        """Take entries away and add others; what is among both stays.

        Raises KeyError for one to remove that is not there or one to add that is; nothing has changed then.
        """
        gone, new = set(removed), set(added)
        gone, new = gone - new, new - gone
        if not gone and not new:
            return
        state = self._wanted
        gone_row, gone_tree = self._sorted(gone)
        new_row, new_tree = self._sorted(new)
        self._wanted = _State(
            _row_changed(state.row, gone_row, new_row),
            _root_changed(state.tree, gone_tree, new_tree),
            state.tail,
        )

    def chains(self) -> dict[str, Rules]:
        """All chains as the batch wants them, by name: nodes, children first, then the root."""
        return self._rendered(self._wanted, None)

    def pending(self) -> dict[str, tuple[Rules | None, Rules | None]]:
        """What the batch changes: chain -> (its rules before, its rules after); None: it is not there.

        In an order in which they can be written one by one: children before parents, and at the end those to remove,
        parents first.  Before the first accept() nothing is there, and everything is pending.
        """
        if self._accepted is self._wanted:
            return {}
        before = {} if self._accepted is None else self._rendered(self._accepted, self._wanted)
        after = self._rendered(self._wanted, self._accepted)
        found: dict[str, tuple[Rules | None, Rules | None]] = {
            name: (before.get(name), rules) for name, rules in after.items() if before.get(name) != rules
        }
        found.update((name, (before[name], None)) for name in reversed(before) if name not in after)
        return found

    def accept(self) -> None:
        """The batch is in force."""
        self._accepted = self._wanted

    def give_up(self) -> None:
        """Forget the batch: all is as after the last accept(), or as made."""
        self._wanted = self._first if self._accepted is None else self._accepted

    def __len__(self) -> int:
        """How many entries the batch leads to."""
        return len(self._wanted.row) + self._wanted.tree.count

    def _sorted(self, entries: set[Entry]) -> tuple[list[Entry], list[Entry]]:
        """Those that stand in the root in any case, and those that a tree can hold."""
        if self._tree_from is None:
            return sorted(entries), []
        return sorted(e for e in entries if not e.address), sorted(e for e in entries if e.address)

    def _is_tree(self, state: _State) -> bool:
        return self._tree_from is not None and state.tree.count >= max(self._tree_from, 1)

    def _rendered(self, state: _State, other: _State | None) -> dict[str, Rules]:
        """The chains of a state, children first; not those that are surely the same in the other one."""
        chains: dict[str, Rules] = {}
        row = tuple(entry.rule for entry in state.row)
        if self._is_tree(state):
            known = other.tree if other is not None and self._is_tree(other) else None
            for child in _children(state.tree):
                _render(child, 1, *_opposite(child, known, 0), chains)
            chains[self.root.chain] = (*row, *_rules(state.tree, 0), *state.tail)
        else:
            chains[self.root.chain] = (*row, *(entry.rule for entry in _entries(state.tree)), *state.tail)
        return chains


class _Branch(msgspec.Struct, frozen=True, eq=False):
    """Entries of several addresses that have their first digits, of 4 bits, in common.

    `address`: one with these digits; `digits`: their number.  `children`: 16, by the next digit.  `count`: of entries.  `height`:
    of chains that lie one below the other, this one included.
    """

    address: bytes
    digits: int
    children: tuple[_Node | None, ...]
    count: int
    height: int


_Node: TypeAlias = _Branch | tuple[Entry, ...]
"""A tuple holds sorted entries: at most INLINE, or any number with the same address; it is never empty."""
_ROOT = _Branch(b"", 0, (None,) * 16, 0, 1)


class _State(NamedTuple):
    """`row`: entries that stand in the root in any case.  `tree`: the others; the root branches at the first digit."""

    row: tuple[Entry, ...]
    tree: _Branch
    tail: Rules


def _digit(address: bytes, place: int) -> int:
    byte = address[place >> 1]
    return byte & 15 if place & 1 else byte >> 4


def _in_common(one: bytes, other: bytes) -> int:
    """How many leading digits two addresses share."""
    for place, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            return 2 * place + ((a ^ b) < 16)
    return 2 * len(one)


def _count(node: _Node) -> int:
    return node.count if isinstance(node, _Branch) else len(node)


def _height(node: _Node) -> int:
    return node.height if isinstance(node, _Branch) else int(len(node) > INLINE)


def _prefix(node: _Node) -> tuple[bytes, int]:
    """An address, and how many of its digits all entries share."""
    if isinstance(node, _Branch):
        return node.address, node.digits
    return node[0].address, 2 * len(node[0].address)


def _children(node: _Branch) -> Iterator[_Node]:
    return (child for child in node.children if child is not None)


def _entries(node: _Node) -> Iterator[Entry]:
    """All entries of a node, in their order."""
    if isinstance(node, _Branch):
        for child in _children(node):
            yield from _entries(child)
    else:
        yield from node


def _by_digit(entries: Sequence[Entry], place: int) -> dict[int, list[Entry]]:
    parts: dict[int, list[Entry]] = {}
    for entry in entries:
        parts.setdefault(_digit(entry.address, place), []).append(entry)
    return parts


def _branch(address: bytes, digits: int, children: Sequence[_Node | None]) -> _Branch:
    there = [child for child in children if child is not None]
    return _Branch(
        address,
        digits,
        tuple(children),
        sum(map(_count, there)),
        1 + max(map(_height, there), default=0),
    )


def _built(entries: Sequence[Entry]) -> _Node | None:
    """The node of sorted entries; None: there are none."""
    if not entries:
        return None
    address = entries[0].address
    digits = _in_common(address, entries[-1].address)
    if len(entries) <= INLINE or digits == 2 * len(address):
        return tuple(entries)
    children: list[_Node | None] = [None] * 16
    for digit, part in _by_digit(entries, digits).items():
        children[digit] = _built(part)
    return _branch(address, digits, children)


def _row_changed(row: tuple[Entry, ...], gone: Sequence[Entry], new: Sequence[Entry]) -> tuple[Entry, ...]:
    if not gone and not new:
        return row
    entries = list(row)
    for entry in gone:
        place = bisect_left(entries, entry)
        if entries[place : place + 1] != [entry]:
            raise KeyError(entry)
        del entries[place]
    for entry in new:
        place = bisect_left(entries, entry)
        if entries[place : place + 1] == [entry]:
            raise KeyError(entry)
        entries.insert(place, entry)
    return tuple(entries)


def _root_changed(root: _Branch, gone: Sequence[Entry], new: Sequence[Entry]) -> _Branch:
    """The root stays a branch at the first digit, whatever is in it: an address of no Service meets few rules then."""
    if not gone and not new:
        return root
    return _branch(root.address, 0, _children_changed(root.children, 0, gone, new))


def _changed(node: _Node | None, gone: Sequence[Entry], new: Sequence[Entry]) -> _Node | None:
    """The node without some entries and with others, both sorted; the same as if built from the outcome.

    Raises KeyError for an entry to remove that is not there, or one to add that is.
    """
    if not isinstance(node, _Branch):
        return _built(_row_changed(node or (), gone, new))
    address, digits, children = node.address, node.digits, node.children
    if new:
        digits = min(digits, _in_common(address, new[0].address), _in_common(address, new[-1].address))
        if digits < node.digits:
            place = _digit(address, digits)
            children = (*(None,) * place, node, *(None,) * (15 - place))
    changed = _branch(address, digits, _children_changed(children, digits, gone, new))
    if changed.count <= INLINE:
        return tuple(_entries(changed)) or None
    only, *others = _children(changed)
    return changed if others else only


def _children_changed(
    children: tuple[_Node | None, ...], place: int, gone: Sequence[Entry], new: Sequence[Entry]
) -> list[_Node | None]:
    found = list(children)
    gone_parts, new_parts = _by_digit(gone, place), _by_digit(new, place)
    for digit in gone_parts.keys() | new_parts.keys():
        found[digit] = _changed(found[digit], gone_parts.get(digit, ()), new_parts.get(digit, ()))
    return found


def _opposite(node: _Node, other: _Node | None, level: int) -> tuple[_Node | None, int]:
    """The place that corresponds to a node in another tree, and its level; `other`, at `level`: where to look."""
    address, digits = _prefix(node)
    while isinstance(other, _Branch) and other.digits < digits:
        other = other.children[_digit(address, other.digits)]
        level += 1
    return other, level


def _render(node: _Node, level: int, other: _Node | None, its_level: int, chains: dict[str, Rules]) -> None:
    """Add the chains of a node on this level, children first, unless they are the same as those of the other one."""
    if _count(node) <= INLINE:
        return
    # Only near the deepest level does what a node's chains hold depend on its own.
    if node is other and (level == its_level or max(level, its_level) + _height(node) - 1 <= LEVELS):
        return
    if isinstance(node, _Branch) and level < LEVELS:
        for child in _children(node):
            _render(child, level + 1, *_opposite(child, other, its_level), chains)
    chains[node_name(*_prefix(node))] = _rules(node, level)


def _rules(node: _Node, level: int) -> Rules:
    """What the chain of a node on this level holds; the root is on level 0."""
    if not isinstance(node, _Branch) or level == LEVELS:
        return tuple(entry.rule for entry in _entries(node))
    rules: list[Rule] = []
    for child in _children(node):
        if _count(child) <= INLINE:
            rules += (entry.rule for entry in _entries(child))
        else:
            address, digits = _prefix(child)
            rules.append(f"-d {_text(address, digits)} -j {node_name(address, digits)}")
    return tuple(rules)


def node_name(address: bytes, digits: int) -> str:
    """The chain of the entries that share the first digits of an address; at most 28 characters."""
    if len(address) == 4:
        return f"{TREE}{_masked(address, digits).hex()}.{4 * digits}"
    hashed = b32encode(hashlib.sha256(_text(address, digits).encode()).digest()).decode()
    return TREE + hashed[:14]


def _masked(address: bytes, digits: int) -> bytes:
    bits = 8 * len(address)
    rest = bits - 4 * digits
    return (int.from_bytes(address, "big") >> rest << rest).to_bytes(len(address), "big")


def _text(address: bytes, digits: int) -> str:
    """A prefix as `iptables-save` prints it, which leaves the text to the C library."""
    family = AF_INET if len(address) == 4 else AF_INET6
    return f"{inet_ntop(family, _masked(address, digits))}/{4 * digits}"


def edit(before: Rules, after: Rules, chain: str) -> list[str] | None:
    """Lines for `iptables-restore --noflush` that turn what a chain holds into something else, rule by rule.

    None: it is better rewritten as a whole, since it is small, much differs, or rules are twice in it or change their order.
    Removed rules go by their text, new ones come by their number; so the chain must hold exactly `before`.
    """
    if len(after) <= _SMALL:
        return None
    head = 0
    for one, other in zip(before, after, strict=False):
        if one != other:
            break
        head += 1
    tail = 0
    for one, other in zip(reversed(before[head:]), reversed(after[head:]), strict=False):
        if one != other:
            break
        tail += 1
    old, new = before[head : len(before) - tail], after[head : len(after) - tail]
    is_old, is_new = set(old), set(new)
    common = [rule for rule in old if rule in is_new]
    if common != [rule for rule in new if rule in is_old]:
        return None
    if len(old) + len(new) - 2 * len(common) > len(after) // 2:
        return None
    if len(set(before)) != len(before) or len(set(after)) != len(after):
        return None
    lines = [f"-D {chain} {rule}" for rule in old if rule not in is_new]
    length = len(before) - len(lines)
    for place, rule in enumerate(new, head + 1):
        if rule not in is_old:
            lines.append(f"-I {chain} {place} {rule}" if place <= length else f"-A {chain} {rule}")
            length += 1
    return lines
