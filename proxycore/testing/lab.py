"""The lab: one node and everything around it, in network namespaces.

        nodes (other nodes) ---- eth0 |      | pods0 ---- pods (this node's)
                                      | node |
        overlay (other pods) --- ovl0 |      | ext0 ----- world (default route)

Each peer is one namespace that answers for every address routed to it and may send from any.  Yet every pod behaves
as a machine of its own: what a peer sends leaves by its link even when the destination is its own address (the rule
for `iif lo` stands before the local table), so that traffic between two pods, and from a pod to itself by way of a
Service, crosses the node twice.  Hardware addresses are fixed and neighbours permanent: no packet waits for ARP.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import socket
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from .netns import Namespace, close_all, veth
from .responder import Responder

NODE_NAME = "test-node"
ClientKind = Literal["pod", "node", "other-node", "remote-pod", "external"]
Place = Literal["node", "nodes", "pods", "overlay", "world"]

NODE_ADDRESSES = ("192.168.0.2", "192.168.1.2", "2001:db8::1", "2001:db8:1::2")


@dataclass(frozen=True, slots=True)
class Link:
    """One interface of the node; addresses with prefix lengths, IPv4 and IPv6."""

    interface: str
    place: Place
    node: tuple[str, ...]
    peer: tuple[str, str]
    destinations: tuple[str, ...]
    """What the node routes there unless told otherwise."""


LINKS = (
    Link(
        interface="eth0",
        place="nodes",
        node=("192.168.0.2/24", "192.168.1.2/24", "2001:db8::1/64", "2001:db8:1::2/64"),
        peer=("192.168.0.3/24", "2001:db8::3/64"),
        destinations=("192.168.0.0/24", "192.168.1.0/24", "2001:db8::/64", "2001:db8:1::/64"),
    ),
    Link(
        interface="pods0",
        place="pods",
        node=("100.64.1.1/30", "fd64:1::1/64"),
        peer=("100.64.1.2/30", "fd64:1::2/64"),
        destinations=("10.180.0.0/24", "10.0.0.0/24", "fd00:10::/64"),
    ),
    Link(
        interface="ovl0",
        place="overlay",
        node=("100.64.2.1/30", "fd64:2::1/64"),
        peer=("100.64.2.2/30", "fd64:2::2/64"),
        destinations=("10.0.0.0/8", "fd00:10::/32"),
    ),
    Link(
        interface="ext0",
        place="world",
        node=("100.64.3.1/30", "fd64:3::1/64"),
        peer=("100.64.3.2/30", "fd64:3::2/64"),
        destinations=("0.0.0.0/0", "::/0"),
    ),
)
_LINK_OF = {link.place: link for link in LINKS}

CLIENT_PLACES: Mapping[ClientKind, Place] = {
    "pod": "pods",
    "node": "node",
    "other-node": "nodes",
    "remote-pod": "overlay",
    "external": "world",
}
CLIENT_ADDRESSES: Mapping[ClientKind, tuple[str, str]] = {
    "pod": ("10.0.0.2", "fd00:10::2"),
    "node": ("192.168.0.2", "2001:db8::1"),
    "other-node": ("192.168.0.3", "2001:db8::3"),
    "remote-pod": ("10.180.1.200", "fd00:10:180::1:200"),
    "external": ("203.0.113.2", "2600:5200::1"),
}
"""The source address of each kind of client by family, where a flow names none."""

# Before the interfaces are made, since they take over what `default` says then.
QUIET = {
    "ipv6/conf/default/accept_dad": 0,
    "ipv6/conf/default/dad_transmits": 0,
    "ipv6/conf/default/accept_ra": 0,
    "ipv6/conf/default/router_solicitations": 0,
    "ipv4/conf/all/rp_filter": 0,
    "ipv4/conf/default/rp_filter": 0,
    "ipv4/conf/all/send_redirects": 0,
    "ipv4/conf/default/send_redirects": 0,
    "ipv4/conf/all/accept_redirects": 0,
    "ipv6/conf/all/accept_redirects": 0,
    "ipv6/conf/default/accept_redirects": 0,
    # No ICMP error is held back: type 255 exists in neither family.
    "ipv4/icmp_ratelimit": 0,
    "ipv4/icmp_ratemask": 0,
    "ipv6/icmp/ratelimit": 0,
    "ipv6/icmp/ratemask": 255,
}
FORWARD = {"ipv4/ip_forward": 1, "ipv6/conf/all/forwarding": 1}
ANY_ADDRESS = {
    "ipv4/conf/all/accept_local": 1,
    "ipv4/ip_nonlocal_bind": 1,
    "ipv6/ip_nonlocal_bind": 1,
}
OUTBOUND_TABLE = "100"
SOURCE_PORTS = (20000, 60000)


class Lab:
    """A node with its peers, answering on `ports`.  Use as a context manager; nothing is left behind.

    Raises OSError or KernelError when the host does not allow network namespaces.
    """

    def __init__(self, ports: Iterable[int] = ()) -> None:
        self._namespaces: list[Namespace] = []
        self._routes: dict[str, Place] = {}
        self._node_local: set[str] = set()
        self._reserved: set[int] = set()
        self._source_ports = itertools.cycle(range(*SOURCE_PORTS))
        self.responder = Responder()
        try:
            self.node = self._namespace("node")
            self.node.sysctl(QUIET | FORWARD)
            self.places: dict[Place, Namespace] = {"node": self.node}
            for number, link in enumerate(LINKS, start=1):
                self.places[link.place] = self._connect(number, link)
            self.serve(ports)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything; processes in the lab are killed."""
        with contextlib.ExitStack() as stack:
            stack.callback(close_all, self._namespaces)
            stack.callback(self.responder.close)

    def _namespace(self, label: str) -> Namespace:
        made = Namespace(label)
        self._namespaces.append(made)
        return made

    def _connect(self, number: int, link: Link) -> Namespace:
        peer = self._namespace(link.place)
        peer.sysctl(QUIET | ANY_ADDRESS)
        node_mac, peer_mac = f"02:00:00:00:{number:02x}:01", f"02:00:00:00:{number:02x}:02"
        veth(self.node, link.interface, node_mac, peer, "node0", peer_mac)
        interface = ["dev", link.interface]
        commands = [["addr", "add", address, *interface, *_nodad(address)] for address in link.node]
        for gateway in map(_host, link.peer):
            commands.append(["neigh", "replace", gateway, "lladdr", peer_mac, "nud", "permanent", *interface])
        for destination in link.destinations:
            if link.place != "nodes":  # Connected already.
                commands.append(["route", "add", destination, "via", _gateway(link, destination), *interface])
        self.node.ip(*commands)
        peer.ip(*_peer_commands(link, node_mac, ipv6=False))
        peer.ip(*_peer_commands(link, node_mac, ipv6=True), ipv6=True)
        return peer

    def serve(self, ports: Iterable[int]) -> None:
        """Answer on these ports, TCP and UDP, at every address beyond every link; on no others any more."""
        wanted = set(ports)
        for place, namespace in self.places.items():
            if place != "node":
                self.responder.listen(namespace, place, wanted)
        self.reserve(wanted)

    def serve_node(self, addresses: Collection[str], ports: Iterable[int]) -> None:
        """Answer on these ports of these addresses of the node itself: endpoints of pods on its network."""
        self.responder.listen(self.node, "node", ports if addresses else (), addresses)

    def reserve(self, ports: Iterable[int]) -> None:
        """Keep source_port() off these ports."""
        self._reserved = set(ports)

    def source_port(self) -> int:
        """A source port that was not used for a long time."""
        return next(port for port in self._source_ports if port not in self._reserved)

    def put(self, places: Mapping[str, Place]) -> None:
        """Route these addresses where they are said to be, and none else away from its usual place."""
        wanted = {
            address: place for address, place in places.items() if place not in ("node", usual_place(address))
        }
        commands = []
        for address in self._routes.keys() - wanted.keys():
            commands.append(["route", "del", _single(address)])
        for address, place in wanted.items():
            if self._routes.get(address) != place:
                link = _LINK_OF[place]
                via = ["via", _gateway(link, address), "dev", link.interface]
                commands.append(["route", "replace", _single(address), *via])
        self.node.ip(*commands)
        self._routes = wanted

    def set_node_local(self, addresses: Iterable[str]) -> None:
        """Make these addresses, and no others added by this call before, the node's own as well (on loopback)."""
        wanted = set(addresses)
        self.node.ip(
            *(["addr", "del", _single(address), "dev", "lo"] for address in self._node_local - wanted),
            *(
                ["addr", "add", _single(address), "dev", "lo", *_nodad(address)]
                for address in wanted - self._node_local
            ),
        )
        self._node_local = wanted

    def client(
        self, kind: ClientKind, protocol: Literal["tcp", "udp"], address: str, port: int = 0
    ) -> socket.socket:
        """A socket of a client, bound to its address and a source port (0: one not used lately), not blocking.

        Raises OSError: the port is taken, or a node client's address is not the node's.
        """
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        stream = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        made = self.places[CLIENT_PLACES[kind]].socket(family, stream)
        try:
            made.setblocking(False)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((address, port or self.source_port()))
        except BaseException:
            made.close()
            raise
        return made


