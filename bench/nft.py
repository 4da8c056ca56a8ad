"""The nft backend: a node's first programming, one change through the whole proxy, many changes, a restart."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence

from proxycore.backend import BackendContext
from proxycore.changes import ChangeBatch, HostChange, ServiceChange, change
from proxycore.model import ServiceState
from proxycore_nft.backend import NftBackend
from proxycore_nft.kernel import NetlinkSocket

from . import cluster
from .live import Live
from .measure import median, memory_mb, percentile, settle, spent
from .report import Row

CONTEXT = BackendContext(host=cluster.HOST, families=("IPv4",))


class KernelClock:
    """CPU seconds inside NetlinkSocket.send(): the kernel works through a whole batch in there."""

    def __init__(self) -> None:
        self.seconds = 0.0
        send = NetlinkSocket.send

        def timed(socket: NetlinkSocket, data: bytes) -> None:
            began = time.thread_time()
            send(socket, data)
            self.seconds += time.thread_time() - began

        NetlinkSocket.send = timed  # type: ignore[method-assign]

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def run(*, full: bool) -> Iterator[Row]:
    gc.collect()
    gc.freeze()
    clock = KernelClock()
    for services in (1_000, 10_000, 30_000) if full else (1_000, 10_000):
        yield from _programming(services, clock, rounds=5 if full and services < 30_000 else 3)
    p50 = {}
    for services in (1_000, 10_000, 30_000) if full else (1_000, 10_000):
        with Live(services) as live:
            p50[services] = yield from _events(live, 2_000 if full else 1_000)
            if services == 10_000:
                yield from _sustained(live, 60 if full else 10)
    most = max(p50)
    yield Row(
        what=f"one event, p50 at {most:,} Services / at 1,000",
        value=p50[most] / p50[1_000],
        unit="x",
        bar=1.5,
    )


def batch_of(changes: Sequence[ServiceChange], *, first: bool = False) -> ChangeBatch:
    host = HostChange(before=None, after=cluster.HOST) if first else None
    return ChangeBatch(generation=1, changes=tuple(changes), host=host, full=first)


def full_batch(states: Sequence[ServiceState]) -> ChangeBatch:
    return batch_of([change(state.name, None, state) for state in states], first=True)


def _programming(services: int, clock: KernelClock, rounds: int) -> Iterator[Row]:
    """The backend alone: first load, restart, verify."""
    states = [cluster.state(n) for n in range(services)]
    label = f"{services:,} x {cluster.ENDPOINTS}"
    loads, ratios, starts, adopted, verifies = [], [], [], [], []
    for _ in range(rounds):
        settle()
        backend = NftBackend()
        backend.proxycore_backend_start(CONTEXT)
        batch = full_batch(states)
        clock.take()
        with spent() as load:
            backend.proxycore_backend_apply(batch)
        loads.append(load.wall)
        ratios.append(load.cpu / clock.take())
        backend.proxycore_backend_stop()
        backend = NftBackend()
        with spent() as start:
            backend.proxycore_backend_start(CONTEXT)
        starts.append(start.wall)
        with spent() as again:
            backend.proxycore_backend_apply(batch)
        adopted.append(start.wall + again.wall)
        if services <= 10_000:
            with spent() as verify:
                assert not backend.proxycore_backend_verify(True).drift
            verifies.append(verify.wall)
        backend.proxycore_backend_stop()
        backend.proxycore_backend_cleanup(CONTEXT)
    yield Row(what=f"first full programming, {label}", value=median(loads) * 1e3, unit="ms")
    # With 1,000 Services starting `nft` for the hooks is a third of it; the bar is for 10,000.
    yield Row(
        what=f"the same / the kernel's own commit time, {label}",
        value=median(ratios),
        unit="x CPU",
        bar=2 if services >= 10_000 else None,
    )
    yield Row(what=f"restart, reading what is there, {label}", value=median(starts) * 1e3, unit="ms")
    yield Row(what=f"restart until all is in force anew, {label}", value=median(adopted) * 1e3, unit="ms")
    if verifies:
        yield Row(what=f"verify, every element, {label}", value=median(verifies) * 1e3, unit="ms")


def _events(live: Live, count: int) -> Iterator[Row]:
    """Slices' bytes in, acknowledgement out, one after the other, through the engine and its threads."""
    label = f"{live.services:,} Services"
    for what, endpoints in (("one endpoint replaced", (10,)), ("endpoint count 10 to 9 and back", (9, 10))):
        raw = [
            cluster.to_bytes(
                cluster.endpoint_slice(
                    i // len(endpoints) * 7 % live.services,
                    shift=i + 1,
                    endpoints=endpoints[i % len(endpoints)],
                )
            )
            for i in range(count)
        ]
        live.apply(raw[:1])  # a class that is used for the first time is made then
        live.rest()
        settle()
        walls = []
        with spent() as total:
            for data in raw[1:]:
                walls.append(live.apply([data]))
        bars = what.startswith("one")
        p50, p99 = percentile(walls, 0.5), percentile(walls, 0.99)
        yield Row(what=f"{what}, p50, {label}", value=p50 * 1e3, unit="ms", bar=1 if bars else None)
        yield Row(what=f"{what}, p99, {label}", value=p99 * 1e3, unit="ms", bar=5 if bars else None)
        yield Row(what=f"{what}, slowest of {len(walls):,}, {label}", value=max(walls) * 1e3, unit="ms")
        yield Row(
            what=f"{what}, CPU, {label}",
            value=total.cpu / len(walls) * 1e3,
            unit="ms CPU",
            bar=1 if bars else None,
        )
        if bars:
            result = p50
    cpus = []
    for shift in range(1, 6):
        raw = [cluster.to_bytes(cluster.endpoint_slice(n, shift=50_000 + shift)) for n in range(1_000)]
        settle()
        with spent() as many:
            live.apply(raw)
        cpus.append(many.cpu)
    yield Row(
        what=f"1,000 Services changed at once, {label}", value=median(cpus) * 1e3, unit="ms CPU", bar=150
    )
    return result


def _sustained(live: Live, seconds: int) -> Iterator[Row]:
    """A thousand slices a second, each with another endpoint; they are made beforehand."""
    rate = 1_000
    # Two rings, so that no slice says what the one before it said.
    raw = [
        cluster.to_bytes(cluster.endpoint_slice(i * 13 % live.services, shift=100_000 + i))
        for i in range(2 * live.services)
    ]
    settle()
    live.rest()
    before = memory_mb()
    began = time.perf_counter()
    with spent() as total:
        batches, changes = live.batches, live.changes
        for i in range(rate * seconds):
            late = began + i / rate - time.perf_counter()
            if late > 0:
                time.sleep(late)
            live.put([raw[i % len(raw)]])
        offered = time.perf_counter() - began
        lag = live.rest()
    assert live.changes - changes > 0.99 * rate * seconds
    label = f"{rate:,} changes/s for {seconds} s"
    yield Row(
        what=f"{label}: time to offer them", value=offered, unit="s", bar=seconds * 1.01, note="kept up with"
    )
    yield Row(what=f"{label}: from the last one to rest", value=lag * 1e3, unit="ms", bar=100)
    yield Row(what=f"{label}: CPU", value=total.cpu / total.wall * 100, unit="% of a core", bar=60)
    yield Row(what=f"{label}: batches", value=(live.batches - batches) / seconds, unit="a second")
    yield Row(what=f"{label}: memory gained", value=memory_mb() - before, unit="MB", bar=5)
