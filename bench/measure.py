"""Clocks, medians and memory."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class Spent:
    """Seconds that a block took: of the wall clock, and on a processor, threads and ended children included."""

    wall = 0.0
    cpu = 0.0


@contextmanager
def spent() -> Iterator[Spent]:
    found = Spent()
    cpu, wall = _cpu(), time.perf_counter()
    try:
        yield found
    finally:
        found.wall = time.perf_counter() - wall
        found.cpu = _cpu() - cpu


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def settle() -> None:
    """Leave no garbage of an earlier run to be collected in a later one."""
    gc.collect()


def memory_mb(pid: int | str = "self", field: str = "VmRSS") -> float:
    """Resident memory of a process in MB of 10^6 bytes; `VmHWM` is the most it ever was."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"no {field} in the status of process {pid}")
