"""An in-memory nf_tables beside the real one, strict where the kernel is strict, for tests without rights.

It takes the same bytes.  It knows tables, chains, sets with their elements and references between them; it sees no packets.
Stricter than the kernel: a range is deleted only by both of its ends.  More lenient: one-field intervals may overlap, rules
may form loops.
A batch works on a copy, so that a refused one leaves nothing.
"""

from __future__ import annotations

import errno
import hashlib
import re
import struct
from collections.abc import Callable, Sequence

from proxycore.api import KernelError
from proxycore.kernel.netlink import attributes, parse_attributes, text_of

from . import encode
from .encode import Body
from .kernel import Element, Refusal, Refused, parse_element
from .skeleton import HOOKS, Hook


def _size(field: str) -> int:
    """Bytes of a field in registers."""
    return 16 if field.startswith("ip6 ") else 4


class FakeSet:
    """Elements by key; an interval's start and end marks, and ranges, are told apart."""

    def __init__(self, kind: str) -> None:
        """`kind` is what stands after `typeof`: fields joined by dots, and a map's data after a colon."""
        self.kind = kind
        key, _, data = kind.partition(" : ")
        self.key_size = sum(map(_size, key.split(" . ")))
        self.data_size = sum(map(_size, data.split(" . "))) if data and data != "verdict" else None
        self.is_map = bool(data)
        self.elements: dict[tuple[bytes, bytes | None, int], Element] = {}

    def copy(self) -> FakeSet:
        made = FakeSet(self.kind)
        made.elements = dict(self.elements)
        return made


class FakeTable:
    def __init__(self) -> None:
        self.sets: dict[str, FakeSet] = {}
        self.chains: dict[str, Hook | None] = {}
        self.rules: dict[str, list[bytes]] = {}
        self.dormant = False

    def copy(self) -> FakeTable:
        made = FakeTable()
        made.sets = {name: item.copy() for name, item in self.sets.items()}
        made.chains, made.dormant = dict(self.chains), self.dormant
        made.rules = {chain: list(rules) for chain, rules in self.rules.items()}
        return made


_HEAD = 20
"""Bytes of a message before its first attribute."""


def _after_table(found: dict[int, memoryview]) -> int:
    """Where the attribute behind the table's name starts."""
    return _HEAD + 4 + (len(found[1]) + 3 & ~3)


class _Refuse(Exception):
    def __init__(self, number: int, text: str, offset: int | None = None) -> None:
        self.refusal = (number, text, offset)


