"""What a connection's first packet costs on the node: a SYN through the rules, conntrack and both translations.

Each set of rules is in a namespace of its own; a raw socket there sends SYNs with ever new source ports, in turn for all
sets and for the first, the middle and the last Service, so that the machine's moods meet all alike.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import time
from collections.abc import Iterator

from proxycore.testing.netns import Namespace
from proxycore_nft.backend import NftBackend

from . import cluster
from .measure import median, percentile
from .nft import CONTEXT, full_batch
from .report import Row

NODE = "192.168.0.2"
ROUNDS, BURST = 30, 400
FLOOR = f"""\
table ip floor {{
    chain output {{
        type nat hook output priority -100;
        ip daddr {cluster.cluster_ip(0)} tcp dport 80 dnat to {cluster.pod_ip(0)}:8080
    }}
    chain postrouting {{
        type nat hook postrouting priority 100;
        masquerade fully-random
    }}
}}
"""


def run(*, full: bool) -> Iterator[Row]:
    sizes = (1_000, 10_000, 30_000) if full else (1_000,)
    with contextlib.ExitStack() as stack:
        floor = _node(stack, "floor")
        floor.call(lambda: subprocess.run(["nft", "-f", "-"], input=FLOOR, text=True, check=True))
        targets = {("floor", "only"): _Sender(stack, floor, 0)}
        for services in sizes:
            node = _node(stack, f"{services}")
            node.call(lambda services=services: _program(services))
            for position, number in (("first", 0), ("middle", services // 2), ("last", services - 1)):
                targets[f"{services:,}", position] = _Sender(stack, node, number)
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in targets}
        for number in range(ROUNDS):
            for key, sender in targets.items():
                seconds[key] += sender.send(1024 + number * BURST)
    base = percentile(seconds["floor", "only"], 0.5)
    yield Row(what="a bare dnat rule and masquerade, p50", value=base * 1e6, unit="us")
    for services in sizes:
        p50 = {
            position: percentile(found, 0.5)
            for (label, position), found in seconds.items()
            if label == f"{services:,}"
        }
        for position, value in p50.items():
            yield Row(what=f"{position} of {services:,} Services, p50", value=value * 1e6, unit="us")
        label = f"of {services:,} Services"
        yield Row(what=f"last {label} / bare rule", value=p50["last"] / base, unit="x", bar=1.5)
        yield Row(what=f"last {label} / first", value=p50["last"] / p50["first"], unit="x", bar=1.2)
        mean = median(
            [sum(found) / len(found) for (name, _), found in seconds.items() if name == f"{services:,}"]
        )
        yield Row(what=f"mean {label}", value=mean * 1e6, unit="us")


def _node(stack: contextlib.ExitStack, label: str) -> Namespace:
    """A node whose routes all lead into a bridge without ports, which swallows what it gets."""
    node = stack.enter_context(Namespace(f"packets-{label}"))
    node.ip(
        ["link", "add", "sink", "type", "bridge"],
        ["address", "add", f"{NODE}/24", "dev", "sink"],
        ["link", "set", "sink", "arp", "off", "up"],
        ["route", "add", "10.0.0.0/8", "dev", "sink"],
        ["route", "add", "172.16.0.0/12", "dev", "sink"],
    )
    return node


def _program(services: int) -> None:
    backend = NftBackend()
    backend.proxycore_backend_start(CONTEXT)
    backend.proxycore_backend_apply(full_batch([cluster.state(n) for n in range(services)]))
    backend.proxycore_backend_stop()


class _Sender:
    """Opens connections from the node to one Service."""

    def __init__(self, stack: contextlib.ExitStack, node: Namespace, service: int) -> None:
        self._address = cluster.cluster_ip(service)
        self._socket = stack.enter_context(node.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))
        self._socket.sendto(self._syn(1000), (self._address, 0))
        entry = node.run(["conntrack", "-L", "--orig-dst", self._address]).stdout
        if "src=10." not in entry or f"dst={NODE} sport=8080" not in entry:
            raise AssertionError(f"a SYN to {self._address} was not translated: {entry!r}")

    def send(self, first_port: int) -> list[float]:
        """Seconds that each send() took, for a burst of SYNs from one source port after the other."""
        clock, send, target = time.perf_counter, self._socket.sendto, (self._address, 0)
        found = []
        for packet in [self._syn(first_port + i) for i in range(BURST)]:
            began = clock()
            send(packet, target)
            found.append(clock() - began)
        return found

    def _syn(self, port: int) -> bytes:
        """IPv4 and TCP header; the kernel fills in lengths and the IP checksum, and nobody looks at TCP's."""
        source, destination = socket.inet_aton(NODE), socket.inet_aton(self._address)
        ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, socket.IPPROTO_TCP, 0, source, destination)
        return ip + struct.pack(">HHIIBBHHH", port, 80, port, 0, 5 << 4, 0x02, 64240, 0, 0)
