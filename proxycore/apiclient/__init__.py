"""Requests to the Kubernetes API server: configuration, credentials, transport.

kubeconfig (what is configured) + execplugin (credentials) --> client --> connections (sockets that can be interrupted)
"""

from __future__ import annotations

from .client import (
    CONNECT_SECONDS,
    APIClient,
    Unreachable,
    allow_silence,
    chunks,
    connect,
    discard,
    jittered,
    read,
)
from .counts import BUCKETS, REQUESTS, Histogram, RequestCounts, Requests
from .limiter import Limiter

__all__ = [
    "BUCKETS",
    "CONNECT_SECONDS",
    "REQUESTS",
    "APIClient",
    "Histogram",
    "Limiter",
    "RequestCounts",
    "Requests",
    "Unreachable",
    "allow_silence",
    "chunks",
    "connect",
    "discard",
    "jittered",
    "read",
]
