"""The proxy's engine with its real threads and backend, fed from here; tells when the kernel has acknowledged."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from proxycore import logs
from proxycore.backend import ApplyResult
from proxycore.changes import ChangeBatch
from proxycore.decode import decode_bytes
from proxycore.dispatch import BackendRunner
from proxycore.engine import Engine
from proxycore.inbox import EngineSettings
from proxycore.objects import Kind
from proxycore.plugins import load_backend
from proxycore.runtime import SWITCH_INTERVAL_SECONDS
from proxycore.source import Applied, Event, Synced

from . import cluster

PAGE = 500
PATIENCE_SECONDS = 120.0
SETTLED_SECONDS = 1.5
"""After this the first verify is over, and with it what the engine does once after a full batch."""


class _Acknowledged:
    """Stands where the observers' threads stand and is called on the engine's, as each answer comes in."""

    name = "bench"

    def __init__(self) -> None:
        self.answers: SimpleQueue[tuple[float, ApplyResult]] = SimpleQueue()
        self.batches = 0
        self.changes = 0

    def start(self, context: Any) -> None: ...

    def applied(self, batch: ChangeBatch, result: ApplyResult, seconds: float) -> None:
        self.batches += 1
        self.changes += len(batch.changes)
        if result.failed or result.unsupported:
            raise AssertionError(f"not everything is in force: {result}")
        self.answers.put((time.perf_counter(), result))

    def failed(self, batch: ChangeBatch, result: ApplyResult, seconds: float) -> None:
        raise AssertionError(f"refused: {result.message}")

    def drift(self, verification: Any) -> None:
        raise AssertionError(f"drift: {verification}")

    def health(self, healthy: bool, reason: str) -> None: ...

    def close(self, timeout: float) -> bool:
        return True


class Live:
    """`services` Services with 10 endpoints each are in force when the context is entered."""

    def __init__(self, services: int) -> None:
        self.services = services
        sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
        # Entries are formatted and written, as in a real run.
        logs.configure(stream=open(os.devnull, "w"))  # noqa: SIM115
        logging.raiseExceptions = False
        self._told = _Acknowledged()
        cell = load_backend("nft")
        self._engine = Engine(
            settings=EngineSettings(node_name=cluster.NODE, families=("IPv4",)),
            host_of=lambda node, service_cidrs: cluster.HOST,
            backend=lambda deliver: BackendRunner(cell, deliver, log=logs.get("backend")),
            backend_info=cell.info,
            observers=lambda snapshot: [self._told],  # type: ignore[list-item]
            log=logs.get("engine"),
        )
        self._cell = cell
        self._thread = threading.Thread(target=self._engine.run, name="engine", daemon=True)

    @property
    def batches(self) -> int:
        return self._told.batches

    @property
    def changes(self) -> int:
        return self._told.changes

    def __enter__(self) -> Live:
        self._thread.start()
        for kind, make in (("Service", cluster.service), ("EndpointSlice", cluster.endpoint_slice)):
            for start in range(0, self.services, PAGE):
                page = range(start, min(start + PAGE, self.services))
                self._put(kind, [cluster.to_bytes(make(n)) for n in page])
        self._engine.sink.put([Synced()])
        self._wait()
        time.sleep(SETTLED_SECONDS)
        self.rest()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from proxycore.backend import BackendContext

        self._engine.stop()
        self._thread.join(10.0)
        self._cell.call(
            "proxycore_backend_cleanup", context=BackendContext(host=cluster.HOST, families=("IPv4",))
        )

    def _put(self, kind: Kind, raw: Sequence[bytes]) -> None:
        events: list[Event] = [Applied(decode_bytes(kind, data)) for data in raw]
        self._engine.sink.put(events)

    def _wait(self) -> float:
        """When the next answer came."""
        return self._told.answers.get(timeout=PATIENCE_SECONDS)[0]

    def put(self, slices: Sequence[bytes]) -> None:
        """Hand over slices as they come from the watch, and go on."""
        self._put("EndpointSlice", slices)

    def apply(self, slices: Sequence[bytes]) -> float:
        """Seconds from the bytes to the kernel's acknowledgement, as the engine learns of it."""
        began = time.perf_counter()
        self.put(slices)
        return self._wait() - began

    def rest(self) -> float:
        """Wait until the engine has nothing to do; how long ago that was when it began to rest.

        Seconds from the call to the last answer.
        """
        began = last = time.perf_counter()
        quiet = 0
        while quiet < 20:
            time.sleep(0.01)
            quiet += 1
            while not self._told.answers.empty():
                last = self._told.answers.get()[0]
                quiet = 0
        return max(0.0, last - began)
