"""What the text of the rules does to a packet, with sets and servers beside it: read and followed rule by rule.

A match or target that is not known here is an error, so that no rule is silently without effect.
"""

from __future__ import annotations

import ipaddress
import shlex
from dataclasses import dataclass, field
from typing import NamedTuple

from proxycore_ipvs import netrules
from proxycore_ipvs.entries import Entry, SetKind, named
from proxycore_ipvs.netrules import Chains, Place, PolicyRule, TableName
from proxycore_ipvs.plane import Objects
from proxycore_ipvs.servers import PERSISTENT, ByMark
from proxycore_ipvs.shape import Shape

Outcome = tuple[object, ...]
"""`("reject",)`, `("drop",)`, `("untouched",)`, or `("to", address, port, masqueraded)`."""
REJECT, DROP, UNTOUCHED = ("reject",), ("drop",), ("untouched",)


class Packet(NamedTuple):
    """The first packet of a connection, unless `connection_mark` is not 0: then it belongs to an open one.

    `interface`: by which it comes in; None: it is the node's own.
    """

    source: str
    interface: str | None
    destination: str
    protocol: str
    port: int
    connection_mark: int = 0


@dataclass
class _Traveller:
    packet: Packet
    destination: str
    port: int
    mark: int = 0
    connection_mark: int = 0
    by_ipvs: bool = False
    is_new: bool = True
    log: list[str] = field(default_factory=list)


class _Ended(Exception):
    """A verdict."""


