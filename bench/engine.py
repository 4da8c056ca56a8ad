"""What our code adds to decoding: 10,000 Services with 10 endpoints each, from the bytes of single objects.

The same chunk of objects is decoded by msgspec alone and then taken in by us, in turn: what disturbs the machine for a
moment disturbs both.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import msgspec

from proxycore.decode import decode_bytes
from proxycore.delta import Ledger
from proxycore.desired import Desired
from proxycore.objects import EndpointSlice, Kind, Service
from proxycore.source import Applied

from . import cluster
from .measure import median, settle
from .report import Row

SERVICES = 10_000
CHUNK = 500
"""Objects on a page of a list."""
_ALONE = {
    "Service": msgspec.json.Decoder(Service).decode,
    "EndpointSlice": msgspec.json.Decoder(EndpointSlice).decode,
}
_cpu = time.process_time


def run(*, full: bool) -> Iterator[Row]:
    raw: list[tuple[Kind, bytes]] = [
        ("Service", cluster.to_bytes(cluster.service(n))) for n in range(SERVICES)
    ]
    raw += [("EndpointSlice", cluster.to_bytes(cluster.endpoint_slice(n))) for n in range(SERVICES)]
    gc.collect()
    gc.freeze()
    rounds = []
    for _ in range(15 if full else 9):
        rounds.append(_round(raw))
        settle()
    alone = [one[0] for one in rounds]
    size = sum(len(data) for _, data in raw) / 1e6
    yield Row(
        what="msgspec alone",
        value=median(alone) * 1e3,
        unit="ms CPU",
        note=f"{size:.0f} MB of JSON, 100,000 endpoints",
    )
    yield Row(what="decode and index", value=median([one[1] / one[0] for one in rounds]), unit="x", bar=3)
    yield Row(
        what="decode, index, resolve and diff",
        value=median([sum(one[1:]) / one[0] for one in rounds]),
        unit="x",
        bar=6,
    )
    yield Row(
        what="resolve and diff",
        value=median([one[2] for one in rounds]) / SERVICES * 1e6,
        unit="us CPU a Service",
    )


def _round(raw: list[tuple[Kind, bytes]]) -> tuple[float, float, float]:
    """CPU seconds of msgspec alone, of decode and index, of resolve and diff."""
    desired = Desired(cluster.NODE)
    desired.handle((), cluster.HOST)
    alone = index = 0.0
    for start in range(0, len(raw), CHUNK):
        chunk = raw[start : start + CHUNK]
        began = _cpu()
        objects = [_ALONE[kind](data) for kind, data in chunk]
        alone += _cpu() - began
        del objects
        began = _cpu()
        desired.handle([Applied(decode_bytes(kind, data)) for kind, data in chunk], arrived=1.0)
        index += _cpu() - began
    ledger = Ledger()
    ledger.update_host(cluster.HOST)
    began = _cpu()
    ledger.update(desired.take(), 1.0)
    batch = ledger.batch(0.0, full=True, reason="start")
    resolve = _cpu() - began
    assert batch is not None
    assert len(batch.changes) == len(raw) // 2
    return alone, index, resolve
