"""nf_tables of the kernel: one batch in, errors with their place out; dumps of what is there.

The skeleton is loaded as text by `nft -f`, everything else goes and comes by netlink.
"""

from __future__ import annotations

import errno
import hashlib
import struct
import subprocess
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from proxycore.api import KernelError
from proxycore.kernel import nftables
from proxycore.kernel.netlink import (
    NETLINK_NETFILTER,
    NLMSG_ERROR,
    DumpInterrupted,
    NetlinkFault,
    NetlinkSocket,
    attributes,
    error_of,
    messages,
    parse_attributes,
    text_of,
)

from . import encode
from .encode import Body
from .skeleton import Hook

SEND_BUFFER = 256 << 20
"""Upper limit for one batch; the kernel takes only what is sent at once.  300,000 endpoints need about 15 MB."""


ANSWER_SECONDS = 30.0
"""So long may the kernel take to answer what we read; a batch it works through before the send returns."""


class Element(NamedTuple):
    """One element as dumped.

    `data` is None in a set.  `chain` is for verdict maps: the chain gone to, empty for a drop.  Times are in milliseconds.
    """

    key: bytes
    data: bytes | None = None
    chain: str | None = None
    key_end: bytes | None = None
    flags: int = 0
    timeout: int = 0
    expiration: int = 0
    comment: str = ""
    packets: int = 0


class Refusal(NamedTuple):
    """Message `position` of the batch was refused; `offset` is the byte in that message, if the kernel says."""

    position: int
    errno: int
    text: str
    offset: int | None


class Refused(KernelError):
    """The kernel refused a batch: nothing of it holds."""

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        self.refusals = tuple(refusals)
        first = self.refusals[0]
        text = str(NetlinkFault(first.errno, first.text, None, 0))
        super().__init__(f"nf_tables refused the transaction: {text}", errno=first.errno)


class NotSent(KernelError):
    """The kernel did not take a batch into its hands: nothing of it holds."""


class Kernel(Protocol):
    """What the backend asks of nf_tables; the real one and the fake pass the same tests."""

    def generation(self) -> int:
        """Number of the ruleset; each commit of anybody raises it by one."""

    def tables(self, family: str) -> set[str]:
        """Names of all tables of a family."""

    def dormant(self, family: str) -> set[str]:
        """Names of the tables whose hooks are switched off."""

    def sets(self, family: str, table: str) -> set[str]:
        """Names of a table's sets and maps, those without a name excepted."""

    def chains(self, family: str, table: str) -> dict[str, Hook | None]:
        """Chains of a table: name -> its hook, None for plain ones."""

    def rules(self, family: str, table: str, chain: str | None = None) -> dict[str, str]:
        """Digest of each chain's rules, or of one chain's, by chain: equal text, equal digest."""

    def load(self, text: str) -> None:
        """Load nft text in one transaction.  Raises KernelError: nothing was changed."""

    def commit(self, bodies: Sequence[Body]) -> None:
        """One transaction.  Raises Refused, NotSent: nothing was changed.  KernelError otherwise: unknown, read the kernel."""

    def elements(self, family: str, table: str, name: str) -> list[Element]:
        """All elements of a set or map.  Raises KernelError (ENOENT: there is no such set)."""

    def find(self, family: str, table: str, name: str, keys: Sequence[bytes]) -> list[Element]:
        """Those of the elements with these keys that are there."""

    def close(self) -> None: ...


