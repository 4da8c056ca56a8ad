"""One text for each address and CIDR, whatever way it was written.

IPv4 may carry leading zeros (`010.0.0.1` is `10.0.0.1`, decimal), as Kubernetes has always read it.  IPv6 is written as
RFC 5952 says.  An IPv4-mapped IPv6 address (`::ffff:10.0.0.1`) *is* the IPv4 address: kube-proxy reads it so, and two
texts for one address would be two claims on it.  Zones (`fe80::1%eth0`) are no part of an address here.

Semantics: `ParseIPSloppy` and `ParseCIDRSloppy` of Kubernetes.
"""

from __future__ import annotations

import re

# The C part alone: the module `socket` around it would bring selectors and the like into the pure core.
from _socket import AF_INET, AF_INET6, inet_ntop, inet_pton

_SLOPPY_IPV4 = re.compile(r"[0-9]{1,32}(?:\.[0-9]{1,32}){3}")
_MAPPED = bytes(10) + b"\xff\xff"
_LOOPBACK_IPV6 = bytes(15) + b"\x01"

UNUSUAL_FIRST_OCTETS = frozenset((0, 127, 169, *range(224, 256)))
"""IPv4 addresses that `special` may object to start with one of these; all others need not be asked about."""

UNUSUAL_FIRST_OCTETS_IPV6 = frozenset((0x00, 0xFE, 0xFF))
"""The same for IPv6; of the others the C library writes the canonical text."""


def _tidy_ipv4(text: str) -> str | None:
    """Dotted quad without leading zeros; None when it is no IPv4 address."""
    if not _SLOPPY_IPV4.fullmatch(text):
        return None
    octets = [int(part) for part in text.split(".")]
    return ".".join(map(str, octets)) if max(octets) <= 255 else None


def _pack_ipv6(text: str) -> bytes | None:
    try:
        return inet_pton(AF_INET6, text)
    except (OSError, ValueError):
        pass
    head, colon, tail = text.rpartition(":")
    tidy = _tidy_ipv4(tail) if colon else None
    if tidy is None or tidy == tail:
        return None
    return _pack_ipv6(f"{head}:{tidy}")


def _unpack(packed: bytes) -> str:
    if len(packed) == 4:
        return inet_ntop(AF_INET, packed)
    if packed.startswith(_MAPPED):
        return inet_ntop(AF_INET, packed[12:])
    # The C library writes `::1:2` in the long obsolete form `::0.1.0.2`.
    if packed.startswith(bytes(12)) and packed[12:14] != bytes(2):
        return f"::{int.from_bytes(packed[12:14]):x}:{int.from_bytes(packed[14:]):x}"
    return inet_ntop(AF_INET6, packed)


def address(text: str) -> str:
    """The canonical text of an address.  Raises ValueError, with the reason, when it is none."""
    try:
        inet_pton(AF_INET, text)  # accepts canonical text only
        return text
    except (OSError, ValueError):
        pass
    if ":" in text:
        packed = _pack_ipv6(text)
        if packed is not None:
            return _unpack(packed)
    else:
        tidy = _tidy_ipv4(text)
        if tidy is not None:
            return tidy
    raise ValueError(f"{text!r} is not an IP address")


def pack(canonical: str) -> bytes:
    """4 or 16 bytes of a canonical address."""
    return inet_pton(AF_INET6 if ":" in canonical else AF_INET, canonical)


def special(packed: bytes) -> str | None:
    """Why an address can be neither an endpoint nor a frontend; None when nothing speaks against it.

    Semantics: `ValidateEndpointIP` of Kubernetes, and all of multicast and the broadcast address.
    """
    if len(packed) == 4:
        first = packed[0]
        if first == 127:
            return "loopback"
        if first == 169 and packed[1] == 254:
            return "link-local"
        if 224 <= first < 240:
            return "multicast"
        if packed == b"\0\0\0\0":
            return "unspecified"
        return "broadcast" if packed == b"\xff\xff\xff\xff" else None
    if packed[0] == 0xFE and packed[1] & 0xC0 == 0x80:
        return "link-local"
    if packed[0] == 0xFF:
        return "multicast"
    if packed == _LOOPBACK_IPV6:
        return "loopback"
    return "unspecified" if packed == bytes(16) else None


def usable_address(text: str) -> str:
    """The canonical text of an address that can be an endpoint or a frontend.  Raises ValueError, with the reason."""
    try:
        if inet_pton(AF_INET, text)[0] not in UNUSUAL_FIRST_OCTETS:
            return text
    except (OSError, ValueError):
        pass
    canonical = address(text)
    why = special(pack(canonical))
    if why:
        raise ValueError(f"{canonical} is a {why} address")
    return canonical


def cidr(text: str) -> str:
    """The canonical text of a CIDR, host bits cleared.  Raises ValueError, with the reason, when it is none."""
    base, slash, length = text.partition("/")
    if not slash or not length.isascii() or not length.isdigit() or len(length) > 3:
        raise ValueError(f"{text!r} is not a CIDR")
    try:
        packed = pack(address(base))
    except ValueError:
        raise ValueError(f"{text!r} is not a CIDR") from None
    bits = int(length)
    if len(packed) == 4 and ":" in base:
        bits -= 96  # IPv4-mapped
    width = len(packed) * 8
    if not 0 <= bits <= width:
        raise ValueError(f"{text!r} has an impossible prefix length")
    number = int.from_bytes(packed) >> (width - bits) << (width - bits)
    return f"{_unpack(number.to_bytes(len(packed)))}/{bits}"


def contains(outer: str, inner: str) -> bool:
    """Does a canonical CIDR contain a canonical address or CIDR?"""
    base, _, length = outer.partition("/")
    start, _, inner_length = inner.partition("/")
    first, second = pack(base), pack(start)
    if len(first) != len(second):
        return False
    bits, width = int(length), len(first) * 8
    if inner_length and int(inner_length) < bits:
        return False
    return int.from_bytes(first) >> (width - bits) == int.from_bytes(second) >> (width - bits)


def outermost(cidrs: list[str]) -> tuple[str, ...]:
    """Canonical CIDRs without those that lie in another, in their first order: the same addresses, disjoint.

    Sets of intervals in the kernel refuse overlaps.
    """
    distinct = list(dict.fromkeys(cidrs))
    if len(distinct) < 2:
        return tuple(distinct)
    return tuple(
        one for one in distinct if not any(other != one and contains(other, one) for other in distinct)
    )
