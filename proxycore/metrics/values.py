"""Values of metrics as plain data."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

Type = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]
"""Values of a family's labels, in its order."""


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """One metric: its full name as it is exposed, `_total` of a counter included, and its labels.

    `buckets`: upper bounds of a histogram, without the infinite one.  `modes`: kube-proxy's modes that have it, empty: all.
    """

    name: str
    type: Type
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    modes: tuple[str, ...] = ()


class Histogram:
    """How many observations fell below or at each bound.  For one thread at a time."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        """Of each bucket alone; the last one has no upper bound."""
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> Histogram:
        """As it is now."""
        same = Histogram(self.bounds)
        same.counts, same.sum = self.counts.copy(), self.sum
        return same

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.counts)


Samples = Mapping[Any, "float | Histogram"]
"""A family's values by their Labels; `()` for one without labels."""
Values = Mapping[str, Samples]
"""Samples by the family's name; a family that is missing has none now."""


def one(value: float) -> Samples:
    """Samples of a family without labels."""
    return {(): value}