class NetlinkKernel:
    """nf_tables of the network namespace that the object was made in; to be used by one thread."""

    def __init__(self) -> None:
        self._socket = NetlinkSocket(
            NETLINK_NETFILTER, send_buffer_bytes=SEND_BUFFER, timeout_seconds=ANSWER_SECONDS
        )

    def close(self) -> None:
        self._socket.close()

    # -- reading --

    def generation(self) -> int:
        return nftables.generation(self._socket)

    def tables(self, family: str) -> set[str]:
        return {text_of(found[1]) for found in self._dump(encode.GETTABLE, family, b"")}

    def dormant(self, family: str) -> set[str]:
        found = self._dump(encode.GETTABLE, family, b"")
        return {text_of(item[1]) for item in found if int.from_bytes(item.get(2, b""), "big") & 1}

    def sets(self, family: str, table: str) -> set[str]:
        found = self._dump(encode.GETSET, family, encode.text(1, table))
        names = {text_of(item[2]) for item in found if text_of(item[1]) == table}
        return {name for name in names if not name.startswith("__")}

    def chains(self, family: str, table: str) -> dict[str, Hook | None]:
        # The kernel does not filter this dump by table.
        found = self._dump(encode.GETCHAIN, family, b"")
        return {text_of(chain[3]): _hook(chain) for chain in found if text_of(chain[1]) == table}

    def rules(self, family: str, table: str, chain: str | None = None) -> dict[str, str]:
        digests: dict[str, hashlib._Hash] = {}
        which = encode.text(1, table) + (encode.text(2, chain) if chain else b"")
        for rule in self._dump(encode.GETRULE, family, which):
            if text_of(rule[1]) != table:
                continue
            digest = digests.setdefault(text_of(rule[2]), hashlib.sha256())
            digest.update(_without_counters(bytes(rule.get(4, b""))))
        return {chain: digest.hexdigest() for chain, digest in digests.items()}

    def elements(self, family: str, table: str, name: str) -> list[Element]:
        body = encode.header(encode.GETSETELEM, 0, family, 0, 0)[16:] + encode.set_head(table, name)
        kind = encode.GETSETELEM | encode.SUBSYSTEM
        for attempt in range(5):
            found: list[Element] = []
            try:
                for reply in self._socket.dump_messages(kind, body):
                    _parse_list(reply.body[4:], found)
            except DumpInterrupted:
                if attempt == 4:
                    raise
                continue
            return found
        raise AssertionError("unreachable")

    def find(self, family: str, table: str, name: str, keys: Sequence[bytes]) -> list[Element]:
        found: list[Element] = []
        for key in keys:
            wanted = encode.set_head(table, name) + encode.nest(3, encode.element(key))
            seq = self._send(encode.GETSETELEM, family, wanted, encode.F_ACK)
            done = False
            while not done:
                for reply in self._socket.receive():
                    if reply.seq != seq:
                        continue
                    if reply.type == NLMSG_ERROR:
                        fault = error_of(reply)
                        if fault is not None and fault.errno != errno.ENOENT:
                            raise KernelError(f"cannot read {name}: {fault}", errno=fault.errno)
                        done = True
                    else:
                        _parse_list(reply.body[4:], found)
        return found

    def _send(self, kind: int, family: str, payload: bytes, flags: int) -> int:
        seq = self._socket.reserve()
        self._socket.send(encode.header(kind, flags, family, len(payload), seq) + payload)
        return seq

    def _dump(self, kind: int, family: str, payload: bytes) -> list[dict[int, memoryview]]:
        body = encode.header(kind, 0, family, 0, 0)[16:] + payload
        return [parse_attributes(m.body[4:]) for m in self._socket.dump(kind | encode.SUBSYSTEM, body)]

    # -- writing --

    def load(self, text: str) -> None:
        try:
            done = subprocess.run(
                ["nft", "-f", "-"], input=text, text=True, capture_output=True, timeout=60, check=False
            )
        except FileNotFoundError as error:
            raise KernelError("the program nft is not installed (package nftables)") from error
        except subprocess.TimeoutExpired as error:
            raise KernelError("nft did not answer within 60 s") from error
        if done.returncode:
            said = " ".join(done.stderr.split())[:500]
            raise KernelError(f"nft refused the skeleton: {said or f'exit status {done.returncode}'}")

    def commit(self, bodies: Sequence[Body]) -> None:
        if not bodies:
            return
        first = self._socket.reserve(len(bodies) + 2)
        batch = encode.frame(bodies, first)
        try:
            self._socket.send(batch)
        except KernelError as error:
            raise NotSent(str(error), errno=error.errno) from error
        # The kernel works through a batch before send() returns, so all answers are waiting by now: the
        # acknowledgement of the last message, or one error a refused message and no acknowledgement.
        refusals: list[Refusal] = []
        last = first + len(bodies)
        acknowledged = False
        while not acknowledged:
            try:
                for reply in messages(self._socket.receive_waiting()):
                    if reply.type != NLMSG_ERROR:
                        continue
                    if not first <= reply.seq <= last + 1:
                        # Late news of an earlier request says nothing about this batch.
                        continue
                    fault = error_of(reply)
                    if fault is not None:
                        refusals.append(Refusal(reply.seq - first - 1, fault.errno, fault.text, fault.offset))
                    elif reply.seq == last:
                        acknowledged = True
            except BlockingIOError:
                break
        if refusals:
            raise Refused(refusals)
        if not acknowledged:
            raise KernelError("nf_tables did not acknowledge the transaction", errno=errno.ETIMEDOUT)


def _hook(chain: dict[int, memoryview]) -> Hook | None:
    """Of a base chain as dumped."""
    if 4 not in chain:
        return None
    place = parse_attributes(chain[4])
    return Hook(
        type=text_of(chain[7]),
        number=int.from_bytes(place[1], "big"),
        priority=int.from_bytes(place[2], "big", signed=True),
        policy=int.from_bytes(chain[5], "big"),
    )


