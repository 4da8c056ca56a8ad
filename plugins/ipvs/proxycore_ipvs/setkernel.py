"""IP sets of the kernel: made, filled in batches, read, swapped and destroyed.

No change of several entries is atomic.  To change a whole set at once, fill another one and swap the two.
"""

from __future__ import annotations

import errno as errnos
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from proxycore.api import Family, KernelError
from proxycore.kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLM_F_EXCL,
    NLMSG_ERROR,
    Message,
    NetlinkFault,
    attributes,
    error_of,
    parse_attributes,
    text_of,
)

from . import setwire
from .link import Link, answers
from .sets import Entry, EntryRefusal, Mark, Members, SetSpec, SetState, text_of_error


class Sets(Protocol):
    """The IP sets of one network namespace.

    Methods raise KernelError where nothing else is said, with the kernel's number; ENOENT: there is no such set.
    """

    def states(self) -> Mapping[str, SetState]:
        """All sets, others' included, without their entries."""
        ...

    def create(self, spec: SetSpec, *, hash_size: int | None = None) -> bool:
        """Make an empty set; False: the name is taken, by whatever set.

        `hash_size`: buckets to begin with, for sets that will be large at once; the kernel has more when they are needed.
        """
        ...

    def destroy(self, name: str) -> bool:
        """False: there was none.  Raises KernelError (BUSY) if rules or sets refer to it."""
        ...

    def swap(self, name: str, other: str) -> None:
        """Exchange the content of two sets of one kind and family, in one moment for packets and rules."""
        ...

    def members(self, spec: SetSpec) -> dict[Entry, Mark | None]:
        """The content of a set of this kind and family; one that changes meanwhile may be read in part."""
        ...

    def add(self, spec: SetSpec, members: Members, *, exclusive: bool = False) -> tuple[EntryRefusal, ...]:
        """Add entries; those refused.  The others hold.

        An entry that is there gets the mark given, or is refused if `exclusive`.  Raises KernelError if there is no such set,
        or the kernel could not be asked: any of the entries may hold then.  Raises ValueError for entries
        that are not of this kind: nothing was done.
        """
        ...

    def delete(
        self, spec: SetSpec, entries: Iterable[Entry], *, exclusive: bool = False
    ) -> tuple[EntryRefusal, ...]:
        """Delete entries; those refused.  One that is not there is refused only if `exclusive`.  Errors as in add()."""
        ...

    def close(self) -> None:
        """Close; doing it twice does no harm."""
        ...


