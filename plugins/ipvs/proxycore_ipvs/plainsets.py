"""The same by pyroute2's WiSet and IPSet, one entry at a time: the reference that the batch is compared with.

pyroute2 0.9: a WiSet adds IPv4 entries unless told otherwise at each call, and its own reading of a set knows IPv4 only
and takes the first address of `hash:ip,port,ip` for the second; so sets are read by IPSet.
"""

from __future__ import annotations

import errno as errnos
import socket
from collections.abc import Iterable
from typing import Any

from pyroute2 import IPSet
from pyroute2.ipset import PortEntry
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.wiset import WiSet

from proxycore.api import KernelError

from . import setwire
from .sets import Entry, EntryRefusal, Mark, Members, SetSpec, SetState, text_of_error
from .wire import NUMBERS

_PROTOCOLS = {number: protocol for protocol, number in NUMBERS.items()}


class PlainSets:
    """IP sets of the calling thread's network namespace, by pyroute2; for one thread at a time."""

    def __init__(self) -> None:
        self._socket = IPSet()

    def __enter__(self) -> PlainSets:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def _set(self, spec: SetSpec) -> Any:
        return WiSet(
            name=spec.name,
            attr_type=spec.kind,
            family=_family(spec),
            sock=self._socket,
            skbinfo=spec.skbinfo,
        )

    def states(self) -> dict[str, SetState]:
        found = {}
        for message in self._socket.list():
            state = _state(message)
            found[state.spec.name] = state
        return found

    def create(self, spec: SetSpec, *, hash_size: int | None = None) -> bool:
        # Values that are not ours are refused alike.
        setwire.create(spec, 0, hash_size)
        made = self._set(spec)
        made.hashsize = hash_size
        options: dict[str, Any] = {"exclusive": True}
        if spec.kind == "bitmap:port":
            options["bitmap_ports_range"] = (0, 65535)
        else:
            options["maxelem"] = spec.max_entries
        try:
            made.create(**options)
        except NetlinkError as error:
            if error.code == errnos.EEXIST:
                return False
            raise _failed(error) from error
        return True

    def destroy(self, name: str) -> bool:
        try:
            self._socket.destroy(name)
        except NetlinkError as error:
            if error.code == errnos.ENOENT:
                return False
            raise _failed(error) from error
        return True

    def swap(self, name: str, other: str) -> None:
        try:
            self._socket.swap(name, other)
        except NetlinkError as error:
            raise _failed(error) from error

    def members(self, spec: SetSpec) -> dict[Entry, Mark | None]:
        try:
            messages = list(self._socket.list(spec.name))
        except NetlinkError as error:
            raise _failed(error) from error
        found: dict[Entry, Mark | None] = {}
        for message in messages:
            adt = message.get_attr("IPSET_ATTR_ADT")
            for data in adt.get_attrs("IPSET_ATTR_DATA") if adt is not None else ():
                mark = data.get_attr("IPSET_ATTR_SKBMARK")
                found[_entry(spec, data)] = None if mark is None else Mark(*mark)
        return found

    def add(self, spec: SetSpec, members: Members, *, exclusive: bool = False) -> tuple[EntryRefusal, ...]:
        chosen, refusals, pack = self._set(spec), [], setwire.packer(spec, marked=True)
        for entry, mark in members.items():
            pack(entry, mark, 1)
        for entry, mark in members.items():
            try:
                marks = {} if mark is None else {"skbmark": tuple(mark)}
                chosen.add(_parts(entry), family=_family(spec), exclusive=exclusive, **marks)
            except NetlinkError as error:
                if error.code == errnos.ENOENT:
                    raise _failed(error) from error
                refusals.append(EntryRefusal(entry, error.code, True))
        return tuple(refusals)

    def delete(
        self, spec: SetSpec, entries: Iterable[Entry], *, exclusive: bool = False
    ) -> tuple[EntryRefusal, ...]:
        wanted, pack = list(entries), setwire.packer(spec, marked=False)
        for entry in wanted:
            pack(entry, None, 1)
        chosen, refusals = self._set(spec), []
        for entry in wanted:
            try:
                chosen.delete(_parts(entry), family=_family(spec), exclusive=exclusive)
            except NetlinkError as error:
                if error.code == errnos.ENOENT:
                    raise _failed(error) from error
                refusals.append(EntryRefusal(entry, error.code, False))
        return tuple(refusals)


def _family(spec: SetSpec) -> int:
    return socket.AF_INET6 if spec.family == "IPv6" else socket.AF_INET


def _failed(error: NetlinkError) -> KernelError:
    return KernelError(text_of_error(error.code), errno=error.code)


def _parts(entry: Entry) -> Any:
    """An entry as pyroute2 takes it."""
    if not entry.address:
        return entry.port
    if entry.protocol is None:
        return (entry.address,)
    port = PortEntry(entry.port, protocol=NUMBERS[entry.protocol])
    return (entry.address, port, entry.second) if entry.second else (entry.address, port)


def _entry(spec: SetSpec, data: Any) -> Entry:
    version = f"IPSET_ATTR_IPADDR_IPV{spec.family[-1]}"

    def host(attribute: str) -> str:
        return str(data.get_attr(attribute).get_attr(version))

    port = data.get_attr("IPSET_ATTR_PORT_FROM")
    if spec.kind == "bitmap:port":
        return Entry(port=port)
    address = host("IPSET_ATTR_IP_FROM")
    if spec.kind == "hash:net":
        return Entry(f"{address}/{data.get_attr('IPSET_ATTR_CIDR')}")
    if spec.kind == "hash:ip":
        return Entry(address)
    second = host("IPSET_ATTR_IP2") if spec.kind.count(",") == 2 else ""
    if spec.kind == "hash:ip,port,net":
        second = f"{second}/{data.get_attr('IPSET_ATTR_CIDR2')}"
    return Entry(address, _PROTOCOLS[data.get_attr("IPSET_ATTR_PROTO")], port, second)


def _state(message: Any) -> SetState:
    data = message.get_attr("IPSET_ATTR_DATA")
    flags = data.get_attr("IPSET_ATTR_CADT_FLAGS") or 0
    spec = SetSpec(
        message.get_attr("IPSET_ATTR_SETNAME"),
        message.get_attr("IPSET_ATTR_TYPENAME"),
        "IPv6" if message.get_attr("IPSET_ATTR_FAMILY") == socket.AF_INET6 else "IPv4",
        bool(flags & setwire.WITH_SKBINFO),
        data.get_attr("IPSET_ATTR_MAXELEM") or 0,
    )
    return SetState(spec, data.get_attr("IPSET_ATTR_ELEMENTS"), data.get_attr("IPSET_ATTR_REFERENCES"))
