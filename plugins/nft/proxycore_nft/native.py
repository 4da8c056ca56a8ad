"""Messages and elements as nft text, for people: plans, renderings, logs and drift reports."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Callable, Iterable

from . import encode, layout
from .kernel import Element, parse_element


def _address(raw: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def _port(raw: bytes) -> str:
    return str(struct.unpack(">H", raw[:2])[0])


def _protocol(raw: bytes) -> str:
    return layout.PROTOCOL_NAME.get(raw[0], str(raw[0]))


def _number(raw: bytes) -> str:
    value = struct.unpack("=I", raw)[0]
    return f"{value >> 16:x}:{value & 0xFFFF:x}"


def _slot(raw: bytes) -> str:
    return str(struct.unpack("=I", raw)[0])


Field = tuple[int, Callable[[bytes], str]]


def _fields(family: str) -> dict[str, tuple[tuple[Field, ...], tuple[Field, ...]]]:
    size = 4 if family == "ip" else 16
    address: Field = (size, _address)
    port: Field = (4, _port)
    protocol: Field = (4, _protocol)
    number: Field = (4, _number)
    slot: Field = (4, _slot)
    frontend = (address, protocol, port)
    return {
        "frontends": (frontend, (number,)),
        "node-ports": ((protocol, port), (number,)),
        "pools": ((number,), (number,)),
        "classes": ((number,), ()),
        "refusals": ((number,), ()),
        "endpoints": ((number, slot), (address, port)),
        "slots": ((number, slot), (number,)),
        "sticky-endpoints": ((number,), (address, port)),
        "local-sticky-endpoints": ((number,), (address, port)),
        "affinity": ((address, number), (number,)),
        "cluster-ips": ((address,), ()),
        "node-addresses": ((address,), ()),
        "local-pods": ((address,), ()),
        "service-cidrs": ((address,), ()),
        "firewalled": (frontend, ()),
        "allowed-sources": ((*frontend, address), ()),
        "hairpin": ((address, address), ()),
    }


_FIELDS = {family: _fields(family) for family in ("ip", "ip6")}


def _join(raw: bytes, fields: tuple[Field, ...]) -> str:
    parts: list[str] = []
    position = 0
    for size, show in fields:
        parts.append(show(raw[position : position + size]))
        position += size
    return " . ".join(parts)


def element_text(family: str, name: str, item: Element) -> str:
    """One element as `nft list` writes it (an interval of concatenations as first - last)."""
    keys, data = _FIELDS[family][name]
    shown = _join(item.key, keys)
    if item.key_end is not None:
        shown = f"{shown}-{_join(item.key_end, keys).rsplit(' . ', 1)[1]}"
    if item.comment:
        shown += f' comment "{item.comment}"'
    if item.chain is not None:
        goes = item.chain.removeprefix("!") if item.chain.startswith("!") else f"goto {item.chain}"
        return f"{shown} : {goes}" if item.chain else f"{shown} : drop"
    return shown if item.data is None else f"{shown} : {_join(item.data, data)}"


def element_from_bytes(raw: bytes) -> Element:
    """The element that encode.element() and its like made."""
    return parse_element(memoryview(raw)[4:])


def key_text(family: str, name: str, key: bytes) -> str:
    """A key alone: `10.0.0.1 . tcp . 80`."""
    return _join(key, _FIELDS[family][name][0])


def interval_texts(family: str, name: str, elements: Iterable[Element]) -> list[str]:
    """A one-field interval set's marks as CIDRs or `first-last`, as `nft list` shows them."""
    starts: list[bytes] = []
    ends: list[bytes] = []
    for item in elements:
        (ends if item.flags & encode.ELEM_INTERVAL_END else starts).append(item.key)
    ends.sort()
    shown: list[str] = []
    for start in sorted(starts):
        end = next((end for end in ends if end > start), None)
        size = len(start)
        last = int.from_bytes(end, "big") - 1 if end is not None else (1 << 8 * size) - 1
        shown.append(_interval(start, last.to_bytes(size, "big")))
    return shown


def _interval(first: bytes, last: bytes) -> str:
    start, stop = ipaddress.ip_address(first), ipaddress.ip_address(last)
    cidrs = list(ipaddress.summarize_address_range(start, stop))
    return str(cidrs[0]) if len(cidrs) == 1 else f"{start}-{stop}"
