"""IPVS and ipset: batches by netlink beside pyroute2 and the tools, which do one thing at a time or are processes.

Where the host's kernel has no IPVS, that part runs in a guest of user-mode Linux: its ratios mean something, its
seconds are the guest's.  Nothing is deleted and loaded again in one namespace: what is deleted stays in the kernel's way
for a while.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from proxycore.kernel import ipvs
from proxycore.testing.netns import Namespace
from proxycore.testing.uml import guest
from proxycore_ipvs.kernel import Kernel, NetlinkKernel, read_all
from proxycore_ipvs.plain import PlainKernel
from proxycore_ipvs.plainsets import PlainSets
from proxycore_ipvs.servers import (
    AddDestination,
    AddServer,
    ByMark,
    DeleteDestination,
    Destination,
    Operation,
    Server,
    SetDestination,
)
from proxycore_ipvs.setkernel import NetlinkSets, Sets
from proxycore_ipvs.sets import Entry, Mark, SetSpec, line

from . import cluster
from .measure import median, settle, spent
from .report import Row

T = TypeVar("T")
PLAIN_SERVERS, PLAIN_ENTRIES, ONES = 50, 500, 30
GUEST_SECONDS = 500


def run(*, full: bool) -> Iterator[Row]:
    yield from _sets(100_000 if full else 20_000)
    if ipvs.there():
        yield from _servers(full=full)
        return
    reason = guest.problem()
    if reason is not None:
        print(
            f"bench: IPVS is left out: the kernel has none, and there is no guest: {reason}", file=sys.stderr
        )
        return
    command = [sys.executable, "-m", "bench.ipvs", "full" if full else "quick"]
    done = guest.run(command, timeout=GUEST_SECONDS, directory=Path(__file__).parents[1])
    if done.status:
        raise RuntimeError(f"the guest ended with {done.status}: {done.stderr.decode()[-2000:]}")
    for text in done.stdout.splitlines():
        row = msgspec.json.decode(text, type=Row)
        yield msgspec.structs.replace(row, note=", ".join(filter(None, (row.note, "in a guest"))))


def _inside(function: Callable[[], T]) -> T:
    """In a network namespace of its own."""
    settle()
    with Namespace("bench") as namespace:
        return namespace.call(function)


# -- IP sets --


def _sets(count: int) -> Iterator[Row]:
    spec = SetSpec("bench", "hash:ip,port", skbinfo=True, max_entries=1 << 20)
    members: dict[Entry, Mark | None] = {
        Entry(cluster.cluster_ip(n), "TCP", 80): Mark(0x48000000 + n) for n in range(count)
    }
    few = dict(list(members.items())[:PLAIN_ENTRIES])
    one = dict(list(members.items())[-1:])

    def fill(sets: Sets, content: dict[Entry, Mark | None]) -> tuple[float, float, float]:
        """Seconds to add all, to read all, and of one deletion and addition."""
        sets.create(spec)
        with spent() as adding:
            assert sets.add(spec, content) == ()
        with spent() as reading:
            assert len(sets.members(spec)) == len(content)
        singles = []
        for _ in range(ONES):
            with spent() as single:
                sets.delete(spec, one)
                sets.add(spec, one)
            singles.append(single.wall)
        return adding.wall, reading.wall, median(singles)

    def by_ipset() -> float:
        text = "\n".join([str(spec), *(line(spec.name, entry, mark) for entry, mark in members.items()), ""])
        with spent() as loading:
            subprocess.run(["ipset", "restore"], input=text, text=True, check=True)
        return loading.wall

    add, read, single = _inside(lambda: fill(NetlinkSets(), members))
    slow_add, slow_read, slow_single = _inside(lambda: fill(PlainSets(), few))
    tool = _inside(by_ipset)
    label = f"hash:ip,port with marks, {count:,}"
    yield Row(what=f"entries added, {label}", value=count / add, unit="/s")
    yield Row(what=f"entries read, {label}", value=count / read, unit="/s")
    yield Row(what="one entry deleted and added", value=single * 1e6, unit="us")
    ratios = (
        ("entries added, pyroute2 / batch, each", slow_add / len(few) / (add / count), 20.0),
        ("entries added, ipset restore / batch", tool / add, 1.0),
        ("entries read, pyroute2 / batch, each", slow_read / len(few) / (read / count), 5.0),
        ("one entry, pyroute2 / batch", slow_single / single, 3.0),
    )
    for what, value, bar in ratios:
        yield Row(what=what, value=value, unit="x", bar=bar, sense=">=")


# -- IPVS --


def _key(number: int) -> ByMark:
    return ByMark("IPv4", 0x40000000 + number + 1)


def _destination(number: int, nth: int, weight: int = 1) -> Destination:
    return Destination(cluster.pod_ip(number * cluster.ENDPOINTS + nth), 8080, weight)


def _additions(services: int) -> list[Operation]:
    found: list[Operation] = [AddServer(Server(_key(n))) for n in range(services)]
    found += (
        AddDestination(_key(n), _destination(n, nth))
        for n in range(services)
        for nth in range(cluster.ENDPOINTS)
    )
    return found


def _fill(kernel: Kernel, services: int) -> tuple[float, float, float, float]:
    """Seconds to add all, to read all, of one destination's weight set, and of one destination deleted."""
    operations = _additions(services)
    gc.collect()
    with spent() as loading:
        assert kernel.run(operations) == ()
    with spent() as reading:
        found = read_all(kernel)
    assert sum(len(destinations) for _, destinations in found.values()) == services * cluster.ENDPOINTS
    weights, deletions = [], []
    for n in range(ONES):
        with spent() as one:
            assert kernel.run([SetDestination(_key(n), _destination(n, 3, weight=0))]) == ()
        weights.append(one.wall)
        gone = _destination(n, 3)
        with spent() as one:
            assert kernel.run([DeleteDestination(_key(n), gone.address, gone.port)]) == ()
        deletions.append(one.wall)
    return loading.wall, reading.wall, median(weights), median(deletions)