_LIST = struct.Struct("=HH")


def _parse_list(payload: memoryview, into: list[Element]) -> None:
    """Elements in one message of a dump."""
    body = parse_attributes(payload).get(3)
    if body is None or len(body) < 4:
        return
    size, _ = _LIST.unpack_from(body, 0)
    if _is_plain(body, size):
        _parse_plain(bytes(body), size, into)
        return
    for _, item in attributes(body):
        into.append(parse_element(item))


def _is_plain(body: memoryview, size: int) -> bool:
    """Are all elements of one size, with key and data and nothing else?"""
    if size & 3 or len(body) % size or size < 20:
        return False
    (key_nest,) = struct.unpack_from("=H", body, 4)
    if 4 + key_nest + 4 > size:
        return False
    data_nest, kind = struct.unpack_from("=HH", body, 4 + key_nest)
    if kind & 0x3FFF != encode.ELEM_DATA or 4 + key_nest + data_nest != size:
        return False
    sizes = {struct.unpack_from("=H", body, at)[0] for at in range(0, len(body), size)}
    return sizes == {size}


def _parse_plain(body: bytes, size: int, into: list[Element]) -> None:
    (key_nest,) = struct.unpack_from("=H", body, 4)
    inner_kind = struct.unpack_from("=H", body, 4 + key_nest + 4 + 2)[0] & 0x3FFF
    if inner_kind != encode.DATA_VALUE:
        for _, item in attributes(body):
            into.append(parse_element(item))
        return
    key_stop, data_start = 4 + key_nest, 4 + key_nest + 8
    into.extend(
        Element(body[at + 12 : at + key_stop], body[at + data_start : at + size])
        for at in range(0, len(body), size)
    )


def _value(nest: memoryview) -> bytes | None:
    found = parse_attributes(nest).get(encode.DATA_VALUE)
    return None if found is None else bytes(found)


_VERDICTS = {0: "", 1: "!accept", encode.VERDICT_JUMP: "!jump "}
"""Only `goto` and `drop` are ours; the mark before others tells them from the name of a chain."""


def _verdict(verdict: dict[int, memoryview]) -> str:
    code = int.from_bytes(verdict[1], "big")
    chain = text_of(verdict[2]) if 2 in verdict else ""
    return chain if code == encode.VERDICT_GOTO else _VERDICTS.get(code, f"!verdict {code}") + chain


def parse_element(item: memoryview) -> Element:
    found = parse_attributes(item)
    data = chain = None
    if encode.ELEM_DATA in found:
        inner = parse_attributes(found[encode.ELEM_DATA])
        if encode.DATA_VALUE in inner:
            data = bytes(inner[encode.DATA_VALUE])
        elif encode.DATA_VERDICT in inner:
            chain = _verdict(parse_attributes(inner[encode.DATA_VERDICT]))
    end = found.get(encode.ELEM_KEY_END)
    return Element(
        key=_value(found[encode.ELEM_KEY]) or b"" if encode.ELEM_KEY in found else b"",
        data=data,
        chain=chain,
        key_end=None if end is None else _value(end),
        flags=int.from_bytes(found.get(encode.ELEM_FLAGS, b""), "big"),
        timeout=int.from_bytes(found.get(encode.ELEM_TIMEOUT, b""), "big"),
        expiration=int.from_bytes(found.get(encode.ELEM_EXPIRATION, b""), "big"),
        comment=_comment(found.get(encode.ELEM_USERDATA)),
        packets=_packets(found.get(encode.ELEM_EXPR)),
    )


def _comment(userdata: memoryview | None) -> str:
    """First entry of libnftnl's userdata (type, length, value) if it is a comment."""
    if userdata is None or len(userdata) < 2 or userdata[0] != 0:
        return ""
    return text_of(userdata[2 : 2 + userdata[1]])


def _packets(expression: memoryview | None) -> int:
    """Packets of a counter expression."""
    if expression is None:
        return 0
    found = parse_attributes(expression)
    if 2 not in found or text_of(found[1]) != "counter":
        return 0
    return int.from_bytes(parse_attributes(found[2]).get(2, b""), "big")


def _without_counters(expressions: bytes) -> bytes:
    """A rule's expressions as they were loaded: anonymous sets get a new number each time."""
    parts: list[bytes] = []
    for _, item in attributes(expressions):
        found = parse_attributes(item)
        name = text_of(found[1])
        body = bytes(found.get(2, b""))
        if name == "lookup":
            inner = parse_attributes(body)
            target = text_of(inner[1])
            body = b"anonymous" if target.startswith("__") else body
        parts.append(name.encode() + b"\0" + body)
    return b"\1".join(parts)
