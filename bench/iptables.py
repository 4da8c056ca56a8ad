"""The iptables backend: what a load and one change cost, how much is written, and what a connection's way through costs.

Every bar is a ratio of two figures of the same minutes.  Each set of rules is in a namespace of its own.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from proxycore.backend import BackendContext
from proxycore.changes import change
from proxycore.testing.netns import Namespace, veth
from proxycore_iptables.backend import IptablesBackend

from . import cluster
from .measure import median, percentile, settle, spent
from .nft import batch_of, full_batch
from .report import Row

NODE, SERVER = "192.168.0.2", "192.168.0.1"
ROUNDS, BURST = 40, 100
ALL_IN_ONE = {"chainsPerRestore": 1_000_000}
NEVER_COMMENTS = {"commentsUpTo": 0}
"""When they come or go with the number of endpoints, everything is written anew."""
IN_A_ROW, AS_A_TREE = {"treeFrom": 10_000_000}, {"treeFrom": 1}


def run(*, full: bool) -> Iterator[Row]:
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory() as directory:
        os.environ["XTABLES_LOCKFILE"] = str(Path(directory, "xtables.lock"))
        yield from _loads(2_000 if full else 500, full=full)
        for variant in ("nft", "legacy"):
            yield from _lines(variant, 5_000 if full else 1_000)
        yield from _connections("legacy", 10_000 if full else 2_000, full=full)
        yield from _connections("nft", 4_000 if full else 1_000, full=full)


@contextlib.contextmanager
def _backend(variant: str, options: dict[str, Any] | None = None) -> Iterator[IptablesBackend]:
    """A started backend in the namespace of this thread."""
    context = BackendContext(
        host=cluster.HOST, families=("IPv4",), options={"variant": variant, **(options or {})}
    )
    backend = IptablesBackend()
    backend.proxycore_backend_start(context)
    try:
        yield backend
    finally:
        backend.proxycore_backend_stop()


class _Loaded(NamedTuple):
    """Seconds: of a full load, of one endpoint removed, of a restart."""

    load: float
    one: float
    again: float


def _load(variant: str, services: int, options: dict[str, Any] | None = None) -> _Loaded:
    """In a namespace of its own."""
    states = [cluster.state(n) for n in range(services)]

    def inside() -> _Loaded:
        ones = []
        with _backend(variant, options) as backend:
            batch = full_batch(states)
            with spent() as whole:
                assert backend.proxycore_backend_apply(batch).operations
            for i in range(10):
                before = states[i * 47 % services]
                after = cluster.state(i * 47 % services, endpoints=cluster.ENDPOINTS - 1)
                removal = batch_of([change(after.name, before, after)])
                with spent() as one:
                    assert backend.proxycore_backend_apply(removal).operations
                ones.append(one.wall)
                assert backend.proxycore_backend_apply(
                    batch_of([change(after.name, after, before)])
                ).operations
        with spent() as again, _backend(variant, options) as backend:
            # Where iptables prints a rule in another way than it was written, its chain is written again.
            assert backend.proxycore_backend_apply(batch).operations < services
        return _Loaded(whole.wall, median(ones), again.wall)

    settle()
    with Namespace(f"load-{variant}") as namespace:
        return namespace.call(inside)


def _loads(services: int, *, full: bool) -> Iterator[Row]:
    """iptables-nft is quadratic in the chains of one input, so that a load goes in by pieces."""
    label = f"nft, {services:,} x {cluster.ENDPOINTS}"
    pieces, whole = _load("nft", services), _load("nft", services, ALL_IN_ONE)
    yield from _figures(pieces, label)
    yield Row(what=f"full load in one restore, {label}", value=whole.load, unit="s")
    for what, other, bar in (
        ("full load in pieces", pieces.load, 10 if full else 1.5),
        ("one endpoint removed", pieces.one, 50 if full else 10),
    ):
        yield Row(
            what=f"one restore / {what}, {label}", value=whole.load / other, unit="x", bar=bar, sense=">="
        )
    if full:
        large = 5 * services
        loaded = _load("nft", large)
        yield from _figures(loaded, f"nft, {large:,} x {cluster.ENDPOINTS}")
        yield Row(
            what=f"full load of 5 times as many Services, nft, {large:,} x {cluster.ENDPOINTS}",
            value=loaded.load / pieces.load,
            unit="x",
            bar=10,
        )
        yield from _figures(_load("legacy", large), f"legacy, {large:,} x {cluster.ENDPOINTS}")


def _figures(loaded: _Loaded, label: str) -> Iterator[Row]:
    yield Row(what=f"full load, {label}", value=loaded.load, unit="s")
    yield Row(what=f"one endpoint removed, {label}", value=loaded.one * 1e3, unit="ms")
    yield Row(what=f"restart with next to nothing to write, {label}", value=loaded.again * 1e3, unit="ms")


def _lines(variant: str, most: int) -> Iterator[Row]:
    """How much is written for a change; it must not grow with the number of Services."""
    found: dict[tuple[str, int], int] = {}

    def count(services: int) -> None:
        states = [cluster.state(n) for n in range(services)]
        with _backend(variant, NEVER_COMMENTS) as backend:
            backend.proxycore_backend_apply(full_batch(states))
            before, after = states[50], cluster.state(50, endpoints=cluster.ENDPOINTS - 1)
            changed = backend.proxycore_backend_apply(batch_of([change(after.name, before, after)]))
            found["one endpoint removed", services] = changed.operations
            new = cluster.state(services)
            changed = backend.proxycore_backend_apply(batch_of([change(new.name, None, new)]))
            found["one new Service", services] = changed.operations

    for services in (100, most):
        with Namespace(f"lines-{services}") as namespace:
            namespace.call(lambda services=services: count(services))
    for what in ("one endpoint removed", "one new Service"):
        few, many = found[what, 100], found[what, most]
        yield Row(what=f"{what}, {variant}, {most:,} Services", value=many, unit="lines")
        yield Row(what=f"{what}, {variant}, {most:,} Services / 100", value=many / few, unit="x", bar=1.5)


def _connections(variant: str, services: int, *, full: bool) -> Iterator[Row]:
    """TCP connections from a node to the last Service, and to what is no Service: rules in a row, and as a tree."""
    layouts = {"no rules": None, "row": IN_A_ROW, "tree": AS_A_TREE}
    targets = {"the last Service": (cluster.cluster_ip(services - 1), 80), "no Service": (SERVER, 8080)}
    seconds: dict[tuple[str, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        nodes = {layout: _Node(stack, f"{variant}-{number}") for number, layout in enumerate(layouts)}
        states = [cluster.state(n, endpoints=1) for n in range(services)]
        for layout, options in layouts.items():
            if options is not None:
                nodes[layout].namespace.call(lambda options=options: _program(variant, options, states))
        settle()
        for _ in range(ROUNDS):
            for layout, node in nodes.items():
                for what, target in targets.items():
                    if layout != "no rules" or what == "no Service":
                        seconds.setdefault((layout, what), []).extend(node.connect(target))
    p50 = {key: percentile(found, 0.5) for key, found in seconds.items()}
    label = f"{variant}, {services:,} Services"
    for (layout, what), value in p50.items():
        yield Row(what=f"connection to {what}, {layout}, p50, {label}", value=value * 1e6, unit="us")
    bars = {"the last Service": 0.7, "no Service": 0.6} if full else {}
    for what in targets:
        yield Row(
            what=f"connection to {what}, tree / row, {label}",
            value=p50["tree", what] / p50["row", what],
            unit="x",
            bar=bars.get(what),
        )


def _program(variant: str, options: dict[str, Any], states: list[Any]) -> None:
    with _backend(variant, options) as backend:
        assert backend.proxycore_backend_apply(full_batch(states)).operations


class _Node:
    """A node and, at the other end of its link, a machine that has every pod's address."""

    def __init__(self, stack: contextlib.ExitStack, label: str) -> None:
        self.namespace = stack.enter_context(Namespace(f"node-{label}"))
        pods = stack.enter_context(Namespace(f"pods-{label}"))
        veth(self.namespace, "link", "02:00:00:00:00:02", pods, "link", "02:00:00:00:00:01")
        self.namespace.ip(
            ["address", "add", f"{NODE}/24", "dev", "link"],
            ["route", "add", "10.0.0.0/8", "via", SERVER],
            ["route", "add", "172.16.0.0/12", "via", SERVER],
        )
        pods.ip(
            ["address", "add", f"{SERVER}/24", "dev", "link"],
            ["route", "add", "local", "10.0.0.0/8", "dev", "lo"],
        )
        self._listener = stack.enter_context(pods.socket(socket.AF_INET, socket.SOCK_STREAM))
        self._listener.bind(("", 8080))
        self._listener.listen(2 * BURST)
        self._listener.setblocking(False)

    def connect(self, target: tuple[str, int]) -> list[float]:
        """Seconds that each connect() of a burst took."""
        return self.namespace.call(lambda: self._burst(target))

    def _burst(self, target: tuple[str, int]) -> list[float]:
        clock = time.perf_counter
        found, held = [], []
        for _ in range(BURST):
            client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            held.append(client)
            began = clock()
            client.connect(target)
            found.append(clock() - began)
        # The kernel finishes handshakes without us; a reset leaves nothing behind at either end.
        for client in held:
            client.close()
        with contextlib.suppress(BlockingIOError):
            while True:
                self._listener.accept()[0].close()
        return found
