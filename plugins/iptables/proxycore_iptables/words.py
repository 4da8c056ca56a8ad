"""Pieces of rules: comments, addresses, clients and chances, written as `iptables-save` prints them.

Each piece is empty or ends with a space, so that pieces can be put side by side.  The order that both variants print is: source,
destination, interface, protocol, then matches as they were given, then the target.
"""

from __future__ import annotations

import math
import re

# The C part alone, as in the core: the module around it brings selectors and the like.
from _socket import AF_INET, AF_INET6, inet_pton
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec

from proxycore.api import Family

from .shape import Shape

COMMENT_BYTES = 255
"""The kernel's room for a comment."""
CHANCE_STEPS = 1 << 31
"""The kernel keeps a chance as a number of these steps."""

_UNSAFE = re.compile(r"[^A-Za-z0-9_./:>\-\[\] ]")
_PRINTED_BARE = re.compile(r"[A-Za-z0-9_-]+")
_FOUR_IN_SIX = re.compile(r"::([0-9a-f]{1,4}):([0-9a-f]{1,4})")
INVALID_COUNTER = "ct_state_invalid_dropped_pkts"
"""Counts packets dropped because connection tracking calls them invalid."""
LOCALHOST_COUNTER = "localhost_nps_accepted_pkts"
"""Counts first packets to node ports of loopback addresses."""
MASQUERADE = "-j KUBE-MARK-MASQ"


def safe(text: str) -> str:
    """A name from the API as it may stand in a comment: nothing in it has to be escaped, and no rule can end in it."""
    return _UNSAFE.sub("_", text)


def comment(text: str) -> str:
    """A match that says `text`, which is safe() and has a blank or a slash somewhere."""
    if len(text) > COMMENT_BYTES:
        text = text[:COMMENT_BYTES]
        if _PRINTED_BARE.fullmatch(text):
            return f"-m comment --comment {text} "
    return f'-m comment --comment "{text}" '


def printed(address: str) -> str:
    """A canonical address as iptables prints it: the C library writes `::1:2` as `::0.1.0.2`."""
    if not address.startswith("::"):
        return address
    match = _FOUR_IN_SIX.fullmatch(address)
    if match is None:
        return address
    high, low = (int(group, 16) for group in match.groups())
    return f"::{high >> 8}.{high & 255}.{low >> 8}.{low & 255}"


def packed(address: str) -> bytes:
    """A canonical address in network order."""
    return inet_pton(AF_INET6 if ":" in address else AF_INET, address)


def source(cidr: str) -> str:
    """`-s`, for a canonical CIDR; nothing for one that holds every address."""
    address, _, length = cidr.rpartition("/")
    return "" if length == "0" else f"-s {printed(address)}/{length} "


class Client(NamedTuple):
    """How one class of client is told: match of the source, of the interface, and the rest.  All empty: anyone."""

    source: str = ""
    interface: str = ""
    rest: str = ""


ANYONE = Client()
NODE = Client(rest="-m addrtype --src-type LOCAL ")


class Words(msgspec.Struct, frozen=True, kw_only=True):
    """What rules say that depends on the shape alone.

    `local_pod`: how a pod of this node is told; None: nobody is one.  `other`: anyone who is none; None: nobody.
    `length`: of a single address, as in `/32`.  `refusing`: the target that refuses.  `recent`: which addresses
    the match of that name keeps.  `node_port_destinations`: as the function says.
    """

    local_pod: Client | None
    other: Client | None
    length: str
    refusing: str
    recent: str
    node_port_destinations: tuple[tuple[str, str], ...]


@lru_cache(maxsize=8)
def words(shape: Shape) -> Words:
    """The words of a shape."""
    v4 = shape.family == "IPv4"
    local_pod: Client | None = None
    other: Client | None = ANYONE
    kind, _, value = shape.local_pods.partition(" ")
    if kind == "-s" and value.endswith("/0"):
        local_pod, other = ANYONE, None
    elif kind == "-s":
        told = source(value)
        local_pod, other = Client(source=told), Client(source=f"! {told}")
    elif kind:
        local_pod, other = Client(interface=f"{kind} {value} "), Client(interface=f"! {kind} {value} ")
    return Words(
        local_pod=local_pod,
        other=other,
        length="/32" if v4 else "/128",
        refusing=f"REJECT --reject-with {'icmp' if v4 else 'icmp6'}-port-unreachable",
        recent=f"--mask {'255.255.255.255' if v4 else ':'.join(['ffff'] * 8)} --rsource ",
        node_port_destinations=node_port_destinations(shape),
    )


def loopback(family: Family) -> str:
    """The addresses that packets from outside never have."""
    return "127.0.0.0/8" if family == "IPv4" else "::1/128"


def node_port_destinations(shape: Shape) -> tuple[tuple[str, str], ...]:
    """Where node ports are: for each rule, the match of the destination and the other matches.

    Loopback is one of these places if node ports on localhost are on, and only then.
    """
    everywhere = loopback(shape.family)
    if shape.node_ports.all_local:
        excluded = "" if shape.localhost_node_ports else f"! -d {everywhere} "
        return ((excluded, "-m addrtype --dst-type LOCAL "),)
    length = "/32" if shape.family == "IPv4" else "/128"
    places = [
        f"{printed(address)}{length}"
        for address in shape.node_ports.addresses
        if address != "::1" and not address.startswith("127.")
    ]
    if shape.localhost_node_ports:
        places.append(everywhere)
    return tuple((f"-d {place} ", "") for place in places)


_chances: list[str] = ["", ""]
"""A match that holds for one of n new connections, at place n."""


def _chance(share: int, whole: int) -> str:
    # kube-proxy writes ten decimals, iptables takes the nearest step of those, and prints eleven.
    steps = math.floor(float(f"{share / whole:.10f}") * CHANCE_STEPS + 0.5)
    steps = min(max(steps, 1), CHANCE_STEPS - 1)
    return f"-m statistic --mode random --probability {steps / CHANCE_STEPS:.11f} "


def chances(weights: Sequence[int]) -> list[str]:
    """For each of several rules in a row, the match by which new connections are shared out as `weights`, all above 0, say.

    A rule takes its share of what those before it left, and the last one all.
    """
    count = len(weights)
    if weights.count(1) == count:
        while len(_chances) <= count:
            _chances.append(_chance(1, len(_chances)))
        return _chances[count:0:-1]
    left = sum(weights)
    found: list[str] = []
    for weight in weights[:-1]:
        found.append(_chance(weight, left))
        left -= weight
    return [*found, ""]