class FakeKernel:
    """Same interface as NetlinkKernel.  `refuse` may name a reason to refuse an element, for tests of faults."""

    def __init__(self) -> None:
        self.state: dict[tuple[str, str], FakeTable] = {}
        self.number = 1
        self.refuse: Callable[[str, bytes], str | None] = lambda name, key: None
        self.fail_next: int | None = None
        """errno that the next commit fails with as a whole."""
        self.lose_next = False
        """The next commit is done, yet nobody hears of it."""
        self.commits = 0
        self.messages = 0
        self._changes = 0
        """Of the batch under way: one that changes nothing makes no generation."""

    def close(self) -> None:
        """Nothing to give back."""

    def generation(self) -> int:
        return self.number

    def tables(self, family: str) -> set[str]:
        return {name for of, name in self.state if of == family}

    def dormant(self, family: str) -> set[str]:
        return {name for (of, name), table in self.state.items() if of == family and table.dormant}

    def sets(self, family: str, table: str) -> set[str]:
        found = self.state.get((family, table))
        return set(found.sets) if found else set()

    def chains(self, family: str, table: str) -> dict[str, Hook | None]:
        found = self.state.get((family, table))
        return dict(found.chains) if found else {}

    def rules(self, family: str, table: str, chain: str | None = None) -> dict[str, str]:
        found = self._table(family, table)
        return {
            name: hashlib.sha256(b"\1".join(rules)).hexdigest()
            for name, rules in found.rules.items()
            if rules and chain in (None, name)
        }

    def elements(self, family: str, table: str, name: str) -> list[Element]:
        found = self._table(family, table).sets.get(name)
        if found is None:
            raise KernelError(f"there is no set {name}", errno=errno.ENOENT)
        return list(found.elements.values())

    def find(self, family: str, table: str, name: str, keys: Sequence[bytes]) -> list[Element]:
        wanted = set(keys)
        return [item for item in self.elements(family, table, name) if item.key in wanted]

    def _table(self, family: str, table: str) -> FakeTable:
        found = self.state.get((family, table))
        if found is None:
            raise KernelError(f"there is no table {family} {table}", errno=errno.ENOENT)
        return found

    # -- text --

    def load(self, text: str) -> None:
        """Understands what skeleton.py writes: tables of sets, maps and chains, `add element`, `delete table`."""
        state = {place: table.copy() for place, table in self.state.items()}
        for line in text.splitlines():
            match = re.fullmatch(r"delete table (\S+) (\S+)", line.strip())
            if match and state.pop((match[1], match[2]), None) is None:
                raise KernelError(f"nft refused: no table {match[2]}")
        for block in re.finditer(r"^table (\S+) (\S+) \{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE):
            table = state.setdefault((block[1], block[2]), FakeTable())
            self._load_table(table, block[3])
        for match in re.finditer(r"add element (\S+) (\S+) (\S+) \{(.*)\}", text):
            into = state[match[1], match[2]].sets.get(match[3])
            if into is None:
                raise KernelError(f"nft refused: no set {match[3]}")
            for key, chain in re.findall(r"0x(\w+) : (?:goto (\S+)|drop)", match[4].replace(",", " ")):
                raw = struct.pack("=I", int(key, 16))
                into.elements[raw, None, 0] = Element(raw, chain=chain)
        self.state = state
        self.number += 1

    @staticmethod
    def _load_table(table: FakeTable, body: str) -> None:
        for kind, name, inner in re.findall(
            r"^\t(map|set|chain) (\S+) \{(.*?)\}$", body, re.DOTALL | re.MULTILINE
        ):
            if kind == "chain":
                table.chains[name] = HOOKS[name][0] if " hook " in inner else None
                lines = [line.strip() for line in re.split(r"[;\n]", inner)]
                rules = [line.encode() for line in lines if line and not line.startswith("type ")]
                table.rules.setdefault(name, []).extend(rules)
            else:
                fields = re.search(r"^\t\ttypeof (.*)$", inner, re.MULTILINE)
                assert fields is not None
                table.sets.setdefault(name, FakeSet(fields[1]))

    # -- batches --

    def commit(self, bodies: Sequence[Body]) -> None:
        if not bodies:
            return
        if self.fail_next is not None:
            number, self.fail_next = self.fail_next, None
            raise KernelError("the transaction failed", errno=number)
        state = {place: table.copy() for place, table in self.state.items()}
        refusals: list[Refusal] = []
        self._changes = 0
        for position, body in enumerate(bodies):
            try:
                self._apply(state, body)
            except _Refuse as refused:
                refusals.append(Refusal(position, *refused.refusal))
        if refusals:
            raise Refused(refusals)
        if self._changes:
            self.number += 1
        self.state = state
        self.commits += 1
        self.messages += len(bodies)
        if self.lose_next:
            self.lose_next = False
            raise KernelError("the acknowledgement is lost", errno=errno.ETIMEDOUT)

    def _apply(self, state: dict[tuple[str, str], FakeTable], body: Body) -> None:
        found = parse_attributes(body.payload)
        table = state.get((body.family, text_of(found[1])))
        if table is None:
            raise _Refuse(errno.ENOENT, "no such table", _HEAD)
        if body.kind == encode.NEWCHAIN:
            name = text_of(found[3])
            if len(name) > 255:
                raise _Refuse(errno.ERANGE, "chain name too long", _after_table(found))
            table.chains.setdefault(name, None)
            self._changes += 1
        elif body.kind == encode.NEWRULE:
            self._rule(table, text_of(found[2]), found[4], _after_table(found))
            self._changes += 1
        elif body.kind in (encode.NEWSETELEM, encode.DELSETELEM):
            self._elements(table, body, found)
        else:
            raise _Refuse(errno.EOPNOTSUPP, f"message {body.kind}")

    @staticmethod
    def _rule(table: FakeTable, chain: str, expressions: memoryview, after_table: int) -> None:
        if chain not in table.chains:
            raise _Refuse(errno.ENOENT, "no such chain", after_table)
        for _, item in attributes(expressions):
            expression = parse_attributes(item)
            name, inner = text_of(expression[1]), parse_attributes(expression[2])
            if name in ("lookup", "dynset") and text_of(inner[1]) not in table.sets:
                raise _Refuse(errno.ENOENT, "no such set")
            if name == "immediate":
                verdict = parse_attributes(inner[2]).get(encode.DATA_VERDICT)
                if verdict is not None and text_of(parse_attributes(verdict)[2]) not in table.chains:
                    raise _Refuse(errno.ENOENT, "no such chain")
        table.rules.setdefault(chain, []).append(bytes(expressions))

    def _elements(self, table: FakeTable, body: Body, found: dict[int, memoryview]) -> None:
        name = text_of(found[2])
        where = table.sets.get(name)
        if where is None:
            raise _Refuse(errno.ENOENT, "no such set", _after_table(found))
        if 3 not in found:
            self._changes += len(where.elements)
            where.elements.clear()
            return
        if len(found[3]) > encode.LIST_PAYLOAD_MAX:
            raise _Refuse(errno.EMSGSIZE, "attribute too long")
        offset = _HEAD + len(body.payload) - len(found[3])
        for _, raw in attributes(found[3]):
            item = parse_element(raw)
            place = (item.key, item.key_end, item.flags & encode.ELEM_INTERVAL_END)
            if body.kind == encode.DELSETELEM:
                if len(item.key) != where.key_size:
                    raise _Refuse(errno.EINVAL, "key of another size", offset)
                if place not in where.elements:
                    raise _Refuse(errno.ENOENT, "no such element", offset)
                self._changes += 1
                del where.elements[place]
            else:
                self._insert(table, name, where, place, item, offset)
            offset += len(raw) + 4

    def _insert(
        self,
        table: FakeTable,
        name: str,
        where: FakeSet,
        place: tuple[bytes, bytes | None, int],
        item: Element,
        offset: int,
    ) -> None:
        reason = self.refuse(name, item.key)
        if reason is not None:
            raise _Refuse(errno.EINVAL, reason, offset)
        verdict = where.is_map and where.data_size is None
        if len(item.key) != where.key_size or (item.chain is not None) != verdict:
            raise _Refuse(errno.EINVAL, "key of another size, or data of another kind", offset)
        if (None if item.data is None else len(item.data)) != where.data_size:
            raise _Refuse(errno.EINVAL, "data of another size", offset)
        if item.key_end is not None:
            self._range(where, item, item.key_end, offset)
        if item.chain and item.chain not in table.chains:
            raise _Refuse(errno.ENOENT, "no such chain", offset)
        there = where.elements.get(place)
        if there is not None and (there.data, there.chain) != (item.data, item.chain):
            raise _Refuse(errno.EEXIST, "element exists with other data", offset)
        self._changes += there is None
        where.elements[place] = item

    @staticmethod
    def _range(where: FakeSet, item: Element, last: bytes, offset: int) -> None:
        """Neither end of a range may be inside another one; the same range once more is nothing new."""
        if last < item.key:
            raise _Refuse(errno.EINVAL, "range ends before it starts", offset)
        for other in where.elements.values():
            end = other.key_end or other.key
            if (other.key, end) != (item.key, last) and (
                other.key <= item.key <= end or other.key <= last <= end
            ):
                raise _Refuse(errno.EEXIST, "range overlaps another", offset)