class NetlinkSets:
    """IP sets of the calling thread's network namespace, in batches; for one thread at a time."""

    def __init__(self) -> None:
        self._link = Link(NETLINK_NETFILTER)
        self._revisions: dict[tuple[str, Family], int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._link.close()

    def states(self) -> dict[str, SetState]:
        with self._link.during("list IP sets") as socket:
            entries = socket.dump(setwire.LIST, setwire.headers())
        found = (_state(entry) for entry in entries)
        return {state.spec.name: state for state in found if state is not None}

    def create(self, spec: SetSpec, *, hash_size: int | None = None) -> bool:
        body = setwire.create(spec, self._revision(spec), hash_size)
        fault = self._transact(f"create set {spec.name}", setwire.CREATE, body, NLM_F_EXCL)
        if fault is None:
            return True
        if fault.errno == errnos.EEXIST:
            return False
        raise _refused(f"create set {spec.name}", fault.errno)

    def _revision(self, spec: SetSpec) -> int:
        """The newest revision of a kind that the kernel has."""
        kind = spec.kind, spec.family
        if kind not in self._revisions:
            doing = f"create set {spec.name} of kind {spec.kind}"
            with self._link.during(doing) as socket:
                seq = socket.request(setwire.TYPE, setwire.kind_request(spec))
                reply = next(answers(socket, seq))
            fault = error_of(reply)
            if fault is not None:
                raise _refused(doing, fault.errno)
            parts = parse_attributes(reply.body[setwire.NFGENMSG_BYTES :])
            self._revisions[kind] = parts[setwire.REVISION][0]
        return self._revisions[kind]

    def destroy(self, name: str) -> bool:
        doing = f"destroy set {name}"
        fault = self._transact(doing, setwire.DESTROY, setwire.request(name), NLM_F_EXCL)
        if fault is not None and fault.errno != errnos.ENOENT:
            raise _refused(doing, fault.errno)
        return fault is None

    def swap(self, name: str, other: str) -> None:
        doing = f"swap sets {name} and {other}"
        fault = self._transact(doing, setwire.SWAP, setwire.swap(name, other))
        if fault is not None:
            raise _refused(doing, fault.errno)

    def members(self, spec: SetSpec) -> dict[Entry, Mark | None]:
        found: dict[Entry, Mark | None] = {}
        reader = setwire.entry_reader(spec)
        read, skip = reader.read, setwire.NFGENMSG_BYTES
        with self._link.during(f"read set {spec.name}") as socket:
            for entry in socket.dump_messages(setwire.LIST, setwire.request(spec.name)):
                adt = parse_attributes(entry.body[skip:]).get(setwire.ADT)
                if adt is None:
                    continue
                for _, data in attributes(adt):
                    one, mark = read(data, 0, len(data))
                    found[one] = mark
        return found

    def add(self, spec: SetSpec, members: Members, *, exclusive: bool = False) -> tuple[EntryRefusal, ...]:
        plain = setwire.packer(spec, marked=False)
        marking = setwire.packer(spec, marked=True)
        packed = [
            (marking if mark is not None else plain)(entry, mark, number)
            for number, (entry, mark) in enumerate(members.items(), 1)
        ]
        return self._change(setwire.ADD, spec.name, list(members), packed, exclusive)

    def delete(
        self, spec: SetSpec, entries: Iterable[Entry], *, exclusive: bool = False
    ) -> tuple[EntryRefusal, ...]:
        wanted, pack = list(entries), setwire.packer(spec, marked=False)
        packed = [pack(entry, None, number) for number, entry in enumerate(wanted, 1)]
        return self._change(setwire.DEL, spec.name, wanted, packed, exclusive)

    def _change(
        self, command: int, name: str, entries: Sequence[Entry], packed: Sequence[bytes], exclusive: bool
    ) -> tuple[EntryRefusal, ...]:
        """Send entries in messages that the kernel leaves at the first refused one; go on behind it.

        After a refusal messages are as short as the distance to it was, and double again, so that many refusals cost
        no more than twice what they must.
        """
        refusals: list[EntryRefusal] = []
        doing = f"{'add to' if command == setwire.ADD else 'delete from'} set {name}"
        flags = NLM_F_EXCL if exclusive else 0
        longest = setwire.MESSAGE_BYTES // max(map(len, packed), default=1)
        position, count = 0, longest
        while position < len(packed):
            chunk = packed[position : position + count]
            number, refused = self._send(doing, command, setwire.change(name, chunk), flags)
            if number == 0:
                position += len(chunk)
                count = min(2 * count, longest)
                continue
            if not position < refused <= position + len(chunk):
                raise _refused(doing, number)
            refusals.append(EntryRefusal(entries[refused - 1], number, command == setwire.ADD))
            count = max(1, refused - 1 - position)
            position = refused
        return tuple(refusals)

    def _send(self, doing: str, command: int, body: bytes, flags: int) -> tuple[int, int]:
        """The number of an error and the line it is about, or 0 for either."""
        reply = self._acknowledgement(doing, command, body, flags)
        fault = error_of(reply)
        if fault is None:
            return 0, 0
        # Code of the error and header of the request stand before the request, which has the line written into it.
        said = parse_attributes(reply.body[20 + setwire.NFGENMSG_BYTES :])
        refused = said.get(setwire.LINENO, b"")
        return fault.errno, int.from_bytes(refused, sys.byteorder)

    def _transact(self, doing: str, command: int, body: bytes, flags: int = 0) -> NetlinkFault | None:
        return error_of(self._acknowledgement(doing, command, body, flags))

    def _acknowledgement(self, doing: str, command: int, body: bytes, flags: int) -> Message:
        with self._link.during(doing) as socket:
            seq = socket.request(command, body, flags | NLM_F_ACK)
            return next(reply for reply in answers(socket, seq) if reply.type == NLMSG_ERROR)


def _refused(doing: str, number: int) -> KernelError:
    return KernelError(f"cannot {doing}: {text_of_error(number)}", errno=number)


def _state(entry: Message) -> SetState | None:
    parts = parse_attributes(entry.body[setwire.NFGENMSG_BYTES :])
    if setwire.TYPENAME not in parts or setwire.DATA not in parts:
        return None
    data = parse_attributes(parts[setwire.DATA])

    def number(kind: int) -> int:
        return int.from_bytes(data.get(kind, b""), "big")

    kind = text_of(parts[setwire.TYPENAME])
    six = bytes(parts.get(setwire.FAMILY, b"")) == bytes((10,))
    spec = SetSpec(
        text_of(parts[setwire.SETNAME]),
        kind,
        "IPv6" if six else "IPv4",
        bool(number(setwire.CADT_FLAGS) & setwire.WITH_SKBINFO),
        number(setwire.MAXELEM),
    )
    return SetState(spec, number(setwire.ELEMENTS), number(setwire.REFERENCES))