def _by_ipvsadm(services: int) -> float:
    text = "".join(f"{operation}\n" for operation in _additions(services))
    with spent() as loading:
        subprocess.run(["ipvsadm", "-R"], input=text, text=True, check=True)
    return loading.wall


def _servers(*, full: bool) -> Iterator[Row]:
    services = 10_000 if full else 2_000
    few, some = PLAIN_SERVERS, services // 20
    load, read, weight, deletion = _inside(lambda: _fill(NetlinkKernel(), services))
    slow_load, slow_read, slow_weight, slow_deletion = _inside(lambda: _fill(PlainKernel(), few))
    tool = _inside(lambda: _by_ipvsadm(some))
    label = f"{services:,} x {cluster.ENDPOINTS}"
    yield Row(what=f"full load, {label}", value=load, unit="s")
    yield Row(what=f"read back, {label}", value=read, unit="s")
    yield Row(what=f"weight of one destination, {label}", value=weight * 1e6, unit="us")
    yield Row(what=f"one destination deleted, {label}", value=deletion * 1e6, unit="us")
    ratios = (
        ("full load, pyroute2 / batch, each", slow_load / few / (load / services), 20.0),
        ("full load, ipvsadm -R / batch, each", tool / some / (load / services), 5.0),
        ("read back, pyroute2 / batch, each", slow_read / few / (read / services), 5.0),
        ("weight of one destination, pyroute2 / batch", slow_weight / weight, 3.0),
        ("one destination deleted, pyroute2 / batch", slow_deletion / deletion, 3.0),
    )
    for what, value, bar in ratios:
        yield Row(what=what, value=value, unit="x", bar=bar, sense=">=")


def _main() -> None:
    """In the guest: rows to standard output, one JSON text a line."""
    with os.fdopen(os.dup(1), "wb", buffering=0) as out:
        for row in _servers(full=sys.argv[1:] == ["full"]):
            out.write(msgspec.json.encode(row) + b"\n")


if __name__ == "__main__":
    _main()