def usual_place(address: str) -> Place:
    """Where the node's routes lead when put() says nothing."""
    if address in NODE_ADDRESSES:
        return "node"
    value = ipaddress.ip_address(address)
    best: tuple[int, Place] = (-1, "world")
    for link in LINKS:
        for destination in map(ipaddress.ip_network, link.destinations):
            if value.version == destination.version and value in destination:
                best = max(best, (destination.prefixlen, link.place))
    return best[1]


def endpoint_place(address: str, node_name: str | None, node_local: Collection[str] = ()) -> Place:
    """Where an endpoint lives: on the node's own address, another node's, among this node's pods, or beyond ovl0."""
    usual = usual_place(address)
    if usual == "node" or address in node_local:
        return "node"
    if usual in ("nodes", "pods"):
        return usual
    return "pods" if node_name == NODE_NAME else "overlay"


def _peer_commands(link: Link, node_mac: str, *, ipv6: bool) -> list[list[str]]:
    """Sends everything to the node, takes everything for its own, in one family."""
    device = ["dev", "node0"]
    address, everything = link.peer[ipv6], "::/0" if ipv6 else "0.0.0.0/0"
    gateway = next(_host(address) for address in link.node if (":" in address) == ipv6)
    return [
        ["addr", "add", address, *device, *_nodad(address)],
        ["neigh", "replace", gateway, "lladdr", node_mac, "nud", "permanent", *device],
        ["route", "add", everything, "via", gateway, *device, "table", OUTBOUND_TABLE],
        ["rule", "add", "pref", "10", "iif", "lo", "lookup", OUTBOUND_TABLE],
        ["rule", "add", "pref", "20", "lookup", "local"],
        ["rule", "del", "pref", "0"],
        # Last: from here on no address looks like a neighbour any more.
        ["route", "add", "local", everything, "dev", "lo", "table", "local"],
    ]


def _host(address: str) -> str:
    return address.partition("/")[0]


def _single(address: str) -> str:
    return f"{address}/128" if ":" in address else f"{address}/32"


def _nodad(address: str) -> tuple[str, ...]:
    return ("nodad",) if ":" in address else ()


def _gateway(link: Link, destination: str) -> str:
    return _host(link.peer[1 if ":" in destination else 0])