class World:
    """Rules, sets and servers of one family, and the node's own addresses."""

    def __init__(self, shape: Shape, chains: Chains, objects: Objects, local: frozenset[str]) -> None:
        self._shape = shape
        self._chains = {(place.table, place.chain): rules for place, rules in chains.items()}
        self._objects = objects
        self._local = local
        self._nets: dict[str, list[tuple[Entry, object]]] = {}
        for entry in objects.entries:
            if entry.set.kind in (SetKind.CIDR, SetKind.ADMITTED):
                cidr = entry.address if entry.set.kind is SetKind.CIDR else entry.other
                self._nets.setdefault(str(entry.set), []).append((entry, ipaddress.ip_network(str(cidr))))

    def send(self, packet: Packet) -> set[Outcome]:
        """Everything that may become of it."""
        traveller = _Traveller(packet, packet.destination, packet.port)
        traveller.connection_mark = packet.connection_mark
        traveller.is_new = not packet.connection_mark
        first = netrules.OUTPUT if packet.interface is None else netrules.SERVICES
        try:
            self._walk(first, traveller)
            self._walk(netrules.PORTS, traveller)
            self._walk(netrules.REJECT, traveller)
            if not self._is_routed_here(traveller):
                return {UNTOUCHED}
            self._walk(netrules.INPUT, traveller)
        except _Ended as verdict:
            return {(str(verdict),)}
        return self._schedule(traveller)

    def _is_routed_here(self, traveller: _Traveller) -> bool:
        """By policy routing; packets that came in never come from `lo`."""
        rules = [each for each in netrules.policy_routes(self._shape) if isinstance(each, PolicyRule)]
        return any(
            rule.interface is None and traveller.mark & rule.mask == rule.mark and rule.table == 310
            for rule in rules
        )

    def _schedule(self, traveller: _Traveller) -> set[Outcome]:
        server = self._objects.servers.get(ByMark(self._shape.family, traveller.mark))
        assert server is not None, f"no server has the mark 0x{traveller.mark:x}: {traveller.log}"
        usable = [each for each in server.destinations.values() if each.weight > 0]
        assert usable, f"nobody answers at the server 0x{traveller.mark:x}"
        found: set[Outcome] = set()
        for each in usable:
            port = traveller.port if server.server.flags & PERSISTENT else each.port
            sent = _Traveller(
                traveller.packet,
                each.address,
                port,
                mark=traveller.mark,
                connection_mark=traveller.connection_mark,
                by_ipvs=True,
            )
            self._walk(netrules.OUTPUT, sent)
            assert sent.mark == 0, "it would be sent to lo"
            masqueraded = False
            try:
                self._walk(netrules.POSTROUTING, sent)
            except _Ended as verdict:
                masqueraded = str(verdict) == "masquerade"
            found.add(("to", each.address, port, masqueraded))
        return found

    # -- rules --

    def _walk(self, place: Place, traveller: _Traveller) -> bool:
        """Follow a chain.  Returns: it ended by a `-g` below, or ran to its end or a RETURN: go on in the caller."""
        for rule in self._chains.get((place.table, place.chain), ()):
            words = shlex.split(rule)
            matched, rest = self._match(words, traveller)
            if not matched:
                continue
            traveller.log.append(f"{place.chain} {rule}")
            how, target, *options = rest
            if how == "-g":
                return self._walk(Place(place.table, target), traveller)
            assert how == "-j", rule
            if target == "RETURN":
                return True
            if target.startswith("PX-"):
                self._walk(Place(place.table, target), traveller)
            else:
                self._do(place.table, target, options, traveller)
        return True

    def _match(self, words: list[str], traveller: _Traveller) -> tuple[bool, list[str]]:
        packet = traveller.packet
        matched, negated = True, False
        module = ""
        while words[0] not in ("-j", "-g"):
            word, *words = words
            if word == "!":
                negated = True
                continue
            if word == "-m":
                module, *words = words
                continue
            holds = True
            if word == "--ipvs":
                holds = traveller.by_ipvs
            else:
                value, *words = words
                if word == "-s":
                    holds = ipaddress.ip_address(packet.source) in ipaddress.ip_network(value)
                elif word == "-i":
                    name = packet.interface or ""
                    holds = name.startswith(value[:-1]) if value.endswith("+") else name == value
                elif word == "-p":
                    holds = packet.protocol == value
                elif word == "--ctdir":
                    assert value == "REPLY"
                    holds = False
                elif word == "--ctstate":
                    holds = ("NEW" if traveller.is_new else "ESTABLISHED") in value.split(",")
                elif word == "--src-type":
                    assert value == "LOCAL"
                    holds = packet.source in self._local
                elif word == "--mark":
                    wanted, mask = (int(part, 16) for part in value.split("/"))
                    mark = traveller.connection_mark if module == "connmark" else traveller.mark
                    holds = mark & mask == wanted
                elif word == "--match-set":
                    fields, *words = words
                    holds = self._lookup(value, fields, traveller) is not None
                else:
                    raise AssertionError(f"unknown match {word}")
            matched = matched and holds is not negated
            negated = False
        return matched, words

    def _lookup(self, text: str, fields: str, traveller: _Traveller) -> tuple[int | None] | None:
        name = named(text)
        assert name is not None, text
        packet, kind = traveller.packet, name.kind
        protocol = packet.protocol.upper()
        at = (traveller.destination, protocol, traveller.port)
        if kind in (SetKind.CIDR, SetKind.ADMITTED):
            assert fields == ("dst" if kind is SetKind.CIDR else "dst,dst,src")
            address = ipaddress.ip_address(traveller.destination if kind is SetKind.CIDR else packet.source)
            for entry, net in self._nets.get(text, ()):
                same = kind is SetKind.CIDR or (entry.address, entry.protocol, entry.port) == at
                if same and address in net:
                    return (None,)
            return None
        if kind in (SetKind.NODE, SetKind.CLUSTER_IPS):
            assert fields == "dst"
            entry = Entry(name, traveller.destination)
        elif kind in (SetKind.VIP, SetKind.FIREWALLED):
            assert fields == "dst,dst"
            entry = Entry(name, *at)
        elif kind is SetKind.LOOP:
            assert fields == "dst,dst,src"
            entry = Entry(name, *at, packet.source)
        else:
            assert fields == "dst"
            assert kind.value == f"NP-{packet.protocol}"
            entry = Entry(name, None, protocol, traveller.port)
        return (self._objects.entries[entry],) if entry in self._objects.entries else None

    def _do(self, table: TableName, target: str, options: list[str], traveller: _Traveller) -> None:
        if target == "DROP":
            raise _Ended("drop")
        if target == "REJECT":
            assert table == "filter"
            raise _Ended("reject")
        if target == "MASQUERADE":
            assert table == "nat"
            raise _Ended("masquerade")
        if target == "MARK":
            value, mask = (int(part, 16) for part in options[1].split("/"))
            assert options[0] == "--set-xmark"
            traveller.mark = traveller.mark & ~mask ^ value
        elif target == "SET":
            _, text, fields, flag = options
            assert flag == "--map-mark"
            found = self._lookup(text, fields, traveller)
            if found is not None:
                assert found[0] is not None
                traveller.mark = found[0]
        elif target == "CONNMARK":
            _, _, kept, _, mask = options
            traveller.connection_mark = traveller.connection_mark & ~int(mask, 16) ^ (
                traveller.mark & int(kept, 16)
            )
        elif target == "DNAT":
            traveller.port = int(options[1].removeprefix(":"))
            # The first rule of nat that translates ends the walk; there is one per class.
        else:
            raise AssertionError(f"unknown target {target}")
