"""A cluster that fits into one machine: network namespaces for a node, its pods, a second node and the world outside.

                         outside  198.51.100.7, .8 (the office), 192.0.2.66 (a stranger), 2001:db8:100::7
                            | eth0 192.168.1.1
                            |
                            | eth0 192.168.1.10
    web-1  eth0 --- v1 ---- node-1 ---- eth1 192.168.2.10 --- 192.168.2.11 eth0  node-2
    web-2  eth0 --- v2 ------'                                                   all its pods: addresses on lo
    ...                       the proxy runs here                                10.244.2.x, fd00:10:244:2::x
    10.244.1.x, fd00:10:244:1::x

Pods hang on links of their own and the node routes between them, so also traffic between two pods passes the node's
hooks.  Everything goes with the process: namespaces have no names and nothing outside them is touched.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from ..testing.netns import Namespace, veth
from .manifests import Pod

NODE = "node-1"
NODE_IPV4, NODE_IPV6 = "192.168.1.10", "fd00:192:168:1::10"
# Nodes exchange pods' traffic over a link of its own, so that the node has another address there when it masquerades.
BETWEEN_IPV4, BETWEEN_IPV6 = "192.168.2.10", "fd00:192:168:2::10"
OTHER_IPV4, OTHER_IPV6 = "192.168.2.11", "fd00:192:168:2::11"
ROUTER_IPV4, ROUTER_IPV6 = "192.168.1.1", "fd00:192:168:1::1"
GATEWAY_IPV4, GATEWAY_IPV6 = "10.244.1.1", "fd00:10:244:1::1"
OUTSIDE = ("198.51.100.7", "198.51.100.8", "192.0.2.66", "2001:db8:100::7")
OTHER_PODS = ("10.244.2.0/24", "fd00:10:244:2::/64")
CLIENT = Pod("client", NODE, ("10.244.1.5", "fd00:10:244:1::5"), frozenset())

# The kernel would refuse one connection a second and be silent about the others; a demo asks for many.
ROUTER_IPV4_SETTINGS = {
    "ipv4/ip_forward": 1,
    "ipv4/conf/all/rp_filter": 0,
    "ipv4/conf/default/rp_filter": 0,
    "ipv4/icmp_ratelimit": 0,
}
ROUTER_IPV6_SETTINGS = {"ipv6/conf/all/forwarding": 1, "ipv6/icmp/ratelimit": 0}
# Checking new addresses for duplicates would cost every link its first second.
IPV6_SETTINGS = {"ipv6/conf/default/accept_dad": 0}


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def host_prefix(address: str) -> str:
    return f"{address}/128" if ":" in address else f"{address}/32"


def _mac(number: int) -> str:
    return f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}"


Command = list[str]


def _address(address: str, device: str) -> Command:
    return ["addr", "add", address, "dev", device, *(["nodad"] if ":" in address else [])]


def _route(to: str, *way: str) -> Command:
    return ["route", "add", to, *way]


def _default(gateway: str) -> Command:
    return _route("::/0" if ":" in gateway else "0.0.0.0/0", "via", gateway)


class Lab:
    """All namespaces of the lab, as a context manager.  `ipv6` is False where the kernel has none.

    Raises KernelError or OSError when one cannot be made; what was made by then is gone again.
    """

    def __init__(self, pods: Iterable[Pod]) -> None:
        self.ipv6 = Path("/proc/sys/net/ipv6").is_dir()
        self._pods = (CLIENT, *pods)
        self._stack = ExitStack()
        self._macs = iter(range(1, 1 << 16))
        self._places: dict[str, Namespace] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.node = self._namespace(stack, NODE)
            self.outside = self._namespace(stack, "outside")
            self._other = self._namespace(stack, "node-2")
            self.node.sysctl(ROUTER_IPV4_SETTINGS | (ROUTER_IPV6_SETTINGS if self.ipv6 else {}))
            self._connect_outside()
            self._connect_other_node()
            for number, pod in enumerate(self._pods):
                if pod.node == NODE:
                    self._places[pod.name] = self._namespace(stack, pod.name)
                    self._connect_pod(f"v{number}", pod)
                else:
                    self._places[pod.name] = self._other
                    self._ip(self._other, *(_address(host_prefix(a), "lo") for a in pod.addresses))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def place(self, pod_name: str) -> Namespace:
        """The namespace that a pod lives in."""
        return self._places[pod_name]

    def addresses(self, pod: Pod) -> tuple[str, ...]:
        """Those of the pod's addresses that this machine can carry."""
        return tuple(a for a in pod.addresses if self.ipv6 or ":" not in a)

    def _namespace(self, stack: ExitStack, label: str) -> Namespace:
        namespace = stack.enter_context(Namespace(label))
        if self.ipv6:
            namespace.sysctl(IPV6_SETTINGS)
        return namespace

    def _ip(self, namespace: Namespace, *commands: Command) -> None:
        namespace.ip(*(c for c in commands if self.ipv6 or not any(":" in word for word in c)))

    def _link(self, here: Namespace, name: str, there: Namespace) -> None:
        veth(here, name, _mac(next(self._macs)), there, "eth0", _mac(next(self._macs)))

    def _connect_outside(self) -> None:
        self._link(self.node, "eth0", self.outside)
        self._ip(
            self.node,
            _address(f"{NODE_IPV4}/24", "eth0"),
            _address(f"{NODE_IPV6}/64", "eth0"),
            _default(ROUTER_IPV4),
            _default(ROUTER_IPV6),
        )
        self._ip(
            self.outside,
            _address(f"{ROUTER_IPV4}/24", "eth0"),
            _address(f"{ROUTER_IPV6}/64", "eth0"),
            *(_address(host_prefix(a), "lo") for a in OUTSIDE),
            _default(NODE_IPV4),
            _default(NODE_IPV6),
        )

    def _connect_other_node(self) -> None:
        self._link(self.node, "eth1", self._other)
        self._ip(
            self.node,
            _address(f"{BETWEEN_IPV4}/24", "eth1"),
            _address(f"{BETWEEN_IPV6}/64", "eth1"),
            _route(OTHER_PODS[0], "via", OTHER_IPV4, "dev", "eth1"),
            _route(OTHER_PODS[1], "via", OTHER_IPV6, "dev", "eth1"),
        )
        self._ip(
            self._other,
            _address(f"{OTHER_IPV4}/24", "eth0"),
            _address(f"{OTHER_IPV6}/64", "eth0"),
            _default(BETWEEN_IPV4),
            _default(BETWEEN_IPV6),
        )

    def _connect_pod(self, device: str, pod: Pod) -> None:
        place = self._places[pod.name]
        self._link(self.node, device, place)
        gateways = [g for g in (GATEWAY_IPV4, GATEWAY_IPV6) if family(g) in map(family, pod.addresses)]
        self._ip(
            self.node,
            *(_address(host_prefix(g), device) for g in gateways),
            *(_route(host_prefix(a), "dev", device) for a in pod.addresses),
        )
        self._ip(
            place,
            *(_address(host_prefix(a), "eth0") for a in pod.addresses),
            *(_route(host_prefix(g), "dev", "eth0") for g in gateways),
            *(_default(g) for g in gateways),
        )
