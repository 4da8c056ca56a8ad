"""Requests to the API server, counted by its client."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

from .families import REQUEST
from .values import Histogram, Labels, Values

CLIENT = "proxycore.apiclient"


class _Durations(Protocol):
    """`counts`: how many were at most each bound of REQUEST; the last one: all."""

    @property
    def counts(self) -> Sequence[int]: ...
    @property
    def sum(self) -> float: ...


class _Counts(Protocol):
    """`requests` by code, method and host; `durations` by verb and host."""

    @property
    def requests(self) -> Mapping[tuple[str, str, str], int]: ...
    @property
    def durations(self) -> Mapping[tuple[str, str], _Durations]: ...


def values() -> Values:
    """All that is declared as REQUESTS; nothing where no client of the API server is loaded: it is not for us to load it."""
    client = sys.modules.get(CLIENT)
    return of_counts(client.REQUESTS.snapshot()) if client is not None else {}


def of_counts(counts: _Counts) -> Values:
    """The client's counts as values."""
    requests: dict[Labels, float] = dict(counts.requests.items())
    durations: dict[Labels, Histogram] = {}
    for labels, taken in counts.durations.items():
        histogram = durations[labels] = Histogram(REQUEST)
        histogram.counts = [later - earlier for earlier, later in pairwise((0, *taken.counts))]
        histogram.sum = taken.sum
    return {
        "rest_client_requests_total": requests,
        "rest_client_request_duration_seconds": durations,
    }
